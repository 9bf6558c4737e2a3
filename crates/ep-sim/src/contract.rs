//! What every driver does: one suite for the simulator and for the vendor's driver.
//!
//! The expectations are those of the vendor's driver on real devices. Where they and the simulator
//! differ, the simulator is wrong. The suite creates only what it releases, so whoever runs it may
//! ask afterwards that nothing is held.

use std::fmt;
use std::sync::Arc;

use ep_sys::vmm::{DeviceMemory, Event, HostBuffer, Mapping, Physical, Reservation, Stream};
use ep_sys::{
    Bytes16, Call, DeviceOrdinal, DevicePtr, Driver, Error, EventHandle, GranularityKind,
    HandleKind, HostMemory, Link, PhysHandle, Result, ShareableHandle, Status, StreamHandle,
};

/// How a driver did in one case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaseResult {
    /// The case.
    pub name: &'static str,
    /// What was not as expected; empty if all was.
    pub violations: Vec<String>,
}

impl CaseResult {
    /// Whether all was as expected.
    pub fn passed(&self) -> bool {
        self.violations.is_empty()
    }
}

impl fmt::Display for CaseResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.name)?;
        if self.passed() {
            return f.write_str("ok");
        }
        for (i, violation) in self.violations.iter().enumerate() {
            write!(f, "{}{violation}", if i == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

/// Runs every case on `device`. Cases between two devices run with the next visible one, where there
/// is one.
///
/// ```
/// use std::sync::Arc;
///
/// use ep_sim::{Cluster, SimDriver, contract};
/// use ep_sys::{DeviceOrdinal, Driver};
///
/// let driver: Arc<dyn Driver> = SimDriver::new(&Cluster::hgx_h200(2), 0, &[0, 1]);
/// for case in contract::run(&driver, DeviceOrdinal(0)) {
///     assert!(case.passed(), "{case}");
/// }
/// ```
pub fn run(driver: &Arc<dyn Driver>, device: DeviceOrdinal) -> Vec<CaseResult> {
    CASES
        .iter()
        .map(|(name, case)| {
            let mut bench = Bench {
                driver,
                device,
                violations: Vec::new(),
            };
            if let Err(error) = case(&mut bench) {
                bench.violations.push(format!("stopped: {error}"));
            }
            CaseResult {
                name,
                violations: bench.violations,
            }
        })
        .collect()
}

type Case = fn(&mut Bench<'_>) -> Result<()>;

/// A list of cases, each with its function's name.
macro_rules! cases {
    ($($case:ident,)*) => { &[$((stringify!($case), $case),)*] };
}

const CASES: &[(&str, Case)] = cases![
    devices,
    granularity,
    sizes_of_physical_allocations,
    release_once,
    reservations,
    map_and_unmap,
    mapping_keeps_memory,
    parts_of_an_allocation,
    two_mappings_of_one_allocation,
    neighbouring_mappings,
    descriptor_round_trip,
    descriptor_keeps_memory,
    fabric_works_or_is_refused,
    gdr_works_or_is_refused,
    foreign_handles,
    plain_memory,
    memory_is_given_back,
    ipc_of_one_process,
    host_memory,
    fill_and_copy,
    copies_to_nowhere,
    streams,
    events,
    events_across_streams,
    peers,
    access_of_a_peer,
];

fn devices(b: &mut Bench<'_>) -> Result<()> {
    let count = b.driver.device_count()?;
    let infos = (0..count)
        .map(|ordinal| b.driver.device_info(DeviceOrdinal(ordinal)))
        .collect::<Result<Vec<_>>>()?;
    for (i, info) in infos.iter().enumerate() {
        b.check(info.uuid != Bytes16::ZERO, "a device has a UUID");
        b.check(
            infos[..i].iter().all(|other| other.uuid != info.uuid),
            "UUIDs differ",
        );
        b.check(
            infos[..i].iter().all(|o| o.pci_bus_id != info.pci_bus_id),
            "PCI addresses differ",
        );
        b.check(!info.name.is_empty(), "a device has a name");
        b.check(info.total_bytes > 1 << 30, "a device has memory");
        b.check(info.multiprocessors > 0, "a device has multiprocessors");
        b.check(info.vmm_attribute, "a device has virtual memory management");
    }
    b.check(
        b.driver.device_info(b.device)? == b.driver.device_info(b.device)?,
        "info is stable",
    );
    b.driver.fabric_info(b.device)?;
    let strangers = [Bytes16([0x5a; 16]), Bytes16([0xa5; 16])];
    b.check(
        b.driver.peer_links(b.device, &strangers)? == [Link::Unknown; 2],
        "of GPUs that the host lacks NVML cannot tell",
    );
    let own = b.driver.device_info(b.device)?.uuid;
    b.check(
        b.driver.peer_links(b.device, &[own])? == [Link::Unknown],
        "nothing joins a GPU and itself",
    );
    let absent = DeviceOrdinal(count);
    b.refused(
        "info of an absent device",
        b.driver.device_info(absent),
        Status::INVALID_DEVICE,
    );
    b.refused(
        "alloc on an absent device",
        b.driver.mem_alloc(absent, 256),
        Status::INVALID_DEVICE,
    );
    b.refused(
        "stream on an absent device",
        b.driver.stream_create(absent),
        Status::INVALID_DEVICE,
    );
    let absent_peer = b.driver.can_access_peer(b.device, absent);
    b.refused(
        "access to an absent device",
        absent_peer,
        Status::INVALID_DEVICE,
    );
    b.check(
        b.driver.host_facts() == b.driver.host_facts(),
        "host facts are stable",
    );
    Ok(())
}

fn granularity(b: &mut Bench<'_>) -> Result<()> {
    let granule = b.granule()?;
    let recommended =
        b.driver
            .mem_granularity(b.device, HandleKind::PosixFd, GranularityKind::Recommended)?;
    b.check(
        granule.is_power_of_two(),
        "the granularity is a power of two",
    );
    b.check(
        recommended.is_multiple_of(granule),
        "recommended is a multiple of minimum",
    );
    Ok(())
}

fn sizes_of_physical_allocations(b: &mut Bench<'_>) -> Result<()> {
    let granule = b.granule()?;
    let total = b.driver.device_info(b.device)?.total_bytes;
    for (what, bytes, status) in [
        ("create of 0 bytes", 0, Status::INVALID_VALUE),
        ("create of 1 byte", 1, Status::INVALID_VALUE),
        (
            "create of a granule and a byte",
            granule + 1,
            Status::INVALID_VALUE,
        ),
        (
            "create of more than the device has",
            total.next_multiple_of(granule) + granule,
            Status::OUT_OF_MEMORY,
        ),
    ] {
        let created = b
            .driver
            .mem_create(b.device, bytes, HandleKind::PosixFd, false);
        b.refused(what, created, status);
    }
    Ok(())
}

fn release_once(b: &mut Bench<'_>) -> Result<()> {
    let granule = b.granule()?;
    let handle = b
        .driver
        .mem_create(b.device, granule, HandleKind::PosixFd, false)?;
    b.driver.mem_release(b.device, handle)?;
    let invalid = Status::INVALID_VALUE;
    b.refused(
        "second release",
        b.driver.mem_release(b.device, handle),
        invalid,
    );
    let exported = b.driver.mem_export(b.device, handle, HandleKind::PosixFd);
    b.refused("export after release", exported, invalid);
    let space = Reservation::new(b.driver, b.device, granule, 0)?;
    let mapped = b.driver.mem_map(b.device, space.ptr(), granule, handle);
    b.refused("map after release", mapped, invalid);
    b.refused(
        "release of null",
        b.driver.mem_release(b.device, PhysHandle(0)),
        invalid,
    );
    space.close()
}

fn reservations(b: &mut Bench<'_>) -> Result<()> {
    let granule = b.granule()?;
    let invalid = Status::INVALID_VALUE;
    b.refused(
        "reserve 0 bytes",
        b.driver.mem_reserve(b.device, 0, 0),
        invalid,
    );
    b.refused(
        "align to 3",
        b.driver.mem_reserve(b.device, granule, 3),
        invalid,
    );
    for align in [0, granule, 16 * granule] {
        let space = Reservation::new(b.driver, b.device, 3 * granule, align)?;
        let (ptr, bytes) = (space.ptr(), space.bytes());
        let other = Reservation::new(b.driver, b.device, granule, align)?;
        b.check(
            ptr.0.is_multiple_of(align.max(granule)),
            "a reservation is aligned",
        );
        let apart = other.ptr().0 + granule <= ptr.0 || ptr.0 + bytes <= other.ptr().0;
        b.check(apart, "reservations do not overlap");
        other.close()?;
        let part = b.driver.mem_address_free(b.device, ptr, granule);
        b.refused("free part of a reservation", part, invalid);
        let inside = b
            .driver
            .mem_address_free(b.device, ptr.offset(granule), granule);
        b.refused("free from the middle of a reservation", inside, invalid);
        // Unmapping what is not mapped is no mistake.
        b.driver.mem_unmap(b.device, ptr, bytes)?;
        space.close()?;
        b.refused(
            "second free",
            b.driver.mem_address_free(b.device, ptr, bytes),
            invalid,
        );
    }
    Ok(())
}

fn map_and_unmap(b: &mut Bench<'_>) -> Result<()> {
    let granule = b.granule()?;
    let invalid = Status::INVALID_VALUE;
    let (driver, device) = (b.driver, b.device);
    let physical = Physical::create(driver, device, granule, HandleKind::PosixFd, false)?;
    let other = Physical::create(driver, device, granule, HandleKind::PosixFd, false)?;
    let space = Reservation::new(driver, device, 2 * granule, 0)?;
    let ptr = space.ptr();
    let map = |at: DevicePtr, bytes, of: &Physical| driver.mem_map(device, at, bytes, of.handle());

    b.refused(
        "map at an odd address",
        map(ptr.offset(1), granule, &physical),
        invalid,
    );
    let too_much = map(ptr, 2 * granule, &physical);
    b.refused(
        "map more than the allocation",
        too_much,
        Status::NOT_SUPPORTED,
    );
    b.refused("map 0 bytes", map(ptr, 0, &physical), invalid);
    b.refused(
        "access before map",
        driver.mem_set_access(device, ptr, granule),
        invalid,
    );

    map(ptr, granule, &physical)?;
    b.refused("map over a mapping", map(ptr, granule, &other), invalid);
    let freed = driver.mem_address_free(device, ptr, 2 * granule);
    b.refused("free a reservation with a mapping", freed, invalid);
    driver.mem_set_access(device, ptr, granule)?;
    b.round_trip(ptr, b"through a mapping")?;
    let beyond = driver.mem_set_access(device, ptr, 2 * granule);
    b.refused("access beyond the mapping", beyond, invalid);

    driver.mem_unmap(device, ptr, granule)?;
    // Unmapping what is not mapped is no mistake.
    driver.mem_unmap(device, ptr, granule)?;
    let copied = driver.copy_to_device(device, ptr, b"gone");
    b.refused("copy to what was unmapped", copied, invalid);

    // The place can be taken again.
    map(ptr, granule, &other)?;
    driver.mem_set_access(device, ptr, granule)?;
    b.round_trip(ptr.offset(granule - 8), b"at last")?;
    driver.mem_unmap(device, ptr, granule)?;
    space.close()?;
    other.close()?;
    physical.close()
}

fn mapping_keeps_memory(b: &mut Bench<'_>) -> Result<()> {
    let granule = b.granule()?;
    let (driver, device) = (b.driver, b.device);
    let handle = driver.mem_create(device, granule, HandleKind::PosixFd, false)?;
    let space = Reservation::new(driver, device, granule, 0)?;
    driver.mem_map(device, space.ptr(), granule, handle)?;
    driver.mem_set_access(device, space.ptr(), granule)?;
    driver.copy_to_device(device, space.ptr(), b"before")?;
    driver.mem_release(device, handle)?;
    b.holds(space.ptr(), b"before")?;
    b.round_trip(space.ptr(), b"after release")?;
    driver.mem_unmap(device, space.ptr(), granule)?;
    space.close()
}

fn parts_of_an_allocation(b: &mut Bench<'_>) -> Result<()> {
    let granule = b.granule()?;
    let invalid = Status::INVALID_VALUE;
    let (driver, device) = (b.driver, b.device);
    let physical = Physical::create(driver, device, 2 * granule, HandleKind::PosixFd, false)?;
    let space = Reservation::new(driver, device, 4 * granule, 0)?;
    let ptr = space.ptr();
    let start = driver.mem_map(device, ptr, granule, physical.handle());
    b.refused(
        "map the start of an allocation",
        start,
        Status::NOT_SUPPORTED,
    );
    driver.mem_map(device, ptr, 2 * granule, physical.handle())?;
    let overlapping = driver.mem_map(device, ptr.offset(granule), 2 * granule, physical.handle());
    b.refused("map over half a mapping", overlapping, invalid);
    let half = driver.mem_unmap(device, ptr, granule);
    b.refused("unmap half a mapping", half, invalid);
    driver.mem_set_access(device, ptr, 2 * granule)?;
    driver.mem_set_access(device, ptr, 2 * granule)?;
    b.round_trip(ptr.offset(granule - 4), b"all of it")?;
    // With what is free around it.
    driver.mem_unmap(device, ptr, 4 * granule)?;
    space.close()?;
    physical.close()
}

fn two_mappings_of_one_allocation(b: &mut Bench<'_>) -> Result<()> {
    let granule = b.granule()?;
    let (driver, device) = (b.driver, b.device);
    let physical = Physical::create(driver, device, granule, HandleKind::PosixFd, false)?;
    let space = Reservation::new(driver, device, 2 * granule, 0)?;
    let (first, second) = (space.ptr(), space.ptr().offset(granule));
    for at in [first, second] {
        driver.mem_map(device, at, granule, physical.handle())?;
        driver.mem_set_access(device, at, granule)?;
    }
    driver.copy_to_device(device, first, b"in both")?;
    b.holds(second, b"in both")?;
    driver.mem_unmap(device, first, granule)?;
    b.holds(second, b"in both")?;
    driver.mem_unmap(device, second, granule)?;
    space.close()?;
    physical.close()
}

fn neighbouring_mappings(b: &mut Bench<'_>) -> Result<()> {
    let granule = b.granule()?;
    let (driver, device) = (b.driver, b.device);
    let space = Reservation::new(driver, device, 2 * granule, 0)?;
    for at in [space.ptr(), space.ptr().offset(granule)] {
        let physical = Physical::create(driver, device, granule, HandleKind::PosixFd, false)?;
        driver.mem_map(device, at, granule, physical.handle())?;
        physical.close()?;
    }
    // Access, copies and unmapping may cover both at once.
    driver.mem_set_access(device, space.ptr(), 2 * granule)?;
    b.round_trip(space.ptr().offset(granule - 3), b"across the border")?;
    driver.mem_unmap(device, space.ptr(), 2 * granule)?;
    space.close()
}

fn descriptor_round_trip(b: &mut Bench<'_>) -> Result<()> {
    let granule = b.granule()?;
    let (driver, device) = (b.driver, b.device);
    let physical = Physical::create(driver, device, 2 * granule, HandleKind::PosixFd, false)?;
    let as_fabric = driver.mem_export(device, physical.handle(), HandleKind::Fabric);
    b.refused(
        "export as what it was not created for",
        as_fabric,
        Status::INVALID_VALUE,
    );
    let exported = physical.export(HandleKind::PosixFd)?;
    let imported = Physical::import(driver, device, &exported, 2 * granule)?;
    drop(exported);
    let ours = Mapping::new(physical, granule)?;
    let theirs = Mapping::new(imported, granule)?;
    b.check(ours.ptr() != theirs.ptr(), "an import is mapped elsewhere");
    driver.copy_to_device(device, ours.ptr().offset(granule), b"out")?;
    b.holds(theirs.ptr().offset(granule), b"out")?;
    driver.copy_to_device(device, theirs.ptr(), b"and back")?;
    b.holds(ours.ptr(), b"and back")?;
    ours.close()?;
    b.holds(theirs.ptr(), b"and back")?;
    theirs.close()
}

fn descriptor_keeps_memory(b: &mut Bench<'_>) -> Result<()> {
    let granule = b.granule()?;
    let (driver, device) = (b.driver, b.device);
    let physical = Physical::create(driver, device, granule, HandleKind::PosixFd, false)?;
    let exported = physical.export(HandleKind::PosixFd)?;
    let mapping = Mapping::new(physical, 0)?;
    driver.copy_to_device(device, mapping.ptr(), b"kept")?;
    mapping.close()?;
    let again = Mapping::new(Physical::import(driver, device, &exported, granule)?, 0)?;
    b.holds(again.ptr(), b"kept")?;
    again.close()
}

fn fabric_works_or_is_refused(b: &mut Bench<'_>) -> Result<()> {
    let (driver, device) = (b.driver, b.device);
    let granule = driver.mem_granularity(device, HandleKind::Fabric, GranularityKind::Minimum)?;
    let physical = match Physical::create(driver, device, granule, HandleKind::Fabric, false) {
        Ok(physical) => physical,
        Err(error) => {
            b.check(
                error.call() == Call::MemCreate,
                "the refusal names the call",
            );
            b.check(error.status().is_some(), "the refusal has a status");
            return Ok(());
        }
    };
    let exported = physical.export(HandleKind::Fabric)?;
    let ours = Mapping::new(physical, 0)?;
    let theirs = Mapping::new(Physical::import(driver, device, &exported, granule)?, 0)?;
    driver.copy_to_device(device, ours.ptr(), b"over fabric")?;
    b.holds(theirs.ptr(), b"over fabric")?;
    theirs.close()?;
    ours.close()
}

fn gdr_works_or_is_refused(b: &mut Bench<'_>) -> Result<()> {
    let granule = b.granule()?;
    match Physical::create(b.driver, b.device, granule, HandleKind::PosixFd, true) {
        Ok(physical) => {
            let mapping = Mapping::new(physical, 0)?;
            b.round_trip(mapping.ptr(), b"for a NIC")?;
            mapping.close()
        }
        Err(error) => {
            b.check(error.status().is_some(), "the refusal has a status");
            Ok(())
        }
    }
}

fn foreign_handles(b: &mut Bench<'_>) -> Result<()> {
    let (driver, device) = (b.driver, b.device);
    match std::fs::File::open("/dev/null") {
        Ok(file) => {
            let foreign = ShareableHandle::PosixFd(file.into());
            let imported = driver.mem_import(device, &foreign);
            b.refused_somehow("import of a descriptor that is no memory", imported);
        }
        Err(source) => {
            return Err(Error::Os {
                call: Call::MemImport,
                source,
            });
        }
    }
    let foreign = ShareableHandle::Fabric([0x5a; 64]);
    b.refused_somehow(
        "import of a forged fabric handle",
        driver.mem_import(device, &foreign),
    );
    let opened = driver.ipc_open(device, &[0x5a; 64]);
    b.refused("opening a forged IPC handle", opened, Status::INVALID_VALUE);
    Ok(())
}

fn plain_memory(b: &mut Bench<'_>) -> Result<()> {
    let granule = b.granule()?;
    let invalid = Status::INVALID_VALUE;
    let (driver, device) = (b.driver, b.device);
    b.refused("alloc of 0 bytes", driver.mem_alloc(device, 0), invalid);
    let total = driver.device_info(device)?.total_bytes;
    let too_much = driver.mem_alloc(device, 2 * total);
    b.refused("alloc of twice the memory", too_much, Status::OUT_OF_MEMORY);
    for bytes in [1, 300, granule + 17] {
        let memory = DeviceMemory::new(driver, device, bytes)?;
        b.check(!memory.ptr().is_null(), "memory has an address");
        b.check(
            memory.ptr().0.is_multiple_of(256),
            "memory is aligned to 256 bytes",
        );
        b.round_trip(memory.ptr().offset(bytes - 1), b"x")?;
        let ptr = memory.ptr();
        memory.close()?;
        b.refused("second free", driver.mem_free(device, ptr), invalid);
    }
    let physical = Physical::create(driver, device, granule, HandleKind::PosixFd, false)?;
    let mapping = Mapping::new(physical, 0)?;
    b.refused(
        "free of a mapping",
        driver.mem_free(device, mapping.ptr()),
        invalid,
    );
    mapping.close()
}

fn memory_is_given_back(b: &mut Bench<'_>) -> Result<()> {
    // Larger than any pool that a driver keeps, so that it shows.
    let bytes = 256 << 20;
    let (driver, device) = (b.driver, b.device);
    let (before, total) = driver.mem_info(device)?;
    b.check(before <= total, "no more is free than there is");
    let plain = DeviceMemory::new(driver, device, bytes)?;
    let (with_plain, _) = driver.mem_info(device)?;
    b.check(
        with_plain + bytes <= before,
        "an allocation takes its memory",
    );
    plain.close()?;
    let physical = Physical::create(driver, device, bytes, HandleKind::PosixFd, false)?;
    let mapping = Mapping::new(physical, 0)?;
    let (with_mapping, _) = driver.mem_info(device)?;
    b.check(
        with_mapping + bytes <= before,
        "a physical allocation takes its memory",
    );
    mapping.close()?;
    let (after, _) = driver.mem_info(device)?;
    b.check(after >= with_mapping + bytes, "closing gives it back");
    Ok(())
}

fn ipc_of_one_process(b: &mut Bench<'_>) -> Result<()> {
    let granule = b.granule()?;
    let (driver, device) = (b.driver, b.device);
    let memory = DeviceMemory::new(driver, device, granule)?;
    let handle = memory.ipc_handle()?;
    b.check(handle == memory.ipc_handle()?, "a handle is stable");
    let of_middle = driver.ipc_get_handle(device, memory.ptr().offset(granule / 2))?;
    b.check(of_middle == handle, "a handle is of the whole allocation");
    let opened = driver.ipc_open(device, &handle);
    b.refused("opening one's own handle", opened, Status::INVALID_CONTEXT);
    let closed = driver.ipc_close(device, memory.ptr());
    b.refused("closing what was not opened", closed, Status::INVALID_VALUE);
    let physical = Physical::create(driver, device, granule, HandleKind::PosixFd, false)?;
    let mapping = Mapping::new(physical, 0)?;
    let of_mapping = driver.ipc_get_handle(device, mapping.ptr());
    b.refused(
        "an IPC handle of a mapping",
        of_mapping,
        Status::INVALID_VALUE,
    );
    mapping.close()?;
    let ptr = memory.ptr();
    memory.close()?;
    let of_freed = driver.ipc_get_handle(device, ptr);
    b.refused(
        "an IPC handle of freed memory",
        of_freed,
        Status::INVALID_VALUE,
    );
    Ok(())
}

fn host_memory(b: &mut Bench<'_>) -> Result<()> {
    let invalid = Status::INVALID_VALUE;
    let (driver, device) = (b.driver, b.device);
    b.refused(
        "host alloc of 0 bytes",
        driver.host_alloc(device, 0),
        invalid,
    );
    let buffer = HostBuffer::new(driver, device, 4096)?;
    let memory = buffer.memory();
    b.check(memory.bytes == 4096, "it has the size that was asked for");
    for offset in (0..4096).step_by(8) {
        b.check(buffer.load(offset)? == 0, "host memory is zeroed");
    }
    let word = 0x0123_4567_89ab_cdef_u64;
    driver.copy_to_device(device, memory.device.offset(8), &word.to_ne_bytes())?;
    b.check(
        buffer.load(8)? == word,
        "the device writes what the host loads",
    );
    for offset in [4096, 4092, 1, u64::MAX - 7] {
        b.refused(
            "a load that is not inside, or not aligned",
            buffer.load(offset),
            invalid,
        );
    }
    let other = DevicePtr(memory.device.0.wrapping_add(8));
    for changed in [
        HostMemory {
            bytes: 8192,
            ..memory
        },
        HostMemory {
            bytes: u64::MAX,
            ..memory
        },
        HostMemory {
            device: other,
            ..memory
        },
    ] {
        for offset in [0, 4096, u64::MAX - 15] {
            b.refused(
                "a load from what was given otherwise",
                driver.host_load(changed, offset),
                invalid,
            );
        }
        b.refused(
            "free of what was given otherwise",
            driver.host_free(device, changed),
            invalid,
        );
    }
    buffer.close()?;
    b.refused("second free", driver.host_free(device, memory), invalid);
    b.refused("load after free", driver.host_load(memory, 0), invalid);
    let never = HostMemory {
        host: 4096,
        device: DevicePtr(4096),
        bytes: 8,
    };
    b.refused(
        "free of what was not allocated",
        driver.host_free(device, never),
        invalid,
    );
    Ok(())
}

fn fill_and_copy(b: &mut Bench<'_>) -> Result<()> {
    let (driver, device) = (b.driver, b.device);
    let stream = Stream::new(driver, device)?;
    let a = DeviceMemory::new(driver, device, 4096)?;
    let c = DeviceMemory::new(driver, device, 4096)?;
    for (offset, bytes) in [(0, 4096), (1, 4094), (3, 1), (7, 65)] {
        driver.fill(device, a.ptr(), 0x11, 4096, stream.handle())?;
        driver.fill(device, a.ptr().offset(offset), 0xa5, bytes, stream.handle())?;
        driver.fill(device, c.ptr(), 0x22, 4096, stream.handle())?;
        driver.copy_on_device(
            device,
            c.ptr().offset(offset),
            a.ptr().offset(offset),
            bytes,
            stream.handle(),
        )?;
        stream.synchronize()?;
        let (from, to) = (to_usize(offset), to_usize(offset + bytes));
        for (ptr, outside) in [(a.ptr(), 0x11), (c.ptr(), 0x22)] {
            let mut expected = vec![outside; 4096];
            expected[from..to].fill(0xa5);
            b.holds(ptr, &expected)?;
        }
    }
    // Nothing is a length too.
    driver.copy_to_device(device, a.ptr(), &[])?;
    driver.copy_to_host(device, &mut [], a.ptr())?;
    driver.fill(device, a.ptr(), 0, 0, stream.handle())?;
    driver.copy_on_device(device, c.ptr(), a.ptr(), 0, stream.handle())?;
    stream.synchronize()?;
    b.round_trip(a.ptr().offset(5), b"still here")?;
    c.close()?;
    a.close()?;
    stream.close()
}

fn copies_to_nowhere(b: &mut Bench<'_>) -> Result<()> {
    let granule = b.granule()?;
    let invalid = Status::INVALID_VALUE;
    let (driver, device) = (b.driver, b.device);
    let space = Reservation::new(driver, device, 2 * granule, 0)?;
    let ptr = space.ptr();
    let mut out = [0; 8];
    b.refused(
        "copy to null",
        driver.copy_to_device(device, DevicePtr::NULL, b"x"),
        invalid,
    );
    b.refused(
        "copy to reserved space",
        driver.copy_to_device(device, ptr, b"x"),
        invalid,
    );
    b.refused(
        "copy from reserved space",
        driver.copy_to_host(device, &mut out, ptr),
        invalid,
    );
    let filled = driver.fill(device, ptr, 0, 8, StreamHandle::default());
    b.refused("fill of reserved space", filled, invalid);
    let physical = Physical::create(driver, device, granule, HandleKind::PosixFd, false)?;
    driver.mem_map(device, ptr, granule, physical.handle())?;
    driver.mem_set_access(device, ptr, granule)?;
    let over = driver.copy_to_device(device, ptr.offset(granule - 1), b"over");
    b.refused("copy over the end of a mapping", over, invalid);
    driver.mem_unmap(device, ptr, granule)?;
    physical.close()?;
    space.close()
}

fn streams(b: &mut Bench<'_>) -> Result<()> {
    let (driver, device) = (b.driver, b.device);
    driver.stream_synchronize(device, StreamHandle::default())?;
    driver.stream_synchronize(device, StreamHandle::LEGACY)?;
    let stream = Stream::new(driver, device)?;
    let other = Stream::new(driver, device)?;
    b.check(stream.handle() != other.handle(), "streams differ");
    b.check(
        stream.handle() != StreamHandle::default(),
        "a stream is not the default stream",
    );
    stream.synchronize()?;
    let handle = stream.handle();
    stream.close()?;
    let destroyed = driver.stream_destroy(device, handle);
    b.refused("second destroy", destroyed, Status::INVALID_HANDLE);
    other.close()
}

fn events(b: &mut Bench<'_>) -> Result<()> {
    let invalid = Status::INVALID_HANDLE;
    let (driver, device) = (b.driver, b.device);
    let stream = Stream::new(driver, device)?;
    let memory = DeviceMemory::new(driver, device, 16 << 20)?;
    let start = Event::new(driver, device, true)?;
    let end = Event::new(driver, device, true)?;
    let untimed = Event::new(driver, device, false)?;

    // What was never recorded counts as reached, but has no time.
    start.synchronize()?;
    stream.wait_event(&start)?;
    b.refused(
        "time of what was not recorded",
        end.elapsed_us(&start),
        invalid,
    );

    start.record(stream.handle())?;
    driver.fill(device, memory.ptr(), 1, memory.bytes(), stream.handle())?;
    end.record(stream.handle())?;
    untimed.record(stream.handle())?;
    end.synchronize()?;
    untimed.synchronize()?;
    let elapsed = end.elapsed_us(&start)?;
    b.check(elapsed > 0.0, "a fill of 16 MiB takes time");
    b.check(
        elapsed < 1e7,
        "a fill of 16 MiB takes less than ten seconds",
    );
    b.check(start.elapsed_us(&end)? <= 0.0, "time has a direction");
    b.check(
        end.elapsed_us(&end)? == 0.0,
        "no time passes between an event and itself",
    );
    b.refused(
        "time of an untimed event",
        untimed.elapsed_us(&start),
        invalid,
    );

    // Recorded again, it is the later one that counts.
    start.record(stream.handle())?;
    start.synchronize()?;
    b.check(
        end.elapsed_us(&start)? <= 0.0,
        "an event is where it was last recorded",
    );

    let handle = untimed.handle();
    untimed.close()?;
    b.refused(
        "second destroy",
        driver.event_destroy(device, handle),
        invalid,
    );
    b.refused(
        "wait for a destroyed event",
        driver.event_synchronize(device, handle),
        invalid,
    );
    b.refused(
        "destroy of null",
        driver.event_destroy(device, EventHandle(0)),
        invalid,
    );
    end.close()?;
    start.close()?;
    memory.close()?;
    stream.close()
}

fn events_across_streams(b: &mut Bench<'_>) -> Result<()> {
    let (driver, device) = (b.driver, b.device);
    let (first, second) = (Stream::new(driver, device)?, Stream::new(driver, device)?);
    let memory = DeviceMemory::new(driver, device, 16 << 20)?;
    let done = Event::new(driver, device, false)?;
    for value in 1..=4 {
        driver.fill(device, memory.ptr(), value, memory.bytes(), first.handle())?;
        done.record(first.handle())?;
        second.wait_event(&done)?;
        let last = memory.ptr().offset(memory.bytes() - 1);
        driver.copy_on_device(device, memory.ptr(), last, 1, second.handle())?;
        second.synchronize()?;
        b.holds(memory.ptr(), &[value])?;
    }
    done.close()?;
    memory.close()?;
    second.close()?;
    first.close()
}

fn peers(b: &mut Bench<'_>) -> Result<()> {
    let (driver, device) = (b.driver, b.device);
    b.check(
        !driver.can_access_peer(device, device)?,
        "a device is not its own peer",
    );
    let own = driver.enable_peer_access(device, device);
    b.refused("access to itself", own, Status::PEER_ACCESS_UNSUPPORTED);
    let Some(peer) = b.peer()? else { return Ok(()) };
    if !driver.can_access_peer(device, peer)? {
        let enabled = driver.enable_peer_access(device, peer);
        b.refused(
            "access that cannot be",
            enabled,
            Status::PEER_ACCESS_UNSUPPORTED,
        );
        return Ok(());
    }
    driver.enable_peer_access(device, peer)?;
    driver.enable_peer_access(device, peer)?;
    let here = DeviceMemory::new(driver, device, 4096)?;
    let there = DeviceMemory::new(driver, peer, 4096)?;
    driver.copy_to_device(peer, there.ptr(), b"from the peer")?;
    let stream = Stream::new(driver, device)?;
    driver.copy_on_device(device, here.ptr(), there.ptr(), 13, stream.handle())?;
    stream.synchronize()?;
    b.holds(here.ptr(), b"from the peer")?;

    let foreign = Event::new(driver, peer, false)?;
    let recorded = driver.event_record(device, foreign.handle(), stream.handle());
    b.refused(
        "an event of one device on a stream of another",
        recorded,
        Status::INVALID_HANDLE,
    );
    foreign.close()?;
    stream.close()?;
    there.close()?;
    here.close()
}

fn access_of_a_peer(b: &mut Bench<'_>) -> Result<()> {
    let (driver, device) = (b.driver, b.device);
    let Some(peer) = b.peer()? else { return Ok(()) };
    if !driver.can_access_peer(device, peer)? {
        return Ok(());
    }
    // As between ranks: one makes, the other imports, and each maps for itself only.
    let granule = b.granule()?;
    let made = Physical::create(driver, peer, granule, HandleKind::PosixFd, false)?;
    let exported = made.export(HandleKind::PosixFd)?;
    let theirs = Mapping::new(made, 0)?;
    let ours = Mapping::new(Physical::import(driver, device, &exported, granule)?, 0)?;
    driver.copy_to_device(device, ours.ptr(), b"pushed")?;
    let mut out = [0; 6];
    driver.copy_to_host(peer, &mut out, theirs.ptr())?;
    b.check(&out == b"pushed", "what is pushed arrives");
    ours.close()?;
    theirs.close()
}

/// What a case works with, and what it found.
struct Bench<'a> {
    driver: &'a Arc<dyn Driver>,
    device: DeviceOrdinal,
    violations: Vec<String>,
}

impl Bench<'_> {
    fn granule(&self) -> Result<u64> {
        self.driver
            .mem_granularity(self.device, HandleKind::PosixFd, GranularityKind::Minimum)
    }

    /// The next visible device.
    fn peer(&self) -> Result<Option<DeviceOrdinal>> {
        let count = self.driver.device_count()?;
        Ok((count > 1).then(|| DeviceOrdinal((self.device.0 + 1) % count)))
    }

    fn check(&mut self, holds: bool, what: &str) {
        if !holds {
            self.violations.push(format!("not so: {what}"));
        }
    }

    /// Expects a refusal with a status.
    fn refused<T>(&mut self, what: &str, result: Result<T>, status: Status) {
        match result {
            Ok(_) => self
                .violations
                .push(format!("{what}: done, expected {status}")),
            Err(error) if error.status() == Some(status) => {}
            Err(error) => self
                .violations
                .push(format!("{what}: {error}; expected {status}")),
        }
    }

    /// Expects a refusal, whatever the status: drivers differ.
    fn refused_somehow<T>(&mut self, what: &str, result: Result<T>) {
        match result {
            Ok(_) => self
                .violations
                .push(format!("{what}: done, expected a refusal")),
            Err(error) if error.status().is_some() => {}
            Err(error) => self
                .violations
                .push(format!("{what}: {error}; expected a status")),
        }
    }

    /// Expects `bytes` at `ptr`.
    fn holds(&mut self, ptr: DevicePtr, bytes: &[u8]) -> Result<()> {
        let mut out = vec![0; bytes.len()];
        self.driver.copy_to_host(self.device, &mut out, ptr)?;
        self.check(out == bytes, "memory holds what was written");
        Ok(())
    }

    /// Writes `bytes` at `ptr` and expects them there.
    fn round_trip(&mut self, ptr: DevicePtr, bytes: &[u8]) -> Result<()> {
        self.driver.copy_to_device(self.device, ptr, bytes)?;
        self.holds(ptr, bytes)
    }
}

/// A small number as an index.
fn to_usize(small: u64) -> usize {
    usize::try_from(small).unwrap_or(usize::MAX)
}
