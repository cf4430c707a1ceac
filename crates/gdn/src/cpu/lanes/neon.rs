//! Four f32, on 64-bit Arm.

use std::arch::{aarch64 as arm, asm};

use gdn_math::Lanes;

use super::Register;

/// A register of four. There is one only where the machine has NEON.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct F32x4(arm::float32x4_t);

/// Wraps intrinsics of NEON.
macro_rules! op {
    ($intrinsic:ident($($argument:expr),*)) => {
        // SAFETY: a value of the type shows that the machine has the instructions.
        Self(unsafe { arm::$intrinsic($($argument),*) })
    };
}

impl F32x4 {
    #[inline(always)]
    fn select(mask: arm::uint32x4_t, then: Self, otherwise: Self) -> Self {
        op!(vbslq_f32(mask, then.0, otherwise.0))
    }
}

impl Lanes for F32x4 {
    const LEN: usize = 4;

    #[inline(always)]
    fn splat(self, value: f32) -> Self {
        op!(vdupq_n_f32(value))
    }

    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        op!(vaddq_f32(self.0, other.0))
    }

    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        op!(vsubq_f32(self.0, other.0))
    }

    #[inline(always)]
    fn times(self, other: Self) -> Self {
        op!(vmulq_f32(self.0, other.0))
    }

    #[inline(always)]
    fn over(self, other: Self) -> Self {
        op!(vdivq_f32(self.0, other.0))
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        op!(vfmaq_f32(addend.0, self.0, factor.0))
    }

    #[inline(always)]
    fn neg_mul_add(self, factor: Self, addend: Self) -> Self {
        op!(vfmsq_f32(addend.0, self.0, factor.0))
    }

    #[inline(always)]
    fn root(self) -> Self {
        op!(vsqrtq_f32(self.0))
    }

    #[inline(always)]
    fn at_least(self, least: Self) -> Self {
        least.if_greater(self, least, self)
    }

    #[inline(always)]
    fn at_most(self, most: Self) -> Self {
        self.if_greater(most, most, self)
    }

    #[inline(always)]
    fn if_greater(self, other: Self, then: Self, otherwise: Self) -> Self {
        // SAFETY: a value of the type shows that the machine has the instructions.
        let mask = unsafe { arm::vcgtq_f32(self.0, other.0) };
        Self::select(mask, then, otherwise)
    }

    #[inline(always)]
    fn half_of_power(self) -> Self {
        // SAFETY: a value of the type shows that the machine has the instructions.
        Self(unsafe {
            let shifted = arm::vshlq_n_u32::<23>(arm::vreinterpretq_u32_f32(self.0));
            arm::vreinterpretq_f32_u32(arm::vaddq_u32(shifted, arm::vdupq_n_u32(126 << 23)))
        })
    }

    #[inline(always)]
    fn negated(self) -> Self {
        op!(vnegq_f32(self.0))
    }
}

/// Numbers whose upper halves are the nearest bf16.
#[inline(always)]
fn rounded(numbers: F32x4) -> arm::uint32x4_t {
    // SAFETY: a value of the type shows that the machine has the instructions.
    unsafe {
        let bits = arm::vreinterpretq_u32_f32(numbers.0);
        // The last place that stays: the topmost bit here, and then 1.
        let last = arm::vshlq_n_u32::<15>(bits);
        arm::vsraq_n_u32::<31>(arm::vaddq_u32(bits, arm::vdupq_n_u32(0x7fff)), last)
    }
}

