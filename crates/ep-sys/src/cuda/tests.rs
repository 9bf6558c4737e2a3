//! The driver against a libcuda that journals its calls.

use std::ffi::OsStr;
use std::fmt::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, Weak};

use tracing::field::{Field, Visit};
use tracing::{Level, Metadata, span};

use super::{CudaDriver, Shared};
use crate::fake::Fake;
use crate::vmm::{DeviceMemory, Event, HostBuffer, IpcMapping, Mapping, Physical, Stream};
use crate::{
    Bytes16, Call, DeviceOrdinal, DevicePtr, Driver, Error, GranularityKind, HandleKind,
    HostMemory, Link, Result, ShareableHandle, Status, StreamHandle,
};

const NO_NVML: &str = "/nonexistent/libnvidia-ml.so.1";
const D0: DeviceOrdinal = DeviceOrdinal(0);
const D1: DeviceOrdinal = DeviceOrdinal(1);
const MIB2: u64 = 2 << 20;

fn load(fake: &Fake) -> Result<Arc<CudaDriver>> {
    CudaDriver::load_from(fake.library(), OsStr::new(NO_NVML))
}

/// A driver whose journal begins after the first use of `device`.
fn ready(fake: &Fake, device: DeviceOrdinal) -> Arc<dyn Driver> {
    let driver = load(fake).unwrap();
    driver.mem_info(device).unwrap();
    fake.journal();
    driver
}

/// The journal without the switching of contexts.
fn calls(fake: &Fake) -> Vec<String> {
    let mut calls = fake.journal();
    calls.retain(|line| !line.contains("cuCtxSetCurrent"));
    calls
}

#[test]
fn a_missing_library_is_an_error() {
    let error = CudaDriver::load_from(OsStr::new("/nonexistent/libcuda.so.1"), OsStr::new(NO_NVML))
        .unwrap_err();
    assert_eq!(error.call(), Call::Load);
    assert!(error.to_string().contains("cannot open libcuda.so.1"));
    assert!(std::error::Error::source(&error).is_some());
}

#[test]
fn a_library_that_is_not_libcuda_is_an_error() {
    let Some(fake) = Fake::libcuda(&["cuInit=absent"]) else {
        return;
    };
    let error = load(&fake).unwrap_err();
    assert!(matches!(
        error,
        Error::MissingSymbol {
            call: Call::Init,
            symbol: "cuInit"
        }
    ));
}

#[test]
fn no_device_is_an_error() {
    let Some(fake) = Fake::libcuda(&["FAIL=\"cuInit\"", "STATUS=100"]) else {
        return;
    };
    let error = load(&fake).unwrap_err();
    assert_eq!(
        (error.call(), error.status()),
        (Call::Init, Some(Status::NO_DEVICE))
    );

    let Some(fake) = Fake::libcuda(&["DEVICES=0"]) else {
        return;
    };
    let error = load(&fake).unwrap_err();
    assert_eq!(
        (error.call(), error.status()),
        (Call::DeviceCount, Some(Status::NO_DEVICE))
    );
}

#[test]
fn a_process_has_one_driver_as_long_as_it_is_held() {
    let Some(fake) = Fake::libcuda(&[]) else {
        return;
    };
    let held = Shared::new(Weak::new());
    let once = || CudaDriver::load_into(&held, || load(&fake)).unwrap();
    let missing = || CudaDriver::load_from(OsStr::new("/nonexistent"), OsStr::new(NO_NVML));
    CudaDriver::load_into(&held, missing).unwrap_err();

    let first = once();
    assert!(Arc::ptr_eq(&first, &once()));
    let event = first.event_create(D0, false).unwrap();
    // Known to every holder.
    once().event_destroy(D0, event).unwrap();
    let inits = |calls: Vec<String>| calls.iter().filter(|line| line.contains("cuInit")).count();
    assert_eq!(inits(fake.journal()), 1);

    drop(first);
    let released = fake.journal();
    assert!(
        released.iter().any(|line| line.contains("CtxRelease")),
        "{released:?}"
    );
    once().device_count().unwrap();
    assert_eq!(inits(fake.journal()), 1);
}

