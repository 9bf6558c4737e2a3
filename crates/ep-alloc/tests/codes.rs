//! What travels between ranks as small integers, and what an operator writes.

use ep_alloc::{
    BackendKind, Cause, Choice, Failure, Trial, Untried, call_from_code, call_to_code,
    fabric_state_from_code, fabric_state_to_code,
};
use ep_sys::{Call, FabricState, Status};

/// A code that changes its meaning needs a new version of the record that carries it.
#[test]
fn codes_are_pinned() {
    let kinds = BackendKind::ALL.map(|kind| (kind.name(), kind.to_code()));
    assert_eq!(kinds, [("fabric", 1), ("posix_fd", 2), ("malloc", 3)]);
    assert_eq!(Choice::Auto.to_code(), 0);
    assert_eq!(Choice::Force(BackendKind::PosixFd).to_code(), 2);

    let calls = [
        (Call::Load, 0),
        (Call::Init, 1),
        (Call::DeviceCount, 2),
        (Call::DeviceInfo, 3),
        (Call::ContextRetain, 4),
        (Call::ContextSet, 5),
        (Call::FabricInfo, 6),
        (Call::CanAccessPeer, 7),
        (Call::EnablePeerAccess, 8),
        (Call::MemGranularity, 9),
        (Call::MemCreate, 10),
        (Call::MemRelease, 11),
        (Call::MemReserve, 12),
        (Call::MemAddressFree, 13),
        (Call::MemMap, 14),
        (Call::MemUnmap, 15),
        (Call::MemSetAccess, 16),
        (Call::MemExport, 17),
        (Call::MemImport, 18),
        (Call::MemAlloc, 19),
        (Call::MemFree, 20),
        (Call::MemInfo, 21),
        (Call::IpcGetHandle, 22),
        (Call::IpcOpen, 23),
        (Call::IpcClose, 24),
        (Call::HostAlloc, 25),
        (Call::HostFree, 26),
        (Call::HostLoad, 27),
        (Call::Fill, 28),
        (Call::CopyToDevice, 29),
        (Call::CopyToHost, 30),
        (Call::CopyOnDevice, 31),
        (Call::StreamCreate, 32),
        (Call::StreamDestroy, 33),
        (Call::StreamSynchronize, 34),
        (Call::StreamWaitEvent, 35),
        (Call::EventCreate, 36),
        (Call::EventDestroy, 37),
        (Call::EventRecord, 38),
        (Call::EventSynchronize, 39),
        (Call::EventElapsed, 40),
        (Call::PeerLinks, 41),
    ];
    assert_eq!(calls.map(|(call, _)| call), Call::ALL);
    for (call, code) in calls {
        assert_eq!(call_to_code(call), code, "{call}");
    }

    for (cause, code) in [
        (Cause::Status(Status(7)), 0x1000_0000_0007),
        (Cause::Nvml(7), 0x2000_0000_0007),
        (Cause::Os(7), 0x3000_0000_0007),
        (Cause::NoSymbol, 0x4000_0000_0000),
        (Cause::NoLibrary, 0x5000_0000_0000),
        (Cause::WrongBytes, 0x6000_0000_0000),
        (Cause::Other, 0x7000_0000_0000),
        (Cause::No, 0x8000_0000_0000),
    ] {
        let call = Call::Load;
        assert_eq!(Failure { call, cause }.to_code(), code, "{cause:?}");
    }

    let not_permitted = Failure {
        call: Call::MemCreate,
        cause: Cause::Status(Status::NOT_PERMITTED),
    };
    assert_eq!(not_permitted.to_code(), 0x100a_0000_0320);
    assert_eq!(
        Trial::Refused(not_permitted).to_code(),
        0x0002_100a_0000_0320
    );
    assert_eq!(Trial::Ok { gdr: true }.to_code(), 0x0001_0000_0000_0001);
    assert_eq!(Trial::default().to_code(), 0);
    assert_eq!(Trial::NotTried(Untried::NotProbed).to_code(), 0);
    assert_eq!(Trial::NotTried(Untried::VmmAttribute).to_code(), 1);
    assert_eq!(Trial::NotTried(Untried::FabricAttribute).to_code(), 2);
    assert_eq!(Trial::NotTried(Untried::PosixFdAttribute).to_code(), 3);
}

