//! What was decided, and why, as data that prints in an operator's words.

use std::fmt;

use ep_sys::{Bytes16, FabricInfo, FabricState};

use crate::{BackendKind, Cause, Failure, Trial};

/// What the group will use. Prints as one line: the backend, why, and what was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The backend, the same on every rank.
    pub backend: BackendKind,
    /// The multiple of bytes that suits every rank's device.
    pub granularity: u64,
    /// Why this one.
    pub reason: Reason,
    /// What speaks against the backends that came before it, and against this one between single
    /// pairs of ranks.
    pub refused: Vec<Refusal>,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.backend, self.reason)?;
        for refusal in &self.refused {
            write!(f, "; {refusal}")?;
        }
        Ok(())
    }
}

/// Why a backend was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// The operator of this rank, the lowest that has an opinion, wants it.
    Forced {
        /// The rank.
        rank: u32,
    },
    /// Every rank is on one host, where fabric memory would connect no more.
    OneNode,
    /// There are several hosts, and every NVLink clique keeps to one of them.
    NoSpanningClique {
        /// Hosts.
        nodes: u32,
    },
    /// An NVLink clique reaches over several hosts, and every rank can use fabric memory.
    CliqueSpansNodes {
        /// The clique that reaches over the most hosts.
        clique: (Bytes16, u32),
        /// The hosts that it reaches over.
        nodes: u32,
    },
    /// An NVLink clique reaches over several hosts, but fabric memory is refused.
    SpanningCliqueRefused {
        /// The clique that reaches over the most hosts.
        clique: (Bytes16, u32),
        /// The hosts that it reaches over.
        nodes: u32,
    },
    /// Plain memory cannot be allocated or exported.
    MallocRefused,
    /// The backend that came first could not be imported everywhere; this one connects more.
    ConnectsMore {
        /// The backend that came first.
        than: BackendKind,
        /// Pairs of ranks that the chosen backend connects.
        pairs: u64,
        /// Pairs of ranks that the other connects.
        than_pairs: u64,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Forced { rank } => write!(f, "forced by rank {rank}"),
            Self::OneNode => f.write_str("one node"),
            Self::NoSpanningClique { nodes } => {
                write!(
                    f,
                    "{nodes} nodes and no NVLink clique that spans two of them"
                )
            }
            Self::CliqueSpansNodes { clique, nodes } => {
                write!(f, "NVLink clique {} spans {nodes} nodes", Clique(clique))
            }
            Self::SpanningCliqueRefused { clique, nodes } => {
                let clique = Clique(clique);
                write!(
                    f,
                    "NVLink clique {clique} spans {nodes} nodes but not every rank can use it"
                )
            }
            Self::MallocRefused => f.write_str("malloc does not work on every rank"),
            Self::ConnectsMore {
                than,
                pairs,
                than_pairs,
            } => {
                let noun = if pairs == 1 { "pair" } else { "pairs" };
                write!(
                    f,
                    "connects {pairs} {noun} of ranks where {than} connects {than_pairs}"
                )
            }
        }
    }
}

/// Why a backend was not chosen, or does not connect a pair.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// The backend was tried on these ranks, or not even that, with the same outcome.
    Trial {
        /// The backend.
        backend: BackendKind,
        /// The ranks, ascending.
        ranks: Vec<u32>,
        /// The outcome; not [`Trial::Ok`].
        trial: Trial,
        /// Whether the refusal is explained by the ranks seeing no IMEX channel.
        no_imex: bool,
    },
    /// These ranks are in no NVLink clique, for the same reason, so fabric memory would not connect
    /// them to other hosts.
    NoClique {
        /// The ranks, ascending.
        ranks: Vec<u32>,
        /// The reason.
        gap: CliqueGap,
    },
    /// Importing failed between these ranks, always in the same way.
    Import {
        /// The backend.
        backend: BackendKind,
        /// Importer and exporter, ascending.
        pairs: Vec<(u32, u32)>,
        /// How it failed.
        failure: Failure,
    },
}

impl Refusal {
    /// The backend that it speaks against.
    pub fn backend(&self) -> BackendKind {
        match self {
            Self::Trial { backend, .. } | Self::Import { backend, .. } => *backend,
            Self::NoClique { .. } => BackendKind::Fabric,
        }
    }

