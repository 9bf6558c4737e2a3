//! Which memory a group of ranks uses, and why.
//!
//! The crate has one idea: attributes nominate, trials decide, and the group decides together from
//! the same facts. In order of use:
//!
//! 1. [`probe`] tries every backend on one device for one granule. It never fails: what the driver
//!    refused is part of the answer.
//! 2. [`RankFacts`] is that answer as plain data. Ranks exchange it; how is not known here.
//! 3. [`decide`] is a pure function from the facts of all ranks to a [`Plan`] with its [`Reason`],
//!    or to a [`PolicyError`] that names the rank, the call and what to check next. The same table
//!    gives the same plan on every rank.
//! 4. [`Allocation`] is the memory that the plan asks for, and [`Export`] what peers import.
//!
//! Only importing a peer's memory proves that two ranks can share it. When that is refused, ranks
//! share the [`ImportRefusal`]s and decide again.
//!
//! It must not know other ranks' pointers.

#![forbid(unsafe_code)]

mod allocation;
mod backend;
mod choice;
mod code;
mod error;
mod facts;
mod failure;
mod kind;
mod plan;
mod policy;
mod probe;
mod route;
mod trial;

pub use allocation::{Allocation, Export};
pub use choice::{Choice, ChoiceError};
pub use code::{call_from_code, call_to_code, fabric_state_from_code, fabric_state_to_code};
pub use error::Error;
pub use facts::RankFacts;
pub use failure::{Cause, Failure};
pub use kind::{BackendKind, PerBackend};
pub use plan::{CliqueGap, Plan, PolicyError, Reason, Refusal};
pub use policy::{ImportRefusal, decide};
pub use probe::{Probe, ProbeOptions, probe};
pub use route::{Route, route};
pub use trial::{Trial, Untried};
