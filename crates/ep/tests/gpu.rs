//! The facade on GPUs: what the simulator's tests ask, of the CUDA kernels.
//!
//! Whether there are GPUs is found out when the tests run. `EP_GPU=require` makes their absence a
//! failure. `EP_GPU_CASES` and `EP_GPU_ITERS` say how many drawn cases and how many iterations are
//! run, for instance few under compute-sanitizer.
//!
//! A rank is a thread with a GPU to itself. Where `EP_GPU_RANKS_EACH` is above 1, so many ranks share
//! each GPU and are processes that take turns on it, at any instruction of a kernel: groups of four
//! on one GPU.

#![allow(unsafe_code, reason = "lends streams to the library")]

#[path = "../../../kernels/tests/common/mod.rs"]
mod common;
mod rig;

use std::fmt::Debug;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaGraph, CudaStream, DriverError};
use ep::driver::{CudaDriver, Driver, StreamHandle};
use ep::{
    BackendKind, Buffer, Choice, CombineInput, Communicator, Config, DType, Device, DispatchInput,
    DispatchOptions, DispatchOutputMut, Element, Error, Event, Fault, FaultKind, Operation, Phase,
    Stream, Tensor,
};

use zerocopy::IntoBytes;

use common::{Case, Oracle, Precision, Routing, Weights};
use rig::{
    Order, PATIENCE, POISON, Processes, Rank, Task, Tensors, all_well, case, drawn, explain,
    threads,
};

/// A number from the environment.
fn setting<T: FromStr<Err: Debug>>(name: &str, default: T) -> T {
    match std::env::var(name) {
        Ok(value) => value.parse().unwrap(),
        Err(_) => default,
    }
}

/// The GPUs of this host, `None` where there are none. Says why.
fn gpus() -> Option<u32> {
    let found = match CudaDriver::load() {
        Err(error) => Err(error.to_string()),
        Ok(_) if cfg!(not(feature = "cuda")) => Err(String::from("built without feature cuda")),
        Ok(driver) => driver.device_count().map_err(|error| error.to_string()),
    };
    match found {
        Ok(count) => Some(count),
        Err(why) if std::env::var("EP_GPU").as_deref() == Ok("require") => {
            panic!("EP_GPU=require: {why}");
        }
        Err(why) => {
            eprintln!("skipped: {why}");
            None
        }
    }
}

/// Ranks that share a GPU.
fn ranks_each() -> u32 {
    setting("EP_GPU_RANKS_EACH", 1)
}

/// Whether this process starts the ranks of a test and is none. They have ended well on return.
fn starts_ranks(test: &str) -> bool {
    if ranks_each() == 1 || Task::of_this_process().is_some() {
        return false;
    }
    let ranks = groups(8).pop().unwrap_or(0);
    Processes::start(test, ranks, &[], |_, _| {}).succeed();
    true
}

/// Runs the ranks of a group that are in this process: all as threads, or one, or none if the process
/// is a rank that the group does not have.
fn group<T: Send>(ranks: usize, rank: impl Fn(Communicator) -> T + Sync) -> Vec<T> {
    static GROUPS: AtomicU64 = AtomicU64::new(0);
    // The first groups may be done long before all ranks are needed.
    const LONGEST_TEST: Duration = Duration::from_secs(3600);
    let Some(task) = Task::of_this_process() else {
        return threads(ranks, rank);
    };
    let name = format!(
        "@ep-test-{}-{}",
        task.key,
        GROUPS.fetch_add(1, Ordering::Relaxed)
    );
    let size = u32::try_from(ranks).unwrap();
    (task.rank < size)
        .then(|| rank(Communicator::unix(name, task.rank, size, LONGEST_TEST).unwrap()))
        .into_iter()
        .collect()
}

/// The sizes of groups that the GPUs of this host can form; no more than `most`.
fn groups(most: u32) -> Vec<usize> {
    let Some(gpus) = gpus() else {
        return Vec::new();
    };
    let (fit, rest): (Vec<u32>, Vec<u32>) = [1, 2, 4, 8]
        .into_iter()
        .filter(|size| *size <= most)
        .partition(|size| *size <= gpus * ranks_each());
    if !rest.is_empty() {
        eprintln!("skipped groups of {rest:?}: {gpus} GPUs");
    }
    fit.into_iter().map(|size| size as usize).collect()
}

/// The GPU of a rank.
fn device(rank: u32) -> Result<Device, Error> {
    gpu(rank / ranks_each())
}

#[cfg(feature = "cuda")]
fn gpu(ordinal: u32) -> Result<Device, Error> {
    Device::cuda(ep::driver::DeviceOrdinal(ordinal))
}

#[cfg(not(feature = "cuda"))]
fn gpu(ordinal: u32) -> Result<Device, Error> {
    unreachable!("asked for GPU {ordinal} without feature cuda")
}

