//! Exponential, inverse and inverse root for what is rounded to 16 bits afterwards: within 8e-6 of the exact
//! result, where bf16 is within 4e-3 and f16 within 5e-4, and the same bits on every machine.
//!
//! A GPU divides and takes roots in 8 to 20 instructions, most of them for the last place and for numbers
//! that do not come up here. These take 14 for a whole silu. For one f32: a thread of a GPU.

use core::f32::consts::LOG2_E;

use crate::lanes::{EXPONENT_BITS, Lanes};

/// See `special.rs`.
const ROUNDER: f32 = 12_582_912.0;
/// Sums are made of powers of two from 2^-22 to 2^122, of which [`inverse`] makes the inverse. `LOG2_E` and the
/// smallest over their difference are f32 that are rounded by less than 1e-9 of them.
const POWERS: f32 = 144.072_16;
const SMALLEST_POWER: f32 = 22.0;
/// The lowest bits of a sum with it are a whole number, 0 for the smallest power, and an exponent's bias.
const ROUNDER_AND_BIAS: f32 = ROUNDER + 127.0 - SMALLEST_POWER;
/// From here on a sum's inverse root is 0: it stands for infinity, too.
const LARGEST_SUM: f32 = 1e38;

/// The coefficients of the best polynomials for `2^r`, r from -1/2 to 1/2: within 2.6e-6 and 5.7e-8 of it.
const POWER_4: [f32; 5] = [0.999_999_2, 0.693_121_9, 0.240_248_11, 0.055_917_498, 0.009_567_739];
const POWER_5: [f32; 6] = [1.0, 0.693_146_94, 0.240_221_3, 0.055_508_64, 0.009_675_669, 0.001_322_54];
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

/// `e^x` for x from -87 to 87, by a polynomial for 2^r.
#[inline(always)]
fn power<const N: usize>(x: f32, p: [f32; N]) -> f32 {
    let whole = Lanes::mul_add(x, LOG2_E, ROUNDER);
    let r = Lanes::mul_add(x, LOG2_E, ROUNDER - whole);
    // The whole number is added to the exponent.
    f32::from_bits(polynomial(r, p).to_bits().wrapping_add(whole.to_bits() << EXPONENT_BITS))
}

/// `1 / x` to the nearest for x from 2^-120 to 2^122.
#[cfg(not(target_arch = "nvptx64"))]
#[inline(always)]
pub fn inverse(x: f32) -> f32 {
    1.0 / x
}

/// The same in three instructions: what the machine has for an inverse is off by a last place, and a step of Newton's makes it
/// the nearest. Those are what the compiler makes of `1 / x`, too, once it has asked whether x is too small or large for
/// them. `gdn_probe_inverses` tries all mantissas.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
pub fn inverse(x: f32) -> f32 {
    unsafe extern "C" {
        #[link_name = "llvm.nvvm.rcp.approx.ftz.f"]
        fn near_inverse(x: f32) -> f32;
    }
    // SAFETY: an instruction on registers.
    let near = unsafe { near_inverse(x) };
    Lanes::mul_add(near, Lanes::neg_mul_add(near, x, 1.0), near)
}

/// `x * factor + addend`, rounded, then cut to 0 to 1. NaN becomes 0.
#[cfg(not(target_arch = "nvptx64"))]
#[inline(always)]
fn mul_add_cut(x: f32, factor: f32, addend: f32) -> f32 {
    let sum = Lanes::mul_add(x, factor, addend);
    if sum > 0.0 { sum.min(1.0) } else { 0.0 }
}

/// The same in one instruction.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
fn mul_add_cut(x: f32, factor: f32, addend: f32) -> f32 {
    unsafe extern "C" {
        #[link_name = "llvm.nvvm.saturate.f"]
        fn saturate(x: f32) -> f32;
    }
    // SAFETY: an instruction on registers.
    unsafe { saturate(Lanes::mul_add(x, factor, addend)) }
}

/// `1 + e^-x`, where that is at most 2^122. NaN is as a large number.
#[inline(always)]
fn one_and_power(x: f32) -> f32 {
    // Where e^-x is between the smallest and the largest power: both ends are cut off at once.
    let part = mul_add_cut(x, -LOG2_E / POWERS, SMALLEST_POWER / POWERS);
    let whole = Lanes::mul_add(part, POWERS, ROUNDER_AND_BIAS);
    let r = Lanes::mul_add(part, POWERS, ROUNDER_AND_BIAS - whole);
    Lanes::mul_add(polynomial(r, POWER_4), f32::from_bits(whole.to_bits() << EXPONENT_BITS), 1.0)
}

/// `e^x` for x of at most 87, within 1e-6 down to -50 and 2e-6 below; less than 1.2e-38 below -87. NaN is as
/// 0.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    power(x.max(-87.0), POWER_5)
}

/// `1 / (1 + e^-x)`, within 6e-6 and below -20 within 8e-6; some 1.8e-37 below -84.6.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    let y = inverse(one_and_power(x));
    if x.is_nan() { x } else { y }
}

/// `x / (1 + e^-x)`, within 6e-6 and below -20 within 8e-6; some 1.8e-37 of `x` below -84.6, so that
/// -inf stays.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x * inverse(one_and_power(x))
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
        check("sigmoid", 6e-6, [-20.0, 1e30], sigmoid, |x| 1.0 / (1.0 + (-x).exp()));
        check("sigmoid", 8e-6, [-84.5, 0.0], sigmoid, |x| 1.0 / (1.0 + (-x).exp()));
        check("silu", 6e-6, [-20.0, 1e30], silu, |x| x / (1.0 + (-x).exp()));
        check("silu", 8e-6, [-84.5, 0.0], silu, |x| x / (1.0 + (-x).exp()));
        check("inverse root", 1e-6, [1.2e-38, 1e38], inverse_root, |x| x.powf(-0.5));
    }

    #[test]
    fn at_the_ends() {
        let inf = f32::INFINITY;
        for x in [-85.0, -87.0, -88.0, -1e4, f32::MIN, -inf] {
            let silu = if x > -inf { silu(x) / x } else { 0.0 };
            for (name, small) in [("exp", exp(x - 3.0)), ("sigmoid", sigmoid(x)), ("silu", silu)] {
                assert!((0.0..2e-37).contains(&small), "{}", format!("{name}({x:e}) is {small:e}"));
            }
        }
        for x in [85.0, 87.0, 88.0, 1e4, f32::MAX, inf] {
            assert!((sigmoid(x) - 1.0).abs() < 2e-6 && (silu(x) == x || (silu(x) / x - 1.0).abs() < 2e-6));
        }
        assert!(sigmoid(f32::NAN).is_nan() && silu(f32::NAN).is_nan() && inverse_root(f32::NAN).is_nan());
        assert_eq!(silu(-inf), -inf);
        assert!(sigmoid(-f32::NAN).is_nan() && silu(-f32::NAN).is_nan());
        assert_eq!((silu(0.0), silu(-0.0), 0.0 * inverse_root(0.0)), (0.0, 0.0, 0.0));
        assert_eq!((inverse_root(inf), inverse_root(2e38)), (0.0, 0.0));
    }
}
