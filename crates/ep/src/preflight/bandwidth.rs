//! How fast connected ranks copy to each other.

use ep_peers::Peers;
use ep_sys::vmm;

use crate::session::Session;
use crate::{Device, Error};

/// How fast every rank copies to every other that it is connected with.
///
/// All ranks copy at once, each to one other, so that every link carries one copy in each direction.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Bandwidth {
    /// Gigabytes per second, `[from][to]`; `None` where there is no route by pointers, and for a
    /// rank and itself.
    pub measured: Vec<Vec<Option<f64>>>,
    /// What NVLink gives the GPU of each rank in one direction at most, in gigabytes per second;
    /// `None` for a GPU that is not known here.
    pub nominal: Vec<Option<f64>>,
}

/// Symmetric memory that a measurement needs. Its first half is read and its second half written.
pub(super) const BYTES: u64 = 2 * COPY_BYTES;

/// Large enough that what a copy costs to start is lost in it.
const COPY_BYTES: u64 = 32 << 20;
/// Copies that are timed together.
const COPIES: u32 = 8;

/// Times copies to every peer. Collective; fails on every rank if one fails.
pub(super) fn measure(
    session: &Session,
    device: &Device,
    peers: &Peers,
) -> Result<Bandwidth, Error> {
    let size = peers.num_ranks();
    let mut rates = vec![0.0; size as usize];
    let mut outcome = Ok(());
    for shift in 1..size {
        session.gather("before a copy", &[])?;
        let to = (session.rank() + shift) % size;
        if outcome.is_ok() && peers.is_reachable(to) {
            outcome = rate(device, peers, to).map(|rate| rates[to as usize] = rate);
        }
    }
    session.agree("copying", outcome.map_err(Error::driver("timing copies")))?;

    let own = nominal(device).unwrap_or(0.0);
    let record: Vec<u8> = [own]
        .iter()
        .chain(&rates)
        .flat_map(|rate| rate.to_le_bytes())
        .collect();
    let mut bandwidth = Bandwidth {
        measured: Vec::new(),
        nominal: Vec::new(),
    };
    for record in session.gather("bandwidth", &record)? {
        let (words, _) = record.as_chunks::<8>();
        let mut known = words.iter().map(|word| {
            let rate = f64::from_le_bytes(*word);
            (rate > 0.0).then_some(rate)
        });
        bandwidth.nominal.push(known.next().flatten());
        bandwidth.measured.push(known.collect());
    }
    Ok(bandwidth)
}

/// Gigabytes per second of copies to a reachable peer.
fn rate(device: &Device, peers: &Peers, to: u32) -> ep_sys::Result<f64> {
    let (driver, ordinal) = (device.driver(), device.ordinal());
    let entries = peers.entries();
    let src = entries[peers.rank() as usize];
    let dst = entries[to as usize].offset(COPY_BYTES);
    let stream = vmm::Stream::new(driver, ordinal)?;
    let start = vmm::Event::new(driver, ordinal, true)?;
    let end = vmm::Event::new(driver, ordinal, true)?;
    let copy = || driver.copy_on_device(ordinal, dst, src, COPY_BYTES, stream.handle());
    // The first one may find the link asleep.
    copy()?;
    start.record(stream.handle())?;
    for _ in 0..COPIES {
        copy()?;
    }
    end.record(stream.handle())?;
    end.synchronize()?;
    let us = end.elapsed_us(&start)?;
    end.close()?;
    start.close()?;
    stream.close()?;
    Ok(f64::from(COPIES) * COPY_BYTES as f64 / us.max(f64::MIN_POSITIVE) / 1e3)
}

/// Of the SXM parts of a generation, which are those with NVLink to every peer.
fn nominal(device: &Device) -> Option<f64> {
    let info = device.driver().device_info(device.ordinal()).ok()?;
    match info.compute_capability {
        (8, 0) => Some(300.0),
        (9, 0) => Some(450.0),
        (10, _) => Some(900.0),
        _ => None,
    }
}
