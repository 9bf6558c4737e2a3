//! What the operations have in common: peers, epochs, deadlines and faults.

use std::hint;
use std::thread;
use std::time::{Duration, Instant};

use super::check::Dims;
use super::memory::{GroupMemory, Window};
use super::wire::{Guarded, Regions, pair};
use crate::Shape;
use crate::ffi::{
    self, EP_ABORTED, EP_FAULT_ABORTED, EP_FAULT_BYTES, EP_FAULT_RING, EP_FAULT_TIMEOUT,
    EP_FAULT_UNREACHABLE, EP_OP_BARRIER, EP_OP_COMBINE, EP_OP_DISPATCH, ep_group, ep_layout,
};

/// The group during one operation.
#[derive(Debug)]
pub(super) struct Group<'a> {
    pub(super) dims: &'a Dims,
    pub(super) regions: Regions<'a>,
    memory: GroupMemory,
    /// The participation table as the operation found it.
    active: Vec<bool>,
    start: Instant,
    timeout: Duration,
}

/// What can be done with a rank.
#[derive(Clone, Copy, Debug)]
pub(super) enum Peer<'a> {
    /// It takes part.
    Present(&'a Window),
    /// It does not take part: nothing is sent to it or expected from it.
    Masked,
    /// Its entry of the peer table is null.
    Unreachable,
}

/// A part of an operation, with an epoch of its own so that parts can be launched apart.
#[derive(Clone, Copy, Debug)]
pub(super) enum Counter {
    DispatchSend,
    DispatchRecv,
    CombineSend,
    CombineRecv,
    Barrier,
    /// Not a part: the sequence of the fault ring.
    Faults,
}

impl Counter {
    fn op(self) -> u32 {
        match self {
            Self::DispatchSend | Self::DispatchRecv => EP_OP_DISPATCH,
            Self::CombineSend | Self::CombineRecv => EP_OP_COMBINE,
            Self::Barrier | Self::Faults => EP_OP_BARRIER,
        }
    }

    /// Its word in the control block.
    fn at(self, shape: &Shape) -> u64 {
        shape.control_part(self as u64)
    }
}

impl<'a> Group<'a> {
    /// Starts the clock and reads the participation table.
    pub(super) fn new(
        group: &ep_group,
        layout: &'a ep_layout,
        dims: &'a Dims,
        memory: GroupMemory,
    ) -> Self {
        let active = |rank| memory.control.load_u32(4 * rank as u64) != 0;
        Self {
            dims,
            regions: Regions(layout),
            active: (0..dims.ranks).map(active).collect(),
            memory,
            start: Instant::now(),
            timeout: Duration::from_nanos(group.timeout_ns),
        }
    }

    pub(super) fn peer(&self, rank: usize) -> Peer<'_> {
        match &self.memory.buffers[rank] {
            None => Peer::Unreachable,
            Some(_) if !self.active[rank] => Peer::Masked,
            Some(window) => Peer::Present(window),
        }
    }

    /// Ranks that take part, ascending.
    pub(super) fn present(&self) -> impl Iterator<Item = (usize, &Window)> {
        (0..self.dims.ranks).filter_map(|rank| match self.peer(rank) {
            Peer::Present(window) => Some((rank, window)),
            Peer::Masked | Peer::Unreachable => None,
        })
    }

    /// This rank's own buffer, where the peers write.
    pub(super) fn own(&self) -> Option<&Window> {
        self.memory.buffers[self.dims.rank].as_ref()
    }

    /// Begins a part: advances its epoch.
    pub(super) fn begin(&self, counter: Counter) -> Part<'_> {
        let epoch = self.memory.control.increment(counter.at(&self.dims.shape));
        Part {
            group: self,
            op: counter.op(),
            epoch,
        }
    }

    /// Restarts the clock, after a pause that is not part of the waits.
    pub(super) fn restart_clock(&mut self) {
        self.start = Instant::now();
    }

    /// Polls until something is settled or the operation's time is up; whether it arrived.
    pub(super) fn wait(&self, mut poll: impl FnMut() -> Progress) -> bool {
        let mut pause = Pause::default();
        loop {
            match poll() {
                Progress::Arrived => return true,
                Progress::Passed => return false,
                Progress::Pending => {}
            }
            if self.is_aborted() || self.start.elapsed() >= self.timeout {
                return false;
            }
            pause.take();
        }
    }

    /// Whether the host has called operations off.
    fn is_aborted(&self) -> bool {
        let [first, ..] = self.dims.shape.control_waits();
        self.memory.control.load(first) == EP_ABORTED.into()
    }

    /// Nanoseconds since the start of the launch, from which the time-out counts too.
    pub(super) fn waited_ns(&self) -> i64 {
        i64::try_from(self.start.elapsed().as_nanos()).unwrap_or(i64::MAX)
    }
}

