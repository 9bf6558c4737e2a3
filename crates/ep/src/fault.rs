//! What operations report while they run.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ep_kernels::Kernel;
use ep_kernels::ffi::{self, EP_FAULT_BYTES, EP_FAULT_RING};
use ep_sys::vmm::HostBuffer;
use ep_sys::{DeviceOrdinal, Driver};

use crate::{Device, Error};

/// An operation of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Tokens to their experts' ranks.
    Dispatch,
    /// Expert outputs back to the tokens' ranks.
    Combine,
    /// All ranks meet on the device.
    Barrier,
}

impl Operation {
    pub(crate) fn kernel(self) -> Kernel {
        match self {
            Self::Dispatch => Kernel::Dispatch,
            Self::Combine => Kernel::Combine,
            Self::Barrier => Kernel::Barrier,
        }
    }

    fn from_code(code: u32) -> Option<Self> {
        match code {
            ffi::EP_OP_DISPATCH => Some(Self::Dispatch),
            ffi::EP_OP_COMBINE => Some(Self::Combine),
            ffi::EP_OP_BARRIER => Some(Self::Barrier),
            _ => None,
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.kernel(), f)
    }
}

/// The part of an operation that reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Sending.
    Send,
    /// Waiting for how many rows a peer sends.
    Counts,
    /// Waiting for a peer's rows.
    Rows,
    /// Waiting for weights that a peer gives with its combine.
    Weights,
    /// Waiting for a peer's sums.
    Partials,
    /// Waiting at the barrier.
    Barrier,
    /// A number that this version has no name for.
    Other(u32),
}

impl Phase {
    fn from_code(code: u32) -> Self {
        match code {
            ffi::EP_PHASE_SEND => Self::Send,
            ffi::EP_PHASE_COUNTS => Self::Counts,
            ffi::EP_PHASE_ROWS => Self::Rows,
            ffi::EP_PHASE_WEIGHTS => Self::Weights,
            ffi::EP_PHASE_PARTIALS => Self::Partials,
            ffi::EP_PHASE_BARRIER => Self::Barrier,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Send => f.write_str("to accept rows"),
            Self::Counts => f.write_str("for its counts"),
            Self::Rows => f.write_str("for its rows"),
            Self::Weights => f.write_str("for its weights"),
            Self::Partials => f.write_str("for its sums"),
            Self::Barrier => f.write_str("at the barrier"),
            Self::Other(phase) => write!(f, "in phase {phase}"),
        }
    }
}

/// Something that an operation met, and went on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fault {
    /// Its number on this rank, from 1.
    pub sequence: u64,
    /// The operation.
    pub operation: Operation,
    /// The operation's number on the device, counted per kind from 1.
    pub epoch: u64,
    /// What happened.
    pub kind: FaultKind,
    /// The part of the operation.
    pub phase: Phase,
    /// The rank that was waited for or cannot be reached; for a bad expert the rank whose token it
    /// is.
    pub rank: u32,
}

/// What an operation met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultKind {
    /// A rank did not come in time. It was given up for this operation: what it sent is missing from
    /// the result.
    Timeout {
        /// How long it was waited for.
        waited: Duration,
    },
    /// [`Buffer::abort`](crate::Buffer::abort) ended the wait for a rank. It was given up for this
    /// operation, as by the time-out.
    Aborted,
    /// An expert id that the layer does not have. It was skipped, like -1.
    ExpertOutOfRange {
        /// The token.
        token: u64,
        /// The id.
        id: i64,
    },
    /// A token names an expert twice. It was counted once.
    ExpertRepeated {
        /// The token.
        token: u64,
        /// The id.
        id: i64,
    },
    /// A token goes to a rank whose memory cannot be reached. It was not sent there.
    Unreachable {
        /// The token.
        token: u64,
    },
    /// A number that this version has no name for.
    Other {
        /// The number.
        code: u32,
        /// Its value.
        value: i64,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            operation,
            epoch,
            phase,
            rank,
            ..
        } = self;
        write!(f, "{operation} {epoch}: ")?;
        match self.kind {
            FaultKind::Timeout { waited } => write!(
                f,
                "waited {waited:.1?} for rank {rank} {phase} and went on without it; check that \
                 rank {rank} is alive and makes the same calls in the same order"
            ),
            FaultKind::Aborted => write!(
                f,
                "waited for rank {rank} {phase} until the buffer was aborted; refresh or close it"
            ),
            FaultKind::ExpertOutOfRange { token, id } => write!(
                f,
                "token {token} of rank {rank} names expert {id}, which the layer does not have; \
                 skipped; check the router"
            ),
            FaultKind::ExpertRepeated { token, id } => write!(
                f,
                "token {token} of rank {rank} names expert {id} twice; counted once; check the \
                 router"
            ),
            FaultKind::Unreachable { token } => write!(
                f,
                "token {token} was not sent to rank {rank}, which cannot be reached; check the \
                 plan and its refusals"
            ),
            FaultKind::Other { code, value } => write!(
                f,
                "fault {code} with value {value} about rank {rank}; check that library and kernels \
                 are of one version"
            ),
        }
    }
}

