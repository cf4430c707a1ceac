//! Sixteen f32, on x86-64 with AVX-512.

use std::arch::x86_64 as x86;

use gdn_math::Lanes;

use super::Register;

/// A register of sixteen. There is one only where the machine has AVX-512F, BW, VL and DQ.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct F32x16(x86::__m512);

/// Wraps intrinsics of AVX-512F.
macro_rules! op {
    ($intrinsic:ident($($argument:expr),*)) => {
        // SAFETY: a value of the type shows that the machine has the instructions.
        Self(unsafe { x86::$intrinsic($($argument),*) })
    };
}

impl Lanes for F32x16 {
    const LEN: usize = 16;

    #[inline(always)]
    fn splat(self, value: f32) -> Self {
        op!(_mm512_set1_ps(value))
    }

    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        op!(_mm512_add_ps(self.0, other.0))
    }

    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        op!(_mm512_sub_ps(self.0, other.0))
    }

    #[inline(always)]
    fn times(self, other: Self) -> Self {
        op!(_mm512_mul_ps(self.0, other.0))
    }

    #[inline(always)]
    fn over(self, other: Self) -> Self {
        op!(_mm512_div_ps(self.0, other.0))
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        op!(_mm512_fmadd_ps(self.0, factor.0, addend.0))
    }

    #[inline(always)]
    fn neg_mul_add(self, factor: Self, addend: Self) -> Self {
        op!(_mm512_fnmadd_ps(self.0, factor.0, addend.0))
    }

    #[inline(always)]
    fn root(self) -> Self {
        op!(_mm512_sqrt_ps(self.0))
    }

    // The instructions give their second operand where one is NaN.
    #[inline(always)]
    fn at_least(self, least: Self) -> Self {
        op!(_mm512_max_ps(least.0, self.0))
    }

    #[inline(always)]
    fn at_most(self, most: Self) -> Self {
        op!(_mm512_min_ps(most.0, self.0))
    }

    #[inline(always)]
    fn if_greater(self, other: Self, then: Self, otherwise: Self) -> Self {
        // SAFETY: a value of the type shows that the machine has the instructions.
        Self(unsafe {
            let greater = x86::_mm512_cmp_ps_mask::<{ x86::_CMP_GT_OQ }>(self.0, other.0);
            x86::_mm512_mask_blend_ps(greater, otherwise.0, then.0)
        })
    }

    #[inline(always)]
    fn half_of_power(self) -> Self {
        // SAFETY: a value of the type shows that the machine has the instructions.
        Self(unsafe {
            let shifted = x86::_mm512_slli_epi32::<23>(x86::_mm512_castps_si512(self.0));
            x86::_mm512_castsi512_ps(x86::_mm512_add_epi32(shifted, x86::_mm512_set1_epi32(126 << 23)))
        })
    }

    #[inline(always)]
    fn negated(self) -> Self {
        // SAFETY: a value of the type shows that the machine has the instructions.
        Self(unsafe {
            let sign = x86::_mm512_set1_epi32(i32::MIN);
            x86::_mm512_castsi512_ps(x86::_mm512_xor_si512(x86::_mm512_castps_si512(self.0), sign))
        })
    }
}

impl Register for F32x16 {
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { x86::_mm512_setzero_ps() })
    }

    #[inline(always)]
    unsafe fn load(src: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { x86::_mm512_loadu_ps(src) })
    }

    #[inline(always)]
    unsafe fn store(self, dst: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { x86::_mm512_storeu_ps(dst, self.0) }
    }

    #[inline(always)]
    unsafe fn load_bf16(src: *const u16) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let wide = x86::_mm512_cvtepu16_epi32(x86::_mm256_loadu_si256(src.cast()));
            Self(x86::_mm512_castsi512_ps(x86::_mm512_slli_epi32::<16>(wide)))
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, dst: *mut u16) {
        // SAFETY: the caller's promise.
        unsafe {
            let bits = x86::_mm512_castps_si512(self.0);
            let last = x86::_mm512_and_si512(x86::_mm512_srli_epi32::<16>(bits), x86::_mm512_set1_epi32(1));
            let half = x86::_mm512_add_epi32(last, x86::_mm512_set1_epi32(0x7fff));
            let rounded = x86::_mm512_add_epi32(bits, half);
            let nan = x86::_mm512_cmp_ps_mask::<{ x86::_CMP_UNORD_Q }>(self.0, self.0);
            let quiet = x86::_mm512_or_si512(bits, x86::_mm512_set1_epi32(0x0040_0000));
            let bits = x86::_mm512_mask_blend_epi32(nan, rounded, quiet);
            let narrow = x86::_mm512_cvtepi32_epi16(x86::_mm512_srli_epi32::<16>(bits));
            x86::_mm256_storeu_si256(dst.cast(), narrow);
        }
    }

    #[inline(always)]
    unsafe fn load_f16(src: *const u16) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { x86::_mm512_cvtph_ps(x86::_mm256_loadu_si256(src.cast())) })
    }

    #[inline(always)]
    unsafe fn store_f16(self, dst: *mut u16) {
        // SAFETY: the caller's promise.
        unsafe {
            let narrow = x86::_mm512_cvtps_ph::<{ x86::_MM_FROUND_TO_NEAREST_INT }>(self.0);
            x86::_mm256_storeu_si256(dst.cast(), narrow);
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
        unsafe {
            let (low, high) = (x86::_mm512_castps512_ps256(self.0), x86::_mm512_extractf32x8_ps::<1>(self.0));
            super::avx2::sum(x86::_mm256_add_ps(low, high))
        }
    }
}
