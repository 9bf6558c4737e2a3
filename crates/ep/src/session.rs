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
}

/// A rank's outcome where it failed at something that is no driver call.
const FAILED: u64 = u64::MAX;

impl Session {
    pub(crate) fn new(comm: Communicator, deadline: Duration) -> Self {
        Self { comm, deadline }
    }

    pub(crate) fn rank(&self) -> u32 {
        self.comm.rank()
    }

    pub(crate) fn group(&self) -> Group<'_> {
        Group::whole(self.comm.exchange())
    }

    /// When a step that begins now ends.
    pub(crate) fn due(&self) -> Instant {
        Instant::now() + self.deadline
    }

    pub(crate) fn gather(&self, step: &str, record: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        self.comm.gather(Step::new(step), record, self.due())
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
        for (peer, bytes) in (0..).zip(heard?) {
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
