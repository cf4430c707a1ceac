//! [`Tensor`]: what the package knows of anybody's tensor, wherever it came from.

use std::{fmt, ops::Deref};

use pyo3::{
    PyErr, PyResult,
    exceptions::{PyTypeError, PyValueError},
};

/// The most dims that an argument of an op has: recurrent states of several tokens are `[slots, T, HV, DV,
/// DK]`.
pub(crate) const MAX_DIMS: usize = 5;

/// An element type, in the terms of DLPack.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DType {
    pub(crate) code: u8,
    pub(crate) bits: u8,
    pub(crate) lanes: u16,
}

impl DType {
    pub(crate) const INT: u8 = 0;
    pub(crate) const UINT: u8 = 1;
    pub(crate) const FLOAT: u8 = 2;
    pub(crate) const BFLOAT: u8 = 4;
    pub(crate) const COMPLEX: u8 = 5;
    pub(crate) const BOOL: u8 = 6;
    /// No code of DLPack's: so many and more are types that have none here.
    pub(crate) const OPAQUE: u8 = 0x80;

    /// Bytes of an element; 0 where it is no whole number of them.
    pub(crate) fn size(self) -> usize {
        let bits = usize::from(self.bits) * usize::from(self.lanes);
        if bits.is_multiple_of(8) { bits / 8 } else { 0 }
    }
}

/// As in `bfloat16`, with DLPack's names for what has no other.
impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { code, bits, lanes } = *self;
        match code {
            0 => write!(f, "int{bits}"),
            1 => write!(f, "uint{bits}"),
            2 => write!(f, "float{bits}"),
            3 => write!(f, "opaque{bits}"),
            4 => write!(f, "bfloat{bits}"),
            5 => write!(f, "complex{bits}"),
            6 => f.write_str("bool"),
            7 => f.write_str("float8_e3m4"),
            8 => f.write_str("float8_e4m3"),
            9 => f.write_str("float8_e4m3b11fnuz"),
            10 => f.write_str("float8_e4m3fn"),
            11 => f.write_str("float8_e4m3fnuz"),
            12 => f.write_str("float8_e5m2"),
            13 => f.write_str("float8_e5m2fnuz"),
            14 => f.write_str("float8_e8m0fnu"),
            _ => write!(f, "type {code} of {bits} bits"),
        }?;
        if lanes == 1 { Ok(()) } else { write!(f, " x {lanes}") }
    }
}

/// Where a tensor's memory is.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    /// DLPack's number for a kind of device.
    pub(crate) kind: i32,
    pub(crate) ordinal: i32,
}

impl Device {
    pub(crate) const CPU: Self = Self { kind: 1, ordinal: 0 };
    pub(crate) const CUDA: i32 = 2;
    /// Memory of the host, pinned for a GPU.
    const CUDA_HOST: i32 = 3;

    pub(crate) fn is_cpu(self) -> bool {
        self.kind == Self::CPU.kind || self.kind == Self::CUDA_HOST
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            1 | Self::CUDA_HOST => f.write_str("cpu"),
            Self::CUDA => write!(f, "cuda:{}", self.ordinal),
            kind => write!(f, "device {kind}:{} of DLPack", self.ordinal),
        }
    }
}

/// The lengths of at most [`MAX_DIMS`] dims, of a tensor that is to be made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    dims: usize,
    lengths: [usize; MAX_DIMS],
}

impl<const DIMS: usize> From<[usize; DIMS]> for Shape {
    fn from(lengths: [usize; DIMS]) -> Self {
        const { assert!(DIMS <= MAX_DIMS) };
        Self { dims: DIMS, lengths: std::array::from_fn(|dim| lengths.get(dim).copied().unwrap_or(1)) }
    }
}

impl Deref for Shape {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        &self.lengths[..self.dims]
    }
}

