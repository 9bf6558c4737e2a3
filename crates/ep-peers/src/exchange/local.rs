//! Threads of one process, over shared memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::{Cause, Exchange, Fault, MAX_RECORD_BYTES, Step};
use crate::{Error, Result};

/// A group of `size` threads. Give each thread its own member; the members come by rank.
///
/// ```
/// use std::thread;
/// use std::time::{Duration, Instant};
///
/// use ep_peers::exchange::local::local;
/// use ep_peers::exchange::{Exchange, Step};
///
/// thread::scope(|scope| {
///     for member in local(3) {
///         scope.spawn(move || {
///             let deadline = Instant::now() + Duration::from_secs(10);
///             let record = [member.rank() as u8];
///             let records = member.all_gather(Step::new("hello"), &record, deadline)?;
///             assert_eq!(records, [[0], [1], [2]]);
///             Ok::<(), ep_peers::Error>(())
///         });
///     }
/// });
/// ```
pub fn local(size: u32) -> Vec<Local> {
    let group = Arc::new(Group {
        state: Mutex::new(State {
            sequence: 0,
            started: None,
            arrived: (0..size).map(|_| None).collect(),
            gathered: Arc::default(),
            fault: None,
        }),
        turned: Condvar::new(),
    });
    (0..size)
        .map(|rank| Local {
            rank,
            size,
            group: Arc::clone(&group),
        })
        .collect()
}

/// One thread's membership in a group of its process. Dropping it while others wait, or before they
/// come to their next step, gives them an error that names it.
#[derive(Debug)]
pub struct Local {
    rank: u32,
    size: u32,
    group: Arc<Group>,
}

#[derive(Debug)]
struct Group {
    state: Mutex<State>,
    /// A step has ended, well or with a fault.
    turned: Condvar,
}

#[derive(Debug)]
struct State {
    /// Steps that have ended well.
    sequence: u64,
    /// When the first rank arrived at the present step.
    started: Option<Instant>,
    /// What the present step's ranks brought.
    arrived: Vec<Option<(Step, Vec<u8>)>>,
    /// The last step's records. It stays until the next ends, and that needs every rank.
    gathered: Arc<Vec<Vec<u8>>>,
    /// What broke the group. It stays broken.
    fault: Option<Fault>,
}

impl Exchange for Local {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn size(&self) -> u32 {
        self.size
    }

    fn all_gather(&self, step: Step, record: &[u8], deadline: Instant) -> Result<Vec<Vec<u8>>> {
        if record.len() > MAX_RECORD_BYTES {
            return Err(Error::RecordTooLarge {
                step,
                bytes: record.len(),
            });
        }
        let rank = self.rank as usize;
        let mut state = self
            .group
            .state
            .try_lock_until(deadline)
            .ok_or(Error::Busy { step })?;
        if let Some(fault) = &state.fault {
            return Err(fault.clone().into());
        }
        if state.arrived[rank].is_some() {
            // Another thread is in a step as this rank.
            return Err(Error::Busy { step });
        }
        state.arrived[rank] = Some((step, record.to_vec()));
        state.started.get_or_insert_with(Instant::now);
        if state.arrived.iter().all(Option::is_some) {
            state.turn();
            self.group.turned.notify_all();
            return match &state.fault {
                Some(fault) => Err(fault.clone().into()),
                None => Ok(Vec::clone(&state.gathered)),
            };
        }
        let sequence = state.sequence;
        loop {
            let timed_out = self
                .group
                .turned
                .wait_until(&mut state, deadline)
                .timed_out();
            if state.sequence != sequence {
                return Ok(Vec::clone(&state.gathered));
            }
            if timed_out && state.fault.is_none() {
                state.fault = Some(state.missing(step));
                self.group.turned.notify_all();
            }
            if let Some(fault) = &state.fault {
                return Err(fault.clone().into());
            }
        }
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        let mut state = self.group.state.lock();
        let step = state.arrived.iter().flatten().map(|(step, _)| *step).next();
        if state.fault.is_none() {
            let cause = Cause::Lost { errno: None };
            let step = step.unwrap_or(Step::new("between steps"));
            state.fault = Some(Fault::new(step, self.rank, cause));
            self.group.turned.notify_all();
        }
    }
}

impl State {
    /// Ends a step at which every rank has arrived.
    fn turn(&mut self) {
        let arrived: Vec<_> = self.arrived.iter_mut().filter_map(Option::take).collect();
        self.started = None;
        self.fault = disagreement(&arrived);
        if self.fault.is_none() {
            self.gathered = Arc::new(arrived.into_iter().map(|(_, record)| record).collect());
            self.sequence += 1;
        }
    }

    fn missing(&self, step: Step) -> Fault {
        Fault {
            step,
            ranks: (0..)
                .zip(&self.arrived)
                .filter(|(_, record)| record.is_none())
                .map(|(rank, _)| rank)
                .collect(),
            cause: Cause::Missing {
                waited: self
                    .started
                    .map_or(Duration::ZERO, |started| started.elapsed()),
            },
        }
    }
}

/// What keeps these arrivals from being one step, measured by rank 0.
fn disagreement(arrived: &[(Step, Vec<u8>)]) -> Option<Fault> {
    let ((step, record), others) = arrived.split_first()?;
    (1..).zip(others).find_map(|(rank, (at, theirs))| {
        let cause = if at != step {
            Cause::Step { at: *at }
        } else if theirs.len() != record.len() {
            Cause::Size {
                expected: record.len() as u64,
                actual: theirs.len() as u64,
            }
        } else {
            return None;
        };
        Some(Fault::new(*step, rank, cause))
    })
}
