//! Errors on their way to the user.

use std::error::Error;

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
