//! Where a run takes place: on GPUs, or on a simulated cluster.

use std::fmt;
use std::path::Path;

use ep::Device;
use ep::driver::DeviceOrdinal;
#[cfg(feature = "cuda")]
use ep::driver::{CudaDriver, Driver as _};
use ep_sim::{Cluster, SimDriver};
use serde::{Deserialize, Serialize};

use super::Backend;
use crate::cluster_file::{self, ClusterFileError, run_key};
use crate::failure::{Failure, chain};

/// Where ranks run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Place {
    /// On GPUs, one each.
    Cuda,
    /// On a simulated cluster.
    Sim {
        /// Its file's text; one HGX H200 host without.
        cluster: Option<String>,
        /// Keeps this run's memory apart from other runs'.
        run_key: u64,
    },
}

impl Place {
    /// Where `ranks` ranks run, and why there.
    pub(super) fn choose(
        choice: Backend,
        cluster: Option<&Path>,
        ranks: usize,
    ) -> Result<(Self, String), PlaceError> {
        match (choice, cluster) {
            (Backend::Cuda, Some(_)) => Err(PlaceError::ClusterOfGpus),
            (Backend::Cuda, None) => Ok((Self::Cuda, gpus(ranks)?)),
            (_, Some(path)) => Ok((simulated(path, ranks)?, path.display().to_string())),
            (Backend::Sim, None) => Ok((hgx_h200(), "as asked".to_owned())),
            (Backend::Auto, None) => match gpus(ranks) {
                Ok(reason) => Ok((Self::Cuda, reason)),
                Err(error) => Ok((hgx_h200(), chain(&error))),
            },
        }
    }

    /// The device of a rank.
    pub(super) fn device(&self, ranks: usize, rank: usize) -> Result<Device, Failure> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda => Ok(Device::cuda(DeviceOrdinal(u32::try_from(rank)?))?),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda => Err(PlaceError::NotBuilt.into()),
            Self::Sim { cluster, run_key } => {
                let cluster = match cluster {
                    Some(text) => Cluster::from_toml(text)?,
                    None => Cluster::hgx_h200(u32::try_from(ranks)?),
                };
                // A process of its own, as the driver sees it, with its GPU alone visible.
                let gpus = cluster.ranks();
                let driver = SimDriver::for_rank(&cluster.with_run_key(*run_key), rank)
                    .ok_or(PlaceError::TooSmall { ranks, gpus })?;
                Ok(Device::host(driver, DeviceOrdinal(0)))
            }
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cuda => "GPUs",
            Self::Sim { .. } => "a simulated cluster with the host kernels",
        })
    }
}

/// Why ranks cannot run where they were asked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum PlaceError {
    #[cfg(not(feature = "cuda"))]
    #[error("this build has no CUDA kernels; build with --features cuda")]
    NotBuilt,
    #[cfg(feature = "cuda")]
    #[error("the GPUs cannot be used")]
    Driver(#[from] ep::driver::Error),
    #[cfg(feature = "cuda")]
    #[error(
        "{ranks} ranks need a GPU each and {gpus} are visible; lower --ranks or check CUDA_VISIBLE_DEVICES"
    )]
    TooFewGpus { ranks: usize, gpus: usize },
    #[cfg(feature = "cuda")]
    #[error(
        "GPU {gpu} ({name}) has compute capability {major}.{minor}; the kernels need 9.0 or newer"
    )]
    TooOld {
        gpu: usize,
        name: String,
        major: u32,
        minor: u32,
    },
    #[error("--cluster describes a simulated cluster; leave out --backend cuda")]
    ClusterOfGpus,
    #[error(transparent)]
    ClusterFile(#[from] ClusterFileError),
    #[error("{ranks} ranks need a GPU each and the cluster has {gpus}; lower --ranks")]
    TooSmall { ranks: usize, gpus: usize },
}

/// What GPUs there are, if they are enough. Asks the driver alone: a context in this process, which
/// only starts the ranks, would take half a gigabyte of a GPU.
#[cfg(feature = "cuda")]
fn gpus(ranks: usize) -> Result<String, PlaceError> {
    let driver = CudaDriver::load()?;
    let gpus = driver.device_count()? as usize;
    if gpus < ranks {
        return Err(PlaceError::TooFewGpus { ranks, gpus });
    }
    for gpu in 0..ranks {
        let info = driver.device_info(DeviceOrdinal(gpu as u32))?;
        let (major, minor) = info.compute_capability;
        if major < 9 {
            return Err(PlaceError::TooOld {
                gpu,
                name: info.name,
                major,
                minor,
            });
        }
    }
    Ok(format!("{gpus} are visible"))
}

#[cfg(not(feature = "cuda"))]
fn gpus(_ranks: usize) -> Result<String, PlaceError> {
    Err(PlaceError::NotBuilt)
}

fn hgx_h200() -> Place {
    Place::Sim {
        cluster: None,
        run_key: run_key(),
    }
}

fn simulated(path: &Path, ranks: usize) -> Result<Place, PlaceError> {
    let (text, cluster) = cluster_file::read(path)?;
    let gpus = cluster.ranks();
    if gpus < ranks {
        return Err(PlaceError::TooSmall { ranks, gpus });
    }
    Ok(Place::Sim {
        cluster: Some(text),
        run_key: run_key(),
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, process};

    use super::*;

    #[test]
    fn the_simulator_needs_nothing() {
        let (place, reason) = Place::choose(Backend::Sim, None, 4).unwrap();
        assert!(matches!(place, Place::Sim { cluster: None, .. }));
        assert_eq!(reason, "as asked");
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn without_the_kernels_auto_says_why_it_simulates_and_cuda_is_an_error() {
        let (place, reason) = Place::choose(Backend::Auto, None, 4).unwrap();
        assert!(matches!(place, Place::Sim { .. }));
        assert!(reason.contains("no CUDA kernels"), "{reason}");
        assert!(matches!(
            Place::choose(Backend::Cuda, None, 4),
            Err(PlaceError::NotBuilt)
        ));
    }

    #[test]
    fn a_cluster_file_is_read_and_must_have_a_gpu_for_each_rank() {
        let folder = std::env::temp_dir().join(format!("ep-backend-{}", process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("cluster.toml");
        fs::write(&path, "[[node]]\nname = \"n0\"\ngpus = 2\n").unwrap();
        let (place, _) = Place::choose(Backend::Auto, Some(&path), 2).unwrap();
        assert!(matches!(
            place,
            Place::Sim {
                cluster: Some(_),
                ..
            }
        ));
        assert!(matches!(
            Place::choose(Backend::Sim, Some(&path), 3),
            Err(PlaceError::TooSmall { ranks: 3, gpus: 2 })
        ));
        assert!(matches!(
            Place::choose(Backend::Cuda, Some(&path), 2),
            Err(PlaceError::ClusterOfGpus)
        ));
        fs::write(&path, "[[nod]]").unwrap();
        let error = Place::choose(Backend::Sim, Some(&path), 2).unwrap_err();
        assert!(
            matches!(
                error,
                PlaceError::ClusterFile(ClusterFileError::Malformed { .. })
            ),
            "{error:?}"
        );
        fs::remove_dir_all(&folder).unwrap();
        let error = Place::choose(Backend::Sim, Some(&path), 2).unwrap_err();
        assert!(matches!(error, PlaceError::ClusterFile { .. }), "{error:?}");
    }
}
