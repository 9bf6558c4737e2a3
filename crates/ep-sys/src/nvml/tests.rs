//! Fabric information from libraries of every age, and links.

use super::Nvml;
use crate::cuda::load::Site;
use crate::fake::Fake;
use crate::{Bytes16, Call, DeviceOrdinal, Error, FabricInfo, FabricState, Link, Result};

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

/// What a library built so answers of links to two GPUs, and the calls that it took.
fn ask_links(defines: &[&str]) -> Option<(Result<Vec<Link>>, Vec<String>)> {
    let fake = Fake::libnvml(defines)?;
    let nvml = Nvml::open(fake.library()).unwrap();
    let site = Site {
        call: Call::PeerLinks,
        device: DeviceOrdinal(1),
    };
    let peers = [0x10, 0xa0].map(|first| Bytes16(std::array::from_fn(|i| first + i as u8)));
    let answer = nvml.peer_links(site, "0000:1B:00.0", &peers);
    Some((answer, fake.journal()))
}

#[test]
fn links_are_asked_for_by_uuid_in_one_session() {
    let Some((answer, calls)) = ask_links(&[]) else {
        return;
    };
    assert_eq!(answer.unwrap(), [Link::Nvlink; 2]);
    assert_eq!(
        calls,
        [
            "0: nvmlInit_v2",
            "1: nvmlDeviceGetHandleByPciBusId_v2 0000:1B:00.0",
            "1: nvmlDeviceGetHandleByUUID GPU-10111213-1415-1617-1819-1a1b1c1d1e1f",
            "1: nvmlDeviceGetP2PStatus 0xd 0xe 2",
            "1: nvmlDeviceGetHandleByUUID GPU-a0a1a2a3-a4a5-a6a7-a8a9-aaabacadaeaf",
            "1: nvmlDeviceGetP2PStatus 0xd 0xe 2",
            "1: nvmlShutdown",
        ]
    );
}

#[test]
fn only_a_plain_answer_says_that_there_is_no_nvlink() {
    for (nvlink, p2p, link) in [
        (1, 0, Link::Pcie),
        (5, 0, Link::Pcie),
        (6, 0, Link::Unknown),
        (7, 0, Link::Unknown),
        // They were seen to address each other, or nobody would ask.
        (5, 5, Link::Unknown),
        (5, 6, Link::Unknown),
    ] {
        let defines = [format!("NVLINK={nvlink}"), format!("P2P={p2p}")];
        let Some((answer, _)) = ask_links(&defines.each_ref().map(String::as_str)) else {
            return;
        };
        assert_eq!(answer.unwrap(), [link; 2], "{defines:?}");
    }
    for call in ["nvmlDeviceGetHandleByUUID", "nvmlDeviceGetP2PStatus"] {
        let fail = format!("FAIL=\"{call}\"");
        for status in ["STATUS=3", "STATUS=4", "STATUS=6"] {
            let Some((answer, _)) = ask_links(&[&fail, status]) else {
                return;
            };
            assert_eq!(answer.unwrap(), [Link::Unknown; 2], "{call} {status}");
        }
        let Some((answer, calls)) = ask_links(&[&fail, "STATUS=999"]) else {
            return;
        };
        let error = answer.unwrap_err();
        assert!(
            matches!(
                error,
                Error::Nvml {
                    call: Call::PeerLinks,
                    status: 999,
                    ..
                }
            ),
            "{error}"
        );
        assert_eq!(calls.last().unwrap(), "1: nvmlShutdown");

        let absent = format!("{call}=absent");
        let Some((answer, _)) = ask_links(&[&absent]) else {
            return;
        };
        assert!(
            matches!(
                answer,
                Err(Error::MissingSymbol {
                    call: Call::PeerLinks,
                    ..
                })
            ),
            "{answer:?}"
        );
    }
}