    /// The ranks that it concerns, ascending.
    pub fn ranks(&self) -> Vec<u32> {
        match self {
            Self::Trial { ranks, .. } | Self::NoClique { ranks, .. } => ranks.clone(),
            Self::Import { pairs, .. } => {
                let mut ranks: Vec<u32> = pairs.iter().flat_map(|&(a, b)| [a, b]).collect();
                ranks.sort_unstable();
                ranks.dedup();
                ranks
            }
        }
    }

    /// What failed, where a call did.
    pub fn failure(&self) -> Option<Failure> {
        match self {
            Self::Trial { trial, .. } => trial.failure(),
            Self::NoClique { gap, .. } => match gap {
                CliqueGap::Unknown(failure) => Some(*failure),
                _ => None,
            },
            Self::Import { failure, .. } => Some(*failure),
        }
    }

    /// What an operator should check next.
    pub fn check(&self) -> &'static str {
        match self {
            Self::Trial {
                backend,
                trial,
                no_imex,
                ..
            } => match trial {
                Trial::NotTried(why) => why.check(),
                Trial::Refused(failure) => failure.check(*backend, *no_imex),
                Trial::Ok { .. } => "",
            },
            Self::NoClique { gap, .. } => gap.check(),
            Self::Import {
                backend, failure, ..
            } => failure.check(*backend, false),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Trial {
                backend,
                ranks,
                trial,
                no_imex,
            } => {
                let ranks = Ranks(ranks);
                match trial {
                    Trial::NotTried(why) => write!(f, "{backend} not tried on {ranks}: {why}"),
                    Trial::Refused(failure) => {
                        write!(f, "{backend} refused on {ranks}: ")?;
                        explained(f, *failure, *backend, *no_imex)
                    }
                    Trial::Ok { .. } => write!(f, "{backend} works on {ranks}"),
                }
            }
            Self::NoClique { ranks, gap } => {
                write!(f, "no NVLink clique on {}: {gap}", Ranks(ranks))
            }
            Self::Import {
                backend,
                pairs,
                failure,
            } => {
                write!(f, "{backend} refused")?;
                if let Some((importer, exporter)) = pairs.first() {
                    write!(f, " when rank {importer} imports from rank {exporter}")?;
                }
                match pairs.len() {
                    0 | 1 => {}
                    2 => f.write_str(" and in 1 more case")?,
                    n => write!(f, " and in {} more cases", n - 1)?,
                }
                f.write_str(": ")?;
                explained(f, *failure, *backend, false)
            }
        }
    }
}

fn explained(
    f: &mut fmt::Formatter<'_>,
    failure: Failure,
    backend: BackendKind,
    no_imex: bool,
) -> fmt::Result {
    match failure.meaning(backend, no_imex) {
        Some(meaning) => write!(f, "{failure} ({meaning})"),
        None => write!(f, "{failure}"),
    }
}

/// Why a GPU is in no NVLink clique.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CliqueGap {
    /// NVML would not tell.
    Unknown(Failure),
    /// The GPU has no fabric.
    NotSupported,
    /// Registration with the fabric has not started.
    NotStarted,
    /// Registration with the fabric is under way.
    InProgress,
    /// Registration is in a state that this crate has no name for.
    State(u32),
    /// Registration ended with this NVML return value.
    Status(u32),
    /// Registration succeeded with a cluster UUID of zeros: a fabric of one host.
    ZeroUuid,
}

impl CliqueGap {
    /// Why `fabric` is no clique; `None` if it is one.
    pub fn of(fabric: &Result<FabricInfo, Failure>) -> Option<Self> {
        let info = match fabric {
            Ok(info) => info,
            Err(failure) => return Some(Self::Unknown(*failure)),
        };
        match info.state {
            FabricState::NotSupported => Some(Self::NotSupported),
            FabricState::NotStarted => Some(Self::NotStarted),
            FabricState::InProgress => Some(Self::InProgress),
            FabricState::Other(state) => Some(Self::State(state)),
            FabricState::Completed if info.status != 0 => Some(Self::Status(info.status)),
            FabricState::Completed => info.cluster_uuid.is_zero().then_some(Self::ZeroUuid),
        }
    }