/// What an operation reported so far.
///
/// It is complete once the stream has passed the operation.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// The operation.
    pub operation: Operation,
    /// Its number, counted per kind from 1.
    pub epoch: u64,
    /// What it reported, oldest first.
    pub faults: Vec<Fault>,
    /// Whether reports on later operations of its kind have overwritten some that may have been this
    /// operation's: the newest 64 of all kinds are kept.
    pub is_overwritten: bool,
}

impl Status {
    /// What these, all that are kept, say of an operation.
    pub(crate) fn of(operation: Operation, epoch: u64, mut faults: Vec<Fault>) -> Self {
        // What is gone came before the oldest that is kept. How operations of different kinds
        // followed each other their numbers do not tell.
        let is_overwritten = faults.first().is_some_and(|oldest| {
            oldest.sequence > 1 && oldest.operation == operation && oldest.epoch >= epoch
        });
        faults.retain(|fault| fault.operation == operation && fault.epoch == epoch);
        Self {
            operation,
            epoch,
            faults,
            is_overwritten,
        }
    }

    /// Whether it reported nothing. Not so if it is not known any more.
    pub fn is_ok(&self) -> bool {
        self.faults.is_empty() && !self.is_overwritten
    }
}

/// The records that kernels write while they run, in page-locked host memory.
#[derive(Debug)]
pub(crate) struct Ring {
    memory: HostBuffer,
}

impl Ring {
    pub(crate) fn new(driver: &Arc<dyn Driver>, device: DeviceOrdinal) -> ep_sys::Result<Self> {
        let bytes = u64::from(EP_FAULT_RING) * u64::from(EP_FAULT_BYTES);
        HostBuffer::new(driver, device, bytes).map(|memory| Self { memory })
    }

    /// Its address on the device.
    pub(crate) fn device_address(&self) -> u64 {
        self.memory.memory().device.0
    }

    /// Forgets all records. Nothing writes any meanwhile.
    pub(crate) fn clear(&self, device: &Device) -> ep_sys::Result<()> {
        let memory = self.memory.memory();
        device.zero(memory.device, memory.bytes)
    }

    /// The records that stand, oldest first. One that is being written, or that no longer belongs to
    /// the newest, is left out.
    pub(crate) fn read(&self) -> Result<Vec<Fault>, Error> {
        let mut faults = Vec::new();
        for slot in 0..u64::from(EP_FAULT_RING) {
            faults.extend(
                self.read_slot(slot)
                    .map_err(Error::driver("reading the fault ring"))?,
            );
        }
        faults.sort_unstable_by_key(|fault: &Fault| fault.sequence);
        let newest = faults.last().map_or(0, |fault| fault.sequence);
        faults.retain(|fault| fault.sequence + u64::from(EP_FAULT_RING) > newest);
        Ok(faults)
    }

    fn read_slot(&self, slot: u64) -> ep_sys::Result<Option<Fault>> {
        let load = |word: u64| {
            self.memory
                .load(slot * u64::from(EP_FAULT_BYTES) + 8 * word)
        };
        let sequence = load(0)?;
        if sequence == 0 {
            return Ok(None);
        }
        let mut words = [0; 5];
        for (word, at) in words.iter_mut().zip(1..) {
            *word = load(at)?;
        }
        if load(0)? != sequence {
            return Ok(None);
        }
        Ok(Fault::decode(sequence, words))
    }

