//! The environment: the only place of the stack that reads it.
//!
//! | variable | meaning |
//! |---|---|
//! | `RANK`, `WORLD_SIZE` | this process's rank and the number of ranks |
//! | `LOCAL_RANK` | this process's number on its host |
//! | `MASTER_ADDR`, `MASTER_PORT` | where rank 0 listens |
//! | `EP_PORT` | takes the place of `MASTER_PORT`, where the launcher itself listens on that |
//! | `EP_RUN_ID` | tells runs at one address apart |
//! | `EP_ALLOC` | `auto`, `fabric`, `posix-fd` or `malloc` |
//! | `MC_USE_NVLINK_IPC` | anything but `0` means malloc, unless `EP_ALLOC` is set |
//! | `EP_TIMEOUT_MS` | bound on the waits of an operation, 10000 unless set |
//! | `EP_DEADLINE_MS` | bound on each step of setting up and tearing down, 60000 unless set |

use std::env::{self, VarError};
use std::str::FromStr;
use std::time::Duration;

use ep_alloc::Choice;
use ep_peers::exchange::RunToken;
use ep_sys::{DeviceOrdinal, Driver};

use crate::Error;

const RANK: &str = "RANK";
const WORLD_SIZE: &str = "WORLD_SIZE";
const LOCAL_RANK: &str = "LOCAL_RANK";
const MASTER_ADDR: &str = "MASTER_ADDR";
const MASTER_PORT: &str = "MASTER_PORT";
const EP_PORT: &str = "EP_PORT";
const EP_RUN_ID: &str = "EP_RUN_ID";
const EP_ALLOC: &str = "EP_ALLOC";
const MC_USE_NVLINK_IPC: &str = "MC_USE_NVLINK_IPC";
const EP_TIMEOUT_MS: &str = "EP_TIMEOUT_MS";
const EP_DEADLINE_MS: &str = "EP_DEADLINE_MS";

/// What a launcher such as `torchrun` tells a process.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Launch {
    /// This process's rank.
    pub rank: u32,
    /// Number of ranks.
    pub world_size: u32,
    /// This process's number on its host, where the launcher tells.
    pub local_rank: Option<u32>,
    /// Name or address of rank 0's host.
    pub master_addr: String,
    /// Port on it.
    pub master_port: u16,
    pub(crate) run: RunToken,
}

impl Launch {
    /// Reads the environment.
    pub fn from_env() -> Result<Self, Error> {
        let rank = required(RANK, "this process's rank, a number below WORLD_SIZE")?;
        let world_size = required(WORLD_SIZE, "the number of ranks")?;
        let alone = world_size == 1;
        let master_addr = match value(MASTER_ADDR, "the name of rank 0's host")? {
            Some(addr) => addr,
            None if alone => String::from("127.0.0.1"),
            None => {
                return Err(Error::Environment {
                    variable: MASTER_ADDR,
                    value: None,
                    expected: "the name of rank 0's host",
                });
            }
        };
        let expected = "a free port on rank 0's host";
        let (variable, master_port) = match optional(EP_PORT, expected)? {
            Some(port) => (EP_PORT, port),
            None if alone => (MASTER_PORT, optional(MASTER_PORT, expected)?.unwrap_or(0)),
            None => (MASTER_PORT, required(MASTER_PORT, expected)?),
        };
        // The system would choose one that the other ranks do not know.
        if master_port == 0 && !alone {
            return Err(Error::Environment {
                variable,
                value: Some(String::from("0")),
                expected,
            });
        }
        Ok(Self {
            rank,
            world_size,
            local_rank: optional(LOCAL_RANK, "this process's number on its host")?,
            master_addr,
            master_port,
            run: value(EP_RUN_ID, "a text")?
                .map_or_else(RunToken::default, |name| RunToken::from_name(&name)),
        })
    }

    /// The device of this process: the only one, where it sees only one; else number `LOCAL_RANK`,
    /// or `RANK` without that.
    pub fn device(&self, driver: &dyn Driver) -> Result<DeviceOrdinal, Error> {
        let count = driver
            .device_count()
            .map_err(|e| Error::driver("counting devices")(e).of_rank(self.rank))?;
        let ordinal = match count {
            1 => 0,
            _ => self.local_rank.unwrap_or(self.rank),
        };
        Ok(DeviceOrdinal(ordinal))
    }
}

pub(crate) fn choice() -> Result<Choice, Error> {
    let expected = "auto, fabric, posix-fd or malloc";
    let ep_alloc = value(EP_ALLOC, expected)?;
    let mooncake = value(MC_USE_NVLINK_IPC, "0 or 1")?;
    Ok(Choice::from_values(
        ep_alloc.as_deref(),
        mooncake.as_deref(),
    )?)
}

/// Bound on the waits of an operation, unless set.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Bound on each step of setting up and tearing down, unless set.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) fn timeout() -> Result<Duration, Error> {
    milliseconds(EP_TIMEOUT_MS, TIMEOUT)
}

pub(crate) fn deadline() -> Result<Duration, Error> {
    milliseconds(EP_DEADLINE_MS, DEADLINE)
}

/// A bound that a caller gave, and without it the environment's. Zero is refused in either.
pub(crate) fn bound(
    rank: u32,
    bound: &'static str,
    given: Option<Duration>,
    default: fn() -> Result<Duration, Error>,
) -> Result<Duration, Error> {
    match given {
        Some(Duration::ZERO) => Err(Error::ZeroBound { rank, bound }),
        Some(duration) => Ok(duration),
        None => default(),
    }
}

fn milliseconds(variable: &'static str, default: Duration) -> Result<Duration, Error> {
    let expected = "a number of milliseconds above 0";
    match optional::<u64>(variable, expected)? {
        None => Ok(default),
        Some(0) => Err(Error::Environment {
            variable,
            value: Some(String::from("0")),
            expected,
        }),
        Some(ms) => Ok(Duration::from_millis(ms)),
    }
}

fn required<T: FromStr>(variable: &'static str, expected: &'static str) -> Result<T, Error> {
    optional(variable, expected)?.ok_or(Error::Environment {
        variable,
        value: None,
        expected,
    })
}

fn optional<T: FromStr>(
    variable: &'static str,
    expected: &'static str,
) -> Result<Option<T>, Error> {
    let Some(value) = value(variable, expected)? else {
        return Ok(None);
    };
    match value.parse() {
        Ok(parsed) => Ok(Some(parsed)),
        Err(_) => Err(Error::Environment {
            variable,
            value: Some(value),
            expected,
        }),
    }
}

fn value(variable: &'static str, expected: &'static str) -> Result<Option<String>, Error> {
    match env::var(variable) {
        Ok(value) => Ok(Some(value)),
        Err(VarError::NotPresent) => Ok(None),
        Err(VarError::NotUnicode(value)) => Err(Error::Environment {
            variable,
            value: Some(value.to_string_lossy().into_owned()),
            expected,
        }),
    }
}
