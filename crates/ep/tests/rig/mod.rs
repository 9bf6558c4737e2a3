//! Ranks that run cases through the facade and compare them with the oracle: as threads, or as
//! processes, on any device.

#![allow(
    dead_code,
    reason = "shared by several test binaries, each of which uses a part"
)]

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ep::driver::{DeviceOrdinal, Driver};
use ep::{
    Buffer, BufferBuilder, CombineInput, Communicator, Config, DType, Device, DispatchInput,
    DispatchOptions, DispatchOutput, Error, Fault, FaultKind, Handle, Operation, PendingCombine,
    PendingDispatch, Phase, Scales, Stream, Tensor,
};

use crate::common::{
    self, BadEntry, Case, Input, Links, Odd, Oracle, Precision, Rng, Routing, Weights,
};

/// What outputs hold before an operation.
pub(crate) const POISON: u8 = 0xa5;

/// Bound on everything that should not take long: generous, because the machine may be busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// In which order dispatches and combines follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// One after the other, each in one launch.
    Fused,
    /// One after the other, send and receive parts apart.
    Split,
    /// Two results alive at once.
    Nested,
    /// Two dispatches sent before the first is received.
    Overlapped,
}

/// A small case that has a bit of everything.
pub(crate) fn case(ranks: usize) -> Case {
    Case {
        ranks,
        experts: 3 * ranks,
        hidden: 256,
        top_k: 4,
        max_tokens: 9,
        tokens: (0..ranks).map(|rank| [7, 0, 9, 1][rank % 4]).collect(),
        routing: Routing::Uniform,
        weights: Weights::AtDispatch,
        precision: Precision::Bf16,
        odd: Odd {
            missing: true,
            out_of_range: false,
            repeated: false,
        },
        specials: false,
        seed: 7,
    }
}

/// The `n`-th case of a group of this size, and how to run it.
pub(crate) fn drawn(ranks: usize, n: u64) -> (Case, Order) {
    let mut rng = Rng::new(&[3, ranks as u64, n]);
    let up_to = |rng: &mut Rng, most: u64| rng.below(most) as usize + 1;
    let tokens: Vec<_> = (0..ranks)
        .map(|_| match rng.below(4) {
            0 => rng.below(2),
            1 => rng.below(200),
            _ => rng.below(40),
        } as usize)
        .collect();
    let spare = rng.below(3) as usize;
    let case = Case {
        ranks,
        experts: ranks * up_to(&mut rng, 12),
        hidden: 128 * up_to(&mut rng, 9),
        top_k: up_to(&mut rng, 16),
        max_tokens: (tokens.iter().max().unwrap() + spare).max(1),
        tokens,
        routing: rng.pick(&[Routing::Uniform, Routing::Zipf, Routing::Hot, Routing::One]),
        weights: rng.pick(&[Weights::None, Weights::AtDispatch, Weights::AtCombine]),
        precision: rng.pick(&[
            Precision::Bf16,
            Precision::Fp8,
            Precision::Fp8Pow2,
            Precision::Fp8Ue8m0,
        ]),
        odd: Odd {
            missing: rng.below(2) == 0,
            out_of_range: rng.below(4) == 0,
            repeated: rng.below(4) == 0,
        },
        specials: rng.below(2) == 0,
        seed: rng.next(),
    };
    let order = rng.pick(&[Order::Fused, Order::Split, Order::Nested, Order::Overlapped]);
    (case, order)
}

pub(crate) fn config(case: &Case) -> Config {
    let number = |value: usize| u32::try_from(value).unwrap();
    Config::new(
        number(case.hidden),
        number(case.experts),
        number(case.max_tokens),
        number(case.top_k),
    )
    .with_sends_in_flight(2)
}

pub(crate) fn options(precision: Precision) -> DispatchOptions {
    match precision {
        Precision::Bf16 => DispatchOptions::bf16(),
        Precision::Fp8 => DispatchOptions::fp8(Scales::F32),
        Precision::Fp8Pow2 => DispatchOptions::fp8(Scales::Pow2),
        Precision::Fp8Ue8m0 => DispatchOptions::fp8(Scales::Ue8m0),
    }
}

