//! Probing, deciding and allocating on simulated clusters.

use std::sync::Arc;

use ep_alloc::{
    Allocation, BackendKind, Cause, Choice, Error, Export, Failure, ImportRefusal, Probe,
    ProbeOptions, RankFacts, Trial, Untried, decide, probe,
};
use ep_sim::{Cluster, FaultPlan, IpcNamespace, Outcome, PeerAccess, SimDriver};
use ep_sys::vmm::{IpcMapping, Mapping, Physical};
use ep_sys::{Bytes16, Call, DeviceOrdinal, Driver, FabricState, ShareableHandle, Status};

const DEVICE: DeviceOrdinal = DeviceOrdinal(0);
const OK: Trial = Trial::Ok { gdr: false };

#[test]
fn trials_say_what_the_node_does() {
    let h200 = Cluster::hgx_h200(1);
    let tray = Cluster::gb200_nvl72(1);

    let found = probed(&h200, false);
    let refused = Trial::Refused(status(Call::MemCreate, 800));
    assert_eq!(found.trials.fabric, refused);
    assert_eq!((found.trials.posix_fd, found.trials.malloc), (OK, OK));
    assert_eq!(found.granularity.posix_fd, 2 << 20);
    assert_eq!(found.granularity.malloc, 2 << 20);

    let found = probed(&tray, false);
    assert_eq!(found.trials, ep_alloc::PerBackend::from_fn(|_| OK));

    // An attribute of 0 is not put to the test.
    let plain = tray.clone().map_gpus(|gpu| gpu.fabric_attribute = false);
    let found = probed(&plain, false);
    assert_eq!(
        found.trials.fabric,
        Trial::NotTried(Untried::FabricAttribute)
    );
    assert_eq!(found.granularity.fabric, 0);
    let plain = tray.clone().map_gpus(|gpu| gpu.posix_fd_attribute = false);
    assert_eq!(
        probed(&plain, false).trials.posix_fd,
        Trial::NotTried(Untried::PosixFdAttribute)
    );

    // Creating works without an IMEX channel here; importing does not.
    let sealed = tray.clone().map_nodes(|node| node.imex_channel = false);
    assert_eq!(
        probed(&sealed, false).trials.fabric,
        Trial::Refused(status(Call::MemImport, 801))
    );
}

#[test]
fn the_rdma_flag_is_asked_for_when_wanted_and_nominated() {
    let with = Cluster::hgx_h200(1);
    let without = Cluster::hgx_h200(1).map_gpus(|gpu| gpu.gdr_attribute = false);
    assert_eq!(probed(&with, false).trials.posix_fd, OK);
    assert_eq!(probed(&with, true).trials.posix_fd, Trial::Ok { gdr: true });
    assert_eq!(probed(&with, true).trials.malloc, OK);
    assert_eq!(probed(&without, true).trials.posix_fd, OK);

    // Without the attribute the flag is not even tried.
    let tray = Cluster::gb200_nvl72(1).map_gpus(|gpu| gpu.gdr_attribute = false);
    let sim = SimDriver::new(&tray, 0, &[0]);
    let driver: Arc<dyn Driver> = sim.clone();
    probe(&driver, DEVICE, &ProbeOptions { gdr: true });
    assert!(
        sim.journal()
            .iter()
            .all(|entry| entry.outcome == Outcome::Done)
    );

    for (cluster, gdr) in [(with, true), (without, false)] {
        let driver = rank(&cluster, 0);
        let memory = Allocation::new(&driver, DEVICE, BackendKind::PosixFd, 1, true).unwrap();
        assert_eq!(memory.gdr(), gdr);
    }
}

#[test]
fn memory_that_does_not_hold_what_was_written_is_refused() {
    let wrong = Trial::Refused(Failure {
        call: Call::CopyToHost,
        cause: Cause::WrongBytes,
    });
    // Fabric and posix_fd each read both ends of their granule.
    for (nth, fabric, posix_fd) in [
        (0, wrong, OK),
        (1, wrong, OK),
        (2, OK, wrong),
        (3, OK, wrong),
        (4, OK, OK),
    ] {
        let sim = SimDriver::new(&Cluster::gb200_nvl72(1), 0, &[0]);
        sim.inject(FaultPlan::garble_nth(nth));
        let driver: Arc<dyn Driver> = sim;
        let trials = probe(&driver, DEVICE, &ProbeOptions::default()).trials;
        assert_eq!(
            (trials.fabric, trials.posix_fd),
            (fabric, posix_fd),
            "{nth}"
        );
    }
}

#[test]
fn without_nvml_the_reason_says_so() {
    let facts = group(&Cluster::gb200_nvl72(2)).into_iter().map(|mut f| {
        f.fabric = Err(Failure {
            call: Call::FabricInfo,
            cause: Cause::NoLibrary,
        });
        f
    });
    let plan = decide(&facts.collect::<Vec<_>>(), &[]).unwrap();
    let gap = &plan.refused[0];
    assert_eq!(
        gap.to_string(),
        "no NVLink clique on ranks 0-7: nvmlDeviceGetGpuFabricInfo found no driver library"
    );
    assert!(gap.check().contains("libnvidia-ml.so.1"), "{}", gap.check());
}

