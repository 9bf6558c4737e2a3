//! The operator's override.

use std::fmt;

use crate::BackendKind;

/// Whether the policy chooses the backend, or the operator did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Choice {
    /// The policy chooses.
    #[default]
    Auto,
    /// This backend or an error.
    Force(BackendKind),
}

impl Choice {
    /// Parses a value of `EP_ALLOC`: `auto`, `fabric`, `posix-fd` or `malloc`. Reports spell
    /// `posix_fd`, so that spelling is taken too.
    pub fn parse(value: &str) -> Result<Self, ChoiceError> {
        match value {
            "auto" => Ok(Self::Auto),
            "fabric" => Ok(Self::Force(BackendKind::Fabric)),
            "posix-fd" | "posix_fd" => Ok(Self::Force(BackendKind::PosixFd)),
            "malloc" => Ok(Self::Force(BackendKind::Malloc)),
            _ => Err(ChoiceError {
                value: value.to_owned(),
            }),
        }
    }

    /// The choice that two environment variables express; `None` is a variable that is not set.
    ///
    /// * `EP_ALLOC`, when set and not empty, is [parsed](Self::parse) and wins.
    /// * Otherwise `MC_USE_NVLINK_IPC` set to anything but `0`, the empty string included, means
    ///   malloc, as in Mooncake. Set to `0` it means that fabric is allowed, which is
    ///   [`Auto`](Self::Auto): fabric where it connects more ranks, never an attempt that fails.
    /// * Otherwise `Auto`.
    pub fn from_values(
        ep_alloc: Option<&str>,
        mc_use_nvlink_ipc: Option<&str>,
    ) -> Result<Self, ChoiceError> {
        match (ep_alloc, mc_use_nvlink_ipc) {
            (Some(value), _) if !value.is_empty() => Self::parse(value),
            (_, Some(value)) if value != "0" => Ok(Self::Force(BackendKind::Malloc)),
            _ => Ok(Self::Auto),
        }
    }

    /// The backend that is forced.
    pub fn forced(self) -> Option<BackendKind> {
        match self {
            Self::Auto => None,
            Self::Force(kind) => Some(kind),
        }
    }

    /// A small integer that travels.
    pub fn to_code(self) -> u8 {
        self.forced().map_or(0, BackendKind::to_code)
    }

    /// The choice that [`to_code`](Self::to_code) gave this code.
    pub fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Auto),
            _ => BackendKind::from_code(code).map(Self::Force),
        }
    }
}

impl fmt::Display for Choice {
    /// As `EP_ALLOC` spells it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Force(BackendKind::Fabric) => "fabric",
            Self::Force(BackendKind::PosixFd) => "posix-fd",
            Self::Force(BackendKind::Malloc) => "malloc",
        })
    }
}

/// A value of `EP_ALLOC` that names no choice.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("EP_ALLOC is {value:?}; set it to auto, fabric, posix-fd or malloc")]
#[non_exhaustive]
pub struct ChoiceError {
    /// The value.
    pub value: String,
}