/// The call is not to blame, so what it is for is no hint.
#[test]
fn a_status_that_an_earlier_kernel_left_says_so() {
    let Some(fake) = Fake::libcuda(&["FAIL=\"cuStreamSynchronize\"", "STATUS=719"]) else {
        return;
    };
    let driver = ready(&fake, D0);
    let error = driver.stream_synchronize(D0, StreamHandle(0)).unwrap_err();
    assert!(error.status().unwrap().is_context_lost());
    let error = error.to_string();
    let expected = "returned 719 CUDA_ERROR_LAUNCH_FAILED; an earlier kernel of this process";
    assert!(error.contains(expected), "{error}");

    for status in [214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 721].map(Status) {
        assert!(
            status.is_context_lost() && status.name().is_some(),
            "{status}"
        );
        let advice = status.advice().unwrap();
        assert!(advice.contains("end the process"), "{status}: {advice}");
    }
    for status in [
        Status::INVALID_VALUE,
        Status::OUT_OF_MEMORY,
        Status::TOO_MANY_PEERS,
    ] {
        assert!(!status.is_context_lost(), "{status}");
    }
}

#[test]
fn a_missing_symbol_fails_only_the_call_that_needs_it() {
    let Some(fake) = Fake::libcuda(&["cuMemCreate=absent"]) else {
        return;
    };
    let driver = ready(&fake, D0);
    let error = driver
        .mem_create(D0, MIB2, HandleKind::Fabric, false)
        .unwrap_err();
    assert!(matches!(
        error,
        Error::MissingSymbol {
            call: Call::MemCreate,
            symbol: "cuMemCreate"
        }
    ));
    driver.mem_reserve(D0, MIB2, 0).unwrap();

    // One of several that a call needs.
    let Some(fake) = Fake::libcuda(&["cuDeviceGetUuid_v2=absent"]) else {
        return;
    };
    let error = ready(&fake, D0).device_info(D0).unwrap_err().to_string();
    assert!(error.contains("has no cuDeviceGetUuid_v2"), "{error}");
}

#[test]
fn a_status_without_a_name_is_reported_and_everything_released() {
    let Some(fake) = Fake::libcuda(&["FAIL=\"cuMemMap\"", "STATUS=917", "CURRENT=0xab"]) else {
        return;
    };
    let driver = ready(&fake, D1);
    let physical = Physical::create(&driver, D1, MIB2, HandleKind::PosixFd, false).unwrap();
    let error = Mapping::new(physical, MIB2).unwrap_err();
    assert_eq!(
        (error.call(), error.status()),
        (Call::MemMap, Some(Status(917)))
    );
    assert!(
        error
            .to_string()
            .starts_with("cuMemMap on device 1 returned 917;"),
        "{error}"
    );
    assert_eq!(
        calls(&fake),
        [
            "c0b: cuMemCreate 2097152 type=1 kinds=1 location=1/11 win32=0 gdr=0 flags=0",
            "c0b: cuMemAddressReserve 2097152 align=2097152 hint=0 flags=0",
            "c0b: cuMemMap 7000 2097152 offset=0 handle=11 flags=0",
            "c0b: cuMemAddressFree 7000 2097152",
            "c0b: cuMemRelease 11",
        ]
    );
}

#[test]
fn the_callers_context_is_restored() {
    let Some(fake) = Fake::libcuda(&["FAIL=\"cuMemFree_v2\"", "STATUS=1", "CURRENT=0xab"]) else {
        return;
    };
    let driver = load(&fake).unwrap();
    fake.journal();
    let ptr = driver.mem_alloc(D0, 64).unwrap();
    driver.mem_free(D0, ptr).unwrap_err();
    drop(driver);
    assert_eq!(
        fake.journal(),
        [
            "ab: cuDevicePrimaryCtxRetain 10",
            "ab: cuCtxSetCurrent c0a",
            "c0a: cuStreamCreate flags=1",
            "c0a: cuCtxSetCurrent ab",
            "ab: cuCtxSetCurrent c0a",
            "c0a: cuMemAlloc_v2 64",
            "c0a: cuCtxSetCurrent ab",
            "ab: cuCtxSetCurrent c0a",
            "c0a: cuMemFree_v2 1",
            "c0a: cuCtxSetCurrent ab",
            "ab: cuCtxSetCurrent c0a",
            "c0a: cuStreamDestroy_v2 50",
            "c0a: cuCtxSetCurrent ab",
            "ab: cuDevicePrimaryCtxRelease_v2 10",
        ]
    );
}

