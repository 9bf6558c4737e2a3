//! One dispatch and one combine over four ranks, on a simulated host.
//!
//! `cargo run -p ep --example dispatch_combine`

use std::thread;

use ep::driver::DeviceOrdinal;
use ep::{
    Buffer, CombineInput, Communicator, Config, DType, Device, DispatchInput, DispatchOptions,
    Error, Stream, Tensor,
};
use ep_sim::{Cluster, SimDriver};
use half::bf16;

const RANKS: u32 = 4;
const TOKENS: usize = 3;
const TOP_K: usize = 2;
const HIDDEN: usize = 256;
const EXPERTS: u32 = 8;

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
    let config = Config::new(HIDDEN as u32, EXPERTS, 16, TOP_K as u32);
    let buffer = Buffer::builder(device, comm, config).build()?;
    if buffer.rank() == 0 {
        println!("memory: {}", buffer.plan());
        println!("{} bytes on each rank", buffer.symmetric_bytes());
    }

    // Every channel of token t of rank r is 10 r + t.
    let me = buffer.rank() as usize;
    let value = |token: usize| bf16::from_f32((10 * me + token) as f32);
    let x: Vec<u16> = (0..TOKENS * HIDDEN)
        .map(|i| value(i / HIDDEN).to_bits())
        .collect();
    let topk_idx: Vec<i64> = (0..TOKENS * TOP_K)
        .map(|i| ((3 * me + i) % EXPERTS as usize) as i64)
        .collect();
    let x = Tensor::from_host(device, DType::Bf16, [TOKENS, HIDDEN], &x)?;
    let topk_idx = Tensor::from_host(device, DType::I64, [TOKENS, TOP_K], &topk_idx)?;
    let weights = Tensor::from_host(
        device,
        DType::F32,
        [TOKENS, TOP_K],
        &[0.5_f32; TOKENS * TOP_K],
    )?;

    let stream = Stream::new(device)?;
    let options = DispatchOptions::bf16();
    let mut received = buffer.new_output(&options)?;
    let input = DispatchInput {
        x: x.view(),
        topk_idx: topk_idx.view(),
        topk_weights: Some(weights.view()),
    };
    let handle = buffer.dispatch(&stream, &input, &options, &mut received)?;

    // The experts would run here, on the rows of `received.recv_x`. These give back what they get.
    let y = CombineInput::new(&received.recv_x);

    let mut out = Tensor::new(device, DType::Bf16, [TOKENS, HIDDEN])?;
    buffer.combine(&stream, handle, &y, &mut out)?;
    stream.synchronize()?;

    for fault in buffer.faults()? {
        eprintln!("rank {me}: {fault}");
    }
    let counts = received.recv_count.copy_to_host::<i32>()?;
    let out = out.copy_to_host::<u16>()?;
    let first: Vec<_> = out
        .chunks(HIDDEN)
        .map(|token| bf16::from_bits(token[0]).to_f32())
        .collect();
    println!("rank {me}: {counts:?} rows for its experts; tokens came back as {first:?}");
    assert!((0..TOKENS).all(|t| first[t] == value(t).to_f32()));
    buffer.close()
}
