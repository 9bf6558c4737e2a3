//! The seam between the job and the code under test: what one rank needs of it.

mod buffers;
#[cfg(feature = "cuda")]
mod gpu;

use ep::Communicator;
use half::bf16;

use self::buffers::Buffers;
use super::backend::Place;
use super::job::Job;
use super::model::Model;
use super::report::{Facts, Times};
use super::router::Routes;

/// One rank's connection to its group, with buffers for one job and the rank's experts.
pub(crate) trait Transport {
    /// How the ranks are connected.
    fn facts(&self) -> Facts;

    /// One pass of the layer over this rank's tokens, `[tokens, hidden]`: dispatch, experts,
    /// combine. Outputs of every step are filled with NaN first.
    fn layer(&mut self, x: &[bf16], routes: &Routes) -> Result<Vec<bf16>, Failure>;

    /// Times dispatch and combine of the last pass's tokens, `iters` times each, experts left out.
    fn time(&mut self, iters: usize) -> Result<Times, Failure>;

    /// Leaves the group, with the other ranks.
    fn close(self: Box<Self>) -> Result<(), Failure>;
}

/// Why a rank cannot go on.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Connects a rank to its group.
pub(crate) fn connect(
    job: &Job,
    rank: usize,
    place: &Place,
    communicator: &Communicator,
    model: &Model,
) -> Result<Box<dyn Transport>, Failure> {
    let device = place.device(job, rank)?;
    Ok(Box::new(Buffers::new(
        job,
        rank,
        &device,
        communicator,
        model,
    )?))
}
