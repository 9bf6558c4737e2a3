//! The CUDA implementation of the driver trait, over the libcuda that the host has.

#![allow(
    unsafe_code,
    reason = "this module passes buffers to libcuda and reads memory that it allocated"
)]

mod live;
pub(crate) mod load;
mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};

use cudarc::driver::sys::{
    self, CUdevice, CUdevice_attribute, CUipcMemHandle, CUmemAccess_flags, CUmemAccessDesc,
    CUmemAllocationGranularity_flags, CUmemAllocationHandleType, CUmemAllocationProp,
    CUmemAllocationProp_st__bindgen_ty_1, CUmemAllocationType, CUmemFabricHandle, CUmemLocation,
    CUmemLocationType, CUuuid,
};

use self::live::Live;
use self::load::Site;
use self::table::Table;
use crate::nvml::Nvml;
use crate::{
    Bytes16, Call, DeviceInfo, DeviceOrdinal, DevicePtr, Driver, Error, EventHandle, FabricInfo,
    GranularityKind, HandleKind, HostFacts, HostMemory, IPC_HANDLE_BYTES, Link, PhysHandle, Result,
    ShareableHandle, Status, StreamHandle,
};

/// The installed NVIDIA driver.
///
/// Work runs in each device's primary context, which the CUDA runtime uses too, so kernels launched
/// through the runtime see this memory and these streams. A device's primary context is retained by
/// the first call that needs one and released when the driver is dropped.
///
/// Copies between host and device run on a stream of the driver's own. They wait for no other
/// stream, and none waits for them: synchronise with whatever writes or reads the device memory.
pub struct CudaDriver {
    cuda: Table,
    nvml: OnceLock<Nvml>,
    nvml_path: &'static OsStr,
    devices: Box<[Device]>,
    live: Live,
    host_memory: RwLock<BTreeMap<u64, HostMemory>>,
}

/// A driver, as long as anybody else holds it.
type Shared = Mutex<Weak<CudaDriver>>;

struct Device {
    raw: CUdevice,
    primary: Mutex<Option<Primary>>,
}

#[derive(Clone, Copy)]
struct Primary {
    context: u64,
    /// The stream of `copy_to_device` and `copy_to_host`.
    copies: u64,
}

impl CudaDriver {
    /// Opens libcuda and initialises it. Creates no context.
    ///
    /// A process has one driver: as long as anybody holds it, this gives the same one. So what was
    /// created by one holder is known to all, and devices compare by driver and number.
    ///
    /// Fails, with the reason, where there is no driver or no visible device.
    pub fn load() -> Result<Arc<Self>> {
        static OF_PROCESS: Shared = Shared::new(Weak::new());
        Self::load_into(&OF_PROCESS, || {
            Self::load_from(OsStr::new("libcuda.so.1"), OsStr::new("libnvidia-ml.so.1"))
        })
    }

    /// The driver that is held already, or a new one. A failure is not remembered.
    fn load_into(held: &Shared, load: impl FnOnce() -> Result<Arc<Self>>) -> Result<Arc<Self>> {
        let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(driver) = held.upgrade() {
            return Ok(driver);
        }
        let driver = load()?;
        *held = Arc::downgrade(&driver);
        Ok(driver)
    }

    /// Whether a driver with at least one visible device is here. The reason for a no is logged;
    /// [`load`](Self::load) returns it.
    pub fn is_present() -> bool {
        match Self::load() {
            Ok(_) => true,
            Err(error) => {
                tracing::info!(%error, "no CUDA device");
                false
            }
        }
    }

    fn load_from(cuda: &OsStr, nvml_path: &'static OsStr) -> Result<Arc<Self>> {
        let cuda = Table::resolve(load::open("libcuda.so.1", cuda)?);
        let site = |call, ordinal| Site {
            call,
            device: DeviceOrdinal(ordinal),
        };
        cuda.cuInit(site(Call::Init, 0), 0)?;
        let mut count = 0;
        cuda.cuDeviceGetCount(site(Call::DeviceCount, 0), &mut count)?;
        if count < 1 {
            return Err(refused(site(Call::DeviceCount, 0), Status::NO_DEVICE));
        }
        let devices = (0..count)
            .map(|ordinal| {
                let mut raw = 0;
                cuda.cuDeviceGet(site(Call::DeviceInfo, ordinal as u32), &mut raw, ordinal)?;
                Ok(Device {
                    raw,
                    primary: Mutex::new(None),
                })
            })
            .collect::<Result<_>>()?;
        Ok(Arc::new(Self {
            cuda,
            nvml: OnceLock::new(),
            nvml_path,
            devices,
            live: Live::default(),
            host_memory: RwLock::default(),
        }))
    }

