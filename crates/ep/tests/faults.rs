//! Fault sweep of the facade: every driver call of every public operation fails once, alone and
//! together with each clean-up call that then follows, on every kind of memory.
//!
//! Two ranks take part; the calls of rank 1 fail. After each case the error names the call that
//! failed first, a clean-up call that failed too has been told, nothing is held but what the driver
//! refused to take back, no rank has waited for one that did not come, and the same buffer, or a new
//! one among the same ranks, dispatches and combines.

#[path = "../../../kernels/tests/common/mod.rs"]
mod common;
mod rig;

use std::fmt::{self, Write};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::Duration;

use ep::driver::{Call, DeviceOrdinal, Driver, Status};
use ep::{
    BackendKind, Buffer, Choice, CombineInput, Communicator, Config, DType, Device, DispatchInput,
    DispatchOptions, Error, Event, Handle, Scales, Stream, Tensor,
};
use ep_sim::{Cluster, Entry, FaultPlan, IpcNamespace, Outcome, SimDriver};
use parking_lot::Mutex;
use tracing::field::{Field, Visit};
use tracing::{Metadata, span};

use common::Case;
use rig::{Order, PATIENCE, Rank, config, explain};

// ---- Collective operations ----

#[test]
fn build_with_plain_memory() {
    build(&Place::threads());
    build(&Place::processes(BackendKind::Malloc));
}

#[test]
fn build_with_descriptors() {
    build(&Place::processes(BackendKind::PosixFd));
}

#[test]
fn build_with_fabric_memory() {
    build(&Place::processes(BackendKind::Fabric));
}

/// The ranks cannot import each other's memory, and try another kind.
#[test]
fn build_at_the_second_attempt() {
    build(&Place::second_attempt());
}

fn build(place: &Place) {
    let clean = Group::new(place);
    let probed = clean.probe();
    let built = clean.build(FaultPlan::none());
    let calls = built.calls.clone();
    clean.end(built.all_well());
    // What the probe is refused of memory that the group does not use decides nothing. Nor does it
    // matter how an attempt fails that is given up, and whether it is left in order. Where NVML cannot
    // tell what joins GPUs, they are taken for joined.
    let mut sweep = Sweep::new("build", place, |n, call| {
        let given_up = is_release(call) || matches!(call, Call::IpcOpen | Call::CopyToDevice);
        n < probed || call == Call::PeerLinks || place.attempts > 1 && given_up
    });
    sweep.probed = probed;
    for n in 0..calls.len() {
        let group = Group::new(place);
        sweep.cases(n, &calls, |plan| {
            let step = group.build(plan);
            let told = step.told();
            let ranks = match step.successes() {
                Some(ranks) => ranks,
                None => {
                    group.assert_nothing_left(&told);
                    group.build(FaultPlan::none()).all_well()
                }
            };
            group.run(&ranks);
            group.close(ranks, FaultPlan::none()).all_well();
            group.assert_nothing_left(&told);
            told
        });
    }
    sweep.end();
}

#[test]
fn refresh() {
    for place in Place::all() {
        let clean = Group::new(&place);
        let mut ranks = clean.build(FaultPlan::none()).all_well();
        clean.run(&ranks);
        let refreshed = clean.refresh(&mut ranks, FaultPlan::none());
        let calls = refreshed.calls.clone();
        refreshed.all_well();
        clean.end(ranks);
        // The group is connected anew even where a mapping from before is stuck, or NVML cannot tell
        // what joins GPUs; that is logged.
        let mut sweep = Sweep::new("refresh", &place, |_, call| {
            call == Call::PeerLinks || is_release(call) && call != Call::StreamDestroy
        });
        for n in 0..calls.len() {
            let group = Group::new(&place);
            let mut ranks = group.build(FaultPlan::none()).all_well();
            let held = group.held();
            sweep.cases(n, &calls, |plan| {
                // A refresh waits for the stream of the operation before it.
                group.run(&ranks);
                let step = group.refresh(&mut ranks, plan);
                let told = step.told();
                if step.successes().is_none() {
                    group.refresh(&mut ranks, FaultPlan::none()).all_well();
                }
                group.run(&ranks);
                // Less where what is stuck has a descriptor in common with what is in use.
                assert!(group.held() <= held, "{told}");
                told
            });
            // A buffer that could not be refreshed can be left all the same.
            group.refresh(&mut ranks, Fault::new(&calls, n, FIRST).plan());
            group.end(ranks);
        }
        sweep.end();
    }
}

