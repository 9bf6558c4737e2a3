//! One rank's calls, timed.

use std::num::NonZeroU32;
use std::time::Duration;

use ep::{
    Buffer, CombineInput, Communicator, Config, DType, Device, DispatchInput, DispatchOptions,
    DispatchOutput, Event, Plan, Scales, Stream, Tensor,
};
use half::bf16;

use super::args::{Sweep, Weights};
use super::line::Times;
use crate::failure::{self, Failure};
use crate::layer::{Dtype, Routes};

/// What the launch of a timed call hides behind: longer than it takes.
const SPIN: Duration = Duration::from_micros(60);

/// One rank's buffer and tensors, made for the most tokens of the sweep.
#[derive(Debug)]
pub(super) struct Bench {
    buffer: Buffer,
    stream: Stream,
    options: DispatchOptions,
    weights: Weights,
    /// Of the shape that is measured.
    tokens: usize,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    received: DispatchOutput,
    /// What experts that change nothing would give.
    outputs: DispatchOutput,
    out: Tensor,
}

impl Bench {
    /// Meets the other ranks.
    pub(super) fn new(
        sweep: &Sweep,
        device: &Device,
        communicator: &Communicator,
        x: &[bf16],
        routes: &Routes,
    ) -> Result<Self, Failure> {
        let job = &sweep.job;
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
        let buffer = Buffer::builder(device, communicator, config)
            .num_sms(sweep.sms.map_or(0, NonZeroU32::get))
            .build()?;
        let (per_token, per_choice) = ([job.tokens, job.hidden], [job.tokens, job.top_k]);
        let x: Vec<u16> = x.iter().map(|value| value.to_bits()).collect();
        Ok(Self {
            stream: Stream::new(device)?,
            options,
            weights: sweep.weights,
            tokens: job.tokens,
            x: Tensor::from_host(device, DType::Bf16, per_token, &x)?,
            topk_idx: Tensor::from_host(device, DType::I64, per_choice, &routes.ids)?,
            topk_weights: Tensor::from_host(device, DType::F32, per_choice, &routes.weights)?,
            received: buffer.new_output(&options)?,
            outputs: buffer.new_output(&DispatchOptions::bf16())?,
            out: Tensor::new(device, DType::Bf16, per_token)?,
            buffer,
        })
    }

    #[cfg(feature = "cuda")]
    pub(super) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Which memory the ranks share, and why.
    pub(super) fn plan(&self) -> &Plan {
        self.buffer.plan()
    }

    /// Turns to the shape of so many tokens.
    fn prepare(&mut self, tokens: usize) -> Result<(), Failure> {
        self.tokens = tokens;
        let input = DispatchInput {
            x: self.x.view().first(tokens),
            topk_idx: self.topk_idx.view().first(tokens),
            topk_weights: None,
        };
        let bf16 = DispatchOptions::bf16();
        self.buffer
            .dispatch(&self.stream, &input, &bf16, &mut self.outputs)
            .map(drop)?;
        Ok(self.stream.synchronize()?)
    }

    /// Times every call with so many tokens, and fails if an operation met anything.
    pub(super) fn time(&mut self, sweep: &Sweep, tokens: usize) -> Result<Times, Failure> {
        self.prepare(tokens)?;
        let calls = sweep.warmup + sweep.job.iters;
        let mut times = if sweep.graph {
            self.replays(calls)?
        } else {
            self.launches(calls)?
        };
        times.forget(sweep.warmup);
        Ok(times)
    }

    /// Fails if an operation met anything.
    pub(super) fn check(&self) -> Result<(), Failure> {
        failure::check(&self.buffer)
    }

    /// Leaves the group, with the other ranks.
    pub(super) fn close(self) -> Result<(), Failure> {
        Ok(self.buffer.close()?)
    }

