//! Steps over a star of links: every rank sends its record to rank 0, which sends all to all.
//!
//! Rank 0 sees every connection, so it is the one that knows who is at fault. It gives up a little
//! before the first deadline of those that have arrived and tells everyone the fault; a rank that
//! hears nothing until its own deadline can only name rank 0.
//!
//! A step has succeeded once rank 0 has all records: everyone who is still there is sent them. If
//! someone is not, the group is broken from the next step on, so that the others agree on how this
//! one ended.

use std::os::fd::AsFd;
use std::time::Instant;

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags};

use super::frame::{self, Header, Kind};
use super::link::{self, Link};
use super::{Cause, Exchange, Fault, MAX_RECORD_BYTES, Step, give_up_at};
use crate::{Error, Result};

/// A connected group.
#[derive(Debug)]
pub(super) struct Star {
    rank: u32,
    size: u32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Steps taken.
    sequence: u64,
    /// What broke the group. It stays broken.
    fault: Option<Fault>,
    side: Side,
}

#[derive(Debug)]
enum Side {
    /// Rank 0, with the links to ranks 1, 2, ….
    Hub(Vec<Link>),
    /// Another rank, with its link to rank 0.
    Leaf(Link),
}

impl Star {
    /// Rank 0 of a group, with the links to ranks 1, 2, ….
    pub(super) fn hub(links: Vec<Link>) -> Self {
        let size = u32::try_from(links.len())
            .unwrap_or(u32::MAX)
            .saturating_add(1);
        Self::new(0, size, Side::Hub(links))
    }

    /// Another rank of a group.
    pub(super) fn leaf(rank: u32, size: u32, link: Link) -> Self {
        Self::new(rank, size, Side::Leaf(link))
    }

    fn new(rank: u32, size: u32, side: Side) -> Self {
        Self {
            rank,
            size,
            state: Mutex::new(State {
                sequence: 0,
                fault: None,
                side,
            }),
        }
    }
}

impl Exchange for Star {
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
        let mut state = self
            .state
            .try_lock_until(deadline)
            .ok_or(Error::Busy { step })?;
        let State {
            sequence,
            fault,
            side,
        } = &mut *state;
        if let Some(fault) = fault {
            return Err(fault.clone().into());
        }
        let turn = Turn {
            rank: self.rank,
            size: self.size,
            sequence: *sequence,
            step,
            record,
            deadline,
        };
        let outcome = match side {
            Side::Hub(links) => turn.lead(links, fault),
            Side::Leaf(link) => turn.follow(link),
        };
        *sequence += 1;
        outcome.map_err(|found| {
            *fault = Some(found.clone());
            found.into()
        })
    }
}

/// One rank's part in one step.
struct Turn<'a> {
    rank: u32,
    size: u32,
    sequence: u64,
    step: Step,
    record: &'a [u8],
    deadline: Instant,
}

