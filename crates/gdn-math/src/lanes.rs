//! [`Lanes`]: a register of f32, of any width.

/// Some f32 that are computed side by side.
///
/// Every operation is rounded once, to nearest, ties to even, lane by lane, and so gives the same bits
/// whatever the width.
///
/// A value of an implementing type shows that the machine has its instructions: there is no way to make one
/// out of nothing but `unsafe` constructors of the types themselves, and [`splat`](Lanes::splat) takes a
/// value for that reason alone.
pub trait Lanes: Copy {
    /// How many.
    const LEN: usize;

    /// The same number in every lane. What `self` holds does not matter.
    #[must_use]
    fn splat(self, value: f32) -> Self;

    /// `self + other`
    #[must_use]
    fn plus(self, other: Self) -> Self;

    /// `self - other`
    #[must_use]
    fn minus(self, other: Self) -> Self;

    /// `self * other`
    #[must_use]
    fn times(self, other: Self) -> Self;

    /// `self / other`
    #[must_use]
    fn over(self, other: Self) -> Self;

    /// `self * factor + addend`, rounded once.
    #[must_use]
    fn mul_add(self, factor: Self, addend: Self) -> Self;

    /// `addend - self * factor`, rounded once.
    #[must_use]
    fn neg_mul_add(self, factor: Self, addend: Self) -> Self;

    /// The square root.
    #[must_use]
    fn root(self) -> Self;

    /// `self` where it is not less than `least`, else `least`. NaN stays.
    #[must_use]
    fn at_least(self, least: Self) -> Self;

    /// `self` where it is not greater than `most`, else `most`. NaN stays.
    #[must_use]
    fn at_most(self, most: Self) -> Self;

    /// `then` in the lanes in which `self > other`, `otherwise` in the others and where one of the two is
    /// NaN.
    #[must_use]
    fn if_greater(self, other: Self, then: Self, otherwise: Self) -> Self;

    /// `2^(n - 1)` where `self` is `1.5 * 2^23 + n` for a whole n from -126 to 128; 0 for n = -126.
    #[must_use]
    fn half_of_power(self) -> Self;

    /// `-self`
    #[must_use]
    #[inline(always)]
    fn negated(self) -> Self {
        self.times(self.splat(-1.0))
    }

    /// The magnitude. NaN stays.
    #[must_use]
    #[inline(always)]
    fn magnitude(self) -> Self {
        self.splat(0.0).if_greater(self, self.negated(), self)
    }
}

/// What [`Lanes::half_of_power`] adds to its whole number's bits: they are shifted to the exponent, whose
/// bias is 127, less 1.
pub(crate) const EXPONENT_BITS: u32 = 23;
pub(crate) const HALF: u32 = 126 << EXPONENT_BITS;

/// One lane: a thread of a GPU, or a processor without vector instructions.
impl Lanes for f32 {
    const LEN: usize = 1;

    #[inline(always)]
    fn splat(self, value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        self + other
    }

    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        self - other
    }

    #[inline(always)]
    fn times(self, other: Self) -> Self {
        self * other
    }

    #[inline(always)]
    fn over(self, other: Self) -> Self {
        self / other
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        fused(self, factor, addend)
    }

    #[inline(always)]
    fn neg_mul_add(self, factor: Self, addend: Self) -> Self {
        fused(-self, factor, addend)
    }

    #[inline(always)]
    fn root(self) -> Self {
        square_root(self)
    }

    #[inline(always)]
    fn at_least(self, least: Self) -> Self {
        if least > self { least } else { self }
    }

    #[inline(always)]
    fn at_most(self, most: Self) -> Self {
        if most < self { most } else { self }
    }

    #[inline(always)]
    fn if_greater(self, other: Self, then: Self, otherwise: Self) -> Self {
        if self > other { then } else { otherwise }
    }

    #[inline(always)]
    fn half_of_power(self) -> Self {
        f32::from_bits((self.to_bits() << EXPONENT_BITS).wrapping_add(HALF))
    }
}

#[cfg(not(target_arch = "nvptx64"))]
#[inline(always)]
pub(crate) fn fused(a: f32, b: f32, c: f32) -> f32 {
    a.mul_add(b, c)
}

#[cfg(not(target_arch = "nvptx64"))]
#[inline(always)]
fn square_root(x: f32) -> f32 {
    x.sqrt()
}

#[cfg(target_arch = "nvptx64")]
#[inline(always)]
pub(crate) fn fused(a: f32, b: f32, c: f32) -> f32 {
    core::intrinsics::fmaf32(a, b, c)
}

#[cfg(target_arch = "nvptx64")]
#[inline(always)]
fn square_root(x: f32) -> f32 {
    core::intrinsics::sqrtf32(x)
}
