//! What a driver call can fail with.

use std::fmt;

use crate::{Call, DeviceOrdinal};

/// The result of a driver call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A driver's status as the number it returned. Never an enum: a driver newer than this crate may
/// return a number without a name here.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(pub u32);

macro_rules! statuses {
    ($($konst:ident = $value:literal => $name:literal,)*) => {
        impl Status {
            $(#[doc = concat!("`", $name, "`")] pub const $konst: Self = Self($value);)*

            /// The vendor's name, where this crate knows it.
            pub fn name(self) -> Option<&'static str> {
                match self.0 { $($value => Some($name),)* _ => None }
            }
        }
    };
}

impl Status {
    /// Whether an earlier kernel of the process failed on the device. The driver then answers every
    /// call on it with the same status, so the call is not to blame; only a new process can go on.
    pub fn is_context_lost(self) -> bool {
        matches!(
            self,
            Self::ECC_UNCORRECTABLE
                | Self::NVLINK_UNCORRECTABLE
                | Self::CONTAINED
                | Self::ILLEGAL_ADDRESS
                | Self::LAUNCH_TIMEOUT
                | Self::ASSERT
                | Self::HARDWARE_STACK_ERROR
                | Self::ILLEGAL_INSTRUCTION
                | Self::MISALIGNED_ADDRESS
                | Self::INVALID_ADDRESS_SPACE
                | Self::INVALID_PC
                | Self::LAUNCH_FAILED
                | Self::TENSOR_MEMORY_LEAK
        )
    }

    /// What an operator should check next, where the status tells by itself, whichever call
    /// returned it.
    pub fn advice(self) -> Option<&'static str> {
        Some(match self {
            Self::OUT_OF_MEMORY => "free device memory, or lower the buffer's limits",
            Self::STUB_LIBRARY => {
                "a toolkit's stub libcuda was loaded; take its folder off the loader's path"
            }
            Self::NO_DEVICE | Self::INVALID_DEVICE => "check CUDA_VISIBLE_DEVICES",
            Self::PEER_ACCESS_UNSUPPORTED => "check nvidia-smi topo -p2p r",
            Self::SYSTEM_NOT_READY => "check that nvidia-fabricmanager runs",
            Self::ECC_UNCORRECTABLE | Self::NVLINK_UNCORRECTABLE | Self::CONTAINED => {
                "an earlier kernel met broken memory or a broken link, and the context is lost: \
                 end the process; check dmesg for Xid, and nvidia-smi -q -d ECC or \
                 nvidia-smi nvlink -e"
            }
            status if status.is_context_lost() => {
                "an earlier kernel of this process failed on the device, and the context is lost: \
                 end the process; run it with compute-sanitizer to find that kernel, and check \
                 dmesg for Xid"
            }
            _ => return None,
        })
    }
}

