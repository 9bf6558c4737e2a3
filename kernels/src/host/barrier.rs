//! The barrier: every rank writes its epoch to all and waits for theirs.

use std::thread;
use std::time::Duration;

use super::check::Dims;
use super::group::{Counter, Group, Progress};
use super::memory::BarrierMemory;
use crate::ffi::{EP_PHASE_BARRIER, ep_barrier_args};

pub(super) fn run(args: &ep_barrier_args, dims: &Dims, memory: BarrierMemory) {
    let mut group = Group::new(&args.group, &args.layout, dims, memory.group);
    if args.spin_ns > 0 {
        thread::sleep(Duration::from_nanos(args.spin_ns));
        group.restart_clock();
    }
    let part = group.begin(Counter::Barrier);
    for (_, window) in group.present() {
        window.publish(group.regions.barrier(dims.rank), part.epoch);
    }
    let Some(own) = group.own() else { return };
    for (source, _) in group.present() {
        let at = group.regions.barrier(source);
        // A peer that is a barrier ahead has passed this one too.
        let arrived = group.wait(|| {
            if own.load(at) >= part.epoch {
                Progress::Arrived
            } else {
                Progress::Pending
            }
        });
        if !arrived {
            part.timed_out(EP_PHASE_BARRIER, source);
        }
    }
}
