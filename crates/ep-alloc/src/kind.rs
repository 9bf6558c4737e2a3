//! The backends by name.

use std::fmt;
use std::ops::{Index, IndexMut};

/// A way to allocate memory that peers can map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BackendKind {
    /// `cuMemCreate` with a fabric handle: any rank of the NVLink clique maps it, on any host.
    Fabric,
    /// `cuMemCreate` with a file descriptor: ranks of one host map it, whatever their namespaces.
    PosixFd,
    /// `cuMemAlloc` with a CUDA IPC handle: ranks of one host map it.
    Malloc,
}

impl BackendKind {
    /// Every backend.
    pub const ALL: [Self; 3] = [Self::Fabric, Self::PosixFd, Self::Malloc];

    /// The name in reports: `fabric`, `posix_fd` or `malloc`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fabric => "fabric",
            Self::PosixFd => "posix_fd",
            Self::Malloc => "malloc",
        }
    }

    /// A small integer that travels; never 0.
    pub fn to_code(self) -> u8 {
        match self {
            Self::Fabric => 1,
            Self::PosixFd => 2,
            Self::Malloc => 3,
        }
    }

    /// The backend that [`to_code`](Self::to_code) gave this code.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.to_code() == code)
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One value for each backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PerBackend<T> {
    /// Of [`BackendKind::Fabric`].
    pub fabric: T,
    /// Of [`BackendKind::PosixFd`].
    pub posix_fd: T,
    /// Of [`BackendKind::Malloc`].
    pub malloc: T,
}

impl<T> PerBackend<T> {
    /// Asks `value` for each backend.
    pub fn from_fn(mut value: impl FnMut(BackendKind) -> T) -> Self {
        Self {
            fabric: value(BackendKind::Fabric),
            posix_fd: value(BackendKind::PosixFd),
            malloc: value(BackendKind::Malloc),
        }
    }
}

impl<T> Index<BackendKind> for PerBackend<T> {
    type Output = T;

    fn index(&self, kind: BackendKind) -> &T {
        match kind {
            BackendKind::Fabric => &self.fabric,
            BackendKind::PosixFd => &self.posix_fd,
            BackendKind::Malloc => &self.malloc,
        }
    }
}

impl<T> IndexMut<BackendKind> for PerBackend<T> {
    fn index_mut(&mut self, kind: BackendKind) -> &mut T {
        match kind {
            BackendKind::Fabric => &mut self.fabric,
            BackendKind::PosixFd => &mut self.posix_fd,
            BackendKind::Malloc => &mut self.malloc,
        }
    }
}
