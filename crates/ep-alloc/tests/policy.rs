//! The policy as a table: what a group looks like, what it decides, and in which words.

use ep_alloc::{
    BackendKind::{self, Fabric, Malloc, PosixFd},
    Cause, Choice, Failure, ImportRefusal, RankFacts, Reason, Refusal, Route, Trial, Untried,
    decide, route,
};
use ep_sys::{Bytes16, Call, FabricInfo, FabricState, Status};

const U1: Bytes16 = uuid(1);
const U2: Bytes16 = uuid(2);
const OK: Trial = Trial::Ok { gdr: false };

const NOT_PERMITTED: Trial = refused(Call::MemCreate, 800);
const NO_FABRIC_ATTRIBUTE: Trial = Trial::NotTried(Untried::FabricAttribute);
const NO_POSIX_ATTRIBUTE: Trial = Trial::NotTried(Untried::PosixFdAttribute);
const NO_VMM: Trial = Trial::NotTried(Untried::VmmAttribute);

/// CUDA IPC between processes that do not share a namespace.
const IPC: Failure = status(Call::IpcOpen, 201);
/// CUDA IPC between GPUs that cannot address each other.
const NO_PEER: Failure = status(Call::IpcOpen, 217);
const FABRIC_IMPORT: Failure = status(Call::MemImport, 800);
const FD_IMPORT: Failure = status(Call::MemSetAccess, 217);

#[test]
fn table() {
    let rows = rows();
    for row in &rows {
        let (backend, text) = match decide(&row.group.facts, &row.group.imports) {
            Ok(plan) => (Some(plan.backend), plan.to_string()),
            Err(error) => (None, error.to_string()),
        };
        assert_eq!(backend, row.backend, "{}: {text}", row.name);
        assert_eq!(text, row.text, "{}", row.name);
    }
    assert!(rows.len() >= 60, "{} rows", rows.len());
    for (i, a) in rows.iter().enumerate() {
        for b in &rows[i + 1..] {
            assert_ne!(a.name, b.name);
            assert_ne!(a.group, b.group, "{} and {}", a.name, b.name);
        }
    }
}

