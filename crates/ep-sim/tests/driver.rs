//! What the simulated driver does, and what it refuses.

use std::sync::Arc;

use ep_sim::{Cluster, Gpu, IpcNamespace, Node, PeerAccess, SimDriver};
use ep_sys::{
    DeviceOrdinal, DevicePtr, Driver, Error, GranularityKind, HandleKind, HostMemory, Link,
    PhysHandle, ShareableHandle, Status, StreamHandle,
};

const D0: DeviceOrdinal = DeviceOrdinal(0);
const D1: DeviceOrdinal = DeviceOrdinal(1);
const GRANULE: u64 = 2 << 20;

fn status<T: std::fmt::Debug>(result: Result<T, Error>) -> Status {
    result
        .expect_err("the call should be refused")
        .status()
        .expect("a driver status")
}

/// A mapping of `handle` that `device` may use.
fn map(driver: &SimDriver, device: DeviceOrdinal, handle: PhysHandle, bytes: u64) -> DevicePtr {
    let ptr = driver.mem_reserve(device, bytes, 0).unwrap();
    driver.mem_map(device, ptr, bytes, handle).unwrap();
    driver.mem_set_access(device, ptr, bytes).unwrap();
    ptr
}

fn unmap(driver: &SimDriver, device: DeviceOrdinal, ptr: DevicePtr, bytes: u64) {
    driver.mem_unmap(device, ptr, bytes).unwrap();
    driver.mem_address_free(device, ptr, bytes).unwrap();
}

fn read(driver: &SimDriver, device: DeviceOrdinal, ptr: DevicePtr, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    driver.copy_to_host(device, &mut out, ptr).unwrap();
    out
}

#[test]
fn devices_are_numbered_as_they_are_visible() {
    let cluster = Cluster::hgx_h200(8);
    let all = SimDriver::new(&cluster, 0, &[0, 1, 2, 3, 4, 5, 6, 7]);
    let two = SimDriver::new(&cluster, 0, &[5, 2]);
    let uuid = |driver: &SimDriver, n| driver.device_info(DeviceOrdinal(n)).unwrap().uuid;
    assert_eq!(two.device_count().unwrap(), 2);
    assert_eq!(uuid(&two, 0), uuid(&all, 5));
    assert_eq!(uuid(&two, 1), uuid(&all, 2));
    assert_ne!(uuid(&two, 0), uuid(&two, 1));
    assert_eq!(
        status(two.device_info(DeviceOrdinal(2))),
        Status::INVALID_DEVICE
    );
    // As with CUDA_VISIBLE_DEVICES, the list ends at a device that is not there.
    assert_eq!(
        SimDriver::new(&cluster, 0, &[1, 8, 2])
            .device_count()
            .unwrap(),
        1
    );
    assert_eq!(
        status(SimDriver::new(&cluster, 1, &[0]).device_count()),
        Status::NO_DEVICE
    );
}

#[test]
fn hosts_are_told_apart_and_processes_of_one_host_are_not() {
    let cluster = Cluster::hgx_h200_nodes(2, 4, 1);
    let host = |cluster: &Cluster, node| SimDriver::new(cluster, node, &[0]).host_facts();
    assert_eq!(host(&cluster, 0), host(&cluster, 0));
    assert_ne!(host(&cluster, 0).host_id, host(&cluster, 1).host_id);
    let other_run = cluster.clone().with_run_key(9);
    assert_ne!(host(&cluster, 0).host_id, host(&other_run, 0).host_id);
    let facts = host(&cluster, 1);
    assert_eq!(
        (facts.name.as_str(), facts.imex_channel, facts.rdma_nics),
        ("n1", false, 1)
    );
}

#[test]
fn attributes_and_fabric_information_come_from_the_description() {
    let cluster = Cluster::from_toml(
        "[[node]]\nname = \"n\"\ngpus = 1\n[node.gpu]\nfabric_attribute = false\n\
         fabric_state = \"in-progress\"\nfabric_status = 4\nclique_id = 7\n",
    )
    .unwrap();
    let driver = SimDriver::for_rank(&cluster, 0).unwrap();
    let info = driver.device_info(D0).unwrap();
    assert!(!info.fabric_attribute && info.posix_fd_attribute && info.vmm_attribute);
    let fabric = driver.fabric_info(D0).unwrap();
    assert_eq!(
        (fabric.status, fabric.clique_id, fabric.clique()),
        (4, 7, None)
    );
    let rack = SimDriver::for_rank(&Cluster::gb200_nvl72(1), 0).unwrap();
    assert_eq!(rack.fabric_info(D0).unwrap().clique().unwrap().1, 1);
    assert!(SimDriver::for_rank(&cluster, 1).is_none());
}

