//! The transport of the library: a buffer with its tensors, on whatever device.

use std::fmt;
use std::time::Duration;

use ep::{
    Buffer, CombineInput, Communicator, Config, DType, Device, DispatchInput, DispatchOptions,
    DispatchOutput, Event, Fault, Handle, Scales, Stream, Tensor,
};
use half::bf16;

use super::{Failure, Transport};
use crate::run::experts::{HostExperts, Received, Rows};
use crate::run::job::{Dtype, Job};
use crate::run::model::Model;
use crate::run::report::{Facts, Times};
use crate::run::router::Routes;

/// Every byte of the poison: NaN in each format, and a count that no dispatch gives.
const POISON: u8 = 0xff;
/// What a timed call is hidden behind, so that launching it takes none of its time.
const SPIN: Duration = Duration::from_micros(100);
/// Calls before the timed ones.
const WARM_UP: usize = 5;

/// What operations reported although every rank was there and every expert exists.
#[derive(Debug, thiserror::Error)]
#[error("operations reported: {}", .0.iter().map(Fault::to_string).collect::<Vec<_>>().join("; "))]
struct Faults(Vec<Fault>);

/// One rank's buffer, tensors and experts.
#[derive(Debug)]
pub(super) struct Buffers {
    buffer: Buffer,
    stream: Stream,
    options: DispatchOptions,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    received: DispatchOutput,
    y: Tensor,
    out: Tensor,
    experts: Box<dyn Experts>,
}

/// The experts of one rank.
pub(super) trait Experts: fmt::Debug {
    /// Enqueues the experts on `counts[l]` rows each; `y` gets their outputs where `received` has
    /// their inputs.
    fn run(
        &mut self,
        counts: &[i32],
        received: &DispatchOutput,
        y: &mut Tensor,
    ) -> Result<(), Failure>;
}

impl Buffers {
    /// Meets the other ranks.
    pub(super) fn new(
        job: &Job,
        rank: usize,
        device: &Device,
        communicator: &Communicator,
        model: &Model,
    ) -> Result<Self, Failure> {
        let size = |value: usize| u32::try_from(value);
        let config = Config::new(
            size(job.hidden)?,
            size(job.experts)?,
            size(job.tokens.max(1))?,
            size(job.top_k)?,
        );
        let options = match job.dtype {
            Dtype::Bf16 => DispatchOptions::bf16(),
            Dtype::Fp8 => DispatchOptions::fp8(Scales::F32),
        };
        let buffer = Buffer::builder(device, communicator, config).build()?;
        let stream = Stream::new(device)?;
        let rows = buffer.rows_per_expert() as usize;
        let experts: Box<dyn Experts> = match device.backend() {
            #[cfg(feature = "cuda")]
            "cuda" => Box::new(super::gpu::GpuExperts::new(
                job, model, rank, rows, &stream,
            )?),
            _ => Box::new(HostExperts::new(job, model, rank)),
        };
        let tensor = |dtype, dims| Tensor::new(device, dtype, dims);
        Ok(Self {
            x: tensor(DType::Bf16, [job.tokens, job.hidden])?,
            topk_idx: tensor(DType::I64, [job.tokens, job.top_k])?,
            topk_weights: tensor(DType::F32, [job.tokens, job.top_k])?,
            received: buffer.new_output(&options)?,
            y: Tensor::new(device, DType::Bf16, [job.local_experts(), rows, job.hidden])?,
            out: tensor(DType::Bf16, [job.tokens, job.hidden])?,
            buffer,
            stream,
            options,
            experts,
        })
    }

    fn dispatch(&mut self) -> Result<Handle, ep::Error> {
        let input = DispatchInput {
            x: self.x.view(),
            topk_idx: self.topk_idx.view(),
            topk_weights: Some(self.topk_weights.view()),
        };
        self.buffer
            .dispatch(&self.stream, &input, &self.options, &mut self.received)
    }