fn rows() -> Vec<Row> {
    let mut table = Vec::new();
    let mut row = |name, group: Group, backend: Option<BackendKind>, text: &str| {
        table.push(Row {
            name,
            group,
            backend,
            text: text.to_owned(),
        });
    };

    // One node.
    row(
        "HGX H200",
        hgx(&[4]),
        Some(Malloc),
        "malloc: one node; fabric refused on ranks 0-3: cuMemCreate returned 800 \
         CUDA_ERROR_NOT_PERMITTED (no IMEX channel is visible to the process)",
    );
    row(
        "a rank alone",
        hgx(&[1]),
        Some(Malloc),
        "malloc: one node; fabric refused on rank 0: cuMemCreate returned 800 \
         CUDA_ERROR_NOT_PERMITTED (no IMEX channel is visible to the process)",
    );
    row(
        "an IMEX channel that may not be used",
        hgx(&[4]).each(|f| f.imex_channel = true),
        Some(Malloc),
        "malloc: one node; fabric refused on ranks 0-3: cuMemCreate returned 800 \
         CUDA_ERROR_NOT_PERMITTED (an IMEX channel is visible, but the process may not use it)",
    );
    row(
        "an IMEX channel in one container only",
        hgx(&[4]).rank(1, |f| f.imex_channel = true),
        Some(Malloc),
        "malloc: one node; fabric refused on ranks 0, 2-3: cuMemCreate returned 800 \
         CUDA_ERROR_NOT_PERMITTED (no IMEX channel is visible to the process); fabric refused on \
         rank 1: cuMemCreate returned 800 CUDA_ERROR_NOT_PERMITTED (an IMEX channel is visible, \
         but the process may not use it)",
    );
    row(
        "fabric attribute 0",
        hgx(&[4]).fabric(NO_FABRIC_ATTRIBUTE),
        Some(Malloc),
        "malloc: one node; fabric not tried on ranks 0-3: device attribute \
         HANDLE_TYPE_FABRIC_SUPPORTED is 0",
    );
    row(
        "VMM attribute 0",
        hgx(&[4]).fabric(NO_VMM).posix_fd(NO_VMM),
        Some(Malloc),
        "malloc: one node; fabric not tried on ranks 0-3: device attribute \
         VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED is 0",
    );
    row(
        "posix_fd attribute 0, not needed",
        hgx(&[4]).posix_fd(NO_POSIX_ATTRIBUTE).fabric(OK),
        Some(Malloc),
        "malloc: one node",
    );
    row(
        "fabric not supported by the GPU",
        hgx(&[2]).fabric(refused(Call::MemCreate, 801)),
        Some(Malloc),
        "malloc: one node; fabric refused on ranks 0-1: cuMemCreate returned 801 \
         CUDA_ERROR_NOT_SUPPORTED (the GPU or its driver has no such handles)",
    );
    row(
        "fabric manager down",
        hgx(&[2]).fabric(refused(Call::MemCreate, 802)),
        Some(Malloc),
        "malloc: one node; fabric refused on ranks 0-1: cuMemCreate returned 802 \
         CUDA_ERROR_SYSTEM_NOT_READY (the NVSwitch fabric is not set up)",
    );
    row(
        "a status newer than the crate",
        hgx(&[2]).fabric(refused(Call::MemCreate, 917)),
        Some(Malloc),
        "malloc: one node; fabric refused on ranks 0-1: cuMemCreate returned 917",
    );
    row(
        "granularity refused",
        hgx(&[2]).fabric(refused(Call::MemGranularity, 1)),
        Some(Malloc),
        "malloc: one node; fabric refused on ranks 0-1: cuMemGetAllocationGranularity returned 1 \
         CUDA_ERROR_INVALID_VALUE",
    );
    row(
        "export refused",
        hgx(&[2]).fabric(refused(Call::MemExport, 800)),
        Some(Malloc),
        "malloc: one node; fabric refused on ranks 0-1: cuMemExportToShareableHandle returned 800 \
         CUDA_ERROR_NOT_PERMITTED",
    );
    row(
        "import of one's own handle refused",
        hgx(&[2]).fabric(refused(Call::MemImport, 999)),
        Some(Malloc),
        "malloc: one node; fabric refused on ranks 0-1: cuMemImportFromShareableHandle returned \
         999 CUDA_ERROR_UNKNOWN (the IMEX domain does not let the handle in)",
    );
    row(
        "import of one's own handle not permitted",
        hgx(&[2]).fabric(refused(Call::MemImport, 800)),
        Some(Malloc),
        "malloc: one node; fabric refused on ranks 0-1: cuMemImportFromShareableHandle returned \
         800 CUDA_ERROR_NOT_PERMITTED (no IMEX channel is visible to the process)",
    );
    row(
        "map refused",
        hgx(&[2]).fabric(refused(Call::MemMap, 205)),
        Some(Malloc),
        "malloc: one node; fabric refused on ranks 0-1: cuMemMap returned 205 \
         CUDA_ERROR_MAP_FAILED",
    );
    row(
        "access refused",
        hgx(&[2]).fabric(refused(Call::MemSetAccess, 101)),
        Some(Malloc),
        "malloc: one node; fabric refused on ranks 0-1: cuMemSetAccess returned 101 \
         CUDA_ERROR_INVALID_DEVICE (the process sees no such GPU)",
    );
    row(
        "other bytes read than written",
        hgx(&[2]).fabric(failed(Call::CopyToHost, Cause::WrongBytes)),
        Some(Malloc),
        "malloc: one node; fabric refused on ranks 0-1: cuMemcpyDtoH read other bytes than were \
         written",
    );
    row(
        "a driver without the entry point",
        hgx(&[2]).fabric(failed(Call::MemExport, Cause::NoSymbol)),
        Some(Malloc),
        "malloc: one node; fabric refused on ranks 0-1: cuMemExportToShareableHandle is missing \
         from the driver library",
    );
    row(
        "nobody probed fabric",
        hgx(&[2]).fabric(Trial::default()),
        Some(Malloc),
        "malloc: one node; fabric not tried on ranks 0-1: it was not probed",
    );
    row(
        "fabric works, no clique",
        hgx(&[4]).fabric(OK),
        Some(Malloc),
        "malloc: one node",
    );
    row(
        "fabric works but on one rank",
        nvl(&[4]).rank(2, |f| {
            f.trials.fabric = NOT_PERMITTED;
            f.imex_channel = false;
        }),
        Some(Malloc),
        "malloc: one node; fabric refused on rank 2: cuMemCreate returned 800 \
         CUDA_ERROR_NOT_PERMITTED (no IMEX channel is visible to the process)",
    );
    row(
        "one tray of an NVL72",
        nvl(&[4]),
        Some(Malloc),
        "malloc: one node",
    );
    row(
        "one host in two cliques",
        nvl(&[4]).rank(3, |f| f.fabric = clique(U1, 2)),
        Some(Malloc),
        "malloc: one node",
    );
    row(
        "NVML refuses on one node, where cliques do not matter",
        hgx(&[2]).fabric(OK).each(|f| f.fabric = Err(nvml(999))),
        Some(Malloc),
        "malloc: one node",
    );
    row(
        "no host id, one name",
        hgx(&[2]).fabric(OK).each(|f| f.host_id = Bytes16::ZERO),
        Some(Malloc),
        "malloc: one node",
    );
    row(
        "one host id, a name in each container",
        hgx(&[2])
            .fabric(OK)
            .rank(1, |f| f.host_name = "pod-1".into()),
        Some(Malloc),
        "malloc: one node",
    );

    // One node, malloc refused.
    row(
        "no IPC handles on one rank",
        hgx(&[4])
            .fabric(OK)
            .rank(1, |f| f.trials.malloc = refused(Call::IpcGetHandle, 801)),
        Some(PosixFd),
        "posix_fd: malloc does not work on every rank; malloc refused on rank 1: cuIpcGetMemHandle returned 801 \
         CUDA_ERROR_NOT_SUPPORTED",
    );
    row(
        "no IPC handles at all, and no fabric",
        hgx(&[2]).malloc(refused(Call::IpcGetHandle, 801)),
        Some(PosixFd),
        "posix_fd: malloc does not work on every rank; fabric refused on ranks 0-1: cuMemCreate returned 800 \
         CUDA_ERROR_NOT_PERMITTED (no IMEX channel is visible to the process); malloc refused on \
         ranks 0-1: cuIpcGetMemHandle returned 801 CUDA_ERROR_NOT_SUPPORTED",
    );
    row(
        "no IPC handles and no descriptors",
        hgx(&[2])
            .fabric(OK)
            .malloc(refused(Call::IpcGetHandle, 801))
            .rank(1, |f| f.trials.posix_fd = NO_POSIX_ATTRIBUTE),
        None,
        "no backend works on every rank: malloc refused on ranks 0-1: cuIpcGetMemHandle returned \
         801 CUDA_ERROR_NOT_SUPPORTED; posix_fd not tried on rank 1: device attribute \
         HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED is 0; check that the platform has CUDA IPC \
         (virtual machines may not), or set EP_ALLOC=posix-fd",
    );
    row(
        "a full GPU",
        hgx(&[2]).rank(1, |f| {
            f.trials.malloc = refused(Call::MemAlloc, 2);
            f.trials.posix_fd = refused(Call::MemCreate, 2);
        }),
        None,
        "no backend works on every rank: fabric refused on ranks 0-1: cuMemCreate returned 800 \
         CUDA_ERROR_NOT_PERMITTED (no IMEX channel is visible to the process); malloc refused on \
         rank 1: cuMemAlloc returned 2 CUDA_ERROR_OUT_OF_MEMORY (the device's memory is used up); \
         posix_fd refused on rank 1: cuMemCreate returned 2 CUDA_ERROR_OUT_OF_MEMORY (the device's \
         memory is used up); free device memory, or lower the buffer's limits",
    );
    row(
        "no driver on one host",
        hgx(&[1, 1])
            .fabric(OK)
            .rank(1, |f| f.fabric = Ok(FabricInfo::NONE))
            .rank(1, |f| {
                let missing = failed(Call::Load, Cause::NoLibrary);
                f.trials.fabric = missing;
                f.trials.posix_fd = missing;
                f.trials.malloc = missing;
            }),
        None,
        "no backend works on every rank: no NVLink clique on rank 0: the cluster UUID is all \
         zeros; no NVLink clique on rank 1: the GPU has no fabric; fabric refused on rank 1: \
         dlopen found no driver library; malloc refused on rank 1: dlopen found no driver library; \
         posix_fd refused on rank 1: dlopen found no driver library; install the NVIDIA driver, or \
         make its folder visible to the dynamic loader",
    );

    // One node, importing refused.
    row(
        "IPC refused between all",
        hgx(&[4]).fabric(OK).imports(Malloc, all(4), IPC),
        Some(PosixFd),
        "posix_fd: connects 6 pairs of ranks where malloc connects 0; malloc refused when rank 0 \
         imports from rank 1 and in 11 more cases: cuIpcOpenMemHandle returned 201 \
         CUDA_ERROR_INVALID_CONTEXT (CUDA IPC does not work between the two processes)",
    );
    row(
        "IPC refused one way",
        hgx(&[4]).fabric(OK).imports(Malloc, vec![(2, 1)], IPC),
        Some(PosixFd),
        "posix_fd: connects 6 pairs of ranks where malloc connects 5; malloc refused when rank 2 \
         imports from rank 1: cuIpcOpenMemHandle returned 201 CUDA_ERROR_INVALID_CONTEXT (CUDA IPC \
         does not work between the two processes)",
    );
    row(
        "IPC refused both ways",
        hgx(&[4])
            .fabric(OK)
            .imports(Malloc, vec![(2, 1), (1, 2)], IPC),
        Some(PosixFd),
        "posix_fd: connects 6 pairs of ranks where malloc connects 5; malloc refused when rank 1 \
         imports from rank 2 and in 1 more case: cuIpcOpenMemHandle returned 201 \
         CUDA_ERROR_INVALID_CONTEXT (CUDA IPC does not work between the two processes)",
    );
    row(
        "IPC refused, and the fabric too",
        hgx(&[2]).imports(Malloc, all(2), IPC),
        Some(PosixFd),
        "posix_fd: connects 1 pair of ranks where malloc connects 0; fabric refused on ranks 0-1: \
         cuMemCreate returned 800 CUDA_ERROR_NOT_PERMITTED (no IMEX channel is visible to the \
         process); malloc refused when rank 0 imports from rank 1 and in 1 more case: \
         cuIpcOpenMemHandle returned 201 CUDA_ERROR_INVALID_CONTEXT (CUDA IPC does not work \
         between the two processes)",
    );
    row(
        "IPC refused, no descriptors on one rank",
        hgx(&[4])
            .fabric(OK)
            .rank(3, |f| f.trials.posix_fd = NO_POSIX_ATTRIBUTE)
            .imports(Malloc, vec![(0, 1)], IPC),
        Some(Malloc),
        "malloc: one node; malloc refused when rank 0 imports from rank 1: cuIpcOpenMemHandle \
         returned 201 CUDA_ERROR_INVALID_CONTEXT (CUDA IPC does not work between the two \
         processes); posix_fd not tried on rank 3: device attribute \
         HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED is 0",
    );
    row(
        "IPC refused, descriptors refused on one rank",
        hgx(&[2])
            .fabric(OK)
            .rank(1, |f| {
                f.trials.posix_fd = failed(Call::MemExport, Cause::Os(24))
            })
            .imports(Malloc, vec![(0, 1)], IPC),
        Some(Malloc),
        "malloc: one node; malloc refused when rank 0 imports from rank 1: cuIpcOpenMemHandle \
         returned 201 CUDA_ERROR_INVALID_CONTEXT (CUDA IPC does not work between the two \
         processes); posix_fd refused on rank 1: cuMemExportToShareableHandle failed with system \
         error 24",
    );
    row(
        "no peer access, whatever the backend",
        hgx(&[2])
            .fabric(OK)
            .imports(Malloc, all(2), NO_PEER)
            .imports(PosixFd, all(2), FD_IMPORT),
        Some(Malloc),
        "malloc: one node; malloc refused when rank 0 imports from rank 1 and in 1 more case: \
         cuIpcOpenMemHandle returned 217 CUDA_ERROR_PEER_ACCESS_UNSUPPORTED (the GPUs cannot \
         address each other); posix_fd refused when rank 0 imports from rank 1 and in 1 more case: \
         cuMemSetAccess returned 217 CUDA_ERROR_PEER_ACCESS_UNSUPPORTED",
    );
    row(
        "descriptors refused less often than IPC",
        hgx(&[4])
            .fabric(OK)
            .imports(Malloc, vec![(0, 1), (0, 2)], IPC)
            .imports(PosixFd, vec![(0, 1)], FD_IMPORT),
        Some(PosixFd),
        "posix_fd: connects 5 pairs of ranks where malloc connects 4; malloc refused when rank 0 \
         imports from rank 1 and in 1 more case: cuIpcOpenMemHandle returned 201 \
         CUDA_ERROR_INVALID_CONTEXT (CUDA IPC does not work between the two processes); posix_fd \
         refused when rank 0 imports from rank 1: cuMemSetAccess returned 217 \
         CUDA_ERROR_PEER_ACCESS_UNSUPPORTED",
    );
    row(
        "two ways to refuse IPC",
        hgx(&[3])
            .fabric(OK)
            .imports(Malloc, vec![(1, 0)], IPC)
            .imports(Malloc, vec![(2, 0)], NO_PEER),
        Some(PosixFd),
        "posix_fd: connects 3 pairs of ranks where malloc connects 1; malloc refused when rank 1 \
         imports from rank 0: cuIpcOpenMemHandle returned 201 CUDA_ERROR_INVALID_CONTEXT (CUDA IPC \
         does not work between the two processes); malloc refused when rank 2 imports from rank 0: \
         cuIpcOpenMemHandle returned 217 CUDA_ERROR_PEER_ACCESS_UNSUPPORTED (the GPUs cannot \
         address each other)",
    );
    row(
        "evidence against a backend that is not needed",
        hgx(&[2]).fabric(OK).imports(PosixFd, all(2), FD_IMPORT),
        Some(Malloc),
        "malloc: one node",
    );
    row(
        "evidence about a rank that has left",
        hgx(&[2]).fabric(OK).imports(Malloc, vec![(0, 7)], IPC),
        Some(Malloc),
        "malloc: one node",
    );

    // Several nodes, no clique that spans them.
    row(
        "the reviewer's case: attribute true on an InfiniBand cluster",
        hgx(&[8, 8]).each(|f| f.rdma_nics = 8),
        Some(Malloc),
        "malloc: 2 nodes and no NVLink clique that spans two of them; no NVLink clique on ranks \
         0-15: the cluster UUID is all zeros; fabric refused on ranks 0-15: cuMemCreate returned \
         800 CUDA_ERROR_NOT_PERMITTED (no IMEX channel is visible to the process)",
    );
    row(
        "attribute 0 on an InfiniBand cluster",
        hgx(&[2, 2])
            .fabric(NO_FABRIC_ATTRIBUTE)
            .each(|f| f.fabric = Ok(FabricInfo::NONE)),
        Some(Malloc),
        "malloc: 2 nodes and no NVLink clique that spans two of them; no NVLink clique on ranks \
         0-3: the GPU has no fabric; fabric not tried on ranks 0-3: device attribute \
         HANDLE_TYPE_FABRIC_SUPPORTED is 0",
    );
    row(
        "fabric works, cluster UUID of zeros",
        nvl(&[2, 2]).each(|f| f.fabric = clique(Bytes16::ZERO, 0)),
        Some(Malloc),
        "malloc: 2 nodes and no NVLink clique that spans two of them; no NVLink clique on ranks \
         0-3: the cluster UUID is all zeros",
    );
    row(
        "one clique id is no clique without a cluster",
        nvl(&[2, 2]).each(|f| f.fabric = clique(Bytes16::ZERO, 32766)),
        Some(Malloc),
        "malloc: 2 nodes and no NVLink clique that spans two of them; no NVLink clique on ranks \
         0-3: the cluster UUID is all zeros",
    );
    row(
        "registration not started",
        nvl(&[2, 2]).state(FabricState::NotStarted, 0),
        Some(Malloc),
        "malloc: 2 nodes and no NVLink clique that spans two of them; no NVLink clique on ranks \
         0-3: fabric registration has not started",
    );
    row(
        "registration in progress",
        nvl(&[2, 2]).state(FabricState::InProgress, 0),
        Some(Malloc),
        "malloc: 2 nodes and no NVLink clique that spans two of them; no NVLink clique on ranks \
         0-3: fabric registration is in progress",
    );
    row(
        "a UUID without fabric support",
        nvl(&[2, 2]).state(FabricState::NotSupported, 0),
        Some(Malloc),
        "malloc: 2 nodes and no NVLink clique that spans two of them; no NVLink clique on ranks \
         0-3: the GPU has no fabric",
    );
    row(
        "a state newer than the crate",
        nvl(&[2, 2]).state(FabricState::Other(9), 0),
        Some(Malloc),
        "malloc: 2 nodes and no NVLink clique that spans two of them; no NVLink clique on ranks \
         0-3: fabric registration is in unknown state 9",
    );
    row(
        "registration completed without success",
        nvl(&[2, 2]).state(FabricState::Completed, 999),
        Some(Malloc),
        "malloc: 2 nodes and no NVLink clique that spans two of them; no NVLink clique on ranks \
         0-3: fabric registration ended with NVML status 999",
    );
    row(
        "NVML refuses",
        nvl(&[2, 2]).each(|f| f.fabric = Err(nvml(15))),
        Some(Malloc),
        "malloc: 2 nodes and no NVLink clique that spans two of them; no NVLink clique on ranks \
         0-3: nvmlDeviceGetGpuFabricInfo returned NVML status 15",
    );
    row(
        "registration in progress on one of two nodes",
        nvl(&[2, 2]).node(1, |f| f.fabric = info(FabricState::InProgress, 0, U1, 1)),
        Some(Malloc),
        "malloc: 2 nodes and no NVLink clique that spans two of them; no NVLink clique on ranks \
         2-3: fabric registration is in progress",
    );
    row(
        "a cluster of its own on each node",
        nvl(&[2, 2]).node(1, |f| f.fabric = clique(U2, 1)),
        Some(Malloc),
        "malloc: 2 nodes and no NVLink clique that spans two of them",
    );
    row(
        "a clique of its own on each node of a cluster",
        nvl(&[2, 2]).node(1, |f| f.fabric = clique(U1, 2)),
        Some(Malloc),
        "malloc: 2 nodes and no NVLink clique that spans two of them",
    );
    row(
        "one clique id in two clusters",
        nvl(&[2, 2])
            .node(0, |f| f.fabric = clique(U1, 32766))
            .node(1, |f| f.fabric = clique(U2, 32766)),
        Some(Malloc),
        "malloc: 2 nodes and no NVLink clique that spans two of them",
    );
    row(
        "uneven nodes",
        hgx(&[3, 1, 2]).fabric(OK),
        Some(Malloc),
        "malloc: 3 nodes and no NVLink clique that spans two of them; no NVLink clique on ranks \
         0-5: the cluster UUID is all zeros",
    );
    row(
        "no host ids, two names",
        hgx(&[1, 1]).fabric(OK).each(|f| f.host_id = Bytes16::ZERO),
        Some(Malloc),
        "malloc: 2 nodes and no NVLink clique that spans two of them; no NVLink clique on ranks \
         0-1: the cluster UUID is all zeros",
    );
    row(
        "IPC refused on one of two nodes",
        hgx(&[2, 2])
            .fabric(OK)
            .imports(Malloc, vec![(2, 3), (3, 2)], IPC),
        Some(PosixFd),
        "posix_fd: connects 2 pairs of ranks where malloc connects 1; no NVLink clique on ranks \
         0-3: the cluster UUID is all zeros; malloc refused when rank 2 imports from rank 3 and in \
         1 more case: cuIpcOpenMemHandle returned 201 CUDA_ERROR_INVALID_CONTEXT (CUDA IPC does \
         not work between the two processes)",
    );
    row(
        "IPC was never possible between nodes",
        hgx(&[2, 2]).fabric(OK).imports(Malloc, vec![(1, 2)], IPC),
        Some(Malloc),
        "malloc: 2 nodes and no NVLink clique that spans two of them; no NVLink clique on ranks \
         0-3: the cluster UUID is all zeros",
    );

    // Several nodes in a clique.
    row(
        "two trays of an NVL72",
        nvl(&[4, 4]),
        Some(Fabric),
        "fabric: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/1 spans 2 nodes",
    );
    row(
        "NVL72",
        nvl(&[4; 18]),
        Some(Fabric),
        "fabric: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/1 spans 18 nodes",
    );
    row(
        "clique id 0 of a cluster",
        nvl(&[1, 1]).each(|f| f.fabric = clique(U1, 0)),
        Some(Fabric),
        "fabric: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/0 spans 2 nodes",
    );
    row(
        "uneven nodes of a clique",
        nvl(&[4, 1, 3]),
        Some(Fabric),
        "fabric: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/1 spans 3 nodes",
    );
    row(
        "memory with the GPUDirect RDMA flag",
        nvl(&[1, 1]).fabric(Trial::Ok { gdr: true }),
        Some(Fabric),
        "fabric: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/1 spans 2 nodes",
    );
    row(
        "malloc refused where fabric works",
        nvl(&[2, 2]).malloc(refused(Call::IpcGetHandle, 801)),
        Some(Fabric),
        "fabric: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/1 spans 2 nodes",
    );
    row(
        "two cliques of equal width",
        nvl(&[4, 4, 4, 4])
            .node(0, |f| f.fabric = clique(U2, 1))
            .node(1, |f| f.fabric = clique(U2, 1)),
        Some(Fabric),
        "fabric: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/1 spans 2 nodes",
    );
    row(
        "two cliques, the second wider",
        nvl(&[4, 4, 4, 4, 4])
            .node(2, |f| f.fabric = clique(U1, 2))
            .node(3, |f| f.fabric = clique(U1, 2))
            .node(4, |f| f.fabric = clique(U1, 2)),
        Some(Fabric),
        "fabric: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/2 spans 3 nodes",
    );
    row(
        "a clique and a node of another",
        nvl(&[2, 2, 2]).node(2, |f| f.fabric = clique(U2, 1)),
        Some(Fabric),
        "fabric: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/1 spans 2 nodes",
    );
    row(
        "a clique and a node in none where fabric works",
        nvl(&[2, 2, 2]).node(0, |f| f.fabric = clique(Bytes16::ZERO, 0)),
        Some(Fabric),
        "fabric: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/1 spans 2 nodes",
    );
    row(
        "a clique and a node that is still registering",
        nvl(&[2, 2, 2]).node(1, |f| f.fabric = info(FabricState::InProgress, 0, U1, 1)),
        Some(Fabric),
        "fabric: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/1 spans 2 nodes",
    );
    row(
        "a clique that crosses two hosts in two",
        nvl(&[2, 2])
            .rank(1, |f| f.fabric = clique(U2, 1))
            .rank(3, |f| f.fabric = clique(U2, 1)),
        Some(Fabric),
        "fabric: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/1 spans 2 nodes",
    );
    row(
        "a clique and an HGX node",
        nvl(&[2, 2, 2]).node(2, |f| {
            f.fabric = clique(Bytes16::ZERO, 0);
            f.trials.fabric = NOT_PERMITTED;
            f.imex_channel = false;
        }),
        Some(Malloc),
        "malloc: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/1 spans 2 nodes but not every \
         rank can use it; fabric refused on ranks 4-5: cuMemCreate returned 800 \
         CUDA_ERROR_NOT_PERMITTED (no IMEX channel is visible to the process)",
    );
    row(
        "a plausible cluster UUID on Hopper nodes without IMEX",
        hgx(&[2, 2]).each(|f| f.fabric = clique(U2, 7)),
        Some(Malloc),
        "malloc: NVLink clique 6b1f0c3e-0000-4000-8000-000000000002/7 spans 2 nodes but not every \
         rank can use it; fabric refused on ranks 0-3: cuMemCreate returned 800 \
         CUDA_ERROR_NOT_PERMITTED (no IMEX channel is visible to the process)",
    );
    row(
        "a container without the IMEX channel",
        nvl(&[2, 2]).rank(3, |f| {
            f.trials.fabric = NOT_PERMITTED;
            f.imex_channel = false;
        }),
        Some(Malloc),
        "malloc: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/1 spans 2 nodes but not every \
         rank can use it; fabric refused on rank 3: cuMemCreate returned 800 \
         CUDA_ERROR_NOT_PERMITTED (no IMEX channel is visible to the process)",
    );
    row(
        "attribute 0 on one rank of a clique",
        nvl(&[2, 2]).rank(0, |f| f.trials.fabric = NO_FABRIC_ATTRIBUTE),
        Some(Malloc),
        "malloc: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/1 spans 2 nodes but not every \
         rank can use it; fabric not tried on rank 0: device attribute \
         HANDLE_TYPE_FABRIC_SUPPORTED is 0",
    );
    row(
        "nvidia-imex down on one node",
        nvl(&[2, 2]).node(1, |f| f.trials.fabric = refused(Call::MemImport, 304)),
        Some(Malloc),
        "malloc: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/1 spans 2 nodes but not every \
         rank can use it; fabric refused on ranks 2-3: cuMemImportFromShareableHandle returned 304 \
         CUDA_ERROR_OPERATING_SYSTEM (the IMEX domain does not let the handle in)",
    );
    row(
        "neither fabric nor malloc in a clique",
        nvl(&[1, 1])
            .fabric(NOT_PERMITTED)
            .malloc(refused(Call::IpcGetHandle, 801)),
        Some(PosixFd),
        "posix_fd: malloc does not work on every rank; fabric refused on ranks 0-1: cuMemCreate returned 800 \
         CUDA_ERROR_NOT_PERMITTED (an IMEX channel is visible, but the process may not use it); \
         malloc refused on ranks 0-1: cuIpcGetMemHandle returned 801 CUDA_ERROR_NOT_SUPPORTED",
    );

    // Several nodes in a clique, importing refused.
    row(
        "no IMEX domain between two nodes, where malloc would connect no more",
        nvl(&[2, 2]).imports(Fabric, across(0..2, 2..4), FABRIC_IMPORT),
        Some(Fabric),
        "fabric: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/1 spans 2 nodes; fabric \
         refused when rank 0 imports from rank 2 and in 7 more cases: \
         cuMemImportFromShareableHandle returned 800 CUDA_ERROR_NOT_PERMITTED (the IMEX domain \
         does not let the handle in)",
    );
    row(
        "one of four nodes outside the IMEX domain",
        nvl(&[1, 1, 1, 1]).imports(Fabric, across(0..3, 3..4), FABRIC_IMPORT),
        Some(Fabric),
        "fabric: NVLink clique 6b1f0c3e-0000-4000-8000-000000000001/1 spans 4 nodes; fabric \
         refused when rank 0 imports from rank 3 and in 5 more cases: \
         cuMemImportFromShareableHandle returned 800 CUDA_ERROR_NOT_PERMITTED (the IMEX domain \
         does not let the handle in)",
    );
    row(
        "no fabric handle can be imported",
        nvl(&[2, 2]).imports(Fabric, all(4), FABRIC_IMPORT),
        Some(Malloc),
        "malloc: connects 2 pairs of ranks where fabric connects 0; fabric refused when rank 0 \
         imports from rank 1 and in 11 more cases: cuMemImportFromShareableHandle returned 800 \
         CUDA_ERROR_NOT_PERMITTED (the IMEX domain does not let the handle in)",
    );
    row(
        "no fabric handle can be imported, no IPC handles",
        nvl(&[2, 2])
            .malloc(refused(Call::IpcGetHandle, 801))
            .imports(Fabric, all(4), FABRIC_IMPORT),
        Some(PosixFd),
        "posix_fd: connects 2 pairs of ranks where fabric connects 0; fabric refused when rank 0 \
         imports from rank 1 and in 11 more cases: cuMemImportFromShareableHandle returned 800 \
         CUDA_ERROR_NOT_PERMITTED (the IMEX domain does not let the handle in); malloc refused on \
         ranks 0-3: cuIpcGetMemHandle returned 801 CUDA_ERROR_NOT_SUPPORTED",
    );
    row(
        "no fabric handle can be imported, IPC refused on one node",
        nvl(&[2, 2])
            .imports(Fabric, all(4), FABRIC_IMPORT)
            .imports(Malloc, vec![(1, 0)], IPC),
        Some(PosixFd),
        "posix_fd: connects 2 pairs of ranks where malloc connects 1; fabric refused when rank 0 \
         imports from rank 1 and in 11 more cases: cuMemImportFromShareableHandle returned 800 \
         CUDA_ERROR_NOT_PERMITTED (the IMEX domain does not let the handle in); malloc refused \
         when rank 1 imports from rank 0: cuIpcOpenMemHandle returned 201 \
         CUDA_ERROR_INVALID_CONTEXT (CUDA IPC does not work between the two processes)",
    );

    // Forced.
    row(
        "malloc forced in a clique",
        nvl(&[2, 2]).force(Malloc),
        Some(Malloc),
        "malloc: forced by rank 0",
    );
    row(
        "malloc forced by one rank",
        nvl(&[2, 2]).rank(2, |f| f.choice = Choice::Force(Malloc)),
        Some(Malloc),
        "malloc: forced by rank 2",
    );
    row(
        "fabric forced on one node where it works",
        nvl(&[4]).force(Fabric),
        Some(Fabric),
        "fabric: forced by rank 0",
    );
    row(
        "fabric forced where cliques differ",
        nvl(&[1, 1])
            .force(Fabric)
            .rank(1, |f| f.fabric = clique(U2, 1)),
        Some(Fabric),
        "fabric: forced by rank 0",
    );
    row(
        "posix_fd forced on HGX",
        hgx(&[4]).force(PosixFd),
        Some(PosixFd),
        "posix_fd: forced by rank 0",
    );
    row(
        "fabric forced on HGX",
        hgx(&[4]).force(Fabric),
        None,
        "fabric is forced by rank 0: fabric refused on ranks 0-3: cuMemCreate returned 800 \
         CUDA_ERROR_NOT_PERMITTED (no IMEX channel is visible to the process); check that \
         /dev/nvidia-caps-imex-channels/channel0 exists and is passed to the container, and that \
         nvidia-imex runs",
    );
    row(
        "fabric forced, IMEX channel not usable",
        hgx(&[1])
            .each(|f| f.imex_channel = true)
            .rank(0, |f| f.choice = Choice::Force(Fabric)),
        None,
        "fabric is forced by rank 0: fabric refused on rank 0: cuMemCreate returned 800 \
         CUDA_ERROR_NOT_PERMITTED (an IMEX channel is visible, but the process may not use it); \
         check the permissions of /dev/nvidia-caps-imex-channels/channel* and that nvidia-imex \
         runs",
    );
    row(
        "fabric forced, attribute 0 on one rank and refusal on another",
        nvl(&[2, 2])
            .force(Fabric)
            .rank(1, |f| f.trials.fabric = NO_FABRIC_ATTRIBUTE)
            .rank(2, |f| f.trials.fabric = refused(Call::MemExport, 801)),
        None,
        "fabric is forced by rank 0: fabric not tried on rank 1: device attribute \
         HANDLE_TYPE_FABRIC_SUPPORTED is 0; fabric refused on rank 2: cuMemExportToShareableHandle \
         returned 801 CUDA_ERROR_NOT_SUPPORTED; use a GPU of the Hopper generation or later and a \
         driver of release 550 or later",
    );
    row(
        "fabric forced, fabric manager down",
        hgx(&[1])
            .force(Fabric)
            .fabric(refused(Call::MemCreate, 802)),
        None,
        "fabric is forced by rank 0: fabric refused on rank 0: cuMemCreate returned 802 \
         CUDA_ERROR_SYSTEM_NOT_READY (the NVSwitch fabric is not set up); check that \
         nvidia-fabricmanager runs",
    );
    row(
        "posix_fd forced, attribute 0",
        hgx(&[2])
            .force(PosixFd)
            .rank(1, |f| f.trials.posix_fd = NO_POSIX_ATTRIBUTE),
        None,
        "posix_fd is forced by rank 0: posix_fd not tried on rank 1: device attribute \
         HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED is 0; check the GPU's compute mode and \
         virtualisation",
    );
    row(
        "posix_fd forced, VMM attribute 0",
        hgx(&[2]).force(PosixFd).posix_fd(NO_VMM),
        None,
        "posix_fd is forced by rank 0: posix_fd not tried on ranks 0-1: device attribute \
         VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED is 0; use a GPU and driver with virtual memory \
         management",
    );
    row(
        "posix_fd forced, descriptors used up",
        hgx(&[2]).force(PosixFd).rank(0, |f| {
            f.trials.posix_fd = failed(Call::MemExport, Cause::Os(24))
        }),
        None,
        "posix_fd is forced by rank 0: posix_fd refused on rank 0: cuMemExportToShareableHandle \
         failed with system error 24; check the descriptor limit (ulimit -n)",
    );
    row(
        "malloc forced, no IPC handles",
        hgx(&[2])
            .force(Malloc)
            .malloc(refused(Call::IpcGetHandle, 801)),
        None,
        "malloc is forced by rank 0: malloc refused on ranks 0-1: cuIpcGetMemHandle returned 801 \
         CUDA_ERROR_NOT_SUPPORTED; check that the platform has CUDA IPC (virtual machines may not), \
         or set EP_ALLOC=posix-fd",
    );
    row(
        "malloc forced, IPC refused, no NIC",
        hgx(&[2]).force(Malloc).imports(Malloc, vec![(1, 0)], IPC),
        None,
        "malloc is forced by rank 0: malloc refused when rank 1 imports from rank 0: \
         cuIpcOpenMemHandle returned 201 CUDA_ERROR_INVALID_CONTEXT (CUDA IPC does not work \
         between the two processes); let the processes share the IPC and PID namespaces, or set \
         EP_ALLOC=posix-fd",
    );
    row(
        "malloc forced, IPC refused, NIC on one rank only",
        hgx(&[2])
            .force(Malloc)
            .rank(0, |f| f.rdma_nics = 1)
            .imports(Malloc, vec![(1, 0)], NO_PEER),
        None,
        "malloc is forced by rank 0: malloc refused when rank 1 imports from rank 0: \
         cuIpcOpenMemHandle returned 217 CUDA_ERROR_PEER_ACCESS_UNSUPPORTED (the GPUs cannot \
         address each other); check nvidia-smi topo -p2p r",
    );
    row(
        "malloc forced, IPC refused, NICs take over",
        hgx(&[2])
            .force(Malloc)
            .each(|f| f.rdma_nics = 1)
            .imports(Malloc, vec![(1, 0)], IPC),
        Some(Malloc),
        "malloc: forced by rank 0; malloc refused when rank 1 imports from rank 0: \
         cuIpcOpenMemHandle returned 201 CUDA_ERROR_INVALID_CONTEXT (CUDA IPC does not work \
         between the two processes)",
    );
    row(
        "fabric forced, no IMEX domain between two nodes",
        nvl(&[1, 1])
            .force(Fabric)
            .imports(Fabric, all(2), FABRIC_IMPORT),
        None,
        "fabric is forced by rank 0: fabric refused when rank 0 imports from rank 1 and in 1 more \
         case: cuMemImportFromShareableHandle returned 800 CUDA_ERROR_NOT_PERMITTED (the IMEX \
         domain does not let the handle in); check with nvidia-imex-ctl -N that both hosts are in \
         one IMEX domain",
    );
    row(
        "different backends forced",
        hgx(&[4])
            .rank(0, |f| f.choice = Choice::Force(Fabric))
            .rank(3, |f| f.choice = Choice::Force(Malloc)),
        None,
        "rank 0 forces fabric and rank 3 forces malloc; set EP_ALLOC and MC_USE_NVLINK_IPC alike \
         on every rank",
    );
    row(
        "different backends forced after some agreement",
        hgx(&[4])
            .rank(1, |f| f.choice = Choice::Force(PosixFd))
            .rank(2, |f| f.choice = Choice::Force(PosixFd))
            .rank(3, |f| f.choice = Choice::Force(Malloc)),
        None,
        "rank 1 forces posix_fd and rank 3 forces malloc; set EP_ALLOC and MC_USE_NVLINK_IPC alike \
         on every rank",
    );

    // No group.
    row(
        "no ranks",
        hgx(&[]),
        None,
        "a group has at least one rank; check the facts that were exchanged",
    );
    row(
        "ranks out of order",
        hgx(&[3]).rank(1, |f| f.rank = 5),
        None,
        "rank 2 follows rank 5 in the facts of the group; check that ranks are numbered once each",
    );
    row(
        "a rank twice",
        hgx(&[2]).rank(1, |f| f.rank = 0),
        None,
        "rank 0 follows rank 0 in the facts of the group; check that ranks are numbered once each",
    );
    table
}

