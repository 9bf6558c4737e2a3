//! One process's view of one simulated node: what it holds, and what the driver refuses it.
//!
//! Refusals carry the status that the vendor's driver returns for the same mistake, so that a caller
//! which is wrong fails here as it would on a GPU.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ep_sys::{
    DeviceOrdinal, DevicePtr, EventHandle, FABRIC_HANDLE_BYTES, FabricInfo, HandleKind, HostMemory,
    IPC_HANDLE_BYTES, Link, PhysHandle, ShareableHandle, Status, StreamHandle,
};

use crate::cluster::{Cluster, Gpu, IpcNamespace, Node, PeerAccess};
use crate::live::Live;
use crate::memory::{Mapping, Space, SpaceError};
use crate::share::{Charge, Identity, Locator, Physical, Sharing, pid, unique};

/// The multiple that physical allocations and their addresses keep, whatever the handle.
pub(crate) const GRANULARITY: u64 = 2 << 20;

/// Why the model did not do what was asked.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// As the simulated driver would.
    Driver(Status),
    /// The host that simulates could not.
    Host(io::Error),
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self::Driver(status)
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::OutOfMemory => Self::Driver(Status::OUT_OF_MEMORY),
            _ => Self::Host(error),
        }
    }
}

impl From<SpaceError> for Refusal {
    fn from(error: SpaceError) -> Self {
        match error {
            SpaceError::Misplaced => Self::Driver(Status::INVALID_VALUE),
            SpaceError::Os(error) => error.into(),
        }
    }
}

type Result<T, E = Refusal> = std::result::Result<T, E>;

/// A simulated process.
#[derive(Debug)]
pub(crate) struct Process {
    cluster: Arc<Cluster>,
    cluster_id: u64,
    node: u32,
    /// Number within the real process: several simulated processes may live in one.
    id: u64,
    devices: Vec<Device>,
    handles: HashMap<PhysHandle, Handle>,
    regions: BTreeMap<u64, Region>,
    streams: HashMap<StreamHandle, Stream>,
    events: HashMap<EventHandle, Event>,
}

/// A visible device.
#[derive(Debug)]
struct Device {
    /// Its number on the node.
    gpu: u32,
    used: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Handle {
    memory: Arc<Physical>,
    stuck: bool,
}

/// Addresses that one call acquired and one call gives up.
#[derive(Debug)]
struct Region {
    space: Space,
    role: Role,
    /// How many times an injected fault refused to give it up.
    stuck: usize,
}

#[derive(Debug, PartialEq)]
enum Role {
    Reservation,
    Allocation,
    Ipc {
        device: DeviceOrdinal,
        identity: Identity,
        opens: usize,
    },
    Host {
        bytes: u64,
    },
}

#[derive(Debug)]
struct Stream {
    device: DeviceOrdinal,
    stuck: bool,
}

#[derive(Debug)]
struct Event {
    device: DeviceOrdinal,
    timing: bool,
    recorded_us: Option<f64>,
    stuck: bool,
}

impl Process {
    pub(crate) fn new(cluster: &Cluster, node: usize, visible: &[u32]) -> Self {
        let gpus = cluster.nodes.get(node).map_or(0, |node| node.gpus.len());
        let devices = visible
            .iter()
            .take_while(|gpu| usize::try_from(**gpu).is_ok_and(|gpu| gpu < gpus))
            .map(|gpu| Device {
                gpu: *gpu,
                used: Arc::default(),
            })
            .collect();
        Self {
            cluster: Arc::new(cluster.clone()),
            cluster_id: cluster.id(),
            node: u32::try_from(node).unwrap_or(u32::MAX),
            id: unique(),
            devices,
            handles: HashMap::new(),
            regions: BTreeMap::new(),
            streams: HashMap::new(),
            events: HashMap::new(),
        }
    }

    pub(crate) fn cluster_id(&self) -> u64 {
        self.cluster_id
    }

    pub(crate) fn node_index(&self) -> u32 {
        self.node
    }

    pub(crate) fn node(&self) -> Option<&Node> {
        self.cluster.nodes.get(usize::try_from(self.node).ok()?)
    }

    pub(crate) fn device_count(&self) -> Result<u32> {
        match self.devices.len() {
            0 => Err(Status::NO_DEVICE.into()),
            n => u32::try_from(n).map_err(|_| Status::INVALID_VALUE.into()),
        }
    }

