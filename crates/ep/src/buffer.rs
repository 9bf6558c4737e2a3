//! The buffer: what a rank dispatches and combines with.

use std::sync::Arc;
use std::time::Duration;

use ep_alloc::Plan;
use ep_kernels::{LaunchError, Layout};
use ep_peers::{Access, Reason};

use crate::connection::{Connection, first_of};
use crate::dispatch::check_stream;
use crate::error::ArgumentError;
use crate::fault::{Fault, Status};
use crate::handle::{Lease, Slots};
use crate::launch::Launcher;
use crate::order::{Parts, Unreceived};
use crate::state::DeviceState;
use crate::{BufferBuilder, Communicator, Config, Device, Error, Handle, Operation, Stream};

/// One rank's share of a group that dispatches and combines.
///
/// Made by a [builder](Self::builder), on every rank at once. Every rank then makes the same sequence
/// of operations on it, [dispatch](Self::dispatch), [combine](Self::combine) and
/// [barrier](Self::barrier), and gives up handles at the same places of that sequence.
///
/// # Streams
/// Operations are enqueued and return at once (on the simulator they have finished by then). They
/// run in the order of the stream; an operation on another stream than the one before it must be
/// made to wait for that one, with [`Stream::follow`]. Arguments must stay unchanged, and results are
/// there, when the stream has passed the operation. The device counts the operations itself, so a
/// captured CUDA graph can be replayed, on every rank alike. A replayed dispatch uses the slot that it
/// was captured with: whatever handles are alive then must have been alive when it was captured, or
/// it overwrites what one of them holds.
///
/// # Beside other work
/// For operations that run while the caller's stream goes on, make a second stream and give them
/// that: a communication stream. It first [follows](Stream::follow) the caller's, on which the
/// arguments are written; the caller's follows it where the results are used.
///
/// ```
/// # use ep::driver::DeviceOrdinal;
/// # use ep::{Communicator, Config, DType, Device, DispatchInput, DispatchOptions, Tensor};
/// use ep::{Buffer, CombineInput, Event, Stream};
/// # use ep_sim::{Cluster, SimDriver};
///
/// # let device = Device::host(SimDriver::new(&Cluster::hgx_h200(1), 0, &[0]), DeviceOrdinal(0));
/// # let comm = Communicator::threads(1).remove(0);
/// # let buffer = Buffer::builder(&device, &comm, Config::new(128, 2, 3, 1)).build()?;
/// # let options = DispatchOptions::bf16();
/// # let mut received = buffer.new_output(&options)?;
/// # let x = Tensor::from_host(&device, DType::Bf16, [3, 128], &[0x3f80_u16; 3 * 128])?;
/// # let topk_idx = Tensor::from_host(&device, DType::I64, [3, 1], &[0_i64, 1, 1])?;
/// # let input = DispatchInput { x: x.view(), topk_idx: topk_idx.view(), topk_weights: None };
/// # let mut out = Tensor::new(&device, DType::Bf16, [3, 128])?;
/// // Once, for all layers.
/// let (compute, communication) = (Stream::new(&device)?, Stream::new(&device)?);
/// let mut order = Event::untimed(&device)?;
///
/// // The tokens are written on `compute`.
/// communication.follow(&compute, &mut order)?;
/// let handle = buffer.dispatch(&communication, &input, &options, &mut received)?;
/// // `compute` goes on, for instance with a shared expert.
/// compute.follow(&communication, &mut order)?;
/// // From here on the received rows are there. The experts turn them into their outputs.
/// communication.follow(&compute, &mut order)?;
/// let y = CombineInput::new(&received.recv_x);
/// buffer.combine(&communication, handle, &y, &mut out)?;
/// // `compute` goes on.
/// compute.follow(&communication, &mut order)?;
/// // From here on `out` is there.
/// # compute.synchronize()?;
/// # assert_eq!(out.copy_to_host::<u16>()?, [0x3f80; 3 * 128]);
/// # buffer.close()?;
/// # Ok::<(), ep::Error>(())
/// ```
///
/// The parts of an operation do so just as well: [`dispatch_send`](Self::dispatch_send) and
/// [`dispatch_receive`](Self::dispatch_receive) are each a piece of work on the stream that they are
/// given. While a part runs it takes the multiprocessors that [`BufferBuilder::num_sms`] allows;
/// fewer leave some to the other work. To go on behind a point that lies further back than a
/// stream's end, record an [`Event`](crate::Event) there and let the stream [`wait`](Stream::wait)
/// for it.
///
/// A graph that is captured from the caller's stream takes the communication stream in where it
/// follows, and ends when the caller's stream has followed it back. Nothing but recording an event
/// and waiting for it is asked of the driver.
///
/// What an operation was given, and the output, must live and stay as they are until its stream has
/// passed it, not only until the call returns. A [`Tensor`](crate::Tensor) that is dropped before is
/// freed once the device is idle; memory that came in through `from_raw` is its owner's to keep, and
/// an allocator that reuses memory in the order of one stream has to be told of the other. What a
/// graph was captured with must live as long as the graph. A borrowed [`Stream`] must live until the
/// buffer is closed or used with another; an [`Event`](crate::Event) may be dropped at any time.
///
/// Blocks of an operation wait for each other and for other ranks', so all of them must be able to
/// run at once. Operations of several buffers that run side by side on a GPU therefore share its
/// multiprocessors by [`num_sms`](BufferBuilder::num_sms), or are ordered alike on every rank.
///
/// # When a rank does not come
/// Waits of an operation end after the [time-out](BufferBuilder::timeout). The operation then goes
/// on without that rank and [reports](Self::faults) it; the buffer stays usable with the others.
/// Who knows that a rank is gone need not wait: [`abort`](Self::abort) ends all waits, and
/// [`refresh`](Self::refresh) connects those that are left.
///
/// # End
/// [`close`](Self::close) waits for the last stream, which has no bound of its own, and for the
/// other ranks, within the deadline, and gives everything back. Dropping does the same and logs
/// what it cannot report. Every rank closes at the same place of the sequence. Work that the buffer
/// did not enqueue, such as a replayed graph, must have ended before.
#[derive(Debug)]
pub struct Buffer {
    // The connection ends first: after it no peer uses this rank's memory.
    connection: Connection,
    state: DeviceState,
    slots: Arc<Slots>,
    config: Config,
    plan: Plan,
}

