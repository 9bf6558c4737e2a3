//! A rank's ties to its group: symmetric memory and the table of peers, made and taken apart in the
//! one order that is safe.

use std::mem;
use std::sync::Arc;
use std::thread;

use ep_alloc::{
    Allocation, BackendKind, Cause, Export, Failure, ImportRefusal, Plan, PolicyError, RankFacts,
    decide,
};
use ep_peers::wire::{Facts, Identity, Refusal};
use ep_peers::{Access, DescriptorError, NvlinkCheck, Offer, Peers, Reason, Unreachable, connect};
use ep_sys::{Call, DevicePtr};
use parking_lot::Mutex;

use crate::order::Order;
use crate::session::Session;
use crate::{Device, Error};

/// A rank's memory and its peers', which it leaves in order when it is dropped.
#[derive(Debug)]
pub(crate) struct Connection {
    /// None once it has been left.
    ties: Option<Ties>,
    session: Session,
    /// What has been enqueued, and on which stream.
    order: Arc<Mutex<Order>>,
}

/// One attempt's memory and peers.
#[derive(Debug)]
pub(crate) struct Ties {
    peers: Peers,
    memory: Symmetric,
}

impl Connection {
    /// Allocates symmetric memory, zeroed, and connects it with the other ranks': by the backend that
    /// the policy names, and if importing fails by the next that it names then. Collective; fails on
    /// every rank or on none, unless the group breaks.
    ///
    /// Peers may write to the memory as soon as this returns on any of them.
    pub(crate) fn new(
        session: Session,
        device: &Device,
        facts: &[RankFacts],
        bytes: u64,
    ) -> Result<(Self, Plan), Error> {
        let rank = session.rank();
        let mut evidence = Evidence::default();
        loop {
            let (plan, known) = evidence
                .decide(facts)
                .map_err(|source| Error::Policy { rank, source })?;
            if let Some(pair) = known {
                let plan = Box::new(plan);
                return Err(Error::Unreachable { rank, pair, plan });
            }
            tracing::info!(rank, %plan, bytes, "connecting");
            let ties = Ties::new(&session, device, facts, plan.backend, bytes)?;
            if evidence.learn(plan.backend, &ties) {
                let connection = Self {
                    ties: Some(ties),
                    session,
                    order: Arc::default(),
                };
                return Ok((connection, plan));
            }
            ties.abandon(&session)?;
        }
    }

    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    pub(crate) fn order(&self) -> &Arc<Mutex<Order>> {
        &self.order
    }

    /// Bytes of the symmetric memory.
    pub(crate) fn bytes(&self) -> u64 {
        let ties = self.ties.as_ref();
        ties.map_or(0, |ties| ties.memory.allocation.bytes())
    }

    /// Where kernels find the bases of the ranks' symmetric memory.
    pub(crate) fn table(&self) -> DevicePtr {
        let ties = self.ties.as_ref();
        ties.map_or(DevicePtr::NULL, |ties| ties.peers.device_ptr())
    }

    /// Whether and how rank `from` reaches rank `to`.
    pub(crate) fn access(&self, from: u32, to: u32) -> Result<Access, Reason> {
        let ties = self.ties.as_ref();
        ties.map_or(Err(Reason::Absent), |ties| ties.peers.verdict(from, to))
    }

    /// Waits for the last stream, then for the other ranks, and gives peers and memory back.
    pub(crate) fn close(&mut self) -> Result<(), Error> {
        let Some(ties) = self.ties.take() else {
            return Ok(());
        };
        let finished = self.finish();
        let left = ties.close(&self.session);
        first_of(finished, left)
    }

