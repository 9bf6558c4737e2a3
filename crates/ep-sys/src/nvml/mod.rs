//! NVML: a GPU's registration with its NVLink fabric, and its links to others.

#![allow(unsafe_code, reason = "this module calls NVML's functions")]

#[cfg(test)]
mod tests;

use std::ffi::{CString, OsStr, c_char, c_void};

use crate::cuda::load::{self, Site, entry_points};
use crate::{Bytes16, Error, FabricInfo, FabricState, Link, Result};

const NOT_SUPPORTED: u32 = 3;
const NO_PERMISSION: u32 = 4;
const NOT_FOUND: u32 = 6;
const FUNCTION_NOT_FOUND: u32 = 13;
const ARGUMENT_VERSION_MISMATCH: u32 = 25;

/// `NVML_P2P_CAPS_INDEX_READ` and `NVML_P2P_CAPS_INDEX_NVLINK`.
const P2P_READ: u32 = 0;
const P2P_NVLINK: u32 = 2;
/// `NVML_P2P_STATUS_OK` and `NVML_P2P_STATUS_UNKNOWN`; what lies between is why not.
const P2P_OK: u32 = 0;
const P2P_UNKNOWN: u32 = 6;

/// `nvmlGpuFabricInfo_t`.
#[repr(C)]
#[derive(Default)]
struct InfoV1 {
    cluster_uuid: [u8; 16],
    status: u32,
    clique_id: u32,
    state: u8,
}

/// `nvmlGpuFabricInfo_v3_t`, of which `nvmlGpuFabricInfo_v2_t` is the part before `health_summary`.
#[repr(C)]
#[derive(Default)]
struct InfoV3 {
    version: u32,
    info: InfoV1,
    health_mask: u32,
    health_summary: u8,
}

const V2: u32 = version(std::mem::offset_of!(InfoV3, health_summary), 2);
const V3: u32 = version(size_of::<InfoV3>(), 3);

/// `NVML_STRUCT_VERSION`.
const fn version(bytes: usize, version: u32) -> u32 {
    bytes as u32 | version << 24
}

const _: () = {
    assert!(size_of::<InfoV1>() == 28);
    assert!(std::mem::offset_of!(InfoV3, health_mask) == 32);
    assert!(size_of::<InfoV3>() == 40);
    assert!(V2 == 0x0200_0024);
    assert!(V3 == 0x0300_0028);
};

fn refused(Site { call, device }: Site, status: u32) -> Error {
    Error::Nvml {
        call,
        device,
        status,
    }
}

entry_points! {
    /// NVML. A device is an opaque pointer, passed as a number.
    struct Table refuses with refused;

    safe {
        fn nvmlInit_v2();
        fn nvmlShutdown();
        fn nvmlDeviceGetGpuFabricInfo(device: u64, info: &mut InfoV1);
        fn nvmlDeviceGetP2PStatus(device: u64, peer: u64, capability: u32, status: &mut u32);
    }

    // SAFETY: nothing is called here; raw pointers make the methods of these unsafe to call.
    unsafe {
        fn nvmlDeviceGetHandleByPciBusId_v2(id: *const c_char, device: &mut u64);
        fn nvmlDeviceGetHandleByUUID(id: *const c_char, device: &mut u64);
        fn nvmlDeviceGetGpuFabricInfoV(device: u64, info: *mut c_void);
    }
}

/// The host's NVML, initialised only while it is asked something.
pub(crate) struct Nvml(Table);

impl Nvml {
    /// Opens the library.
    pub(crate) fn open(path: &OsStr) -> Result<Self> {
        load::open("libnvidia-ml.so.1", path).map(|library| Self(Table::resolve(library)))
    }

    /// What NVML says of the GPU at a PCI address. Of a GPU without a fabric it is
    /// [`FabricInfo::NONE`].
    pub(crate) fn fabric_info(&self, site: Site, pci_bus_id: &str) -> Result<FabricInfo> {
        match self.ask(site, pci_bus_id, |device| self.fabric(site, device)) {
            Err(Error::Nvml {
                status: NOT_SUPPORTED,
                ..
            }) => Ok(FabricInfo::NONE),
            answer => answer,
        }
    }

