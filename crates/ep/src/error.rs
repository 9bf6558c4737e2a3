//! What can go wrong, and what to check next.

use std::{fmt, io};

use ep_alloc::{ChoiceError, Failure, Plan, PolicyError};
use ep_kernels::{Kernel, LaunchError, ShapeError};
use ep_peers::Unreachable;
use ep_sys::DevicePtr;

use crate::tensor::{DType, Dims};
use crate::{Device, Operation};

/// Why an operation did not happen.
///
/// Nothing was launched, and the buffer stays usable, unless the variant says otherwise. The error
/// below, if there is one, is the [`source`](std::error::Error::source) and not part of the text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration is outside the limits.
    #[error("rank {rank}: no buffer has this configuration; change the Config")]
    Config {
        /// This rank.
        rank: u32,
        /// What is wrong with it.
        source: ShapeError,
    },
    /// A bound on waits is zero, so that nothing could be waited for.
    #[error("rank {rank}: the {bound} is zero; give more, or leave it out")]
    ZeroBound {
        /// This rank.
        rank: u32,
        /// Which: `timeout` or `deadline`, as the [builder](crate::BufferBuilder) calls them.
        bound: &'static str,
    },
    /// Ranks were configured differently.
    #[error(
        "rank {rank} has {field} {got}, rank {reference} has {expected}; give every rank the same \
         configuration"
    )]
    Mismatch {
        /// What differs: a field of [`Config`](crate::Config), or `kernels`.
        field: &'static str,
        /// The lowest rank that differs.
        rank: u32,
        /// What it has.
        got: String,
        /// The rank that it was compared with.
        reference: u32,
        /// What that one has.
        expected: String,
    },
    /// The host kernels cannot follow the addresses of a driver's device memory.
    #[error(
        "rank {rank}: host kernels do not run on this driver's memory; make the device with \
         Device::cuda, or with a simulated driver"
    )]
    HostKernels {
        /// This rank.
        rank: u32,
    },
    /// The ranks could not meet, or lost each other.
    #[error("rank {rank}: the group failed; check the rank that the cause names")]
    Group {
        /// This rank.
        rank: u32,
        /// What failed.
        source: ep_peers::Error,
    },
    /// What another rank told of itself could not be read.
    #[error(
        "rank {rank} cannot read the facts of rank {peer}; check that every rank runs the same build"
    )]
    Facts {
        /// This rank.
        rank: u32,
        /// The rank whose facts they are.
        peer: u32,
    },
    /// The group cannot agree on memory that all ranks can use.
    #[error("rank {rank}: no memory suits the group")]
    Policy {
        /// This rank.
        rank: u32,
        /// Why.
        source: PolicyError,
    },
    /// Memory that peers map could not be allocated, exported or given back.
    #[error("rank {rank}: shared memory failed")]
    Memory {
        /// This rank.
        rank: u32,
        /// The call that failed.
        source: ep_alloc::Error,
    },
    /// Another rank failed in setting up, and told the group.
    #[error(
        "rank {rank}: rank {peer} failed in {step}{}; see that rank's own error",
        Because(*failure)
    )]
    Peer {
        /// This rank.
        rank: u32,
        /// The lowest rank that failed.
        peer: u32,
        /// The step of setting up.
        step: &'static str,
        /// The driver call that failed there, if it was one.
        failure: Option<Failure>,
    },
    /// Two ranks cannot reach each other's memory.
    #[error("rank {rank}: {pair}; memory is {plan}")]
    Unreachable {
        /// This rank.
        rank: u32,
        /// The first pair that cannot, and why.
        pair: Unreachable,
        /// What the group tried, and why.
        plan: Box<Plan>,
    },
    /// This process cannot be told from others.
    #[error(
        "rank {rank} drew no random number to tell its process from others by; check that the \
         process may call getrandom"
    )]
    Process {
        /// This rank.
        rank: u32,
        /// The system's error.
        source: io::Error,
    },
    /// A driver call failed.
    #[error("{}{doing} failed", Of(*rank))]
    Driver {
        /// This rank, where the caller has one yet.
        rank: Option<u32>,
        /// What was being done.
        doing: &'static str,
        /// The call and its status.
        source: ep_sys::Error,
    },
    /// A stream, an event or a tensor was used with one of another device.
    #[error(
        "{doing}: the {argument} is of {}, not of {expected:?}; make both from one Device or its \
         clones",
        Elsewhere { got, expected }
    )]
    OtherDevice {
        /// What was being done.
        doing: &'static str,
        /// What is of the wrong device.
        argument: &'static str,
        /// The device that it must be of.
        expected: Device,
        /// The device that it is of.
        got: Device,
    },
    /// A borrowed stream is the per-thread default stream, which is another one on every thread.
    #[error(
        "the per-thread default stream is another stream on every thread; give a stream of its own \
         (cudaStreamCreateWithFlags), or 1 for the legacy default stream"
    )]
    PerThreadStream,
    /// A kernel was not launched.
    #[error("{}an operation was not launched", Of(*rank))]
    Launch {
        /// This rank, where the caller has one yet.
        rank: Option<u32>,
        /// Why.
        source: LaunchError,
    },
    /// An argument is not what the operation takes.
    #[error("{}{operation} does not take these arguments", Of(*rank))]
    Argument {
        /// This rank, where the caller has one.
        rank: Option<u32>,
        /// The operation.
        operation: Kernel,
        /// Which argument, and why.
        source: ArgumentError,
    },
    /// A handle or a pending operation of another buffer, or from before a
    /// [refresh](crate::Buffer::refresh).
    #[error(
        "rank {rank}: the handle or pending operation is not of this buffer, or from before its \
         refresh; give it to the buffer that returned it"
    )]
    ForeignHandle {
        /// This rank.
        rank: u32,
    },
    /// As many results are alive as the buffer has slots.
    #[error("rank {rank}: {slots} results are alive; combine or drop one, or raise Config::slots")]
    NoFreeSlot {
        /// This rank.
        rank: u32,
        /// Slots of the buffer.
        slots: u32,
    },
    /// As many operations are sent and not yet received as the buffer allows.
    #[error(
        "rank {rank}: {pending} of {operation} are sent and not received; receive one first \
         (before it only send parts of a dispatch may begin, up to Config::sends_in_flight)"
    )]
    Pending {
        /// This rank.
        rank: u32,
        /// The operation.
        operation: Operation,
        /// How many wait for their receive part.
        pending: u64,
    },
    /// Receive parts are not in the order of the send parts.
    #[error(
        "rank {rank}: {operation} {number} cannot be received before {expected}; receive in the \
         order of sending"
    )]
    OutOfOrder {
        /// This rank.
        rank: u32,
        /// The operation.
        operation: Operation,
        /// The one that was to be received.
        number: u64,
        /// The one whose turn it is.
        expected: u64,
    },
    /// An operation was sent and never received, so this rank is out of step with the others.
    #[error(
        "rank {rank}: a {operation} was sent and dropped without being received; refresh the buffer \
         on every rank, or build it again"
    )]
    Abandoned {
        /// This rank.
        rank: u32,
        /// The operation.
        operation: Operation,
    },
    /// What was enqueued has been called off, so this rank is out of step with the others.
    #[error(
        "rank {rank}: the buffer was aborted; refresh it with the ranks that are left, or close it"
    )]
    Aborted {
        /// This rank.
        rank: u32,
    },
    /// A refresh failed, so no peer is connected.
    #[error("rank {rank}: no peer is connected since a refresh failed; refresh the buffer again")]
    NotConnected {
        /// This rank.
        rank: u32,
    },
    /// A refresh with a communicator in which this rank has another's place.
    #[error(
        "rank {rank} is named {named} in the new group; member i is the rank whose communicator has \
         rank i"
    )]
    NotMember {
        /// This rank.
        rank: u32,
        /// The rank that stands in its place.
        named: u32,
    },
    /// An environment variable is missing or has a value that means nothing.
    #[error("{variable} {}; set it to {expected}", Found(value))]
    Environment {
        /// The variable.
        variable: &'static str,
        /// Its value; `None` if it is not set.
        value: Option<String>,
        /// What it should be.
        expected: &'static str,
    },
    /// The choice of memory in the environment means nothing.
    #[error("the environment chooses no memory")]
    Choice {
        /// The value.
        #[from]
        source: ChoiceError,
    },
    /// A tensor's size in bytes does not fit.
    #[error("a tensor {dtype}{dims} has no size in bytes; make it smaller")]
    TensorTooLarge {
        /// Its sizes.
        dims: Dims,
        /// Its element type.
        dtype: DType,
    },
    /// Host elements do not stand for a tensor's elements.
    #[error("a tensor of {dtype} is not copied from or to {host}; use the host type of that width")]
    HostType {
        /// The tensor's element type.
        dtype: DType,
        /// The host's.
        host: &'static str,
    },
    /// As many host elements as the tensor has are needed.
    #[error("{got} host elements are not those of a tensor {dims}; give as many as it has")]
    HostLength {
        /// The tensor's sizes.
        dims: Dims,
        /// Host elements.
        got: usize,
    },
}

