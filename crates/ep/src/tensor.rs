//! Dense tensors in device memory, and views of them.

use std::fmt;
use std::marker::PhantomData;

use ep_sys::{DevicePtr, vmm::DeviceMemory};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::error::ArgumentError;
use crate::{Device, Error, Stream};

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// Bfloat16.
    Bf16,
    /// IEEE 754 single precision.
    F32,
    /// 8-bit float, 4 bits of exponent and 3 of mantissa, without infinities (`float8_e4m3fn`).
    E4m3,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
    /// A byte.
    U8,
}

impl DType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::E4m3 | Self::U8 => 1,
            Self::Bf16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::I64 => 8,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
            Self::E4m3 => "e4m3",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::U8 => "u8",
        })
    }
}

/// The sizes of a tensor, outermost first; at most [`Dims::MAX`] of them.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Dims {
    sizes: [usize; Dims::MAX],
    len: u8,
}

impl Dims {
    /// Most dimensions of a tensor.
    pub const MAX: usize = 4;

    /// Elements; `None` if a `usize` does not hold them.
    pub fn elements(&self) -> Option<usize> {
        self.as_slice()
            .iter()
            .try_fold(1_usize, |all, &size| all.checked_mul(size))
    }

    /// The outermost size and the others.
    fn split_outermost(&self) -> Option<(usize, Self)> {
        let (outermost, inner) = self.as_slice().split_first()?;
        let mut dims = Self {
            sizes: [1; Self::MAX],
            len: self.len - 1,
        };
        dims.sizes[..inner.len()].copy_from_slice(inner);
        Some((*outermost, dims))
    }

    /// The sizes.
    pub fn as_slice(&self) -> &[usize] {
        &self.sizes[..self.len.into()]
    }
}

impl<const N: usize> From<[usize; N]> for Dims {
    fn from(sizes: [usize; N]) -> Self {
        const { assert!(N <= Self::MAX, "a tensor has at most four dimensions") };
        let mut dims = Self {
            sizes: [1; Self::MAX],
            len: N as u8,
        };
        dims.sizes[..N].copy_from_slice(&sizes);
        dims
    }
}

impl fmt::Display for Dims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_slice())
    }
}

impl fmt::Debug for Dims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A type that host code reads and writes tensors with.
pub trait Element: Copy + FromBytes + IntoBytes + Immutable + sealed::Sealed {
    /// The element types that it stands for.
    const DTYPES: &'static [DType];
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! elements {
    ($($type:ty => $($dtype:ident)|+,)*) => {$(
        impl sealed::Sealed for $type {}
        impl Element for $type {
            const DTYPES: &'static [DType] = &[$(DType::$dtype),+];
        }
    )*};
}

elements! {
    u8 => U8 | E4m3,
    u16 => Bf16,
    f32 => F32,
    i32 => I32,
    i64 => I64,
}

/// A dense, row-major tensor in device memory of its own.
///
/// Dropping it frees the memory. On a GPU the driver waits for the work in flight before it frees.
///
/// ```
/// # use ep::{Device, DType, Tensor, driver::DeviceOrdinal};
/// # use ep_sim::{Cluster, SimDriver};
/// # let device = Device::host(SimDriver::new(&Cluster::hgx_h200(1), 0, &[0]), DeviceOrdinal(0));
/// let tensor = Tensor::from_host(&device, DType::F32, [2, 3], &[0.0_f32, 1.0, 2.0, 3.0, 4.0, 5.0])?;
/// assert_eq!(tensor.dims().as_slice(), [2, 3]);
/// assert_eq!(tensor.copy_to_host::<f32>()?[5], 5.0);
/// # Ok::<(), ep::Error>(())
/// ```
#[derive(Debug)]
pub struct Tensor {
    /// None for a tensor without elements.
    memory: Option<DeviceMemory>,
    device: Device,
    dtype: DType,
    dims: Dims,
    bytes: u64,
}

impl Tensor {
    /// Allocates a tensor; its contents are undefined.
    pub fn new(device: &Device, dtype: DType, dims: impl Into<Dims>) -> Result<Self, Error> {
        let dims = dims.into();
        let bytes = dims
            .elements()
            .and_then(|elements| elements.checked_mul(dtype.bytes()))
            .and_then(|bytes| u64::try_from(bytes).ok())
            .ok_or(Error::TensorTooLarge { dims, dtype })?;
        let memory = match bytes {
            0 => None,
            _ => Some(
                DeviceMemory::new(device.driver(), device.ordinal(), bytes)
                    .map_err(Error::driver("allocating a tensor"))?,
            ),
        };
        Ok(Self {
            memory,
            device: device.clone(),
            dtype,
            dims,
            bytes,
        })
    }