/// A tensor: an address, and what lies there. It keeps nothing alive, and nothing here follows the address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tensor {
    pub(crate) address: usize,
    pub(crate) dtype: DType,
    pub(crate) device: Device,
    pub(crate) read_only: bool,
    dims: usize,
    shape: [i64; MAX_DIMS],
    /// In elements.
    strides: [i64; MAX_DIMS],
    /// What PyTorch's own words for its dtype, device and kind, and for who frees its memory, were, where it
    /// is on a GPU and was read by them (`torch/fields.rs`); else zeros. The same tensor read otherwise is equal to it.
    pub(crate) words: [u64; 4],
}

/// Rows of a tensor: as many numbers as `gdn::Rows` is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowsOf {
    pub(crate) num_rows: usize,
    pub(crate) features: usize,
    pub(crate) row_stride: usize,
}

impl RowsOf {
    pub(crate) const NONE: Self = Self { num_rows: 0, features: 0, row_stride: 0 };
}

impl PartialEq for Tensor {
    /// All numbers at once: a call of decode on a GPU compares a dozen tensors.
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        let others = |tensor: &Self| (tensor.dtype, tensor.device, tensor.read_only);
        let is_same = self.address == other.address && others(self) == others(other);
        is_same && self.lies_so(other.dims, &other.shape, &other.strides)
    }
}

impl Tensor {
    /// The place of one that is not known yet.
    pub(crate) const NONE: Self = Self {
        address: 0,
        dtype: DType { code: 0, bits: 0, lanes: 0 },
        device: Device::CPU,
        read_only: true,
        dims: 0,
        shape: [1; MAX_DIMS],
        strides: [1; MAX_DIMS],
        words: [0; 4],
    };

    /// Whether it has so many dims, and of the numbers for [`MAX_DIMS`] those of its dims.
    #[inline]
    pub(crate) fn lies_so(&self, dims: usize, shape: &[i64; MAX_DIMS], strides: &[i64; MAX_DIMS]) -> bool {
        // No slices: two calls of `memcmp` would take longer.
        let is_same = |dim: usize| self.shape[dim] == shape[dim] && self.strides[dim] == strides[dim];
        self.dims == dims && (0..dims.min(MAX_DIMS)).all(is_same)
    }

    /// Fills in what is known, in place: handed on from call to call by value, it would cost more than all
    /// that is asked about it. `strides` in elements, `None` for dense ones. `false`, and nothing filled in,
    /// where there are more than [`MAX_DIMS`] dims.
    #[inline]
    #[must_use]
    pub(crate) fn fill(
        &mut self,
        address: usize,
        dtype: DType,
        device: Device,
        read_only: bool,
        shape: &[i64],
        strides: Option<&[i64]>,
    ) -> bool {
        if shape.len() > MAX_DIMS {
            return false;
        }
        (self.address, self.dtype, self.device, self.read_only) = (address, dtype, device, read_only);
        self.words = [0; 4];
        self.dims = shape.len();
        let number = |numbers: &[i64], dim: usize| numbers.get(dim).copied().unwrap_or(1);
        for dim in 0..MAX_DIMS {
            self.shape[dim] = number(shape, dim);
        }
        match strides {
            Some(strides) => (0..MAX_DIMS).for_each(|dim| self.strides[dim] = number(strides, dim)),
            None => self.lie_dense(),
        }
        true
    }

    /// A fresh, dense one, of at most [`MAX_DIMS`] dims.
    #[inline]
    pub(crate) fn dense(address: usize, dtype: DType, device: Device, shape: &[usize]) -> Self {
        let dims = shape.len().min(MAX_DIMS);
        let shape = std::array::from_fn(|dim| shape.get(dim).map_or(1, |length| *length as i64));
        let mut tensor = Self { address, dtype, device, read_only: false, dims, shape, ..Self::NONE };
        tensor.lie_dense();
        tensor
    }