/// Runs a case with a thread for each rank, on so many multiprocessors each; 0: all.
fn run_group(case: &Case, num_sms: u32, operations: usize, order: Order) -> Result<(), String> {
    let outcomes = group(case.ranks, |comm| {
        let device = device(comm.rank()).map_err(explain)?;
        let rank = Rank::with(&device, &comm, case, |builder| builder.num_sms(num_sms))
            .map_err(explain)?;
        rank.run(operations, order)?;
        rank.buffer.close().map_err(explain)
    });
    all_well(outcomes)
}

#[test]
fn drawn_cases_on_gpus() {
    if starts_ranks("drawn_cases_on_gpus") {
        return;
    }
    for ranks in groups(8) {
        for n in 0..setting("EP_GPU_CASES", 48) {
            let (case, order) = drawn(ranks, n);
            // Few multiprocessors have many tokens and rows each, as have all of them with more.
            let num_sms = [0, 3][n as usize % 2];
            run_group(&case, num_sms, 4, order).unwrap_or_else(|errors| {
                panic!("case {n} of {ranks} ranks, {num_sms} SMs: {errors}\n{order:?} {case:#?}")
            });
        }
    }
}

/// The shapes of well-known models, at the batch sizes of decoding.
#[test]
fn models_on_gpus() {
    if starts_ranks("models_on_gpus") {
        return;
    }
    let shapes = [
        // hidden, experts, top-k, most tokens
        (7168, 256, 8, 128),
        (3584, 256, 16, 128),
        (7168, 256, 8, 1),
        (2048, 128, 8, 64),
        (4096, 128, 4, 33),
        // Some blocks send several tokens each, the others place.
        (6144, 128, 8, 300),
        // A row has more lines than a block's senders hold at once.
        (14336, 16, 4, 9),
    ];
    let shapes = &shapes[..setting("EP_GPU_CASES", shapes.len()).min(shapes.len())];
    let Some(ranks) = groups(4).pop() else {
        return;
    };
    for (hidden, experts, top_k, tokens) in shapes.iter().copied() {
        for precision in [Precision::Bf16, Precision::Fp8] {
            let case = Case {
                experts,
                hidden,
                top_k,
                max_tokens: tokens,
                tokens: (0..ranks).map(|rank| tokens - rank.min(tokens)).collect(),
                routing: Routing::Zipf,
                weights: Weights::AtDispatch,
                precision,
                ..case(ranks)
            };
            for num_sms in [0, 8] {
                run_group(&case, num_sms, 1, Order::Fused).unwrap_or_else(|errors| {
                    panic!("{ranks} ranks, {num_sms} SMs: {errors}\n{case:?}")
                });
            }
        }
    }
}

#[test]
fn processes_on_gpus() {
    const TEST: &str = "processes_on_gpus";
    if let Some(task) = Task::of_this_process() {
        let [ranks, visible] = [0, 1].map(|i| task.words[i].parse::<usize>().unwrap());
        // With one GPU visible to each process, every process calls its own number 0.
        let choice = Choice::parse(&task.words[2]).unwrap();
        let device = if visible == 1 {
            gpu(0)
        } else {
            device(task.rank)
        };
        let device = device.unwrap();
        let comm = task.meet(ranks).unwrap();
        for n in 0..2 {
            let (case, order) = drawn(ranks, n);
            let rank = Rank::with(&device, &comm, &case, |b| b.alloc(choice)).unwrap();
            let backend = rank.buffer.plan().backend;
            assert_eq!(backend, choice.forced().unwrap_or(BackendKind::Malloc));
            rank.run(4, order).unwrap();
            rank.buffer.close().unwrap();
        }
        return;
    }
    for ranks in groups(4) {
        for choice in ["auto", "posix-fd", "malloc"] {
            let all = [&ranks.to_string(), "0", choice];
            Processes::start(TEST, ranks, &all, |_, _| {}).succeed();
        }
        let one = [&ranks.to_string(), "1", "auto"];
        Processes::start(TEST, ranks, &one, |rank, command| {
            let ordinal = rank / ranks_each() as usize;
            command.env("CUDA_VISIBLE_DEVICES", ordinal.to_string());
        })
        .succeed();
    }
}

/// The tensors of several operations, each with what its experts give in place.
fn prepared(rank: &Rank<'_>, oracles: &[Oracle<'_>]) -> Result<Vec<Tensors>, Error> {
    oracles
        .iter()
        .map(|oracle| {
            let mut tensors = rank.tensors(oracle)?;
            rank.experts(oracle, &mut tensors)?;
            Ok(tensors)
        })
        .collect()
}

/// Everything that an operation writes.
fn written(tensors: &Tensors) -> Result<Vec<Vec<u8>>, Error> {
    let received = &tensors.received;
    let bytes = |tensor: &ep::Tensor| {
        fn read<T: Element>(tensor: &ep::Tensor) -> Result<Vec<u8>, Error> {
            Ok(tensor.copy_to_host::<T>()?.as_bytes().to_vec())
        }
        match tensor.dtype() {
            ep::DType::Bf16 => read::<u16>(tensor),
            ep::DType::F32 => read::<f32>(tensor),
            ep::DType::I32 => read::<i32>(tensor),
            ep::DType::I64 => read::<i64>(tensor),
            _ => read::<u8>(tensor),
        }
    };
    [
        Some(&received.recv_x),
        received.recv_scales.as_ref(),
        Some(&received.recv_count),
        Some(&received.src_info),
        Some(&received.layout_range),
        Some(&tensors.out),
    ]
    .into_iter()
    .flatten()
    .map(bytes)
    .collect()
}

