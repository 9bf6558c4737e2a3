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
