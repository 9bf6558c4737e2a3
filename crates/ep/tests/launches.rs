//! Launches that are refused, and streams that are borrowed.
//!
//! A refused launch has enqueued nothing: its operation comes back with an error that names rank
//! and kernel, together with what it was given, and can be done again while the other ranks wait
//! for it.

#![allow(unsafe_code, reason = "stands between the facade and the kernels")]

#[path = "../../../kernels/tests/common/mod.rs"]
mod common;
mod rig;

use std::error::Error as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use ep::driver::{DeviceOrdinal, StreamHandle};
use ep::{Buffer, Communicator, Config, DType, Device, Error, Stream, Tensor};
use ep_kernels::{HostKernels, Kernel, Kernels, LaunchError, ffi};
use ep_sim::{Cluster, SimDriver};

use common::Case;
use rig::{Rank, all_well, case, explain, threads};

/// `cudaErrorLaunchOutOfResources`.
const STATUS: i32 = 701;

/// Host kernels of which one launch is refused.
#[derive(Debug, Default)]
struct Refusing {
    host: HostKernels,
    launches: AtomicUsize,
    refused: Option<usize>,
}

impl Refusing {
    fn admit(&self, kernel: Kernel) -> Result<(), LaunchError> {
        let n = self.launches.fetch_add(1, Ordering::Relaxed);
        if self.refused == Some(n) {
            return Err(LaunchError::Cuda {
                kernel,
                error: STATUS,
            });
        }
        Ok(())
    }
}

impl Kernels for Refusing {
    fn name(&self) -> &'static str {
        self.host.name()
    }

    unsafe fn dispatch(
        &self,
        args: &ffi::ep_dispatch_args,
        stream: u64,
    ) -> Result<(), LaunchError> {
        self.admit(Kernel::Dispatch)?;
        // SAFETY: the caller's promise is the one that is asked for.
        unsafe { self.host.dispatch(args, stream) }
    }

    unsafe fn combine(&self, args: &ffi::ep_combine_args, stream: u64) -> Result<(), LaunchError> {
        self.admit(Kernel::Combine)?;
        // SAFETY: as above.
        unsafe { self.host.combine(args, stream) }
    }

    unsafe fn barrier(&self, args: &ffi::ep_barrier_args, stream: u64) -> Result<(), LaunchError> {
        self.admit(Kernel::Barrier)?;
        // SAFETY: as above.
        unsafe { self.host.barrier(args, stream) }
    }

    unsafe fn empty(&self, args: &ffi::ep_empty_args, stream: u64) -> Result<(), LaunchError> {
        self.admit(Kernel::Empty)?;
        // SAFETY: as above.
        unsafe { self.host.empty(args, stream) }
    }
}

/// What rank 1 launches in [`layers`], in this order.
const LAUNCHES: [Kernel; 7] = [
    Kernel::Dispatch,
    Kernel::Combine,
    Kernel::Dispatch,
    Kernel::Dispatch,
    Kernel::Combine,
    Kernel::Combine,
    Kernel::Barrier,
];

#[test]
fn what_was_refused_can_be_done_again() {
    let case = case(2);
    for (n, kernel) in LAUNCHES.into_iter().enumerate() {
        let driver = SimDriver::new(&Cluster::hgx_h200(2), 0, &[0, 1]);
        let outcomes = threads(case.ranks, |comm| {
            let kernels = Arc::new(Refusing {
                refused: (comm.rank() == 1).then_some(n),
                ..Refusing::default()
            });
            let ordinal = DeviceOrdinal(comm.rank());
            // SAFETY: the kernels are those of the host, and the driver's memory is this process's.
            let device = unsafe { Device::new(driver.clone(), kernels.clone(), ordinal) };
            let rank = Rank::new(&device, &comm, &case).map_err(explain)?;
            let mut refusals = Vec::new();
            layers(&rank, &case, &mut |error| refusals.push(error))?;
            rank.buffer.close().map_err(explain)?;

            let launched = kernels.launches.load(Ordering::Relaxed);
            let Some(error) = refusals.pop() else {
                assert_eq!((comm.rank(), launched), (0, LAUNCHES.len()));
                return Ok(());
            };
            assert_eq!((comm.rank(), launched), (1, LAUNCHES.len() + 1));
            assert!(refusals.is_empty(), "{refusals:?}");
            assert!(error.to_string().starts_with("rank 1: "), "{error}");
            let source = error.source().map(ToString::to_string).unwrap_or_default();
            assert!(
                source.starts_with(&format!("{kernel} was not launched")),
                "{source}"
            );
            assert!(source.contains(&STATUS.to_string()), "{source}");
            Ok(())
        });
        all_well(outcomes).unwrap_or_else(|errors| panic!("launch {n}, {kernel}: {errors}"));
        assert!(driver.live().is_empty(), "launch {n}: {:?}", driver.live());
    }
    println!("{} launches refused, each once", LAUNCHES.len());
}

