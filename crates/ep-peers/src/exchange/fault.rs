//! What breaks a step, as plain data that every rank of the group can be told.

use std::fmt;
use std::time::Duration;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Step;

/// A step that failed, and the ranks at fault. The same on every rank that could be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The step.
    pub step: Step,
    /// The ranks at fault, ascending.
    pub ranks: Vec<u32>,
    /// What they did.
    pub cause: Cause,
}

/// What ranks did that broke a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// They did not arrive.
    Missing {
        /// How long the group waited.
        waited: Duration,
    },
    /// Their connection ended.
    Lost {
        /// The operating system's error number; none if the connection was closed in order.
        errno: Option<i32>,
    },
    /// They sent the beginning of a frame only.
    Truncated {
        /// Bytes that came.
        got: u64,
        /// Bytes announced.
        expected: u64,
    },
    /// Their record is of another size than the group's.
    Size {
        /// Bytes of the group's records.
        expected: u64,
        /// Bytes of theirs.
        actual: u64,
    },
    /// They sent something that is no frame.
    Foreign,
    /// They speak another version of the protocol.
    Version {
        /// The group's.
        expected: u32,
        /// Theirs.
        actual: u32,
    },
    /// They are at another step.
    Step {
        /// Theirs.
        at: Step,
    },
    /// The rank exists twice.
    Duplicate,
    /// They were started for a group of another size.
    GroupSize {
        /// Ranks in the group.
        expected: u32,
        /// Ranks they were told of.
        actual: u32,
    },
    /// They belong to another run.
    Token,
}

impl std::error::Error for Fault {}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let who = Ranks(&self.ranks);
        let step = self.step;
        match self.cause {
            Cause::Missing { waited } => write!(
                f,
                "{who} did not arrive at step {step} within {waited:.1?}; check that its process \
                 is alive and that it can reach the rendezvous (over TCP: MASTER_ADDR, MASTER_PORT)"
            ),
            Cause::Lost { errno: None } => write!(
                f,
                "{who} closed its connection at step {step}; check whether its process died or \
                 failed on its own, and its log"
            ),
            Cause::Lost { errno: Some(errno) } => write!(
                f,
                "{who} broke its connection at step {step} ({}); check whether its process died, \
                 and its log",
                std::io::Error::from_raw_os_error(errno)
            ),
            Cause::Truncated { got, expected } => write!(
                f,
                "{who} sent {got} of {expected} bytes at step {step}; check whether its process \
                 died or is stopped, and its log"
            ),
            Cause::Size { expected, actual } => write!(
                f,
                "{who} sent a record of {actual} bytes at step {step} where the group sends \
                 {expected}; check that every rank runs the same build and configuration"
            ),
            Cause::Foreign => write!(
                f,
                "{who} sent something that is no frame at step {step}; check that no other \
                 program uses the rendezvous (over TCP: MASTER_ADDR, MASTER_PORT)"
            ),
            Cause::Version { expected, actual } => write!(
                f,
                "{who} speaks version {actual} of the exchange at step {step}, the group version \
                 {expected}; check that every rank runs the same build"
            ),
            Cause::Step { at } => write!(
                f,
                "{who} is at step {at} while the group is at step {step}; check that every rank \
                 makes the same calls in the same order"
            ),
            Cause::Duplicate => write!(
                f,
                "{who} came twice at step {step}; check that RANK differs between processes and \
                 that no earlier run is left over"
            ),
            Cause::GroupSize { expected, actual } => write!(
                f,
                "{who} expects a group of {actual} at step {step}, the group has {expected}; check \
                 WORLD_SIZE on every rank"
            ),
            Cause::Token => write!(
                f,
                "{who} belongs to another run at step {step}; check that two runs do not share \
                 one rendezvous (over TCP: MASTER_ADDR, MASTER_PORT)"
            ),
        }
    }
}

impl Fault {
    pub(super) fn new(step: Step, rank: u32, cause: Cause) -> Self {
        Self {
            step,
            ranks: vec![rank],
            cause,
        }
    }

    /// The largest encoding in a group of `size`.
    pub(super) fn max_bytes(size: u32) -> usize {
        size_of::<Raw>() + 4 * size as usize
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let (code, a, b, at) = self.cause.encode();
        let mut bytes = Raw {
            step: self.step.to_bytes(),
            at: at.to_bytes(),
            a: a.into(),
            b: b.into(),
            code: code.into(),
        }
        .as_bytes()
        .to_vec();
        for rank in &self.ranks {
            bytes.extend_from_slice(&rank.to_le_bytes());
        }
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (raw, ranks) = Raw::read_from_prefix(bytes).ok()?;
        let (ranks, []) = ranks.as_chunks::<4>() else {
            return None;
        };
        Some(Self {
            step: Step::from_bytes(raw.step),
            ranks: ranks.iter().map(|rank| u32::from_le_bytes(*rank)).collect(),
            cause: Cause::decode(&raw)?,
        })
    }
}