impl Buffer {
    /// Begins to make a buffer on `device` for the ranks of `comm`.
    pub fn builder(device: &Device, comm: &Communicator, config: Config) -> BufferBuilder {
        BufferBuilder::new(device, comm, config)
    }

    pub(crate) fn from_parts(
        connection: Connection,
        state: DeviceState,
        config: Config,
        plan: Plan,
    ) -> Self {
        Self {
            connection,
            state,
            slots: Slots::new(config.slots),
            config,
            plan,
        }
    }

    /// Enqueues a barrier of all ranks on `stream`, after `spin` of busy waiting on the device: it
    /// lines ranks up, for timing, while the host runs ahead.
    pub fn barrier(&self, stream: &Stream, spin: Duration) -> Result<(), Error> {
        self.check(Operation::Barrier, || check_stream(stream, &self.state))?;
        let spin_ns = u64::try_from(spin.as_nanos()).unwrap_or(u64::MAX);
        self.enqueue(Operation::Barrier, Parts::Both, stream, |launcher| {
            launcher
                .barrier(spin_ns, stream)
                .map_err(|source| self.launch_error(source))
        })
        .map(drop)
    }

    /// Calls off what this rank has enqueued, for when it is known that a rank is gone: every wait
    /// ends within milliseconds as by the [time-out](BufferBuilder::timeout), and is
    /// [reported](Self::faults) as [`FaultKind::Aborted`](crate::FaultKind::Aborted).
    ///
    /// It waits for no stream, and may be called while another thread waits for one. Operations
    /// still run, replays of captured graphs too: they send, take what has come, and write their
    /// outputs, of which nothing should be used. No other is accepted ([`Error::Aborted`]) until the
    /// buffer is [refreshed](Self::refresh); it can also be [closed](Self::close). The other ranks
    /// are not told: each that is left calls off its own.
    ///
    /// # Errors
    /// [`Error::Driver`] if the words that say so cannot be written. Operations are refused all the
    /// same, but some of the waits may last; abort again.
    pub fn abort(&self) -> Result<(), Error> {
        // First of all: on the simulator, who launches keeps the order until waits are over.
        let called_off = self.state.abort();
        self.connection.order().lock().abort();
        called_off.map_err(|error| error.of_rank(self.rank()))
    }