    fn device(&self, site: Site) -> Result<&Device> {
        self.devices
            .get(site.device.0 as usize)
            .ok_or_else(|| refused(site, Status::INVALID_DEVICE))
    }

    /// Makes the device's primary context current until the guard is dropped.
    fn enter(&self, call: Call, device: DeviceOrdinal) -> Result<Current<'_>> {
        let site = Site { call, device };
        let primary = self.primary(site)?;
        self.switch(site, primary)
    }

    /// The device's primary context, retained by the first who asks.
    fn primary(&self, site: Site) -> Result<Primary> {
        let device = self.device(site)?;
        let mut primary = device
            .primary
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(primary) = *primary {
            return Ok(primary);
        }
        let retain = Site {
            call: Call::ContextRetain,
            ..site
        };
        let mut new = Primary {
            context: 0,
            copies: 0,
        };
        self.cuda
            .cuDevicePrimaryCtxRetain(retain, &mut new.context, device.raw)?;
        let created = self.switch(site, new).and_then(|_current| {
            let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            self.cuda.cuStreamCreate(retain, &mut new.copies, flags)
        });
        if let Err(error) = created {
            self.release(retain, device);
            return Err(error);
        }
        *primary = Some(new);
        Ok(new)
    }

    fn switch(&self, site: Site, primary: Primary) -> Result<Current<'_>> {
        let set = Site {
            call: Call::ContextSet,
            ..site
        };
        let mut previous = 0;
        self.cuda.cuCtxGetCurrent(set, &mut previous)?;
        let switched = previous != primary.context;
        if switched {
            self.cuda.cuCtxSetCurrent(set, primary.context)?;
        }
        Ok(Current {
            cuda: &self.cuda,
            site,
            primary,
            previous: switched.then_some(previous),
            this_thread: PhantomData,
        })
    }

    fn release(&self, site: Site, device: &Device) {
        if let Err(error) = self.cuda.cuDevicePrimaryCtxRelease_v2(site, device.raw) {
            tracing::error!(device = site.device.0, %error, "primary context not released");
        }
    }

    fn attribute(&self, site: Site, attribute: CUdevice_attribute) -> Result<c_int> {
        let mut value = 0;
        let raw = self.device(site)?.raw;
        self.cuda
            .cuDeviceGetAttribute(site, &mut value, attribute, raw)?;
        Ok(value)
    }

    /// An attribute that a driver may be too old to know, and then does not have.
    fn has(&self, site: Site, attribute: CUdevice_attribute) -> Result<bool> {
        match self.attribute(site, attribute) {
            Err(error) if error.status() == Some(Status::INVALID_VALUE) => Ok(false),
            value => Ok(value? != 0),
        }
    }

    fn pci_bus_id(&self, site: Site) -> Result<String> {
        let raw = self.device(site)?.raw;
        text(|buffer, len| {
            // SAFETY: writes at most `len` bytes at `buffer`, which has them.
            unsafe { self.cuda.cuDeviceGetPCIBusId(site, buffer, len, raw) }
        })
    }

    /// NVML, opened by the first who asks.
    fn nvml(&self) -> Result<&Nvml> {
        if let Some(nvml) = self.nvml.get() {
            return Ok(nvml);
        }
        let opened = Nvml::open(self.nvml_path)?;
        Ok(self.nvml.get_or_init(|| opened))
    }

    /// What `cuMemCreate` is asked for.
    fn prop(&self, site: Site, kind: HandleKind, gdr: bool) -> Result<CUmemAllocationProp> {
        Ok(CUmemAllocationProp {
            type_: CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            requestedHandleTypes: handle_type(kind),
            location: self.location(site)?,
            win32HandleMetaData: ptr::null_mut(),
            allocFlags: CUmemAllocationProp_st__bindgen_ty_1 {
                compressionType: 0,
                gpuDirectRDMACapable: gdr.into(),
                usage: 0,
                reserved: [0; 4],
            },
        })
    }

    fn location(&self, site: Site) -> Result<CUmemLocation> {
        Ok(CUmemLocation {
            type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: self.device(site)?.raw,
        })
    }
}

