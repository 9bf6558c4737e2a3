//! The facade on simulated clusters: round trips over threads and processes on every kind of memory,
//! and everything that a caller can do wrong.

#[path = "../../../kernels/tests/common/mod.rs"]
mod common;
mod rig;

use std::sync::Arc;
use std::time::{Duration, Instant};

use ep::driver::{Call, DeviceOrdinal, Status};
use ep::{
    ArgumentError, BackendKind, Buffer, BufferBuilder, Choice, CombineInput, Communicator, Config,
    DType, Device, DispatchInput, DispatchOptions, DispatchOutput, DispatchOutputMut, Error, Event,
    FaultKind, Handle, Operation, Phase, Rejected, Scales, Stream, Tensor,
};
use ep_sim::{Cluster, FaultPlan, IpcNamespace, SimDriver};
use proptest::prelude::*;

use common::{Case, Odd, Precision, Routing, Weights};
use rig::{
    Order, PATIENCE, Processes, Rank, Task, Tensors, all_well, case, config, explain, threads,
};

/// A host with this many GPUs, all visible to one process.
fn host(gpus: usize) -> Arc<SimDriver> {
    let gpus = u32::try_from(gpus).unwrap();
    let visible: Vec<_> = (0..gpus).collect();
    SimDriver::new(&Cluster::hgx_h200(gpus), 0, &visible)
}

fn device(driver: &Arc<SimDriver>, comm: &Communicator) -> Device {
    Device::host(driver.clone(), DeviceOrdinal(comm.rank()))
}

/// Runs a case with ranks that are threads of one simulated process, and asks that nothing is left.
fn run_threads(case: &Case, operations: usize, order: Order) -> Result<(), String> {
    let driver = host(case.ranks);
    let outcomes = threads(case.ranks, |comm| {
        let rank = Rank::new(&device(&driver, &comm), &comm, case).map_err(explain)?;
        rank.run(operations, order)?;
        rank.buffer.close().map_err(explain)
    });
    all_well(outcomes)?;
    match driver.live() {
        live if live.is_empty() => Ok(()),
        live => Err(format!("left behind: {live:?}")),
    }
}

