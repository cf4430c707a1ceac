//! Exponential and inverse root for what is rounded to 16 bits afterwards: within 2e-6 of the exact result, where
//! bf16 is within 4e-3 and f16 within 5e-4, and the same bits on every machine.
//!
//! A GPU takes roots in 8 to 20 instructions, most of them for the last place and for numbers that do not come up
//! here. For one f32: a thread of a GPU.

use core::f32::consts::LOG2_E;

use crate::lanes::{EXPONENT_BITS, Lanes};

/// See `special.rs`.
const ROUNDER: f32 = 12_582_912.0;
/// From here on a sum's inverse root is 0: it stands for infinity, too.
const LARGEST_SUM: f32 = 1e38;

/// The coefficients of the best polynomial for `2^r`, r from -1/2 to 1/2: within 5.7e-8 of it.
const POWER: [f32; 6] = [1.0, 0.693_146_94, 0.240_221_3, 0.055_508_64, 0.009_675_669, 0.001_322_54];
/// `1 / sqrt(1 - e)` for e from 0.007 to 0.125, within 6e-7.
const INVERSE_ROOT: [f32; 4] = [0.999_998_03, 0.500_248, 0.367_125_5, 0.398_886_26];

/// `p[0] + p[1] x + ...`
#[inline(always)]
pub(crate) fn polynomial<const N: usize>(x: f32, p: [f32; N]) -> f32 {
    let mut sum = p[N - 1];
    let mut i = N - 1;
    while i > 0 {
        i -= 1;
        sum = x.mul_add(sum, p[i]);
    }
    sum
}

/// `e^x` for x of at most 87, within 1e-6 down to -50 and 2e-6 below; less than 1.7e-38 below -87. NaN is as
/// 0.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = x.max(-87.0);
    let whole = Lanes::mul_add(x, LOG2_E, ROUNDER);
    let r = Lanes::mul_add(x, LOG2_E, ROUNDER - whole);
    // The whole number is added to the exponent.
    f32::from_bits(polynomial(r, POWER).to_bits().wrapping_add(whole.to_bits() << EXPONENT_BITS))
}

/// `1 / sqrt(sum)` for a sum of squares of at least 1.2e-38, within 1e-6; 0 above 1e38. What is less gives a
/// finite number, so that nothing times it stays nothing.
#[inline(always)]
pub fn inverse_root(sum: f32) -> f32 {
    let root = inverse_root_of_any(sum);
    if sum > LARGEST_SUM { 0.0 } else { root }
}

/// The same for every finite sum.
#[inline(always)]
pub(crate) fn inverse_root_of_any(sum: f32) -> f32 {
    let seed = f32::from_bits(0x5f30_0000u32.wrapping_sub(sum.to_bits() >> 1));
    seed * polynomial(Lanes::neg_mul_add(sum * seed, seed, 1.0), INVERSE_ROOT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::format;

    /// Holds `f` to `exact`, relative to it, for all exponents and signs, and between `from` and `to`.
    fn check(name: &str, bound: f64, [from, to]: [f32; 2], f: fn(f32) -> f32, exact: fn(f64) -> f64) {
        let steps = 1_000_000;
        let even = (0..=steps).map(|i| from + (to - from) * (i as f32 / steps as f32));
        let all = (0..=u32::MAX >> 10).map(|high| f32::from_bits(high << 10 | high & 0x3ff));
        for x in even.chain(all.filter(|x| (from..=to).contains(x))) {
            let right = exact(f64::from(x));
            let error = (f64::from(f(x)) - right).abs();
            // A subnormal number has fewer places.
            let bound = bound * right.abs() + 1.5e-45;
            assert!(error <= bound, "{}", format!("{name}({x:e}) is {:e}, not {right:e}", f(x)));
        }
    }

    #[test]
    fn errors() {
        check("exp", 1e-6, [-50.0, 50.0], exp, f64::exp);
        check("exp", 2e-6, [-86.9, 86.9], exp, f64::exp);
        check("inverse root", 1e-6, [1.2e-38, 1e38], inverse_root, |x| x.powf(-0.5));
    }

    #[test]
    fn at_the_ends() {
        for x in [-88.0, -90.0, -1e4, f32::MIN, f32::NEG_INFINITY] {
            assert!((0.0..1.7e-38).contains(&exp(x)), "{}", format!("exp({x:e}) is {:e}", exp(x)));
        }
        assert!(inverse_root(f32::NAN).is_nan());
        assert_eq!(0.0 * inverse_root(0.0), 0.0);
        assert_eq!((inverse_root(f32::INFINITY), inverse_root(2e38)), (0.0, 0.0));
    }
}
