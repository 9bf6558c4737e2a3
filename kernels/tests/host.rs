//! The host kernels against the oracle: what the contract asks of all kernels, and what only these
//! promise.

mod common;
mod contract;
mod harness;

use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

use common::{Case, Links, Oracle, Precision, Weights};
use contract::{COMBINE, DISPATCH, Order, check, fused, plain, sums};
use ep_kernels::{HostKernels, Kernel, LaunchError, ffi};
use harness::{Memory, POISON, Tensors, World};

const CASES: u32 = 128;
const MOST_RANKS: usize = 8;
const MOST_TOKENS: usize = 64;
/// Of what is written at a time, the first word is its epoch.
const EVERY_LINE_HAS_AN_EPOCH: bool = false;

/// The clock that waits are measured by.
fn clock() -> Duration {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed()
}

fn kernels() -> HostKernels {
    HostKernels::default()
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
        // That of receive parts advances as one begins.
        let begun = contract::counter(case.ranks, 1);
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