    /// Connects anew, with the members of the next session. Collective among them. What operations
    /// use is put back by `reset` while nobody uses it.
    ///
    /// Until this succeeds, no operation is admitted.
    pub(crate) fn refresh(
        &mut self,
        session: Session,
        plan: &Plan,
        reset: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let rank = session.rank();
        let finished = self.finish();
        self.order.lock().disconnect();
        let Some(Ties { peers, memory }) = &mut self.ties else {
            return Err(Error::NotConnected { rank });
        };
        session.agree("refresh", finished)?;
        // From here on no member uses another's memory.
        let stays = |rank: &u32| session.members().contains(rank);
        memory.has_strays |= !self.session.members().iter().all(stays);
        self.session = session;
        let session = &self.session;
        let generation = session.most("generation", peers.generation())?;
        let export = memory.zero().and_then(|()| reset());
        let export = export.and_then(|()| memory.export(rank));
        let export = session.agree("memory", export)?;
        let offer = memory.offer(export, generation.saturating_add(1));
        let refreshed = session
            .group()
            .and_then(|group| peers.refresh(&group, offer, session.due()));
        let refreshed = match refreshed {
            Err(ep_peers::Error::Release { source, .. }) => {
                tracing::error!(rank, error = %source, "a mapping from before was not given back");
                Ok(())
            }
            refreshed => refreshed.map_err(|source| Error::Group { rank, source }),
        };
        session.agree("connecting", refreshed)?;
        let members = session.members();
        let pairs = members
            .iter()
            .flat_map(|&from| members.iter().map(move |&to| (from, to)));
        for (from, to) in pairs {
            if let Err(reason) = peers.verdict(from, to) {
                let pair = Unreachable { from, to, reason };
                let plan = Box::new(plan.clone());
                return Err(Error::Unreachable { rank, pair, plan });
            }
        }
        // What was sent before keeps the order that it was sent in.
        self.order = Arc::default();
        Ok(())
    }

    /// Waits until the last operation has finished.
    pub(crate) fn finish(&self) -> Result<(), Error> {
        let stream = self.order.lock().stream().cloned();
        stream
            .map_or(Ok(()), |stream| stream.synchronize())
            .map_err(|error| error.of_rank(self.session.rank()))
    }
}

/// Whether something could not be given back, and nothing else is wrong.
fn is_refused_release(error: &Error) -> bool {
    match error {
        Error::Memory { source, .. } => matches!(source, ep_alloc::Error::Release { .. }),
        Error::Group { source, .. } => matches!(
            source,
            ep_peers::Error::Release { .. } | ep_peers::Error::PeerRelease { .. }
        ),
        _ => false,
    }
}

/// The first error of two parts, both of which are over. A second one is logged: what could not be
/// given back is told, whatever else went wrong.
pub(crate) fn first_of<T>(first: Result<T, Error>, second: Result<(), Error>) -> Result<T, Error> {
    if let (Err(_), Err(error)) = (&first, &second) {
        let source = std::error::Error::source(error);
        tracing::error!(%error, source, "something else went wrong at the end, too");
    }
    first.and_then(|value| second.map(|()| value))
}

/// The generation of a buffer's first connection.
const FIRST: u64 = 1;

impl Drop for Connection {
    fn drop(&mut self) {
        let rank = self.session.rank();
        if thread::panicking() {
            // The others learn it when this rank's communicator goes; to wait for them would hide
            // the panic for as long as they go on.
            if let Some(Ties { peers, memory }) = self.ties.take() {
                if let Err(error) = self.finish() {
                    tracing::error!(rank, %error, "a stream did not finish");
                }
                drop(peers);
                memory.give_up();
            }
        } else if let Err(error) = self.close() {
            let source = std::error::Error::source(&error);
            tracing::error!(rank, %error, source, "a buffer was not closed in order");
        }
    }
}

impl Ties {
    /// One attempt, by one backend. Collective; every rank has an error if one has.
    pub(crate) fn new(
        session: &Session,
        device: &Device,
        facts: &[RankFacts],
        backend: BackendKind,
        bytes: u64,
    ) -> Result<Self, Error> {
        let rank = session.rank();
        let offered = Symmetric::new(device, facts, rank, backend, bytes);
        let (memory, export) = session.agree("memory", offered)?;
        let offer = memory.offer(export, FIRST);
        let (driver, ordinal) = (device.driver(), device.ordinal());
        let peers = session
            .group()
            .and_then(|group| connect(&group, driver, ordinal, offer, session.due()))
            .map_err(|source| Error::Group { rank, source });
        match session.agree("connecting", peers) {
            Ok(peers) => Ok(Self { peers, memory }),
            Err(error) => {
                // By now this rank has given back what it had mapped.
                match session.gather("withdrawn", &[]) {
                    Ok(_) => drop(memory),
                    Err(_) => memory.give_up(),
                }
                Err(error)
            }
        }
    }

