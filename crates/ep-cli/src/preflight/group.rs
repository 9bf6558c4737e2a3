//! The ranks where no launcher starts them: threads of this process, or processes with this one as
//! rank 0, started as a launcher would.

use std::env;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use ep::driver::{CudaDriver, DeviceOrdinal, Driver};
use ep::{Communicator, Preflight, Report};
use ep_sim::{Cluster, SimDriver};

use super::{Args, PreflightError};
use crate::failure::Failure;

/// Bound on the ranks' meeting, and on the end of their processes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where ranks run.
#[derive(Debug)]
pub(super) enum Place {
    /// On the GPUs that the process sees.
    Gpus,
    /// On a simulated cluster.
    Simulated(Cluster),
}

/// The devices of a place, by rank.
enum Devices<'a> {
    Gpus(Arc<CudaDriver>),
    Simulated(&'a Cluster),
}

/// Every rank a thread of this process.
pub(super) fn threads(args: &Args, place: &Place) -> Result<Report, Failure> {
    let devices = Devices::of(place)?;
    let communicators = Communicator::threads(devices.count()?);
    let reports: Vec<Result<Report, Failure>> = thread::scope(|scope| {
        let ranks: Vec<_> = communicators
            .into_iter()
            .map(|communicator| {
                let devices = &devices;
                scope.spawn(move || examine(args, devices, &communicator))
            })
            .collect();
        ranks
            .into_iter()
            .map(|rank| {
                rank.join()
                    .unwrap_or_else(|_| Err("a rank panicked".into()))
            })
            .collect()
    });
    let reports: Result<Vec<Report>, Failure> = reports.into_iter().collect();
    reports?
        .into_iter()
        .next()
        .ok_or_else(|| "there are no ranks".into())
}

/// Every rank a process, this one rank 0.
pub(super) fn processes(args: &Args, place: &Place) -> Result<Report, Failure> {
    let devices = Devices::of(place)?;
    let size = devices.count()?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    let mut others = Others::default();
    for rank in 1..size {
        let mut command = Command::new(env::current_exe()?);
        command.arg("preflight");
        if let Some(alloc) = args.alloc.and_then(|alloc| alloc.to_possible_value()) {
            command.args(["--alloc", alloc.get_name()]);
        }
        if args.bandwidth {
            command.arg("--bandwidth");
        }
        if let (Some(path), Place::Simulated(cluster)) = (&args.cluster, place) {
            command.arg("--cluster").arg(path);
            command.args(["--run-key", &cluster.run_key.to_string()]);
        }
        command
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("WORLD_SIZE", size.to_string())
            .env("MASTER_ADDR", Ipv4Addr::LOCALHOST.to_string())
            .env("MASTER_PORT", port.to_string())
            .env_remove("EP_PORT")
            .env_remove("EP_RUN_ID")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        others.0.push(command.spawn()?);
    }
    let communicator = Communicator::tcp_listener(listener, size, PATIENCE)?;
    let report = examine(args, &devices, &communicator)?;
    drop(communicator);
    others.wait(Instant::now() + PATIENCE)?;
    Ok(report)
}

/// The device of a rank of a simulated cluster, in a process of its own as the driver sees it.
pub(super) fn simulated(
    cluster: &Cluster,
    rank: u32,
) -> Result<(Arc<dyn Driver>, DeviceOrdinal), PreflightError> {
    let driver = SimDriver::for_rank(cluster, rank as usize);
    let driver = driver.ok_or(PreflightError::NoRank { rank })?;
    Ok((driver, DeviceOrdinal(0)))
}

fn examine(
    args: &Args,
    devices: &Devices<'_>,
    communicator: &Communicator,
) -> Result<Report, Failure> {
    let (driver, device) = devices.of_rank(communicator.rank())?;
    let preflight = Preflight::new(driver, device, communicator);
    Ok(args.preflight(preflight).run()?)
}

impl<'a> Devices<'a> {
    fn of(place: &'a Place) -> Result<Self, PreflightError> {
        match place {
            Place::Gpus => CudaDriver::load()
                .map(Self::Gpus)
                .map_err(PreflightError::NoDriver),
            Place::Simulated(cluster) => Ok(Self::Simulated(cluster)),
        }
    }

    fn count(&self) -> Result<u32, Failure> {
        match self {
            Self::Gpus(driver) => Ok(driver.device_count()?),
            Self::Simulated(cluster) => Ok(u32::try_from(cluster.ranks())?),
        }
    }

    fn of_rank(&self, rank: u32) -> Result<(Arc<dyn Driver>, DeviceOrdinal), PreflightError> {
        match self {
            Self::Gpus(driver) => Ok((driver.clone(), DeviceOrdinal(rank))),
            Self::Simulated(cluster) => simulated(cluster, rank),
        }
    }
}

/// The processes of the other ranks; those still running are ended when it is dropped.
#[derive(Default)]
struct Others(Vec<Child>);

impl Others {
    /// Waits until all have ended, and no longer than until `end`.
    fn wait(&mut self, end: Instant) -> io::Result<()> {
        for child in &mut self.0 {
            while child.try_wait()?.is_none() && Instant::now() < end {
                thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }
}

impl Drop for Others {
    fn drop(&mut self) {
        for child in &mut self.0 {
            if let Ok(None) = child.try_wait()
                && let Err(error) = child.kill().and_then(|()| child.wait().map(drop))
            {
                tracing::error!(pid = child.id(), %error, "a rank's process is left behind");
            }
        }
    }
}