    /// Times calls that are launched on the stream. One pass at a time: all behind the one in which
    /// a rank stops would wait for it in vain.
    fn launches(&mut self, calls: usize) -> Result<Times, Failure> {
        let marks = Marks::new(self.buffer.device())?;
        let mut times = Times::default();
        for _ in 0..calls {
            self.pass(|point, stream| Ok(marks.event(point).record(stream)?))?;
            self.stream.synchronize()?;
            self.check()?;
            marks.read(&mut times)?;
        }
        Ok(times)
    }

    /// Times replays of a graph that holds one call of each operation.
    #[cfg(feature = "cuda")]
    fn replays(&mut self, calls: usize) -> Result<Times, Failure> {
        // Kernels are loaded before they are captured.
        self.launches(1)?;
        let marks = Marks::new(self.buffer.device())?;
        let graph = super::graph::Graph::capture(self, &marks)?;
        let mut times = Times::default();
        for _ in 0..calls {
            graph.replay()?;
            marks.read(&mut times)?;
        }
        Ok(times)
    }

    #[cfg(not(feature = "cuda"))]
    fn replays(&mut self, _calls: usize) -> Result<Times, Failure> {
        Err(super::NoGraphs.into())
    }

    /// Enqueues a dispatch, a combine, and a kernel that does nothing, with `mark` at the begin
    /// and the end of each.
    pub(super) fn pass(
        &mut self,
        mut mark: impl FnMut(Point, &Stream) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let Self {
            buffer,
            stream,
            tokens,
            ..
        } = self;
        let topk_weights = self.topk_weights.view().first(*tokens);
        let input = DispatchInput {
            x: self.x.view().first(*tokens),
            topk_idx: self.topk_idx.view().first(*tokens),
            topk_weights: (self.weights == Weights::Dispatch).then_some(topk_weights),
        };
        let mut outputs = CombineInput::new(&self.outputs.recv_x);
        if self.weights == Weights::Combine {
            outputs = outputs.with_weights(topk_weights);
        }

        buffer.barrier(stream, SPIN)?;
        mark(Point::BeforeDispatch, stream)?;
        let handle = buffer.dispatch(stream, &input, &self.options, &mut self.received)?;
        mark(Point::AfterDispatch, stream)?;

        buffer.barrier(stream, SPIN)?;
        mark(Point::BeforeCombine, stream)?;
        let out = self.out.view_mut().first(*tokens);
        buffer
            .combine(stream, handle, &outputs, out)
            .map_err(ep::Error::from)?;
        mark(Point::AfterCombine, stream)?;

        buffer.barrier(stream, SPIN)?;
        mark(Point::BeforeEmpty, stream)?;
        stream.launch_empty()?;
        mark(Point::AfterEmpty, stream)
    }
}

/// A place between the operations of a pass.
#[derive(Clone, Copy, Debug)]
pub(super) enum Point {
    BeforeDispatch,
    AfterDispatch,
    BeforeCombine,
    AfterCombine,
    BeforeEmpty,
    AfterEmpty,
}

/// The events of a pass.
#[derive(Debug)]
pub(super) struct Marks([Event; 6]);

impl Marks {
    fn new(device: &Device) -> Result<Self, ep::Error> {
        let event = || Event::new(device);
        Ok(Self([
            event()?,
            event()?,
            event()?,
            event()?,
            event()?,
            event()?,
        ]))
    }

    pub(super) fn event(&self, point: Point) -> &Event {
        &self.0[point as usize]
    }

    /// Adds the times of a pass that the stream has passed.
    fn read(&self, times: &mut Times) -> Result<(), ep::Error> {
        let between = |begin, end| self.event(end).elapsed_us(self.event(begin));
        let dispatch = between(Point::BeforeDispatch, Point::AfterDispatch)?;
        let combine = between(Point::BeforeCombine, Point::AfterCombine)?;
        let empty = between(Point::BeforeEmpty, Point::AfterEmpty)?;
        times.dispatch_us.push(dispatch);
        times.combine_us.push(combine);
        times.empty_us.push(empty);
        Ok(())
    }
}