/// Thousands of operations, eight of them enqueued between two looks: the outputs of each are
/// poisoned before and compared after.
#[test]
fn iterations_back_to_back_on_gpus() {
    if starts_ranks("iterations_back_to_back_on_gpus") {
        return;
    }
    const AT_ONCE: usize = 8;
    let iterations: usize = setting("EP_GPU_ITERS", 10_000);
    for ranks in groups(8) {
        for precision in [Precision::Bf16, Precision::Fp8] {
            let case = Case {
                hidden: 1024,
                max_tokens: 24,
                tokens: (0..ranks).map(|rank| [24, 17, 0, 9][rank % 4]).collect(),
                precision,
                ..case(ranks)
            };
            let inputs: Vec<_> = (0..AT_ONCE).map(|n| case.inputs(n)).collect();
            let outcomes = group(ranks, |comm| {
                let device = device(comm.rank()).map_err(explain)?;
                let rank = Rank::new(&device, &comm, &case).map_err(explain)?;
                let oracles: Vec<_> = (0..).zip(&inputs).map(|(n, i)| rank.oracle(n, i)).collect();
                let mut tensors = prepared(&rank, &oracles).map_err(explain)?;
                let mut expected = Vec::new();
                for round in 0..iterations.div_ceil(AT_ONCE) {
                    for tensors in &mut tensors {
                        rank.poison(tensors).map_err(explain)?;
                    }
                    for tensors in &mut tensors {
                        let handle = rank.dispatch(tensors).map_err(explain)?;
                        rank.combine(handle, tensors).map_err(explain)?;
                    }
                    rank.stream.synchronize().map_err(explain)?;
                    for (n, tensors) in tensors.iter().enumerate() {
                        let written = written(tensors).map_err(explain)?;
                        if round == 0 {
                            // What is right once is right always, bit for bit.
                            rank.compare_dispatch(&oracles[n], tensors)?;
                            rank.compare_combine(&oracles[n], tensors)?;
                            expected.push(written);
                        } else if written != expected[n] {
                            rank.compare_dispatch(&oracles[n], tensors)?;
                            rank.compare_combine(&oracles[n], tensors)?;
                            return Err(format!("round {round}, operation {n} differs"));
                        }
                    }
                }
                let faults = rank.buffer.faults().map_err(explain)?;
                if let Some(fault) = faults.first() {
                    return Err(fault.to_string());
                }
                rank.buffer.close().map_err(explain)
            });
            all_well(outcomes)
                .unwrap_or_else(|errors| panic!("{ranks} ranks, {precision:?}: {errors}"));
        }
    }
}

/// A graph of two layers, captured once: replayed with other inputs in the same places, between
/// operations that are enqueued as usual, and after a refresh of the buffer.
#[test]
fn graphs_replay_on_gpus() {
    if starts_ranks("graphs_replay_on_gpus") {
        return;
    }
    in_each_precision(replay);
}

/// Runs a rank's part of a test, with a few tokens a rank.
fn in_each_precision(part: fn(&Case, &Communicator) -> Result<(), String>) {
    for ranks in groups(4) {
        for precision in [Precision::Bf16, Precision::Fp8] {
            let case = Case {
                tokens: vec![9; ranks],
                precision,
                ..case(ranks)
            };
            let outcomes = group(ranks, |comm| {
                part(&case, &comm).map_err(|error| format!("{precision:?}: {error}"))
            });
            all_well(outcomes).unwrap_or_else(|errors| panic!("{ranks} ranks: {errors}"));
        }
    }
}

fn failed(error: DriverError) -> String {
    format!("{error:?}")
}

/// A framework's stream: captured by its owner, borrowed by the library.
fn their_stream(device: &Device) -> Result<Arc<CudaStream>, String> {
    let context = CudaContext::new(device.ordinal().0 as usize).map_err(failed)?;
    context.new_stream().map_err(failed)
}

/// The graph of what is enqueued from a stream.
fn captured(
    stream: &Arc<CudaStream>,
    enqueue: impl FnOnce() -> Result<(), Error>,
) -> Result<CudaGraph, String> {
    stream
        .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        .map_err(failed)?;
    let enqueued = enqueue();
    let graph = stream
        .end_capture(CUgraphInstantiate_flags(0))
        .map_err(failed)?;
    enqueued.map_err(explain)?;
    graph.ok_or_else(|| "nothing was captured".into())
}

