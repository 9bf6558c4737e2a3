//! A simulated GPU cluster behind the driver trait of `ep-sys`.
//!
//! [`Cluster`] describes nodes and GPUs, from a preset, a file or by hand; [`SimDriver`] is the
//! driver of one process on one node of it. Device memory lives in memfds, so that real processes
//! share it: handles made in one process open in another. Calls are refused as the vendor's driver
//! refuses them, can be made to fail by number ([`FaultPlan`]), and are written down ([`Entry`]);
//! what is held is counted ([`Live`]).
//!
//! For tests, demonstrations and questions about machines that are not at hand. Nothing below `ep`
//! depends on it, and it is never a cargo feature of another crate.
//!
//! Safety story: `unsafe` lives in `memory`, which maps memory and copies it. Everything else sees
//! addresses as numbers, and every access is checked against the table of what is mapped.

mod cluster;
pub mod contract;
mod driver;
mod fault;
mod journal;
mod live;
mod memory;
mod process;
mod share;

pub use cluster::{Cluster, ClusterError, Gpu, IpcNamespace, Node, PeerAccess, Product};
pub use driver::SimDriver;
pub use fault::FaultPlan;
pub use journal::{Entry, Outcome};
pub use live::Live;
