//! Four elements at a time, of any dtype, and how f32 are brought into the range of f16.

use core::f32::consts::LOG2_E;

use gdn_math::{Lanes, element::f32_of_bf16};

use super::args::{BF16, F32, Vector};
use crate::gpu::{Bytes16, Gpu, LOGISTIC_MIDDLE, TensorCore};

/// `1 / (1 + e^-x)`, within 2e-6 down to -20 and 4e-6 down to -66, 0 below -66.6.
#[inline(always)]
pub(super) fn sigmoid(gpu: &impl Gpu, x: f32) -> f32 {
    gpu.logistic(Lanes::mul_add(x, -LOG2_E, LOGISTIC_MIDDLE))
}

/// `x / (1 + e^-x)`, as exact as [`sigmoid`].
#[inline(always)]
pub(super) fn silu(gpu: &impl Gpu, x: f32) -> f32 {
    x * sigmoid(gpu, x)
}

/// Bytes of an element.
#[inline(always)]
pub(super) fn size(dtype: u32) -> u32 {
    if dtype == F32 { 4 } else { 2 }
}

/// The two numbers of 16 bits in a word, without a branch.
#[inline(always)]
pub(super) fn widened(gpu: &impl TensorCore, dtype: u32, two: u32) -> [f32; 2] {
    let [low, high] = gpu.unpack_f16(two);
    if dtype == BF16 { [f32_of_bf16(two as u16), f32_of_bf16((two >> 16) as u16)] } else { [low, high] }
}

/// Two numbers in 16 bits each, to nearest.
#[inline(always)]
fn narrowed(gpu: &impl TensorCore, dtype: u32, [low, high]: [f32; 2]) -> u32 {
    if dtype == BF16 { gpu.bf16_pair(low, high) } else { gpu.pack_f16(low, high) }
}

/// One element as it lies in memory: what is read early is widened when it is there.
#[derive(Clone, Copy, Default)]
pub(super) struct Element(u32);

impl Element {
    /// Reads one, without a branch.
    ///
    /// # Safety
    /// It is readable, at a multiple of its size.
    #[inline(always)]
    pub(super) unsafe fn read(gpu: &impl TensorCore, dtype: u32, address: u64) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { gpu.load4_or_2(address, dtype == F32) })
    }

    /// Of the dtype that it was read with.
    #[inline(always)]
    pub(super) fn value(self, gpu: &impl TensorCore, dtype: u32) -> f32 {
        let [value, _] = widened(gpu, dtype, self.0);
        if dtype == F32 { f32::from_bits(self.0) } else { value }
    }
}

/// One element.
///
/// # Safety
/// It is readable, at a multiple of its size.
#[inline(always)]
pub(super) unsafe fn load(gpu: &impl TensorCore, dtype: u32, address: u64) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        if dtype == F32 {
            return f32::from_bits(gpu.load4(address));
        }
        let [value, _] = widened(gpu, dtype, u32::from(gpu.load2(address)));
        value
    }
}

/// Writes one element, rounded to nearest.
///
/// # Safety
/// It is writable, at a multiple of its size, and no other thread's.
#[inline(always)]
pub(super) unsafe fn store(gpu: &impl TensorCore, dtype: u32, address: u64, value: f32) {
    // SAFETY: the caller's promise.
    unsafe {
        if dtype == F32 {
            gpu.store4(address, value.to_bits());
        } else {
            gpu.store2(address, narrowed(gpu, dtype, [value, 0.0]) as u16);
        }
    }
}

/// Element `i` of a vector.
///
/// # Safety
/// It is there.
#[inline(always)]
pub(super) unsafe fn of_vector(gpu: &impl TensorCore, vector: &Vector, i: u32) -> f32 {
    // SAFETY: the caller's promise.
    unsafe { load(gpu, vector.dtype, vector.address + u64::from(i) * vector.stride) }
}

