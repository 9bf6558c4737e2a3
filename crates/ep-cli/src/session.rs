//! One rank's use of the library: a buffer, the tensors of a batch, and its operations, timed.

use std::time::Duration;

use ep::{
    Buffer, CombineInput, Communicator, Config, DType, Device, DispatchInput, DispatchOptions,
    DispatchOutput, Event, Handle, Scales, Stream, Tensor,
};
use half::bf16;
use serde::{Deserialize, Serialize};

use crate::failure::{self, Failure};
use crate::layer::{Dtype, Job, Routes};

/// Every byte of the poison: NaN in each format, and a count that no dispatch gives.
const POISON: u8 = 0xff;
/// What a timed call is hidden behind, so that launching it takes none of its time.
const SPIN: Duration = Duration::from_micros(100);
/// Calls before the timed ones.
const WARM_UP: usize = 5;
/// Bound on a rank's lead over the slowest outside operations; the head's own is usually shorter.
const LEAD: Duration = Duration::from_secs(600);

/// How the ranks are connected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Facts {
    /// `"cuda"` or `"sim"`.
    pub(crate) backend: String,
    /// Kind of the symmetric memory.
    pub(crate) alloc: String,
    /// Why that kind.
    pub(crate) plan: String,
    /// Symmetric memory of a rank.
    pub(crate) symmetric_bytes: u64,
}

/// Microseconds of each timed call.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Times {
    pub(crate) dispatch_us: Vec<f64>,
    pub(crate) combine_us: Vec<f64>,
}

/// One rank's buffer and tensors.
#[derive(Debug)]
pub(crate) struct Session {
    buffer: Buffer,
    communicator: Communicator,
    stream: Stream,
    options: DispatchOptions,
    batch: Batch,
    received: DispatchOutput,
    /// Expert outputs, bf16 `[local experts, rows, hidden]`.
    y: Tensor,
}

/// The tensors of a rank's tokens.
#[derive(Debug)]
struct Batch {
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    out: Tensor,
}

impl Session {
    /// Meets the other ranks, with room for the job's tokens.
    pub(crate) fn new(
        job: &Job,
        device: &Device,
        communicator: &Communicator,
    ) -> Result<Self, Failure> {
        let size = |value: usize| u32::try_from(value);
        let tokens = job.tokens.max(1);
        let config = Config::new(
            size(job.hidden)?,
            size(job.experts)?,
            size(tokens)?,
            size(job.top_k)?,
        );
        let options = match job.dtype {
            Dtype::Bf16 => DispatchOptions::bf16(),
            Dtype::Fp8 => DispatchOptions::fp8(Scales::F32),
        };
        let buffer = Buffer::builder(device, communicator, config).build()?;
        let rows = buffer.rows_per_expert() as usize;
        Ok(Self {
            stream: Stream::new(device)?,
            batch: Batch::new(device, job.hidden, job.top_k, &[], &Routes::default())?,
            received: buffer.new_output(&options)?,
            y: Tensor::new(device, DType::Bf16, [job.local_experts(), rows, job.hidden])?,
            communicator: communicator.clone(),
            options,
            buffer,
        })
    }

