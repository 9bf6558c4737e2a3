//! How the ranks of a group talk to each other while setting up and tearing down.

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ep_peers::exchange::local::local;
use ep_peers::exchange::tcp::{Tcp, TcpAddress};
use ep_peers::exchange::unix::{Unix, UnixAddress};
use ep_peers::exchange::{Exchange, RunToken, Step};

use crate::session::due_in;
use crate::{Error, Launch, env};

/// One rank's membership in a group. Cheap to clone; the clones are one rank.
///
/// A group serves any number of buffers, built and closed in the same order on every rank. It
/// carries set-up and tear-down only: dispatch and combine never use it. When a rank drops its last
/// clone, or dies, later steps of the others fail at once with an error that names it.
#[derive(Clone, Debug)]
pub struct Communicator {
    exchange: Arc<dyn Exchange>,
}

impl Communicator {
    /// A group of `size` threads of this process. Give each thread its own; they come by rank.
    ///
    /// ```
    /// let ranks = ep::Communicator::threads(4);
    /// assert_eq!(ranks[3].rank(), 3);
    /// assert_eq!(ranks[3].size(), 4);
    /// ```
    pub fn threads(size: u32) -> Vec<Self> {
        local(size).into_iter().map(Self::new).collect()
    }

    /// Meets processes of this host at a Unix socket: at a path, or, if it begins with `@`, at a
    /// name in the network namespace's list of abstract sockets. Returns when all `size` ranks are
    /// there.
    pub fn unix(
        path: impl Into<PathBuf>,
        rank: u32,
        size: u32,
        deadline: Duration,
    ) -> Result<Self, Error> {
        let path = path.into();
        let address = match path.as_os_str().as_encoded_bytes() {
            [b'@', name @ ..] => UnixAddress::Abstract(name.to_vec()),
            _ => UnixAddress::Path(path),
        };
        Unix::connect(&address, rank, size, RunToken::default(), due_in(deadline))
            .map(Self::new)
            .map_err(|source| Error::Group { rank, source })
    }

    /// Meets processes of any hosts at a TCP port of rank 0's host. Returns when all `size` ranks
    /// are there.
    pub fn tcp(
        host: impl Into<String>,
        port: u16,
        rank: u32,
        size: u32,
        deadline: Duration,
    ) -> Result<Self, Error> {
        let host = host.into();
        Self::tcp_at(
            &TcpAddress { host, port },
            rank,
            size,
            RunToken::default(),
            deadline,
        )
    }

    /// Meets the other ranks as rank 0 at a listener that exists already: at a port that the system
    /// chose, and that the others were told of.
    pub fn tcp_listener(
        listener: TcpListener,
        size: u32,
        deadline: Duration,
    ) -> Result<Self, Error> {
        Tcp::host(listener, size, RunToken::default(), due_in(deadline))
            .map(Self::new)
            .map_err(|source| Error::Group { rank: 0, source })
    }

    /// Meets the ranks of a launcher, over TCP: see [`env`](crate::env) for the variables.
    pub fn from_env() -> Result<Self, Error> {
        Self::from_launch(&Launch::from_env()?)
    }

    /// Meets the ranks of a launcher, over TCP.
    pub fn from_launch(launch: &Launch) -> Result<Self, Error> {
        let deadline = env::deadline()?;
        if let (1, 0) = (launch.world_size, launch.rank)
            && let Some(alone) = Self::threads(1).pop()
        {
            return Ok(alone);
        }
        let address = TcpAddress {
            host: launch.master_addr.clone(),
            port: launch.master_port,
        };
        Self::tcp_at(
            &address,
            launch.rank,
            launch.world_size,
            launch.run,
            deadline,
        )
    }

    /// This rank.
    pub fn rank(&self) -> u32 {
        self.exchange.rank()
    }

    /// Ranks in the group.
    pub fn size(&self) -> u32 {
        self.exchange.size()
    }

    /// Gives every rank's record to every rank, by rank; all of one size, at most 1 MiB. For what
    /// the caller's ranks have to agree on, such as timings.
    ///
    /// A rank that does not arrive within the deadline breaks the group for good: every later step
    /// fails with that same error, also those of a [`Buffer`](crate::Buffer) on it, which can then
    /// not be closed in order. So this is not for seeing who is alive.
    ///
    /// ```
    /// use std::time::{Duration, Instant};
    /// # let alone = ep::Communicator::threads(1).remove(0);
    /// let records = alone.all_gather(b"hello", Duration::from_secs(1))?;
    /// assert_eq!(records, [b"hello"]);
    /// # Ok::<(), ep::Error>(())
    /// ```
    pub fn all_gather(&self, record: &[u8], deadline: Duration) -> Result<Vec<Vec<u8>>, Error> {
        self.gather(Step::new("all_gather"), record, due_in(deadline))
    }

    /// Returns when every rank has arrived. One that does not breaks the group, as in
    /// [`all_gather`](Self::all_gather).
    pub fn barrier(&self, deadline: Duration) -> Result<(), Error> {
        self.all_gather(&[], deadline).map(drop)
    }

    pub(crate) fn exchange(&self) -> &dyn Exchange {
        &*self.exchange
    }

    pub(crate) fn gather(
        &self,
        step: Step,
        record: &[u8],
        deadline: Instant,
    ) -> Result<Vec<Vec<u8>>, Error> {
        self.exchange
            .all_gather(step, record, deadline)
            .map_err(|source| Error::Group {
                rank: self.rank(),
                source,
            })
    }

    fn new(exchange: impl Exchange + 'static) -> Self {
        Self {
            exchange: Arc::new(exchange),
        }
    }

    fn tcp_at(
        address: &TcpAddress,
        rank: u32,
        size: u32,
        run: RunToken,
        deadline: Duration,
    ) -> Result<Self, Error> {
        Tcp::connect(address, rank, size, run, due_in(deadline))
            .map(Self::new)
            .map_err(|source| Error::Group { rank, source })
    }
}
