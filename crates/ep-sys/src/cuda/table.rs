//! The entry points of libcuda, with cuda.h's signatures.
//!
//! Versioned entry points are named exactly: the library keeps every version that it ever exported.
//! Contexts, streams and events, which are opaque pointers, are declared as the numbers that this
//! crate passes around; `size_t` as `u64`, which it is wherever CUDA runs.

#![allow(unsafe_code, reason = "this file calls libcuda's functions")]

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};

use cudarc::driver::sys::{
    CUdevice, CUdevice_attribute, CUdeviceptr, CUipcMemHandle, CUmemAccessDesc,
    CUmemAllocationGranularity_flags, CUmemAllocationHandleType, CUmemAllocationProp,
    CUmemGenericAllocationHandle, CUuuid,
};

use super::load::{Site, entry_points};
use crate::{Error, Status};

const _: () = assert!(size_of::<usize>() == size_of::<u64>());

fn refused(Site { call, device }: Site, status: u32) -> Error {
    Error::Refused {
        call,
        device,
        status: Status(status),
    }
}

entry_points! {
    /// libcuda.
    pub(super) struct Table refuses with refused;

    safe {
        fn cuInit(flags: c_uint);

        fn cuDeviceGetCount(count: &mut c_int);
        fn cuDeviceGet(device: &mut CUdevice, ordinal: c_int);
        fn cuDeviceGetAttribute(value: &mut c_int, attribute: CUdevice_attribute, device: CUdevice);
        fn cuDeviceGetUuid_v2(uuid: &mut CUuuid, device: CUdevice);
        fn cuDeviceTotalMem_v2(bytes: &mut u64, device: CUdevice);
        fn cuDeviceCanAccessPeer(can: &mut c_int, device: CUdevice, peer: CUdevice);

        fn cuDevicePrimaryCtxRetain(context: &mut u64, device: CUdevice);
        fn cuDevicePrimaryCtxRelease_v2(device: CUdevice);
        fn cuCtxGetCurrent(context: &mut u64);
        fn cuCtxSetCurrent(context: u64);
        fn cuCtxEnablePeerAccess(peer: u64, flags: c_uint);

        fn cuMemGetAllocationGranularity(
            bytes: &mut u64,
            prop: &CUmemAllocationProp,
            option: CUmemAllocationGranularity_flags,
        );
        fn cuMemCreate(
            handle: &mut CUmemGenericAllocationHandle,
            bytes: u64,
            prop: &CUmemAllocationProp,
            flags: c_ulonglong,
        );
        fn cuMemRelease(handle: CUmemGenericAllocationHandle);
        fn cuMemAddressReserve(
            ptr: &mut CUdeviceptr,
            bytes: u64,
            align: u64,
            hint: CUdeviceptr,
            flags: c_ulonglong,
        );
        fn cuMemAddressFree(ptr: CUdeviceptr, bytes: u64);
        fn cuMemMap(
            ptr: CUdeviceptr,
            bytes: u64,
            offset: u64,
            handle: CUmemGenericAllocationHandle,
            flags: c_ulonglong,
        );
        fn cuMemUnmap(ptr: CUdeviceptr, bytes: u64);
        fn cuMemSetAccess(ptr: CUdeviceptr, bytes: u64, desc: &[CUmemAccessDesc; 1], count: u64);

        fn cuMemAlloc_v2(ptr: &mut CUdeviceptr, bytes: u64);
        fn cuMemFree_v2(ptr: CUdeviceptr);
        fn cuMemGetInfo_v2(free: &mut u64, total: &mut u64);
        fn cuIpcGetMemHandle(handle: &mut CUipcMemHandle, ptr: CUdeviceptr);
        fn cuIpcOpenMemHandle_v2(ptr: &mut CUdeviceptr, handle: CUipcMemHandle, flags: c_uint);
        fn cuIpcCloseMemHandle(ptr: CUdeviceptr);

        fn cuMemHostAlloc(host: &mut u64, bytes: u64, flags: c_uint);
        fn cuMemHostGetDevicePointer_v2(ptr: &mut CUdeviceptr, host: u64, flags: c_uint);
        fn cuMemFreeHost(host: u64);

        fn cuMemsetD8Async(ptr: CUdeviceptr, value: u8, bytes: u64, stream: u64);
        fn cuMemcpyDtoDAsync_v2(dst: CUdeviceptr, src: CUdeviceptr, bytes: u64, stream: u64);

        fn cuStreamCreate(stream: &mut u64, flags: c_uint);
        fn cuStreamDestroy_v2(stream: u64);
        fn cuStreamSynchronize(stream: u64);
        fn cuStreamWaitEvent(stream: u64, event: u64, flags: c_uint);
        fn cuEventCreate(event: &mut u64, flags: c_uint);
        fn cuEventDestroy_v2(event: u64);
        fn cuEventRecord(event: u64, stream: u64);
        fn cuEventSynchronize(event: u64);
        fn cuEventElapsedTime(milliseconds: &mut f32, start: u64, end: u64);
    }

    // SAFETY: nothing is called here; raw pointers make the methods of these unsafe to call.
    unsafe {
        fn cuDeviceGetName(name: *mut c_char, len: c_int, device: CUdevice);
        fn cuDeviceGetPCIBusId(id: *mut c_char, len: c_int, device: CUdevice);
        fn cuMemExportToShareableHandle(
            shareable: *mut c_void,
            handle: CUmemGenericAllocationHandle,
            kind: CUmemAllocationHandleType,
            flags: c_ulonglong,
        );
        fn cuMemImportFromShareableHandle(
            handle: &mut CUmemGenericAllocationHandle,
            shareable: *mut c_void,
            kind: CUmemAllocationHandleType,
        );
        fn cuMemcpyHtoDAsync_v2(dst: CUdeviceptr, src: *const c_void, bytes: u64, stream: u64);
        fn cuMemcpyDtoHAsync_v2(dst: *mut c_void, src: CUdeviceptr, bytes: u64, stream: u64);
    }
}
