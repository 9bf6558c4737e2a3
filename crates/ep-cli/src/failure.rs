//! Errors on their way to the user.

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use ep::{Buffer, Fault};

/// Why something cannot go on.
pub(crate) type Failure = Box<dyn Error + Send + Sync>;

/// What operations reported although every rank was there and every expert exists.
#[derive(Debug, thiserror::Error)]
#[error("operations reported: {}", .0.iter().map(Fault::to_string).collect::<Vec<_>>().join("; "))]
struct Faults(Vec<Fault>);

/// Fails if the buffer's operations met anything.
pub(crate) fn check(buffer: &Buffer) -> Result<(), Failure> {
    let faults = buffer.faults()?;
    if faults.is_empty() {
        Ok(())
    } else {
        Err(Faults(faults).into())
    }
}

/// How the command ends: whether what it was asked for is so, or why it cannot say.
pub(crate) fn exit_code(outcome: Result<bool, Failure>) -> ExitCode {
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // Written at once: processes of other ranks write there too. If nobody can be told, the
            // exit status is what is left.
            let line = format!("error: {}\n", chain(&*error));
            let _ = io::stderr().write_all(line.as_bytes());
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += ": ";
        text += &error.to_string();
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn causes_are_in_the_text() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] io::Error);
        assert_eq!(chain(&Outer(io::Error::other("inner"))), "outer: inner");
    }
}
