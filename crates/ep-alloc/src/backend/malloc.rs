//! Plain device memory and CUDA IPC: what every single node has always had.

use std::sync::Arc;

use ep_sys::vmm::DeviceMemory;
use ep_sys::{DeviceInfo, DeviceOrdinal, DevicePtr, Driver};

use super::{Backend, Memory};
use crate::{Export, Failure, Untried};

pub(super) struct Malloc;

/// The driver carves smaller allocations out of blocks of this size, and an IPC handle opens the
/// whole block to the peer: other allocations of the process with it.
const GRANULARITY: u64 = 2 << 20;

impl Backend for Malloc {
    fn ruled_out(&self, _info: &DeviceInfo) -> Option<Untried> {
        None
    }

    fn granularity(
        &self,
        _driver: &Arc<dyn Driver>,
        _device: DeviceOrdinal,
    ) -> ep_sys::Result<u64> {
        Ok(GRANULARITY)
    }

    fn allocate(
        &self,
        driver: &Arc<dyn Driver>,
        device: DeviceOrdinal,
        bytes: u64,
        _granularity: u64,
        _gdr: bool,
    ) -> ep_sys::Result<Box<dyn Memory>> {
        DeviceMemory::new(driver, device, bytes)
            .map(|memory| -> Box<dyn Memory> { Box::new(memory) })
    }

    /// Allocates and asks for the IPC handle; a process cannot open its own.
    fn attempt(
        &self,
        driver: &Arc<dyn Driver>,
        device: DeviceOrdinal,
        granularity: u64,
        _gdr: bool,
    ) -> Result<bool, Failure> {
        let memory = DeviceMemory::new(driver, device, granularity)?;
        memory.ipc_handle()?;
        memory.close()?;
        Ok(false)
    }
}

impl Memory for DeviceMemory {
    fn ptr(&self) -> DevicePtr {
        Self::ptr(self)
    }

    /// Plain memory needs no flag for GPUDirect RDMA.
    fn gdr(&self) -> bool {
        false
    }

    fn export(&self) -> ep_sys::Result<Export> {
        self.ipc_handle().map(Export::Ipc)
    }

    fn close(self: Box<Self>) -> ep_sys::Result<()> {
        (*self).close()
    }
}