#[test]
fn a_device_that_does_not_exist_is_data() {
    let driver = rank(&Cluster::hgx_h200(1), 0);
    let found = probe(&driver, DeviceOrdinal(3), &ProbeOptions::default());
    let failure = status(Call::DeviceInfo, 101);
    assert_eq!(found.info, Err(failure));
    for kind in BackendKind::ALL {
        assert_eq!(found.trials[kind], Trial::Refused(failure));
    }
    let facts = RankFacts::new(0, Bytes16::ZERO, Choice::Auto, &found);
    let error = decide(&[facts], &[]).unwrap_err().to_string();
    assert!(error.contains("cuDeviceGetAttribute"), "{error}");
    assert!(error.ends_with("check CUDA_VISIBLE_DEVICES"), "{error}");
}

#[test]
fn presets_decide() {
    let plan = |cluster: &Cluster| decide(&group(cluster), &[]).unwrap().to_string();
    assert_eq!(
        plan(&Cluster::hgx_h200(4)),
        "malloc: one node; fabric refused on ranks 0-3: cuMemCreate returned 800 \
         CUDA_ERROR_NOT_PERMITTED (no IMEX channel is visible to the process)"
    );
    assert_eq!(
        plan(&Cluster::hgx_h100_infiniband(2)),
        "malloc: 2 nodes and no NVLink clique that spans two of them; no NVLink clique on ranks \
         0-15: the cluster UUID is all zeros; fabric refused on ranks 0-15: cuMemCreate returned \
         800 CUDA_ERROR_NOT_PERMITTED (no IMEX channel is visible to the process)"
    );
    assert_eq!(
        plan(&Cluster::gb200_nvl72(18)),
        "fabric: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/1 spans 18 nodes"
    );
    assert_eq!(
        plan(&Cluster::gb200_nvl72_cliques(2, 2)),
        "fabric: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/1 spans 2 nodes"
    );
    let starting = Cluster::gb200_nvl72(2).map_gpus(|gpu| {
        gpu.fabric_state = FabricState::InProgress;
    });
    assert_eq!(
        plan(&starting),
        "malloc: 2 nodes and no NVLink clique that spans two of them; no NVLink clique on ranks \
         0-7: fabric registration is in progress"
    );
}

/// Facts that the exchange carries are those that the probe found.
#[test]
fn facts_are_what_was_found() {
    let cluster = Cluster::gb200_nvl72_cliques(2, 1);
    let facts = group(&cluster);
    assert_eq!(facts.len(), 8);
    for (rank, fact) in facts.iter().enumerate() {
        assert_eq!(fact.rank as usize, rank);
        assert_eq!(fact.host_name, format!("n{}", rank / 4));
        assert!(fact.imex_channel);
        assert_eq!(fact.rdma_nics, 4);
        assert_eq!(fact.same_host(&facts[0]), rank < 4);
        assert_eq!(fact.clique() == facts[0].clique(), rank < 4);
        assert!(!fact.gpu_uuid.is_zero() && !fact.pci_bus_id.is_empty());
        assert!(facts[..rank].iter().all(|f| f.gpu_uuid != fact.gpu_uuid));
    }
}

/// What one process cannot find out: it takes an import, and a second decision.
#[test]
fn a_refused_import_leads_to_another_backend() {
    let cluster = Cluster::hgx_h200(2).map_nodes(|node| node.ipc_namespace = IpcNamespace::Private);
    let facts = group(&cluster);
    let drivers = [rank(&cluster, 0), rank(&cluster, 1)];

    let plan = decide(&facts, &[]).unwrap();
    assert_eq!(plan.backend, BackendKind::Malloc);
    let refused = exchange(&drivers, plan.backend);
    assert_eq!(refused.len(), 2);
    assert!(refused.iter().all(|r| r.failure.call == Call::IpcOpen));

    let plan = decide(&facts, &refused).unwrap();
    assert_eq!(plan.backend, BackendKind::PosixFd, "{plan}");
    assert_eq!(exchange(&drivers, plan.backend), []);
}

#[test]
fn no_peer_access_is_settled_on_the_first_backend() {
    let cluster = Cluster::hgx_h200(2).map_gpus(|gpu| gpu.peer_access = PeerAccess::None);
    let facts = group(&cluster);
    let drivers = [rank(&cluster, 0), rank(&cluster, 1)];
    let mut refused = Vec::new();
    let mut tried = Vec::new();
    let plan = loop {
        let plan = decide(&facts, &refused).unwrap();
        if tried.contains(&plan.backend) {
            break plan;
        }
        refused.extend(exchange(&drivers, plan.backend));
        tried.push(plan.backend);
    };
    assert_eq!(tried, [BackendKind::Malloc, BackendKind::PosixFd]);
    assert_eq!(plan.backend, BackendKind::Malloc);
    assert_eq!(plan.refused.last().unwrap().backend(), BackendKind::PosixFd);
}