/// Runs every rank on a thread of its own.
pub(crate) fn threads<T: Send>(ranks: usize, rank: impl Fn(Communicator) -> T + Sync) -> Vec<T> {
    let rank = &rank;
    thread::scope(|scope| {
        let running: Vec<_> = Communicator::threads(ranks.try_into().unwrap())
            .into_iter()
            .map(|comm| scope.spawn(move || rank(comm)))
            .collect();
        running
            .into_iter()
            .map(|rank| rank.join().expect("a rank panicked"))
            .collect()
    })
}

/// What went wrong on any rank.
pub(crate) fn all_well(outcomes: Vec<Result<(), String>>) -> Result<(), String> {
    let failed = |(rank, outcome): (usize, Result<(), String>)| {
        let error = outcome.err()?;
        Some(format!("\nrank {rank}: {error}"))
    };
    let errors: String = outcomes
        .into_iter()
        .enumerate()
        .filter_map(failed)
        .collect();
    if errors.is_empty() {
        Ok(())
    } else {
        Err(errors)
    }
}

/// Fails a rank in words.
pub(crate) fn explain(error: impl std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// A rank's part of a case.
pub(crate) struct Rank<'c> {
    pub(crate) buffer: Buffer,
    pub(crate) stream: Stream,
    case: &'c Case,
}

/// The tensors of one operation.
pub(crate) struct Tensors {
    pub(crate) x: Tensor,
    pub(crate) topk_idx: Tensor,
    pub(crate) topk_weights: Tensor,
    pub(crate) received: DispatchOutput,
    y: Tensor,
    pub(crate) out: Tensor,
}

impl<'c> Rank<'c> {
    pub(crate) fn new(device: &Device, comm: &Communicator, case: &'c Case) -> Result<Self, Error> {
        Self::with(device, comm, case, |builder| builder)
    }

    pub(crate) fn with(
        device: &Device,
        comm: &Communicator,
        case: &'c Case,
        set: impl FnOnce(BufferBuilder) -> BufferBuilder,
    ) -> Result<Self, Error> {
        let builder = Buffer::builder(device, comm, config(case))
            .deadline(PATIENCE)
            .timeout(PATIENCE);
        Ok(Self {
            buffer: set(builder).build()?,
            stream: Stream::new(device)?,
            case,
        })
    }

    /// A rank of a buffer that has been made.
    pub(crate) fn of(buffer: Buffer, stream: Stream, case: &'c Case) -> Self {
        Self {
            buffer,
            stream,
            case,
        }
    }

    /// The same rank on another stream.
    pub(crate) fn on(self, stream: Stream) -> Self {
        Self { stream, ..self }
    }

    pub(crate) fn rank(&self) -> usize {
        self.buffer.rank() as usize
    }

    /// Runs operations `0..operations` in an order, compares each, and then what was reported.
    pub(crate) fn run(&self, operations: usize, order: Order) -> Result<(), String> {
        match order {
            Order::Fused => (0..operations).try_for_each(|n| self.fused(n)),
            Order::Split => (0..operations).try_for_each(|n| self.split(n)),
            Order::Nested => (0..operations)
                .step_by(2)
                .try_for_each(|n| self.nested(n, n + 1)),
            Order::Overlapped => (0..operations)
                .step_by(2)
                .try_for_each(|n| self.overlapped(n, n + 1)),
        }
    }

    fn fused(&self, n: usize) -> Result<(), String> {
        let inputs = self.case.inputs(n);
        let oracle = self.oracle(n, &inputs);
        let mut tensors = self.tensors(&oracle).map_err(explain)?;
        let handle = self.dispatch(&mut tensors).map_err(explain)?;
        self.check_dispatch(&oracle, &handle, &mut tensors)?;
        self.combine(handle, &mut tensors).map_err(explain)?;
        self.check_combine(&oracle, &tensors)
    }

    fn split(&self, n: usize) -> Result<(), String> {
        let inputs = self.case.inputs(n);
        let oracle = self.oracle(n, &inputs);
        let mut tensors = self.tensors(&oracle).map_err(explain)?;
        let pending = self.dispatch_send(&tensors).map_err(explain)?;
        let handle = self
            .dispatch_receive(pending, &mut tensors)
            .map_err(explain)?;
        self.check_dispatch(&oracle, &handle, &mut tensors)?;
        let pending = self.combine_send(handle, &tensors).map_err(explain)?;
        self.combine_receive(pending, &mut tensors)
            .map_err(explain)?;
        self.check_combine(&oracle, &tensors)
    }

