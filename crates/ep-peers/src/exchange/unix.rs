//! Processes of one host, over a Unix socket.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use rustix::fs::{FileType, FlockOperation, Mode, OFlags};
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
    /// removes it once all ranks have met. A file that is no socket is left alone.
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
            let listener = Bound::new(address, size, deadline)?;
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
    /// The file as it was made: by now another run's may have its name.
    file: Option<FileId>,
}

impl<'a> Bound<'a> {
    fn new(address: &'a UnixAddress, size: u32, deadline: Instant) -> Result<Self> {
        let local = address
            .socket_address()
            .map_err(|errno| address.error("use", errno))?;
        Self::listen(address, &local, size, deadline)
            .map_err(|errno| address.error("listen at", errno))
    }

    fn listen(
        address: &'a UnixAddress,
        local: &SocketAddrUnix,
        size: u32,
        deadline: Instant,
    ) -> Result<Self, Errno> {
        let mut bound = Self {
            socket: stream_socket()?,
            address,
            file: None,
        };
        let backlog = i32::try_from(size).unwrap_or(i32::MAX);
        let UnixAddress::Path(path) = address else {
            rustix::net::bind(&bound.socket, local)?;
            rustix::net::listen(&bound.socket, backlog)?;
            return Ok(bound);
        };
        // Until it listens, the file of this run looks like one left behind.
        let _turn = lock_directory_of(path, deadline);
        match rustix::net::bind(&bound.socket, local) {
            Err(Errno::ADDRINUSE) if is_stale(path, local)? => {
                rustix::fs::unlink(path)?;
                rustix::net::bind(&bound.socket, local)?;
            }
            outcome => outcome?,
        }
        bound.file = Some(FileId::of(path)?);
        rustix::net::listen(&bound.socket, backlog)?;
        Ok(bound)
    }
}

/// What tells a file from another of its name.
#[derive(Debug, PartialEq, Eq)]
struct FileId(u64, u64);

impl FileId {
    fn of(path: &Path) -> Result<Self, Errno> {
        let stat = rustix::fs::lstat(path)?;
        Ok(Self(stat.st_dev, stat.st_ino))
    }
}

/// Keeps other ranks 0 from making or taking over a file beside `path` meanwhile. None where the
/// file system has no such locks, or another holds this one until the deadline.
fn lock_directory_of(path: &Path, deadline: Instant) -> Option<OwnedFd> {
    let directory = path.parent().filter(|parent| *parent != Path::new(""));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = directory.unwrap_or(Path::new("."));
    let directory = rustix::fs::open(directory, flags, Mode::empty()).ok()?;
    loop {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(directory),
            Err(Errno::WOULDBLOCK) if Instant::now() + RETRY < deadline => thread::sleep(RETRY),
            Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

/// Whether a crashed run left a socket there: nobody answers.
fn is_stale(path: &Path, remote: &SocketAddrUnix) -> Result<bool, Errno> {
    let is_socket = FileType::from_raw_mode(rustix::fs::lstat(path)?.st_mode) == FileType::Socket;
    // A file that is no socket refuses connections too.
    Ok(is_socket && matches!(connect(remote), Err(Errno::CONNREFUSED)))
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
            && self.file.is_some()
            && FileId::of(path).ok() == self.file
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Barrier;
    use std::time::Duration;

    use super::*;

    /// A path of this test's own, and its address.
    fn place(name: &str) -> (PathBuf, UnixAddress) {
        let path = std::env::temp_dir().join(format!("ep-unix-{name}-{}", std::process::id()));
        let _ = fs::remove_file(&path);
        (path.clone(), UnixAddress::Path(path))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    /// A socket file that nobody listens at.
    fn leave(address: &UnixAddress) {
        let socket = stream_socket().unwrap();
        rustix::net::bind(&socket, &address.socket_address().unwrap()).unwrap();
    }

    #[test]
    fn a_file_that_is_no_socket_stays() {
        let (path, address) = place("file");
        fs::write(&path, "kept").unwrap();
        let refused = Bound::new(&address, 2, soon());
        assert!(matches!(refused, Err(Error::Address { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "kept");
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn of_two_that_take_a_file_over_one_listens() {
        let (path, address) = place("two");
        for _ in 0..100 {
            leave(&address);
            let together = Barrier::new(2);
            let listeners = thread::scope(|scope| {
                let listen = || {
                    together.wait();
                    Bound::new(&address, 2, soon())
                };
                [(); 2]
                    .map(|()| scope.spawn(listen))
                    .map(|thread| thread.join().unwrap())
            });
            let listening = listeners.iter().filter(|bound| bound.is_ok()).count();
            assert_eq!(listening, 1);
            drop(listeners);
            assert!(!path.exists());
        }
    }

    #[test]
    fn another_runs_file_of_the_same_name_stays() {
        let (path, address) = place("other");
        let first = Bound::new(&address, 2, soon()).unwrap();
        fs::remove_file(&path).unwrap();
        let second = Bound::new(&address, 2, soon()).unwrap();
        drop(first);
        assert!(connect(&address.socket_address().unwrap()).is_ok());
        drop(second);
        assert!(!path.exists());
    }
}
