//! A group of ranks: where they run, as processes or as threads, and what they say.

mod group;
mod place;

use std::fmt;
use std::fs::{self, DirBuilder};
use std::io::{self, BufRead, Read, Write};
use std::num::{NonZeroU64, NonZeroUsize};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{self, Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use ep::{Communicator, Device};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use self::group::{GroupError, Message, Patience};
use self::place::Place;
use crate::failure::{Failure, chain};

/// What the other ranks may still say once one has failed: longer than a rank waits for a peer.
const GRACE: Duration = Duration::from_secs(15);
/// Bound on the ranks' meeting.
const MEETING: Duration = Duration::from_secs(60);

/// Where the ranks run.
#[derive(Debug, clap::Args)]
pub(crate) struct PlaceArgs {
    /// On GPUs, or on a simulated cluster in host memory
    #[arg(long, value_enum, default_value_t = Backend::Auto)]
    backend: Backend,
    /// Simulate the cluster that this file describes, instead of one HGX H200 host
    #[arg(long, value_name = "FILE.toml")]
    cluster: Option<PathBuf>,
    /// What a rank is
    #[arg(long, value_enum, default_value_t = Spawn::Processes)]
    spawn: Spawn,
    /// Seconds after which processes that have not finished are ended
    #[arg(long, default_value = "300", value_name = "SECONDS")]
    timeout: NonZeroU64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Backend {
    /// GPUs if there are enough, else the simulator
    Auto,
    /// The simulated cluster
    Sim,
    /// GPUs, or fail
    Cuda,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Spawn {
    /// One process per rank
    Processes,
    /// One thread per rank, all in this process
    Threads,
}

impl fmt::Display for Spawn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Processes => "process",
            Self::Threads => "thread",
        })
    }
}

/// What a group of ranks does together.
pub(crate) trait Work: Serialize + DeserializeOwned + Sync {
    /// What a rank brings back.
    type Outcome: Serialize + DeserializeOwned + Send + 'static;
    /// The hidden command that a rank's process is started with.
    const RANK_COMMAND: &'static str;

    /// Ranks in the group.
    fn ranks(&self) -> usize;

    /// Does the part of one rank.
    fn run(&self, member: &Member<'_>) -> Result<Self::Outcome, Failure>;
}

/// One rank, as its work sees it.
pub(crate) struct Member<'a> {
    pub(crate) rank: usize,
    ranks: usize,
    place: &'a Place,
    meeting: Meeting,
    progress: &'a dyn Fn(&str),
    failed: &'a dyn Fn(&Failure),
}

/// How ranks meet.
#[derive(Clone, Debug)]
enum Meeting {
    /// At a Unix socket.
    Socket(PathBuf),
    /// They are threads that have met already.
    Threads(Communicator),
}

impl Member<'_> {
    /// The rank's device, and its group.
    pub(crate) fn connect(&self) -> Result<(Device, Communicator), Failure> {
        let device = self.place.device(self.ranks, self.rank)?;
        let communicator = match &self.meeting {
            Meeting::Threads(communicator) => communicator.clone(),
            Meeting::Socket(path) => {
                let (rank, size) = (u32::try_from(self.rank)?, u32::try_from(self.ranks)?);
                let communicator = Communicator::unix(path, rank, size, MEETING)?;
                if rank == 0 {
                    // All have met. A signal that ends all processes leaves nothing from here on.
                    remove_meeting_place(path);
                }
                communicator
            }
        };
        Ok((device, communicator))
    }

    /// Says what the rank is doing.
    pub(crate) fn progress(&self, text: &str) {
        (self.progress)(text);
    }

    /// Passes a result on. Of an error the head is told at once: to give a buffer back takes as long
    /// as ranks may keep each other waiting.
    pub(crate) fn tell<T>(&self, result: Result<T, Failure>) -> Result<T, Failure> {
        result.inspect_err(|error| (self.failed)(error))
    }
}

