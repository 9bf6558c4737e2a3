//! Finding out what a group would use before it is used, and why.

mod bandwidth;

use std::sync::Arc;
use std::time::Duration;

use ep_alloc::{
    BackendKind, Choice, CliqueGap, Plan, PolicyError, ProbeOptions, RankFacts, Reason, Refusal,
    Route, probe, route,
};
use ep_kernels::{HostKernels, ffi};
use ep_peers::{Access, NvlinkCheck, Unreachable};
use ep_sys::{Bytes16, DeviceOrdinal, Driver};

pub use self::bandwidth::Bandwidth;
use crate::connection::{Evidence, Ties, Verdict, first_of};
use crate::facts::{self, Hello};
use crate::session::Session;
use crate::{Communicator, Config, Device, Error, env};

/// Proves what memory a group would use, as building a [`Buffer`](crate::Buffer) does, with one
/// granule per rank; [`run`](Self::run) on every rank at once. Needs no kernels.
///
/// ```
/// use ep::alloc::Route;
/// use ep::driver::DeviceOrdinal;
/// use ep::{BackendKind, Communicator, Preflight};
/// use ep_sim::{Cluster, SimDriver};
///
/// let driver = SimDriver::new(&Cluster::hgx_h200(1), 0, &[0]);
/// let alone = Communicator::threads(1).remove(0);
/// let report = Preflight::new(driver, DeviceOrdinal(0), &alone)
///     .alloc(ep::Choice::Auto)
///     .run()?;
/// assert!(report.is_usable());
/// assert_eq!(report.backend, BackendKind::Malloc);
/// assert_eq!(report.route(0, 0), Route::SelfRank);
/// # Ok::<(), ep::Error>(())
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct Preflight {
    device: Device,
    comm: Communicator,
    choice: Option<Choice>,
    deadline: Option<Duration>,
    bandwidth: bool,
}

impl Preflight {
    /// For the rank of `comm` that would use this device. Ranks of one process share a driver.
    pub fn new(driver: Arc<dyn Driver>, device: DeviceOrdinal, comm: &Communicator) -> Self {
        Self {
            // No kernel is launched, so it matters not which there are.
            device: Device::from_parts(driver, Arc::new(HostKernels::default()), device),
            comm: comm.clone(),
            choice: None,
            deadline: None,
            bandwidth: false,
        }
    }

    /// Which memory to use. Unless set, the environment chooses, as for a buffer.
    pub fn alloc(mut self, choice: Choice) -> Self {
        self.choice = Some(choice);
        self
    }

    /// Bound on each step that waits for other ranks. Unless set, `EP_DEADLINE_MS`, and without it
    /// 60 s. Zero is refused when it runs.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Also times copies between all ranks that are connected; the same on every rank. Needs 64 MiB
    /// of each device.
    pub fn bandwidth(mut self) -> Self {
        self.bandwidth = true;
        self
    }

    /// Tries what each device can share, agrees on one kind, allocates and connects a granule of it,
    /// and gives everything back. Every rank has a report or none has: with the same findings, and
    /// naming the rank that failed where one did. Only that rank's own report has the whole error.
    ///
    /// # Errors
    /// A rank has no valid settings, or the group broke: a rank was gone, or did not come within
    /// the deadline. That no memory suits the group, or that a call failed on one rank, is no error
    /// but a [`Report`]. If the group breaks while its last step ends, ranks that had finished have
    /// a report nonetheless.
    pub fn run(self) -> Result<Report, Error> {
        let rank = self.comm.rank();
        self.run_here().map_err(|error| error.of_rank(rank))
    }

    fn run_here(self) -> Result<Report, Error> {
        let rank = self.comm.rank();
        let choice = self.choice.map_or_else(env::choice, Ok);
        let deadline = env::bound(rank, "deadline", self.deadline, env::deadline);
        let bound = *deadline.as_ref().unwrap_or(&env::DEADLINE);
        let session = Session::new(self.comm.clone(), bound);
        let process = self.device.process().map_err(Error::process(rank));
        let settings = choice.and_then(|choice| Ok((choice, deadline.and(process)?)));

        let hello = self.hello(settings.as_ref().copied().ok());
        let heard = session.gather("preflight", &hello.encode(GENERATION));
        settings?;
        let hellos = (0..)
            .zip(&heard?)
            .map(|(peer, bytes)| Hello::decode(bytes, rank, peer, GENERATION))
            .collect::<Result<Vec<_>, _>>()?;
        facts::compare(rank, &hellos)?;
        let facts = hellos.into_iter().map(|hello| hello.facts).collect();
        Report::new(&session, &self.device, facts, self.bandwidth)
    }

