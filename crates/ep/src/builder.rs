//! Making a buffer, together with the other ranks.

use std::time::Duration;

use ep_alloc::{Choice, ProbeOptions, RankFacts, probe};
use ep_kernels::{Layout, ffi};
use ep_sys::Bytes16;

use crate::connection::Connection;
use crate::facts::{self, Hello};
use crate::session::Session;
use crate::state::DeviceState;
use crate::{Buffer, Communicator, Config, Device, Error, env};

/// Makes a [`Buffer`]; [`build`](Self::build) on every rank at once.
#[derive(Clone, Debug)]
#[must_use]
pub struct BufferBuilder {
    device: Device,
    comm: Communicator,
    config: Config,
    choice: Option<Choice>,
    deadline: Option<Duration>,
    timeout: Option<Duration>,
    num_sms: u32,
}

impl BufferBuilder {
    pub(crate) fn new(device: &Device, comm: &Communicator, config: Config) -> Self {
        Self {
            device: device.clone(),
            comm: comm.clone(),
            config,
            choice: None,
            deadline: None,
            timeout: None,
            num_sms: 0,
        }
    }

    /// Which memory to use. Unless set, the environment chooses (`EP_ALLOC`, `MC_USE_NVLINK_IPC`),
    /// and without it the policy.
    pub fn alloc(mut self, choice: Choice) -> Self {
        self.choice = Some(choice);
        self
    }

    /// Bound on each step of setting up and tearing down that waits for other ranks. Unless set,
    /// `EP_DEADLINE_MS`, and without it 60 s. Zero is refused when the buffer is built.
    ///
    /// [Refreshing](Buffer::refresh) and [closing](Buffer::close) begin when a rank's stream has
    /// finished, so what is enqueued behind a rank that never comes must time out within it.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Bound on the waits of an operation on the device. Unless set, `EP_TIMEOUT_MS`, and without it
    /// 10 s. Zero is refused when the buffer is built.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Most multiprocessors that an operation occupies; as many as the device has, unless set.
    pub fn num_sms(mut self, num_sms: u32) -> Self {
        self.num_sms = num_sms;
        self
    }

    /// Makes the buffer.
    ///
    /// Tries what memory each device can share, agrees on one kind, allocates and connects it.
    ///
    /// # Errors
    /// A rank that fails a step tells the others, so that every rank has an error that names it. A
    /// rank that does not come is named by the others' errors within the deadline. What had been
    /// acquired is given back.
    pub fn build(self) -> Result<Buffer, Error> {
        let rank = self.comm.rank();
        self.build_here().map_err(|error| error.of_rank(rank))
    }

    fn build_here(self) -> Result<Buffer, Error> {
        let rank = self.comm.rank();
        let settings = self.settings();
        let deadline = match &settings {
            Ok(settings) => settings.deadline,
            Err(_) => env::DEADLINE,
        };
        let session = Session::new(self.comm.clone(), deadline);

        let shape = self.config.shape(self.comm.size());
        let layout = Layout::new(&shape).map_err(|source| Error::Config { rank, source });
        let hello = self.hello(settings.as_ref().ok());
        let heard = session.gather("facts", &hello.encode(GENERATION));
        // What this rank did wrong itself explains more than what it hears of the others.
        let settings = settings?;
        let records = match (heard, &layout) {
            (Err(_), Err(_)) => Vec::new(),
            (heard, _) => heard?,
        };
        let hellos = (0..)
            .zip(&records)
            .map(|(peer, bytes)| Hello::decode(bytes, rank, peer, GENERATION))
            .collect::<Result<Vec<_>, _>>()?;
        facts::compare(rank, &hellos)?;
        let layout = layout?;
        let facts: Vec<_> = hellos.into_iter().map(|hello| hello.facts).collect();

        let state = DeviceState::new(&self.device, rank, shape, layout, &settings, self.num_sms);
        let state = session.agree("control", state)?;
        let (connection, plan) =
            Connection::new(session, &self.device, &facts, state.layout.bytes())?;
        Ok(Buffer::from_parts(connection, state, self.config, plan))
    }

    fn settings(&self) -> Result<Settings, Error> {
        if !self.device.can_run() {
            return Err(Error::HostKernels {
                rank: self.comm.rank(),
            });
        }
        let rank = self.comm.rank();
        Ok(Settings {
            choice: self.choice.map_or_else(env::choice, Ok)?,
            deadline: env::bound(rank, "deadline", self.deadline, env::deadline)?,
            timeout: env::bound(rank, "timeout", self.timeout, env::timeout)?,
            process: self.device.process().map_err(Error::process(rank))?,
        })
    }

    /// What this rank tells of itself. Without settings it says that it cannot go on.
    fn hello(&self, settings: Option<&Settings>) -> Hello {
        let rank = self.comm.rank();
        let (driver, ordinal) = (self.device.driver(), self.device.ordinal());
        let probe = probe(driver, ordinal, &ProbeOptions::default());
        let (choice, process) = settings
            .map(|settings| (settings.choice, settings.process))
            .unwrap_or_default();
        Hello {
            is_ready: settings.is_some(),
            config: self.config,
            kernels: (
                self.device.backend().to_owned(),
                ffi::EP_KERNELS_ABI_VERSION,
            ),
            facts: RankFacts::new(rank, process, choice, &probe),
        }
    }
}

/// Of the facts' records.
const GENERATION: u64 = 0;

/// What the builder or the environment says.
pub(crate) struct Settings {
    choice: Choice,
    deadline: Duration,
    pub(crate) timeout: Duration,
    process: Bytes16,
}
