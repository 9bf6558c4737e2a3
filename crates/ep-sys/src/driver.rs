//! The seam: one method per driver entry point that the project uses.

use std::fmt;

use crate::{
    Bytes16, DeviceInfo, DeviceOrdinal, DevicePtr, EventHandle, FabricInfo, GranularityKind,
    HandleKind, HostFacts, HostMemory, IPC_HANDLE_BYTES, Link, PhysHandle, Result, ShareableHandle,
    StreamHandle,
};

/// A GPU driver: the real one ([`CudaDriver`](crate::CudaDriver)) or a simulated cluster.
///
/// Calls are for set-up, tear-down and host-side copies; no call is made between a dispatch and its
/// combine. Every method may be called from any thread, makes the device's primary context current
/// for its own duration only, and gives back the caller's.
///
/// What a call frees, unmaps or writes must be the caller's own: the [crate](crate) says what its
/// holder vouches for.
///
/// Sizes are bytes. Methods that take a stream are ordered on it; the others complete before they
/// return and are ordered with no stream, not even the default one: synchronise first.
pub trait Driver: fmt::Debug + Send + Sync {
    /// What this process sees of its host. Asks no driver; cannot fail.
    fn host_facts(&self) -> HostFacts;
    /// Whether device memory is memory of this process, so that host code may follow device addresses
    /// as far as the device may. Only a simulated driver's is.
    fn is_host_addressable(&self) -> bool {
        false
    }
    /// Number of devices visible to this process.
    fn device_count(&self) -> Result<u32>;
    /// Identity and attributes of a device.
    fn device_info(&self, device: DeviceOrdinal) -> Result<DeviceInfo>;
    /// NVML's fabric information; of a GPU that has no fabric [`FabricInfo::NONE`]. It is an error
    /// if NVML is missing, too old, or refuses: the GPU may well be in a fabric.
    fn fabric_info(&self, device: DeviceOrdinal) -> Result<FabricInfo>;
    /// What joins `device` and each of these other GPUs of the host, by their UUIDs, in their order.
    /// They need not be visible to this process. It is an error if NVML is missing, too old, or
    /// refuses.
    fn peer_links(&self, device: DeviceOrdinal, peers: &[Bytes16]) -> Result<Vec<Link>>;
    /// Whether `device` can address the memory of `peer`, both visible to this process.
    fn can_access_peer(&self, device: DeviceOrdinal, peer: DeviceOrdinal) -> Result<bool>;
    /// Lets `device` address plain allocations of `peer`. Enabling twice is no error.
    fn enable_peer_access(&self, device: DeviceOrdinal, peer: DeviceOrdinal) -> Result<()>;

    /// The multiple that sizes and addresses of physical allocations of this kind must keep.
    fn mem_granularity(
        &self,
        device: DeviceOrdinal,
        handle: HandleKind,
        kind: GranularityKind,
    ) -> Result<u64>;
    /// Creates a physical allocation that can be exported as `handle`. `bytes` is a multiple of the
    /// granularity. `gdr` asks for memory that an RDMA NIC can register.
    fn mem_create(
        &self,
        device: DeviceOrdinal,
        bytes: u64,
        handle: HandleKind,
        gdr: bool,
    ) -> Result<PhysHandle>;
    /// Gives up a physical allocation; mappings keep the memory alive.
    fn mem_release(&self, device: DeviceOrdinal, handle: PhysHandle) -> Result<()>;
    /// Reserves address space.
    fn mem_reserve(&self, device: DeviceOrdinal, bytes: u64, align: u64) -> Result<DevicePtr>;
    /// Gives up reserved address space. Refused while something is mapped there.
    fn mem_address_free(&self, device: DeviceOrdinal, ptr: DevicePtr, bytes: u64) -> Result<()>;
    /// Maps a whole physical allocation at a reserved address.
    fn mem_map(
        &self,
        device: DeviceOrdinal,
        ptr: DevicePtr,
        bytes: u64,
        handle: PhysHandle,
    ) -> Result<()>;
    /// Removes a mapping.
    fn mem_unmap(&self, device: DeviceOrdinal, ptr: DevicePtr, bytes: u64) -> Result<()>;
    /// Lets `device`, and only it, read and write a mapping.
    fn mem_set_access(&self, device: DeviceOrdinal, ptr: DevicePtr, bytes: u64) -> Result<()>;
    /// Exports a physical allocation in the form in which it travels.
    fn mem_export(
        &self,
        device: DeviceOrdinal,
        handle: PhysHandle,
        kind: HandleKind,
    ) -> Result<ShareableHandle>;
    /// Imports another process's, or this process's own, physical allocation.
    fn mem_import(&self, device: DeviceOrdinal, handle: &ShareableHandle) -> Result<PhysHandle>;