    /// A visible device's number on the node, and its description.
    pub(crate) fn gpu(&self, device: DeviceOrdinal) -> Result<(u32, &Gpu)> {
        let gpu = self.device(device)?.gpu;
        let described = self
            .describe(self.node, gpu)
            .ok_or(Status::INVALID_DEVICE)?;
        Ok((gpu, described))
    }

    /// What joins a visible device and a GPU of the node, by its number there. A process in a
    /// container of its own knows no others than the visible.
    pub(crate) fn link(&self, device: DeviceOrdinal, peer: u32) -> Result<Link> {
        let (here, gpu) = self.gpu(device)?;
        let hidden = self
            .node()
            .is_some_and(|node| node.ipc_namespace == IpcNamespace::Private)
            && self.devices.iter().all(|visible| visible.gpu != peer);
        let by_nvlink = |gpu: &Gpu| gpu.peer_access == PeerAccess::All;
        Ok(match self.describe(self.node, peer) {
            Some(other) if !hidden && here != peer && self.reaches(here, peer) => {
                if by_nvlink(gpu) && by_nvlink(other) {
                    Link::Nvlink
                } else {
                    Link::Pcie
                }
            }
            _ => Link::Unknown,
        })
    }

    pub(crate) fn can_access_peer(
        &self,
        device: DeviceOrdinal,
        peer: DeviceOrdinal,
    ) -> Result<bool> {
        let ((here, _), (there, _)) = (self.gpu(device)?, self.gpu(peer)?);
        Ok(here != there && self.reaches(here, there))
    }

    pub(crate) fn enable_peer_access(
        &self,
        device: DeviceOrdinal,
        peer: DeviceOrdinal,
    ) -> Result<()> {
        match self.can_access_peer(device, peer)? {
            true => Ok(()),
            false => Err(Status::PEER_ACCESS_UNSUPPORTED.into()),
        }
    }

    // Physical allocations.

    pub(crate) fn create(
        &mut self,
        device: DeviceOrdinal,
        bytes: u64,
        kind: HandleKind,
        gdr: bool,
    ) -> Result<PhysHandle> {
        let (_, gpu) = self.gpu(device)?;
        if bytes == 0 || !bytes.is_multiple_of(GRANULARITY) {
            return Err(Status::INVALID_VALUE.into());
        }
        match kind {
            HandleKind::Fabric if gpu.create_fabric != Status::SUCCESS => {
                return Err(gpu.create_fabric.into());
            }
            HandleKind::Fabric if !gpu.fabric_attribute => return Err(Status::NOT_SUPPORTED.into()),
            HandleKind::PosixFd if !gpu.posix_fd_attribute => {
                return Err(Status::NOT_SUPPORTED.into());
            }
            _ => {}
        }
        if gdr && !gpu.gdr_attribute {
            return Err(Status::NOT_SUPPORTED.into());
        }
        let memory = self.allocate(device, bytes, kind.into())?;
        Ok(self.hold(memory))
    }

    pub(crate) fn release(&mut self, handle: PhysHandle) -> Result<()> {
        self.handles
            .remove(&handle)
            .map(drop)
            .ok_or(Status::INVALID_VALUE.into())
    }

    pub(crate) fn export(&self, handle: PhysHandle, kind: HandleKind) -> Result<ShareableHandle> {
        let memory = &self
            .handles
            .get(&handle)
            .ok_or(Status::INVALID_VALUE)?
            .memory;
        if !memory.is_own() || memory.identity().sharing != kind.into() {
            return Err(Status::INVALID_VALUE.into());
        }
        Ok(match kind {
            HandleKind::Fabric => ShareableHandle::Fabric(memory.locator().encode()),
            HandleKind::PosixFd => ShareableHandle::PosixFd(memory.memfd().duplicate()?),
        })
    }

    pub(crate) fn import(
        &mut self,
        device: DeviceOrdinal,
        handle: &ShareableHandle,
    ) -> Result<PhysHandle> {
        let memory = match handle {
            ShareableHandle::Fabric(handle) => self.import_fabric(device, handle)?,
            ShareableHandle::PosixFd(fd) => {
                self.device(device)?;
                Physical::of_descriptor(fd.as_fd())?
                    // A descriptor cannot leave its host: one of another node is a forgery.
                    .filter(|memory| {
                        let identity = memory.identity();
                        identity.sharing == Sharing::PosixFd && self.is_here(identity)
                    })
                    .ok_or(Status::UNKNOWN)?
            }
        };
        Ok(self.hold(memory))
    }

