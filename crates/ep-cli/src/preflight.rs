//! `ep preflight`: what memory a group would use here, and why.
//!
//! Every rank goes through [`ep::Preflight`], wherever it runs: under a launcher, as one of the
//! processes or threads that the command starts, or on a simulated cluster. Rank 0 speaks.

mod group;
mod report;

use std::env;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::{self, ExitCode};
use std::time::SystemTime;

use ep::driver::CudaDriver;
use ep::{BackendKind, Choice, Communicator, Launch, Preflight, Report};
use ep_sim::{Cluster, ClusterError};

use self::group::Place;
use self::report::{Findings, Words};
use crate::failure::{Failure, chain};

/// Finds out what memory a group of ranks would use, by trying, and says why.
///
/// Under a launcher (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) on every rank at once, else over all
/// visible GPUs of this host. The exit status is zero only if every pair of ranks has a route.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Asks about the cluster that this file describes instead: one simulated rank per GPU
    #[arg(long, value_name = "FILE.toml")]
    cluster: Option<PathBuf>,
    /// Memory to use [default: EP_ALLOC and MC_USE_NVLINK_IPC, or auto]
    #[arg(long, value_enum)]
    alloc: Option<Alloc>,
    /// What a rank is, where no launcher says [default: processes on GPUs, threads on a simulated
    /// cluster]
    #[arg(long, value_enum)]
    spawn: Option<Spawn>,
    /// Also times copies between every pair of connected GPUs, and compares them with the link's
    /// nominal speed
    #[arg(long, conflicts_with = "cluster")]
    bandwidth: bool,
    /// One line of JSON on standard output
    #[arg(long)]
    json: bool,
    /// Of the simulated cluster in which this process is one rank
    #[arg(long, hide = true, requires = "cluster")]
    run_key: Option<u64>,
}

/// Memory to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Alloc {
    Auto,
    Fabric,
    PosixFd,
    Malloc,
}

/// What a rank is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Spawn {
    /// One process per rank
    Processes,
    /// One thread per rank, all in this process
    Threads,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum PreflightError {
    #[error("{path} cannot be read; check the argument of --cluster")]
    ClusterFile {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} describes no cluster")]
    Cluster {
        path: PathBuf,
        #[source]
        source: ClusterError,
    },
    #[error("no GPU can be asked; run it on a GPU host, or with --cluster FILE.toml")]
    NoDriver(#[source] ep::driver::Error),
    #[error("the cluster has no rank {rank}; start as many ranks as it has GPUs")]
    NoRank { rank: u32 },
}

/// Runs the command and says how it went.
pub(crate) fn main(args: &Args) -> ExitCode {
    let (report, speaks) = match examine(args) {
        Ok(found) => found,
        Err(error) => {
            eprintln!("error: {}", chain(&*error));
            return ExitCode::FAILURE;
        }
    };
    if speaks && args.json {
        match serde_json::to_string(&Findings::of(&report)) {
            Ok(line) => println!("{line}"),
            Err(error) => {
                eprintln!("error: the report cannot be written as JSON: {error}");
                return ExitCode::FAILURE;
            }
        }
    } else if speaks {
        print!("{}", Words(&report));
    }
    if report.is_usable() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// The report, and whether this process is the one that prints it.
fn examine(args: &Args) -> Result<(Report, bool), Failure> {
    let place = place(args)?;
    let is_member = match args.cluster {
        Some(_) => args.run_key.is_some(),
        None => ["RANK", "WORLD_SIZE"]
            .iter()
            .any(|v| env::var_os(v).is_some()),
    };
    if is_member {
        return member(args, &place);
    }
    let spawn = args.spawn.unwrap_or(match place {
        Place::Gpus => Spawn::Processes,
        Place::Simulated(_) => Spawn::Threads,
    });
    let report = match spawn {
        Spawn::Processes => group::processes(args, &place)?,
        Spawn::Threads => group::threads(args, &place)?,
    };
    Ok((report, true))
}

/// One rank of a launcher's, which may be this command.
fn member(args: &Args, place: &Place) -> Result<(Report, bool), Failure> {
    let launch = Launch::from_env()?;
    // First of all, so that the others notice at once when this rank cannot go on.
    let communicator = Communicator::from_launch(&launch)?;
    let (driver, device) = match place {
        Place::Gpus => {
            let driver = CudaDriver::load().map_err(PreflightError::NoDriver)?;
            let device = launch.device(&*driver)?;
            (driver as _, device)
        }
        Place::Simulated(cluster) => group::simulated(cluster, launch.rank)?,
    };
    let preflight = args.preflight(Preflight::new(driver, device, &communicator));
    Ok((preflight.run()?, launch.rank == 0))
}

fn place(args: &Args) -> Result<Place, PreflightError> {
    let Some(path) = &args.cluster else {
        return Ok(Place::Gpus);
    };
    let text = fs::read_to_string(path).map_err(|source| PreflightError::ClusterFile {
        path: path.clone(),
        source,
    })?;
    let cluster = Cluster::from_toml(&text).map_err(|source| PreflightError::Cluster {
        path: path.clone(),
        source,
    })?;
    let run_key = args.run_key.unwrap_or_else(|| {
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        (now.as_nanos() as u64).rotate_left(32) ^ u64::from(process::id())
    });
    Ok(Place::Simulated(cluster.with_run_key(run_key)))
}

impl Args {
    fn preflight(&self, preflight: Preflight) -> Preflight {
        let preflight = match self.alloc {
            Some(alloc) => preflight.alloc(alloc.into()),
            None => preflight,
        };
        if self.bandwidth {
            preflight.bandwidth()
        } else {
            preflight
        }
    }
}

impl From<Alloc> for Choice {
    fn from(alloc: Alloc) -> Self {
        match alloc {
            Alloc::Auto => Self::Auto,
            Alloc::Fabric => Self::Force(BackendKind::Fabric),
            Alloc::PosixFd => Self::Force(BackendKind::PosixFd),
            Alloc::Malloc => Self::Force(BackendKind::Malloc),
        }
    }
}