    /// Allocates a tensor with these elements, row-major.
    pub fn from_host<T: Element>(
        device: &Device,
        dtype: DType,
        dims: impl Into<Dims>,
        elements: &[T],
    ) -> Result<Self, Error> {
        let mut tensor = Self::new(device, dtype, dims)?;
        tensor.copy_from_host(elements)?;
        Ok(tensor)
    }

    /// Overwrites all elements; returns when they have arrived. Ordered with no stream: synchronise
    /// first with what reads or writes the tensor.
    pub fn copy_from_host<T: Element>(&mut self, elements: &[T]) -> Result<(), Error> {
        self.check_host::<T>(elements.len())?;
        if self.bytes == 0 {
            return Ok(());
        }
        self.device
            .driver()
            .copy_to_device(self.device.ordinal(), self.ptr(), elements.as_bytes())
            .map_err(Error::driver("copying to a tensor"))
    }

    /// All elements, row-major. Ordered with no stream: synchronise first with what writes the
    /// tensor.
    pub fn copy_to_host<T: Element>(&self) -> Result<Vec<T>, Error> {
        let len = self.dims.elements().unwrap_or(0);
        self.check_host::<T>(len)?;
        let mut elements = vec![T::new_zeroed(); len];
        if self.bytes > 0 {
            self.device
                .driver()
                .copy_to_host(self.device.ordinal(), elements.as_mut_bytes(), self.ptr())
                .map_err(Error::driver("copying from a tensor"))?;
        }
        Ok(elements)
    }

    /// Fills every byte, ordered on the stream.
    ///
    /// # Errors
    /// [`Error::OtherDevice`] if the stream is not of the tensor's device.
    pub fn fill(&mut self, byte: u8, stream: &Stream) -> Result<(), Error> {
        self.check_stream(stream)?;
        if self.bytes == 0 {
            return Ok(());
        }
        self.device
            .driver()
            .fill(
                self.device.ordinal(),
                self.ptr(),
                byte,
                self.bytes,
                stream.handle(),
            )
            .map_err(Error::driver(FILLING))
    }

    /// Whether it could be filled on the stream.
    pub(crate) fn check_stream(&self, stream: &Stream) -> Result<(), Error> {
        self.device.check(FILLING, "stream", stream.device())
    }

    /// The whole tensor, to read.
    pub fn view(&self) -> TensorRef<'_> {
        TensorRef::new(self.raw())
    }

    /// The whole tensor, to write.
    pub fn view_mut(&mut self) -> TensorMut<'_> {
        TensorMut::new(self.raw())
    }

    /// The first address; null for a tensor without elements.
    pub fn ptr(&self) -> DevicePtr {
        self.memory
            .as_ref()
            .map_or(DevicePtr::NULL, DeviceMemory::ptr)
    }

    /// The device that holds it.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The type of its elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Its sizes.
    pub fn dims(&self) -> Dims {
        self.dims
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn raw(&self) -> Raw<'_> {
        Raw {
            ptr: self.ptr(),
            dtype: self.dtype,
            dims: self.dims,
            device: &self.device,
        }
    }

    fn check_host<T: Element>(&self, len: usize) -> Result<(), Error> {
        if !T::DTYPES.contains(&self.dtype) {
            return Err(Error::HostType {
                dtype: self.dtype,
                host: std::any::type_name::<T>(),
            });
        }
        match self.dims.elements() {
            Some(elements) if elements == len => Ok(()),
            _ => Err(Error::HostLength {
                dims: self.dims,
                got: len,
            }),
        }
    }
}

const FILLING: &str = "filling a tensor";

/// A dense, row-major tensor that is read. Of a [`Tensor`], or a caller's own memory: see
/// [`from_raw`](Self::from_raw).
#[derive(Clone, Copy)]
pub struct TensorRef<'a> {
    raw: Raw<'a>,
}

/// A dense, row-major tensor that is written. Of a [`Tensor`], or a caller's own memory: see
/// [`from_raw`](Self::from_raw).
pub struct TensorMut<'a> {
    raw: Raw<'a>,
    exclusive: PhantomData<&'a mut ()>,
}

