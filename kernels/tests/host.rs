//! The host kernels against the oracle: what the contract asks of all kernels, and what only these
//! promise.

mod common;
mod contract;
mod harness;

use std::thread;
use std::time::{Duration, Instant};

use common::{Case, Links, Oracle, Precision, Weights};
use contract::{COMBINE, DISPATCH, Order, check, fused, given_up, plain, sums};
use ep_kernels::{HostKernels, Kernel, LaunchError, ffi};
use harness::{Memory, POISON, Tensors, World};

const CASES: u32 = 128;
const MOST_RANKS: usize = 8;
const MOST_TOKENS: usize = 64;

fn kernels() -> HostKernels {
    HostKernels::default()
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
        let counters = (4 * case.ranks as u64).next_multiple_of(8);
        for counter in 0..5 {
            rank.control.set_word(counters + 8 * counter, 0xffff_fffd);
        }
    }
    check(&world, 5, Order::Split, &Links::all(case.ranks)).unwrap();
    assert!((0..case.ranks).all(|rank| world.faults(rank).is_empty()));
}

#[test]
fn the_wait_for_a_late_source_is_its_own() {
    const LATE: usize = 0;
    const RECEIVER: usize = 1;
    let case = plain();
    let world = World::new(&case, 1, 1, Duration::from_secs(60));
    let tensors: Vec<_> = case.inputs(0).iter().map(Tensors::new).collect();
    let send = |rank: usize| {
        let args = world.dispatch_args(rank, 0, &tensors[rank], ffi::EP_DISPATCH_SEND);
        harness::dispatch(&args).unwrap();
    };
    (0..case.ranks).filter(|&rank| rank != LATE).for_each(send);

    let wait_ns = Memory::of(&[0_i64; 3], i64::to_le_bytes);
    let mut late = Duration::ZERO;
    thread::scope(|scope| {
        scope.spawn(|| {
            let tensors = &tensors[RECEIVER];
            let mut args = world.dispatch_args(RECEIVER, 0, tensors, ffi::EP_DISPATCH_RECV);
            args.wait_ns = wait_ns.address();
            harness::dispatch(&args).unwrap();
        });
        // The second counter is that of receive parts, which advances as one begins.
        let begun = (4 * case.ranks as u64).next_multiple_of(8) + 8;
        while world.ranks[RECEIVER].control.word(begun) == 0 {
            thread::yield_now();
        }
        let start = Instant::now();
        thread::sleep(Duration::from_millis(200));
        late = start.elapsed();
        send(LATE);
    });
    let waited: Vec<_> = sums(&wait_ns)
        .into_iter()
        .map(|ns| Duration::from_nanos(ns.try_into().unwrap()))
        .collect();
    assert!(waited[LATE] >= late, "{waited:?}, {late:?}");
    // Those who were there are not taken for late, though they come after it in order.
    assert!(waited[RECEIVER] < late && waited[2] < late, "{waited:?}");
    assert!(world.faults(RECEIVER).is_empty());
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
    assert_eq!(world.ranks[0].symmetric.word(lost), 1);
    world.ranks[0].symmetric.set_word(lost, 0);

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
    let rows = world.ranks[0].handles[0][2].values(u32::from_le_bytes);
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
        world.ranks[0].symmetric.set_word(partial, 2);
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

/// Changes that make arguments unacceptable, by what is wrong with them.
type Changes<T> = Vec<(&'static str, fn(&mut T))>;

#[test]
fn bad_dispatch_arguments_are_refused() {
    let case = Case {
        precision: Precision::Fp8Pow2,
        ..plain()
    };
    let world = World::new(&case, 2, 1, Duration::from_secs(60));
    let tensors = Tensors::new(&case.inputs(0)[1]);
    let good = world.dispatch_args(1, 0, &tensors, DISPATCH);
    let changes: Changes<ffi::ep_dispatch_args> = vec![
        ("older struct", |a| a.struct_size -= 8),
        ("no part", |a| a.flags &= !DISPATCH),
        ("unknown flag", |a| a.flags |= 1 << 30),
        ("powers of two without FP8", |a| {
            a.flags &= !ffi::EP_DISPATCH_FP8
        }),
        ("exponents without powers of two", |a| {
            a.flags = a.flags & !ffi::EP_DISPATCH_POW2 | ffi::EP_DISPATCH_UE8M0;
        }),
        ("no peer table", |a| a.group.peer_table = 0),
        ("no control block", |a| a.group.control = 0),
        ("no fault ring", |a| a.group.faults = 0),
        ("no deadline", |a| a.group.timeout_ns = 0),
        ("rank beyond the group", |a| a.group.rank = 3),
        ("no ranks", |a| a.group.num_ranks = 0),
        ("experts not a multiple", |a| a.group.num_experts = 7),
        ("too many experts", |a| a.group.num_experts = 3 * 4096),
        ("no room for tokens", |a| a.group.max_tokens = 0),
        ("hidden not a multiple", |a| a.group.hidden = 200),
        ("no hidden", |a| a.group.hidden = 0),
        ("top-k over the limit", |a| a.group.max_top_k = 33),
        ("another layout", |a| a.layout.row_stride += 128),
        ("no ring", |a| a.layout.ring = 0),
        ("slot beyond the slots", |a| a.handle.slot = 2),
        ("more tokens than the buffer holds", |a| {
            a.handle.num_tokens = 10
        }),
        ("no top-k", |a| a.handle.top_k = 0),
        ("more top-k than the buffer holds", |a| a.handle.top_k = 6),
        ("no route", |a| a.handle.route = 0),
        ("no map", |a| a.handle.recv_map = 0),
        ("no rows", |a| a.handle.recv_rows = 0),
        ("no x", |a| a.x = 0),
        ("odd x", |a| a.x += 1),
        ("no experts", |a| a.topk_idx = 0),
        ("no weights", |a| a.topk_weights = 0),
        ("no output", |a| a.recv_x = 0),
        ("no scales", |a| a.recv_scales = 0),
        ("no counts", |a| a.recv_count = 0),
        ("no source info", |a| a.src_info = 0),
        ("no ranges", |a| a.layout_range = 0),
        ("odd totals", |a| a.total_count = a.layout_range + 4),
        ("odd waits", |a| a.wait_ns = a.layout_range + 4),
    ];
    let before = world.ranks[1].control.values(u64::from_le_bytes);
    for (what, change) in changes {
        let mut args = good;
        change(&mut args);
        let refused = LaunchError::BadArgs {
            kernel: Kernel::Dispatch,
        };
        assert_eq!(harness::dispatch(&args), Err(refused), "{what}");
    }
    // Nothing happened, and the buffer is as good as new.
    assert!(world.ranks[1].control.values(u64::from_le_bytes) == before);
    check(&world, 2, Order::Fused, &Links::all(case.ranks)).unwrap();
}

#[test]
fn bad_combine_and_barrier_arguments_are_refused() {
    let case = Case {
        weights: Weights::AtCombine,
        ..plain()
    };
    let world = World::new(&case, 2, 1, Duration::from_secs(60));
    let tensors = Tensors::new(&case.inputs(0)[1]);
    let (y, out) = (Memory::new(8), Memory::new(8));
    let good = world.combine_args(1, 0, &tensors, &y, &out, COMBINE);
    let changes: Changes<ffi::ep_combine_args> = vec![
        ("older struct", |a| a.struct_size -= 8),
        ("no part", |a| a.flags &= !COMBINE),
        ("unknown flag", |a| a.flags |= 2),
        ("no deadline", |a| a.group.timeout_ns = 0),
        ("hidden not a multiple", |a| a.group.hidden = 200),
        ("another layout", |a| a.layout.partials += 128),
        ("slot beyond the slots", |a| a.handle.slot = 2),
        ("more tokens than the buffer holds", |a| {
            a.handle.num_tokens = 10
        }),
        ("no top-k", |a| a.handle.top_k = 0),
        ("no route", |a| a.handle.route = 0),
        ("no expert outputs", |a| a.y = 0),
        ("no weights", |a| a.topk_weights = 0),
        ("no output", |a| a.out = 0),
    ];
    for (what, change) in changes {
        let mut args = good;
        change(&mut args);
        let refused = LaunchError::BadArgs {
            kernel: Kernel::Combine,
        };
        assert_eq!(harness::combine(&args), Err(refused), "{what}");
    }

    let good = world.barrier_args(1, 0);
    let changes: Changes<ffi::ep_barrier_args> = vec![
        ("older struct", |a| a.struct_size -= 8),
        ("no deadline", |a| a.group.timeout_ns = 0),
        ("rank beyond the group", |a| a.group.rank = 3),
    ];
    for (what, change) in changes {
        let mut args = good;
        change(&mut args);
        let refused = LaunchError::BadArgs {
            kernel: Kernel::Barrier,
        };
        assert_eq!(harness::barrier(&args), Err(refused), "{what}");
    }
    check(&world, 2, Order::Fused, &Links::all(case.ranks)).unwrap();
}

#[test]
fn the_oracle_notices_one_wrong_bit() {
    let case = Case {
        precision: Precision::Fp8,
        ..plain()
    };
    let world = fused(case.clone()).check().unwrap();
    let inputs = case.inputs(0);
    let oracle = Oracle::new(&case, 0, &inputs, Links::all(case.ranks));
    let notices = |memory: &Memory, at: u64| {
        let before = memory.word(at);
        memory.set_word(at, before ^ 1 << 33);
        let found = world.with_output(0, 0, |output| oracle.check_dispatch(0, output, POISON));
        memory.set_word(at, before);
        found.is_err()
    };
    let outputs = &world.ranks[0].outputs[0];
    world
        .with_output(0, 0, |output| oracle.check_dispatch(0, output, POISON))
        .unwrap();
    assert!(notices(&outputs.recv_x, 0));
    // The last row is empty, and must stay so.
    assert!(notices(&outputs.recv_x, outputs.recv_x.bytes() as u64 - 8));
    assert!(notices(&outputs.recv_scales, 0));
    assert!(notices(&outputs.recv_count, 0));
    assert!(notices(&outputs.src_info, 0));
    assert!(notices(&outputs.layout_range, 0));
}

#[test]
fn the_oracle_rounds_as_half_does() {
    for high in 0..=u16::MAX {
        for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            let value = f32::from_bits(u32::from(high) << 16 | low);
            let half = half::bf16::from_f32(value).to_bits();
            let expected = if value.is_nan() { 0x7fff } else { half };
            assert_eq!(common::bf16_round(value), expected, "{value:e}");
        }
    }
}
