//! A device with its driver and its kernels.

use std::fmt;
use std::io;
use std::sync::Arc;

use ep_kernels::{HostKernels, Kernels};
use ep_sys::{Bytes16, DeviceInfo, DeviceOrdinal, DevicePtr, Driver, vmm};

use crate::Error;

/// A GPU, real or simulated, and the kernels that run on it. Cheap to clone.
///
/// What is used together (tensors, streams, events, a buffer) is of one device: of one driver and
/// one number. What is not is refused by name, before anything is enqueued.
///
/// ```
/// use ep::{Device, driver::DeviceOrdinal};
/// use ep_sim::{Cluster, SimDriver};
///
/// let driver = SimDriver::new(&Cluster::hgx_h200(2), 0, &[0, 1]);
/// let device = Device::host(driver, DeviceOrdinal(1));
/// assert_eq!(device.ordinal(), DeviceOrdinal(1));
/// assert_eq!(device.backend(), "host");
/// assert_eq!(device.info()?.multiprocessors, 132);
/// # Ok::<(), ep::Error>(())
/// ```
///
/// Nobody gets a device's driver: with it, safe code could free or write what tensors and buffers
/// hold.
///
/// ```compile_fail,E0624
/// # fn f(tensor: &ep::Tensor) {
/// let device = tensor.device();
/// device.driver().mem_free(device.ordinal(), tensor.ptr()); // error: `driver` is private
/// # }
/// ```
#[derive(Clone)]
pub struct Device {
    shared: Arc<Shared>,
    /// Whether the kernels can follow the driver's addresses.
    can_run: bool,
}

struct Shared {
    driver: Arc<dyn Driver>,
    kernels: Arc<dyn Kernels>,
    ordinal: DeviceOrdinal,
}

impl Device {
    /// A device of a simulated cluster, whose memory this process addresses directly; dispatch and
    /// combine run on the calling thread.
    ///
    /// Of a driver whose device memory is elsewhere no buffer can be made.
    pub fn host(driver: Arc<dyn Driver>, ordinal: DeviceOrdinal) -> Self {
        let can_run = driver.is_host_addressable();
        Self {
            can_run,
            ..Self::from_parts(driver, Arc::new(HostKernels::default()), ordinal)
        }
    }

    /// The GPU with this number among those that the process sees, with the CUDA kernels. Devices
    /// of one number are one device, however often they are made.
    ///
    /// # Errors
    /// [`Error::Driver`] if there is no driver or no such GPU among those that the process sees,
    /// [`Error::Launch`] if the linked kernels are of another version or not compiled for it.
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: DeviceOrdinal) -> Result<Self, Error> {
        use ep_kernels::CudaKernels;
        use ep_sys::CudaDriver;

        let driver = CudaDriver::load().map_err(Error::driver("opening the driver"))?;
        driver
            .device_info(ordinal)
            .map_err(Error::driver("opening the device"))?;
        let kernels = CudaKernels::new().map_err(Error::launch)?;
        kernels.load(ordinal.0 as i32).map_err(Error::launch)?;
        Ok(Self::from_parts(driver, Arc::new(kernels), ordinal))
    }

    pub(crate) fn from_parts(
        driver: Arc<dyn Driver>,
        kernels: Arc<dyn Kernels>,
        ordinal: DeviceOrdinal,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                driver,
                kernels,
                ordinal,
            }),
            can_run: true,
        }
    }

    /// The device's number in this process.
    pub fn ordinal(&self) -> DeviceOrdinal {
        self.shared.ordinal
    }

    /// Which kernels run: `"cuda"` or `"host"`.
    pub fn backend(&self) -> &'static str {
        self.shared.kernels.name()
    }

    /// What the driver says of it: name, UUID, multiprocessors and more.
    pub fn info(&self) -> Result<DeviceInfo, Error> {
        self.driver()
            .device_info(self.ordinal())
            .map_err(Error::driver("asking for a device"))
    }

    /// The driver. Only for this crate: a driver frees and writes any address that it is told,
    /// also one of another's tensor.
    pub(crate) fn driver(&self) -> &Arc<dyn Driver> {
        &self.shared.driver
    }

    pub(crate) fn kernels(&self) -> &dyn Kernels {
        &*self.shared.kernels
    }

    /// Zeroes memory that this device can write, and waits until that is done.
    pub(crate) fn zero(&self, ptr: DevicePtr, bytes: u64) -> ep_sys::Result<()> {
        let (driver, ordinal) = (self.driver(), self.ordinal());
        let stream = vmm::Stream::new(driver, ordinal)?;
        driver.fill(ordinal, ptr, 0, bytes, stream.handle())?;
        stream.synchronize()?;
        stream.close()
    }

    pub(crate) fn can_run(&self) -> bool {
        self.can_run
    }

    /// Whether memory, streams and events of `other` are of this device: it is the same one of the
    /// same driver. Another driver object gives the same numbers to other things.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let driver = |device: &Self| Arc::as_ptr(&device.shared.driver).addr();
        self.ordinal() == other.ordinal() && driver(self) == driver(other)
    }

    /// Refuses what is of another device than this one.
    pub(crate) fn check(
        &self,
        doing: &'static str,
        argument: &'static str,
        got: &Self,
    ) -> Result<(), Error> {
        if got.is_same(self) {
            return Ok(());
        }
        Err(Error::OtherDevice {
            doing,
            argument,
            expected: self.clone(),
            got: got.clone(),
        })
    }

    /// What two ranks have in common exactly if they are of one process, as the driver sees
    /// processes: every simulated driver is one.
    pub(crate) fn process(&self) -> io::Result<Bytes16> {
        let Bytes16(mut token) = ep_peers::process_token()?;
        if self.backend() != "cuda" {
            let driver = Arc::as_ptr(&self.shared.driver).addr() as u64;
            for (byte, of_driver) in token.iter_mut().rev().zip(driver.to_ne_bytes()) {
                *byte ^= of_driver;
            }
        }
        Ok(Bytes16(token))
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.ordinal(), self.backend())
    }
}
