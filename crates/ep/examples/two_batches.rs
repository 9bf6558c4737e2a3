//! Two batches whose work overlaps: while one's rows are on their way, the other computes. Dispatch
//! and combine run on a communication stream beside the one that computes. Four ranks, on a
//! simulated host.
//!
//! `cargo run -p ep --example two_batches`

use std::thread;

use ep::driver::DeviceOrdinal;
use ep::{
    Buffer, CombineInput, Communicator, Config, DType, Device, DispatchInput, DispatchOptions,
    DispatchOutput, Error, Event, Stream, Tensor,
};
use ep_sim::{Cluster, SimDriver};
use half::bf16;

const RANKS: u32 = 4;
const TOKENS: usize = 3;
const TOP_K: usize = 2;
const HIDDEN: usize = 256;
const EXPERTS: usize = 8;
const LAYERS: usize = 2;

fn main() -> Result<(), Error> {
    let driver = SimDriver::new(&Cluster::hgx_h200(RANKS), 0, &[0, 1, 2, 3]);
    thread::scope(|scope| {
        let ranks: Vec<_> = Communicator::threads(RANKS)
            .into_iter()
            .map(|comm| {
                let device = Device::host(driver.clone(), DeviceOrdinal(comm.rank()));
                scope.spawn(move || rank(&device, &comm))
            })
            .collect();
        ranks
            .into_iter()
            .try_for_each(|rank| rank.join().expect("a rank panicked"))
    })
}

/// What every rank does.
fn rank(device: &Device, comm: &Communicator) -> Result<(), Error> {
    let config = Config::new(HIDDEN as u32, EXPERTS as u32, 16, TOP_K as u32)
        // A result of each batch is alive at once, and each is sent before the first is received.
        .with_slots(2)
        .with_sends_in_flight(2);
    let buffer = Buffer::builder(device, comm, config).build()?;
    let mut streams = Streams::new(device)?;
    let mut a = Batch::new(&buffer, 1)?;
    let mut b = Batch::new(&buffer, 2)?;
    for _ in 0..LAYERS {
        layer(&buffer, &mut streams, &mut a, &mut b)?;
    }
    streams.compute.synchronize()?;

    let faults = buffer.faults()?;
    assert!(faults.is_empty(), "{faults:?}");
    for (name, batch) in [("a", &a), ("b", &b)] {
        let out = batch.out.copy_to_host::<u16>()?;
        assert!(out == batch.x.copy_to_host::<u16>()?);
        println!("rank {}: batch {name} came back", buffer.rank());
    }
    buffer.close()
}

/// One layer, for both batches.
fn layer(
    buffer: &Buffer,
    streams: &mut Streams,
    a: &mut Batch,
    b: &mut Batch,
) -> Result<(), Error> {
    let Streams {
        compute,
        communication,
        order,
        b_received,
    } = streams;
    let options = DispatchOptions::bf16();

    // Attention of batch a runs here, on `compute`.
    communication.follow(compute, order)?;
    let sent_a = buffer.dispatch_send(communication, &a.input(), &options)?;

    // Attention of batch b, while the rows of a are on their way.
    communication.follow(compute, order)?;
    let sent_b = buffer.dispatch_send(communication, &b.input(), &options)?;

    let handle_a = buffer.dispatch_receive(communication, sent_a, &mut a.received)?;
    compute.follow(communication, order)?;
    let handle_b = buffer.dispatch_receive(communication, sent_b, &mut b.received)?;
    b_received.record(communication)?;

    // Experts of batch a, on `compute`, while b is received. These give back what they get.
    communication.follow(compute, order)?;
    let y_a = CombineInput::new(&a.received.recv_x);
    let back_a = buffer.combine_send(communication, handle_a, &y_a)?;

    // Experts of batch b, while the sums of a are on their way. They wait for their rows alone;
    // `follow` would let them wait for the sending of a, too.
    compute.wait(b_received)?;
    communication.follow(compute, order)?;
    let y_b = CombineInput::new(&b.received.recv_x);
    let back_b = buffer.combine_send(communication, handle_b, &y_b)?;

    buffer.combine_receive(communication, back_a, &mut a.out)?;
    buffer.combine_receive(communication, back_b, &mut b.out)?;
    // The next layer's attention reads both.
    compute.follow(communication, order)
}

/// Made once: between a dispatch and its combine nothing is asked of the driver but to record an
/// event and to wait for it.
struct Streams {
    compute: Stream,
    communication: Stream,
    order: Event,
    b_received: Event,
}

impl Streams {
    fn new(device: &Device) -> Result<Self, Error> {
        Ok(Self {
            compute: Stream::new(device)?,
            communication: Stream::new(device)?,
            order: Event::untimed(device)?,
            b_received: Event::untimed(device)?,
        })
    }
}

/// The tensors of one batch. They live until the streams have passed everything that uses them.
struct Batch {
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    received: DispatchOutput,
    out: Tensor,
}

impl Batch {
    /// Every token has the same value in each channel, and two experts that weigh the same.
    fn new(buffer: &Buffer, seed: usize) -> Result<Self, Error> {
        let device = buffer.device();
        let first = seed * 10 + buffer.rank() as usize;
        let x: Vec<u16> = (0..TOKENS * HIDDEN)
            .map(|i| bf16::from_f32((first + i / HIDDEN) as f32).to_bits())
            .collect();
        let topk_idx: Vec<i64> = (0..TOKENS * TOP_K)
            .map(|i| ((3 * first + i) % EXPERTS) as i64)
            .collect();
        let weights = [0.5_f32; TOKENS * TOP_K];
        Ok(Self {
            x: Tensor::from_host(device, DType::Bf16, [TOKENS, HIDDEN], &x)?,
            topk_idx: Tensor::from_host(device, DType::I64, [TOKENS, TOP_K], &topk_idx)?,
            topk_weights: Tensor::from_host(device, DType::F32, [TOKENS, TOP_K], &weights)?,
            received: buffer.new_output(&DispatchOptions::bf16())?,
            out: Tensor::new(device, DType::Bf16, [TOKENS, HIDDEN])?,
        })
    }

    fn input(&self) -> DispatchInput<'_> {
        DispatchInput {
            x: self.x.view(),
            topk_idx: self.topk_idx.view(),
            topk_weights: Some(self.topk_weights.view()),
        }
    }
}
