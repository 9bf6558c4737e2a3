//! Connected groups on the simulated cluster, with a thread for each rank.

mod common;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::chain;
use common::memory::{DIGEST, Kind, Memory, failed_offer, identity, prove};
use ep_peers::exchange::local::{Local, local};
use ep_peers::exchange::{Cause, Exchange, Fault, Step};
use ep_peers::wire::{Identity, Refusal};
use ep_peers::{Access, Error, Group, Nearness, NvlinkCheck, Offer, Peers, Reason, connect};
use ep_sim::{Cluster, Entry, FaultPlan, Gpu, IpcNamespace, Node, Outcome, PeerAccess, SimDriver};
use ep_sys::{Call, DeviceOrdinal, DevicePtr, Driver, Status};

/// One rank of a test group.
struct Rank {
    exchange: Local,
    sim: Arc<SimDriver>,
    driver: Arc<dyn Driver>,
    device: DeviceOrdinal,
    identity: Identity,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ranks {
    /// Ranks of a node are threads of one process, and see all its GPUs.
    Threads,
    /// Every rank is a process, and sees only its own GPU.
    Processes,
}

impl Rank {
    fn rank(&self) -> u32 {
        self.exchange.rank()
    }

    /// The same rank in another group.
    fn again(&self, exchange: Local) -> Self {
        Self {
            exchange,
            sim: Arc::clone(&self.sim),
            driver: Arc::clone(&self.driver),
            ..*self
        }
    }

    fn group(&self) -> Group<'_> {
        Group::whole(&self.exchange)
    }

    fn memory(&self, kind: Kind) -> Memory {
        Memory::new(&self.driver, self.device, kind)
    }

    fn connect(&self, memory: &Memory) -> Result<Peers, Error> {
        let offer = memory.offer(1, self.identity);
        connect(&self.group(), &self.driver, self.device, offer, soon())
    }

