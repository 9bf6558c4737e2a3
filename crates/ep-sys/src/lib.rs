//! The only door to libcuda and NVML.
//!
//! The crate has one idea: [`Driver`], a trait with one method per driver entry point that the
//! project uses, and its implementation [`CudaDriver`] over libraries that are opened at run time.
//! Everything links and starts without them. What must be released is held by the guards of
//! [`vmm`], one guard per acquisition.
//!
//! It must not know policy, ranks or kernels.
//!
//! Safety story: `unsafe` lives in `cuda` and `nvml`, where function pointers are called. The trait
//! takes and returns numbers in newtypes, never references to device memory, so implementing and
//! calling it is safe: a wrong address is refused by the driver with a status, or by this crate
//! where the driver would not survive it. There are three exceptions. Streams of a framework are
//! welcome, so whoever passes a [`StreamHandle`] vouches that it names a live stream: not one of
//! another origin, and not one that [`Driver`] has destroyed. Page-locked host memory, and on some
//! systems all of a process's memory, is device memory too, so whoever passes such an address as a
//! destination vouches that nothing in this process refers to the memory. And a number does not say
//! whose it is, so whoever frees, unmaps or writes by it vouches that it is theirs. The guards of
//! [`vmm`] answer for what they hold. The facade hands its driver to nobody: only who opens a
//! driver takes these promises on.

mod call;
mod caps;
mod cuda;
mod driver;
mod error;
#[cfg(test)]
mod fake;
mod host;
mod nvml;
mod types;
pub mod vmm;

pub use call::Call;
pub use caps::{DeviceInfo, FabricInfo, FabricState, HostFacts, Link};
pub use cuda::CudaDriver;
pub use driver::Driver;
pub use error::{Error, Result, Status};
pub use types::{
    Bytes16, DeviceOrdinal, DevicePtr, EventHandle, FABRIC_HANDLE_BYTES, GranularityKind,
    HandleKind, HostMemory, IPC_HANDLE_BYTES, PhysHandle, ShareableHandle, StreamHandle,
};
