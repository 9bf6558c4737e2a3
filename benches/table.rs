//! Making a buffer: ranks probe, agree, allocate, import each other's memory and write the table of
//! peers. On a simulated cluster, so without the driver's own time.

mod ranks;

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use ep::driver::DeviceOrdinal;
use ep::{BackendKind, Buffer, Choice, Communicator, Config, Device, Error};
use ep_sim::{Cluster, SimDriver};

use ranks::{PATIENCE, each, slowest};

fn main() {
    ranks::main(table);
}

fn table(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("table");
    for size in [4, 8] {
        for (kind, cluster) in [
            (BackendKind::Malloc, Cluster::hgx_h200(size)),
            (BackendKind::PosixFd, Cluster::hgx_h200(size)),
            (BackendKind::Fabric, Cluster::gb200_nvl72(size / 4)),
        ] {
            let ranks = ranks(&cluster);
            group.bench_function(BenchmarkId::new(kind.to_string(), size), |bencher| {
                bencher.iter_custom(|times| {
                    let spent = each(&ranks, |rank| {
                        (0..times).map(|_| rank.connect(kind)).collect()
                    });
                    slowest(&spent)
                });
            });
        }
    }
}

struct Rank {
    comm: Communicator,
    device: Device,
}

/// The ranks of a cluster, to its driver each a process of its own.
fn ranks(cluster: &Cluster) -> Vec<Rank> {
    let cluster = cluster.clone().with_run_key(std::process::id().into());
    Communicator::threads(cluster.ranks() as u32)
        .into_iter()
        .map(|comm| {
            let driver = SimDriver::for_rank(&cluster, comm.rank() as usize).expect("a rank");
            let device = Device::host(driver, DeviceOrdinal(0));
            Rank { comm, device }
        })
        .collect()
}

impl Rank {
    /// Makes a buffer, timed, and closes it.
    fn connect(&self, kind: BackendKind) -> Result<Duration, Error> {
        let config = Config::new(1024, 32, 32, 8);
        let builder = Buffer::builder(&self.device, &self.comm, config)
            .alloc(Choice::Force(kind))
            .deadline(PATIENCE)
            .timeout(PATIENCE);
        self.comm.barrier(PATIENCE)?;
        let start = Instant::now();
        let buffer = builder.build()?;
        let spent = start.elapsed();
        buffer.close()?;
        Ok(spent)
    }
}
