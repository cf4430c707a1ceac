//! Quotients and roots without a branch: the bits of `/` and of the square root, where those are all that is asked.
//!
//! A GPU divides and takes roots to the nearest with a branch for what is seldom, and its compiler moves nothing
//! past that. A kernel whose time is that of one chain of instructions does without.

use crate::lanes::{Lanes, fused};
use crate::quick::{inverse_root_of_any, polynomial};

/// An f32 whose quotients and roots are fused multiply-adds.
///
/// They are those of f32 bit for bit, but for a NaN's bits, where a divisor is at least 2^-90 (infinity too), a
/// quotient is 0, infinite, or no less than 2^-126 or made by a divisor from 1 to 4, and a root is one of at least 2^-100.
#[derive(Clone, Copy, Debug)]
pub struct Straight(pub f32);

/// What brings divisors to where their inverse is no subnormal number while it is worked out.
const DOWN: f32 = 1.0 / 256.0;

/// `1 / t` for t from 0.707 to 0.729, within 9e-7.
const INVERSE: [f32; 3] = [4.180_136_7, -5.824_188_7, 2.704_798_2];

/// `1 / x` for x from 2^-122 to 2^123, within 9e-7.
#[inline(always)]
fn near_inverse(x: f32) -> f32 {
    // Exponents subtract, and so, roughly, do the logs of mantissas: with this number, which makes 0.7 of the
    // inverse, more nearly the same than with any other.
    let seed = f32::from_bits(0x7eb5_0000u32.wrapping_sub(x.to_bits()));
    seed * polynomial(x * seed, INVERSE)
}

/// `a / b`
#[inline(always)]
fn quotient(a: f32, b: f32) -> f32 {
    let near = b * DOWN;
    let inverse = near_inverse(near);
    let inverse = fused(inverse, fused(-near, inverse, 1.0), inverse);
    let inverse = fused(inverse, fused(-near, inverse, 1.0), inverse);
    // That is the nearest but for one mantissa, all ones, where it is the one below. So the quotient is the nearest, too.
    let is_ones = near < f32::INFINITY && near.to_bits() << 9 == u32::MAX << 9;
    let inverse = f32::from_bits(inverse.to_bits().wrapping_add(u32::from(is_ones)));
    let inverse = inverse * DOWN;
    let inverse = if b == f32::INFINITY { 0.0 } else { inverse };
    let first = a * inverse;
    let rest = fused(-b, first, a);
    // Of what is infinite or 0 there is no rest.
    let last = fused(rest, inverse, first);
    if rest.abs() > 0.0 { last } else { first }
}

/// The root of `x`.
#[inline(always)]
fn root(x: f32) -> f32 {
    let inverse = inverse_root_of_any(x);
    let (near, half) = (x * inverse, 0.5 * inverse);
    let error = fused(-near, half, 0.5);
    let (near, half) = (fused(near, error, near), fused(half, error, half));
    let root = fused(fused(-near, near, x), half, near);
    if x < f32::INFINITY { root } else { x }
}

impl Lanes for Straight {
    const LEN: usize = 1;

    #[inline(always)]
    fn splat(self, value: f32) -> Self {
        Self(value)
    }

    #[inline(always)]
    fn plus(self, Self(other): Self) -> Self {
        Self(self.0 + other)
    }

    #[inline(always)]
    fn minus(self, Self(other): Self) -> Self {
        Self(self.0 - other)
    }

    #[inline(always)]
    fn times(self, Self(other): Self) -> Self {
        Self(self.0 * other)
    }

    #[inline(always)]
    fn over(self, Self(other): Self) -> Self {
        Self(quotient(self.0, other))
    }

    #[inline(always)]
    fn mul_add(self, Self(factor): Self, Self(addend): Self) -> Self {
        Self(fused(self.0, factor, addend))
    }

    #[inline(always)]
    fn neg_mul_add(self, Self(factor): Self, Self(addend): Self) -> Self {
        Self(fused(-self.0, factor, addend))
    }

    #[inline(always)]
    fn root(self) -> Self {
        Self(root(self.0))
    }

    #[inline(always)]
    fn at_least(self, Self(least): Self) -> Self {
        Self(Lanes::at_least(self.0, least))
    }

    #[inline(always)]
    fn at_most(self, Self(most): Self) -> Self {
        Self(Lanes::at_most(self.0, most))
    }

    #[inline(always)]
    fn if_greater(self, Self(other): Self, Self(then): Self, Self(otherwise): Self) -> Self {
        Self(self.0.if_greater(other, then, otherwise))
    }

    #[inline(always)]
    fn half_of_power(self) -> Self {
        Self(self.0.half_of_power())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        layer::{Gate, gate_factor, l2_scale, rms_scale},
        special::{log1p, sigmoid, silu},
    };
    use std::format;

    fn same(name: &str, x: f32, straight: f32, right: f32) {
        let is_same = straight.to_bits() == right.to_bits() || straight.is_nan() && right.is_nan();
        assert!(is_same, "{}", format!("{name}({x:e}) is {straight:e}, not {right:e}"));
    }

    fn check(bits: impl Iterator<Item = u32>) {
        let s = Straight;
        for x in bits.map(f32::from_bits) {
            same("silu", x, silu(s(x)).0, silu(x));
            same("sigmoid", x, sigmoid(s(x)).0, sigmoid(x));
            same("gate", x, gate_factor(s(x), Gate::Sigmoid).0, gate_factor(x, Gate::Sigmoid));
            if (0.0..=1.0).contains(&x) {
                same("log1p", x, log1p(s(x)).0, log1p(x));
            }
            if x >= 0.0 || x.is_nan() {
                for scale in [1.0, 0.088_388_35, 0.3, 1e8, 1e-8, 1.999_999_9] {
                    let right = l2_scale(x, 1e-6, scale);
                    same("length", x, l2_scale(s(x), s(1e-6), s(scale)).0, right);
                }
                same("norm", x, rms_scale(s(x), s(128.0), s(1e-6)).0, rms_scale(x, 128.0, 1e-6));
            }
        }
    }

    #[test]
    fn the_bits_are_those_of_f32() {
        check((0..1 << 21).map(|i| i << 11 | i & 0x7ff));
        for x in [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN, 1e-45, -1e-45] {
            check(core::iter::once(x.to_bits()));
        }
    }

    /// Roots and inverses of all mantissas, and quotients by the one whose inverse is hardest to round.
    #[test]
    fn every_mantissa() {
        for i in 0..1u32 << 24 {
            let x = f32::from_bits((1.0f32.to_bits()) + i);
            same("root", x, root(x), x.sqrt());
            same("inverse", x, quotient(1.0, x), 1.0 / x);
            let odd = 1.999_999_9;
            same("quotient", x, quotient(x, odd), x / odd);
        }
    }

    #[test]
    #[ignore = "minutes: every f32"]
    fn every_f32() {
        check(0..=u32::MAX);
    }
}