    fn nested(&self, a: usize, b: usize) -> Result<(), String> {
        let inputs = [self.case.inputs(a), self.case.inputs(b)];
        let (first, second) = (self.oracle(a, &inputs[0]), self.oracle(b, &inputs[1]));
        let mut outer = self.tensors(&first).map_err(explain)?;
        let mut inner = self.tensors(&second).map_err(explain)?;
        let kept = self.dispatch(&mut outer).map_err(explain)?;
        let handle = self.dispatch(&mut inner).map_err(explain)?;
        self.check_dispatch(&second, &handle, &mut inner)?;
        self.combine(handle, &mut inner).map_err(explain)?;
        self.check_combine(&second, &inner)?;
        self.check_dispatch(&first, &kept, &mut outer)?;
        self.combine(kept, &mut outer).map_err(explain)?;
        self.check_combine(&first, &outer)
    }

    fn overlapped(&self, a: usize, b: usize) -> Result<(), String> {
        let inputs = [self.case.inputs(a), self.case.inputs(b)];
        let (first, second) = (self.oracle(a, &inputs[0]), self.oracle(b, &inputs[1]));
        let mut one = self.tensors(&first).map_err(explain)?;
        let mut other = self.tensors(&second).map_err(explain)?;
        let sent = self.dispatch_send(&one).map_err(explain)?;
        let next = self.dispatch_send(&other).map_err(explain)?;
        let handle = self.dispatch_receive(sent, &mut one).map_err(explain)?;
        self.check_dispatch(&first, &handle, &mut one)?;
        let later = self.dispatch_receive(next, &mut other).map_err(explain)?;
        self.check_dispatch(&second, &later, &mut other)?;
        let sent = self.combine_send(handle, &one).map_err(explain)?;
        let next = self.combine_send(later, &other).map_err(explain)?;
        self.combine_receive(sent, &mut one).map_err(explain)?;
        self.check_combine(&first, &one)?;
        self.combine_receive(next, &mut other).map_err(explain)?;
        self.check_combine(&second, &other)
    }