#[test]
fn a_context_that_is_current_stays() {
    let Some(fake) = Fake::libcuda(&["CURRENT=0xc0a"]) else {
        return;
    };
    let driver = ready(&fake, D0);
    driver.mem_info(D0).unwrap();
    assert_eq!(fake.journal(), ["c0a: cuMemGetInfo_v2"]);
}

#[test]
fn a_context_that_cannot_be_used_is_released() {
    let Some(fake) = Fake::libcuda(&["FAIL=\"cuStreamCreate\"", "STATUS=2"]) else {
        return;
    };
    let driver = load(&fake).unwrap();
    fake.journal();
    for _ in 0..2 {
        let error = driver.mem_info(D0).unwrap_err();
        assert_eq!(error.call(), Call::ContextRetain);
        assert_eq!(
            calls(&fake),
            [
                "0: cuDevicePrimaryCtxRetain 10",
                "c0a: cuStreamCreate flags=1",
                "0: cuDevicePrimaryCtxRelease_v2 10",
            ]
        );
    }
    drop(driver);
    assert!(fake.journal().is_empty());
}

#[test]
fn one_retain_serves_every_thread() {
    let Some(fake) = Fake::libcuda(&[]) else {
        return;
    };
    let driver = load(&fake).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| driver.mem_info(D1).unwrap());
        }
    });
    let calls = fake.journal();
    let of = |call: &str| calls.iter().filter(|line| line.contains(call)).count();
    assert_eq!(
        (of("cuDevicePrimaryCtxRetain"), of("cuMemGetInfo_v2")),
        (1, 8)
    );
}

#[test]
fn an_ordinal_out_of_range_is_refused_before_the_driver_is_asked() {
    let Some(fake) = Fake::libcuda(&[]) else {
        return;
    };
    let driver = ready(&fake, D0);
    let absent = DeviceOrdinal(2);
    let errors = [
        (Call::MemAlloc, driver.mem_alloc(absent, 64).unwrap_err()),
        (Call::DeviceInfo, driver.device_info(absent).unwrap_err()),
        (Call::FabricInfo, driver.fabric_info(absent).unwrap_err()),
        (Call::PeerLinks, driver.peer_links(absent, &[]).unwrap_err()),
        (
            Call::CanAccessPeer,
            driver.can_access_peer(D0, absent).unwrap_err(),
        ),
        (
            Call::EnablePeerAccess,
            driver.enable_peer_access(D0, absent).unwrap_err(),
        ),
    ];
    for (call, error) in errors {
        assert!(
            matches!(error, Error::Refused { call: c, device, status: Status::INVALID_DEVICE }
                if c == call && device == absent),
            "{error}"
        );
    }
    assert!(fake.journal().is_empty());
}

#[test]
fn device_info_needs_no_context() {
    // 128 is the fabric attribute: drivers before CUDA 12.3 do not know it.
    let Some(fake) = Fake::libcuda(&["UNKNOWN_ATTRIBUTE=128"]) else {
        return;
    };
    let driver = load(&fake).unwrap();
    fake.journal();
    assert_eq!(driver.device_count().unwrap(), 2);
    let info = driver.device_info(D1).unwrap();
    assert_eq!(info.uuid, Bytes16(std::array::from_fn(|i| 0xf0 + i as u8)));
    assert_eq!(
        (info.name.as_str(), info.pci_bus_id.as_str()),
        ("Fake 11", "0000:11:00.0")
    );
    assert_eq!(info.total_bytes, 141 << 30);
    // The fake answers an attribute with its number.
    assert_eq!(
        (info.compute_capability, info.multiprocessors),
        ((75, 76), 16)
    );
    assert!(info.vmm_attribute && info.posix_fd_attribute && info.gdr_vmm_attribute);
    assert!(!info.fabric_attribute);
    let granularity = driver
        .mem_granularity(D1, HandleKind::Fabric, GranularityKind::Minimum)
        .unwrap();
    assert_eq!(granularity, MIB2);
    assert!(driver.can_access_peer(D0, D1).unwrap());
    let journal = fake.journal();
    assert!(
        journal.iter().all(|line| !line.contains("Ctx")),
        "{journal:?}"
    );
    let last_two = &journal[journal.len() - 2..];
    assert_eq!(
        last_two,
        [
            "0: cuMemGetAllocationGranularity kinds=8 device=11 option=0",
            "0: cuDeviceCanAccessPeer 10 11",
        ]
    );
}