#[test]
fn the_attribute_says_fabric_and_the_driver_refuses_it() {
    let driver = SimDriver::for_rank(&Cluster::hgx_h200(1), 0).unwrap();
    assert!(driver.device_info(D0).unwrap().fabric_attribute);
    let refused = driver.mem_create(D0, GRANULE, HandleKind::Fabric, false);
    assert_eq!(status(refused), Status::NOT_PERMITTED);
    assert!(driver.live().is_empty());
}

#[test]
fn a_mapping_keeps_released_memory_alive() {
    let driver = SimDriver::for_rank(&Cluster::hgx_h200(1), 0).unwrap();
    for kind in [GranularityKind::Minimum, GranularityKind::Recommended] {
        assert_eq!(
            driver
                .mem_granularity(D0, HandleKind::PosixFd, kind)
                .unwrap(),
            GRANULE
        );
    }
    let handle = driver
        .mem_create(D0, GRANULE, HandleKind::PosixFd, false)
        .unwrap();
    let first = map(&driver, D0, handle, GRANULE);
    let second = map(&driver, D0, handle, GRANULE);
    driver
        .copy_to_device(D0, first.offset(5), b"seen twice")
        .unwrap();
    assert_eq!(read(&driver, D0, second.offset(5), 10), b"seen twice");
    driver.mem_release(D0, handle).unwrap();
    let live = driver.live();
    assert_eq!(
        (
            live.handles,
            live.mappings,
            live.reservations,
            live.descriptors
        ),
        (0, 2, 2, 1)
    );
    unmap(&driver, D0, first, GRANULE);
    assert_eq!(read(&driver, D0, second.offset(5), 10), b"seen twice");
    unmap(&driver, D0, second, GRANULE);
    assert!(driver.live().is_empty());
}

#[test]
fn virtual_memory_refuses_what_the_driver_refuses() {
    let driver = SimDriver::new(&Cluster::hgx_h200(2), 0, &[0, 1]);
    let create = |bytes, gdr| driver.mem_create(D0, bytes, HandleKind::PosixFd, gdr);
    assert_eq!(status(create(0, false)), Status::INVALID_VALUE);
    assert_eq!(status(create(GRANULE + 1, false)), Status::INVALID_VALUE);

    assert_eq!(status(create(GRANULE << 30, false)), Status::OUT_OF_MEMORY);
    assert_eq!(status(driver.mem_reserve(D0, 0, 0)), Status::INVALID_VALUE);
    assert_eq!(
        status(driver.mem_reserve(D0, GRANULE, 3)),
        Status::INVALID_VALUE
    );

    let handle = create(GRANULE, false).unwrap();
    let ptr = driver.mem_reserve(D0, 2 * GRANULE, 4 * GRANULE).unwrap();
    assert_eq!(ptr.0 % (4 * GRANULE), 0);
    let invalid = |result| assert_eq!(status(result), Status::INVALID_VALUE);
    invalid(driver.mem_set_access(D0, ptr, GRANULE));
    invalid(driver.mem_map(D0, ptr.offset(1), GRANULE, handle));

    invalid(driver.mem_map(D0, ptr.offset(2 * GRANULE), GRANULE, handle));
    invalid(driver.mem_map(D0, ptr, GRANULE, PhysHandle(12345)));
    driver.mem_map(D0, ptr, GRANULE, handle).unwrap();
    invalid(driver.mem_map(D0, ptr, GRANULE, handle));

    // Mapped, but open to nobody; then to one device only.
    invalid(driver.copy_to_device(D0, ptr, b"x"));
    driver.mem_set_access(D0, ptr, GRANULE).unwrap();
    driver.copy_to_device(D0, ptr, b"x").unwrap();
    invalid(driver.copy_to_device(D1, ptr, b"x"));
    driver.mem_set_access(D1, ptr, GRANULE).unwrap();
    driver.copy_to_device(D1, ptr, b"x").unwrap();
    // The end of the mapping is the end.
    invalid(driver.copy_to_device(D0, ptr.offset(GRANULE - 1), b"xy"));

    invalid(driver.mem_address_free(D0, ptr, 2 * GRANULE));
    invalid(driver.mem_unmap(D0, ptr, 3 * GRANULE));
    driver.mem_unmap(D0, ptr, 2 * GRANULE).unwrap();
    invalid(driver.mem_address_free(D0, ptr, GRANULE));
    invalid(driver.mem_address_free(D0, ptr.offset(GRANULE), GRANULE));
    driver.mem_address_free(D0, ptr, 2 * GRANULE).unwrap();
    invalid(driver.mem_address_free(D0, ptr, 2 * GRANULE));
    driver.mem_release(D0, handle).unwrap();
    invalid(driver.mem_release(D0, handle));
    assert!(driver.live().is_empty());
}

