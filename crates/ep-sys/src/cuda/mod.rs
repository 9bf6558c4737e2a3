//! The CUDA implementation of the driver trait.

/// The installed NVIDIA driver.
#[derive(Debug)]
pub struct CudaDriver {}
