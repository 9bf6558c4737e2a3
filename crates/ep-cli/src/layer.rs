//! The layer that is run: its shape, its routing, and its data, all functions of a seed.

pub(crate) mod job;
pub(crate) mod model;
pub(crate) mod npy;
pub(crate) mod parallel;
pub(crate) mod random;
pub(crate) mod router;

pub(crate) use self::job::{Dtype, Job, JobError, Routing};
pub(crate) use self::model::Model;
pub(crate) use self::router::Routes;