    /// What joins the GPU at a PCI address and those with these UUIDs.
    pub(crate) fn peer_links(
        &self,
        site: Site,
        pci_bus_id: &str,
        peers: &[Bytes16],
    ) -> Result<Vec<Link>> {
        self.ask(site, pci_bus_id, |device| {
            let links = peers
                .iter()
                .map(|peer| match self.link(site, device, *peer) {
                    Err(Error::Nvml {
                        status: NOT_SUPPORTED | NO_PERMISSION | NOT_FOUND,
                        ..
                    }) => Ok(Link::Unknown),
                    answer => answer,
                });
            links.collect()
        })
    }

    /// Asks about the GPU at a PCI address.
    fn ask<T>(
        &self,
        site: Site,
        pci_bus_id: &str,
        question: impl FnOnce(u64) -> Result<T>,
    ) -> Result<T> {
        self.0.nvmlInit_v2(site)?;
        let _session = Session { nvml: self, site };
        let id = CString::new(pci_bus_id).unwrap_or_default();
        let mut device = 0;
        // SAFETY: `id` is a string that ends in a zero.
        unsafe {
            self.0
                .nvmlDeviceGetHandleByPciBusId_v2(site, id.as_ptr(), &mut device)
        }?;
        question(device)
    }

    fn link(&self, site: Site, device: u64, peer: Bytes16) -> Result<Link> {
        let id = CString::new(format!("GPU-{peer}")).unwrap_or_default();
        let mut other = 0;
        // SAFETY: `id` is a string that ends in a zero.
        unsafe {
            self.0
                .nvmlDeviceGetHandleByUUID(site, id.as_ptr(), &mut other)
        }?;
        let status = |capability| {
            let mut status = P2P_UNKNOWN;
            self.0
                .nvmlDeviceGetP2PStatus(site, device, other, capability, &mut status)?;
            Ok(status)
        };
        Ok(match status(P2P_NVLINK)? {
            P2P_OK => Link::Nvlink,
            P2P_UNKNOWN.. => Link::Unknown,
            _ if status(P2P_READ)? == P2P_OK => Link::Pcie,
            _ => Link::Unknown,
        })
    }

    fn fabric(&self, site: Site, device: u64) -> Result<FabricInfo> {
        for version in [V3, V2] {
            match self.versioned(site, device, version) {
                Err(error) if is_too_new(&error) => {}
                answer => return answer.map(FabricInfo::from),
            }
        }
        let mut info = InfoV1::default();
        self.0.nvmlDeviceGetGpuFabricInfo(site, device, &mut info)?;
        Ok(info.into())
    }

    fn versioned(&self, site: Site, device: u64, version: u32) -> Result<InfoV1> {
        let mut info = InfoV3 {
            version,
            ..InfoV3::default()
        };
        // SAFETY: `info` has room for the structure that its version names.
        unsafe {
            self.0
                .nvmlDeviceGetGpuFabricInfoV(site, device, (&raw mut info).cast())
        }?;
        Ok(info.info)
    }
}

impl From<InfoV1> for FabricInfo {
    fn from(info: InfoV1) -> Self {
        Self {
            state: match info.state {
                0 => FabricState::NotSupported,
                1 => FabricState::NotStarted,
                2 => FabricState::InProgress,
                3 => FabricState::Completed,
                other => FabricState::Other(other.into()),
            },
            status: info.status,
            cluster_uuid: Bytes16(info.cluster_uuid),
            clique_id: info.clique_id,
        }
    }
}

/// NVML counts its initialisations; each is undone by one shutdown.
struct Session<'a> {
    nvml: &'a Nvml,
    site: Site,
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.nvml.0.nvmlShutdown(self.site) {
            tracing::error!(%error, "NVML not shut down");
        }
    }
}

/// The library knows no such structure: an older one may serve.
fn is_too_new(error: &Error) -> bool {
    matches!(
        error,
        Error::MissingSymbol { .. }
            | Error::Nvml {
                status: ARGUMENT_VERSION_MISMATCH | FUNCTION_NOT_FOUND,
                ..
            }
    )
}