/// The order in which evidence arrives differs between ranks.
#[test]
fn order_and_repetition_of_evidence_do_not_matter() {
    let mut group = hgx(&[4])
        .imports(Malloc, all(4), IPC)
        .imports(Malloc, vec![(0, 1)], NO_PEER)
        .imports(PosixFd, vec![(3, 2)], FD_IMPORT);
    let plan = decide(&group.facts, &group.imports).unwrap();
    group.imports.reverse();
    assert_eq!(decide(&group.facts, &group.imports).unwrap(), plan);
    group.imports.extend_from_within(..);
    assert_eq!(decide(&group.facts, &group.imports).unwrap(), plan);
}

/// A group that imports, shares what was refused and decides again comes to rest, whatever the
/// imports answer, and never on a plan that another backend beats.
#[test]
fn deciding_again_comes_to_rest() {
    // Each bit: whether one backend connects one of the pairs (0,1), (0,2), (1,2).
    let pairs = [(0, 1), (0, 2), (1, 2)];
    let works = |world: u32, kind: BackendKind, pair: usize| {
        world >> (3 * (u32::from(kind.to_code()) - 1)) & (1 << pair) != 0
    };
    for world in 0..512 {
        let mut group = nvl(&[2, 1]);
        let mut tried = Vec::new();
        let settled = loop {
            let plan = decide(&group.facts, &group.imports).unwrap();
            if tried.last() == Some(&plan.backend) {
                break plan;
            }
            tried.push(plan.backend);
            assert!(tried.len() <= 4, "world {world:#b}: {tried:?}");
            for (i, &(a, b)) in pairs.iter().enumerate() {
                let hope = route(
                    &group.facts[a as usize],
                    &group.facts[b as usize],
                    plan.backend,
                );
                if hope == Route::Nvlink && !works(world, plan.backend, i) {
                    group = group.imports(plan.backend, vec![(b, a)], FABRIC_IMPORT);
                }
            }
        };
        let connected = |kind| {
            let reach = |&(i, &(a, b)): &(usize, &(u32, u32))| {
                let (a, b) = (&group.facts[a as usize], &group.facts[b as usize]);
                route(a, b, kind) == Route::Nvlink && works(world, kind, i)
            };
            pairs.iter().enumerate().filter(reach).count()
        };
        let best = BackendKind::ALL.into_iter().map(connected).max().unwrap();
        assert_eq!(
            connected(settled.backend),
            best,
            "world {world:#b}: {settled}"
        );
    }
}

