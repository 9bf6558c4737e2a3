//! What a rank found out about a backend by trying it.

use std::fmt;

use crate::Failure;

/// The outcome of trying a backend on one device for one granule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Trial {
    /// Not tried.
    NotTried(Untried),
    /// Every step worked.
    Ok {
        /// Whether the memory was created with the GPUDirect RDMA flag. Always false where the flag
        /// was not wanted, and for malloc, which needs none.
        gdr: bool,
    },
    /// A step failed.
    Refused(Failure),
}

/// Why a backend was not tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Untried {
    /// Nobody probed.
    NotProbed,
    /// `CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED` is 0.
    VmmAttribute,
    /// `CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED` is 0.
    FabricAttribute,
    /// `CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED` is 0.
    PosixFdAttribute,
}

impl Trial {
    /// Whether the backend works on the device.
    pub fn is_ok(self) -> bool {
        matches!(self, Self::Ok { .. })
    }

    /// The step that failed, if one did.
    pub fn failure(self) -> Option<Failure> {
        match self {
            Self::Refused(failure) => Some(failure),
            Self::NotTried(_) | Self::Ok { .. } => None,
        }
    }

    /// An integer that travels.
    pub fn to_code(self) -> u64 {
        match self {
            Self::NotTried(why) => why.to_code(),
            Self::Ok { gdr } => (1 << 48) | u64::from(gdr),
            Self::Refused(failure) => (2 << 48) | failure.to_code(),
        }
    }

    /// The outcome that [`to_code`](Self::to_code) gave this code.
    pub fn from_code(code: u64) -> Option<Self> {
        let low = code & 0xffff_ffff_ffff;
        match (code >> 48, low) {
            (0, why) => Untried::from_code(why).map(Self::NotTried),
            (1, 0) => Some(Self::Ok { gdr: false }),
            (1, 1) => Some(Self::Ok { gdr: true }),
            (2, failure) => Failure::from_code(failure).map(Self::Refused),
            _ => None,
        }
    }
}

impl Default for Trial {
    fn default() -> Self {
        Self::NotTried(Untried::NotProbed)
    }
}

impl Untried {
    const ALL: [Self; 4] = [
        Self::NotProbed,
        Self::VmmAttribute,
        Self::FabricAttribute,
        Self::PosixFdAttribute,
    ];

    /// What an operator should check next.
    pub fn check(self) -> &'static str {
        match self {
            Self::NotProbed => "probe the device first",
            Self::VmmAttribute => "use a GPU and driver with virtual memory management",
            Self::FabricAttribute => {
                "use a GPU of the Hopper generation or later and a driver of release 550 or later"
            }
            Self::PosixFdAttribute => "check the GPU's compute mode and virtualisation",
        }
    }

    fn to_code(self) -> u64 {
        match self {
            Self::NotProbed => 0,
            Self::VmmAttribute => 1,
            Self::FabricAttribute => 2,
            Self::PosixFdAttribute => 3,
        }
    }

    fn from_code(code: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|why| why.to_code() == code)
    }
}

impl fmt::Display for Untried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotProbed => "it was not probed",
            Self::VmmAttribute => "device attribute VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED is 0",
            Self::FabricAttribute => "device attribute HANDLE_TYPE_FABRIC_SUPPORTED is 0",
            Self::PosixFdAttribute => {
                "device attribute HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED is 0"
            }
        })
    }
}
