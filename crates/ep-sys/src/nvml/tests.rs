//! Fabric information from libraries of every age.

use super::Nvml;
use crate::cuda::load::Site;
use crate::fake::Fake;
use crate::{Bytes16, Call, DeviceOrdinal, Error, FabricInfo, FabricState, Result};

/// What a library built so answers, and the calls that it took.
fn ask(defines: &[&str]) -> Option<(Result<FabricInfo>, Vec<String>)> {
    let fake = Fake::libnvml(defines)?;
    let nvml = Nvml::open(fake.library()).unwrap();
    let site = Site {
        call: Call::FabricInfo,
        device: DeviceOrdinal(1),
    };
    let answer = nvml.fabric_info(site, "0000:1B:00.0");
    Some((answer, fake.journal()))
}

/// What the fake answers in a structure of this version.
fn answered(version: u32) -> FabricInfo {
    FabricInfo {
        state: FabricState::Completed,
        status: 15,
        cluster_uuid: Bytes16([0x6b; 16]),
        clique_id: version,
    }
}

#[test]
fn the_newest_structure_that_the_library_knows_is_used() {
    let Some((answer, calls)) = ask(&["KNOWS=3"]) else {
        return;
    };
    assert_eq!(answer.unwrap(), answered(3));
    assert_eq!(
        calls,
        [
            "0: nvmlInit_v2",
            "1: nvmlDeviceGetHandleByPciBusId_v2 0000:1B:00.0",
            "1: nvmlDeviceGetGpuFabricInfoV 0xd 3000028",
            "1: nvmlShutdown",
        ]
    );

    let Some((answer, calls)) = ask(&["KNOWS=2"]) else {
        return;
    };
    assert_eq!(answer.unwrap(), answered(2));
    assert_eq!(
        calls[2..4],
        [
            "1: nvmlDeviceGetGpuFabricInfoV 0xd 3000028",
            "1: nvmlDeviceGetGpuFabricInfoV 0xd 2000024",
        ]
    );

    for older in ["KNOWS=1", "nvmlDeviceGetGpuFabricInfoV=absent"] {
        let Some((answer, calls)) = ask(&[older]) else {
            return;
        };
        assert_eq!(answer.unwrap(), answered(1), "{older}");
        assert_eq!(calls.last().unwrap(), "1: nvmlShutdown");
    }
}

#[test]
fn a_gpu_without_a_fabric_has_none() {
    let Some((answer, _)) = ask(&["FAIL=\"nvmlDeviceGetGpuFabricInfoV\"", "STATUS=3"]) else {
        return;
    };
    assert_eq!(answer.unwrap(), FabricInfo::NONE);
}

#[test]
fn a_library_without_the_call_does_not_know() {
    let lacking: [&[&str]; 3] = [
        &["nvmlInit_v2=absent"],
        &["KNOWS=1", "nvmlDeviceGetGpuFabricInfo=absent"],
        &[
            "KNOWS=1",
            "FAIL=\"nvmlDeviceGetGpuFabricInfo\"",
            "STATUS=13",
        ],
    ];
    for defines in lacking {
        let Some((answer, _)) = ask(defines) else {
            return;
        };
        let error = answer.unwrap_err();
        assert_eq!(error.call(), Call::FabricInfo, "{defines:?}");
    }
}

#[test]
fn a_refusal_is_an_error_and_the_session_ends() {
    let failing = [
        ("FAIL=\"nvmlInit_v2\"", false),
        ("FAIL=\"nvmlDeviceGetHandleByPciBusId_v2\"", true),
        ("FAIL=\"nvmlDeviceGetGpuFabricInfoV\"", true),
    ];
    for (fail, began) in failing {
        let Some((answer, calls)) = ask(&[fail, "STATUS=999"]) else {
            return;
        };
        let error = answer.unwrap_err();
        assert!(
            matches!(
                error,
                Error::Nvml {
                    call: Call::FabricInfo,
                    device: DeviceOrdinal(1),
                    status: 999
                }
            ),
            "{error}"
        );
        assert_eq!(calls.last().unwrap() == "1: nvmlShutdown", began, "{fail}");
    }
}