#[test]
fn granularity_suits_every_rank() {
    let group = nvl(&[1, 1])
        .rank(0, |f| f.granularity.fabric = 2 << 20)
        .rank(1, |f| f.granularity.fabric = 32 << 20);
    assert_eq!(decide(&group.facts, &[]).unwrap().granularity, 32 << 20);
    let group = group.force(Malloc).each(|f| f.granularity.malloc = 512);
    assert_eq!(decide(&group.facts, &[]).unwrap().granularity, 512);
}

#[test]
fn refusals_are_data() {
    let group = hgx(&[3]).imports(Malloc, vec![(2, 0), (0, 2)], IPC);
    let plan = decide(&group.facts, &group.imports).unwrap();
    assert_eq!(
        plan.reason,
        Reason::ConnectsMore {
            than: Malloc,
            pairs: 3,
            than_pairs: 2
        }
    );
    let [fabric, malloc] = plan.refused.as_slice() else {
        panic!("{:?}", plan.refused);
    };
    assert_eq!((fabric.backend(), fabric.ranks()), (Fabric, vec![0, 1, 2]));
    assert_eq!(fabric.failure().unwrap().status(), Some(800));
    assert!(fabric.check().contains("channel0"));
    assert_eq!((malloc.backend(), malloc.ranks()), (Malloc, vec![0, 2]));
    assert_eq!(malloc.failure(), Some(IPC));
    assert!(malloc.check().contains("EP_ALLOC=posix-fd"));

    let group = nvl(&[1, 1]).each(|f| f.fabric = Err(nvml(15)));
    let plan = decide(&group.facts, &[]).unwrap();
    let [gap] = plan.refused.as_slice() else {
        panic!("{:?}", plan.refused);
    };
    assert!(matches!(gap, Refusal::NoClique { .. }));
    assert_eq!(gap.failure(), Some(nvml(15)));

    let error = decide(&hgx(&[2]).force(Fabric).facts, &[]).unwrap_err();
    assert_eq!(error.refused().len(), 1);
}

