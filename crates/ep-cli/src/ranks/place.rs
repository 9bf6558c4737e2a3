//! Where a run takes place: on GPUs, or on a simulated cluster.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::Path;

use ep::Device;
use ep::driver::DeviceOrdinal;
#[cfg(feature = "cuda")]
use ep::driver::{CudaDriver, Driver as _};
use ep_sim::{Cluster, SimDriver};
use serde::{Deserialize, Serialize};

use super::{Backend, PlaceArgs, Spawn};
use crate::cluster_file::{self, ClusterFileError, run_key};
use crate::failure::{Failure, chain};

/// Where ranks run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Place {
    /// On GPUs.
    Cuda {
        /// Neighbouring ranks that share one.
        ranks_per_gpu: NonZeroUsize,
    },
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
        args: &PlaceArgs,
        ranks_per_gpu: NonZeroUsize,
        ranks: usize,
    ) -> Result<(Self, String), PlaceError> {
        // What frees memory in a process waits for the process's kernels, and these for each other.
        if ranks_per_gpu.get() > 1 && args.spawn == Spawn::Threads {
            return Err(PlaceError::ThreadsOnOneGpu);
        }
        let cuda = Self::Cuda { ranks_per_gpu };
        let gpus = |ranks: usize| gpus(ranks.div_ceil(ranks_per_gpu.get()));
        match (args.backend, args.cluster.as_deref()) {
            (Backend::Cuda, Some(_)) => Err(PlaceError::ClusterOfGpus),
            (Backend::Cuda, None) => Ok((cuda, gpus(ranks)?)),
            (_, Some(path)) => Ok((simulated(path, ranks)?, path.display().to_string())),
            (Backend::Sim, None) => Ok((hgx_h200(), "as asked".to_owned())),
            (Backend::Auto, None) => match gpus(ranks) {
                Ok(reason) => Ok((cuda, reason)),
                Err(error) => Ok((hgx_h200(), chain(&error))),
            },
        }
    }

    /// The device of a rank.
    pub(super) fn device(&self, ranks: usize, rank: usize) -> Result<Device, Failure> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda { ranks_per_gpu } => {
                let ordinal = DeviceOrdinal(u32::try_from(rank / *ranks_per_gpu)?);
                Ok(Device::cuda(ordinal)?)
            }
            #[cfg(not(feature = "cuda"))]
            Self::Cuda { .. } => Err(PlaceError::NotBuilt.into()),
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
            Self::Cuda { .. } => "GPUs",
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
        "{needed} GPUs are needed and {visible} are visible; lower --ranks or check CUDA_VISIBLE_DEVICES"
    )]
    TooFewGpus { needed: usize, visible: usize },
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
    #[error("ranks that share a GPU must be processes; leave out --spawn threads")]
    ThreadsOnOneGpu,
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
fn gpus(needed: usize) -> Result<String, PlaceError> {
    let driver = CudaDriver::load()?;
    let visible = driver.device_count()? as usize;
    if visible < needed {
        return Err(PlaceError::TooFewGpus { needed, visible });
    }
    for gpu in 0..needed {
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
    Ok(format!("{visible} visible, {needed} used"))
}

#[cfg(not(feature = "cuda"))]
fn gpus(_needed: usize) -> Result<String, PlaceError> {
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
    use std::num::NonZeroU64;
    use std::{fs, process};

    use super::*;

    fn args(backend: Backend, cluster: Option<&Path>) -> PlaceArgs {
        PlaceArgs {
            backend,
            cluster: cluster.map(Path::to_owned),
            spawn: Spawn::Threads,
            timeout: NonZeroU64::MIN,
        }
    }

    fn choose(
        backend: Backend,
        cluster: Option<&Path>,
        ranks: usize,
    ) -> Result<(Place, String), PlaceError> {
        Place::choose(&args(backend, cluster), NonZeroUsize::MIN, ranks)
    }

    #[test]
    fn threads_have_a_gpu_each() {
        let two = NonZeroUsize::new(2).unwrap();
        let mut args = args(Backend::Cuda, None);
        assert!(matches!(
            Place::choose(&args, two, 2),
            Err(PlaceError::ThreadsOnOneGpu)
        ));
        args.backend = Backend::Sim;
        args.spawn = Spawn::Processes;
        assert!(Place::choose(&args, two, 2).is_ok());
    }

    #[test]
    fn the_simulator_needs_nothing() {
        let (place, reason) = choose(Backend::Sim, None, 4).unwrap();
        assert!(matches!(place, Place::Sim { cluster: None, .. }));
        assert_eq!(reason, "as asked");
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn without_the_kernels_auto_says_why_it_simulates_and_cuda_is_an_error() {
        let (place, reason) = choose(Backend::Auto, None, 4).unwrap();
        assert!(matches!(place, Place::Sim { .. }));
        assert!(reason.contains("no CUDA kernels"), "{reason}");
        assert!(matches!(
            choose(Backend::Cuda, None, 4),
            Err(PlaceError::NotBuilt)
        ));
    }

    #[test]
    fn a_cluster_file_is_read_and_must_have_a_gpu_for_each_rank() {
        let folder = std::env::temp_dir().join(format!("ep-backend-{}", process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("cluster.toml");
        fs::write(&path, "[[node]]\nname = \"n0\"\ngpus = 2\n").unwrap();
        let (place, _) = choose(Backend::Auto, Some(&path), 2).unwrap();
        assert!(matches!(
            place,
            Place::Sim {
                cluster: Some(_),
                ..
            }
        ));
        assert!(matches!(
            choose(Backend::Sim, Some(&path), 3),
            Err(PlaceError::TooSmall { ranks: 3, gpus: 2 })
        ));
        assert!(matches!(
            choose(Backend::Cuda, Some(&path), 2),
            Err(PlaceError::ClusterOfGpus)
        ));
        fs::write(&path, "[[nod]]").unwrap();
        let error = choose(Backend::Sim, Some(&path), 2).unwrap_err();
        assert!(
            matches!(
                error,
                PlaceError::ClusterFile(ClusterFileError::Malformed { .. })
            ),
            "{error:?}"
        );
        fs::remove_dir_all(&folder).unwrap();
        let error = choose(Backend::Sim, Some(&path), 2).unwrap_err();
        assert!(matches!(error, PlaceError::ClusterFile { .. }), "{error:?}");
    }
}
