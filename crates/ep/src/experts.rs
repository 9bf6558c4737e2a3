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
        // A tensor without rows may have any number of columns.
        let both = intermediate.checked_mul(2).ok_or(ArgumentError::Range {
            field: "intermediate",
            got: intermediate,
            min: 0,
            max: LARGEST,
        })?;
        Ok(launch::Swiglu {
            gate_up: gate_up
                .raw()
                .check("gate_up", device, DType::Bf16, [rows, both])?,
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

/// Where the driver's grids end.
const LARGEST: usize = i32::MAX as usize;

fn size(field: &'static str, got: usize) -> Result<u32, ArgumentError> {
    u32::try_from(got)
        .ok()
        .filter(|_| got <= LARGEST)
        .ok_or(ArgumentError::Range {
            field,
            got,
            min: 0,
            max: LARGEST,
        })
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use ep_sim::{Cluster, SimDriver};
    use ep_sys::DeviceOrdinal;

    use super::*;
    use crate::Tensor;

    /// Arguments are looked at before the kernels are.
    #[test]
    fn wrong_arguments_are_named_without_a_buffer() {
        let driver = SimDriver::new(&Cluster::hgx_h200(2), 0, &[0, 1]);
        let [here, elsewhere] = [0, 1].map(|n| Device::host(driver.clone(), DeviceOrdinal(n)));
        let stream = Stream::new(&here).unwrap();
        let tensor = |device: &Device, dtype, dims: [usize; 2]| Tensor::new(device, dtype, dims);
        let bf16 = |dims| tensor(&here, DType::Bf16, dims).unwrap();
        let refused = |outcome: Result<(), Error>, expected: &str| {
            let error = outcome.unwrap_err();
            let source = error.source().unwrap().to_string();
            assert!(source.contains(expected), "{error}: {source}");
            assert!(!source.contains("buffer"), "{source}");
        };
        let swiglu = |gate_up: &Tensor, out: &mut Tensor| {
            super::swiglu(&stream, gate_up.view(), out.view_mut())
        };
        let mut wide = bf16([0, usize::MAX / 2 + 1]);
        refused(swiglu(&bf16([0, 0]), &mut wide), "intermediate is");
        let mut wide = bf16([0, LARGEST + 1]);
        let both = bf16([0, 2 * (LARGEST + 1)]);
        refused(swiglu(&both, &mut wide), "it must be 0 to 2147483647");
        let foreign = tensor(&elsewhere, DType::Bf16, [2, 8]).unwrap();
        let expected = "gate_up is on device 1 (host); it must be on device 0 (host)";
        refused(swiglu(&foreign, &mut bf16([2, 4])), expected);

        let codes = tensor(&here, DType::E4m3, [2, 128]).unwrap();
        let scales = tensor(&here, DType::F32, [1, 2]).unwrap();
        let mut out = bf16([3, 128]);
        let converted = dequantize(&stream, codes.view(), scales.view(), out.view_mut());
        refused(converted, "rows of out is 3; it must be 0 to 2");
    }
}