/// Why an argument is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArgumentError {
    /// Its sizes are wrong.
    #[error("{field} has sizes {got}; it must have {expected}")]
    Dims {
        /// The argument.
        field: &'static str,
        /// The sizes that it must have.
        expected: Dims,
        /// The sizes that it has.
        got: Dims,
    },
    /// It has another number of dimensions.
    #[error("{field} has sizes {got}; it must have {expected} of them")]
    Rank {
        /// The argument.
        field: &'static str,
        /// The number that it must have.
        expected: usize,
        /// The sizes that it has.
        got: Dims,
    },
    /// Its elements are of another type.
    #[error("{field} is of {got}; it must be of {expected}")]
    DType {
        /// The argument.
        field: &'static str,
        /// The type that it must have.
        expected: DType,
        /// The type that it has.
        got: DType,
    },
    /// It is on another device.
    #[error("{field} is on {}; it must be on {expected:?}", Elsewhere { got, expected })]
    Device {
        /// The argument.
        field: &'static str,
        /// The device that it must be on: the buffer's or, without a buffer, the stream's.
        expected: Device,
        /// The argument's.
        got: Device,
    },
    /// Its address is null.
    #[error("{field} has a null address; pass memory of the device")]
    Null {
        /// The argument.
        field: &'static str,
    },
    /// Its address is not aligned.
    #[error("{field} is at {ptr:?}; its address must be a multiple of {align}")]
    Alignment {
        /// The argument.
        field: &'static str,
        /// The multiple.
        align: u64,
        /// The address.
        ptr: DevicePtr,
    },
    /// A number is too large or too small: for the buffer or, without one, for the kernel or the
    /// other arguments.
    #[error("{field} is {got}; it must be {min} to {max}")]
    Range {
        /// The argument.
        field: &'static str,
        /// Its value.
        got: usize,
        /// The least.
        min: usize,
        /// The most.
        max: usize,
    },
    /// It is there and must not be, or the other way round.
    #[error("{field} is {}; the payload's format needs it {}", Given(!*wanted), Given(*wanted))]
    Presence {
        /// The argument.
        field: &'static str,
        /// Whether it must be given.
        wanted: bool,
    },
}

