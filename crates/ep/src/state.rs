//! What a buffer holds on its device beside symmetric memory.

use ep_kernels::ffi::EP_ABORTED;
use ep_kernels::{Layout, Shape};
use ep_sys::DevicePtr;
use ep_sys::vmm::DeviceMemory;

use crate::builder::Settings;
use crate::connection::first_of;
use crate::fault::Ring;
use crate::{Device, Error};

/// What a rank's kernels use beside its peers' memory.
#[derive(Debug)]
pub(crate) struct DeviceState {
    pub(crate) device: Device,
    pub(crate) rank: u32,
    pub(crate) shape: Shape,
    pub(crate) layout: Layout,
    pub(crate) timeout_ns: u64,
    pub(crate) num_sms: u32,
    /// `EP_CONTROL_BYTES`, kept by the kernels; the participation table is at its beginning.
    control: DeviceMemory,
    pub(crate) faults: Ring,
    slots: SlotMemory,
}

impl DeviceState {
    /// Allocates everything, as kernels expect it at first.
    pub(crate) fn new(
        device: &Device,
        rank: u32,
        shape: Shape,
        layout: Layout,
        settings: &Settings,
        num_sms: u32,
    ) -> Result<Self, Error> {
        let failed = Error::driver("allocating what operations need");
        let (driver, ordinal) = (device.driver(), device.ordinal());
        let allocate = || -> ep_sys::Result<_> {
            let control = DeviceMemory::new(driver, ordinal, shape.control_bytes())?;
            let image = control_image(&shape, |_| true);
            driver.copy_to_device(ordinal, control.ptr(), &image)?;
            let slots = SlotMemory::new(device, &shape)?;
            Ok((control, slots, Ring::new(driver, ordinal)?))
        };
        let (control, slots, faults) = allocate().map_err(failed)?;
        Ok(Self {
            device: device.clone(),
            rank,
            shape,
            layout,
            timeout_ns: u64::try_from(settings.timeout.as_nanos()).unwrap_or(u64::MAX),
            num_sms,
            control,
            faults,
            slots,
        })
    }

    /// Puts everything back as it was at first, for a group of these ranks.
    pub(crate) fn reset(&self, members: &[u32]) -> Result<(), Error> {
        let image = control_image(&self.shape, |rank| members.contains(&rank));
        let (driver, ordinal) = (self.device.driver(), self.device.ordinal());
        driver
            .copy_to_device(ordinal, self.control.ptr(), &image)
            .and_then(|()| self.faults.clear(&self.device))
            .map_err(Error::driver("resetting what operations use"))
    }

    /// Ends the waits of what runs and will run, until everything is put back.
    pub(crate) fn abort(&self) -> Result<(), Error> {
        let aborted = [u64::from(EP_ABORTED).to_le_bytes(); 2];
        let (driver, ordinal) = (self.device.driver(), self.device.ordinal());
        let waits = self.shape.control_waits();
        waits
            .into_iter()
            .try_for_each(|at| {
                driver.copy_to_device(
                    ordinal,
                    self.control.ptr().offset(at),
                    aborted.as_flattened(),
                )
            })
            .map_err(Error::driver("calling operations off"))
    }

    pub(crate) fn control(&self) -> DevicePtr {
        self.control.ptr()
    }

    /// Addresses of a slot's route, map and row counts.
    pub(crate) fn slot(&self, slot: u32) -> [DevicePtr; 3] {
        let [route, map, rows, stride] = self.slots.offsets;
        let base = self.slots.memory.ptr().offset(u64::from(slot) * stride);
        [route, map, rows].map(|offset| base.offset(offset))
    }

    /// Frees everything. All is tried; the error is the first, and others are logged.
    pub(crate) fn close(self) -> Result<(), Error> {
        let Self {
            rank,
            control,
            faults,
            slots,
            ..
        } = self;
        [control.close(), faults.close(), slots.memory.close()]
            .into_iter()
            .map(|freed| freed.map_err(Error::driver("freeing what operations needed")))
            .map(|freed| freed.map_err(|error| error.of_rank(rank)))
            .fold(Ok(()), first_of)
    }
}

/// A control block for a group of these ranks, in which nothing has happened yet.
fn control_image(shape: &Shape, is_member: impl Fn(u32) -> bool) -> Vec<u8> {
    let active = |rank| u32::from(is_member(rank)).to_le_bytes();
    let mut image: Vec<u8> = (0..shape.num_ranks).flat_map(active).collect();
    image.resize(shape.control_bytes() as usize, 0);
    image
}

/// What handles have on the device, for every slot.
#[derive(Debug)]
struct SlotMemory {
    memory: DeviceMemory,
    /// Of a slot's parts from its beginning, and of the next slot.
    offsets: [u64; 4],
}

impl SlotMemory {
    fn new(device: &Device, shape: &Shape) -> ep_sys::Result<Self> {
        let mut offsets = [0; 4];
        let mut end = 0;
        for (offset, bytes) in offsets[1..].iter_mut().zip(shape.handle_bytes()) {
            end += bytes.next_multiple_of(256);
            *offset = end;
        }
        let bytes = end * u64::from(shape.slots);
        let memory = DeviceMemory::new(device.driver(), device.ordinal(), bytes)?;
        Ok(Self { memory, offsets })
    }
}