#[test]
fn close() {
    leave("close", |group, ranks, plan| group.close(ranks, plan));
}

/// What goes wrong when a buffer is dropped can only be logged.
#[test]
fn drop_instead_of_close() {
    leave("drop", |group, ranks, plan| group.drop(ranks, plan));
}

type Leave = fn(&Group<'_>, [Rank<'static>; RANKS], FaultPlan) -> Step<()>;

fn leave(operation: &'static str, leave: Leave) {
    for place in Place::all() {
        let clean = Group::new(&place);
        let ranks = clean.build(FaultPlan::none()).all_well();
        clean.run(&ranks);
        let left = leave(&clean, ranks, FaultPlan::none());
        let calls = left.calls.clone();
        left.all_well();
        let mut sweep = Sweep::new(operation, &place, |_, _| operation == "drop");
        for n in 0..calls.len() {
            let group = Group::new(&place);
            sweep.cases(n, &calls, |plan| {
                let ranks = group.build(FaultPlan::none()).all_well();
                group.run(&ranks);
                let told = leave(&group, ranks, plan).told();
                group.assert_nothing_left(&told);
                told
            });
            let ranks = group.build(FaultPlan::none()).all_well();
            group.run(&ranks);
            group.end(ranks);
        }
        sweep.end();
    }
}

// ---- Operations of one rank ----

/// Operations launch and make no driver call. Their caller makes some when it waits for them and
/// reads what they gave; if one fails, the results are still there.
#[test]
fn dispatch_and_combine() {
    for place in Place::all() {
        let group = Group::new(&place);
        let ranks = group.build(FaultPlan::none()).all_well();
        let calls = group.launch(&ranks);
        println!("dispatch, combine and barrier, {place}: {calls} driver calls to fail");
        for operation in ["reading a dispatch", "reading a combine"] {
            let clean = group.exchange(&ranks, operation, FaultPlan::none());
            assert_eq!(clean.said[BAD], Ok(()));
            let mut sweep = Sweep::new(operation, &place, |_, _| false);
            for n in 0..clean.calls.len() {
                sweep.cases(n, &clean.calls, |plan| {
                    group.exchange(&ranks, operation, plan)
                });
            }
            sweep.end();
        }
        group.end(ranks);
    }
}

#[test]
fn reports() {
    for place in Place::all() {
        let group = Group::new(&place);
        let ranks = group.build(FaultPlan::none()).all_well();
        group.run(&ranks);
        let mut cases = 0;
        // The ring is polled, and so not in the journal.
        loop {
            let plan = FaultPlan::fail_nth_of(Call::HostLoad, cases, FIRST);
            group.sims[BAD].inject(plan);
            let Err(error) = ranks[BAD].buffer.status().map_err(explain) else {
                break;
            };
            assert!(names(&error, Call::HostLoad, FIRST), "{error}");
            cases += 1;
        }
        println!("status, {place}: {cases} cases");
        assert!(cases >= 64, "{cases}");
        group.run(&ranks);
        group.end(ranks);
    }
}

/// Tensors, streams and events are of one rank; dropped, they can only log what went wrong.
#[test]
fn tensors_streams_and_events() {
    let place = Place::processes(BackendKind::Malloc);
    let mut sweep = Sweep::new("tensors, streams and events", &place, |_, call| {
        is_release(call)
    });
    let group = Group::new(&place);
    let ranks = group.build(FaultPlan::none()).all_well();
    let rank = &ranks[BAD];
    let part = || {
        let device = rank.buffer.device();
        let [stream, other] = [Stream::new(device)?, Stream::new(device)?];
        let [start, end] = [Event::new(device)?, Event::new(device)?];
        let inputs = CASE.inputs(0);
        let oracle = rank.oracle(0, &inputs);
        let mut tensors = rank.tensors(&oracle)?;
        start.record(&stream)?;
        tensors.out.fill(1, &stream)?;
        end.record(&stream)?;
        other.wait(&end)?;
        other.synchronize()?;
        end.synchronize()?;
        end.elapsed_us(&start)?;
        tensors.out.copy_to_host::<u16>()?;
        Ok::<_, ep::Error>(())
    };
    let part = || part().map_err(explain);
    let held = group.held();
    let clean = group.alone(FaultPlan::none(), part);
    assert_eq!(clean.said[BAD], Ok(()));
    for n in 0..clean.calls.len() {
        sweep.cases(n, &clean.calls, |plan| {
            let told = group.alone(plan, part);
            assert_eq!(group.held(), held, "{told}");
            assert_eq!(group.alone(FaultPlan::none(), part).said[BAD], Ok(()));
            told
        });
    }
    group.run(&ranks);
    group.end(ranks);
    sweep.end();
}

