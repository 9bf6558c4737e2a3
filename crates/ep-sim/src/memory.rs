//! Device memory: memfds, and the address space that they are mapped in.
//!
//! The only file of the crate with `unsafe`. What makes it sound:
//! - a [`Space`] owns its address range from `mmap` to `munmap`, and nothing else maps there;
//! - a part of it is readable and writable only while a [`Mapping`] with access covers it, the
//!   table of mappings changes only through `&mut Space`, and it is consulted before every access;
//! - a [`Memfd`] is sealed against shrinking before it is mapped, whoever made it;
//! - this memory is shared with kernels, threads and processes, so it is never borrowed as a Rust
//!   reference: it is copied with relaxed atomic words.

#![allow(
    unsafe_code,
    reason = "maps memory, and reads and writes it by address"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use ep_sys::DeviceOrdinal;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};

use crate::share::Physical;

/// The page size that sizes are rounded to; a multiple of the host's on every supported host.
const PAGE: u64 = 1 << 16;

/// A memory file that cannot shrink.
#[derive(Debug)]
pub(crate) struct Memfd {
    fd: OwnedFd,
    name: String,
    bytes: u64,
    inode: u64,
}

impl Memfd {
    /// A new file of zeros, rounded up to whole pages.
    pub(crate) fn create(name: String, bytes: u64) -> io::Result<Self> {
        let bytes = bytes
            .checked_next_multiple_of(PAGE)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create(name.as_str(), flags)?;
        rustix::fs::ftruncate(&fd, bytes)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let inode = rustix::fs::fstat(&fd)?.st_ino;
        Ok(Self {
            fd,
            name,
            bytes,
            inode,
        })
    }

    /// Takes a descriptor that somebody else opened. `None` if it is not a file made by
    /// [`create`](Self::create), here or in another process.
    pub(crate) fn adopt(fd: OwnedFd) -> io::Result<Option<Self>> {
        let Ok(seals) = rustix::fs::fcntl_get_seals(&fd) else {
            return Ok(None);
        };
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL) {
            return Ok(None);
        }
        let link = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new())?;
        let name = link.to_str().ok().and_then(|link| {
            link.strip_prefix("/memfd:")?
                .strip_suffix(" (deleted)")
                .map(str::to_owned)
        });
        let Some(name) = name else { return Ok(None) };
        let stat = rustix::fs::fstat(&fd)?;
        let Ok(bytes) = u64::try_from(stat.st_size) else {
            return Ok(None);
        };
        Ok(Some(Self {
            fd,
            name,
            bytes,
            inode: stat.st_ino,
        }))
    }

    /// The name given at creation; the file's creator cannot change it later.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn inode(&self) -> u64 {
        self.inode
    }

    pub(crate) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }
}

impl AsFd for Memfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What is mapped at one place of a [`Space`].
#[derive(Debug)]
pub(crate) struct Mapping {
    bytes: u64,
    /// `None` for page-locked host memory, which belongs to this process alone.
    memory: Option<Arc<Physical>>,
    /// Devices that may use it. The pages are readable and writable exactly when it is not empty.
    access: BTreeSet<DeviceOrdinal>,
    /// Whether an injected fault refused to remove it.
    pub(crate) stuck: bool,
}

impl Mapping {
    pub(crate) fn memory(&self) -> Option<&Arc<Physical>> {
        self.memory.as_ref()
    }
}

/// Why a [`Space`] refused.
#[derive(Debug)]
pub(crate) enum SpaceError {
    /// Outside the space, over a mapping, or not at a mapping's ends.
    Misplaced,
    /// The operating system refused.
    Os(io::Error),
}

impl From<io::Error> for SpaceError {
    fn from(error: io::Error) -> Self {
        Self::Os(error)
    }
}

impl From<rustix::io::Errno> for SpaceError {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Os(errno.into())
    }
}

/// A reserved range of addresses, and what is mapped in it.
#[derive(Debug)]
pub(crate) struct Space {
    base: u64,
    bytes: u64,
    mappings: BTreeMap<u64, Mapping>,
}

