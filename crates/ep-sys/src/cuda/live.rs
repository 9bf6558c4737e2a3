//! What libcuda handed out and would follow unchecked if it were handed back twice.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::load::Site;
use super::refused;
use crate::{EventHandle, PhysHandle, Result, Status, StreamHandle};

/// An object that libcuda knows by the address of its own record. It ends the process when given
/// the number of one that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Object {
    Physical(u64),
    Stream(u64),
    Event(u64),
}

/// The objects created and not yet released. Importing an allocation that the process already has
/// may give the same handle again, to be released as often.
#[derive(Default)]
pub(super) struct Live(Mutex<BTreeMap<Object, u32>>);

impl Live {
    pub(super) fn add(&self, object: impl Into<Object>) {
        *self.lock().entry(object.into()).or_default() += 1;
    }

    /// Refuses what is not live. Nothing keeps it so: releasing an object while another thread uses
    /// it is the caller's mistake.
    pub(super) fn check(&self, site: Site, object: impl Into<Object>) -> Result<()> {
        let object = object.into();
        match self.lock().contains_key(&object) {
            true => Ok(()),
            false => Err(refused(site, object.absent())),
        }
    }

    /// Strikes out an object that is about to be released.
    pub(super) fn take(&self, site: Site, object: impl Into<Object>) -> Result<()> {
        let object = object.into();
        let mut live = self.lock();
        let count = live
            .get_mut(&object)
            .ok_or_else(|| refused(site, object.absent()))?;
        *count -= 1;
        if *count == 0 {
            live.remove(&object);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Object, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Object {
    /// What libcuda documents for a number that names no such object.
    fn absent(self) -> Status {
        match self {
            Self::Physical(_) => Status::INVALID_VALUE,
            Self::Stream(_) | Self::Event(_) => Status::INVALID_HANDLE,
        }
    }
}

impl From<PhysHandle> for Object {
    fn from(handle: PhysHandle) -> Self {
        Self::Physical(handle.0)
    }
}

impl From<StreamHandle> for Object {
    fn from(stream: StreamHandle) -> Self {
        Self::Stream(stream.0)
    }
}

impl From<EventHandle> for Object {
    fn from(event: EventHandle) -> Self {
        Self::Event(event.0)
    }
}
