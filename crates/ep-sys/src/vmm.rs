//! Guards: what the driver handed out, held by the value that gives it back.
//!
//! One guard per acquisition, taken at once, so that an early return at any point releases exactly
//! what had been acquired. Dropping a guard releases and logs a refusal; `close` releases and
//! reports it. A release is tried once: a resource whose release was refused is lost to the process,
//! never released twice.
//!
//! A guard does not wait for the device. Whoever drops memory that work in flight may touch, on this
//! device or on a peer's, has synchronised with that work first.

use std::fmt;
use std::sync::Arc;

use crate::{
    DeviceOrdinal, DevicePtr, Driver, EventHandle, HandleKind, HostMemory, IPC_HANDLE_BYTES,
    PhysHandle, Result, ShareableHandle, StreamHandle,
};

/// A physical allocation, created here or imported.
#[derive(Debug)]
pub struct Physical {
    owned: Owned<PhysHandle>,
    bytes: u64,
}

impl Physical {
    /// Creates a physical allocation on `device` that can be exported as `kind`.
    ///
    /// `bytes` is a multiple of the device's granularity. `gdr` asks for memory that an RDMA NIC can
    /// register.
    pub fn create(
        driver: &Arc<dyn Driver>,
        device: DeviceOrdinal,
        bytes: u64,
        kind: HandleKind,
        gdr: bool,
    ) -> Result<Self> {
        let handle = driver.mem_create(device, bytes, kind, gdr)?;
        Ok(Self {
            owned: Owned::new(driver, device, handle),
            bytes,
        })
    }

    /// Imports a physical allocation for use from `device`. `bytes` is its size, as the exporter
    /// states it; the driver checks it when the allocation is mapped.
    pub fn import(
        driver: &Arc<dyn Driver>,
        device: DeviceOrdinal,
        shareable: &ShareableHandle,
        bytes: u64,
    ) -> Result<Self> {
        let handle = driver.mem_import(device, shareable)?;
        Ok(Self {
            owned: Owned::new(driver, device, handle),
            bytes,
        })
    }

    /// Exports the allocation in the form in which it travels.
    pub fn export(&self, kind: HandleKind) -> Result<ShareableHandle> {
        self.owned
            .driver
            .mem_export(self.owned.device, self.owned.resource, kind)
    }

    /// The driver's handle.
    pub fn handle(&self) -> PhysHandle {
        self.owned.resource
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The device that it was created on or imported for.
    pub fn device(&self) -> DeviceOrdinal {
        self.owned.device
    }

    /// The driver that gave it.
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.owned.driver
    }

    /// Gives the allocation up. Mappings keep the memory alive.
    pub fn close(self) -> Result<()> {
        self.owned.close()
    }
}

/// Reserved address space with nothing mapped by this guard.
#[derive(Debug)]
pub struct Reservation {
    owned: Owned<Reserved>,
}

impl Reservation {
    /// Reserves `bytes` of address space at a multiple of `align`.
    pub fn new(
        driver: &Arc<dyn Driver>,
        device: DeviceOrdinal,
        bytes: u64,
        align: u64,
    ) -> Result<Self> {
        let ptr = driver.mem_reserve(device, bytes, align)?;
        Ok(Self {
            owned: Owned::new(driver, device, Reserved { ptr, bytes }),
        })
    }

    /// The first address.
    pub fn ptr(&self) -> DevicePtr {
        self.owned.resource.ptr
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.owned.resource.bytes
    }

    /// Gives the address space back.
    pub fn close(self) -> Result<()> {
        self.owned.close()
    }
}

/// A whole physical allocation, mapped where its device, and only that device, reads and writes it.
#[derive(Debug)]
pub struct Mapping {
    // Fields drop in this order, and the driver accepts no other.
    mapped: Owned<Mapped>,
    reservation: Reservation,
    physical: Physical,
}

impl Mapping {
    /// Reserves address space at a multiple of `align`, maps `physical` there and lets its device
    /// access it. On failure all of it, `physical` included, has been released.
    pub fn new(physical: Physical, align: u64) -> Result<Self> {
        let (device, bytes) = (physical.device(), physical.bytes());
        let driver = Arc::clone(physical.driver());
        let reservation = Reservation::new(&driver, device, bytes, align)?;
        let ptr = reservation.ptr();
        driver.mem_map(device, ptr, bytes, physical.handle())?;
        let mapped = Owned::new(&driver, device, Mapped { ptr, bytes });
        driver.mem_set_access(device, ptr, bytes)?;
        Ok(Self {
            mapped,
            reservation,
            physical,
        })
    }

    /// The first address.
    pub fn ptr(&self) -> DevicePtr {
        self.mapped.resource.ptr
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.mapped.resource.bytes
    }

    /// The allocation that is mapped.
    pub fn physical(&self) -> &Physical {
        &self.physical
    }

