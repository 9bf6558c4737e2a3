//! `ep preflight`: what memory a group would use here, and why.
//!
//! Every rank goes through [`ep::Preflight`], wherever it runs: under a launcher, as one of the
//! processes or threads that the command starts, or on a simulated cluster. Rank 0 speaks.

mod group;
mod report;

use std::env;
use std::path::PathBuf;
use std::process::ExitCode;

use ep::driver::CudaDriver;
use ep::{BackendKind, Choice, Communicator, Launch, Preflight, Report};

use self::group::Place;
use self::report::{Findings, Words};
use crate::cluster_file::{self, ClusterFileError};
use crate::failure::{self, Failure};
use crate::output::print;
use crate::ranks::Spawn;

/// Finds out what memory a group of ranks would use, by trying, and says why.
///
/// Under a launcher (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) on every rank at once, else over all
/// visible GPUs of this host. The exit status is zero only if every pair of ranks has a route.
#[derive(Debug, clap::Args)]
#[command(after_help = ENVIRONMENT)]
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

/// What the library reads.
const ENVIRONMENT: &str = "\
Environment:
  RANK, WORLD_SIZE          this process's rank and the number of ranks
  LOCAL_RANK                its number on its host
  MASTER_ADDR, MASTER_PORT  where rank 0 listens
  EP_PORT                   instead of MASTER_PORT, where the launcher itself listens at that
  EP_RUN_ID                 tells runs at one address apart
  EP_ALLOC                  auto, fabric, posix-fd or malloc
  MC_USE_NVLINK_IPC         anything but 0 means malloc, unless EP_ALLOC is set
  EP_TIMEOUT_MS             bound on the waits of an operation [default: 10000]
  EP_DEADLINE_MS            bound on each step of setting up and tearing down [default: 60000]";

/// Memory to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Alloc {
    Auto,
    Fabric,
    PosixFd,
    Malloc,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum PreflightError {
    #[error("no GPU can be asked; run it on a GPU host, or with --cluster FILE.toml")]
    NoDriver(#[source] ep::driver::Error),
    #[error("the cluster has no rank {rank}; start as many ranks as it has GPUs")]
    NoRank { rank: u32 },
}

/// Runs the command and says how it went.
pub(crate) fn main(args: &Args) -> ExitCode {
    failure::exit_code(tell(args))
}

/// Whether every pair of ranks has a route.
fn tell(args: &Args) -> Result<bool, Failure> {
    let (report, speaks) = examine(args)?;
    if speaks && args.json {
        print(serde_json::to_string(&Findings::of(&report))?)?;
    } else if speaks {
        print(Words(&report))?;
    }
    Ok(report.is_usable())
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
        Place::Simulated { .. } => Spawn::Threads,
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
        Place::Simulated { cluster, .. } => group::simulated(cluster, launch.rank)?,
    };
    let preflight = args.preflight(Preflight::new(driver, device, &communicator));
    Ok((preflight.run()?, launch.rank == 0))
}

fn place(args: &Args) -> Result<Place, ClusterFileError> {
    let Some(path) = &args.cluster else {
        return Ok(Place::Gpus);
    };
    let (text, cluster) = cluster_file::read(path)?;
    let run_key = args.run_key.unwrap_or_else(cluster_file::run_key);
    Ok(Place::Simulated {
        cluster: cluster.with_run_key(run_key),
        text,
    })
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
