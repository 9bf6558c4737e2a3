//! The contract on memory that the calling thread can address.

/// The host implementation.
#[derive(Debug, Default)]
pub struct HostKernels {}
