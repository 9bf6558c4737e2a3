//! The order of a buffer's operations, which is the same on every rank.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::{Error, Operation, Stream};

/// What has been enqueued.
#[derive(Debug, Default)]
pub(crate) struct Order {
    dispatch: Sequence,
    combine: Sequence,
    barrier: Sequence,
    /// The last operation and its number.
    last: Option<(Operation, u64)>,
    /// The stream that it is on.
    stream: Option<Stream>,
    /// Why no operation is admitted any more.
    ended: Option<End>,
}

/// What ends a sequence of operations.
#[derive(Clone, Copy, Debug)]
enum End {
    /// An operation was sent and will never be received.
    Abandoned(Operation),
    /// What was enqueued has been called off.
    Aborted,
    /// The peers are not connected.
    Disconnected,
}

/// Operations of one kind. Kernels count the same, each part for itself.
#[derive(Clone, Copy, Debug, Default)]
struct Sequence {
    sent: u64,
    received: u64,
}

/// Which parts of an operation are launched.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Parts {
    Both,
    Send,
    Receive {
        /// Of the operation, as it was sent.
        number: u64,
    },
}

impl Order {
    /// Whether the next operation may be this one. At most `limit` are sent and not received.
    pub(crate) fn admit(
        &self,
        rank: u32,
        operation: Operation,
        parts: Parts,
        limit: u64,
    ) -> Result<(), Error> {
        match self.ended {
            None => {}
            Some(End::Abandoned(operation)) => return Err(Error::Abandoned { rank, operation }),
            Some(End::Aborted) => return Err(Error::Aborted { rank }),
            Some(End::Disconnected) => return Err(Error::NotConnected { rank }),
        }
        let Sequence { sent, received } = *self.sequence(operation);
        let pending = sent - received;
        match parts {
            Parts::Both if pending > 0 => {}
            Parts::Send if pending >= limit => {}
            Parts::Receive { number } if number != received + 1 => {
                return Err(Error::OutOfOrder {
                    rank,
                    operation,
                    number,
                    expected: received + 1,
                });
            }
            Parts::Both | Parts::Send | Parts::Receive { .. } => return Ok(()),
        }
        Err(Error::Pending {
            rank,
            operation,
            pending,
        })
    }

    /// Notes an operation that has been launched, and gives its number.
    pub(crate) fn launched(&mut self, operation: Operation, parts: Parts, stream: &Stream) -> u64 {
        let sequence = self.sequence_mut(operation);
        if !matches!(parts, Parts::Receive { .. }) {
            sequence.sent += 1;
        }
        if !matches!(parts, Parts::Send) {
            sequence.received += 1;
        }
        let number = match parts {
            Parts::Receive { number } => number,
            Parts::Both | Parts::Send => sequence.sent,
        };
        self.last = Some((operation, number));
        if !self
            .stream
            .as_ref()
            .is_some_and(|last| last.is_same(stream))
        {
            self.stream = Some(stream.clone());
        }
        number
    }

    pub(crate) fn abandon(&mut self, operation: Operation) {
        self.ended.get_or_insert(End::Abandoned(operation));
    }

    pub(crate) fn abort(&mut self) {
        self.ended.get_or_insert(End::Aborted);
    }

    pub(crate) fn disconnect(&mut self) {
        self.ended = Some(End::Disconnected);
    }

    pub(crate) fn last(&self) -> Option<(Operation, u64)> {
        self.last
    }

    pub(crate) fn stream(&self) -> Option<&Stream> {
        self.stream.as_ref()
    }

    fn sequence(&self, operation: Operation) -> &Sequence {
        match operation {
            Operation::Dispatch => &self.dispatch,
            Operation::Combine => &self.combine,
            Operation::Barrier => &self.barrier,
        }
    }

    fn sequence_mut(&mut self, operation: Operation) -> &mut Sequence {
        match operation {
            Operation::Dispatch => &mut self.dispatch,
            Operation::Combine => &mut self.combine,
            Operation::Barrier => &mut self.barrier,
        }
    }
}

/// An operation that has been sent. Dropped before it is received, it ends its buffer's order.
#[derive(Debug)]
pub(crate) struct Unreceived {
    order: Arc<Mutex<Order>>,
    operation: Operation,
    number: u64,
    received: bool,
}

impl Unreceived {
    pub(crate) fn new(order: &Arc<Mutex<Order>>, operation: Operation, number: u64) -> Self {
        Self {
            order: Arc::clone(order),
            operation,
            number,
            received: false,
        }
    }

    /// The part that is missing.
    pub(crate) fn parts(&self) -> Parts {
        Parts::Receive {
            number: self.number,
        }
    }

    /// Notes that it has been received, and gives its number.
    pub(crate) fn received(mut self) -> u64 {
        self.received = true;
        self.number
    }
}

impl Drop for Unreceived {
    fn drop(&mut self) {
        if !self.received {
            self.order.lock().abandon(self.operation);
        }
    }
}