    fn import_fabric(
        &self,
        device: DeviceOrdinal,
        handle: &[u8; FABRIC_HANDLE_BYTES],
    ) -> Result<Arc<Physical>> {
        let (here, gpu) = self.gpu(device)?;
        if !self.node().is_some_and(|node| node.imex_channel) {
            return Err(Status::NOT_SUPPORTED.into());
        }
        let locator = Locator::decode(handle)
            .filter(|locator| locator.identity.sharing == Sharing::Fabric)
            .ok_or(Status::INVALID_VALUE)?;
        let identity = &locator.identity;
        let own_gpu = self.is_here(identity) && identity.gpu == here;
        if !own_gpu && gpu.import_fabric != Status::SUCCESS {
            return Err(gpu.import_fabric.into());
        }
        if !self.in_fabric_of(gpu, identity) {
            return Err(Status::INVALID_HANDLE.into());
        }
        Physical::of_locator(&locator)?.ok_or(Status::INVALID_HANDLE.into())
    }

    /// Whether `gpu`, on this node, is in one NVLink domain with the maker of `identity`.
    fn in_fabric_of(&self, gpu: &Gpu, identity: &Identity) -> bool {
        if identity.cluster != self.cluster_id {
            return false;
        }
        let there = usize::try_from(identity.node)
            .ok()
            .and_then(|n| self.cluster.nodes.get(n));
        let Some(maker) = self.describe(identity.node, identity.gpu) else {
            return false;
        };
        match (fabric_of(gpu).clique(), fabric_of(maker).clique()) {
            (Some(here), Some(there)) if here != there => false,
            (Some(_), Some(_)) => there.is_some_and(|node| node.imex_channel),
            // GPUs of one host need no cluster around them.
            _ => identity.node == self.node,
        }
    }

    // Address space.

    pub(crate) fn reserve(&mut self, bytes: u64, align: u64) -> Result<DevicePtr> {
        let align = if align == 0 { GRANULARITY } else { align };
        if bytes == 0 || !bytes.is_multiple_of(GRANULARITY) || !align.is_power_of_two() {
            return Err(Status::INVALID_VALUE.into());
        }
        let space = Space::reserve(bytes, align.max(GRANULARITY))?;
        Ok(self.place(space, Role::Reservation))
    }

    pub(crate) fn address_free(&mut self, ptr: DevicePtr, bytes: u64) -> Result<()> {
        let free = |region: &Region| {
            region.role == Role::Reservation
                && region.space.bytes() == bytes
                && region.space.mappings().next().is_none()
        };
        self.remove(ptr, free)
    }

    pub(crate) fn map(&mut self, ptr: DevicePtr, bytes: u64, handle: PhysHandle) -> Result<()> {
        let memory = &self
            .handles
            .get(&handle)
            .ok_or(Status::INVALID_VALUE)?
            .memory;
        let memory = Arc::clone(memory);
        if bytes == 0 || !ptr.0.is_multiple_of(GRANULARITY) {
            return Err(Status::INVALID_VALUE.into());
        }
        // No part of an allocation is mapped alone, not even its start.
        if bytes != memory.bytes() {
            return Err(Status::NOT_SUPPORTED.into());
        }
        Ok(self.reservation(ptr, bytes)?.map(ptr.0, bytes, memory)?)
    }

    pub(crate) fn unmap(&mut self, ptr: DevicePtr, bytes: u64) -> Result<()> {
        Ok(self.reservation(ptr, bytes)?.unmap(ptr.0, bytes)?)
    }

    pub(crate) fn set_access(
        &mut self,
        device: DeviceOrdinal,
        ptr: DevicePtr,
        bytes: u64,
    ) -> Result<()> {
        let (here, _) = self.gpu(device)?;
        let node = self.node;
        let cluster = Arc::clone(&self.cluster);
        let space = self.reservation(ptr, bytes)?;
        let reachable = space.mappings_in(ptr.0, bytes).all(|mapping| {
            mapping.memory().is_none_or(|memory| {
                let identity = memory.identity();
                identity.node != node || reaches(&cluster, node, here, identity.gpu)
            })
        });
        if !reachable {
            return Err(Status::NOT_SUPPORTED.into());
        }
        Ok(space.allow(ptr.0, bytes, device)?)
    }

    // Plain memory.

