//! The facade on simulated clusters: round trips over threads and processes on every kind of memory,
//! and everything that a caller can do wrong.

#[path = "../../../kernels/tests/common/mod.rs"]
mod common;
mod rig;

use std::sync::Arc;
use std::time::{Duration, Instant};

use ep::driver::{Call, DeviceOrdinal, Driver, Status};
use ep::{
    ArgumentError, BackendKind, Buffer, Choice, CombineInput, Communicator, Config, DType, Device,
    DispatchInput, DispatchOptions, Error, FaultKind, Operation, Phase, Scales, Stream, Tensor,
};
use ep_sim::{Cluster, FaultPlan, IpcNamespace, SimDriver};
use proptest::prelude::*;

use common::{Case, Odd, Precision, Routing, Weights};
use rig::{Order, PATIENCE, Processes, Rank, Task, all_well, case, config, explain, threads};

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

/// Clusters on which the policy, or an override, gives each kind of memory, and what it is called.
fn kinds(nodes: u32) -> [(Cluster, Choice, BackendKind); 4] {
    let private = Cluster::hgx_h200(8).map_nodes(|node| node.ipc_namespace = IpcNamespace::Private);
    [
        (Cluster::hgx_h200(8), Choice::Auto, BackendKind::Malloc),
        (
            Cluster::hgx_h200(8),
            Choice::Force(BackendKind::PosixFd),
            BackendKind::PosixFd,
        ),
        // CUDA IPC is refused between containers: found by importing, then decided anew.
        (private, Choice::Auto, BackendKind::PosixFd),
        (
            Cluster::gb200_nvl72(nodes),
            Choice::Auto,
            BackendKind::Fabric,
        ),
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
    for (kind, (cluster, choice, expected)) in (0..).zip(kinds(2)) {
        let cluster = cluster.with_run_key(u64::from(std::process::id()) << 8 | kind);
        // Fabric over both nodes of the rack.
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
        let (cluster, choice, expected) = kinds(1).into_iter().nth(kind).unwrap();
        let cluster = cluster.with_run_key(task.key);
        let driver = SimDriver::for_rank(&cluster, task.rank as usize).unwrap();
        let comm = task.meet(ranks).unwrap();
        // One process to a node: ranks 0 and 1 of two racks' nodes would be too few for fabric.
        let expected = match expected {
            BackendKind::Fabric => BackendKind::Malloc,
            other => other,
        };
        as_a_process(&driver, &comm, &case(ranks), choice, expected).unwrap();
        return;
    }
    for kind in 0..3 {
        for ranks in [2, 4] {
            let task = [kind.to_string(), ranks.to_string()];
            let task = [task[0].as_str(), task[1].as_str()];
            Processes::start(TEST, ranks, &task, |_, _| {}).succeed();
        }
    }
}