#[test]
fn routes() {
    // Names as in the report: s(elf), v (NVLink), w (network), - (none).
    let map = |group: &Group, kind| -> Vec<String> {
        let letter = |route| match route {
            Route::SelfRank => 's',
            Route::Nvlink => 'v',
            Route::Network => 'w',
            Route::None => '-',
        };
        let line = |a| group.facts.iter().map(move |b| letter(route(a, b, kind)));
        group.facts.iter().map(|a| line(a).collect()).collect()
    };

    let one = hgx(&[3]);
    assert_eq!(map(&one, Malloc), ["svv", "vsv", "vvs"]);
    assert_eq!(map(&one, PosixFd), ["svv", "vsv", "vvs"]);
    // Refused on trial.
    assert_eq!(map(&one, Fabric), ["s--", "-s-", "--s"]);
    // Works, and one host needs no clique.
    assert_eq!(map(&one.fabric(OK), Fabric), ["svv", "vsv", "vvs"]);

    let two = nvl(&[2, 1]);
    assert_eq!(map(&two, Fabric), ["svv", "vsv", "vvs"]);
    assert_eq!(map(&two, Malloc), ["sv-", "vs-", "--s"]);
    let two = two.each(|f| f.rdma_nics = 1);
    assert_eq!(map(&two, Malloc), ["svw", "vsw", "wws"]);
    let two = two.rank(2, |f| f.rdma_nics = 0);
    assert_eq!(map(&two, Malloc), ["sv-", "vs-", "--s"]);
    // Another clique, on the same host and on another.
    let cliques = nvl(&[2, 1]).rank(1, |f| f.fabric = clique(U1, 2));
    assert_eq!(map(&cliques, Fabric), ["s-v", "-s-", "v-s"]);
    assert_eq!(map(&cliques, PosixFd), ["sv-", "vs-", "--s"]);
    // One clique, but refused on rank 1.
    let refused = nvl(&[1, 1, 1]).rank(1, |f| f.trials.fabric = NOT_PERMITTED);
    assert_eq!(map(&refused, Fabric), ["s-v", "-s-", "v-s"]);
    // A cluster UUID of zeros connects no hosts.
    let zeros = nvl(&[1, 1]).each(|f| f.fabric = clique(Bytes16::ZERO, 1));
    assert_eq!(map(&zeros, Fabric), ["s-", "-s"]);
    // Two processes that see the same GPU, or one process with two ranks, are ranks like others.
    let same = hgx(&[2]).each(|f| {
        f.process = U1;
        f.gpu_uuid = U2;
    });
    assert_eq!(map(&same, Malloc), ["sv", "vs"]);
}