    /// The device that can access it.
    pub fn device(&self) -> DeviceOrdinal {
        self.mapped.device
    }

    /// Unmaps, gives the address space back and gives the allocation up. All three are tried; the
    /// error is the first, and further ones are logged.
    pub fn close(self) -> Result<()> {
        let Self {
            mapped,
            reservation,
            physical,
        } = self;
        let unmapped = mapped.close();
        let freed = reservation.owned.close_after(unmapped);
        physical.owned.close_after(freed)
    }
}

/// Plain device memory.
#[derive(Debug)]
pub struct DeviceMemory {
    owned: Owned<Plain>,
    bytes: u64,
}

impl DeviceMemory {
    /// Allocates `bytes` on `device`, at least 256-byte aligned, contents undefined.
    pub fn new(driver: &Arc<dyn Driver>, device: DeviceOrdinal, bytes: u64) -> Result<Self> {
        let ptr = driver.mem_alloc(device, bytes)?;
        Ok(Self {
            owned: Owned::new(driver, device, Plain(ptr)),
            bytes,
        })
    }

    /// The first address.
    pub fn ptr(&self) -> DevicePtr {
        self.owned.resource.0
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The CUDA IPC handle by which another process of this host opens the memory.
    pub fn ipc_handle(&self) -> Result<[u8; IPC_HANDLE_BYTES]> {
        self.owned
            .driver
            .ipc_get_handle(self.owned.device, self.ptr())
    }

    /// The device that holds it.
    pub fn device(&self) -> DeviceOrdinal {
        self.owned.device
    }

    /// The driver that gave it.
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.owned.driver
    }

    /// Frees the memory.
    pub fn close(self) -> Result<()> {
        self.owned.close()
    }
}

/// Another process's plain device memory, opened by its CUDA IPC handle.
#[derive(Debug)]
pub struct IpcMapping {
    owned: Owned<Opened>,
}

impl IpcMapping {
    /// Opens the memory for access from `device`.
    pub fn open(
        driver: &Arc<dyn Driver>,
        device: DeviceOrdinal,
        handle: &[u8; IPC_HANDLE_BYTES],
    ) -> Result<Self> {
        let ptr = driver.ipc_open(device, handle)?;
        Ok(Self {
            owned: Owned::new(driver, device, Opened(ptr)),
        })
    }

    /// The first address, as `device` sees it.
    pub fn ptr(&self) -> DevicePtr {
        self.owned.resource.0
    }

    /// The device that can access it.
    pub fn device(&self) -> DeviceOrdinal {
        self.owned.device
    }

    /// Closes the mapping. The exporter's memory stays.
    pub fn close(self) -> Result<()> {
        self.owned.close()
    }
}

/// Page-locked host memory that the device can write: where kernels report.
#[derive(Debug)]
pub struct HostBuffer {
    owned: Owned<HostMemory>,
}

impl HostBuffer {
    /// Allocates `bytes` of zeros, mapped for the device.
    pub fn new(driver: &Arc<dyn Driver>, device: DeviceOrdinal, bytes: u64) -> Result<Self> {
        let memory = driver.host_alloc(device, bytes)?;
        Ok(Self {
            owned: Owned::new(driver, device, memory),
        })
    }

    /// Its addresses and size.
    pub fn memory(&self) -> HostMemory {
        self.owned.resource
    }

    /// Reads the 8-byte word at `offset` bytes, a multiple of 8. Order: acquire.
    pub fn load(&self, offset: u64) -> Result<u64> {
        self.owned.driver.host_load(self.owned.resource, offset)
    }

    /// Frees the memory.
    pub fn close(self) -> Result<()> {
        self.owned.close()
    }
}

/// A stream that does not synchronise with the legacy default stream.
#[derive(Debug)]
pub struct Stream {
    owned: Owned<StreamHandle>,
}

impl Stream {
    /// Creates a stream on `device`.
    pub fn new(driver: &Arc<dyn Driver>, device: DeviceOrdinal) -> Result<Self> {
        let handle = driver.stream_create(device)?;
        Ok(Self {
            owned: Owned::new(driver, device, handle),
        })
    }

    /// The driver's handle.
    pub fn handle(&self) -> StreamHandle {
        self.owned.resource
    }

    /// The stream's device.
    pub fn device(&self) -> DeviceOrdinal {
        self.owned.device
    }

    /// Waits until all work on the stream has finished. Bounded only by that work.
    pub fn synchronize(&self) -> Result<()> {
        self.owned
            .driver
            .stream_synchronize(self.owned.device, self.owned.resource)
    }

    /// Lets later work on this stream wait for `event`.
    pub fn wait_event(&self, event: &Event) -> Result<()> {
        self.owned
            .driver
            .stream_wait_event(self.owned.device, self.owned.resource, event.handle())
    }

    /// Destroys the stream. Work already on it still runs.
    pub fn close(self) -> Result<()> {
        self.owned.close()
    }
}

