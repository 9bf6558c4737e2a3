//! What this process sees of its host, read from the file systems of the kernel.

use std::fs;
use std::path::Path;

use crate::{Bytes16, HostFacts};

pub(crate) fn facts() -> HostFacts {
    let name = read("/proc/sys/kernel/hostname").unwrap_or_else(|| "unknown".into());
    let boot_id = read("/proc/sys/kernel/random/boot_id");
    HostFacts {
        // Sandboxes may hide the boot id. A host's name tells hosts apart too, if less surely.
        host_id: boot_id
            .and_then(|id| uuid(&id))
            .unwrap_or_else(|| digest(&name)),
        name,
        imex_channel: imex_channel(Path::new("/dev/nvidia-caps-imex-channels")),
        rdma_nics: rdma_nics(Path::new("/sys/class/infiniband")),
    }
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}

/// The paths in a folder; none if it cannot be read.
fn entries(folder: &Path) -> impl Iterator<Item = std::path::PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path())
}

fn imex_channel(folder: &Path) -> bool {
    entries(folder).any(|path| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().starts_with("channel")
    })
}

/// NICs of which a port is active.
fn rdma_nics(folder: &Path) -> u32 {
    let active = |port: std::path::PathBuf| {
        // Reads "4: ACTIVE".
        read(port.join("state")).is_some_and(|state| state.ends_with(": ACTIVE"))
    };
    entries(folder)
        .filter(|nic| entries(&nic.join("ports")).any(active))
        .count() as u32
}

/// The bytes of a UUID in its usual form.
fn uuid(text: &str) -> Option<Bytes16> {
    let hex = text.replace('-', "");
    (hex.len() == 32).then_some(())?;
    u128::from_str_radix(&hex, 16)
        .ok()
        .map(|n| Bytes16(n.to_be_bytes()))
}

/// FNV-1a of 128 bits.
fn digest(text: &str) -> Bytes16 {
    let hash = text.bytes().fold(
        0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128,
        |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(0x0100_0000_0000_0000_0000_013b),
    );
    Bytes16(hash.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of files, removed with this value.
    struct Tree(std::path::PathBuf);

    impl Tree {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let pid = std::process::id();
            let tree = Self(std::env::temp_dir().join(format!("ep-sys-{name}-{pid}")));
            for (path, text) in files {
                let path = tree.0.join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            tree
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn facts_are_of_this_host_and_stable() {
        let facts = facts();
        assert!(!facts.name.is_empty());
        assert!(!facts.host_id.is_zero());
        assert_eq!(facts, super::facts());
    }

    #[test]
    fn a_boot_id_is_read_as_its_bytes() {
        let id = uuid("0123abcd-4567-89ef-0011-aabbccddeeff").unwrap();
        assert_eq!(id.to_string(), "0123abcd-4567-89ef-0011-aabbccddeeff");
        for bad in ["", "0123", "0123abcd-4567-89ef-0011-aabbccddeefg"] {
            assert_eq!(uuid(bad), None, "{bad}");
        }
    }

    #[test]
    fn digests_tell_hosts_apart() {
        // FNV-1a's published value for "a".
        let a = 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964_u128;
        assert_eq!(digest("a"), Bytes16(a.to_be_bytes()));
        assert_ne!(digest("node-1"), digest("node-2"));
    }

    #[test]
    fn a_nic_counts_once_and_only_with_an_active_port() {
        let tree = Tree::new(
            "infiniband",
            &[
                ("mlx5_0/ports/1/state", "4: ACTIVE\n"),
                ("mlx5_0/ports/2/state", "4: ACTIVE\n"),
                ("mlx5_1/ports/1/state", "1: DOWN\n"),
                ("mlx5_2/ports/1/state", "1: DOWN\n"),
                ("mlx5_2/ports/2/state", "4: ACTIVE\n"),
                ("mlx5_3/node_type", "1: CA\n"),
            ],
        );
        assert_eq!(rdma_nics(&tree.0), 2);
        assert_eq!(rdma_nics(&tree.0.join("absent")), 0);
    }

    #[test]
    fn an_imex_channel_is_seen_by_its_node() {
        let tree = Tree::new("imex", &[("channel0", ""), ("other/file", "")]);
        assert!(imex_channel(&tree.0));
        assert!(!imex_channel(&tree.0.join("other")));
        assert!(!imex_channel(&tree.0.join("absent")));
    }
}
