//! Dispatch and combine: on a simulated host with the host kernels, which runs anywhere, and on the
//! GPUs that are found at run time. `EP_GPU=require` makes it a failure to find none.
//!
//! Ranks are threads of this process. Before each operation a barrier of the group lines them up;
//! events of the device time it, and its slowest rank counts. Throughput is of one rank, in logical
//! bytes: a row for every expert of a token, though it travels once for all experts of a rank.

mod ranks;

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::iter::successors;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use ep::driver::DeviceOrdinal;
use ep::{
    Buffer, CombineInput, Communicator, Config, DType, Device, DispatchInput, DispatchOptions,
    DispatchOutput, Error, Event, Format, Handle, Scales, Stream, Tensor,
};
use ep_sim::{Cluster, SimDriver};

use ranks::{PATIENCE, each, slowest};

fn main() {
    ranks::main(|criterion| {
        host(criterion);
        match gpus() {
            Ok(devices) => gpu(criterion, &devices),
            Err(why) => {
                let why = explain(&*why);
                let required = std::env::var("EP_GPU").is_ok_and(|value| value == "require");
                assert!(!required, "EP_GPU=require: {why}");
                eprintln!("layer/gpu skipped: {why}");
            }
        }
    });
}

fn host(criterion: &mut Criterion) {
    for (ranks, tokens) in [(4, 32), (8, 8)] {
        let shape = Shape {
            tokens,
            hidden: 1024,
            experts: 32,
            top_k: 8,
        };
        let cluster = Cluster::hgx_h200(ranks);
        let driver = SimDriver::new(&cluster, 0, &Vec::from_iter(0..ranks));
        let devices: Vec<_> = (0..ranks)
            .map(|gpu| Device::host(driver.clone(), DeviceOrdinal(gpu)))
            .collect();
        // Host and device are one here: nothing runs ahead.
        layer(criterion, "layer/host", &devices, shape, Duration::ZERO);
    }
}

fn gpu(criterion: &mut Criterion, devices: &[Device]) {
    let shape = Shape {
        tokens: 128,
        hidden: 7168,
        experts: 256,
        top_k: 8,
    };
    // Long enough to enqueue an operation and its events.
    let spin = Duration::from_micros(50);
    for devices in [1, 2, 4].iter().filter_map(|&ranks| devices.get(..ranks)) {
        layer(criterion, "layer/gpu", devices, shape, spin);
    }
}

/// The GPUs that this process sees, or why there are none.
fn gpus() -> Result<Vec<Device>, Box<dyn std::error::Error>> {
    #[cfg(feature = "cuda")]
    {
        use ep::driver::{CudaDriver, Driver as _};

        let count = CudaDriver::load()?.device_count()?;
        let devices = (0..count).map(|gpu| Device::cuda(DeviceOrdinal(gpu)));
        Ok(devices.collect::<Result<_, _>>()?)
    }
    #[cfg(not(feature = "cuda"))]
    Err("built without the CUDA kernels; add --features cuda".into())
}

