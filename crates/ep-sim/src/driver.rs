//! The driver: every call is counted, may be made to fail, is carried out by the model, and is
//! written down.

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use ep_sys::{
    Bytes16, Call, DeviceInfo, DeviceOrdinal, DevicePtr, Driver, Error, EventHandle, FabricInfo,
    GranularityKind, HandleKind, HostFacts, HostMemory, IPC_HANDLE_BYTES, Link, PhysHandle,
    ShareableHandle, StreamHandle,
};
use parking_lot::{Mutex, RwLock};

use crate::cluster::{Cluster, Fnv};
use crate::fault::FaultPlan;
use crate::journal::{Entry, Journal};
use crate::live::Live;
use crate::process::{GRANULARITY, Process, Refusal, fabric_of};

type Result<T, E = Error> = std::result::Result<T, E>;
type Modelled<T> = std::result::Result<T, Refusal>;

/// The driver of one process on one node of a simulated cluster.
///
/// Ranks that share a `SimDriver` are threads of one process. Ranks with a `SimDriver` each are
/// processes, also where they are threads of one real process: CUDA IPC works between them and not
/// within them.
///
/// A [`DevicePtr`] is an address of the calling process: host code may use it directly, as far as
/// the device may.
///
/// Streams have no queue: what is put on one is finished when the call returns. Events carry the
/// host's clock.
///
/// Dropping the driver ends the process: what it held is gone, and its addresses with it.
#[derive(Debug)]
pub struct SimDriver {
    process: RwLock<Process>,
    journal: Mutex<Journal>,
    epoch: Instant,
}

impl SimDriver {
    /// A new process on a node of `cluster`, which sees those of the node's GPUs whose numbers are
    /// in `visible`, in that order.
    ///
    /// As with `CUDA_VISIBLE_DEVICES`, the list ends before the first GPU that the node does not
    /// have; a node that the cluster does not have has none, and `device_count` then returns
    /// `CUDA_ERROR_NO_DEVICE`.
    ///
    /// ```
    /// use ep_sim::{Cluster, SimDriver};
    /// use ep_sys::{DeviceOrdinal, Driver};
    ///
    /// let driver = SimDriver::new(&Cluster::hgx_h200(8), 0, &[2, 3]);
    /// assert_eq!(driver.device_count()?, 2);
    ///
    /// let ptr = driver.mem_alloc(DeviceOrdinal(0), 1024)?;
    /// driver.copy_to_device(DeviceOrdinal(0), ptr, b"hello")?;
    /// let mut back = [0; 5];
    /// driver.copy_to_host(DeviceOrdinal(0), &mut back, ptr)?;
    /// assert_eq!(&back, b"hello");
    ///
    /// driver.mem_free(DeviceOrdinal(0), ptr)?;
    /// assert!(driver.live().is_empty());
    /// # Ok::<(), ep_sys::Error>(())
    /// ```
    pub fn new(cluster: &Cluster, node: usize, visible: &[u32]) -> Arc<Self> {
        Arc::new(Self {
            process: RwLock::new(Process::new(cluster, node, visible)),
            journal: Mutex::default(),
            epoch: Instant::now(),
        })
    }

    /// A new process for one rank, which sees only its own GPU, or `None` where the cluster has no
    /// such rank.
    pub fn for_rank(cluster: &Cluster, rank: usize) -> Option<Arc<Self>> {
        let (node, gpu) = cluster.place(rank)?;
        Some(Self::new(cluster, node, &[gpu]))
    }

    /// From now on calls fail and take long as `plan` says, instead of as said before. The plan's
    /// counts start at the next call.
    pub fn inject(&self, plan: FaultPlan) {
        self.journal.lock().inject(plan);
    }

    /// How many calls were made, ever. Leaves out what [`FaultPlan`] does not count.
    pub fn calls(&self) -> usize {
        self.journal.lock().total()
    }

    /// The calls that were made, in the order in which they began; at most the first 65,536.
    pub fn journal(&self) -> Vec<Entry> {
        self.journal.lock().entries().to_vec()
    }

    /// What this process holds.
    pub fn live(&self) -> Live {
        self.process.read().live()
    }

    /// A call that looks, or copies.
    fn look<T>(
        &self,
        call: Call,
        device: DeviceOrdinal,
        body: impl FnOnce(&Process) -> Modelled<T>,
    ) -> Result<T> {
        self.call(call, device, |_| body(&self.process.read()), || {})
    }

