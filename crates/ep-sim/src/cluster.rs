//! The cluster that is simulated: plain data.

mod file;

use std::hash::{Hash, Hasher};

use ep_sys::{Bytes16, FabricState, Status};

pub use file::ClusterError;

/// A simulated cluster: nodes with their GPUs, in rank order.
///
/// Plain data; edit the fields, start from a preset, or read a file with
/// [`from_toml`](Self::from_toml). Two drivers belong to the same simulated cluster when their
/// descriptions *and* run keys are equal.
///
/// ```
/// use ep_sim::Cluster;
///
/// let rack = Cluster::gb200_nvl72(18);
/// assert_eq!(rack.ranks(), 72);
/// assert_eq!(rack.place(5), Some((1, 1)));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Cluster {
    /// The nodes, in file order.
    pub nodes: Vec<Node>,
    /// Tells runs of the same description apart, so that two runs on one machine do not meet. All
    /// processes of a run use the same key; 0 unless set.
    pub run_key: u64,
}

/// One simulated host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    /// The host's name, for people.
    pub name: String,
    /// Whether an IMEX channel device node is visible.
    pub imex_channel: bool,
    /// RDMA NICs with an active port.
    pub nics: u32,
    /// Whether CUDA IPC works between processes of this node.
    pub ipc_namespace: IpcNamespace,
    /// The GPUs, by their number on the host.
    pub gpus: Vec<Gpu>,
}

/// One simulated GPU.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Gpu {
    /// What it is sold as. Not in the cluster file, where every GPU is an H200.
    pub product: Product,
    /// Whether the device claims fabric handles.
    pub fabric_attribute: bool,
    /// Whether the device has descriptor handles.
    pub posix_fd_attribute: bool,
    /// Whether memory for virtual addresses can be registered by a NIC. Not in the cluster file.
    pub gdr_attribute: bool,
    /// NVML: progress of the registration with the fabric.
    pub fabric_state: FabricState,
    /// NVML: how the registration ended; 0 is success.
    pub fabric_status: u32,
    /// NVML: the NVLink cluster; zeros mean none.
    pub cluster_uuid: Bytes16,
    /// NVML: the clique within the NVLink cluster.
    pub clique_id: u32,
    /// What `cuMemCreate` with a fabric handle returns.
    pub create_fabric: Status,
    /// What importing a fabric handle on this GPU returns.
    pub import_fabric: Status,
    /// Whether it can address other GPUs of its node, and they it, and over which links.
    pub peer_access: PeerAccess,
}

/// Whether CUDA IPC works between processes of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum IpcNamespace {
    /// It does.
    #[default]
    Shared,
    /// Every process is in a container of its own.
    Private,
}

/// Which GPUs of its node a GPU can address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PeerAccess {
    /// Every one, and over NVLink those that also say so.
    #[default]
    All,
    /// Every one, over PCIe alone.
    Pcie,
    /// Only itself.
    None,
}

/// What a GPU is sold as: fixes name, memory, multiprocessors and compute capability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Product {
    /// H100 SXM 80 GB.
    H100,
    /// H200 SXM.
    #[default]
    H200,
    /// One GPU of a GB200.
    Gb200,
}

impl Cluster {
    /// One HGX H200 host: fabric attribute true, but no NVLink cluster and fabric memory refused.
    pub fn hgx_h200(gpus: u32) -> Self {
        Self::hosts(1, Gpu::default(), gpus, 0)
    }

    /// HGX H200 hosts with `nics` RDMA NICs each.
    pub fn hgx_h200_nodes(nodes: u32, gpus_per_node: u32, nics: u32) -> Self {
        Self::hosts(nodes, Gpu::default(), gpus_per_node, nics)
    }

    /// HGX H100 hosts of 8 GPUs on InfiniBand, 8 NICs each.
    pub fn hgx_h100_infiniband(nodes: u32) -> Self {
        let gpu = Gpu {
            product: Product::H100,
            ..Gpu::default()
        };
        Self::hosts(nodes, gpu, 8, 8)
    }

    /// Nodes of one GB200 NVL72 rack, 4 GPUs each, all in one clique with IMEX running. A full rack
    /// has 18.
    pub fn gb200_nvl72(nodes: u32) -> Self {
        Self::gb200_nvl72_cliques(1, nodes)
    }

    /// GB200 NVL72 racks, each a clique of its own in an NVLink cluster of its own, joined by NICs.
    pub fn gb200_nvl72_cliques(cliques: u32, nodes_per_clique: u32) -> Self {
        let mut cluster = Self::default();
        for clique in 0..cliques {
            let mut uuid = [
                0x6b, 0x1f, 0x0c, 0x3e, 0, 0, 0x40, 0, 0x80, 0, 0, 0, 0, 0, 0, 0,
            ];
            uuid[12..].copy_from_slice(&clique.wrapping_add(1).to_be_bytes());
            // Racks out of the factory share clique ids: only the pair with the UUID is unique.
            let gpu = Gpu {
                product: Product::Gb200,
                ..Gpu::default()
            }
            .in_clique(Bytes16(uuid), 1);
            let nics = if cliques > 1 { 4 } else { 0 };
            for _ in 0..nodes_per_clique {
                let name = format!("n{}", cluster.nodes.len());
                let mut node = Node::new(name, gpu.clone(), 4);
                node.imex_channel = true;
                node.nics = nics;
                cluster.nodes.push(node);
            }
        }
        cluster
    }