/// An error with what caused it.
fn explain(error: &dyn std::error::Error) -> String {
    let causes = successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Measures both operations in both formats, with a rank on each device.
fn layer(criterion: &mut Criterion, name: &str, devices: &[Device], shape: Shape, spin: Duration) {
    let mut group = criterion.benchmark_group(name);
    for (precision, format) in [("bf16", Format::Bf16), ("fp8", Format::Fp8(Scales::F32))] {
        let mut layer = None;
        for operation in [Operation::Dispatch, Operation::Combine] {
            let id = BenchmarkId::new(
                format!("{operation:?} {precision}").to_lowercase(),
                format!("{}x{}x{}", devices.len(), shape.tokens, shape.hidden),
            );
            group.throughput(Throughput::Bytes(shape.bytes(operation, format)));
            group.bench_function(id, |bencher| {
                let ranks = layer.get_or_insert_with(|| {
                    let comms = Communicator::threads(devices.len() as u32);
                    each(comms.into_iter().zip(devices), |(comm, device)| {
                        Rank::new(device, &comm, shape, format, spin)
                    })
                });
                bencher.iter_custom(|times| {
                    slowest(&each(ranks.iter_mut(), |rank| {
                        rank.measure(operation, times)
                    }))
                });
            });
        }
        each(layer.into_iter().flatten(), |rank: Rank| {
            rank.buffer.close()
        });
    }
}

#[derive(Clone, Copy, Debug)]
enum Operation {
    Dispatch,
    Combine,
}

#[derive(Clone, Copy)]
struct Shape {
    /// Of each rank.
    tokens: usize,
    hidden: usize,
    /// Over all ranks.
    experts: u32,
    top_k: usize,
}

impl Shape {
    fn bytes(self, operation: Operation, format: Format) -> u64 {
        let row = match (operation, format) {
            (Operation::Dispatch, Format::Fp8(_)) => self.hidden + self.hidden / 128 * 4,
            _ => self.hidden * 2,
        };
        (self.tokens * self.top_k * row) as u64
    }

    fn config(self) -> Config {
        let [hidden, tokens, top_k] = [self.hidden, self.tokens, self.top_k].map(|n| n as u32);
        Config::new(hidden, self.experts, tokens, top_k)
    }

    /// Different experts for each token, chosen uniformly and in each run alike.
    fn routing(self, rank: u32) -> Vec<i64> {
        let hasher = BuildHasherDefault::<DefaultHasher>::new();
        let token = |token: usize| {
            let mut experts: Vec<_> = (0..self.experts.into()).collect();
            experts.sort_by_cached_key(|expert: &i64| hasher.hash_one((rank, token, expert)));
            experts.truncate(self.top_k);
            experts
        };
        (0..self.tokens).flat_map(token).collect()
    }
}

struct Rank {
    buffer: Buffer,
    stream: Stream,
    options: DispatchOptions,
    spin: Duration,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    received: DispatchOutput,
    y: Tensor,
    out: Tensor,
    /// Begin and end of the operations of a batch: what is enqueued before the host waits.
    events: Vec<(Event, Event)>,
}

impl Rank {
    fn new(
        device: &Device,
        comm: &Communicator,
        shape: Shape,
        format: Format,
        spin: Duration,
    ) -> Result<Self, Error> {
        let buffer = Buffer::builder(device, comm, shape.config())
            .deadline(PATIENCE)
            .timeout(PATIENCE)
            .build()?;
        let stream = Stream::new(device)?;
        let options = DispatchOptions::from(format);
        let (tokens, hidden, top_k) = (shape.tokens, shape.hidden, shape.top_k);
        // bf16 from 1 to 2.
        let x: Vec<u16> = (0..tokens * hidden)
            .map(|i| 0x3f80 | (i % 128) as u16)
            .collect();
        let weights = vec![1.0 / top_k as f32; tokens * top_k];
        let rows = [buffer.local_experts(), buffer.rows_per_expert()].map(|n| n as usize);
        let mut y = Tensor::new(device, DType::Bf16, [rows[0], rows[1], hidden])?;
        y.fill(0x3f, &stream)?;
        Ok(Self {
            x: Tensor::from_host(device, DType::Bf16, [tokens, hidden], &x)?,
            topk_idx: Tensor::from_host(
                device,
                DType::I64,
                [tokens, top_k],
                &shape.routing(comm.rank()),
            )?,
            topk_weights: Tensor::from_host(device, DType::F32, [tokens, top_k], &weights)?,
            received: buffer.new_output(&options)?,
            y,
            out: Tensor::new(device, DType::Bf16, [tokens, hidden])?,
            events: (0..32)
                .map(|_| Ok((Event::new(device)?, Event::new(device)?)))
                .collect::<Result<_, Error>>()?,
            buffer,
            stream,
            options,
            spin,
        })
    }

    /// Times an operation on the device so many times.
    fn measure(&mut self, operation: Operation, times: u64) -> Result<Vec<Duration>, Error> {
        let events = std::mem::take(&mut self.events);
        let mut spent = Vec::new();
        let mut left = times as usize;
        while left > 0 {
            let batch = &events[..left.min(events.len())];
            left -= batch.len();
            for (start, end) in batch {
                self.enqueue(operation, start, end)?;
            }
            self.stream.synchronize()?;
            for (start, end) in batch {
                spent.push(Duration::from_secs_f64(end.elapsed_us(start)? * 1e-6));
            }
        }
        self.events = events;
        let faults = self.buffer.faults()?;
        assert!(faults.is_empty(), "rank {}: {faults:?}", self.buffer.rank());
        Ok(spent)
    }

    fn enqueue(&mut self, operation: Operation, start: &Event, end: &Event) -> Result<(), Error> {
        match operation {
            Operation::Dispatch => {
                self.line_up(start)?;
                self.dispatch()?;
            }
            Operation::Combine => {
                let handle = self.dispatch()?;
                self.line_up(start)?;
                let y = CombineInput::new(&self.y);
                self.buffer
                    .combine(&self.stream, handle, &y, &mut self.out)?;
            }
        }
        end.record(&self.stream)
    }

    fn line_up(&self, start: &Event) -> Result<(), Error> {
        self.buffer.barrier(&self.stream, self.spin)?;
        start.record(&self.stream)
    }

    fn dispatch(&mut self) -> Result<Handle, Error> {
        let input = DispatchInput {
            x: self.x.view(),
            topk_idx: self.topk_idx.view(),
            topk_weights: Some(self.topk_weights.view()),
        };
        self.buffer
            .dispatch(&self.stream, &input, &self.options, &mut self.received)
    }
}
