//! Descriptors between threads and between processes, and what happens when a process has no room
//! for them.

mod common;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use common::{Process, meet, meeting_place, report, role};
use ep_peers::exchange::local::local;
use ep_peers::exchange::{Exchange, Step};
use ep_peers::{DescriptorError, pass_descriptors};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const STEP: Step = Step::new("descriptors");
const TOO_MANY_OPEN_FILES: i32 = 24;

fn memory(content: &str) -> OwnedFd {
    let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::io::pwrite(&file, content.as_bytes(), 0).unwrap();
    file
}

fn content(descriptor: OwnedFd) -> String {
    let mut content = String::new();
    let mut file = File::from(descriptor);
    file.read_to_string(&mut content).unwrap();
    content
}

/// Passes a file that names this rank to the peers; what came, by rank.
fn pass(
    exchange: &dyn Exchange,
    offers: bool,
    peers: &[bool],
) -> Vec<Result<String, DescriptorError>> {
    let file = memory(&format!("of rank {}", exchange.rank()));
    let own = offers.then(|| file.as_fd());
    let deadline = Instant::now() + Duration::from_secs(10);
    let received = pass_descriptors(exchange, STEP, own, peers, deadline).unwrap();
    // Every descriptor is a file of its own: the position is shared with its other holders.
    received
        .into_iter()
        .map(|received| received.map(reread))
        .collect()
}

fn reread(descriptor: OwnedFd) -> String {
    let link = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
    content(File::open(link).unwrap().into())
}

#[test]
fn threads_get_exactly_what_their_peers_offer() {
    // Ranks 0, 1, 3 are one host, 2 and 4 another; rank 3 has nothing to give.
    let host = [0, 0, 1, 0, 1];
    thread::scope(|scope| {
        for member in local(5) {
            scope.spawn(move || {
                let own = member.rank() as usize;
                let peers = host.map(|other| other == host[own]);
                let received = pass(&member, own != 3, &peers);
                for (rank, received) in received.into_iter().enumerate() {
                    let expected = match (rank == own || !peers[rank], rank) {
                        (true, _) => Err(DescriptorError::NotPeer),
                        (false, 3) => Err(DescriptorError::NotOffered),
                        (false, rank) => Ok(format!("of rank {rank}")),
                    };
                    assert_eq!(received, expected, "rank {rank} at rank {own}");
                }
            });
        }
    });
}

#[test]
fn child() {
    let Some(role) = role() else { return };
    let role: Vec<_> = role.iter().map(String::as_str).collect();
    let [place, rank, room] = role[..] else {
        panic!("{role:?}")
    };
    let deadline = Instant::now() + Duration::from_secs(10);
    let exchange = meet(place, rank.parse().unwrap(), 3, 0, deadline).unwrap();
    let file = memory(&format!("of rank {rank}"));
    let before = getrlimit(Resource::Nofile);
    let _fillers = room.parse().map(leave_room_for);
    let received = pass_descriptors(&*exchange, STEP, Some(file.as_fd()), &[true; 3], deadline);
    setrlimit(Resource::Nofile, before).unwrap();
    let received = received
        .unwrap()
        .into_iter()
        .map(|received| match received {
            Ok(descriptor) => reread(descriptor),
            Err(DescriptorError::NotPeer) => String::from("self"),
            Err(error) => format!("{error:?}"),
        });
    report(&received.collect::<Vec<_>>().join("; "));
}

/// Lets this process open only so many descriptors more, while what is returned stays open.
fn leave_room_for(more: u64) -> Vec<File> {
    let mut fillers = Vec::new();
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count();
    // Beyond the holes that earlier descriptors left.
    let top = loop {
        let filler = File::open("/dev/null").unwrap();
        let number = u64::try_from(filler.as_raw_fd()).unwrap();
        fillers.push(filler);
        if fillers.len() > open {
            break number;
        }
    };
    let limit = Rlimit {
        current: Some(top + 1 + more),
        maximum: getrlimit(Resource::Nofile).maximum,
    };
    setrlimit(Resource::Nofile, limit).unwrap();
    fillers
}

/// What each of three processes got, where rank 2 has room for so many descriptors more.
fn with_room(room: &str) -> [String; 3] {
    let place = meeting_place("tcp");
    let room = |rank| if rank == "2" { room } else { "enough" };
    ["0", "1", "2"]
        .map(|rank| Process::start(&[&place, rank, room(rank)]))
        .map(|process| process.report().unwrap())
}

#[test]
fn processes_get_what_their_peers_offer() {
    assert_eq!(
        with_room("enough"),
        [
            "self; of rank 1; of rank 2",
            "of rank 0; self; of rank 2",
            "of rank 0; of rank 1; self",
        ]
    );
}

#[test]
fn a_process_without_any_room_is_told_from_the_others() {
    let missing = format!("NotSent {{ errno: {TOO_MANY_OPEN_FILES} }}");
    assert_eq!(
        with_room("0"),
        [
            format!("self; of rank 1; {missing}"),
            format!("of rank 0; self; {missing}"),
            format!("{missing}; {missing}; self"),
        ]
    );
}

#[test]
fn a_process_that_can_send_but_not_take_says_so() {
    // Room for the socket that listens and the one that was accepted, not for what comes.
    let missing = format!("NotReceived {{ errno: {TOO_MANY_OPEN_FILES} }}");
    assert_eq!(
        with_room("2"),
        [
            String::from("self; of rank 1; of rank 2"),
            String::from("of rank 0; self; of rank 2"),
            format!("{missing}; {missing}; self"),
        ]
    );
}
