//! From one rank's memory to every rank's table, and back.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use ep_sys::{DeviceOrdinal, DevicePtr, Driver, FABRIC_HANDLE_BYTES, IPC_HANDLE_BYTES};
use zerocopy::FromBytes;
use zerocopy::little_endian::U32;

use crate::exchange::Step;
use crate::fds::{DescriptorError, pass_descriptors};
use crate::group::Group;
use crate::import::{self, Access, Import, Importer, NvlinkCheck, Reason, Verdict};
use crate::table::PeerTable;
use crate::topology::{Nearness, Topology};
use crate::wire::{Facts, Handle, Identity, Record, RecordError, Refusal};
use crate::{Error, Result};

const ASSEMBLE: Step = Step::new("assemble");
const HANDLES: Step = Step::new("handles");
const DESCRIPTORS: Step = Step::new("descriptors");
const REACHABILITY: Step = Step::new("reachability");
const TABLE: Step = Step::new("table");
const TEARDOWN: Step = Step::new("teardown");
const RELEASED: Step = Step::new("released");

/// What a rank brings to its group.
#[derive(Debug)]
pub struct Offer {
    /// How others can reach its memory.
    pub export: Export,
    /// Address of the memory on this rank's device; null without memory.
    pub base: DevicePtr,
    /// Size of the memory in bytes, as it was allocated.
    pub bytes: u64,
    /// The granularity that it was allocated with, in bytes; importers align to it. 0 for plain
    /// allocations.
    pub granularity: u64,
    /// The group's generation: the same on every member, and higher at every refresh.
    pub generation: u64,
    /// Where the rank runs.
    pub identity: Identity,
    /// A digest of what must be configured alike on every rank.
    pub digest: u64,
    /// The caller's own facts; come back in [`Peers::record`].
    pub facts: Facts,
}

/// How others can reach a rank's memory.
#[derive(Debug)]
pub enum Export {
    /// By a fabric handle.
    Fabric([u8; FABRIC_HANDLE_BYTES]),
    /// By a descriptor. It is closed when the peers have theirs.
    PosixFd(OwnedFd),
    /// By a CUDA IPC handle, and in this process by address.
    Ipc([u8; IPC_HANDLE_BYTES]),
    /// Not at all, because a call was refused. The rank still takes every step, so that the others
    /// learn the reason instead of waiting.
    Failed(Refusal),
}

/// Why two ranks do not reach each other: the direction that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Unreachable {
    /// The rank that cannot reach.
    pub from: u32,
    /// The rank that it cannot reach.
    pub to: u32,
    /// Why not.
    pub reason: Reason,
}

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, to, reason } = self;
        write!(f, "rank {from} cannot reach rank {to}: {reason}")
    }
}

/// Offers this rank's memory to the group, reaches the other members' memory, agrees with them on
/// who reaches whom, and writes the table. Collective.
///
/// A member that cannot be reached, or cannot reach this rank, has a null entry and a reason; it is
/// no error. This rank's own failure to make the table is an error here, after the others were told.
///
/// ```
/// use std::sync::Arc;
/// use std::time::{Duration, Instant};
///
/// use ep_peers::exchange::local::local;
/// use ep_peers::wire::{Facts, Identity};
/// use ep_peers::{Export, Group, Offer, connect, process_token};
/// use ep_sim::{Cluster, SimDriver};
/// use ep_sys::vmm::DeviceMemory;
/// use ep_sys::{DeviceOrdinal, Driver};
///
/// let driver: Arc<dyn Driver> = SimDriver::new(&Cluster::hgx_h200(1), 0, &[0]);
/// let device = DeviceOrdinal(0);
/// let memory = DeviceMemory::new(&driver, device, 4096)?;
/// let offer = Offer {
///     export: Export::Ipc(memory.ipc_handle()?),
///     base: memory.ptr(),
///     bytes: memory.bytes(),
///     granularity: 0,
///     generation: 1,
///     identity: Identity {
///         host: driver.host_facts().host_id,
///         process: process_token()?,
///         gpu: driver.device_info(device)?.uuid,
///         clique: driver.fabric_info(device).ok().and_then(|fabric| fabric.clique()),
///     },
///     digest: 0,
///     facts: Facts::EMPTY,
/// };
///
/// // A group of one; others would do the same in threads or processes of their own.
/// let exchange = local(1).remove(0);
/// let group = Group::whole(&exchange);
/// let deadline = Instant::now() + Duration::from_secs(10);
/// let peers = connect(&group, &driver, device, offer, deadline)?;
/// assert_eq!(peers.entries(), [memory.ptr()]);
/// peers.disconnect(&group, deadline)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// A member did not take part, or its record cannot be used: every member has an error that names
/// it, by the deadline. What was acquired is given back.
pub fn connect(
    group: &Group<'_>,
    driver: &Arc<dyn Driver>,
    device: DeviceOrdinal,
    offer: Offer,
    deadline: Instant,
) -> Result<Peers> {
    let table = PeerTable::new(driver, device, group.num_ranks());
    group.barrier(ASSEMBLE, deadline)?;
    match table {
        Ok(table) => {
            let mut peers = Peers::alone(table, group.rank(), driver, device);
            peers.meet(group, offer, deadline)?;
            Ok(peers)
        }
        Err(source) => {
            decline(
                group,
                driver,
                device,
                offer,
                Refusal::from(&source),
                deadline,
            )?;
            Err(driver_error(group.rank(), source))
        }
    }
}

