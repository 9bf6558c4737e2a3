//! Filling the kernels' arguments and launching: the only unsafe code of the crate.
//!
//! Every address in the arguments is either of a resource that the buffer holds, or of a tensor that
//! has been checked. A tensor's address is of memory that a [`Tensor`](crate::Tensor) owns, or
//! a caller vouched for it with one of the unsafe constructors here.

#![allow(
    unsafe_code,
    reason = "launches kernels on addresses, and declares the constructors that vouch for addresses"
)]

use std::sync::Arc;

#[cfg(feature = "cuda")]
use ep_kernels::CudaKernels;
use ep_kernels::{Kernels, LaunchError, ffi};
use ep_sys::{DeviceOrdinal, DevicePtr, Driver, StreamHandle};

use crate::connection::Connection;
use crate::state::DeviceState;
use crate::tensor::{DType, Dims, Raw};
use crate::{Device, Error, Stream, TensorMut, TensorRef};

impl Device {
    /// A device with kernels of the caller's choice.
    ///
    /// # Safety
    /// `kernels` must be able to follow the addresses that `driver` gives for device `ordinal`:
    /// host kernels only those of a driver whose device memory is this process's own.
    pub unsafe fn new(
        driver: Arc<dyn Driver>,
        kernels: Arc<dyn Kernels>,
        ordinal: DeviceOrdinal,
    ) -> Self {
        Self::from_parts(driver, kernels, ordinal)
    }
}

impl Stream {
    /// A caller's own stream, such as a framework's current one.
    ///
    /// # Default streams
    /// 0 and [`StreamHandle::LEGACY`] are the legacy default stream, and are taken. It suits a
    /// program that uses no other stream. It waits for all blocking streams of the device and they
    /// wait for it, so an operation there that waits for a rank holds up their work too. Streams of
    /// [`new`](Self::new), like all non-blocking ones, are not ordered with it: let them
    /// [`follow`](Self::follow). It cannot be captured in a CUDA graph, and to use it while a
    /// blocking stream is captured spoils that capture. For graphs, and beside other work, give a
    /// stream of one's own.
    ///
    /// [`StreamHandle::PER_THREAD`] is refused. It names another stream on every thread, and a
    /// buffer may be used, waited for and closed on another thread than the one that enqueued. A
    /// caller that is compiled for per-thread default streams means that one by 0, too, which
    /// cannot be told from here.
    ///
    /// # Errors
    /// [`Error::PerThreadStream`].
    ///
    /// # Safety
    /// `raw` must be a live stream (`CUstream`) of the device, and stay one until the value and its
    /// clones are gone. A buffer keeps a clone of the stream that it was last used with until it is
    /// used with another or closed.
    pub unsafe fn borrowed(device: &Device, raw: StreamHandle) -> Result<Self, Error> {
        match raw {
            StreamHandle::PER_THREAD => Err(Error::PerThreadStream),
            raw => Ok(Self::from_raw(device, raw)),
        }
    }
}

impl<'a> TensorRef<'a> {
    /// A caller's own memory.
    ///
    /// # Safety
    /// `ptr` must be the address of a dense, row-major tensor of these elements and sizes in memory
    /// that `device` can read, until every operation that was given the view has been passed by its
    /// stream.
    pub unsafe fn from_raw(
        device: &'a Device,
        ptr: DevicePtr,
        dtype: DType,
        dims: impl Into<Dims>,
    ) -> Self {
        let dims = dims.into();
        Self::new(Raw {
            ptr,
            dtype,
            dims,
            device,
        })
    }
}

impl<'a> TensorMut<'a> {
    /// A caller's own memory.
    ///
    /// # Safety
    /// `ptr` must be the address of a dense, row-major tensor of these elements and sizes in memory
    /// that `device` can write and nothing else uses, until every operation that was given the view
    /// has been passed by its stream.
    pub unsafe fn from_raw(
        device: &'a Device,
        ptr: DevicePtr,
        dtype: DType,
        dims: impl Into<Dims>,
    ) -> Self {
        let dims = dims.into();
        Self::new(Raw {
            ptr,
            dtype,
            dims,
            device,
        })
    }
}

/// A dispatch whose tensors have been checked: their addresses, 0 where there is none.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Dispatch {
    pub(crate) flags: u32,
    pub(crate) slot: u32,
    pub(crate) num_tokens: u32,
    pub(crate) top_k: u32,
    pub(crate) x: u64,
    pub(crate) topk_idx: u64,
    pub(crate) topk_weights: u64,
    pub(crate) recv_x: u64,
    pub(crate) recv_scales: u64,
    pub(crate) recv_count: u64,
    pub(crate) src_info: u64,
    pub(crate) layout_range: u64,
    pub(crate) total_count: u64,
    pub(crate) wait_ns: u64,
}

/// A combine whose tensors have been checked: their addresses, 0 where there is none.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Combine {
    pub(crate) flags: u32,
    pub(crate) slot: u32,
    pub(crate) num_tokens: u32,
    pub(crate) top_k: u32,
    pub(crate) y: u64,
    pub(crate) topk_weights: u64,
    pub(crate) out: u64,
}

/// Enqueues a kernel without work.
pub(crate) fn empty(stream: &Stream) -> Result<(), LaunchError> {
    let device = stream.device();
    let args = ffi::ep_empty_args {
        struct_size: size_of::<ffi::ep_empty_args>() as u32,
        device: device.ordinal().0.cast_signed(),
    };
    // SAFETY: the stream is alive, and its device is the one in the arguments.
    unsafe { device.kernels().empty(&args, stream.handle().0) }
}

