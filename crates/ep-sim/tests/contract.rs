//! The driver contract: on the simulator always, on the GPUs of this host where there are any.

use std::sync::Arc;

use ep_sim::{Cluster, PeerAccess, SimDriver, contract};
use ep_sys::{CudaDriver, DeviceOrdinal, DevicePtr, Driver};

/// Runs the suite on every device.
fn check(driver: &Arc<dyn Driver>) {
    let mut failed = Vec::new();
    for ordinal in 0..driver.device_count().unwrap() {
        for case in contract::run(driver, DeviceOrdinal(ordinal)) {
            if !case.passed() {
                failed.push(format!("device {ordinal}: {case}"));
            }
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    any_thread(driver);
}

/// What one thread makes, another uses and a third releases.
fn any_thread(driver: &Arc<dyn Driver>) {
    let device = DeviceOrdinal(0);
    let on_thread = |work: &(dyn Fn() -> DevicePtr + Sync)| {
        std::thread::scope(|scope| scope.spawn(work).join().unwrap())
    };
    let ptr = on_thread(&|| driver.mem_alloc(device, 64).unwrap());
    on_thread(&|| {
        driver.copy_to_device(device, ptr, b"threads").unwrap();
        ptr
    });
    let mut out = [0; 7];
    driver.copy_to_host(device, &mut out, ptr).unwrap();
    assert_eq!(&out, b"threads");
    on_thread(&|| {
        driver.mem_free(device, ptr).unwrap();
        ptr
    });
}

fn check_simulated(cluster: &Cluster, visible: &[u32]) {
    let simulated = SimDriver::new(cluster, 0, visible);
    let driver: Arc<dyn Driver> = simulated.clone();
    check(&driver);
    assert!(simulated.live().is_empty(), "{:?}", simulated.live());
}

#[test]
fn simulated_hgx_h200() {
    check_simulated(&Cluster::hgx_h200(4), &[0, 1, 2, 3]);
}

#[test]
fn simulated_gb200_nvl72() {
    check_simulated(&Cluster::gb200_nvl72(2), &[0, 1, 2, 3]);
}

#[test]
fn simulated_infiniband_node() {
    check_simulated(&Cluster::hgx_h100_infiniband(2), &[0, 7]);
}

#[test]
fn simulated_gpus_without_peer_access() {
    let cluster = Cluster::hgx_h200(2).map_gpus(|gpu| gpu.peer_access = PeerAccess::None);
    check_simulated(&cluster, &[0, 1]);
}

#[test]
fn one_visible_device() {
    check_simulated(&Cluster::hgx_h200(8), &[5]);
}

#[test]
fn cuda() {
    match CudaDriver::load() {
        Ok(driver) => {
            let driver: Arc<dyn Driver> = driver;
            check(&driver);
        }
        Err(error) if std::env::var("EP_GPU").as_deref() == Ok("require") => {
            panic!("EP_GPU=require: {error}");
        }
        Err(error) => eprintln!("skipped: {error}"),
    }
}

#[test]
fn a_driver_that_breaks_the_contract_is_found_out() {
    use ep_sim::FaultPlan;
    use ep_sys::{Call, Status};
    let simulated = SimDriver::new(&Cluster::hgx_h200(1), 0, &[0]);
    let driver: Arc<dyn Driver> = simulated.clone();
    simulated.inject(FaultPlan::fail_nth_of(Call::MemMap, 0, Status::UNKNOWN));
    let failed: Vec<_> = contract::run(&driver, DeviceOrdinal(0))
        .into_iter()
        .filter(|case| !case.passed())
        .map(|case| case.to_string())
        .collect();
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert!(
        failed[0].contains("cuMemMap") && failed[0].contains("999"),
        "{failed:?}"
    );
}
