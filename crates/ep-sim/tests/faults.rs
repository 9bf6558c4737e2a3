//! Injected faults, the journal, and the count of what is held.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ep_sim::{Cluster, FaultPlan, Live, Outcome, SimDriver};
use ep_sys::vmm::{DeviceMemory, Event, HostBuffer, Mapping, Physical, Stream};
use ep_sys::{Call, DeviceOrdinal, Driver, Error, HandleKind, Result, Status};

const D0: DeviceOrdinal = DeviceOrdinal(0);
const D1: DeviceOrdinal = DeviceOrdinal(1);
const GRANULE: u64 = 2 << 20;

fn simulated() -> (Arc<SimDriver>, Arc<dyn Driver>) {
    let simulated = SimDriver::new(&Cluster::hgx_h200(2), 0, &[0, 1]);
    (simulated.clone(), simulated)
}

/// Acquires one of each kind, and gives all up.
fn scenario(driver: &Arc<dyn Driver>) -> Result<()> {
    let physical = Physical::create(driver, D0, GRANULE, HandleKind::PosixFd, false)?;
    let exported = physical.export(HandleKind::PosixFd)?;
    let ours = Mapping::new(physical, 0)?;
    let theirs = Mapping::new(Physical::import(driver, D0, &exported, GRANULE)?, 0)?;
    let plain = DeviceMemory::new(driver, D0, 4096)?;
    let host = HostBuffer::new(driver, D0, 4096)?;
    let stream = Stream::new(driver, D0)?;
    let event = Event::new(driver, D0, true)?;
    driver.fill(D0, ours.ptr(), 1, 64, stream.handle())?;
    event.record(stream.handle())?;
    event.synchronize()?;
    host.load(0)?;
    event.close()?;
    stream.close()?;
    host.close()?;
    plain.close()?;
    theirs.close()?;
    ours.close()
}

#[test]
fn the_nth_call_fails_names_itself_and_leaves_nothing() {
    let (clean, driver) = simulated();
    scenario(&driver).unwrap();
    let calls = clean.calls();
    assert!(calls > 20, "{calls}");
    assert_eq!(clean.journal().len(), calls);
    assert!(clean.live().is_empty());

    for n in 0..calls {
        let (simulated, driver) = simulated();
        simulated.inject(FaultPlan::fail_nth(n, Status::UNKNOWN));
        let error = scenario(&driver).unwrap_err();
        let entry = clean.journal()[n];
        assert_eq!(
            (error.call(), error.status()),
            (entry.call, Some(Status::UNKNOWN)),
            "{n}"
        );
        let failed = simulated.journal()[n];
        assert_eq!(failed.outcome, Outcome::Injected(Status::UNKNOWN));
        assert!(
            simulated.live().is_explained(),
            "call {n}, {failed}: {:?}",
            simulated.live()
        );
        // The same driver works afterwards.
        scenario(&driver).unwrap();
    }
}

#[test]
fn pairs_of_faults_leave_only_what_they_refused() {
    let (clean, driver) = simulated();
    scenario(&driver).unwrap();
    let releases = [
        Call::MemRelease,
        Call::MemAddressFree,
        Call::MemUnmap,
        Call::MemFree,
        Call::HostFree,
        Call::StreamDestroy,
        Call::EventDestroy,
    ];
    let mut leaked = 0;
    for n in 0..clean.calls() {
        for release in releases {
            let (simulated, driver) = simulated();
            simulated.inject(
                FaultPlan::fail_nth(n, Status::UNKNOWN).and(FaultPlan::fail_nth_of(
                    release,
                    0,
                    Status::INVALID_VALUE,
                )),
            );
            scenario(&driver).unwrap_err();
            let live = simulated.live();
            assert!(live.is_explained(), "call {n}, then {release}: {live:?}");
            leaked += usize::from(!live.is_empty());
        }
    }
    assert!(leaked > 0);
}

#[test]
fn what_is_held_is_counted() {
    let (simulated, driver) = simulated();
    let physical = Physical::create(&driver, D0, GRANULE, HandleKind::PosixFd, false).unwrap();
    let mapping = Mapping::new(physical, 0).unwrap();
    let plain = DeviceMemory::new(&driver, D0, 4096).unwrap();
    let host = HostBuffer::new(&driver, D0, 4096).unwrap();
    let stream = Stream::new(&driver, D0).unwrap();
    let event = Event::new(&driver, D0, true).unwrap();
    let live = simulated.live();
    let counts = |live: Live| {
        [
            live.handles,
            live.reservations,
            live.mappings,
            live.allocations,
            live.ipc,
            live.host,
            live.streams,
            live.events,
            live.descriptors,
        ]
    };
    assert_eq!(counts(live), [1, 1, 1, 1, 0, 1, 1, 1, 2]);
    assert_eq!(
        (live.total(), live.injected_leaks, live.is_explained()),
        (9, 0, false)
    );
    drop((mapping, plain, host, stream, event));
    assert_eq!(simulated.live(), Live::default());
}

