//! Results on their way to the user.

use std::fmt::Display;
use std::io::{self, Write};

use crate::failure::Failure;

/// Why a result was not written.
#[derive(Debug, thiserror::Error)]
#[error("standard output cannot be written; check where it leads")]
struct OutputError(#[source] io::Error);

/// Writes a line to standard output. A reader that has gone wants no more of it.
pub(crate) fn print(line: impl Display) -> Result<(), Failure> {
    let line = format!("{line}\n");
    let mut out = io::stdout().lock();
    match out.write_all(line.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(OutputError(error).into()),
        _ => Ok(()),
    }
}