    fn prove(&self, peers: &Peers) {
        prove(&self.group(), &*self.driver, self.device, peers);
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn ranks(cluster: &Cluster, kind: Ranks) -> Vec<Rank> {
    let size = cluster.ranks();
    let nodes: Vec<_> = (0..cluster.nodes.len())
        .map(|node| SimDriver::new(cluster, node, &(0..64).collect::<Vec<_>>()))
        .collect();
    let exchanges = local(u32::try_from(size).unwrap());
    let place = |(rank, exchange)| {
        let (node, gpu) = cluster.place(rank).unwrap();
        let (sim, device, process) = match kind {
            Ranks::Threads => (Arc::clone(&nodes[node]), gpu, node),
            Ranks::Processes => (SimDriver::for_rank(cluster, rank).unwrap(), 0, rank),
        };
        let device = DeviceOrdinal(device);
        Rank {
            exchange,
            identity: identity(&*sim, device, process as u64),
            driver: Arc::clone(&sim) as Arc<dyn Driver>,
            sim,
            device,
        }
    };
    exchanges.into_iter().enumerate().map(place).collect()
}

/// Runs every rank's part in its own thread; what they return, by rank. Nothing may be held at the
/// end.
fn run<T: Send>(cluster: &Cluster, kind: Ranks, part: impl Fn(Rank) -> T + Sync) -> Vec<T> {
    let ranks = ranks(cluster, kind);
    let sims: Vec<_> = ranks.iter().map(|rank| Arc::clone(&rank.sim)).collect();
    let returned = in_threads(ranks, part);
    for sim in sims {
        assert!(sim.live().is_empty(), "{:?}", sim.live());
    }
    returned
}

fn in_threads<T: Send>(ranks: Vec<Rank>, part: impl Fn(Rank) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|rank| scope.spawn(|| part(rank)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

/// Connects, proves, and leaves; what the table said, by rank.
fn connected(cluster: &Cluster, kind: Ranks, memory: Kind) -> Vec<Vec<Result<Access, Reason>>> {
    run(cluster, kind, |rank| {
        let memory = rank.memory(memory);
        let peers = rank.connect(&memory).unwrap();
        rank.prove(&peers);
        let size = rank.exchange.size();
        let row = (0..size).map(|to| peers.verdict(rank.rank(), to)).collect();
        for from in 0..size {
            assert_eq!(peers.record(from).unwrap().facts.as_bytes(), b"facts");
        }
        peers.disconnect(&rank.group(), soon()).unwrap();
        row
    })
}

/// The expected verdicts of a group whose every pair is reached in one way.
fn all_by(access: Access, size: usize) -> Vec<Vec<Result<Access, Reason>>> {
    let cell = |from, to| Ok(if from == to { Access::Own } else { access });
    (0..size)
        .map(|from| (0..size).map(|to| cell(from, to)).collect())
        .collect()
}

// ---- What connects, and how ----

#[test]
fn every_kind_of_memory_connects_threads_and_processes() {
    let host = Cluster::hgx_h200(4);
    let rack = Cluster::gb200_nvl72(1);
    for (cluster, kind, ranks, access) in [
        (&host, Kind::Malloc, Ranks::Threads, Access::Process),
        (&host, Kind::Malloc, Ranks::Processes, Access::Ipc),
        (&host, Kind::PosixFd, Ranks::Threads, Access::PosixFd),
        (&host, Kind::PosixFd, Ranks::Processes, Access::PosixFd),
        (&rack, Kind::Fabric, Ranks::Threads, Access::Fabric),
        (&rack, Kind::Fabric, Ranks::Processes, Access::Fabric),
    ] {
        assert_eq!(
            connected(cluster, ranks, kind),
            all_by(access, 4),
            "{kind:?} {ranks:?}"
        );
    }
}

#[test]
fn a_single_rank_connects_to_itself() {
    for kind in [Kind::Malloc, Kind::PosixFd] {
        let verdicts = connected(&Cluster::hgx_h200(1), Ranks::Processes, kind);
        assert_eq!(verdicts, [[Ok(Access::Own)]]);
    }
}

#[test]
fn a_rack_of_72_connects() {
    let verdicts = connected(&Cluster::gb200_nvl72(18), Ranks::Processes, Kind::Fabric);
    assert_eq!(verdicts, all_by(Access::Fabric, 72));
}

#[test]
fn cliques_are_islands() {
    let verdicts = connected(
        &Cluster::gb200_nvl72_cliques(2, 2),
        Ranks::Processes,
        Kind::Fabric,
    );
    for (from, row) in verdicts.iter().enumerate() {
        for (to, &verdict) in row.iter().enumerate() {
            let expected = match (from == to, from / 8 == to / 8) {
                (true, _) => Ok(Access::Own),
                (false, true) => Ok(Access::Fabric),
                (false, false) => Err(Reason::OtherClique),
            };
            assert_eq!(verdict, expected, "{from} {to}");
        }
    }
}

#[test]
fn uneven_nodes_are_told_apart_by_host_not_by_number() {
    let gpu = Gpu::default();
    let cluster = Cluster::default()
        .with_node(Node::new("one", gpu.clone(), 1))
        .with_node(Node::new("three", gpu.clone(), 3))
        .with_node(Node::new("two", gpu, 2));
    let host = [0, 1, 1, 1, 2, 2];
    for kind in [Kind::Malloc, Kind::PosixFd] {
        let verdicts = connected(&cluster, Ranks::Processes, kind);
        for (from, row) in verdicts.iter().enumerate() {
            for (to, verdict) in row.iter().enumerate() {
                assert_eq!(verdict.is_ok(), host[from] == host[to], "{from} {to}");
                if host[from] != host[to] {
                    assert_eq!(*verdict, Err(Reason::OtherHost));
                }
            }
        }
    }
}

#[test]
fn several_buffers_live_side_by_side() {
    run(&Cluster::hgx_h200(3), Ranks::Processes, |rank| {
        let memories = [Kind::Malloc, Kind::PosixFd, Kind::Malloc].map(|kind| rank.memory(kind));
        let mut buffers: Vec<_> = memories
            .iter()
            .map(|memory| rank.connect(memory).unwrap())
            .collect();
        buffers
            .swap_remove(0)
            .disconnect(&rank.group(), soon())
            .unwrap();
        for peers in &buffers {
            rank.prove(peers);
        }
        for peers in buffers {
            peers.disconnect(&rank.group(), soon()).unwrap();
        }
    });
}

#[test]
fn members_know_where_all_run_and_how_all_pairs_connect() {
    run(&Cluster::gb200_nvl72(2), Ranks::Threads, |rank| {
        let memory = rank.memory(Kind::Fabric);
        let peers = rank.connect(&memory).unwrap();
        assert_eq!(peers.topology().hosts(), [[0, 1, 2, 3], [4, 5, 6, 7]]);
        assert_eq!(peers.topology().cliques(), [[0, 1, 2, 3, 4, 5, 6, 7]]);
        assert_eq!(peers.topology().nearness(4, 7), Some(Nearness::Process));
        for from in 0..8 {
            for to in 0..8 {
                let expected = if from == to {
                    Access::Own
                } else {
                    Access::Fabric
                };
                assert_eq!(peers.verdict(from, to), Ok(expected));
            }
        }
        assert_eq!(peers.verdict(0, 8), Err(Reason::Absent));
        peers.disconnect(&rank.group(), soon()).unwrap();
    });
}

// ---- What does not connect, and why ----

fn refused(call: Call, status: Status) -> Reason {
    Reason::Refused(Refusal {
        call,
        status: Some(status),
    })
}

#[test]
fn refusals_of_the_cluster_become_reasons() {
    let private = Cluster::hgx_h200(2).map_nodes(|node| node.ipc_namespace = IpcNamespace::Private);
    let apart = Cluster::hgx_h200(2).map_gpus(|gpu| gpu.peer_access = PeerAccess::None);
    let pcie = Cluster::hgx_h200(2).map_gpus(|gpu| gpu.peer_access = PeerAccess::Pcie);
    let deaf = Cluster::gb200_nvl72(1).map_gpus(|gpu| gpu.import_fabric = Status::NOT_PERMITTED);
    for (cluster, ranks, kind, reason) in [
        (
            &private,
            Ranks::Processes,
            Kind::Malloc,
            refused(Call::IpcOpen, Status::INVALID_VALUE),
        ),
        (
            &apart,
            Ranks::Processes,
            Kind::Malloc,
            refused(Call::IpcOpen, Status::PEER_ACCESS_UNSUPPORTED),
        ),
        (&apart, Ranks::Threads, Kind::Malloc, Reason::NoPeerAccess),
        (&pcie, Ranks::Threads, Kind::Malloc, Reason::NoNvlink),
        (&pcie, Ranks::Processes, Kind::Malloc, Reason::NoNvlink),
        (&pcie, Ranks::Processes, Kind::PosixFd, Reason::NoNvlink),
        (
            &deaf,
            Ranks::Processes,
            Kind::Fabric,
            refused(Call::MemImport, Status::NOT_PERMITTED),
        ),
    ] {
        for (from, row) in connected(cluster, ranks, kind).into_iter().enumerate() {
            for (to, verdict) in row.into_iter().enumerate() {
                let expected = if from == to {
                    Ok(Access::Own)
                } else {
                    Err(reason)
                };
                assert_eq!(verdict, expected, "{kind:?} {ranks:?} {from} {to}");
            }
        }
    }
}

#[test]
fn gpus_of_which_nvml_cannot_tell_connect() {
    // In containers of their own processes see only their own GPUs.
    let hidden = Cluster::hgx_h200(2).map_nodes(|node| node.ipc_namespace = IpcNamespace::Private);
    let verdicts = connected(&hidden, Ranks::Processes, Kind::PosixFd);
    assert_eq!(verdicts, all_by(Access::PosixFd, 2));

    run(&Cluster::hgx_h200(2), Ranks::Processes, |rank| {
        rank.sim
            .inject(FaultPlan::fail_nth_of(Call::PeerLinks, 0, Status::UNKNOWN));
        let memory = rank.memory(Kind::Malloc);
        let peers = rank.connect(&memory).unwrap();
        rank.prove(&peers);
        peers.disconnect(&rank.group(), soon()).unwrap();
    });
}

#[test]
fn links_are_asked_for_once() {
    run(&Cluster::hgx_h200(4), Ranks::Threads, |rank| {
        let memory = rank.memory(Kind::PosixFd);
        let peers = rank.connect(&memory).unwrap();
        let asked = rank.sim.journal().into_iter();
        let asked =
            asked.filter(|entry| entry.call == Call::PeerLinks && entry.device == rank.device);
        assert_eq!(asked.count(), 1);
        peers.disconnect(&rank.group(), soon()).unwrap();
    });
}

#[test]
fn one_failing_import_closes_both_directions_and_no_other_pair() {
    for (kind, call) in [
        (Kind::Malloc, Call::IpcOpen),
        (Kind::PosixFd, Call::MemMap),
        (Kind::PosixFd, Call::MemImport),
    ] {
        let refusal = refused(call, Status::UNKNOWN);
        run(&Cluster::hgx_h200(4), Ranks::Processes, |rank| {
            let memory = rank.memory(kind);
            if rank.rank() == 1 {
                // Rank 1's second import is rank 2's memory.
                rank.sim
                    .inject(FaultPlan::fail_nth_of(call, 1, Status::UNKNOWN));
            }
            let peers = rank.connect(&memory).unwrap();
            for peer in 0..4 {
                let cut = [(1, 2), (2, 1)].contains(&(rank.rank(), peer));
                assert_eq!(peers.is_reachable(peer), !cut);
                let reason = peers.reason(peer).map(|why| (why.from, why.to, why.reason));
                assert_eq!(reason, cut.then_some((1, 2, refusal)));
            }
            rank.prove(&peers);
            peers.disconnect(&rank.group(), soon()).unwrap();
        });
    }
}

#[test]
fn a_rank_without_memory_takes_every_step_and_is_explained() {
    let refusal = Refusal {
        call: Call::MemCreate,
        status: Some(Status::OUT_OF_MEMORY),
    };
    run(&Cluster::hgx_h200(3), Ranks::Processes, |rank| {
        let memory = rank.memory(Kind::PosixFd);
        let offer = if rank.rank() == 2 {
            failed_offer(1, rank.identity, refusal)
        } else {
            memory.offer(1, rank.identity)
        };
        let peers = connect(&rank.group(), &rank.driver, rank.device, offer, soon()).unwrap();
        if rank.rank() == 2 {
            let why = peers.reason(0).unwrap();
            assert_eq!((why.from, why.to), (2, 0));
            assert_eq!(why.reason, Reason::OffersNothing(Some(refusal)));
            assert!(peers.entries().iter().all(|entry| entry.is_null()));
        } else {
            let why = peers.reason(2).unwrap();
            assert_eq!(why.reason, Reason::PeerOffersNothing(Some(refusal)));
            let text = why.to_string();
            assert!(text.contains("cannot reach rank 2"), "{text}");
            assert!(
                text.contains("cuMemCreate returned 2 CUDA_ERROR_OUT_OF_MEMORY"),
                "{text}"
            );
            assert!(peers.is_reachable(1 - rank.rank()));
        }
        peers.disconnect(&rank.group(), soon()).unwrap();
    });
}

#[test]
fn a_rank_without_a_table_is_explained() {
    for (call, nth) in [
        (Call::MemAlloc, 0),
        (Call::CopyToDevice, 0),
        (Call::CopyToDevice, 1),
    ] {
        let refusal = Refusal {
            call,
            status: Some(Status::UNKNOWN),
        };
        run(&Cluster::hgx_h200(3), Ranks::Processes, |rank| {
            let memory = rank.memory(Kind::Malloc);
            if rank.rank() == 2 {
                rank.sim
                    .inject(FaultPlan::fail_nth_of(call, nth, Status::UNKNOWN));
                match rank.connect(&memory) {
                    Err(Error::Driver { rank: 2, source }) => assert_eq!(source.call(), call),
                    other => panic!("{other:?}"),
                }
                return;
            }
            let peers = rank.connect(&memory).unwrap();
            assert!(peers.is_reachable(1 - rank.rank()));
            let why = peers.reason(2).unwrap().reason;
            if nth == 0 {
                assert_eq!(why, Reason::PeerOffersNothing(Some(refusal)));
            } else {
                // It could import, but has no table to put the pointers in.
                assert_eq!(why, Reason::NoTable(refusal));
            }
        });
    }
}

#[test]
fn different_configurations_are_named_on_every_rank() {
    let outcomes = run(&Cluster::hgx_h200(4), Ranks::Processes, |rank| {
        let memory = rank.memory(Kind::Malloc);
        let mut offer = memory.offer(1, rank.identity);
        offer.digest += u64::from(rank.rank() == 2);
        connect(&rank.group(), &rank.driver, rank.device, offer, soon()).unwrap_err()
    });
    for error in outcomes {
        let Error::Configuration {
            rank,
            reference,
            expected,
            actual,
        } = error
        else {
            panic!("{error:?}")
        };
        assert_eq!(
            (rank, reference, expected, actual),
            (2, 0, DIGEST, DIGEST + 1)
        );
    }
}

#[test]
fn another_generation_is_an_error_on_every_rank() {
    let outcomes = run(&Cluster::hgx_h200(3), Ranks::Processes, |rank| {
        let memory = rank.memory(Kind::Malloc);
        let offer = memory.offer(if rank.rank() == 2 { 8 } else { 7 }, rank.identity);
        connect(&rank.group(), &rank.driver, rank.device, offer, soon()).unwrap_err()
    });
    for (rank, error) in outcomes.iter().enumerate() {
        let text = chain(error);
        let expected = if rank == 2 {
            "of rank 0 cannot"
        } else {
            "of rank 2 cannot"
        };
        assert!(
            text.contains(expected) && text.contains("is for generation"),
            "{text}"
        );
    }
}

#[test]
fn a_rank_that_never_comes_is_named_and_nothing_is_held() {
    let outcomes = run(&Cluster::hgx_h200(3), Ranks::Processes, |rank| {
        if rank.rank() == 1 {
            thread::sleep(Duration::from_millis(600));
            return None;
        }
        let memory = rank.memory(Kind::Malloc);
        let offer = memory.offer(1, rank.identity);
        let deadline = Instant::now() + Duration::from_millis(300);
        let connected = connect(&rank.group(), &rank.driver, rank.device, offer, deadline);
        Some(connected.unwrap_err())
    });
    for error in outcomes.into_iter().flatten() {
        let Error::Exchange(Fault {
            ranks,
            cause: Cause::Missing { .. },
            ..
        }) = error
        else {
            panic!("{error:?}")
        };
        assert_eq!(ranks, [1]);
    }
}

#[test]
fn a_table_that_cannot_be_rewritten_is_told_too() {
    let outcomes = run(&Cluster::hgx_h200(4), Ranks::Processes, |rank| {
        let memory = rank.memory(Kind::Malloc);
        // A table is made of nulls first. Rank 1 cannot write its own then, and rank 2 cannot write
        // its own again without rank 1.
        let failing = match rank.rank() {
            1 => FaultPlan::fail_nth_of(Call::CopyToDevice, 1, FIRST),
            2 => FaultPlan::fail_nth_of(Call::CopyToDevice, 2, SECOND),
            _ => FaultPlan::none(),
        };
        rank.sim.inject(failing);
        let connected = rank.connect(&memory);
        rank.sim.inject(FaultPlan::none());
        let peers = match connected {
            Ok(peers) => peers,
            Err(error) => return Err(error),
        };
        let reasons = (0..4).map(|peer| peers.reason(peer).map(|why| why.reason));
        let reachable = (0..4).map(|peer| peers.is_reachable(peer));
        Ok((reachable.collect::<Vec<_>>(), reasons.collect::<Vec<_>>()))
    });
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        match (rank, outcome) {
            (1 | 2, Err(Error::Driver { .. })) => {}
            (0 | 3, Ok((reachable, reasons))) => {
                assert_eq!(reachable, [true, false, false, true]);
                assert!(matches!(
                    reasons[..],
                    [None, Some(Reason::NoTable(first)), Some(Reason::NoTable(second)), None]
                        if first.status == Some(FIRST) && second.status == Some(SECOND)
                ));
            }
            (rank, outcome) => panic!("rank {rank}: {outcome:?}"),
        }
    }
}

// ---- Refresh and teardown ----

#[test]
fn refresh_changes_entries_and_keeps_the_table() {
    for kind in Kind::ALL {
        run(&Cluster::gb200_nvl72(1), Ranks::Processes, |rank| {
            let mut memory = rank.memory(kind);
            let mut peers = rank.connect(&memory).unwrap();
            let table = peers.device_ptr();
            for generation in 2..5 {
                let new = rank.memory(kind);
                let offer = new.offer(generation, rank.identity);
                peers.refresh(&rank.group(), offer, soon()).unwrap();
                // Nobody has the old memory mapped any more.
                memory = new;
                assert_eq!(
                    (peers.device_ptr(), peers.generation()),
                    (table, generation)
                );
                assert_eq!(peers.entries()[rank.rank() as usize], memory.base());
                rank.prove(&peers);
            }
            peers.disconnect(&rank.group(), soon()).unwrap();
        });
    }
}

#[test]
fn a_generation_is_not_used_twice() {
    run(&Cluster::hgx_h200(2), Ranks::Processes, |rank| {
        let memory = rank.memory(Kind::Malloc);
        let mut peers = rank.connect(&memory).unwrap();
        let again = peers.refresh(&rank.group(), memory.offer(1, rank.identity), soon());
        assert!(matches!(
            again,
            Err(Error::Generation {
                current: 1,
                given: 1
            })
        ));
        rank.prove(&peers);
        peers.disconnect(&rank.group(), soon()).unwrap();
    });
}

#[test]
fn members_leave_and_come_back() {
    let cluster = Cluster::hgx_h200(4);
    // Ranks 3, 0 and 2 go on without rank 1, counted anew in an exchange of their own.
    let remaining = [3, 0, 2];
    let smaller = parking_lot::Mutex::new(local(3).into_iter().map(Some).collect::<Vec<_>>());
    run(&cluster, Ranks::Processes, |rank| {
        let memory = rank.memory(Kind::PosixFd);
        let mut peers = rank.connect(&memory).unwrap();
        let table = peers.device_ptr();
        let place = remaining.iter().position(|&member| member == rank.rank());
        if let Some(place) = place {
            let exchange = smaller.lock()[place].take().unwrap();
            let group = Group::members(&exchange, 4, &remaining).unwrap();
            assert_eq!(group.rank(), rank.rank());
            peers
                .refresh(&group, memory.offer(2, rank.identity), soon())
                .unwrap();
            assert_eq!(peers.device_ptr(), table);
            assert_eq!(peers.entries()[1], DevicePtr::NULL);
            assert_eq!(peers.reason(1).unwrap().reason, Reason::Absent);
            assert!(remaining.iter().all(|&member| peers.is_reachable(member)));
            prove(&group, &*rank.driver, rank.device, &peers);
        } else {
            drop(peers);
            // The rank comes back as a new one.
            let offer = memory.offer(3, rank.identity);
            let peers = connect(&rank.group(), &rank.driver, rank.device, offer, soon()).unwrap();
            rank.prove(&peers);
            peers.disconnect(&rank.group(), soon()).unwrap();
            return;
        }
        peers
            .refresh(&rank.group(), memory.offer(3, rank.identity), soon())
            .unwrap();
        assert_eq!(peers.device_ptr(), table);
        rank.prove(&peers);
        peers.disconnect(&rank.group(), soon()).unwrap();
    });
}

#[test]
fn faults_of_a_smaller_group_are_told_in_table_ranks() {
    let cluster = Cluster::hgx_h200(4);
    let members = [3, 1];
    let [first, second]: [Local; 2] = local(2).try_into().unwrap();
    let group = Group::members(&first, 4, &members).unwrap();
    drop(second);
    let sim = SimDriver::for_rank(&cluster, 3).unwrap();
    let driver = Arc::clone(&sim) as Arc<dyn Driver>;
    let memory = Memory::new(&driver, DeviceOrdinal(0), Kind::Malloc);
    let offer = memory.offer(1, identity(&*sim, DeviceOrdinal(0), 3));
    let error = connect(&group, &driver, DeviceOrdinal(0), offer, soon()).unwrap_err();
    assert!(
        matches!(&error, Error::Exchange(fault) if fault.ranks == [1]),
        "{error}"
    );
}

#[test]
fn members_that_fit_no_table_are_refused() {
    let exchange = &local(2)[0];
    for members in [&[0][..], &[0, 4], &[1, 1], &[0, 1, 2]] {
        assert!(matches!(
            Group::members(exchange, 4, members),
            Err(Error::BadMembers {
                size: 2,
                num_ranks: 4,
                ..
            })
        ));
    }
    run(&Cluster::hgx_h200(2), Ranks::Processes, |rank| {
        let memory = rank.memory(Kind::Malloc);
        let mut peers = rank.connect(&memory).unwrap();
        let wider = Group::members(&rank.exchange, 3, &[0, 1]).unwrap();
        let refused = peers.refresh(&wider, memory.offer(2, rank.identity), soon());
        assert!(matches!(refused, Err(Error::BadMembers { .. })));
        peers.disconnect(&rank.group(), soon()).unwrap();
    });
}

#[test]
fn teardown_does_not_wait_for_the_dead() {
    for stays_away in [false, true] {
        let outcomes = run(&Cluster::hgx_h200(3), Ranks::Processes, |rank| {
            let memory = rank.memory(Kind::Malloc);
            let peers = rank.connect(&memory).unwrap();
            rank.exchange
                .barrier(Step::new("connected"), soon())
                .unwrap();
            if rank.rank() == 1 {
                if stays_away {
                    thread::sleep(Duration::from_millis(600));
                }
                return None;
            }
            let begun = Instant::now();
            let outcome = peers.disconnect(&rank.group(), begun + Duration::from_millis(300));
            assert!(begun.elapsed() < Duration::from_millis(550));
            Some(outcome.unwrap_err())
        });
        for error in outcomes.into_iter().flatten() {
            assert!(
                matches!(&error, Error::Exchange(fault) if fault.ranks == [1]),
                "{error}"
            );
        }
    }
}

#[test]
fn a_mapping_that_cannot_be_given_back_is_told_to_its_owner() {
    let ranks = ranks(&Cluster::hgx_h200(3), Ranks::Processes);
    let outcomes = in_threads(ranks, |rank| {
        let memory = rank.memory(Kind::Malloc);
        let peers = rank.connect(&memory).unwrap();
        if rank.rank() == 1 {
            rank.sim
                .inject(FaultPlan::fail_nth_of(Call::IpcClose, 0, FIRST));
        }
        peers.disconnect(&rank.group(), soon()).unwrap_err()
    });
    for (rank, error) in outcomes.iter().enumerate() {
        assert!(
            match error {
                Error::Release { rank: 1, .. } => rank == 1,
                Error::PeerRelease { rank: 1, refusal } =>
                    rank != 1 && refusal.call == Call::IpcClose,
                _ => false,
            },
            "rank {rank}: {error}"
        );
    }
}

#[test]
fn the_table_is_cleared_before_anything_is_unmapped() {
    for kind in Kind::ALL {
        run(&Cluster::gb200_nvl72(1), Ranks::Processes, |rank| {
            let memory = rank.memory(kind);
            let peers = rank.connect(&memory).unwrap();
            let before = rank.sim.calls();
            peers.disconnect(&rank.group(), soon()).unwrap();
            let calls: Vec<_> = rank.sim.journal()[before..]
                .iter()
                .map(|entry| entry.call)
                .collect();
            let place = |wanted: Call| calls.iter().position(|&call| call == wanted);
            let unmap = if kind == Kind::Malloc {
                Call::IpcClose
            } else {
                Call::MemUnmap
            };
            assert_eq!(place(Call::CopyToDevice), Some(0));
            assert!(place(Call::CopyToDevice) < place(unmap), "{calls:?}");
            assert_eq!(calls.last(), Some(&Call::MemFree), "the table goes last");
            assert_eq!(calls.iter().filter(|&&call| call == unmap).count(), 3);
        });
    }
}

// ---- Faults in every driver call ----

/// What a rank met on its way through everything: an error if it could not go on, and the reason for
/// every peer that it could not reach, or of whose link it could not learn.
type Life = (Option<Error>, Vec<String>);

fn live(rank: &Rank, [first, second]: [Offer; 2]) -> Life {
    let mut reasons = Vec::new();
    let mut note = |peers: &Peers| {
        let ranks = 0..peers.num_ranks();
        reasons.extend(
            ranks.filter_map(|peer| match peers.nvlink(peers.rank(), peer) {
                Some(check @ NvlinkCheck::Refused(_)) => Some(check.to_string()),
                _ => Some(peers.reason(peer)?.reason.to_string()),
            }),
        );
    };
    let group = rank.group();
    let outcome =
        connect(&group, &rank.driver, rank.device, first, soon()).and_then(|mut peers| {
            note(&peers);
            let refreshed = peers.refresh(&group, second, soon());
            if !matches!(refreshed, Ok(()) | Err(Error::Release { .. })) {
                return refreshed;
            }
            note(&peers);
            let disconnected = peers.disconnect(&group, soon());
            refreshed.and(disconnected)
        });
    (outcome.err(), reasons)
}

/// What the call that fails first returns.
const FIRST: Status = Status(4242);

/// What the clean-up call returns that fails then.
const SECOND: Status = Status(4243);

/// Fails call `n` of one rank's driver, for every `n`: alone, and with each call that gives something
/// back after it. How many cases that were.
fn sweep(cluster: &Cluster, ranks_are: Ranks, kind: Kind) -> usize {
    let clean = life_with(cluster, ranks_are, kind, FaultPlan::none());
    assert_eq!(clean.hit(FIRST), None);
    let mut cases = 0;
    for n in 0..clean.calls.len() {
        let first = FaultPlan::fail_nth(n, FIRST);
        let alone = life_with(cluster, ranks_are, kind, first.clone());
        let call = alone.hit(FIRST).expect("the call is made in every run");
        let case = format!("{kind:?} {ranks_are:?} call {n}, {call}");
        assert!(alone.tells(call, FIRST), "{case}: {}", alone.told);
        cases += 1;

        // Clean-up is the same code for threads, whose calls of one driver come in any order.
        let after = match ranks_are {
            Ranks::Processes => &alone.calls[n + 1..],
            Ranks::Threads => &[],
        };
        for (m, entry) in (n + 1..).zip(after) {
            // A table that could not be written is made null again.
            let clears = call == Call::CopyToDevice && entry.call == call;
            if !(is_release(entry.call) || clears) {
                continue;
            }
            let plan = first.clone().and(FaultPlan::fail_nth(m, SECOND));
            let both = life_with(cluster, ranks_are, kind, plan);
            let case = format!("{case}, then call {m}, {}", entry.call);
            assert_eq!(both.hit(FIRST), Some(call), "{case}");
            assert_eq!(both.hit(SECOND), Some(entry.call), "{case}");
            assert!(both.tells(call, FIRST), "{case}: {}", both.told);
            cases += 1;
        }
    }
    cases
}

fn is_release(call: Call) -> bool {
    matches!(
        call,
        Call::IpcClose | Call::MemUnmap | Call::MemAddressFree | Call::MemRelease | Call::MemFree
    )
}

struct Swept {
    /// Calls that the plan counted.
    calls: Vec<Entry>,
    /// What the ranks said.
    told: String,
}

impl Swept {
    /// The call that an injected fault refused with this status.
    fn hit(&self, status: Status) -> Option<Call> {
        let hit = |entry: &&Entry| entry.outcome == Outcome::Injected(status);
        self.calls.iter().find(hit).map(|entry| entry.call)
    }

    /// Whether a rank said that this call returned this status.
    fn tells(&self, call: Call, status: Status) -> bool {
        self.told
            .split("; ")
            .any(|said| said.contains(call.name()) && said.contains(&status.to_string()))
    }
}

/// One group's life with faults on rank 1's driver. Afterwards nothing is held but what the driver
/// refused to take back, nobody is stuck, and the same processes can form a group again.
fn life_with(cluster: &Cluster, ranks_are: Ranks, kind: Kind, plan: FaultPlan) -> Swept {
    const BAD: usize = 1;
    let first = ranks(cluster, ranks_are);
    let second: Vec<_> = local(3)
        .into_iter()
        .zip(&first)
        .map(|(exchange, rank)| rank.again(exchange))
        .collect();
    let sims: Vec<_> = first.iter().map(|rank| Arc::clone(&rank.sim)).collect();
    let bad = &sims[BAD];
    let begin = std::sync::Barrier::new(3);
    let span = parking_lot::Mutex::new(0..0);

    let lives = in_threads(first, |rank| {
        let is_bad = rank.rank() as usize == BAD;
        let memories = [rank.memory(kind), rank.memory(kind)];
        let offers = [(1, &memories[0]), (2, &memories[1])]
            .map(|(generation, memory)| memory.offer(generation, rank.identity));
        begin.wait();
        if is_bad {
            span.lock().start = bad.calls();
            bad.inject(plan.clone());
        }
        begin.wait();
        let life = live(&rank, offers);
        // Leave the group, so that nobody waits for this rank; others may still use the driver.
        drop(rank);
        begin.wait();
        if is_bad {
            span.lock().end = bad.calls();
            bad.inject(FaultPlan::none());
        }
        begin.wait();
        life
    });

    let calls = bad.journal()[span.into_inner()].to_vec();
    for sim in &sims {
        let live = sim.live();
        assert!(live.is_explained(), "{calls:?}: {live:?}");
    }
    in_threads(second, |rank| {
        let memory = rank.memory(kind);
        let peers = rank.connect(&memory).unwrap();
        assert!((0..3).all(|peer| peers.is_reachable(peer)));
        rank.prove(&peers);
        peers.disconnect(&rank.group(), soon()).unwrap();
    });
    let told = lives
        .iter()
        .map(|(error, reasons)| {
            let error = error.as_ref().map(|error| chain(error));
            format!("{error:?} {reasons:?}; ")
        })
        .collect();
    Swept { calls, told }
}

#[test]
fn a_fault_in_any_call_is_told_and_leaves_nothing_behind() {
    let host = Cluster::hgx_h200(3);
    let mut rack = Cluster::gb200_nvl72(1);
    rack.nodes[0].gpus.truncate(3);
    for ranks_are in [Ranks::Processes, Ranks::Threads] {
        for (cluster, kind) in [
            (&host, Kind::Malloc),
            (&host, Kind::PosixFd),
            (&rack, Kind::Fabric),
        ] {
            let cases = sweep(cluster, ranks_are, kind);
            println!("connect to disconnect, {ranks_are:?}, {kind:?}: {cases} cases");
            assert!(cases > 0);
        }
    }
}