    /// Plain device memory, at least 256-byte aligned, contents undefined.
    fn mem_alloc(&self, device: DeviceOrdinal, bytes: u64) -> Result<DevicePtr>;
    /// Frees plain device memory.
    fn mem_free(&self, device: DeviceOrdinal, ptr: DevicePtr) -> Result<()>;
    /// Free and total device memory.
    fn mem_info(&self, device: DeviceOrdinal) -> Result<(u64, u64)>;
    /// The CUDA IPC handle of a plain allocation.
    fn ipc_get_handle(
        &self,
        device: DeviceOrdinal,
        ptr: DevicePtr,
    ) -> Result<[u8; IPC_HANDLE_BYTES]>;
    /// Opens another process's plain allocation for access from `device`.
    fn ipc_open(&self, device: DeviceOrdinal, handle: &[u8; IPC_HANDLE_BYTES])
    -> Result<DevicePtr>;
    /// Closes what [`ipc_open`](Self::ipc_open) opened.
    fn ipc_close(&self, device: DeviceOrdinal, ptr: DevicePtr) -> Result<()>;

    /// Page-locked host memory, zeroed, mapped for the device.
    fn host_alloc(&self, device: DeviceOrdinal, bytes: u64) -> Result<HostMemory>;
    /// Frees page-locked host memory.
    fn host_free(&self, device: DeviceOrdinal, memory: HostMemory) -> Result<()>;
    /// Reads an aligned 8-byte word of page-locked memory that the device may be writing.
    /// `offset` is in bytes. Order: acquire.
    fn host_load(&self, memory: HostMemory, offset: u64) -> Result<u64>;

    /// Fills device memory with a byte, ordered on the stream.
    fn fill(
        &self,
        device: DeviceOrdinal,
        ptr: DevicePtr,
        value: u8,
        bytes: u64,
        stream: StreamHandle,
    ) -> Result<()>;
    /// Copies host bytes to device memory; returns when they have arrived.
    fn copy_to_device(&self, device: DeviceOrdinal, dst: DevicePtr, src: &[u8]) -> Result<()>;
    /// Copies device memory to host bytes; returns when they have arrived.
    fn copy_to_host(&self, device: DeviceOrdinal, dst: &mut [u8], src: DevicePtr) -> Result<()>;
    /// Copies device memory to memory that this device can address, ordered on the stream.
    fn copy_on_device(
        &self,
        device: DeviceOrdinal,
        dst: DevicePtr,
        src: DevicePtr,
        bytes: u64,
        stream: StreamHandle,
    ) -> Result<()>;

    /// Creates a stream that does not synchronise with the legacy default stream.
    fn stream_create(&self, device: DeviceOrdinal) -> Result<StreamHandle>;
    /// Destroys a stream.
    fn stream_destroy(&self, device: DeviceOrdinal, stream: StreamHandle) -> Result<()>;
    /// Waits until all work on a stream has finished.
    fn stream_synchronize(&self, device: DeviceOrdinal, stream: StreamHandle) -> Result<()>;
    /// Lets later work on `stream` wait for `event`.
    fn stream_wait_event(
        &self,
        device: DeviceOrdinal,
        stream: StreamHandle,
        event: EventHandle,
    ) -> Result<()>;
    /// Creates an event; one that can be timed if `timing`.
    fn event_create(&self, device: DeviceOrdinal, timing: bool) -> Result<EventHandle>;
    /// Destroys an event.
    fn event_destroy(&self, device: DeviceOrdinal, event: EventHandle) -> Result<()>;
    /// Records an event on a stream.
    fn event_record(
        &self,
        device: DeviceOrdinal,
        event: EventHandle,
        stream: StreamHandle,
    ) -> Result<()>;
    /// Waits until an event has been reached.
    fn event_synchronize(&self, device: DeviceOrdinal, event: EventHandle) -> Result<()>;
    /// Microseconds between two recorded and reached events, to about half a microsecond.
    fn event_elapsed_us(
        &self,
        device: DeviceOrdinal,
        start: EventHandle,
        end: EventHandle,
    ) -> Result<f64>;
}
