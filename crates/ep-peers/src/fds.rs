//! Descriptors from every rank to its peers on the same host, by `SCM_RIGHTS`.
//!
//! Works over any [`Exchange`] whose members share a network namespace with the peers they pass
//! descriptors to, threads of one process included. Each rank listens at an abstract socket of
//! random name, publishes the name and a secret by an all-gather, and sends its descriptor to every
//! peer's socket together with that peer's secret. A second all-gather says what was sent: by then
//! it lies in the receiver's queue, so receiving waits for nothing, and a peer that could not send
//! is known with the reason.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix,
};
use rustix::rand::GetRandomFlags;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::exchange::unix::{accept, connect, stream_socket};
use crate::exchange::{Exchange, Step};
use crate::{Error, Result};

/// Why a peer's descriptor is not here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum DescriptorError {
    /// The rank is this one, or not one to exchange descriptors with.
    #[error("no descriptor is exchanged with this rank")]
    NotPeer,
    /// The peer has none to give.
    #[error("the peer has no descriptor to give")]
    NotOffered,
    /// The peer could not send it.
    #[error(
        "the peer could not send its descriptor (system error {errno}); check that both processes \
         share a network namespace, and their descriptor limits"
    )]
    NotSent {
        /// The system's error number on the peer.
        errno: i32,
    },
    /// This process could not take it.
    #[error(
        "this process could not take the peer's descriptor (system error {errno}); check its \
         descriptor limit"
    )]
    NotReceived {
        /// The system's error number here.
        errno: i32,
    },
}

/// Gives `descriptor` to every rank marked in `peers`, and takes theirs.
///
/// A collective of two steps: every rank of the exchange calls it, with or without a descriptor. Of
/// two ranks, each marks the other or neither does. The result is by rank; what fails between two
/// ranks is told there and leaves the others alone.
pub fn pass_descriptors(
    exchange: &dyn Exchange,
    step: Step,
    descriptor: Option<BorrowedFd<'_>>,
    peers: &[bool],
    deadline: Instant,
) -> Result<Vec<Result<OwnedFd, DescriptorError>>> {
    let listener = Listener::new(exchange.size());
    let invitation = Invitation {
        name: listener.as_ref().map_or([0; 16], |listener| listener.name),
        secret: listener
            .as_ref()
            .map_or([0; 16], |listener| listener.secret),
        errno: U32::new(listener.as_ref().err().map_or(0, |errno| number(*errno))),
        offers: U32::new(descriptor.is_some().into()),
    };
    let invitations = exchange
        .all_gather(step, invitation.as_bytes(), deadline)?
        .iter()
        .zip(0..)
        .map(|(bytes, rank)| read::<Invitation>(bytes, rank))
        .collect::<Result<Vec<_>>>()?;

    let is_peer = |rank: u32| rank != exchange.rank() && peers.get(rank as usize) == Some(&true);
    let mut sent = Vec::new();
    for (rank, invitation) in (0..).zip(&invitations) {
        let outcome = match descriptor {
            Some(descriptor) if is_peer(rank) => invitation
                .accepted()
                .and_then(|()| send(descriptor, exchange.rank(), invitation)),
            _ => Ok(()),
        };
        sent.push(U32::new(outcome.map_or_else(number, |()| 0)));
    }
    let sent = exchange.all_gather(step, sent.as_bytes(), deadline)?;

    let mut received: Vec<_> = (0..)
        .zip(invitations.iter().zip(&sent))
        .map(|(rank, (invitation, sent))| {
            if !is_peer(rank) {
                return Err(DescriptorError::NotPeer);
            }
            if invitation.offers.get() == 0 {
                return Err(DescriptorError::NotOffered);
            }
            let own = exchange.rank() as usize * size_of::<U32>();
            let word = sent.get(own..own + size_of::<U32>()).unwrap_or_default();
            match i32::try_from(read::<U32>(word, rank).map_or(0, U32::get)) {
                // Until it is found in the queue.
                Ok(0) => Err(DescriptorError::NotReceived {
                    errno: Errno::NOMSG.raw_os_error(),
                }),
                errno => Err(DescriptorError::NotSent {
                    errno: errno.unwrap_or(i32::MAX),
                }),
            }
        })
        .collect();
    if let Ok(listener) = listener {
        listener.receive(&mut received);
    }
    Ok(received)
}

