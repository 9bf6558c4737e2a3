//! The CUDA kernels behind the C ABI.
#![allow(unsafe_code, reason = "calls the C launchers")]

use std::ffi::c_void;

use crate::{Kernel, Kernels, LaunchError, ffi};

type Launcher<A> = unsafe extern "C" fn(*const A, *mut c_void, *mut i32) -> i32;

/// The CUDA kernels. They run on the primary context of the device in their arguments.
#[derive(Clone, Copy, Debug)]
pub struct CudaKernels(());

impl CudaKernels {
    /// The kernels that were linked, if they speak this crate's version of the contract.
    ///
    /// Call [`load`](Self::load) for every device before the first launch there.
    pub fn new() -> Result<Self, LaunchError> {
        // SAFETY: the function takes nothing and reads nothing.
        let version = unsafe { ffi::ep_kernels_abi_version() };
        if version == ffi::EP_KERNELS_ABI_VERSION {
            Ok(Self(()))
        } else {
            Err(LaunchError::BadArgs {
                kernel: Kernel::Dispatch,
            })
        }
    }

    /// Loads every kernel onto a device (its number in this process). CUDA otherwise loads a kernel
    /// when it is first launched, and first waits for the device to be idle: in vain, if an
    /// operation there waits for a peer that this thread has still to launch.
    pub fn load(&self, device: i32) -> Result<(), LaunchError> {
        let mut error = 0;
        // SAFETY: the function takes numbers, and writes `error` before it returns.
        let status = unsafe { ffi::ep_kernels_load(device, &mut error) };
        outcome(Kernel::Dispatch, status, error)
    }

    /// Enqueues the conversion of E4M3 rows to bf16.
    ///
    /// # Safety
    /// Every address in `args` must be valid on its device until the stream has passed the launch.
    pub unsafe fn dequantize(
        &self,
        args: &ffi::ep_dequantize_args,
        stream: u64,
    ) -> Result<(), LaunchError> {
        // SAFETY: the launcher reads `args` before it returns; the caller vouches for the addresses.
        unsafe { launch(Kernel::Dequantize, ffi::ep_dequantize_launch, args, stream) }
    }

    /// Enqueues `silu(gate) * up`.
    ///
    /// # Safety
    /// Every address in `args` must be valid on its device until the stream has passed the launch.
    pub unsafe fn swiglu(
        &self,
        args: &ffi::ep_swiglu_args,
        stream: u64,
    ) -> Result<(), LaunchError> {
        // SAFETY: the launcher reads `args` before it returns; the caller vouches for the addresses.
        unsafe { launch(Kernel::Swiglu, ffi::ep_swiglu_launch, args, stream) }
    }
}

impl Kernels for CudaKernels {
    fn name(&self) -> &'static str {
        "cuda"
    }

    unsafe fn dispatch(
        &self,
        args: &ffi::ep_dispatch_args,
        stream: u64,
    ) -> Result<(), LaunchError> {
        // SAFETY: the launcher reads `args` before it returns; the caller vouches for the addresses.
        unsafe { launch(Kernel::Dispatch, ffi::ep_dispatch_launch, args, stream) }
    }

    unsafe fn combine(&self, args: &ffi::ep_combine_args, stream: u64) -> Result<(), LaunchError> {
        // SAFETY: the launcher reads `args` before it returns; the caller vouches for the addresses.
        unsafe { launch(Kernel::Combine, ffi::ep_combine_launch, args, stream) }
    }

    unsafe fn barrier(&self, args: &ffi::ep_barrier_args, stream: u64) -> Result<(), LaunchError> {
        // SAFETY: the launcher reads `args` before it returns; the caller vouches for the addresses.
        unsafe { launch(Kernel::Barrier, ffi::ep_barrier_launch, args, stream) }
    }

    unsafe fn empty(&self, args: &ffi::ep_empty_args, stream: u64) -> Result<(), LaunchError> {
        // SAFETY: the launcher reads `args` before it returns; the caller vouches for the stream.
        unsafe { launch(Kernel::Empty, ffi::ep_empty_launch, args, stream) }
    }
}

/// Calls a launcher and names its status.
///
/// # Safety
/// As for the launcher: addresses in `args` must be valid until the stream has passed the launch.
unsafe fn launch<A>(
    kernel: Kernel,
    launcher: Launcher<A>,
    args: &A,
    stream: u64,
) -> Result<(), LaunchError> {
    let mut error = 0;
    // SAFETY: `args` is a valid struct of the header, which the launcher only reads; `error` is
    // written before it returns.
    let status = unsafe { launcher(args, stream as *mut c_void, &mut error) };
    outcome(kernel, status, error)
}

fn outcome(kernel: Kernel, status: i32, error: i32) -> Result<(), LaunchError> {
    match status {
        ffi::EP_LAUNCH_OK => Ok(()),
        ffi::EP_LAUNCH_BAD_ARGS => Err(LaunchError::BadArgs { kernel }),
        ffi::EP_LAUNCH_TOO_LARGE => Err(LaunchError::TooLarge { kernel }),
        ffi::EP_LAUNCH_UNSUPPORTED => Err(LaunchError::Unsupported { kernel }),
        _ => Err(LaunchError::Cuda { kernel, error }),
    }
}
