//! The host kernels against the oracle: random shapes, and everything that can go wrong.

mod common;
mod harness;

use std::thread;
use std::time::Duration;

use common::{Case, Links, Odd, Oracle, Precision, Routing, Weights};
use ep_kernels::ffi;
use harness::{Memory, POISON, Tensors, World, bad_entries};
use proptest::prelude::*;

const DISPATCH: u32 = ffi::EP_DISPATCH_SEND | ffi::EP_DISPATCH_RECV;
const COMBINE: u32 = ffi::EP_COMBINE_SEND | ffi::EP_COMBINE_RECV;

/// How operations follow one another on a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
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
enum Step {
    Dispatch(u32),
    Combine(u32),
}

/// Runs all ranks through the operations, each on a thread, and checks every result.
fn check(world: &World, operations: usize, order: Order, links: &Links) -> Result<(), String> {
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

fn run_rank(
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
                    world.ranks[rank].handles[slot]
                        .iter()
                        .for_each(|memory| memory.fill(POISON));
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
fn check_bad_entries(world: &World, rank: usize, oracles: &[Oracle<'_>]) -> Result<(), String> {
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
struct Run {
    case: Case,
    operations: usize,
    order: Order,
}

impl Run {
    fn check(&self) -> Result<World, String> {
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

fn cases() -> impl Strategy<Value = Case> {
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
    let tokens = prop_oneof![1 => Just(0usize), 5 => 0..=6usize, 1 => 7..=64usize];
    let shape = (1..=8usize, 1..=8usize, hidden, 1..=16usize);
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

fn runs() -> impl Strategy<Value = Run> {
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
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_shape_gives_what_the_oracle_says(run in runs()) {
        run.check().map_err(TestCaseError::fail)?;
    }
}