    pub(crate) fn peers(&self) -> &Peers {
        &self.peers
    }

    /// Whether and how each rank reaches each, and over what, `[from][to]`.
    pub(crate) fn verdicts(&self) -> Vec<Vec<Verdict>> {
        let ranks = 0..self.peers.num_ranks();
        let row = |from| {
            let verdict = |to| {
                let access = self.peers.verdict(from, to)?;
                Ok((access, self.peers.nvlink(from, to)))
            };
            ranks.clone().map(verdict).collect()
        };
        ranks.clone().map(row).collect()
    }

    /// Leaves an attempt that the group gives up. What is stuck of it is logged: the others do not
    /// know and go on, so they would wait for a rank that returned here, and it does not concern
    /// what they do next.
    pub(crate) fn abandon(self, session: &Session) -> Result<(), Error> {
        match self.close(session) {
            Err(error) if is_refused_release(&error) => {
                let (rank, source) = (session.rank(), std::error::Error::source(&error));
                tracing::error!(rank, %error, source, "an attempt was not left in order");
                Ok(())
            }
            left => left,
        }
    }

    /// Leaves the group. What this rank had mapped is given back in any case.
    pub(crate) fn close(self, session: &Session) -> Result<(), Error> {
        let Self { peers, memory } = self;
        let rank = session.rank();
        let left = session
            .group()
            .and_then(|group| peers.disconnect(&group, session.due()));
        let freed = match &left {
            // Every rank has given back its mapping.
            Ok(()) | Err(ep_peers::Error::Release { .. })
                if !(memory.is_direct && memory.has_strays) =>
            {
                memory.allocation.close()
            }
            _ => {
                memory.give_up();
                Ok(())
            }
        };
        first_of(
            left.map_err(|source| Error::Group { rank, source }),
            freed.map_err(|source| Error::Memory { rank, source }),
        )
    }
}

/// What a group has learned by attempts to connect; the same on every rank.
#[derive(Debug, Default)]
pub(crate) struct Evidence {
    imports: Vec<ImportRefusal>,
    /// The attempts that failed, each with the first pair of ranks that do not reach each other.
    failed: Vec<(BackendKind, Unreachable)>,
}

impl Evidence {
    /// What to attempt next. With a pair that it does not connect there is nothing to attempt: all
    /// evidence about a backend is in after one attempt, and the policy still names this one.
    pub(crate) fn decide(
        &self,
        facts: &[RankFacts],
    ) -> Result<(Plan, Option<Unreachable>), PolicyError> {
        let plan = decide(facts, &self.imports)?;
        let mut failed = self.failed.iter();
        let known = failed.find(|(backend, _)| *backend == plan.backend);
        Ok((plan, known.map(|(_, pair)| *pair)))
    }

    /// Takes in an attempt; whether it connected every rank with every other.
    pub(crate) fn learn(&mut self, backend: BackendKind, ties: &Ties) -> bool {
        let peers = &ties.peers;
        let ranks = 0..peers.num_ranks();
        let pairs = ranks
            .clone()
            .flat_map(|from| ranks.clone().map(move |to| (from, to)));
        let mut first = None;
        for (from, to) in pairs {
            if let Err(reason) = peers.verdict(from, to) {
                first.get_or_insert(Unreachable { from, to, reason });
                self.imports.push(ImportRefusal {
                    backend,
                    importer: from,
                    exporter: to,
                    failure: failure(reason),
                });
            }
        }
        self.failed.extend(first.map(|pair| (backend, pair)));
        first.is_none()
    }
}

/// This rank's memory, which peers write.
#[derive(Debug)]
struct Symmetric {
    allocation: Allocation,
    device: Device,
    /// Where this rank runs.
    identity: Identity,
    /// Whether peers use the allocation itself, as threads of this process do with plain memory. All
    /// others have mappings that keep the memory behind them. Of CUDA IPC CUDA does not promise that;
    /// it was found so on drivers of branch 580 (`ep-sim/tests/processes.rs`).
    is_direct: bool,
    /// Whether a refresh left a rank out. That rank has been told nothing, and may still use what it
    /// has of this memory.
    has_strays: bool,
}

