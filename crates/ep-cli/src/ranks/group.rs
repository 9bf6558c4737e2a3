//! The ranks as processes: start them, hear them, end them in time.
//!
//! A rank reads its task, one line, from standard input, which then stays open: its end tells the
//! rank that the head is gone. It answers with [`Message`]s, one JSON line each, on standard output.

use std::fmt;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What a rank says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Message<T> {
    /// What it is doing.
    Progress(String),
    /// The end, and a good one.
    Done(T),
    /// The end.
    Failed(String),
}

/// How long a group may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// For everything.
    pub(crate) deadline: Duration,
    /// For the other ranks once one has failed: they may know why.
    pub(crate) grace: Duration,
}

/// The ranks that failed, the first one first.
#[derive(Debug)]
pub(crate) struct GroupError {
    pub(crate) failures: Vec<(usize, Failure)>,
}

/// How a rank failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum Failure {
    #[error("its process could not be started ({0})")]
    Start(io::Error),
    #[error("{0}")]
    Said(String),
    #[error("its process ended ({0}) without a result; see its output above")]
    Ended(ExitStatus),
    #[error("its process said {0:?}, which is no message; something else writes to its output")]
    Garbled(String),
    #[error("it had not finished after {} s and was ended; see --timeout", .0.as_secs())]
    Late(Duration),
}

impl fmt::Display for GroupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (rank, failure)) in self.failures.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            let name = format!("rank {rank}: ");
            let failure = failure.to_string();
            // Errors of the library begin with the rank that found them.
            write!(
                f,
                "{name}{}",
                failure.strip_prefix(&name).unwrap_or(&failure)
            )?;
        }
        Ok(())
    }
}

impl std::error::Error for GroupError {}

/// Runs `size` ranks, each `command(rank)` fed with its line of input, and returns what they found.
/// None of the processes is left when this returns.
pub(crate) fn run<T: DeserializeOwned + Send + 'static>(
    size: usize,
    patience: Patience,
    mut command: impl FnMut(usize) -> (Command, String),
    mut progress: impl FnMut(usize, &str),
) -> Result<Vec<T>, GroupError> {
    let start = Instant::now();
    let (sender, events) = mpsc::channel();
    let mut ranks = Vec::with_capacity(size);
    for rank in 0..size {
        let (command, task) = command(rank);
        match Rank::start(rank, command, &task, sender.clone()) {
            Ok(process) => ranks.push(process),
            Err(error) => {
                return Err(GroupError {
                    failures: vec![(rank, Failure::Start(error))],
                });
            }
        }
    }
    drop(sender);

    // No run takes decades.
    let mut end = start + patience.deadline.min(Duration::from_secs(1 << 30));
    let mut outcomes: Vec<Option<T>> = (0..size).map(|_| None).collect();
    let mut ended = vec![false; size];
    let mut failures: Vec<(usize, Failure)> = Vec::new();
    while ended.contains(&false) {
        let left = end.saturating_duration_since(Instant::now());
        let Ok((rank, event)) = events.recv_timeout(left) else {
            break;
        };
        let failure = match event {
            Event::Said(Message::Progress(text)) => {
                progress(rank, &text);
                continue;
            }
            Event::Said(Message::Done(outcome)) => {
                outcomes[rank] = Some(outcome);
                continue;
            }
            Event::Said(Message::Failed(text)) => Failure::Said(text),
            Event::Garbled(line) => Failure::Garbled(line),
            Event::Closed => match ranks[rank].wait(end) {
                // Late, as found below.
                Ok(None) => continue,
                Ok(Some(status)) => {
                    ended[rank] = true;
                    // A crash after a result, while tearing down, is a failure too.
                    if status.success() && outcomes[rank].is_some() {
                        continue;
                    }
                    Failure::Ended(status)
                }
                Err(error) => Failure::Said(error.to_string()),
            },
        };
        if failures.is_empty() {
            end = end.min(Instant::now() + patience.grace);
        }
        // The first word of a rank says more than how its process ended.
        if failures.iter().all(|(failed, _)| *failed != rank) {
            failures.push((rank, failure));
        }
    }

    if failures.is_empty() {
        let late = ended.iter().enumerate().filter(|(_, ended)| !**ended);
        failures.extend(late.map(|(rank, _)| (rank, Failure::Late(start.elapsed()))));
    }
    if failures.is_empty() {
        Ok(outcomes.into_iter().flatten().collect())
    } else {
        Err(GroupError { failures })
    }
}

enum Event<T> {
    Said(Message<T>),
    Garbled(String),
    Closed,
}

/// A rank's process; ended when dropped.
struct Rank {
    rank: usize,
    child: Child,
    /// Open as long as the head lives.
    _stdin: Option<ChildStdin>,
}

impl Rank {
    fn start<T: DeserializeOwned + Send + 'static>(
        rank: usize,
        mut command: Command,
        task: &str,
        events: Sender<(usize, Event<T>)>,
    ) -> io::Result<Self> {
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut this = Self {
            rank,
            child,
            _stdin: None,
        };
        let stdout = this.child.stdout.take();
        this._stdin = this.child.stdin.take();
        if let Some(stdin) = &mut this._stdin {
            match writeln!(stdin, "{task}") {
                // It ended before it read; its output or its status says why.
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
                _ => {}
            }
        }
        thread::Builder::new()
            .name(format!("rank {rank}"))
            .spawn(move || {
                if let Some(stdout) = stdout {
                    listen(rank, stdout, &events);
                }
                // The head may have stopped listening.
                let _ = events.send((rank, Event::Closed));
            })?;
        Ok(this)
    }

    /// Its status, or none if it has not ended by `end`. It has closed its output, so that this is a
    /// matter of microseconds.
    fn wait(&mut self, end: Instant) -> io::Result<Option<ExitStatus>> {
        loop {
            match self.child.try_wait()? {
                None if Instant::now() < end => thread::sleep(Duration::from_millis(1)),
                status => return Ok(status),
            }
        }
    }

    fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        if self.is_alive()
            && let Err(error) = self.child.kill().and_then(|()| self.child.wait())
        {
            tracing::error!(rank = self.rank, pid = self.child.id(), %error, "a rank's process is left behind");
        }
    }
}

