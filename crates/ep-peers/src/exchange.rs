//! Collectives among ranks: equal-sized records to everyone, and a barrier.
//!
//! All ranks call the same steps in the same order. A step either gives every rank every record, or
//! an error that names who broke it; after an error the exchange stays broken and repeats it at
//! once, so that teardown never waits for a group that has already failed.
//!
//! The implementations: [`Local`](local::Local) for threads of one process, [`Unix`](unix::Unix) for
//! processes of one host, [`Tcp`](tcp::Tcp) for hosts. The last two are a star through rank 0 and
//! share everything but their rendezvous. No implementation starts a thread.

mod fault;
mod frame;
mod link;
pub mod local;
mod rendezvous;
mod star;
pub mod tcp;
pub mod unix;

use std::fmt;
use std::time::{Duration, Instant};

pub use fault::{Cause, Fault};
pub use rendezvous::RunToken;

use crate::Result;

/// The largest record that a step takes, in bytes.
pub const MAX_RECORD_BYTES: usize = 1 << 20;

/// Collectives among the ranks of a group.
///
/// Every wait ends at the deadline. A rank calls from one thread at a time: concurrent calls take
/// turns in no given order, or are refused with [`Error::Busy`](crate::Error::Busy).
pub trait Exchange: fmt::Debug + Send + Sync {
    /// This rank, below [`size`](Self::size).
    fn rank(&self) -> u32;

    /// Ranks in the group.
    fn size(&self) -> u32;

    /// Gives every rank's record to every rank, by rank. All ranks give records of one size; one
    /// that does not is named by everyone's error.
    fn all_gather(&self, step: Step, record: &[u8], deadline: Instant) -> Result<Vec<Vec<u8>>>;

    /// Returns when every rank has arrived.
    fn barrier(&self, step: Step, deadline: Instant) -> Result<()> {
        self.all_gather(step, &[], deadline).map(drop)
    }
}

/// The name of a step, as errors give it and as it travels in frames: at most 16 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Step([u8; Step::BYTES]);

impl Step {
    /// Where ranks meet, before any step.
    pub const RENDEZVOUS: Self = Self::new("rendezvous");

    const BYTES: usize = 16;

    /// The step of this name. What exceeds 16 bytes is cut off.
    pub const fn new(name: &str) -> Self {
        let name = name.as_bytes();
        let mut bytes = [0; Self::BYTES];
        let mut i = 0;
        while i < name.len() && i < Self::BYTES {
            bytes[i] = name[i];
            i += 1;
        }
        Self(bytes)
    }

    fn to_bytes(self) -> [u8; Self::BYTES] {
        self.0
    }

    fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.0.iter().position(|&b| b == 0).unwrap_or(Self::BYTES);
        write!(f, "{}", self.0[..end].escape_ascii())
    }
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// When whoever leads a step gives up on it: a little before the deadline, so that the others hear
/// the reason within theirs.
fn give_up_at(now: Instant, deadline: Instant) -> Instant {
    let left = deadline.saturating_duration_since(now);
    deadline - (left / 8).min(Duration::from_millis(250))
}
