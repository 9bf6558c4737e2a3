//! How the ranks of a star meet: each introduces itself to rank 0, which answers when all are there.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::frame::{self, Header, Hello, Kind};
use super::link::{self, Link};
use super::{Cause, Fault, Step, give_up_at};
use crate::{Error, Result};

/// What tells one run from another at the same address: a rank with another token is turned away.
/// (A rank of a build whose protocol is another cannot be asked for its token. It ends the group, as
/// one of the same run would.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RunToken(pub u64);

impl RunToken {
    /// The token of a run's name, such as a launcher's job identifier.
    pub fn from_name(name: &str) -> Self {
        Self(crate::fnv1a64(name.as_bytes()))
    }
}

/// How long a rank waits between attempts to reach rank 0.
pub(super) const RETRY: Duration = Duration::from_millis(10);

/// Connections that may stand before they have introduced themselves, beyond one a rank.
const STRANGERS: usize = 64;

/// What rank 0 listens on.
pub(super) trait Listener {
    fn fd(&self) -> BorrowedFd<'_>;
    /// The next connection, if one waits.
    fn accept(&self) -> io::Result<Option<OwnedFd>>;
    fn address(&self) -> String;
}

/// Rank 0: gathers ranks 1 to `size - 1`. The links come back by rank.
///
/// If the group cannot be, rank 0 stays until every rank has been told why, or its time is up.
pub(super) fn host(
    listener: &dyn Listener,
    size: u32,
    token: RunToken,
    deadline: Instant,
) -> Result<Vec<Link>> {
    let mut host = Host {
        size,
        token,
        seats: (1..size).map(|_| Seat::Empty).collect(),
        strangers: Vec::new(),
        due: give_up_at(Instant::now(), deadline),
        fault: None,
    };
    if let Err(error) = host.gather(listener) {
        host.give_up(fault(0, Cause::Lost { errno: None }));
        return Err(error);
    }
    host.welcome();
    match host.fault {
        Some(fault) => Err(fault.into()),
        None => Ok(host.seats.into_iter().filter_map(Seat::link).collect()),
    }
}

/// Another rank: introduces itself over a fresh connection and waits for the group.
///
/// `Ok(None)` means that the connection ended without a word, as it does when something other than
/// this run's rank 0 still held the address: worth another attempt.
pub(super) fn join(
    socket: OwnedFd,
    rank: u32,
    size: u32,
    token: RunToken,
    deadline: Instant,
) -> Result<Option<Link>> {
    let hello = Hello {
        token: token.0.into(),
        size: size.into(),
    };
    let header = Header {
        kind: Kind::Hello,
        rank,
        sequence: 0,
        step: Step::RENDEZVOUS,
        left: deadline.saturating_duration_since(Instant::now()),
        length: u32::try_from(hello.as_bytes().len()).unwrap_or(u32::MAX),
    };
    let bytes = [header.encode().as_slice(), hello.as_bytes()].concat();
    let admit = |header: &Header| match header.kind {
        Kind::Welcome if header.length == 0 => Ok(()),
        Kind::Abort if header.length as usize <= Fault::max_bytes(size) => Ok(()),
        _ => Err(Cause::Foreign),
    };
    let started = Instant::now();
    let mut link = Link::new(socket);
    let mut sent = 0;
    loop {
        match link.receive(admit) {
            Ok(Some((header, _))) if header.kind == Kind::Welcome => return Ok(Some(link)),
            Ok(Some((_, payload))) => {
                return Err(link::told(&payload, || fault(0, Cause::Foreign)).into());
            }
            Ok(None) => {}
            Err(Cause::Lost { .. }) => return Ok(None),
            Err(cause) => return Err(fault(0, cause).into()),
        }
        if link.send(&bytes, &mut sent).is_err() {
            return Ok(None);
        }
        if Instant::now() >= deadline {
            let waited = started.elapsed();
            return Err(fault(0, Cause::Missing { waited }).into());
        }
        // The greeting is smaller than any socket's buffer, so only an answer is waited for.
        wait(&mut [PollFd::new(&link, PollFlags::IN)], rank, deadline)?;
    }
}

struct Host {
    size: u32,
    token: RunToken,
    /// Of ranks 1, 2, ….
    seats: Vec<Seat>,
    /// Connections that have not introduced themselves yet.
    strangers: Vec<Link>,
    /// When to give up.
    due: Instant,
    /// Why there will be no group.
    fault: Option<Fault>,
}

#[derive(Debug)]
enum Seat {
    /// The rank has not come.
    Empty,
    /// It has, and waits for the others.
    Taken(Link),
    /// It has been told that there will be no group, or is why.
    Left,
}

impl Seat {
    fn link(self) -> Option<Link> {
        match self {
            Self::Taken(link) => Some(link),
            Self::Empty | Self::Left => None,
        }
    }
}

impl Host {
    fn gather(&mut self, listener: &dyn Listener) -> Result<()> {
        let started = Instant::now();
        while self.empty().next().is_some() {
            let taken = self.seats.iter().filter_map(|seat| match seat {
                Seat::Taken(link) => Some(link),
                Seat::Empty | Seat::Left => None,
            });
            let links = taken.chain(&self.strangers);
            let mut fds = vec![PollFd::from_borrowed_fd(listener.fd(), PollFlags::IN)];
            fds.extend(links.map(|link| PollFd::new(link, PollFlags::IN)));
            wait(&mut fds, 0, self.due)?;

            self.accept(listener)?;
            self.hear_strangers();
            self.hear_seated();
            if Instant::now() >= self.due {
                if self.empty().next().is_some() {
                    self.give_up(Fault {
                        step: Step::RENDEZVOUS,
                        ranks: self.empty().collect(),
                        cause: Cause::Missing {
                            waited: started.elapsed(),
                        },
                    });
                }
                return Ok(());
            }
        }
        Ok(())
    }