#[test]
fn memory_for_nics_is_refused_where_the_attribute_says_so() {
    let cluster = Cluster::hgx_h200(1).map_gpus(|gpu| gpu.gdr_attribute = false);
    let driver = SimDriver::for_rank(&cluster, 0).unwrap();
    assert!(!driver.device_info(D0).unwrap().gdr_vmm_attribute);
    let create = |gdr| driver.mem_create(D0, GRANULE, HandleKind::PosixFd, gdr);
    assert_eq!(status(create(true)), Status::NOT_SUPPORTED);
    create(false).unwrap();
}

#[test]
fn a_missing_attribute_means_no_such_handles() {
    let cluster = Cluster::gb200_nvl72(1).map_gpus(|gpu| {
        gpu.posix_fd_attribute = false;
        gpu.fabric_attribute = false;
    });
    let driver = SimDriver::for_rank(&cluster, 0).unwrap();
    for kind in [HandleKind::Fabric, HandleKind::PosixFd] {
        assert_eq!(
            status(driver.mem_create(D0, GRANULE, kind, false)),
            Status::NOT_SUPPORTED
        );
    }
}

#[test]
fn descriptors_share_memory_between_processes_of_a_node_only() {
    let cluster = Cluster::hgx_h200_nodes(2, 2, 0);
    let maker = SimDriver::for_rank(&cluster, 0).unwrap();
    let peer = SimDriver::for_rank(&cluster, 1).unwrap();
    let far = SimDriver::for_rank(&cluster, 2).unwrap();
    let handle = maker
        .mem_create(D0, GRANULE, HandleKind::PosixFd, false)
        .unwrap();
    let exported = maker.mem_export(D0, handle, HandleKind::PosixFd).unwrap();
    assert_eq!(
        status(maker.mem_export(D0, handle, HandleKind::Fabric)),
        Status::INVALID_VALUE,
        "exported only as what it was created for"
    );

    // Into itself, as a trial does, and into the peer.
    for importer in [&maker, &peer] {
        let imported = importer.mem_import(D0, &exported).unwrap();
        let theirs = map(importer, D0, imported, GRANULE);
        let ours = map(&maker, D0, handle, GRANULE);
        importer.copy_to_device(D0, theirs, b"there").unwrap();
        assert_eq!(read(&maker, D0, ours, 5), b"there");
        unmap(importer, D0, theirs, GRANULE);
        unmap(&maker, D0, ours, GRANULE);
        importer.mem_release(D0, imported).unwrap();
    }
    assert_eq!(status(far.mem_import(D0, &exported)), Status::UNKNOWN);

    // The descriptor alone keeps the memory.
    maker.mem_release(D0, handle).unwrap();
    assert!(maker.live().is_empty());
    let imported = peer.mem_import(D0, &exported).unwrap();
    let ptr = map(&peer, D0, imported, GRANULE);
    assert_eq!(read(&peer, D0, ptr, 5), b"there");

    let file = std::fs::File::open("/dev/null").unwrap();
    let garbage = ShareableHandle::PosixFd(file.into());
    assert_eq!(status(peer.mem_import(D0, &garbage)), Status::UNKNOWN);
}