    pub(crate) fn alloc(&mut self, device: DeviceOrdinal, bytes: u64) -> Result<DevicePtr> {
        self.device(device)?;
        if bytes == 0 {
            return Err(Status::INVALID_VALUE.into());
        }
        let memory = self.allocate(device, bytes, Sharing::Ipc)?;
        let space = Space::of_memory(memory, device)?;
        Ok(self.place(space, Role::Allocation))
    }

    pub(crate) fn free(&mut self, ptr: DevicePtr) -> Result<()> {
        self.remove(ptr, |region| region.role == Role::Allocation)
    }

    pub(crate) fn mem_info(&self, device: DeviceOrdinal) -> Result<(u64, u64)> {
        let total = self.gpu(device)?.1.product.total_bytes();
        let used = self.device(device)?.used.load(Ordering::Relaxed);
        Ok((total.saturating_sub(used), total))
    }

    /// The handle of the whole allocation, wherever in it `ptr` points.
    pub(crate) fn ipc_handle(&self, ptr: DevicePtr) -> Result<[u8; IPC_HANDLE_BYTES]> {
        self.region(ptr, 1)
            .filter(|region| region.role == Role::Allocation)
            .and_then(|region| region.space.mappings().find_map(Mapping::memory))
            .map(|memory| memory.locator().encode())
            .ok_or(Status::INVALID_VALUE.into())
    }

    pub(crate) fn ipc_open(
        &mut self,
        device: DeviceOrdinal,
        handle: &[u8; IPC_HANDLE_BYTES],
    ) -> Result<DevicePtr> {
        let (here, _) = self.gpu(device)?;
        let locator = Locator::decode(handle).ok_or(Status::INVALID_VALUE)?;
        let identity = locator.identity;
        if identity.sharing != Sharing::Ipc {
            return Err(Status::INVALID_VALUE.into());
        }
        if (identity.pid, identity.process) == (pid(), self.id) {
            return Err(Status::INVALID_CONTEXT.into());
        }
        let private = self
            .node()
            .is_none_or(|node| node.ipc_namespace == IpcNamespace::Private);
        if private || !self.is_here(&identity) {
            return Err(Status::INVALID_VALUE.into());
        }
        if !self.reaches(here, identity.gpu) {
            return Err(Status::PEER_ACCESS_UNSUPPORTED.into());
        }
        // Opened before: the driver counts, and returns the same address.
        for (base, region) in &mut self.regions {
            if let Role::Ipc {
                device: on,
                identity: of,
                opens,
            } = &mut region.role
                && (*on, *of) == (device, identity)
            {
                *opens += 1;
                return Ok(DevicePtr(*base));
            }
        }
        let memory = Physical::of_locator(&locator)?.ok_or(Status::INVALID_VALUE)?;
        let space = Space::of_memory(memory, device)?;
        Ok(self.place(
            space,
            Role::Ipc {
                device,
                identity,
                opens: 1,
            },
        ))
    }

    pub(crate) fn ipc_close(&mut self, device: DeviceOrdinal, ptr: DevicePtr) -> Result<()> {
        let region = self.regions.get_mut(&ptr.0).ok_or(Status::INVALID_VALUE)?;
        match &mut region.role {
            Role::Ipc {
                device: on, opens, ..
            } if *on == device => *opens -= 1,
            _ => return Err(Status::INVALID_VALUE.into()),
        }
        if matches!(region.role, Role::Ipc { opens: 0, .. }) {
            self.regions.remove(&ptr.0);
        }
        Ok(())
    }

    // Page-locked host memory.

    pub(crate) fn host_alloc(&mut self, device: DeviceOrdinal, bytes: u64) -> Result<HostMemory> {
        self.device(device)?;
        if bytes == 0 {
            return Err(Status::INVALID_VALUE.into());
        }
        let space = Space::of_host(bytes, device)?;
        let device = self.place(space, Role::Host { bytes });
        Ok(HostMemory {
            host: device.0,
            device,
            bytes,
        })
    }

    pub(crate) fn host_free(&mut self, memory: HostMemory) -> Result<()> {
        self.remove(memory.device, |region| is_as_given(region, memory))
    }

    pub(crate) fn host_load(&self, memory: HostMemory, offset: u64) -> Result<u64> {
        let region = self.regions.get(&memory.host);
        let inside = offset.is_multiple_of(8)
            && offset.checked_add(8).is_some_and(|end| end <= memory.bytes);
        region
            .filter(|region| inside && is_as_given(region, memory))
            .and_then(|region| region.space.load(memory.host + offset))
            .ok_or(Status::INVALID_VALUE.into())
    }

