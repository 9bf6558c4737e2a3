//! The calls that were made, in order, and the faults that were injected into them.

use std::collections::HashMap;
use std::fmt;

use ep_sys::{Call, DeviceOrdinal, Status};

use crate::fault::{Effects, FaultPlan, Selector, counts};
use crate::process::Refusal;

/// Entries that are kept. A driver that lives longer goes on counting, without a journal.
const LIMIT: usize = 1 << 16;

/// One call that was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The call.
    pub call: Call,
    /// The device it was made for.
    pub device: DeviceOrdinal,
    /// How it ended.
    pub outcome: Outcome,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// It has not yet.
    Pending,
    /// It succeeded.
    Done,
    /// The model refused it.
    Refused(Status),
    /// An injected fault refused it.
    Injected(Status),
    /// The host that simulates could not do it.
    Host,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            call,
            device,
            outcome,
        } = self;
        write!(f, "{call} on {device}: ")?;
        match outcome {
            Outcome::Pending => f.write_str("pending"),
            Outcome::Done => f.write_str("done"),
            Outcome::Refused(status) => write!(f, "{status}"),
            Outcome::Injected(status) => write!(f, "{status} (injected)"),
            Outcome::Host => f.write_str("refused by the host"),
        }
    }
}

/// Counts calls, decides their faults and keeps the journal.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    entries: Vec<Entry>,
    total: usize,
    plan: FaultPlan,
    since_injection: HashMap<Selector, usize>,
}

/// A call that has begun.
#[derive(Debug)]
pub(crate) struct Begun {
    index: Option<usize>,
    pub(crate) effects: Effects,
}

impl Journal {
    pub(crate) fn inject(&mut self, plan: FaultPlan) {
        self.plan = plan;
        self.since_injection.clear();
    }

    pub(crate) fn begin(&mut self, call: Call, device: DeviceOrdinal) -> Begun {
        let seen = &self.since_injection;
        let effects = self.plan.decide(call, device, |selector| {
            seen.get(&selector).copied().unwrap_or_default()
        });
        for device in [None, Some(device)] {
            *self
                .since_injection
                .entry(Selector {
                    device,
                    call: Some(call),
                })
                .or_default() += 1;
            if counts(call) {
                *self
                    .since_injection
                    .entry(Selector { device, call: None })
                    .or_default() += 1;
            }
        }
        let mut index = None;
        if counts(call) {
            self.total += 1;
            if self.entries.len() < LIMIT {
                index = Some(self.entries.len());
                self.entries.push(Entry {
                    call,
                    device,
                    outcome: Outcome::Pending,
                });
            }
        }
        Begun { index, effects }
    }

    pub(crate) fn end<T>(&mut self, begun: &Begun, result: &Result<T, Refusal>) {
        let outcome = match result {
            Ok(_) => Outcome::Done,
            Err(Refusal::Driver(status)) if begun.effects.status.is_some() => {
                Outcome::Injected(*status)
            }
            Err(Refusal::Driver(status)) => Outcome::Refused(*status),
            Err(Refusal::Host(_)) => Outcome::Host,
        };
        if let Some(entry) = begun.index.and_then(|index| self.entries.get_mut(index)) {
            entry.outcome = outcome;
        }
    }

    pub(crate) fn total(&self) -> usize {
        self.total
    }

    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }
}