#[test]
fn fabric_handles_cross_nodes_within_a_clique() {
    let cluster = Cluster::gb200_nvl72_cliques(2, 2);
    let maker = SimDriver::for_rank(&cluster, 0).unwrap();
    let handle = maker
        .mem_create(D0, GRANULE, HandleKind::Fabric, false)
        .unwrap();
    let ptr = map(&maker, D0, handle, GRANULE);
    maker.copy_to_device(D0, ptr, b"fabric").unwrap();
    let exported = maker.mem_export(D0, handle, HandleKind::Fabric).unwrap();

    let same_node = SimDriver::for_rank(&cluster, 3).unwrap();
    let same_clique = SimDriver::for_rank(&cluster, 7).unwrap();
    for importer in [&maker, &same_node, &same_clique] {
        let imported = importer.mem_import(D0, &exported).unwrap();
        let theirs = map(importer, D0, imported, GRANULE);
        assert_eq!(read(importer, D0, theirs, 6), b"fabric");
        unmap(importer, D0, theirs, GRANULE);
        importer.mem_release(D0, imported).unwrap();
    }

    let other_clique = SimDriver::for_rank(&cluster, 8).unwrap();
    assert_eq!(
        status(other_clique.mem_import(D0, &exported)),
        Status::INVALID_HANDLE
    );
    let other_run = SimDriver::for_rank(&cluster.clone().with_run_key(1), 1).unwrap();
    assert_eq!(
        status(other_run.mem_import(D0, &exported)),
        Status::INVALID_HANDLE
    );
    let garbage = ShareableHandle::Fabric([0x5a; 64]);
    assert_eq!(
        status(maker.mem_import(D0, &garbage)),
        Status::INVALID_VALUE
    );

    // Memory that nobody holds any more cannot be found.
    unmap(&maker, D0, ptr, GRANULE);
    maker.mem_release(D0, handle).unwrap();
    assert_eq!(
        status(same_clique.mem_import(D0, &exported)),
        Status::INVALID_HANDLE
    );
    assert!(same_clique.live().is_empty());
}

#[test]
fn fabric_imports_are_refused_as_the_file_says() {
    let fabric = |cluster: &Cluster, from, to| {
        let maker = SimDriver::for_rank(cluster, from).unwrap();
        let handle = maker
            .mem_create(D0, GRANULE, HandleKind::Fabric, false)
            .unwrap();
        let exported = maker.mem_export(D0, handle, HandleKind::Fabric).unwrap();
        SimDriver::for_rank(cluster, to)
            .unwrap()
            .mem_import(D0, &exported)
    };
    let rack = Cluster::gb200_nvl72(2);
    fabric(&rack, 0, 4).unwrap();

    // Importing from a peer fails; a trial with itself does not notice.
    let broken = rack
        .clone()
        .map_gpus(|gpu| gpu.import_fabric = Status::UNKNOWN);
    assert_eq!(status(fabric(&broken, 0, 4)), Status::UNKNOWN);
    fabric(&broken, 0, 0).unwrap();

    let mut no_channel = rack.clone();
    no_channel.nodes[1].imex_channel = false;
    assert_eq!(status(fabric(&no_channel, 0, 4)), Status::NOT_SUPPORTED);
    assert_eq!(status(fabric(&no_channel, 4, 0)), Status::INVALID_HANDLE);

    let no_cluster = rack
        .clone()
        .map_gpus(|gpu| gpu.cluster_uuid = ep_sys::Bytes16::ZERO);
    assert_eq!(status(fabric(&no_cluster, 0, 4)), Status::INVALID_HANDLE);
    fabric(&no_cluster, 0, 1).unwrap();

    let unfinished = rack.map_gpus(|gpu| gpu.fabric_status = 3);
    assert_eq!(status(fabric(&unfinished, 0, 4)), Status::INVALID_HANDLE);
}

#[test]
fn links_are_those_of_both_gpus_where_they_can_be_seen() {
    let uuids = |cluster: &Cluster| {
        let all = SimDriver::new(cluster, 0, &[0, 1, 2]);
        [0, 1, 2].map(|gpu| all.device_info(DeviceOrdinal(gpu)).unwrap().uuid)
    };
    let links = |cluster: &Cluster, visible: &[u32]| {
        let driver = SimDriver::new(cluster, 0, visible);
        driver.peer_links(D0, &uuids(cluster)).unwrap()
    };
    let mut cluster = Cluster::hgx_h200(3);
    cluster.nodes[0].gpus[2].peer_access = PeerAccess::Pcie;
    // Not of itself.
    let of_0 = [Link::Unknown, Link::Nvlink, Link::Pcie];
    assert_eq!(links(&cluster, &[0]), of_0);
    let of_2 = [Link::Pcie, Link::Pcie, Link::Unknown];
    assert_eq!(links(&cluster, &[2]), of_2);
    let both = SimDriver::new(&cluster, 0, &[0, 2]);
    assert!(both.can_access_peer(D0, D1).unwrap());

    let private = cluster.map_nodes(|node| node.ipc_namespace = IpcNamespace::Private);
    assert_eq!(links(&private, &[1]), [Link::Unknown; 3]);
    let seen = [Link::Nvlink, Link::Unknown, Link::Unknown];
    assert_eq!(links(&private, &[1, 0]), seen);
    let driver = SimDriver::new(&private, 0, &[0]);
    let elsewhere = uuids(&Cluster::gb200_nvl72(1));
    assert_eq!(
        driver.peer_links(D0, &elsewhere).unwrap(),
        [Link::Unknown; 3]
    );
}