/// Takes every step of meeting, as a rank that cannot have peers.
fn decline(
    group: &Group<'_>,
    driver: &Arc<dyn Driver>,
    device: DeviceOrdinal,
    mut offer: Offer,
    refusal: Refusal,
    deadline: Instant,
) -> Result<()> {
    offer.export = Export::Failed(refusal);
    let mut met = Meeting::hold(group, driver, device, offer, deadline)?;
    met.agree_on_tables(group, None, |_| None, deadline)
}

/// A connected rank: its table of peer pointers, and the mappings that they lead to.
///
/// An entry is non-null exactly when that rank and this one reach each other.
///
/// Dropping it frees the table, then the mappings, without a word to the group and without waiting
/// for the device: only for when the group is broken. In order, use [`disconnect`](Self::disconnect).
#[derive(Debug)]
pub struct Peers {
    // Before the mappings, so that it is dropped before them: no table leads to what is unmapped.
    table: PeerTable,
    /// What the entries lead to, by rank.
    imports: Vec<Option<Import>>,
    rank: u32,
    generation: u64,
    driver: Arc<dyn Driver>,
    device: DeviceOrdinal,
    /// The members' records, by rank.
    records: Vec<Option<Record>>,
    topology: Topology,
    /// Who reaches whom: `[from][to]`, by rank.
    verdicts: Vec<Vec<Verdict>>,
}

impl Peers {
    /// This rank.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Entries of the table.
    pub fn num_ranks(&self) -> u32 {
        u32::try_from(self.table.entries().len()).unwrap_or(u32::MAX)
    }

    /// The generation that the table is of.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Device address of the table, `u64[num_ranks]`. The same from [`connect`] to
    /// [`disconnect`](Self::disconnect), through every [`refresh`](Self::refresh).
    pub fn device_ptr(&self) -> DevicePtr {
        self.table.device_ptr()
    }

    /// What the table holds, by rank: where this device finds each rank's memory, or null.
    pub fn entries(&self) -> &[DevicePtr] {
        self.table.entries()
    }

    /// Whether this rank and `rank` reach each other.
    pub fn is_reachable(&self, rank: u32) -> bool {
        let entry = self.table.entries().get(rank as usize);
        entry.is_some_and(|entry| !entry.is_null())
    }

    /// Why this rank and `rank` do not reach each other; `None` if they do.
    pub fn reason(&self, rank: u32) -> Option<Unreachable> {
        let one_way = |from, to| {
            let reason = self.verdict(from, to).err()?;
            Some(Unreachable { from, to, reason })
        };
        one_way(self.rank, rank).or_else(|| one_way(rank, self.rank))
    }

