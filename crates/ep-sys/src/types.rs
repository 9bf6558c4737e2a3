//! Values that cross the driver seam: numbers in newtypes, so that a pointer, a handle and an
//! ordinal cannot be mistaken for one another.

use std::fmt;
use std::os::fd::OwnedFd;

/// Bytes of a `CUmemFabricHandle`.
pub const FABRIC_HANDLE_BYTES: usize = 64;
/// Bytes of a `CUipcMemHandle`.
pub const IPC_HANDLE_BYTES: usize = 64;

/// A UUID: of a GPU (`cuDeviceGetUuid_v2`) or of an NVLink cluster (NVML).
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bytes16(pub [u8; 16]);

impl Bytes16 {
    /// Sixteen zero bytes: NVML's "no cluster".
    pub const ZERO: Self = Self([0; 16]);

    /// Whether every byte is zero.
    pub fn is_zero(self) -> bool {
        self == Self::ZERO
    }
}

impl fmt::Display for Bytes16 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, b) in self.0.iter().enumerate() {
            if matches!(i, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{b:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Bytes16 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A device's number among those visible to this process. Never leaves the process: another
/// process may see the same GPU under another number. Use [`DeviceInfo::uuid`] across processes.
///
/// [`DeviceInfo::uuid`]: crate::DeviceInfo::uuid
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceOrdinal(pub u32);

impl fmt::Display for DeviceOrdinal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device {}", self.0)
    }
}

/// A device address (`CUdeviceptr`). Zero is null.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    /// The null address.
    pub const NULL: Self = Self(0);

    /// Whether this is the null address.
    pub fn is_null(self) -> bool {
        self.0 == 0
    }

    /// The address `bytes` further on.
    pub fn offset(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }
}

impl fmt::Debug for DevicePtr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A physical allocation (`CUmemGenericAllocationHandle`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PhysHandle(pub u64);

/// A stream (`CUstream`) as a number. Zero is the legacy default stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct StreamHandle(pub u64);

impl StreamHandle {
    /// The legacy default stream by its explicit name, `CU_STREAM_LEGACY`: the same as zero.
    pub const LEGACY: Self = Self(1);
    /// `CU_STREAM_PER_THREAD`: the default stream of whichever thread uses it, so another stream on
    /// every thread.
    pub const PER_THREAD: Self = Self(2);
}

/// An event (`CUevent`) as a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EventHandle(pub u64);

/// Page-locked host memory that the device can also address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// Address in this process.
    pub host: u64,
    /// Address on the device.
    pub device: DevicePtr,
    /// Size in bytes.
    pub bytes: u64,
}

/// How a physical allocation can be handed to another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HandleKind {
    /// `CU_MEM_HANDLE_TYPE_FABRIC`: 64 bytes that any host of the NVLink domain can import.
    Fabric,
    /// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`: a descriptor, for processes of one host.
    PosixFd,
}

/// Which granularity is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GranularityKind {
    /// The smallest multiple that the driver accepts.
    Minimum,
    /// The multiple that the driver prefers.
    Recommended,
}

/// A physical allocation in the form in which it travels.
#[derive(Debug)]
pub enum ShareableHandle {
    /// A fabric handle.
    Fabric([u8; FABRIC_HANDLE_BYTES]),
    /// An owned descriptor; travels by `SCM_RIGHTS`.
    PosixFd(OwnedFd),
}

impl ShareableHandle {
    /// The kind of handle that this is.
    pub fn kind(&self) -> HandleKind {
        match self {
            Self::Fabric(_) => HandleKind::Fabric,
            Self::PosixFd(_) => HandleKind::PosixFd,
        }
    }
}