fn replay(case: &Case, comm: &Communicator) -> Result<(), String> {
    let device = device(comm.rank()).map_err(explain)?;
    let theirs = their_stream(&device)?;
    let handle = StreamHandle(theirs.cu_stream() as u64);
    // SAFETY: the stream is of the device's primary context, and lives until this function ends.
    let stream = unsafe { Stream::borrowed(&device, handle) }.map_err(explain)?;
    let mut rank = Rank::new(&device, comm, case).map_err(explain)?.on(stream);

    let operations = 6;
    let inputs: Vec<_> = (0..operations).map(|n| case.inputs(n)).collect();
    let oracles: Vec<_> = (0..).zip(&inputs).map(|(n, i)| rank.oracle(n, i)).collect();
    let mut tensors = prepared(&rank, &oracles[..2]).map_err(explain)?;
    rank.run(1, Order::Fused)?;

    let graph = captured(&theirs, || {
        tensors.iter_mut().try_for_each(|tensors| {
            let handle = rank.dispatch(tensors)?;
            rank.combine(handle, tensors)
        })
    })?;

    let members: Vec<u32> = (0..comm.size()).collect();
    let rounds = setting("EP_GPU_ITERS", 300).min(300);
    for round in 0..rounds {
        // The graph reads the table of peers when it is replayed, and finds the new one.
        if round == rounds / 2 {
            rank.buffer.refresh(comm, &members).map_err(explain)?;
        }
        let first = 2 * (round % (operations / 2));
        for (tensors, n) in tensors.iter_mut().zip(first..) {
            let input = &inputs[n][rank.rank()];
            let refill = |tensors: &mut Tensors| {
                tensors.x.copy_from_host(&input.x)?;
                tensors.topk_idx.copy_from_host(&input.topk_idx)?;
                tensors.topk_weights.copy_from_host(&input.topk_weights)?;
                rank.experts(&oracles[n], tensors)?;
                rank.poison(tensors)
            };
            refill(tensors).map_err(explain)?;
        }
        graph.launch().map_err(failed)?;
        rank.stream.synchronize().map_err(explain)?;
        for (tensors, n) in tensors.iter().zip(first..) {
            rank.compare_dispatch(&oracles[n], tensors)
                .and_then(|()| rank.compare_combine(&oracles[n], tensors))
                .map_err(|error| format!("round {round}: {error}"))?;
        }
        if round % 16 == 5 {
            let handle = rank.dispatch(&mut tensors[0]).map_err(explain)?;
            rank.combine(handle, &mut tensors[0]).map_err(explain)?;
            rank.stream.synchronize().map_err(explain)?;
            rank.compare_combine(&oracles[first], &tensors[0])?;
        }
    }
    let faults = rank.buffer.faults().map_err(explain)?;
    if let Some(fault) = faults.first() {
        return Err(fault.to_string());
    }
    let closed = rank.buffer.close().map_err(explain);
    drop(graph);
    closed
}

/// Dispatch and combine on a communication stream, while another computes: the same bits as on one
/// stream, launched and replayed.
#[test]
fn operations_beside_other_work_on_gpus() {
    if starts_ranks("operations_beside_other_work_on_gpus") {
        return;
    }
    in_each_precision(beside);
}

fn beside(case: &Case, comm: &Communicator) -> Result<(), String> {
    let device = device(comm.rank()).map_err(explain)?;
    let theirs = their_stream(&device)?;
    let handle = StreamHandle(theirs.cu_stream() as u64);
    // SAFETY: the stream is of the device's primary context, and lives until this function ends.
    let compute = unsafe { Stream::borrowed(&device, handle) }.map_err(explain)?;
    let rank = Rank::new(&device, comm, case).map_err(explain)?;
    let inputs = case.inputs(0);
    let oracle = rank.oracle(0, &inputs);

    // What one stream gives.
    let mut tensors = rank.tensors(&oracle).map_err(explain)?;
    rank.experts(&oracle, &mut tensors).map_err(explain)?;
    let handle = rank.dispatch(&mut tensors).map_err(explain)?;
    rank.combine(handle, &mut tensors).map_err(explain)?;
    rank.stream.synchronize().map_err(explain)?;
    rank.compare_dispatch(&oracle, &tensors)?;
    rank.compare_combine(&oracle, &tensors)?;
    let expected = written(&tensors).map_err(explain)?;

    let mut beside = Beside::new(&rank, compute, &oracle, tensors).map_err(explain)?;
    for is_split in [false, true] {
        for round in 0..setting("EP_GPU_ITERS", 50).min(50) {
            beside.poison().map_err(explain)?;
            beside.enqueue(is_split).map_err(explain)?;
            beside
                .compare(&expected)
                .map_err(|error| format!("launch {round}: {error}"))?;
        }
        let graph = captured(&theirs, || beside.enqueue(is_split))?;
        for round in 0..setting("EP_GPU_ITERS", 50).min(50) {
            beside.poison().map_err(explain)?;
            graph.launch().map_err(failed)?;
            beside
                .compare(&expected)
                .map_err(|error| format!("replay {round}: {error}"))?;
        }
    }
    let faults = rank.buffer.faults().map_err(explain)?;
    if let Some(fault) = faults.first() {
        return Err(fault.to_string());
    }
    drop(beside);
    rank.buffer.close().map_err(explain)
}