    /// Whether and how rank `from` reaches rank `to`. Known of every pair, on every member.
    pub fn verdict(&self, from: u32, to: u32) -> Result<Access, Reason> {
        let row = self.verdicts.get(from as usize);
        let verdict = row.and_then(|row| row.get(to as usize));
        let verdict = verdict.copied().unwrap_or(Err(Reason::Absent));
        verdict.map(|(access, _)| access)
    }

    /// Whether NVLink joins the GPUs of `from` and `to`, if these are two of one host and `from`
    /// reaches `to`. Known of every pair, on every member.
    pub fn nvlink(&self, from: u32, to: u32) -> Option<NvlinkCheck> {
        let row = self.verdicts.get(from as usize)?;
        row.get(to as usize)?.ok()?.1
    }

    /// A member's record.
    pub fn record(&self, rank: u32) -> Option<&Record> {
        self.records.get(rank as usize)?.as_ref()
    }

    /// Where the members run.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Connects anew, after a membership change or with other memory. Collective; new members call
    /// [`connect`] instead. The table keeps its address, so kernels captured with it stay valid.
    ///
    /// The caller has synchronised with all work that uses the table, on every member.
    ///
    /// # Errors
    /// As [`connect`]. When the members did not even assemble, nothing has changed. After any other
    /// error but [`Error::Release`] every entry is null, except where the driver refused to make
    /// them so: then entries and mappings are those from before. [`Error::Release`] means that the
    /// refresh succeeded and a mapping from before could not be given back.
    pub fn refresh(&mut self, group: &Group<'_>, offer: Offer, deadline: Instant) -> Result<()> {
        if (group.num_ranks(), group.rank()) != (self.num_ranks(), self.rank) {
            return Err(Error::BadMembers {
                members: group.ranks().to_vec(),
                size: group.exchange().size(),
                num_ranks: self.num_ranks(),
            });
        }
        if offer.generation <= self.generation {
            return Err(Error::Generation {
                current: self.generation,
                given: offer.generation,
            });
        }
        group.barrier(ASSEMBLE, deadline)?;
        if let Err(source) = self.table.clear() {
            self.generation = offer.generation;
            let (driver, device) = (&self.driver, self.device);
            decline(
                group,
                driver,
                device,
                offer,
                Refusal::from(&source),
                deadline,
            )?;
            return Err(driver_error(self.rank, source));
        }
        let released = self.forget();
        let met = self.meet(group, offer, deadline);
        match (met, released) {
            (Ok(()), Err(source)) => Err(release_error(self.rank, source)),
            (met, released) => {
                log(self.rank, released);
                met
            }
        }
    }

    /// Leaves in order: waits for the group, makes every entry null, gives the mappings back, hears
    /// from the group that all have, frees the table. Collective. After it, a member's memory is
    /// mapped by nobody else and may be freed.
    ///
    /// The caller has synchronised with all work that uses the table.
    ///
    /// # Errors
    /// The first thing that went wrong, after everything was done all the same. If a member did not
    /// take part, or could not give back what it had mapped ([`Error::PeerRelease`]), this rank's
    /// memory may still be mapped there.
    pub fn disconnect(self, group: &Group<'_>, deadline: Instant) -> Result<()> {
        let Self {
            mut table,
            imports,
            rank,
            ..
        } = self;
        let assembled = group.barrier(TEARDOWN, deadline);
        let cleared = table.clear();
        let released = release(imports);
        let parted = match &assembled {
            Ok(()) => part(group, &released, deadline),
            // The group is broken: nobody would come.
            Err(_) => Ok(()),
        };
        let freed = table.close();
        let mut outcome = assembled.and(parted);
        for given_back in [cleared, released, freed] {
            match given_back {
                Err(source) if outcome.is_ok() => outcome = Err(release_error(rank, source)),
                given_back => log(rank, given_back),
            }
        }
        outcome
    }

    /// A rank without peers.
    fn alone(table: PeerTable, rank: u32, driver: &Arc<dyn Driver>, device: DeviceOrdinal) -> Self {
        let num_ranks = table.entries().len();
        Self {
            table,
            imports: Vec::new(),
            rank,
            generation: 0,
            driver: Arc::clone(driver),
            device,
            records: vec![None; num_ranks],
            topology: Topology::default(),
            verdicts: vec![vec![Err(Reason::Absent); num_ranks]; num_ranks],
        }
    }