#[test]
fn a_refused_release_is_a_leak_and_a_retry_mends_it() {
    let (simulated, driver) = simulated();
    let handle = driver
        .mem_create(D0, GRANULE, HandleKind::PosixFd, false)
        .unwrap();
    simulated.inject(FaultPlan::fail_nth(0, Status::UNKNOWN));
    driver.mem_release(D0, handle).unwrap_err();
    let live = simulated.live();
    // The handle, and the descriptor behind it.
    assert_eq!(
        (live.handles, live.descriptors, live.injected_leaks),
        (1, 1, 2)
    );
    assert!(live.is_explained() && !live.is_empty());
    driver.mem_release(D0, handle).unwrap();
    assert_eq!(simulated.live(), Live::default());

    // A stuck mapping keeps the reservation around it.
    let physical = Physical::create(&driver, D0, GRANULE, HandleKind::PosixFd, false).unwrap();
    let mapping = Mapping::new(physical, 0).unwrap();
    simulated.inject(FaultPlan::fail_nth_of(Call::MemUnmap, 0, Status::UNKNOWN));
    drop(mapping);
    let live = simulated.live();
    assert_eq!(
        (
            live.handles,
            live.mappings,
            live.reservations,
            live.descriptors
        ),
        (0, 1, 1, 1)
    );
    assert!(live.is_explained());

    // Somebody else's leak is not explained by it.
    let plain = driver.mem_alloc(D0, 64).unwrap();
    assert!(!simulated.live().is_explained());
    driver.mem_free(D0, plain).unwrap();
    assert!(simulated.live().is_explained());
}

#[test]
fn a_refused_ipc_close_counts_once() {
    let cluster = Cluster::hgx_h200(2);
    let maker = SimDriver::for_rank(&cluster, 0).unwrap();
    let peer = SimDriver::for_rank(&cluster, 1).unwrap();
    let ptr = maker.mem_alloc(D0, 64).unwrap();
    let handle = maker.ipc_get_handle(D0, ptr).unwrap();
    let opened = peer.ipc_open(D0, &handle).unwrap();
    peer.ipc_open(D0, &handle).unwrap();
    peer.inject(FaultPlan::fail_nth_of(Call::IpcClose, 1, Status::UNKNOWN));
    peer.ipc_close(D0, opened).unwrap();
    peer.ipc_close(D0, opened).unwrap_err();
    let live = peer.live();
    assert_eq!((live.ipc, live.descriptors, live.injected_leaks), (1, 1, 2));
    assert!(live.is_explained());
}

#[test]
fn calls_are_counted_by_kind_by_device_and_from_the_injection() {
    let (simulated, driver) = simulated();
    let status = |result: Result<ep_sys::DevicePtr>| result.err().and_then(|error| error.status());
    driver.mem_alloc(D0, 64).unwrap();
    simulated.inject(
        FaultPlan::fail_nth_of(Call::MemAlloc, 2, Status(2))
            .and(FaultPlan::fail_nth(1, Status(700)).on(D1))
            .and(FaultPlan::fail_nth_of(Call::MemAlloc, 2, Status(12345)).on(D1)),
    );
    assert_eq!(status(driver.mem_alloc(D0, 64)), None);
    driver.mem_info(D1).unwrap();
    assert_eq!(status(driver.mem_alloc(D1, 64)), Some(Status(700)));
    assert_eq!(status(driver.mem_alloc(D1, 64)), Some(Status(2)));
    assert_eq!(status(driver.mem_alloc(D0, 64)), None);
    assert_eq!(status(driver.mem_alloc(D1, 64)), Some(Status(12345)));
    assert_eq!(status(driver.mem_alloc(D1, 64)), None);
    assert_eq!(simulated.calls(), 8);
    simulated.inject(FaultPlan::none());
    assert_eq!(status(driver.mem_alloc(D0, 64)), None);
    let text: Vec<_> = simulated.journal()[2..4]
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        text,
        [
            "cuMemGetInfo on device 1: done",
            "cuMemAlloc on device 1: 700 CUDA_ERROR_ILLEGAL_ADDRESS (injected)"
        ]
    );
}

#[test]
fn host_loads_are_not_counted_but_can_fail() {
    let (simulated, driver) = simulated();
    let host = HostBuffer::new(&driver, D0, 64).unwrap();
    let before = simulated.calls();
    simulated.inject(FaultPlan::fail_nth_of(Call::HostLoad, 1, Status::UNKNOWN));
    host.load(0).unwrap();
    assert_eq!(host.load(0).unwrap_err().call(), Call::HostLoad);
    host.load(0).unwrap();
    driver.host_facts();
    assert_eq!(simulated.calls(), before);
    assert_eq!(simulated.journal().len(), before);
}

#[test]
fn a_fault_in_nvml_is_an_nvml_error() {
    let (simulated, driver) = simulated();
    simulated.inject(FaultPlan::fail_nth_of(Call::FabricInfo, 0, Status(3)));
    match driver.fabric_info(D0).unwrap_err() {
        Error::Nvml {
            call: Call::FabricInfo,
            device: D0,
            status: 3,
        } => {}
        other => panic!("{other}"),
    }
}

#[test]
fn a_delay_takes_its_time_and_then_the_call_is_made() {
    let (simulated, driver) = simulated();
    let delay = Duration::from_millis(30);
    simulated.inject(
        FaultPlan::delay_nth_of(Call::MemInfo, 1, delay)
            .and(FaultPlan::delay_nth(2, delay))
            .and(FaultPlan::fail_nth(2, Status::NOT_READY)),
    );
    driver.mem_info(D0).unwrap();
    let start = Instant::now();
    driver.mem_info(D0).unwrap();
    assert!(start.elapsed() >= delay);
    let start = Instant::now();
    assert_eq!(
        driver.mem_info(D0).unwrap_err().status(),
        Some(Status::NOT_READY)
    );
    assert!(start.elapsed() >= delay);
}