/// A rank whose operations run on its own stream, and what they are given on another.
struct Beside<'r> {
    rank: &'r Rank<'r>,
    compute: Stream,
    order: Event,
    /// Fills of it take the compute stream long enough that what does not wait for them is early.
    work: Tensor,
    tokens: Tensor,
    outputs: Tensor,
    /// What the experts are taken to write.
    y: Tensor,
    tensors: Tensors,
    /// What the compute stream finds where it uses results.
    seen_counts: Tensor,
    seen_out: Tensor,
}

impl<'r> Beside<'r> {
    const WORK: usize = 128 << 20;

    fn new(
        rank: &'r Rank<'_>,
        compute: Stream,
        oracle: &Oracle<'_>,
        tensors: Tensors,
    ) -> Result<Self, Error> {
        let device = rank.buffer.device();
        let like = |tensor: &Tensor| Tensor::new(device, tensor.dtype(), tensor.dims());
        let tokens = Tensor::from_host(
            device,
            DType::Bf16,
            tensors.x.dims(),
            &oracle.inputs[rank.rank()].x,
        )?;
        let rows = tensors.received.src_info.dims();
        let [experts, rows] = rows.as_slice() else {
            panic!("src_info has sizes {rows}");
        };
        let outputs = Tensor::from_host(
            device,
            DType::Bf16,
            [*experts, *rows, oracle.case.hidden],
            &oracle.expert_outputs(rank.rank()),
        )?;
        Ok(Self {
            rank,
            compute,
            order: Event::untimed(device)?,
            work: Tensor::new(device, DType::U8, [Self::WORK])?,
            tokens,
            y: like(&outputs)?,
            outputs,
            seen_counts: like(&tensors.received.recv_count)?,
            seen_out: like(&tensors.out)?,
            tensors,
        })
    }

    /// Undoes everything that `enqueue` does.
    fn poison(&mut self) -> Result<(), Error> {
        self.rank.poison(&mut self.tensors)?;
        let stream = &self.rank.stream;
        self.tensors.x.fill(POISON, stream)?;
        self.y.fill(POISON, stream)?;
        self.seen_counts.fill(POISON, stream)?;
        self.seen_out.fill(POISON, stream)?;
        stream.synchronize()
    }

    /// Everything from the tokens to their sums. Begins and ends on the compute stream.
    fn enqueue(&mut self, is_split: bool) -> Result<(), Error> {
        let Self {
            rank,
            compute,
            order,
            work,
            tensors,
            ..
        } = self;
        let communication = &rank.stream;
        let copy = |to: &Tensor, from: &Tensor| {
            let device = rank.buffer.device();
            let copied = CudaDriver::load().and_then(|driver| {
                driver.copy_on_device(
                    device.ordinal(),
                    to.ptr(),
                    from.ptr(),
                    from.bytes(),
                    compute.handle(),
                )
            });
            copied.map_err(|source| Error::Driver {
                rank: None,
                doing: "copying a tensor",
                source,
            })
        };

        work.fill(1, compute)?;
        copy(&tensors.x, &self.tokens)?;
        communication.follow(compute, order)?;
        let handle = if is_split {
            let pending = rank.dispatch_send(tensors)?;
            work.fill(2, compute)?;
            rank.buffer
                .dispatch_receive(communication, pending, &mut tensors.received)?
        } else {
            rank.dispatch(tensors)?
        };
        work.fill(3, compute)?;
        compute.follow(communication, order)?;
        copy(&self.seen_counts, &tensors.received.recv_count)?;

        work.fill(4, compute)?;
        copy(&self.y, &self.outputs)?;
        communication.follow(compute, order)?;
        let input = CombineInput::new(&self.y);
        if is_split {
            let pending = rank.buffer.combine_send(communication, handle, &input)?;
            work.fill(5, compute)?;
            rank.buffer
                .combine_receive(communication, pending, &mut tensors.out)?;
        } else {
            rank.buffer
                .combine(communication, handle, &input, &mut tensors.out)?;
        }
        work.fill(6, compute)?;
        compute.follow(communication, order)?;
        copy(&self.seen_out, &tensors.out)
    }

    /// Waits for the compute stream alone.
    fn compare(&self, expected: &[Vec<u8>]) -> Result<(), String> {
        self.compute.synchronize().map_err(explain)?;
        if written(&self.tensors).map_err(explain)? != expected {
            return Err("the outputs differ".into());
        }
        let [.., counts, _, _, out] = expected else {
            return Err("the outputs are too few".into());
        };
        let seen = self.seen_counts.copy_to_host::<i32>().map_err(explain)?;
        if seen.as_bytes() != counts {
            return Err(format!("the compute stream found counts {seen:?}"));
        }
        let seen = self.seen_out.copy_to_host::<u16>().map_err(explain)?;
        if seen.as_bytes() != out {
            return Err("the compute stream found other sums".into());
        }
        Ok(())
    }
}

