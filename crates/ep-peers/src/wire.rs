//! Handle records: what a rank tells the others of itself and its memory.
//!
//! The only place that knows the record's byte layout. A record has one size, [`Record::BYTES`], in
//! every state, so that a rank whose allocation failed takes part in the same step as the others and
//! says so in the record. Fields are little-endian. The last is a checksum (FNV-1a, 64 bits) of all
//! before it: its steps are invertible, so no change of a single byte goes unnoticed.
//!
//! Decoding never panics, whatever the bytes, and accepts only what encoding writes.

use std::fmt;

use ep_sys::{Bytes16, Call, DevicePtr, FABRIC_HANDLE_BYTES, IPC_HANDLE_BYTES, Status};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Version of the record's layout and of the numbers in it.
pub const RECORD_VERSION: u32 = 1;

/// Bytes of a record that belong to the caller.
pub const FACTS_BYTES: usize = 512;

const MAGIC: [u8; 8] = *b"EPHANDLE";
/// Stands for the absent status of a call that the driver did not answer, and for no call.
const NONE: u32 = u32::MAX;

/// What a rank tells the others.
///
/// ```
/// use ep_peers::wire::{Facts, Handle, Identity, Record, RecordError};
/// use ep_sys::DevicePtr;
///
/// let record = Record {
///     rank: 3,
///     generation: 1,
///     identity: Identity::default(),
///     bytes: 0,
///     granularity: 0,
///     base: DevicePtr::NULL,
///     handle: Handle::None(None),
///     digest: 0,
///     facts: Facts::new(b"anything")?,
/// };
/// let mut bytes = record.encode();
/// assert_eq!(Record::decode_from(&bytes, 3, 1)?, record);
///
/// bytes[100] ^= 1;
/// assert_eq!(Record::decode(&bytes), Err(RecordError::Checksum));
/// # Ok::<(), RecordError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The sender.
    pub rank: u32,
    /// The generation of the group that the record is for.
    pub generation: u64,
    /// Where the sender runs.
    pub identity: Identity,
    /// Size of the memory in bytes, as it was allocated. 0 without memory.
    pub bytes: u64,
    /// The granularity that it was allocated with, in bytes. 0 without memory.
    pub granularity: u64,
    /// Address of the memory; means something in the sender's process only.
    pub base: DevicePtr,
    /// How others can reach the memory.
    pub handle: Handle,
    /// A digest of what must be configured alike on every rank.
    pub digest: u64,
    /// The caller's own facts.
    pub facts: Facts,
}

/// Where a rank runs, in terms that mean the same everywhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The host: the same for processes of one running kernel, different between hosts.
    pub host: Bytes16,
    /// The process: the same for threads of one process, different between processes.
    pub process: Bytes16,
    /// The GPU.
    pub gpu: Bytes16,
    /// The NVLink clique, as a non-zero cluster and a number in it.
    pub clique: Option<(Bytes16, u32)>,
}

/// How a rank's memory can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Handle {
    /// Not at all: there is no memory yet, or the call that made or exported it was refused.
    None(Option<Refusal>),
    /// By a fabric handle.
    Fabric([u8; FABRIC_HANDLE_BYTES]),
    /// By a descriptor, which travels apart.
    PosixFd,
    /// By a CUDA IPC handle; in the owner's process by its address.
    Ipc([u8; IPC_HANDLE_BYTES]),
}

/// A driver call that failed, as it travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Refusal {
    /// The call.
    pub call: Call,
    /// What the driver, or NVML where the call is its, answered; none if it could not be asked.
    pub status: Option<Status>,
}

impl From<&ep_sys::Error> for Refusal {
    fn from(error: &ep_sys::Error) -> Self {
        let status = match error {
            ep_sys::Error::Nvml { status, .. } => Some(Status(*status)),
            error => error.status(),
        };
        Self {
            call: error.call(),
            status,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.status {
            Some(Status(status)) if self.call.is_of_nvml() => {
                write!(f, "{} returned NVML status {status}", self.call)
            }
            Some(status) => write!(f, "{} returned {status}", self.call),
            None => write!(f, "{} could not be called", self.call),
        }
    }
}

impl Refusal {
    /// Two numbers: the call by its place in [`Call::ALL`], and the status.
    pub(crate) fn encode(refusal: Option<Self>) -> [u32; 2] {
        let Some(Self { call, status }) = refusal else {
            return [NONE, NONE];
        };
        let place = Call::ALL.iter().position(|&known| known == call);
        [
            place
                .and_then(|place| u32::try_from(place).ok())
                .unwrap_or(NONE),
            status.map_or(NONE, |status| status.0),
        ]
    }

