//! Expert-parallel dispatch and combine for Mixture-of-Experts inference.
//!
//! Every rank holds some of the experts of a layer. **Dispatch** sends each token to the ranks that
//! own its top-k experts and lays the received rows out by local expert; **combine** sends the
//! experts' outputs back and sums them with the routing weights. Ranks of one NVLink domain write
//! each other's memory directly.
//!
//! The way through the crate:
//!
//! 1. a [`Device`]: a GPU, or a GPU of a simulated cluster with kernels that run on the host;
//! 2. a [`Communicator`]: the ranks meet, as threads, as processes of a host, or over TCP;
//! 3. a [`Config`] and [`Buffer::builder`]: memory that suits the group is chosen, connected and
//!    [explained](Buffer::plan);
//! 4. [`Buffer::dispatch`], the experts, [`Buffer::combine`], on a caller's [`Stream`];
//! 5. [`Buffer::faults`]: what operations met and went on from, such as a rank that did not come.
//!
//! ```
//! use std::thread;
//!
//! use ep::driver::DeviceOrdinal;
//! use ep::{
//!     Buffer, CombineInput, Communicator, Config, DType, Device, DispatchInput, DispatchOptions,
//!     Error, Stream, Tensor,
//! };
//! use ep_sim::{Cluster, SimDriver};
//!
//! // One token of 128 channels, all of them 1.0, for expert 1 of two, which lives on rank 1.
//! fn rank(device: &Device, comm: &Communicator) -> Result<(), Error> {
//!     let buffer = Buffer::builder(device, comm, Config::new(128, 2, 1, 1)).build()?;
//!     let x = Tensor::from_host(device, DType::Bf16, [1, 128], &[0x3f80_u16; 128])?;
//!     let topk_idx = Tensor::from_host(device, DType::I64, [1, 1], &[1_i64])?;
//!     let topk_weights = Tensor::from_host(device, DType::F32, [1, 1], &[0.5_f32])?;
//!     let mut out = Tensor::new(device, DType::Bf16, [1, 128])?;
//!
//!     let stream = Stream::new(device)?;
//!     let options = DispatchOptions::bf16();
//!     let mut received = buffer.new_output(&options)?;
//!     let input = DispatchInput {
//!         x: x.view(),
//!         topk_idx: topk_idx.view(),
//!         topk_weights: Some(topk_weights.view()),
//!     };
//!     let handle = buffer.dispatch(&stream, &input, &options, &mut received)?;
//!     // Here the experts would turn the received rows into their outputs.
//!     buffer.combine(&stream, handle, &CombineInput::new(&received.recv_x), &mut out)?;
//!     stream.synchronize()?;
//!
//!     let rows = [0, 2][buffer.rank() as usize];
//!     assert_eq!(received.recv_count.copy_to_host::<i32>()?, [rows]);
//!     assert_eq!(out.copy_to_host::<u16>()?, [0x3f00; 128]); // 0.5
//!     assert!(buffer.faults()?.is_empty());
//!     buffer.close()
//! }
//!
//! let driver = SimDriver::new(&Cluster::hgx_h200(2), 0, &[0, 1]);
//! thread::scope(|scope| {
//!     for comm in Communicator::threads(2) {
//!         let device = Device::host(driver.clone(), DeviceOrdinal(comm.rank()));
//!         scope.spawn(move || rank(&device, &comm).unwrap());
//!     }
//! });
//! ```
//!
//! # What is safe
//! Operations check sizes, types and devices of their tensors before anything is launched. Expert
//! ids are data on the device: one that does not exist is skipped and reported. Addresses from
//! outside come in through three unsafe constructors, [`TensorRef::from_raw`],
//! [`TensorMut::from_raw`] and [`Stream::borrowed`]; kernels of the caller's choice through
//! [`Device::new`]. The driver of a device, which frees and writes whatever address it is told,
//! stays inside; whoever opens one by [`driver`] vouches for what they tell it. As on any GPU,
//! order between streams is the caller's: see [`Buffer`].
//!
//! # Features
//! `cuda` compiles and links the CUDA kernels and adds `Device::cuda` and the module `experts`. It
//! changes nothing else; libcuda and NVML are opened at run time in any case.
//!
//! # The crates below
//! Users name only this one: [`driver`], [`alloc`], [`peers`] and [`kernels`] are the layers below,
//! for what operators ask (why this memory?) and for drivers of one's own.

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
pub use preflight::{Bandwidth, Preflight, Problem, Report};
pub use stream::{Event, Stream};
pub use tensor::{DType, Dims, Element, Tensor, TensorMut, TensorRef};
