//! A report as JSON, and in words.

use std::fmt;

use ep::alloc::{BackendKind, CliqueGap, RankFacts, Route, Trial};
use ep::peers::{Access, NvlinkCheck, Reason};
use ep::{Bandwidth, Error, Problem, Report};
use serde::Serialize;

use crate::failure::chain;

/// The JSON of a report.
#[derive(Debug, Serialize)]
pub(super) struct Findings {
    usable: bool,
    backend: &'static str,
    reason: String,
    ranks: Vec<Rank>,
    problems: Vec<ProblemFound>,
    /// Gigabytes per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    bandwidth: Option<Rates>,
}

#[derive(Debug, Serialize)]
struct Rates {
    measured: Vec<Vec<Option<f64>>>,
    nominal: Vec<Option<f64>>,
}

#[derive(Debug, Serialize)]
struct Rank {
    rank: u32,
    node: String,
    gpu: usize,
    clique: Option<String>,
    fabric_trial: FabricTrial,
    routes: Vec<&'static str>,
}

#[derive(Debug, Serialize)]
struct FabricTrial {
    ok: bool,
    call: Option<&'static str>,
    status: Option<u32>,
}

#[derive(Debug, Serialize)]
struct ProblemFound {
    ranks: Vec<u32>,
    what: String,
    check: String,
}

impl Findings {
    pub(super) fn of(report: &Report) -> Self {
        let rank = |facts: &RankFacts| {
            let trial = facts.trials.fabric;
            let routes = report.facts.iter();
            Rank {
                rank: facts.rank,
                node: facts.host_name.clone(),
                gpu: gpu(report, facts),
                clique: clique(facts),
                fabric_trial: FabricTrial {
                    ok: trial.is_ok(),
                    call: trial.failure().map(|failure| failure.call.name()),
                    status: trial.failure().and_then(|failure| failure.status()),
                },
                routes: routes
                    .map(|peer| report.route(facts.rank, peer.rank).name())
                    .collect(),
            }
        };
        let problem = |problem: Problem| ProblemFound {
            ranks: problem.ranks,
            what: problem.what,
            check: problem.check,
        };
        Self {
            usable: report.is_usable(),
            backend: report.backend.name(),
            reason: reason(report),
            ranks: report.facts.iter().map(rank).collect(),
            problems: report.problems().into_iter().map(problem).collect(),
            bandwidth: report.bandwidth.clone().map(|bandwidth| Rates {
                measured: bandwidth.measured,
                nominal: bandwidth.nominal,
            }),
        }
    }
}

/// Why this backend, and what speaks against the others; or why none.
fn reason(report: &Report) -> String {
    match &report.plan {
        Ok(plan) => {
            let refused = plan.refused.iter().map(|refusal| format!("; {refusal}"));
            plan.reason.to_string() + &refused.collect::<String>()
        }
        Err(Error::Policy { source, .. }) => source.to_string(),
        Err(error) => chain(error),
    }
}

/// The GPU's number on its host, in the order of PCI addresses, among those of the group.
fn gpu(report: &Report, of: &RankFacts) -> usize {
    let peers = report.facts.iter().filter(|facts| facts.same_host(of));
    let mut addresses: Vec<&str> = peers
        .map(|facts| facts.pci_bus_id.as_str())
        .filter(|address| *address < of.pci_bus_id.as_str())
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses.len()
}

fn clique(facts: &RankFacts) -> Option<String> {
    let (cluster, clique) = facts.clique()?;
    Some(format!("{cluster}/{clique}"))
}

/// A report in an operator's words.
pub(super) struct Words<'a>(pub(super) &'a Report);