#[test]
fn sizes_are_rounded_up_and_checked() {
    let sim = SimDriver::new(&Cluster::gb200_nvl72(1), 0, &[0]);
    let driver: Arc<dyn Driver> = sim.clone();
    for kind in BackendKind::ALL {
        for (asked, bytes) in [(1, 2 << 20), (2 << 20, 2 << 20), ((2 << 20) + 1, 4 << 20)] {
            let memory = Allocation::new(&driver, DEVICE, kind, asked, false).unwrap();
            assert_eq!(memory.bytes(), bytes);
            assert_eq!((memory.kind(), memory.device()), (kind, DEVICE));
            assert_eq!(memory.granularity(), 2 << 20);
            let last = memory.ptr().offset(bytes - 1);
            driver.copy_to_device(DEVICE, last, &[7]).unwrap();
            memory.close().unwrap();
        }
        for asked in [0, u64::MAX] {
            let error = Allocation::new(&driver, DEVICE, kind, asked, false).unwrap_err();
            assert!(matches!(error, Error::Size { bytes, .. } if bytes == asked));
            assert_eq!(error.call(), None);
        }
        let error = Allocation::new(&driver, DEVICE, kind, 1 << 42, false).unwrap_err();
        assert_eq!(error.status(), Some(Status::OUT_OF_MEMORY), "{error}");
        assert!(
            error
                .to_string()
                .contains("4398046511104 bytes on device 0"),
            "{error}"
        );
        assert!(error.to_string().contains("free device memory"), "{error}");
    }
    assert!(sim.live().is_empty(), "{:?}", sim.live());
}

/// Every rank allocates, exports, and imports from every other; what failed comes back. Whatever
/// connects is written by the exporter and read by the importer.
fn exchange(drivers: &[Arc<dyn Driver>], kind: BackendKind) -> Vec<ImportRefusal> {
    let mut refused = Vec::new();
    let memory: Vec<Allocation> = drivers
        .iter()
        .map(|driver| Allocation::new(driver, DEVICE, kind, 1, false).unwrap())
        .collect();
    for (importer, driver) in (0..).zip(drivers) {
        for (exporter, memory) in (0..).zip(&memory) {
            if importer == exporter {
                continue;
            }
            let token = [importer as u8 + 1, exporter as u8 + 1];
            let owner = &drivers[exporter as usize];
            owner.copy_to_device(DEVICE, memory.ptr(), &token).unwrap();
            let mut read = [0; 2];
            let imported = match memory.export().unwrap() {
                Export::Ipc(handle) => IpcMapping::open(driver, DEVICE, &handle)
                    .and_then(|open| driver.copy_to_host(DEVICE, &mut read, open.ptr())),
                Export::Fabric(handle) => map(
                    driver,
                    &ShareableHandle::Fabric(handle),
                    memory.bytes(),
                    &mut read,
                ),
                Export::PosixFd(fd) => map(
                    driver,
                    &ShareableHandle::PosixFd(fd),
                    memory.bytes(),
                    &mut read,
                ),
            };
            match imported {
                Ok(()) => assert_eq!(read, token),
                Err(error) => refused.push(ImportRefusal {
                    backend: kind,
                    importer,
                    exporter,
                    failure: Failure::from(&error),
                }),
            }
        }
    }
    refused
}

fn map(
    driver: &Arc<dyn Driver>,
    handle: &ShareableHandle,
    bytes: u64,
    read: &mut [u8],
) -> ep_sys::Result<()> {
    let physical = Physical::import(driver, DEVICE, handle, bytes)?;
    let mapping = Mapping::new(physical, 0)?;
    driver.copy_to_host(DEVICE, read, mapping.ptr())
}

/// The facts of every rank, each probed in a process of its own.
fn group(cluster: &Cluster) -> Vec<RankFacts> {
    let ranks = 0..u32::try_from(cluster.ranks()).unwrap();
    ranks
        .map(|r| {
            let sim = SimDriver::for_rank(cluster, r as usize).unwrap();
            let driver: Arc<dyn Driver> = sim.clone();
            let found = probe(&driver, DEVICE, &ProbeOptions::default());
            assert!(sim.live().is_empty(), "{:?}", sim.live());
            let process = Bytes16(u128::from(r).to_be_bytes());
            RankFacts::new(r, process, Choice::Auto, &found)
        })
        .collect()
}

fn probed(cluster: &Cluster, gdr: bool) -> Probe {
    probe(&rank(cluster, 0), DEVICE, &ProbeOptions { gdr })
}

fn rank(cluster: &Cluster, rank: usize) -> Arc<dyn Driver> {
    SimDriver::for_rank(cluster, rank).unwrap()
}

fn status(call: Call, status: u32) -> Failure {
    Failure {
        call,
        cause: Cause::Status(Status(status)),
    }
}