/// `?` gives a refused operation up. That is told, and what was given is gone as if it were
/// dropped.
#[test]
fn a_refused_operation_that_is_given_up_is_logged() {
    let driver = SimDriver::new(&Cluster::hgx_h200(1), 0, &[0]);
    let device = Device::host(driver.clone(), DeviceOrdinal(0));
    let comm = Communicator::threads(1).remove(0);
    let config = Config::new(128, 1, 1, 1);
    let buffer = Buffer::builder(&device, &comm, config).build().unwrap();
    let stream = Stream::new(&device).unwrap();
    let x = Tensor::from_host(&device, DType::Bf16, [1, 128], &[0_u16; 128]).unwrap();
    let topk_idx = Tensor::from_host(&device, DType::I64, [1, 1], &[0_i64]).unwrap();
    let input = DispatchInput {
        x: x.view(),
        topk_idx: topk_idx.view(),
        topk_weights: None,
    };
    let options = DispatchOptions::bf16();
    let mut received = buffer.new_output(&options).unwrap();
    let mut wrong = Tensor::new(&device, DType::F32, [1, 128]).unwrap();

    // More often than there are slots.
    for _ in 0..=config.slots {
        let handle = buffer
            .dispatch(&stream, &input, &options, &mut received)
            .unwrap();
        let (given_up, log) = logged(|| -> Result<(), Error> {
            let y = CombineInput::new(&received.recv_x);
            Ok(buffer.combine(&stream, handle, &y, &mut wrong)?)
        });
        assert!(matches!(given_up, Err(Error::Argument { .. })));
        assert!(log.contains("WARN"), "{log}");
        assert!(log.contains("given up") && log.contains("Handle"), "{log}");
    }

    let mut wrong = buffer
        .new_output(&DispatchOptions::fp8(Scales::F32))
        .unwrap();
    let pending = buffer.dispatch_send(&stream, &input, &options).unwrap();
    let (given_up, log) = logged(|| -> Result<Handle, Error> {
        Ok(buffer.dispatch_receive(&stream, pending, &mut wrong)?)
    });
    assert!(matches!(given_up, Err(Error::Argument { .. })));
    assert!(log.contains("PendingDispatch"), "{log}");
    assert!(matches!(
        buffer.dispatch(&stream, &input, &options, &mut received),
        Err(Error::Abandoned { .. })
    ));
    buffer.close().unwrap();
}

// ---- Groups ----

const RANKS: usize = 2;

/// The rank whose calls fail.
const BAD: usize = 1;

/// Small, and a bit of everything.
static CASE: LazyLock<Case> = LazyLock::new(|| Case {
    hidden: 128,
    max_tokens: 3,
    tokens: vec![3, 2],
    top_k: 2,
    ..rig::case(RANKS)
});

/// Where two ranks run, and on which memory.
struct Place {
    name: &'static str,
    cluster: Cluster,
    choice: Choice,
    /// What they end up with.
    kind: BackendKind,
    /// Whether they are threads of one process.
    threads: bool,
    /// How often they try to connect.
    attempts: usize,
}

impl Place {
    fn all() -> [Self; 4] {
        let [malloc, posix_fd, fabric] = [
            BackendKind::Malloc,
            BackendKind::PosixFd,
            BackendKind::Fabric,
        ]
        .map(Self::processes);
        [Self::threads(), malloc, posix_fd, fabric]
    }

    /// Each rank is a process, as its driver sees it.
    fn processes(kind: BackendKind) -> Self {
        let cluster = match kind {
            BackendKind::Fabric => Cluster::gb200_nvl72(1),
            _ => Cluster::hgx_h200(2),
        };
        Self {
            name: kind.name(),
            cluster,
            choice: Choice::Force(kind),
            kind,
            threads: false,
            attempts: 1,
        }
    }

    /// Threads use each other's plain memory itself.
    fn threads() -> Self {
        Self {
            name: "malloc among threads",
            threads: true,
            ..Self::processes(BackendKind::Malloc)
        }
    }

