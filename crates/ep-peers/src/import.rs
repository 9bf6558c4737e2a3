//! From a peer's record to an address for this device.

use std::cell::OnceCell;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ep_sys::vmm::{IpcMapping, Mapping, Physical};
use ep_sys::{Bytes16, DeviceOrdinal, DevicePtr, Driver, Link, ShareableHandle};

use crate::fds::DescriptorError;
use crate::topology::{Nearness, Topology};
use crate::wire::{Handle, Record, Refusal};

/// How a rank reaches another's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// It is its own.
    Own,
    /// By the address itself, in the owner's process.
    Process,
    /// By CUDA IPC.
    Ipc,
    /// By an imported descriptor.
    PosixFd,
    /// By an imported fabric handle.
    Fabric,
}

/// Why a rank does not reach another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// The other is not a member.
    Absent,
    /// The other has no memory to offer; what was refused there, if anything was.
    PeerOffersNothing(Option<Refusal>),
    /// The rank has no memory to offer itself, so it did not try.
    OffersNothing(Option<Refusal>),
    /// The rank's driver refused a call.
    Refused(Refusal),
    /// The other is on another host, where handles of its kind do not lead.
    OtherHost,
    /// The other is on another host, in another NVLink clique.
    OtherClique,
    /// The other's GPU is not visible to the process that both are in.
    NotVisible,
    /// The rank's GPU cannot address the other's.
    NoPeerAccess,
    /// The GPUs address each other over PCIe, where lines of the wire may tear.
    NoNvlink,
    /// The other's descriptor did not come.
    NoDescriptor(DescriptorError),
    /// The other's memory has no address.
    NoAddress,
    /// The rank's table could not be written.
    NoTable(Refusal),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("it is not a member of the group"),
            Self::PeerOffersNothing(None) => f.write_str("it offers no memory"),
            Self::PeerOffersNothing(Some(refusal)) => {
                write!(
                    f,
                    "it offers no memory, {refusal} there; check that rank's log"
                )
            }
            Self::OffersNothing(None) => f.write_str("the rank offers no memory itself"),
            Self::OffersNothing(Some(refusal)) => {
                write!(
                    f,
                    "the rank offers no memory itself, {refusal}; check its log"
                )
            }
            Self::Refused(refusal) => write!(f, "{refusal}; check the rank's driver log"),
            Self::OtherHost => f.write_str(
                "it is on another host, and its handle leads nowhere outside; check that fabric \
                 memory is available on both",
            ),
            Self::OtherClique => {
                f.write_str("it is in another NVLink clique; check nvidia-smi -q (Fabric) on both")
            }
            Self::NotVisible => f.write_str(
                "its GPU is not visible to the process they share; check CUDA_VISIBLE_DEVICES",
            ),
            Self::NoPeerAccess => f.write_str(
                "the GPUs cannot address each other; check nvidia-smi topo -p2p r on this host",
            ),
            Self::NoNvlink => {
                f.write_str("no NVLink joins the GPUs; check nvidia-smi topo -p2p n on this host")
            }
            Self::NoDescriptor(error) => fmt::Display::fmt(error, f),
            Self::NoAddress => f.write_str("its memory has no address; check that rank's log"),
            Self::NoTable(refusal) => {
                write!(
                    f,
                    "the rank's table could not be written, {refusal}; check its log"
                )
            }
        }
    }
}

/// Whether NVLink joins the GPUs of two ranks that reach each other, by NVML. Where that is not known
/// they are taken for joined: the driver lets them address each other, which it also does over PCIe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NvlinkCheck {
    /// It does.
    Joined,
    /// NVML does not tell: it does not see the other's GPU, as in a container, or has no answer.
    Unknown,
    /// NVML could not be asked.
    Refused(Refusal),
}

impl fmt::Display for NvlinkCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Joined => f.write_str("NVLink joins the GPUs"),
            Self::Unknown => f.write_str("NVML does not tell what joins the GPUs"),
            Self::Refused(refusal) => {
                write!(f, "NVML does not tell what joins the GPUs, {refusal}")
            }
        }
    }
}

/// Whether a rank reaches another, how, and over what, where it is another GPU of its host.
pub(crate) type Verdict = Result<(Access, Option<NvlinkCheck>), Reason>;

