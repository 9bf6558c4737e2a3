//! Files that describe simulated clusters.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::time::SystemTime;

use ep_sim::{Cluster, ClusterError};

/// Why there is no cluster.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum ClusterFileError {
    #[error("{path} cannot be read; check the argument of --cluster")]
    Unreadable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} describes no cluster")]
    Malformed {
        path: PathBuf,
        #[source]
        source: ClusterError,
    },
}

/// A file's text, for other processes, and the cluster that it describes.
pub(crate) fn read(path: &Path) -> Result<(String, Cluster), ClusterFileError> {
    let path = || path.to_owned();
    let text = fs::read_to_string(path()).map_err(|source| ClusterFileError::Unreadable {
        path: path(),
        source,
    })?;
    match Cluster::from_toml(&text) {
        Ok(cluster) => Ok((text, cluster)),
        Err(source) => Err(ClusterFileError::Malformed {
            path: path(),
            source,
        }),
    }
}

/// What keeps a run's simulated memory apart from other runs'.
pub(crate) fn run_key() -> u64 {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    (now.as_nanos() as u64).rotate_left(32) ^ u64::from(process::id())
}