    /// The inverse of [`encode`](Self::encode); an outer `None` for numbers that it never gives.
    pub(crate) fn decode([call, status]: [u32; 2]) -> Option<Option<Self>> {
        if call == NONE {
            return (status == NONE).then_some(None);
        }
        let call = *Call::ALL.get(call as usize)?;
        Some(Some(Self {
            call,
            status: (status != NONE).then_some(Status(status)),
        }))
    }
}

/// Up to [`FACTS_BYTES`] bytes that the caller sends along and alone understands.
#[derive(Clone, PartialEq, Eq)]
pub struct Facts {
    bytes: [u8; FACTS_BYTES],
    len: usize,
}

impl Facts {
    /// No facts.
    pub const EMPTY: Self = Self {
        bytes: [0; FACTS_BYTES],
        len: 0,
    };

    /// These bytes, unless they are too many.
    pub fn new(facts: &[u8]) -> Result<Self, RecordError> {
        let mut bytes = [0; FACTS_BYTES];
        bytes
            .get_mut(..facts.len())
            .ok_or(RecordError::Facts { len: facts.len() })?
            .copy_from_slice(facts);
        Ok(Self {
            bytes,
            len: facts.len(),
        })
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Default for Facts {
    fn default() -> Self {
        Self::EMPTY
    }
}

impl fmt::Debug for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Facts({})", self.as_bytes().escape_ascii())
    }
}

/// What is wrong with a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// It has another size.
    #[error(
        "it has {actual} bytes, a record has {}; check the sender's build",
        Record::BYTES
    )]
    Length {
        /// Bytes that came.
        actual: usize,
    },
    /// It does not begin as records do.
    #[error("it does not begin with a record's magic bytes; check what the sender is")]
    Magic,
    /// It is of another version.
    #[error("it has version {actual}, this build reads {RECORD_VERSION}; check the sender's build")]
    Version {
        /// The version that it states.
        actual: u32,
    },
    /// Its checksum does not match.
    #[error("its checksum does not match; check the network and the sender's memory")]
    Checksum,
    /// A field has a value that this version does not know.
    #[error(
        "field {field} has a value that version {RECORD_VERSION} does not know; check the sender's build"
    )]
    Field {
        /// The field.
        field: &'static str,
    },
    /// It is for another generation of the group.
    #[error(
        "it is for generation {actual}, the group is at {expected}; check that every rank refreshed"
    )]
    Generation {
        /// The group's.
        expected: u64,
        /// The record's.
        actual: u64,
    },
    /// It is another rank's.
    #[error("it states rank {actual} where rank {expected} sent it; check RANK on that host")]
    Rank {
        /// Who sent it.
        expected: u32,
        /// Whose it says it is.
        actual: u32,
    },
    /// The caller's facts are too long.
    #[error("facts of {len} bytes exceed {FACTS_BYTES}; send less")]
    Facts {
        /// Their length in bytes.
        len: usize,
    },
}

impl Record {
    /// Bytes of an encoded record.
    pub const BYTES: usize = size_of::<Raw>();

