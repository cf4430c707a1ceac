//! Exponential and logarithm out of fused multiply-adds: the same bits on every machine, within 1 to 3 units
//! in the last place (the tests say which).

use crate::lanes::Lanes;

/// Adding it to a number of magnitude below 2^22 rounds that number to a whole one, which then stands in the
/// last bits.
const ROUNDER: f32 = 12_582_912.0;
/// ln 2 in two parts. The first has few bits, so that its product with a whole number up to 2^8 is exact.
const LN_2_HIGH: f32 = 355.0 / 512.0;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// `e^self`: 0 below -86.99 (where the result would be less than 1.7e-38), infinity above 88.72.
///
/// `x = n ln 2 + r` with a whole n; `e^r` by its Taylor series, whose first term left out is below 2^-27.
#[inline(always)]
pub fn exp<L: Lanes>(x: L) -> L {
    let c = |value: f32| x.splat(value);
    let x = x.at_least(c(-87.5)).at_most(c(89.0));
    let whole = x.mul_add(c(core::f32::consts::LOG2_E), c(ROUNDER));
    let n = whole.minus(c(ROUNDER));
    let r = n.neg_mul_add(c(LN_2_LOW), n.neg_mul_add(c(LN_2_HIGH), x));
    let p = r.mul_add(c(1.0 / 5040.0), c(1.0 / 720.0));
    let p = r.mul_add(p, c(1.0 / 120.0));
    let p = r.mul_add(p, c(1.0 / 24.0));
    let p = r.mul_add(p, c(1.0 / 6.0));
    let p = r.mul_add(p, c(0.5));
    let p = r.mul_add(p, c(1.0));
    let p = r.mul_add(p, c(1.0));
    p.plus(p).times(whole.half_of_power())
}

/// `ln(1 + u)` for u from 0 to 1: `2 artanh(s)` with `s = u / (2 + u)`, by its series, whose first term left
/// out is below 2^-28.
#[inline(always)]
pub fn log1p<L: Lanes>(u: L) -> L {
    let c = |value: f32| u.splat(value);
    let s = u.over(u.plus(c(2.0)));
    let square = s.times(s);
    let p = square.mul_add(c(2.0 / 15.0), c(2.0 / 13.0));
    let p = square.mul_add(p, c(2.0 / 11.0));
    let p = square.mul_add(p, c(2.0 / 9.0));
    let p = square.mul_add(p, c(2.0 / 7.0));
    let p = square.mul_add(p, c(2.0 / 5.0));
    let p = square.mul_add(p, c(2.0 / 3.0));
    s.times(square).mul_add(p, s.plus(s))
}

/// `1 / (1 + e^-x)`
#[inline(always)]
pub fn sigmoid<L: Lanes>(x: L) -> L {
    let one = x.splat(1.0);
    one.over(exp(x.negated()).plus(one))
}

/// `x / (1 + e^-x)`
#[inline(always)]
pub fn silu<L: Lanes>(x: L) -> L {
    x.over(exp(x.negated()).plus(x.splat(1.0)))
}

/// `ln(1 + e^x)`, and x above 20, where PyTorch's and every engine's softplus is x itself.
#[inline(always)]
pub fn softplus<L: Lanes>(x: L) -> L {
    let small = x.at_least(x.splat(0.0)).plus(log1p(exp(x.magnitude().negated())));
    x.if_greater(x.splat(20.0), x, small)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::format;

    /// The largest error over f32 from `from` to `to`, in units in the last place of the exact result.
    fn worst(from: f32, to: f32, f: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64) -> (f64, f32) {
        let steps = 400_000;
        let at = |i: i32| from + (to - from) * (i as f32 / steps as f32);
        (0..=steps).map(at).fold((0.0, 0.0), |worst, x| {
            let right = exact(f64::from(x));
            let place = f64::from(f32::EPSILON) * 2f64.powi((right.abs().log2().floor() as i32).max(-126));
            let error = (f64::from(f(x)) - right).abs() / place;
            if error > worst.0 { (error, x) } else { worst }
        })
    }

    fn check(name: &str, bound: f64, (error, x): (f64, f32)) {
        assert!(error <= bound, "{}", format!("{name}({x:e}) is off by {error:.2} units in the last place"));
    }

    #[test]
    fn errors_in_units_in_the_last_place() {
        check("exp", 1.0, worst(-86.9, 88.7, exp, f64::exp));
        check("exp near 0", 1.0, worst(-1.0, 1.0, exp, f64::exp));
        check("log1p", 2.0, worst(0.0, 1.0, log1p, f64::ln_1p));
        check("sigmoid", 2.5, worst(-80.0, 80.0, sigmoid, |x| 1.0 / (1.0 + (-x).exp())));
        check("silu", 2.5, worst(-80.0, 80.0, silu, |x| x / (1.0 + (-x).exp())));
        check("softplus", 3.0, worst(-20.0, 20.0, softplus, |x| x.exp().ln_1p()));
    }

    #[test]
    fn at_the_ends() {
        assert_eq!((exp(-1000.0f32), exp(f32::NEG_INFINITY), exp(0.0f32)), (0.0, 0.0, 1.0));
        assert_eq!(
            (exp(1000.0f32), exp(f32::INFINITY), exp(89.0f32)),
            (f32::INFINITY, f32::INFINITY, f32::INFINITY)
        );
        assert!(exp(f32::NAN).is_nan() && sigmoid(f32::NAN).is_nan() && softplus(f32::NAN).is_nan());
        assert_eq!((sigmoid(200.0f32), sigmoid(-200.0f32)), (1.0, 0.0));
        assert_eq!((silu(200.0f32), silu(-200.0f32).abs()), (200.0, 0.0));
        assert_eq!((softplus(90.0f32), softplus(20.5f32), softplus(-200.0f32)), (90.0, 20.5, 0.0));
        assert_eq!((softplus(f32::INFINITY), softplus(f32::NEG_INFINITY)), (f32::INFINITY, 0.0));
    }
}
