//! Ranks find each other, exchange handles, and end with one table of peer pointers.
//!
//! The crate has one idea: a rank's view of its peers is a device-resident table of addresses, and
//! **an entry is non-null exactly when the peer is reachable in both directions**. Nothing else says
//! whether a peer is reachable.
//!
//! - [`exchange`]: collectives with deadlines among threads, processes and hosts;
//! - [`wire`]: the record in which a rank tells of its memory, the only byte layout here that
//!   callers meet;
//! - [`connect()`]: offers, imports, agrees and writes the table; gives [`Peers`], which takes it all
//!   back in order.
//!
//! It must not know how memory was chosen: it is given an [`Export`] and follows it.
//!
//! A failure of one rank's driver is data in its record, so every rank takes every step; who cannot
//! be reached has a [`Reason`]. A failure of a rank to take part is an [`Error`] on every other, by
//! the deadline, that names it.

#![forbid(unsafe_code)]

mod connect;
mod error;
pub mod exchange;
mod fds;
mod group;
mod import;
mod table;
mod topology;
pub mod wire;

pub use connect::{Export, Offer, Peers, Unreachable, connect};
pub use error::{Error, Result};
pub use fds::{DescriptorError, pass_descriptors};
pub use group::Group;
pub use import::{Access, NvlinkCheck, Reason};
pub use topology::{Nearness, Topology, process_token};

/// FNV-1a, 64 bits. Every step is invertible, so any change of one byte changes the sum.
fn fnv1a64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, &byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