/// What is added over dispatches, of one launch and of two, and replayed; and a rank that is late.
#[test]
fn totals_and_waits_on_gpus() {
    if starts_ranks("totals_and_waits_on_gpus") {
        return;
    }
    for ranks in groups(8) {
        let case = case(ranks);
        let outcomes = group(ranks, |comm| totals_and_waits(&case, &comm));
        all_well(outcomes).unwrap_or_else(|errors| panic!("{ranks} ranks: {errors}"));
    }
}

fn totals_and_waits(case: &Case, comm: &Communicator) -> Result<(), String> {
    let device = device(comm.rank()).map_err(explain)?;
    let short = Duration::from_secs(1);
    let rank = Rank::with(&device, comm, case, |b| b.timeout(short)).map_err(explain)?;
    let read = |tensor: &Tensor| tensor.copy_to_host::<i64>().map_err(explain);
    let mut totals: Vec<i64> = (0..).take(case.local_experts()).map(|l| l - 1).collect();
    let waits = vec![1 << 40; case.ranks];
    let sums = |values: &[i64]| {
        Tensor::from_host(&device, DType::I64, [values.len()], values).map_err(explain)
    };
    let (mut total_count, mut wait_ns) = (sums(&totals)?, sums(&waits)?);
    comm.barrier(PATIENCE).map_err(explain)?;
    for n in 0..6 {
        let inputs = case.inputs(n);
        let oracle = rank.oracle(n, &inputs);
        let mut tensors = rank.tensors(&oracle).map_err(explain)?;
        let before = (read(&total_count)?, read(&wait_ns)?);
        let input = DispatchInput {
            x: tensors.x.view(),
            topk_idx: tensors.topk_idx.view(),
            topk_weights: Some(tensors.topk_weights.view()),
        };
        let options = DispatchOptions::bf16();
        let output = DispatchOutputMut::from(&mut tensors.received);
        // Of two launches, of one, and without anything to add to.
        let handle = match n % 3 {
            0 => {
                let output = output
                    .with_total_count(&mut total_count)
                    .with_wait_ns(&mut wait_ns);
                let sent = rank.buffer.dispatch_send(&rank.stream, &input, &options);
                let sent = sent.map_err(explain)?;
                let received = rank.buffer.dispatch_receive(&rank.stream, sent, output);
                received.map_err(explain)?
            }
            1 => {
                let output = output
                    .with_total_count(&mut total_count)
                    .with_wait_ns(&mut wait_ns);
                let dispatched = rank.buffer.dispatch(&rank.stream, &input, &options, output);
                dispatched.map_err(explain)?
            }
            _ => {
                let dispatched = rank.buffer.dispatch(&rank.stream, &input, &options, output);
                dispatched.map_err(explain)?
            }
        };
        rank.check_dispatch(&oracle, &handle, &mut tensors)?;
        drop(handle);
        let after = (read(&total_count)?, read(&wait_ns)?);
        if n % 3 == 2 {
            if after != before {
                return Err(format!("dispatch {n} added to {before:?}: {after:?}"));
            }
            continue;
        }
        let counts = tensors.received.recv_count.copy_to_host::<i32>();
        for (total, count) in totals.iter_mut().zip(counts.map_err(explain)?) {
            *total += i64::from(count);
        }
        if after.0 != totals {
            return Err(format!("dispatch {n}: {:?}, not {totals:?}", after.0));
        }
        let limit = i64::try_from(short.as_nanos()).unwrap();
        for (after, before) in after.1.iter().zip(before.1) {
            // The device's clock may not have advanced.
            if !(0..limit).contains(&(after - before)) {
                return Err(format!("dispatch {n}: {after} ns after {before}"));
            }
        }
    }

    comm.barrier(PATIENCE).map_err(explain)?;
    let late = case.ranks - 1;
    if late > 0 && rank.rank() != late {
        let inputs = case.inputs(0);
        let oracle = rank.oracle(0, &inputs);
        let mut tensors = rank.tensors(&oracle).map_err(explain)?;
        let before = read(&wait_ns)?;
        let input = DispatchInput {
            x: tensors.x.view(),
            topk_idx: tensors.topk_idx.view(),
            topk_weights: Some(tensors.topk_weights.view()),
        };
        let output = DispatchOutputMut::from(&mut tensors.received).with_wait_ns(&mut wait_ns);
        let options = DispatchOptions::bf16();
        let dispatched = rank.buffer.dispatch(&rank.stream, &input, &options, output);
        drop(dispatched.map_err(explain)?);
        rank.stream.synchronize().map_err(explain)?;
        let after = read(&wait_ns)?;
        let waited = |source: usize| Duration::from_nanos((after[source] - before[source]) as u64);
        // Blocks begin a little apart; the clock that ends a wait is that of the first.
        let time_out = short - Duration::from_millis(1)..PATIENCE;
        if !time_out.contains(&waited(late)) {
            return Err(format!("waited {:?} for who did not come", waited(late)));
        }
        if (0..late).any(|source| waited(source) >= waited(late)) {
            return Err(format!("waits became {after:?} from {before:?}"));
        }
    }
    comm.barrier(PATIENCE).map_err(explain)?;
    rank.buffer.close().map_err(explain)
}

