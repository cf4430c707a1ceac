//! Elements of tensors as numbers: read, written, compared.

use gdn::Dtype;
use half::{bf16, f16};

/// The dtype that the ops know a tensor's by, if they do.
pub(crate) fn dtype_of(dtype: safetensors::Dtype) -> Option<Dtype> {
    Dtype::parse(&dtype.to_string())
}

/// The same dtype in a file.
pub(crate) fn dtype_in_file(dtype: Dtype) -> safetensors::Dtype {
    match dtype {
        Dtype::F32 => safetensors::Dtype::F32,
        Dtype::F16 => safetensors::Dtype::F16,
        Dtype::BF16 => safetensors::Dtype::BF16,
    }
}

/// What the elements are, in f64, which holds each of them exactly.
pub(crate) fn read(dtype: Dtype, bytes: &[u8]) -> Box<dyn Iterator<Item = f64> + '_> {
    match dtype {
        Dtype::F32 => Box::new(bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x).into())),
        Dtype::F16 => Box::new(bytes.as_chunks().0.iter().map(|x| f16::from_le_bytes(*x).into())),
        Dtype::BF16 => Box::new(bytes.as_chunks().0.iter().map(|x| bf16::from_le_bytes(*x).into())),
    }
}

/// Writes as many elements as `bytes` has, each rounded once.
pub(crate) fn write(dtype: Dtype, bytes: &mut [u8], numbers: impl IntoIterator<Item = f64>) {
    let elements = bytes.chunks_exact_mut(dtype.size()).zip(numbers);
    match dtype {
        Dtype::F32 => elements.for_each(|(to, x)| to.copy_from_slice(&(x as f32).to_le_bytes())),
        Dtype::F16 => elements.for_each(|(to, x)| to.copy_from_slice(&f16::from_f64(x).to_le_bytes())),
        Dtype::BF16 => elements.for_each(|(to, x)| to.copy_from_slice(&bf16::from_f64(x).to_le_bytes())),
    }
}

/// The number that an element holds after `x` was rounded to it.
pub(crate) fn rounded(dtype: Dtype, x: f64) -> f64 {
    match dtype {
        Dtype::F32 => f64::from(x as f32),
        Dtype::F16 => f16::from_f64(x).to_f64(),
        Dtype::BF16 => bf16::from_f64(x).to_f64(),
    }
}

/// The most by which rounding to the dtype changes a number, as a share of it, within the dtype's range.
pub(crate) fn unit_roundoff(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 2f64.powi(-24),
        Dtype::F16 => 2f64.powi(-11),
        Dtype::BF16 => 2f64.powi(-8),
    }
}

/// The 2-norm of the difference as a share of that of `right`, all elements together. 0 where all are equal;
/// NaN where one is NaN.
pub(crate) fn relative_error(
    got: impl IntoIterator<Item = f64>,
    right: impl IntoIterator<Item = f64>,
) -> f64 {
    let (mut difference, mut size) = (0.0, 0.0);
    for (got, right) in got.into_iter().zip(right) {
        // Infinities that agree have no difference.
        difference += if got == right { 0.0 } else { (got - right) * (got - right) };
        size += right * right;
    }
    if difference == 0.0 { 0.0 } else { (difference / size).sqrt() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again_rounded_once() {
        for dtype in Dtype::ALL {
            let numbers = [0.0, -1.0, 1.0 / 3.0, 1e-3, 65504.0, f64::INFINITY];
            let mut bytes = vec![0xA5; numbers.len() * dtype.size()];
            write(dtype, &mut bytes, numbers);
            let read: Vec<f64> = read(dtype, &bytes).collect();
            assert_eq!(read, numbers.map(|x| rounded(dtype, x)));
            let error = (read[2] - numbers[2]).abs() / numbers[2];
            assert!(error > 0.0 && error <= unit_roundoff(dtype), "{dtype}: {error}");
            assert_eq!(dtype_of(dtype_in_file(dtype)), Some(dtype));
        }
        assert_eq!(dtype_of(safetensors::Dtype::I32), None);
    }

    #[test]
    fn errors() {
        assert_eq!(relative_error([3.0, 4.0], [3.0, 4.0]), 0.0);
        assert_eq!(relative_error([3.0, 4.5], [3.0, 4.0]), 0.1);
        assert_eq!(relative_error([0.0], [0.0]), 0.0);
        assert_eq!(relative_error([1.0], [0.0]), f64::INFINITY);
        assert_eq!(relative_error([f64::INFINITY], [f64::INFINITY]), 0.0);
        assert!(relative_error([f64::NAN], [1.0]).is_nan() && relative_error([1.0], [f64::NAN]).is_nan());
    }
}
