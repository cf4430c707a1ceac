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

/// The lanes of the register `which` of three that are `first` or a multiple of three from it, of all 24.
const fn lanes_of(which: i32, first: i32) -> i32 {
    let mut lanes = 0;
    let mut lane = 0;
    while lane < 8 {
        if (8 * which + lane) % 3 == first {
            lanes |= 1 << lane;
        }
        lane += 1;
    }
    lanes
}

/// Numbers whose upper halves are the nearest bf16.
#[inline(always)]
fn rounded(numbers: F32x8) -> x86::__m256i {
    // SAFETY: a value of the type shows that the machine has the instructions.
    unsafe {
        let bits = x86::_mm256_castps_si256(numbers.0);
        let last = x86::_mm256_and_si256(x86::_mm256_srli_epi32::<16>(bits), x86::_mm256_set1_epi32(1));
        x86::_mm256_add_epi32(last, x86::_mm256_add_epi32(bits, x86::_mm256_set1_epi32(0x7fff)))
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
            let rounded = x86::_mm256_castsi256_ps(rounded(self));
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
    unsafe fn load_bf16_pair(src: *const u16) -> [Self; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let both = x86::_mm256_loadu_si256(src.cast());
            let odd = x86::_mm256_and_si256(both, x86::_mm256_set1_epi32(0xffff_0000_u32 as i32));
            let even = x86::_mm256_slli_epi32::<16>(both);
            [Self(x86::_mm256_castsi256_ps(even)), Self(x86::_mm256_castsi256_ps(odd))]
        }
    }

    #[inline(always)]
    unsafe fn store_bf16_pair([even, odd]: [Self; 2], dst: *mut u16) {
        // SAFETY: the caller's promise.
        unsafe {
            let even = x86::_mm256_srli_epi32::<16>(rounded(even));
            let both = x86::_mm256_blend_epi16::<0b1010_1010>(even, rounded(odd));
            x86::_mm256_storeu_si256(dst.cast(), both);
        }
    }

    #[inline(always)]
    fn unzip([first, second]: [Self; 2]) -> [Self; 2] {
        // SAFETY: a value of the type shows that the machine has the instructions.
        unsafe {
            // Within the halves of a register, then pairs of lanes across them.
            let even = x86::_mm256_shuffle_ps::<0b10_00_10_00>(first.0, second.0);
            let odd = x86::_mm256_shuffle_ps::<0b11_01_11_01>(first.0, second.0);
            let even = x86::_mm256_permute4x64_pd::<0b11_01_10_00>(x86::_mm256_castps_pd(even));
            let odd = x86::_mm256_permute4x64_pd::<0b11_01_10_00>(x86::_mm256_castps_pd(odd));
            [Self(x86::_mm256_castpd_ps(even)), Self(x86::_mm256_castpd_ps(odd))]
        }
    }

    #[inline(always)]
    fn zip([even, odd]: [Self; 2]) -> [Self; 2] {
        // SAFETY: a value of the type shows that the machine has the instructions.
        unsafe {
            let low = x86::_mm256_unpacklo_ps(even.0, odd.0);
            let high = x86::_mm256_unpackhi_ps(even.0, odd.0);
            [
                Self(x86::_mm256_permute2f128_ps::<0x20>(low, high)),
                Self(x86::_mm256_permute2f128_ps::<0x31>(low, high)),
            ]
        }
    }

    // Every third of 24 lanes lies in a lane of its own of the three registers, whichever one it is in.
    #[inline(always)]
    fn unzip_three([a, b, c]: [Self; 3]) -> [Self; 3] {
        // SAFETY: a value of the type shows that the machine has the instructions.
        unsafe {
            let x = x86::_mm256_blend_ps::<{ lanes_of(1, 0) }>(a.0, b.0);
            let x = x86::_mm256_blend_ps::<{ lanes_of(2, 0) }>(x, c.0);
            let y = x86::_mm256_blend_ps::<{ lanes_of(1, 1) }>(a.0, b.0);
            let y = x86::_mm256_blend_ps::<{ lanes_of(2, 1) }>(y, c.0);
            let z = x86::_mm256_blend_ps::<{ lanes_of(1, 2) }>(a.0, b.0);
            let z = x86::_mm256_blend_ps::<{ lanes_of(2, 2) }>(z, c.0);
            [
                Self(x86::_mm256_permutevar8x32_ps(x, x86::_mm256_setr_epi32(0, 3, 6, 1, 4, 7, 2, 5))),
                Self(x86::_mm256_permutevar8x32_ps(y, x86::_mm256_setr_epi32(1, 4, 7, 2, 5, 0, 3, 6))),
                Self(x86::_mm256_permutevar8x32_ps(z, x86::_mm256_setr_epi32(2, 5, 0, 3, 6, 1, 4, 7))),
            ]
        }
    }

    #[inline(always)]
    fn zip_three([x, y, z]: [Self; 3]) -> [Self; 3] {
        // SAFETY: a value of the type shows that the machine has the instructions.
        unsafe {
            let x = x86::_mm256_permutevar8x32_ps(x.0, x86::_mm256_setr_epi32(0, 3, 6, 1, 4, 7, 2, 5));
            let y = x86::_mm256_permutevar8x32_ps(y.0, x86::_mm256_setr_epi32(5, 0, 3, 6, 1, 4, 7, 2));
            let z = x86::_mm256_permutevar8x32_ps(z.0, x86::_mm256_setr_epi32(2, 5, 0, 3, 6, 1, 4, 7));
            let a = x86::_mm256_blend_ps::<{ lanes_of(0, 1) }>(x, y);
            let b = x86::_mm256_blend_ps::<{ lanes_of(1, 1) }>(x, y);
            let c = x86::_mm256_blend_ps::<{ lanes_of(2, 1) }>(x, y);
            [
                Self(x86::_mm256_blend_ps::<{ lanes_of(0, 2) }>(a, z)),
                Self(x86::_mm256_blend_ps::<{ lanes_of(1, 2) }>(b, z)),
                Self(x86::_mm256_blend_ps::<{ lanes_of(2, 2) }>(c, z)),
            ]
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
    #[inline(always)]
    fn four_sums([a, b, c, d]: [Self; 4]) -> [f32; 4] {
        // SAFETY: a value of the type shows that the machine has the instructions.
        unsafe { four_sums([a.0, b.0, c.0, d.0]) }
    }
}

/// The two halves of a register, added.
///
/// # Safety
/// The machine has AVX.
#[inline(always)]
unsafe fn halves(lanes: x86::__m256) -> x86::__m128 {
    // SAFETY: the caller's promise.
    unsafe { x86::_mm_add_ps(x86::_mm256_castps256_ps128(lanes), x86::_mm256_extractf128_ps::<1>(lanes)) }
}

/// # Safety
/// The machine has AVX.
#[inline(always)]
pub(super) unsafe fn sum(lanes: x86::__m256) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let four = halves(lanes);
        let two = x86::_mm_add_ps(four, x86::_mm_movehl_ps(four, four));
        let one = x86::_mm_add_ss(two, x86::_mm_shuffle_ps::<1>(two, two));
        x86::_mm_cvtss_f32(one)
    }
}

/// [`sum`] of four registers, which share all but the first step.
///
/// # Safety
/// The machine has AVX.
#[inline(always)]
pub(super) unsafe fn four_sums([a, b, c, d]: [x86::__m256; 4]) -> [f32; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b, c, d) = (halves(a), halves(b), halves(c), halves(d));
        let ab = x86::_mm_add_ps(x86::_mm_movelh_ps(a, b), x86::_mm_movehl_ps(b, a));
        let cd = x86::_mm_add_ps(x86::_mm_movelh_ps(c, d), x86::_mm_movehl_ps(d, c));
        let even = x86::_mm_shuffle_ps::<0b10_00_10_00>(ab, cd);
        let odd = x86::_mm_shuffle_ps::<0b11_01_11_01>(ab, cd);
        let mut sums = [0.0; 4];
        x86::_mm_storeu_ps(sums.as_mut_ptr(), x86::_mm_add_ps(even, odd));
        sums
    }
}