#[test]
fn a_late_rank_is_reported_on_gpus() {
    if starts_ranks("a_late_rank_is_reported_on_gpus") {
        return;
    }
    let Some(&ranks) = groups(4).iter().find(|ranks| **ranks > 1) else {
        return;
    };
    // So many rows that one multiprocessor takes the kernels for many, and all of them those for few.
    let case = Case {
        hidden: 1024,
        max_tokens: 64,
        tokens: (0..ranks).map(|rank| 64 - rank).collect(),
        ..case(ranks)
    };
    for num_sms in [0, 1] {
        group(ranks, |comm| report_late_rank(&case, num_sms, &comm));
    }
}

/// The last rank of the case takes no part; the others say so, and have what came from the rest.
fn report_late_rank(case: &Case, num_sms: u32, comm: &Communicator) {
    let device = device(comm.rank()).unwrap();
    let short = Duration::from_millis(200);
    let rank = Rank::with(&device, comm, case, |b| b.timeout(short).num_sms(num_sms)).unwrap();
    let late = case.ranks - 1;
    comm.barrier(PATIENCE).unwrap();
    if rank.rank() != late {
        let inputs = case.inputs(0);
        let oracle = rank.oracle(0, &inputs);
        let mut tensors = rank.tensors(&oracle).unwrap();
        let handle = rank.dispatch(&mut tensors).unwrap();
        rank.stream.synchronize().unwrap();
        let status = rank.buffer.status_of(&handle).unwrap();
        let [fault] = status.faults[..] else {
            panic!("{status:?}");
        };
        assert_eq!((fault.rank as usize, fault.phase), (late, Phase::Counts));
        let FaultKind::Timeout { waited } = fault.kind else {
            panic!("{fault}");
        };
        assert!((short..PATIENCE).contains(&waited), "{waited:?}");

        // What came from those that were there is there, and the next operation goes on.
        let links = common::Links::all(case.ranks).without(late);
        let without = Oracle::new(case, 0, &inputs, links);
        rank.compare_dispatch(&without, &tensors).unwrap();
        rank.experts(&without, &mut tensors).unwrap();
        rank.combine(handle, &mut tensors).unwrap();
        rank.stream.synchronize().unwrap();
        rank.compare_combine(&without, &tensors).unwrap();
        let status = rank.buffer.status().unwrap().unwrap();
        assert_eq!((status.operation, status.epoch), (Operation::Combine, 1));
        let of_late = |fault: &Fault| (fault.rank as usize, fault.phase) == (late, Phase::Partials);
        assert!(
            !status.faults.is_empty() && status.faults.iter().all(of_late),
            "{status:?}"
        );
    }
    comm.barrier(PATIENCE).unwrap();
    rank.buffer.close().unwrap();
}

#[test]
fn weights_that_do_not_come_keep_no_other_rank_waiting_on_gpus() {
    if starts_ranks("weights_that_do_not_come_keep_no_other_rank_waiting_on_gpus") {
        return;
    }
    for ranks in groups(4).into_iter().filter(|ranks| *ranks > 1) {
        group(ranks, |comm| {
            rig::miss_weights_of_rank_0(&device(comm.rank()).unwrap(), &comm);
        });
    }
}

#[test]
fn operations_that_are_called_off_end_on_gpus() {
    if starts_ranks("operations_that_are_called_off_end_on_gpus") {
        return;
    }
    for ranks in groups(4).into_iter().filter(|ranks| *ranks > 1) {
        group(ranks, |comm| {
            rig::call_off_what_waits_for_the_last(&device(comm.rank()).unwrap(), &comm);
        });
    }
}

#[test]
fn buffers_come_and_go_on_gpus() {
    if starts_ranks("buffers_come_and_go_on_gpus") {
        return;
    }
    let Some(ranks) = groups(4).pop() else {
        return;
    };
    let case = case(ranks);
    let driver = CudaDriver::load().unwrap();
    let free = |device: &Device| driver.mem_info(device.ordinal()).unwrap().0;
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    group(ranks, |comm| {
        let device = device(comm.rank()).unwrap();
        let mut before = None;
        for round in 0..setting("EP_GPU_ITERS", 200).min(200) {
            let kinds = [BackendKind::Malloc, BackendKind::PosixFd];
            let choice = Choice::Force(kinds[round % 2]);
            let rank = Rank::with(&device, &comm, &case, |b| b.alloc(choice)).unwrap();
            rank.run(1, Order::Fused).unwrap();
            rank.buffer.close().unwrap();
            drop(rank.stream);
            comm.barrier(PATIENCE).unwrap();
            let now = (free(&device), descriptors());
            // The first rounds load what the driver keeps.
            if round == 3 {
                before = Some(now);
            }
            if let Some((memory, descriptors)) = before {
                // A round that leaked would take 2 MiB.
                assert!(
                    now.0 + (16 << 20) >= memory,
                    "round {round}: {} of {memory} free",
                    now.0
                );
                assert!(
                    now.1 <= descriptors + 2,
                    "round {round}: {} descriptors",
                    now.1
                );
            }
            comm.barrier(PATIENCE).unwrap();
        }
    });
}

