//! What a buffer holds on its device.

use std::sync::Arc;

use ep_kernels::{Layout, Shape};
use ep_sys::vmm::{self, DeviceMemory};
use ep_sys::{DeviceOrdinal, DevicePtr, Driver};

use crate::fault::Ring;
use crate::{Device, Error};

/// What a rank's kernels use besides its peers' memory.
#[derive(Debug)]
pub(crate) struct DeviceState {
    pub(crate) device: Device,
    pub(crate) rank: u32,
    pub(crate) shape: Shape,
    pub(crate) layout: Layout,
    pub(crate) timeout_ns: u64,
    pub(crate) num_sms: u32,
    /// `EP_CONTROL_BYTES`, kept by the kernels; the participation table is at its beginning.
    pub(crate) control: DeviceMemory,
    pub(crate) faults: Ring,
    pub(crate) slots: SlotMemory,
    /// u64 for each rank: the base of its symmetric buffer. Of `ep-peers`, which keeps it.
    pub(crate) table: DevicePtr,
}

/// What handles have on the device, for every slot.
#[derive(Debug)]
pub(crate) struct SlotMemory {
    memory: DeviceMemory,
    /// Of the parts of a slot, from its beginning, and of the next slot's.
    offsets: [u64; 4],
}

impl SlotMemory {
    pub(crate) fn new(
        driver: &Arc<dyn Driver>,
        device: DeviceOrdinal,
        shape: &Shape,
    ) -> ep_sys::Result<Self> {
        let mut offsets = [0; 4];
        let mut end = 0;
        for (offset, bytes) in offsets[1..].iter_mut().zip(shape.handle_bytes()) {
            end += bytes.next_multiple_of(256);
            *offset = end;
        }
        let memory = DeviceMemory::new(driver, device, end * u64::from(shape.slots))?;
        Ok(Self { memory, offsets })
    }

    /// Addresses of a slot's route, map and row counts.
    pub(crate) fn of(&self, slot: u32) -> [DevicePtr; 3] {
        let [route, map, rows, stride] = self.offsets;
        let base = self.memory.ptr().offset(u64::from(slot) * stride);
        [route, map, rows].map(|offset| base.offset(offset))
    }

    pub(crate) fn zero(
        &self,
        driver: &Arc<dyn Driver>,
        stream: &vmm::Stream,
    ) -> ep_sys::Result<()> {
        driver.fill(
            self.memory.device(),
            self.memory.ptr(),
            0,
            self.memory.bytes(),
            stream.handle(),
        )
    }
}

impl DeviceState {
    pub(crate) fn table(&self) -> DevicePtr {
        self.table
    }

    /// Frees everything. All is tried; the error is the first.
    pub(crate) fn close(self) -> Result<(), Error> {
        let rank = self.rank;
        let closed = [
            self.control.close(),
            self.faults.close(),
            self.slots.memory.close(),
        ];
        closed
            .into_iter()
            .collect::<Result<(), _>>()
            .map_err(|source| Error::driver("freeing the buffer")(source).of_rank(rank))
    }
}

/// A control block in which every rank takes part.
pub(crate) fn new_control(
    driver: &Arc<dyn Driver>,
    device: DeviceOrdinal,
    shape: &Shape,
) -> ep_sys::Result<DeviceMemory> {
    let memory = DeviceMemory::new(driver, device, shape.control_bytes())?;
    let mut image = vec![0; memory.bytes() as usize];
    for active in image.chunks_exact_mut(4).take(shape.num_ranks as usize) {
        active.copy_from_slice(&1_u32.to_ne_bytes());
    }
    driver.copy_to_device(device, memory.ptr(), &image)?;
    Ok(memory)
}