    /// What an operator should check next.
    pub fn check(self) -> &'static str {
        match self {
            Self::Unknown(failure) => match failure.cause {
                Cause::NoLibrary => {
                    "make libnvidia-ml.so.1 visible to the process (in a container, \
                     NVIDIA_DRIVER_CAPABILITIES has to include utility)"
                }
                _ => failure.check(BackendKind::Fabric, false),
            },
            Self::NotSupported => "check nvidia-smi -q -d FABRIC; this GPU reports no fabric",
            Self::NotStarted | Self::InProgress | Self::State(_) | Self::Status(_) => {
                "check nvidia-smi -q -d FABRIC and the log of nvidia-fabricmanager"
            }
            Self::ZeroUuid => {
                "nothing to mend on a host with an NVLink domain of its own; on a multi-node NVLink \
                 system, check nvidia-fabricmanager and the NVLink partition"
            }
        }
    }
}

impl fmt::Display for CliqueGap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(failure) => write!(f, "{failure}"),
            Self::NotSupported => f.write_str("the GPU has no fabric"),
            Self::NotStarted => f.write_str("fabric registration has not started"),
            Self::InProgress => f.write_str("fabric registration is in progress"),
            Self::State(state) => write!(f, "fabric registration is in unknown state {state}"),
            Self::Status(status) => {
                write!(f, "fabric registration ended with NVML status {status}")
            }
            Self::ZeroUuid => f.write_str("the cluster UUID is all zeros"),
        }
    }
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// There are no ranks.
    #[error("a group has at least one rank; check the facts that were exchanged")]
    NoRanks,
    /// Facts are not in ascending order of rank, or a rank occurs twice.
    #[error(
        "rank {rank} follows rank {after} in the facts of the group; check that ranks are numbered \
         once each"
    )]
    RankOrder {
        /// The rank out of order.
        rank: u32,
        /// The rank before it.
        after: u32,
    },
    /// Two ranks force different backends.
    #[error(
        "rank {} forces {} and rank {} forces {}; set EP_ALLOC and MC_USE_NVLINK_IPC alike on every \
         rank",
        first.0, first.1, second.0, second.1
    )]
    Conflict {
        /// The lowest rank that forces a backend, and which.
        first: (u32, BackendKind),
        /// The lowest rank that forces another.
        second: (u32, BackendKind),
    },
    /// The forced backend cannot be had.
    #[error(
        "{backend} is forced by rank {rank}: {}; {}",
        Listed(refused),
        next_check(refused)
    )]
    Forced {
        /// The backend.
        backend: BackendKind,
        /// The lowest rank that forces it.
        rank: u32,
        /// What was refused; not empty.
        refused: Vec<Refusal>,
    },
    /// No backend works on every rank.
    #[error(
        "no backend works on every rank: {}; {}",
        Listed(refused),
        next_check(refused)
    )]
    NoBackend {
        /// What was refused; not empty.
        refused: Vec<Refusal>,
    },
}

impl PolicyError {
    /// What was refused, if that is the reason.
    pub fn refused(&self) -> &[Refusal] {
        match self {
            Self::Forced { refused, .. } | Self::NoBackend { refused } => refused,
            _ => &[],
        }
    }
}

/// The check of the first refusal; of one that is not fabric's, as only a forced fabric must work.
fn next_check(refused: &[Refusal]) -> &'static str {
    let other = |refusal: &&Refusal| refusal.backend() != BackendKind::Fabric;
    let refusal = refused.iter().find(other).or(refused.first());
    refusal.map_or("", Refusal::check)
}

struct Listed<'a>(&'a [Refusal]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, refusal) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{refusal}")?;
        }
        Ok(())
    }
}

struct Clique((Bytes16, u32));

impl fmt::Display for Clique {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (cluster, clique) = self.0;
        write!(f, "{cluster}/{clique}")
    }
}

/// Ascending ranks, runs of them as `first-last`.
struct Ranks<'a>(&'a [u32]);

impl fmt::Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.len() == 1 { "rank " } else { "ranks " })?;
        let runs = self.0.chunk_by(|a, b| a.checked_add(1) == Some(*b));
        for (i, run) in runs.enumerate() {
            let separator = if i == 0 { "" } else { ", " };
            match *run {
                [first, .., last] => write!(f, "{separator}{first}-{last}")?,
                [only] => write!(f, "{separator}{only}")?,
                [] => {}
            }
        }
        Ok(())
    }
}