/// A conversion to bf16 whose tensors have been checked.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dequantize {
    pub(crate) x: u64,
    pub(crate) scales: u64,
    pub(crate) scale_stride: u64,
    pub(crate) out: u64,
    pub(crate) rows: u32,
    pub(crate) hidden: u32,
}

/// A SwiGLU whose tensors have been checked.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Swiglu {
    pub(crate) gate_up: u64,
    pub(crate) out: u64,
    pub(crate) rows: u32,
    pub(crate) intermediate: u32,
}

#[cfg(feature = "cuda")]
pub(crate) fn dequantize(
    kernels: CudaKernels,
    call: &Dequantize,
    stream: &Stream,
) -> Result<(), LaunchError> {
    let args = ffi::ep_dequantize_args {
        struct_size: size_of::<ffi::ep_dequantize_args>() as u32,
        device: stream.device().ordinal().0.cast_signed(),
        x: call.x,
        scales: call.scales,
        scale_stride: call.scale_stride,
        out: call.out,
        rows: call.rows,
        hidden: call.hidden,
    };
    // SAFETY: the tensors were checked.
    unsafe { kernels.dequantize(&args, stream.handle().0) }
}

#[cfg(feature = "cuda")]
pub(crate) fn swiglu(
    kernels: CudaKernels,
    call: &Swiglu,
    stream: &Stream,
) -> Result<(), LaunchError> {
    let args = ffi::ep_swiglu_args {
        struct_size: size_of::<ffi::ep_swiglu_args>() as u32,
        device: stream.device().ordinal().0.cast_signed(),
        gate_up: call.gate_up,
        out: call.out,
        rows: call.rows,
        intermediate: call.intermediate,
    };
    // SAFETY: the tensors were checked.
    unsafe { kernels.swiglu(&args, stream.handle().0) }
}

/// What a launch uses of its buffer.
#[derive(Clone, Copy)]
pub(crate) struct Launcher<'b> {
    state: &'b DeviceState,
    /// u64 for each rank: the base of its symmetric memory.
    table: DevicePtr,
}

impl<'b> Launcher<'b> {
    pub(crate) fn new(state: &'b DeviceState, connection: &Connection) -> Self {
        Self {
            state,
            table: connection.table(),
        }
    }

    pub(crate) fn dispatch(self, call: &Dispatch, stream: &Stream) -> Result<(), LaunchError> {
        let args = ffi::ep_dispatch_args {
            struct_size: size_of::<ffi::ep_dispatch_args>() as u32,
            flags: call.flags,
            group: self.group(),
            layout: self.state.layout.raw(),
            handle: self.handle(call.slot, call.num_tokens, call.top_k),
            x: call.x,
            topk_idx: call.topk_idx,
            topk_weights: call.topk_weights,
            recv_x: call.recv_x,
            recv_scales: call.recv_scales,
            recv_count: call.recv_count,
            src_info: call.src_info,
            layout_range: call.layout_range,
            total_count: call.total_count,
            wait_ns: call.wait_ns,
        };
        // SAFETY: group, layout and handle are of one buffer, whose memory outlives its last
        // operation, and every rank derived the same layout; the tensors were checked.
        unsafe { self.kernels().dispatch(&args, stream.handle().0) }
    }

    pub(crate) fn combine(self, call: &Combine, stream: &Stream) -> Result<(), LaunchError> {
        let args = ffi::ep_combine_args {
            struct_size: size_of::<ffi::ep_combine_args>() as u32,
            flags: call.flags,
            group: self.group(),
            layout: self.state.layout.raw(),
            handle: self.handle(call.slot, call.num_tokens, call.top_k),
            y: call.y,
            topk_weights: call.topk_weights,
            out: call.out,
        };
        // SAFETY: as for dispatch; the slot was filled by a dispatch that was enqueued before.
        unsafe { self.kernels().combine(&args, stream.handle().0) }
    }

    pub(crate) fn barrier(self, spin_ns: u64, stream: &Stream) -> Result<(), LaunchError> {
        let args = ffi::ep_barrier_args {
            struct_size: size_of::<ffi::ep_barrier_args>() as u32,
            reserved: 0,
            group: self.group(),
            layout: self.state.layout.raw(),
            spin_ns,
        };
        // SAFETY: group and layout are of one buffer, as for dispatch.
        unsafe { self.kernels().barrier(&args, stream.handle().0) }
    }

    fn kernels(self) -> &'b dyn Kernels {
        self.state.device.kernels()
    }

    fn group(self) -> ffi::ep_group {
        let state = self.state;
        ffi::ep_group {
            peer_table: self.table.0,
            control: state.control().0,
            faults: state.faults.device_address(),
            timeout_ns: state.timeout_ns,
            rank: state.rank,
            num_ranks: state.shape.num_ranks,
            num_experts: state.shape.num_experts,
            max_tokens: state.shape.max_tokens,
            hidden: state.shape.hidden,
            max_top_k: state.shape.max_top_k,
            // The driver counts devices in an int.
            device: state.device.ordinal().0.cast_signed(),
            num_sms: state.num_sms,
        }
    }

    fn handle(self, slot: u32, num_tokens: u32, top_k: u32) -> ffi::ep_handle {
        let [route, recv_map, recv_rows] = self.state.slot(slot);
        ffi::ep_handle {
            route: route.0,
            recv_map: recv_map.0,
            recv_rows: recv_rows.0,
            slot,
            num_tokens,
            top_k,
            reserved: 0,
        }
    }
}