    // Copies.

    pub(crate) fn fill(
        &self,
        device: DeviceOrdinal,
        ptr: DevicePtr,
        value: u8,
        bytes: u64,
        stream: StreamHandle,
    ) -> Result<()> {
        self.stream(device, stream)?;
        if bytes == 0 {
            return Ok(());
        }
        let space = self.addressable(device, ptr, bytes)?;
        done(space.fill(ptr.0, to_usize(bytes)?, value))
    }

    pub(crate) fn write(&self, device: DeviceOrdinal, dst: DevicePtr, src: &[u8]) -> Result<()> {
        if src.is_empty() {
            return self.device(device).map(drop);
        }
        done(
            self.addressable(device, dst, src.len() as u64)?
                .write(dst.0, src),
        )
    }

    pub(crate) fn read(&self, device: DeviceOrdinal, dst: &mut [u8], src: DevicePtr) -> Result<()> {
        if dst.is_empty() {
            return self.device(device).map(drop);
        }
        done(
            self.addressable(device, src, dst.len() as u64)?
                .read(src.0, dst),
        )
    }

    pub(crate) fn copy(
        &self,
        device: DeviceOrdinal,
        dst: DevicePtr,
        src: DevicePtr,
        bytes: u64,
        stream: StreamHandle,
    ) -> Result<()> {
        self.stream(device, stream)?;
        if bytes == 0 {
            return Ok(());
        }
        let from = self.addressable(device, src, bytes)?;
        let to = self.addressable(device, dst, bytes)?;
        let mut chunk = vec![0; to_usize(bytes.min(1 << 20))?];
        let mut at = 0;
        while at < bytes {
            let part = to_usize((bytes - at).min(chunk.len() as u64))?;
            done(
                from.read(src.0 + at, &mut chunk[..part]) && to.write(dst.0 + at, &chunk[..part]),
            )?;
            at += part as u64;
        }
        Ok(())
    }

    // Streams and events.

    pub(crate) fn stream_create(&mut self, device: DeviceOrdinal) -> Result<StreamHandle> {
        self.device(device)?;
        let handle = StreamHandle(unique());
        self.streams.insert(
            handle,
            Stream {
                device,
                stuck: false,
            },
        );
        Ok(handle)
    }

    pub(crate) fn stream_destroy(
        &mut self,
        device: DeviceOrdinal,
        stream: StreamHandle,
    ) -> Result<()> {
        self.stream(device, stream)?;
        self.streams
            .remove(&stream)
            .map(drop)
            .ok_or(Status::INVALID_HANDLE.into())
    }

    /// Refuses a stream that work for `device` cannot be put on. Every device has the default one.
    fn stream(&self, device: DeviceOrdinal, stream: StreamHandle) -> Result<()> {
        self.device(device)?;
        self.known_stream(stream)?;
        match self.streams.get(&stream) {
            Some(stream) if stream.device != device => Err(Status::INVALID_HANDLE.into()),
            _ => Ok(()),
        }
    }

    pub(crate) fn known_stream(&self, stream: StreamHandle) -> Result<()> {
        let is_default = [StreamHandle::default(), StreamHandle::LEGACY].contains(&stream);
        if is_default || self.streams.contains_key(&stream) {
            Ok(())
        } else {
            Err(Status::INVALID_HANDLE.into())
        }
    }

    pub(crate) fn event_create(
        &mut self,
        device: DeviceOrdinal,
        timing: bool,
    ) -> Result<EventHandle> {
        self.device(device)?;
        let handle = EventHandle(unique());
        self.events.insert(
            handle,
            Event {
                device,
                timing,
                recorded_us: None,
                stuck: false,
            },
        );
        Ok(handle)
    }

    pub(crate) fn event_destroy(&mut self, event: EventHandle) -> Result<()> {
        self.events
            .remove(&event)
            .map(drop)
            .ok_or(Status::INVALID_HANDLE.into())
    }

    pub(crate) fn event_record(
        &mut self,
        device: DeviceOrdinal,
        event: EventHandle,
        stream: StreamHandle,
        now_us: f64,
    ) -> Result<()> {
        self.stream(device, stream)?;
        let event = self
            .events
            .get_mut(&event)
            .filter(|event| event.device == device);
        event.ok_or(Status::INVALID_HANDLE)?.recorded_us = Some(now_us);
        Ok(())
    }

