//! Matrix products on the GPU: bf16 in and out, float32 within, by cuBLAS.

#![allow(unsafe_code, reason = "calls cuBLAS with device addresses")]

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use cudarc::cublas::{result, sys};
use cudarc::driver::{CudaContext, DriverError};
use ep::{DType, Device, Dims, Stream, TensorMut, TensorRef};

/// Why a product was not enqueued.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum BlasError {
    #[error(
        "libcublas is not found; add the folder that holds libcublas.so.13 to LD_LIBRARY_PATH (in \
         a CUDA toolkit lib64, in the PyPI wheel nvidia-cublas nvidia/cu13/lib)"
    )]
    Absent,
    #[error(
        "the context of GPU {device} is refused with status {status}; check that no other process \
         has the GPU for itself"
    )]
    Context { device: usize, status: u32 },
    #[error("{call} failed with {status}; check that libcublas is of the driver's CUDA version")]
    Call { call: &'static str, status: i32 },
    #[error(
        "{operand} is {dtype}{dims} on {device:?}; a bf16 matrix on the stream's device is needed"
    )]
    Operand {
        operand: &'static str,
        dims: Dims,
        dtype: DType,
        device: Device,
    },
    #[error("the operands' sizes differ: {input:?} · {weights:?}ᵀ is not {output:?}")]
    Sizes {
        input: Dims,
        weights: Dims,
        output: Dims,
    },
}

/// cuBLAS on one stream.
#[derive(Debug)]
pub(crate) struct Blas {
    handle: sys::cublasHandle_t,
    context: Arc<CudaContext>,
    /// Outlives the handle, which uses it.
    stream: Stream,
}

impl Blas {
    /// Opens cuBLAS for the stream and its device.
    pub(crate) fn new(stream: &Stream) -> Result<Self, BlasError> {
        // SAFETY: opens and closes a library that has no more than the usual initialisers.
        if !unsafe { sys::is_culib_present() } {
            return Err(BlasError::Absent);
        }
        let device = stream.device().ordinal().0 as usize;
        // Retains the primary context, which is the driver's own, and makes it current.
        let context = CudaContext::new(device).map_err(refused(device))?;
        let handle = result::create_handle().map_err(failed("cublasCreate"))?;
        let this = Self {
            handle,
            context,
            stream: stream.clone(),
        };
        // SAFETY: the handle is new, and the stream is alive as long as `this`.
        unsafe { result::set_stream(handle, stream.handle().0 as sys::cudaStream_t) }
            .map_err(failed("cublasSetStream"))?;
        Ok(this)
    }

    /// Enqueues `output = input · weightsᵀ`, all of them row-major bf16 matrices.
    pub(crate) fn product(
        &self,
        input: TensorRef<'_>,
        weights: TensorRef<'_>,
        output: TensorMut<'_>,
    ) -> Result<(), BlasError> {
        let on = self.stream.device();
        let [rows, depth] = matrix("the input", on, input.device(), input.dtype(), input.dims())?;
        let [columns, weights_depth] = matrix(
            "the weights",
            on,
            weights.device(),
            weights.dtype(),
            weights.dims(),
        )?;
        let out = matrix(
            "the output",
            on,
            output.device(),
            output.dtype(),
            output.dims(),
        )?;
        let int = |size| c_int::try_from(size).ok();
        let (true, Some(m), Some(n), Some(k)) = (
            weights_depth == depth && out == [rows, columns],
            int(columns),
            int(rows),
            int(depth),
        ) else {
            return Err(BlasError::Sizes {
                input: input.dims(),
                weights: weights.dims(),
                output: output.dims(),
            });
        };
        if m == 0 || n == 0 {
            return Ok(());
        }
        self.bind()?;
        let (one, zero) = (1.0_f32, 0.0_f32);
        let bf16 = sys::cudaDataType::CUDA_R_16BF;
        // cuBLAS is column-major, so that it sees the transposes: outputᵀ = weights · inputᵀ.
        // SAFETY: the views are of dense matrices of the sizes given here, whose memory is freed
        // only after the stream's work; alpha and beta are float32, as the compute type asks.
        unsafe {
            result::gemm_ex(
                self.handle,
                sys::cublasOperation_t::CUBLAS_OP_T,
                sys::cublasOperation_t::CUBLAS_OP_N,
                m,
                n,
                k,
                (&raw const one).cast::<c_void>(),
                weights.ptr().0 as *const c_void,
                bf16,
                k,
                input.ptr().0 as *const c_void,
                bf16,
                k,
                (&raw const zero).cast::<c_void>(),
                output.ptr().0 as *mut c_void,
                bf16,
                m,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(failed("cublasGemmEx"))
    }

    /// Makes the context current, which launches of other libraries on this thread may have changed.
    fn bind(&self) -> Result<(), BlasError> {
        self.context
            .bind_to_thread()
            .map_err(refused(self.context.ordinal()))
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        if let Err(error) = self.bind() {
            tracing::error!(%error, "a cuBLAS handle is left behind");
            return;
        }
        // SAFETY: the handle was created by `new` and is destroyed here only.
        if let Err(error) = unsafe { result::destroy_handle(self.handle) } {
            tracing::error!(status = error.0 as i32, device = %self.stream.device().ordinal(), "cublasDestroy failed");
        }
    }
}

/// The sizes of an operand that cuBLAS can be given.
fn matrix(
    operand: &'static str,
    on: &Device,
    device: &Device,
    dtype: DType,
    dims: Dims,
) -> Result<[usize; 2], BlasError> {
    match *dims.as_slice() {
        [rows, columns]
            if dtype == DType::Bf16
                && (device.backend(), device.ordinal()) == (on.backend(), on.ordinal()) =>
        {
            Ok([rows, columns])
        }
        _ => Err(BlasError::Operand {
            operand,
            dims,
            dtype,
            device: device.clone(),
        }),
    }
}

/// Keeps the number alone: to format the driver's error is to call the driver.
fn refused(device: usize) -> impl Fn(DriverError) -> BlasError {
    move |error| BlasError::Context {
        device,
        status: error.0 as u32,
    }
}

fn failed(call: &'static str) -> impl Fn(result::CublasError) -> BlasError {
    move |error| BlasError::Call {
        call,
        status: error.0 as i32,
    }
}
