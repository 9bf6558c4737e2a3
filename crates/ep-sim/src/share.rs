//! How simulated memory is found again: by threads of this process, through a table; by other
//! processes, through `/proc`.
//!
//! The identity of an allocation is the name of its memfd. A handle of 64 bytes repeats it and adds
//! where the file is open; whoever opens the file compares both, so a recycled process id or
//! descriptor cannot be mistaken for the memory.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::{fmt, io};

use ep_sys::{HandleKind, StreamHandle};
use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags};

use crate::memory::Memfd;

/// Bytes of a handle: CUDA's, for fabric and for IPC handles.
pub(crate) const HANDLE_BYTES: usize = 64;

const MAGIC: [u8; 8] = *b"epsimh01";

/// Allocations of this process that others may import, by number.
static EXPORTED: Mutex<BTreeMap<u64, Weak<Physical>>> = Mutex::new(BTreeMap::new());

/// A number that no other call in this process returns, and no name of a default stream.
pub(crate) fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(StreamHandle::PER_THREAD.0 + 1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// How an allocation was made, and so how it may be shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    Fabric,
    PosixFd,
    Ipc,
}

impl Sharing {
    const ALL: [Self; 3] = [Self::Fabric, Self::PosixFd, Self::Ipc];

    fn code(self) -> u32 {
        match self {
            Self::Fabric => 1,
            Self::PosixFd => 2,
            Self::Ipc => 3,
        }
    }

    fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|sharing| sharing.code() == code)
    }
}

impl From<HandleKind> for Sharing {
    fn from(kind: HandleKind) -> Self {
        match kind {
            HandleKind::Fabric => Self::Fabric,
            HandleKind::PosixFd => Self::PosixFd,
        }
    }
}

/// Who made an allocation, where, and how it may be shared. Unique on the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The simulated cluster.
    pub(crate) cluster: u64,
    /// The node in it.
    pub(crate) node: u32,
    /// The GPU on the node.
    pub(crate) gpu: u32,
    pub(crate) sharing: Sharing,
    /// The real process.
    pub(crate) pid: u32,
    /// The simulated process within it.
    pub(crate) process: u64,
    /// The allocation within the real process.
    pub(crate) id: u64,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            cluster,
            node,
            gpu,
            sharing,
            pid,
            process,
            id,
        } = self;
        write!(
            f,
            "ep-sim:{cluster}:{node}:{gpu}:{}:{pid}:{process}:{id}",
            sharing.code()
        )
    }
}

impl Identity {
    /// Reads what `Display` wrote.
    fn parse(name: &str) -> Option<Self> {
        let mut fields = name.strip_prefix("ep-sim:")?.split(':');
        let mut number = || fields.next()?.parse::<u64>().ok();
        let identity = Self {
            cluster: number()?,
            node: number()?.try_into().ok()?,
            gpu: number()?.try_into().ok()?,
            sharing: Sharing::from_code(number()?.try_into().ok()?)?,
            pid: number()?.try_into().ok()?,
            process: number()?,
            id: number()?,
        };
        fields.next().is_none().then_some(identity)
    }
}

/// An allocation, held by its maker or by an importer. The memory lives while anybody holds it.
#[derive(Debug)]
pub(crate) struct Physical {
    memfd: Arc<Memfd>,
    identity: Identity,
    bytes: u64,
    /// What the maker's device gets back.
    charge: Option<Charge>,
}

impl Physical {
    /// New memory of zeros.
    pub(crate) fn create(identity: Identity, bytes: u64, charge: Charge) -> io::Result<Arc<Self>> {
        let memfd = Arc::new(Memfd::create(identity.to_string(), bytes)?);
        let physical = Arc::new(Self {
            memfd,
            identity,
            bytes,
            charge: Some(charge),
        });
        EXPORTED
            .lock()
            .insert(identity.id, Arc::downgrade(&physical));
        Ok(physical)
    }

    /// The memory behind a descriptor. `None` if it is no simulated memory.
    pub(crate) fn of_descriptor(fd: BorrowedFd<'_>) -> io::Result<Option<Arc<Self>>> {
        let Some(memfd) = Memfd::adopt(fd.try_clone_to_owned()?)? else {
            return Ok(None);
        };
        let Some(identity) = Identity::parse(memfd.name()) else {
            return Ok(None);
        };
        // Threads of one process share the descriptor: a rack of ranks needs few of them.
        let memfd = match shared(&identity) {
            Some(shared) if shared.inode() == memfd.inode() => shared,
            _ => Arc::new(memfd),
        };
        Ok(Some(Self::imported(memfd, identity)))
    }

    /// The memory that a handle names. `None` if its maker is gone.
    pub(crate) fn of_locator(locator: &Locator) -> io::Result<Option<Arc<Self>>> {
        let identity = locator.identity;
        if identity.pid == pid() {
            return Ok(shared(&identity).map(|memfd| Self::imported(memfd, identity)));
        }
        let path = format!("/proc/{}/fd/{}", identity.pid, locator.fd);
        let fd = match rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE) => {
                return Err(rustix::io::Errno::MFILE.into());
            }
            Err(_) => return Ok(None),
        };
        let same = |memfd: &Memfd| {
            memfd.inode() == locator.inode && Identity::parse(memfd.name()) == Some(identity)
        };
        let memfd = Memfd::adopt(fd)?.filter(same);
        Ok(memfd.map(|memfd| Self::imported(Arc::new(memfd), identity)))
    }

    pub(crate) fn memfd(&self) -> &Memfd {
        &self.memfd
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether this holder made it.
    pub(crate) fn is_own(&self) -> bool {
        self.charge.is_some()
    }

    /// Where others find it.
    pub(crate) fn locator(&self) -> Locator {
        let fd = self.memfd.as_fd().as_raw_fd().cast_unsigned();
        Locator {
            identity: self.identity,
            fd,
            inode: self.memfd.inode(),
        }
    }

    fn imported(memfd: Arc<Memfd>, identity: Identity) -> Arc<Self> {
        let bytes = memfd.bytes();
        Arc::new(Self {
            memfd,
            identity,
            bytes,
            charge: None,
        })
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        if self.is_own() {
            EXPORTED.lock().remove(&self.identity.id);
        }
    }
}