    /// What this rank tells of itself. Without settings it says that it cannot go on.
    fn hello(&self, settings: Option<(Choice, Bytes16)>) -> Hello {
        let rank = self.comm.rank();
        let (driver, ordinal) = (self.device.driver(), self.device.ordinal());
        let probe = probe(driver, ordinal, &ProbeOptions::default());
        let (choice, process) = settings.unwrap_or_default();
        // None run, but ranks that take other steps must not go on together.
        let kernels = if self.bandwidth {
            "bandwidth"
        } else {
            "preflight"
        };
        Hello {
            is_ready: settings.is_some(),
            // The least that there is: nothing of it is made.
            config: Config::new(128, self.comm.size(), 1, 1),
            kernels: (String::from(kernels), ffi::EP_KERNELS_ABI_VERSION),
            facts: RankFacts::new(rank, process, choice, &probe),
        }
    }
}

/// Of the facts' records.
const GENERATION: u64 = 0;

/// What a group would use, and why.
#[derive(Debug)]
#[non_exhaustive]
pub struct Report {
    /// What every rank found by trying, by rank.
    pub facts: Vec<RankFacts>,
    /// The memory that the group would use, or why there is none for it: none suits it, or a rank
    /// failed in allocating, connecting, copying or giving back.
    pub plan: Result<Plan, Error>,
    /// The backend of the plan; without a plan the one that is forced, or that was tried last.
    pub backend: BackendKind,
    /// How fast connected ranks copy to each other, if that was asked for and there is a plan.
    pub bandwidth: Option<Bandwidth>,
    /// Who reached whom by the backend; empty if that was not tried.
    verdicts: Verdicts,
}

/// Who reached whom, `[from][to]`.
type Verdicts = Vec<Vec<Verdict>>;

/// What connecting by one backend showed.
struct Attempt {
    backend: BackendKind,
    verdicts: Verdicts,
    bandwidth: Option<Bandwidth>,
}

/// Something for an operator to mend.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Problem {
    /// The ranks that it concerns, ascending.
    pub ranks: Vec<u32>,
    /// What is wrong.
    pub what: String,
    /// What to check next.
    pub check: String,
}

impl Report {
    /// Connects by the backend that the policy names, and if importing fails by the next that it
    /// names then, until no more is to be learned. Collective.
    fn new(
        session: &Session,
        device: &Device,
        facts: Vec<RankFacts>,
        with_bandwidth: bool,
    ) -> Result<Self, Error> {
        let rank = session.rank();
        let mut evidence = Evidence::default();
        let mut attempts: Vec<Attempt> = Vec::new();
        let mut last = BackendKind::Malloc;
        // The allocation rounds this up to a granule.
        let bytes = if with_bandwidth { bandwidth::BYTES } else { 1 };
        let plan = loop {
            let plan = match evidence.decide(&facts) {
                Ok((plan, None)) => plan,
                Ok((plan, Some(_))) => break Ok(plan),
                Err(source) => break Err(Error::Policy { rank, source }),
            };
            last = plan.backend;
            let ties = match Ties::new(session, device, &facts, plan.backend, bytes) {
                Ok(ties) => ties,
                Err(error) => break Err(to_report(session, error)?),
            };
            let is_connected = evidence.learn(plan.backend, &ties);
            let verdicts = ties.verdicts();
            let rates = with_bandwidth
                .then(|| bandwidth::measure(session, device, ties.peers()))
                .transpose();
            let left = match is_connected {
                true => ties.close(session),
                false => ties.abandon(session),
            };
            // Who could not give something back is the first to know, and tells the others.
            let left = session.agree("leaving", own_failure(left));
            let (bandwidth, failed) = match first_of(rates, left) {
                Ok(rates) => (rates, None),
                Err(error) => (None, Some(to_report(session, error)?)),
            };
            attempts.push(Attempt {
                backend: plan.backend,
                verdicts,
                bandwidth,
            });
            match failed {
                Some(error) => break Err(error),
                None if is_connected => break Ok(plan),
                None => {}
            }
        };
        let backend = match &plan {
            Ok(plan) => plan.backend,
            Err(Error::Policy { source, .. }) => match *source {
                PolicyError::Forced { backend, .. } => backend,
                PolicyError::Conflict { first, .. } => first.1,
                _ => last,
            },
            Err(_) => last,
        };
        let is_planned = plan.is_ok();
        let shown = attempts.into_iter().find(|of| of.backend == backend);
        let (verdicts, bandwidth) = shown
            .map(|of| (of.verdicts, of.bandwidth))
            .unwrap_or_default();
        Ok(Self {
            facts,
            plan,
            backend,
            bandwidth: bandwidth.filter(|_| is_planned),
            verdicts,
        })
    }

