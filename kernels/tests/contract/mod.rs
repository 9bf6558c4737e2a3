//! What every implementation of the contract has to do, judged by the oracle: random shapes, and what
//! can go wrong. The test binary says which implementation (`kernels`), what its wire is like
//! (`EVERY_LINE_HAS_AN_EPOCH`) and its clock (`clock`), and how much (`CASES`, `MOST_RANKS`,
//! `MOST_TOKENS`).

#![allow(
    dead_code,
    reason = "shared by several test binaries, each of which uses a part"
)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ep_kernels::ffi;
use proptest::prelude::*;

use crate::common::{self, Case, Links, Odd, Oracle, Precision, Routing, Weights};
use crate::harness::{self, Memory, POISON, Tensors, World, bad_entries};

pub(crate) const DISPATCH: u32 = ffi::EP_DISPATCH_SEND | ffi::EP_DISPATCH_RECV;
pub(crate) const COMBINE: u32 = ffi::EP_COMBINE_SEND | ffi::EP_COMBINE_RECV;

/// How operations follow one another on a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Dispatch, combine, dispatch, combine.
    Fused,
    /// The same with send and receive parts apart.
    Split,
    /// Two dispatches, then their combines, the second first.
    Nested,
    /// Two operations whose parts interleave.
    Overlapped,
}

impl Order {
    fn sends_in_flight(self) -> u32 {
        if self == Self::Overlapped { 2 } else { 1 }
    }

    /// Operations in the order in which ranks make them: which, and what.
    fn steps(self, operations: usize) -> Vec<(usize, Step)> {
        use Step::{Combine, Dispatch};
        let (dispatch, combine) = (Dispatch(DISPATCH), Combine(COMBINE));
        let split = [
            Dispatch(ffi::EP_DISPATCH_SEND),
            Dispatch(ffi::EP_DISPATCH_RECV),
            Combine(ffi::EP_COMBINE_SEND),
            Combine(ffi::EP_COMBINE_RECV),
        ];
        let pairs = (0..operations).step_by(2).map(|a| (a, a + 1));
        match self {
            Self::Fused => (0..operations)
                .flat_map(|n| [(n, dispatch), (n, combine)])
                .collect(),
            Self::Split => (0..operations)
                .flat_map(|n| split.map(|step| (n, step)))
                .collect(),
            Self::Nested => pairs
                .flat_map(|(a, b)| [(a, dispatch), (b, dispatch), (b, combine), (a, combine)])
                .collect(),
            Self::Overlapped => pairs
                .flat_map(|(a, b)| split.map(|step| [(a, step), (b, step)]))
                .flatten()
                .collect(),
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    Dispatch(u32),
    Combine(u32),
}

/// Runs all ranks through the operations, each on a thread, and checks every result.
pub(crate) fn check(
    world: &World,
    operations: usize,
    order: Order,
    links: &Links,
) -> Result<(), String> {
    let case = &world.case;
    let inputs: Vec<_> = (0..operations).map(|n| case.inputs(n)).collect();
    let oracles: Vec<_> = (0..operations)
        .map(|n| Oracle::new(case, n, &inputs[n], links.clone()))
        .collect();
    // Ranks that nobody reaches do not run.
    let runs = |rank: &usize| (0..case.ranks).any(|peer| links.has(*rank, peer));
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..case.ranks)
            .filter(runs)
            .map(|rank| {
                let oracles = &oracles;
                scope.spawn(move || run_rank(world, rank, oracles, &order.steps(operations)))
            })
            .collect();
        ranks.into_iter().try_for_each(|rank| rank.join().unwrap())
    })?;
    for rank in (0..case.ranks).filter(runs) {
        check_bad_entries(world, rank, &oracles)?;
    }
    if world.intact() {
        Ok(())
    } else {
        Err("something was written out of bounds".into())
    }
}