impl Space {
    /// Reserves `bytes` addresses, rounded up to whole pages, at a multiple of `align`, which is a
    /// power of two.
    pub(crate) fn reserve(bytes: u64, align: u64) -> io::Result<Self> {
        let align = align.max(PAGE);
        let too_large = || io::Error::from(io::ErrorKind::OutOfMemory);
        let bytes = bytes.checked_next_multiple_of(PAGE).ok_or_else(too_large)?;
        let wide = bytes.checked_add(align).ok_or_else(too_large)?;
        // SAFETY: with a null address hint the kernel places a new mapping where nothing is.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                to_usize(wide)?,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let start = start.expose_provenance() as u64;
        let base = start.next_multiple_of(align);
        // Give back what the alignment left over on both sides.
        trim(start, base - start)?;
        trim(base + bytes, start + wide - (base + bytes))?;
        Ok(Self {
            base,
            bytes,
            mappings: BTreeMap::new(),
        })
    }

    /// Reserves addresses with `memory` mapped at the start, for `device`.
    pub(crate) fn of_memory(memory: Arc<Physical>, device: DeviceOrdinal) -> io::Result<Self> {
        let bytes = memory.memfd().bytes();
        let mut space = Self::reserve(bytes, PAGE)?;
        let base = space.base;
        let mapped = space
            .map(base, bytes, memory)
            .and_then(|()| space.allow(base, bytes, device));
        match mapped {
            Ok(()) => Ok(space),
            Err(SpaceError::Os(error)) => Err(error),
            Err(SpaceError::Misplaced) => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Zeroed memory of this process alone.
    pub(crate) fn of_host(bytes: u64, device: DeviceOrdinal) -> io::Result<Self> {
        let mut space = Self::reserve(bytes, PAGE)?;
        let (base, bytes) = (space.base, space.bytes);
        protect(base, bytes, MprotectFlags::READ | MprotectFlags::WRITE)?;
        let access = BTreeSet::from([device]);
        space.mappings.insert(
            base,
            Mapping {
                bytes,
                memory: None,
                access,
                stuck: false,
            },
        );
        Ok(space)
    }

    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn mappings(&self) -> impl Iterator<Item = &Mapping> {
        self.mappings.values()
    }

    /// The mappings that share a byte with `[address, address + bytes)`.
    pub(crate) fn mappings_in(&self, address: u64, bytes: u64) -> impl Iterator<Item = &Mapping> {
        self.overlapping(address, bytes).map(|(_, mapping)| mapping)
    }

    /// The mappings that start in `[address, address + bytes)`.
    pub(crate) fn mappings_in_mut(
        &mut self,
        address: u64,
        bytes: u64,
    ) -> impl Iterator<Item = &mut Mapping> {
        let end = address.saturating_add(bytes);
        self.mappings
            .range_mut(address..end)
            .map(|(_, mapping)| mapping)
    }

    /// Whether `[address, address + bytes)` lies inside.
    pub(crate) fn contains(&self, address: u64, bytes: u64) -> bool {
        address >= self.base
            && address
                .checked_add(bytes)
                .is_some_and(|end| end <= self.base + self.bytes)
    }

    /// Maps the first `bytes` of `memory` at `address`, closed to every device.
    pub(crate) fn map(
        &mut self,
        address: u64,
        bytes: u64,
        memory: Arc<Physical>,
    ) -> Result<(), SpaceError> {
        let free = self.overlapping(address, bytes).next().is_none();
        let aligned = address.is_multiple_of(PAGE) && bytes.is_multiple_of(PAGE) && bytes > 0;
        let fits = self.contains(address, bytes) && bytes <= memory.memfd().bytes();
        if !(free && aligned && fits) {
            return Err(SpaceError::Misplaced);
        }
        // SAFETY: the whole pages [address, address + bytes) lie inside the range that this space
        // owns, and no mapping of it is there, so nothing refers to what MAP_FIXED replaces.
        unsafe {
            rustix::mm::mmap(
                ptr::with_exposed_provenance_mut(to_usize(address)?),
                to_usize(bytes)?,
                ProtFlags::empty(),
                MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE,
                memory.memfd(),
                0,
            )
        }?;
        let access = BTreeSet::new();
        self.mappings.insert(
            address,
            Mapping {
                bytes,
                memory: Some(memory),
                access,
                stuck: false,
            },
        );
        Ok(())
    }

    /// Removes the mappings in `[address, address + bytes)`, which cuts through none.
    pub(crate) fn unmap(&mut self, address: u64, bytes: u64) -> Result<(), SpaceError> {
        let aligned = address.is_multiple_of(PAGE) && bytes.is_multiple_of(PAGE) && bytes > 0;
        let whole = self
            .overlapping(address, bytes)
            .all(|(start, mapping)| start >= address && start + mapping.bytes <= address + bytes);
        if !(aligned && self.contains(address, bytes) && whole) {
            return Err(SpaceError::Misplaced);
        }
        // SAFETY: the whole pages [address, address + bytes) lie inside the range that this space
        // owns, and `&mut self` keeps every access through it out; what kernels do with the address
        // afterwards is a fault of theirs, as on a device.
        unsafe {
            rustix::mm::mmap_anonymous(
                ptr::with_exposed_provenance_mut(to_usize(address)?),
                to_usize(bytes)?,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
            )
        }?;
        self.mappings
            .retain(|start, _| !(address..address + bytes).contains(start));
        Ok(())
    }

    /// Opens the mappings that together are exactly `[address, address + bytes)` to `device`.
    pub(crate) fn allow(
        &mut self,
        address: u64,
        bytes: u64,
        device: DeviceOrdinal,
    ) -> Result<(), SpaceError> {
        let inside = self.exactly(address, bytes).ok_or(SpaceError::Misplaced)?;
        protect(address, bytes, MprotectFlags::READ | MprotectFlags::WRITE)?;
        for address in inside {
            if let Some(mapping) = self.mappings.get_mut(&address) {
                mapping.access.insert(device);
            }
        }
        Ok(())
    }

    /// Whether every byte of the range is mapped and open to a device that `who` accepts.
    pub(crate) fn open(
        &self,
        address: u64,
        bytes: u64,
        who: impl Fn(&BTreeSet<DeviceOrdinal>) -> bool,
    ) -> bool {
        let Some(end) = address.checked_add(bytes) else {
            return false;
        };
        let mut reached = address;
        for (start, mapping) in self.overlapping(address, bytes) {
            if start > reached || mapping.access.is_empty() || !who(&mapping.access) {
                return false;
            }
            reached = start + mapping.bytes;
        }
        reached >= end
    }

    /// Copies from the space. `false`, and nothing is copied, where the range is not open.
    pub(crate) fn read(&self, address: u64, out: &mut [u8]) -> bool {
        let Some(cells) = self.cells(address, out.len()) else {
            return false;
        };
        let (head, rest) = out.split_at_mut(cells.head.len());
        let (words, tail) = rest.split_at_mut(cells.words.len() * 8);
        for (byte, cell) in head.iter_mut().zip(cells.head) {
            *byte = cell.load(Ordering::Relaxed);
        }
        for (word, cell) in words.chunks_exact_mut(8).zip(cells.words) {
            word.copy_from_slice(&cell.load(Ordering::Relaxed).to_ne_bytes());
        }
        for (byte, cell) in tail.iter_mut().zip(cells.tail) {
            *byte = cell.load(Ordering::Relaxed);
        }
        true
    }

    /// Copies into the space. `false`, and nothing is copied, where the range is not open.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) -> bool {
        let Some(cells) = self.cells(address, bytes.len()) else {
            return false;
        };
        let (head, rest) = bytes.split_at(cells.head.len());
        let (words, tail) = rest.split_at(cells.words.len() * 8);
        for (byte, cell) in head.iter().zip(cells.head) {
            cell.store(*byte, Ordering::Relaxed);
        }
        for (word, cell) in words.as_chunks().0.iter().zip(cells.words) {
            cell.store(u64::from_ne_bytes(*word), Ordering::Relaxed);
        }
        for (byte, cell) in tail.iter().zip(cells.tail) {
            cell.store(*byte, Ordering::Relaxed);
        }
        true
    }

    /// Fills part of the space. `false`, and nothing is written, where the range is not open.
    pub(crate) fn fill(&self, address: u64, bytes: usize, value: u8) -> bool {
        let Some(cells) = self.cells(address, bytes) else {
            return false;
        };
        for cell in cells.head.iter().chain(cells.tail) {
            cell.store(value, Ordering::Relaxed);
        }
        for cell in cells.words {
            cell.store(u64::from_ne_bytes([value; 8]), Ordering::Relaxed);
        }
        true
    }

    /// Reads an aligned word, acquire. `None` where the word is not open.
    pub(crate) fn load(&self, address: u64) -> Option<u64> {
        let cells = self.cells(address, 8)?;
        cells.words.first().map(|word| word.load(Ordering::Acquire))
    }

    /// The range as atomic cells, if all of it is open.
    fn cells(&self, address: u64, bytes: usize) -> Option<Cells<'_>> {
        let inside = self.contains(address, bytes as u64);
        if !inside || !self.open(address, bytes as u64, |_| true) {
            return None;
        }
        let start = to_usize(address).ok()?;
        let head = (start.next_multiple_of(8) - start).min(bytes);
        let words = (bytes - head) / 8;
        let tail = bytes - head - words * 8;
        let bytes_at = |offset| ptr::with_exposed_provenance(start + offset);
        let words_at = match words {
            0 => ptr::dangling(),
            _ => ptr::with_exposed_provenance::<AtomicU64>(start + head),
        };
        // SAFETY: the range lies inside the space, so no address in it is null, and every byte is
        // mapped readable and writable, as `open` found, and stays so while `self` is borrowed; a
        // page of a memfd cannot vanish, since the file is sealed against shrinking. Bytes need no
        // alignment, and an atomic may be changed by others at any time.
        let head = unsafe { slice::from_raw_parts(bytes_at(0), head) };
        // SAFETY: as above; with `words` over 0, `head` was what is missing to a multiple of 8, and
        // with 0 the slice is empty at an address that is aligned and not null.
        let words = unsafe { slice::from_raw_parts(words_at, words) };
        // SAFETY: as for the head.
        let tail = unsafe { slice::from_raw_parts(bytes_at(bytes - tail), tail) };
        Some(Cells { head, words, tail })
    }

