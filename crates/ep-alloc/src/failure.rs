//! A driver's refusal as plain data, which a rank can tell the others.

use std::fmt;

use ep_sys::{Call, Status};

use crate::{BackendKind, call_from_code, call_to_code};

/// A call that failed, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Failure {
    /// The call.
    pub call: Call,
    /// How it failed.
    pub cause: Cause,
}

/// How a call failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Cause {
    /// The driver answered with this status.
    Status(Status),
    /// NVML answered with this return value.
    Nvml(u32),
    /// The operating system answered with this error number; 0 if it gave none.
    Os(u32),
    /// The driver library has no such entry point.
    NoSymbol,
    /// A driver library could not be opened.
    NoLibrary,
    /// The call succeeded but the memory did not hold what had been written.
    WrongBytes,
    /// The call succeeded, and its answer was no.
    No,
    /// An error that this crate has no name for.
    Other,
}

impl Failure {
    /// The driver's status or NVML's return value, where one of them answered.
    pub fn status(self) -> Option<u32> {
        match self.cause {
            Cause::Status(Status(number)) | Cause::Nvml(number) => Some(number),
            _ => None,
        }
    }

    /// Whether this is how the driver refuses fabric memory to a process without an IMEX channel:
    /// 800 when it is created, 801 when a handle is imported (measured with driver 580).
    pub fn asks_for_imex(self, kind: BackendKind) -> bool {
        let Cause::Status(status) = self.cause else {
            return false;
        };
        kind == BackendKind::Fabric
            && match self.call {
                Call::MemCreate => status == Status::NOT_PERMITTED,
                Call::MemImport => matches!(status, Status::NOT_PERMITTED | Status::NOT_SUPPORTED),
                _ => false,
            }
    }

