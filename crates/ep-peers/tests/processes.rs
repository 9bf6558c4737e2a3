//! Exchanges among real processes, and every way in which one process can spoil them: all survivors
//! have an error that names it, within their deadline.

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use common::{Process, chain, meet, meeting_place, report, role};
use ep_peers::exchange::Step;

const SIZE: u32 = 4;
const TOKEN: u64 = 7;
const STEP: Step = Step::new("handles");
const RECORD: usize = 64;
const TRANSPORTS: [&str; 3] = ["tcp", "path", "abstract"];
/// What a survivor gives each wait.
const PATIENCE: Duration = Duration::from_millis(800);
/// How much later than that its error may be seen on a busy machine.
const SLACK: Duration = Duration::from_millis(800);

#[test]
fn child() {
    let Some(role) = role() else { return };
    let role: Vec<_> = role.iter().map(String::as_str).collect();
    let [what, place, rank] = role[..] else {
        panic!("{role:?}")
    };
    let rank: u32 = rank.parse().unwrap();
    match what {
        "works" => works(place, rank),
        "survives" => survives(place, rank, TOKEN, SIZE),
        "other token" => survives(place, rank, TOKEN + 1, SIZE),
        "other size" => survives(place, rank, TOKEN, SIZE + 1),
        _ if rank == 0 => spoils_as_hub(what, place),
        _ => spoils(what, place, rank),
    }
}

// ---- The good case ----

#[test]
fn processes_exchange_records() {
    for transport in TRANSPORTS {
        let place = meeting_place(transport);
        let processes: Vec<_> = (0..SIZE)
            .map(|rank| Process::start(&["works", &place, &rank.to_string()]))
            .collect();
        for process in processes {
            assert_eq!(
                process.report().as_deref(),
                Some("exchanged"),
                "{transport}"
            );
        }
        if let Some(path) = place.strip_prefix("path:") {
            assert!(
                !std::path::Path::new(path).exists(),
                "the socket file was left behind"
            );
        }
    }
}

fn works(place: &str, rank: u32) {
    let soon = || Instant::now() + Duration::from_secs(10);
    let exchange = meet(place, rank, SIZE, TOKEN, soon()).unwrap();
    assert_eq!((exchange.rank(), exchange.size()), (rank, SIZE));
    // Sizes from nothing to more than any socket's buffer.
    for bytes in [0, 1, 728, 1 << 20, 0, 3].into_iter().cycle().take(30) {
        let record = |rank: u32| vec![u8::try_from(rank).unwrap() + 1; bytes];
        let records = exchange.all_gather(STEP, &record(rank), soon()).unwrap();
        assert!(records.into_iter().eq((0..SIZE).map(record)));
    }
    exchange.barrier(Step::new("end"), soon()).unwrap();
    report("exchanged");
}

#[test]
fn a_socket_file_left_by_a_crash_is_replaced() {
    let place = meeting_place("path");
    drop(UnixListener::bind(place.strip_prefix("path:").unwrap()).unwrap());
    let first = Process::start(&["works", &place, "0"]);
    let others: Vec<_> = (1..SIZE)
        .map(|rank| Process::start(&["works", &place, &rank.to_string()]))
        .collect();
    for process in others.into_iter().chain([first]) {
        assert_eq!(process.report().as_deref(), Some("exchanged"));
    }
}

#[test]
fn a_socket_in_use_is_not_taken_over() {
    let place = meeting_place("path");
    let path = place.strip_prefix("path:").unwrap();
    let _in_use = UnixListener::bind(path).unwrap();
    let soon = Instant::now() + Duration::from_millis(100);
    let error = meet(&place, 0, SIZE, TOKEN, soon).unwrap_err();
    assert!(chain(&error).contains("in use"), "{}", chain(&error));
    assert!(std::path::Path::new(path).exists());
}

#[test]
fn a_rack_of_72_meets() {
    for transport in TRANSPORTS {
        let place = &meeting_place(transport);
        let soon = || Instant::now() + Duration::from_secs(10);
        thread::scope(|scope| {
            for rank in 0..72 {
                scope.spawn(move || {
                    let exchange = meet(place, rank, 72, TOKEN, soon()).unwrap();
                    for _ in 0..3 {
                        let records = exchange.all_gather(STEP, &[7; 728], soon()).unwrap();
                        assert_eq!(records, vec![[7; 728]; 72]);
                    }
                });
            }
        });
    }
}

