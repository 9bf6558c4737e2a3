//! The table of peer pointers that kernels read.

use std::sync::Arc;

use ep_sys::vmm::DeviceMemory;
use ep_sys::{DeviceOrdinal, DevicePtr, Driver};

/// One address per rank in device memory: where the rank's memory is for this device, or null.
///
/// Kernels are given the table's own address, which never changes, so that what they were captured
/// with stays valid when the entries change.
#[derive(Debug)]
pub(crate) struct PeerTable {
    memory: DeviceMemory,
    /// What the device has.
    entries: Vec<DevicePtr>,
}

impl PeerTable {
    /// A table of nulls.
    pub(crate) fn new(
        driver: &Arc<dyn Driver>,
        device: DeviceOrdinal,
        num_ranks: u32,
    ) -> ep_sys::Result<Self> {
        let entries = vec![DevicePtr::NULL; num_ranks as usize];
        let bytes = u64::from(num_ranks) * size_of::<u64>() as u64;
        let mut table = Self {
            memory: DeviceMemory::new(driver, device, bytes)?,
            entries: Vec::new(),
        };
        table.write(entries)?;
        Ok(table)
    }

    /// Writes all entries. When it fails, the device keeps those that it had.
    pub(crate) fn write(&mut self, entries: Vec<DevicePtr>) -> ep_sys::Result<()> {
        // Every device that CUDA has is little-endian.
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|entry| entry.0.to_le_bytes())
            .collect();
        let driver = self.memory.driver();
        driver.copy_to_device(self.memory.device(), self.memory.ptr(), &bytes)?;
        self.entries = entries;
        Ok(())
    }

    /// Makes every entry null.
    pub(crate) fn clear(&mut self) -> ep_sys::Result<()> {
        self.write(vec![DevicePtr::NULL; self.entries.len()])
    }

    /// The table's address on the device.
    pub(crate) fn device_ptr(&self) -> DevicePtr {
        self.memory.ptr()
    }

    /// The entries, by rank.
    pub(crate) fn entries(&self) -> &[DevicePtr] {
        &self.entries
    }

    /// Frees the table.
    pub(crate) fn close(self) -> ep_sys::Result<()> {
        self.memory.close()
    }
}
