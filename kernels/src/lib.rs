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
    /// The CUDA runtime refused the launch. Not always for what was launched: see
    /// [`is_context_lost`](Self::is_context_lost).
    #[error("{kernel} was not launched: CUDA runtime error {error}; {}", hint(*error))]
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

impl LaunchError {
    /// Whether an earlier kernel of the process failed on the device, the caller's or one of these.
    /// CUDA then answers every call with the same error, so this launch is not to blame; only a new
    /// process can go on.
    pub fn is_context_lost(&self) -> bool {
        matches!(self, Self::Cuda { error, .. } if is_sticky(*error))
    }
}

/// The errors of which CUDA documents that the process must be ended, and those of memory and
/// links that are broken: 214 ECC, 220 NVLink, 226 contained, 700 illegal address, 702 time-out,
/// 710 assert, 714 hardware stack, 715 illegal instruction, 716 misaligned address, 717 address
/// space, 718 program counter, 719 launch failure, 721 tensor memory.
fn is_sticky(error: i32) -> bool {
    matches!(error, 214 | 220 | 226 | 700 | 702 | 710 | 714..=719 | 721)
}

/// What to check next.
fn hint(error: i32) -> &'static str {
    match error {
        214 | 220 | 226 => {
            "an earlier kernel met broken memory or a broken link, and the context is lost: \
             end the process; check dmesg for Xid, and nvidia-smi -q -d ECC or \
             nvidia-smi nvlink -e"
        }
        error if is_sticky(error) => {
            "an earlier kernel of this process failed on the device, and the context is lost: end \
             the process; run it with compute-sanitizer to find that kernel, and check dmesg for \
             Xid"
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_an_earlier_kernel_left_says_so() {
        let refused = |error| LaunchError::Cuda {
            kernel: Kernel::Combine,
            error,
        };
        for error in [
            214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721,
        ] {
            let refused = refused(error);
            assert!(refused.is_context_lost(), "{error}");
            let text = refused.to_string();
            assert!(
                text.contains(&format!("error {error}; an earlier kernel")),
                "{text}"
            );
            assert!(text.contains("end the process"), "{text}");
            assert!(!text.contains("the stream belongs"), "{text}");
        }
        // Out of resources, no image for the device, an invalid stream, a capture that is spoiled.
        for error in [1, 209, 400, 701, 704, 713, 720, 901] {
            let refused = refused(error);
            assert!(!refused.is_context_lost(), "{error}");
            assert!(
                refused.to_string().contains("the stream belongs"),
                "{refused}"
            );
        }
        let kernel = Kernel::Combine;
        assert!(!LaunchError::BadArgs { kernel }.is_context_lost());
    }
}
