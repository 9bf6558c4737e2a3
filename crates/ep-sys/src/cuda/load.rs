//! Opening a vendor's library and calling what it exports.

#![allow(
    unsafe_code,
    reason = "this file opens shared libraries and resolves their symbols"
)]

use std::ffi::OsStr;

use libloading::Library;

use crate::{Call, DeviceOrdinal, Error, Result};

/// What an entry point is called for: named by errors and logs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Site {
    pub(crate) call: Call,
    pub(crate) device: DeviceOrdinal,
}

/// Opens a vendor's library for the life of the process: such a library starts threads and
/// registers exit handlers, and does not survive being closed.
pub(crate) fn open(name: &'static str, path: &OsStr) -> Result<&'static Library> {
    // SAFETY: `Library::new` asks that the library's initialisers be sound to run. These are a
    // driver's own, which have no precondition.
    let library = unsafe { Library::new(path) }.map_err(|source| Error::Library {
        library: name,
        source: Box::new(source),
    })?;
    tracing::debug!(library = ?path, "opened");
    Ok(Box::leak(Box::new(library)))
}

/// The entry point that `library` exports under exactly this name, if it does.
///
/// # Safety
/// `F` is the type of a C function pointer with the entry point's signature.
pub(crate) unsafe fn symbol<F: Copy>(library: &'static Library, name: &str) -> Option<F> {
    // SAFETY: `get` asks for the symbol's type, which the caller vouches for. The pointer does not
    // outlive the library, which is never closed.
    let symbol = unsafe { library.get::<F>(name) };
    symbol.ok().map(|f| *f)
}

/// Declares a table of entry points under the names that the library exports.
///
/// Each becomes a method that takes a [`Site`] and the declared arguments and returns
/// `Result<()>`: [`Error::MissingSymbol`] if the library has no such entry point, what the given
/// function makes of the status if that is not zero.
///
/// As in an `unsafe extern` block, a function is listed under `safe` when its declared types alone
/// make the call valid for memory of this process: numbers, and references to what the library
/// reads or writes. Statuses are numbers, because a newer library may return one without a name.
macro_rules! entry_points {
    (
        $(#[$meta:meta])*
        $vis:vis struct $table:ident refuses with $refused:path;
        safe { $(fn $safe:ident($($arg:ident: $type:ty),* $(,)?);)* }
        // SAFETY: a pattern, nothing is called; the methods made of it are unsafe to call.
        unsafe { $(fn $raw:ident($($raw_arg:ident: $raw_type:ty),* $(,)?);)* }
    ) => {
        $(#[$meta])*
        #[allow(non_snake_case, reason = "entry points keep the vendor's names")]
        $vis struct $table {
            $($safe: Option<unsafe extern "C" fn($($type),*) -> u32>,)*
            $($raw: Option<unsafe extern "C" fn($($raw_type),*) -> u32>,)*
        }

        #[allow(non_snake_case, reason = "entry points keep the vendor's names")]
        impl $table {
            $vis fn resolve(library: &'static libloading::Library) -> Self {
                Self {
                    // SAFETY: the vendor's header declares this function with these types.
                    $($safe: unsafe { $crate::cuda::load::symbol(library, stringify!($safe)) },)*
                    // SAFETY: the vendor's header declares this function with these types.
                    $($raw: unsafe { $crate::cuda::load::symbol(library, stringify!($raw)) },)*
                }
            }

            $(
                $vis fn $safe(
                    &self,
                    site: $crate::cuda::load::Site,
                    $($arg: $type),*
                ) -> $crate::Result<()> {
                    let f = self.$safe.ok_or($crate::Error::MissingSymbol {
                        call: site.call,
                        symbol: stringify!($safe),
                    })?;
                    // SAFETY: `f` has this signature, and the argument types alone make the call
                    // valid, as its place in the table says.
                    let status = unsafe { f($($arg),*) };
                    $crate::cuda::load::answer(site, stringify!($safe), status, $refused)
                }
            )*

            $(
                /// # Safety
                /// The pointers are valid for what the vendor documents for this entry point.
                $vis unsafe fn $raw(
                    &self,
                    site: $crate::cuda::load::Site,
                    $($raw_arg: $raw_type),*
                ) -> $crate::Result<()> {
                    let f = self.$raw.ok_or($crate::Error::MissingSymbol {
                        call: site.call,
                        symbol: stringify!($raw),
                    })?;
                    // SAFETY: `f` has this signature; the caller vouches for the pointers.
                    let status = unsafe { f($($raw_arg),*) };
                    $crate::cuda::load::answer(site, stringify!($raw), status, $refused)
                }
            )*
        }
    };
}
pub(crate) use entry_points;

/// Logs a status and turns it into a result.
pub(crate) fn answer(
    site: Site,
    symbol: &'static str,
    status: u32,
    refused: fn(Site, u32) -> Error,
) -> Result<()> {
    tracing::debug!(call = symbol, device = site.device.0, status);
    if status == 0 {
        Ok(())
    } else {
        Err(refused(site, status))
    }
}