#[test]
fn a_mapping_is_made_for_its_device_and_undone_in_reverse() {
    let Some(fake) = Fake::libcuda(&[]) else {
        return;
    };
    let driver = ready(&fake, D0);
    let physical = Physical::create(&driver, D0, MIB2, HandleKind::Fabric, true).unwrap();
    let exported = physical.export(HandleKind::Fabric).unwrap();
    assert!(matches!(exported, ShareableHandle::Fabric(bytes) if bytes == [0xfa; 64]));
    let imported = Physical::import(&driver, D1, &exported, MIB2).unwrap();
    let mapping = Mapping::new(imported, 0).unwrap();
    assert_eq!((mapping.ptr(), mapping.bytes()), (DevicePtr(0x7000), MIB2));
    mapping.close().unwrap();
    physical.close().unwrap();
    let mut calls = calls(&fake);
    calls.retain(|line| !line.contains("PrimaryCtx") && !line.contains("cuStream"));
    assert_eq!(
        calls,
        [
            "c0a: cuMemCreate 2097152 type=1 kinds=8 location=1/10 win32=0 gdr=1 flags=0",
            "c0a: cuMemExportToShareableHandle 11 kind=8 flags=0",
            "c0b: cuMemImportFromShareableHandle kind=8 fa",
            "c0b: cuMemAddressReserve 2097152 align=0 hint=0 flags=0",
            "c0b: cuMemMap 7000 2097152 offset=0 handle=12 flags=0",
            "c0b: cuMemSetAccess 7000 2097152 location=1/11 flags=3 count=1",
            "c0b: cuMemUnmap 7000 2097152",
            "c0b: cuMemAddressFree 7000 2097152",
            "c0b: cuMemRelease 12",
            "c0a: cuMemRelease 11",
        ]
    );
}

#[test]
fn a_refused_release_is_reported_and_the_rest_released() {
    let Some(fake) = Fake::libcuda(&["FAIL=\"cuMemUnmap\"", "STATUS=1"]) else {
        return;
    };
    let driver = ready(&fake, D0);
    let physical = Physical::create(&driver, D0, MIB2, HandleKind::PosixFd, false).unwrap();
    let mapping = Mapping::new(physical, 0).unwrap();
    fake.journal();
    assert_eq!(mapping.close().unwrap_err().call(), Call::MemUnmap);
    assert_eq!(
        calls(&fake),
        [
            "c0a: cuMemUnmap 7000 2097152",
            "c0a: cuMemAddressFree 7000 2097152",
            "c0a: cuMemRelease 11",
        ]
    );
}

/// Any two of the three releases: the first returns a status, the second is missing.
#[test]
fn of_two_refused_releases_one_is_reported_and_one_logged() {
    let releases = [
        ("cuMemUnmap", Call::MemUnmap),
        ("cuMemAddressFree", Call::MemAddressFree),
        ("cuMemRelease", Call::MemRelease),
    ];
    for (first, second) in [(0, 1), (0, 2), (1, 2)] {
        let ((first, call), (second, _)) = (releases[first], releases[second]);
        let defines = [
            &format!("FAIL=\"{first}\""),
            "STATUS=1",
            &format!("{second}=absent"),
        ];
        let Some(fake) = Fake::libcuda(&defines) else {
            return;
        };
        let driver = ready(&fake, D0);
        let mapping = || {
            let physical = Physical::create(&driver, D0, MIB2, HandleKind::PosixFd, false);
            let mapping = Mapping::new(physical.unwrap(), 0).unwrap();
            fake.journal();
            mapping
        };
        // The others are asked of the driver, in order.
        let asked = || {
            let mut calls = releases.map(|(name, _)| name).to_vec();
            calls.retain(|name| *name != second);
            let made = calls.len();
            let journal = self::calls(&fake);
            assert_eq!(journal.len(), made, "{journal:?}");
            for (line, name) in journal.iter().zip(calls) {
                assert!(line.contains(name), "{journal:?}");
            }
        };

        let kept = mapping();
        let (closed, log) = logged(|| kept.close());
        asked();
        assert_eq!(closed.unwrap_err().call(), call);
        assert_eq!(log.len(), 1, "{log:?}");
        assert!(log[0].contains(second), "{log:?}");

        // Nobody is there to take an error.
        let dropped = mapping();
        let ((), log) = logged(|| drop(dropped));
        asked();
        assert_eq!(log.len(), 2, "{log:?}");
        assert!(log[0].contains(first), "{log:?}");
        assert!(log[1].contains(second), "{log:?}");
    }
}

