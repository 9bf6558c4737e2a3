//! Real processes for tests: the test binary starts itself again in a role.
//!
//! A test binary that uses this has a test named `child`, which does nothing unless the process was
//! started by [`Process::start`]. A process that is not through by the hard limit is killed, and its
//! test fails: nothing here can hang.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses its own part"
)]

pub mod memory;

use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::ops::Deref;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ep_peers::exchange::tcp::{Tcp, TcpAddress};
use ep_peers::exchange::unix::{Unix, UnixAddress};
use ep_peers::exchange::{Exchange, RunToken};
use ep_peers::{Error, Result};
use rustix::event::{PollFd, PollFlags};

const ROLE: &str = "EP_PEERS_TEST_ROLE";
const MARK: &str = "RESULT ";
/// However wrong things go, a test process ends after this.
const HARD_LIMIT: Duration = Duration::from_secs(20);

/// A running test process. Killed when dropped.
pub struct Process(Child);

impl Process {
    /// Starts this binary's `child` test in a role: words, which it gets from [`role`].
    pub fn start(role: &[&str]) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture", "--test-threads=1"])
            .env(ROLE, role.join("\x1f"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        Self(child)
    }

    pub fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.0)
    }

    /// Waits until the process reports something; it goes on.
    pub fn wait_for_mark(&self) {
        let limit = Instant::now() + HARD_LIMIT;
        let stdout = self.0.stdout.as_ref().unwrap();
        let mut seen = Vec::new();
        let mut byte = [0];
        while !seen.ends_with(MARK.as_bytes()) {
            let left = limit.saturating_duration_since(Instant::now());
            let mut ready = [PollFd::new(stdout, PollFlags::IN)];
            let events = rustix::event::poll(&mut ready, Some(&left.try_into().unwrap())).unwrap();
            assert_eq!(events, 1, "a test process is stuck");
            assert_eq!(
                rustix::io::read(stdout, &mut byte).unwrap(),
                1,
                "it ended without a word"
            );
            seen.push(byte[0]);
        }
    }

    /// What the process reported, once it has ended; nothing if it ended without a report.
    pub fn report(mut self) -> Option<String> {
        let limit = Instant::now() + HARD_LIMIT;
        while self.0.try_wait().unwrap().is_none() {
            assert!(Instant::now() < limit, "a test process is stuck");
            std::thread::sleep(Duration::from_millis(2));
        }
        let mut output = String::new();
        let mut stdout = self.0.stdout.take().unwrap();
        stdout.read_to_string(&mut output).unwrap();
        let (_, report) = output.split_once(MARK)?;
        Some(report.lines().next().unwrap().to_owned())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The words that this process was started with; none in the test runner itself.
pub fn role() -> Option<Vec<String>> {
    let role = std::env::var(ROLE).ok()?;
    Some(role.split('\x1f').map(str::to_owned).collect())
}

/// Reports to the test that started this process.
pub fn report(text: &str) {
    println!("\n{MARK}{}", text.replace('\n', " "));
}

/// An error with all its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

/// Where test processes meet, as a word that fits a role. Held for as long as they may meet.
#[derive(Debug)]
pub struct Place(String);

impl Deref for Place {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl Drop for Place {
    /// A rank 0 that was killed leaves its socket.
    fn drop(&mut self) {
        if let Some(path) = self.strip_prefix("path:") {
            let _ = fs::remove_file(path);
        }
    }
}

/// A new place, for an exchange by `tcp`, `path` or `abstract`.
pub fn meeting_place(transport: &str) -> Place {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let unique = format!("ep-peers-{}-{count}", std::process::id());
    Place(match transport {
        "tcp" => {
            let free = TcpListener::bind("127.0.0.1:0").unwrap();
            format!("tcp:{}", free.local_addr().unwrap().port())
        }
        "path" => format!("path:{}", std::env::temp_dir().join(unique).display()),
        "abstract" => format!("abstract:{unique}"),
        _ => panic!("{transport}"),
    })
}

/// Meets the others as one rank.
pub fn meet(
    place: &str,
    rank: u32,
    size: u32,
    token: u64,
    deadline: Instant,
) -> Result<Box<dyn Exchange>, Error> {
    let token = RunToken(token);
    let (transport, address) = place.split_once(':').unwrap();
    Ok(match transport {
        "tcp" => Box::new(Tcp::connect(&tcp(address), rank, size, token, deadline)?),
        _ => Box::new(Unix::connect(&unix(place), rank, size, token, deadline)?),
    })
}

pub fn tcp(port: &str) -> TcpAddress {
    TcpAddress {
        host: String::from("127.0.0.1"),
        port: port.parse().unwrap(),
    }
}

pub fn unix(place: &str) -> UnixAddress {
    match place.split_once(':').unwrap() {
        ("path", path) => UnixAddress::Path(path.into()),
        (_, name) => UnixAddress::Abstract(name.into()),
    }
}