#[test]
fn forced_fabric_is_refused_with_the_reason_on_gpus() {
    if starts_ranks("forced_fabric_is_refused_with_the_reason_on_gpus") {
        return;
    }
    let Some(ranks) = groups(4).pop() else {
        return;
    };
    let case = case(ranks);
    let outcomes = group(ranks, |comm| {
        let device = device(comm.rank()).unwrap();
        if CudaDriver::load().unwrap().host_facts().imex_channel {
            eprintln!("skipped: this host has an IMEX channel");
            return None;
        }
        let force = Choice::Force(BackendKind::Fabric);
        let rank = Rank::with(&device, &comm, &case, |b| b.alloc(force));
        Some(explain(rank.err().unwrap()))
    });
    for error in outcomes.into_iter().flatten() {
        assert!(error.contains("cuMemCreate returned 800"), "{error}");
        assert!(error.contains("IMEX"), "{error}");
    }
}

#[test]
fn host_kernels_keep_off_the_memory_of_gpus() {
    if gpus().is_none() {
        return;
    }
    let driver = CudaDriver::load().unwrap();
    let device = Device::host(driver, ep::driver::DeviceOrdinal(0));
    let comm = Communicator::threads(1).remove(0);
    let error = Buffer::builder(&device, &comm, Config::new(128, 1, 1, 1)).build();
    assert!(matches!(error, Err(Error::HostKernels { rank: 0 })));
}

/// What the demo's experts are made of.
#[cfg(feature = "cuda")]
#[test]
fn expert_kernels_on_a_gpu() {
    use ep::experts;

    if gpus().is_none() {
        return;
    }
    let device = gpu(0).unwrap();
    let stream = Stream::new(&device).unwrap();
    let (capacity, hidden, rows) = (19, 256, 16);

    // Every code of E4M3, in rows that do not all count.
    let codes: Vec<u8> = (0..capacity * hidden)
        .map(|i| (i * 7 % 255) as u8)
        .collect();
    let scales: Vec<f32> = (0..hidden / 128 * capacity)
        .map(|i| 0.01 * (i + 1) as f32)
        .collect();
    let x = Tensor::from_host(&device, DType::E4m3, [capacity, hidden], &codes).unwrap();
    let scale = Tensor::from_host(&device, DType::F32, [hidden / 128, capacity], &scales).unwrap();
    let mut out = Tensor::new(&device, DType::Bf16, [rows, hidden]).unwrap();
    out.fill(POISON, &stream).unwrap();
    experts::dequantize(&stream, x.view(), scale.view(), out.view_mut()).unwrap();
    stream.synchronize().unwrap();
    let magnitudes = common::e4m3_values();
    for (i, bits) in out.copy_to_host::<u16>().unwrap().into_iter().enumerate() {
        let (row, channel) = (i / hidden, i % hidden);
        let code = codes[i];
        let Some(magnitude) = magnitudes.get(usize::from(code & 0x7f)) else {
            assert!(common::bf16_value(bits).is_nan(), "{row}, {channel}");
            continue;
        };
        let sign = if code < 0x80 { 1.0 } else { -1.0 };
        let value = (sign * magnitude) as f32 * scales[channel / 128 * capacity + row];
        assert_eq!(bits, common::bf16_round(value), "{row}, {channel}");
    }

    let intermediate = 384;
    let gate_up: Vec<u16> = (0..rows * 2 * intermediate)
        .map(|i| common::bf16_round((i % 61) as f32 / 8.0 - 3.5))
        .collect();
    let input = Tensor::from_host(&device, DType::Bf16, [rows, 2 * intermediate], &gate_up);
    let mut out = Tensor::new(&device, DType::Bf16, [rows, intermediate]).unwrap();
    out.fill(POISON, &stream).unwrap();
    experts::swiglu(&stream, input.unwrap().view(), out.view_mut()).unwrap();
    stream.synchronize().unwrap();
    for (i, bits) in out.copy_to_host::<u16>().unwrap().into_iter().enumerate() {
        let (row, channel) = (i / intermediate, i % intermediate);
        let at =
            |column: usize| f64::from(common::bf16_value(gate_up[row * 2 * intermediate + column]));
        let (gate, up) = (at(channel), at(intermediate + channel));
        let value = gate / (1.0 + (-gate).exp()) * up;
        let error = (f64::from(common::bf16_value(bits)) - value).abs();
        assert!(
            error <= value.abs() / 200.0 + 1e-6,
            "{row}, {channel}: {error}"
        );
    }

    let mut small = Tensor::new(&device, DType::Bf16, [capacity + 1, hidden]).unwrap();
    let refused = experts::dequantize(&stream, x.view(), scale.view(), small.view_mut());
    assert!(matches!(refused, Err(Error::Argument { .. })));
}
