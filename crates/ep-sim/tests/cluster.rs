//! The cluster file and the presets.

use ep_sim::{Cluster, ClusterError, Gpu, IpcNamespace, Node, PeerAccess};
use ep_sys::{Bytes16, FabricState, Status};

const FULL: &str = r#"
[[node]]
name = "n0"
imex_channel = true          # an IMEX channel device node is visible
nics = 2                     # usable RDMA NICs
ipc_namespace = "private"    # shared | private
gpus = 4                     # shorthand
[node.gpu]
fabric_attribute = false
posix_fd_attribute = false
fabric_state = "in-progress"
fabric_status = 3
cluster_uuid = "6b1f0c3e-0000-4000-8000-000000000001"
clique_id = 1
create_fabric = 0
import_fabric = 999
peer_access = "none"
"#;

fn refusal(text: &str) -> ClusterError {
    Cluster::from_toml(text).expect_err(text)
}

#[test]
fn every_key_is_read() {
    let cluster = Cluster::from_toml(FULL).unwrap();
    let mut uuid = [0; 16];
    uuid[..4].copy_from_slice(&[0x6b, 0x1f, 0x0c, 0x3e]);
    (uuid[6], uuid[8], uuid[15]) = (0x40, 0x80, 1);
    let gpu = Gpu {
        fabric_attribute: false,
        posix_fd_attribute: false,
        fabric_state: FabricState::InProgress,
        fabric_status: 3,
        cluster_uuid: Bytes16(uuid),
        clique_id: 1,
        create_fabric: Status::SUCCESS,
        import_fabric: Status::UNKNOWN,
        peer_access: PeerAccess::None,
        ..Gpu::default()
    };
    let node = Node {
        imex_channel: true,
        nics: 2,
        ipc_namespace: IpcNamespace::Private,
        ..Node::new("n0", gpu, 4)
    };
    assert_eq!(cluster, Cluster::default().with_node(node));
}

#[test]
fn the_defaults_are_an_ordinary_hgx_h200() {
    let cluster = Cluster::from_toml("[[node]]\nname = \"n0\"\ngpus = 8\n").unwrap();
    assert_eq!(cluster, Cluster::hgx_h200(8));
    let node = &cluster.nodes[0];
    assert_eq!(
        (node.imex_channel, node.nics, node.ipc_namespace),
        (false, 0, IpcNamespace::Shared)
    );
    let gpu = &node.gpus[0];
    assert!(gpu.fabric_attribute && gpu.posix_fd_attribute);
    assert_eq!(
        (gpu.fabric_state, gpu.fabric_status),
        (FabricState::Completed, 0)
    );
    assert_eq!((gpu.cluster_uuid, gpu.clique_id), (Bytes16::ZERO, 0));
    assert_eq!(
        (gpu.create_fabric, gpu.import_fabric),
        (Status(800), Status(0))
    );
    assert_eq!(gpu.peer_access, PeerAccess::All);
}

#[test]
fn an_empty_gpu_table_and_inline_tables_are_the_same_file() {
    let spelled = "[[node]]\nname = \"n0\"\ngpus = 8\n[node.gpu]\n";
    let inline = "node = [{ name = \"n0\", gpus = 8, gpu = {} }]";
    assert_eq!(Cluster::from_toml(spelled).unwrap(), Cluster::hgx_h200(8));
    assert_eq!(Cluster::from_toml(inline).unwrap(), Cluster::hgx_h200(8));
}

#[test]
fn an_unknown_key_is_named_with_its_line() {
    for (text, at, name) in [
        ("nodes = 1\n", 1, "nodes"),
        (
            "# a comment\n[[node]]\nname = \"a\"\ngpus = 1\nnic = 1\n",
            5,
            "nic",
        ),
        (
            "[[node]]\nname = \"a\"\ngpus = 1\n[node.gpu]\nfabric = true\n",
            5,
            "fabric",
        ),
        // The first in the file, not in the alphabet.
        (
            "[[node]]\nname = \"a\"\nzeta = 1\nalpha = 1\ngpus = 1\n",
            3,
            "zeta",
        ),
        (
            "[[node]]\nname = \"a\"\ngpus = 1\n[[node.gpus_list]]\n",
            4,
            "gpus_list",
        ),
        (
            "[[node]]\nname = \"a\"\ngpus = 1\n[[node]]\nname = \"b\"\ngpus = 1\nx = 2\n",
            7,
            "x",
        ),
    ] {
        let error = refusal(text);
        match &error {
            ClusterError::UnknownKey { line, key, .. } => {
                assert_eq!((*line, key.as_str()), (at, name), "{text}");
            }
            other => panic!("{text}: {other}"),
        }
        let words = error.to_string();
        assert!(
            words.contains(&format!("line {at}")) && words.contains(name),
            "{words}"
        );
    }
}

#[test]
fn a_file_without_nodes_is_refused() {
    for text in ["", "\n# nothing\n", "node = []"] {
        assert_eq!(refusal(text), ClusterError::NoNodes);
    }
}

#[test]
fn missing_keys_are_named_with_the_line_of_their_node() {
    let text = "[[node]]\nname = \"a\"\ngpus = 1\n\n[[node]]\nname = \"b\"\n";
    assert_eq!(
        refusal(text),
        ClusterError::MissingKey {
            line: 5,
            key: "gpus"
        }
    );
    assert_eq!(
        refusal("[[node]]\ngpus = 1\n"),
        ClusterError::MissingKey {
            line: 1,
            key: "name"
        }
    );
}