    /// The starts of the mappings that together are exactly `[address, address + bytes)`.
    fn exactly(&self, address: u64, bytes: u64) -> Option<Vec<u64>> {
        let mut reached = address;
        let mut starts = Vec::new();
        for (start, mapping) in self.overlapping(address, bytes) {
            if start != reached {
                return None;
            }
            reached += mapping.bytes;
            starts.push(start);
        }
        (!starts.is_empty() && reached == address.checked_add(bytes)?).then_some(starts)
    }

    /// The mappings that share a byte with `[address, address + bytes)`, in order.
    fn overlapping(&self, address: u64, bytes: u64) -> impl Iterator<Item = (u64, &Mapping)> {
        let end = address.saturating_add(bytes);
        let before = self.mappings.range(..address).next_back();
        let before = before.filter(move |(start, mapping)| *start + mapping.bytes > address);
        let within = self.mappings.range(address..end.max(address));
        before
            .into_iter()
            .chain(within)
            .map(|(start, mapping)| (*start, mapping))
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        if let Err(error) = trim(self.base, self.bytes) {
            tracing::error!(base = self.base, bytes = self.bytes, %error, "munmap failed");
        }
    }
}

/// A range of memory that others may be using too: the bytes up to the first aligned word, the
/// words, and the bytes after the last.
struct Cells<'a> {
    head: &'a [AtomicU8],
    words: &'a [AtomicU64],
    tail: &'a [AtomicU8],
}

