//! Sixteen f32, on x86-64 with AVX-512.

use std::arch::x86_64 as x86;

use gdn_math::Lanes;

use super::Register;

/// A register of sixteen. There is one only where the machine has AVX-512F, BW, VL and DQ.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct F32x16(x86::__m512);

/// The upper half of 32 bits.
const UPPER: i32 = 0xffff_0000_u32 as i32;

/// Numbers whose upper halves are the nearest bf16.
#[inline(always)]
fn rounded(numbers: F32x16) -> x86::__m512i {
    // SAFETY: a value of the type shows that the machine has the instructions.
    unsafe {
        let bits = x86::_mm512_castps_si512(numbers.0);
        // What is added is 0x7fff, and 1 where the last place that stays is odd: 0x8000 less that place's
        // opposite, as one operation makes it out of the place (A), 1 (B) and -0x8000 (C): `(!A & B) | C`.
        let less = x86::_mm512_ternarylogic_epi32::<0b1010_1110>(
            x86::_mm512_srli_epi32::<16>(bits),
            x86::_mm512_set1_epi32(1),
            x86::_mm512_set1_epi32(-0x8000),
        );
        x86::_mm512_sub_epi32(bits, less)
    }
}

/// Lanes of two registers by their places, those of the second from 16 on.
#[inline(always)]
fn permuted(pair: [F32x16; 2], places: &[i32; 16]) -> F32x16 {
    // SAFETY: a value of the type shows that the machine has the instructions.
    unsafe {
        let places = x86::_mm512_loadu_si512(places.as_ptr().cast());
        F32x16(x86::_mm512_permutex2var_ps(pair[0].0, places, pair[1].0))
    }
}

/// The places of every third lane of three registers, from lane `first` on: of what comes from the first two
/// registers, and of that and the third one.
const fn third(first: usize) -> [[i32; 16]; 2] {
    let mut places = [[0; 16]; 2];
    let mut lane = 0;
    while lane < 16 {
        let at = 3 * lane + first;
        places[0][lane] = if at < 32 { at as i32 } else { 0 };
        places[1][lane] = if at < 32 { lane } else { at - 16 } as i32;
        lane += 1;
    }
    places
}

/// As [`third`], for the register `which` of three in which the lanes of three registers take turns.
const fn thirds(which: usize) -> [[i32; 16]; 2] {
    let mut places = [[0; 16]; 2];
    let mut lane = 0;
    while lane < 16 {
        let (at, from) = ((16 * which + lane) / 3, (16 * which + lane) % 3);
        places[0][lane] = (at + if from == 1 { 16 } else { 0 }) as i32;
        places[1][lane] = if from == 2 { 16 + at } else { lane } as i32;
        lane += 1;
    }
    places
}

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
            let nan = x86::_mm512_cmp_ps_mask::<{ x86::_CMP_UNORD_Q }>(self.0, self.0);
            let quiet = x86::_mm512_or_si512(bits, x86::_mm512_set1_epi32(0x0040_0000));
            let bits = x86::_mm512_mask_blend_epi32(nan, rounded(self), quiet);
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
    unsafe fn load_bf16_pair(src: *const u16) -> [Self; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let both = x86::_mm512_loadu_si512(src.cast());
            let odd = x86::_mm512_and_si512(both, x86::_mm512_set1_epi32(UPPER));
            let even = x86::_mm512_slli_epi32::<16>(both);
            [Self(x86::_mm512_castsi512_ps(even)), Self(x86::_mm512_castsi512_ps(odd))]
        }
    }

    #[inline(always)]
    unsafe fn store_bf16_pair([even, odd]: [Self; 2], dst: *mut u16) {
        // SAFETY: the caller's promise.
        unsafe {
            // Where the mask has ones the first, else the second.
            let both = x86::_mm512_ternarylogic_epi32::<0b1110_0100>(
                rounded(odd),
                x86::_mm512_srli_epi32::<16>(rounded(even)),
                x86::_mm512_set1_epi32(UPPER),
            );
            x86::_mm512_storeu_si512(dst.cast(), both);
        }
    }

    #[inline(always)]
    fn unzip(pair: [Self; 2]) -> [Self; 2] {
        const EVEN: [i32; 16] = [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30];
        const ODD: [i32; 16] = [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31];
        [permuted(pair, &EVEN), permuted(pair, &ODD)]
    }

    #[inline(always)]
    fn zip(pair: [Self; 2]) -> [Self; 2] {
        const LOW: [i32; 16] = [0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23];
        const HIGH: [i32; 16] = [8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31];
        [permuted(pair, &LOW), permuted(pair, &HIGH)]
    }

    #[inline(always)]
    fn unzip_three([a, b, c]: [Self; 3]) -> [Self; 3] {
        const PLACES: [[[i32; 16]; 2]; 3] = [third(0), third(1), third(2)];
        let [x, y, z] = &PLACES;
        [
            permuted([permuted([a, b], &x[0]), c], &x[1]),
            permuted([permuted([a, b], &y[0]), c], &y[1]),
            permuted([permuted([a, b], &z[0]), c], &z[1]),
        ]
    }

    #[inline(always)]
    fn zip_three([a, b, c]: [Self; 3]) -> [Self; 3] {
        const PLACES: [[[i32; 16]; 2]; 3] = [thirds(0), thirds(1), thirds(2)];
        let [x, y, z] = &PLACES;
        [
            permuted([permuted([a, b], &x[0]), c], &x[1]),
            permuted([permuted([a, b], &y[0]), c], &y[1]),
            permuted([permuted([a, b], &z[0]), c], &z[1]),
        ]
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
        unsafe { super::avx2::sum(halves(self)) }
    }
    #[inline(always)]
    fn four_sums([a, b, c, d]: [Self; 4]) -> [f32; 4] {
        // SAFETY: as above.
        unsafe { super::avx2::four_sums([halves(a), halves(b), halves(c), halves(d)]) }
    }
}

/// The two halves of a register, added.
#[inline(always)]
fn halves(lanes: F32x16) -> x86::__m256 {
    // SAFETY: a value of the type shows that the machine has the instructions.
    unsafe {
        x86::_mm256_add_ps(x86::_mm512_castps512_ps256(lanes.0), x86::_mm512_extractf32x8_ps::<1>(lanes.0))
    }
}
