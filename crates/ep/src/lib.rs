//! Expert-parallel dispatch and combine for Mixture-of-Experts inference.
#![deny(missing_docs)]

mod buffer;
mod builder;
mod combine;
mod communicator;
mod config;
mod connection;
mod device;
mod dispatch;
pub mod env;
mod error;
#[cfg(feature = "cuda")]
pub mod experts;
mod facts;
mod fault;
mod handle;
mod launch;
mod order;
mod preflight;
mod session;
mod state;
mod stream;
mod tensor;

pub use buffer::Buffer;
pub use builder::BufferBuilder;
pub use combine::{CombineInput, PendingCombine};
pub use communicator::Communicator;
pub use config::Config;
pub use device::Device;
pub use dispatch::{
    DispatchInput, DispatchOptions, DispatchOutput, DispatchOutputMut, Format, PendingDispatch,
    Scales,
};
pub use env::Launch;
pub use ep_alloc as alloc;
pub use ep_alloc::{BackendKind, Choice, Plan};
pub use ep_kernels as kernels;
pub use ep_kernels::Layout;
pub use ep_peers as peers;
pub use ep_sys as driver;
pub use error::{ArgumentError, Error, Rejected};
pub use fault::{Fault, FaultKind, Operation, Phase, Status};
pub use handle::Handle;
pub use preflight::{Preflight, Problem, Report};
pub use stream::{Event, Stream};
pub use tensor::{DType, Dims, Element, Tensor, TensorMut, TensorRef};
