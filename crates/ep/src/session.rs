//! Steps that the ranks of a group take together, each with a bound.

use std::time::{Duration, Instant};

use ep_alloc::Failure;
use ep_peers::Group;
use ep_peers::exchange::Step;

use crate::{Communicator, Error};

/// A group that sets up or tears down.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    comm: Communicator,
    deadline: Duration,
    /// The buffer's rank of each of the communicator's.
    members: Vec<u32>,
    num_ranks: u32,
}

/// A rank's outcome where it failed at something that is no driver call.
const FAILED: u64 = u64::MAX;

/// When what may take so long from now on ends: of what no clock can tell, in decades.
pub(crate) fn due_in(deadline: Duration) -> Instant {
    const FAR: Duration = Duration::from_secs(1 << 30);
    Instant::now() + deadline.min(FAR)
}

impl Session {
    /// Of every rank.
    pub(crate) fn new(comm: Communicator, deadline: Duration) -> Self {
        Self {
            members: (0..comm.size()).collect(),
            num_ranks: comm.size(),
            comm,
            deadline,
        }
    }

    /// The same ranks' next session: those of `comm`, which are `members` of this one's.
    pub(crate) fn next(&self, comm: &Communicator, members: &[u32]) -> Result<Self, Error> {
        let next = Self {
            comm: comm.clone(),
            deadline: self.deadline,
            members: members.to_vec(),
            num_ranks: self.num_ranks,
        };
        match next.group() {
            Ok(group) if group.rank() == self.rank() => Ok(next),
            Ok(group) => Err(Error::NotMember {
                rank: self.rank(),
                named: group.rank(),
            }),
            Err(source) => Err(Error::Group {
                rank: self.rank(),
                source,
            }),
        }
    }

    /// This rank, as the buffer counts.
    pub(crate) fn rank(&self) -> u32 {
        self.named(self.comm.rank())
    }

    /// The ranks that take part, as the buffer counts.
    pub(crate) fn members(&self) -> &[u32] {
        &self.members
    }

    pub(crate) fn group(&self) -> ep_peers::Result<Group<'_>> {
        Group::members(self.comm.exchange(), self.num_ranks, &self.members)
    }

    /// When a step that begins now ends.
    pub(crate) fn due(&self) -> Instant {
        due_in(self.deadline)
    }

    pub(crate) fn gather(&self, step: &str, record: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let gathered = self.comm.gather(Step::new(step), record, self.due());
        gathered.map_err(|error| match error {
            Error::Group { mut source, .. } => {
                if let ep_peers::Error::Exchange(fault) = &mut source {
                    for rank in &mut fault.ranks {
                        *rank = self.named(*rank);
                    }
                }
                Error::Group {
                    rank: self.rank(),
                    source,
                }
            }
            other => other,
        })
    }

    /// The buffer's rank of one of the communicator's.
    fn named(&self, rank: u32) -> u32 {
        self.members.get(rank as usize).copied().unwrap_or(rank)
    }

    /// The largest of the ranks' numbers.
    pub(crate) fn most(&self, step: &str, own: u64) -> Result<u64, Error> {
        let numbers = self.gather(step, &own.to_le_bytes())?;
        let number = |bytes: Vec<u8>| <[u8; 8]>::try_from(bytes).map(u64::from_le_bytes);
        Ok(numbers.into_iter().flat_map(number).fold(own, u64::max))
    }

    /// Tells the group how this rank fared, and fails on every rank if one failed: with this rank's
    /// own error, if it has one.
    pub(crate) fn agree<T>(
        &self,
        step: &'static str,
        outcome: Result<T, Error>,
    ) -> Result<T, Error> {
        let code = match &outcome {
            Ok(_) => 0,
            Err(error) => error.failure().map_or(FAILED, Failure::to_code),
        };
        let heard = self.gather(step, &code.to_le_bytes());
        let value = outcome?;
        for (&peer, bytes) in self.members.iter().zip(heard?) {
            let code = <[u8; 8]>::try_from(bytes).map_or(FAILED, u64::from_le_bytes);
            if code != 0 {
                return Err(Error::Peer {
                    rank: self.rank(),
                    peer,
                    step,
                    failure: Failure::from_code(code),
                });
            }
        }
        Ok(value)
    }
}
