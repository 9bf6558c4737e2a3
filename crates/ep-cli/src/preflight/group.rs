//! The ranks where no launcher starts them: threads of this process, or processes with this one as
//! rank 0, started as a launcher would.

use std::env;
use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, ExitStatus, Stdio};
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
    Simulated {
        cluster: Cluster,
        /// As it was read.
        text: String,
    },
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
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(GroupError::Listener)?;
    let port = listener.local_addr().map_err(GroupError::Listener)?.port();
    let program = env::current_exe().map_err(GroupError::Program)?;
    let mut others = Others::default();
    for rank in 1..size {
        let mut command = Command::new(&program);
        command.arg("preflight");
        if let Some(alloc) = args.alloc.and_then(|alloc| alloc.to_possible_value()) {
            command.args(["--alloc", alloc.get_name()]);
        }
        if args.bandwidth {
            command.arg("--bandwidth");
        }
        let mut input = None;
        if let Place::Simulated { cluster, text } = place {
            // What the file says may be there to be read once only.
            command.args(["--cluster", "/dev/stdin"]);
            command.args(["--run-key", &cluster.run_key.to_string()]);
            input = Some(text.as_str());
        }
        command
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("WORLD_SIZE", size.to_string())
            .env("MASTER_ADDR", Ipv4Addr::LOCALHOST.to_string())
            .env("MASTER_PORT", port.to_string())
            .env_remove("EP_PORT")
            .env_remove("EP_RUN_ID")
            .stdin(if input.is_some() {
                Stdio::piped()
            } else {
                Stdio::null()
            })
            .stdout(Stdio::null());
        let started = others.start(command, input);
        started.map_err(|source| GroupError::Start { rank, source })?;
    }
    let communicator = others.meet(listener, size)?;
    let report = examine(args, &devices, &communicator)?;
    drop(communicator);
    others.wait(Instant::now() + PATIENCE)?;
    Ok(report)
}

/// Why processes are no group.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum GroupError {
    #[error("no port of the loopback interface can be listened at")]
    Listener(#[source] io::Error),
    #[error("the program that the ranks run cannot be found")]
    Program(#[source] io::Error),
    #[error("rank {rank}: its process could not be started")]
    Start {
        rank: u32,
        #[source]
        source: io::Error,
    },
    #[error("rank {rank}: its process ended ({status}) before the ranks met; see its output above")]
    Ended { rank: usize, status: ExitStatus },
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
            Place::Simulated { cluster, .. } => Ok(Self::Simulated(cluster)),
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
    /// Starts the next rank and hands it its input.
    fn start(&mut self, mut command: Command, input: Option<&str>) -> io::Result<()> {
        let mut child = command.spawn()?;
        let stdin = child.stdin.take();
        self.0.push(child);
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            match stdin.write_all(input.as_bytes()) {
                // It ended before it read; its output says why.
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Meets them all. A rank that has ended will not come.
    fn meet(&mut self, listener: TcpListener, size: u32) -> Result<Communicator, Failure> {
        let meeting = thread::Builder::new()
            .name("meeting".to_owned())
            .spawn(move || Communicator::tcp_listener(listener, size, PATIENCE))?;
        while !meeting.is_finished() {
            for (child, rank) in self.0.iter_mut().zip(1..) {
                if let Some(status) = child.try_wait()?
                    && !meeting.is_finished()
                {
                    return Err(GroupError::Ended { rank, status }.into());
                }
            }
            thread::sleep(Duration::from_millis(1));
        }
        match meeting.join() {
            Ok(communicator) => Ok(communicator?),
            Err(_) => Err("the thread that meets the ranks panicked".into()),
        }
    }

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