    /// A call that acquires or changes.
    fn change<T>(
        &self,
        call: Call,
        device: DeviceOrdinal,
        body: impl FnOnce(&mut Process) -> Modelled<T>,
    ) -> Result<T> {
        self.call(call, device, |_| body(&mut self.process.write()), || {})
    }

    /// A call that gives up. Where a fault refuses it, `stuck` marks what stays.
    fn give_up(
        &self,
        call: Call,
        device: DeviceOrdinal,
        body: impl FnOnce(&mut Process) -> Modelled<()>,
        stuck: impl FnOnce(&mut Process),
    ) -> Result<()> {
        let locked = |_| {
            let mut process = self.process.write();
            process.gpu(device)?;
            body(&mut process)
        };
        self.call(call, device, locked, || stuck(&mut self.process.write()))
    }

    /// `body` is told whether a fault garbles what it reads.
    fn call<T>(
        &self,
        call: Call,
        device: DeviceOrdinal,
        body: impl FnOnce(bool) -> Modelled<T>,
        refused: impl FnOnce(),
    ) -> Result<T> {
        let begun = self.journal.lock().begin(call, device);
        let effects = begun.effects;
        if !effects.delay.is_zero() {
            thread::sleep(effects.delay);
        }
        let result = match effects.status {
            Some(status) => {
                refused();
                Err(Refusal::Driver(status))
            }
            None => body(effects.garbled),
        };
        self.journal.lock().end(&begun, &result);
        result.map_err(|refusal| match refusal {
            Refusal::Driver(status) if call.is_of_nvml() => Error::Nvml {
                call,
                device,
                status: status.0,
            },
            Refusal::Driver(status) => Error::Refused {
                call,
                device,
                status,
            },
            Refusal::Host(source) => Error::Os { call, source },
        })
    }
}

impl Driver for SimDriver {
    fn host_facts(&self) -> HostFacts {
        let process = self.process.read();
        let node = process.node();
        HostFacts {
            name: node.map(|node| node.name.clone()).unwrap_or_default(),
            host_id: identity("host", &process, None),
            imex_channel: node.is_some_and(|node| node.imex_channel),
            rdma_nics: node.map_or(0, |node| node.nics),
        }
    }

    fn is_host_addressable(&self) -> bool {
        true
    }

    fn device_count(&self) -> Result<u32> {
        self.look(Call::DeviceCount, DeviceOrdinal(0), Process::device_count)
    }

    fn device_info(&self, device: DeviceOrdinal) -> Result<DeviceInfo> {
        self.look(Call::DeviceInfo, device, |process| {
            let (number, gpu) = process.gpu(device)?;
            Ok(DeviceInfo {
                uuid: identity("gpu", process, Some(number)),
                pci_bus_id: format!("{:04x}:{:02x}:00.0", number >> 8, number & 0xff),
                name: gpu.product.name().to_owned(),
                compute_capability: gpu.product.compute_capability(),
                multiprocessors: gpu.product.multiprocessors(),
                total_bytes: gpu.product.total_bytes(),
                vmm_attribute: true,
                fabric_attribute: gpu.fabric_attribute,
                posix_fd_attribute: gpu.posix_fd_attribute,
                gdr_vmm_attribute: gpu.gdr_attribute,
            })
        })
    }

    fn fabric_info(&self, device: DeviceOrdinal) -> Result<FabricInfo> {
        self.look(Call::FabricInfo, device, |process| {
            Ok(fabric_of(process.gpu(device)?.1))
        })
    }

    fn peer_links(&self, device: DeviceOrdinal, peers: &[Bytes16]) -> Result<Vec<Link>> {
        self.look(Call::PeerLinks, device, |process| {
            let gpus = process.node().map_or(0, |node| node.gpus.len() as u32);
            let number = |uuid: &Bytes16| {
                (0..gpus).find(|gpu| identity("gpu", process, Some(*gpu)) == *uuid)
            };
            let link = |peer| match number(peer) {
                Some(number) => process.link(device, number),
                None => Ok(Link::Unknown),
            };
            peers.iter().map(link).collect()
        })
    }

    fn can_access_peer(&self, device: DeviceOrdinal, peer: DeviceOrdinal) -> Result<bool> {
        self.look(Call::CanAccessPeer, device, |process| {
            process.can_access_peer(device, peer)
        })
    }

    fn enable_peer_access(&self, device: DeviceOrdinal, peer: DeviceOrdinal) -> Result<()> {
        self.look(Call::EnablePeerAccess, device, |process| {
            process.enable_peer_access(device, peer)
        })
    }

