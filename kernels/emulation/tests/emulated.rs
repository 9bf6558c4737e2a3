//! The CUDA kernels, emulated, against the oracle.

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/contract/mod.rs"]
mod contract;
#[path = "../../tests/harness/mod.rs"]
mod harness;

use std::sync::atomic::{AtomicU32, Ordering};

use std::time::Duration;

use common::{Case, Precision};
use contract::{DISPATCH, Order, Run, plain};
use ep_emulation::EmulatedKernels;
use ep_kernels::{Kernel, LaunchError};
use harness::{Tensors, World};

// A case takes a few hundred times as long as with the host kernels.
const CASES: u32 = 32;
const MOST_RANKS: usize = 4;
const MOST_TOKENS: usize = 20;
const EVERY_LINE_HAS_AN_EPOCH: bool = true;

/// The clock that waits are measured by.
fn clock() -> Duration {
    EmulatedKernels::clock()
}

/// Few, because every lane of each takes its turns.
static MULTIPROCESSORS: AtomicU32 = AtomicU32::new(2);

fn kernels() -> EmulatedKernels {
    EmulatedKernels::on(MULTIPROCESSORS.load(Ordering::Relaxed))
}

/// Other kernels than those for many tokens: blocks share a token, some only send, others only place.
#[test]
fn few_tokens_for_the_blocks_that_there_are() {
    MULTIPROCESSORS.store(8, Ordering::Relaxed);
    for (hidden, precision) in [
        (7168, Precision::Fp8),
        (3584, Precision::Bf16),
        (256, Precision::Fp8Ue8m0),
    ] {
        for order in [Order::Fused, Order::Overlapped] {
            let case = Case {
                hidden,
                precision,
                tokens: vec![3, 0, 1],
                ..plain()
            };
            let run = Run {
                case,
                operations: 4,
                order,
            };
            run.check().unwrap();
        }
    }
}

#[test]
fn a_shape_for_which_shared_memory_is_too_small_is_refused() {
    let case = Case {
        precision: Precision::Fp8,
        ..plain()
    };
    let world = World::new(&case, 1, 1, Duration::from_secs(60));
    let tensors = Tensors::new(&case.inputs(0)[0]);
    // The launcher refuses it before anything is read that these point to.
    let mut args = world.dispatch_args(0, 0, &tensors, DISPATCH);
    args.group.num_ranks = 4;
    args.group.num_experts = 8192;
    args.group.hidden = 65536;
    let too_large = LaunchError::TooLarge {
        kernel: Kernel::Dispatch,
    };
    assert_eq!(harness::dispatch(&args), Err(too_large));
    assert!(too_large.to_string().contains("dispatch bf16"));
    let begun = |part| {
        world.ranks[0]
            .control
            .word(contract::counter(case.ranks, part))
    };
    assert_eq!([begun(0), begun(1)], [0, 0]);
}