/// A peer's memory, held for this device.
#[derive(Debug)]
pub(crate) enum Import {
    /// Own memory, or a thread's of this process: nothing to give back.
    Address(DevicePtr),
    Ipc(IpcMapping),
    Mapped(Mapping),
}

impl Import {
    pub(crate) fn ptr(&self) -> DevicePtr {
        match self {
            Self::Address(ptr) => *ptr,
            Self::Ipc(mapping) => mapping.ptr(),
            Self::Mapped(mapping) => mapping.ptr(),
        }
    }

    pub(crate) fn close(self) -> ep_sys::Result<()> {
        match self {
            Self::Address(_) => Ok(()),
            Self::Ipc(mapping) => mapping.close(),
            Self::Mapped(mapping) => mapping.close(),
        }
    }
}

/// What imports of one rank have in common.
pub(crate) struct Importer<'a> {
    driver: &'a Arc<dyn Driver>,
    device: DeviceOrdinal,
    rank: u32,
    topology: &'a Topology,
    /// The process's devices by UUID, asked for at the first need.
    devices: OnceCell<Vec<(Bytes16, DeviceOrdinal)>>,
    /// What joins the device and the GPUs of the host's members, asked for at the first need.
    links: OnceCell<Vec<(Bytes16, Result<Link, Refusal>)>>,
}

impl<'a> Importer<'a> {
    pub(crate) fn new(
        driver: &'a Arc<dyn Driver>,
        device: DeviceOrdinal,
        rank: u32,
        topology: &'a Topology,
    ) -> Self {
        Self {
            driver,
            device,
            rank,
            topology,
            devices: OnceCell::new(),
            links: OnceCell::new(),
        }
    }

    /// Reaches the memory of a record, with the descriptor that came for it.
    pub(crate) fn import(
        &self,
        peer: &Record,
        descriptor: Result<OwnedFd, DescriptorError>,
    ) -> Result<(Access, Option<NvlinkCheck>, Import), Reason> {
        let Some(nearness) = self.topology.nearness(self.rank, peer.rank) else {
            return Err(Reason::Absent);
        };
        let reached = match (nearness, &peer.handle) {
            (_, Handle::None(refusal)) => return Err(Reason::PeerOffersNothing(*refusal)),
            (Nearness::Own, _) => (Access::Own, Import::Address(peer.base)),
            (Nearness::Process, Handle::Ipc(_)) => {
                self.enable_peer_access(peer.identity.gpu)?;
                (Access::Process, Import::Address(peer.base))
            }
            (Nearness::Host, Handle::Ipc(handle)) => {
                let mapping =
                    IpcMapping::open(self.driver, self.device, handle).map_err(refused)?;
                (Access::Ipc, Import::Ipc(mapping))
            }
            (Nearness::Process | Nearness::Host, Handle::PosixFd) => {
                let descriptor = descriptor.map_err(Reason::NoDescriptor)?;
                (
                    Access::PosixFd,
                    self.map(&ShareableHandle::PosixFd(descriptor), peer)?,
                )
            }
            (Nearness::Remote, Handle::Ipc(_) | Handle::PosixFd) => return Err(Reason::OtherHost),
            (Nearness::Remote, Handle::Fabric(_))
                if self.topology.in_different_cliques(self.rank, peer.rank) =>
            {
                return Err(Reason::OtherClique);
            }
            (_, Handle::Fabric(handle)) => (
                Access::Fabric,
                self.map(&ShareableHandle::Fabric(*handle), peer)?,
            ),
        };
        if reached.1.ptr().is_null() {
            return Err(Reason::NoAddress);
        }
        let (access, import) = reached;
        let links = self.links.get_or_init(|| self.links());
        let link = links.iter().find(|(gpu, _)| *gpu == peer.identity.gpu);
        let check = match link.map(|&(_, link)| link) {
            None => None,
            Some(Ok(Link::Nvlink)) => Some(NvlinkCheck::Joined),
            Some(Ok(Link::Pcie)) => return Err(Reason::NoNvlink),
            Some(Ok(Link::Unknown)) => Some(NvlinkCheck::Unknown),
            Some(Err(refusal)) => Some(NvlinkCheck::Refused(refusal)),
        };
        Ok((access, check, import))
    }