// ---- The bad cases ----

/// Starts survivors and one process that spoils their group, and holds the survivors to their word:
/// an error with `expected` in it, in time.
fn spoil(bad_rank: u32, role: Option<&str>, expected: &str) {
    let groups = TRANSPORTS.map(|transport| {
        let place = meeting_place(transport);
        let bad = role.map(|role| Process::start(&[role, &place, &bad_rank.to_string()]));
        let survivors: Vec<_> = (0..SIZE)
            .filter(|&rank| rank != bad_rank)
            .map(|rank| (rank, survivor(&place, rank)))
            .collect();
        (transport, place, survivors, bad)
    });
    for (transport, _place, survivors, _bad) in groups {
        hold_to_their_word(transport, survivors, expected);
    }
}

fn survivor(place: &str, rank: u32) -> Process {
    Process::start(&["survives", place, &rank.to_string()])
}

fn hold_to_their_word(transport: &str, survivors: Vec<(u32, Process)>, expected: &str) {
    for (rank, survivor) in survivors {
        let report = survivor.report().expect("a survivor reports");
        assert!(
            report.starts_with("in time: ") && report.contains(expected),
            "{transport}, rank {rank}: {report}"
        );
    }
}

#[test]
fn dies_at_the_rendezvous() {
    for transport in TRANSPORTS {
        let place = meeting_place(transport);
        let bad = Process::start(&["dies before the rendezvous ends", &place, "3"]);
        let mut survivors: Vec<_> = (0..2).map(|rank| (rank, survivor(&place, rank))).collect();
        // Whoever comes last ends the rendezvous: somebody is missing until the rank is dead.
        assert_eq!(bad.report(), None);
        survivors.push((2, survivor(&place, 2)));
        let expected = "rank 3 closed its connection at step rendezvous";
        hold_to_their_word(transport, survivors, expected);
    }
}

/// A rank that keeps to the rules, and reports how it learned that another did not.
fn survives(place: &str, rank: u32, token: u64, size: u32) {
    let begun = Instant::now();
    let mut waits = begun;
    let outcome = meet(place, rank, size, token, begun + PATIENCE).and_then(|exchange| {
        waits = Instant::now();
        exchange.all_gather(STEP, &[0; RECORD], waits + PATIENCE)?;
        waits = Instant::now();
        exchange.barrier(Step::new("after"), waits + PATIENCE)
    });
    let took = waits.elapsed();
    let when = if took <= PATIENCE + SLACK {
        String::from("in time")
    } else {
        format!("late by {:?}", took - PATIENCE)
    };
    match outcome {
        Ok(()) => report(&format!("{when}: nothing happened")),
        Err(error) => report(&format!("{when}: {}", chain(&error))),
    }
}

