//! The CUDA kernels on the host: `kernels/cuda` compiled as C++, each lane a fiber, so that tests
//! without a GPU run the very code that GPUs run, in any order of warps.
//!
//! What it cannot show is what a GPU's memory does: here everybody sees a store at once.
#![allow(unsafe_code, reason = "calls the C launchers")]

use std::ffi::c_void;
use std::ptr;

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
}

fn outcome(kernel: Kernel, status: i32) -> Result<(), LaunchError> {
    match status {
        ffi::EP_LAUNCH_OK => Ok(()),
        _ => Err(LaunchError::BadArgs { kernel }),
    }
}

impl Kernels for EmulatedKernels {
    fn name(&self) -> &'static str {
        "emulated"
    }

    unsafe fn dispatch(&self, args: &ffi::ep_dispatch_args, _: u64) -> Result<(), LaunchError> {
        // SAFETY: the caller vouches for the addresses; the kernel has ended on return.
        let status = unsafe { ep_emulated_dispatch_launch(args, ptr::null_mut(), ptr::null_mut()) };
        outcome(Kernel::Dispatch, status)
    }

    unsafe fn combine(&self, args: &ffi::ep_combine_args, _: u64) -> Result<(), LaunchError> {
        // SAFETY: the caller vouches for the addresses; the kernel has ended on return.
        let status = unsafe { ep_emulated_combine_launch(args, ptr::null_mut(), ptr::null_mut()) };
        outcome(Kernel::Combine, status)
    }

    unsafe fn barrier(&self, args: &ffi::ep_barrier_args, _: u64) -> Result<(), LaunchError> {
        // SAFETY: the caller vouches for the addresses; the kernel has ended on return.
        let status = unsafe { ep_emulated_barrier_launch(args, ptr::null_mut(), ptr::null_mut()) };
        outcome(Kernel::Barrier, status)
    }

    unsafe fn empty(&self, _: &ffi::ep_empty_args, _: u64) -> Result<(), LaunchError> {
        Ok(())
    }
}