#[test]
fn codes_come_back() {
    for kind in BackendKind::ALL {
        assert_eq!(BackendKind::from_code(kind.to_code()), Some(kind));
        let choice = Choice::Force(kind);
        assert_eq!(Choice::from_code(choice.to_code()), Some(choice));
    }
    assert_eq!(Choice::from_code(0), Some(Choice::Auto));

    let mut seen = std::collections::BTreeSet::new();
    let mut trials = vec![Trial::Ok { gdr: false }, Trial::Ok { gdr: true }];
    trials.extend(
        [
            Untried::NotProbed,
            Untried::VmmAttribute,
            Untried::FabricAttribute,
            Untried::PosixFdAttribute,
        ]
        .map(Trial::NotTried),
    );
    for &call in Call::ALL {
        assert_eq!(call_from_code(call_to_code(call)), Some(call));
        for cause in [
            Cause::Status(Status::SUCCESS),
            Cause::Status(Status(917)),
            Cause::Status(Status(u32::MAX)),
            Cause::Nvml(999),
            Cause::Os(24),
            Cause::NoSymbol,
            Cause::NoLibrary,
            Cause::WrongBytes,
            Cause::Other,
        ] {
            let failure = Failure { call, cause };
            assert_eq!(Failure::from_code(failure.to_code()), Some(failure));
            trials.push(Trial::Refused(failure));
        }
    }
    for trial in trials {
        assert_eq!(Trial::from_code(trial.to_code()), Some(trial));
        assert!(seen.insert(trial.to_code()), "{trial:?}");
    }

    for state in [
        FabricState::NotSupported,
        FabricState::NotStarted,
        FabricState::InProgress,
        FabricState::Completed,
        FabricState::Other(4),
    ] {
        let code = fabric_state_to_code(state);
        assert_eq!(fabric_state_from_code(code), state);
    }
}

/// Codes arrive from other processes: anything may come.
#[test]
fn foreign_codes_are_refused() {
    for code in [0, 4, 255] {
        assert_eq!(BackendKind::from_code(code), None);
    }
    assert_eq!(Choice::from_code(4), None);
    let calls = u16::try_from(Call::ALL.len()).unwrap();
    for code in [calls, 0xfff, 0x1000, u16::MAX] {
        assert_eq!(call_from_code(code), None);
    }
    let beyond = u64::from(calls) << 32;
    for code in [
        0,                   // no cause
        9 << 44,             // no such cause
        (4 << 44) | 1,       // a value where none belongs
        (1 << 44) | beyond,  // no such call
        (1 << 48) | 1 << 44, // bits above a failure
        u64::MAX,
    ] {
        assert_eq!(Failure::from_code(code), None, "{code:#x}");
    }
    for code in [4, 2 << 48, (1 << 48) | 2, 3 << 48, u64::MAX] {
        assert_eq!(Trial::from_code(code), None, "{code:#x}");
    }
}

#[test]
fn choice_of_the_environment() {
    use BackendKind::{Fabric, Malloc, PosixFd};
    let auto = Ok(Choice::Auto);
    let force = |kind| Ok(Choice::Force(kind));
    let rows: [(_, _, Result<_, &str>); 19] = [
        (None, None, auto),
        (Some(""), None, auto),
        (Some("auto"), None, auto),
        (Some("fabric"), None, force(Fabric)),
        (Some("posix-fd"), None, force(PosixFd)),
        (Some("posix_fd"), None, force(PosixFd)),
        (Some("malloc"), None, force(Malloc)),
        // Mooncake's variable.
        (None, Some("0"), auto),
        (None, Some("1"), force(Malloc)),
        (None, Some("true"), force(Malloc)),
        (None, Some("00"), force(Malloc)),
        (None, Some(""), force(Malloc)),
        (Some(""), Some("1"), force(Malloc)),
        // EP_ALLOC wins.
        (Some("auto"), Some("1"), auto),
        (Some("fabric"), Some("1"), force(Fabric)),
        (Some("malloc"), Some("0"), force(Malloc)),
        // Not a choice.
        (Some("Fabric"), None, Err("Fabric")),
        (Some(" malloc"), None, Err(" malloc")),
        (Some("ipc"), Some("1"), Err("ipc")),
    ];
    for (ep_alloc, mc_use_nvlink_ipc, want) in rows {
        let got = Choice::from_values(ep_alloc, mc_use_nvlink_ipc);
        let row = (ep_alloc, mc_use_nvlink_ipc);
        assert_eq!(
            got.as_ref().copied().map_err(|e| &*e.value),
            want,
            "{row:?}"
        );
    }
    assert_eq!(
        Choice::parse("ipc").unwrap_err().to_string(),
        r#"EP_ALLOC is "ipc"; set it to auto, fabric, posix-fd or malloc"#
    );
    for choice in [Choice::Auto, Choice::Force(PosixFd)] {
        assert_eq!(Choice::parse(&choice.to_string()), Ok(choice));
    }
}