    /// Fills the table, which is all nulls. On error it is again.
    fn meet(&mut self, group: &Group<'_>, offer: Offer, deadline: Instant) -> Result<()> {
        self.generation = offer.generation;
        let mut met = Meeting::hold(group, &self.driver, self.device, offer, deadline)?;
        let written = self.table.write(met.entries(self.rank));
        // Held here from now on, because the table may lead to them.
        self.imports = std::mem::take(&mut met.imports);
        if let Err(error) = self.settle(group, &mut met, written, deadline) {
            match self.table.clear() {
                Ok(()) => log(self.rank, self.forget()),
                // The entries stay, and so does what they lead to.
                Err(source) => log(self.rank, Err(source)),
            }
            return Err(error);
        }
        self.records = met.records;
        self.topology = met.topology;
        self.verdicts = met.verdicts;
        self.tell(group);
        Ok(())
    }

    /// Leaves the reasons in the log, where there are any.
    fn tell(&self, group: &Group<'_>) {
        let (rank, generation) = (self.rank, self.generation);
        for &peer in group.ranks() {
            if let Some(why) = self.reason(peer) {
                tracing::debug!(rank, generation, "{why}");
            }
        }
        tracing::debug!(rank, generation, members = group.ranks().len(), "connected");
    }

    /// Tells the group whether the table was written, so that nobody counts on a rank that has none,
    /// and drops those from the table that have none.
    fn settle(
        &mut self,
        group: &Group<'_>,
        met: &mut Meeting,
        written: ep_sys::Result<()>,
        deadline: Instant,
    ) -> Result<()> {
        let mut failure = written.err();
        let refusal = failure.as_ref().map(Refusal::from);
        let rank = self.rank;
        let table = &mut self.table;
        let rewrite = |met: &Meeting| {
            let mut entries = table.entries().to_vec();
            for (peer, entry) in (0..).zip(&mut entries) {
                if !met.both_ways(rank, peer) {
                    *entry = DevicePtr::NULL;
                }
            }
            if entries != table.entries() {
                failure = table.write(entries).err();
            }
            failure.as_ref().map(Refusal::from)
        };
        met.agree_on_tables(group, refusal, rewrite, deadline)?;
        if let Some(source) = failure {
            return Err(driver_error(rank, source));
        }
        // What was reached in one direction only is given back.
        for (import, entry) in self.imports.iter_mut().zip(self.table.entries()) {
            if entry.is_null() {
                *import = None;
            }
        }
        Ok(())
    }

    /// Forgets the members and gives their memory back. The table leads nowhere by now.
    fn forget(&mut self) -> ep_sys::Result<()> {
        self.records.fill(None);
        self.topology = Topology::default();
        for verdict in self.verdicts.iter_mut().flatten() {
            *verdict = Err(Reason::Absent);
        }
        release(self.imports.drain(..))
    }
}

/// What a group's ranks have learned of each other. Indices are ranks.
struct Meeting {
    records: Vec<Option<Record>>,
    topology: Topology,
    verdicts: Vec<Vec<Verdict>>,
    imports: Vec<Option<Import>>,
}

impl Meeting {
    /// Exchanges records and descriptors, imports, and exchanges who reaches whom.
    fn hold(
        group: &Group<'_>,
        driver: &Arc<dyn Driver>,
        device: DeviceOrdinal,
        offer: Offer,
        deadline: Instant,
    ) -> Result<Self> {
        let num_ranks = group.num_ranks() as usize;
        let (record, descriptor) = describe(group.rank(), offer);
        let mut records = vec![None; num_ranks];
        for record in group.gather(HANDLES, &record, deadline)? {
            let rank = record.rank as usize;
            records[rank] = Some(record);
        }
        let identity = |record: &Option<Record>| record.as_ref().map(|record| record.identity);
        let mut met = Self {
            topology: Topology::new(records.iter().map(identity).collect()),
            records,
            verdicts: vec![vec![Err(Reason::Absent); num_ranks]; num_ranks],
            imports: (0..num_ranks).map(|_| None).collect(),
        };
        let descriptors = met.pass_descriptors(group, descriptor, deadline)?;
        let row = met.import(group, driver, device, &record, descriptors);
        met.compare(group, &row, deadline)?;
        Ok(met)
    }

