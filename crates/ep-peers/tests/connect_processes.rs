//! Connected groups of real processes on the simulated cluster.

mod common;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::memory::{Kind, Memory, identity, prove};
use common::{Process, chain, meet, meeting_place, report, role};
use ep_peers::exchange::{Exchange, Step};
use ep_peers::{Access, Error, Group, Peers, connect};
use ep_sim::{Cluster, SimDriver};
use ep_sys::{DeviceOrdinal, Driver};

const SIZE: u32 = 4;
const DEVICE: DeviceOrdinal = DeviceOrdinal(0);
const PATIENCE: Duration = Duration::from_millis(1000);
const SLACK: Duration = Duration::from_millis(800);

#[test]
fn child() {
    let Some(role) = role() else { return };
    let role: Vec<_> = role.iter().map(String::as_str).collect();
    let [what, place, rank, kind, key] = role[..] else {
        panic!("{role:?}")
    };
    let kind = Kind::ALL
        .into_iter()
        .find(|known| format!("{known:?}") == kind)
        .unwrap();
    let rank = Rank::meet(place, rank.parse().unwrap(), kind, key.parse().unwrap());
    match what {
        "connects" => rank.connects(),
        "connects often" => rank.connects_often(),
        "is killed while connected" => rank.survives(false),
        "survives" => rank.survives(true),
        _ => panic!("{what}"),
    }
}

/// A rank that has met the others.
struct Rank {
    exchange: Box<dyn Exchange>,
    driver: Arc<dyn Driver>,
    sim: Arc<SimDriver>,
    kind: Kind,
}

impl Rank {
    fn meet(place: &str, rank: u32, kind: Kind, key: u64) -> Self {
        let cluster = match kind {
            Kind::Fabric => {
                let mut cluster = Cluster::gb200_nvl72(2);
                // One GPU on the first node, three on the second.
                cluster.nodes[0].gpus.truncate(1);
                cluster.nodes[1].gpus.truncate(3);
                cluster
            }
            Kind::Malloc | Kind::PosixFd => Cluster::hgx_h200(SIZE),
        };
        let sim = SimDriver::for_rank(&cluster.with_run_key(key), rank as usize).unwrap();
        Self {
            exchange: meet(place, rank, SIZE, key, soon()).unwrap(),
            driver: Arc::clone(&sim) as Arc<dyn Driver>,
            sim,
            kind,
        }
    }

    fn group(&self) -> Group<'_> {
        Group::whole(&*self.exchange)
    }

    fn connect(&self, memory: &Memory, generation: u64) -> Peers {
        let identity = identity(&*self.driver, DEVICE, std::process::id().into());
        let offer = memory.offer(generation, identity);
        connect(&self.group(), &self.driver, DEVICE, offer, soon()).unwrap()
    }

    fn connects(self) {
        let memory = Memory::new(&self.driver, DEVICE, self.kind);
        let peers = self.connect(&memory, 1);
        let access = match self.kind {
            Kind::Malloc => Access::Ipc,
            Kind::PosixFd => Access::PosixFd,
            Kind::Fabric => Access::Fabric,
        };
        for peer in (0..SIZE).filter(|&peer| peer != peers.rank()) {
            assert_eq!(peers.verdict(peers.rank(), peer), Ok(access));
        }
        prove(&self.group(), &*self.driver, DEVICE, &peers);
        peers.disconnect(&self.group(), soon()).unwrap();
        drop(memory);
        assert!(self.sim.live().is_empty());
        report("connected");
    }

    fn connects_often(self) {
        let mut held = None;
        for generation in 0..50 {
            let memory = Memory::new(&self.driver, DEVICE, self.kind);
            let peers = self.connect(&memory, generation);
            peers.disconnect(&self.group(), soon()).unwrap();
            drop(memory);
            let now = (count("/proc/self/fd"), mappings());
            assert_eq!(*held.get_or_insert(now), now, "round {generation}");
        }
        report("connected often");
    }

    /// Waits connected, is or is not killed, and leaves.
    fn survives(self, leaves: bool) {
        let memory = Memory::new(&self.driver, DEVICE, self.kind);
        let peers = self.connect(&memory, 1);
        prove(&self.group(), &*self.driver, DEVICE, &peers);
        if !leaves {
            report("connected");
            thread::sleep(Duration::from_secs(10));
        }
        let begun = Instant::now();
        let outcome = peers.disconnect(&self.group(), begun + PATIENCE);
        assert!(begun.elapsed() < PATIENCE + SLACK);
        drop(memory);
        assert!(self.sim.live().is_empty(), "{:?}", self.sim.live());
        let Err(Error::Exchange(fault)) = &outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(fault.step, Step::new("teardown"));
        report(&chain(fault));
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn count(folder: &str) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

/// Mappings of simulated memory in this process.
fn mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("ep-sim")).count()
}

fn start(what: &str, place: &str, rank: u32, kind: Kind) -> Process {
    // The run's key keeps tests apart that run at the same time.
    let key = place
        .bytes()
        .fold(u64::from(std::process::id()), |key, byte| {
            key.wrapping_mul(31).wrapping_add(byte.into())
        });
    let (rank, kind, key) = (rank.to_string(), format!("{kind:?}"), key.to_string());
    Process::start(&[what, place, &rank, &kind, &key])
}

fn all_report(what: &str, expected: &str) {
    let groups: Vec<_> = Kind::ALL
        .into_iter()
        .zip(["tcp", "path", "abstract"])
        .map(|(kind, transport)| {
            let place = meeting_place(transport);
            let group: Vec<_> = (0..SIZE)
                .map(|rank| start(what, &place, rank, kind))
                .collect();
            (kind, place, group)
        })
        .collect();
    for (kind, _place, group) in groups {
        for process in group {
            assert_eq!(process.report().as_deref(), Some(expected), "{kind:?}");
        }
    }
}

#[test]
fn processes_connect_by_every_kind_of_memory() {
    all_report("connects", "connected");
}

#[test]
fn connecting_again_and_again_leaves_nothing_behind() {
    all_report("connects often", "connected often");
}

#[test]
fn survivors_of_a_killed_process_leave_in_time_and_give_all_back() {
    for (kind, killed) in [(Kind::Malloc, 3), (Kind::PosixFd, 1), (Kind::Fabric, 0)] {
        let place = meeting_place("tcp");
        let victim = start("is killed while connected", &place, killed, kind);
        let survivors: Vec<_> = (0..SIZE)
            .filter(|&rank| rank != killed)
            .map(|rank| start("survives", &place, rank, kind))
            .collect();
        victim.wait_for_mark();
        drop(victim);
        for survivor in survivors {
            let report = survivor.report().expect("a survivor reports");
            assert!(
                report.starts_with(&format!("rank {killed} ")),
                "{kind:?}: {report}"
            );
        }
    }
}