    /// What operations of this rank have reported, oldest first: the newest 64 records at most. Reads
    /// host memory and stops no stream; what an operation reports is complete once its stream has
    /// passed it.
    pub fn faults(&self) -> Result<Vec<Fault>, Error> {
        self.state
            .faults
            .read()
            .map_err(|error| error.of_rank(self.rank()))
    }

    /// What the last operation that this buffer enqueued has reported so far; `None` before the
    /// first.
    ///
    /// Operations are told apart by their number. A replayed graph advances the numbers on the device
    /// and not here; from then on use [`faults`](Self::faults).
    pub fn status(&self) -> Result<Option<Status>, Error> {
        let last = self.connection.order().lock().last();
        last.map(|(operation, epoch)| self.status_of_epoch(operation, epoch))
            .transpose()
    }

    /// What the dispatch of a handle has reported so far. Not to be relied on once a graph has been
    /// replayed, as [`status`](Self::status).
    pub fn status_of(&self, handle: &Handle) -> Result<Status, Error> {
        self.check_own(&handle.lease)?;
        self.status_of_epoch(Operation::Dispatch, handle.epoch)
    }

    /// Waits until the stream that the buffer was last used with has finished. How long that takes
    /// at most is said of [`close`](Self::close).
    pub fn synchronize(&self) -> Result<(), Error> {
        self.connection.finish()
    }

    /// This rank.
    pub fn rank(&self) -> u32 {
        self.state.rank
    }

    /// Ranks in the group.
    pub fn num_ranks(&self) -> u32 {
        self.state.shape.num_ranks
    }

    /// Experts on each rank.
    pub fn local_experts(&self) -> u32 {
        self.state.shape.local_experts()
    }

    /// Rows that the output has for each local expert: ranks times the most tokens.
    pub fn rows_per_expert(&self) -> u32 {
        self.state.shape.rows_per_expert()
    }

    /// What the buffer was made for.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Which memory the group uses, and why.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Where things lie in every rank's symmetric memory.
    pub fn layout(&self) -> &Layout {
        &self.state.layout
    }

    /// Bytes of this rank's symmetric memory, as allocated.
    pub fn symmetric_bytes(&self) -> u64 {
        self.connection.bytes()
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.state.device
    }

    /// Connects anew after a change of membership, or after ranks fell out of step. Collective among
    /// the ranks that remain: each gives a communicator of theirs, in which rank `i` is rank
    /// `members[i]` of this buffer.
    ///
    /// Operations begin to count from 1, every rank's memory is as at first, and results that were
    /// alive are lost: their handles, and what was sent and not received, are refused from now on.
    /// Ranks that are not members take no part; tokens for their experts are skipped and reported.
    /// The memory stays where it is, and so does the table of peers, so captured CUDA graphs stay
    /// valid. It waits for the stream that the buffer was last used with; replays, and operations on
    /// other streams, must have ended before.
    ///
    /// # How long it takes
    /// As for [`close`](Self::close), the stream comes first: N enqueued operations behind a rank
    /// that never comes take N [time-outs](BufferBuilder::timeout), unless they are
    /// [called off](Self::abort).
    /// Then come five steps with the members, each within the [deadline](BufferBuilder::deadline).
    /// A member that does not come breaks the group, so no later step waits: it costs one deadline.
    /// Members whose streams are empty wait in the first step for those whose streams are not, so
    /// the deadline must be longer than N time-outs.
    ///
    /// # Errors
    /// Members that do not fit the communicator or this rank are refused, and nothing has changed.
    /// After any other error operations are refused until a refresh succeeds.
    pub fn refresh(&mut self, comm: &Communicator, members: &[u32]) -> Result<(), Error> {
        let session = self.connection.session().next(comm, members)?;
        // Whether it succeeds or not, what was alive is gone.
        self.slots = Slots::new(self.config.slots);
        let (state, plan) = (&self.state, &self.plan);
        self.connection
            .refresh(session, plan, || state.reset(members))
            .map_err(|error| error.of_rank(state.rank))
    }