pub(crate) fn run_rank(
    world: &World,
    rank: usize,
    oracles: &[Oracle<'_>],
    steps: &[(usize, Step)],
) -> Result<(), String> {
    let slots = world.shape.slots as usize;
    let tensors: Vec<_> = oracles
        .iter()
        .map(|o| Tensors::new(&o.inputs[rank]))
        .collect();
    let mut combines: Vec<Option<(Memory, Memory)>> = oracles.iter().map(|_| None).collect();
    for &(n, step) in steps {
        let (slot, oracle, tensors) = (n % slots, &oracles[n], &tensors[n]);
        match step {
            Step::Dispatch(parts) => {
                if parts & ffi::EP_DISPATCH_SEND != 0 {
                    world.ranks[rank].outputs[slot].poison();
                    // What is left of an earlier handle leads somewhere: to slot 0 of rank 0.
                    let [route, recv_map, recv_rows] = &world.ranks[rank].handles[slot];
                    route.fill(0);
                    recv_map.fill(POISON);
                    recv_rows.fill(POISON);
                }
                let args = world.dispatch_args(rank, slot, tensors, parts);
                harness::dispatch(&args).map_err(|error| error.to_string())?;
                if parts & ffi::EP_DISPATCH_RECV != 0 {
                    world.with_output(rank, slot, |output| {
                        oracle.check_dispatch(rank, output, POISON)
                    })?;
                }
            }
            Step::Combine(parts) => {
                let (y, out) = combines[n].get_or_insert_with(|| {
                    let y = Memory::of(&oracle.expert_outputs(rank), u16::to_le_bytes);
                    let out = 2 * tensors.tokens as usize * world.case.hidden;
                    (y, Memory::poisoned(out))
                });
                let args = world.combine_args(rank, slot, tensors, y, out, parts);
                harness::combine(&args).map_err(|error| error.to_string())?;
                if parts & ffi::EP_COMBINE_RECV != 0 {
                    oracle.check_combine(rank, &out.values(u16::from_le_bytes))?;
                    if !(y.intact() && out.intact()) {
                        return Err("something was written around out".into());
                    }
                    combines[n] = None;
                }
            }
        }
    }
    Ok(())
}

/// Compares the bad entries that a rank reported. Operations dispatch in ascending order.
pub(crate) fn check_bad_entries(
    world: &World,
    rank: usize,
    oracles: &[Oracle<'_>],
) -> Result<(), String> {
    let faults = world.faults(rank);
    if faults
        .last()
        .is_some_and(|newest| newest.sequence > ffi::EP_FAULT_RING.into())
    {
        // The oldest are gone; the newest must follow one another.
        let gap = faults
            .windows(2)
            .find(|pair| pair[0].sequence + 1 != pair[1].sequence);
        return gap.map_or(Ok(()), |gap| Err(format!("rank {rank}: records {gap:?}")));
    }
    for (oracle, epoch) in oracles.iter().zip(1..) {
        let (found, expected) = (bad_entries(&faults, rank, epoch), oracle.bad_entries(rank));
        if found != expected {
            return Err(format!(
                "rank {rank}, dispatch {epoch}: {found:?}, not {expected:?}"
            ));
        }
    }
    Ok(())
}

/// A case with operations in an order.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) case: Case,
    pub(crate) operations: usize,
    pub(crate) order: Order,
}

impl Run {
    pub(crate) fn check(&self) -> Result<World, String> {
        let timeout = Duration::from_secs(60);
        let world = World::new(&self.case, 2, self.order.sends_in_flight(), timeout);
        check(
            &world,
            self.operations,
            self.order,
            &Links::all(self.case.ranks),
        )?;
        for rank in 0..self.case.ranks {
            let given_up = world.waits_given_up(rank);
            if !given_up.is_empty() {
                return Err(format!("rank {rank}: {given_up:?}"));
            }
        }
        Ok(world)
    }
}

pub(crate) fn cases() -> impl Strategy<Value = Case> {
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
    let odd = any::<[bool; 3]>().prop_map(|[missing, out_of_range, repeated]| Odd {
        missing,
        out_of_range,
        repeated,
    });
    // Large values of everything at once would only cost time.
    let hidden = prop_oneof![6 => 1..=3usize, 2 => 4..=5usize, 1 => 6..=8usize];
    let tokens = prop_oneof![1 => Just(0usize), 5 => 0..=6usize, 1 => 7..=crate::MOST_TOKENS];
    let shape = (1..=crate::MOST_RANKS, 1..=8usize, hidden, 1..=16usize);
    shape.prop_flat_map(move |(ranks, local, blocks, top_k)| {
        let rest = (
            routing.clone(),
            weights.clone(),
            precision.clone(),
            odd.clone(),
        );
        (
            prop::collection::vec(tokens.clone(), ranks),
            0..3usize,
            rest,
            any::<(bool, u64)>(),
        )
            .prop_map(
                move |(tokens, spare, (routing, weights, precision, odd), (specials, seed))| Case {
                    ranks,
                    experts: ranks * local,
                    hidden: 128 * blocks,
                    top_k,
                    max_tokens: (tokens.iter().max().unwrap() + spare).max(1),
                    tokens,
                    routing,
                    weights,
                    precision,
                    odd,
                    specials,
                    seed,
                },
            )
    })
}

pub(crate) fn runs() -> impl Strategy<Value = Run> {
    let order = prop::sample::select(vec![
        Order::Fused,
        Order::Split,
        Order::Nested,
        Order::Overlapped,
    ]);
    (cases(), order, 1..=3usize).prop_map(|(case, order, n)| {
        let pairs = matches!(order, Order::Nested | Order::Overlapped);
        Run {
            case,
            order,
            operations: if pairs { 2 * n } else { n + 1 },
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(crate::CASES)
    })]

    #[test]
    fn any_shape_gives_what_the_oracle_says(run in runs()) {
        run.check().map_err(TestCaseError::fail)?;
    }
}

/// A case in which every rank sends to every rank.
/// Where the operations begun of a part are counted, in the control block.
pub(crate) fn counter(ranks: usize, part: u64) -> u64 {
    (4 * ranks as u64).next_multiple_of(128) + 32 * part
}

pub(crate) fn plain() -> Case {
    Case {
        ranks: 3,
        experts: 6,
        hidden: 256,
        top_k: 4,
        max_tokens: 9,
        tokens: vec![9, 5, 7],
        routing: Routing::Uniform,
        weights: Weights::AtDispatch,
        precision: Precision::Bf16,
        odd: Odd::default(),
        specials: false,
        seed: 11,
    }
}

pub(crate) fn fused(case: Case) -> Run {
    Run {
        case,
        operations: 2,
        order: Order::Fused,
    }
}

#[test]
fn shapes_of_real_models() {
    for (hidden, experts, top_k, precision) in [
        (7168, 256, 8, Precision::Fp8),
        (3584, 64, 16, Precision::Bf16),
        (5120, 32, 6, Precision::Fp8Ue8m0),
    ] {
        let case = Case {
            ranks: 4,
            experts,
            hidden,
            top_k,
            max_tokens: 4,
            tokens: vec![4, 1, 0, 3],
            precision,
            ..plain()
        };
        fused(case).check().unwrap();
    }
}

#[test]
fn limits_of_the_wire_format() {
    let experts = (ffi::EP_MAX_LOCAL_EXPERTS, ffi::EP_MAX_TOP_K);
    let case = Case {
        ranks: 2,
        experts: 2 * experts.0 as usize,
        hidden: 128,
        top_k: experts.1 as usize,
        max_tokens: 2,
        tokens: vec![2, 1],
        weights: Weights::AtCombine,
        ..plain()
    };
    fused(case).check().unwrap();
}

#[test]
fn one_rank_without_peers() {
    let case = Case {
        ranks: 1,
        experts: 4,
        tokens: vec![9],
        ..plain()
    };
    fused(case).check().unwrap();
}

#[test]
fn epochs_pass_32_bits() {
    let case = plain();
    let world = World::new(&case, 2, 1, Duration::from_secs(60));
    // As if so many operations had been run.
    let counts = world.layout.counts..world.layout.weights;
    for rank in &world.ranks {
        for packet in counts.clone().step_by(8) {
            rank.symmetric.set_word(packet, 0xffff_fff0 << 32);
        }
        for part in 0..5 {
            let counter = counter(case.ranks, part);
            rank.control.set_word(counter, 0xffff_fffd);
        }
    }
    check(&world, 5, Order::Split, &Links::all(case.ranks)).unwrap();
    assert!((0..case.ranks).all(|rank| world.faults(rank).is_empty()));
}

/// The control block begins with a word for each rank, and the host writes to it too.
#[test]
fn what_counts_operations_is_nowhere_near_what_calls_them_off() {
    for ranks in [28, 32] {
        let case = Case {
            ranks,
            experts: ranks,
            hidden: 128,
            max_tokens: 1,
            tokens: vec![1; ranks],
            ..plain()
        };
        fused(case).check().unwrap();
    }
}

#[test]
fn ring_keeps_the_newest_records() {
    let odd = Odd {
        missing: true,
        out_of_range: true,
        repeated: true,
    };
    let case = Case {
        top_k: 16,
        max_tokens: 64,
        tokens: vec![64, 3, 0],
        odd,
        ..plain()
    };
    let world = fused(case).check().unwrap();
    let faults = world.faults(0);
    assert_eq!(faults.len(), ffi::EP_FAULT_RING as usize);
    assert!(faults[0].sequence > 1);
}

/// Faults of an operation that are not bad entries: what, of which part, and about whom.
pub(crate) fn given_up(world: &World, rank: usize) -> Vec<(u32, u32, u32, u32, u64)> {
    let faults = world.waits_given_up(rank).into_iter();
    faults
        .map(|f| (f.fault, f.op, f.phase, f.peer, f.epoch))
        .collect()
}

#[test]
fn a_silent_rank_is_given_up_in_time_and_can_be_masked() {
    const SILENT: usize = 2;
    const OPERATIONS: usize = 2;
    for weights in [Weights::AtDispatch, Weights::AtCombine] {
        let case = Case { weights, ..plain() };
        let timeout = Duration::from_secs(1);
        let world = World::new(&case, 2, 1, timeout);
        let links = Links::all(case.ranks).without(SILENT);

        let start = crate::clock();
        check(&world, OPERATIONS, Order::Fused, &links).unwrap();
        // A dispatch and a combine each, which are late by what the checks take.
        assert!(crate::clock() - start < 2 * OPERATIONS as u32 * timeout + 10 * timeout);
        for rank in [0, 1] {
            let mut expected = Vec::new();
            for (n, epoch) in (0..OPERATIONS).zip(1..) {
                let inputs = case.inputs(n);
                assert!(
                    Oracle::new(&case, n, &inputs, links.clone())
                        .owners(rank)
                        .contains(&SILENT)
                );
                for (op, phase) in [
                    (ffi::EP_OP_DISPATCH, ffi::EP_PHASE_COUNTS),
                    (ffi::EP_OP_COMBINE, ffi::EP_PHASE_PARTIALS),
                ] {
                    expected.push((ffi::EP_FAULT_TIMEOUT, op, phase, SILENT as u32, epoch));
                }
            }
            assert_eq!(given_up(&world, rank), expected);
            let waited = |fault: &harness::Fault| Duration::from_nanos(fault.value as u64);
            assert!(
                world
                    .faults(rank)
                    .iter()
                    .all(|fault| waited(fault) >= timeout)
            );
        }

        world.clear_faults();
        for rank in [0, 1] {
            world.set_active(rank, SILENT, false);
        }
        // Nobody waits for a masked rank, and nothing is sent to it.
        let before = world.ranks[SILENT].symmetric.values(u64::from_le_bytes);
        check(&world, OPERATIONS, Order::Split, &links).unwrap();
        assert_eq!((given_up(&world, 0), given_up(&world, 1)), (vec![], vec![]));
        assert!(world.ranks[SILENT].symmetric.values(u64::from_le_bytes) == before);
    }
}

#[test]
fn waits_that_are_called_off_end() {
    const SILENT: usize = 2;
    let case = plain();
    let world = World::new(&case, 1, 1, Duration::from_secs(600));
    let inputs = case.inputs(0);
    let tensors: Vec<_> = inputs.iter().map(Tensors::new).collect();
    let links = Links::all(case.ranks).without(SILENT);
    let oracle = Oracle::new(&case, 0, &inputs, links);
    let start = Instant::now();
    for rank in [0, 1] {
        let args = world.dispatch_args(rank, 0, &tensors[rank], ffi::EP_DISPATCH_SEND);
        harness::dispatch(&args).unwrap();
    }
    thread::scope(|scope| {
        for rank in [0, 1] {
            let args = world.dispatch_args(rank, 0, &tensors[rank], ffi::EP_DISPATCH_RECV);
            scope.spawn(move || harness::dispatch(&args).unwrap());
        }
        // They wait by now, or will find it called off.
        thread::sleep(Duration::from_millis(20));
        for rank in [0, 1] {
            world.abort(rank);
        }
    });
    // What has come is taken, and nobody else is waited for.
    let outputs = [0, 1].map(|rank| {
        world
            .with_output(rank, 0, |output| {
                oracle.check_dispatch(rank, output, POISON)
            })
            .unwrap();
        let y = Memory::of(&oracle.expert_outputs(rank), u16::to_le_bytes);
        let out = Memory::poisoned(2 * inputs[rank].tokens * case.hidden);
        let args = world.combine_args(rank, 0, &tensors[rank], &y, &out, ffi::EP_COMBINE_SEND);
        harness::combine(&args).unwrap();
        (y, out)
    });
    for (rank, (y, out)) in outputs.iter().enumerate() {
        let args = world.combine_args(rank, 0, &tensors[rank], y, out, ffi::EP_COMBINE_RECV);
        harness::combine(&args).unwrap();
        let combined = out.values(u16::from_le_bytes);
        oracle.check_combine(rank, &combined).unwrap();
        // The kernels themselves put the starts of waits back, by turns.
        for _ in 0..3 {
            harness::barrier(&world.barrier_args(rank, 0)).unwrap();
        }
    }
    assert!(start.elapsed() < Duration::from_secs(60));
    for rank in [0, 1] {
        let given_up = given_up(&world, rank);
        let silent = |op, phase, epoch| (ffi::EP_FAULT_ABORTED, op, phase, SILENT as u32, epoch);
        for record in [
            silent(ffi::EP_OP_DISPATCH, ffi::EP_PHASE_COUNTS, 1),
            silent(ffi::EP_OP_COMBINE, ffi::EP_PHASE_PARTIALS, 1),
            silent(ffi::EP_OP_BARRIER, ffi::EP_PHASE_BARRIER, 1),
            silent(ffi::EP_OP_BARRIER, ffi::EP_PHASE_BARRIER, 2),
            silent(ffi::EP_OP_BARRIER, ffi::EP_PHASE_BARRIER, 3),
        ] {
            assert!(given_up.contains(&record), "{record:?} in {given_up:?}");
        }
        assert!(
            given_up
                .iter()
                .all(|record| record.0 == ffi::EP_FAULT_ABORTED)
        );
    }
    assert!(world.intact());
}

#[test]
fn a_null_entry_is_reported_once_and_not_followed() {
    for weights in [Weights::AtDispatch, Weights::AtCombine] {
        let case = Case { weights, ..plain() };
        let world = World::new(&case, 2, 1, Duration::from_secs(60));
        world.cut(0, 2);
        let links = Links::all(case.ranks).cut(0, 2);
        check(&world, 2, Order::Split, &links).unwrap();
        let unreachable = |peer| {
            let one = |epoch| {
                (
                    ffi::EP_FAULT_UNREACHABLE,
                    ffi::EP_OP_DISPATCH,
                    ffi::EP_PHASE_SEND,
                    peer,
                    epoch,
                )
            };
            vec![one(1), one(2)]
        };
        assert_eq!(given_up(&world, 0), unreachable(2));
        assert_eq!(given_up(&world, 1), vec![]);
        assert_eq!(given_up(&world, 2), unreachable(0));
    }
}

#[test]
fn a_peer_lost_between_dispatch_and_combine_contributes_nothing() {
    let case = plain();
    let world = World::new(&case, 1, 1, Duration::from_secs(60));
    let inputs = case.inputs(0);
    let connected = Oracle::new(&case, 0, &inputs, Links::all(case.ranks));
    let cut = Oracle::new(&case, 0, &inputs, Links::all(case.ranks).cut(0, 2));
    let tensors: Vec<_> = inputs.iter().map(Tensors::new).collect();
    let each = |run: &(dyn Fn(usize) + Sync)| {
        thread::scope(|scope| {
            for rank in 0..case.ranks {
                scope.spawn(move || run(rank));
            }
        });
    };
    each(&|rank| {
        let args = world.dispatch_args(rank, 0, &tensors[rank], DISPATCH);
        harness::dispatch(&args).unwrap();
    });
    world.cut(0, 2);
    each(&|rank| {
        let y = Memory::of(&connected.expert_outputs(rank), u16::to_le_bytes);
        let out = Memory::poisoned(2 * inputs[rank].tokens * case.hidden);
        let args = world.combine_args(rank, 0, &tensors[rank], &y, &out, COMBINE);
        harness::combine(&args).unwrap();
        cut.check_combine(rank, &out.values(u16::from_le_bytes))
            .unwrap();
    });
    for (rank, peer) in [(0, 2), (2, 0)] {
        let one = |phase| {
            (
                ffi::EP_FAULT_UNREACHABLE,
                ffi::EP_OP_COMBINE,
                phase,
                peer,
                1,
            )
        };
        let expected = vec![one(ffi::EP_PHASE_SEND), one(ffi::EP_PHASE_PARTIALS)];
        assert_eq!(given_up(&world, rank), expected);
    }
}

#[test]
fn counts_that_come_in_part_count_for_nothing() {
    let case = plain();
    let inputs = case.inputs(0);
    let tensors: Vec<_> = inputs.iter().map(Tensors::new).collect();
    for lost in 0..=case.local_experts() {
        let world = World::new(&case, 1, 1, Duration::from_millis(100));
        for rank in [1, 2] {
            let args = world.dispatch_args(rank, 0, &tensors[rank], ffi::EP_DISPATCH_SEND);
            harness::dispatch(&args).unwrap();
        }
        // As if rank 1 had died in between.
        world.ranks[0]
            .symmetric
            .set_word(world.packet(1, 1, lost), 0);
        harness::dispatch(&world.dispatch_args(0, 0, &tensors[0], DISPATCH)).unwrap();
        check_given_up_source(&world, &inputs, 1);
    }
}

#[test]
fn counts_that_come_as_the_time_ends_count_or_do_not() {
    let case = plain();
    let inputs = case.inputs(0);
    let tensors: Vec<_> = inputs.iter().map(Tensors::new).collect();
    let all = Oracle::new(&case, 0, &inputs, Links::all(case.ranks));
    let rng = &mut common::Rng::new(&[7]);
    let mut given_up_after = Duration::ZERO;
    for n in 0..crate::CASES {
        let world = World::new(&case, 1, 1, Duration::from_millis(2));
        for rank in [1, 2] {
            let args = world.dispatch_args(rank, 0, &tensors[rank], ffi::EP_DISPATCH_SEND);
            harness::dispatch(&args).unwrap();
        }
        let buffer = &world.ranks[0].symmetric;
        let packets: Vec<_> = (0..=case.local_experts())
            .map(|packet| world.packet(1, 1, packet))
            .map(|at| (at, buffer.word(at)))
            .collect();
        packets.iter().for_each(|&(at, _)| buffer.set_word(at, 0));
        thread::scope(|scope| {
            let start = Instant::now();
            let dispatch = scope.spawn(|| {
                let args = world.dispatch_args(0, 0, &tensors[0], DISPATCH);
                harness::dispatch(&args).unwrap();
            });
            if n == 0 {
                dispatch.join().unwrap();
                given_up_after = start.elapsed();
            } else {
                // The last comes about then, on average.
                let most = 2 * given_up_after / packets.len() as u32;
                for (at, packet) in packets {
                    thread::sleep(most * rng.below(1000) as u32 / 1000);
                    buffer.set_word(at, packet);
                }
            }
        });
        if given_up(&world, 0).is_empty() {
            world
                .with_output(0, 0, |output| all.check_dispatch(0, output, POISON))
                .unwrap();
        } else {
            check_given_up_source(&world, &inputs, 1);
        }
    }
}

/// That rank 0 has taken nothing of a source in its first dispatch, and all of the others'.
fn check_given_up_source(world: &World, inputs: &[common::Input], source: usize) {
    let record = (
        ffi::EP_FAULT_TIMEOUT,
        ffi::EP_OP_DISPATCH,
        ffi::EP_PHASE_COUNTS,
        source as u32,
        1,
    );
    assert_eq!(given_up(world, 0), vec![record]);
    let links = Links::all(world.case.ranks).cut(0, source);
    let oracle = Oracle::new(&world.case, 0, inputs, links);
    world
        .with_output(0, 0, |output| oracle.check_dispatch(0, output, POISON))
        .unwrap();
    let rows = world.rows_from_sources(0, 0);
    assert!(
        rows.iter()
            .enumerate()
            .all(|(rank, &rows)| (rows == 0) == (rank == source))
    );
    assert!(world.intact());
}

#[test]
fn rows_that_never_come_have_no_entries() {
    let case = Case {
        ranks: 2,
        tokens: vec![5, 9],
        ..plain()
    };
    let timeout = Duration::from_millis(200);
    let world = World::new(&case, 1, 1, timeout);
    let inputs = case.inputs(0);
    // Rank 1 sends, and then its second row is unwritten, as if it had died in between.
    let tensors = Tensors::new(&inputs[1]);
    harness::dispatch(&world.dispatch_args(1, 0, &tensors, ffi::EP_DISPATCH_SEND)).unwrap();
    let lost = world.row(1, 1, 1);
    world.set_epoch(0, lost, world.layout.row_stride, 0);

    let tensors = Tensors::new(&inputs[0]);
    harness::dispatch(&world.dispatch_args(0, 0, &tensors, DISPATCH)).unwrap();
    let record = (
        ffi::EP_FAULT_TIMEOUT,
        ffi::EP_OP_DISPATCH,
        ffi::EP_PHASE_ROWS,
        1,
        1,
    );
    assert_eq!(given_up(&world, 0), vec![record]);
    let map = world.ranks[0].handles[0][1].values(u64::from_le_bytes);
    let entries = |slot: usize| map[(case.max_tokens + slot) * (case.top_k + 2)] >> 32;
    assert_eq!(entries(1), 0);
    assert!(entries(0) > 0 && entries(2) > 0);
    // Combine takes none of them.
    let rows = world.rows_from_sources(0, 0);
    assert!(rows[0] > 0 && rows[1] == 0, "{rows:?}");
    assert!(world.intact());
}

#[test]
fn a_rank_that_was_given_up_does_not_wait_in_vain() {
    let case = Case {
        ranks: 2,
        tokens: vec![5, 9],
        ..plain()
    };
    let mut world = World::new(&case, 1, 1, Duration::from_millis(20));
    let inputs: Vec<_> = (0..3).map(|n| case.inputs(n)).collect();
    let dispatch = |world: &World, rank: usize, n: usize| {
        world.ranks[rank].outputs[0].poison();
        let tensors = Tensors::new(&inputs[n][rank]);
        harness::dispatch(&world.dispatch_args(rank, 0, &tensors, DISPATCH)).unwrap();
    };
    (0..3).for_each(|n| dispatch(&world, 0, n));
    assert_eq!(given_up(&world, 0).len(), 3);

    // The first dispatch's buffers are overwritten by the third; the others are still there.
    world.timeout = Duration::from_secs(600);
    let start = Instant::now();
    (0..3).for_each(|n| dispatch(&world, 1, n));
    assert!(start.elapsed() < Duration::from_secs(60));
    let record = (
        ffi::EP_FAULT_TIMEOUT,
        ffi::EP_OP_DISPATCH,
        ffi::EP_PHASE_COUNTS,
        0,
        1,
    );
    assert_eq!(given_up(&world, 1), vec![record]);
    let last = Oracle::new(&case, 2, &inputs[2], Links::all(2));
    world
        .with_output(1, 0, |output| last.check_dispatch(1, output, POISON))
        .unwrap();
}

#[test]
fn a_partial_of_a_later_combine_is_not_waited_for() {
    let case = Case {
        ranks: 2,
        tokens: vec![5, 9],
        ..plain()
    };
    let world = World::new(&case, 1, 1, Duration::from_secs(600));
    let inputs = case.inputs(0);
    let tensors: Vec<_> = inputs.iter().map(Tensors::new).collect();
    for part in [ffi::EP_DISPATCH_SEND, ffi::EP_DISPATCH_RECV] {
        for (rank, tensors) in tensors.iter().enumerate() {
            harness::dispatch(&world.dispatch_args(rank, 0, tensors, part)).unwrap();
        }
    }
    for slot in 0..case.max_tokens as u64 {
        let partials = world.layout.partials + world.layout.partials_source_stride;
        let partial = partials + slot * world.layout.partial_stride;
        world.set_epoch(0, partial, world.layout.partial_stride, 2);
    }

    let oracle = Oracle::new(&case, 0, &inputs, Links::all(2));
    let y = Memory::of(&oracle.expert_outputs(0), u16::to_le_bytes);
    let out = Memory::poisoned(2 * inputs[0].tokens * case.hidden);
    let start = Instant::now();
    let args = world.combine_args(0, 0, &tensors[0], &y, &out, COMBINE);
    harness::combine(&args).unwrap();
    assert!(start.elapsed() < Duration::from_secs(60));
    let record = (
        ffi::EP_FAULT_TIMEOUT,
        ffi::EP_OP_COMBINE,
        ffi::EP_PHASE_PARTIALS,
        1,
        1,
    );
    assert_eq!(given_up(&world, 0), vec![record]);
    let alone = Oracle::new(&case, 0, &inputs, Links::all(2).cut(0, 1));
    alone
        .check_combine(0, &out.values(u16::from_le_bytes))
        .unwrap();
}

/// Sums of a caller's: i64, as an operation left them.
pub(crate) fn sums(memory: &Memory) -> Vec<i64> {
    memory.values(i64::from_le_bytes)
}

#[test]
fn totals_and_waits_are_added_by_the_receive_part() {
    let case = plain();
    let world = World::new(&case, 2, 1, Duration::from_secs(60));
    let start = crate::clock();
    thread::scope(|scope| {
        for rank in 0..case.ranks {
            let (world, case) = (&world, &case);
            scope.spawn(move || {
                // What was there before stays in the sum, whatever it is.
                let mut totals = vec![1000 * rank as i64, i64::MAX];
                let waits = vec![-(rank as i64), 5, 1 << 40];
                let total_count = Memory::of(&totals, i64::to_le_bytes);
                let wait_ns = Memory::of(&waits, i64::to_le_bytes);
                for n in 0..4 {
                    let tensors = Tensors::new(&case.inputs(n)[rank]);
                    let dispatch = |parts, with_sums: bool| {
                        let mut args = world.dispatch_args(rank, n % 2, &tensors, parts);
                        if with_sums {
                            args.total_count = total_count.address();
                            args.wait_ns = wait_ns.address();
                        }
                        harness::dispatch(&args).unwrap();
                    };
                    let before = [sums(&total_count), sums(&wait_ns)];
                    match n {
                        // In one launch, and apart: the send part leaves them alone.
                        0 => dispatch(DISPATCH, true),
                        1 => {
                            dispatch(ffi::EP_DISPATCH_SEND, true);
                            assert_eq!([sums(&total_count), sums(&wait_ns)], before);
                            dispatch(ffi::EP_DISPATCH_RECV, true);
                        }
                        // Where they are left out nothing is added.
                        _ => {
                            dispatch(DISPATCH, false);
                            assert_eq!([sums(&total_count), sums(&wait_ns)], before);
                            continue;
                        }
                    }
                    let inputs = case.inputs(n);
                    let oracle = Oracle::new(case, n, &inputs, Links::all(case.ranks));
                    for (local, total) in totals.iter_mut().enumerate() {
                        let rows = oracle.rows[rank * case.local_experts() + local].len();
                        *total = total.wrapping_add(rows as i64);
                    }
                    assert_eq!(sums(&total_count), totals);
                    for (now, before) in sums(&wait_ns).into_iter().zip(&before[1]) {
                        assert!(now > *before, "{now} after {before}");
                    }
                }
                let spent = crate::clock() - start;
                let limit = i64::try_from(spent.as_nanos()).unwrap();
                for (now, before) in sums(&wait_ns).into_iter().zip(waits) {
                    assert!(now - before <= limit, "{now} after {before}");
                }
                assert!(total_count.intact() && wait_ns.intact());
            });
        }
    });
    assert!(world.intact());
}

#[test]
fn the_wait_for_a_source_that_is_given_up_is_the_time_out() {
    let case = plain();
    let timeout = Duration::from_millis(200);
    let world = World::new(&case, 1, 1, timeout);
    let tensors: Vec<_> = case.inputs(0).iter().map(Tensors::new).collect();
    // Rank 1 comes, rank 0 does not, and there is no way to rank 2.
    world.cut(1, 2);
    world.cut(0, 2);
    let wait_ns = Memory::of(&[7_i64; 3], i64::to_le_bytes);
    let mut args = world.dispatch_args(1, 0, &tensors[1], DISPATCH);
    args.wait_ns = wait_ns.address();
    let start = crate::clock();
    harness::dispatch(&args).unwrap();
    let spent = crate::clock() - start;
    let waited = sums(&wait_ns);
    let given_up = Duration::from_nanos((waited[0] - 7).try_into().unwrap());
    assert!((timeout..=spent).contains(&given_up), "{given_up:?}");
    assert!(waited[1] > 7 && waited[1] < waited[0], "{waited:?}");
    assert_eq!(waited[2], 7);

    // Nor does anybody wait for a rank that takes no part.
    world.set_active(1, 0, false);
    harness::dispatch(&args).unwrap();
    let now = sums(&wait_ns);
    assert_eq!([now[0], now[2]], [waited[0], 7]);
    assert!(now[1] > waited[1]);
}

#[test]
fn wrong_content_of_a_peer_does_no_harm() {
    // All tokens go to experts of rank 0, which is alone; rank 1 is what the test writes.
    let case = Case {
        ranks: 2,
        routing: Routing::One,
        tokens: vec![9, 9],
        top_k: 3,
        weights: Weights::AtCombine,
        seed: 20,
        ..plain()
    };
    let inputs = case.inputs(0);
    let oracle = Oracle::new(&case, 0, &inputs, Links::all(2).cut(0, 1));
    let tensors = Tensors::new(&inputs[0]);
    for seed in 0..60 {
        let rng = &mut common::Rng::new(&[seed]);
        let world = World::new(&case, 1, 1, Duration::from_secs(60));
        let buffer = &world.ranks[0].symmetric;
        let layout = world.layout;
        let ring = u64::from(layout.ring);
        for (region, stride, copies, bytes) in [
            (
                layout.counts,
                layout.counts_ring_stride,
                ring,
                layout.counts_source_stride,
            ),
            (
                layout.rows,
                layout.rows_ring_stride,
                ring,
                layout.rows_source_stride,
            ),
            (layout.weights, 0, 1, layout.weights_source_stride),
            (layout.partials, 0, 1, layout.partials_source_stride),
        ] {
            for copy in 0..copies {
                let of_rank_1 = region + copy * stride + bytes;
                for at in (of_rank_1..of_rank_1 + bytes).step_by(8) {
                    let any = rng.next();
                    buffer.set_word(at, any);
                }
            }
        }
        let mut wild = |small: u64| match rng.below(3) {
            0 => rng.below(small),
            1 => u64::from(u32::MAX) - rng.below(small),
            _ => rng.next() & 0xffff_ffff,
        };
        for packet in 0..=case.local_experts() {
            buffer.set_word(world.packet(1, 1, packet), 1 << 32 | wild(12));
        }
        for slot in 0..case.max_tokens {
            let mut header = vec![wild(10) | wild(5) << 32];
            header.extend((0..case.top_k).map(|_| {
                let place = wild(4) & 0x7ff | wild(12) << 16;
                place & 0xffff_ffff | wild(4) << 32
            }));
            world.put_row(0, (1, 1, slot), &header);
            let weights = layout.weights + layout.weights_source_stride;
            let at = weights + slot as u64 * layout.weight_stride;
            world.set_epoch(0, at, layout.weight_stride, 1);
        }

        harness::dispatch(&world.dispatch_args(0, 0, &tensors, DISPATCH)).unwrap();
        let y = Memory::of(&oracle.expert_outputs(0), u16::to_le_bytes);
        let out = Memory::poisoned(2 * inputs[0].tokens * case.hidden);
        let args = world.combine_args(0, 0, &tensors, &y, &out, COMBINE);
        harness::combine(&args).unwrap();
        assert!(world.intact() && out.intact());

        // Its own rows stand first, and are not touched.
        oracle
            .check_combine(0, &out.values(u16::from_le_bytes))
            .unwrap();
        world.with_output(0, 0, |output| {
            for local in 0..case.local_experts() {
                assert!(output.recv_count[local] as usize <= case.rows_per_expert());
                for (row, from) in oracle.rows[local].iter().enumerate() {
                    let index = local * case.rows_per_expert() + row;
                    let x = &inputs[0].x[from.token * case.hidden..][..case.hidden];
                    let row = &output.recv_x[index * 2 * case.hidden..][..2 * case.hidden];
                    assert_eq!(row, common::Encoded::new(case.precision, x).bytes);
                    assert_eq!(output.src_info[index] as usize, from.token);
                }
            }
        });
        let map = world.ranks[0].handles[0][1].values(u64::from_le_bytes);
        let rows = world.rows_from_sources(0, 0);
        assert!(rows[1] as usize <= case.max_tokens);
        for slot in 0..rows[1] as usize {
            let row = &map[(case.max_tokens + slot) * (case.top_k + 2)..][..case.top_k + 2];
            let entries = (row[0] >> 32) as usize;
            assert!(entries <= case.top_k + 1);
            assert!(entries == 0 || (row[0] as u32) < case.max_tokens as u32);
            let limit = (case.local_experts() * case.rows_per_expert()) as u32;
            assert!(row[1..=entries].iter().all(|&entry| (entry as u32) < limit));
        }
    }
}

#[test]
fn a_rank_without_tokens_needs_no_tensors() {
    let case = Case {
        tokens: vec![0, 0, 0],
        ..plain()
    };
    let world = World::new(&case, 1, 1, Duration::from_secs(60));
    let inputs = case.inputs(0);
    let oracle = Oracle::new(&case, 0, &inputs, Links::all(case.ranks));
    thread::scope(|scope| {
        for rank in 0..case.ranks {
            let (world, inputs, oracle) = (&world, &inputs, &oracle);
            scope.spawn(move || {
                let tensors = Tensors::new(&inputs[rank]);
                let mut args = world.dispatch_args(rank, 0, &tensors, DISPATCH);
                (args.x, args.topk_idx, args.topk_weights) = (0, 0, 0);
                harness::dispatch(&args).unwrap();
                world
                    .with_output(rank, 0, |output| {
                        oracle.check_dispatch(rank, output, POISON)
                    })
                    .unwrap();
                let y = Memory::of(&oracle.expert_outputs(rank), u16::to_le_bytes);
                let mut args = world.combine_args(rank, 0, &tensors, &y, &y, COMBINE);
                args.out = 0;
                harness::combine(&args).unwrap();
            });
        }
    });
}

#[test]
fn nobody_leaves_a_barrier_before_all_are_there() {
    const ROUNDS: usize = 100;
    let case = plain();
    let world = World::new(&case, 1, 1, Duration::from_secs(60));
    let entered = AtomicUsize::new(0);
    thread::scope(|scope| {
        for rank in 0..case.ranks {
            let (world, entered) = (&world, &entered);
            scope.spawn(move || {
                for round in 1..=ROUNDS {
                    entered.fetch_add(1, Ordering::SeqCst);
                    let spin_ns = if round % 16 == rank { 200_000 } else { 0 };
                    harness::barrier(&world.barrier_args(rank, spin_ns)).unwrap();
                    assert!(entered.load(Ordering::SeqCst) >= round * world.case.ranks);
                }
            });
        }
    });
    assert!((0..case.ranks).all(|rank| world.faults(rank).is_empty()));
}

#[test]
fn a_barrier_gives_up_who_does_not_come() {
    let timeout = Duration::from_millis(50);
    let world = World::new(&plain(), 1, 1, timeout);
    let start = crate::clock();
    harness::barrier(&world.barrier_args(1, 0)).unwrap();
    let spent = crate::clock() - start;
    assert!((timeout..100 * timeout).contains(&spent));
    let record = |peer| {
        (
            ffi::EP_FAULT_TIMEOUT,
            ffi::EP_OP_BARRIER,
            ffi::EP_PHASE_BARRIER,
            peer,
            1,
        )
    };
    assert_eq!(given_up(&world, 1), vec![record(0), record(2)]);
}