#[test]
fn access_to_a_peer_needs_peer_access() {
    let closed = Cluster::hgx_h200(2).map_gpus(|gpu| gpu.peer_access = PeerAccess::None);
    let maker = SimDriver::for_rank(&closed, 0).unwrap();
    let peer = SimDriver::for_rank(&closed, 1).unwrap();
    let handle = maker
        .mem_create(D0, GRANULE, HandleKind::PosixFd, false)
        .unwrap();
    let exported = maker.mem_export(D0, handle, HandleKind::PosixFd).unwrap();
    let imported = peer.mem_import(D0, &exported).unwrap();
    let ptr = peer.mem_reserve(D0, GRANULE, 0).unwrap();
    peer.mem_map(D0, ptr, GRANULE, imported).unwrap();
    assert_eq!(
        status(peer.mem_set_access(D0, ptr, GRANULE)),
        Status::NOT_SUPPORTED
    );

    let plain = maker.mem_alloc(D0, 64).unwrap();
    let ipc = maker.ipc_get_handle(D0, plain).unwrap();
    assert_eq!(
        status(peer.ipc_open(D0, &ipc)),
        Status::PEER_ACCESS_UNSUPPORTED
    );

    let both = SimDriver::new(&closed, 0, &[0, 1]);
    assert!(!both.can_access_peer(D0, D1).unwrap());
    assert_eq!(
        status(both.enable_peer_access(D0, D1)),
        Status::PEER_ACCESS_UNSUPPORTED
    );

    let open = SimDriver::new(&Cluster::hgx_h200(2), 0, &[0, 1]);
    assert!(open.can_access_peer(D0, D1).unwrap());
    assert!(!open.can_access_peer(D0, D0).unwrap());
    open.enable_peer_access(D0, D1).unwrap();
    open.enable_peer_access(D0, D1).unwrap();
    assert_eq!(
        status(open.enable_peer_access(D0, D0)),
        Status::PEER_ACCESS_UNSUPPORTED
    );
}

#[test]
fn plain_memory_is_charged_and_freed_once() {
    let driver = SimDriver::new(&Cluster::hgx_h200(2), 0, &[0, 1]);
    let (free, total) = driver.mem_info(D0).unwrap();
    assert_eq!(free, total);
    let ptr = driver.mem_alloc(D0, 1 << 30).unwrap();
    assert!(!ptr.is_null() && ptr.0.is_multiple_of(256));
    assert_eq!(driver.mem_info(D0).unwrap(), (total - (1 << 30), total));
    assert_eq!(driver.mem_info(D1).unwrap().0, total);
    assert_eq!(status(driver.mem_alloc(D0, total)), Status::OUT_OF_MEMORY);
    assert_eq!(status(driver.mem_alloc(D0, 0)), Status::INVALID_VALUE);
    assert_eq!(
        status(driver.mem_free(D0, ptr.offset(256))),
        Status::INVALID_VALUE
    );
    driver.mem_free(D0, ptr).unwrap();
    assert_eq!(status(driver.mem_free(D0, ptr)), Status::INVALID_VALUE);
    assert_eq!(driver.mem_info(D0).unwrap(), (total, total));
    assert_eq!(
        status(driver.copy_to_device(D0, ptr, b"x")),
        Status::INVALID_VALUE
    );
}

