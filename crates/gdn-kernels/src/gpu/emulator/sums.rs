//! How tensor cores add: products exact, a few of them and the accumulator brought to the largest exponent,
//! cut, and summed.
//!
//! No manual says so. [`Model::HARDWARE`] is what an H100 does, in `mma.sync` and `wgmma`, in bfloat16 and
//! half precision, bit for bit on every input of `probe/cases.rs`: sizes that are equal, far apart, too small
//! or too large for an f32, and not finite.

use crate::gpu::Float16;

/// A 16-bit floating-point number, taken apart: `significand * 2^lowest`.
#[derive(Clone, Copy, Debug)]
pub struct Factor {
    /// With its sign.
    significand: i32,
    /// Of its last place.
    lowest: i16,
    /// Of its first place, were it normal.
    exponent: i16,
    /// The significand of what is not finite is 0 where it is NaN.
    finite: bool,
}

impl Factor {
    /// Zero.
    pub const ZERO: Self = Self { significand: 0, lowest: 0, exponent: 0, finite: true };

    /// From its bits.
    pub fn new<T: Float16>(bits: u16) -> Self {
        let (fraction, bias) = if T::BF16 { (7, 127) } else { (10, 15) };
        let field = (bits & 0x7fff) as i16;
        let (exponent, low) = (field >> fraction, i32::from(field) & ((1 << fraction) - 1));
        let sign = if bits >> 15 == 0 { 1 } else { -1 };
        if exponent == 0x7fff >> fraction {
            return Self { significand: if low == 0 { sign } else { 0 }, lowest: 0, exponent, finite: false };
        }
        let whole = if exponent == 0 { low } else { low | 1 << fraction };
        let exponent = exponent.max(1) - bias;
        Self { significand: sign * whole, lowest: exponent - fraction, exponent, finite: true }
    }

    /// The number.
    pub fn value(self) -> f64 {
        let significand = f64::from(self.significand);
        match (self.finite, self.significand) {
            (true, _) => significand * power(i32::from(self.lowest)),
            (false, 0) => f64::NAN,
            (false, _) => f64::INFINITY * significand,
        }
    }
}

/// `2^n`, exactly.
fn power(n: i32) -> f64 {
    if n >= -1022 {
        f64::from_bits(((n + 1023) as u64) << 52)
    } else {
        f64::from_bits(1 << (n + 1074).max(0))
    }
}

/// How a generation of tensor cores adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Model {
    /// Products that are added at a time, to what was there before.
    pub width: usize,
    /// Bits kept beyond the 24 of an f32 when everything is brought to the largest exponent. What lies below
    /// is cut off.
    pub extra: i32,
    /// Whether the sum is rounded to the nearest f32. Else it is cut too.
    pub nearest: bool,
}

impl Model {
    /// What an H100 does, and the emulator.
    pub const HARDWARE: Self = Self { width: 16, extra: 2, nearest: false };

    /// `sum of a * b, plus c`.
    pub fn dot(self, a: &[Factor], b: &[Factor], c: f32) -> f32 {
        let pairs = a.chunks(self.width).zip(b.chunks(self.width));
        pairs.fold(c, |sum, (a, b)| self.add(a, b, sum))
    }

