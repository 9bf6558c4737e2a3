//! What experts need on a GPU besides matrix products.

use ep_kernels::{CudaKernels, Kernel, LaunchError};

use crate::error::ArgumentError;
use crate::{DType, Device, Dims, Error, Stream, TensorMut, TensorRef, launch};

/// Enqueues the conversion of FP8 rows to bf16, of one local expert.
///
/// `x` is E4M3 `[N, H]` and `scales` f32 `[H / 128, N]`, as a dispatch gives them; `out` is bf16
/// `[rows, H]` for the first `rows` of the `N`.
pub fn dequantize(
    stream: &Stream,
    x: TensorRef<'_>,
    scales: TensorRef<'_>,
    out: TensorMut<'_>,
) -> Result<(), Error> {
    let device = stream.device();
    let check = || {
        let [capacity, hidden] = two("x", x.dims())?;
        let [rows, _] = two("out", out.dims())?;
        if rows > capacity {
            return Err(ArgumentError::Range {
                field: "rows of out",
                got: rows,
                min: 0,
                max: capacity,
            });
        }
        Ok(launch::Dequantize {
            x: x.raw()
                .check("x", device, DType::E4m3, [capacity, hidden])?,
            scales: scales
                .raw()
                .check("scales", device, DType::F32, [hidden / 128, capacity])?,
            scale_stride: capacity as u64,
            out: out
                .raw()
                .check("out", device, DType::Bf16, [rows, hidden])?,
            rows: size("rows of out", rows)?,
            hidden: size("hidden", hidden)?,
        })
    };
    let call = check().map_err(argument(Kernel::Dequantize))?;
    launch::dequantize(kernels(device, Kernel::Dequantize)?, &call, stream).map_err(Error::launch)
}

/// Enqueues `silu(gate) * up`: `gate_up` is bf16 `[rows, 2 I]`, gate first, and `out` bf16
/// `[rows, I]`.
pub fn swiglu(stream: &Stream, gate_up: TensorRef<'_>, out: TensorMut<'_>) -> Result<(), Error> {
    let device = stream.device();
    let check = || {
        let [rows, intermediate] = two("out", out.dims())?;
        Ok(launch::Swiglu {
            gate_up: gate_up.raw().check(
                "gate_up",
                device,
                DType::Bf16,
                [rows, 2 * intermediate],
            )?,
            out: out
                .raw()
                .check("out", device, DType::Bf16, [rows, intermediate])?,
            rows: size("rows", rows)?,
            intermediate: size("intermediate", intermediate)?,
        })
    };
    let call = check().map_err(argument(Kernel::Swiglu))?;
    launch::swiglu(kernels(device, Kernel::Swiglu)?, &call, stream).map_err(Error::launch)
}

/// The CUDA kernels, where the device has them.
fn kernels(device: &Device, kernel: Kernel) -> Result<CudaKernels, Error> {
    match device.backend() {
        "cuda" => CudaKernels::new().map_err(Error::launch),
        _ => Err(Error::launch(LaunchError::Unsupported { kernel })),
    }
}

fn argument(operation: Kernel) -> impl FnOnce(ArgumentError) -> Error {
    move |source| Error::Argument {
        rank: None,
        operation,
        source,
    }
}

fn two(field: &'static str, got: Dims) -> Result<[usize; 2], ArgumentError> {
    got.as_slice().try_into().map_err(|_| ArgumentError::Rank {
        field,
        expected: 2,
        got,
    })
}

fn size(field: &'static str, got: usize) -> Result<u32, ArgumentError> {
    // The driver's grids end there.
    let max = i32::MAX as usize;
    u32::try_from(got)
        .ok()
        .filter(|_| got <= max)
        .ok_or(ArgumentError::Range {
            field,
            got,
            min: 0,
            max,
        })
}