/// What a poll found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Pending,
    Arrived,
    /// The peer is already in a later operation: it gave this rank up, and waiting is in vain. To
    /// see that at once is how a rank that was slow catches up with the others.
    Passed,
}

/// A part of an operation that is running.
#[derive(Debug)]
pub(super) struct Part<'g> {
    pub(super) group: &'g Group<'g>,
    op: u32,
    pub(super) epoch: u64,
}

impl Part<'_> {
    /// How far the data are, by their flag in this rank's own buffer.
    pub(super) fn progress(&self, own: &Window, data: Guarded) -> Progress {
        match own.load(data.flag()) {
            flag if flag == self.epoch => Progress::Arrived,
            flag if flag > self.epoch => Progress::Passed,
            _ => Progress::Pending,
        }
    }

    /// Waits for the flag of this operation in this rank's own buffer.
    pub(super) fn wait_for(&self, own: &Window, data: Guarded) -> bool {
        self.group.wait(|| self.progress(own, data))
    }

    /// Whether what was read behind a flag was whole.
    pub(super) fn whole(&self, own: &Window, data: Guarded) -> bool {
        own.unchanged(data.flag(), self.epoch)
    }

    /// Writes data and then their flag into a peer's buffer.
    pub(super) fn push(&self, peer: &Window, data: Guarded, write: impl FnOnce(&Window)) {
        peer.begin(data.flag());
        write(peer);
        peer.publish(data.flag(), self.epoch);
    }

    /// Reports that a peer was given up in a phase.
    pub(super) fn timed_out(&self, phase: u32, peer: usize) {
        let (fault, value) = if self.group.is_aborted() {
            (EP_FAULT_ABORTED, 0)
        } else {
            (EP_FAULT_TIMEOUT, self.group.waited_ns())
        };
        self.report(Fault {
            fault,
            phase,
            peer,
            token: 0,
            value,
        });
    }

    /// Reports that there is no way to a peer.
    pub(super) fn unreachable(&self, phase: u32, peer: usize, token: usize) {
        self.report(Fault {
            fault: EP_FAULT_UNREACHABLE,
            phase,
            peer,
            token,
            value: 0,
        });
    }

    /// Writes a record into the fault ring.
    pub(super) fn report(&self, fault: Fault) {
        let group = self.group;
        let sequence = group
            .memory
            .control
            .increment(Counter::Faults.at(&group.dims.shape));
        let ring = &group.memory.faults;
        let at = (sequence - 1) % u64::from(EP_FAULT_RING) * u64::from(EP_FAULT_BYTES);
        let words = [
            self.epoch,
            pair(fault.fault, self.op),
            pair(fault.phase, fault.peer as u32),
            fault.token as u64,
            fault.value as u64,
        ];
        ring.begin(at);
        for (word, at) in words.into_iter().zip((at + 8..).step_by(8)) {
            ring.store_relaxed(at, word);
        }
        ring.publish(at, sequence);
    }
}

/// What a record of the fault ring says beyond its operation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    pub(super) fault: u32,
    pub(super) phase: u32,
    pub(super) peer: usize,
    pub(super) token: usize,
    pub(super) value: i64,
}

// The words of `Part::report` are the struct of the header.
const _: () = {
    use std::mem::offset_of;
    assert!(offset_of!(ffi::ep_fault, sequence) == 0);
    assert!(offset_of!(ffi::ep_fault, epoch) == 8);
    assert!(offset_of!(ffi::ep_fault, fault) == 16);
    assert!(offset_of!(ffi::ep_fault, op) == 20);
    assert!(offset_of!(ffi::ep_fault, phase) == 24);
    assert!(offset_of!(ffi::ep_fault, peer) == 28);
    assert!(offset_of!(ffi::ep_fault, token) == 32);
    assert!(offset_of!(ffi::ep_fault, value) == 40);
    assert!(size_of::<ffi::ep_fault>() == EP_FAULT_BYTES as usize);
};

/// How a wait spends its time: ranks may outnumber cores, so the processor is soon given away.
#[derive(Debug, Default)]
struct Pause {
    taken: u32,
}

impl Pause {
    const SPINS: u32 = 64;
    const YIELDS: u32 = 256;
    const SLEEP: Duration = Duration::from_micros(50);

    fn take(&mut self) {
        self.taken = self.taken.saturating_add(1);
        if self.taken <= Self::SPINS {
            hint::spin_loop();
        } else if self.taken <= Self::SPINS + Self::YIELDS {
            thread::yield_now();
        } else {
            thread::sleep(Self::SLEEP);
        }
    }
}