impl Driver for CudaDriver {
    fn host_facts(&self) -> HostFacts {
        crate::host::facts()
    }

    fn device_count(&self) -> Result<u32> {
        Ok(self.devices.len() as u32)
    }

    fn device_info(&self, device: DeviceOrdinal) -> Result<DeviceInfo> {
        use CUdevice_attribute as A;
        let site = Site {
            call: Call::DeviceInfo,
            device,
        };
        let raw = self.device(site)?.raw;
        let mut uuid = CUuuid { bytes: [0; 16] };
        self.cuda.cuDeviceGetUuid_v2(site, &mut uuid, raw)?;
        let mut total_bytes = 0;
        self.cuda.cuDeviceTotalMem_v2(site, &mut total_bytes, raw)?;
        Ok(DeviceInfo {
            uuid: Bytes16(uuid.bytes.map(|b| b as u8)),
            pci_bus_id: self.pci_bus_id(site)?,
            name: text(|buffer, len| {
                // SAFETY: writes at most `len` bytes at `buffer`, which has them.
                unsafe { self.cuda.cuDeviceGetName(site, buffer, len, raw) }
            })?,
            compute_capability: (
                self.attribute(site, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32,
                self.attribute(site, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32,
            ),
            multiprocessors: self.attribute(site, A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?
                as u32,
            total_bytes,
            vmm_attribute: self.has(
                site,
                A::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
            )?,
            fabric_attribute: self
                .has(site, A::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED)?,
            posix_fd_attribute: self.has(
                site,
                A::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
            )?,
            gdr_vmm_attribute: self.has(
                site,
                A::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED,
            )?,
        })
    }

    fn fabric_info(&self, device: DeviceOrdinal) -> Result<FabricInfo> {
        let call = Call::FabricInfo;
        let site = Site { call, device };
        // NVML numbers every GPU of the host, CUDA only those visible here: the PCI address is
        // common to both.
        let pci_bus_id = self.pci_bus_id(site)?;
        self.nvml()?.fabric_info(site, &pci_bus_id)
    }

    fn peer_links(&self, device: DeviceOrdinal, peers: &[Bytes16]) -> Result<Vec<Link>> {
        let call = Call::PeerLinks;
        let site = Site { call, device };
        let pci_bus_id = self.pci_bus_id(site)?;
        self.nvml()?.peer_links(site, &pci_bus_id, peers)
    }

    fn can_access_peer(&self, device: DeviceOrdinal, peer: DeviceOrdinal) -> Result<bool> {
        let call = Call::CanAccessPeer;
        let site = Site { call, device };
        let raw = self.device(site)?.raw;
        let peer = self.device(Site { call, device: peer })?.raw;
        let mut can = 0;
        self.cuda.cuDeviceCanAccessPeer(site, &mut can, raw, peer)?;
        Ok(can != 0)
    }

    fn enable_peer_access(&self, device: DeviceOrdinal, peer: DeviceOrdinal) -> Result<()> {
        let call = Call::EnablePeerAccess;
        let peer = self.primary(Site { call, device: peer })?;
        let at = self.enter(call, device)?;
        match self.cuda.cuCtxEnablePeerAccess(at.site, peer.context, 0) {
            Err(error) if error.status() == Some(Status::PEER_ACCESS_ALREADY_ENABLED) => Ok(()),
            result => result,
        }
    }

    fn mem_granularity(
        &self,
        device: DeviceOrdinal,
        handle: HandleKind,
        kind: GranularityKind,
    ) -> Result<u64> {
        use CUmemAllocationGranularity_flags as G;
        let call = Call::MemGranularity;
        let site = Site { call, device };
        let prop = self.prop(site, handle, false)?;
        let option = match kind {
            GranularityKind::Minimum => G::CU_MEM_ALLOC_GRANULARITY_MINIMUM,
            GranularityKind::Recommended => G::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED,
        };
        let mut bytes = 0;
        self.cuda
            .cuMemGetAllocationGranularity(site, &mut bytes, &prop, option)?;
        Ok(bytes)
    }

    fn mem_create(
        &self,
        device: DeviceOrdinal,
        bytes: u64,
        handle: HandleKind,
        gdr: bool,
    ) -> Result<PhysHandle> {
        let at = self.enter(Call::MemCreate, device)?;
        let prop = self.prop(at.site, handle, gdr)?;
        let mut physical = 0;
        self.cuda
            .cuMemCreate(at.site, &mut physical, bytes, &prop, 0)?;
        let physical = PhysHandle(physical);
        self.live.add(physical);
        Ok(physical)
    }

    fn mem_release(&self, device: DeviceOrdinal, handle: PhysHandle) -> Result<()> {
        let at = self.enter(Call::MemRelease, device)?;
        self.live.take(at.site, handle)?;
        self.cuda.cuMemRelease(at.site, handle.0)
    }

    fn mem_reserve(&self, device: DeviceOrdinal, bytes: u64, align: u64) -> Result<DevicePtr> {
        let at = self.enter(Call::MemReserve, device)?;
        let mut ptr = 0;
        self.cuda
            .cuMemAddressReserve(at.site, &mut ptr, bytes, align, 0, 0)?;
        Ok(DevicePtr(ptr))
    }

    fn mem_address_free(&self, device: DeviceOrdinal, ptr: DevicePtr, bytes: u64) -> Result<()> {
        let at = self.enter(Call::MemAddressFree, device)?;
        self.cuda.cuMemAddressFree(at.site, ptr.0, bytes)
    }

    fn mem_map(
        &self,
        device: DeviceOrdinal,
        ptr: DevicePtr,
        bytes: u64,
        handle: PhysHandle,
    ) -> Result<()> {
        let at = self.enter(Call::MemMap, device)?;
        self.live.check(at.site, handle)?;
        self.cuda.cuMemMap(at.site, ptr.0, bytes, 0, handle.0, 0)
    }

    fn mem_unmap(&self, device: DeviceOrdinal, ptr: DevicePtr, bytes: u64) -> Result<()> {
        let at = self.enter(Call::MemUnmap, device)?;
        self.cuda.cuMemUnmap(at.site, ptr.0, bytes)
    }

    fn mem_set_access(&self, device: DeviceOrdinal, ptr: DevicePtr, bytes: u64) -> Result<()> {
        let at = self.enter(Call::MemSetAccess, device)?;
        let desc = [CUmemAccessDesc {
            location: self.location(at.site)?,
            flags: CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        }];
        self.cuda.cuMemSetAccess(at.site, ptr.0, bytes, &desc, 1)
    }

    fn mem_export(
        &self,
        device: DeviceOrdinal,
        handle: PhysHandle,
        kind: HandleKind,
    ) -> Result<ShareableHandle> {
        let at = self.enter(Call::MemExport, device)?;
        self.live.check(at.site, handle)?;
        let export = |shareable: *mut c_void| {
            // SAFETY: `shareable` points to what this kind of handle is written to, below.
            unsafe {
                self.cuda.cuMemExportToShareableHandle(
                    at.site,
                    shareable,
                    handle.0,
                    handle_type(kind),
                    0,
                )
            }
        };
        match kind {
            HandleKind::Fabric => {
                let mut fabric = CUmemFabricHandle { data: [0; 64] };
                export((&raw mut fabric).cast())?;
                Ok(ShareableHandle::Fabric(fabric.data))
            }
            HandleKind::PosixFd => {
                let mut fd: c_int = -1;
                export((&raw mut fd).cast())?;
                if fd < 0 {
                    return Err(Error::Os {
                        call: Call::MemExport,
                        source: io::Error::new(
                            io::ErrorKind::InvalidData,
                            "the driver reported success but gave no descriptor",
                        ),
                    });
                }
                // SAFETY: the driver opened `fd` for this call; nobody else has it.
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                Ok(ShareableHandle::PosixFd(fd))
            }
        }
    }

    fn mem_import(&self, device: DeviceOrdinal, handle: &ShareableHandle) -> Result<PhysHandle> {
        let at = self.enter(Call::MemImport, device)?;
        let mut physical = 0;
        let mut import = |shareable: *mut c_void| {
            let kind = handle_type(handle.kind());
            // SAFETY: `shareable` is what this kind of handle is read from, below.
            unsafe {
                self.cuda
                    .cuMemImportFromShareableHandle(at.site, &mut physical, shareable, kind)
            }
        };
        match handle {
            ShareableHandle::Fabric(data) => {
                let mut fabric = CUmemFabricHandle { data: *data };
                import((&raw mut fabric).cast())?;
            }
            // The descriptor itself, as a pointer-sized value.
            ShareableHandle::PosixFd(fd) => {
                import(ptr::without_provenance_mut(fd.as_raw_fd() as usize))?;
            }
        }
        let physical = PhysHandle(physical);
        self.live.add(physical);
        Ok(physical)
    }

    fn mem_alloc(&self, device: DeviceOrdinal, bytes: u64) -> Result<DevicePtr> {
        let at = self.enter(Call::MemAlloc, device)?;
        let mut ptr = 0;
        self.cuda.cuMemAlloc_v2(at.site, &mut ptr, bytes)?;
        Ok(DevicePtr(ptr))
    }

    fn mem_free(&self, device: DeviceOrdinal, ptr: DevicePtr) -> Result<()> {
        let at = self.enter(Call::MemFree, device)?;
        self.cuda.cuMemFree_v2(at.site, ptr.0)
    }

    fn mem_info(&self, device: DeviceOrdinal) -> Result<(u64, u64)> {
        let at = self.enter(Call::MemInfo, device)?;
        let (mut free, mut total) = (0, 0);
        self.cuda.cuMemGetInfo_v2(at.site, &mut free, &mut total)?;
        Ok((free, total))
    }

    fn ipc_get_handle(
        &self,
        device: DeviceOrdinal,
        ptr: DevicePtr,
    ) -> Result<[u8; IPC_HANDLE_BYTES]> {
        let at = self.enter(Call::IpcGetHandle, device)?;
        let mut handle = CUipcMemHandle {
            reserved: [0; IPC_HANDLE_BYTES],
        };
        self.cuda.cuIpcGetMemHandle(at.site, &mut handle, ptr.0)?;
        Ok(handle.reserved.map(|b| b as u8))
    }

    fn ipc_open(
        &self,
        device: DeviceOrdinal,
        handle: &[u8; IPC_HANDLE_BYTES],
    ) -> Result<DevicePtr> {
        let at = self.enter(Call::IpcOpen, device)?;
        let handle = CUipcMemHandle {
            reserved: handle.map(|b| b as c_char),
        };
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut ptr = 0;
        self.cuda
            .cuIpcOpenMemHandle_v2(at.site, &mut ptr, handle, flags)?;
        Ok(DevicePtr(ptr))
    }

    fn ipc_close(&self, device: DeviceOrdinal, ptr: DevicePtr) -> Result<()> {
        let at = self.enter(Call::IpcClose, device)?;
        self.cuda.cuIpcCloseMemHandle(at.site, ptr.0)
    }

    fn host_alloc(&self, device: DeviceOrdinal, bytes: u64) -> Result<HostMemory> {
        let at = self.enter(Call::HostAlloc, device)?;
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        let mut host = 0;
        self.cuda.cuMemHostAlloc(at.site, &mut host, bytes, flags)?;
        // SAFETY: the driver has just allocated these `bytes` at `host`, writable.
        unsafe { ptr::write_bytes(host_ptr::<u8>(host), 0, bytes as usize) };
        let mut ptr = 0;
        let mapped = self
            .cuda
            .cuMemHostGetDevicePointer_v2(at.site, &mut ptr, host, 0);
        if let Err(error) = mapped {
            if let Err(error) = self.cuda.cuMemFreeHost(at.site, host) {
                tracing::error!(device = device.0, host, %error, "host memory not released");
            }
            return Err(error);
        }
        let memory = HostMemory {
            host,
            device: DevicePtr(ptr),
            bytes,
        };
        self.host_memory
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(host, memory);
        Ok(memory)
    }

    fn host_free(&self, device: DeviceOrdinal, memory: HostMemory) -> Result<()> {
        let at = self.enter(Call::HostFree, device)?;
        // Taken out first: a load under way holds the lock, a later one finds nothing.
        let known = {
            let mut live = self
                .host_memory
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            live.get(&memory.host) == Some(&memory) && live.remove(&memory.host).is_some()
        };
        if !known {
            return Err(refused(at.site, Status::INVALID_VALUE));
        }
        self.cuda.cuMemFreeHost(at.site, memory.host)
    }

    fn host_load(&self, memory: HostMemory, offset: u64) -> Result<u64> {
        let live = self
            .host_memory
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let inside = offset.checked_add(8).is_some_and(|end| end <= memory.bytes);
        let address = memory.host.wrapping_add(offset);
        if !inside || !address.is_multiple_of(8) || live.get(&memory.host) != Some(&memory) {
            let site = Site {
                call: Call::HostLoad,
                device: DeviceOrdinal(0),
            };
            return Err(refused(site, Status::INVALID_VALUE));
        }
        // SAFETY: the word is aligned and lies within an allocation that cannot be freed while
        // `live` is held. This process reads it here only, the device writes it atomically.
        let word = unsafe { AtomicU64::from_ptr(host_ptr(address)) };
        Ok(word.load(Ordering::Acquire))
    }

    fn fill(
        &self,
        device: DeviceOrdinal,
        ptr: DevicePtr,
        value: u8,
        bytes: u64,
        stream: StreamHandle,
    ) -> Result<()> {
        let at = self.enter(Call::Fill, device)?;
        self.cuda
            .cuMemsetD8Async(at.site, ptr.0, value, bytes, stream.0)
    }

    fn copy_to_device(&self, device: DeviceOrdinal, dst: DevicePtr, src: &[u8]) -> Result<()> {
        let at = self.enter(Call::CopyToDevice, device)?;
        let (from, bytes, copies) = (src.as_ptr().cast(), src.len() as u64, at.primary.copies);
        // SAFETY: `from` is readable for `bytes`, until after the stream has been waited for.
        unsafe {
            self.cuda
                .cuMemcpyHtoDAsync_v2(at.site, dst.0, from, bytes, copies)
        }?;
        self.cuda.cuStreamSynchronize(at.site, copies)
    }

    fn copy_to_host(&self, device: DeviceOrdinal, dst: &mut [u8], src: DevicePtr) -> Result<()> {
        let at = self.enter(Call::CopyToHost, device)?;
        let (to, bytes, copies) = (dst.as_mut_ptr().cast(), dst.len() as u64, at.primary.copies);
        // SAFETY: `to` is writable for `bytes`, until after the stream has been waited for.
        unsafe {
            self.cuda
                .cuMemcpyDtoHAsync_v2(at.site, to, src.0, bytes, copies)
        }?;
        self.cuda.cuStreamSynchronize(at.site, copies)
    }

    fn copy_on_device(
        &self,
        device: DeviceOrdinal,
        dst: DevicePtr,
        src: DevicePtr,
        bytes: u64,
        stream: StreamHandle,
    ) -> Result<()> {
        let at = self.enter(Call::CopyOnDevice, device)?;
        self.cuda
            .cuMemcpyDtoDAsync_v2(at.site, dst.0, src.0, bytes, stream.0)
    }

    fn stream_create(&self, device: DeviceOrdinal) -> Result<StreamHandle> {
        let at = self.enter(Call::StreamCreate, device)?;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let mut stream = 0;
        self.cuda.cuStreamCreate(at.site, &mut stream, flags)?;
        let stream = StreamHandle(stream);
        self.live.add(stream);
        Ok(stream)
    }

    fn stream_destroy(&self, device: DeviceOrdinal, stream: StreamHandle) -> Result<()> {
        let at = self.enter(Call::StreamDestroy, device)?;
        self.live.take(at.site, stream)?;
        self.cuda.cuStreamDestroy_v2(at.site, stream.0)
    }

    fn stream_synchronize(&self, device: DeviceOrdinal, stream: StreamHandle) -> Result<()> {
        let at = self.enter(Call::StreamSynchronize, device)?;
        self.cuda.cuStreamSynchronize(at.site, stream.0)
    }

    fn stream_wait_event(
        &self,
        device: DeviceOrdinal,
        stream: StreamHandle,
        event: EventHandle,
    ) -> Result<()> {
        let at = self.enter(Call::StreamWaitEvent, device)?;
        self.live.check(at.site, event)?;
        self.cuda.cuStreamWaitEvent(at.site, stream.0, event.0, 0)
    }

    fn event_create(&self, device: DeviceOrdinal, timing: bool) -> Result<EventHandle> {
        use sys::CUevent_flags as F;
        let at = self.enter(Call::EventCreate, device)?;
        let flags = if timing {
            F::CU_EVENT_DEFAULT
        } else {
            F::CU_EVENT_DISABLE_TIMING
        };
        let mut event = 0;
        self.cuda.cuEventCreate(at.site, &mut event, flags as u32)?;
        let event = EventHandle(event);
        self.live.add(event);
        Ok(event)
    }

    fn event_destroy(&self, device: DeviceOrdinal, event: EventHandle) -> Result<()> {
        let at = self.enter(Call::EventDestroy, device)?;
        self.live.take(at.site, event)?;
        self.cuda.cuEventDestroy_v2(at.site, event.0)
    }

    fn event_record(
        &self,
        device: DeviceOrdinal,
        event: EventHandle,
        stream: StreamHandle,
    ) -> Result<()> {
        let at = self.enter(Call::EventRecord, device)?;
        self.live.check(at.site, event)?;
        self.cuda.cuEventRecord(at.site, event.0, stream.0)
    }

    fn event_synchronize(&self, device: DeviceOrdinal, event: EventHandle) -> Result<()> {
        let at = self.enter(Call::EventSynchronize, device)?;
        self.live.check(at.site, event)?;
        self.cuda.cuEventSynchronize(at.site, event.0)
    }

    fn event_elapsed_us(
        &self,
        device: DeviceOrdinal,
        start: EventHandle,
        end: EventHandle,
    ) -> Result<f64> {
        let at = self.enter(Call::EventElapsed, device)?;
        self.live.check(at.site, start)?;
        self.live.check(at.site, end)?;
        let mut milliseconds = 0.0;
        self.cuda
            .cuEventElapsedTime(at.site, &mut milliseconds, start.0, end.0)?;
        Ok(f64::from(milliseconds) * 1e3)
    }
}

impl fmt::Debug for CudaDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaDriver")
            .field("devices", &self.devices.len())
            .finish_non_exhaustive()
    }
}

impl Drop for CudaDriver {
    fn drop(&mut self) {
        for (ordinal, device) in self.devices.iter().enumerate() {
            let primary = *device
                .primary
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let Some(primary) = primary else { continue };
            let site = Site {
                call: Call::ContextRetain,
                device: DeviceOrdinal(ordinal as u32),
            };
            let destroyed = self
                .switch(site, primary)
                .and_then(|at| self.cuda.cuStreamDestroy_v2(site, at.primary.copies));
            if let Err(error) = destroyed {
                tracing::error!(device = ordinal, %error, "copy stream not destroyed");
            }
            self.release(site, device);
        }
    }
}

/// A device's primary context, current on this thread until dropped.
struct Current<'a> {
    cuda: &'a Table,
    site: Site,
    primary: Primary,
    previous: Option<u64>,
    /// What is current is a property of the thread.
    this_thread: PhantomData<*const ()>,
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        let Some(previous) = self.previous else {
            return;
        };
        let set = Site {
            call: Call::ContextSet,
            ..self.site
        };
        if let Err(error) = self.cuda.cuCtxSetCurrent(set, previous) {
            tracing::error!(device = set.device.0, %error, "caller's context not restored");
        }
    }
}

fn refused(Site { call, device }: Site, status: Status) -> Error {
    Error::Refused {
        call,
        device,
        status,
    }
}

fn handle_type(kind: HandleKind) -> CUmemAllocationHandleType {
    match kind {
        HandleKind::Fabric => CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_FABRIC,
        HandleKind::PosixFd => CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
    }
}

/// The text that a call writes to a buffer, given the buffer and its size.
fn text(write: impl FnOnce(*mut c_char, c_int) -> Result<()>) -> Result<String> {
    let mut buffer = [0_u8; 256];
    write(buffer.as_mut_ptr().cast(), buffer.len() as c_int)?;
    let text = CStr::from_bytes_until_nul(&buffer).unwrap_or_default();
    Ok(text.to_string_lossy().into_owned())
}

/// Memory that the driver allocated, by the number that it gave.
fn host_ptr<T>(address: u64) -> *mut T {
    ptr::with_exposed_provenance_mut(address as usize)
}