/// A rank that spoils the group in one way.
fn spoils(what: &str, place: &str, rank: u32) {
    let far = Instant::now() + Duration::from_secs(10);
    // Whoever comes with an own way of speaking does it over a raw connection.
    let met = || meet(place, rank, SIZE, TOKEN, far).unwrap();
    match what {
        "dies before the rendezvous ends" => {
            let mut raw = Raw::connect(place);
            raw.write(&hello(rank, 1));
        }
        "hello of another version" => {
            let mut raw = Raw::connect(place);
            raw.write(&hello(rank, 2));
            raw.stay();
        }
        "foreign hello" => {
            let mut raw = Raw::connect(place);
            raw.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: a probe of some kind\r\n");
            raw.stay();
        }
        "half a hello" => {
            let mut raw = Raw::connect(place);
            raw.write(&hello(rank, 1)[..30]);
            raw.stay();
        }
        "arrives late" => {
            let exchange = met();
            thread::sleep(PATIENCE + SLACK);
            let error = exchange.all_gather(STEP, &[0; RECORD], far).unwrap_err();
            report(&chain(&error));
        }
        "dies before the step" => drop(met()),
        "aborts in the step" => {
            let exchange = met();
            let _ = exchange.all_gather(STEP, &[0; RECORD], far);
            std::process::abort();
        }
        "other size of record" => {
            let _ = met().all_gather(STEP, &[0; RECORD + 1], far);
        }
        "other step" => {
            let _ = met().all_gather(Step::new("teardown"), &[0; RECORD], far);
        }
        _ => {
            let mut raw = Raw::connect(place);
            raw.write(&hello(rank, 1));
            raw.read(48);
            let record = frame(1, 3, rank, 0, "handles", RECORD);
            match what {
                "half a record, then death" => raw.write(&record[..60]),
                "half a header, then silence" => {
                    raw.write(&record[..20]);
                    raw.stay();
                }
                "half a record, then silence" => {
                    raw.write(&record[..60]);
                    raw.stay();
                }
                "a record without end" => {
                    raw.write(&frame(1, 3, rank, 0, "handles", 0)[..12]);
                    raw.write(&u32::MAX.to_le_bytes());
                    raw.write(&record[16..]);
                    raw.stay();
                }
                "foreign bytes" => {
                    raw.write(&[0xa5; 256]);
                    raw.stay();
                }
                "record of another version" => {
                    raw.write(&frame(2, 3, rank, 0, "handles", RECORD));
                    raw.stay();
                }
                "record of another rank" => {
                    raw.write(&frame(1, 3, rank - 1, 0, "handles", RECORD));
                    raw.stay();
                }
                "record of an earlier step" => {
                    raw.write(&frame(1, 3, rank, 9, "handles", RECORD));
                    raw.stay();
                }
                "two records at once" => {
                    raw.write(&record);
                    raw.write(&record);
                    raw.stay();
                }
                _ => panic!("{what}"),
            }
        }
    }
}

/// Rank 0 that spoils the group in one way.
fn spoils_as_hub(what: &str, place: &str) {
    if what == "dies before the step" {
        drop(meet(place, 0, SIZE, TOKEN, Instant::now() + PATIENCE).unwrap());
        return;
    }
    let mut leaves = Raw::listen(place, SIZE - 1);
    for leaf in &mut leaves {
        leaf.read(48 + 12);
    }
    if what == "dies in the rendezvous" {
        return;
    }
    let welcome = match what {
        "welcome of another version" => frame(2, 2, 0, 0, "rendezvous", 0),
        "foreign welcome" => vec![0; 48],
        _ => frame(1, 2, 0, 0, "rendezvous", 0),
    };
    for leaf in &mut leaves {
        leaf.write(&welcome);
    }
    let answer = match what {
        "half an answer, then death" | "half an answer, then silence" => {
            frame(1, 4, 0, 0, "handles", RECORD * SIZE as usize)[..100].to_vec()
        }
        "short answer" => frame(1, 4, 0, 0, "handles", RECORD),
        "foreign answer" => vec![0x5a; 100],
        _ => Vec::new(),
    };
    for leaf in &mut leaves {
        leaf.write(&answer);
    }
    if what != "half an answer, then death" {
        leaves.pop().unwrap().stay();
    }
}