    /// Whether there is memory for the group, and a route between any two of its ranks.
    pub fn is_usable(&self) -> bool {
        self.plan.is_ok() && self.pairs().all(|(a, b)| self.route(a, b) != Route::None)
    }

    /// How two ranks reach each other: by pointers if importing worked both ways, else by the network
    /// if both see a NIC.
    pub fn route(&self, a: u32, b: u32) -> Route {
        let nics = |rank: u32| self.facts.get(rank as usize).map_or(0, |f| f.rdma_nics);
        if a == b {
            Route::SelfRank
        } else if self.access(a, b).is_some() && self.access(b, a).is_some() {
            Route::Nvlink
        } else if nics(a) > 0 && nics(b) > 0 {
            Route::Network
        } else {
            Route::None
        }
    }

    /// By what kind of mapping rank `from` reached rank `to`, if it did.
    pub fn access(&self, from: u32, to: u32) -> Option<Access> {
        Some(self.verdict(from, to)?.ok()?.0)
    }

    /// Whether NVLink joins the GPUs of `from` and `to`, if these are two of one host and `from`
    /// reached `to`.
    pub fn nvlink(&self, from: u32, to: u32) -> Option<NvlinkCheck> {
        self.verdict(from, to)?.ok()?.1
    }

    /// Why two ranks have no pointers to each other: the direction that failed. `None` if they have,
    /// or if it was not tried.
    pub fn unreachable(&self, a: u32, b: u32) -> Option<Unreachable> {
        let one_way = |from, to| {
            let reason = self.verdict(from, to)?.err()?;
            Some(Unreachable { from, to, reason })
        };
        one_way(a, b).or_else(|| one_way(b, a))
    }

    /// What an operator can mend: whatever leaves the group without memory or some of its ranks
    /// without a route, and refusals of memory that would have connected ranks.
    pub fn problems(&self) -> Vec<Problem> {
        let refused = match &self.plan {
            Ok(plan) => &plan.refused[..],
            Err(Error::Policy { source, .. }) => source.refused(),
            Err(_) => &[],
        };
        let mut problems = Vec::new();
        if let Err(error) = &self.plan
            && refused.is_empty()
        {
            problems.push(Problem::of(error));
        }
        let gaps = self.clique_gaps();
        problems.extend(
            refused
                .iter()
                .filter(|refusal| !matches!(refusal, Refusal::NoClique { .. }))
                .chain(&gaps)
                .filter(|refusal| self.matters(refusal))
                .map(Problem::from),
        );
        problems.extend(self.gap_between_hosts());
        problems
    }

    fn verdict(&self, from: u32, to: u32) -> Option<Verdict> {
        let row = self.verdicts.get(from as usize)?;
        row.get(to as usize).copied()
    }

    /// Every pair of ranks, the lower one first.
    fn pairs(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        let ranks = || self.facts.iter().map(|f| f.rank);
        ranks().flat_map(move |a| ranks().filter(move |b| a < *b).map(move |b| (a, b)))
    }

    /// Ranks that are in no NVLink clique, those with one reason together.
    fn clique_gaps(&self) -> Vec<Refusal> {
        let mut gaps: Vec<(CliqueGap, Vec<u32>)> = Vec::new();
        for facts in &self.facts {
            let Some(gap) = CliqueGap::of(&facts.fabric) else {
                continue;
            };
            match gaps.iter_mut().find(|(known, _)| *known == gap) {
                Some((_, ranks)) => ranks.push(facts.rank),
                None => gaps.push((gap, vec![facts.rank])),
            }
        }
        let refusal = |(gap, ranks)| Refusal::NoClique { ranks, gap };
        gaps.into_iter().map(refusal).collect()
    }

    /// Whether a refusal costs the group something. That a host without a multi-node fabric has no
    /// fabric memory is in order, as long as the network joins it to the others.
    fn matters(&self, refusal: &Refusal) -> bool {
        let of_fabric = refusal.backend() == BackendKind::Fabric;
        match (&self.plan, refusal) {
            (Err(_), Refusal::Trial { .. }) => true,
            (Ok(plan), Refusal::Trial { .. }) if of_fabric => {
                matches!(plan.reason, Reason::SpanningCliqueRefused { .. })
                    || self.is_parted() && self.has_clique()
            }
            (_, Refusal::NoClique { gap, .. }) => match gap {
                CliqueGap::ZeroUuid | CliqueGap::NotSupported => {
                    self.is_parted() && self.has_clique()
                }
                _ => self.has_hosts() || self.plan.is_err(),
            },
            _ => true,
        }
    }