    /// The members' descriptors, in the exchange's order. Nothing is exchanged if nobody has any.
    fn pass_descriptors(
        &self,
        group: &Group<'_>,
        own: Option<OwnedFd>,
        deadline: Instant,
    ) -> Result<Vec<Result<OwnedFd, DescriptorError>>> {
        let offered = |record: &Record| record.handle == Handle::PosixFd;
        if !self.records.iter().flatten().any(offered) {
            let none = |_: &u32| Err(DescriptorError::NotOffered);
            return Ok(group.ranks().iter().map(none).collect());
        }
        let is_near = |rank: &u32| {
            let nearness = self.topology.nearness(group.rank(), *rank);
            matches!(nearness, Some(Nearness::Process | Nearness::Host))
        };
        let peers: Vec<_> = group.ranks().iter().map(is_near).collect();
        let own = own.as_ref().map(AsFd::as_fd);
        let exchange = group.exchange();
        group.named(pass_descriptors(
            exchange,
            DESCRIPTORS,
            own,
            &peers,
            deadline,
        ))
    }

    /// Reaches every member; a failure is kept, and the next is tried. In the exchange's order.
    fn import(
        &mut self,
        group: &Group<'_>,
        driver: &Arc<dyn Driver>,
        device: DeviceOrdinal,
        own: &Record,
        descriptors: Vec<Result<OwnedFd, DescriptorError>>,
    ) -> Vec<Verdict> {
        if let Handle::None(refusal) = own.handle {
            // Nobody can reach this rank, so no pair of it can become usable.
            return vec![Err(Reason::OffersNothing(refusal)); group.ranks().len()];
        }
        let importer = Importer::new(driver, device, group.rank(), &self.topology);
        let mut row = Vec::new();
        for (&rank, descriptor) in group.ranks().iter().zip(descriptors) {
            let outcome = match &self.records[rank as usize] {
                Some(record) => importer.import(record, descriptor),
                None => Err(Reason::Absent),
            };
            row.push(outcome.map(|(access, link, import)| {
                self.imports[rank as usize] = Some(import);
                (access, link)
            }));
        }
        row
    }

    /// Exchanges who reaches whom.
    fn compare(&mut self, group: &Group<'_>, row: &[Verdict], deadline: Instant) -> Result<()> {
        let words: Vec<_> = row
            .iter()
            .flat_map(|&verdict| import::encode(verdict))
            .collect();
        let rows = group.all_gather(REACHABILITY, &to_bytes(&words), deadline)?;
        for (&from, bytes) in group.ranks().iter().zip(&rows) {
            let words: Vec<_> = words_of(bytes, from)?;
            for (&to, numbers) in group.ranks().iter().zip(words.as_chunks::<3>().0) {
                self.verdicts[from as usize][to as usize] =
                    import::decode(*numbers).ok_or(Error::Record {
                        rank: from,
                        source: RecordError::Field { field: "verdict" },
                    })?;
            }
        }
        Ok(())
    }

    /// Agrees on whose table could not be written: those ranks reach nobody. The others `rewrite`
    /// theirs without them, which may fail in turn, until all have what they said.
    fn agree_on_tables(
        &mut self,
        group: &Group<'_>,
        mut own: Option<Refusal>,
        mut rewrite: impl FnMut(&Self) -> Option<Refusal>,
        deadline: Instant,
    ) -> Result<()> {
        while self.tell_refusals(group, own, deadline)? {
            if own.is_none() {
                own = rewrite(self);
            }
        }
        Ok(())
    }

    /// Exchanges whose table could not be written; whether anybody's is new.
    fn tell_refusals(
        &mut self,
        group: &Group<'_>,
        own: Option<Refusal>,
        deadline: Instant,
    ) -> Result<bool> {
        let outcomes = group.all_gather(TABLE, &to_bytes(&Refusal::encode(own)), deadline)?;
        let mut news = false;
        for (&rank, bytes) in group.ranks().iter().zip(&outcomes) {
            if let Some(refusal) = refusal_of(bytes, rank, "table")? {
                let verdicts = &mut self.verdicts[rank as usize];
                news |= verdicts[rank as usize] != Err(Reason::NoTable(refusal));
                verdicts.fill(Err(Reason::NoTable(refusal)));
            }
        }
        Ok(news)
    }