    /// The record in the form in which it travels.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let (kind, handle, refusal) = match &self.handle {
            Handle::None(refusal) => (0, [0; 64], *refusal),
            Handle::Fabric(handle) => (1, *handle, None),
            Handle::PosixFd => (2, [0; 64], None),
            Handle::Ipc(handle) => (3, *handle, None),
        };
        let [call, status] = Refusal::encode(refusal);
        let (cluster, clique) = self.identity.clique.unwrap_or_default();
        let mut raw = Raw {
            magic: MAGIC,
            version: RECORD_VERSION.into(),
            kind: U32::new(kind),
            generation: self.generation.into(),
            rank: self.rank.into(),
            clique: clique.into(),
            host: self.identity.host.0,
            process: self.identity.process.0,
            gpu: self.identity.gpu.0,
            cluster: cluster.0,
            bytes: self.bytes.into(),
            granularity: self.granularity.into(),
            base: self.base.0.into(),
            handle,
            call: call.into(),
            status: status.into(),
            digest: self.digest.into(),
            // At most FACTS_BYTES, by construction.
            facts_len: U64::new(self.facts.len as u64),
            facts: self.facts.bytes,
            checksum: U64::ZERO,
        };
        raw.checksum = raw.sum().into();
        zerocopy::transmute!(raw)
    }

    /// The record that these bytes are.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let raw = Raw::read_from_bytes(bytes).map_err(|_| RecordError::Length {
            actual: bytes.len(),
        })?;
        if raw.magic != MAGIC {
            return Err(RecordError::Magic);
        }
        if raw.version.get() != RECORD_VERSION {
            return Err(RecordError::Version {
                actual: raw.version.get(),
            });
        }
        if raw.checksum.get() != raw.sum() {
            return Err(RecordError::Checksum);
        }
        let record = Self {
            rank: raw.rank.get(),
            generation: raw.generation.get(),
            identity: Identity {
                host: Bytes16(raw.host),
                process: Bytes16(raw.process),
                gpu: Bytes16(raw.gpu),
                clique: raw.clique()?,
            },
            bytes: raw.bytes.get(),
            granularity: raw.granularity.get(),
            base: DevicePtr(raw.base.get()),
            handle: raw.handle()?,
            digest: raw.digest.get(),
            facts: raw.facts()?,
        };
        Ok(record)
    }

    /// The record that these bytes are, if `rank` sent it for this generation.
    pub fn decode_from(bytes: &[u8], rank: u32, generation: u64) -> Result<Self, RecordError> {
        let record = Self::decode(bytes)?;
        if record.rank != rank {
            return Err(RecordError::Rank {
                expected: rank,
                actual: record.rank,
            });
        }
        if record.generation != generation {
            return Err(RecordError::Generation {
                expected: generation,
                actual: record.generation,
            });
        }
        Ok(record)
    }
}

#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
struct Raw {
    magic: [u8; 8],
    version: U32,
    kind: U32,
    generation: U64,
    rank: U32,
    clique: U32,
    host: [u8; 16],
    process: [u8; 16],
    gpu: [u8; 16],
    cluster: [u8; 16],
    bytes: U64,
    granularity: U64,
    base: U64,
    handle: [u8; 64],
    call: U32,
    status: U32,
    digest: U64,
    facts_len: U64,
    facts: [u8; FACTS_BYTES],
    checksum: U64,
}

impl Raw {
    fn sum(&self) -> u64 {
        let bytes = self.as_bytes();
        crate::fnv1a64(&bytes[..bytes.len() - size_of::<U64>()])
    }

    fn clique(&self) -> Result<Option<(Bytes16, u32)>, RecordError> {
        let (cluster, clique) = (Bytes16(self.cluster), self.clique.get());
        match (cluster.is_zero(), clique) {
            (false, _) => Ok(Some((cluster, clique))),
            (true, 0) => Ok(None),
            (true, _) => Err(RecordError::Field { field: "clique" }),
        }
    }

    fn handle(&self) -> Result<Handle, RecordError> {
        let refusal = Refusal::decode([self.call.get(), self.status.get()])
            .ok_or(RecordError::Field { field: "call" })?;
        match (self.kind.get(), refusal, self.handle == [0; 64]) {
            (0, refusal, true) => Ok(Handle::None(refusal)),
            (1, None, _) => Ok(Handle::Fabric(self.handle)),
            (2, None, true) => Ok(Handle::PosixFd),
            (3, None, _) => Ok(Handle::Ipc(self.handle)),
            (0, _, _) | (2, None, _) => Err(RecordError::Field { field: "handle" }),
            (1..=3, _, _) => Err(RecordError::Field { field: "call" }),
            _ => Err(RecordError::Field { field: "kind" }),
        }
    }

    fn facts(&self) -> Result<Facts, RecordError> {
        let field = RecordError::Field { field: "facts" };
        let len = usize::try_from(self.facts_len.get()).map_err(|_| field)?;
        let unused = self.facts.get(len..).ok_or(field)?;
        if unused.iter().any(|&byte| byte != 0) {
            return Err(field);
        }
        Ok(Facts {
            bytes: self.facts,
            len,
        })
    }
}