/// Why ranks cannot be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum StartError {
    #[error("the program that the ranks run cannot be found")]
    Program(#[source] io::Error),
    #[error("a folder for the ranks' socket cannot be made in {parent}; check TMPDIR")]
    Folder {
        parent: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// What a rank's process is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Task<W> {
    work: W,
    rank: usize,
    place: Place,
    /// Unix socket where the ranks meet.
    socket: PathBuf,
}

/// Cores of this machine, which the ranks share.
pub(crate) fn cores() -> usize {
    thread::available_parallelism().map_or(1, Into::into)
}

/// Runs the work and returns what each rank found. Says on standard error where the ranks run and
/// what rank 0 is doing, with seconds since `start`.
pub(crate) fn run<W: Work>(
    work: &W,
    args: &PlaceArgs,
    ranks_per_gpu: NonZeroUsize,
    start: Instant,
) -> Result<Vec<W::Outcome>, Failure> {
    let (place, reason) = Place::choose(args, ranks_per_gpu, work.ranks())?;
    let ranks = match work.ranks() {
        1 => "1 rank".to_owned(),
        ranks => format!("{ranks} ranks"),
    };
    eprintln!("{ranks}, each a {}, on {place}: {reason}", args.spawn);
    let progress = |rank: usize, text: &str| {
        if rank == 0 {
            eprintln!("[{:6.2} s] {text}", start.elapsed().as_secs_f64());
        }
    };
    let outcomes = match args.spawn {
        Spawn::Processes => {
            let deadline = Duration::from_secs(args.timeout.get());
            processes(work, &place, deadline, progress)?
        }
        Spawn::Threads => threads(work, &place, progress)?,
    };
    progress(0, "done");
    Ok(outcomes)
}

fn processes<W: Work>(
    work: &W,
    place: &Place,
    deadline: Duration,
    progress: impl Fn(usize, &str),
) -> Result<Vec<W::Outcome>, Failure> {
    let program = std::env::current_exe().map_err(StartError::Program)?;
    let folder = PrivateFolder::new()?;
    let socket = folder.path().join("ranks");
    let tasks: Vec<String> = (0..work.ranks())
        .map(|rank| {
            serde_json::to_string(&Task {
                work,
                rank,
                place: place.clone(),
                socket: socket.clone(),
            })
        })
        .collect::<Result<_, _>>()?;
    let command = |rank: usize| {
        let mut command = Command::new(&program);
        command.arg(W::RANK_COMMAND);
        (command, tasks[rank].clone())
    };
    let patience = Patience {
        deadline,
        grace: GRACE,
    };
    Ok(group::run(tasks.len(), patience, command, progress)?)
}

fn threads<W: Work>(
    work: &W,
    place: &Place,
    progress: impl Fn(usize, &str) + Sync,
) -> Result<Vec<W::Outcome>, Failure> {
    let communicators = Communicator::threads(u32::try_from(work.ranks())?);
    let progress = &progress;
    let results: Vec<Result<W::Outcome, Failure>> = thread::scope(|scope| {
        let ranks: Vec<_> = communicators
            .into_iter()
            .enumerate()
            .map(|(rank, communicator)| {
                scope.spawn(move || {
                    work.run(&Member {
                        rank,
                        ranks: work.ranks(),
                        place,
                        meeting: Meeting::Threads(communicator),
                        progress: &|text| progress(rank, text),
                        failed: &|_| {},
                    })
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
        Err(GroupError { failures }.into())
    }
}

/// Runs one rank in this process, as the task on standard input says.
pub(crate) fn main<W: Work>() -> ExitCode {
    let (message, code) = match obey::<W>() {
        Ok(outcome) => (Message::Done(outcome), ExitCode::SUCCESS),
        Err(error) => (Message::Failed(chain(&*error)), ExitCode::FAILURE),
    };
    say(&message);
    code
}

fn obey<W: Work>() -> Result<W::Outcome, Failure> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    let task: Task<W> = serde_json::from_str(&line)?;
    thread::Builder::new().name("head".to_owned()).spawn({
        let socket = task.socket.clone();
        move || end_with_head(&socket)
    })?;
    task.work.run(&Member {
        rank: task.rank,
        ranks: task.work.ranks(),
        place: &task.place,
        meeting: Meeting::Socket(task.socket),
        progress: &|text| say(&Message::<W::Outcome>::Progress(text.to_owned())),
        failed: &|error| say(&Message::<W::Outcome>::Failed(chain(&**error))),
    })
}

/// Tells the head. If it is gone, nobody is left to tell.
fn say<T: Serialize>(message: &Message<T>) {
    if let Ok(line) = serde_json::to_string(message) {
        let _ = writeln!(io::stdout(), "{line}");
    }
}

/// Waits for the head's end, removes what it cannot remove any more, and ends the process.
#[expect(
    clippy::disallowed_methods,
    reason = "the thread that would return may be waiting for ranks that end at the same time"
)]
fn end_with_head(socket: &Path) {
    // Nothing more is ever sent: a return means that the head is gone.
    let _ = io::stdin().lock().read(&mut [0]);
    remove_meeting_place(socket);
    process::exit(1);
}

/// Removes the head's folder with the socket, unless that is done.
fn remove_meeting_place(socket: &Path) {
    let _ = fs::remove_file(socket);
    if let Some(folder) = socket.parent() {
        let _ = fs::remove_dir(folder);
    }
}

/// A folder that only this user can enter; removed when dropped, if it is still there.
struct PrivateFolder(PathBuf);

impl PrivateFolder {
    fn new() -> Result<Self, StartError> {
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let name = format!("ep-{}-{:x}", process::id(), now.as_nanos());
        let parent = std::env::temp_dir();
        let path = parent.join(name);
        match DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => Ok(Self(path)),
            Err(source) => Err(StartError::Folder { parent, source }),
        }
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for PrivateFolder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::error!(path = %self.0.display(), %error, "a temporary folder is left behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::layer::{Job, job};

    #[test]
    fn places_are_read() {
        #[derive(clap::Parser)]
        struct Command {
            #[command(flatten)]
            place: PlaceArgs,
        }
        let parse = |line: &str| {
            Command::try_parse_from(std::iter::once("run").chain(line.split_whitespace()))
                .map(|command| command.place)
        };
        let args = parse("").unwrap();
        assert_eq!(
            (args.backend, args.spawn),
            (Backend::Auto, Spawn::Processes)
        );
        let args = parse("--backend cuda --spawn threads --timeout 5").unwrap();
        assert_eq!((args.backend, args.spawn), (Backend::Cuda, Spawn::Threads));
        assert_eq!(args.timeout.get(), 5);
        for line in ["--backend rocm", "--spawn hosts", "--timeout 0"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn tasks_survive_the_way_to_a_process() {
        let task = Task {
            work: job::tests::small(),
            rank: 1,
            place: Place::Sim {
                cluster: Some("[[node]]\nname = \"n0\"".to_owned()),
                run_key: 7,
            },
            socket: "/tmp/some where/ranks".into(),
        };
        let line = serde_json::to_string(&task).unwrap();
        assert!(!line.contains('\n'));
        assert_eq!(serde_json::from_str::<Task<Job>>(&line).unwrap(), task);
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