#[test]
fn ipc_opens_in_another_process_of_the_node_and_counts() {
    let cluster = Cluster::hgx_h200_nodes(2, 2, 0);
    let maker = SimDriver::for_rank(&cluster, 0).unwrap();
    let peer = SimDriver::for_rank(&cluster, 1).unwrap();
    let far = SimDriver::for_rank(&cluster, 2).unwrap();
    let ptr = maker.mem_alloc(D0, 4096).unwrap();
    let handle = maker.ipc_get_handle(D0, ptr).unwrap();

    assert_eq!(status(maker.ipc_open(D0, &handle)), Status::INVALID_CONTEXT);
    assert_eq!(status(far.ipc_open(D0, &handle)), Status::INVALID_VALUE);
    assert_eq!(status(peer.ipc_open(D0, &[7; 64])), Status::INVALID_VALUE);
    assert_eq!(maker.ipc_get_handle(D0, ptr.offset(256)).unwrap(), handle);

    let first = peer.ipc_open(D0, &handle).unwrap();
    assert_eq!(peer.ipc_open(D0, &handle).unwrap(), first);
    assert_eq!(peer.live().ipc, 2);
    peer.copy_to_device(D0, first, b"over ipc").unwrap();
    assert_eq!(read(&maker, D0, ptr, 8), b"over ipc");
    assert_eq!(status(peer.mem_free(D0, first)), Status::INVALID_VALUE);
    peer.ipc_close(D0, first).unwrap();
    assert_eq!(read(&peer, D0, first, 8), b"over ipc");
    peer.ipc_close(D0, first).unwrap();
    assert_eq!(status(peer.ipc_close(D0, first)), Status::INVALID_VALUE);
    assert!(peer.live().is_empty());

    maker.mem_free(D0, ptr).unwrap();
    assert_eq!(status(peer.ipc_open(D0, &handle)), Status::INVALID_VALUE);
}

#[test]
fn a_private_namespace_has_no_ipc() {
    let cluster = Cluster::hgx_h200(2).map_nodes(|node| node.ipc_namespace = IpcNamespace::Private);
    let maker = SimDriver::for_rank(&cluster, 0).unwrap();
    let ptr = maker.mem_alloc(D0, 4096).unwrap();
    let handle = maker.ipc_get_handle(D0, ptr).unwrap();
    let peer = SimDriver::for_rank(&cluster, 1).unwrap();
    assert_eq!(status(peer.ipc_open(D0, &handle)), Status::INVALID_VALUE);
}

#[test]
fn handles_of_one_kind_are_not_of_another() {
    let cluster = Cluster::gb200_nvl72(1);
    let maker = SimDriver::for_rank(&cluster, 0).unwrap();
    let peer = SimDriver::for_rank(&cluster, 1).unwrap();
    let ptr = maker.mem_alloc(D0, 4096).unwrap();
    let ipc = maker.ipc_get_handle(D0, ptr).unwrap();
    let physical = maker
        .mem_create(D0, GRANULE, HandleKind::Fabric, false)
        .unwrap();
    let ShareableHandle::Fabric(fabric) =
        maker.mem_export(D0, physical, HandleKind::Fabric).unwrap()
    else {
        panic!("a fabric handle");
    };
    assert_eq!(
        status(peer.mem_import(D0, &ShareableHandle::Fabric(ipc))),
        Status::INVALID_VALUE
    );
    assert_eq!(status(peer.ipc_open(D0, &fabric)), Status::INVALID_VALUE);
    let mapped = map(&maker, D0, physical, GRANULE);
    assert_eq!(
        status(maker.ipc_get_handle(D0, mapped)),
        Status::INVALID_VALUE
    );
}

#[test]
fn copies_of_any_length_and_alignment_are_exact() {
    let driver = SimDriver::new(&Cluster::hgx_h200(1), 0, &[0]);
    let a = driver.mem_alloc(D0, 4096).unwrap();
    let b = driver.mem_alloc(D0, 4096).unwrap();
    let source: Vec<u8> = (0..=255).cycle().take(64).collect();
    for offset in 0..9 {
        for bytes in 0..33_usize {
            driver.fill(D0, a, 0xee, 128, StreamHandle(0)).unwrap();
            driver
                .copy_to_device(D0, a.offset(offset), &source[..bytes])
                .unwrap();
            let at = usize::try_from(offset).unwrap();
            let mut expected = vec![0xee; 128];
            expected[at..at + bytes].copy_from_slice(&source[..bytes]);
            assert_eq!(
                read(&driver, D0, a, 128),
                expected,
                "{bytes} bytes at {offset}"
            );
            assert_eq!(read(&driver, D0, a.offset(offset), bytes), &source[..bytes]);

            driver.fill(D0, b, 0x11, 128, StreamHandle(0)).unwrap();
            let (to, from) = (b.offset(3), a.offset(offset));
            driver
                .copy_on_device(D0, to, from, bytes as u64, StreamHandle(0))
                .unwrap();
            let mut expected = vec![0x11; 128];
            expected[3..3 + bytes].copy_from_slice(&source[..bytes]);
            assert_eq!(read(&driver, D0, b, 128), expected);

            driver
                .fill(D0, a.offset(offset), 0x77, bytes as u64, StreamHandle(0))
                .unwrap();
            let mut expected = vec![0xee; 128];
            expected[at..at + bytes].fill(0x77);
            assert_eq!(read(&driver, D0, a, 128), expected);
        }
    }
    // Larger than one bounce.
    let large = (3 << 20) + 5;
    let (x, y) = (
        driver.mem_alloc(D0, large).unwrap(),
        driver.mem_alloc(D0, large).unwrap(),
    );
    let pattern: Vec<u8> = (0..large).map(|i| (i % 251) as u8).collect();
    driver.copy_to_device(D0, x, &pattern).unwrap();
    driver
        .copy_on_device(D0, y, x, large, StreamHandle(0))
        .unwrap();
    assert_eq!(read(&driver, D0, y, pattern.len()), pattern);
}