    pub(crate) fn event(&self, event: EventHandle) -> Result<()> {
        self.events
            .get(&event)
            .map(drop)
            .ok_or(Status::INVALID_HANDLE.into())
    }

    pub(crate) fn elapsed_us(&self, start: EventHandle, end: EventHandle) -> Result<f64> {
        let time = |event: &EventHandle| {
            self.events
                .get(event)
                .filter(|event| event.timing)
                .and_then(|event| event.recorded_us)
        };
        match (time(&start), time(&end)) {
            (Some(start), Some(end)) => Ok(end - start),
            _ => Err(Status::INVALID_HANDLE.into()),
        }
    }

    // What an injected refusal leaves behind.

    pub(crate) fn handle_stuck(&mut self, handle: PhysHandle) {
        if let Some(handle) = self.handles.get_mut(&handle) {
            handle.stuck = true;
        }
    }

    pub(crate) fn region_stuck(&mut self, ptr: DevicePtr) {
        if let Some(region) = self.regions.get_mut(&ptr.0) {
            region.stuck += 1;
        }
    }

    pub(crate) fn mappings_stuck(&mut self, ptr: DevicePtr, bytes: u64) {
        if let Ok(space) = self.reservation(ptr, bytes) {
            space
                .mappings_in_mut(ptr.0, bytes)
                .for_each(|mapping| mapping.stuck = true);
        }
    }

    pub(crate) fn stream_stuck(&mut self, stream: StreamHandle) {
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.stuck = true;
        }
    }

    pub(crate) fn event_stuck(&mut self, event: EventHandle) {
        if let Some(event) = self.events.get_mut(&event) {
            event.stuck = true;
        }
    }

    /// Counts what is held.
    pub(crate) fn live(&self) -> Live {
        let mut live = Live {
            handles: self.handles.len(),
            streams: self.streams.len(),
            events: self.events.len(),
            ..Live::default()
        };
        let mut injected = self.handles.values().filter(|handle| handle.stuck).count()
            + self.streams.values().filter(|stream| stream.stuck).count()
            + self.events.values().filter(|event| event.stuck).count();
        // Every memory file that is held, and whether a stuck object holds it.
        let mut files: BTreeMap<(u32, u64), bool> = BTreeMap::new();
        let mut hold = |memory: &Physical, stuck: bool| {
            let Identity { pid, id, .. } = *memory.identity();
            *files.entry((pid, id)).or_default() |= stuck;
        };
        for handle in self.handles.values() {
            hold(&handle.memory, handle.stuck);
        }
        for region in self.regions.values() {
            let inner = region
                .space
                .mappings()
                .filter(|mapping| mapping.stuck)
                .count();
            for mapping in region.space.mappings() {
                if let Some(memory) = mapping.memory() {
                    hold(memory, region.stuck > 0 || mapping.stuck);
                }
            }
            match region.role {
                Role::Reservation => {
                    live.reservations += 1;
                    live.mappings += region.space.mappings().count();
                    // What is still mapped keeps the addresses too.
                    injected += inner + usize::from(region.stuck > 0 || inner > 0);
                }
                Role::Allocation => {
                    live.allocations += 1;
                    injected += usize::from(region.stuck > 0);
                }
                Role::Host { .. } => {
                    live.host += 1;
                    injected += usize::from(region.stuck > 0);
                }
                Role::Ipc { opens, .. } => {
                    live.ipc += opens;
                    injected += region.stuck.min(opens);
                }
            }
        }
        live.descriptors = files.len();
        live.injected_leaks = injected + files.values().filter(|stuck| **stuck).count();
        live
    }

    // Look-ups.

    fn device(&self, device: DeviceOrdinal) -> Result<&Device> {
        let index = usize::try_from(device.0).ok();
        index
            .and_then(|index| self.devices.get(index))
            .ok_or(Status::INVALID_DEVICE.into())
    }

    fn describe(&self, node: u32, gpu: u32) -> Option<&Gpu> {
        describe(&self.cluster, node, gpu)
    }

    /// Whether one GPU of this node can address another's memory.
    fn reaches(&self, here: u32, there: u32) -> bool {
        reaches(&self.cluster, self.node, here, there)
    }

    /// Whether an allocation was made on this node of this cluster.
    fn is_here(&self, identity: &Identity) -> bool {
        (identity.cluster, identity.node) == (self.cluster_id, self.node)
    }

