//! The decision: a pure function from the facts of a group to the backend that it uses.

use std::collections::{BTreeMap, BTreeSet};

use ep_sys::Bytes16;

use crate::plan::{CliqueGap, Plan, PolicyError, Reason, Refusal};
use crate::route::{Route, connects, network};
use crate::{BackendKind, Failure, PerBackend, RankFacts};

/// Proof that a pair of ranks cannot share a backend's memory: one of them tried to import.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ImportRefusal {
    /// The backend whose memory it was.
    pub backend: BackendKind,
    /// The rank that imported.
    pub importer: u32,
    /// The rank whose memory it was.
    pub exporter: u32,
    /// How it failed.
    pub failure: Failure,
}

/// Decides which backend the group uses.
///
/// `facts` holds one entry for each rank, ascending. `imports` is what the group has learned by
/// importing, in any order; empty at first. Every rank gives the same arguments and gets the same
/// answer.
///
/// When the choice is left to the policy, it goes down this ladder and takes the first backend that
/// worked on every rank:
///
/// 1. fabric, if an NVLink clique spans more than one host;
/// 2. malloc;
/// 3. posix_fd.
///
/// A backend that failed to import between some pairs gives way to a later one that connects more
/// pairs. So a group that shares its refusals and decides again, until the plan names the backend
/// that it has just tried, is done after at most one attempt per backend and one more: imports only
/// add evidence, and all evidence about a backend is in after one attempt.
///
/// A forced backend is used or is an error: when a rank refused it, and when importing failed
/// between two ranks that no network connects. Ranks that leave the choice open follow those that
/// force one.
pub fn decide(facts: &[RankFacts], imports: &[ImportRefusal]) -> Result<Plan, PolicyError> {
    check_ranks(facts)?;
    let group = Group::new(facts, imports);
    match forced(facts)? {
        Some((rank, backend)) => group.forced(rank, backend),
        None => group.auto(),
    }
}

fn check_ranks(facts: &[RankFacts]) -> Result<(), PolicyError> {
    if facts.is_empty() {
        return Err(PolicyError::NoRanks);
    }
    let pairs = facts.iter().zip(facts.iter().skip(1));
    for (a, b) in pairs {
        if a.rank >= b.rank {
            return Err(PolicyError::RankOrder {
                rank: b.rank,
                after: a.rank,
            });
        }
    }
    Ok(())
}

/// The lowest rank that forces a backend, and which.
fn forced(facts: &[RankFacts]) -> Result<Option<(u32, BackendKind)>, PolicyError> {
    let mut forcing = facts
        .iter()
        .filter_map(|f| f.choice.forced().map(|kind| (f.rank, kind)));
    let Some(first) = forcing.next() else {
        return Ok(None);
    };
    match forcing.find(|&(_, kind)| kind != first.1) {
        Some(second) => Err(PolicyError::Conflict { first, second }),
        None => Ok(Some(first)),
    }
}

struct Group<'a> {
    facts: &'a [RankFacts],
    by_rank: BTreeMap<u32, &'a RankFacts>,
    /// Evidence about pairs that the backend should connect, by backend, importer and exporter.
    imports: PerBackend<BTreeMap<(u32, u32), Failure>>,
}

/// A backend that works on every rank.
struct Candidate {
    backend: BackendKind,
    reason: Reason,
    /// Pairs of ranks that it connects.
    pairs: u64,
    /// Whether importing failed between a pair that it should connect.
    lossy: bool,
}

impl<'a> Group<'a> {
    fn new(facts: &'a [RankFacts], imports: &[ImportRefusal]) -> Self {
        let by_rank: BTreeMap<_, _> = facts.iter().map(|f| (f.rank, f)).collect();
        let mut relevant = PerBackend::<BTreeMap<(u32, u32), Failure>>::default();
        for import in imports {
            let ends = (by_rank.get(&import.importer), by_rank.get(&import.exporter));
            let (Some(importer), Some(exporter)) = ends else {
                continue;
            };
            if importer.rank != exporter.rank && connects(importer, exporter, import.backend) {
                let pair = (import.importer, import.exporter);
                // Two reports of one import: keep the same one on every rank.
                let known = relevant[import.backend]
                    .entry(pair)
                    .or_insert(import.failure);
                if import.failure.to_code() < known.to_code() {
                    *known = import.failure;
                }
            }
        }
        Self {
            facts,
            by_rank,
            imports: relevant,
        }
    }

    fn forced(&self, rank: u32, backend: BackendKind) -> Result<Plan, PolicyError> {
        let mut refused = self.trial_refusals(backend);
        if refused.is_empty() {
            refused = self.import_refusals(backend, |left| left == Route::None);
        }
        if !refused.is_empty() {
            return Err(PolicyError::Forced {
                backend,
                rank,
                refused,
            });
        }
        let refused = self.import_refusals(backend, |_| true);
        Ok(self.plan(backend, Reason::Forced { rank }, refused))
    }

