//! Whatever bytes come over a connection of the exchange, each side ends as soon as the connection
//! does, with the group's result or a fault that names a rank.
//!
//! The parser of frames is private, and stays so: the bytes go through real sockets, in the three
//! places where another process can put them. Nothing here waits unless the exchange does.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ep_peers::exchange::unix::{Unix, UnixAddress};
use ep_peers::exchange::{Exchange, RunToken, Step};
use ep_peers::{Error, Result};

/// The group's, which the corpus uses too.
pub(crate) const TOKEN: u64 = 0x1122_3344_5566_7788;
pub(crate) const STEP: &str = "handles";
pub(crate) const RECORD: [u8; 12] = *b"one's record";

const HEADER: usize = 48;
/// For the whole exchange. No bytes may make anyone wait for it.
const PATIENCE: Duration = Duration::from_secs(20);
/// What a busy machine may take for work without a wait.
const AT_ONCE: Duration = Duration::from_secs(10);

/// The property.
pub(crate) fn check(bytes: &[u8]) {
    let begun = Instant::now();
    as_stranger(bytes);
    as_rank_1(bytes);
    as_rank_0(bytes);
    assert!(begun.elapsed() < AT_ONCE, "it waited");
}

/// Somebody connects to the rendezvous before rank 1 does.
fn as_stranger(bytes: &[u8]) {
    let name = &fresh_name();
    beside(
        || {
            say(&mut connect(name), bytes);
            // Unless the stranger ended the rendezvous.
            if let Ok(mut peer) = UnixStream::connect_addr(&address(name)) {
                let _ = peer.write_all(&hello());
                hear(&mut peer);
            }
        },
        || match meet(name, 0) {
            Ok(group) => assert_eq!((group.rank(), group.size()), (0, 2)),
            Err(error) => {
                assert_eq!(named(&error).len(), 1, "{error}");
                // Other programs are turned away, and the group goes on waiting for its own.
                assert!(
                    bytes.starts_with(b"EPX\x1a") && bytes.len() >= HEADER,
                    "a stranger broke the group: {error}"
                );
            }
        },
    );
}

/// Rank 1 has met rank 0 and takes its turn with anything.
fn as_rank_1(bytes: &[u8]) {
    let name = &fresh_name();
    beside(
        || {
            let mut peer = connect(name);
            peer.write_all(&hello()).expect("rank 0 listens");
            peer.read_exact(&mut welcome()).expect("a group of two");
            say(&mut peer, bytes);
            hear(&mut peer);
        },
        || {
            let group = meet(name, 0).expect("a group of two");
            let outcome = group.all_gather(Step::new(STEP), &RECORD, soon());
            match (&outcome, in_turn(bytes, 3, 1, RECORD.len())) {
                (Ok(records), Some(record)) => assert_eq!(*records, [&RECORD, record]),
                (Err(error), None) => assert_eq!(named(error), [1], "{error}"),
                _ => panic!("{outcome:?}"),
            }
            stays_broken(&group, outcome);
        },
    );
}

/// Rank 0 has met rank 1 and answers with anything.
fn as_rank_0(bytes: &[u8]) {
    let name = &fresh_name();
    let listener = UnixListener::bind_addr(&address(name)).expect("a name of its own");
    beside(
        || {
            let (mut leaf, _) = listener.accept().expect("rank 1 comes");
            leaf.read_exact(&mut hello()).expect("it says who it is");
            say(&mut leaf, &[welcome().as_slice(), bytes].concat());
            hear(&mut leaf);
        },
        || {
            let group = meet(name, 1).expect("a group of two");
            let outcome = group.all_gather(Step::new(STEP), &RECORD, soon());
            match (&outcome, in_turn(bytes, 4, 0, 2 * RECORD.len())) {
                (Ok(records), Some(all)) => {
                    let (first, second) = all.split_at(RECORD.len());
                    assert_eq!(*records, [first, second]);
                }
                (Err(error), None) => {
                    assert!(!named(error).is_empty() || tells_nobody(bytes), "{error}");
                }
                _ => panic!("{outcome:?}"),
            }
            stays_broken(&group, outcome);
        },
    );
}