    pub(crate) fn facts(&self) -> Facts {
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

    /// Rows that a local expert can receive.
    #[cfg(feature = "cuda")]
    pub(crate) fn rows_per_expert(&self) -> usize {
        self.buffer.rows_per_expert() as usize
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Takes this rank's tokens, `[tokens, hidden]`, for the operations to come.
    pub(crate) fn load(&mut self, x: &[bf16], routes: &Routes) -> Result<(), Failure> {
        self.stream.synchronize()?;
        let hidden = self.buffer.config().hidden as usize;
        let top_k = self.buffer.config().max_top_k as usize;
        self.batch = Batch::new(self.buffer.device(), hidden, top_k, x, routes)?;
        Ok(())
    }

    /// Fills everything that operations and experts write.
    pub(crate) fn poison(&mut self) -> Result<(), Failure> {
        self.received.fill(POISON, &self.stream)?;
        self.y.fill(POISON, &self.stream)?;
        self.batch.out.fill(POISON, &self.stream)?;
        Ok(())
    }

    pub(crate) fn dispatch(&mut self) -> Result<Handle, Failure> {
        let input = DispatchInput {
            x: self.batch.x.view(),
            topk_idx: self.batch.topk_idx.view(),
            topk_weights: Some(self.batch.topk_weights.view()),
        };
        Ok(self
            .buffer
            .dispatch(&self.stream, &input, &self.options, &mut self.received)?)
    }

    /// What the last dispatch received, how many rows of it each local expert has, and where the
    /// experts write. Waits for the dispatch.
    pub(crate) fn at_experts(
        &mut self,
    ) -> Result<(Vec<i32>, &DispatchOutput, &mut Tensor), Failure> {
        self.finish()?;
        let counts = self.received.recv_count.copy_to_host()?;
        Ok((counts, &self.received, &mut self.y))
    }

    pub(crate) fn combine(&mut self, handle: Handle) -> Result<(), Failure> {
        let input = CombineInput::new(&self.y);
        self.buffer
            .combine(&self.stream, handle, &input, &mut self.batch.out)
            .map_err(ep::Error::from)?;
        Ok(())
    }

    /// What the last combine gave, `[tokens, hidden]`. Waits for it.
    pub(crate) fn output(&self) -> Result<Vec<bf16>, Failure> {
        self.finish()?;
        Ok(from_bits(&self.batch.out.copy_to_host()?))
    }

    /// Waits for the other ranks where one may be seconds ahead of another. An operation waits for
    /// its peers too, but no longer than for a rank that is lost.
    pub(crate) fn meet(&self) -> Result<(), Failure> {
        self.stream.synchronize()?;
        self.communicator.barrier(LEAD)?;
        Ok(())
    }

    /// Times dispatch and combine of the batch, `iters` times each. Ranks are lined up on the device
    /// before every call, and its launch is hidden.
    pub(crate) fn time(&mut self, iters: usize) -> Result<Times, Failure> {
        if iters == 0 {
            return Ok(Times::default());
        }
        self.meet()?;
        let mut calls = Vec::with_capacity(WARM_UP + iters);
        for _ in 0..WARM_UP + iters {
            let before_dispatch = self.line_up()?;
            let handle = self.dispatch()?;
            let dispatched = self.mark()?;
            let before_combine = self.line_up()?;
            self.combine(handle)?;
            let combined = self.mark()?;
            calls.push([before_dispatch, dispatched, before_combine, combined]);
            // A lost rank would cost every further call its time-out.
            failure::check(&self.buffer)?;
        }
        self.finish()?;
        let mut times = Times::default();
        for [before_dispatch, dispatched, before_combine, combined] in &calls[WARM_UP..] {
            let dispatch_us = dispatched.elapsed_us(before_dispatch)?;
            times.dispatch_us.push(dispatch_us);
            times.combine_us.push(combined.elapsed_us(before_combine)?);
        }
        Ok(times)
    }

    /// Leaves the group, with the other ranks.
    pub(crate) fn close(self) -> Result<(), Failure> {
        Ok(self.buffer.close()?)
    }

    fn line_up(&self) -> Result<Event, Failure> {
        self.buffer.barrier(&self.stream, SPIN)?;
        self.mark()
    }

    fn mark(&self) -> Result<Event, Failure> {
        let event = Event::new(self.buffer.device())?;
        event.record(&self.stream)?;
        Ok(event)
    }

    /// Waits for the stream, and fails if an operation met anything.
    fn finish(&self) -> Result<(), Failure> {
        self.stream.synchronize()?;
        failure::check(&self.buffer)
    }
}

impl Batch {
    fn new(
        device: &Device,
        hidden: usize,
        top_k: usize,
        x: &[bf16],
        routes: &Routes,
    ) -> Result<Self, ep::Error> {
        let tokens = x.len() / hidden;
        let entries = [tokens, top_k];
        Ok(Self {
            x: Tensor::from_host(device, DType::Bf16, [tokens, hidden], &to_bits(x))?,
            topk_idx: Tensor::from_host(device, DType::I64, entries, &routes.ids)?,
            topk_weights: Tensor::from_host(device, DType::F32, entries, &routes.weights)?,
            out: Tensor::new(device, DType::Bf16, [tokens, hidden])?,
        })
    }
}

/// As tensors are copied.
pub(crate) fn to_bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// As tensors are copied.
pub(crate) fn from_bits(bits: &[u16]) -> Vec<bf16> {
    bits.iter().map(|&bits| bf16::from_bits(bits)).collect()
}