    /// The links to the other GPUs of this host's members.
    fn links(&self) -> Vec<(Bytes16, Result<Link, Refusal>)> {
        let own = self.topology.identity(self.rank).map(|own| own.gpu);
        let hosts = self.topology.hosts();
        let host = hosts.iter().find(|ranks| ranks.contains(&self.rank));
        let mut others: Vec<_> = host
            .into_iter()
            .flatten()
            .filter_map(|&rank| Some(self.topology.identity(rank)?.gpu))
            .filter(|gpu| Some(*gpu) != own && !gpu.is_zero())
            .collect();
        others.sort_unstable();
        others.dedup();
        if others.is_empty() {
            return Vec::new();
        }
        match self.driver.peer_links(self.device, &others) {
            Ok(links) => others.into_iter().zip(links.into_iter().map(Ok)).collect(),
            Err(error) => {
                tracing::warn!(rank = self.rank, %error, "what joins the host's GPUs is not known");
                let refusal = Refusal::from(&error);
                others.into_iter().map(|gpu| (gpu, Err(refusal))).collect()
            }
        }
    }

    fn map(&self, handle: &ShareableHandle, peer: &Record) -> Result<Import, Reason> {
        let physical = Physical::import(self.driver, self.device, handle, peer.bytes);
        physical
            .and_then(|physical| Mapping::new(physical, peer.granularity))
            .map(Import::Mapped)
            .map_err(refused)
    }

    fn enable_peer_access(&self, gpu: Bytes16) -> Result<(), Reason> {
        let peer = self.devices()?.iter().find(|(uuid, _)| *uuid == gpu);
        let &(_, peer) = peer.ok_or(Reason::NotVisible)?;
        if peer == self.device {
            return Ok(());
        }
        let can = self
            .driver
            .can_access_peer(self.device, peer)
            .map_err(refused)?;
        if !can {
            return Err(Reason::NoPeerAccess);
        }
        self.driver
            .enable_peer_access(self.device, peer)
            .map_err(refused)
    }

    fn devices(&self) -> Result<&[(Bytes16, DeviceOrdinal)], Reason> {
        if let Some(devices) = self.devices.get() {
            return Ok(devices);
        }
        let count = self.driver.device_count().map_err(refused)?;
        let devices = (0..count)
            .map(DeviceOrdinal)
            .map(|device| Ok((self.driver.device_info(device)?.uuid, device)))
            .collect::<ep_sys::Result<Vec<_>>>()
            .map_err(refused)?;
        Ok(self.devices.get_or_init(|| devices))
    }
}

fn refused(error: ep_sys::Error) -> Reason {
    Reason::Refused(Refusal::from(&error))
}

/// A verdict in the form in which it travels: a code and what goes with it.
pub(crate) fn encode(verdict: Verdict) -> [u32; 3] {
    let with = |code: u32, refusal: Option<Refusal>| {
        let [call, status] = Refusal::encode(refusal);
        [code, call, status]
    };
    match verdict {
        Ok((access, check)) => {
            let access = match access {
                Access::Own => 0,
                Access::Process => 1,
                Access::Ipc => 2,
                Access::PosixFd => 3,
                Access::Fabric => 4,
            };
            match check {
                None => [access, 0, 0],
                Some(NvlinkCheck::Joined) => [access | 0x100, 0, 0],
                Some(NvlinkCheck::Unknown) => [access | 0x200, 0, 0],
                Some(NvlinkCheck::Refused(refusal)) => with(access | 0x300, Some(refusal)),
            }
        }
        Err(Reason::Absent) => [16, 0, 0],
        Err(Reason::PeerOffersNothing(refusal)) => with(17, refusal),
        Err(Reason::OffersNothing(refusal)) => with(18, refusal),
        Err(Reason::Refused(refusal)) => with(19, Some(refusal)),
        Err(Reason::OtherHost) => [20, 0, 0],
        Err(Reason::OtherClique) => [21, 0, 0],
        Err(Reason::NotVisible) => [22, 0, 0],
        Err(Reason::NoPeerAccess) => [23, 0, 0],
        Err(Reason::NoDescriptor(error)) => {
            let (code, errno) = match error {
                DescriptorError::NotPeer => (0, 0),
                DescriptorError::NotOffered => (1, 0),
                DescriptorError::NotSent { errno } => (2, errno),
                DescriptorError::NotReceived { errno } => (3, errno),
            };
            [24, code, errno.unsigned_abs()]
        }
        Err(Reason::NoAddress) => [25, 0, 0],
        Err(Reason::NoTable(refusal)) => with(26, Some(refusal)),
        Err(Reason::NoNvlink) => [27, 0, 0],
    }
}