impl Turn<'_> {
    /// Rank 0's part. `broken`: what breaks the group although this step succeeded.
    fn lead(&self, links: &mut [Link], broken: &mut Option<Fault>) -> Result<Vec<Vec<u8>>, Fault> {
        let started = Instant::now();
        let outcome = self.collect(links, started).map(|(records, due)| {
            *broken = self.scatter(links, &records.concat(), due);
            records
        });
        if let Some(fault) = outcome.as_ref().err().or(broken.as_ref()) {
            let abort = frame::abort(self.rank, self.sequence, fault);
            for link in links {
                link.finish(&abort);
            }
        }
        outcome
    }

    /// All records, by rank, and when to give up on those that do not take the answer.
    fn collect(
        &self,
        links: &mut [Link],
        started: Instant,
    ) -> Result<(Vec<Vec<u8>>, Instant), Fault> {
        let mut due = give_up_at(started, self.deadline);
        let mut records = vec![None; links.len()];
        while records.iter().any(Option::is_none) {
            let ready = self.ready(links.iter(), PollFlags::IN, due)?;
            for (i, link) in links.iter_mut().enumerate().filter(|(i, _)| ready[*i]) {
                let rank = rank_of(i);
                let received = if records[i].is_none() {
                    link.receive(|header| self.admit_record(rank, header))
                } else {
                    // Nothing can follow a record before its answer: this is the connection's end,
                    // or a rank that does not keep to the protocol.
                    link.receive(|header| Err(Cause::Step { at: header.step }))
                };
                match received {
                    Ok(Some((header, record))) => {
                        let now = Instant::now();
                        due = due.min(match now.checked_add(header.left) {
                            Some(theirs) => give_up_at(now, theirs),
                            None => due,
                        });
                        records[i] = Some(record);
                    }
                    Ok(None) => {}
                    Err(cause) => return Err(self.fault(rank, cause)),
                }
            }
            if Instant::now() >= due && records.iter().any(Option::is_none) {
                return Err(self.missing(links, |i| records[i].is_none(), started));
            }
        }
        let own = std::iter::once(self.record.to_vec());
        let records = own.chain(records.into_iter().flatten()).collect();
        Ok((records, due))
    }

    /// Sends the answer to everyone. The connection to a rank that is gone, or does not take it in
    /// time, is ended, and the fault returned.
    fn scatter(&self, links: &mut [Link], records: &[u8], due: Instant) -> Option<Fault> {
        let started = Instant::now();
        let frame = self.frame(Kind::Records, records);
        let mut sent = vec![0; links.len()];
        let mut lost = None;
        loop {
            for (i, link) in links.iter_mut().enumerate() {
                if let Err(cause) = link.send(&frame, &mut sent[i]) {
                    link.finish(&[]);
                    sent[i] = frame.len();
                    lost.get_or_insert(self.fault(rank_of(i), cause));
                }
            }
            let behind = |i: &usize| sent[*i] < frame.len();
            if !(0..links.len()).any(|i| behind(&i)) {
                return lost;
            }
            let waited_for = links.iter().enumerate().filter(|(i, _)| behind(i));
            let waited = self.ready(waited_for.map(|(_, link)| link), PollFlags::OUT, due);
            let fault = match waited {
                Ok(_) if Instant::now() < due => continue,
                Ok(_) => self.missing(links, |i| behind(&i), started),
                Err(fault) => fault,
            };
            for (_, link) in links.iter_mut().enumerate().filter(|(i, _)| behind(i)) {
                link.finish(&[]);
            }
            return lost.or(Some(fault));
        }
    }

    /// Another rank's part.
    fn follow(&self, link: &mut Link) -> Result<Vec<Vec<u8>>, Fault> {
        let outcome = self.ask(link);
        if outcome.is_err() {
            link.finish(&[]);
        }
        outcome
    }

    fn ask(&self, link: &mut Link) -> Result<Vec<Vec<u8>>, Fault> {
        let started = Instant::now();
        let frame = self.frame(Kind::Record, self.record);
        let mut sent = 0;
        loop {
            // The group may have given up, on this rank or another, before this step.
            if let Some(answer) = self.answer(link)? {
                return Ok(answer);
            }
            if let Err(cause) = link.send(&frame, &mut sent) {
                // What rank 0 said last explains more than the connection's end.
                return match self.answer(link) {
                    Err(fault) => Err(fault),
                    Ok(_) => Err(self.fault(0, cause)),
                };
            }
            if Instant::now() >= self.deadline {
                return Err(self.missing(std::slice::from_ref(link), |_| true, started));
            }
            let flags = if sent < frame.len() {
                PollFlags::IN | PollFlags::OUT
            } else {
                PollFlags::IN
            };
            self.ready(std::iter::once(&*link), flags, self.deadline)?;
        }
    }

    /// Rank 0's answer, if it has come.
    fn answer(&self, link: &mut Link) -> Result<Option<Vec<Vec<u8>>>, Fault> {
        let received = link
            .receive(|header| self.admit_answer(header))
            .map_err(|cause| self.fault(0, cause))?;
        let Some((header, payload)) = received else {
            return Ok(None);
        };
        if header.kind == Kind::Abort {
            return Err(link::told(&payload, || self.fault(0, Cause::Foreign)));
        }
        Ok(Some(if self.record.is_empty() {
            vec![Vec::new(); self.size as usize]
        } else {
            payload
                .chunks_exact(self.record.len())
                .map(<[u8]>::to_vec)
                .collect()
        }))
    }

    fn admit_record(&self, rank: u32, header: &Header) -> Result<(), Cause> {
        if header.kind != Kind::Record || header.rank != rank {
            return Err(Cause::Foreign);
        }
        self.admit_step(header)?;
        admit_length(header, self.record.len() as u64)
    }

    fn admit_answer(&self, header: &Header) -> Result<(), Cause> {
        match header.kind {
            Kind::Abort if header.length as usize <= Fault::max_bytes(self.size) => Ok(()),
            Kind::Records if header.rank == 0 => {
                self.admit_step(header)?;
                admit_length(header, u64::from(self.size) * self.record.len() as u64)
            }
            _ => Err(Cause::Foreign),
        }
    }

    fn admit_step(&self, header: &Header) -> Result<(), Cause> {
        if (header.sequence, header.step) == (self.sequence, self.step) {
            Ok(())
        } else {
            Err(Cause::Step { at: header.step })
        }
    }

    fn frame(&self, kind: Kind, payload: &[u8]) -> Vec<u8> {
        let header = Header {
            kind,
            rank: self.rank,
            sequence: self.sequence,
            step: self.step,
            left: self.deadline.saturating_duration_since(Instant::now()),
            length: u32::try_from(payload.len()).unwrap_or(u32::MAX),
        };
        [header.encode().as_slice(), payload].concat()
    }

    /// Waits for the links; says which of them have something to do.
    fn ready<'l>(
        &self,
        links: impl Iterator<Item = &'l Link>,
        flags: PollFlags,
        until: Instant,
    ) -> Result<Vec<bool>, Fault> {
        let mut fds: Vec<_> = links
            .map(|link| PollFd::from_borrowed_fd(link.as_fd(), flags))
            .collect();
        link::wait(&mut fds, until).map_err(|errno| {
            let errno = Some(errno.raw_os_error());
            self.fault(self.rank, Cause::Lost { errno })
        })?;
        Ok(fds.iter().map(|fd| !fd.revents().is_empty()).collect())
    }

    /// The fault of those that are waited for: if they all began a frame, that; else their absence.
    fn missing(&self, links: &[Link], waited_for: impl Fn(usize) -> bool, since: Instant) -> Fault {
        let late = || links.iter().enumerate().filter(|(i, _)| waited_for(*i));
        let absent = Cause::Missing {
            waited: since.elapsed(),
        };
        let mut causes = late().map(|(_, link)| link.truncated());
        let cause = match (causes.next().flatten(), causes.all(|cause| cause.is_some())) {
            (Some(truncated), true) => truncated,
            _ => absent,
        };
        Fault {
            step: self.step,
            ranks: late()
                .map(|(i, _)| if self.rank == 0 { rank_of(i) } else { 0 })
                .collect(),
            cause,
        }
    }

    fn fault(&self, rank: u32, cause: Cause) -> Fault {
        Fault::new(self.step, rank, cause)
    }
}