/// Gives a range of addresses back to the system. Only for ranges that a [`Space`] owns.
fn trim(address: u64, bytes: u64) -> io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let start = ptr::with_exposed_provenance_mut(to_usize(address)?);
    // SAFETY: the callers, `reserve` and `drop`, own the range since `mmap` and give up every use of
    // it here: `reserve` before a `Space` exists, `drop` with exclusive access to the last one.
    Ok(unsafe { rustix::mm::munmap(start, to_usize(bytes)?) }?)
}

/// Changes the protection of a range. Only for ranges that a [`Space`] owns.
fn protect(address: u64, bytes: u64, flags: MprotectFlags) -> io::Result<()> {
    let start = ptr::with_exposed_provenance_mut(to_usize(address)?);
    // SAFETY: the callers own the range and hold `&mut` to its space; they only ever add rights.
    Ok(unsafe { rustix::mm::mprotect(start, to_usize(bytes)?, flags) }?)
}

fn to_usize(value: u64) -> io::Result<usize> {
    usize::try_from(value).map_err(|_| io::ErrorKind::OutOfMemory.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::share::{Charge, Identity, Sharing, pid, unique};

    const D0: DeviceOrdinal = DeviceOrdinal(0);

    fn physical(bytes: u64) -> Arc<Physical> {
        let identity = Identity {
            cluster: 0,
            node: 0,
            gpu: 0,
            sharing: Sharing::PosixFd,
            pid: pid(),
            process: unique(),
            id: unique(),
        };
        let charge = Charge::take(&Arc::default(), bytes, u64::MAX).unwrap();
        Physical::create(identity, bytes, charge).unwrap()
    }

    /// The lines of the kernel's list of mappings that lie in a range.
    fn kernel_sees(base: u64, bytes: u64) -> Vec<String> {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let inside = |line: &&str| {
            let (start, _) = line.split_once('-').unwrap();
            let start = u64::from_str_radix(start, 16).unwrap();
            (base..base + bytes).contains(&start)
        };
        maps.lines().filter(inside).map(str::to_owned).collect()
    }

    #[test]
    fn a_space_is_reserved_mapped_opened_and_given_back() {
        let memory = physical(PAGE);
        let mut space = Space::reserve(4 * PAGE, 64 * PAGE).unwrap();
        let (base, bytes) = (space.base(), space.bytes());
        assert!(base.is_multiple_of(64 * PAGE));
        assert!(
            kernel_sees(base, bytes)
                .iter()
                .all(|line| line.contains("---p"))
        );

        space.map(base + PAGE, PAGE, Arc::clone(&memory)).unwrap();
        let seen = kernel_sees(base, bytes);
        assert!(
            seen.iter()
                .any(|line| line.contains("---s") && line.contains("ep-sim:"))
        );
        assert!(!space.write(base + PAGE, b"x"));

        space.allow(base + PAGE, PAGE, D0).unwrap();
        assert!(
            kernel_sees(base, bytes)
                .iter()
                .any(|line| line.contains("rw-s"))
        );
        assert!(space.write(base + PAGE, b"x"));
        assert!(!space.write(base + PAGE - 1, b"xy"));
        assert!(!space.write(base + 2 * PAGE - 1, b"xy"));

        space.unmap(base, 4 * PAGE).unwrap();
        assert!(
            kernel_sees(base, bytes)
                .iter()
                .all(|line| line.contains("---p"))
        );
        drop(space);
        // Another test may have been given the addresses; the name is of this memory alone.
        let name = memory.memfd().name();
        let mapped = |line: &String| line.contains(&format!("{name} (deleted)"));
        assert!(!kernel_sees(base, bytes).iter().any(mapped));
        assert_eq!(Arc::strong_count(&memory), 1);
    }

    #[test]
    fn mappings_neither_overlap_nor_leave_the_space() {
        let memory = physical(2 * PAGE);
        let mut space = Space::reserve(4 * PAGE, PAGE).unwrap();
        let base = space.base();
        let mut map = |at: u64, bytes| space.map(at, bytes, Arc::clone(&memory));
        map(base + PAGE, 2 * PAGE).unwrap();
        for (at, bytes) in [
            (base, 2 * PAGE),
            (base + PAGE, PAGE),
            (base + 2 * PAGE, 2 * PAGE),
            (base + 3 * PAGE, 2 * PAGE),
            (base.wrapping_sub(PAGE), PAGE),
            (base + 3 * PAGE + 1, PAGE),
            (base + 3 * PAGE, 0),
            (base + 3 * PAGE, 3 * PAGE),
            (u64::MAX - PAGE + 1, PAGE),
        ] {
            let refused = map(at, bytes);
            assert!(
                matches!(refused, Err(SpaceError::Misplaced)),
                "{at:#x} {bytes}"
            );
        }
        map(base, PAGE).unwrap();
        map(base + 3 * PAGE, PAGE).unwrap();
    }

    #[test]
    fn nothing_outside_is_read_not_even_nothing() {
        let space = Space::of_memory(physical(PAGE), D0).unwrap();
        assert!(!space.read(0, &mut []));
        assert!(!space.read(u64::MAX, &mut [0]));
        assert!(!space.fill(space.base(), usize::MAX, 0));
        assert!(space.read(space.base() + PAGE, &mut []));
        assert_eq!(space.load(space.base() + PAGE), None);
        assert_eq!(space.load(space.base() + PAGE - 8), Some(0));
    }

    #[test]
    fn only_sealed_memory_files_are_adopted() {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let unsealed = rustix::fs::memfd_create("ep-sim:unsealed", flags).unwrap();
        assert!(Memfd::adopt(unsealed).unwrap().is_none());
        let file = std::fs::File::open("/proc/self/maps").unwrap();
        assert!(Memfd::adopt(file.into()).unwrap().is_none());
        let ours = Memfd::create("ep-sim:name".to_owned(), 1).unwrap();
        let adopted = Memfd::adopt(ours.duplicate().unwrap()).unwrap().unwrap();
        assert_eq!((adopted.name(), adopted.bytes()), ("ep-sim:name", PAGE));
        assert_eq!(adopted.inode(), ours.inode());
        assert!(rustix::fs::ftruncate(&ours, 0).is_err());
    }

    #[test]
    fn absurd_sizes_are_out_of_memory() {
        for bytes in [1 << 62, u64::MAX] {
            assert_eq!(
                Space::reserve(bytes, PAGE).unwrap_err().kind(),
                io::ErrorKind::OutOfMemory
            );
        }
    }
}
