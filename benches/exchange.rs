//! Records: their bytes, and their way to every rank.

mod ranks;

use std::hint::black_box;
use std::net::TcpListener;
use std::time::Instant;

use criterion::{BenchmarkId, Criterion};
use ep::Communicator;
use ep::driver::{Bytes16, DevicePtr, FABRIC_HANDLE_BYTES};
use ep::peers::wire::{Facts, Handle, Identity, Record};

use ranks::{PATIENCE, each, slowest};

fn main() {
    ranks::main(|criterion| {
        codec(criterion);
        all_gather(criterion);
    });
}

fn record() -> Record {
    Record {
        rank: 3,
        generation: 1,
        identity: Identity {
            host: Bytes16([1; 16]),
            process: Bytes16([2; 16]),
            gpu: Bytes16([3; 16]),
            clique: Some((Bytes16([4; 16]), 1)),
        },
        bytes: 32 << 20,
        granularity: 2 << 20,
        base: DevicePtr(0x7f00_0000_0000),
        handle: Handle::Fabric([5; FABRIC_HANDLE_BYTES]),
        digest: 6,
        facts: Facts::new(&[7; 256]).expect("they fit"),
    }
}

fn codec(criterion: &mut Criterion) {
    let record = record();
    let bytes = record.encode();
    assert_eq!(Record::decode(&bytes), Ok(record.clone()));

    let mut group = criterion.benchmark_group("record");
    group.bench_function("encode", |bencher| {
        bencher.iter(|| black_box(&record).encode());
    });
    group.bench_function("decode", |bencher| {
        bencher.iter(|| Record::decode(black_box(&bytes)));
    });
    group.finish();
}

fn all_gather(criterion: &mut Criterion) {
    let record = record().encode();
    let mut group = criterion.benchmark_group("all_gather");
    for size in [4, 8] {
        for (name, meet) in [("threads", threads as Meet), ("unix", unix), ("tcp", tcp)] {
            let mut comms = None;
            group.bench_function(BenchmarkId::new(name, size), |bencher| {
                let comms = comms.get_or_insert_with(|| meet(size));
                bencher.iter_custom(|times| {
                    let spent = each(&*comms, |comm| {
                        comm.barrier(PATIENCE)?;
                        let start = Instant::now();
                        for _ in 0..times {
                            black_box(comm.all_gather(&record, PATIENCE)?);
                        }
                        Ok(vec![start.elapsed()])
                    });
                    slowest(&spent)
                });
            });
        }
    }
}

/// Makes a group of so many ranks.
type Meet = fn(u32) -> Vec<Communicator>;

fn threads(size: u32) -> Vec<Communicator> {
    Communicator::threads(size)
}

fn unix(size: u32) -> Vec<Communicator> {
    let name = format!("@ep-benches-{}-{size}", std::process::id());
    each(0..size, |rank| {
        Communicator::unix(&name, rank, size, PATIENCE)
    })
}

fn tcp(size: u32) -> Vec<Communicator> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    let places = (0..size).zip(
        [Some(listener)]
            .into_iter()
            .chain(std::iter::repeat_with(|| None)),
    );
    each(places, |(rank, listener)| match listener {
        Some(listener) => Communicator::tcp_listener(listener, size, PATIENCE),
        None => Communicator::tcp("127.0.0.1", port, rank, size, PATIENCE),
    })
}
