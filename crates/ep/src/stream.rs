//! Streams and events.

use std::fmt;
use std::sync::Arc;

use ep_sys::{EventHandle, StreamHandle, vmm};

use crate::{Device, Error, launch};

/// A stream of a device: work on it runs in order. Cheap to clone.
///
/// Made here, or a caller's own: see [`borrowed`](Self::borrowed).
///
/// ```
/// # use ep::{Device, Stream, driver::DeviceOrdinal};
/// # use ep_sim::{Cluster, SimDriver};
/// # let device = Device::host(SimDriver::new(&Cluster::hgx_h200(1), 0, &[0]), DeviceOrdinal(0));
/// let stream = Stream::new(&device)?;
/// stream.synchronize()?;
/// # Ok::<(), ep::Error>(())
/// ```
#[derive(Clone)]
pub struct Stream {
    device: Device,
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    Owned(Arc<vmm::Stream>),
    Borrowed(StreamHandle),
}

impl Stream {
    /// Creates a stream that does not synchronise with the legacy default stream. It is destroyed
    /// with its last clone; buffers keep one of the stream that they were last used with.
    pub fn new(device: &Device) -> Result<Self, Error> {
        let stream = vmm::Stream::new(device.driver(), device.ordinal())
            .map_err(Error::driver("creating a stream"))?;
        Ok(Self {
            device: device.clone(),
            kind: Kind::Owned(Arc::new(stream)),
        })
    }

    pub(crate) fn from_raw(device: &Device, raw: StreamHandle) -> Self {
        Self {
            device: device.clone(),
            kind: Kind::Borrowed(raw),
        }
    }

    /// The driver's handle.
    pub fn handle(&self) -> StreamHandle {
        match &self.kind {
            Kind::Owned(stream) => stream.handle(),
            Kind::Borrowed(handle) => *handle,
        }
    }

    /// Whether `other` is this stream, and lives no longer than this value lets it.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        match (&self.kind, &other.kind) {
            (Kind::Owned(stream), Kind::Owned(other)) => Arc::ptr_eq(stream, other),
            (Kind::Borrowed(handle), Kind::Borrowed(other)) => handle == other,
            // One may have ended, and the other been given its number.
            (Kind::Owned(_), Kind::Borrowed(_)) | (Kind::Borrowed(_), Kind::Owned(_)) => false,
        }
    }

    /// The stream's device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Waits until all work on the stream has finished. Operations of a buffer finish within their
    /// time-out, so the wait is bounded by them and by the caller's own work.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.device
            .driver()
            .stream_synchronize(self.device.ordinal(), self.handle())
            .map_err(Error::driver("synchronising a stream"))
    }

    /// Enqueues a kernel without work, launched as the operations are: what it takes between two
    /// events is what timing costs by itself. Kernels on the host do nothing.
    pub fn launch_empty(&self) -> Result<(), Error> {
        launch::empty(self).map_err(Error::launch)
    }

    /// Lets later work on this stream wait for what is on `other` now: `event` is recorded there and
    /// waited for here. Any event of the device serves; an [untimed](Event::untimed) one takes least.
    ///
    /// Both are enqueued and the host waits for nothing, so that a CUDA graph can capture them. The
    /// event is free again on return: one serves any number of such orders. To wait for a point that
    /// other work has been enqueued behind since, [record](Event::record) an event there and
    /// [`wait`](Self::wait) for it.
    ///
    /// Dispatch and combine beside other work are [described](crate::Buffer#beside-other-work) with
    /// the buffer.
    ///
    /// # Errors
    /// [`Error::OtherDevice`] if streams and event are not of one device; nothing was recorded
    /// then. [`Error::Driver`] if the driver refuses. This stream then waits for nothing more than
    /// before.
    pub fn follow(&self, other: &Self, event: &mut Event) -> Result<(), Error> {
        self.device.check(WAITING, "event", &event.device)?;
        event.record(other)?;
        self.wait(event)
    }

    /// Lets later work on this stream wait for an event, for the point where it was last recorded
    /// when this is called. An event that was never recorded is not waited for.
    ///
    /// # Errors
    /// [`Error::OtherDevice`] if the event is not of this stream's device.
    pub fn wait(&self, event: &Event) -> Result<(), Error> {
        self.device.check(WAITING, "event", &event.device)?;
        self.device
            .driver()
            .stream_wait_event(self.device.ordinal(), self.handle(), event.event.handle())
            .map_err(Error::driver(WAITING))
    }
}

const WAITING: &str = "letting a stream wait";

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream {:#x} of {:?}", self.handle().0, self.device)
    }
}

/// A point in a stream's work, with the time at which it was reached unless it is
/// [untimed](Self::untimed).
///
/// ```
/// # use ep::{Device, Event, Stream, driver::DeviceOrdinal};
/// # use ep_sim::{Cluster, SimDriver};
/// # let device = Device::host(SimDriver::new(&Cluster::hgx_h200(1), 0, &[0]), DeviceOrdinal(0));
/// let stream = Stream::new(&device)?;
/// let (start, end) = (Event::new(&device)?, Event::new(&device)?);
/// start.record(&stream)?;
/// end.record(&stream)?;
/// end.synchronize()?;
/// assert!(end.elapsed_us(&start)? >= 0.0);
/// # Ok::<(), ep::Error>(())
/// ```
#[derive(Debug)]
pub struct Event {
    event: vmm::Event,
    device: Device,
}

impl Event {
    /// Creates an event that can be timed.
    pub fn new(device: &Device) -> Result<Self, Error> {
        Self::create(device, true)
    }

    /// Creates an event that only orders work: [`elapsed_us`](Self::elapsed_us) is refused, and the
    /// device spends no time on taking the time.
    pub fn untimed(device: &Device) -> Result<Self, Error> {
        Self::create(device, false)
    }

    fn create(device: &Device, timing: bool) -> Result<Self, Error> {
        let event = vmm::Event::new(device.driver(), device.ordinal(), timing)
            .map_err(Error::driver("creating an event"))?;
        Ok(Self {
            event,
            device: device.clone(),
        })
    }

    /// The driver's handle.
    pub fn handle(&self) -> EventHandle {
        self.event.handle()
    }

    /// The event's device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Records the event behind the work that is on the stream now.
    ///
    /// # Errors
    /// [`Error::OtherDevice`] if the stream is not of the event's device.
    pub fn record(&self, stream: &Stream) -> Result<(), Error> {
        let doing = "recording an event";
        self.device.check(doing, "stream", stream.device())?;
        self.event
            .record(stream.handle())
            .map_err(Error::driver(doing))
    }

    /// Waits until the event has been reached.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.event
            .synchronize()
            .map_err(Error::driver("waiting for an event"))
    }

    /// Microseconds from `start` to this event, both timed, recorded and reached; exact to about
    /// half a microsecond.
    ///
    /// # Errors
    /// [`Error::OtherDevice`] if they are not of one device.
    pub fn elapsed_us(&self, start: &Self) -> Result<f64, Error> {
        let doing = "timing events";
        self.device.check(doing, "first event", &start.device)?;
        self.event
            .elapsed_us(&start.event)
            .map_err(Error::driver(doing))
    }
}
