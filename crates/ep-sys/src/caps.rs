//! What a device says of itself: plain data, asked once. Attributes nominate; only a trial decides.

use crate::{Bytes16, Status};

/// Identity and attributes of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The GPU's UUID, the same in every process.
    pub uuid: Bytes16,
    /// PCI address, `domain:bus:device.function`.
    pub pci_bus_id: String,
    /// Product name.
    pub name: String,
    /// Compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Memory in bytes.
    pub total_bytes: u64,
    /// `CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED`.
    pub vmm_attribute: bool,
    /// `CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED`. True on ordinary Hopper hosts too.
    pub fabric_attribute: bool,
    /// `CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED`.
    pub posix_fd_attribute: bool,
    /// `CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED`.
    pub gdr_vmm_attribute: bool,
}

/// Progress of a GPU's registration with its NVLink fabric (NVML `nvmlGpuFabricState_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FabricState {
    /// The GPU has no fabric.
    NotSupported,
    /// Registration has not started.
    NotStarted,
    /// Registration is under way.
    InProgress,
    /// Registration ended; `status` says how.
    Completed,
    /// A value this crate has no name for.
    Other(u32),
}

/// What joins two GPUs of a host, by NVML (`nvmlDeviceGetP2PStatus`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Link {
    /// NVLink, switches in between or not.
    Nvlink,
    /// PCIe alone: they can address each other, and not over NVLink.
    Pcie,
    /// NVML does not say: the other GPU is hidden from it, as in a container; it says that the two
    /// cannot even address each other, which only trying proves; or they are one GPU.
    Unknown,
}

/// NVML's view of a GPU's fabric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FabricInfo {
    /// Registration state.
    pub state: FabricState,
    /// NVML return value of the registration; 0 is success.
    pub status: u32,
    /// The NVLink cluster; zeros mean none.
    pub cluster_uuid: Bytes16,
    /// The clique within the cluster. Not unique without the cluster's UUID.
    pub clique_id: u32,
}

impl FabricInfo {
    /// A GPU without a fabric.
    pub const NONE: Self = Self {
        state: FabricState::NotSupported,
        status: 0,
        cluster_uuid: Bytes16::ZERO,
        clique_id: 0,
    };

    /// The clique that this GPU belongs to: registration completed with success in a real cluster.
    pub fn clique(&self) -> Option<(Bytes16, u32)> {
        (self.state == FabricState::Completed
            && Status(self.status) == Status::SUCCESS
            && !self.cluster_uuid.is_zero())
        .then_some((self.cluster_uuid, self.clique_id))
    }
}

/// What a process sees of its host, beyond the GPU driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// The host's name, for people.
    pub name: String,
    /// The same for all processes of one running kernel (on Linux its boot id), whatever container
    /// they are in; different between hosts.
    pub host_id: Bytes16,
    /// Whether an IMEX channel device node is visible (`/dev/nvidia-caps-imex-channels/channel*`).
    pub imex_channel: bool,
    /// RDMA NICs with an active port (`/sys/class/infiniband`).
    pub rdma_nics: u32,
}
