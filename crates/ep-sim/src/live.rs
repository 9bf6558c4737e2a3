//! What a simulated process holds.

/// Objects that were acquired and not given up.
///
/// A call that an injected fault refuses has done nothing: an object whose release was refused is
/// still held, and a caller cannot help it. [`injected_leaks`](Self::injected_leaks) counts those,
/// with what they keep: the reservation around a stuck mapping, the descriptor behind a stuck
/// handle. So after a fault in a clean-up call, ask [`is_explained`](Self::is_explained).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Live {
    /// Physical allocations, created or imported.
    pub handles: usize,
    /// Reserved address ranges.
    pub reservations: usize,
    /// Mappings in reserved ranges.
    pub mappings: usize,
    /// Plain device allocations.
    pub allocations: usize,
    /// Opened IPC handles, each opening counted.
    pub ipc: usize,
    /// Page-locked host allocations.
    pub host: usize,
    /// Streams.
    pub streams: usize,
    /// Events.
    pub events: usize,
    /// Memory files behind handles, mappings, allocations and IPC handles; each is one descriptor.
    pub descriptors: usize,
    /// How many of all these are still there because an injected fault refused to release them.
    pub injected_leaks: usize,
}

impl Live {
    /// Number of objects held, descriptors included.
    pub fn total(&self) -> usize {
        self.handles
            + self.reservations
            + self.mappings
            + self.allocations
            + self.ipc
            + self.host
            + self.streams
            + self.events
            + self.descriptors
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.total() == 0
    }

    /// Whether nothing is held but what injected faults refused to release.
    pub fn is_explained(&self) -> bool {
        self.total() == self.injected_leaks
    }
}