macro_rules! views {
    ($($view:ident)*) => {$(
        impl<'a> $view<'a> {
            /// The first address.
            pub fn ptr(&self) -> DevicePtr {
                self.raw.ptr
            }

            /// The device that holds it.
            pub fn device(&self) -> &'a Device {
                self.raw.device
            }

            /// The type of its elements.
            pub fn dtype(&self) -> DType {
                self.raw.dtype
            }

            /// Its sizes.
            pub fn dims(&self) -> Dims {
                self.raw.dims
            }

            /// The first `len` entries of the outermost dimension, or all if it has fewer.
            ///
            /// So a tensor that holds the most tokens a rank can have serves steps with fewer.
            #[must_use]
            pub fn first(mut self, len: usize) -> Self {
                if self.raw.dims.len > 0 {
                    let outermost = &mut self.raw.dims.sizes[0];
                    *outermost = len.min(*outermost);
                }
                self
            }

            /// Entry `index` of the outermost dimension, without that dimension; `None` if it has
            /// fewer.
            pub fn nth(mut self, index: usize) -> Option<Self> {
                let (len, inner) = self.raw.dims.split_outermost()?;
                let bytes = inner.elements()?.checked_mul(self.raw.dtype.bytes())?;
                let offset = u64::try_from(bytes.checked_mul(index)?).ok()?;
                self.raw.ptr = self.raw.ptr.offset(offset);
                self.raw.dims = inner;
                (index < len).then_some(self)
            }

            pub(crate) fn raw(&self) -> &Raw<'a> {
                &self.raw
            }
        }

        impl fmt::Debug for $view<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let Raw { ptr, dtype, dims, device } = self.raw;
                write!(f, "{dtype}{dims} at {ptr:?} of {device:?}")
            }
        }
    )*};
}

views! { TensorRef TensorMut }

impl<'a> TensorRef<'a> {
    pub(crate) fn new(raw: Raw<'a>) -> Self {
        Self { raw }
    }
}

impl<'a> TensorMut<'a> {
    pub(crate) fn new(raw: Raw<'a>) -> Self {
        Self {
            raw,
            exclusive: PhantomData,
        }
    }

    /// The same tensor for a shorter time.
    pub fn reborrow(&mut self) -> TensorMut<'_> {
        TensorMut::new(self.raw)
    }
}

impl<'a> From<&'a Tensor> for TensorRef<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        tensor.view()
    }
}

impl<'a> From<&'a mut Tensor> for TensorMut<'a> {
    fn from(tensor: &'a mut Tensor) -> Self {
        tensor.view_mut()
    }
}

/// What views have in common.
#[derive(Clone, Copy)]
pub(crate) struct Raw<'a> {
    pub(crate) ptr: DevicePtr,
    pub(crate) dtype: DType,
    pub(crate) dims: Dims,
    pub(crate) device: &'a Device,
}

impl Raw<'_> {
    /// The address, if the tensor is what an operation needs.
    pub(crate) fn check(
        &self,
        field: &'static str,
        device: &Device,
        dtype: DType,
        dims: impl Into<Dims>,
    ) -> Result<u64, ArgumentError> {
        // Rows are moved in units of 16 bytes; a row is a multiple of that.
        let align = match dtype {
            DType::Bf16 | DType::E4m3 => 16,
            _ => dtype.bytes() as u64,
        };
        let expected = dims.into();
        if !self.device.is_same(device) {
            return Err(ArgumentError::Device {
                field,
                expected: device.clone(),
                got: self.device.clone(),
            });
        }
        if self.dtype != dtype {
            return Err(ArgumentError::DType {
                field,
                expected: dtype,
                got: self.dtype,
            });
        }
        if self.dims != expected {
            return Err(ArgumentError::Dims {
                field,
                expected,
                got: self.dims,
            });
        }
        if self.dims.elements() == Some(0) {
            return Ok(self.ptr.0);
        }
        if self.ptr.is_null() {
            return Err(ArgumentError::Null { field });
        }
        if !self.ptr.0.is_multiple_of(align) {
            return Err(ArgumentError::Alignment {
                field,
                align,
                ptr: self.ptr,
            });
        }
        Ok(self.ptr.0)
    }
}

#[cfg(test)]
mod tests {
    use ep_sim::{Cluster, SimDriver};
    use ep_sys::DeviceOrdinal;

    use super::*;

    #[test]
    fn addresses_that_kernels_cannot_use_are_refused() {
        let driver = SimDriver::new(&Cluster::hgx_h200(1), 0, &[0]);
        let device = &Device::host(driver, DeviceOrdinal(0));
        let check = |ptr, dtype, rows| {
            let dims = Dims::from([rows, 256]);
            let raw = Raw {
                ptr: DevicePtr(ptr),
                dtype,
                dims,
                device,
            };
            raw.check("x", device, dtype, dims)
        };
        assert!(matches!(
            check(0, DType::Bf16, 7),
            Err(ArgumentError::Null { field: "x" })
        ));
        assert_eq!(check(0, DType::Bf16, 0).unwrap(), 0);
        for (dtype, align) in [
            (DType::Bf16, 16),
            (DType::E4m3, 16),
            (DType::F32, 4),
            (DType::I64, 8),
        ] {
            assert_eq!(check(4096 + align, dtype, 7).unwrap(), 4096 + align);
            let refused = check(4096 + align / 2, dtype, 7).unwrap_err();
            assert!(
                matches!(refused, ArgumentError::Alignment { align: found, .. } if found == align)
            );
        }
    }
}
