//! `ep run`: one mixture-of-experts layer over several ranks, checked.
//!
//! The head (`head`) makes a [`Job`] of its arguments, starts the ranks, and sums up what they
//! found. A rank (`member`) makes its data from the seed, runs the layer through a [`Transport`]
//! (the only door to the code under test), and compares the result with [`reference`].

mod args;
mod backend;
mod check;
#[cfg(feature = "cuda")]
mod cublas;
mod dense;
mod e4m3;
mod experts;
mod group;
mod job;
mod member;
mod model;
mod npy;
mod parallel;
mod random;
mod reference;
mod report;
mod router;
mod transport;

use std::env;
use std::error::Error;
use std::fs::{self, DirBuilder};
use std::io::{self, BufRead, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{self, Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use ep::Communicator;
use serde::{Deserialize, Serialize};

pub(crate) use self::args::Args;
use self::args::Spawn;
use self::backend::Place;
use self::group::{Message, Patience};
use self::job::Job;
use self::report::{Outcome, Report};
use self::transport::Failure;

/// The hidden command that a rank's process is started with.
pub(crate) const RANK_COMMAND: &str = "rank";

/// What the other ranks may still say once one has failed: longer than a rank waits for a peer.
const GRACE: Duration = Duration::from_secs(15);
/// Bound on the ranks' meeting.
const MEETING: Duration = Duration::from_secs(60);

/// What a rank's process is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Task {
    job: Job,
    rank: usize,
    place: Place,
    /// Unix socket where the ranks meet.
    socket: PathBuf,
}

/// Runs the command and says how it went.
pub(crate) fn head(args: &Args) -> ExitCode {
    let report = match launch(args) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("error: {}", chain(&*error));
            return ExitCode::FAILURE;
        }
    };
    if args.json {
        eprintln!("{report}");
        match serde_json::to_string(&report) {
            Ok(line) => println!("{line}"),
            Err(error) => {
                eprintln!("error: the result cannot be written as JSON: {error}");
                return ExitCode::FAILURE;
            }
        }
    } else {
        println!("{report}");
    }
    if report.verified() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn launch(args: &Args) -> Result<Report, Failure> {
    let start = Instant::now();
    let job = args.job(thread::available_parallelism().map_or(1, Into::into))?;
    let (place, reason) = backend::choose(args.backend, args.cluster.as_deref(), job.ranks)?;
    eprintln!(
        "{} ranks, each a {}, on {place}: {reason}",
        job.ranks, args.spawn
    );
    let progress = |rank: usize, text: &str| {
        if rank == 0 {
            eprintln!("[{:6.2} s] {text}", start.elapsed().as_secs_f64());
        }
    };
    let outcomes = match args.spawn {
        Spawn::Processes => processes(&job, &place, args.deadline(), progress)?,
        Spawn::Threads => threads(&job, &place, progress)?,
    };
    eprintln!("[{:6.2} s] done", start.elapsed().as_secs_f64());
    Ok(Report::new(&job, &outcomes))
}

fn processes(
    job: &Job,
    place: &Place,
    deadline: Duration,
    progress: impl FnMut(usize, &str),
) -> Result<Vec<Outcome>, Failure> {
    let program = env::current_exe()?;
    let folder = PrivateFolder::new()?;
    let tasks: Vec<String> = (0..job.ranks)
        .map(|rank| {
            serde_json::to_string(&Task {
                job: job.clone(),
                rank,
                place: place.clone(),
                socket: folder.path().join("ranks"),
            })
        })
        .collect::<Result<_, _>>()?;
    let command = |rank: usize| {
        let mut command = Command::new(&program);
        command.arg(RANK_COMMAND);
        (command, tasks[rank].clone())
    };
    Ok(group::run(
        job.ranks,
        Patience {
            deadline,
            grace: GRACE,
        },
        command,
        progress,
    )?)
}