    fn mem_granularity(
        &self,
        device: DeviceOrdinal,
        _handle: HandleKind,
        _kind: GranularityKind,
    ) -> Result<u64> {
        self.look(Call::MemGranularity, device, |process| {
            process.gpu(device)?;
            Ok(GRANULARITY)
        })
    }

    fn mem_create(
        &self,
        device: DeviceOrdinal,
        bytes: u64,
        handle: HandleKind,
        gdr: bool,
    ) -> Result<PhysHandle> {
        self.change(Call::MemCreate, device, |process| {
            process.create(device, bytes, handle, gdr)
        })
    }

    fn mem_release(&self, device: DeviceOrdinal, handle: PhysHandle) -> Result<()> {
        self.give_up(
            Call::MemRelease,
            device,
            |process| process.release(handle),
            |process| process.handle_stuck(handle),
        )
    }

    fn mem_reserve(&self, device: DeviceOrdinal, bytes: u64, align: u64) -> Result<DevicePtr> {
        self.change(Call::MemReserve, device, |process| {
            process.gpu(device)?;
            process.reserve(bytes, align)
        })
    }

    fn mem_address_free(&self, device: DeviceOrdinal, ptr: DevicePtr, bytes: u64) -> Result<()> {
        self.give_up(
            Call::MemAddressFree,
            device,
            |process| process.address_free(ptr, bytes),
            |process| process.region_stuck(ptr),
        )
    }

    fn mem_map(
        &self,
        device: DeviceOrdinal,
        ptr: DevicePtr,
        bytes: u64,
        handle: PhysHandle,
    ) -> Result<()> {
        self.change(Call::MemMap, device, |process| {
            process.gpu(device)?;
            process.map(ptr, bytes, handle)
        })
    }

    fn mem_unmap(&self, device: DeviceOrdinal, ptr: DevicePtr, bytes: u64) -> Result<()> {
        self.give_up(
            Call::MemUnmap,
            device,
            |process| process.unmap(ptr, bytes),
            |process| process.mappings_stuck(ptr, bytes),
        )
    }

    fn mem_set_access(&self, device: DeviceOrdinal, ptr: DevicePtr, bytes: u64) -> Result<()> {
        self.change(Call::MemSetAccess, device, |process| {
            process.set_access(device, ptr, bytes)
        })
    }

    fn mem_export(
        &self,
        device: DeviceOrdinal,
        handle: PhysHandle,
        kind: HandleKind,
    ) -> Result<ShareableHandle> {
        self.look(Call::MemExport, device, |process| {
            process.gpu(device)?;
            process.export(handle, kind)
        })
    }

    fn mem_import(&self, device: DeviceOrdinal, handle: &ShareableHandle) -> Result<PhysHandle> {
        self.change(Call::MemImport, device, |process| {
            process.import(device, handle)
        })
    }

    fn mem_alloc(&self, device: DeviceOrdinal, bytes: u64) -> Result<DevicePtr> {
        self.change(Call::MemAlloc, device, |process| {
            process.alloc(device, bytes)
        })
    }

    fn mem_free(&self, device: DeviceOrdinal, ptr: DevicePtr) -> Result<()> {
        self.give_up(
            Call::MemFree,
            device,
            |process| process.free(ptr),
            |process| process.region_stuck(ptr),
        )
    }

    fn mem_info(&self, device: DeviceOrdinal) -> Result<(u64, u64)> {
        self.look(Call::MemInfo, device, |process| process.mem_info(device))
    }

    fn ipc_get_handle(
        &self,
        device: DeviceOrdinal,
        ptr: DevicePtr,
    ) -> Result<[u8; IPC_HANDLE_BYTES]> {
        self.look(Call::IpcGetHandle, device, |process| {
            process.gpu(device)?;
            process.ipc_handle(ptr)
        })
    }

    fn ipc_open(
        &self,
        device: DeviceOrdinal,
        handle: &[u8; IPC_HANDLE_BYTES],
    ) -> Result<DevicePtr> {
        self.change(Call::IpcOpen, device, |process| {
            process.ipc_open(device, handle)
        })
    }

    fn ipc_close(&self, device: DeviceOrdinal, ptr: DevicePtr) -> Result<()> {
        self.give_up(
            Call::IpcClose,
            device,
            |process| process.ipc_close(device, ptr),
            |process| process.region_stuck(ptr),
        )
    }

    fn host_alloc(&self, device: DeviceOrdinal, bytes: u64) -> Result<HostMemory> {
        self.change(Call::HostAlloc, device, |process| {
            process.host_alloc(device, bytes)
        })
    }