/// The payload, if the bytes begin with the frame that is due. What is reserved, and how much time
/// the sender has left, may be anything.
fn in_turn(bytes: &[u8], kind: u8, rank: u32, length: usize) -> Option<&[u8]> {
    let payload = bytes.get(HEADER..HEADER + length)?;
    let mut due = frame(kind, rank, STEP, payload);
    due[7] = bytes[7];
    due[40..HEADER].copy_from_slice(&bytes[40..HEADER]);
    bytes.starts_with(&due).then_some(payload)
}

/// Whether these are rank 0's word on a fault, with no rank in it.
fn tells_nobody(bytes: &[u8]) -> bool {
    bytes.get(6) == Some(&5) && bytes.get(12..16) == Some(&[52, 0, 0, 0])
}

/// After a fault there is no way back, and no wait.
fn stays_broken(group: &Unix, outcome: Result<Vec<Vec<u8>>>) {
    if let Err(error) = outcome {
        let again = group.barrier(Step::new("after"), soon());
        let again = again.expect_err("it is broken").to_string();
        assert_eq!(again, error.to_string());
    }
}

/// The ranks at fault.
fn named(error: &Error) -> &[u32] {
    let message = error.to_string();
    assert!(!message.contains(char::is_control), "{message:?}");
    match error {
        Error::Exchange(fault) => &fault.ranks,
        other => panic!("{other}"),
    }
}

/// Runs the other process's part in a thread.
fn beside(other: impl FnOnce() + Send, one: impl FnOnce()) {
    thread::scope(|scope| {
        let other = scope.spawn(other);
        one();
        // The scope's own wait is over before the thread is, whose memory would then look leaked.
        other.join().expect("the other part does not panic");
    });
}

/// An abstract socket's name: unlike TCP's, its connections leave nothing behind when they end.
fn fresh_name() -> Vec<u8> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("ep-fuzz-{}-{count}", std::process::id()).into_bytes()
}

fn address(name: &[u8]) -> SocketAddr {
    SocketAddr::from_abstract_name(name).expect("it is short")
}

fn meet(name: &[u8], rank: u32) -> Result<Unix> {
    let address = UnixAddress::Abstract(name.to_vec());
    Unix::connect(&address, rank, 2, RunToken(TOKEN), soon())
}

/// Connects as soon as rank 0 listens.
fn connect(name: &[u8]) -> UnixStream {
    let limit = soon();
    loop {
        match UnixStream::connect_addr(&address(name)) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < limit, "{error}"),
        }
        thread::yield_now();
    }
}

/// Hears the other side out. A connection that is closed with unread bytes is reset, and what was
/// said may be lost.
fn hear(stream: &mut UnixStream) {
    let _ = io::copy(stream, &mut io::sink());
}

/// Says it and nothing else. The other side may have ended the connection by then.
fn say(stream: &mut UnixStream, bytes: &[u8]) {
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
}

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// A frame of the protocol, version 1.
pub(crate) fn frame(kind: u8, rank: u32, step: &str, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short");
    let mut bytes = b"EPX\x1a\x01\0".to_vec();
    bytes.extend([kind, 0]);
    bytes.extend(rank.to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend(step.as_bytes());
    bytes.resize(40, 0);
    bytes.extend(60_000_u64.to_le_bytes());
    bytes.extend(payload);
    bytes
}

/// Rank 1 introduces itself.
pub(crate) fn hello() -> Vec<u8> {
    let payload = [TOKEN.to_le_bytes().as_slice(), &2_u32.to_le_bytes()].concat();
    frame(1, 1, "rendezvous", &payload)
}

fn welcome() -> Vec<u8> {
    frame(2, 0, "rendezvous", &[])
}
