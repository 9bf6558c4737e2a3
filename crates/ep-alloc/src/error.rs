//! Why memory could not be had, handed out or given back.

use ep_sys::{Call, DeviceOrdinal, Status};

use crate::{BackendKind, Failure};

/// Why an operation on an [`Allocation`](crate::Allocation) failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Allocating failed. What had been acquired has been given back.
    #[error(
        "{backend}: allocating {bytes} bytes on {device} failed at {}; {}",
        source.call(), check(*backend, source)
    )]
    Allocate {
        /// The backend.
        backend: BackendKind,
        /// The device.
        device: DeviceOrdinal,
        /// Bytes that were asked for.
        bytes: u64,
        /// The driver's error.
        source: ep_sys::Error,
    },
    /// Exporting failed. The allocation is as it was.
    #[error(
        "{backend}: exporting {bytes} bytes of {device} failed at {}; {}",
        source.call(), check(*backend, source)
    )]
    Export {
        /// The backend.
        backend: BackendKind,
        /// The device.
        device: DeviceOrdinal,
        /// Bytes of the allocation.
        bytes: u64,
        /// The driver's error.
        source: ep_sys::Error,
    },
    /// Giving memory back failed. What was refused is lost to the process; the rest is given back.
    #[error(
        "{backend}: releasing {bytes} bytes of {device} failed at {}; {}",
        source.call(), check(*backend, source)
    )]
    Release {
        /// The backend.
        backend: BackendKind,
        /// The device.
        device: DeviceOrdinal,
        /// Bytes of the allocation.
        bytes: u64,
        /// The driver's first error.
        source: ep_sys::Error,
    },
    /// No allocation has this size.
    #[error(
        "{bytes} bytes cannot be rounded up to a positive multiple of {granularity}; check the \
         buffer's limits"
    )]
    Size {
        /// Bytes that were asked for.
        bytes: u64,
        /// Bytes of which an allocation is a multiple.
        granularity: u64,
    },
}

impl Error {
    /// The call that failed, if one did.
    pub fn call(&self) -> Option<Call> {
        self.driver().map(ep_sys::Error::call)
    }

    /// The driver's status, where the driver answered.
    pub fn status(&self) -> Option<Status> {
        self.driver().and_then(ep_sys::Error::status)
    }

    /// The driver's error, if it is one, as plain data.
    pub fn failure(&self) -> Option<Failure> {
        self.driver().map(Failure::from)
    }

    fn driver(&self) -> Option<&ep_sys::Error> {
        match self {
            Self::Allocate { source, .. }
            | Self::Export { source, .. }
            | Self::Release { source, .. } => Some(source),
            Self::Size { .. } => None,
        }
    }
}

/// What to check next. Whether an IMEX channel is visible was settled by the probe.
fn check(backend: BackendKind, error: &ep_sys::Error) -> &'static str {
    Failure::from(error).check(backend, false)
}