/// Where a rank takes descriptors, as it travels.
#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
struct Invitation {
    name: [u8; 16],
    secret: [u8; 16],
    /// Why the rank cannot take any; 0 if it can.
    errno: U32,
    /// Whether it has one to give.
    offers: U32,
}

impl Invitation {
    fn accepted(&self) -> Result<(), Errno> {
        match self.errno.get() {
            0 => Ok(()),
            errno => Err(Errno::from_raw_os_error(
                i32::try_from(errno).unwrap_or(i32::MAX),
            )),
        }
    }
}

/// What a descriptor comes with.
#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
struct Letter {
    secret: [u8; 16],
    from: U32,
}

struct Listener {
    socket: OwnedFd,
    name: [u8; 16],
    secret: [u8; 16],
}

impl Listener {
    fn new(size: u32) -> Result<Self, Errno> {
        let listener = Self {
            socket: stream_socket()?,
            name: random()?,
            secret: random()?,
        };
        let address = SocketAddrUnix::new_abstract_name(&listener.name)?;
        rustix::net::bind(&listener.socket, &address)?;
        let backlog = i32::try_from(size).unwrap_or(i32::MAX);
        rustix::net::listen(&listener.socket, backlog)?;
        Ok(listener)
    }

    /// Takes every descriptor that waits in the queue. What does not know the secret, or comes from
    /// a rank that nothing is expected from, is closed.
    fn receive(&self, received: &mut [Result<OwnedFd, DescriptorError>]) {
        loop {
            let connection = match accept(&self.socket) {
                Ok(Some(connection)) => connection,
                Ok(None) => return,
                Err(errno) => {
                    let errno = errno.raw_os_error();
                    for slot in received {
                        if matches!(slot, Err(DescriptorError::NotReceived { .. })) {
                            *slot = Err(DescriptorError::NotReceived { errno });
                        }
                    }
                    return;
                }
            };
            let Some((letter, descriptor)) = take(&connection) else {
                continue;
            };
            let slot = received.get_mut(letter.from.get() as usize);
            if let Some(slot @ Err(DescriptorError::NotReceived { .. })) = slot
                && letter.secret == self.secret
            {
                *slot = descriptor.map_err(|errno| DescriptorError::NotReceived {
                    errno: errno.raw_os_error(),
                });
            }
        }
    }
}

fn send(descriptor: BorrowedFd<'_>, from: u32, to: &Invitation) -> Result<(), Errno> {
    let letter = Letter {
        secret: to.secret,
        from: from.into(),
    };
    let connection = connect(&SocketAddrUnix::new_abstract_name(&to.name)?)?;
    let descriptors = [descriptor];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(Errno::NOBUFS);
    }
    let bytes = letter.as_bytes();
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let taken = rustix::net::sendmsg(&connection, &[IoSlice::new(bytes)], &mut control, flags)?;
    if taken == bytes.len() {
        Ok(())
    } else {
        Err(Errno::NOBUFS)
    }
}

/// The letter in a connection's queue, with its descriptor if that could be taken. `None` if there
/// is no whole letter.
fn take(connection: &OwnedFd) -> Option<(Letter, Result<OwnedFd, Errno>)> {
    let mut bytes = [0; size_of::<Letter>()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = rustix::net::recvmsg(
        connection.as_fd(),
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
    )
    .ok()?;
    if message.bytes != bytes.len() {
        return None;
    }
    let descriptor = control
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        })
        .ok_or(if message.flags.contains(ReturnFlags::CTRUNC) {
            Errno::MFILE
        } else {
            Errno::NOMSG
        });
    Some((zerocopy::transmute!(bytes), descriptor))
}

