//! How one rank is expected to reach another.

use std::fmt;

use crate::{BackendKind, RankFacts};

/// How one rank reaches another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    /// It is the same rank.
    SelfRank,
    /// Through a pointer into the peer's memory.
    Nvlink,
    /// Through RDMA NICs.
    Network,
    /// Not at all.
    None,
}

/// The route that two ranks should get from a backend. A prediction: only importing proves it.
///
/// A pointer needs a backend that worked on both ranks, and ranks that it can connect: of one host
/// for posix_fd and malloc; of one NVLink clique for fabric, or of one host where either is in no
/// clique. The network needs a NIC on both.
pub fn route(a: &RankFacts, b: &RankFacts, kind: BackendKind) -> Route {
    if a.rank == b.rank {
        Route::SelfRank
    } else if connects(a, b, kind) {
        Route::Nvlink
    } else {
        network(a, b)
    }
}

impl Route {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::SelfRank => "self",
            Self::Nvlink => "nvlink",
            Self::Network => "network",
            Self::None => "none",
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether a backend should give two ranks pointers to each other.
pub(crate) fn connects(a: &RankFacts, b: &RankFacts, kind: BackendKind) -> bool {
    let joined = match (kind, a.clique(), b.clique()) {
        (BackendKind::Fabric, Some(a), Some(b)) => a == b,
        _ => a.same_host(b),
    };
    joined && a.trials[kind].is_ok() && b.trials[kind].is_ok()
}

/// The route of two ranks that have no pointers to each other.
pub(crate) fn network(a: &RankFacts, b: &RankFacts) -> Route {
    if a.rdma_nics > 0 && b.rdma_nics > 0 {
        Route::Network
    } else {
        Route::None
    }
}
