//! Fault sweep: every driver call of every operation fails once, on every backend. The error names
//! the call, nothing stays behind, and the next attempt works.

use std::sync::Arc;

use ep_alloc::{Allocation, BackendKind, Cause, Error, Failure, Probe, ProbeOptions, Trial, probe};
use ep_sim::{Cluster, FaultPlan, Outcome, SimDriver};
use ep_sys::{Call, DeviceOrdinal, Driver, Status};

const DEVICE: DeviceOrdinal = DeviceOrdinal(0);
const BYTES: u64 = 3 << 20;
const CLEAN_UP: [Call; 4] = [
    Call::MemUnmap,
    Call::MemAddressFree,
    Call::MemRelease,
    Call::MemFree,
];

#[test]
fn allocations() {
    let mut cases = 0;
    for kind in BackendKind::ALL {
        for gdr in [false, true] {
            for close in [false, true] {
                cases += sweep(kind, gdr, close);
            }
        }
    }
    println!("{cases} cases");
    assert!(cases > 100, "{cases} cases");
}

/// Fails each call of one life of an allocation, alone and together with the first clean-up call of
/// each kind.
fn sweep(kind: BackendKind, gdr: bool, close: bool) -> usize {
    let sim = driver();
    life(&sim, kind, gdr, close).expect("nothing is injected");
    let calls = sim.calls();
    assert!(sim.live().is_empty(), "{:?}", sim.live());

    let also = [None].into_iter().chain(CLEAN_UP.map(Some));
    let cases = also.flat_map(|clean_up| (0..calls).map(move |n| (n, clean_up)));
    let mut count = 0;
    for (n, clean_up) in cases {
        let case = format!("{kind}, gdr {gdr}, close {close}, call {n}, clean-up {clean_up:?}");
        let mut plan = FaultPlan::fail_nth(n, Status::UNKNOWN);
        if let Some(call) = clean_up {
            plan = plan.and(FaultPlan::fail_nth_of(call, 0, Status::INVALID_VALUE));
        }
        let sim = driver();
        sim.inject(plan);
        let result = life(&sim, kind, gdr, close);

        let injected: Vec<Call> = sim
            .journal()
            .iter()
            .filter(|entry| matches!(entry.outcome, Outcome::Injected(_)))
            .map(|entry| entry.call)
            .collect();
        let first = *injected.first().expect("call n is made");
        let releases = CLEAN_UP.contains(&first);
        let retried = gdr && n == create_of(kind);
        match result {
            Ok(with_gdr) => {
                // Only a refusal that has an answer, or that nobody is told of, is no error.
                assert!(retried || (releases && !close), "{case}: {first} ignored");
                assert_eq!(
                    with_gdr,
                    gdr && !retried && kind != BackendKind::Malloc,
                    "{case}"
                );
            }
            Err(error) => {
                let named = error.call().expect("a call failed");
                // The retry succeeded, so the error is about the clean-up.
                let expected = if retried { injected[1] } else { first };
                assert_eq!(named, expected, "{case}: {error}");
                assert_eq!(
                    releases || retried,
                    matches!(error, Error::Release { .. }),
                    "{case}"
                );
                assert!(error.to_string().contains(named.name()), "{case}: {error}");
            }
        }
        let live = sim.live();
        assert!(live.is_explained(), "{case}: {live:?}");
        if !injected.iter().any(|call| CLEAN_UP.contains(call)) {
            assert!(live.is_empty(), "{case}: {live:?}");
        }

        sim.inject(FaultPlan::none());
        life(&sim, kind, gdr, close).unwrap_or_else(|error| panic!("{case}: then {error}"));
        assert_eq!(sim.live(), live, "{case}");
        count += 1;
    }
    count
}

/// Allocates, exports and releases. The answer is whether the memory had the GPUDirect RDMA flag.
fn life(sim: &Arc<SimDriver>, kind: BackendKind, gdr: bool, close: bool) -> Result<bool, Error> {
    let driver: Arc<dyn Driver> = sim.clone();
    let allocation = Allocation::new(&driver, DEVICE, kind, BYTES, gdr)?;
    let export = allocation.export()?;
    assert_eq!(export.kind(), kind);
    let gdr = allocation.gdr();
    if close {
        allocation.close()?;
    }
    Ok(gdr)
}

/// The number of the call that creates physical memory: granularity comes first.
fn create_of(kind: BackendKind) -> usize {
    match kind {
        BackendKind::Fabric | BackendKind::PosixFd => 1,
        BackendKind::Malloc => usize::MAX,
    }
}

/// A probe never fails; it says what did, and only there.
#[test]
fn probes() {
    let mut cases = 0;
    for gdr in [false, true] {
        let clean_sim = driver();
        let clean = probed(&clean_sim, gdr);
        assert!(clean.trials.fabric.is_ok() && clean.trials.posix_fd.is_ok());
        assert!(clean.trials.malloc.is_ok());
        for n in 0..clean_sim.calls() {
            let sim = driver();
            sim.inject(FaultPlan::fail_nth(n, Status::UNKNOWN));
            let found = probed(&sim, gdr);
            let entry = sim.journal()[n];
            assert_eq!(entry.outcome, Outcome::Injected(Status::UNKNOWN));
            check_probe(n, entry.call, gdr, &found, &clean);
            let live = sim.live();
            assert!(live.is_explained(), "call {n}: {live:?}");
            if !CLEAN_UP.contains(&entry.call) {
                assert!(live.is_empty(), "call {n}: {live:?}");
            }
            sim.inject(FaultPlan::none());
            assert_eq!(probed(&sim, gdr), clean, "after call {n}");
            cases += 1;
        }
    }
    println!("{cases} cases");
    assert!(cases > 50, "{cases} cases");
}

fn check_probe(n: usize, call: Call, gdr: bool, found: &Probe, clean: &Probe) {
    let cause = match call {
        Call::FabricInfo => Cause::Nvml(Status::UNKNOWN.0),
        _ => Cause::Status(Status::UNKNOWN),
    };
    let failure = Failure { call, cause };
    let changed: Vec<BackendKind> = BackendKind::ALL
        .into_iter()
        .filter(|&kind| found.trials[kind] != clean.trials[kind])
        .collect();
    match call {
        Call::DeviceInfo => {
            assert_eq!(found.info, Err(failure));
            assert_eq!(changed, BackendKind::ALL);
        }
        Call::FabricInfo => {
            assert_eq!(found.fabric, Err(failure));
            assert_eq!(changed, []);
        }
        _ => {
            let [kind] = changed[..] else {
                panic!("call {n}, {call}: {changed:?}");
            };
            match found.trials[kind] {
                Trial::Ok { gdr: false } => assert!(gdr && call == Call::MemCreate, "call {n}"),
                trial => assert_eq!(trial, Trial::Refused(failure), "call {n}"),
            }
        }
    }
}

fn probed(sim: &Arc<SimDriver>, gdr: bool) -> Probe {
    let driver: Arc<dyn Driver> = sim.clone();
    probe(&driver, DEVICE, &ProbeOptions { gdr })
}

/// A GPU on which every backend works, with a NIC.
fn driver() -> Arc<SimDriver> {
    let cluster = Cluster::gb200_nvl72(1).map_nodes(|node| node.nics = 1);
    SimDriver::new(&cluster, 0, &[0])
}