    fn lie_dense(&mut self) {
        self.strides = [1; MAX_DIMS];
        for dim in (1..self.dims).rev() {
            self.strides[dim - 1] = self.strides[dim].saturating_mul(self.shape[dim].max(1));
        }
    }

    /// Whether there are elements, and no memory for them: a tensor that only stands for one.
    pub(crate) fn is_hollow(&self) -> bool {
        self.address == 0 && self.shape().iter().all(|length| *length > 0)
    }

    /// Whether its lengths are lengths, and its elements have memory.
    #[inline]
    pub(crate) fn check(&self, argument: &str) -> PyResult<()> {
        if self.shape().iter().any(|length| *length < 0) {
            return Err(value_error(format!(
                "{argument} has shape {:?}, expected none below 0",
                self.shape()
            )));
        }
        if self.is_hollow() { Err(no_memory(argument, self.shape())) } else { Ok(()) }
    }

    pub(crate) fn shape(&self) -> &[i64] {
        &self.shape[..self.dims]
    }

    /// In elements, a number for each dim.
    pub(crate) fn strides(&self) -> &[i64] {
        &self.strides[..self.dims]
    }

    /// N rows of features, the last dims of a row dense. `inner` are the dims that a tensor of more than two
    /// must have.
    #[inline]
    pub(crate) fn rows(&self, argument: &str, inner: Option<[usize; 2]>) -> PyResult<RowsOf> {
        let features = match (self.shape(), inner) {
            ([_, features], _) => *features,
            ([_, heads, dim], Some([h, d]))
                if usize::try_from(*heads) == Ok(h) && usize::try_from(*dim) == Ok(d) =>
            {
                if *heads > 1 && self.strides[1] != *dim && self.shape[0] > 0 {
                    return Err(self.not_dense(argument, 1, *dim));
                }
                heads.saturating_mul(*dim)
            }
            _ => return Err(self.bad_shape(argument, inner)),
        };
        let (num_rows, row_stride) = (self.shape[0], self.strides[0]);
        let last = self.dims - 1;
        if self.strides[last] != 1 && self.shape[last] > 1 && num_rows > 0 {
            return Err(self.not_dense(argument, last, 1));
        }
        let negative = || {
            value_error(format!(
                "{argument} has shape {:?} and row stride {row_stride}, expected none below 0",
                self.shape()
            ))
        };
        let number = |number: i64| usize::try_from(number).map_err(|_| negative());
        Ok(RowsOf {
            num_rows: number(num_rows)?,
            features: number(features)?,
            row_stride: if num_rows > 1 { number(row_stride)? } else { 0 },
        })
    }

    #[cold]
    fn bad_shape(&self, argument: &str, inner: Option<[usize; 2]>) -> PyErr {
        let expected = match inner {
            Some([heads, dim]) => format!("[N, {heads}, {dim}] or [N, {}]", heads.saturating_mul(dim)),
            None => "[N, features]".to_owned(),
        };
        value_error(format!("{argument} has shape {:?}, expected {expected}", self.shape()))
    }

    #[cold]
    fn not_dense(&self, argument: &str, dim: usize, expected: i64) -> PyErr {
        let got = self.strides[dim];
        value_error(format!(
            "{argument} has stride {got} in dim {dim}, expected {expected}: rows must be dense"
        ))
    }
}

#[cold]
pub(crate) fn value_error(message: String) -> PyErr {
    PyValueError::new_err(message)
}

#[cold]
pub(crate) fn type_error(message: String) -> PyErr {
    PyTypeError::new_err(message)
}

#[cold]
pub(crate) fn no_memory(argument: &str, shape: &[i64]) -> PyErr {
    value_error(format!("{argument} has shape {shape:?} and no memory: was its storage freed?"))
}

#[cold]
pub(crate) fn too_many_dims(argument: &str, dims: usize) -> PyErr {
    value_error(format!("{argument} has {dims} dims, expected at most {}", MAX_DIMS))
}