struct Row {
    name: &'static str,
    group: Group,
    backend: Option<BackendKind>,
    text: String,
}

#[derive(Debug, PartialEq)]
struct Group {
    facts: Vec<RankFacts>,
    imports: Vec<ImportRefusal>,
}

/// HGX H200 nodes with so many ranks each: the attribute is true, the driver refuses.
fn hgx(ranks: &[usize]) -> Group {
    nvl(ranks).fabric(NOT_PERMITTED).each(|f| {
        f.imex_channel = false;
        f.fabric = clique(Bytes16::ZERO, 0);
    })
}

/// Nodes of one NVL72, with so many ranks each.
fn nvl(ranks: &[usize]) -> Group {
    let placed = ranks
        .iter()
        .enumerate()
        .flat_map(|(node, &ranks)| std::iter::repeat_n(u8::try_from(node).unwrap(), ranks));
    let facts = placed.enumerate().map(|(rank, node)| RankFacts {
        rank: u32::try_from(rank).unwrap(),
        host_id: Bytes16([node + 1; 16]),
        host_name: format!("n{node}"),
        process: uuid(0x10 + rank as u8),
        gpu_uuid: uuid(0x80 + rank as u8),
        pci_bus_id: "0000:18:00.0".into(),
        fabric: clique(U1, 1),
        imex_channel: true,
        rdma_nics: 0,
        trials: ep_alloc::PerBackend::from_fn(|_| OK),
        granularity: ep_alloc::PerBackend::from_fn(|_| 2 << 20),
        choice: Choice::Auto,
    });
    Group {
        facts: facts.collect(),
        imports: Vec::new(),
    }
}

