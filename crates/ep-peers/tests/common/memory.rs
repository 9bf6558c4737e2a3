//! Memory to offer on the simulated cluster, and the proof that a connected group can use it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ep_peers::exchange::Step;
use ep_peers::wire::{Facts, Identity, Refusal};
use ep_peers::{Export, Group, Offer, Peers};
use ep_sys::vmm::{DeviceMemory, Mapping, Physical};
use ep_sys::{
    Bytes16, DeviceOrdinal, DevicePtr, Driver, GranularityKind, HandleKind, ShareableHandle,
};

pub const DIGEST: u64 = 0xd16e;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Malloc,
    PosixFd,
    Fabric,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Malloc, Self::PosixFd, Self::Fabric];

    fn handle(self) -> Option<HandleKind> {
        match self {
            Self::Malloc => None,
            Self::PosixFd => Some(HandleKind::PosixFd),
            Self::Fabric => Some(HandleKind::Fabric),
        }
    }
}

/// A rank's memory.
#[derive(Debug)]
pub enum Memory {
    Plain(DeviceMemory),
    Mapped(Mapping, HandleKind, u64),
}

impl Memory {
    pub fn new(driver: &Arc<dyn Driver>, device: DeviceOrdinal, kind: Kind) -> Self {
        let Some(handle) = kind.handle() else {
            return Self::Plain(DeviceMemory::new(driver, device, 1 << 20).unwrap());
        };
        let granularity = driver
            .mem_granularity(device, handle, GranularityKind::Minimum)
            .unwrap();
        let physical = Physical::create(driver, device, granularity, handle, false).unwrap();
        let mapping = Mapping::new(physical, granularity).unwrap();
        Self::Mapped(mapping, handle, granularity)
    }

    pub fn base(&self) -> DevicePtr {
        match self {
            Self::Plain(memory) => memory.ptr(),
            Self::Mapped(mapping, ..) => mapping.ptr(),
        }
    }

    pub fn offer(&self, generation: u64, identity: Identity) -> Offer {
        let (export, bytes, granularity) = match self {
            Self::Plain(memory) => (Export::Ipc(memory.ipc_handle().unwrap()), memory.bytes(), 0),
            Self::Mapped(mapping, kind, granularity) => {
                let export = match mapping.physical().export(*kind).unwrap() {
                    ShareableHandle::Fabric(handle) => Export::Fabric(handle),
                    ShareableHandle::PosixFd(descriptor) => Export::PosixFd(descriptor),
                };
                (export, mapping.bytes(), *granularity)
            }
        };
        Offer {
            export,
            base: self.base(),
            bytes,
            granularity,
            generation,
            identity,
            digest: DIGEST,
            facts: Facts::new(b"facts").unwrap(),
        }
    }
}

/// An offer of a rank whose allocation failed.
pub fn failed_offer(generation: u64, identity: Identity, refusal: Refusal) -> Offer {
    Offer {
        export: Export::Failed(refusal),
        base: DevicePtr::NULL,
        bytes: 0,
        granularity: 0,
        generation,
        identity,
        digest: DIGEST,
        facts: Facts::EMPTY,
    }
}

/// Where a rank runs, as its driver says it; `process` tells processes of a host apart.
pub fn identity(driver: &dyn Driver, device: DeviceOrdinal, process: u64) -> Identity {
    let mut token = [0xaa; 16];
    token[..8].copy_from_slice(&process.to_le_bytes());
    Identity {
        host: driver.host_facts().host_id,
        process: Bytes16(token),
        gpu: driver.device_info(device).unwrap().uuid,
        clique: driver.fabric_info(device).unwrap().clique(),
    }
}

/// Proves a connected group: every reachable peer's memory is read and written through the table,
/// entries are non-null exactly without a reason, and the device has what the host says. Collective.
pub fn prove(group: &Group<'_>, driver: &dyn Driver, device: DeviceOrdinal, peers: &Peers) {
    let soon = || Instant::now() + Duration::from_secs(10);
    let own = peers.entries()[peers.rank() as usize];
    let mark = |from: u32, to: u32| (u64::from(from) << 32 | u64::from(to)) + 1;
    let slot = |rank: u32| 8 * (1 + u64::from(rank));

    let mut bytes = vec![0; 8 * peers.num_ranks() as usize];
    driver
        .copy_to_host(device, &mut bytes, peers.device_ptr())
        .unwrap();
    let table: Vec<_> = bytes
        .as_chunks::<8>()
        .0
        .iter()
        .map(|entry| DevicePtr(u64::from_le_bytes(*entry)))
        .collect();
    assert_eq!(table, peers.entries());

    write(driver, device, own, mark(peers.rank(), peers.rank()));
    group.barrier(Step::new("own mark"), soon()).unwrap();
    for (rank, &entry) in (0..).zip(peers.entries()) {
        assert_eq!(entry.is_null(), peers.reason(rank).is_some(), "rank {rank}");
        assert_eq!(entry.is_null(), !peers.is_reachable(rank), "rank {rank}");
        if !entry.is_null() {
            assert_eq!(read(driver, device, entry), mark(rank, rank));
            write(
                driver,
                device,
                entry.offset(slot(peers.rank())),
                mark(peers.rank(), rank),
            );
        }
    }
    group.barrier(Step::new("peers' marks"), soon()).unwrap();
    for rank in 0..peers.num_ranks() {
        if peers.is_reachable(rank) {
            assert_eq!(
                read(driver, device, own.offset(slot(rank))),
                mark(rank, peers.rank())
            );
        }
    }
    group.barrier(Step::new("proved"), soon()).unwrap();
}

fn write(driver: &dyn Driver, device: DeviceOrdinal, ptr: DevicePtr, value: u64) {
    driver
        .copy_to_device(device, ptr, &value.to_le_bytes())
        .unwrap();
}

fn read(driver: &dyn Driver, device: DeviceOrdinal, ptr: DevicePtr) -> u64 {
    let mut bytes = [0; 8];
    driver.copy_to_host(device, &mut bytes, ptr).unwrap();
    u64::from_le_bytes(bytes)
}