    fn host_free(&self, device: DeviceOrdinal, memory: HostMemory) -> Result<()> {
        self.give_up(
            Call::HostFree,
            device,
            |process| process.host_free(memory),
            |process| process.region_stuck(memory.device),
        )
    }

    fn host_load(&self, memory: HostMemory, offset: u64) -> Result<u64> {
        self.look(Call::HostLoad, DeviceOrdinal(0), |process| {
            process.host_load(memory, offset)
        })
    }

    fn fill(
        &self,
        device: DeviceOrdinal,
        ptr: DevicePtr,
        value: u8,
        bytes: u64,
        stream: StreamHandle,
    ) -> Result<()> {
        self.look(Call::Fill, device, |process| {
            process.fill(device, ptr, value, bytes, stream)
        })
    }

    fn copy_to_device(&self, device: DeviceOrdinal, dst: DevicePtr, src: &[u8]) -> Result<()> {
        self.look(Call::CopyToDevice, device, |process| {
            process.write(device, dst, src)
        })
    }

    fn copy_to_host(&self, device: DeviceOrdinal, dst: &mut [u8], src: DevicePtr) -> Result<()> {
        let read = |garbled| {
            self.process.read().read(device, &mut *dst, src)?;
            if garbled {
                dst.iter_mut().for_each(|byte| *byte = !*byte);
            }
            Ok(())
        };
        self.call(Call::CopyToHost, device, read, || {})
    }

    fn copy_on_device(
        &self,
        device: DeviceOrdinal,
        dst: DevicePtr,
        src: DevicePtr,
        bytes: u64,
        stream: StreamHandle,
    ) -> Result<()> {
        self.look(Call::CopyOnDevice, device, |process| {
            process.copy(device, dst, src, bytes, stream)
        })
    }

    fn stream_create(&self, device: DeviceOrdinal) -> Result<StreamHandle> {
        self.change(Call::StreamCreate, device, |process| {
            process.stream_create(device)
        })
    }

    fn stream_destroy(&self, device: DeviceOrdinal, stream: StreamHandle) -> Result<()> {
        self.give_up(
            Call::StreamDestroy,
            device,
            |process| process.stream_destroy(device, stream),
            |process| process.stream_stuck(stream),
        )
    }

    fn stream_synchronize(&self, device: DeviceOrdinal, stream: StreamHandle) -> Result<()> {
        self.look(Call::StreamSynchronize, device, |process| {
            process.gpu(device)?;
            process.known_stream(stream)
        })
    }

    fn stream_wait_event(
        &self,
        device: DeviceOrdinal,
        stream: StreamHandle,
        event: EventHandle,
    ) -> Result<()> {
        self.look(Call::StreamWaitEvent, device, |process| {
            process.gpu(device)?;
            process.known_stream(stream)?;
            process.event(event)
        })
    }

    fn event_create(&self, device: DeviceOrdinal, timing: bool) -> Result<EventHandle> {
        self.change(Call::EventCreate, device, |process| {
            process.event_create(device, timing)
        })
    }

    fn event_destroy(&self, device: DeviceOrdinal, event: EventHandle) -> Result<()> {
        self.give_up(
            Call::EventDestroy,
            device,
            |process| process.event_destroy(event),
            |process| process.event_stuck(event),
        )
    }

    fn event_record(
        &self,
        device: DeviceOrdinal,
        event: EventHandle,
        stream: StreamHandle,
    ) -> Result<()> {
        self.change(Call::EventRecord, device, |process| {
            let now_us = self.epoch.elapsed().as_secs_f64() * 1e6;
            process.event_record(device, event, stream, now_us)
        })
    }

    fn event_synchronize(&self, device: DeviceOrdinal, event: EventHandle) -> Result<()> {
        self.look(Call::EventSynchronize, device, |process| {
            process.gpu(device)?;
            process.event(event)
        })
    }

    fn event_elapsed_us(
        &self,
        device: DeviceOrdinal,
        start: EventHandle,
        end: EventHandle,
    ) -> Result<f64> {
        self.look(Call::EventElapsed, device, |process| {
            process.gpu(device)?;
            process.elapsed_us(start, end)
        })
    }
}

/// An identity that every process simulating this node computes alike.
fn identity(what: &str, process: &Process, gpu: Option<u32>) -> Bytes16 {
    Fnv::identity(&(what, process.cluster_id(), process.node_index(), gpu))
}