/// Bytes in use on a device; returned when dropped.
#[derive(Debug)]
pub(crate) struct Charge {
    used: Arc<AtomicU64>,
    bytes: u64,
}

impl Charge {
    /// Takes `bytes` of `total`. `None` if fewer are free.
    pub(crate) fn take(used: &Arc<AtomicU64>, bytes: u64, total: u64) -> Option<Self> {
        used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(bytes).filter(|used| *used <= total)
        })
        .ok()?;
        Some(Self {
            used: Arc::clone(used),
            bytes,
        })
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Where a memory file is open: what a handle of 64 bytes says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Locator {
    pub(crate) identity: Identity,
    fd: u32,
    inode: u64,
}

impl Locator {
    pub(crate) fn encode(&self) -> [u8; HANDLE_BYTES] {
        let Self {
            identity: i,
            fd,
            inode,
        } = self;
        let mut handle = [0; HANDLE_BYTES];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            handle[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&MAGIC);
        for word in [i.cluster, i.process, i.id, *inode] {
            put(&word.to_le_bytes());
        }
        for word in [i.node, i.gpu, i.sharing.code(), i.pid, *fd] {
            put(&word.to_le_bytes());
        }
        handle
    }

    /// `None` for bytes that no [`encode`](Self::encode) wrote.
    pub(crate) fn decode(handle: &[u8; HANDLE_BYTES]) -> Option<Self> {
        let rest = handle.strip_prefix(&MAGIC)?;
        let (long, rest) = rest.split_at_checked(4 * 8)?;
        let (short, rest) = rest.split_at_checked(5 * 4)?;
        let long = |i: usize| Some(u64::from_le_bytes(*long.as_chunks().0.get(i)?));
        let short = |i: usize| Some(u32::from_le_bytes(*short.as_chunks().0.get(i)?));
        let identity = Identity {
            cluster: long(0)?,
            process: long(1)?,
            id: long(2)?,
            node: short(0)?,
            gpu: short(1)?,
            sharing: Sharing::from_code(short(2)?)?,
            pid: short(3)?,
        };
        let locator = Self {
            identity,
            fd: short(4)?,
            inode: long(3)?,
        };
        rest.iter().all(|byte| *byte == 0).then_some(locator)
    }
}

/// This process, as `/proc` numbers it.
pub(crate) fn pid() -> u32 {
    std::process::id()
}

/// The file of an allocation whose maker is in this process and still holds it.
fn shared(identity: &Identity) -> Option<Arc<Memfd>> {
    let exported = EXPORTED.lock().get(&identity.id)?.upgrade()?;
    (exported.identity == *identity).then(|| Arc::clone(&exported.memfd))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            cluster: u64::MAX,
            node: 17,
            gpu: 3,
            sharing: Sharing::Fabric,
            pid: 4_194_304,
            process: 72,
            id: 1 << 40,
        }
    }

    #[test]
    fn a_name_says_all_of_an_identity() {
        for sharing in Sharing::ALL {
            let identity = Identity {
                sharing,
                ..identity()
            };
            let name = identity.to_string();
            // What memfd_create takes.
            assert!(name.len() <= 249, "{name}");
            assert_eq!(Identity::parse(&name), Some(identity));
        }
        let name = identity().to_string();
        for foreign in [
            "",
            "memory",
            "ep-sim:1:2:3",
            &name[1..],
            &name[..name.len() - 2],
            &format!("{name}:0"),
            &name.replace(":1:", ":9:"),
            &name.replace(":17:", ":-17:"),
        ] {
            assert_ne!(Identity::parse(foreign), Some(identity()), "{foreign}");
        }
    }

    #[test]
    fn a_handle_is_what_was_encoded_or_nothing() {
        let locator = Locator {
            identity: identity(),
            fd: 19_999,
            inode: 1 << 33,
        };
        let handle = locator.encode();
        assert_eq!(Locator::decode(&handle), Some(locator));
        for byte in 0..HANDLE_BYTES {
            let mut other = handle;
            other[byte] ^= 0x80;
            assert_ne!(Locator::decode(&other), Some(locator), "byte {byte}");
        }
        assert_eq!(Locator::decode(&[0; HANDLE_BYTES]), None);
        assert_eq!(Locator::decode(&[0xff; HANDLE_BYTES]), None);
    }

    #[test]
    fn a_charge_is_taken_whole_and_returned() {
        let used = Arc::new(AtomicU64::new(0));
        let first = Charge::take(&used, 60, 100).unwrap();
        assert!(Charge::take(&used, 41, 100).is_none());
        assert!(Charge::take(&used, u64::MAX, 100).is_none());
        let second = Charge::take(&used, 40, 100).unwrap();
        drop(first);
        assert_eq!(used.load(Ordering::Relaxed), 40);
        drop(second);
        assert_eq!(used.load(Ordering::Relaxed), 0);
    }
}