fn read<T: FromBytes>(bytes: &[u8], rank: u32) -> Result<T> {
    T::read_from_bytes(bytes).map_err(|_| Error::Record {
        rank,
        source: crate::wire::RecordError::Length {
            actual: bytes.len(),
        },
    })
}

fn random() -> Result<[u8; 16], Errno> {
    let mut bytes = [0; 16];
    // Requests of up to 256 bytes are never cut short.
    rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(bytes)
}

fn number(errno: Errno) -> u32 {
    errno.raw_os_error().unsigned_abs()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use super::*;

    const EXPECTED: DescriptorError = DescriptorError::NotReceived { errno: 42 };

    fn memory(content: &str) -> OwnedFd {
        let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::io::pwrite(&file, content.as_bytes(), 0).unwrap();
        file
    }

    fn content(descriptor: &mut Result<OwnedFd, DescriptorError>) -> String {
        let descriptor = std::mem::replace(descriptor, Err(EXPECTED)).unwrap();
        let mut content = String::new();
        File::from(descriptor).read_to_string(&mut content).unwrap();
        content
    }

    fn invitation(listener: &Listener) -> Invitation {
        Invitation {
            name: listener.name,
            secret: listener.secret,
            errno: U32::ZERO,
            offers: U32::ZERO,
        }
    }

    #[test]
    fn only_letters_that_are_expected_are_taken() {
        let listener = Listener::new(4).unwrap();
        let good = invitation(&listener);
        let forged = Invitation {
            secret: [0; 16],
            ..invitation(&listener)
        };
        let file = memory("mine");
        send(file.as_fd(), 1, &forged).unwrap();
        send(file.as_fd(), 9, &good).unwrap();
        send(file.as_fd(), 2, &good).unwrap();
        send(memory("first").as_fd(), 1, &good).unwrap();
        send(memory("second").as_fd(), 1, &good).unwrap();

        let mut received: Vec<_> = (0..4).map(|_| Err(EXPECTED)).collect();
        received[2] = Err(DescriptorError::NotOffered);
        listener.receive(&mut received);
        assert_eq!(content(&mut received[1]), "first");
        assert_eq!(
            received[2].as_ref().unwrap_err(),
            &DescriptorError::NotOffered
        );
        assert_eq!(received[3].as_ref().unwrap_err(), &EXPECTED);
    }

    #[test]
    fn strangers_do_not_hold_the_queue_up() {
        let listener = Listener::new(8).unwrap();
        let address = SocketAddrUnix::new_abstract_name(&listener.name).unwrap();
        let _silent = connect(&address).unwrap();
        let short = connect(&address).unwrap();
        rustix::io::write(&short, &[1, 2, 3]).unwrap();
        drop(connect(&address).unwrap());
        let without = connect(&address).unwrap();
        let letter = Letter {
            secret: listener.secret,
            from: 2.into(),
        };
        rustix::io::write(&without, letter.as_bytes()).unwrap();
        send(memory("found").as_fd(), 1, &invitation(&listener)).unwrap();

        let mut received: Vec<_> = (0..3).map(|_| Err(EXPECTED)).collect();
        listener.receive(&mut received);
        assert_eq!(content(&mut received[1]), "found");
        let errno = Errno::NOMSG.raw_os_error();
        let without = &DescriptorError::NotReceived { errno };
        assert_eq!(received[2].as_ref().unwrap_err(), without);
    }

    #[test]
    fn names_and_secrets_are_never_the_same() {
        let [one, other] = [(); 2].map(|()| Listener::new(1).unwrap());
        assert_ne!(one.name, other.name);
        assert_ne!(one.secret, other.secret);
        assert_ne!(one.name, one.secret);
    }
}