/// Operations run on a caller's own stream and on the legacy default stream by either name. The
/// default stream of a thread is refused: operations are waited for on other threads, too.
#[test]
fn a_borrowed_stream_is_one_stream_on_every_thread() {
    let driver = SimDriver::new(&Cluster::hgx_h200(1), 0, &[0]);
    let device = Device::host(driver.clone(), DeviceOrdinal(0));
    let comm = Communicator::threads(1).remove(0);
    let config = Config::new(128, 1, 1, 1);
    let buffer = Buffer::builder(&device, &comm, config).build().unwrap();
    // SAFETY: default streams live as long as the device.
    let of_thread = unsafe { Stream::borrowed(&device, StreamHandle::PER_THREAD) };
    let error = of_thread.unwrap_err();
    assert!(matches!(error, Error::PerThreadStream), "{error}");
    assert!(error.to_string().contains("legacy default"), "{error}");

    for raw in [StreamHandle(0), StreamHandle::LEGACY] {
        // SAFETY: as above.
        let stream = unsafe { Stream::borrowed(&device, raw) }.unwrap();
        assert_eq!(stream.handle(), raw);
        buffer.barrier(&stream, Duration::ZERO).unwrap();
        let elsewhere = || stream.synchronize().and_then(|()| buffer.synchronize());
        thread::scope(|scope| scope.spawn(elsewhere).join().unwrap()).unwrap();
    }
    buffer.close().unwrap();
    assert!(driver.live().is_empty(), "{:?}", driver.live());
}

/// A stream that has the number of a borrowed one of before is kept all the same.
#[test]
fn a_buffer_keeps_the_stream_that_it_was_last_used_with() {
    let driver = SimDriver::new(&Cluster::hgx_h200(1), 0, &[0]);
    let device = Device::host(driver.clone(), DeviceOrdinal(0));
    let comm = Communicator::threads(1).remove(0);
    let config = Config::new(128, 1, 1, 1);
    let buffer = Buffer::builder(&device, &comm, config).build().unwrap();
    let owned = Stream::new(&device).unwrap();
    // SAFETY: the buffer is used with the owner next, and this value gone before it.
    let borrowed = unsafe { Stream::borrowed(&device, owned.handle()) }.unwrap();
    buffer.barrier(&borrowed, Duration::ZERO).unwrap();
    buffer.barrier(&owned, Duration::ZERO).unwrap();
    drop(borrowed);
    drop(owned);
    buffer.synchronize().unwrap();
    buffer.close().unwrap();
    assert!(driver.live().is_empty(), "{:?}", driver.live());
}

/// A layer in whole operations, one in parts, and a barrier. What is refused is told and repeated.
fn layers(rank: &Rank<'_>, case: &Case, refused: &mut dyn FnMut(Error)) -> Result<(), String> {
    let (buffer, stream) = (&rank.buffer, &rank.stream);
    for n in 0..2 {
        let inputs = case.inputs(n);
        let oracle = rank.oracle(n, &inputs);
        let mut tensors = rank.tensors(&oracle).map_err(explain)?;
        let dims = tensors.out.dims();
        let mut out = Tensor::new(buffer.device(), DType::Bf16, dims).map_err(explain)?;
        if n == 0 {
            let handle = rank.dispatch(&mut tensors).or_else(|error| {
                refused(error);
                rank.dispatch(&mut tensors)
            });
            let handle = handle.map_err(explain)?;
            rank.check_dispatch(&oracle, &handle, &mut tensors)?;
            let y = rank.output(&tensors);
            let combined = buffer.combine(stream, handle, &y, &mut out);
            combined
                .or_else(|rejected| {
                    refused(*rejected.error);
                    buffer.combine(stream, rejected.operand, &y, &mut out)
                })
                .map_err(explain)?;
        } else {
            let sent = rank.dispatch_send(&tensors).or_else(|error| {
                refused(error);
                rank.dispatch_send(&tensors)
            });
            let sent = sent.map_err(explain)?;
            let received = buffer.dispatch_receive(stream, sent, &mut tensors.received);
            let handle = received
                .or_else(|rejected| {
                    refused(*rejected.error);
                    buffer.dispatch_receive(stream, rejected.operand, &mut tensors.received)
                })
                .map_err(explain)?;
            rank.check_dispatch(&oracle, &handle, &mut tensors)?;
            let y = rank.output(&tensors);
            let sent = buffer.combine_send(stream, handle, &y).or_else(|rejected| {
                refused(*rejected.error);
                buffer.combine_send(stream, rejected.operand, &y)
            });
            let sent = sent.map_err(explain)?;
            let received = buffer.combine_receive(stream, sent, &mut out);
            received
                .or_else(|rejected| {
                    refused(*rejected.error);
                    buffer.combine_receive(stream, rejected.operand, &mut out)
                })
                .map_err(explain)?;
        }
        tensors.out = out;
        rank.check_combine(&oracle, &tensors)?;
    }
    buffer
        .barrier(stream, Duration::ZERO)
        .or_else(|error| {
            refused(error);
            buffer.barrier(stream, Duration::ZERO)
        })
        .map_err(explain)
}