/// Four elements, `stride` bytes apart; `wide`: dense, at a multiple of their size together.
///
/// # Safety
/// They are readable, each at a multiple of its size.
#[inline(always)]
pub(super) unsafe fn load4(
    gpu: &impl TensorCore,
    dtype: u32,
    address: u64,
    stride: u64,
    wide: bool,
) -> [f32; 4] {
    let mut bits = [0u32; 4];
    // SAFETY: the caller's promise.
    unsafe {
        if dtype == F32 {
            if wide {
                Bytes16(bits) = gpu.load16(address);
            } else {
                let mut i = 0;
                while i < 4 {
                    bits[i] = gpu.load4(address + i as u64 * stride);
                    i += 1;
                }
            }
            return bits.map(f32::from_bits);
        }
        if wide {
            let four = gpu.load8(address);
            (bits[0], bits[1]) = (four as u32, (four >> 32) as u32);
        } else {
            let mut i = 0;
            while i < 4 {
                bits[i / 2] |= u32::from(gpu.load2(address + i as u64 * stride)) << (i % 2 * 16);
                i += 1;
            }
        }
    }
    let ([a, b], [c, d]) = (widened(gpu, dtype, bits[0]), widened(gpu, dtype, bits[1]));
    [a, b, c, d]
}

/// Writes four elements, as [`load4`] reads them.
///
/// # Safety
/// They are writable, each at a multiple of its size, and no other thread's.
#[inline(always)]
pub(super) unsafe fn store4(
    gpu: &impl TensorCore,
    dtype: u32,
    address: u64,
    stride: u64,
    wide: bool,
    values: [f32; 4],
) {
    // SAFETY: the caller's promise.
    unsafe {
        if dtype == F32 {
            let bits = values.map(f32::to_bits);
            if wide {
                gpu.store16(address, Bytes16(bits));
                return;
            }
            let mut i = 0;
            while i < 4 {
                gpu.store4(address + i as u64 * stride, bits[i]);
                i += 1;
            }
            return;
        }
        let [a, b, c, d] = values;
        let bits = [narrowed(gpu, dtype, [a, b]), narrowed(gpu, dtype, [c, d])];
        if wide {
            gpu.store8(address, u64::from(bits[0]) | u64::from(bits[1]) << 32);
            return;
        }
        let mut i = 0;
        while i < 4 {
            gpu.store2(address + i as u64 * stride, (bits[i / 2] >> (i % 2 * 16)) as u16);
            i += 1;
        }
    }
}

/// Eight elements as they were read: their bits, or those of f32.
#[derive(Clone, Copy, Default)]
pub(super) struct Eight([u32; 8]);

impl Eight {
    /// As [`load4`] reads four; `wide`: 2 where their address, with dtypes of 2 bytes, is a multiple of 16
    /// too, else as for four.
    ///
    /// # Safety
    /// They are readable, each at a multiple of its size.
    #[inline(always)]
    pub(super) unsafe fn load(
        gpu: &impl TensorCore,
        dtype: u32,
        address: u64,
        stride: u64,
        wide: u32,
    ) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            if dtype != F32 && wide == 2 {
                return Self::of(gpu.load16(address));
            }
            let [a, b, c, d] = load4(gpu, dtype, address, stride, wide != 0);
            let [e, f, g, h] = load4(gpu, dtype, address + 4 * stride, stride, wide != 0);
            Self([a, b, c, d, e, f, g, h].map(f32::to_bits))
        }
    }

    /// Eight of two bytes each that lie side by side, as they are.
    #[inline(always)]
    pub(super) fn of(Bytes16([a, b, c, d]): Bytes16) -> Self {
        Self([a, b, c, d, 0, 0, 0, 0])
    }

    /// Their numbers, with what they were read with.
    #[inline(always)]
    pub(super) fn numbers(self, gpu: &impl TensorCore, dtype: u32, wide: u32) -> [f32; 8] {
        if dtype != F32 && wide == 2 {
            let [a, b, c, d, ..] = self.0;
            let [[a, b], [c, d], [e, f], [g, h]] = [a, b, c, d].map(|word| widened(gpu, dtype, word));
            return [a, b, c, d, e, f, g, h];
        }
        self.0.map(f32::from_bits)
    }
}

