//! The CUDA kernels on the host: `kernels/cuda` compiled as C++, each lane a fiber, so that tests
//! without a GPU run the very code that GPUs run, in any order of warps.
//!
//! What it cannot show is what a GPU's memory does: here everybody sees a store at once.
#![allow(unsafe_code, reason = "calls the C launchers")]

use std::ffi::c_void;
use std::ptr;
use std::time::Duration;

use ep_kernels::{Kernel, Kernels, LaunchError, ffi};

#[allow(improper_ctypes, reason = "the structs are the header's")]
unsafe extern "C" {
    fn ep_emulated_dispatch_launch(
        args: *const ffi::ep_dispatch_args,
        stream: *mut c_void,
        error: *mut i32,
    ) -> i32;
    fn ep_emulated_combine_launch(
        args: *const ffi::ep_combine_args,
        stream: *mut c_void,
        error: *mut i32,
    ) -> i32;
    fn ep_emulated_barrier_launch(
        args: *const ffi::ep_barrier_args,
        stream: *mut c_void,
        error: *mut i32,
    ) -> i32;
    fn ep_emulation_now_ns() -> u64;
    fn ep_emulation_set_multiprocessors(multiprocessors: u32);
}

/// The CUDA kernels, emulated. A launch returns once the kernel has ended; those of several threads
/// run side by side.
#[derive(Clone, Copy, Debug)]
pub struct EmulatedKernels(());

impl EmulatedKernels {
    /// Kernels on devices of so many multiprocessors, at least one. This holds for the process.
    pub fn on(multiprocessors: u32) -> Self {
        // SAFETY: it takes a number.
        unsafe { ep_emulation_set_multiprocessors(multiprocessors.max(1)) };
        Self(())
    }

    /// The devices' clock, since the process began. It counts no more of a turn of all blocks than
    /// they take on a host that does nothing else, so kernels see no peer late that is not.
    pub fn clock() -> Duration {
        // SAFETY: it reads a number.
        Duration::from_nanos(unsafe { ep_emulation_now_ns() })
    }
}

type Launcher<A> = unsafe extern "C" fn(*const A, *mut c_void, *mut i32) -> i32;

/// Calls a launcher and names its status.
///
/// # Safety
/// The addresses in `args` must be valid; the kernel has ended on return.
unsafe fn launch<A>(kernel: Kernel, launcher: Launcher<A>, args: &A) -> Result<(), LaunchError> {
    let mut error = 0;
    // SAFETY: the launcher reads `args` and writes `error`; the caller vouches for the addresses.
    match unsafe { launcher(args, ptr::null_mut(), &mut error) } {
        ffi::EP_LAUNCH_OK => Ok(()),
        ffi::EP_LAUNCH_BAD_ARGS => Err(LaunchError::BadArgs { kernel }),
        ffi::EP_LAUNCH_TOO_LARGE => Err(LaunchError::TooLarge { kernel }),
        _ => Err(LaunchError::Cuda { kernel, error }),
    }
}

impl Kernels for EmulatedKernels {
    fn name(&self) -> &'static str {
        "emulated"
    }

    unsafe fn dispatch(&self, args: &ffi::ep_dispatch_args, _: u64) -> Result<(), LaunchError> {
        // SAFETY: the caller vouches for the addresses.
        unsafe { launch(Kernel::Dispatch, ep_emulated_dispatch_launch, args) }
    }

    unsafe fn combine(&self, args: &ffi::ep_combine_args, _: u64) -> Result<(), LaunchError> {
        // SAFETY: the caller vouches for the addresses.
        unsafe { launch(Kernel::Combine, ep_emulated_combine_launch, args) }
    }

    unsafe fn barrier(&self, args: &ffi::ep_barrier_args, _: u64) -> Result<(), LaunchError> {
        // SAFETY: the caller vouches for the addresses.
        unsafe { launch(Kernel::Barrier, ep_emulated_barrier_launch, args) }
    }

    unsafe fn empty(&self, _: &ffi::ep_empty_args, _: u64) -> Result<(), LaunchError> {
        Ok(())
    }
}
