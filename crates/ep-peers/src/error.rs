//! What keeps ranks from finding each other.

use std::io;
use std::time::Duration;

use crate::exchange::{Fault, MAX_RECORD_BYTES, Step};
use crate::wire::{RecordError, Refusal};

/// The result of an operation on a group.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a group could not be formed, kept or left in order.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A step failed; every rank of the group that could be told has the same fault.
    #[error(transparent)]
    Exchange(#[from] Fault),
    /// An address cannot be used.
    #[error("cannot {action} {address}; {}", check_of(source))]
    Address {
        /// What was tried.
        action: &'static str,
        /// The address.
        address: String,
        /// The system's error.
        source: io::Error,
    },
    /// Rank 0 was not found.
    #[error(
        "cannot reach rank 0 at {address} within {waited:.1?}; check that rank 0 is alive and that \
         its address (over TCP: MASTER_ADDR, MASTER_PORT) is right and reachable from here"
    )]
    Unreachable {
        /// Where rank 0 was looked for.
        address: String,
        /// How long.
        waited: Duration,
        /// Why the last attempt failed, if it was refused rather than left without an answer.
        source: Option<io::Error>,
    },
    /// A rank that no group can have.
    #[error("rank {rank} is not below the group's size {size}; check RANK and WORLD_SIZE")]
    BadRank {
        /// The rank.
        rank: u32,
        /// Ranks in the group.
        size: u32,
    },
    /// A group that is larger than any.
    #[error("a group of {size} ranks exceeds {MAX_RANKS}; check WORLD_SIZE")]
    GroupSize {
        /// Ranks in the group.
        size: u32,
    },
    /// The members do not fit the exchange.
    #[error(
        "members {members:?} do not fit an exchange of {size} and a table of {num_ranks} ranks; \
         give one distinct rank below {num_ranks} for each rank of the exchange"
    )]
    BadMembers {
        /// The members given.
        members: Vec<u32>,
        /// Ranks in the exchange.
        size: u32,
        /// Entries in the table.
        num_ranks: u32,
    },
    /// A record is larger than a step takes.
    #[error("a record of {bytes} bytes at step {step} exceeds {MAX_RECORD_BYTES}; send less")]
    RecordTooLarge {
        /// The step.
        step: Step,
        /// Bytes of the record.
        bytes: usize,
    },
    /// Another thread was in a step as this rank.
    #[error("step {step} cannot begin: this rank is in another; let one thread speak for a rank")]
    Busy {
        /// The step that could not begin.
        step: Step,
    },
    /// A rank's handle record cannot be used.
    #[error("the record of rank {rank} cannot be used; check that every rank runs the same build")]
    Record {
        /// The rank.
        rank: u32,
        /// What is wrong with it.
        source: RecordError,
    },
    /// Ranks were configured differently.
    #[error(
        "rank {rank} has another configuration (digest {actual:#018x}) than rank {reference} \
         ({expected:#018x}); give every rank the same configuration"
    )]
    Configuration {
        /// The lowest rank that differs.
        rank: u32,
        /// The rank it was compared with: the lowest member.
        reference: u32,
        /// Digest of the reference.
        expected: u64,
        /// Digest of the rank.
        actual: u64,
    },
    /// A refresh with a generation that has been used.
    #[error("generation {given} does not follow generation {current}; count generations up")]
    Generation {
        /// The generation in use.
        current: u64,
        /// The one given.
        given: u64,
    },
    /// A driver call of this rank failed; the group was told.
    #[error("rank {rank} cannot have its table of peers; check its driver log")]
    Driver {
        /// This rank.
        rank: u32,
        /// The call and its status.
        source: ep_sys::Error,
    },
    /// Another rank could not give back what it had mapped, which may be this rank's memory.
    #[error(
        "rank {rank} could not give back what it had mapped ({refusal}), so this rank's memory may \
         still be mapped there; check its log, and end its process before the memory is used anew"
    )]
    PeerRelease {
        /// The other rank.
        rank: u32,
        /// The call of its driver and its status.
        refusal: Refusal,
    },
    /// Something could not be given back; everything else was.
    #[error("rank {rank} cannot give back what it had mapped or allocated; check its driver log")]
    Release {
        /// This rank.
        rank: u32,
        /// The call and its status.
        source: ep_sys::Error,
    },
}

impl Error {
    pub(crate) fn check_rank(rank: u32, size: u32) -> Result<()> {
        if size > MAX_RANKS {
            Err(Self::GroupSize { size })
        } else if rank < size {
            Ok(())
        } else {
            Err(Self::BadRank { rank, size })
        }
    }
}

/// Ranks of a group, at most: far more than an NVLink fabric joins.
const MAX_RANKS: u32 = 1 << 16;

/// What to check when an address cannot be used.
fn check_of(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::AddrInUse => {
            "check what else uses it (over TCP, a launcher may itself listen at MASTER_PORT, as \
             torchrun does: then set EP_PORT to another port on every rank)"
        }
        _ => "check that it is free, valid and permitted on this host",
    }
}