#[test]
fn a_descriptor_is_owned_and_travels_as_a_value() {
    let Some(fake) = Fake::libcuda(&[]) else {
        return;
    };
    let driver = ready(&fake, D0);
    let physical = Physical::create(&driver, D0, MIB2, HandleKind::PosixFd, false).unwrap();
    let exported = physical.export(HandleKind::PosixFd).unwrap();
    let ShareableHandle::PosixFd(fd) = &exported else {
        panic!("{exported:?}")
    };
    let open = format!("/proc/self/fd/{}", fd.as_raw_fd());
    assert_eq!(
        std::fs::read_link(open).unwrap().to_str(),
        Some("/dev/null")
    );
    let import = format!(
        "c0a: cuMemImportFromShareableHandle kind=1 {:x}",
        fd.as_raw_fd()
    );
    fake.journal();
    Physical::import(&driver, D0, &exported, MIB2).unwrap();
    assert!(fake.journal().contains(&import));
}

#[test]
fn an_export_without_a_descriptor_is_an_error() {
    let Some(fake) = Fake::libcuda(&["FD=-1"]) else {
        return;
    };
    let driver = ready(&fake, D0);
    let physical = Physical::create(&driver, D0, MIB2, HandleKind::PosixFd, false).unwrap();
    let error = physical.export(HandleKind::PosixFd).unwrap_err();
    assert!(matches!(
        error,
        Error::Os {
            call: Call::MemExport,
            ..
        }
    ));
}

#[test]
fn enabling_peer_access_twice_is_no_error() {
    let Some(fake) = Fake::libcuda(&["FAIL=\"cuCtxEnablePeerAccess\"", "STATUS=704"]) else {
        return;
    };
    let driver = load(&fake).unwrap();
    driver.enable_peer_access(D0, D1).unwrap();
    assert_eq!(
        calls(&fake).last().unwrap(),
        "c0a: cuCtxEnablePeerAccess c0b 0"
    );
}

#[test]
fn plain_memory_is_allocated_opened_and_freed() {
    let Some(fake) = Fake::libcuda(&[]) else {
        return;
    };
    let driver = ready(&fake, D0);
    let memory = DeviceMemory::new(&driver, D0, 64).unwrap();
    let handle = memory.ipc_handle().unwrap();
    assert_eq!(handle, [0xab; 64]);
    let opened = IpcMapping::open(&driver, D0, &handle).unwrap();
    assert_eq!(opened.ptr(), DevicePtr(0x9000));
    fake.journal();
    drop(opened);
    drop(memory);
    assert_eq!(driver.mem_info(D0).unwrap(), (3, 5));
    driver
        .fill(D0, DevicePtr(0x70), 7, 9, StreamHandle(0x51))
        .unwrap();
    driver
        .copy_on_device(D0, DevicePtr(0x70), DevicePtr(0x90), 9, StreamHandle(0))
        .unwrap();
    assert_eq!(
        calls(&fake),
        [
            "c0a: cuIpcCloseMemHandle 9000",
            "c0a: cuMemFree_v2 1",
            "c0a: cuMemGetInfo_v2",
            "c0a: cuMemsetD8Async 70 7 9 stream=51",
            "c0a: cuMemcpyDtoDAsync_v2 70 90 9 stream=0",
        ]
    );
}

#[test]
fn copies_have_arrived_on_a_stream_of_their_own() {
    let Some(fake) = Fake::libcuda(&[]) else {
        return;
    };
    let driver = ready(&fake, D0);
    let memory = DeviceMemory::new(&driver, D0, 64).unwrap();
    fake.journal();
    driver.copy_to_device(D0, memory.ptr(), b"bytes").unwrap();
    let mut back = [0; 5];
    driver.copy_to_host(D0, &mut back, memory.ptr()).unwrap();
    assert_eq!(&back, b"bytes");
    assert_eq!(
        calls(&fake),
        [
            "c0a: cuMemcpyHtoDAsync_v2 5 stream=50",
            "c0a: cuStreamSynchronize 50",
            "c0a: cuMemcpyDtoHAsync_v2 5 stream=50",
            "c0a: cuStreamSynchronize 50",
        ]
    );
}

