//! A pass as a CUDA graph.

#![allow(
    unsafe_code,
    reason = "captures, replays and destroys graphs through the driver"
)]

use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::result::{graph, stream};
use cudarc::driver::{CudaContext, DriverError, sys};
use ep::{Event, Stream};

use super::bench::{Bench, Marks};
use crate::failure::Failure;

/// Why a pass was not captured or replayed.
#[derive(Debug, thiserror::Error)]
#[error("{call} failed with status {status}; check that nothing else uses the stream")]
pub(crate) struct GraphError {
    call: &'static str,
    status: u32,
}

/// A captured pass, ready to be replayed. It holds what its operations use.
#[derive(Debug)]
pub(super) struct Graph<'a> {
    exec: sys::CUgraphExec,
    stream: Stream,
    /// The primary context, which is the driver's own.
    context: Arc<CudaContext>,
    bench: &'a Bench,
    marks: PhantomData<&'a Marks>,
}

impl<'a> Graph<'a> {
    /// Captures one pass, with `marks` at its points. Nothing runs.
    pub(super) fn capture(bench: &'a mut Bench, marks: &'a Marks) -> Result<Self, Failure> {
        let stream = bench.stream().clone();
        let raw = stream.handle().0 as sys::CUstream;
        let context = CudaContext::new(stream.device().ordinal().0 as usize)
            .map_err(failed("cuDevicePrimaryCtxRetain"))?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is alive.
        unsafe { stream::begin_capture(raw, mode) }.map_err(failed("cuStreamBeginCapture"))?;
        let enqueued = bench.pass(|point, stream| Ok(record(marks.event(point), stream)?));
        let bound = context.bind_to_thread();
        // SAFETY: the stream is alive and in the capture that began here.
        let captured = unsafe { stream::end_capture(raw) };
        // What was not enqueued explains more than that the capture is therefore invalid.
        enqueued?;
        bound.map_err(failed("cuCtxSetCurrent"))?;
        let captured = captured.map_err(failed("cuStreamEndCapture"))?;
        // SAFETY: the graph was captured without an error.
        let exec = unsafe { graph::instantiate(captured, sys::CUgraphInstantiate_flags(0)) };
        // SAFETY: the graph is not used any more; what was made of it is its own.
        unsafe { graph::destroy(captured) }.map_err(failed("cuGraphDestroy"))?;
        Ok(Self {
            exec: exec.map_err(failed("cuGraphInstantiate"))?,
            stream,
            context,
            bench,
            marks: PhantomData,
        })
    }

    /// Replays the pass and waits for its end. Fails if an operation met anything.
    pub(super) fn replay(&self) -> Result<(), Failure> {
        self.context
            .bind_to_thread()
            .map_err(failed("cuCtxSetCurrent"))?;
        let stream = self.stream.handle().0 as sys::CUstream;
        // SAFETY: the graph and the stream are alive, and so is all that the operations use: `self`
        // borrows it.
        unsafe { graph::launch(self.exec, stream) }.map_err(failed("cuGraphLaunch"))?;
        self.stream.synchronize()?;
        self.bench.check()
    }
}

impl Drop for Graph<'_> {
    fn drop(&mut self) {
        // After a failure a replay may still be running.
        if let Err(error) = self.stream.synchronize() {
            tracing::error!(%error, "a CUDA graph is left behind");
            return;
        }
        let bound = self.context.bind_to_thread();
        // SAFETY: the graph was instantiated by `capture`, is not running, and is destroyed here
        // only.
        let destroyed = bound.and_then(|()| unsafe { graph::exec_destroy(self.exec) });
        if let Err(error) = destroyed {
            tracing::error!(status = error.0 as u32, "a CUDA graph is left behind");
        }
    }
}

/// Captures the recording of an event as an operation that every replay repeats. Without the flag
/// the event would only order operations within the capture.
fn record(event: &Event, stream: &Stream) -> Result<(), GraphError> {
    let (event, stream) = (event.handle().0, stream.handle().0);
    let flags = sys::CUevent_record_flags::CU_EVENT_RECORD_EXTERNAL as u32;
    // SAFETY: event and stream are alive.
    unsafe { sys::cuEventRecordWithFlags(event as sys::CUevent, stream as sys::CUstream, flags) }
        .result()
        .map_err(failed("cuEventRecordWithFlags"))
}

/// Keeps the number alone: to format the driver's error is to call the driver.
fn failed(call: &'static str) -> impl Fn(DriverError) -> GraphError {
    move |error| GraphError {
        call,
        status: error.0 as u32,
    }
}
