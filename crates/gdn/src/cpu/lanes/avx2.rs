//! Eight f32, on x86-64 with AVX2, FMA and F16C.

use std::arch::x86_64 as x86;

use gdn_math::Lanes;

use super::Register;

/// A register of eight. There is one only where the machine has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct F32x8(x86::__m256);

/// Wraps intrinsics of AVX2 and FMA.
macro_rules! op {
    ($intrinsic:ident($($argument:expr),*)) => {
        // SAFETY: a value of the type shows that the machine has the instructions.
        Self(unsafe { x86::$intrinsic($($argument),*) })
    };
}

impl Lanes for F32x8 {
    const LEN: usize = 8;

    #[inline(always)]
    fn splat(self, value: f32) -> Self {
        op!(_mm256_set1_ps(value))
    }

    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        op!(_mm256_add_ps(self.0, other.0))
    }

    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        op!(_mm256_sub_ps(self.0, other.0))
    }

    #[inline(always)]
    fn times(self, other: Self) -> Self {
        op!(_mm256_mul_ps(self.0, other.0))
    }

    #[inline(always)]
    fn over(self, other: Self) -> Self {
        op!(_mm256_div_ps(self.0, other.0))
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        op!(_mm256_fmadd_ps(self.0, factor.0, addend.0))
    }

    #[inline(always)]
    fn neg_mul_add(self, factor: Self, addend: Self) -> Self {
        op!(_mm256_fnmadd_ps(self.0, factor.0, addend.0))
    }

    #[inline(always)]
    fn root(self) -> Self {
        op!(_mm256_sqrt_ps(self.0))
    }

    // The instructions give their second operand where one is NaN.
    #[inline(always)]
    fn at_least(self, least: Self) -> Self {
        op!(_mm256_max_ps(least.0, self.0))
    }

    #[inline(always)]
    fn at_most(self, most: Self) -> Self {
        op!(_mm256_min_ps(most.0, self.0))
    }

    #[inline(always)]
    fn if_greater(self, other: Self, then: Self, otherwise: Self) -> Self {
        // SAFETY: a value of the type shows that the machine has the instructions.
        Self(unsafe {
            let greater = x86::_mm256_cmp_ps::<{ x86::_CMP_GT_OQ }>(self.0, other.0);
            x86::_mm256_blendv_ps(otherwise.0, then.0, greater)
        })
    }

    #[inline(always)]
    fn half_of_power(self) -> Self {
        // SAFETY: a value of the type shows that the machine has the instructions.
        Self(unsafe {
            let shifted = x86::_mm256_slli_epi32::<23>(x86::_mm256_castps_si256(self.0));
            x86::_mm256_castsi256_ps(x86::_mm256_add_epi32(shifted, x86::_mm256_set1_epi32(126 << 23)))
        })
    }

    #[inline(always)]
    fn negated(self) -> Self {
        op!(_mm256_xor_ps(self.0, x86::_mm256_set1_ps(-0.0)))
    }
}

impl Register for F32x8 {
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { x86::_mm256_setzero_ps() })
    }

    #[inline(always)]
    unsafe fn load(src: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { x86::_mm256_loadu_ps(src) })
    }

    #[inline(always)]
    unsafe fn store(self, dst: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { x86::_mm256_storeu_ps(dst, self.0) }
    }

    #[inline(always)]
    unsafe fn load_bf16(src: *const u16) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let wide = x86::_mm256_cvtepu16_epi32(x86::_mm_loadu_si128(src.cast()));
            Self(x86::_mm256_castsi256_ps(x86::_mm256_slli_epi32::<16>(wide)))
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, dst: *mut u16) {
        // SAFETY: the caller's promise.
        unsafe {
            let bits = x86::_mm256_castps_si256(self.0);
            let last = x86::_mm256_and_si256(x86::_mm256_srli_epi32::<16>(bits), x86::_mm256_set1_epi32(1));
            let half = x86::_mm256_add_epi32(last, x86::_mm256_set1_epi32(0x7fff));
            let rounded = x86::_mm256_castsi256_ps(x86::_mm256_add_epi32(bits, half));
            let nan = x86::_mm256_cmp_ps::<{ x86::_CMP_UNORD_Q }>(self.0, self.0);
            let quiet = x86::_mm256_or_si256(bits, x86::_mm256_set1_epi32(0x0040_0000));
            let bits = x86::_mm256_castps_si256(x86::_mm256_blendv_ps(
                rounded,
                x86::_mm256_castsi256_ps(quiet),
                nan,
            ));
            let words = x86::_mm256_srli_epi32::<16>(bits);
            let (low, high) = (x86::_mm256_castsi256_si128(words), x86::_mm256_extracti128_si256::<1>(words));
            x86::_mm_storeu_si128(dst.cast(), x86::_mm_packus_epi32(low, high));
        }
    }

    #[inline(always)]
    unsafe fn load_f16(src: *const u16) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { x86::_mm256_cvtph_ps(x86::_mm_loadu_si128(src.cast())) })
    }

    #[inline(always)]
    unsafe fn store_f16(self, dst: *mut u16) {
        // SAFETY: the caller's promise.
        unsafe {
            let narrow = x86::_mm256_cvtps_ph::<{ x86::_MM_FROUND_TO_NEAREST_INT }>(self.0);
            x86::_mm_storeu_si128(dst.cast(), narrow);
        }
    }

    #[inline(always)]
    fn prefetch(src: *const u8) {
        // SAFETY: a prefetch of any address is harmless, and every x86-64 machine has SSE, whose instruction
        // it is.
        unsafe { x86::_mm_prefetch::<{ x86::_MM_HINT_T0 }>(src.cast()) }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: a value of the type shows that the machine has the instructions.
        unsafe { sum(self.0) }
    }
}

/// # Safety
/// The machine has AVX.
#[inline(always)]
pub(super) unsafe fn sum(lanes: x86::__m256) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let four =
            x86::_mm_add_ps(x86::_mm256_castps256_ps128(lanes), x86::_mm256_extractf128_ps::<1>(lanes));
        let two = x86::_mm_add_ps(four, x86::_mm_movehl_ps(four, four));
        let one = x86::_mm_add_ss(two, x86::_mm_shuffle_ps::<1>(two, two));
        x86::_mm_cvtss_f32(one)
    }
}
