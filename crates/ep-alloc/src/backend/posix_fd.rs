//! File descriptors: memory that every process of a host maps, whatever its namespaces.

use ep_sys::{DeviceInfo, HandleKind};

use super::Vmm;
use crate::Untried;

pub(super) struct PosixFd;

impl Vmm for PosixFd {
    const HANDLE: HandleKind = HandleKind::PosixFd;

    fn ruled_out(&self, info: &DeviceInfo) -> Option<Untried> {
        (!info.posix_fd_attribute).then_some(Untried::PosixFdAttribute)
    }
}