    /// The entries of a rank: the peers that it reaches and that reach it.
    fn entries(&self, rank: u32) -> Vec<DevicePtr> {
        (0..)
            .zip(&self.imports)
            .map(|(peer, import)| match import {
                Some(import) if self.both_ways(rank, peer) => import.ptr(),
                _ => DevicePtr::NULL,
            })
            .collect()
    }

    fn both_ways(&self, a: u32, b: u32) -> bool {
        let reaches = |from: u32, to: u32| self.verdicts[from as usize][to as usize].is_ok();
        reaches(a, b) && reaches(b, a)
    }
}

/// What a rank says of itself, and the descriptor that goes with it.
fn describe(rank: u32, offer: Offer) -> (Record, Option<OwnedFd>) {
    let (handle, descriptor) = match offer.export {
        Export::Fabric(handle) => (Handle::Fabric(handle), None),
        Export::PosixFd(descriptor) => (Handle::PosixFd, Some(descriptor)),
        Export::Ipc(handle) => (Handle::Ipc(handle), None),
        Export::Failed(refusal) => (Handle::None(Some(refusal)), None),
    };
    let record = Record {
        rank,
        generation: offer.generation,
        identity: offer.identity,
        bytes: offer.bytes,
        granularity: offer.granularity,
        base: offer.base,
        handle,
        digest: offer.digest,
        facts: offer.facts,
    };
    (record, descriptor)
}

/// Gives all back. The first refusal is returned, the others are logged.
fn release(imports: impl IntoIterator<Item = Option<Import>>) -> ep_sys::Result<()> {
    let mut outcome = Ok(());
    for import in imports.into_iter().flatten() {
        if let Err(error) = import.close() {
            if outcome.is_ok() {
                outcome = Err(error);
            } else {
                tracing::error!(%error, "cannot give a peer's memory back");
            }
        }
    }
    outcome
}

/// Tells the group whether this rank has given all back, and hears whether the others have.
fn part(group: &Group<'_>, released: &ep_sys::Result<()>, deadline: Instant) -> Result<()> {
    let own = released.as_ref().err().map(Refusal::from);
    let outcomes = group.all_gather(RELEASED, &to_bytes(&Refusal::encode(own)), deadline)?;
    for (&rank, bytes) in group.ranks().iter().zip(&outcomes) {
        let refusal = refusal_of(bytes, rank, "released")?;
        if let Some(refusal) = refusal.filter(|_| rank != group.rank()) {
            return Err(Error::PeerRelease { rank, refusal });
        }
    }
    Ok(())
}

/// For what went wrong beside an error that is returned.
fn log(rank: u32, outcome: ep_sys::Result<()>) {
    if let Err(error) = outcome {
        tracing::error!(rank, %error, "a clean-up call failed after another failure");
    }
}

fn driver_error(rank: u32, source: ep_sys::Error) -> Error {
    Error::Driver { rank, source }
}

fn release_error(rank: u32, source: ep_sys::Error) -> Error {
    Error::Release { rank, source }
}

fn to_bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The refusal that a member sent, if it sent one.
fn refusal_of(bytes: &[u8], rank: u32, field: &'static str) -> Result<Option<Refusal>> {
    let refusal = match words_of(bytes, rank)?[..] {
        [call, status] => Refusal::decode([call, status]),
        _ => None,
    };
    refusal.ok_or(Error::Record {
        rank,
        source: RecordError::Field { field },
    })
}

/// The words that a member sent.
fn words_of(bytes: &[u8], rank: u32) -> Result<Vec<u32>> {
    match <[U32]>::ref_from_bytes(bytes) {
        Ok(words) => Ok(words.iter().map(|word| word.get()).collect()),
        Err(_) => Err(Error::Record {
            rank,
            source: RecordError::Length {
                actual: bytes.len(),
            },
        }),
    }
}