impl Group {
    fn each(mut self, change: impl Fn(&mut RankFacts)) -> Self {
        self.facts.iter_mut().for_each(change);
        self
    }

    fn rank(mut self, rank: usize, change: impl Fn(&mut RankFacts)) -> Self {
        change(&mut self.facts[rank]);
        self
    }

    fn node(self, node: u8, change: impl Fn(&mut RankFacts)) -> Self {
        let name = format!("n{node}");
        self.each(|f| {
            if f.host_name == name {
                change(f);
            }
        })
    }

    fn fabric(self, trial: Trial) -> Self {
        self.each(|f| f.trials.fabric = trial)
    }

    fn posix_fd(self, trial: Trial) -> Self {
        self.each(|f| f.trials.posix_fd = trial)
    }

    fn malloc(self, trial: Trial) -> Self {
        self.each(|f| f.trials.malloc = trial)
    }

    /// A state and status of a GPU that has a cluster UUID.
    fn state(self, state: FabricState, status: u32) -> Self {
        self.each(|f| f.fabric = info(state, status, U1, 1))
    }

    fn force(self, kind: BackendKind) -> Self {
        self.each(|f| f.choice = Choice::Force(kind))
    }

    fn imports(mut self, backend: BackendKind, pairs: Vec<(u32, u32)>, failure: Failure) -> Self {
        let imports = pairs.into_iter().map(|(importer, exporter)| ImportRefusal {
            backend,
            importer,
            exporter,
            failure,
        });
        self.imports.extend(imports);
        self
    }
}