    /// Whether some ranks of different hosts have no route.
    fn is_parted(&self) -> bool {
        self.unrouted().next().is_some()
    }

    fn has_clique(&self) -> bool {
        self.facts.iter().any(|facts| facts.clique().is_some())
    }

    fn has_hosts(&self) -> bool {
        let mut facts = self.facts.iter();
        let first = facts.next();
        first.is_some_and(|first| facts.any(|other| !other.same_host(first)))
    }

    /// Pairs of ranks of different hosts that have no route, and to which the backend promises none.
    fn unrouted(&self) -> impl Iterator<Item = (&RankFacts, &RankFacts)> {
        let pairs = self.pairs().filter_map(|(a, b)| {
            let (a, b) = (&self.facts.get(a as usize)?, &self.facts.get(b as usize)?);
            Some((*a, *b))
        });
        pairs.filter(|(a, b)| {
            self.plan.is_ok()
                && !a.same_host(b)
                && self.route(a.rank, b.rank) == Route::None
                && route(a, b, self.backend) != Route::Nvlink
        })
    }

    fn gap_between_hosts(&self) -> Option<Problem> {
        let (a, b) = self.unrouted().next()?;
        let mut ranks = vec![false; self.facts.len()];
        let mut pairs = 0_u64;
        for (a, b) in self.unrouted() {
            pairs += 1;
            for rank in [a.rank, b.rank] {
                if let Some(concerned) = ranks.get_mut(rank as usize) {
                    *concerned = true;
                }
            }
        }
        let without_nic = if a.rdma_nics == 0 { a } else { b };
        let reach = match self.backend {
            BackendKind::Fabric => "fabric memory keeps to its NVLink clique",
            BackendKind::PosixFd => "posix_fd memory keeps to its host",
            BackendKind::Malloc => "malloc memory keeps to its host",
        };
        Some(Problem {
            ranks: (0..).zip(ranks).filter(|r| r.1).map(|r| r.0).collect(),
            what: format!(
                "no route between rank {} on {} and rank {} on {}{}: {reach}, and {} has no RDMA NIC \
                 with an active port",
                a.rank,
                a.host_name,
                b.rank,
                b.host_name,
                match pairs {
                    1 => String::new(),
                    2 => String::from(" and 1 more pair"),
                    n => format!(" and {} more pairs", n - 1),
                },
                without_nic.host_name,
            ),
            check: String::from(
                "check ibstat on these hosts; if one NVLink domain should join them, check \
                 nvidia-smi -q -d FABRIC and nvidia-imex-ctl -N",
            ),
        })
    }
}

/// An error of which every rank has its own. If the group still stands, it is something to report;
/// if not, it is why there is no report.
fn to_report(session: &Session, error: Error) -> Result<Error, Error> {
    let error = error.of_rank(session.rank());
    match session.gather("failure", &[]) {
        Ok(_) => Ok(error),
        Err(_) => Err(error),
    }
}

/// What a peer could not give back is that peer's to tell.
fn own_failure(left: Result<(), Error>) -> Result<(), Error> {
    match left {
        Err(Error::Group {
            source: ep_peers::Error::PeerRelease { .. },
            ..
        }) => Ok(()),
        left => left,
    }
}

impl Problem {
    /// An error's own words; they end with what to check.
    fn of(error: &Error) -> Self {
        let ranks = match error {
            Error::Policy {
                source: PolicyError::Conflict { first, second },
                ..
            } => vec![first.0, second.0],
            Error::Peer { peer, .. } => vec![*peer],
            Error::Memory { rank, .. }
            | Error::Driver {
                rank: Some(rank), ..
            }
            | Error::Group {
                rank,
                source: ep_peers::Error::Driver { .. } | ep_peers::Error::Release { .. },
            } => vec![*rank],
            _ => Vec::new(),
        };
        let mut cause: &dyn std::error::Error = error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        let text = match error {
            Error::Peer { .. } => error.to_string(),
            _ => cause.to_string(),
        };
        let (what, check) = text
            .rsplit_once("; ")
            .unwrap_or((&text, "check the ranks' own output"));
        Self {
            ranks,
            what: what.to_owned(),
            check: check.to_owned(),
        }
    }
}

impl From<&Refusal> for Problem {
    fn from(refusal: &Refusal) -> Self {
        Self {
            ranks: refusal.ranks(),
            what: refusal.to_string(),
            check: refusal.check().to_owned(),
        }
    }
}