#[test]
fn host_memory_is_zeroed_and_loads_are_checked() {
    let driver = SimDriver::new(&Cluster::hgx_h200(1), 0, &[0]);
    let memory = driver.host_alloc(D0, 64).unwrap();
    for offset in (0..64).step_by(8) {
        assert_eq!(driver.host_load(memory, offset).unwrap(), 0);
    }
    driver
        .copy_to_device(D0, memory.device.offset(8), &42_u64.to_ne_bytes())
        .unwrap();
    assert_eq!(driver.host_load(memory, 8).unwrap(), 42);
    assert_eq!(status(driver.host_load(memory, 64)), Status::INVALID_VALUE);
    assert_eq!(status(driver.host_load(memory, 12)), Status::INVALID_VALUE);
    assert_eq!(
        status(driver.host_load(memory, u64::MAX - 7)),
        Status::INVALID_VALUE
    );
    assert_eq!(status(driver.host_alloc(D0, 0)), Status::INVALID_VALUE);
    driver.host_free(D0, memory).unwrap();
    assert_eq!(status(driver.host_free(D0, memory)), Status::INVALID_VALUE);
    assert_eq!(status(driver.host_load(memory, 0)), Status::INVALID_VALUE);
    let null = HostMemory {
        host: 0,
        device: DevicePtr::NULL,
        bytes: 64,
    };
    assert_eq!(status(driver.host_load(null, 0)), Status::INVALID_VALUE);
    assert!(driver.live().is_empty());
}

#[test]
fn streams_and_events_belong_to_a_device() {
    let driver = SimDriver::new(&Cluster::hgx_h200(2), 0, &[0, 1]);
    let stream = driver.stream_create(D0).unwrap();
    driver.stream_synchronize(D0, stream).unwrap();
    driver.stream_synchronize(D1, StreamHandle(0)).unwrap();
    // Waiting for a stream needs no device, putting work on it does.
    driver.stream_synchronize(D1, stream).unwrap();
    let memory = driver.mem_alloc(D1, 64).unwrap();
    let filled = driver.fill(D1, memory, 0, 64, stream);
    assert_eq!(status(filled), Status::INVALID_HANDLE);
    driver.mem_free(D1, memory).unwrap();

    let start = driver.event_create(D0, true).unwrap();
    let end = driver.event_create(D0, true).unwrap();
    let untimed = driver.event_create(D0, false).unwrap();
    driver.stream_wait_event(D0, stream, start).unwrap();
    assert_eq!(
        status(driver.event_elapsed_us(D0, start, end)),
        Status::INVALID_HANDLE
    );
    for event in [start, end, untimed] {
        driver.event_record(D0, event, stream).unwrap();
        driver.event_synchronize(D0, event).unwrap();
    }
    assert!(driver.event_elapsed_us(D0, start, end).unwrap() >= 0.0);
    assert_eq!(
        status(driver.event_elapsed_us(D0, start, untimed)),
        Status::INVALID_HANDLE
    );
    let foreign = driver.stream_create(D1).unwrap();
    assert_eq!(
        status(driver.event_record(D0, start, foreign)),
        Status::INVALID_HANDLE
    );

    let live = driver.live();
    assert_eq!((live.streams, live.events, live.total()), (2, 3, 5));
    for event in [start, end, untimed] {
        driver.event_destroy(D0, event).unwrap();
    }
    assert_eq!(
        status(driver.event_destroy(D0, end)),
        Status::INVALID_HANDLE
    );
    driver.stream_destroy(D0, stream).unwrap();
    driver.stream_destroy(D1, foreign).unwrap();
    assert_eq!(
        status(driver.stream_destroy(D0, stream)),
        Status::INVALID_HANDLE
    );
    assert!(driver.live().is_empty());
}

