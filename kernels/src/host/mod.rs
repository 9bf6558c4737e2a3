//! The contract on memory that the calling thread can address.
//!
//! Ranks are threads or processes that share their symmetric buffers; each calls for itself, and a
//! call returns when its part of the operation is done. The protocol is that of the CUDA kernels:
//! counts first, one row per (token, destination rank) with a flag that carries the epoch, slots and
//! positions by prefix sums in token order, the weighted reduction at the owner, reductions in fixed
//! order, and a deadline on every wait.
//!
//! - `check` refuses arguments before anything is touched.
//! - `memory` turns their addresses into slices and windows; all unsafe code is there.
//! - `group` knows the peers, the epochs, the clock and the fault ring.
//! - `wire` is the format of rows, partials and weights.
//! - `dispatch`, `combine` and `barrier` are the operations, in safe code.
//!
//! A window is memory that other ranks write. What is read from one is data of a peer: it decides
//! no address before it has been compared with the limits of the shape.

mod barrier;
mod check;
mod combine;
mod dispatch;
mod group;
mod memory;
mod wire;

use crate::{Kernel, Kernels, LaunchError, ffi};
use memory::{BarrierMemory, CombineMemory, DispatchMemory};

/// The host implementation: runs on the calling thread, on memory that the thread can address.
///
/// Streams are ignored: a call is finished when it returns. Ranks call concurrently, each from a
/// thread or process of its own.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostKernels {}

#[allow(
    unsafe_code,
    reason = "the contract's methods are unsafe; `memory` is what they lead to"
)]
impl Kernels for HostKernels {
    fn name(&self) -> &'static str {
        "host"
    }

    unsafe fn dispatch(&self, args: &ffi::ep_dispatch_args, _: u64) -> Result<(), LaunchError> {
        let dims = check::dispatch(args).ok_or(LaunchError::BadArgs {
            kernel: Kernel::Dispatch,
        })?;
        // SAFETY: the addresses are valid, by the caller's promise; `dims` is their checked shape.
        let memory = unsafe { DispatchMemory::new(args, &dims) };
        dispatch::run(args, &dims, memory);
        Ok(())
    }

    unsafe fn combine(&self, args: &ffi::ep_combine_args, _: u64) -> Result<(), LaunchError> {
        let dims = check::combine(args).ok_or(LaunchError::BadArgs {
            kernel: Kernel::Combine,
        })?;
        // SAFETY: the addresses are valid, by the caller's promise; `dims` is their checked shape.
        let memory = unsafe { CombineMemory::new(args, &dims) };
        combine::run(args, &dims, memory);
        Ok(())
    }

    unsafe fn barrier(&self, args: &ffi::ep_barrier_args, _: u64) -> Result<(), LaunchError> {
        let dims = check::barrier(args).ok_or(LaunchError::BadArgs {
            kernel: Kernel::Barrier,
        })?;
        // SAFETY: the addresses are valid, by the caller's promise; `dims` is their checked shape.
        let memory = unsafe { BarrierMemory::new(args, &dims) };
        barrier::run(args, &dims, memory);
        Ok(())
    }

    unsafe fn empty(&self, _: &ffi::ep_empty_args, _: u64) -> Result<(), LaunchError> {
        Ok(())
    }
}