    pub(crate) fn oracle<'o>(&self, operation: usize, inputs: &'o [Input]) -> Oracle<'o>
    where
        'c: 'o,
    {
        Oracle::new(self.case, operation, inputs, Links::all(self.case.ranks))
    }

    /// The tensors of this rank for an operation; what is written is poisoned.
    pub(crate) fn tensors(&self, oracle: &Oracle<'_>) -> Result<Tensors, Error> {
        let (case, device) = (self.case, self.buffer.device());
        let input = &oracle.inputs[self.rank()];
        let (tokens, hidden, top_k) = (input.tokens, case.hidden, case.top_k);
        let mut tensors = Tensors {
            x: Tensor::from_host(device, DType::Bf16, [tokens, hidden], &input.x)?,
            topk_idx: Tensor::from_host(device, DType::I64, [tokens, top_k], &input.topk_idx)?,
            topk_weights: Tensor::from_host(
                device,
                DType::F32,
                [tokens, top_k],
                &input.topk_weights,
            )?,
            received: self.buffer.new_output(&options(case.precision))?,
            y: Tensor::new(
                device,
                DType::Bf16,
                [case.local_experts(), case.rows_per_expert(), hidden],
            )?,
            out: Tensor::new(device, DType::Bf16, [tokens, hidden])?,
        };
        self.poison(&mut tensors)?;
        Ok(tensors)
    }

    pub(crate) fn poison(&self, tensors: &mut Tensors) -> Result<(), Error> {
        tensors.received.fill(POISON, &self.stream)?;
        tensors.out.fill(POISON, &self.stream)
    }

    fn input<'t>(&self, tensors: &'t Tensors) -> DispatchInput<'t> {
        let with_weights = self.case.weights == Weights::AtDispatch;
        DispatchInput {
            x: tensors.x.view(),
            topk_idx: tensors.topk_idx.view(),
            topk_weights: with_weights.then(|| tensors.topk_weights.view()),
        }
    }

    pub(crate) fn output<'t>(&self, tensors: &'t Tensors) -> CombineInput<'t> {
        let input = CombineInput::new(&tensors.y);
        match self.case.weights {
            Weights::AtCombine => input.with_weights(&tensors.topk_weights),
            _ => input,
        }
    }

    pub(crate) fn dispatch(&self, tensors: &mut Tensors) -> Result<Handle, Error> {
        let with_weights = self.case.weights == Weights::AtDispatch;
        let input = DispatchInput {
            x: tensors.x.view(),
            topk_idx: tensors.topk_idx.view(),
            topk_weights: with_weights.then(|| tensors.topk_weights.view()),
        };
        let options = options(self.case.precision);
        self.buffer
            .dispatch(&self.stream, &input, &options, &mut tensors.received)
    }

    pub(crate) fn dispatch_send(&self, tensors: &Tensors) -> Result<PendingDispatch, Error> {
        let options = options(self.case.precision);
        self.buffer
            .dispatch_send(&self.stream, &self.input(tensors), &options)
    }

    pub(crate) fn dispatch_receive(
        &self,
        pending: PendingDispatch,
        tensors: &mut Tensors,
    ) -> Result<Handle, Error> {
        let received = &mut tensors.received;
        Ok(self
            .buffer
            .dispatch_receive(&self.stream, pending, received)?)
    }

    pub(crate) fn combine(&self, handle: Handle, tensors: &mut Tensors) -> Result<(), Error> {
        let input = CombineInput::new(&tensors.y);
        let input = match self.case.weights {
            Weights::AtCombine => input.with_weights(&tensors.topk_weights),
            _ => input,
        };
        Ok(self
            .buffer
            .combine(&self.stream, handle, &input, &mut tensors.out)?)
    }

    pub(crate) fn combine_send(
        &self,
        handle: Handle,
        tensors: &Tensors,
    ) -> Result<PendingCombine, Error> {
        Ok(self
            .buffer
            .combine_send(&self.stream, handle, &self.output(tensors))?)
    }

    pub(crate) fn combine_receive(
        &self,
        pending: PendingCombine,
        tensors: &mut Tensors,
    ) -> Result<(), Error> {
        let out = &mut tensors.out;
        Ok(self.buffer.combine_receive(&self.stream, pending, out)?)
    }

    /// Compares what a dispatch gave and reported, and runs the experts.
    pub(crate) fn check_dispatch(
        &self,
        oracle: &Oracle<'_>,
        handle: &Handle,
        tensors: &mut Tensors,
    ) -> Result<(), String> {
        self.stream.synchronize().map_err(explain)?;
        self.compare_dispatch(oracle, tensors)?;
        let status = self.buffer.status_of(handle).map_err(explain)?;
        let mut bad: Vec<_> = status
            .faults
            .iter()
            .map(|fault| match fault.kind {
                FaultKind::ExpertOutOfRange { token, id } => Ok(BadEntry::Range { token, id }),
                FaultKind::ExpertRepeated { token, id } => Ok(BadEntry::Repeated { token, id }),
                _ => Err(fault.to_string()),
            })
            .collect::<Result<_, _>>()?;
        bad.sort();
        let expected = oracle.bad_entries(self.rank());
        // Once more have been written than the ring keeps, the oldest are missing.
        let newest = self.buffer.faults().map_err(explain)?.last().copied();
        let complete = newest.is_none_or(|newest| newest.sequence <= 64);
        if complete && bad != expected || bad.iter().any(|entry| !expected.contains(entry)) {
            return Err(format!("reported {bad:?}, not {expected:?}"));
        }
        self.experts(oracle, tensors).map_err(explain)
    }

    /// Compares what a dispatch gave.
    pub(crate) fn compare_dispatch(
        &self,
        oracle: &Oracle<'_>,
        tensors: &Tensors,
    ) -> Result<(), String> {
        let read = || {
            let received = &tensors.received;
            let recv_x = match self.case.precision {
                Precision::Bf16 => {
                    let values = received.recv_x.copy_to_host::<u16>()?;
                    values
                        .iter()
                        .flat_map(|value| value.to_le_bytes())
                        .collect()
                }
                _ => received.recv_x.copy_to_host::<u8>()?,
            };
            let recv_scales = match (&received.recv_scales, self.case.precision) {
                (None, _) => Vec::new(),
                (Some(scales), Precision::Fp8Ue8m0) => {
                    let words = scales.copy_to_host::<i32>()?;
                    words.into_iter().map(i32::cast_unsigned).collect()
                }
                (Some(scales), _) => {
                    let words = scales.copy_to_host::<f32>()?;
                    words.into_iter().map(f32::to_bits).collect()
                }
            };
            let recv_count = received.recv_count.copy_to_host::<i32>()?;
            let src_info = received.src_info.copy_to_host::<i32>()?;
            let layout_range = received.layout_range.copy_to_host::<i64>()?;
            Ok::<_, Error>((recv_x, recv_scales, recv_count, src_info, layout_range))
        };
        let (recv_x, recv_scales, recv_count, src_info, layout_range) = read().map_err(explain)?;
        let output = common::DispatchOutput {
            recv_x: &recv_x,
            recv_scales: &recv_scales,
            recv_count: &recv_count,
            src_info: &src_info,
            layout_range: &layout_range,
        };
        oracle.check_dispatch(self.rank(), &output, POISON)
    }

    /// Puts in place what the experts give.
    pub(crate) fn experts(&self, oracle: &Oracle<'_>, tensors: &mut Tensors) -> Result<(), Error> {
        tensors
            .y
            .copy_from_host(&oracle.expert_outputs(self.rank()))
    }

    /// Compares what a combine gave.
    pub(crate) fn compare_combine(
        &self,
        oracle: &Oracle<'_>,
        tensors: &Tensors,
    ) -> Result<(), String> {
        let out = tensors.out.copy_to_host::<u16>().map_err(explain)?;
        oracle.check_combine(self.rank(), &out)
    }

    /// Compares what a combine gave, and that it reported nothing.
    pub(crate) fn check_combine(
        &self,
        oracle: &Oracle<'_>,
        tensors: &Tensors,
    ) -> Result<(), String> {
        self.stream.synchronize().map_err(explain)?;
        self.compare_combine(oracle, tensors)?;
        match self.buffer.status().map_err(explain)? {
            Some(status) if status.operation == Operation::Combine && status.is_ok() => Ok(()),
            other => Err(format!("the last operation's status is {other:?}")),
        }
    }
}