/// The inverse of [`encode`].
pub(crate) fn decode([code, a, b]: [u32; 3]) -> Option<Verdict> {
    let plain = |verdict: Verdict| ([a, b] == [0, 0]).then_some(verdict);
    let refusal = || Refusal::decode([a, b]);
    let reached = |access| match code >> 8 {
        0 => plain(Ok((access, None))),
        1 => plain(Ok((access, Some(NvlinkCheck::Joined)))),
        2 => plain(Ok((access, Some(NvlinkCheck::Unknown)))),
        3 => Some(Ok((access, Some(NvlinkCheck::Refused(refusal()??))))),
        _ => None,
    };
    match code & 0xff {
        0 => return reached(Access::Own),
        1 => return reached(Access::Process),
        2 => return reached(Access::Ipc),
        3 => return reached(Access::PosixFd),
        4 => return reached(Access::Fabric),
        _ => {}
    }
    match code {
        16 => plain(Err(Reason::Absent)),
        17 => Some(Err(Reason::PeerOffersNothing(refusal()?))),
        18 => Some(Err(Reason::OffersNothing(refusal()?))),
        19 => Some(Err(Reason::Refused(refusal()??))),
        20 => plain(Err(Reason::OtherHost)),
        21 => plain(Err(Reason::OtherClique)),
        22 => plain(Err(Reason::NotVisible)),
        23 => plain(Err(Reason::NoPeerAccess)),
        24 => {
            let errno = i32::try_from(b).ok()?;
            let error = match (a, errno) {
                (0, 0) => DescriptorError::NotPeer,
                (1, 0) => DescriptorError::NotOffered,
                (2, errno) => DescriptorError::NotSent { errno },
                (3, errno) => DescriptorError::NotReceived { errno },
                _ => return None,
            };
            Some(Err(Reason::NoDescriptor(error)))
        }
        25 => plain(Err(Reason::NoAddress)),
        26 => Some(Err(Reason::NoTable(refusal()??))),
        27 => plain(Err(Reason::NoNvlink)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use ep_sys::{Call, Status};

    use super::*;

    #[test]
    fn every_verdict_survives_the_wire() {
        let refusal = Refusal {
            call: Call::MemImport,
            status: Some(Status(999)),
        };
        let unanswered = Refusal {
            call: Call::Load,
            status: None,
        };
        let verdicts = [
            Ok((Access::Own, None)),
            Ok((Access::Process, Some(NvlinkCheck::Joined))),
            Ok((Access::Ipc, Some(NvlinkCheck::Refused(unanswered)))),
            Ok((Access::PosixFd, Some(NvlinkCheck::Unknown))),
            Ok((Access::Fabric, None)),
            Err(Reason::Absent),
            Err(Reason::PeerOffersNothing(None)),
            Err(Reason::PeerOffersNothing(Some(refusal))),
            Err(Reason::OffersNothing(None)),
            Err(Reason::OffersNothing(Some(unanswered))),
            Err(Reason::Refused(refusal)),
            Err(Reason::OtherHost),
            Err(Reason::OtherClique),
            Err(Reason::NotVisible),
            Err(Reason::NoPeerAccess),
            Err(Reason::NoDescriptor(DescriptorError::NotPeer)),
            Err(Reason::NoDescriptor(DescriptorError::NotOffered)),
            Err(Reason::NoDescriptor(DescriptorError::NotSent {
                errno: 111,
            })),
            Err(Reason::NoDescriptor(DescriptorError::NotReceived {
                errno: 24,
            })),
            Err(Reason::NoAddress),
            Err(Reason::NoNvlink),
            Err(Reason::NoTable(refusal)),
        ];
        for verdict in verdicts {
            assert_eq!(decode(encode(verdict)), Some(verdict));
        }
    }

    #[test]
    fn numbers_that_are_no_verdict_are_refused() {
        let bad = [
            [5, 0, 0],
            [0, 1, 0],
            [0x101, 0, 1],
            [0x301, u32::MAX, u32::MAX],
            [0x401, 0, 0],
            [0x110, 0, 0],
            [19, u32::MAX, u32::MAX],
            [19, 9999, 0],
            [17, u32::MAX, 3],
            [24, 4, 0],
            [24, 2, u32::MAX],
        ];
        for numbers in bad {
            assert_eq!(decode(numbers), None, "{numbers:?}");
        }
    }
}