fn cases() -> impl Strategy<Value = (Case, Order)> {
    let routing = prop::sample::select(vec![
        Routing::Uniform,
        Routing::Zipf,
        Routing::Hot,
        Routing::One,
    ]);
    let weights =
        prop::sample::select(vec![Weights::None, Weights::AtDispatch, Weights::AtCombine]);
    let precision = prop::sample::select(vec![
        Precision::Bf16,
        Precision::Fp8,
        Precision::Fp8Pow2,
        Precision::Fp8Ue8m0,
    ]);
    let order = prop::sample::select(vec![
        Order::Fused,
        Order::Split,
        Order::Nested,
        Order::Overlapped,
    ]);
    let odd = any::<[bool; 3]>().prop_map(|[missing, out_of_range, repeated]| Odd {
        missing,
        out_of_range,
        repeated,
    });
    let tokens = prop_oneof![1 => Just(0_usize), 5 => 0..=6_usize, 1 => 7..=32_usize];
    let shape = (1..=4_usize, 1..=6_usize, 1..=4_usize, 1..=12_usize);
    let rest = (routing, weights, precision, odd, order, any::<u64>());
    (shape, prop::collection::vec(tokens, 4), rest).prop_map(
        |((ranks, local, blocks, top_k), tokens, rest)| {
            let (routing, weights, precision, odd, order, seed) = rest;
            let tokens = tokens[..ranks].to_vec();
            let case = Case {
                ranks,
                experts: ranks * local,
                hidden: 128 * blocks,
                top_k,
                max_tokens: tokens.iter().max().copied().unwrap_or(0).max(1),
                tokens,
                routing,
                weights,
                precision,
                odd,
                specials: true,
                seed,
            };
            (case, order)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 4, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_dispatched_is_received_and_combined((case, order) in cases()) {
        run_threads(&case, 4, order).map_err(TestCaseError::fail)?;
    }
}

/// Clusters on which the policy, or an override, gives each kind of memory, and which.
fn kinds() -> [(Cluster, Choice, BackendKind); 5] {
    let (host, rack) = (Cluster::hgx_h200(8), Cluster::gb200_nvl72(2));
    let private = host
        .clone()
        .map_nodes(|node| node.ipc_namespace = IpcNamespace::Private);
    let force = Choice::Force;
    [
        (host.clone(), Choice::Auto, BackendKind::Malloc),
        (host, force(BackendKind::PosixFd), BackendKind::PosixFd),
        // CUDA IPC is refused between containers: found by importing, then decided anew.
        (private, Choice::Auto, BackendKind::PosixFd),
        (
            rack.clone(),
            force(BackendKind::Fabric),
            BackendKind::Fabric,
        ),
        // Where the ranks are on both nodes of the rack.
        (rack, Choice::Auto, BackendKind::Fabric),
    ]
}

/// A rank of a cluster with a process of its own, as its driver sees it.
fn as_a_process(
    driver: &Arc<SimDriver>,
    comm: &Communicator,
    case: &Case,
    choice: Choice,
    expected: BackendKind,
) -> Result<(), String> {
    let device = Device::host(driver.clone(), DeviceOrdinal(0));
    let rank = Rank::with(&device, comm, case, |builder| builder.alloc(choice)).map_err(explain)?;
    if rank.buffer.plan().backend != expected {
        return Err(format!("the plan is {}", rank.buffer.plan()));
    }
    rank.run(2, Order::Fused)?;
    rank.buffer.close().map_err(explain)?;
    drop(rank.stream);
    match driver.live() {
        live if live.is_empty() => Ok(()),
        live => Err(format!("left behind: {live:?}")),
    }
}

#[test]
fn every_kind_of_memory_over_threads() {
    for (kind, (cluster, choice, expected)) in (0..).zip(kinds()) {
        let cluster = cluster.with_run_key(u64::from(std::process::id()) << 8 | kind);
        let case = case(6);
        let outcomes = threads(case.ranks, |comm| {
            let driver = SimDriver::for_rank(&cluster, comm.rank() as usize).unwrap();
            as_a_process(&driver, &comm, &case, choice, expected)
        });
        all_well(outcomes).unwrap_or_else(|errors| panic!("{expected}: {errors}"));
    }
}

#[test]
fn every_kind_of_memory_over_processes() {
    const TEST: &str = "every_kind_of_memory_over_processes";
    if let Some(task) = Task::of_this_process() {
        let [kind, ranks] = [0, 1].map(|i| task.words[i].parse::<usize>().unwrap());
        let (cluster, choice, expected) = kinds().into_iter().nth(kind).unwrap();
        let cluster = cluster.with_run_key(task.key);
        let driver = SimDriver::for_rank(&cluster, task.rank as usize).unwrap();
        let comm = task.meet(ranks).unwrap();
        as_a_process(&driver, &comm, &case(ranks), choice, expected).unwrap();
        return;
    }
    for (kind, ranks) in [(0, 4), (1, 2), (1, 4), (2, 4), (3, 4), (4, 6)] {
        let task = [kind.to_string(), ranks.to_string()];
        let task = [task[0].as_str(), task[1].as_str()];
        Processes::start(TEST, ranks, &task, |_, _| {}).succeed();
    }
}

/// Two ranks of one simulated process, each with a buffer for the usual case.
fn pair<T: Send>(body: impl Fn(Rank<'_>) -> T + Sync) -> Vec<T> {
    pair_of(|_, rank| body(rank))
}

/// The same, with their driver.
fn pair_of<T: Send>(body: impl Fn(&Arc<SimDriver>, Rank<'_>) -> T + Sync) -> Vec<T> {
    let (case, driver) = (case(2), host(2));
    let outcomes = threads(2, |comm| {
        let rank = Rank::new(&device(&driver, &comm), &comm, &case).unwrap();
        body(&driver, rank)
    });
    assert!(driver.live().is_empty(), "left behind: {:?}", driver.live());
    outcomes
}

#[test]
fn arguments_are_refused_by_name_and_the_buffer_stays_usable() {
    pair_of(|driver, rank| {
        let device = rank.buffer.device().clone();
        let other = Device::host(driver.clone(), DeviceOrdinal(7));
        let tensor = |dtype, dims: [usize; 2]| Tensor::new(&device, dtype, dims).unwrap();
        let (good_x, good_idx) = (tensor(DType::Bf16, [7, 256]), tensor(DType::I64, [7, 4]));
        let refused = |x: &Tensor, topk_idx: &Tensor, weights: Option<&Tensor>, options| {
            let mut output = rank.buffer.new_output(&options).unwrap();
            let input = DispatchInput {
                x: x.view(),
                topk_idx: topk_idx.view(),
                topk_weights: weights.map(Tensor::view),
            };
            let refused = rank
                .buffer
                .dispatch(&rank.stream, &input, &options, &mut output);
            named(refused.unwrap_err())
        };
        let bf16 = DispatchOptions::bf16();
        let cases = [
            (tensor(DType::F32, [7, 256]), None, None, "x: DType"),
            (tensor(DType::Bf16, [7, 128]), None, None, "x: Dims"),
            (tensor(DType::Bf16, [10, 256]), None, None, "tokens: Range"),
            (
                Tensor::new(&device, DType::Bf16, [7, 2, 128]).unwrap(),
                None,
                None,
                "x: Rank",
            ),
            (
                tensor(DType::Bf16, [7, 256]),
                Some(tensor(DType::I32, [7, 4])),
                None,
                "topk_idx: DType",
            ),
            (
                tensor(DType::Bf16, [7, 256]),
                Some(tensor(DType::I64, [6, 4])),
                None,
                "topk_idx: Dims",
            ),
            (
                tensor(DType::Bf16, [7, 256]),
                Some(tensor(DType::I64, [7, 5])),
                None,
                "top_k: Range",
            ),
            (
                tensor(DType::Bf16, [7, 256]),
                Some(tensor(DType::I64, [7, 0])),
                None,
                "top_k: Range",
            ),
            (
                tensor(DType::Bf16, [7, 256]),
                None,
                Some(tensor(DType::F32, [7, 3])),
                "topk_weights: Dims",
            ),
            (
                tensor(DType::Bf16, [7, 256]),
                None,
                Some(tensor(DType::Bf16, [7, 4])),
                "topk_weights: DType",
            ),
        ];
        for (x, topk_idx, weights, expected) in &cases {
            let topk_idx = topk_idx.as_ref().unwrap_or(&good_idx);
            assert_eq!(refused(x, topk_idx, weights.as_ref(), bf16), *expected);
        }

        // Outputs of another format, or of another buffer's shape.
        let input = DispatchInput {
            x: good_x.view(),
            topk_idx: good_idx.view(),
            topk_weights: None,
        };
        let formats = [
            (Scales::F32, Scales::Ue8m0, "recv_scales: DType"),
            (Scales::Ue8m0, Scales::Pow2, "recv_scales: DType"),
        ];
        for (made, used, expected) in formats {
            let mut output = rank.buffer.new_output(&DispatchOptions::fp8(made)).unwrap();
            let options = DispatchOptions::fp8(used);
            let refused = rank
                .buffer
                .dispatch(&rank.stream, &input, &options, &mut output);
            assert_eq!(named(refused.unwrap_err()), expected);
            let refused = rank
                .buffer
                .dispatch(&rank.stream, &input, &bf16, &mut output);
            assert_eq!(named(refused.unwrap_err()), "recv_scales: Presence");
            output.recv_scales = None;
            let refused = rank
                .buffer
                .dispatch(&rank.stream, &input, &bf16, &mut output);
            assert_eq!(named(refused.unwrap_err()), "recv_x: DType");
        }
        for field in ["recv_x", "recv_count", "src_info", "layout_range"] {
            let mut output = rank.buffer.new_output(&bf16).unwrap();
            let wrong = match field {
                "recv_x" => &mut output.recv_x,
                "recv_count" => &mut output.recv_count,
                "src_info" => &mut output.src_info,
                _ => &mut output.layout_range,
            };
            *wrong = Tensor::new(&device, wrong.dtype(), [1]).unwrap();
            let refused = rank
                .buffer
                .dispatch(&rank.stream, &input, &bf16, &mut output);
            assert_eq!(named(refused.unwrap_err()), format!("{field}: Dims"));
        }

        // Of another device, as far as this process can have it.
        let elsewhere = Tensor::new(&other, DType::Bf16, [0, 256]).unwrap();
        let none = DispatchInput {
            x: elsewhere.view(),
            topk_idx: good_idx.view().first(0),
            topk_weights: None,
        };
        let mut output = rank.buffer.new_output(&bf16).unwrap();
        let refused = rank
            .buffer
            .dispatch(&rank.stream, &none, &bf16, &mut output);
        assert_eq!(named(refused.unwrap_err()), "x: Device");

        // Combine gives the handle back with the error.
        let inputs = case(2).inputs(0);
        let oracle = rank.oracle(0, &inputs);
        let mut tensors = rank.tensors(&oracle).unwrap();
        let mut handle = rank.dispatch(&mut tensors).unwrap();
        let tokens = handle.num_tokens() as usize;
        let y = |dtype, dims: [usize; 3]| Tensor::new(&device, dtype, dims).unwrap();
        let good_y = || y(DType::Bf16, [3, 18, 256]);
        let combines = [
            (y(DType::F32, [3, 18, 256]), None, [tokens, 256], "y: DType"),
            (y(DType::Bf16, [3, 17, 256]), None, [tokens, 256], "y: Dims"),
            (good_y(), None, [tokens + 1, 256], "out: Dims"),
            (
                good_y(),
                Some(tensor(DType::F32, [tokens + 1, 4])),
                [tokens, 256],
                "topk_weights: Dims",
            ),
        ];
        for (y, weights, out, expected) in &combines {
            let mut input = CombineInput::new(y);
            if let Some(weights) = weights {
                input = input.with_weights(weights);
            }
            let mut out = tensor(DType::Bf16, *out);
            let rejected = rank
                .buffer
                .combine(&rank.stream, handle, &input, &mut out)
                .unwrap_err();
            assert_eq!(named(*rejected.error), *expected);
            handle = rejected.operand;
        }
        rank.check_dispatch(&oracle, &handle, &mut tensors).unwrap();
        rank.combine(handle, &mut tensors).unwrap();
        rank.check_combine(&oracle, &tensors).unwrap();
        rank.run(2, Order::Nested).unwrap();
        rank.buffer.close().unwrap();
    });
}

/// Tensors of i64 with these values.
fn sums<const N: usize>(device: &Device, values: [&[i64]; N]) -> [Tensor; N] {
    values.map(|values| Tensor::from_host(device, DType::I64, [values.len()], values).unwrap())
}

/// An output that is asked for `total_count` and `wait_ns`, where they are there.
fn asked<'a>(
    received: &'a mut DispatchOutput,
    [total_count, wait_ns]: &'a mut [Option<Tensor>; 2],
) -> DispatchOutputMut<'a> {
    let mut output = DispatchOutputMut::from(received);
    if let Some(total_count) = total_count {
        output = output.with_total_count(total_count);
    }
    if let Some(wait_ns) = wait_ns {
        output = output.with_wait_ns(wait_ns);
    }
    output
}

/// A dispatch in one launch that is asked for them.
fn dispatch_asked(
    rank: &Rank<'_>,
    tensors: &mut Tensors,
    given: &mut [Option<Tensor>; 2],
) -> Result<Handle, Error> {
    let input = DispatchInput {
        x: tensors.x.view(),
        topk_idx: tensors.topk_idx.view(),
        topk_weights: Some(tensors.topk_weights.view()),
    };
    let output = asked(&mut tensors.received, given);
    rank.buffer
        .dispatch(&rank.stream, &input, &DispatchOptions::bf16(), output)
}

#[test]
fn totals_and_waits_are_refused_by_name() {
    pair_of(|driver, rank| {
        let device = rank.buffer.device().clone();
        let other = DeviceOrdinal(1 - device.ordinal().0);
        let other = Device::host(driver.clone(), other);
        let tensor = |dtype, len| Some(Tensor::new(&device, dtype, [len]).unwrap());
        let elsewhere = |len| Some(Tensor::new(&other, DType::I64, [len]).unwrap());
        let wrong = [
            (tensor(DType::I32, 3), None, "total_count: DType"),
            (tensor(DType::I64, 2), None, "total_count: Dims"),
            (elsewhere(3), None, "total_count: Device"),
            (None, tensor(DType::F32, 2), "wait_ns: DType"),
            (None, tensor(DType::I64, 3), "wait_ns: Dims"),
            (tensor(DType::I64, 3), elsewhere(2), "wait_ns: Device"),
        ];
        let inputs = case(2).inputs(0);
        let oracle = rank.oracle(0, &inputs);
        let mut tensors = rank.tensors(&oracle).unwrap();
        let mut pending = rank.dispatch_send(&tensors).unwrap();
        for (total_count, wait_ns, expected) in wrong {
            let mut given = [total_count, wait_ns];
            let output = asked(&mut tensors.received, &mut given);
            let rejected = rank
                .buffer
                .dispatch_receive(&rank.stream, pending, output)
                .unwrap_err();
            assert_eq!(named(*rejected.error), expected);
            pending = rejected.operand;
            // Arguments are looked at before whose turn it is.
            let refused = dispatch_asked(&rank, &mut tensors, &mut given);
            assert_eq!(named(refused.unwrap_err()), expected);
        }
        let handle = rank.dispatch_receive(pending, &mut tensors).unwrap();
        rank.check_dispatch(&oracle, &handle, &mut tensors).unwrap();
        rank.combine(handle, &mut tensors).unwrap();
        rank.check_combine(&oracle, &tensors).unwrap();
        rank.buffer.close().unwrap();
    });
}

#[test]
fn totals_and_waits_add_up_over_dispatches() {
    pair(|rank| {
        let case = case(2);
        let mut totals = [10, -20, i64::MIN];
        let mut given = sums(rank.buffer.device(), [&totals, &[0, 1_000_000]]).map(Some);
        let read = |given: &[Option<Tensor>; 2]| {
            let [total_count, wait_ns] = given.each_ref().map(|tensor| tensor.as_ref().unwrap());
            [total_count, wait_ns].map(|tensor| tensor.copy_to_host::<i64>().unwrap())
        };
        for n in 0..4 {
            let inputs = case.inputs(n);
            let oracle = rank.oracle(n, &inputs);
            let mut tensors = rank.tensors(&oracle).unwrap();
            let before = read(&given);
            let handle = match n {
                0 => dispatch_asked(&rank, &mut tensors, &mut given).unwrap(),
                1 => {
                    let pending = rank.dispatch_send(&tensors).unwrap();
                    assert_eq!(read(&given), before);
                    let output = asked(&mut tensors.received, &mut given);
                    rank.buffer
                        .dispatch_receive(&rank.stream, pending, output)
                        .unwrap()
                }
                _ => rank.dispatch(&mut tensors).unwrap(),
            };
            rank.check_dispatch(&oracle, &handle, &mut tensors).unwrap();
            rank.combine(handle, &mut tensors).unwrap();
            rank.check_combine(&oracle, &tensors).unwrap();
            let after = read(&given);
            if n > 1 {
                // Where they are left out nothing is added.
                assert_eq!(after, before);
                continue;
            }
            let counts = tensors.received.recv_count.copy_to_host::<i32>().unwrap();
            for (total, count) in totals.iter_mut().zip(counts) {
                *total += i64::from(count);
            }
            assert_eq!(after[0], totals);
            let mut waits = after[1].iter().zip(&before[1]);
            assert!(waits.all(|(after, before)| after > before), "{after:?}");
        }
        assert!(totals[0] > 10, "nothing was dispatched");
        rank.buffer.close().unwrap();
    });
}

#[test]
fn the_rank_that_others_wait_for_stands_out() {
    let (case, driver) = (case(3), host(3));
    threads(3, |comm| {
        let device = device(&driver, &comm);
        let short = Duration::from_millis(300);
        let rank = Rank::with(&device, &comm, &case, |b| b.timeout(short)).unwrap();
        comm.barrier(PATIENCE).unwrap();
        if comm.rank() != 2 {
            let inputs = case.inputs(0);
            let oracle = rank.oracle(0, &inputs);
            let mut tensors = rank.tensors(&oracle).unwrap();
            let [wait_ns] = sums(&device, [&[0; 3]]);
            let mut given = [None, Some(wait_ns)];
            drop(dispatch_asked(&rank, &mut tensors, &mut given).unwrap());
            let waited = given[1].as_ref().unwrap().copy_to_host::<i64>().unwrap();
            let waited: Vec<_> = waited
                .into_iter()
                .map(|ns| Duration::from_nanos(ns.try_into().unwrap()))
                .collect();
            assert!((short..PATIENCE).contains(&waited[2]), "{waited:?}");
            assert!(waited[0] < waited[2] && waited[1] < waited[2], "{waited:?}");
        }
        comm.barrier(PATIENCE).unwrap();
        rank.buffer.close().unwrap();
    });
    assert!(driver.live().is_empty());
}

/// Dispatch and combine on a communication stream, whole and in parts: as on one stream, and nothing
/// is asked of the driver but what orders the streams.
#[test]
fn operations_run_beside_a_compute_stream() {
    let (case, driver) = (case(2), host(2));
    threads(2, |comm| {
        let device = device(&driver, &comm);
        let rank = Rank::new(&device, &comm, &case).unwrap();
        let compute = Stream::new(&device).unwrap();
        let mut order = Event::untimed(&device).unwrap();
        for n in 0..4 {
            let inputs = case.inputs(n);
            let oracle = rank.oracle(n, &inputs);
            let mut tensors = rank.tensors(&oracle).unwrap();
            // What the experts give does not depend on what they get, so it can be there before.
            rank.experts(&oracle, &mut tensors).unwrap();
            let calls = || {
                let mut calls = driver.journal();
                calls.retain(|entry| entry.device == device.ordinal());
                calls
            };
            let before = calls().len();
            let mut beside = || {
                rank.stream.follow(&compute, &mut order)?;
                let handle = if n % 2 == 0 {
                    rank.dispatch(&mut tensors)?
                } else {
                    let pending = rank.dispatch_send(&tensors)?;
                    compute.follow(&rank.stream, &mut order)?;
                    rank.stream.follow(&compute, &mut order)?;
                    rank.dispatch_receive(pending, &mut tensors)?
                };
                compute.follow(&rank.stream, &mut order)?;
                rank.stream.follow(&compute, &mut order)?;
                if n % 2 == 0 {
                    rank.combine(handle, &mut tensors)?;
                } else {
                    let pending = rank.combine_send(handle, &tensors)?;
                    rank.combine_receive(pending, &mut tensors)?;
                }
                compute.follow(&rank.stream, &mut order)
            };
            beside().unwrap();
            let made: Vec<_> = calls()[before..].iter().map(|entry| entry.call).collect();
            let orders = if n % 2 == 0 { 4 } else { 6 };
            assert_eq!(
                made,
                [Call::EventRecord, Call::StreamWaitEvent].repeat(orders)
            );
            compute.synchronize().unwrap();
            rank.compare_dispatch(&oracle, &tensors).unwrap();
            rank.compare_combine(&oracle, &tensors).unwrap();
        }
        assert!(rank.buffer.faults().unwrap().is_empty());

        // An event without a time has none, and one of another device orders nothing here.
        let start = Event::new(&device).unwrap();
        start.record(&compute).unwrap();
        assert!(matches!(
            order.elapsed_us(&start),
            Err(Error::Driver { .. })
        ));
        // By now nobody counts the calls for its device any more.
        comm.barrier(PATIENCE).unwrap();
        let other = Device::host(driver.clone(), DeviceOrdinal(1 - comm.rank()));
        let mut foreign = Event::untimed(&other).unwrap();
        let refused = compute.follow(&rank.stream, &mut foreign).unwrap_err();
        assert!(matches!(refused, Error::OtherDevice { .. }), "{refused}");
        rank.run(2, Order::Overlapped).unwrap();
        rank.buffer.close().unwrap();
    });
    assert!(driver.live().is_empty());
}

/// Streams, events and tensors of another device, and of another driver that counts alike, are
/// refused before the driver is asked for anything.
#[test]
fn what_is_used_together_is_of_one_device() {
    let [driver, stranger] = [host(2), host(2)];
    let here = Device::host(driver.clone(), DeviceOrdinal(0));
    let comm = Communicator::threads(1).remove(0);
    let config = Config::new(128, 1, 1, 1);
    let buffer = Buffer::builder(&here, &comm, config).build().unwrap();
    let stream = Stream::new(&here).unwrap();
    let [mut event, start] = [(); 2].map(|()| Event::new(&here).unwrap());
    start.record(&stream).unwrap();
    let mut tensor = Tensor::new(&here, DType::U8, [4]).unwrap();
    let mut nothing = Tensor::new(&here, DType::U8, [0]).unwrap();
    let mut output = buffer.new_output(&DispatchOptions::bf16()).unwrap();
    output.recv_count.copy_from_host(&[7_i32]).unwrap();

    let elsewhere = [
        (driver.clone(), 1, "is of device 1 (host), not"),
        (stranger, 0, "is of device 0 (host) of another driver, not"),
    ];
    for (theirs, ordinal, found) in elsewhere {
        let device = Device::host(theirs.clone(), DeviceOrdinal(ordinal));
        let other = Stream::new(&device).unwrap();
        let mut foreign = Event::new(&device).unwrap();
        foreign.record(&other).unwrap();
        let own = Tensor::new(&device, DType::I32, [1]).unwrap();
        let local = std::mem::replace(&mut output.recv_count, own);
        let calls = || (driver.calls(), theirs.calls());
        let before = calls();
        let refusals = [
            (event.record(&other), "recording an event: the stream "),
            (stream.wait(&foreign), "letting a stream wait: the event "),
            (
                stream.follow(&other, &mut event),
                "recording an event: the stream ",
            ),
            (
                stream.follow(&other, &mut foreign),
                "letting a stream wait: the event ",
            ),
            (
                event.elapsed_us(&foreign).map(drop),
                "timing events: the first event ",
            ),
            (tensor.fill(1, &other), "filling a tensor: the stream "),
            (nothing.fill(1, &other), "filling a tensor: the stream "),
        ];
        for (refused, expected) in refusals {
            let error = refused.unwrap_err();
            assert!(matches!(error, Error::OtherDevice { .. }), "{error:?}");
            let error = error.to_string();
            assert!(error.starts_with(&format!("{expected}{found}")), "{error}");
            assert!(error.contains("make both from one Device"), "{error}");
        }
        // One tensor of five is elsewhere: nothing is filled, wherever the stream is.
        for on in [&stream, &other] {
            let refused = output.fill(1, on).unwrap_err();
            assert!(matches!(refused, Error::OtherDevice { .. }), "{refused}");
        }
        let refused = buffer.barrier(&other, Duration::ZERO).unwrap_err();
        assert!(
            explain(&refused).contains("stream is on device"),
            "{refused}"
        );
        assert_eq!(named(refused), "stream: Device");
        assert_eq!(calls(), before);
        output.recv_count = local;
    }
    assert_eq!(output.recv_count.copy_to_host::<i32>().unwrap(), [7]);

    // A device that is made again is the same.
    let again = Stream::new(&Device::host(driver.clone(), DeviceOrdinal(0))).unwrap();
    again.follow(&stream, &mut event).unwrap();
    event.elapsed_us(&start).unwrap();
    output.fill(1, &again).unwrap();
    buffer.barrier(&again, Duration::ZERO).unwrap();
    buffer.close().unwrap();
}

/// The argument and what is wrong with it.
fn named(error: Error) -> String {
    let text = explain(&error);
    let Error::Argument { source, rank, .. } = error else {
        panic!("{text}");
    };
    assert!(rank.is_some(), "{text}");
    let (field, what) = match source {
        ArgumentError::Dims { field, .. } => (field, "Dims"),
        ArgumentError::Rank { field, .. } => (field, "Rank"),
        ArgumentError::DType { field, .. } => (field, "DType"),
        ArgumentError::Device { field, .. } => (field, "Device"),
        ArgumentError::Range { field, .. } => (field, "Range"),
        ArgumentError::Presence { field, .. } => (field, "Presence"),
        other => panic!("{other}"),
    };
    assert!(text.contains(field), "{text}");
    format!("{field}: {what}")
}

#[test]
fn tensors_take_what_fits_them() {
    let device = Device::host(host(1), DeviceOrdinal(0));
    let mut tensor = Tensor::new(&device, DType::Bf16, [2, 3]).unwrap();
    assert!(matches!(
        tensor.copy_from_host(&[1_u16; 5]).unwrap_err(),
        Error::HostLength { got: 5, .. }
    ));
    assert!(matches!(
        tensor.copy_from_host(&[1.0_f32; 6]).unwrap_err(),
        Error::HostType {
            dtype: DType::Bf16,
            ..
        }
    ));
    assert!(matches!(
        Tensor::new(&device, DType::I64, [usize::MAX, 2]).unwrap_err(),
        Error::TensorTooLarge { .. }
    ));
    tensor.copy_from_host(&[1_u16, 2, 3, 4, 5, 6]).unwrap();
    assert_eq!(tensor.copy_to_host::<u16>().unwrap(), [1, 2, 3, 4, 5, 6]);

    let view = tensor.view();
    assert_eq!(view.first(1).dims().as_slice(), [1, 3]);
    assert_eq!(view.first(9).dims().as_slice(), [2, 3]);
    let second = view.nth(1).unwrap();
    assert_eq!(second.dims().as_slice(), [3]);
    assert_eq!(second.ptr(), tensor.ptr().offset(6));
    assert!(view.nth(2).is_none());
    let empty = Tensor::new(&device, DType::F32, [0, 8]).unwrap();
    assert_eq!(empty.copy_to_host::<f32>().unwrap(), []);
}

/// What threads of a server share or hand on.
#[test]
fn threads_may_share_a_buffer() {
    fn shared<T: Send + Sync>() {}
    shared::<Buffer>();
    shared::<Communicator>();
    shared::<Device>();
    shared::<ep::Handle>();
    shared::<ep::PendingCombine>();
    shared::<ep::PendingDispatch>();
    shared::<ep::Stream>();
    shared::<Tensor>();
}

type Change = fn(&mut Config);

#[test]
fn ranks_configured_differently_are_named_on_every_rank() {
    let usual = config(&case(3));
    let changes: [(&str, Change); 6] = [
        ("num_experts", |c| c.num_experts = 12),
        ("hidden", |c| c.hidden = 384),
        ("max_tokens", |c| c.max_tokens = 8),
        ("max_top_k", |c| c.max_top_k = 5),
        ("slots", |c| c.slots = 3),
        ("sends_in_flight", |c| c.sends_in_flight = 1),
    ];
    let driver = host(3);
    for (expected, change) in changes {
        let errors = threads(3, |comm| {
            let mut config = usual;
            if comm.rank() == 2 {
                change(&mut config);
            }
            let builder = Buffer::builder(&device(&driver, &comm), &comm, config);
            builder.deadline(PATIENCE).build().unwrap_err()
        });
        for error in errors {
            assert!(
                matches!(error, Error::Mismatch { field, rank: 2, reference: 0, .. } if field == expected),
                "{error}"
            );
        }
    }
    assert!(driver.live().is_empty());
}

#[test]
fn no_buffer_has_a_shape_outside_the_limits() {
    let usual = config(&case(2));
    let changes: [(&str, Change); 5] = [
        ("hidden", |c| c.hidden = 200),
        ("max_top_k", |c| c.max_top_k = 33),
        ("num_experts", |c| c.num_experts = 7),
        ("max_tokens", |c| c.max_tokens = 0),
        ("slots", |c| c.slots = 65),
    ];
    let driver = host(2);
    for (expected, change) in changes {
        let errors = threads(2, |comm| {
            let mut config = usual;
            change(&mut config);
            let builder = Buffer::builder(&device(&driver, &comm), &comm, config);
            explain(builder.deadline(PATIENCE).build().unwrap_err())
        });
        for error in errors {
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }
    assert!(driver.live().is_empty());
}

#[test]
fn no_buffer_waits_for_no_time_at_all() {
    type Set = fn(BufferBuilder) -> BufferBuilder;
    let settings: [(&str, Set); 2] = [
        ("timeout", |b| b.timeout(Duration::ZERO)),
        ("deadline", |b| b.deadline(Duration::ZERO)),
    ];
    let (case, driver) = (case(2), host(2));
    for (expected, set) in settings {
        let errors = threads(2, |comm| {
            let builder = Buffer::builder(&device(&driver, &comm), &comm, config(&case));
            let builder = builder.deadline(PATIENCE).timeout(PATIENCE);
            let builder = if comm.rank() == 1 {
                set(builder)
            } else {
                builder
            };
            builder.build().unwrap_err()
        });
        assert!(
            matches!(errors[1], Error::ZeroBound { rank: 1, bound } if bound == expected),
            "{}",
            errors[1]
        );
        assert!(errors[1].to_string().contains(expected), "{}", errors[1]);
        // The other rank is told, and does not wait.
        assert!(
            matches!(errors[0], Error::Peer { peer: 1, .. }),
            "{}",
            errors[0]
        );
    }
    assert!(driver.live().is_empty());
}

#[test]
fn opposite_choices_are_named_on_every_rank() {
    let (case, driver) = (case(2), host(2));
    let errors = threads(2, |comm| {
        let choice = [BackendKind::Malloc, BackendKind::PosixFd][comm.rank() as usize];
        let device = device(&driver, &comm);
        let rank = Rank::with(&device, &comm, &case, |b| b.alloc(Choice::Force(choice)));
        explain(rank.err().unwrap())
    });
    for error in errors {
        assert!(error.contains("rank 0 forces malloc"), "{error}");
        assert!(error.contains("rank 1 forces posix_fd"), "{error}");
    }
    assert!(driver.live().is_empty());
}

#[test]
fn a_forced_backend_that_is_refused_says_why_on_every_rank() {
    let (case, driver) = (case(2), host(2));
    let errors = threads(2, |comm| {
        let device = device(&driver, &comm);
        let force = Choice::Force(BackendKind::Fabric);
        let rank = Rank::with(&device, &comm, &case, |b| b.alloc(force));
        explain(rank.err().unwrap())
    });
    for error in errors {
        assert!(error.contains("cuMemCreate returned 800"), "{error}");
        assert!(error.contains("IMEX"), "{error}");
    }
    assert!(driver.live().is_empty());
}

#[test]
fn hosts_that_nothing_connects_are_named() {
    let cluster = Cluster::hgx_h200_nodes(2, 1, 0).with_run_key(std::process::id().into());
    let case = case(2);
    let errors = threads(2, |comm| {
        let driver = SimDriver::for_rank(&cluster, comm.rank() as usize).unwrap();
        let device = Device::host(driver.clone(), DeviceOrdinal(0));
        let error = Rank::new(&device, &comm, &case).err().unwrap();
        assert!(driver.live().is_empty(), "{:?}", driver.live());
        error
    });
    for error in errors {
        let text = explain(&error);
        assert!(
            matches!(error, Error::Unreachable { pair, .. } if (pair.from, pair.to) == (0, 1)),
            "{text}"
        );
        assert!(text.contains("another host"), "{text}");
        assert!(text.contains("2 nodes and no NVLink clique"), "{text}");
    }
}

#[test]
fn a_rank_that_never_comes_is_named_within_the_deadline() {
    let (case, driver) = (case(3), host(3));
    let started = Instant::now();
    let outcomes = threads(3, |comm| {
        if comm.rank() == 1 {
            // Keeps its membership, so that only the deadline can tell.
            std::thread::sleep(Duration::from_secs(3));
            return String::new();
        }
        let device = device(&driver, &comm);
        let soon = Duration::from_secs(1);
        let rank = Rank::with(&device, &comm, &case, |b| b.deadline(soon));
        explain(rank.err().unwrap())
    });
    for rank in [0, 2] {
        let error = &outcomes[rank];
        assert!(error.contains("rank 1 did not arrive"), "{error}");
    }
    assert!(started.elapsed() < PATIENCE);
    assert!(driver.live().is_empty());
}

#[test]
fn a_handle_is_of_its_buffer() {
    let (case, driver) = (case(2), host(2));
    threads(2, |comm| {
        let device = device(&driver, &comm);
        let one = Rank::new(&device, &comm, &case).unwrap();
        let other = Rank::new(&device, &comm, &case).unwrap();
        let inputs = case.inputs(0);
        let oracle = one.oracle(0, &inputs);
        let mut tensors = one.tensors(&oracle).unwrap();
        let handle = one.dispatch(&mut tensors).unwrap();
        assert!(matches!(
            other.buffer.status_of(&handle),
            Err(Error::ForeignHandle { .. })
        ));
        one.check_dispatch(&oracle, &handle, &mut tensors).unwrap();
        let y = Tensor::new(&device, DType::Bf16, [3, 18, 256]).unwrap();
        let input = CombineInput::new(&y);
        let rejected = other
            .buffer
            .combine(&other.stream, handle, &input, &mut tensors.out)
            .unwrap_err();
        assert!(matches!(*rejected.error, Error::ForeignHandle { .. }));
        one.combine(rejected.operand, &mut tensors).unwrap();
        one.check_combine(&oracle, &tensors).unwrap();

        // So is what has been sent.
        one.poison(&mut tensors).unwrap();
        let sent = one.dispatch_send(&tensors).unwrap();
        let rejected = other
            .buffer
            .dispatch_receive(&other.stream, sent, &mut tensors.received)
            .unwrap_err();
        assert!(matches!(*rejected.error, Error::ForeignHandle { .. }));
        let handle = one
            .dispatch_receive(rejected.operand, &mut tensors)
            .unwrap();
        one.check_dispatch(&oracle, &handle, &mut tensors).unwrap();
        let sent = one.combine_send(handle, &tensors).unwrap();
        let rejected = other
            .buffer
            .combine_receive(&other.stream, sent, &mut tensors.out)
            .unwrap_err();
        assert!(matches!(*rejected.error, Error::ForeignHandle { .. }));
        one.combine_receive(rejected.operand, &mut tensors).unwrap();
        one.check_combine(&oracle, &tensors).unwrap();

        // Both stay usable, and their operations may alternate.
        for n in 1..4 {
            let rank = if n % 2 == 0 { &one } else { &other };
            rank.run(n, Order::Fused).unwrap();
        }
        other.buffer.close().unwrap();
        one.buffer.close().unwrap();
    });
    assert!(driver.live().is_empty());
}

#[test]
fn as_many_results_are_alive_as_there_are_slots() {
    pair(|rank| {
        let inputs = case(2).inputs(0);
        let oracle = rank.oracle(0, &inputs);
        let mut tensors = rank.tensors(&oracle).unwrap();
        let first = rank.dispatch(&mut tensors).unwrap();
        let second = rank.dispatch(&mut tensors).unwrap();
        assert!(matches!(
            rank.dispatch(&mut tensors),
            Err(Error::NoFreeSlot { slots: 2, .. })
        ));
        // One is given up without a combine, and its slot is used again.
        drop(first);
        rank.poison(&mut tensors).unwrap();
        let third = rank.dispatch(&mut tensors).unwrap();
        assert_eq!([second.epoch(), third.epoch()], [2, 3]);
        rank.check_dispatch(&oracle, &third, &mut tensors).unwrap();
        rank.combine(third, &mut tensors).unwrap();
        rank.check_combine(&oracle, &tensors).unwrap();
        // A handle may outlive its buffer.
        rank.buffer.close().unwrap();
        drop(second);
    });
}

#[test]
fn parts_are_received_in_the_order_of_sending() {
    pair(|rank| {
        let inputs = case(2).inputs(0);
        let oracle = rank.oracle(0, &inputs);
        let mut tensors = rank.tensors(&oracle).unwrap();
        let first = rank.dispatch_send(&tensors).unwrap();
        assert!(matches!(
            rank.dispatch(&mut tensors),
            Err(Error::Pending { pending: 1, .. })
        ));
        let second = rank.dispatch_send(&tensors).unwrap();
        assert!(matches!(
            rank.dispatch_send(&tensors),
            Err(Error::Pending { pending: 2, .. })
        ));
        let Rejected { operand, error } = rank
            .buffer
            .dispatch_receive(&rank.stream, second, &mut tensors.received)
            .unwrap_err();
        assert!(matches!(
            *error,
            Error::OutOfOrder {
                number: 2,
                expected: 1,
                ..
            }
        ));
        let first = rank.dispatch_receive(first, &mut tensors).unwrap();
        rank.check_dispatch(&oracle, &first, &mut tensors).unwrap();
        rank.poison(&mut tensors).unwrap();
        let second = rank.dispatch_receive(operand, &mut tensors).unwrap();
        rank.check_dispatch(&oracle, &second, &mut tensors).unwrap();

        let first = rank.combine_send(first, &tensors).unwrap();
        let second = rank.combine_send(second, &tensors).unwrap();
        let Rejected { operand, error } = rank
            .buffer
            .combine_receive(&rank.stream, second, &mut tensors.out)
            .unwrap_err();
        assert!(matches!(*error, Error::OutOfOrder { .. }));
        rank.combine_receive(first, &mut tensors).unwrap();
        rank.check_combine(&oracle, &tensors).unwrap();
        rank.poison(&mut tensors).unwrap();
        rank.combine_receive(operand, &mut tensors).unwrap();
        rank.check_combine(&oracle, &tensors).unwrap();
        rank.buffer.close().unwrap();
    });
}

#[test]
fn an_operation_that_is_never_received_ends_the_buffer() {
    pair(|rank| {
        let inputs = case(2).inputs(0);
        let oracle = rank.oracle(0, &inputs);
        let mut tensors = rank.tensors(&oracle).unwrap();
        drop(rank.dispatch_send(&tensors).unwrap());
        assert!(matches!(
            rank.dispatch(&mut tensors),
            Err(Error::Abandoned {
                operation: Operation::Dispatch,
                ..
            })
        ));
        rank.buffer.close().unwrap();
    });
}

#[test]
fn expert_ids_that_do_not_exist_are_reported_and_skipped() {
    let mut case = case(4);
    case.odd = Odd {
        missing: true,
        out_of_range: true,
        repeated: true,
    };
    for precision in [
        Precision::Bf16,
        Precision::Fp8,
        Precision::Fp8Pow2,
        Precision::Fp8Ue8m0,
    ] {
        case.precision = precision;
        // Comparing the reports with the oracle's is part of every operation.
        run_threads(&case, 3, Order::Fused).unwrap();
    }
}

#[test]
fn a_rank_that_is_late_is_reported_and_the_group_goes_on() {
    let (case, driver) = (case(3), host(3));
    threads(3, |comm| {
        let device = device(&driver, &comm);
        let short = Duration::from_secs(1);
        let rank = Rank::with(&device, &comm, &case, |b| b.timeout(short)).unwrap();
        let late = comm.rank() == 2;
        comm.barrier(PATIENCE).unwrap();
        if late {
            // The others have given it up in their first dispatch and combine by then.
            comm.barrier(PATIENCE).unwrap();
            rank.buffer.close().unwrap();
            return;
        }
        let inputs = case.inputs(0);
        let oracle = rank.oracle(0, &inputs);
        let mut tensors = rank.tensors(&oracle).unwrap();
        let handle = rank.dispatch(&mut tensors).unwrap();
        rank.stream.synchronize().unwrap();
        let status = rank.buffer.status().unwrap().unwrap();
        assert_eq!((status.operation, status.epoch), (Operation::Dispatch, 1));
        assert_eq!(status, rank.buffer.status_of(&handle).unwrap());
        let [fault] = status.faults[..] else {
            panic!("{status:?}");
        };
        assert_eq!((fault.rank, fault.phase), (2, Phase::Counts));
        let FaultKind::Timeout { waited } = fault.kind else {
            panic!("{fault}");
        };
        assert!((short..PATIENCE).contains(&waited), "{waited:?}");
        assert!(fault.to_string().contains("rank 2"), "{fault}");

        // What came from those that were there is there.
        let without = common::Oracle::new(&case, 0, &inputs, common::Links::all(3).without(2));
        rank.compare_dispatch(&without, &tensors).unwrap();
        rank.experts(&without, &mut tensors).unwrap();
        rank.combine(handle, &mut tensors).unwrap();
        rank.stream.synchronize().unwrap();
        let status = rank.buffer.status().unwrap().unwrap();
        assert_eq!((status.operation, status.epoch), (Operation::Combine, 1));
        comm.barrier(PATIENCE).unwrap();
        rank.buffer.close().unwrap();
    });
    assert!(driver.live().is_empty());
}

#[test]
fn weights_that_do_not_come_keep_no_other_rank_waiting() {
    let driver = host(3);
    threads(3, |comm| {
        rig::miss_weights_of_rank_0(&device(&driver, &comm), &comm);
    });
    assert!(driver.live().is_empty());
}

#[test]
fn operations_that_are_called_off_end() {
    let driver = host(3);
    threads(3, |comm| {
        rig::call_off_what_waits_for_the_last(&device(&driver, &comm), &comm);
    });
    assert!(driver.live().is_empty());
}

#[test]
fn what_cannot_be_called_off_is_over_too() {
    let (case, driver) = (case(1), host(1));
    threads(1, |comm| {
        let device = device(&driver, &comm);
        let mut rank = Rank::new(&device, &comm, &case).unwrap();
        let plan = FaultPlan::fail_nth_of(Call::CopyToDevice, 1, Status::UNKNOWN);
        driver.inject(plan);
        let error = explain(rank.buffer.abort().unwrap_err());
        assert!(
            error.contains("rank 0") && error.contains("cuMemcpyHtoD"),
            "{error}"
        );
        let refused = rank.run(1, Order::Fused).unwrap_err();
        assert!(refused.contains("aborted"), "{refused}");
        rank.buffer.abort().unwrap();
        rank.buffer.refresh(&comm, &[0]).unwrap();
        rank.run(2, Order::Fused).unwrap();
        rank.buffer.close().unwrap();
    });
    assert!(driver.live().is_empty());
}

#[test]
fn a_barrier_that_nobody_else_reaches_ends() {
    pair(|rank| {
        // Both ranks pass; what they report is nothing.
        rank.buffer
            .barrier(&rank.stream, Duration::from_micros(50))
            .unwrap();
        let status = rank.buffer.status().unwrap().unwrap();
        assert_eq!(status.operation, Operation::Barrier);
        assert!(status.is_ok(), "{status:?}");
        rank.buffer.close().unwrap();
    });
    let (case, driver) = (case(2), host(2));
    threads(2, |comm| {
        let device = device(&driver, &comm);
        let short = Duration::from_millis(100);
        let rank = Rank::with(&device, &comm, &case, |b| b.timeout(short)).unwrap();
        if comm.rank() == 0 {
            rank.buffer.barrier(&rank.stream, Duration::ZERO).unwrap();
            let faults = rank.buffer.faults().unwrap();
            assert_eq!(faults.len(), 1, "{faults:?}");
            assert_eq!((faults[0].rank, faults[0].phase), (1, Phase::Barrier));
        }
        rank.buffer.close().unwrap();
    });
}

#[test]
fn several_buffers_of_one_group_are_apart() {
    let driver = host(2);
    let mut cases = [case(2), case(2), case(2)];
    cases[1].precision = Precision::Fp8;
    cases[1].hidden = 384;
    cases[2].weights = Weights::AtCombine;
    cases[2].seed = 8;
    threads(2, |comm| {
        let device = device(&driver, &comm);
        let ranks = cases
            .each_ref()
            .map(|case| Rank::new(&device, &comm, case).unwrap());
        for order in [Order::Fused, Order::Split, Order::Nested, Order::Overlapped] {
            for rank in &ranks {
                rank.run(2, order).unwrap();
            }
        }
        // Not in the order of making.
        let [first, second, third] = ranks;
        second.buffer.close().unwrap();
        first.run(1, Order::Fused).unwrap();
        third.buffer.close().unwrap();
        first.buffer.close().unwrap();
    });
    assert!(driver.live().is_empty());
}

#[test]
fn buffers_come_and_go_without_a_trace() {
    let driver = host(2);
    let case = case(2);
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    threads(2, |comm| {
        let device = device(&driver, &comm);
        for round in 0..20 {
            let kind = BackendKind::ALL[1 + round % 2];
            let choice = Choice::Force(kind);
            let rank = Rank::with(&device, &comm, &case, |b| b.alloc(choice)).unwrap();
            rank.run(1, Order::Fused).unwrap();
            if round % 3 == 0 {
                drop(rank.buffer);
            } else {
                rank.buffer.close().unwrap();
            }
            drop(rank.stream);
            comm.barrier(PATIENCE).unwrap();
            assert!(driver.live().is_empty(), "{:?}", driver.live());
            comm.barrier(PATIENCE).unwrap();
        }
    });
    // Other tests of this process have descriptors of their own, but not hundreds.
    assert!(descriptors() < 200, "{}", descriptors());
}

/// A free port of this host, until somebody else takes it.
fn free_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port().to_string()
}

/// What a launcher sets for a process.
fn launched(command: &mut std::process::Command, rank: usize, size: usize, port: &str) {
    command
        .env("RANK", rank.to_string())
        .env("WORLD_SIZE", size.to_string())
        .env("LOCAL_RANK", rank.to_string())
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", port);
}

#[test]
fn the_environment_places_ranks_and_chooses_memory() {
    const TEST: &str = "the_environment_places_ranks_and_chooses_memory";
    if let Some(task) = Task::of_this_process() {
        // Ranks in containers, which cannot open each other's CUDA IPC handles.
        let cluster = Cluster::hgx_h200(8)
            .with_run_key(task.key)
            .map_nodes(|node| node.ipc_namespace = IpcNamespace::Private);
        let launch = ep::Launch::from_env().unwrap();
        assert_eq!((launch.rank, launch.world_size), (task.rank, 3));
        let driver = SimDriver::new(&cluster, 0, &[0, 1, 2]);
        let ordinal = launch.device(&*driver).unwrap();
        assert_eq!(ordinal, DeviceOrdinal(task.rank));
        let alone = SimDriver::new(&cluster, 0, &[task.rank]);
        assert_eq!(launch.device(&*alone).unwrap(), DeviceOrdinal(0));

        let comm = Communicator::from_env().unwrap();
        let device = Device::host(driver, ordinal);
        let case = case(3);
        let built = Buffer::builder(&device, &comm, config(&case)).build();
        let [expected, started] = [&task.words[0], &task.words[1]];
        if expected == "malloc" {
            let refused = explain(built.unwrap_err());
            assert!(refused.contains("malloc"), "{refused}");
            return;
        }
        let buffer = built.unwrap();
        assert_eq!(buffer.plan().backend.name(), expected);
        // Only rank 0 comes to the barrier: it ends by EP_TIMEOUT_MS.
        if comm.rank() == 0 {
            let before = Instant::now();
            let stream = ep::Stream::new(&device).unwrap();
            buffer.barrier(&stream, Duration::ZERO).unwrap();
            let at_least = Duration::from_millis(started.parse().unwrap());
            assert!((at_least..PATIENCE).contains(&before.elapsed()));
            assert_eq!(buffer.faults().unwrap().len(), 2);
        }
        buffer.close().unwrap();
        return;
    }
    let settings: [(&[(&str, &str)], &str); 4] = [
        (&[], "posix_fd"),
        (&[("EP_ALLOC", "posix-fd")], "posix_fd"),
        (&[("MC_USE_NVLINK_IPC", "1")], "malloc"),
        (
            &[("EP_ALLOC", "posix-fd"), ("MC_USE_NVLINK_IPC", "1")],
            "posix_fd",
        ),
    ];
    for (variables, expected) in settings {
        let port = free_port();
        Processes::start(TEST, 3, &[expected, "300"], |rank, command| {
            launched(command, rank, 3, &port);
            command.env("EP_TIMEOUT_MS", "300");
            command.envs(variables.iter().copied());
        })
        .succeed();
    }
}

#[test]
fn a_rank_with_nonsense_in_its_environment_tells_the_others() {
    const TEST: &str = "a_rank_with_nonsense_in_its_environment_tells_the_others";
    if let Some(task) = Task::of_this_process() {
        let cluster = Cluster::hgx_h200(8).with_run_key(task.key);
        let driver = SimDriver::for_rank(&cluster, task.rank as usize).unwrap();
        let device = Device::host(driver, DeviceOrdinal(0));
        let comm = Communicator::from_env().unwrap();
        let builder = Buffer::builder(&device, &comm, config(&case(2)));
        let error = builder.build().unwrap_err();
        if task.rank == 1 {
            assert!(explain(&error).contains(&task.words[0]), "{error}");
        } else {
            assert!(matches!(error, Error::Peer { peer: 1, .. }), "{error}");
        }
        return;
    }
    for (variable, value) in [("EP_ALLOC", "best"), ("EP_TIMEOUT_MS", "0")] {
        let port = free_port();
        Processes::start(TEST, 2, &[variable], |rank, command| {
            launched(command, rank, 2, &port);
            if rank == 1 {
                command.env(variable, value);
            }
        })
        .succeed();
    }
}

#[test]
fn a_process_that_dies_is_named_and_the_others_give_everything_back() {
    const TEST: &str = "a_process_that_dies_is_named_and_the_others_give_everything_back";
    if let Some(task) = Task::of_this_process() {
        let choice = Choice::parse(&task.words[0]).unwrap();
        let cluster = Cluster::hgx_h200(8).with_run_key(task.key);
        let driver = SimDriver::for_rank(&cluster, task.rank as usize).unwrap();
        let device = Device::host(driver.clone(), DeviceOrdinal(0));
        let comm = task.meet(3).unwrap();
        let case = case(3);
        let short = Duration::from_millis(300);
        let rank = Rank::with(&device, &comm, &case, |b| b.alloc(choice).timeout(short)).unwrap();
        comm.barrier(PATIENCE).unwrap();
        if task.rank == 1 {
            std::process::abort();
        }
        let inputs = case.inputs(0);
        let oracle = rank.oracle(0, &inputs);
        let mut tensors = rank.tensors(&oracle).unwrap();
        drop(rank.dispatch(&mut tensors).unwrap());
        let faults = rank.buffer.faults().unwrap();
        assert!(faults.iter().any(|fault| fault.rank == 1), "{faults:?}");
        drop(tensors);
        let before = Instant::now();
        let error = explain(rank.buffer.close().unwrap_err());
        assert!(before.elapsed() < PATIENCE, "{:?}", before.elapsed());
        assert!(error.contains("rank 1"), "{error}");
        drop(rank.stream);
        assert!(driver.live().is_empty(), "{:?}", driver.live());
        return;
    }
    for choice in ["malloc", "posix-fd"] {
        Processes::start(TEST, 3, &[choice], |_, _| {}).survive(1);
    }
}

#[test]
fn a_rank_that_panics_does_not_hold_the_others_up() {
    let (case, driver) = (case(2), host(2));
    let started = Instant::now();
    let outcomes = threads(2, |comm| {
        let device = device(&driver, &comm);
        let rank = Rank::new(&device, &comm, &case).unwrap();
        comm.barrier(PATIENCE).unwrap();
        if comm.rank() == 0 {
            return rank.buffer.close().map_err(explain);
        }
        let panics = std::panic::AssertUnwindSafe(|| {
            let _comm = comm;
            let _rank = rank;
            panic!("as the test wants");
        });
        std::panic::catch_unwind(panics).unwrap_err();
        Ok(())
    });
    let error = outcomes[0].as_ref().unwrap_err();
    assert!(error.contains("rank 1"), "{error}");
    assert!(started.elapsed() < PATIENCE);
    // Each is a thread of the other's process: what the other might still write is lost, not freed.
    let live = driver.live();
    assert_eq!((live.allocations, live.total()), (2, 4), "{live:?}");
}

/// Ranks `members` of a group, and for each its place among them and a communicator of theirs.
fn regroup(members: &[u32]) -> Vec<(u32, Communicator)> {
    let comms = Communicator::threads(members.len().try_into().unwrap());
    members.iter().copied().zip(comms).collect()
}

#[test]
fn ranks_that_fell_out_of_step_begin_anew() {
    let (case, driver) = (case(2), host(2));
    threads(2, |comm| {
        let device = device(&driver, &comm);
        let mut rank = Rank::new(&device, &comm, &case).unwrap();
        rank.run(3, Order::Fused).unwrap();
        let inputs = case.inputs(0);
        let oracle = rank.oracle(0, &inputs);
        let mut tensors = rank.tensors(&oracle).unwrap();
        let kept = rank.dispatch(&mut tensors).unwrap();
        let mut sent = Some(rank.dispatch_send(&tensors).unwrap());
        if comm.rank() == 0 {
            sent = None;
            assert!(rank.dispatch(&mut tensors).is_err());
        }
        drop(oracle);
        for _ in 0..2 {
            rank.buffer.refresh(&comm, &[0, 1]).unwrap();
            for order in [Order::Fused, Order::Nested, Order::Overlapped] {
                rank.run(2, order).unwrap();
            }
        }
        assert!(rank.buffer.faults().unwrap().is_empty());

        // What was alive before is refused, its slot is not held, and to drop it leaves out nothing.
        let rejected = rank.combine(kept, &mut tensors).unwrap_err();
        assert!(matches!(rejected, Error::ForeignHandle { .. }));
        if let Some(sent) = sent {
            let rejected = rank.dispatch_receive(sent, &mut tensors).unwrap_err();
            assert!(matches!(rejected, Error::ForeignHandle { .. }));
        }
        rank.run(1, Order::Split).unwrap();
        rank.buffer.close().unwrap();
    });
    assert!(driver.live().is_empty());
}

#[test]
fn members_are_checked_before_anything_changes() {
    let (case, driver) = (case(2), host(2));
    threads(2, |comm| {
        let device = device(&driver, &comm);
        let mut rank = Rank::new(&device, &comm, &case).unwrap();
        let mut refused = |members: &[u32]| {
            let error = rank.buffer.refresh(&comm, members).unwrap_err();
            explain(error)
        };
        assert!(refused(&[0]).contains("members [0]"));
        assert!(refused(&[0, 0]).contains("members [0, 0]"));
        assert!(refused(&[0, 2]).contains("members [0, 2]"));
        assert!(refused(&[1, 0]).contains("in the new group"));
        rank.run(2, Order::Nested).unwrap();
        rank.buffer.close().unwrap();
    });
}

#[test]
fn the_others_go_on_when_a_rank_is_gone() {
    let cluster = Cluster::hgx_h200(3).with_run_key(u64::from(std::process::id()) << 8 | 0xff);
    let case = case(3);
    let mut survivors = regroup(&[0, 2]);
    let smaller = std::sync::Mutex::new(&mut survivors);
    threads(3, |comm| {
        let me = comm.rank();
        // A process each, as their drivers see it, and memory that outlives its owner's mapping.
        let driver = SimDriver::for_rank(&cluster, me as usize).unwrap();
        let device = Device::host(driver.clone(), DeviceOrdinal(0));
        let choice = Choice::Force(BackendKind::PosixFd);
        let mut rank = Rank::with(&device, &comm, &case, |b| b.alloc(choice)).unwrap();
        rank.run(2, Order::Fused).unwrap();
        comm.barrier(PATIENCE).unwrap();
        if me == 1 {
            let panics = std::panic::AssertUnwindSafe(|| {
                let _comm = comm;
                let _rank = rank;
                panic!("as the test wants");
            });
            std::panic::catch_unwind(panics).unwrap_err();
            assert!(driver.live().is_empty(), "{:?}", driver.live());
            return;
        }
        let members = [0, 2];
        let theirs = {
            let mut survivors = smaller.lock().unwrap();
            let place = survivors.iter().position(|(rank, _)| *rank == me).unwrap();
            survivors.remove(place).1
        };
        rank.buffer.refresh(&theirs, &members).unwrap();
        assert!(rank.buffer.access(1).is_err());
        assert!(rank.buffer.access(2).is_ok());

        let inputs = case.inputs(0);
        let left = common::Links::all(3).without(1);
        let oracle = common::Oracle::new(&case, 0, &inputs, left);
        for round in 1..4 {
            let mut tensors = rank.tensors(&oracle).unwrap();
            let handle = rank.dispatch(&mut tensors).unwrap();
            assert_eq!(handle.epoch(), round);
            rank.compare_dispatch(&oracle, &tensors).unwrap();
            for fault in rank.buffer.status_of(&handle).unwrap().faults {
                assert!(
                    matches!(fault.kind, FaultKind::Unreachable { .. }),
                    "{fault}"
                );
                assert_eq!(fault.rank, 1);
            }
            rank.experts(&oracle, &mut tensors).unwrap();
            rank.combine(handle, &mut tensors).unwrap();
            rank.compare_combine(&oracle, &tensors).unwrap();
        }
        rank.buffer.close().unwrap();
        drop(rank.stream);
        assert!(driver.live().is_empty(), "{:?}", driver.live());
    });
}

#[test]
fn a_rank_that_a_refresh_left_out_can_do_no_harm() {
    let (case, driver) = (case(3), host(3));
    let smaller = std::sync::Mutex::new(regroup(&[0, 2]));
    let closed = std::sync::Barrier::new(3);
    threads(3, |comm| {
        // Threads of one process, which write each other's plain memory itself.
        let device = device(&driver, &comm);
        let set = |b: ep::BufferBuilder| b.timeout(Duration::from_millis(200));
        let mut rank = Rank::with(&device, &comm, &case, set).unwrap();
        assert_eq!(rank.buffer.plan().backend, BackendKind::Malloc);
        let me = comm.rank();
        if me == 1 {
            // Slow, not dead: it knows nothing of what the others did.
            closed.wait();
            let inputs = case.inputs(0);
            let oracle = rank.oracle(0, &inputs);
            let mut tensors = rank.tensors(&oracle).unwrap();
            let handle = rank.dispatch(&mut tensors).unwrap();
            assert!(!rank.buffer.status_of(&handle).unwrap().is_ok());
            return;
        }
        let theirs = {
            let mut smaller = smaller.lock().unwrap();
            let place = smaller.iter().position(|(rank, _)| *rank == me).unwrap();
            smaller.remove(place).1
        };
        rank.buffer.refresh(&theirs, &[0, 2]).unwrap();
        rank.buffer.close().unwrap();
        closed.wait();
    });
}

#[test]
fn a_deadline_may_be_as_long_as_there_is() {
    let (case, driver) = (case(2), host(2));
    threads(2, |comm| {
        let device = device(&driver, &comm);
        let rank = Rank::with(&device, &comm, &case, |b| b.deadline(Duration::MAX)).unwrap();
        comm.barrier(Duration::MAX).unwrap();
        rank.buffer.close().unwrap();
    });
}

#[test]
fn a_refresh_that_fails_can_be_done_again() {
    let (case, driver) = (case(2), host(2));
    let again = std::sync::Mutex::new(regroup(&[0, 1]));
    threads(2, |comm| {
        let device = device(&driver, &comm);
        let soon = Duration::from_secs(1);
        let set = |b: ep::BufferBuilder| b.deadline(soon);
        let mut rank = Rank::with(&device, &comm, &case, set).unwrap();
        comm.barrier(PATIENCE).unwrap();
        if comm.rank() == 0 {
            let error = explain(rank.buffer.refresh(&comm, &[0, 1]).unwrap_err());
            assert!(error.contains("rank 1 did not arrive"), "{error}");
            let inputs = case.inputs(0);
            let oracle = rank.oracle(0, &inputs);
            let mut tensors = rank.tensors(&oracle).unwrap();
            let refused = rank.dispatch(&mut tensors).unwrap_err();
            assert!(matches!(refused, Error::NotConnected { rank: 0 }));
        } else {
            std::thread::sleep(2 * soon);
        }
        let theirs = {
            let mut again = again.lock().unwrap();
            let place = again.iter().position(|(rank, _)| *rank == comm.rank());
            again.remove(place.unwrap()).1
        };
        theirs.barrier(PATIENCE).unwrap();
        rank.buffer.refresh(&theirs, &[0, 1]).unwrap();
        rank.run(2, Order::Fused).unwrap();
        rank.buffer.close().unwrap();
    });
    assert!(driver.live().is_empty());
}

#[test]
fn a_whole_rack_dispatches_and_combines() {
    let cluster = Cluster::gb200_nvl72(18).with_run_key(std::process::id().into());
    let case = Case {
        experts: 72,
        hidden: 128,
        max_tokens: 2,
        tokens: (0..72).map(|rank| rank % 3).collect(),
        ..case(72)
    };
    let outcomes = threads(case.ranks, |comm| {
        let driver = SimDriver::for_rank(&cluster, comm.rank() as usize).unwrap();
        as_a_process(&driver, &comm, &case, Choice::Auto, BackendKind::Fabric)
    });
    all_well(outcomes).unwrap();
}