statuses! {
    SUCCESS = 0 => "CUDA_SUCCESS",
    INVALID_VALUE = 1 => "CUDA_ERROR_INVALID_VALUE",
    OUT_OF_MEMORY = 2 => "CUDA_ERROR_OUT_OF_MEMORY",
    NOT_INITIALIZED = 3 => "CUDA_ERROR_NOT_INITIALIZED",
    DEINITIALIZED = 4 => "CUDA_ERROR_DEINITIALIZED",
    STUB_LIBRARY = 34 => "CUDA_ERROR_STUB_LIBRARY",
    NO_DEVICE = 100 => "CUDA_ERROR_NO_DEVICE",
    INVALID_DEVICE = 101 => "CUDA_ERROR_INVALID_DEVICE",
    INVALID_CONTEXT = 201 => "CUDA_ERROR_INVALID_CONTEXT",
    MAP_FAILED = 205 => "CUDA_ERROR_MAP_FAILED",
    ALREADY_MAPPED = 208 => "CUDA_ERROR_ALREADY_MAPPED",
    NOT_MAPPED = 211 => "CUDA_ERROR_NOT_MAPPED",
    ECC_UNCORRECTABLE = 214 => "CUDA_ERROR_ECC_UNCORRECTABLE",
    PEER_ACCESS_UNSUPPORTED = 217 => "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED",
    NVLINK_UNCORRECTABLE = 220 => "CUDA_ERROR_NVLINK_UNCORRECTABLE",
    CONTAINED = 226 => "CUDA_ERROR_CONTAINED",
    FILE_NOT_FOUND = 301 => "CUDA_ERROR_FILE_NOT_FOUND",
    OPERATING_SYSTEM = 304 => "CUDA_ERROR_OPERATING_SYSTEM",
    INVALID_HANDLE = 400 => "CUDA_ERROR_INVALID_HANDLE",
    ILLEGAL_STATE = 401 => "CUDA_ERROR_ILLEGAL_STATE",
    NOT_FOUND = 500 => "CUDA_ERROR_NOT_FOUND",
    NOT_READY = 600 => "CUDA_ERROR_NOT_READY",
    ILLEGAL_ADDRESS = 700 => "CUDA_ERROR_ILLEGAL_ADDRESS",
    LAUNCH_TIMEOUT = 702 => "CUDA_ERROR_LAUNCH_TIMEOUT",
    PEER_ACCESS_ALREADY_ENABLED = 704 => "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED",
    PEER_ACCESS_NOT_ENABLED = 705 => "CUDA_ERROR_PEER_ACCESS_NOT_ENABLED",
    ASSERT = 710 => "CUDA_ERROR_ASSERT",
    TOO_MANY_PEERS = 711 => "CUDA_ERROR_TOO_MANY_PEERS",
    HARDWARE_STACK_ERROR = 714 => "CUDA_ERROR_HARDWARE_STACK_ERROR",
    ILLEGAL_INSTRUCTION = 715 => "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    MISALIGNED_ADDRESS = 716 => "CUDA_ERROR_MISALIGNED_ADDRESS",
    INVALID_ADDRESS_SPACE = 717 => "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    INVALID_PC = 718 => "CUDA_ERROR_INVALID_PC",
    LAUNCH_FAILED = 719 => "CUDA_ERROR_LAUNCH_FAILED",
    TENSOR_MEMORY_LEAK = 721 => "CUDA_ERROR_TENSOR_MEMORY_LEAK",
    NOT_PERMITTED = 800 => "CUDA_ERROR_NOT_PERMITTED",
    NOT_SUPPORTED = 801 => "CUDA_ERROR_NOT_SUPPORTED",
    SYSTEM_NOT_READY = 802 => "CUDA_ERROR_SYSTEM_NOT_READY",
    UNKNOWN = 999 => "CUDA_ERROR_UNKNOWN",
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{} {name}", self.0),
            None => write!(f, "{}", self.0),
        }
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a driver call failed. Every variant names the call.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The driver refused the call.
    #[error("{call} on {device} returned {status}; {}", hint(*call, *status))]
    Refused {
        /// The call.
        call: Call,
        /// The device it was made for.
        device: DeviceOrdinal,
        /// What it returned.
        status: Status,
    },
    /// A library could not be opened.
    #[error(
        "cannot open {library}; install the NVIDIA driver, or make its folder visible to the dynamic loader"
    )]
    Library {
        /// File name of the library.
        library: &'static str,
        /// The loader's error.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The library has no such entry point.
    #[error("{call}: the installed driver library has no {symbol}; check the driver's version")]
    MissingSymbol {
        /// The call.
        call: Call,
        /// The entry point, which the call may need beside the one that it is named after.
        symbol: &'static str,
    },
    /// An NVML call failed.
    #[error("{call} on {device} returned NVML status {status}; check nvidia-smi on this host")]
    Nvml {
        /// The call.
        call: Call,
        /// The device it was made for.
        device: DeviceOrdinal,
        /// NVML's return value.
        status: u32,
    },
    /// The operating system refused.
    #[error("{call}: {source}; check descriptor limits and the process's permissions")]
    Os {
        /// The driver call on whose behalf.
        call: Call,
        /// The system's error.
        source: std::io::Error,
    },
}

impl Error {
    /// The call that failed.
    pub fn call(&self) -> Call {
        match self {
            Self::Refused { call, .. }
            | Self::MissingSymbol { call, .. }
            | Self::Nvml { call, .. }
            | Self::Os { call, .. } => *call,
            Self::Library { .. } => Call::Load,
        }
    }

    /// The driver's status, where the driver answered.
    pub fn status(&self) -> Option<Status> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }
}

/// What an operator should check next.
fn hint(call: Call, status: Status) -> &'static str {
    status.advice().unwrap_or(match (call, status) {
        (Call::MemCreate, Status::NOT_PERMITTED) => {
            "no IMEX channel device node is visible to this process, or the handle type is not permitted"
        }
        (Call::MemImport, _) => {
            "check that the exporter lives and, for a fabric handle, that both hosts are in one NVLink domain and run nvidia-imex"
        }
        (Call::IpcOpen, _) => "check that both processes share the IPC and PID namespaces",
        _ => "check the driver log (dmesg, nvidia-smi -q)",
    })
}