/// Writes eight elements, as [`Eight::load`] reads them.
///
/// # Safety
/// They are writable, each at a multiple of its size, and no other thread's.
#[inline(always)]
pub(super) unsafe fn store8(
    gpu: &impl TensorCore,
    dtype: u32,
    address: u64,
    stride: u64,
    wide: u32,
    [a, b, c, d, e, f, g, h]: [f32; 8],
) {
    // SAFETY: the caller's promise.
    unsafe {
        if dtype != F32 && wide == 2 {
            let words = [[a, b], [c, d], [e, f], [g, h]].map(|two| narrowed(gpu, dtype, two));
            gpu.store16(address, Bytes16(words));
            return;
        }
        store4(gpu, dtype, address, stride, wide != 0, [a, b, c, d]);
        store4(gpu, dtype, address + 4 * stride, stride, wide != 0, [e, f, g, h]);
    }
}

/// A power of two that brings `largest`, and with it all numbers of a row, into the range of f16, and its
/// inverse. What is less than 2^-29 of the largest loses places. Numbers from 2^-45 to 2^75 come to be from
/// 2^14 to 2^15.
#[inline(always)]
pub(super) fn power(largest: f32) -> (f32, f32) {
    // Exponents where they are, with their bias.
    const fn of(exponent: u32) -> u32 {
        (127 + exponent) << 23
    }
    let exponent = largest.to_bits() & 0x7f80_0000;
    let up = (of(127 + 14) - exponent).clamp(of(0) - (60 << 23), of(60));
    (f32::from_bits(up), f32::from_bits(of(127) - up))
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use std::{cell::Cell, format};

    use super::*;
    use crate::emulator::{Launch, Memory, run};

    /// Holds silu and sigmoid to f64 at numbers from some to others, relative to it.
    fn check([from, to]: [f32; 2], bound: f64) {
        let count = Cell::new(0);
        run(&Memory::new(), Launch::new([1; 3], 1), |gpu| {
            for i in 0..=200_000 {
                let x = from + (to - from) * (i as f32 / 200_000.0);
                let exact = 1.0 / (1.0 + (-f64::from(x)).exp());
                let errors = [(sigmoid(gpu, x), exact), (silu(gpu, x), exact * f64::from(x))]
                    .map(|(got, exact)| (f64::from(got) - exact).abs() / exact.abs().max(f64::MIN_POSITIVE));
                assert!(errors.iter().all(|e| *e <= bound), "{}", format!("at {x:e} off by {errors:?}"));
                count.set(count.get() + 1);
            }
        });
        assert_eq!(count.get(), 200_001);
    }

    #[test]
    fn silu_and_sigmoid_are_near() {
        check([-20.0, 20.0], 2e-6);
        check([-1.0, 1.0], 2e-6);
        check([20.0, 1e4], 2e-6);
        check([-66.0, -20.0], 4e-6);
    }

    #[test]
    fn silu_and_sigmoid_at_the_ends() {
        run(&Memory::new(), Launch::new([1; 3], 1), |gpu| {
            for x in [-67.0, -1e4, f32::MIN] {
                assert_eq!([sigmoid(gpu, x), silu(gpu, x)], [0.0, 0.0]);
            }
            for x in [20.0, 1e4, f32::MAX, f32::INFINITY] {
                assert_eq!([sigmoid(gpu, x), silu(gpu, x)], [1.0, x]);
            }
            assert_eq!([sigmoid(gpu, 0.0), silu(gpu, 0.0), silu(gpu, -0.0)], [0.5, 0.0, 0.0]);
            assert!(
                [f32::NAN, -f32::NAN].iter().all(|x| sigmoid(gpu, *x).is_nan() && silu(gpu, *x).is_nan())
            );
            assert_eq!(sigmoid(gpu, f32::NEG_INFINITY), 0.0);
            assert!(silu(gpu, f32::NEG_INFINITY).is_nan());
        });
    }
}
