//! Where things lie in a symmetric buffer, and what a row says in front of its payload.

use crate::ffi::{EP_LINE_BYTES, ep_layout};

// Packets and entries are words whose halves other languages read as two fields.
const _: () = assert!(cfg!(target_endian = "little"));

/// Bytes of the flag in front of rows, weights and partials.
const FLAG_BYTES: u64 = 8;

/// Offsets of a buffer with a layout.
#[derive(Clone, Copy, Debug)]
pub(super) struct Regions<'a>(pub(super) &'a ep_layout);

impl Regions<'_> {
    /// The packets that `source` writes in an operation: rows, then tokens per local expert.
    pub(super) fn counts(&self, epoch: u64, source: usize) -> u64 {
        let l = self.0;
        l.counts
            + epoch % u64::from(l.ring) * l.counts_ring_stride
            + source as u64 * l.counts_source_stride
    }

    /// A row that `source` writes in an operation.
    pub(super) fn row(&self, epoch: u64, source: usize, slot: usize) -> Guarded {
        let l = self.0;
        Guarded(
            l.rows
                + epoch % u64::from(l.ring) * l.rows_ring_stride
                + source as u64 * l.rows_source_stride
                + slot as u64 * l.row_stride,
        )
    }

    /// The payload of a row, behind its header lines.
    pub(super) fn payload(&self, row: Guarded) -> u64 {
        row.flag() + u64::from(self.0.header_lines) * u64::from(EP_LINE_BYTES)
    }

    /// The weights that `source` gives for one of its rows.
    pub(super) fn weights(&self, handle_slot: usize, source: usize, slot: usize) -> Guarded {
        let l = self.0;
        Guarded(
            l.weights
                + handle_slot as u64 * l.weights_slot_stride
                + source as u64 * l.weights_source_stride
                + slot as u64 * l.weight_stride,
        )
    }

    /// The partial sum that `owner` returns for one of the rows it got.
    pub(super) fn partial(&self, handle_slot: usize, owner: usize, slot: usize) -> Guarded {
        let l = self.0;
        Guarded(
            l.partials
                + handle_slot as u64 * l.partials_slot_stride
                + owner as u64 * l.partials_source_stride
                + slot as u64 * l.partial_stride,
        )
    }

    /// The barrier word of a source.
    pub(super) fn barrier(&self, source: usize) -> u64 {
        self.0.barrier + source as u64 * u64::from(EP_LINE_BYTES)
    }
}

/// Data behind a flag word, which holds the epoch of the operation that wrote them.
///
/// The lines of the CUDA wire carry a flag each; here one is enough, and takes the place that theirs
/// leave.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guarded(u64);

impl Guarded {
    pub(super) fn flag(self) -> u64 {
        self.0
    }

    pub(super) fn data(self) -> u64 {
        self.0 + FLAG_BYTES
    }
}

/// Two 32-bit fields of a word, the first in memory first.
pub(super) fn pair(first: u32, second: u32) -> u64 {
    u64::from(first) | u64::from(second) << 32
}

/// The fields of a [`pair`].
pub(super) fn unpair(word: u64) -> (u32, u32) {
    (word as u32, (word >> 32) as u32)
}

/// An entry of a row: one of the token's experts, here.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Entry {
    /// Expert, counted on its rank.
    pub(super) expert: u32,
    /// Which of the token's top-k it is.
    pub(super) k: u32,
    /// Tokens that the source sent this expert before.
    pub(super) position: u32,
    pub(super) weight: f32,
}

impl Entry {
    pub(super) fn pack(self) -> u64 {
        pair(
            self.expert | self.k << 11 | self.position << 16,
            self.weight.to_bits(),
        )
    }

    pub(super) fn unpack(word: u64) -> Self {
        let (place, weight) = unpair(word);
        Self {
            expert: place & 0x7ff,
            k: place >> 11 & 0x1f,
            position: place >> 16,
            weight: f32::from_bits(weight),
        }
    }
}

/// Where a token went: nowhere, for an entry of `route`.
pub(super) const NO_ROUTE: u32 = u32::MAX;

/// An entry of `route`: the owner of the expert, and the token's slot there.
pub(super) fn route(owner: usize, slot: usize) -> u32 {
    (owner as u32) << 16 | slot as u32
}

/// The owner and the slot of an entry of `route` that is not [`NO_ROUTE`].
pub(super) fn unroute(route: u32) -> (usize, usize) {
    ((route >> 16) as usize, (route & 0xffff) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ffi::{EP_MAX_LOCAL_EXPERTS, EP_MAX_RANKS, EP_MAX_TOKENS, EP_MAX_TOP_K};

    #[test]
    fn entries_hold_the_largest_values() {
        for entry in [
            Entry {
                expert: 0,
                k: 0,
                position: 0,
                weight: 0.0,
            },
            Entry {
                expert: EP_MAX_LOCAL_EXPERTS - 1,
                k: EP_MAX_TOP_K - 1,
                position: EP_MAX_TOKENS - 1,
                weight: -1.5,
            },
            Entry {
                expert: 0,
                k: EP_MAX_TOP_K - 1,
                position: 0,
                weight: f32::MIN_POSITIVE,
            },
        ] {
            assert_eq!(Entry::unpack(entry.pack()), entry);
        }
    }

    #[test]
    fn routes_hold_the_largest_values() {
        let last = (EP_MAX_RANKS as usize - 1, EP_MAX_TOKENS as usize - 1);
        assert_ne!(route(last.0, last.1), NO_ROUTE);
        assert_eq!(unroute(route(last.0, last.1)), last);
    }
}
