//! What the group knows about one rank.

use ep_sys::{Bytes16, FabricInfo};

use crate::{Choice, Failure, PerBackend, Probe, Trial};

/// Everything that the decision needs from one rank, as plain data.
///
/// Every rank decides from the same facts: those that came out of the exchange, its own included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankFacts {
    /// The rank.
    pub rank: u32,
    /// The rank's host. Zeros where the host could not tell; its name stands in then.
    pub host_id: Bytes16,
    /// The host's name, for people.
    pub host_name: String,
    /// A random token of the rank's process: the same for two ranks exactly if they share one.
    pub process: Bytes16,
    /// The GPU's UUID; zeros where the driver refused to tell.
    pub gpu_uuid: Bytes16,
    /// The GPU's PCI address; empty where the driver refused to tell.
    pub pci_bus_id: String,
    /// NVML's fabric information, or why there is none.
    pub fabric: Result<FabricInfo, Failure>,
    /// Whether the process sees an IMEX channel.
    pub imex_channel: bool,
    /// RDMA NICs with an active port.
    pub rdma_nics: u32,
    /// What each backend did when it was tried.
    pub trials: PerBackend<Trial>,
    /// Bytes of which an allocation is a multiple; 0 where nobody asked.
    pub granularity: PerBackend<u64>,
    /// What the rank's operator wants.
    pub choice: Choice,
}

impl RankFacts {
    /// The facts that a rank found by probing.
    pub fn new(rank: u32, process: Bytes16, choice: Choice, probe: &Probe) -> Self {
        let (gpu_uuid, pci_bus_id) = match &probe.info {
            Ok(info) => (info.uuid, info.pci_bus_id.clone()),
            Err(_) => (Bytes16::ZERO, String::new()),
        };
        Self {
            rank,
            host_id: probe.host.host_id,
            host_name: probe.host.name.clone(),
            process,
            gpu_uuid,
            pci_bus_id,
            fabric: probe.fabric,
            imex_channel: probe.host.imex_channel,
            rdma_nics: probe.host.rdma_nics,
            trials: probe.trials,
            granularity: probe.granularity,
            choice,
        }
    }

    /// The NVLink clique: cluster UUID and clique id.
    pub fn clique(&self) -> Option<(Bytes16, u32)> {
        self.fabric.ok()?.clique()
    }

    /// Whether two ranks run on one host.
    pub fn same_host(&self, other: &Self) -> bool {
        self.host() == other.host()
    }

    pub(crate) fn host(&self) -> Host<'_> {
        if self.host_id.is_zero() {
            Host::Name(&self.host_name)
        } else {
            Host::Id(self.host_id)
        }
    }
}

/// What tells hosts apart.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Host<'a> {
    Id(Bytes16),
    Name(&'a str),
}