    /// The ranks that have not come.
    fn empty(&self) -> impl Iterator<Item = u32> {
        (1..)
            .zip(&self.seats)
            .filter(|(_, seat)| matches!(seat, Seat::Empty))
            .map(|(rank, _)| rank)
    }

    fn accept(&mut self, listener: &dyn Listener) -> Result<()> {
        loop {
            match listener.accept() {
                Ok(Some(socket)) => {
                    if self.strangers.len() >= self.seats.len() + STRANGERS {
                        self.strangers.remove(0);
                    }
                    self.strangers.push(Link::new(socket));
                }
                Ok(None) => return Ok(()),
                Err(source) => {
                    return Err(Error::Address {
                        action: "accept connections at",
                        address: listener.address(),
                        source,
                    });
                }
            }
        }
    }

    /// Lets those in that introduce themselves well. Others are turned away, and the group goes on
    /// waiting: they may be probes, or ranks of another run. A rank of this run that does not fit
    /// means that there will be no group.
    fn hear_strangers(&mut self) {
        for mut stranger in std::mem::take(&mut self.strangers) {
            let heard = stranger.receive(|header| match header.kind {
                Kind::Hello if header.length as usize == size_of::<Hello>() => Ok(()),
                _ => Err(Cause::Foreign),
            });
            match (heard, stranger.claimed_rank()) {
                (Ok(None), _) => self.strangers.push(stranger),
                (Ok(Some((header, payload))), _) => match Hello::read_from_bytes(&payload) {
                    Ok(hello) => self.greet(stranger, &header, hello),
                    Err(_) => tracing::warn!("turned a connection away at the rendezvous"),
                },
                (Err(cause @ Cause::Version { .. }), Some(rank)) if rank < self.size => {
                    self.give_up(fault(rank, cause));
                    self.turn_away(rank, stranger);
                }
                (Err(cause), _) => {
                    tracing::warn!(?cause, "turned a connection away at the rendezvous");
                }
            }
        }
    }

    fn greet(&mut self, mut link: Link, header: &Header, hello: Hello) {
        let rank = header.rank;
        if hello.token.get() != self.token.0 {
            tracing::warn!(rank, "turned a rank of another run away at the rendezvous");
            link.finish(&frame::abort(0, 0, &fault(rank, Cause::Token)));
            return;
        }
        if hello.size.get() != self.size {
            self.give_up(fault(
                rank,
                Cause::GroupSize {
                    expected: self.size,
                    actual: hello.size.get(),
                },
            ));
        } else if !matches!(self.seat(rank), Some(Seat::Empty)) {
            self.give_up(fault(rank, Cause::Duplicate));
        }
        if self.fault.is_some() {
            self.turn_away(rank, link);
            return;
        }
        let now = Instant::now();
        if let Some(theirs) = now.checked_add(header.left) {
            self.due = self.due.min(give_up_at(now, theirs));
        }
        if let Some(seat) = self.seat(rank) {
            *seat = Seat::Taken(link);
        }
    }

    /// A rank that has a seat has nothing to say until it is welcomed: what comes is its end.
    fn hear_seated(&mut self) {
        let gone = (1..)
            .zip(&mut self.seats)
            .find_map(|(rank, seat)| match seat {
                Seat::Taken(link) => match link.receive(|_| Err(Cause::Foreign)) {
                    Ok(_) => None,
                    Err(cause) => Some((rank, cause)),
                },
                Seat::Empty | Seat::Left => None,
            });
        if let Some((rank, cause)) = gone {
            self.give_up(fault(rank, cause));
        }
    }

    fn welcome(&mut self) {
        if self.fault.is_some() {
            return;
        }
        let bytes = Header {
            kind: Kind::Welcome,
            rank: 0,
            sequence: 0,
            step: Step::RENDEZVOUS,
            left: Duration::ZERO,
            length: 0,
        }
        .encode();
        let gone = (1..)
            .zip(&mut self.seats)
            .find_map(|(rank, seat)| match seat {
                // Nothing was sent on this connection before, so its buffer takes the whole header.
                Seat::Taken(link) => link.send(&bytes, &mut 0).err().map(|cause| (rank, cause)),
                Seat::Empty | Seat::Left => None,
            });
        if let Some((rank, cause)) = gone {
            self.give_up(fault(rank, cause));
        }
    }

    /// There will be no group. Tells those that have come; the first reason stands.
    fn give_up(&mut self, found: Fault) {
        let fault = self.fault.get_or_insert(found);
        let abort = frame::abort(0, 0, fault);
        for seat in &mut self.seats {
            if let Seat::Taken(link) = seat {
                link.finish(&abort);
                *seat = Seat::Left;
            }
        }
    }

    /// Tells one that came later why there will be no group.
    fn turn_away(&mut self, rank: u32, mut link: Link) {
        if let Some(fault) = &self.fault {
            link.finish(&frame::abort(0, 0, fault));
        }
        if let Some(seat) = self.seat(rank) {
            *seat = Seat::Left;
        }
    }

    fn seat(&mut self, rank: u32) -> Option<&mut Seat> {
        self.seats.get_mut(rank.checked_sub(1)? as usize)
    }
}

fn wait(fds: &mut [PollFd<'_>], rank: u32, until: Instant) -> Result<()> {
    link::wait(fds, until).map_err(|errno: Errno| {
        let errno = Some(errno.raw_os_error());
        fault(rank, Cause::Lost { errno }).into()
    })
}

fn fault(rank: u32, cause: Cause) -> Fault {
    Fault::new(Step::RENDEZVOUS, rank, cause)
}