impl fmt::Display for Words<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(report) = self;
        for facts in &report.facts {
            let gpu = gpu(report, facts);
            let (rank, node) = (facts.rank, &facts.host_name);
            write!(f, "rank {rank}: {node}, GPU {gpu} ({})", facts.pci_bus_id)?;
            match (clique(facts), CliqueGap::of(&facts.fabric)) {
                (Some(clique), _) => write!(f, ", NVLink clique {clique}")?,
                (None, Some(gap)) => write!(f, ", no NVLink clique: {gap}")?,
                (None, None) => f.write_str(", no NVLink clique")?,
            }
            let imex = if facts.imex_channel { "an" } else { "no" };
            writeln!(f, "; {imex} IMEX channel, RDMA NICs: {}", facts.rdma_nics)?;
            for kind in BackendKind::ALL {
                match facts.trials[kind] {
                    Trial::Ok { .. } => writeln!(f, "  {kind} works")?,
                    Trial::NotTried(why) => writeln!(f, "  {kind} was not tried: {why}")?,
                    Trial::Refused(failure) => {
                        write!(f, "  {kind} is refused: {failure}")?;
                        match failure.meaning(kind, !facts.imex_channel) {
                            Some(meaning) => writeln!(f, " ({meaning})")?,
                            None => writeln!(f)?,
                        }
                    }
                }
            }
            for ((route, why), peers) in reached(report, rank) {
                writeln!(f, "  {route} to {}: {why}", Numbers(&peers))?;
            }
        }
        if let Some(bandwidth) = &report.bandwidth {
            write_bandwidth(f, bandwidth)?;
        }
        for problem in report.problems() {
            writeln!(f, "problem: {}", problem.what)?;
            writeln!(f, "  {}", problem.check)?;
        }
        for (check, ranks) in unchecked(report) {
            writeln!(
                f,
                "note: on ranks {} {check}, so they are taken for joined by NVLink; over PCIe alone \
                 results may be wrong: check nvidia-smi topo -p2p n on the host",
                Numbers(&ranks)
            )?;
        }
        let islands = islands(report);
        if islands.len() > 1 && report.is_usable() {
            f.write_str("note: dispatch and combine go over NVLink, which does not join ranks ")?;
            for (i, ranks) in islands.iter().enumerate() {
                let separator = if i == 0 { "" } else { " | " };
                write!(f, "{separator}{}", Numbers(ranks))?;
            }
            writeln!(
                f,
                "; between these only the network does: make a group of each"
            )?;
        }
        let verdict = if report.is_usable() {
            "usable"
        } else {
            "not usable"
        };
        write!(f, "{verdict}: {}: {}", report.backend, reason(report))
    }
}

fn write_bandwidth(f: &mut fmt::Formatter<'_>, bandwidth: &Bandwidth) -> fmt::Result {
    for (from, (rates, nominal)) in bandwidth
        .measured
        .iter()
        .zip(&bandwidth.nominal)
        .enumerate()
    {
        for (to, rate) in rates.iter().enumerate() {
            let Some(rate) = rate else { continue };
            write!(f, "rank {from} copies to rank {to} at {rate:.0} GB/s")?;
            match nominal {
                Some(nominal) => {
                    let percent = rate / nominal * 100.0;
                    writeln!(f, ", {percent:.0} % of the link's {nominal:.0} GB/s")?;
                }
                None => writeln!(f, "; the link's nominal speed is not known")?,
            }
        }
    }
    Ok(())
}

/// How a rank reaches the others and why so, those alike together.
fn reached(report: &Report, rank: u32) -> Vec<((Route, String), Vec<u32>)> {
    let mut groups: Vec<((Route, String), Vec<u32>)> = Vec::new();
    for peer in report.facts.iter().map(|facts| facts.rank) {
        if peer == rank {
            continue;
        }
        let how = (report.route(rank, peer), why(report, rank, peer));
        match groups.iter_mut().find(|(known, _)| *known == how) {
            Some((_, peers)) => peers.push(peer),
            None => groups.push((how, vec![peer])),
        }
    }
    groups
}

fn why(report: &Report, rank: u32, peer: u32) -> String {
    if let Some(gap) = report.unreachable(rank, peer) {
        let reason = match gap.reason {
            Reason::OtherHost => String::from("they are on different hosts"),
            Reason::OtherClique => String::from("they are in different NVLink cliques"),
            reason if gap.from == rank => format!("it cannot reach them, {reason}"),
            reason => format!("they cannot reach it, {reason}"),
        };
        return format!("{} gives no pointer, {reason}", report.backend);
    }
    String::from(match report.access(rank, peer) {
        Some(Access::Own) => "its own memory",
        Some(Access::Process) => "a pointer of the same process",
        Some(Access::Ipc) => "a pointer by CUDA IPC",
        Some(Access::PosixFd) => "a pointer by a file descriptor",
        Some(Access::Fabric) => "a pointer by a fabric handle",
        None => "no pointer was tried",
    })
}