impl Cause {
    fn encode(self) -> (u32, u64, u64, Step) {
        let none = Step::new("");
        match self {
            Self::Missing { waited } => (
                1,
                u64::try_from(waited.as_millis()).unwrap_or(u64::MAX),
                0,
                none,
            ),
            Self::Lost { errno: None } => (2, 0, 0, none),
            Self::Lost { errno: Some(errno) } => (3, u64::from(errno.unsigned_abs()), 0, none),
            Self::Truncated { got, expected } => (4, got, expected, none),
            Self::Size { expected, actual } => (5, expected, actual, none),
            Self::Foreign => (6, 0, 0, none),
            Self::Version { expected, actual } => (7, expected.into(), actual.into(), none),
            Self::Step { at } => (8, 0, 0, at),
            Self::Duplicate => (9, 0, 0, none),
            Self::GroupSize { expected, actual } => (10, expected.into(), actual.into(), none),
            Self::Token => (11, 0, 0, none),
        }
    }

    fn decode(raw: &Raw) -> Option<Self> {
        let (a, b) = (raw.a.get(), raw.b.get());
        let narrow = |value: u64| u32::try_from(value).ok();
        Some(match raw.code.get() {
            1 => Self::Missing {
                waited: Duration::from_millis(a),
            },
            2 => Self::Lost { errno: None },
            3 => Self::Lost {
                errno: Some(i32::try_from(a).ok()?),
            },
            4 => Self::Truncated {
                got: a,
                expected: b,
            },
            5 => Self::Size {
                expected: a,
                actual: b,
            },
            6 => Self::Foreign,
            7 => Self::Version {
                expected: narrow(a)?,
                actual: narrow(b)?,
            },
            8 => Self::Step {
                at: Step::from_bytes(raw.at),
            },
            9 => Self::Duplicate,
            10 => Self::GroupSize {
                expected: narrow(a)?,
                actual: narrow(b)?,
            },
            11 => Self::Token,
            _ => return None,
        })
    }
}

#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
struct Raw {
    step: [u8; 16],
    at: [u8; 16],
    a: U64,
    b: U64,
    code: U32,
}

/// Ascending ranks as people read them, runs of them as `first-last`.
struct Ranks<'a>(&'a [u32]);

impl fmt::Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("a rank"),
            [rank] => write!(f, "rank {rank}"),
            ranks => {
                f.write_str("ranks")?;
                let runs = ranks.chunk_by(|a, b| a.checked_add(1) == Some(*b));
                for (i, run) in runs.enumerate() {
                    let separator = if i == 0 { "" } else { "," };
                    match *run {
                        [first, .., last] => write!(f, "{separator} {first}-{last}")?,
                        [only] => write!(f, "{separator} {only}")?,
                        [] => {}
                    }
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Step = Step::new("handles");

    #[test]
    fn every_cause_survives_the_wire() {
        let causes = [
            Cause::Missing {
                waited: Duration::from_millis(1750),
            },
            Cause::Lost { errno: None },
            Cause::Lost { errno: Some(104) },
            Cause::Truncated {
                got: 3,
                expected: 48,
            },
            Cause::Size {
                expected: 728,
                actual: u64::MAX,
            },
            Cause::Foreign,
            Cause::Version {
                expected: 1,
                actual: 2,
            },
            Cause::Step {
                at: Step::new("a name that is longer than sixteen"),
            },
            Cause::Duplicate,
            Cause::GroupSize {
                expected: 4,
                actual: 8,
            },
            Cause::Token,
        ];
        for cause in causes {
            let fault = Fault {
                step: STEP,
                ranks: vec![1, 70_000],
                cause,
            };
            let bytes = fault.encode();
            assert!(bytes.len() <= Fault::max_bytes(2));
            assert_eq!(Fault::decode(&bytes), Some(fault));
        }
    }

    #[test]
    fn damaged_faults_are_refused() {
        let bytes = Fault::new(STEP, 3, Cause::Foreign).encode();
        assert_eq!(Fault::decode(&bytes[..bytes.len() - 1]), None);
        assert_eq!(Fault::decode(&[]), None);
        let mut unknown = bytes;
        unknown[size_of::<Raw>() - 4] = 99;
        assert_eq!(Fault::decode(&unknown), None);
    }

    #[test]
    fn the_text_names_rank_step_and_what_to_check() {
        let mut fault = Fault::new(
            STEP,
            3,
            Cause::Missing {
                waited: Duration::from_secs(10),
            },
        );
        let text = fault.to_string();
        assert!(
            text.starts_with("rank 3 did not arrive at step handles within 10.0s"),
            "{text}"
        );
        assert!(text.contains("MASTER_ADDR"), "{text}");
        fault.ranks.push(5);
        assert!(
            fault.to_string().starts_with("ranks 3, 5 did not"),
            "{fault}"
        );
    }

    #[test]
    fn step_names_are_shown_without_control_bytes() {
        assert_eq!(Step::from_bytes([b'\n'; 16]).to_string(), "\\n".repeat(16));
        assert_eq!(Step::new("handles").to_string(), "handles");
    }
}