#[test]
fn every_call_checks_its_device() {
    let driver = SimDriver::new(&Cluster::hgx_h200(1), 0, &[0]);
    let ptr = driver.mem_alloc(D0, 64).unwrap();
    let invalid = |status| assert_eq!(status, Status::INVALID_DEVICE);
    invalid(status(driver.mem_alloc(D1, 64)));
    invalid(status(driver.mem_free(D1, ptr)));
    invalid(status(driver.mem_create(
        D1,
        GRANULE,
        HandleKind::PosixFd,
        false,
    )));
    invalid(status(driver.mem_reserve(D1, GRANULE, 0)));
    invalid(status(driver.mem_info(D1)));
    invalid(status(driver.host_alloc(D1, 64)));
    invalid(status(driver.stream_create(D1)));
    invalid(status(driver.event_create(D1, true)));
    invalid(status(driver.copy_to_device(D1, ptr, &[])));
    invalid(status(driver.can_access_peer(D0, D1)));
    match driver.fabric_info(D1) {
        Err(Error::Nvml { device, .. }) => assert_eq!(device, D1),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_rack_in_one_process_connects_every_pair() {
    let cluster = Cluster::gb200_nvl72(18);
    let ranks: Vec<Arc<SimDriver>> = (0..72)
        .map(|rank| SimDriver::for_rank(&cluster, rank).unwrap())
        .collect();
    let mut own = Vec::new();
    for driver in &ranks {
        let handle = driver
            .mem_create(D0, GRANULE, HandleKind::Fabric, false)
            .unwrap();
        let ptr = map(driver, D0, handle, GRANULE);
        own.push((
            driver.mem_export(D0, handle, HandleKind::Fabric).unwrap(),
            ptr,
        ));
    }
    // Every rank writes its number into its slot at every rank.
    for (rank, driver) in (0_u64..).zip(&ranks) {
        for (exported, _) in &own {
            let imported = driver.mem_import(D0, exported).unwrap();
            let theirs = map(driver, D0, imported, GRANULE);
            let slot = theirs.offset(8 * rank);
            driver
                .copy_to_device(D0, slot, &(rank + 1).to_ne_bytes())
                .unwrap();
        }
    }
    for (driver, (_, ptr)) in ranks.iter().zip(&own) {
        let slots = read(driver, D0, *ptr, 72 * 8);
        for (rank, slot) in (0_u64..).zip(slots.chunks_exact(8)) {
            assert_eq!(slot, (rank + 1).to_ne_bytes());
        }
        let live = driver.live();
        assert_eq!((live.handles, live.mappings), (73, 73));
        assert_eq!(live.descriptors, 72);
    }
}

#[test]
fn nodes_may_differ() {
    let small = Node::new("small", Gpu::default(), 1);
    let cluster = Cluster::hgx_h200(4).with_node(small);
    let driver = SimDriver::for_rank(&cluster, 4).unwrap();
    assert_eq!(driver.host_facts().name, "small");
    assert_eq!(driver.device_count().unwrap(), 1);
}

#[test]
fn threads_share_a_driver() {
    let driver = SimDriver::new(&Cluster::hgx_h200(4), 0, &[0, 1, 2, 3]);
    std::thread::scope(|scope| {
        for device in (0..4).map(DeviceOrdinal) {
            let driver = &driver;
            scope.spawn(move || {
                for round in 0..50_u8 {
                    let handle = driver
                        .mem_create(device, GRANULE, HandleKind::PosixFd, false)
                        .unwrap();
                    let ptr = map(driver, device, handle, GRANULE);
                    let plain = driver.mem_alloc(device, 4096).unwrap();
                    driver
                        .fill(device, ptr, round, 4096, StreamHandle(0))
                        .unwrap();
                    driver
                        .copy_on_device(device, plain, ptr, 4096, StreamHandle(0))
                        .unwrap();
                    assert_eq!(read(driver, device, plain, 4096), [round; 4096]);
                    unmap(driver, device, ptr, GRANULE);
                    driver.mem_release(device, handle).unwrap();
                    driver.mem_free(device, plain).unwrap();
                }
            });
        }
    });
    assert!(driver.live().is_empty());
    let (free, total) = driver.mem_info(D0).unwrap();
    assert_eq!(free, total);
}