/// Every rank from every other.
fn all(ranks: u32) -> Vec<(u32, u32)> {
    let pairs = (0..ranks).flat_map(|a| (0..ranks).map(move |b| (a, b)));
    pairs.filter(|(a, b)| a != b).collect()
}

/// Every rank of one range from every rank of the other, both ways.
fn across(one: std::ops::Range<u32>, other: std::ops::Range<u32>) -> Vec<(u32, u32)> {
    one.flat_map(|a| other.clone().flat_map(move |b| [(a, b), (b, a)]))
        .collect()
}

fn clique(cluster_uuid: Bytes16, clique_id: u32) -> Result<FabricInfo, Failure> {
    info(FabricState::Completed, 0, cluster_uuid, clique_id)
}

fn info(
    state: FabricState,
    status: u32,
    cluster_uuid: Bytes16,
    clique_id: u32,
) -> Result<FabricInfo, Failure> {
    Ok(FabricInfo {
        state,
        status,
        cluster_uuid,
        clique_id,
    })
}

fn nvml(status: u32) -> Failure {
    Failure {
        call: Call::FabricInfo,
        cause: Cause::Nvml(status),
    }
}

const fn status(call: Call, status: u32) -> Failure {
    Failure {
        call,
        cause: Cause::Status(Status(status)),
    }
}

const fn refused(call: Call, number: u32) -> Trial {
    Trial::Refused(status(call, number))
}

const fn failed(call: Call, cause: Cause) -> Trial {
    Trial::Refused(Failure { call, cause })
}

/// `6b1f0c3e-0000-4000-8000-0000000000nn`.
const fn uuid(last: u8) -> Bytes16 {
    Bytes16([
        0x6b, 0x1f, 0x0c, 0x3e, 0, 0, 0x40, 0, 0x80, 0, 0, 0, 0, 0, 0, last,
    ])
}
