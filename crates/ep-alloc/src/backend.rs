//! What the backends have in common.

mod fabric;
mod malloc;
mod posix_fd;

use std::fmt;
use std::sync::Arc;

use ep_sys::vmm::{Mapping, Physical};
use ep_sys::{Call, DeviceInfo, DeviceOrdinal, DevicePtr, Driver, GranularityKind, HandleKind};

use crate::{BackendKind, Cause, Export, Failure, Untried};

/// A way to allocate memory that peers can map. Sealed: the trait does not leave the crate, users
/// name a [`BackendKind`].
pub(crate) trait Backend: Sync {
    /// The attribute that rules the backend out on a device, if one does.
    fn ruled_out(&self, info: &DeviceInfo) -> Option<Untried>;

    /// Bytes of which an allocation is a multiple.
    fn granularity(&self, driver: &Arc<dyn Driver>, device: DeviceOrdinal) -> ep_sys::Result<u64>;

    /// Allocates `bytes`, a multiple of `granularity`. `gdr` asks for the GPUDirect RDMA flag, and
    /// goes without where it is refused.
    fn allocate(
        &self,
        driver: &Arc<dyn Driver>,
        device: DeviceOrdinal,
        bytes: u64,
        granularity: u64,
        gdr: bool,
    ) -> ep_sys::Result<Box<dyn Memory>>;

    /// Takes one granule as far as one process can and gives it back. The answer is whether the
    /// memory had the GPUDirect RDMA flag.
    fn attempt(
        &self,
        driver: &Arc<dyn Driver>,
        device: DeviceOrdinal,
        granularity: u64,
        gdr: bool,
    ) -> Result<bool, Failure>;
}

/// Allocated memory, released when dropped.
pub(crate) trait Memory: fmt::Debug + Send + Sync {
    fn ptr(&self) -> DevicePtr;
    fn gdr(&self) -> bool;
    fn export(&self) -> ep_sys::Result<Export>;
    fn close(self: Box<Self>) -> ep_sys::Result<()>;
}

pub(crate) fn backend(kind: BackendKind) -> &'static dyn Backend {
    match kind {
        BackendKind::Fabric => &fabric::Fabric,
        BackendKind::PosixFd => &posix_fd::PosixFd,
        BackendKind::Malloc => &malloc::Malloc,
    }
}

/// A backend over virtual memory management: a physical allocation with a shareable handle.
trait Vmm: Sync {
    const HANDLE: HandleKind;

    fn ruled_out(&self, info: &DeviceInfo) -> Option<Untried>;
}

impl<T: Vmm> Backend for T {
    fn ruled_out(&self, info: &DeviceInfo) -> Option<Untried> {
        if info.vmm_attribute {
            Vmm::ruled_out(self, info)
        } else {
            Some(Untried::VmmAttribute)
        }
    }

    fn granularity(&self, driver: &Arc<dyn Driver>, device: DeviceOrdinal) -> ep_sys::Result<u64> {
        driver.mem_granularity(device, T::HANDLE, GranularityKind::Minimum)
    }

    fn allocate(
        &self,
        driver: &Arc<dyn Driver>,
        device: DeviceOrdinal,
        bytes: u64,
        granularity: u64,
        gdr: bool,
    ) -> ep_sys::Result<Box<dyn Memory>> {
        let (physical, gdr) = create(driver, device, T::HANDLE, bytes, gdr)?;
        let mapping = Mapping::new(physical, granularity)?;
        Ok(Box::new(Mapped {
            mapping,
            handle: T::HANDLE,
            gdr,
        }))
    }

    /// Create, export, import, map, set access, write through the imported mapping and read back.
    fn attempt(
        &self,
        driver: &Arc<dyn Driver>,
        device: DeviceOrdinal,
        granularity: u64,
        gdr: bool,
    ) -> Result<bool, Failure> {
        let (created, gdr) = create(driver, device, T::HANDLE, granularity, gdr)?;
        let shareable = created.export(T::HANDLE)?;
        let imported = Physical::import(driver, device, &shareable, granularity)?;
        let mapping = Mapping::new(imported, granularity)?;
        check_bytes(driver, device, mapping.ptr(), granularity)?;
        mapping.close()?;
        created.close()?;
        Ok(gdr)
    }
}

/// A mapped physical allocation.
#[derive(Debug)]
struct Mapped {
    mapping: Mapping,
    handle: HandleKind,
    gdr: bool,
}

impl Memory for Mapped {
    fn ptr(&self) -> DevicePtr {
        self.mapping.ptr()
    }

    fn gdr(&self) -> bool {
        self.gdr
    }

    fn export(&self) -> ep_sys::Result<Export> {
        self.mapping
            .physical()
            .export(self.handle)
            .map(Export::from)
    }

    fn close(self: Box<Self>) -> ep_sys::Result<()> {
        self.mapping.close()
    }
}

/// Creates a physical allocation, with the GPUDirect RDMA flag if it is wanted and granted.
fn create(
    driver: &Arc<dyn Driver>,
    device: DeviceOrdinal,
    handle: HandleKind,
    bytes: u64,
    gdr: bool,
) -> ep_sys::Result<(Physical, bool)> {
    if gdr {
        match Physical::create(driver, device, bytes, handle, true) {
            Ok(physical) => return Ok((physical, true)),
            Err(error) => {
                tracing::debug!(%device, bytes, %error, "retrying without GPUDirect RDMA")
            }
        }
    }
    Physical::create(driver, device, bytes, handle, false).map(|physical| (physical, false))
}

/// Writes a pattern to both ends of mapped memory and reads it back.
fn check_bytes(
    driver: &Arc<dyn Driver>,
    device: DeviceOrdinal,
    ptr: DevicePtr,
    bytes: u64,
) -> Result<(), Failure> {
    // Fresh memory is zeros; no byte of the pattern is.
    const PATTERN: [u8; 16] = *b"ep-alloc granule";
    let end = ptr.offset(bytes.saturating_sub(PATTERN.len() as u64));
    for at in [ptr, end] {
        driver.copy_to_device(device, at, &PATTERN)?;
        let mut read = [0; PATTERN.len()];
        driver.copy_to_host(device, &mut read, at)?;
        if read != PATTERN {
            return Err(Failure {
                call: Call::CopyToHost,
                cause: Cause::WrongBytes,
            });
        }
    }
    Ok(())
}
