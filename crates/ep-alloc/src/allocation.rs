//! The memory that a plan asks for.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use ep_sys::{
    DeviceOrdinal, DevicePtr, Driver, FABRIC_HANDLE_BYTES, IPC_HANDLE_BYTES, ShareableHandle,
};

use crate::backend::{Memory, backend};
use crate::{BackendKind, Error};

/// Device memory that peers can map, readable and writable by its own device.
///
/// The contents are undefined. Dropping it releases the memory and logs a refusal;
/// [`close`](Self::close) reports it. Neither waits: work that may touch the memory, on this device
/// or on a peer's, has ended before.
#[derive(Debug)]
pub struct Allocation {
    memory: Box<dyn Memory>,
    kind: BackendKind,
    device: DeviceOrdinal,
    bytes: u64,
    granularity: u64,
}

impl Allocation {
    /// Allocates at least `bytes` on a device, rounded up to the backend's granularity.
    ///
    /// `gdr` asks for memory that an RDMA NIC can register. Where the driver refuses that,
    /// the memory is created without, and [`gdr`](Self::gdr) says so.
    pub fn new(
        driver: &Arc<dyn Driver>,
        device: DeviceOrdinal,
        kind: BackendKind,
        bytes: u64,
        gdr: bool,
    ) -> Result<Self, Error> {
        let failed = |source| Error::Allocate {
            backend: kind,
            device,
            bytes,
            source,
        };
        let backend = backend(kind);
        let granularity = backend.granularity(driver, device).map_err(failed)?;
        let rounded = match bytes.checked_next_multiple_of(granularity) {
            Some(rounded) if rounded > 0 => rounded,
            _ => return Err(Error::Size { bytes, granularity }),
        };
        let memory = backend
            .allocate(driver, device, rounded, granularity, gdr)
            .map_err(failed)?;
        Ok(Self {
            memory,
            kind,
            device,
            bytes: rounded,
            granularity,
        })
    }

    /// The first address.
    pub fn ptr(&self) -> DevicePtr {
        self.memory.ptr()
    }

    /// Size in bytes, rounded up. A peer maps all of it.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of which the size, and for fabric and posix_fd the address, is a multiple.
    pub fn granularity(&self) -> u64 {
        self.granularity
    }

    /// The backend.
    pub fn kind(&self) -> BackendKind {
        self.kind
    }

    /// The device that holds it.
    pub fn device(&self) -> DeviceOrdinal {
        self.device
    }

    /// Whether it was created with the GPUDirect RDMA flag.
    pub fn gdr(&self) -> bool {
        self.memory.gdr()
    }

    /// The handle by which a peer imports the memory. Each call gives one; a descriptor is the
    /// caller's to close.
    pub fn export(&self) -> Result<Export, Error> {
        self.memory.export().map_err(|source| Error::Export {
            backend: self.kind,
            device: self.device,
            bytes: self.bytes,
            source,
        })
    }

    /// Gives the memory back.
    pub fn close(self) -> Result<(), Error> {
        self.memory.close().map_err(|source| Error::Release {
            backend: self.kind,
            device: self.device,
            bytes: self.bytes,
            source,
        })
    }
}

/// What a peer imports.
#[derive(Debug)]
pub enum Export {
    /// A fabric handle.
    Fabric([u8; FABRIC_HANDLE_BYTES]),
    /// A descriptor; travels by `SCM_RIGHTS`.
    PosixFd(OwnedFd),
    /// A CUDA IPC handle.
    Ipc([u8; IPC_HANDLE_BYTES]),
}

impl Export {
    /// The backend whose memory it names.
    pub fn kind(&self) -> BackendKind {
        match self {
            Self::Fabric(_) => BackendKind::Fabric,
            Self::PosixFd(_) => BackendKind::PosixFd,
            Self::Ipc(_) => BackendKind::Malloc,
        }
    }
}

impl From<ShareableHandle> for Export {
    fn from(handle: ShareableHandle) -> Self {
        match handle {
            ShareableHandle::Fabric(bytes) => Self::Fabric(bytes),
            ShareableHandle::PosixFd(fd) => Self::PosixFd(fd),
        }
    }
}
