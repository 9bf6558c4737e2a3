//! Processes of one host, over a Unix socket.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::thread;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::rendezvous::{self, Listener, RETRY};
use super::star::Star;
use super::{Exchange, RunToken, Step};
use crate::{Error, Result};

/// Where the ranks of one host meet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum UnixAddress {
    /// A socket file. Rank 0 makes it, takes the place of one that nobody listens on any more, and
    /// removes it once all ranks have met.
    Path(PathBuf),
    /// A name in the network namespace's list of abstract sockets; leaves no file.
    Abstract(Vec<u8>),
}

impl UnixAddress {
    fn socket_address(&self) -> Result<SocketAddrUnix, Errno> {
        match self {
            Self::Path(path) => SocketAddrUnix::new(path.as_path()),
            Self::Abstract(name) => SocketAddrUnix::new_abstract_name(name),
        }
    }

    fn error(&self, action: &'static str, errno: Errno) -> Error {
        Error::Address {
            action,
            address: self.to_string(),
            source: errno.into(),
        }
    }
}

impl fmt::Display for UnixAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "unix:{}", path.display()),
            Self::Abstract(name) => write!(f, "unix:@{}", name.escape_ascii()),
        }
    }
}

/// Processes (or threads) of one host that met at a Unix socket.
#[derive(Debug)]
pub struct Unix(Star);

impl Unix {
    /// Meets the other ranks: rank 0 listens at `address`, the others connect, retrying until the
    /// deadline. Returns when all `size` ranks are there.
    pub fn connect(
        address: &UnixAddress,
        rank: u32,
        size: u32,
        token: RunToken,
        deadline: Instant,
    ) -> Result<Self> {
        Error::check_rank(rank, size)?;
        if rank == 0 {
            let listener = Bound::new(address, size)?;
            let links = rendezvous::host(&listener, size, token, deadline)?;
            return Ok(Self(Star::hub(links)));
        }
        let remote = address
            .socket_address()
            .map_err(|errno| address.error("use", errno))?;
        let started = Instant::now();
        loop {
            let refusal = match connect(&remote) {
                Ok(socket) => match rendezvous::join(socket, rank, size, token, deadline)? {
                    Some(link) => return Ok(Self(Star::leaf(rank, size, link))),
                    None => None,
                },
                Err(errno) => Some(io::Error::from(errno)),
            };
            if Instant::now() + RETRY >= deadline {
                return Err(Error::Unreachable {
                    address: address.to_string(),
                    waited: started.elapsed(),
                    source: refusal,
                });
            }
            thread::sleep(RETRY);
        }
    }
}

impl Exchange for Unix {
    fn rank(&self) -> u32 {
        self.0.rank()
    }

    fn size(&self) -> u32 {
        self.0.size()
    }

    fn all_gather(&self, step: Step, record: &[u8], deadline: Instant) -> Result<Vec<Vec<u8>>> {
        self.0.all_gather(step, record, deadline)
    }
}

/// A listening socket and, for a path, the file that goes with it.
struct Bound<'a> {
    socket: OwnedFd,
    address: &'a UnixAddress,
}

impl<'a> Bound<'a> {
    fn new(address: &'a UnixAddress, size: u32) -> Result<Self> {
        let local = address
            .socket_address()
            .map_err(|errno| address.error("use", errno))?;
        let socket = stream_socket().map_err(|errno| address.error("listen at", errno))?;
        let mut bound = rustix::net::bind(&socket, &local);
        if let (Err(Errno::ADDRINUSE), UnixAddress::Path(path)) = (bound, address) {
            // A crashed run leaves its file behind; nobody answers there.
            if matches!(connect(&local), Err(Errno::CONNREFUSED)) {
                bound = rustix::fs::unlink(path).and_then(|()| rustix::net::bind(&socket, &local));
            }
        }
        bound.map_err(|errno| address.error("listen at", errno))?;
        let bound = Self { socket, address };
        let backlog = i32::try_from(size).unwrap_or(i32::MAX);
        rustix::net::listen(&bound.socket, backlog)
            .map_err(|errno| address.error("listen at", errno))?;
        Ok(bound)
    }
}

impl Listener for Bound<'_> {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn accept(&self) -> io::Result<Option<OwnedFd>> {
        accept(&self.socket).map_err(Into::into)
    }

    fn address(&self) -> String {
        self.address.to_string()
    }
}

impl Drop for Bound<'_> {
    fn drop(&mut self) {
        if let UnixAddress::Path(path) = self.address
            && let Err(errno) = rustix::fs::unlink(path)
        {
            tracing::error!(%errno, path = %path.display(), "cannot remove the rendezvous socket");
        }
    }
}

/// A stream socket that never blocks.
pub(crate) fn stream_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Connects without blocking: a listener whose queue is full answers `EAGAIN`.
pub(crate) fn connect(remote: &SocketAddrUnix) -> Result<OwnedFd, Errno> {
    let socket = stream_socket()?;
    rustix::net::connect(&socket, remote)?;
    Ok(socket)
}

/// The next connection, if one waits.
pub(crate) fn accept(listener: &OwnedFd) -> Result<Option<OwnedFd>, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    loop {
        match rustix::net::accept_with(listener, flags) {
            Ok(socket) => return Ok(Some(socket)),
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(errno) => return Err(errno),
        }
    }
}
