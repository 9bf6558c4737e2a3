//! Dispatch and combine: CUDA behind a C99 header, and a host implementation of the same contract.
//!
//! The contract is `include/ep_kernels.h`: one args struct per launcher. [`Kernels`] is the trait
//! over it; [`HostKernels`] executes it on memory that the calling thread can address, and
//! `CudaKernels` (feature `cuda`) launches the CUDA kernels. [`Layout`] says where things lie in
//! every rank's symmetric buffer.
//!
//! The crate must not know drivers, policy or processes.

#[allow(
    non_camel_case_types,
    missing_docs,
    unreachable_pub,
    reason = "generated; documented in the header"
)]
mod bindings;
#[cfg(feature = "cuda")]
mod cuda;
mod host;
mod layout;
mod numerics;

use std::fmt;

#[cfg(feature = "cuda")]
pub use cuda::CudaKernels;
pub use host::HostKernels;
pub use layout::{Layout, Shape, ShapeError};

/// The raw contract: the header's structs and constants.
pub mod ffi {
    pub use crate::bindings::*;
}

/// Why a launch did not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// The CUDA runtime refused the launch.
    #[error(
        "{kernel} was not launched: CUDA runtime error {error}; {}", cuda_hint(*error)
    )]
    Cuda {
        /// The kernel.
        kernel: Kernel,
        /// `cudaError_t` as a number.
        error: i32,
    },
    /// The launcher refused the arguments: the header and the library disagree, or a shape is
    /// outside the limits.
    #[error(
        "{kernel} refused its arguments; check that tensors are aligned to 16 bytes, and that header and library are of one version"
    )]
    BadArgs {
        /// The kernel.
        kernel: Kernel,
    },
    /// The shape needs more shared memory than a thread block of this device has.
    #[error(
        "{kernel} needs more shared memory for this shape than a block of the device has; lower hidden or the number of experts, or dispatch bf16"
    )]
    TooLarge {
        /// The kernel.
        kernel: Kernel,
    },
    /// The device cannot run the kernel.
    #[error(
        "{kernel} does not run on this device; compile the kernels for its compute capability (EP_CUDA_ARCHS), 9.0 or newer"
    )]
    Unsupported {
        /// The kernel.
        kernel: Kernel,
    },
}

/// What to check next. Errors of the context, which every later call of the process returns, are not
/// the launch's.
fn cuda_hint(error: i32) -> &'static str {
    match error {
        700 | 702 | 710 | 714..=719 => {
            "a kernel of this process failed before, and the context with it; look for it with              compute-sanitizer, and start the process anew"
        }
        214 | 220 => "memory or an NVLink has an uncorrectable error; look for Xid in dmesg",
        _ => {
            "check that the stream belongs to the device and that the kernels were compiled for it"
        }
    }
}

/// A kernel's name in errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Tokens to their experts' ranks.
    Dispatch,
    /// Expert outputs back to the tokens' ranks.
    Combine,
    /// All ranks meet on the device.
    Barrier,
    /// Nothing, for timing.
    Empty,
    /// E4M3 to bf16, for the demo.
    Dequantize,
    /// `silu(gate) * up`, for the demo.
    Swiglu,
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dispatch => "dispatch",
            Self::Combine => "combine",
            Self::Barrier => "barrier",
            Self::Empty => "empty kernel",
            Self::Dequantize => "dequantize",
            Self::Swiglu => "swiglu",
        })
    }
}

/// An implementation of the contract.
#[allow(
    unsafe_code,
    reason = "the methods take addresses; this only declares them"
)]
pub trait Kernels: fmt::Debug + Send + Sync {
    /// `"cuda"` or `"host"`.
    fn name(&self) -> &'static str;

    /// Enqueues a dispatch on `stream` (the host implementation runs it before it returns).
    ///
    /// # Safety
    /// Every address in `args` must be valid for what the header says it is, on the device of
    /// `args.group.device`, until the stream has passed the launch; the symmetric buffers behind the
    /// peer table must have the layout `args.layout`, and all ranks must make the same sequence of
    /// calls.
    unsafe fn dispatch(&self, args: &ffi::ep_dispatch_args, stream: u64)
    -> Result<(), LaunchError>;

    /// Enqueues a combine on `stream`.
    ///
    /// # Safety
    /// As for [`dispatch`](Self::dispatch); `args.handle` must have been filled by a dispatch that
    /// the stream has passed.
    unsafe fn combine(&self, args: &ffi::ep_combine_args, stream: u64) -> Result<(), LaunchError>;

    /// Enqueues a barrier of all ranks on `stream`.
    ///
    /// # Safety
    /// As for [`dispatch`](Self::dispatch).
    unsafe fn barrier(&self, args: &ffi::ep_barrier_args, stream: u64) -> Result<(), LaunchError>;

    /// Enqueues a kernel without work on `stream`; the host implementation does nothing.
    ///
    /// # Safety
    /// `stream` must be a live stream of the device `args.device`.
    unsafe fn empty(&self, args: &ffi::ep_empty_args, stream: u64) -> Result<(), LaunchError>;
}