fn listen<T: DeserializeOwned>(
    rank: usize,
    stdout: ChildStdout,
    events: &Sender<(usize, Event<T>)>,
) {
    for line in BufReader::new(stdout).lines() {
        let Ok(line) = line else { return };
        let event = match serde_json::from_str(&line) {
            Ok(message) => Event::Said(message),
            Err(_) => Event::Garbled(line),
        };
        if events.send((rank, event)).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(outcome: u64) -> String {
        serde_json::to_string(&Message::Done(outcome)).unwrap()
    }

    const PATIENCE: Patience = Patience {
        deadline: Duration::from_secs(20),
        grace: Duration::from_millis(300),
    };

    /// Runs shell scripts as ranks; `$line` is the task.
    fn shell(patience: Patience, scripts: &[String]) -> Result<Vec<u64>, GroupError> {
        run(
            scripts.len(),
            patience,
            |rank| {
                let mut command = Command::new("sh");
                command
                    .arg("-c")
                    .arg(format!("read -r line; {}", scripts[rank]));
                (command, done(10 + rank as u64))
            },
            |_, _| {},
        )
    }

    #[test]
    fn ranks_read_their_task_and_answer_in_order_of_rank() {
        let echo = |delay| format!("sleep {delay}; printf '%s\\n' \"$line\"");
        let outcomes = shell(PATIENCE, &[echo("0.2"), echo("0"), echo("0.1")]).unwrap();
        assert_eq!(outcomes, [10, 11, 12]);
    }

    #[test]
    fn progress_is_passed_on() {
        let mut heard = Vec::new();
        let answer = done(1);
        run::<u64>(
            2,
            PATIENCE,
            |rank| {
                let mut command = Command::new("sh");
                command.arg("-c").arg(format!(
                    "echo '{{\"progress\":\"step {rank}\"}}'; printf '%s\\n' '{answer}'"
                ));
                (command, String::new())
            },
            |rank, text| heard.push((rank, text.to_owned())),
        )
        .unwrap();
        heard.sort();
        assert_eq!(heard, [(0, "step 0".to_owned()), (1, "step 1".to_owned())]);
    }

    #[test]
    fn a_failure_is_named_and_the_others_are_ended() {
        let start = Instant::now();
        let error = shell(
            PATIENCE,
            &[
                "exec sleep 60".to_owned(),
                "echo '{\"failed\":\"no memory\"}'; exit 1".to_owned(),
            ],
        )
        .unwrap_err();
        assert_eq!(error.to_string(), "rank 1: no memory");
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn what_others_say_within_the_grace_is_kept() {
        let patience = Patience {
            grace: Duration::from_secs(10),
            ..PATIENCE
        };
        let error = shell(
            patience,
            &[
                "sleep 0.3; echo '{\"failed\":\"rank 1 is missing\"}'; exit 1".to_owned(),
                "kill -9 $$".to_owned(),
            ],
        )
        .unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("rank 1: its process ended (signal: 9"),
            "{text}"
        );
        assert!(text.ends_with("rank 0: rank 1 is missing"), "{text}");
    }

    #[test]
    fn silence_and_noise_are_failures() {
        let good = "printf '%s\\n' \"$line\"".to_owned();
        let error = shell(PATIENCE, &[good.clone(), "exit 0".to_owned()]).unwrap_err();
        assert!(
            matches!(error.failures[..], [(1, Failure::Ended(_))]),
            "{error}"
        );
        let error = shell(PATIENCE, &["echo hello".to_owned(), good.clone()]).unwrap_err();
        assert!(matches!(&error.failures[..], [(0, Failure::Garbled(line))] if line == "hello"));
        let error = shell(PATIENCE, &[format!("{good}; exit 9"), good]).unwrap_err();
        assert!(
            matches!(error.failures[..], [(0, Failure::Ended(_))]),
            "{error}"
        );
    }

    #[test]
    fn the_deadline_names_every_late_rank() {
        let good = "printf '%s\\n' \"$line\"".to_owned();
        let sleep = "exec sleep 60".to_owned();
        let patience = Patience {
            deadline: Duration::from_millis(500),
            ..PATIENCE
        };
        let error = shell(patience, &[sleep.clone(), good.clone(), sleep]).unwrap_err();
        assert!(
            matches!(
                error.failures[..],
                [(0, Failure::Late(_)), (2, Failure::Late(_))]
            ),
            "{error}"
        );
        let error = shell(patience, &[format!("{good}; exec sleep 60")]).unwrap_err();
        assert!(
            matches!(error.failures[..], [(0, Failure::Late(_))]),
            "{error}"
        );
    }

    #[test]
    fn a_command_that_does_not_exist_is_named() {
        let error = run::<u64>(
            1,
            PATIENCE,
            |_| (Command::new("/nonexistent/ep"), String::new()),
            |_, _| {},
        )
        .unwrap_err();
        assert!(
            matches!(error.failures[..], [(0, Failure::Start(_))]),
            "{error}"
        );
    }
}
