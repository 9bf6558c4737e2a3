//! Fabric handles: memory that every rank of an NVLink clique maps.

use ep_sys::{DeviceInfo, HandleKind};

use super::Vmm;
use crate::Untried;

pub(super) struct Fabric;

impl Vmm for Fabric {
    const HANDLE: HandleKind = HandleKind::Fabric;

    fn ruled_out(&self, info: &DeviceInfo) -> Option<Untried> {
        (!info.fabric_attribute).then_some(Untried::FabricAttribute)
    }
}
