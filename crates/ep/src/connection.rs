//! A rank's ties to its group: taken apart in the one order that is safe.

use std::fmt;
use std::time::{Duration, Instant};

use ep_alloc::Allocation;
use ep_peers::exchange::Step;
use ep_sys::vmm::DeviceMemory;
use parking_lot::{Mutex, MutexGuard};

use crate::order::Order;
use crate::{Communicator, Error};

pub(crate) struct Connection {
    pub(crate) comm: Communicator,
    pub(crate) order: Mutex<Order>,
    pub(crate) deadline: Duration,
    pub(crate) peers: Option<DeviceMemory>,
    pub(crate) memory: Option<Allocation>,
    pub(crate) closed: bool,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {}", self.comm.rank(), self.comm.size())
    }
}

impl Connection {
    pub(crate) fn order(&self) -> MutexGuard<'_, Order> {
        self.order.lock()
    }
    pub(crate) fn bytes(&self) -> u64 {
        self.memory.as_ref().map_or(0, Allocation::bytes)
    }
    pub(crate) fn close(&mut self) -> Result<(), Error> {
        if std::mem::replace(&mut self.closed, true) {
            return Ok(());
        }
        let stream = self.order.lock().stream().cloned();
        if let Some(stream) = stream {
            stream.synchronize()?;
        }
        self.comm
            .gather(Step::new("teardown"), &[], Instant::now() + self.deadline)?;
        drop(self.peers.take());
        drop(self.memory.take());
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::error!(%error, "closing a buffer");
        }
    }
}