/// Ranks to whose peers NVML does not tell the link, those with one reason together.
fn unchecked(report: &Report) -> Vec<(NvlinkCheck, Vec<u32>)> {
    let ranks = || report.facts.iter().map(|facts| facts.rank);
    let mut groups: Vec<(NvlinkCheck, Vec<u32>)> = Vec::new();
    for rank in ranks() {
        let checks = ranks()
            .filter(|&peer| report.route(rank, peer) == Route::Nvlink)
            .filter_map(|peer| report.nvlink(rank, peer));
        for check in checks.filter(|check| *check != NvlinkCheck::Joined) {
            match groups.iter_mut().find(|(known, _)| *known == check) {
                Some((_, concerned)) if concerned.last() == Some(&rank) => {}
                Some((_, concerned)) => concerned.push(rank),
                None => groups.push((check, vec![rank])),
            }
        }
    }
    groups
}

/// Ranks that NVLink joins, together.
fn islands(report: &Report) -> Vec<Vec<u32>> {
    let mut islands: Vec<Vec<u32>> = Vec::new();
    for rank in report.facts.iter().map(|facts| facts.rank) {
        let joined = |island: &&mut Vec<u32>| {
            island
                .iter()
                .any(|&peer| report.route(rank, peer) == Route::Nvlink)
        };
        match islands.iter_mut().find(joined) {
            Some(island) => island.push(rank),
            None => islands.push(vec![rank]),
        }
    }
    islands
}

/// Ascending numbers, runs of them as `first-last`.
struct Numbers<'a>(&'a [u32]);

impl fmt::Display for Numbers<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.0.chunk_by(|a, b| a.checked_add(1) == Some(*b));
        for (i, run) in runs.enumerate() {
            let separator = if i == 0 { "" } else { "," };
            match *run {
                [first, .., last] => write!(f, "{separator}{first}-{last}")?,
                [only] => write!(f, "{separator}{only}")?,
                [] => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use ep::driver::DeviceOrdinal;
    use ep::{Choice, Communicator, Preflight};
    use ep_sim::{Cluster, SimDriver};

    use super::*;

    #[test]
    fn bandwidth_is_told_of_every_pair() {
        let cluster = Cluster::hgx_h200(2);
        let report = thread::scope(|scope| {
            let ranks: Vec<_> = Communicator::threads(2)
                .into_iter()
                .map(|communicator| {
                    let rank = communicator.rank() as usize;
                    let driver = SimDriver::for_rank(&cluster, rank).unwrap();
                    scope.spawn(move || {
                        Preflight::new(driver, DeviceOrdinal(0), &communicator)
                            .alloc(Choice::Auto)
                            .bandwidth()
                            .run()
                            .unwrap()
                    })
                })
                .collect();
            let reports = ranks.into_iter().map(|rank| rank.join().unwrap());
            reports.last().unwrap()
        });
        let words = Words(&report).to_string();
        for pair in ["rank 0 copies to rank 1 at ", "rank 1 copies to rank 0 at "] {
            let line = words.lines().find(|line| line.starts_with(pair)).unwrap();
            assert!(line.ends_with("% of the link's 450 GB/s"), "{line}");
        }
        let json = serde_json::to_value(Findings::of(&report)).unwrap();
        assert!(json["bandwidth"]["measured"][0][0].is_null(), "{json}");
        assert!(json["bandwidth"]["measured"][0][1].is_f64(), "{json}");
    }

    #[test]
    fn numbers_are_runs() {
        let text = |numbers: &[u32]| Numbers(numbers).to_string();
        assert_eq!(text(&[]), "");
        assert_eq!(text(&[3]), "3");
        assert_eq!(text(&[0, 1, 2, 5, 7, 8]), "0-2,5,7-8");
    }
}