    fn combine(&mut self, handle: Handle) -> Result<(), ep::Error> {
        let input = CombineInput::new(&self.y);
        Ok(self
            .buffer
            .combine(&self.stream, handle, &input, &mut self.out)?)
    }

    /// Waits for the stream, and fails if an operation met anything.
    fn finish(&self) -> Result<(), Failure> {
        self.stream.synchronize()?;
        let faults = self.buffer.faults()?;
        if faults.is_empty() {
            Ok(())
        } else {
            Err(Faults(faults).into())
        }
    }
}

impl Experts for HostExperts {
    fn run(
        &mut self,
        counts: &[i32],
        received: &DispatchOutput,
        y: &mut Tensor,
    ) -> Result<(), Failure> {
        let mut outputs: Vec<bf16> = values(y.copy_to_host()?);
        let mut run = |rows| self.forward(&Received { rows, counts }, &mut outputs);
        match &received.recv_scales {
            None => run(Rows::Bf16(&values(received.recv_x.copy_to_host()?))),
            Some(scales) => run(Rows::Fp8 {
                codes: &received.recv_x.copy_to_host::<u8>()?,
                scales: &scales.copy_to_host::<f32>()?,
            }),
        }
        Ok(y.copy_from_host(&bits(&outputs))?)
    }
}

impl Transport for Buffers {
    fn facts(&self) -> Facts {
        let backend = match self.buffer.device().backend() {
            "host" => "sim",
            other => other,
        };
        Facts {
            backend: backend.to_owned(),
            alloc: self.buffer.plan().backend.name().to_owned(),
            plan: self.buffer.plan().to_string(),
            symmetric_bytes: self.buffer.symmetric_bytes(),
        }
    }

    fn layer(&mut self, x: &[bf16], routes: &Routes) -> Result<Vec<bf16>, Failure> {
        self.x.copy_from_host(&bits(x))?;
        self.topk_idx.copy_from_host(&routes.ids)?;
        self.topk_weights.copy_from_host(&routes.weights)?;
        self.received.fill(POISON, &self.stream)?;
        self.y.fill(POISON, &self.stream)?;
        self.out.fill(POISON, &self.stream)?;

        let handle = self.dispatch()?;
        self.finish()?;
        let counts: Vec<i32> = self.received.recv_count.copy_to_host()?;
        self.experts.run(&counts, &self.received, &mut self.y)?;
        self.combine(handle)?;
        self.finish()?;
        Ok(values(self.out.copy_to_host()?))
    }

    fn time(&mut self, iters: usize) -> Result<Times, Failure> {
        if iters == 0 {
            return Ok(Times::default());
        }
        let device = self.buffer.device().clone();
        let mut events = Vec::with_capacity(WARM_UP + iters);
        for _ in 0..WARM_UP + iters {
            let event = || Event::new(&device);
            let marks = [event()?, event()?, event()?, event()?];
            self.buffer.barrier(&self.stream, SPIN)?;
            marks[0].record(&self.stream)?;
            let handle = self.dispatch()?;
            marks[1].record(&self.stream)?;
            self.buffer.barrier(&self.stream, SPIN)?;
            marks[2].record(&self.stream)?;
            self.combine(handle)?;
            marks[3].record(&self.stream)?;
            events.push(marks);
        }
        self.finish()?;
        let mut times = Times::default();
        for [before_dispatch, dispatched, before_combine, combined] in &events[WARM_UP..] {
            times
                .dispatch_us
                .push(dispatched.elapsed_us(before_dispatch)?);
            times.combine_us.push(combined.elapsed_us(before_combine)?);
        }
        Ok(times)
    }

    fn close(self: Box<Self>) -> Result<(), Failure> {
        Ok(self.buffer.close()?)
    }
}

fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn values(bits: Vec<u16>) -> Vec<bf16> {
    bits.into_iter().map(bf16::from_bits).collect()
}