#[test]
fn bad_values_are_named_with_their_line() {
    let node = "[[node]]\nname = \"a\"\ngpus = 1\n";
    for (text, at, name) in [
        ("[[node]]\nname = 3\ngpus = 1\n".to_owned(), 2, "name"),
        ("[[node]]\nname = \"\"\ngpus = 1\n".to_owned(), 2, "name"),
        ("[[node]]\nname = \"a\"\ngpus = 0\n".to_owned(), 3, "gpus"),
        (
            "[[node]]\nname = \"a\"\ngpus = 4000000000\n".to_owned(),
            3,
            "gpus",
        ),
        ("[[node]]\nname = \"a\"\ngpus = -1\n".to_owned(), 3, "gpus"),
        (format!("{node}imex_channel = 1\n"), 4, "imex_channel"),
        (format!("{node}nics = \"two\"\n"), 4, "nics"),
        (
            format!("{node}ipc_namespace = \"host\"\n"),
            4,
            "ipc_namespace",
        ),
        (format!("{node}gpu = 1\n"), 4, "gpu"),
        (
            format!("{node}[node.gpu]\nfabric_state = \"done\"\n"),
            5,
            "fabric_state",
        ),
        (
            format!("{node}[node.gpu]\ncluster_uuid = \"6b1f\"\n"),
            5,
            "cluster_uuid",
        ),
        (
            format!("{node}[node.gpu]\ncluster_uuid = \"6b1f0c3e0-000-4000-8000-000000000001\"\n"),
            5,
            "cluster_uuid",
        ),
        (
            format!("{node}[node.gpu]\nclique_id = 4294967296\n"),
            5,
            "clique_id",
        ),
        (
            format!("{node}[node.gpu]\ncreate_fabric = 8.0\n"),
            5,
            "create_fabric",
        ),
        (
            format!("{node}[node.gpu]\npeer_access = true\n"),
            5,
            "peer_access",
        ),
        ("\nnode = 4\n".to_owned(), 2, "node"),
        ("node = [1]\n".to_owned(), 1, "node"),
    ] {
        match refusal(&text) {
            ClusterError::BadValue { line, key, .. } => {
                assert_eq!((line, key), (at, name), "{text}")
            }
            other => panic!("{text}: {other}"),
        }
    }
}

#[test]
fn bad_syntax_has_its_line() {
    match refusal("[[node]]\nname = \"a\"\ngpus = = 1\n") {
        ClusterError::Syntax { line, .. } => assert_eq!(line, 3),
        other => panic!("{other}"),
    }
    match refusal("[[node]]\nname = \"a\"\nname = \"b\"\n") {
        ClusterError::Syntax { line, .. } => assert_eq!(line, 3),
        other => panic!("{other}"),
    }
}

#[test]
fn a_uuid_may_be_written_without_hyphens() {
    let text = "[[node]]\nname = \"a\"\ngpus = 1\n[node.gpu]\n\
                cluster_uuid = \"6B1F0C3E000040008000000000000001\"\n";
    let cluster = Cluster::from_toml(text).unwrap();
    let uuid = cluster.nodes[0].gpus[0].cluster_uuid.to_string();
    assert_eq!(uuid, "6b1f0c3e-0000-4000-8000-000000000001");
}

#[test]
fn ranks_are_placed_one_per_gpu_in_file_order() {
    let cluster = Cluster::default()
        .with_node(Node::new("a", Gpu::default(), 2))
        .with_node(Node::new("b", Gpu::default(), 1))
        .with_node(Node::new("c", Gpu::default(), 3));
    assert_eq!(cluster.ranks(), 6);
    let places: Vec<_> = (0..7).map(|rank| cluster.place(rank)).collect();
    assert_eq!(
        places,
        [
            Some((0, 0)),
            Some((0, 1)),
            Some((1, 0)),
            Some((2, 0)),
            Some((2, 1)),
            Some((2, 2)),
            None
        ]
    );
}

#[test]
fn the_identity_follows_description_and_run_key() {
    let cluster = Cluster::gb200_nvl72(18);
    assert_eq!(cluster.id(), Cluster::gb200_nvl72(18).id());
    assert_ne!(cluster.id(), Cluster::gb200_nvl72(17).id());
    assert_ne!(cluster.id(), cluster.clone().with_run_key(1).id());
    assert_ne!(
        cluster.id(),
        cluster.clone().map_gpus(|gpu| gpu.clique_id = 2).id()
    );
}

#[test]
fn racks_are_cliques_that_only_the_uuid_tells_apart() {
    let cluster = Cluster::gb200_nvl72_cliques(2, 18);
    assert_eq!(cluster.ranks(), 144);
    let (first, second) = (&cluster.nodes[0].gpus[0], &cluster.nodes[18].gpus[0]);
    assert_eq!(first.clique_id, second.clique_id);
    assert_ne!(first.cluster_uuid, second.cluster_uuid);
    assert_eq!(cluster.nodes[17].gpus[3].cluster_uuid, first.cluster_uuid);
}

#[test]
fn no_damaged_file_panics() {
    // Xorshift: the same damage in every run.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let pieces = [
        "[[", "]]", "\"", "=", "\n", "-1", "é", "node", ".", "{", "}", "gpu", "\0", "1e9",
    ];
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..5_000 {
        let mut text = FULL.to_owned();
        for _ in 0..=random(3) {
            let mut at = random(text.len());
            while !text.is_char_boundary(at) {
                at -= 1;
            }
            match random(3) {
                0 => text.truncate(at),
                1 => drop(text.remove(at.min(text.len() - 1))),
                _ => text.insert_str(at, pieces[random(pieces.len())]),
            }
            if text.is_empty() {
                break;
            }
        }
        match Cluster::from_toml(&text) {
            Ok(cluster) => {
                assert!(cluster.ranks() > 0);
                accepted += 1;
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
        }
    }
    assert!(
        accepted > 100 && refused > 100,
        "{accepted} accepted, {refused} refused"
    );
}