impl Symmetric {
    /// Allocates, zeroes and exports.
    fn new(
        device: &Device,
        facts: &[RankFacts],
        rank: u32,
        backend: BackendKind,
        bytes: u64,
    ) -> Result<(Self, Export), Error> {
        let (driver, ordinal) = (device.driver(), device.ordinal());
        let allocation = Allocation::new(driver, ordinal, backend, bytes, false)
            .map_err(|source| Error::Memory { rank, source })?;
        let own = &facts[rank as usize];
        let is_thread = |other: &RankFacts| {
            other.rank != rank && other.process == own.process && other.same_host(own)
        };
        let memory = Self {
            allocation,
            device: device.clone(),
            identity: Identity {
                host: own.host_id,
                process: own.process,
                gpu: own.gpu_uuid,
                clique: own.clique(),
            },
            is_direct: backend == BackendKind::Malloc && facts.iter().any(is_thread),
            has_strays: false,
        };
        memory.zero()?;
        let export = memory.export(rank)?;
        Ok((memory, export))
    }

    /// Zeroes all of it, and waits until that is done.
    fn zero(&self) -> Result<(), Error> {
        let (ptr, bytes) = (self.allocation.ptr(), self.allocation.bytes());
        self.device
            .zero(ptr, bytes)
            .map_err(Error::driver("zeroing symmetric memory"))
    }

    fn export(&self, rank: u32) -> Result<Export, Error> {
        let exported = self.allocation.export();
        exported.map_err(|source| Error::Memory { rank, source })
    }

    fn offer(&self, export: Export, generation: u64) -> Offer {
        Offer {
            export: match export {
                Export::Fabric(handle) => ep_peers::Export::Fabric(handle),
                Export::PosixFd(descriptor) => ep_peers::Export::PosixFd(descriptor),
                Export::Ipc(handle) => ep_peers::Export::Ipc(handle),
            },
            base: self.allocation.ptr(),
            bytes: self.allocation.bytes(),
            granularity: self.allocation.granularity(),
            generation,
            identity: self.identity,
            digest: 0,
            facts: Facts::EMPTY,
        }
    }

    /// For when a rank has not left in order: frees the memory unless a thread of this process may
    /// still write it. Then it is lost to the process, as the lesser evil.
    fn give_up(self) {
        if self.is_direct {
            tracing::error!(
                bytes = self.allocation.bytes(),
                "symmetric memory is not freed: a thread that did not leave the group may still use it"
            );
            #[allow(
                clippy::disallowed_methods,
                reason = "to free what another thread's kernels may write is worse than to leak it"
            )]
            mem::forget(self.allocation);
        }
    }
}

/// How a rank reaches another, and over what if they have two GPUs of one host, or why not.
pub(crate) type Verdict = Result<(Access, Option<NvlinkCheck>), Reason>;

/// Why an import failed, in the policy's terms.
fn failure(reason: Reason) -> Failure {
    let other = |call| Failure {
        call,
        cause: Cause::Other,
    };
    let no = |call| Failure {
        call,
        cause: Cause::No,
    };
    let refused = |Refusal { call, status }: Refusal| Failure {
        call,
        cause: status.map_or(Cause::Other, Cause::Status),
    };
    match reason {
        Reason::Refused(refusal)
        | Reason::NoTable(refusal)
        | Reason::PeerOffersNothing(Some(refusal))
        | Reason::OffersNothing(Some(refusal)) => refused(refusal),
        Reason::NoPeerAccess => no(Call::CanAccessPeer),
        Reason::NoNvlink => no(Call::PeerLinks),
        Reason::NotVisible => other(Call::DeviceInfo),
        Reason::NoDescriptor(
            DescriptorError::NotSent { errno } | DescriptorError::NotReceived { errno },
        ) => Failure {
            call: Call::MemImport,
            cause: Cause::Os(errno.unsigned_abs()),
        },
        _ => other(Call::MemImport),
    }
}