    fn auto(&self) -> Result<Plan, PolicyError> {
        let nodes = self.nodes();
        let spanning = self.spanning_clique();
        let mut refused = Vec::new();
        if spanning.is_none() {
            if nodes > 1 {
                refused.extend(self.clique_gaps());
            }
            // Nobody needs fabric memory here, but everybody asks why it is not used.
            refused.extend(self.trial_refusals(BackendKind::Fabric));
        }

        let fabric = spanning.map(|(clique, nodes)| Reason::CliqueSpansNodes { clique, nodes });
        let malloc = match spanning {
            Some((clique, nodes)) => Reason::SpanningCliqueRefused { clique, nodes },
            None if nodes > 1 => Reason::NoSpanningClique { nodes },
            None => Reason::OneNode,
        };
        let ladder = [
            fabric.map(|reason| (BackendKind::Fabric, reason)),
            Some((BackendKind::Malloc, malloc)),
            Some((BackendKind::PosixFd, Reason::MallocRefused)),
        ];

        let mut best: Option<Candidate> = None;
        for (backend, reason) in ladder.into_iter().flatten() {
            if best.as_ref().is_some_and(|best| !best.lossy) {
                break;
            }
            let trials = self.trial_refusals(backend);
            if !trials.is_empty() {
                refused.extend(trials);
                continue;
            }
            refused.extend(self.import_refusals(backend, |_| true));
            let candidate = self.candidate(backend, reason);
            best = match best {
                None => Some(candidate),
                Some(best) if candidate.pairs > best.pairs => Some(candidate.instead_of(&best)),
                Some(best) => Some(best),
            };
        }
        match best {
            Some(best) => Ok(self.plan(best.backend, best.reason, refused)),
            None => Err(PolicyError::NoBackend { refused }),
        }
    }

    fn plan(&self, backend: BackendKind, reason: Reason, refused: Vec<Refusal>) -> Plan {
        let granularity = self.facts.iter().map(|f| f.granularity[backend]).max();
        Plan {
            backend,
            granularity: granularity.unwrap_or(0),
            reason,
            refused,
        }
    }

    fn candidate(&self, backend: BackendKind, reason: Reason) -> Candidate {
        let imports = &self.imports[backend];
        let mut pairs = 0;
        for (i, a) in self.facts.iter().enumerate() {
            for b in self.facts.iter().skip(i + 1) {
                let refused = imports.contains_key(&(a.rank, b.rank))
                    || imports.contains_key(&(b.rank, a.rank));
                pairs += u64::from(!refused && connects(a, b, backend));
            }
        }
        Candidate {
            backend,
            reason,
            pairs,
            lossy: !imports.is_empty(),
        }
    }

    /// Hosts in the group.
    fn nodes(&self) -> u32 {
        count(self.facts.iter().map(RankFacts::host))
    }

    /// The clique that reaches over the most hosts, if over more than one; of equals, the one with
    /// the lowest name.
    fn spanning_clique(&self) -> Option<((Bytes16, u32), u32)> {
        let cliques: BTreeSet<_> = self.facts.iter().filter_map(RankFacts::clique).collect();
        let mut widest: Option<((Bytes16, u32), u32)> = None;
        for clique in cliques {
            let members = self.facts.iter().filter(|f| f.clique() == Some(clique));
            let nodes = count(members.map(RankFacts::host));
            if nodes > widest.map_or(1, |(_, nodes)| nodes) {
                widest = Some((clique, nodes));
            }
        }
        widest
    }

    /// Ranks on which the backend did not work, those with one outcome together.
    fn trial_refusals(&self, backend: BackendKind) -> Vec<Refusal> {
        let failed = self.facts.iter().filter(|f| !f.trials[backend].is_ok());
        let outcomes = failed.map(|f| {
            let trial = f.trials[backend];
            let asks = trial
                .failure()
                .is_some_and(|failure| failure.asks_for_imex(backend));
            ((trial, asks && !f.imex_channel), f.rank)
        });
        grouped(outcomes)
            .into_iter()
            .map(|((trial, no_imex), ranks)| Refusal::Trial {
                backend,
                ranks,
                trial,
                no_imex,
            })
            .collect()
    }

    /// Ranks in no clique, those with one reason together.
    fn clique_gaps(&self) -> Vec<Refusal> {
        let gaps = self
            .facts
            .iter()
            .filter_map(|f| Some((CliqueGap::of(&f.fabric)?, f.rank)));
        grouped(gaps)
            .into_iter()
            .map(|(gap, ranks)| Refusal::NoClique { ranks, gap })
            .collect()
    }

    /// Pairs between which importing failed, those with one failure together. `keep` is asked for
    /// each whether the route that is left to it counts.
    fn import_refusals(&self, backend: BackendKind, keep: impl Fn(Route) -> bool) -> Vec<Refusal> {
        let imports = self.imports[backend].iter();
        let kept = imports.filter_map(|(&(importer, exporter), &failure)| {
            let importer = self.by_rank.get(&importer)?;
            let exporter = self.by_rank.get(&exporter)?;
            let pair = (importer.rank, exporter.rank);
            keep(network(importer, exporter)).then_some((failure, pair))
        });
        grouped(kept)
            .into_iter()
            .map(|(failure, pairs)| Refusal::Import {
                backend,
                pairs,
                failure,
            })
            .collect()
    }
}

impl Candidate {
    fn instead_of(mut self, other: &Self) -> Self {
        self.reason = Reason::ConnectsMore {
            than: other.backend,
            pairs: self.pairs,
            than_pairs: other.pairs,
        };
        self
    }
}

/// Distinct values.
fn count<T: Ord>(values: impl Iterator<Item = T>) -> u32 {
    let distinct: BTreeSet<T> = values.collect();
    u32::try_from(distinct.len()).unwrap_or(u32::MAX)
}

/// Values by key, keys in order of first occurrence.
fn grouped<K: PartialEq, V>(entries: impl Iterator<Item = (K, V)>) -> Vec<(K, Vec<V>)> {
    let mut groups: Vec<(K, Vec<V>)> = Vec::new();
    for (key, value) in entries {
        match groups.iter_mut().find(|(known, _)| *known == key) {
            Some((_, values)) => values.push(value),
            None => groups.push((key, vec![value])),
        }
    }
    groups
}
