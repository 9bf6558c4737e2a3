//! A rank's ties to its group: symmetric memory and the table of peers, made and taken apart in the
//! one order that is safe.

use std::mem;
use std::thread;

use ep_alloc::{
    Allocation, BackendKind, Cause, Export, Failure, ImportRefusal, Plan, RankFacts, decide,
};
use ep_peers::wire::{Facts, Identity, Refusal};
use ep_peers::{Access, DescriptorError, Offer, Peers, Reason, Unreachable, connect};
use ep_sys::{Call, DevicePtr, vmm};
use parking_lot::{Mutex, MutexGuard};

use crate::order::Order;
use crate::session::Session;
use crate::{Device, Error, Stream};

/// A rank's memory and its peers', which it leaves in order when it is dropped.
#[derive(Debug)]
pub(crate) struct Connection {
    /// None once it has been left.
    ties: Option<Ties>,
    session: Session,
    /// What has been enqueued, and on which stream.
    order: Mutex<Order>,
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
        let mut imports = Vec::new();
        let mut tried: Option<(BackendKind, Unreachable)> = None;
        loop {
            let plan = decide(facts, &imports).map_err(|source| Error::Policy { rank, source })?;
            // All evidence about a backend is in after one attempt.
            if let Some((backend, pair)) = tried
                && backend == plan.backend
            {
                let plan = Box::new(plan);
                return Err(Error::Unreachable { rank, pair, plan });
            }
            tracing::info!(rank, %plan, bytes, "connecting");
            let ties = Ties::new(&session, device, facts, plan.backend, bytes)?;
            let Some(pair) = ties.learn(plan.backend, &mut imports) else {
                let connection = Self {
                    ties: Some(ties),
                    session,
                    order: Mutex::default(),
                };
                return Ok((connection, plan));
            };
            ties.close(&session)?;
            tried = Some((plan.backend, pair));
        }
    }

    pub(crate) fn order(&self) -> MutexGuard<'_, Order> {
        self.order.lock()
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

    /// Waits for the last stream, then for the other ranks, and gives peers and memory back.
    pub(crate) fn close(&mut self) -> Result<(), Error> {
        let Some(ties) = self.ties.take() else {
            return Ok(());
        };
        let stream = self.order.get_mut().stream();
        let finished = stream.map_or(Ok(()), Stream::synchronize);
        let left = ties.close(&self.session);
        finished
            .map_err(|error| error.of_rank(self.session.rank()))
            .and(left)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let rank = self.session.rank();
        if thread::panicking() {
            // The others learn it when this rank's communicator goes; to wait for them would hide
            // the panic for as long as they go on.
            if let Some(Ties { peers, memory }) = self.ties.take() {
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
        let offer = memory.offer(export, facts, rank);
        let (driver, ordinal) = (device.driver(), device.ordinal());
        let peers = connect(&session.group(), driver, ordinal, offer, session.due());
        let peers = peers.map_err(|source| Error::Group { rank, source });
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

    /// A pair of ranks that do not reach each other, if there is one. Adds them all to the evidence.
    pub(crate) fn learn(
        &self,
        backend: BackendKind,
        imports: &mut Vec<ImportRefusal>,
    ) -> Option<Unreachable> {
        let ranks = 0..self.peers.num_ranks();
        let pairs = ranks
            .clone()
            .flat_map(|from| ranks.clone().map(move |to| (from, to)));
        let mut first = None;
        for (from, to) in pairs {
            if let Err(reason) = self.peers.verdict(from, to) {
                first.get_or_insert(Unreachable { from, to, reason });
                imports.push(ImportRefusal {
                    backend,
                    importer: from,
                    exporter: to,
                    failure: failure(reason),
                });
            }
        }
        first
    }

    pub(crate) fn peers(&self) -> &Peers {
        &self.peers
    }

    /// Whether and how each rank reaches each, `[from][to]`.
    pub(crate) fn verdicts(&self) -> Vec<Vec<Result<Access, Reason>>> {
        let ranks = 0..self.peers.num_ranks();
        let row = |from| {
            let verdicts = ranks.clone().map(|to| self.peers.verdict(from, to));
            verdicts.collect()
        };
        ranks.clone().map(row).collect()
    }

    /// Leaves the group. What this rank had mapped is given back in any case.
    pub(crate) fn close(self, session: &Session) -> Result<(), Error> {
        let Self { peers, memory } = self;
        let rank = session.rank();
        let left = peers.disconnect(&session.group(), session.due());
        let freed = match &left {
            // Every rank has given back its mapping, as far as its driver let it.
            Ok(()) | Err(ep_peers::Error::Release { .. }) => memory.allocation.close(),
            Err(_) => {
                memory.give_up();
                Ok(())
            }
        };
        left.map_err(|source| Error::Group { rank, source })
            .and(freed.map_err(|source| Error::Memory { rank, source }))
    }
}

/// This rank's memory, which peers write.
#[derive(Debug)]
struct Symmetric {
    allocation: Allocation,
    /// Whether peers use the allocation itself, as threads of this process do with plain memory. All
    /// others have mappings that keep the memory behind them.
    is_direct: bool,
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
        let memory = |source| Error::Memory { rank, source };
        let (driver, ordinal) = (device.driver(), device.ordinal());
        let allocation = Allocation::new(driver, ordinal, backend, bytes, false).map_err(memory)?;
        let zeroed = vmm::Stream::new(driver, ordinal).and_then(|stream| {
            let (ptr, bytes) = (allocation.ptr(), allocation.bytes());
            driver.fill(ordinal, ptr, 0, bytes, stream.handle())?;
            stream.synchronize()?;
            stream.close()
        });
        zeroed.map_err(Error::driver("zeroing symmetric memory"))?;
        let export = allocation.export().map_err(memory)?;
        let own = &facts[rank as usize];
        let is_thread = |other: &&RankFacts| {
            other.rank != rank && other.process == own.process && other.same_host(own)
        };
        let is_direct =
            backend == BackendKind::Malloc && facts.iter().any(|other| is_thread(&other));
        let symmetric = Self {
            allocation,
            is_direct,
        };
        Ok((symmetric, export))
    }

    fn offer(&self, export: Export, facts: &[RankFacts], rank: u32) -> Offer {
        let own = &facts[rank as usize];
        Offer {
            export: match export {
                Export::Fabric(handle) => ep_peers::Export::Fabric(handle),
                Export::PosixFd(descriptor) => ep_peers::Export::PosixFd(descriptor),
                Export::Ipc(handle) => ep_peers::Export::Ipc(handle),
            },
            base: self.allocation.ptr(),
            bytes: self.allocation.bytes(),
            granularity: self.allocation.granularity(),
            generation: 1,
            identity: Identity {
                host: own.host_id,
                process: own.process,
                gpu: own.gpu_uuid,
                clique: own.clique(),
            },
            digest: 0,
            facts: Facts::EMPTY,
        }
    }

    /// For when the group is broken: frees the memory unless a thread of this process may still
    /// write it. Then it is lost to the process, as the lesser evil.
    fn give_up(self) {
        if self.is_direct {
            tracing::error!(
                bytes = self.allocation.bytes(),
                "symmetric memory is not freed: the group broke and its threads may still use it"
            );
            #[allow(
                clippy::disallowed_methods,
                reason = "to free what another thread's kernels may write is worse than to leak it"
            )]
            mem::forget(self.allocation);
        }
    }
}

/// Why an import failed, in the policy's terms.
fn failure(reason: Reason) -> Failure {
    let other = |call| Failure {
        call,
        cause: Cause::Other,
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
        Reason::NoPeerAccess => other(Call::CanAccessPeer),
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
