//! The allocation policy: from the facts of a group to its plan, on every rank of it.

#[expect(dead_code, reason = "one thread decides")]
mod ranks;

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion};
use ep::alloc::{Cause, Failure, ImportRefusal, ProbeOptions, RankFacts, decide, probe};
use ep::driver::{Bytes16, Call, DeviceOrdinal, Driver, Status};
use ep::{BackendKind, Choice};
use ep_sim::{Cluster, SimDriver};

fn main() {
    ranks::main(policy);
}

fn policy(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("policy");
    for ranks in [8, 72, 576] {
        let infiniband = facts(&infiniband(ranks));
        let refused = ipc_refused(&infiniband);
        let rows = [
            ("infiniband", &infiniband, &[][..], BackendKind::Malloc),
            ("containers", &infiniband, &refused, BackendKind::PosixFd),
            ("mnnvl", &facts(&mnnvl(ranks)), &[], BackendKind::Fabric),
            ("mixed", &facts(&mixed(ranks)), &[], BackendKind::Malloc),
        ];
        for (name, facts, imports, expected) in rows {
            let plan = decide(facts, imports).expect("the group has a backend");
            assert_eq!(plan.backend, expected, "{name} of {ranks} ranks: {plan}");
            group.bench_function(BenchmarkId::new(name, ranks), |bencher| {
                bencher.iter(|| decide(black_box(facts), black_box(imports)));
            });
        }
    }
}

/// HGX hosts of 8 GPUs.
fn infiniband(ranks: u32) -> Cluster {
    Cluster::hgx_h200_nodes(ranks / 8, 8, 8)
}

/// Racks of up to 72 GPUs, each a clique.
fn mnnvl(ranks: u32) -> Cluster {
    let racks = ranks.div_ceil(72);
    Cluster::gb200_nvl72_cliques(racks, ranks / racks / 4)
}

/// One half on HGX hosts, the other in a rack with cliques of its own.
fn mixed(ranks: u32) -> Cluster {
    let half = ranks / 8;
    let rack = Cluster::gb200_nvl72_cliques(1, half);
    let hosts = Cluster::hgx_h200_nodes(half, 4, 4);
    rack.nodes.into_iter().fold(hosts, Cluster::with_node)
}

/// What the ranks of a cluster find when each probes its GPU.
fn facts(cluster: &Cluster) -> Vec<RankFacts> {
    (0..cluster.ranks())
        .map(|rank| {
            let driver: Arc<dyn Driver> = SimDriver::for_rank(cluster, rank).expect("a rank");
            let probe = probe(&driver, DeviceOrdinal(0), &ProbeOptions::default());
            let process = Bytes16((rank as u128 + 1).to_be_bytes());
            RankFacts::new(rank as u32, process, Choice::Auto, &probe)
        })
        .collect()
}

/// What a group has learned where every rank is in a container of its own.
fn ipc_refused(facts: &[RankFacts]) -> Vec<ImportRefusal> {
    let failure = Failure {
        call: Call::IpcOpen,
        cause: Cause::Status(Status::INVALID_CONTEXT),
    };
    facts
        .iter()
        .flat_map(|importer| facts.iter().map(move |exporter| (importer, exporter)))
        .filter(|(importer, exporter)| importer.rank != exporter.rank)
        .filter(|(importer, exporter)| importer.same_host(exporter))
        .map(|(importer, exporter)| ImportRefusal {
            backend: BackendKind::Malloc,
            importer: importer.rank,
            exporter: exporter.rank,
            failure,
        })
        .collect()
}