    /// What it means in words, where backend, call and status tell. `no_imex`: the process sees no
    /// IMEX channel.
    pub fn meaning(self, kind: BackendKind, no_imex: bool) -> Option<&'static str> {
        use BackendKind::{Fabric, Malloc};
        if no_imex && self.asks_for_imex(kind) {
            return Some("no IMEX channel is visible to the process");
        }
        match (kind, self.call, self.cause) {
            (Fabric, Call::MemCreate, Cause::Status(Status::NOT_PERMITTED)) => {
                Some("an IMEX channel is visible, but the process may not use it")
            }
            (_, Call::MemCreate, Cause::Status(Status::NOT_SUPPORTED)) => {
                Some("the GPU or its driver has no such handles")
            }
            (_, _, Cause::Status(Status::OUT_OF_MEMORY)) => Some("the device's memory is used up"),
            (_, _, Cause::Status(Status::SYSTEM_NOT_READY)) => {
                Some("the NVSwitch fabric is not set up")
            }
            (_, _, Cause::Status(Status::NO_DEVICE | Status::INVALID_DEVICE)) => {
                Some("the process sees no such GPU")
            }
            (Fabric, Call::MemImport, Cause::Status(_)) => {
                Some("the IMEX domain does not let the handle in")
            }
            (Malloc, Call::IpcOpen, Cause::Status(Status::PEER_ACCESS_UNSUPPORTED)) => {
                Some("the GPUs cannot address each other")
            }
            (Malloc, Call::IpcOpen, Cause::Status(_)) => {
                Some("CUDA IPC does not work between the two processes")
            }
            (_, Call::CanAccessPeer, Cause::No) => Some("the GPUs cannot address each other"),
            (_, Call::PeerLinks, Cause::No) => Some("no NVLink joins the GPUs"),
            _ => None,
        }
    }

    /// What an operator should check next. `no_imex`: the process sees no IMEX channel.
    pub fn check(self, kind: BackendKind, no_imex: bool) -> &'static str {
        use BackendKind::{Fabric, Malloc, PosixFd};
        if no_imex && self.asks_for_imex(kind) {
            return "check that /dev/nvidia-caps-imex-channels/channel0 exists and is passed to the \
                    container, and that nvidia-imex runs";
        }
        if let Cause::Status(status) = self.cause
            && let Some(advice) = status.advice()
        {
            return advice;
        }
        match (kind, self.call, self.cause) {
            (Fabric, Call::MemCreate, Cause::Status(Status::NOT_PERMITTED)) => {
                "check the permissions of /dev/nvidia-caps-imex-channels/channel* and that \
                 nvidia-imex runs"
            }
            (_, _, Cause::NoLibrary) => {
                "install the NVIDIA driver, or make its folder visible to the dynamic loader"
            }
            (_, _, Cause::NoSymbol) => "check the driver's version",
            (PosixFd, _, Cause::Os(_)) => "check the descriptor limit (ulimit -n)",
            (Fabric, Call::MemImport, _) => {
                "check with nvidia-imex-ctl -N that both hosts are in one IMEX domain"
            }
            (Malloc, Call::IpcGetHandle, _) => {
                "check that the platform has CUDA IPC (virtual machines may not), or set \
                 EP_ALLOC=posix-fd"
            }
            (Malloc, Call::IpcOpen, _) => {
                "let the processes share the IPC and PID namespaces, or set EP_ALLOC=posix-fd"
            }
            (_, Call::CanAccessPeer, _) => "check nvidia-smi topo -p2p r on that host",
            (_, Call::PeerLinks, _) => "check nvidia-smi topo -p2p n on that host",
            (_, Call::FabricInfo, _) | (_, _, Cause::Nvml(_)) => "check nvidia-smi -q on that host",
            _ => "check the driver log on that host (dmesg)",
        }
    }

    /// An integer that travels; never 0. The upper 16 bits are 0.
    pub fn to_code(self) -> u64 {
        let (tag, value) = match self.cause {
            Cause::Status(Status(status)) => (1, status),
            Cause::Nvml(status) => (2, status),
            Cause::Os(errno) => (3, errno),
            Cause::NoSymbol => (4, 0),
            Cause::NoLibrary => (5, 0),
            Cause::WrongBytes => (6, 0),
            Cause::Other => (7, 0),
            Cause::No => (8, 0),
        };
        // The call takes 12 bits and the tag 4, so that a trial finds room above.
        let call = u64::from(call_to_code(self.call)) & 0xfff;
        (tag << 44) | (call << 32) | u64::from(value)
    }

    /// The failure that [`to_code`](Self::to_code) gave this code.
    pub fn from_code(code: u64) -> Option<Self> {
        let value = (code & 0xffff_ffff) as u32;
        let call = call_from_code(((code >> 32) & 0xfff) as u16)?;
        let cause = match (code >> 44, value) {
            (1, _) => Cause::Status(Status(value)),
            (2, _) => Cause::Nvml(value),
            (3, _) => Cause::Os(value),
            (4, 0) => Cause::NoSymbol,
            (5, 0) => Cause::NoLibrary,
            (6, 0) => Cause::WrongBytes,
            (7, 0) => Cause::Other,
            (8, 0) => Cause::No,
            _ => return None,
        };
        Some(Self { call, cause })
    }
}

impl From<&ep_sys::Error> for Failure {
    fn from(error: &ep_sys::Error) -> Self {
        let cause = match error {
            ep_sys::Error::Refused { status, .. } => Cause::Status(*status),
            ep_sys::Error::Nvml { status, .. } => Cause::Nvml(*status),
            ep_sys::Error::Os { source, .. } => Cause::Os(
                source
                    .raw_os_error()
                    .map_or(0, |errno| errno.unsigned_abs()),
            ),
            ep_sys::Error::MissingSymbol { .. } => Cause::NoSymbol,
            ep_sys::Error::Library { .. } => Cause::NoLibrary,
            _ => Cause::Other,
        };
        Self {
            call: error.call(),
            cause,
        }
    }
}

impl From<ep_sys::Error> for Failure {
    fn from(error: ep_sys::Error) -> Self {
        Self::from(&error)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let call = self.call;
        match self.cause {
            Cause::Status(status) => write!(f, "{call} returned {status}"),
            Cause::Nvml(status) => write!(f, "{call} returned NVML status {status}"),
            Cause::Os(errno) => write!(f, "{call} failed with system error {errno}"),
            Cause::NoSymbol => write!(f, "{call} is missing from the driver library"),
            Cause::NoLibrary => write!(f, "{call} found no driver library"),
            Cause::WrongBytes => write!(f, "{call} read other bytes than were written"),
            Cause::No => write!(f, "{call} answered no"),
            Cause::Other => write!(f, "{call} failed"),
        }
    }
}