/// A rank of a group of which rank 0 takes part in a dispatch and then in no combine, with which its
/// weights would come. The last rank waits for these, because it has rows of rank 0; ranks that it
/// sends to are not to wait with it.
pub(crate) fn miss_weights_of_rank_0(device: &Device, comm: &Communicator) {
    let short = Duration::from_secs(1);
    let case = Case {
        top_k: 2,
        tokens: vec![9; comm.size() as usize],
        weights: Weights::AtCombine,
        odd: Odd::default(),
        ..case(comm.size() as usize)
    };
    let local = case.local_experts();
    let last = case.ranks - 1;
    let mut inputs = case.inputs(0);
    for (rank, input) in inputs.iter_mut().enumerate() {
        // Any two experts of the last rank or, where none is rank 0's, of the ranks but the first.
        let from = if rank == 0 { last } else { 1 } * local;
        let experts = case.experts - from;
        for (i, id) in input.topk_idx.iter_mut().enumerate() {
            *id = (from + i % experts) as i64;
        }
    }
    let rank = Rank::with(device, comm, &case, |b| b.timeout(short)).unwrap();
    let oracle = rank.oracle(0, &inputs);
    let mut tensors = rank.tensors(&oracle).unwrap();
    let handle = rank.dispatch(&mut tensors).unwrap();
    rank.check_dispatch(&oracle, &handle, &mut tensors).unwrap();
    comm.barrier(PATIENCE).unwrap();
    if rank.rank() != 0 {
        let start = Instant::now();
        rank.combine(handle, &mut tensors).unwrap();
        rank.stream.synchronize().unwrap();
        let spent = start.elapsed();
        rank.compare_combine(&oracle, &tensors).unwrap();
        let status = rank.buffer.status().unwrap().unwrap();
        if rank.rank() == last {
            let [fault] = status.faults[..] else {
                panic!("{status:?}");
            };
            assert_eq!((fault.rank, fault.phase), (0, Phase::Weights));
            assert!(spent >= short, "{spent:?}");
        } else {
            assert!(status.is_ok(), "{status:?}");
            assert!(spent < short / 2, "{spent:?}");
        }
    }
    comm.barrier(PATIENCE).unwrap();
    rank.buffer.close().unwrap();
}

