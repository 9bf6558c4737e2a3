//! Finding out by trying.

use std::sync::Arc;

use ep_sys::{Call, DeviceInfo, DeviceOrdinal, Driver, FabricInfo, HostFacts};

use crate::backend::backend;
use crate::{BackendKind, Failure, PerBackend, Trial};

/// What to try.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProbeOptions {
    /// Whether memory should be such that an RDMA NIC can register it. Tried with the flag where
    /// the device's attribute nominates it, and again without where that is refused.
    pub gdr: bool,
}

/// What a device answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The device.
    pub device: DeviceOrdinal,
    /// What the process sees of its host.
    pub host: HostFacts,
    /// Identity and attributes, or the refusal to tell.
    pub info: Result<DeviceInfo, Failure>,
    /// NVML's fabric information, or the refusal to tell.
    pub fabric: Result<FabricInfo, Failure>,
    /// Bytes of which an allocation is a multiple; 0 where the backend was not tried or would not
    /// tell.
    pub granularity: PerBackend<u64>,
    /// What each backend did.
    pub trials: PerBackend<Trial>,
}

/// Tries every backend that the device's attributes nominate, each for one granule, and gives
/// everything back. Never fails: a refusal is part of the answer.
pub fn probe(driver: &Arc<dyn Driver>, device: DeviceOrdinal, options: &ProbeOptions) -> Probe {
    let info = driver.device_info(device).map_err(Failure::from);
    let fabric = driver.fabric_info(device).map_err(|error| Failure {
        // Also where NVML could not be opened.
        call: Call::FabricInfo,
        ..error.into()
    });
    for failure in [info.as_ref().err(), fabric.as_ref().err()]
        .into_iter()
        .flatten()
    {
        // A group may well do without; whoever asks why it did finds the call here.
        tracing::debug!(%device, %failure, "the device did not tell of itself");
    }
    let mut granularity = PerBackend::default();
    let trials = PerBackend::from_fn(|kind| {
        let trial = match &info {
            Ok(info) => {
                let (granule, trial) = attempt(driver, device, info, kind, options.gdr);
                granularity[kind] = granule;
                trial
            }
            Err(failure) => Trial::Refused(*failure),
        };
        tracing::debug!(%device, backend = %kind, ?trial, "probed");
        trial
    });
    Probe {
        device,
        host: driver.host_facts(),
        info,
        fabric,
        granularity,
        trials,
    }
}

/// One backend's granularity and trial.
fn attempt(
    driver: &Arc<dyn Driver>,
    device: DeviceOrdinal,
    info: &DeviceInfo,
    kind: BackendKind,
    gdr: bool,
) -> (u64, Trial) {
    let backend = backend(kind);
    if let Some(why) = backend.ruled_out(info) {
        return (0, Trial::NotTried(why));
    }
    let granularity = match backend.granularity(driver, device) {
        Ok(granularity) => granularity,
        Err(error) => return (0, Trial::Refused(error.into())),
    };
    let gdr = gdr && info.gdr_vmm_attribute;
    let trial = match backend.attempt(driver, device, granularity, gdr) {
        Ok(gdr) => Trial::Ok { gdr },
        Err(failure) => Trial::Refused(failure),
    };
    (granularity, trial)
}