    /// CUDA IPC is refused between containers, which is found by importing.
    fn second_attempt() -> Self {
        let place = Self::processes(BackendKind::PosixFd);
        let private = |node: &mut ep_sim::Node| node.ipc_namespace = IpcNamespace::Private;
        Self {
            name: "posix_fd after malloc",
            cluster: place.cluster.map_nodes(private),
            choice: Choice::Auto,
            attempts: 2,
            ..place
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// Two ranks that stay together for several buffers.
struct Group<'p> {
    place: &'p Place,
    sims: [Arc<SimDriver>; RANKS],
    comms: [Communicator; RANKS],
    streams: [Stream; RANKS],
}

impl<'p> Group<'p> {
    fn new(place: &'p Place) -> Self {
        let cluster = &place.cluster;
        let sims = match place.threads {
            true => {
                let shared = SimDriver::new(cluster, 0, &[0, 1]);
                [Arc::clone(&shared), shared]
            }
            false => [0, 1].map(|rank| SimDriver::for_rank(cluster, rank).unwrap()),
        };
        let streams = [0, 1].map(|rank| {
            let device = Device::host(sims[rank].clone(), ordinal(place, rank));
            Stream::new(&device).unwrap()
        });
        Self {
            place,
            sims,
            comms: Communicator::threads(2).try_into().unwrap(),
            streams,
        }
    }

    /// How many calls the probe makes.
    fn probe(&self) -> usize {
        let driver: Arc<dyn Driver> = self.sims[BAD].clone();
        let before = self.calls().len();
        ep::alloc::probe(&driver, self.ordinal(BAD), &Default::default());
        self.calls().len() - before
    }

    fn build(&self, plan: FaultPlan) -> Step<Rank<'static>> {
        self.step(plan, [0, 1], |rank| {
            let stream = self.streams[rank].clone();
            let buffer = Buffer::builder(stream.device(), &self.comms[rank], config(&CASE))
                .alloc(self.place.choice)
                .deadline(PATIENCE)
                .timeout(PATIENCE)
                .build()
                .map_err(explain)?;
            assert_eq!(buffer.plan().backend, self.place.kind);
            Ok(Rank::of(buffer, stream, &CASE))
        })
    }

    fn refresh(&self, ranks: &mut [Rank<'_>; RANKS], plan: FaultPlan) -> Step<()> {
        self.step(plan, ranks.each_mut(), |rank| {
            let comm = &self.comms[rank.rank()];
            rank.buffer.refresh(comm, &[0, 1]).map_err(explain)
        })
    }

    fn close(&self, ranks: [Rank<'_>; RANKS], plan: FaultPlan) -> Step<()> {
        self.step(plan, ranks, |rank| rank.buffer.close().map_err(explain))
    }

    fn drop(&self, ranks: [Rank<'_>; RANKS], plan: FaultPlan) -> Step<()> {
        self.step(plan, ranks, |rank| {
            drop(rank.buffer);
            Ok(())
        })
    }

    /// A dispatch and a combine, rows compared.
    fn run(&self, ranks: &[Rank<'_>; RANKS]) {
        let ran = self.step(FaultPlan::none(), ranks.each_ref(), |rank| {
            rank.run(1, Order::Fused)
        });
        ran.all_well();
    }

    /// Launches everything that there is to launch. How many calls rank 1 made: none.
    fn launch(&self, ranks: &[Rank<'_>; RANKS]) -> usize {
        let launched = self.step(FaultPlan::none(), ranks.each_ref(), |rank| {
            let inputs = CASE.inputs(0);
            let oracle = rank.oracle(0, &inputs);
            let mut tensors = rank.tensors(&oracle).map_err(explain)?;
            let before = self.calls().len();
            let (buffer, stream) = (&rank.buffer, &rank.stream);
            let mut launch = || {
                let handle = rank.dispatch(&mut tensors)?;
                rank.combine(handle, &mut tensors)?;
                let pending = rank.dispatch_send(&tensors)?;
                let handle = rank.dispatch_receive(pending, &mut tensors)?;
                let pending = rank.combine_send(handle, &tensors)?;
                rank.combine_receive(pending, &mut tensors)?;
                drop(rank.dispatch(&mut tensors)?);
                buffer.barrier(stream, Duration::ZERO)
            };
            launch().map_err(explain)?;
            Ok(self.calls().len() - before)
        });
        let [_, calls] = launched.all_well();
        assert_eq!(calls, 0, "operations only launch");
        calls
    }

    /// A dispatch and a combine; calls fail while rank 1 waits for one of them and reads it. Then it
    /// does so again.
    fn exchange(&self, ranks: &[Rank<'_>; RANKS], operation: &str, plan: FaultPlan) -> Told {
        let read = Mutex::new(None);
        let faulty = |rank: &Rank<'_>, of, part: &dyn Fn() -> Result<(), String>| {
            if rank.rank() == BAD && of == operation {
                *read.lock() = Some(self.alone(plan.clone(), part));
            }
            part()
        };
        let whole = self.step(FaultPlan::none(), ranks.each_ref(), |rank| {
            let inputs = CASE.inputs(0);
            let oracle = rank.oracle(0, &inputs);
            let mut tensors = rank.tensors(&oracle).map_err(explain)?;
            let handle = rank.dispatch(&mut tensors).map_err(explain)?;
            faulty(rank, "reading a dispatch", &|| {
                rank.buffer.synchronize().map_err(explain)?;
                rank.compare_dispatch(&oracle, &tensors)
            })?;
            rank.experts(&oracle, &mut tensors).map_err(explain)?;
            rank.combine(handle, &mut tensors).map_err(explain)?;
            faulty(rank, "reading a combine", &|| {
                rank.buffer.synchronize().map_err(explain)?;
                rank.compare_combine(&oracle, &tensors)
            })
        });
        whole.all_well();
        read.into_inner().unwrap()
    }

    /// What one rank does without the other.
    fn alone(&self, plan: FaultPlan, part: impl Fn() -> Result<(), String>) -> Told {
        let before = self.calls().len();
        self.sims[BAD].inject(plan.on(self.ordinal(BAD)));
        let (said, log) = logged(part);
        self.sims[BAD].inject(FaultPlan::none());
        Told {
            said: [Ok(()), said],
            log,
            calls: self.calls()[before..].to_vec(),
        }
    }

    /// What both ranks do at once, each in a thread.
    fn step<I: Send, T: Send>(
        &self,
        plan: FaultPlan,
        inputs: [I; RANKS],
        part: impl Fn(I) -> Result<T, String> + Sync,
    ) -> Step<T> {
        let before = self.calls().len();
        self.sims[BAD].inject(plan.on(self.ordinal(BAD)));
        let part = &part;
        let outcomes = thread::scope(|scope| {
            inputs
                .map(|input| scope.spawn(move || logged(|| part(input))))
                .map(|rank| rank.join().expect("a rank panicked"))
        });
        self.sims[BAD].inject(FaultPlan::none());
        let [(first, _), (second, log)] = outcomes;
        Step {
            outcomes: [first, second],
            log,
            calls: self.calls()[before..].to_vec(),
        }
    }

    fn ordinal(&self, rank: usize) -> DeviceOrdinal {
        ordinal(self.place, rank)
    }

    /// Every call for rank 1's device.
    fn calls(&self) -> Vec<Entry> {
        let mut calls = self.sims[BAD].journal();
        calls.retain(|entry| entry.device == self.ordinal(BAD));
        calls
    }

    /// What is held beside what the driver was made to refuse to take back.
    fn held(&self) -> usize {
        let sims = match self.place.threads {
            true => &self.sims[..1],
            false => &self.sims,
        };
        let held = sims.iter().map(|sim| sim.live());
        held.map(|live| live.total() - live.injected_leaks).sum()
    }

    /// Asks that no buffer has left anything.
    fn assert_nothing_left(&self, told: &Told) {
        let live = self.sims.each_ref().map(|sim| sim.live());
        assert_eq!(self.held(), self.streams.len(), "{told}: {live:?}");
        let refused =
            |entry: &Entry| is_release(entry.call) && matches!(entry.outcome, Outcome::Injected(_));
        if !self.calls().iter().any(refused) {
            assert_eq!(live.map(|live| live.injected_leaks), [0; RANKS], "{told}");
        }
    }

    /// Closes the last buffer and asks that nothing is left.
    fn end(self, ranks: [Rank<'_>; RANKS]) {
        self.close(ranks, FaultPlan::none()).all_well();
        let Self { sims, streams, .. } = self;
        drop(streams);
        for live in sims.map(|sim| sim.live()) {
            assert!(live.is_explained(), "{live:?}");
        }
    }
}

/// A rank's device among those that its process sees.
fn ordinal(place: &Place, rank: usize) -> DeviceOrdinal {
    match (place.threads, rank) {
        (true, 1) => DeviceOrdinal(1),
        _ => DeviceOrdinal(0),
    }
}

/// What two ranks did.
struct Step<T> {
    outcomes: [Result<T, String>; RANKS],
    /// What rank 1 logged.
    log: String,
    /// What it called.
    calls: Vec<Entry>,
}

impl<T> Step<T> {
    fn told(&self) -> Told {
        Told {
            said: self.outcomes.each_ref().map(|outcome| match outcome {
                Ok(_) => Ok(()),
                Err(error) => Err(error.clone()),
            }),
            log: self.log.clone(),
            calls: self.calls.clone(),
        }
    }

    /// What both gave, unless one failed.
    fn successes(self) -> Option<[T; RANKS]> {
        match self.outcomes {
            [Ok(first), Ok(second)] => Some([first, second]),
            _ => None,
        }
    }

    fn all_well(self) -> [T; RANKS] {
        self.outcomes.map(|outcome| outcome.unwrap())
    }
}

/// What a case told.
struct Told {
    said: [Result<(), String>; RANKS],
    log: String,
    calls: Vec<Entry>,
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:?}", self.said)?;
        for entry in &self.calls {
            writeln!(f, "  {entry}")?;
        }
        f.write_str(&self.log)
    }
}

// ---- Cases ----

/// What the call that fails first returns. No driver has such a status.
const FIRST: Status = Status(770_001);

/// What the clean-up call returns that fails then.
const SECOND: Status = Status(770_002);

/// One operation on one kind of memory.
struct Sweep<'p, F> {
    operation: &'static str,
    place: &'p Place,
    /// Whether the operation goes on when this call, by number and kind, is refused, so that the
    /// refusal is in the log alone.
    goes_on: F,
    /// How many calls at the beginning are the probe's.
    probed: usize,
    singles: usize,
    pairs: usize,
}

impl<'p, F: Fn(usize, Call) -> bool> Sweep<'p, F> {
    fn new(operation: &'static str, place: &'p Place, goes_on: F) -> Self {
        Self {
            operation,
            place,
            goes_on,
            probed: 0,
            singles: 0,
            pairs: 0,
        }
    }

    /// Fails call `n` of those that are made where nothing fails, alone and with each clean-up call
    /// that follows then.
    fn cases(&mut self, n: usize, calls: &[Entry], mut case: impl FnMut(FaultPlan) -> Told) {
        let first = Fault::new(calls, n, FIRST);
        let single = case(first.plan());
        let at = format!("{}, {}, {first}", self.operation, self.place);
        self.check(&at, n, first, None, &single);
        let alone_fails = single.said[BAD].is_err();
        assert!(
            alone_fails || (self.goes_on)(n, first.call),
            "{at} {single}"
        );
        self.singles += 1;

        let is_first = |entry: &Entry| entry.outcome == Outcome::Injected(FIRST);
        let reached = single.calls.iter().position(is_first).unwrap();
        for m in reached + 1..single.calls.len() {
            if !self.is_clean_up(n, first.call, single.calls[m].call) {
                continue;
            }
            let second = Fault::new(&single.calls, m, SECOND);
            let both = case(first.plan().and(second.plan()));
            let at = format!("{at}, then {second}");
            self.check(&at, n, first, Some(second), &both);
            // What the probe found out would have decided after an attempt that now fails itself.
            let decides = self.place.attempts == 1 || n >= self.probed;
            if alone_fails && decides {
                // What goes wrong in cleaning up does not hide why.
                let error = both.said[BAD].as_ref().unwrap_err();
                assert!(names(error, first.call, FIRST), "{at} {both}");
            }
            self.pairs += 1;
        }
    }

    /// What holds in every case.
    fn check(&self, at: &str, n: usize, first: Fault, second: Option<Fault>, told: &Told) {
        for fault in [Some(first), second].into_iter().flatten() {
            let hit = |entry: &&Entry| entry.outcome == Outcome::Injected(fault.status);
            let hits: Vec<_> = told
                .calls
                .iter()
                .filter(hit)
                .map(|entry| entry.call)
                .collect();
            assert_eq!(hits, [fault.call], "{at} {told}");
        }
        let [other, bad] = &told.said;
        // Both build or refresh a buffer, or neither does. Otherwise the other rank lacks nothing.
        let together = matches!(self.operation, "build" | "refresh");
        let expected = if together { bad.is_ok() } else { true };
        // It may be told that memory of its own is still mapped there.
        let is_held = !together
            && bad.is_err()
            && (other.as_ref()).is_err_and(|error| error.contains("rank 1 could not give back"));
        assert!(other.is_ok() == expected || is_held, "{at} {told}");
        if let Err(error) = other {
            let says = error.contains("rank 1") || names(error, first.call, FIRST);
            assert!(says, "{at} {told}");
        }
        for error in told.said.iter().filter_map(|said| said.as_ref().err()) {
            for waited in ["did not arrive", "closed its connection", "is at step"] {
                assert!(!error.contains(waited), "{at} {told}");
            }
        }
        // What was refused is told: in the error, or in the log where the operation went on or failed
        // for another refusal.
        let error = bad.as_ref().err().map_or("", String::as_str);
        let in_error = names(error, first.call, FIRST);
        if !in_error {
            assert!((self.goes_on)(n, first.call), "{at} {told}");
            assert!(names(&told.log, first.call, FIRST), "{at} {told}");
        }
        if let Some(Fault { call, status, .. }) = second {
            let is_told = names(error, call, status) || names(&told.log, call, status);
            assert!(is_told, "{at} {told}");
        }
    }

    /// Whether a call that follows a refused one cleans up after it.
    fn is_clean_up(&self, n: usize, refused: Call, call: Call) -> bool {
        // A table that could not be written is made null again; and leaving begins with that.
        let clears = match self.operation {
            "close" | "drop" => true,
            _ => n >= self.probed && refused == Call::CopyToDevice,
        };
        is_release(call) || clears && call == Call::CopyToDevice
    }

    fn end(self) {
        let Self {
            operation,
            place,
            singles,
            pairs,
            ..
        } = self;
        let cases = singles + pairs;
        println!("{operation}, {place}: {cases} cases, {singles} calls and {pairs} pairs");
        assert!(singles > 0);
        // Nothing is released by what only waits and reads.
        assert_eq!(pairs > 0, !operation.starts_with("reading"));
        // Other tests of this process have descriptors of their own, but not hundreds.
        let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
        assert!(descriptors < 300, "{descriptors}");
    }
}

/// A call that fails: the `nth` of its kind.
#[derive(Clone, Copy)]
struct Fault {
    call: Call,
    nth: usize,
    status: Status,
}

impl Fault {
    /// Call number `n` of these.
    fn new(calls: &[Entry], n: usize, status: Status) -> Self {
        let call = calls[n].call;
        let nth = calls[..n].iter().filter(|entry| entry.call == call).count();
        Self { call, nth, status }
    }

    /// Among threads, the other rank's calls for this rank's device may come at any place, but they
    /// are of few kinds.
    fn plan(self) -> FaultPlan {
        FaultPlan::fail_nth_of(self.call, self.nth, self.status)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.call, self.nth)
    }
}

/// Whether a call gives something back.
fn is_release(call: Call) -> bool {
    matches!(
        call,
        Call::MemRelease
            | Call::MemAddressFree
            | Call::MemUnmap
            | Call::MemFree
            | Call::IpcClose
            | Call::HostFree
            | Call::StreamDestroy
            | Call::EventDestroy
    )
}

/// Whether a text says that a call returned a status.
fn names(text: &str, call: Call, status: Status) -> bool {
    let is_about = |line: &str| line.contains(call.name()) || line.contains(&format!("{call:?}"));
    text.lines()
        .any(|line| is_about(line) && line.contains(&status.to_string()))
}

// ---- The log ----

/// What a rank does, and what it logs meanwhile.
fn logged<T>(part: impl FnOnce() -> T) -> (T, String) {
    let log = Log::default();
    let done = tracing::subscriber::with_default(log.clone(), part);
    let text = std::mem::take(&mut *log.0.lock());
    (done, text)
}

/// Keeps what is logged, a line for each event.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<String>>);

impl tracing::Subscriber for Log {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut line = Line(format!("{}", event.metadata().level()));
        event.record(&mut line);
        let mut log = self.0.lock();
        log.push_str(&line.0);
        log.push('\n');
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        write!(self.0, " {field}={value:?}").unwrap();
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        write!(self.0, " {field}={}", explain(value)).unwrap();
    }
}
