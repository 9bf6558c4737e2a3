//! Frames: a fixed header and a payload whose length the header announces.
//!
//! Magic, version and rank keep their places in every version of the protocol, so that a rank of
//! another version can still be named.

use std::time::Duration;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Cause, Fault, Step};

pub(super) const VERSION: u16 = 1;
pub(super) const HEADER_BYTES: usize = size_of::<Raw>();

const MAGIC: [u8; 4] = *b"EPX\x1a";

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A rank introduces itself to rank 0.
    Hello,
    /// Rank 0: everyone is there.
    Welcome,
    /// A rank's record, to rank 0.
    Record,
    /// Everyone's records, by rank, from rank 0.
    Records,
    /// The group has failed; the payload is the [`Fault`].
    Abort,
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    /// The sender.
    pub(super) rank: u32,
    /// Steps that the sender took before this one.
    pub(super) sequence: u64,
    pub(super) step: Step,
    /// What is left until the sender's deadline.
    pub(super) left: Duration,
    /// Bytes of the payload.
    pub(super) length: u32,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        zerocopy::transmute!(Raw {
            magic: MAGIC,
            version: VERSION.into(),
            kind: match self.kind {
                Kind::Hello => 1,
                Kind::Welcome => 2,
                Kind::Record => 3,
                Kind::Records => 4,
                Kind::Abort => 5,
            },
            reserved: 0,
            rank: self.rank.into(),
            length: self.length.into(),
            sequence: self.sequence.into(),
            step: self.step.to_bytes(),
            left_ms: u64::try_from(self.left.as_millis())
                .unwrap_or(u64::MAX)
                .into(),
        })
    }

    /// The rank that a header names, in any version of the protocol.
    pub(super) fn claimed_rank(bytes: &[u8; HEADER_BYTES]) -> u32 {
        let raw: Raw = zerocopy::transmute!(*bytes);
        raw.rank.get()
    }

    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Cause> {
        let raw: Raw = zerocopy::transmute!(*bytes);
        if raw.magic != MAGIC {
            return Err(Cause::Foreign);
        }
        if raw.version.get() != VERSION {
            return Err(Cause::Version {
                expected: VERSION.into(),
                actual: raw.version.get().into(),
            });
        }
        Ok(Self {
            kind: match raw.kind {
                1 => Kind::Hello,
                2 => Kind::Welcome,
                3 => Kind::Record,
                4 => Kind::Records,
                5 => Kind::Abort,
                _ => return Err(Cause::Foreign),
            },
            rank: raw.rank.get(),
            sequence: raw.sequence.get(),
            step: Step::from_bytes(raw.step),
            left: Duration::from_millis(raw.left_ms.get()),
            length: raw.length.get(),
        })
    }
}

/// The frame that tells a group's fault.
pub(super) fn abort(rank: u32, sequence: u64, fault: &Fault) -> Vec<u8> {
    let payload = fault.encode();
    let header = Header {
        kind: Kind::Abort,
        rank,
        sequence,
        step: fault.step,
        left: Duration::ZERO,
        length: u32::try_from(payload.len()).unwrap_or(u32::MAX),
    };
    [header.encode().as_slice(), &payload].concat()
}

/// What a rank says of itself at the rendezvous.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
pub(super) struct Hello {
    pub(super) token: U64,
    pub(super) size: U32,
}

#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
struct Raw {
    magic: [u8; 4],
    version: U16,
    kind: u8,
    reserved: u8,
    rank: U32,
    length: U32,
    sequence: U64,
    step: [u8; 16],
    left_ms: U64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            kind: Kind::Records,
            rank: 7,
            sequence: 1 << 40,
            step: Step::new("handles"),
            left: Duration::from_millis(1234),
            length: 728,
        }
    }

    #[test]
    fn headers_survive_the_wire() {
        for kind in [
            Kind::Hello,
            Kind::Welcome,
            Kind::Record,
            Kind::Records,
            Kind::Abort,
        ] {
            let header = Header { kind, ..header() };
            assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
    }

    #[test]
    fn another_version_still_names_its_rank() {
        let mut bytes = header().encode();
        bytes[4] = 9;
        let cause = Cause::Version {
            expected: VERSION.into(),
            actual: 9,
        };
        assert_eq!(Header::decode(&bytes), Err(cause));
        assert_eq!(Header::claimed_rank(&bytes), 7);
    }

    #[test]
    fn foreign_bytes_are_no_frame() {
        let mut bytes = header().encode();
        bytes[0] ^= 1;
        assert_eq!(Header::decode(&bytes), Err(Cause::Foreign));
        let mut bytes = header().encode();
        bytes[6] = 0;
        assert_eq!(Header::decode(&bytes), Err(Cause::Foreign));
    }
}