    fn add(self, a: &[Factor], b: &[Factor], c: f32) -> f32 {
        if !c.is_finite() || !a.iter().chain(b).all(|factor| factor.finite) {
            // NaN or an infinity, whatever the order.
            let sum = a.iter().zip(b).fold(f64::from(c), |sum, (a, b)| sum + a.value() * b.value());
            return if sum.is_nan() { f32::from_bits(0x7fff_ffff) } else { sum as f32 };
        }
        let bits = c.to_bits();
        let (field, low) = ((bits >> 23 & 0xff) as i32, bits & 0x7f_ffff);
        let whole = if field == 0 { low } else { low | 1 << 23 };
        let c_exponent = field.max(1) - 127;
        let none = i32::MIN / 2;
        let exponent = |(a, b): (&Factor, &Factor)| {
            let some = a.significand != 0 && b.significand != 0;
            if some { i32::from(a.exponent) + i32::from(b.exponent) } else { none }
        };
        let first = if whole == 0 { none } else { c_exponent };
        let most = a.iter().zip(b).map(exponent).fold(first, i32::max);
        if most == none {
            // Zeros have no sign left.
            return c + 0.0;
        }
        // Everything in units of 2^(most - unit); no number is moved up by more than `ROOM` places.
        const ROOM: i32 = 20;
        let unit = 23 + self.extra;
        let cut = |magnitude: u32, negative: bool, lowest: i32| {
            let down = (most - unit - lowest + ROOM).clamp(0, 63);
            let kept = ((u64::from(magnitude) << ROOM) >> down) as i64;
            if negative { -kept } else { kept }
        };
        let product = |(a, b): (&Factor, &Factor)| {
            let product = a.significand * b.significand;
            cut(product.unsigned_abs(), product < 0, i32::from(a.lowest) + i32::from(b.lowest))
        };
        let sum = a.iter().zip(b).map(product).sum::<i64>() + cut(whole, bits >> 31 != 0, c_exponent - 23);
        // Fewer than 53 bits and far from an f64's smallest.
        let exact = sum as f64 * power(most - unit);
        let nearest = exact as f32;
        if self.nearest || f64::from(nearest).abs() <= exact.abs() {
            nearest
        } else if nearest.is_infinite() {
            if exact.abs() >= power(128) { nearest } else { f32::MAX.copysign(nearest) }
        } else {
            f32::from_bits(nearest.to_bits() - 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;
    use crate::gpu::{Bf16, F16};

    #[test]
    fn factors() {
        for (bits, value) in
            [(0x3c00, 1.0), (0xc000, -2.0), (0x0001, 2f64.powi(-24)), (0x7bff, 65504.0), (0x8000, 0.0)]
        {
            assert_eq!(Factor::new::<F16>(bits).value(), value);
        }
        for (bits, value) in [(0x3f80, 1.0), (0xc040, -3.0), (0x0001, 2f64.powi(-133))] {
            assert_eq!(Factor::new::<Bf16>(bits).value(), value);
        }
        assert!(
            Factor::new::<F16>(0x7c00).value() == f64::INFINITY
                && Factor::new::<Bf16>(0x7fc0).value().is_nan()
        );
    }

    #[test]
    fn sums_are_cut() {
        let factors =
            |values: &[u16]| values.iter().map(|bits| Factor::new::<F16>(*bits)).collect::<Vec<_>>();
        let (one, tiny) = (0x3c00, 0x0400);
        let model = Model::HARDWARE;
        // 1 + 2^-28 loses the small one; 3 + 1 + ... is exact.
        assert_eq!(model.dot(&factors(&[one, tiny]), &factors(&[one, tiny]), 0.0), 1.0);
        assert_eq!(model.dot(&factors(&[one; 16]), &factors(&[one; 16]), 0.5), 16.5);
        // Four quarters of the last place: kept at two more bits, lost at none.
        let quarter = f32::from_bits(0x3f80_0000);
        let [a, b] = [factors(&[0x1000; 4]), factors(&[0x1000; 4])];
        assert_eq!(model.dot(&a, &b, quarter), 1.0 + 4.0 * 2f32.powi(-22));
        assert_eq!(model.dot(&factors(&[0x7c00]), &factors(&[one]), 1.0), f32::INFINITY);
        assert!(model.dot(&factors(&[0x7c00]), &factors(&[0]), 1.0).is_nan());
        assert_eq!(model.dot(&factors(&[0]), &factors(&[one]), -3.0), -3.0);
        // The smallest numbers.
        let least = f32::from_bits(1);
        assert_eq!(model.dot(&factors(&[0]), &factors(&[one]), least), least);
    }
}