    pub(crate) fn close(self) -> ep_sys::Result<()> {
        self.memory.close()
    }
}

impl Fault {
    /// The record of `struct ep_fault`, behind its sequence number.
    fn decode(
        sequence: u64,
        [epoch, fault_op, phase_peer, token, value]: [u64; 5],
    ) -> Option<Self> {
        let halves = |word: u64| (word as u32, (word >> 32) as u32);
        let (fault, operation) = halves(fault_op);
        let (phase, rank) = halves(phase_peer);
        let value = value.cast_signed();
        let kind = match fault {
            ffi::EP_FAULT_NONE => return None,
            ffi::EP_FAULT_TIMEOUT => FaultKind::Timeout {
                waited: Duration::from_nanos(value.unsigned_abs()),
            },
            ffi::EP_FAULT_ABORTED => FaultKind::Aborted,
            ffi::EP_FAULT_EXPERT_RANGE => FaultKind::ExpertOutOfRange { token, id: value },
            ffi::EP_FAULT_EXPERT_REPEATED => FaultKind::ExpertRepeated { token, id: value },
            ffi::EP_FAULT_UNREACHABLE => FaultKind::Unreachable { token },
            code => FaultKind::Other { code, value },
        };
        Some(Self {
            sequence,
            operation: Operation::from_code(operation)?,
            epoch,
            kind,
            phase: Phase::from_code(phase),
            rank,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_says_whether_reports_were_overwritten() {
        let at = |sequence, operation, epoch| Fault {
            sequence,
            operation,
            epoch,
            kind: FaultKind::ExpertRepeated { token: 0, id: 1 },
            phase: Phase::Send,
            rank: 0,
        };
        let (dispatch, combine) = (Operation::Dispatch, Operation::Combine);
        let status = |operation, epoch, kept: &[Fault]| Status::of(operation, epoch, kept.to_vec());
        assert!(status(dispatch, 1, &[]).is_ok());
        assert!(status(dispatch, 1, &[at(1, dispatch, 2)]).is_ok());

        // The third dispatch has overwritten some of the second's or the first's.
        let kept = [at(7, dispatch, 2), at(8, dispatch, 3)];
        let first = status(dispatch, 1, &kept);
        assert!(first.is_overwritten && first.faults.is_empty() && !first.is_ok());
        let second = status(dispatch, 2, &kept);
        assert!(second.is_overwritten && second.faults == kept[..1]);
        let third = status(dispatch, 3, &kept);
        assert!(!third.is_overwritten && third.faults == kept[1..]);
        assert!(status(dispatch, 4, &kept).is_ok());
        assert!(status(combine, 1, &kept).is_ok());
    }

    #[test]
    fn records_read_as_operators_do() {
        let op = u64::from(ffi::EP_OP_DISPATCH) << 32;
        let at = |phase: u32, peer: u64| u64::from(phase) | peer << 32;
        let timeout = [
            12,
            u64::from(ffi::EP_FAULT_TIMEOUT) | op,
            at(ffi::EP_PHASE_COUNTS, 3),
            0,
            2_500_000_000,
        ];
        let fault = Fault::decode(1, timeout).unwrap();
        assert_eq!(fault.rank, 3);
        assert_eq!(
            fault.to_string(),
            "dispatch 12: waited 2.5s for rank 3 for its counts and went on without it; check that \
             rank 3 is alive and makes the same calls in the same order"
        );
        let aborted = [
            13,
            u64::from(ffi::EP_FAULT_ABORTED) | op,
            at(ffi::EP_PHASE_ROWS, 3),
            0,
            0,
        ];
        assert_eq!(
            Fault::decode(2, aborted).unwrap().to_string(),
            "dispatch 13: waited for rank 3 for its rows until the buffer was aborted; refresh or \
             close it"
        );
        let range = [
            1,
            u64::from(ffi::EP_FAULT_EXPERT_RANGE) | op,
            at(ffi::EP_PHASE_SEND, 0),
            7,
            (-5_i64).cast_unsigned(),
        ];
        assert_eq!(
            Fault::decode(2, range).unwrap().kind,
            FaultKind::ExpertOutOfRange { token: 7, id: -5 }
        );
        assert_eq!(Fault::decode(3, [0; 5]), None);
    }
}
