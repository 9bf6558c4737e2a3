//! Processes of any hosts, over TCP.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use super::rendezvous::{self, Listener, RETRY};
use super::star::Star;
use super::{Exchange, RunToken, Step};
use crate::{Error, Result};

/// Where the ranks meet: rank 0's host and port, as launchers give them in `MASTER_ADDR` and
/// `MASTER_PORT`.
///
/// A name is resolved by the system's resolver, which keeps its own time limit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TcpAddress {
    /// Name or address of rank 0's host.
    pub host: String,
    /// Port on it.
    pub port: u16,
}

impl TcpAddress {
    /// Where rank 0 listens: at the address itself if that is one of this host's, otherwise at
    /// every address. A name says little about which: hosts commonly resolve their own to loopback,
    /// where nobody else could connect.
    fn listen(&self) -> io::Result<TcpListener> {
        if self.host == "localhost" {
            return TcpListener::bind((Ipv4Addr::LOCALHOST, self.port));
        }
        if let Ok(address) = self.host.parse::<IpAddr>() {
            match TcpListener::bind((address, self.port)) {
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
                bound => return bound,
            }
        }
        match TcpListener::bind((Ipv6Addr::UNSPECIFIED, self.port)) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(error),
            Err(_) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, self.port)),
            bound => bound,
        }
    }

    fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        let mut addresses: Vec<_> = (self.host.as_str(), self.port).to_socket_addrs()?.collect();
        // Rank 0 listens at IPv4 for the names that every host gives itself.
        addresses.sort_by_key(SocketAddr::is_ipv6);
        Ok(addresses)
    }
}

impl fmt::Display for TcpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// Processes of any hosts that met at a TCP port of rank 0.
#[derive(Debug)]
pub struct Tcp(Star);

impl Tcp {
    /// Meets the other ranks: rank 0 listens at `address`, the others connect, retrying until the
    /// deadline. Returns when all `size` ranks are there.
    pub fn connect(
        address: &TcpAddress,
        rank: u32,
        size: u32,
        token: RunToken,
        deadline: Instant,
    ) -> Result<Self> {
        Error::check_rank(rank, size)?;
        if rank == 0 {
            let bound = address.listen().map_err(|source| Error::Address {
                action: "listen at",
                address: address.to_string(),
                source,
            })?;
            return Self::host(bound, size, token, deadline);
        }
        let started = Instant::now();
        loop {
            let refusal = match connect(address, deadline) {
                Ok(socket) => match rendezvous::join(socket, rank, size, token, deadline)? {
                    Some(link) => return Ok(Self(Star::leaf(rank, size, link))),
                    None => None,
                },
                Err(error) => Some(error),
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

    /// Meets the other ranks as rank 0, at a listener that exists already: a port that the system
    /// chose, and that the others were told of.
    pub fn host(
        listener: TcpListener,
        size: u32,
        token: RunToken,
        deadline: Instant,
    ) -> Result<Self> {
        Error::check_rank(0, size)?;
        let address = match listener.local_addr() {
            Ok(address) => address.to_string(),
            Err(_) => String::from("its listener"),
        };
        if let Err(source) = listener.set_nonblocking(true) {
            return Err(Error::Address {
                action: "listen at",
                address,
                source,
            });
        }
        let links = rendezvous::host(&Bound { listener, address }, size, token, deadline)?;
        Ok(Self(Star::hub(links)))
    }
}

impl Exchange for Tcp {
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

struct Bound {
    listener: TcpListener,
    address: String,
}

impl Listener for Bound {
    fn fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    fn accept(&self) -> io::Result<Option<OwnedFd>> {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nodelay(true)?;
                    return Ok(Some(stream.into()));
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ => return Err(error),
                },
            }
        }
    }

    fn address(&self) -> String {
        self.address.clone()
    }
}

/// One attempt to reach rank 0, at each of its addresses.
fn connect(address: &TcpAddress, deadline: Instant) -> io::Result<OwnedFd> {
    /// A host that drops packets is given up for the next attempt: it may have come up since.
    const ATTEMPT: Duration = Duration::from_secs(2);

    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for remote in address.resolve()? {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match TcpStream::connect_timeout(&remote, left.min(ATTEMPT)) {
            // While nobody listens at a port of this host's ephemeral range, a connection to it can
            // meet itself. It is reset: ended in order it would keep rank 0 from listening there
            // for a minute.
            Ok(stream) if stream.local_addr()? == remote => {
                rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?;
                last = io::ErrorKind::ConnectionRefused.into();
            }
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream.into());
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}