fn threads(
    job: &Job,
    place: &Place,
    progress: impl Fn(usize, &str) + Sync,
) -> Result<Vec<Outcome>, Failure> {
    let communicators = Communicator::threads(u32::try_from(job.ranks)?);
    let progress = &progress;
    let results: Vec<Result<Outcome, Failure>> = thread::scope(|scope| {
        let ranks: Vec<_> = communicators
            .into_iter()
            .enumerate()
            .map(|(rank, communicator)| {
                scope.spawn(move || {
                    member::run(
                        job,
                        rank,
                        |model| transport::connect(job, rank, place, &communicator, model),
                        |text| progress(rank, text),
                    )
                })
            })
            .collect();
        ranks
            .into_iter()
            .map(|rank| rank.join().unwrap_or_else(|_| Err("it panicked".into())))
            .collect()
    });
    let mut outcomes = Vec::with_capacity(results.len());
    let mut failures = Vec::new();
    for (rank, result) in results.into_iter().enumerate() {
        match result {
            Ok(outcome) => outcomes.push(outcome),
            Err(error) => failures.push((rank, group::Failure::Said(chain(&*error)))),
        }
    }
    if failures.is_empty() {
        Ok(outcomes)
    } else {
        Err(group::GroupError { failures }.into())
    }
}

/// Runs one rank as the task on standard input says.
pub(crate) fn rank() -> ExitCode {
    let say = |message: &Message| {
        // The head that would read it may be gone; then nobody is left to tell.
        let line = serde_json::to_string(message).unwrap_or_default();
        let _ = writeln!(io::stdout(), "{line}");
    };
    match obey(|text| say(&Message::Progress(text.to_owned()))) {
        Ok(outcome) => {
            say(&Message::Done(Box::new(outcome)));
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(&Message::Failed(chain(&*error)));
            ExitCode::FAILURE
        }
    }
}

fn obey(progress: impl FnMut(&str)) -> Result<Outcome, Failure> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    let Task {
        job,
        rank,
        place,
        socket,
    } = serde_json::from_str(&line)?;
    thread::Builder::new()
        .name("head".to_owned())
        .spawn(end_with_head)?;
    let (number, size) = (u32::try_from(rank)?, u32::try_from(job.ranks)?);
    let connect = |model: &model::Model| {
        let communicator = Communicator::unix(socket, number, size, MEETING)?;
        transport::connect(&job, rank, &place, &communicator, model)
    };
    member::run(&job, rank, connect, progress)
}

/// Waits for the head's end and ends the process.
#[expect(
    clippy::disallowed_methods,
    reason = "the thread that would return may be waiting for ranks that end at the same time"
)]
fn end_with_head() {
    // Nothing more is ever sent: a return means that the head is gone.
    let _ = io::stdin().lock().read(&mut [0]);
    process::exit(1);
}

/// An error with its causes, in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += ": ";
        text += &error.to_string();
        cause = error.source();
    }
    text
}

/// A folder that only this user can enter; removed when dropped.
struct PrivateFolder(PathBuf);

impl PrivateFolder {
    fn new() -> io::Result<Self> {
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let name = format!("ep-{}-{:x}", process::id(), now.as_nanos());
        let path = env::temp_dir().join(name);
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for PrivateFolder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::error!(path = %self.0.display(), %error, "a temporary folder is left behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_survive_the_way_to_a_process() {
        let task = Task {
            job: job::tests::small(),
            rank: 1,
            place: Place::Sim {
                cluster: Some("[[node]]\nname = \"n0\"".to_owned()),
                run_key: 7,
            },
            socket: "/tmp/some where/ranks".into(),
        };
        let line = serde_json::to_string(&task).unwrap();
        assert!(!line.contains('\n'));
        assert_eq!(serde_json::from_str::<Task>(&line).unwrap(), task);
    }

    #[test]
    fn causes_are_in_the_text() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] io::Error);
        let error = Outer(io::Error::other("inner"));
        assert_eq!(chain(&error), "outer: inner");
    }

    #[test]
    fn a_private_folder_is_gone_after_use() {
        let folder = PrivateFolder::new().unwrap();
        let path = folder.path().to_owned();
        fs::write(path.join("file"), "").unwrap();
        drop(folder);
        assert!(!path.exists());
    }
}