/// Something that an operation did not take, and why. What it was given comes back.
///
/// With [`operand`](Self::operand) the operation can be done again, and should be: the other ranks
/// do it too. `?` in a function that returns [`Error`] gives it up instead. The operand is dropped,
/// which is logged as a warning, and with it
///
/// - a [`Handle`](crate::Handle): its slot is free again, and this rank has left out a combine.
///   Where the others do not leave it out, too, ranks are out of step: their combine waits for this
///   rank until the time-out and reports it;
/// - a [`PendingDispatch`](crate::PendingDispatch) or [`PendingCombine`](crate::PendingCombine):
///   the buffer refuses whatever follows with [`Error::Abandoned`] until it is refreshed.
///
/// The conversion is there all the same. A refused argument is mostly a mistake of the program,
/// which no second attempt with the same argument mends; its caller ends, and should end by `?`.
#[must_use = "the operation has not happened, and its operand is in here"]
pub struct Rejected<T> {
    /// What was given.
    pub operand: T,
    /// Why it was not taken.
    pub error: Box<Error>,
}

impl<T> Rejected<T> {
    pub(crate) fn new(operand: T, error: impl Into<Error>) -> Self {
        Self {
            operand,
            error: Box::new(error.into()),
        }
    }
}

impl<T> std::error::Error for Rejected<T> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl<T> fmt::Display for Rejected<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl<T> fmt::Debug for Rejected<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.error, f)
    }
}

/// Gives the operation up: drops the operand, and logs that.
impl<T> From<Rejected<T>> for Error {
    fn from(Rejected { operand, error }: Rejected<T>) -> Self {
        let dropped = std::any::type_name::<T>();
        tracing::warn!(dropped, %error, "a refused operation was given up with what it was given");
        drop(operand);
        *error
    }
}

impl Error {
    /// The driver's refusal of what was being done.
    pub(crate) fn driver(doing: &'static str) -> impl FnOnce(ep_sys::Error) -> Self {
        move |source| Self::Driver {
            rank: None,
            doing,
            source,
        }
    }

    pub(crate) fn process(rank: u32) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Process { rank, source }
    }

    pub(crate) fn launch(source: LaunchError) -> Self {
        Self::Launch { rank: None, source }
    }

    /// The same error as this rank's.
    pub(crate) fn of_rank(mut self, of: u32) -> Self {
        if let Self::Driver { rank, .. } | Self::Launch { rank, .. } = &mut self {
            *rank = Some(of);
        }
        self
    }

    /// The driver call below it that failed, as plain data.
    pub(crate) fn failure(&self) -> Option<Failure> {
        match self {
            Self::Driver { source, .. } => Some(Failure::from(source)),
            Self::Memory { source, .. } => source.failure(),
            Self::Group {
                source: ep_peers::Error::Driver { source, .. },
                ..
            }
            | Self::Group {
                source: ep_peers::Error::Release { source, .. },
                ..
            } => Some(Failure::from(source)),
            _ => None,
        }
    }
}

struct Of(Option<u32>);

impl fmt::Display for Of {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(rank) => write!(f, "rank {rank}: "),
            None => Ok(()),
        }
    }
}

/// A device that is not the expected one, also where their numbers are the same.
struct Elsewhere<'a> {
    got: &'a Device,
    expected: &'a Device,
}

impl fmt::Display for Elsewhere<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.got)?;
        if self.got.ordinal() == self.expected.ordinal() {
            f.write_str(" of another driver")?;
        }
        Ok(())
    }
}

struct Because(Option<Failure>);

impl fmt::Display for Because {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(failure) => write!(f, ": {failure}"),
            None => Ok(()),
        }
    }
}

struct Found<'a>(&'a Option<String>);

impl fmt::Display for Found<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(value) => write!(f, "is {value:?}"),
            None => f.write_str("is not set"),
        }
    }
}

struct Given(bool);

impl fmt::Display for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0 { "given" } else { "left out" })
    }
}