#[test]
fn a_copy_is_named_even_if_it_was_the_wait_that_failed() {
    let Some(fake) = Fake::libcuda(&["FAIL=\"cuStreamSynchronize\"", "STATUS=700"]) else {
        return;
    };
    let driver = ready(&fake, D0);
    let memory = DeviceMemory::new(&driver, D0, 64).unwrap();
    let error = driver
        .copy_to_device(D0, memory.ptr(), b"bytes")
        .unwrap_err();
    assert_eq!(
        (error.call(), error.status()),
        (Call::CopyToDevice, Some(Status::ILLEGAL_ADDRESS))
    );
}

#[test]
fn host_memory_is_zeroed_and_read_only_while_it_lives() {
    let Some(fake) = Fake::libcuda(&[]) else {
        return;
    };
    let driver = ready(&fake, D0);
    let buffer = HostBuffer::new(&driver, D0, 20).unwrap();
    let memory = buffer.memory();
    assert_eq!(buffer.load(0).unwrap(), 0);
    assert_eq!(buffer.load(8).unwrap(), 0);
    let refused = |memory: HostMemory, offset: u64| {
        let error = driver.host_load(memory, offset).unwrap_err();
        assert_eq!(
            (error.call(), error.status()),
            (Call::HostLoad, Some(Status::INVALID_VALUE))
        );
    };
    refused(memory, 4); // unaligned
    refused(memory, 16); // half outside
    refused(memory, u64::MAX - 7);
    refused(
        HostMemory {
            bytes: 64,
            ..memory
        },
        24,
    ); // larger than it is
    refused(
        HostMemory {
            host: memory.host + 8,
            ..memory
        },
        0,
    ); // not an allocation
    buffer.close().unwrap();
    refused(memory, 0);
    let error = driver.host_free(D0, memory).unwrap_err();
    assert_eq!(
        (error.call(), error.status()),
        (Call::HostFree, Some(Status::INVALID_VALUE))
    );
    assert_eq!(
        calls(&fake),
        [
            "c0a: cuMemHostAlloc 20 flags=3",
            "c0a: cuMemHostGetDevicePointer_v2 flags=0",
            "c0a: cuMemFreeHost",
        ]
    );
}

#[test]
fn host_memory_that_the_device_cannot_map_is_freed() {
    let Some(fake) = Fake::libcuda(&["FAIL=\"cuMemHostGetDevicePointer_v2\"", "STATUS=1"]) else {
        return;
    };
    let driver = ready(&fake, D0);
    assert_eq!(
        driver.host_alloc(D0, 8).unwrap_err().call(),
        Call::HostAlloc
    );
    assert_eq!(calls(&fake).last().unwrap(), "c0a: cuMemFreeHost");
}

#[test]
fn streams_and_events() {
    let Some(fake) = Fake::libcuda(&[]) else {
        return;
    };
    let driver = ready(&fake, D0);
    let stream = Stream::new(&driver, D0).unwrap();
    let start = Event::new(&driver, D0, true).unwrap();
    let end = Event::new(&driver, D0, true).unwrap();
    start.record(stream.handle()).unwrap();
    stream.wait_event(&start).unwrap();
    stream.synchronize().unwrap();
    end.synchronize().unwrap();
    assert_eq!(end.elapsed_us(&start).unwrap(), 1500.0);
    Event::new(&driver, D0, false).unwrap().close().unwrap();
    drop((start, end));
    stream.close().unwrap();
    assert_eq!(
        calls(&fake),
        [
            "c0a: cuStreamCreate flags=1",
            "c0a: cuEventCreate flags=0",
            "c0a: cuEventCreate flags=0",
            "c0a: cuEventRecord e0 51",
            "c0a: cuStreamWaitEvent 51 e0 0",
            "c0a: cuStreamSynchronize 51",
            "c0a: cuEventSynchronize e1",
            "c0a: cuEventElapsedTime e0 e1",
            "c0a: cuEventCreate flags=2",
            "c0a: cuEventDestroy_v2 e2",
            "c0a: cuEventDestroy_v2 e0",
            "c0a: cuEventDestroy_v2 e1",
            "c0a: cuStreamDestroy_v2 51",
        ]
    );
}