/// The last rank does not come; the others learn of it and call off what waits for it. Then all begin
/// anew.
pub(crate) fn call_off_what_waits_for_the_last(device: &Device, comm: &Communicator) {
    let case = case(comm.size() as usize);
    let last = comm.size() - 1;
    let long = Duration::from_secs(600);
    let mut rank = Rank::with(device, comm, &case, |b| b.timeout(long)).unwrap();
    comm.barrier(PATIENCE).unwrap();
    if comm.rank() != last {
        let inputs = case.inputs(0);
        let oracle = rank.oracle(0, &inputs);
        let mut tensors = rank.tensors(&oracle).unwrap();
        let start = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(100));
                rank.buffer.abort().unwrap();
            });
            // GPUs have all of them enqueued by then. On the simulator the first does not return.
            for _ in 0..20 {
                let enqueued = rank
                    .dispatch(&mut tensors)
                    .and_then(|handle| rank.combine(handle, &mut tensors));
                match enqueued {
                    Ok(()) => {}
                    Err(Error::Aborted { .. }) => break,
                    Err(error) => panic!("{error}"),
                }
            }
            rank.stream.synchronize().unwrap();
        });
        assert!(start.elapsed() < PATIENCE);
        let faults = rank.buffer.faults().unwrap();
        let is_aborted = |fault: &Fault| fault.kind == FaultKind::Aborted;
        assert!(faults.iter().all(is_aborted), "{faults:?}");
        assert!(faults.iter().any(|fault| fault.rank == last), "{faults:?}");
        let refused = rank.dispatch(&mut tensors).unwrap_err();
        assert!(matches!(refused, Error::Aborted { .. }), "{refused}");
    }
    comm.barrier(PATIENCE).unwrap();
    let members: Vec<_> = (0..comm.size()).collect();
    rank.buffer.refresh(comm, &members).unwrap();
    rank.run(2, Order::Nested).unwrap();
    rank.buffer.close().unwrap();
}

/// A group of processes: this executable again, for one test.
pub(crate) struct Processes {
    ranks: Vec<Child>,
}

const RANK: &str = "EP_TEST_RANK";
const KEY: &str = "EP_TEST_KEY";
const TASK: &str = "EP_TEST_TASK";

/// What a process was started for.
#[derive(Clone, Debug)]
pub(crate) struct Task {
    pub(crate) rank: u32,
    /// Tells runs apart: the same for all ranks of one.
    pub(crate) key: u64,
    pub(crate) words: Vec<String>,
}

impl Task {
    /// In a rank's process: what to do.
    pub(crate) fn of_this_process() -> Option<Self> {
        let read = |name| std::env::var(name).ok();
        Some(Self {
            rank: read(RANK)?.parse().unwrap(),
            key: read(KEY)?.parse().unwrap(),
            words: read(TASK)?.split(' ').map(str::to_owned).collect(),
        })
    }

    /// Where the ranks meet.
    pub(crate) fn meet(&self, size: usize) -> Result<Communicator, Error> {
        let size = u32::try_from(size).unwrap();
        let name = format!("@ep-test-{}", self.key);
        Communicator::unix(name, self.rank, size, PATIENCE)
    }
}

impl Processes {
    /// Starts ranks `0..ranks`. `set` adds to a rank's environment.
    pub(crate) fn start(
        test: &str,
        ranks: usize,
        task: &[&str],
        set: impl Fn(usize, &mut Command),
    ) -> Self {
        static RUNS: AtomicU64 = AtomicU64::new(0);
        let run = RUNS.fetch_add(1, Ordering::Relaxed);
        let key = u64::from(std::process::id()) << 20 | run;
        let ranks = (0..ranks)
            .map(|rank| {
                let mut command = Command::new(std::env::current_exe().unwrap());
                command
                    .args(["--exact", test, "--nocapture"])
                    .env(RANK, rank.to_string())
                    .env(KEY, key.to_string())
                    .env(TASK, task.join(" "))
                    .stdin(Stdio::null())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped());
                set(rank, &mut command);
                command.spawn().unwrap()
            })
            .collect();
        Self { ranks }
    }

    /// Waits until all have ended, well.
    pub(crate) fn succeed(self) {
        self.survive(usize::MAX);
    }

    /// Waits until all have ended: `victim` badly, the others well.
    pub(crate) fn survive(mut self, victim: usize) {
        for (rank, child) in self.ranks.drain(..).enumerate() {
            let output = child.wait_with_output().unwrap();
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let (told, warned) = (text(&output.stdout), text(&output.stderr));
            let well = output.status.success() && told.contains("1 passed");
            assert_eq!(
                well,
                rank != victim,
                "rank {rank}, {}\n{told}{warned}",
                output.status
            );
        }
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for child in &mut self.ranks {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The device of a rank that has a driver of its own.
pub(crate) fn host_device(driver: Arc<dyn Driver>, ordinal: u32) -> Device {
    Device::host(driver, DeviceOrdinal(ordinal))
}