/// An event.
#[derive(Debug)]
pub struct Event {
    owned: Owned<EventHandle>,
}

impl Event {
    /// Creates an event on `device`; one that can be timed if `timing`.
    pub fn new(driver: &Arc<dyn Driver>, device: DeviceOrdinal, timing: bool) -> Result<Self> {
        let handle = driver.event_create(device, timing)?;
        Ok(Self {
            owned: Owned::new(driver, device, handle),
        })
    }

    /// The driver's handle.
    pub fn handle(&self) -> EventHandle {
        self.owned.resource
    }

    /// Records the event on a stream of its device.
    pub fn record(&self, stream: StreamHandle) -> Result<()> {
        self.owned
            .driver
            .event_record(self.owned.device, self.owned.resource, stream)
    }

    /// Waits until the event has been reached. Bounded only by the work before it.
    pub fn synchronize(&self) -> Result<()> {
        self.owned
            .driver
            .event_synchronize(self.owned.device, self.owned.resource)
    }

    /// Microseconds from `start` to this event; both timed, recorded and reached.
    pub fn elapsed_us(&self, start: &Self) -> Result<f64> {
        self.owned
            .driver
            .event_elapsed_us(self.owned.device, start.handle(), self.handle())
    }

    /// Destroys the event.
    pub fn close(self) -> Result<()> {
        self.owned.close()
    }
}

/// Something the driver handed out, released exactly once.
struct Owned<R: Resource> {
    driver: Arc<dyn Driver>,
    device: DeviceOrdinal,
    resource: R,
    released: bool,
}

impl<R: Resource> Owned<R> {
    fn new(driver: &Arc<dyn Driver>, device: DeviceOrdinal, resource: R) -> Self {
        Self {
            driver: Arc::clone(driver),
            device,
            resource,
            released: false,
        }
    }

    fn close(mut self) -> Result<()> {
        self.release()
    }

    /// Releases after something that this one was a part of. Of two refusals the first is the
    /// error, and the second is logged as when a guard is dropped.
    fn close_after(self, before: Result<()>) -> Result<()> {
        match before {
            Ok(()) => self.close(),
            Err(_) => {
                drop(self);
                before
            }
        }
    }

    fn release(&mut self) -> Result<()> {
        self.released = true;
        self.resource.release(&*self.driver, self.device)
    }
}

impl<R: Resource> Drop for Owned<R> {
    fn drop(&mut self) {
        if !self.released
            && let Err(error) = self.release()
        {
            tracing::error!(device = self.device.0, resource = ?self.resource, %error, "release refused");
        }
    }
}

impl<R: Resource> fmt::Debug for Owned<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of {}", self.resource, self.device)
    }
}

/// A thing that the driver hands out, by the call that takes it back.
trait Resource: Copy + fmt::Debug {
    fn release(self, driver: &dyn Driver, device: DeviceOrdinal) -> Result<()>;
}

impl Resource for PhysHandle {
    fn release(self, driver: &dyn Driver, device: DeviceOrdinal) -> Result<()> {
        driver.mem_release(device, self)
    }
}

#[derive(Clone, Copy, Debug)]
struct Reserved {
    ptr: DevicePtr,
    bytes: u64,
}

impl Resource for Reserved {
    fn release(self, driver: &dyn Driver, device: DeviceOrdinal) -> Result<()> {
        driver.mem_address_free(device, self.ptr, self.bytes)
    }
}

#[derive(Clone, Copy, Debug)]
struct Mapped {
    ptr: DevicePtr,
    bytes: u64,
}

impl Resource for Mapped {
    fn release(self, driver: &dyn Driver, device: DeviceOrdinal) -> Result<()> {
        driver.mem_unmap(device, self.ptr, self.bytes)
    }
}

#[derive(Clone, Copy, Debug)]
struct Plain(DevicePtr);

impl Resource for Plain {
    fn release(self, driver: &dyn Driver, device: DeviceOrdinal) -> Result<()> {
        driver.mem_free(device, self.0)
    }
}

#[derive(Clone, Copy, Debug)]
struct Opened(DevicePtr);

impl Resource for Opened {
    fn release(self, driver: &dyn Driver, device: DeviceOrdinal) -> Result<()> {
        driver.ipc_close(device, self.0)
    }
}

impl Resource for HostMemory {
    fn release(self, driver: &dyn Driver, device: DeviceOrdinal) -> Result<()> {
        driver.host_free(device, self)
    }
}

impl Resource for StreamHandle {
    fn release(self, driver: &dyn Driver, device: DeviceOrdinal) -> Result<()> {
        driver.stream_destroy(device, self)
    }
}

impl Resource for EventHandle {
    fn release(self, driver: &dyn Driver, device: DeviceOrdinal) -> Result<()> {
        driver.event_destroy(device, self)
    }
}
