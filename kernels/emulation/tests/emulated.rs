//! The CUDA kernels, emulated, against the oracle.

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/contract/mod.rs"]
mod contract;
#[path = "../../tests/harness/mod.rs"]
mod harness;

use ep_emulation::EmulatedKernels;

// A case takes a few hundred times as long as with the host kernels.
const CASES: u32 = 32;
const MOST_RANKS: usize = 4;
const MOST_TOKENS: usize = 20;

/// Two multiprocessors divide the work among blocks. The cases are small; where tokens are few for
/// the blocks there are, others run.
fn kernels() -> EmulatedKernels {
    EmulatedKernels::on(2)
}
