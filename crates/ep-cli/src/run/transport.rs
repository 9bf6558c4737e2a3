//! The seam between the job and the code under test: what one rank needs of it.

use std::fmt;

use ep::{Communicator, Device, DispatchOutput, Tensor};
use half::bf16;

use super::experts::{HostExperts, Received, Rows};
#[cfg(feature = "cuda")]
use super::gpu::GpuExperts;
use crate::failure::Failure;
use crate::layer::{Job, Model, Routes};
use crate::session::{Facts, Session, Times, from_bits, to_bits};

/// One rank's connection to its group, and its experts.
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

/// Connects a rank to its group, through the library.
pub(crate) fn connect(
    job: &Job,
    rank: usize,
    model: &Model,
    device: &Device,
    communicator: &Communicator,
) -> Result<Box<dyn Transport>, Failure> {
    let session = Session::new(job, device, communicator)?;
    let experts: Box<dyn Experts> = match device.backend() {
        #[cfg(feature = "cuda")]
        "cuda" => {
            let rows = session.rows_per_expert();
            Box::new(GpuExperts::new(job, model, rank, rows, session.stream())?)
        }
        _ => Box::new(HostExperts::new(job, model, rank)),
    };
    Ok(Box::new(Library { session, experts }))
}

/// The experts of one rank, wherever they run.
pub(crate) trait Experts: fmt::Debug {
    /// Enqueues the experts on `counts[l]` rows each; `y` gets their outputs where `received` has
    /// their inputs.
    fn run(
        &mut self,
        counts: &[i32],
        received: &DispatchOutput,
        y: &mut Tensor,
    ) -> Result<(), Failure>;
}

/// The code under test.
#[derive(Debug)]
struct Library {
    session: Session,
    experts: Box<dyn Experts>,
}

impl Transport for Library {
    fn facts(&self) -> Facts {
        self.session.facts()
    }

    fn layer(&mut self, x: &[bf16], routes: &Routes) -> Result<Vec<bf16>, Failure> {
        self.session.load(x, routes)?;
        self.session.poison()?;
        self.session.meet()?;
        let handle = self.session.dispatch()?;
        let (counts, received, y) = self.session.at_experts()?;
        self.experts.run(&counts, received, y)?;
        self.session.meet()?;
        self.session.combine(handle)?;
        self.session.output()
    }

    fn time(&mut self, iters: usize) -> Result<Times, Failure> {
        self.session.time(iters)
    }

    fn close(self: Box<Self>) -> Result<(), Failure> {
        let Self { session, experts } = *self;
        drop(experts);
        session.close()
    }
}

impl Experts for HostExperts {
    fn run(
        &mut self,
        counts: &[i32],
        received: &DispatchOutput,
        y: &mut Tensor,
    ) -> Result<(), Failure> {
        let mut outputs = from_bits(&y.copy_to_host()?);
        let mut run = |rows| self.forward(&Received { rows, counts }, &mut outputs);
        match &received.recv_scales {
            None => run(Rows::Bf16(&from_bits(&received.recv_x.copy_to_host()?))),
            Some(scales) => run(Rows::Fp8 {
                codes: &received.recv_x.copy_to_host::<u8>()?,
                scales: &scales.copy_to_host::<f32>()?,
            }),
        }
        Ok(y.copy_from_host(&to_bits(&outputs))?)
    }
}