    /// Whether and how this rank reaches another, or why not.
    pub fn access(&self, rank: u32) -> Result<Access, Reason> {
        self.connection.access(self.rank(), rank)
    }

    /// Waits for the last stream and for the other ranks, and gives everything back.
    ///
    /// # How long it takes
    /// At most what the stream takes and then one [deadline](BufferBuilder::deadline) for the other
    /// ranks; driver calls come on top. Operations behind a rank that never comes each end after
    /// the [time-out](BufferBuilder::timeout), one after the other: N of them that the stream has
    /// not passed take N × time-out, and a barrier's `spin` and the caller's own work are added. A
    /// combine that is given weights waits for the weights and for the sums, so it counts twice.
    /// With the defaults, 10 s and 60 s, a hundred of them take more than a quarter of an hour.
    /// [`abort`](Self::abort) ends them at once.
    ///
    /// The other ranks' deadline begins when their own streams have finished. If these are empty,
    /// it must be longer than this rank's N time-outs, or they leave without it.
    ///
    /// # Errors
    /// The first thing that went wrong; the rest has been given back all the same. When other ranks
    /// do not come within the deadline, or a refresh left some out, memory that threads of this
    /// process could still write is not freed but lost to it, which the log says.
    pub fn close(self) -> Result<(), Error> {
        let Self {
            mut connection,
            state,
            ..
        } = self;
        let closed = connection.close();
        first_of(closed, state.close())
    }

    pub(crate) fn state(&self) -> &DeviceState {
        &self.state
    }

    /// Refuses the slot of another buffer, or from before a refresh.
    pub(crate) fn check_own(&self, lease: &Lease) -> Result<(), Error> {
        if lease.is_of(&self.slots) {
            Ok(())
        } else {
            Err(Error::ForeignHandle { rank: self.rank() })
        }
    }

    /// Names operation and rank in an argument's error.
    pub(crate) fn check<T>(
        &self,
        operation: Operation,
        check: impl FnOnce() -> Result<T, ArgumentError>,
    ) -> Result<T, Error> {
        check().map_err(|source| Error::Argument {
            rank: Some(self.rank()),
            operation: operation.kernel(),
            source,
        })
    }

    /// Launches an operation if it is its turn, and counts it. Gives its number.
    pub(crate) fn enqueue<T>(
        &self,
        operation: Operation,
        parts: Parts,
        stream: &Stream,
        launch: impl FnOnce(Launcher<'_>) -> Result<T, Error>,
    ) -> Result<(T, u64), Error> {
        let limit = match operation {
            Operation::Dispatch => u64::from(self.config.sends_in_flight),
            // Each holds a slot.
            Operation::Combine | Operation::Barrier => u64::MAX,
        };
        let mut order = self.connection.order().lock();
        order.admit(self.rank(), operation, parts, limit)?;
        let launched = launch(Launcher::new(&self.state, &self.connection))?;
        Ok((launched, order.launched(operation, parts, stream)))
    }

    pub(crate) fn unreceived(&self, operation: Operation, number: u64) -> Unreceived {
        Unreceived::new(self.connection.order(), operation, number)
    }

    pub(crate) fn lease(&self) -> Result<Lease, Error> {
        self.slots.lease().ok_or(Error::NoFreeSlot {
            rank: self.rank(),
            slots: self.config.slots,
        })
    }

    pub(crate) fn launch_error(&self, source: LaunchError) -> Error {
        Error::Launch {
            rank: Some(self.rank()),
            source,
        }
    }

    fn status_of_epoch(&self, operation: Operation, epoch: u64) -> Result<Status, Error> {
        Ok(Status::of(operation, epoch, self.faults()?))
    }
}