macro_rules! spoiled {
    ($($name:ident: $rank:literal, $role:expr => $expected:expr;)*) => {
        $(#[test] fn $name() { spoil($rank, $role, $expected); })*
    };
}

spoiled! {
    never_comes: 3, None => "rank 3 did not arrive at step rendezvous within ";
    hello_of_another_version: 3, Some("hello of another version")
        => "rank 3 speaks version 2 of the exchange at step rendezvous, the group version 1";
    foreign_hello: 3, Some("foreign hello") => "rank 3 did not arrive at step rendezvous";
    half_a_hello: 3, Some("half a hello") => "rank 3 did not arrive at step rendezvous";
    other_token: 3, Some("other token") => "rank 3 did not arrive at step rendezvous";
    other_size: 3, Some("other size")
        => "rank 3 expects a group of 5 at step rendezvous, the group has 4";
    arrives_late: 3, Some("arrives late") => "rank 3 did not arrive at step handles within ";
    dies_before_the_step: 3, Some("dies before the step")
        => "rank 3 closed its connection at step handles";
    dies_after_a_step: 3, Some("aborts in the step")
        => "rank 3 closed its connection at step after";
    other_size_of_record: 3, Some("other size of record")
        => "rank 3 sent a record of 65 bytes at step handles where the group sends 64";
    other_step: 3, Some("other step")
        => "rank 3 is at step teardown while the group is at step handles";
    dies_in_a_record: 3, Some("half a record, then death")
        => "rank 3 sent 60 of 112 bytes at step handles";
    stalls_in_a_header: 3, Some("half a header, then silence")
        => "rank 3 sent 20 of 48 bytes at step handles";
    stalls_in_a_record: 3, Some("half a record, then silence")
        => "rank 3 sent 60 of 112 bytes at step handles";
    oversized_record: 3, Some("a record without end")
        => "rank 3 sent a record of 4294967295 bytes at step handles";
    foreign_bytes: 3, Some("foreign bytes")
        => "rank 3 sent something that is no frame at step handles";
    record_of_another_version: 3, Some("record of another version")
        => "rank 3 speaks version 2 of the exchange at step handles";
    record_of_another_rank: 3, Some("record of another rank")
        => "rank 3 sent something that is no frame at step handles";
    record_of_another_step: 3, Some("record of an earlier step")
        => "rank 3 is at step handles while the group is at step handles";

    hub_never_comes: 0, None => "cannot reach rank 0 at ";
    hub_dies_in_the_rendezvous: 0, Some("dies in the rendezvous") => "cannot reach rank 0 at ";
    hub_of_another_version: 0, Some("welcome of another version")
        => "rank 0 speaks version 2 of the exchange at step rendezvous";
    hub_is_foreign: 0, Some("foreign welcome")
        => "rank 0 sent something that is no frame at step rendezvous";
    hub_dies_before_the_step: 0, Some("dies before the step") => "its connection at step handles";
    hub_is_silent: 0, Some("silence") => "rank 0 did not arrive at step handles";
    hub_dies_in_its_answer: 0, Some("half an answer, then death")
        => "rank 0 sent 100 of 304 bytes at step handles";
    hub_stalls_in_its_answer: 0, Some("half an answer, then silence")
        => "rank 0 sent 100 of 304 bytes at step handles";
    hub_answers_short: 0, Some("short answer")
        => "rank 0 sent a record of 64 bytes at step handles where the group sends 256";
    hub_answers_foreign: 0, Some("foreign answer")
        => "rank 0 sent something that is no frame at step handles";
}

#[test]
fn two_records_at_once_are_noticed_at_once_or_at_the_next_step() {
    spoil(
        3,
        Some("two records at once"),
        "rank 3 is at step handles while the group is at step",
    );
}

#[test]
fn a_stopped_process_is_named() {
    for transport in ["tcp", "abstract"] {
        let place = meeting_place(transport);
        let stopped = Process::start(&["arrives late", &place, "3"]);
        let survivors: Vec<_> = (0..3)
            .map(|rank| Process::start(&["survives", &place, &rank.to_string()]))
            .collect();
        thread::sleep(PATIENCE / 2);
        rustix::process::kill_process(stopped.pid(), rustix::process::Signal::STOP).unwrap();
        for survivor in survivors {
            let report = survivor.report().unwrap();
            assert!(
                report.starts_with("in time: rank 3 did not arrive at step"),
                "{report}"
            );
        }
    }
}

#[test]
fn a_late_rank_learns_that_it_was_late() {
    for transport in TRANSPORTS {
        let place = meeting_place(transport);
        let late = Process::start(&["arrives late", &place, "3"]);
        let survivors: Vec<_> = (0..3)
            .map(|rank| Process::start(&["survives", &place, &rank.to_string()]))
            .collect();
        let report = late.report().unwrap();
        assert!(
            report.starts_with("rank 3 did not arrive at step handles"),
            "{report}"
        );
        drop(survivors);
    }
}

#[test]
fn a_rank_that_comes_twice_is_named() {
    for transport in TRANSPORTS {
        let place = meeting_place(transport);
        // Rank 3 is missing, so the rendezvous is open when the second rank 2 comes.
        let ranks = [0, 1, 2, 2];
        let processes: Vec<_> = ranks
            .map(|rank| Process::start(&["survives", &place, &rank.to_string()]))
            .into_iter()
            .collect();
        for process in processes {
            let report = process.report().unwrap();
            let expected = "in time: rank 2 came twice at step rendezvous";
            assert!(report.starts_with(expected), "{transport}: {report}");
        }
    }
}

#[test]
fn a_rank_of_another_run_is_told() {
    for transport in TRANSPORTS {
        let place = meeting_place(transport);
        let hub = Process::start(&["survives", &place, "0"]);
        let other = Process::start(&["other token", &place, "2"]);
        let report = other.report().unwrap();
        let expected = "in time: rank 2 belongs to another run";
        assert!(report.starts_with(expected), "{transport}: {report}");
        let report = hub.report().unwrap();
        assert!(
            report.contains("ranks 1-3 did not arrive"),
            "{transport}: {report}"
        );
    }
}

#[test]
fn probes_do_not_keep_ranks_apart() {
    for transport in TRANSPORTS {
        let place = meeting_place(transport);
        let mut probes: Vec<_> = (0..3)
            .map(|_| Process::start(&["foreign hello", &place, "3"]))
            .collect();
        let ranks: Vec<_> = (0..SIZE)
            .map(|rank| Process::start(&["works", &place, &rank.to_string()]))
            .collect();
        for rank in ranks {
            assert_eq!(rank.report().as_deref(), Some("exchanged"), "{transport}");
        }
        probes.clear();
    }
}

// ---- Speaking without the library ----

/// A frame as the protocol has it, with a payload of zeros.
fn frame(version: u16, kind: u8, rank: u32, sequence: u64, step: &str, length: usize) -> Vec<u8> {
    let mut name = [0; 16];
    name[..step.len()].copy_from_slice(step.as_bytes());
    let mut bytes = b"EPX\x1a".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend([kind, 0]);
    bytes.extend(rank.to_le_bytes());
    bytes.extend(u32::try_from(length).unwrap().to_le_bytes());
    bytes.extend(sequence.to_le_bytes());
    bytes.extend(name);
    bytes.extend(10_000_u64.to_le_bytes());
    bytes.resize(bytes.len() + length, 0);
    bytes
}

fn hello(rank: u32, version: u16) -> Vec<u8> {
    let mut bytes = frame(version, 1, rank, 0, "rendezvous", 12);
    let payload = bytes.len() - 12;
    bytes[payload..payload + 8].copy_from_slice(&TOKEN.to_le_bytes());
    bytes[payload + 8..].copy_from_slice(&SIZE.to_le_bytes());
    bytes
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// A connection of a process that keeps to no rules.
struct Raw(Box<dyn Stream>);

impl Raw {
    fn connect(place: &str) -> Self {
        let limit = Instant::now() + Duration::from_secs(10);
        loop {
            let attempt: std::io::Result<Self> = match place.split_once(':').unwrap() {
                ("tcp", port) => TcpStream::connect(format!("127.0.0.1:{port}")).map(Self::new),
                ("path", path) => UnixStream::connect(path).map(Self::new),
                (_, name) => {
                    UnixStream::connect_addr(&SocketAddr::from_abstract_name(name).unwrap())
                        .map(Self::new)
                }
            };
            match attempt {
                Ok(raw) => return raw,
                Err(_) => assert!(Instant::now() < limit, "rank 0 is not there"),
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn listen(place: &str, count: u32) -> Vec<Self> {
        let mut accept: Box<dyn FnMut() -> Self> = match place.split_once(':').unwrap() {
            ("tcp", port) => {
                let listener = TcpListener::bind(format!("127.0.0.1:{port}")).unwrap();
                Box::new(move || Self::new(listener.accept().unwrap().0))
            }
            (kind, name) => {
                let listener = if kind == "path" {
                    UnixListener::bind(name)
                } else {
                    UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).unwrap())
                }
                .unwrap();
                Box::new(move || Self::new(listener.accept().unwrap().0))
            }
        };
        (0..count).map(|_| accept()).collect()
    }

    fn new(stream: impl Stream + 'static) -> Self {
        Self(Box::new(stream))
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    fn read(&mut self, bytes: usize) {
        self.0.read_exact(&mut vec![0; bytes]).unwrap();
    }

    /// Holds the connection until this process is killed.
    fn stay(&mut self) {
        thread::sleep(Duration::from_secs(10));
    }
}