    fn allocate(
        &self,
        device: DeviceOrdinal,
        bytes: u64,
        sharing: Sharing,
    ) -> Result<Arc<Physical>> {
        let (gpu, described) = self.gpu(device)?;
        let total = described.product.total_bytes();
        let charge =
            Charge::take(&self.device(device)?.used, bytes, total).ok_or(Status::OUT_OF_MEMORY)?;
        let identity = Identity {
            cluster: self.cluster_id,
            node: self.node,
            gpu,
            sharing,
            pid: pid(),
            process: self.id,
            id: unique(),
        };
        Ok(Physical::create(identity, bytes, charge)?)
    }

    fn hold(&mut self, memory: Arc<Physical>) -> PhysHandle {
        let handle = PhysHandle(unique());
        self.handles.insert(
            handle,
            Handle {
                memory,
                stuck: false,
            },
        );
        handle
    }

    fn place(&mut self, space: Space, role: Role) -> DevicePtr {
        let base = space.base();
        self.regions.insert(
            base,
            Region {
                space,
                role,
                stuck: 0,
            },
        );
        DevicePtr(base)
    }

    fn remove(&mut self, ptr: DevicePtr, may: impl FnOnce(&Region) -> bool) -> Result<()> {
        if !self.regions.get(&ptr.0).is_some_and(may) {
            return Err(Status::INVALID_VALUE.into());
        }
        self.regions.remove(&ptr.0);
        Ok(())
    }

    /// The region that contains a range.
    fn region(&self, ptr: DevicePtr, bytes: u64) -> Option<&Region> {
        let (_, region) = self.regions.range(..=ptr.0).next_back()?;
        region.space.contains(ptr.0, bytes).then_some(region)
    }

    fn reservation(&mut self, ptr: DevicePtr, bytes: u64) -> Result<&mut Space> {
        let (_, region) = self
            .regions
            .range_mut(..=ptr.0)
            .next_back()
            .ok_or(Status::INVALID_VALUE)?;
        let found = region.role == Role::Reservation && region.space.contains(ptr.0, bytes);
        if found {
            Ok(&mut region.space)
        } else {
            Err(Status::INVALID_VALUE.into())
        }
    }

    /// The space of a range that copies made for `device` may touch.
    fn addressable(&self, device: DeviceOrdinal, ptr: DevicePtr, bytes: u64) -> Result<&Space> {
        self.device(device)?;
        let region = self.region(ptr, bytes).ok_or(Status::INVALID_VALUE)?;
        // Plain memory has one address space for all devices of a process; a mapping is open only
        // to those it was opened to.
        let plain = region.role != Role::Reservation;
        let open = |access: &BTreeSet<DeviceOrdinal>| plain || access.contains(&device);
        match region.space.open(ptr.0, bytes, open) {
            true => Ok(&region.space),
            false => Err(Status::INVALID_VALUE.into()),
        }
    }
}

/// NVML's view of a GPU.
pub(crate) fn fabric_of(gpu: &Gpu) -> FabricInfo {
    FabricInfo {
        state: gpu.fabric_state,
        status: gpu.fabric_status,
        cluster_uuid: gpu.cluster_uuid,
        clique_id: gpu.clique_id,
    }
}

fn describe(cluster: &Cluster, node: u32, gpu: u32) -> Option<&Gpu> {
    let node = cluster.nodes.get(usize::try_from(node).ok()?)?;
    node.gpus.get(usize::try_from(gpu).ok()?)
}

fn reaches(cluster: &Cluster, node: u32, here: u32, there: u32) -> bool {
    let open =
        |gpu| describe(cluster, node, gpu).is_some_and(|gpu| gpu.peer_access != PeerAccess::None);
    here == there || (open(here) && open(there))
}

/// Whether the region is host memory, and that is how it was handed out.
fn is_as_given(region: &Region, memory: HostMemory) -> bool {
    let HostMemory {
        host,
        device,
        bytes,
    } = memory;
    region.role == Role::Host { bytes } && (host, device.0) == (region.space.base(), host)
}

fn done(copied: bool) -> Result<()> {
    if copied {
        Ok(())
    } else {
        Err(Status::INVALID_VALUE.into())
    }
}

fn to_usize(bytes: u64) -> Result<usize> {
    usize::try_from(bytes).map_err(|_| Status::INVALID_VALUE.into())
}