    /// Reads a cluster file.
    ///
    /// ```
    /// use ep_sim::Cluster;
    ///
    /// let cluster = Cluster::from_toml(
    ///     r#"
    ///     [[node]]
    ///     name = "n0"
    ///     gpus = 4
    ///     [node.gpu]
    ///     posix_fd_attribute = false
    ///     "#,
    /// )?;
    /// assert_eq!(cluster.ranks(), 4);
    /// # Ok::<(), ep_sim::ClusterError>(())
    /// ```
    ///
    /// # Errors
    /// What is wrong and on which line: syntax, an unknown key, a missing key, a value that is none;
    /// or that there are no nodes.
    pub fn from_toml(text: &str) -> Result<Self, ClusterError> {
        file::parse(text)
    }

    /// The same cluster for the run `key`.
    pub fn with_run_key(mut self, key: u64) -> Self {
        self.run_key = key;
        self
    }

    /// The same cluster with one more node.
    pub fn with_node(mut self, node: Node) -> Self {
        self.nodes.push(node);
        self
    }

    /// The same cluster with every node changed by `change`.
    pub fn map_nodes(mut self, change: impl FnMut(&mut Node)) -> Self {
        self.nodes.iter_mut().for_each(change);
        self
    }

    /// The same cluster with every GPU changed by `change`.
    pub fn map_gpus(mut self, change: impl FnMut(&mut Gpu)) -> Self {
        self.nodes
            .iter_mut()
            .flat_map(|node| &mut node.gpus)
            .for_each(change);
        self
    }

    /// Number of ranks: one per GPU.
    pub fn ranks(&self) -> usize {
        self.nodes.iter().map(|node| node.gpus.len()).sum()
    }

    /// The node and the GPU's number on it where `rank` runs: GPUs are counted in file order.
    pub fn place(&self, rank: usize) -> Option<(usize, u32)> {
        let mut first = 0;
        for (index, node) in self.nodes.iter().enumerate() {
            if let Some(gpu) = rank.checked_sub(first).filter(|gpu| *gpu < node.gpus.len()) {
                return Some((index, u32::try_from(gpu).ok()?));
            }
            first += node.gpus.len();
        }
        None
    }

    /// Identity of this cluster in this run: the same number in every process that simulates it.
    pub fn id(&self) -> u64 {
        let mut hasher = Fnv::default();
        self.hash(&mut hasher);
        hasher.finish()
    }

    fn hosts(nodes: u32, gpu: Gpu, gpus_per_node: u32, nics: u32) -> Self {
        let nodes = (0..nodes)
            .map(|i| Node {
                nics,
                ..Node::new(format!("n{i}"), gpu.clone(), gpus_per_node)
            })
            .collect();
        Self { nodes, run_key: 0 }
    }
}

impl Node {
    /// A host with `gpus` GPUs like `gpu`; otherwise like an ordinary HGX host.
    pub fn new(name: impl Into<String>, gpu: Gpu, gpus: u32) -> Self {
        Self {
            name: name.into(),
            imex_channel: false,
            nics: 0,
            ipc_namespace: IpcNamespace::Shared,
            gpus: (0..gpus).map(|_| gpu.clone()).collect(),
        }
    }
}

impl Gpu {
    /// The same GPU, registered in a clique whose fabric memory works.
    pub fn in_clique(mut self, cluster_uuid: Bytes16, clique_id: u32) -> Self {
        self.cluster_uuid = cluster_uuid;
        self.clique_id = clique_id;
        self.create_fabric = Status::SUCCESS;
        self
    }
}

/// A GPU of an ordinary HGX H200 host, where the attribute says fabric and the driver refuses it.
impl Default for Gpu {
    fn default() -> Self {
        Self {
            product: Product::H200,
            fabric_attribute: true,
            posix_fd_attribute: true,
            gdr_attribute: true,
            fabric_state: FabricState::Completed,
            fabric_status: 0,
            cluster_uuid: Bytes16::ZERO,
            clique_id: 0,
            create_fabric: Status::NOT_PERMITTED,
            import_fabric: Status::SUCCESS,
            peer_access: PeerAccess::All,
        }
    }
}

impl Product {
    /// Product name.
    pub fn name(self) -> &'static str {
        match self {
            Self::H100 => "Simulated H100",
            Self::H200 => "Simulated H200",
            Self::Gb200 => "Simulated GB200",
        }
    }

    /// Device memory in bytes.
    pub fn total_bytes(self) -> u64 {
        match self {
            Self::H100 => 81_559 << 20,
            Self::H200 => 150_109_880_320,
            Self::Gb200 => 189_471 << 20,
        }
    }

    /// Compute capability, major and minor.
    pub fn compute_capability(self) -> (u32, u32) {
        match self {
            Self::H100 | Self::H200 => (9, 0),
            Self::Gb200 => (10, 0),
        }
    }

    /// Streaming multiprocessors.
    pub fn multiprocessors(self) -> u32 {
        match self {
            Self::H100 | Self::H200 => 132,
            Self::Gb200 => 152,
        }
    }
}

/// FNV-1a. The standard hasher promises no stable result, and processes built apart must agree.
pub(crate) struct Fnv(u64);

impl Fnv {
    /// A 128-bit identity of `value`.
    pub(crate) fn identity(value: &impl Hash) -> Bytes16 {
        let mut bytes = [0; 16];
        for (salt, half) in (0_u64..).zip(bytes.chunks_exact_mut(8)) {
            let mut hasher = Self::default();
            salt.hash(&mut hasher);
            value.hash(&mut hasher);
            half.copy_from_slice(&hasher.finish().to_be_bytes());
        }
        Bytes16(bytes)
    }
}

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