#[test]
fn nvml_finds_the_gpu_by_its_pci_address() {
    let (Some(cuda), Some(nvml)) = (Fake::libcuda(&[]), Fake::libnvml(&[])) else {
        return;
    };
    let driver = CudaDriver::load_from(cuda.library(), nvml.library()).unwrap();
    assert!(nvml.journal().is_empty());
    let by_address = String::from("1: nvmlDeviceGetHandleByPciBusId_v2 0000:11:00.0");
    driver.fabric_info(D1).unwrap();
    assert!(nvml.journal().contains(&by_address));
    assert_eq!(
        driver.peer_links(D1, &[Bytes16::ZERO]).unwrap(),
        [Link::Nvlink]
    );
    assert!(nvml.journal().contains(&by_address));
}

#[test]
fn without_nvml_the_fabric_is_not_known() {
    let Some(fake) = Fake::libcuda(&[]) else {
        return;
    };
    let driver = load(&fake).unwrap();
    for _ in 0..2 {
        let error = driver.fabric_info(D0).unwrap_err().to_string();
        assert!(error.contains("cannot open libnvidia-ml.so.1"), "{error}");
    }
}

#[test]
fn what_is_not_live_is_refused_before_libcuda_follows_it() {
    let Some(fake) = Fake::libcuda(&[]) else {
        return;
    };
    let driver = ready(&fake, D0);
    let refused = |result: Result<()>, call: Call, status: Status| {
        let error = result.unwrap_err();
        assert_eq!((error.call(), error.status()), (call, Some(status)));
    };

    let physical = driver
        .mem_create(D0, MIB2, HandleKind::Fabric, false)
        .unwrap();
    let exported = driver.mem_export(D0, physical, HandleKind::Fabric).unwrap();
    let imported = driver.mem_import(D0, &exported).unwrap();
    let again = driver.mem_import(D0, &exported).unwrap();
    assert_eq!(imported, again, "the fake gives one handle to both");
    driver.mem_release(D0, imported).unwrap();
    driver.mem_release(D0, again).unwrap();
    driver.mem_release(D0, physical).unwrap();
    let stream = driver.stream_create(D0).unwrap();
    driver.stream_destroy(D0, stream).unwrap();
    let event = driver.event_create(D0, true).unwrap();
    driver.event_destroy(D0, event).unwrap();
    fake.journal();

    let (value, handle) = (Status::INVALID_VALUE, Status::INVALID_HANDLE);
    refused(driver.mem_release(D0, imported), Call::MemRelease, value);
    refused(driver.mem_release(D0, physical), Call::MemRelease, value);
    refused(
        driver.mem_map(D0, DevicePtr(0x7000), MIB2, physical),
        Call::MemMap,
        value,
    );
    let export = driver.mem_export(D0, physical, HandleKind::PosixFd);
    refused(export.map(drop), Call::MemExport, value);
    refused(
        driver.stream_destroy(D0, stream),
        Call::StreamDestroy,
        handle,
    );
    refused(
        driver.stream_destroy(D0, StreamHandle(0)),
        Call::StreamDestroy,
        handle,
    );
    refused(driver.event_destroy(D0, event), Call::EventDestroy, handle);
    refused(
        driver.event_record(D0, event, StreamHandle(0)),
        Call::EventRecord,
        handle,
    );
    refused(
        driver.event_synchronize(D0, event),
        Call::EventSynchronize,
        handle,
    );
    refused(
        driver.event_elapsed_us(D0, event, event).map(drop),
        Call::EventElapsed,
        handle,
    );
    refused(
        driver.stream_wait_event(D0, StreamHandle(0), event),
        Call::StreamWaitEvent,
        handle,
    );
    assert!(calls(&fake).is_empty());
}

/// The errors that are logged meanwhile.
fn logged<T>(part: impl FnOnce() -> T) -> (T, Vec<String>) {
    let log = Log::default();
    let done = tracing::subscriber::with_default(log.clone(), part);
    let lines = std::mem::take(&mut *log.0.lock().unwrap());
    (done, lines)
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        self.0.lock().unwrap().push(line.0);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        write!(self.0, " {field}={value:?}").unwrap();
    }
}