/// The rank at the other end of rank 0's link `i`.
fn rank_of(i: usize) -> u32 {
    u32::try_from(i).unwrap_or(u32::MAX).saturating_add(1)
}

fn admit_length(header: &Header, expected: u64) -> Result<(), Cause> {
    let actual = u64::from(header.length);
    if actual == expected {
        Ok(())
    } else {
        Err(Cause::Size { expected, actual })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const STEP: Step = Step::new("handles");
    const RECORD: [u8; 8] = [1; 8];

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn hub_and_stream() -> (Star, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Star::hub(vec![Link::new(ours.into())]), theirs)
    }

    /// A leaf's record, as bytes.
    fn record() -> Vec<u8> {
        record_of(1, 2, &RECORD)
    }

    fn record_of(rank: u32, size: u32, record: &[u8]) -> Vec<u8> {
        let turn = Turn {
            rank,
            size,
            sequence: 0,
            step: STEP,
            record,
            deadline: soon(),
        };
        turn.frame(Kind::Record, record)
    }

    #[test]
    fn frames_may_come_byte_by_byte() {
        let (hub, mut stream) = hub_and_stream();
        std::thread::scope(|scope| {
            let gathered = scope.spawn(|| hub.all_gather(STEP, &[2; 8], soon()));
            for byte in record() {
                stream.write_all(&[byte]).unwrap();
                std::thread::sleep(Duration::from_micros(200));
            }
            assert_eq!(gathered.join().unwrap().unwrap(), [[2; 8], RECORD]);
        });
        let mut answer = vec![0; frame::HEADER_BYTES + 16];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer[frame::HEADER_BYTES..], [[2; 8], RECORD].concat());
    }

    #[test]
    fn the_first_deadline_of_the_group_is_kept() {
        let pairs = [(); 2].map(|()| UnixStream::pair().unwrap());
        let [(first, hurried), (second, _silent)] = pairs;
        let hub = Star::hub([first, second].map(|end| Link::new(end.into())).into());
        let hurried = Star::leaf(1, 3, Link::new(hurried.into()));
        let deadline = Instant::now() + Duration::from_millis(500);
        std::thread::scope(|scope| {
            let leaf = scope.spawn(|| hurried.barrier(STEP, deadline).unwrap_err());
            // Rank 0 would wait longer, but then rank 1 could not be told who is missing.
            let hub = hub.barrier(STEP, soon()).unwrap_err();
            assert!(Instant::now() < deadline);
            for error in [hub, leaf.join().unwrap()] {
                let Error::Exchange(fault) = error else {
                    panic!("{error}")
                };
                assert_eq!(fault.ranks, [2]);
                assert!(matches!(fault.cause, Cause::Missing { .. }));
            }
        });
    }

    /// Rank 0 and ranks 1 and 3 take a step that succeeds although rank 2, which `rank_2` prepares,
    /// does not hear of it; the next one fails for that. Ranks 1 and 3 have until `deadline`.
    fn without_rank_2(record: &[u8], deadline: Instant, rank_2: impl FnOnce(&UnixStream)) {
        let pairs = [(); 3].map(|()| UnixStream::pair().unwrap());
        let [(a, first), (b, second), (c, third)] = pairs;
        let hub = Star::hub([a, b, c].map(|end| Link::new(end.into())).into());
        let leaves =
            [(1, first), (3, third)].map(|(rank, end)| Star::leaf(rank, 4, Link::new(end.into())));
        std::thread::scope(|scope| {
            let hub = scope.spawn(|| {
                let outcome = hub.all_gather(STEP, record, soon());
                (outcome, hub.barrier(Step::new("next"), soon()))
            });
            let leaves = leaves.each_ref().map(|leaf| {
                scope.spawn(|| {
                    let outcome = leaf.all_gather(STEP, record, deadline);
                    (outcome, leaf.barrier(Step::new("next"), deadline))
                })
            });
            rank_2(&second);
            let own = record_of(2, 4, record);
            (&second).write_all(&own).unwrap();
            for rank in [hub].into_iter().chain(leaves) {
                let (outcome, next) = rank.join().unwrap();
                assert_eq!(outcome.unwrap().len(), 4);
                let Err(Error::Exchange(fault)) = next else {
                    panic!("{next:?}")
                };
                assert_eq!((fault.step, &fault.ranks[..]), (STEP, &[2][..]), "{fault}");
            }
        });
    }

    #[test]
    fn a_rank_that_is_gone_before_the_answer_breaks_the_next_step() {
        without_rank_2(&RECORD, soon(), |stream| {
            stream.shutdown(Shutdown::Read).unwrap();
        });
    }

    #[test]
    fn a_rank_that_reads_no_answer_is_given_up_before_the_first_deadline() {
        let deadline = Instant::now() + Duration::from_secs(2);
        without_rank_2(&[7; MAX_RECORD_BYTES], deadline, |_| {});
    }

    #[test]
    fn a_record_that_does_not_fit_is_refused_before_memory_is_set_aside() {
        let (hub, mut stream) = hub_and_stream();
        let mut bytes = record();
        bytes[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        stream.write_all(&bytes).unwrap();
        let error = hub.all_gather(STEP, &[2; 8], soon()).unwrap_err();
        let Error::Exchange(fault) = error else {
            panic!("{error}")
        };
        let cause = Cause::Size {
            expected: 8,
            actual: u32::MAX.into(),
        };
        assert_eq!(fault, Fault::new(STEP, 1, cause));
        // The rank at fault is told like the others.
        stream
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        let mut told = Vec::new();
        stream.read_to_end(&mut told).unwrap();
        assert_eq!(Fault::decode(&told[frame::HEADER_BYTES..]), Some(fault));
    }

    proptest! {
        #[test]
        fn no_bytes_of_a_leaf_make_rank_0_panic_or_wait(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..100),
            genuine in 0..=record().len(),
        ) {
            let (hub, mut stream) = hub_and_stream();
            bytes.splice(..0, record()[..genuine].iter().copied());
            stream.write_all(&bytes).unwrap();
            drop(stream);
            let begun = Instant::now();
            let outcome = hub.all_gather(STEP, &RECORD, soon());
            prop_assert!(begun.elapsed() < Duration::from_secs(2));
            if let Ok(records) = outcome {
                // Only a whole record can pass, whatever it says.
                prop_assert_eq!(records.len(), 2);
                prop_assert_eq!(&records[0][..], RECORD);
                prop_assert_eq!(records[1].len(), RECORD.len());
            }
        }

        #[test]
        fn no_bytes_of_rank_0_make_a_leaf_panic_or_wait(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..100),
            genuine in 0..16_usize,
        ) {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let leaf = Star::leaf(1, 2, Link::new(ours.into()));
            bytes.splice(..0, frame::abort(0, 0, &Fault::new(STEP, 1, Cause::Foreign))
                .into_iter()
                .take(genuine * 8));
            theirs.write_all(&bytes).unwrap();
            drop(theirs);
            let begun = Instant::now();
            prop_assert!(leaf.all_gather(STEP, &RECORD, soon()).is_err());
            prop_assert!(begun.elapsed() < Duration::from_secs(2));
        }
    }
}