impl Register for F32x4 {
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { arm::vdupq_n_f32(0.0) })
    }

    #[inline(always)]
    unsafe fn load(src: *const f32) -> Self {
        // SAFETY: the caller's promise. Bytes have no alignment.
        Self(unsafe { arm::vreinterpretq_f32_u8(arm::vld1q_u8(src.cast())) })
    }

    #[inline(always)]
    unsafe fn store(self, dst: *mut f32) {
        // SAFETY: the caller's promise. Bytes have no alignment.
        unsafe { arm::vst1q_u8(dst.cast(), arm::vreinterpretq_u8_f32(self.0)) }
    }

    #[inline(always)]
    unsafe fn load_bf16(src: *const u16) -> Self {
        // SAFETY: the caller's promise. Bytes have no alignment.
        unsafe {
            let narrow = arm::vreinterpret_u16_u8(arm::vld1_u8(src.cast()));
            Self(arm::vreinterpretq_f32_u32(arm::vshll_n_u16::<16>(narrow)))
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, dst: *mut u16) {
        // SAFETY: the caller's promise. Bytes have no alignment.
        unsafe {
            let bits = arm::vreinterpretq_u32_f32(self.0);
            let number = arm::vceqq_f32(self.0, self.0);
            let quiet = arm::vorrq_u32(bits, arm::vdupq_n_u32(0x0040_0000));
            let bits = arm::vbslq_u32(number, rounded(self), quiet);
            let narrow = arm::vshrn_n_u32::<16>(bits);
            arm::vst1_u8(dst.cast(), arm::vreinterpret_u8_u16(narrow));
        }
    }

    // Rust has no stable type for the intrinsics of f16. The instructions are of the first 64-bit Arm.
    #[inline(always)]
    unsafe fn load_f16(src: *const u16) -> Self {
        // SAFETY: the caller's promise. Bytes have no alignment. The instruction touches registers alone.
        unsafe {
            let narrow = arm::vld1_u8(src.cast());
            let wide: arm::float32x4_t;
            asm!(
                "fcvtl {wide:v}.4s, {narrow:v}.4h",
                wide = lateout(vreg) wide,
                narrow = in(vreg) narrow,
                options(pure, nomem, nostack, preserves_flags)
            );
            Self(wide)
        }
    }

    #[inline(always)]
    unsafe fn store_f16(self, dst: *mut u16) {
        // SAFETY: as above.
        unsafe {
            let narrow: arm::uint8x8_t;
            asm!(
                "fcvtn {narrow:v}.4h, {wide:v}.4s",
                narrow = lateout(vreg) narrow,
                wide = in(vreg) self.0,
                options(pure, nomem, nostack, preserves_flags)
            );
            arm::vst1_u8(dst.cast(), narrow);
        }
    }

    #[inline(always)]
    unsafe fn load_bf16_pair(src: *const u16) -> [Self; 2] {
        // SAFETY: the caller's promise. Bytes have no alignment.
        unsafe {
            let both = arm::vreinterpretq_u32_u8(arm::vld1q_u8(src.cast()));
            let odd = arm::vandq_u32(both, arm::vdupq_n_u32(0xffff_0000));
            let even = arm::vshlq_n_u32::<16>(both);
            [Self(arm::vreinterpretq_f32_u32(even)), Self(arm::vreinterpretq_f32_u32(odd))]
        }
    }

    #[inline(always)]
    unsafe fn store_bf16_pair([even, odd]: [Self; 2], dst: *mut u16) {
        // SAFETY: the caller's promise. Bytes have no alignment.
        unsafe {
            let both = arm::vsriq_n_u32::<16>(rounded(odd), rounded(even));
            arm::vst1q_u8(dst.cast(), arm::vreinterpretq_u8_u32(both));
        }
    }

    #[inline(always)]
    fn unzip([first, second]: [Self; 2]) -> [Self; 2] {
        [op!(vuzp1q_f32(first.0, second.0)), op!(vuzp2q_f32(first.0, second.0))]
    }

    #[inline(always)]
    fn zip([even, odd]: [Self; 2]) -> [Self; 2] {
        [op!(vzip1q_f32(even.0, odd.0)), op!(vzip2q_f32(even.0, odd.0))]
    }

    #[inline(always)]
    fn unzip_three([a, b, c]: [Self; 3]) -> [Self; 3] {
        let mut lanes = [0.0; 12];
        // SAFETY: twelve f32; a value of the type shows that the machine has the instructions.
        unsafe {
            a.store(lanes.as_mut_ptr());
            b.store(lanes[4..].as_mut_ptr());
            c.store(lanes[8..].as_mut_ptr());
            let arm::float32x4x3_t(x, y, z) = arm::vld3q_f32(lanes.as_ptr());
            [Self(x), Self(y), Self(z)]
        }
    }

    #[inline(always)]
    fn zip_three([x, y, z]: [Self; 3]) -> [Self; 3] {
        let mut lanes = [0.0; 12];
        // SAFETY: as above.
        unsafe {
            arm::vst3q_f32(lanes.as_mut_ptr(), arm::float32x4x3_t(x.0, y.0, z.0));
            [Self::load(lanes.as_ptr()), Self::load(lanes[4..].as_ptr()), Self::load(lanes[8..].as_ptr())]
        }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: a value of the type shows that the machine has the instructions.
        unsafe {
            let two = arm::vadd_f32(arm::vget_low_f32(self.0), arm::vget_high_f32(self.0));
            arm::vget_lane_f32::<0>(two) + arm::vget_lane_f32::<1>(two)
        }
    }
}
