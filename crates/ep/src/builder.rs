//! Making a buffer, together with the other ranks.

use std::time::{Duration, Instant};

use ep_alloc::{Allocation, Choice, ProbeOptions, RankFacts, decide, probe};
use ep_kernels::{Layout, ffi};
use ep_peers::exchange::Step;
use ep_sys::vmm::{self, DeviceMemory};
use parking_lot::Mutex;

use crate::connection::Connection;
use crate::facts::{self, Hello};
use crate::fault::Ring;
use crate::state::{self, DeviceState, SlotMemory};
use crate::{Buffer, Communicator, Config, Device, Error, env};

/// Makes a [`Buffer`].
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
    /// `EP_DEADLINE_MS`, and without it 60 s.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Bound on the waits of an operation on the device. Unless set, `EP_TIMEOUT_MS`, and without it
    /// 10 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Most multiprocessors that an operation occupies; as many as the device has, unless set.
    pub fn num_sms(mut self, num_sms: u32) -> Self {
        self.num_sms = num_sms;
        self
    }

    /// Makes the buffer. Every rank of the group does so at once.
    ///
    /// Tries what memory each device can share, agrees on one kind, allocates and connects it. A rank
    /// that fails a step tells the others, so that every rank has an error that names it; a rank that
    /// does not come is named by the others' errors within the deadline.
    pub fn build(self) -> Result<Buffer, Error> {
        let rank = self.comm.rank();
        self.build_here().map_err(|error| error.of_rank(rank))
    }

    fn build_here(self) -> Result<Buffer, Error> {
        let rank = self.comm.rank();
        let deadline = match self.deadline {
            Some(deadline) => deadline,
            None => env::deadline()?,
        };
        let timeout = match self.timeout {
            Some(timeout) => timeout,
            None => env::timeout()?,
        };
        let choice = match self.choice {
            Some(choice) => choice,
            None => env::choice()?,
        };
        let shape = self.config.shape(self.comm.size());
        let (driver, ordinal) = (self.device.driver(), self.device.ordinal());

        let probe = probe(driver, ordinal, &ProbeOptions::default());
        let hello = Hello {
            config: self.config,
            kernels: (
                self.device.backend().to_owned(),
                ffi::EP_KERNELS_ABI_VERSION,
            ),
            facts: RankFacts::new(rank, self.device.process(), choice, &probe),
        };
        let heard = self.comm.gather(
            Step::new("facts"),
            &hello.encode(0),
            Instant::now() + deadline,
        );
        let layout = Layout::new(&shape).map_err(|source| Error::Config { rank, source });
        let records = match (heard, &layout) {
            (Ok(records), _) => records,
            (Err(_), Err(_)) => return Err(layout.err().unwrap()),
            (Err(error), Ok(_)) => return Err(error),
        };
        let hellos = records
            .iter()
            .zip(0..)
            .map(|(bytes, peer)| Hello::decode(bytes, rank, peer, 0))
            .collect::<Result<Vec<_>, _>>()?;
        if let Some(error) = facts::mismatch(&hellos) {
            return Err(error);
        }
        let layout = layout?;
        let facts: Vec<_> = hellos.into_iter().map(|hello| hello.facts).collect();
        let plan = decide(&facts, &[]).map_err(|source| Error::Policy { rank, source })?;

        let memory = Allocation::new(driver, ordinal, plan.backend, layout.bytes(), false)
            .map_err(|source| Error::Memory { rank, source })?;
        let stream = vmm::Stream::new(driver, ordinal).map_err(Error::driver("x"))?;
        driver
            .fill(ordinal, memory.ptr(), 0, memory.bytes(), stream.handle())
            .map_err(Error::driver("x"))?;
        let slots = SlotMemory::new(driver, ordinal, &shape).map_err(Error::driver("x"))?;
        slots.zero(driver, &stream).map_err(Error::driver("x"))?;
        stream.synchronize().map_err(Error::driver("x"))?;
        let control = state::new_control(driver, ordinal, &shape).map_err(Error::driver("x"))?;
        let faults = Ring::new(driver, ordinal).map_err(Error::driver("x"))?;
        let table = DeviceMemory::new(driver, ordinal, 8 * u64::from(shape.num_ranks))
            .map_err(Error::driver("x"))?;
        let bases = self.comm.gather(
            Step::new("bases"),
            &memory.ptr().0.to_le_bytes(),
            Instant::now() + deadline,
        )?;
        driver
            .copy_to_device(ordinal, table.ptr(), &bases.concat())
            .map_err(Error::driver("x"))?;
        self.comm
            .gather(Step::new("ready"), &[], Instant::now() + deadline)?;

        let state = DeviceState {
            device: self.device.clone(),
            rank,
            shape,
            layout,
            timeout_ns: u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX),
            num_sms: self.num_sms,
            control,
            faults,
            slots,
            table: table.ptr(),
        };
        let connection = Connection {
            comm: self.comm,
            order: Mutex::default(),
            deadline,
            peers: Some(table),
            memory: Some(memory),
            closed: false,
        };
        Ok(Buffer::from_parts(connection, state, self.config, plan))
    }
}
