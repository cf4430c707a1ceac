//! One f32 at a time, on every machine.

use gdn_math::element::{bf16_of_f32, f16_of_f32, f32_of_bf16, f32_of_f16};

use super::Register;

impl Register for f32 {
    #[inline(always)]
    unsafe fn zero() -> Self {
        0.0
    }

    #[inline(always)]
    unsafe fn load(src: *const f32) -> Self {
        // SAFETY: the caller's promise.
        unsafe { src.read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, dst: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { dst.write_unaligned(self) }
    }

    #[inline(always)]
    unsafe fn load_bf16(src: *const u16) -> Self {
        // SAFETY: the caller's promise.
        f32_of_bf16(unsafe { src.read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store_bf16(self, dst: *mut u16) {
        // SAFETY: the caller's promise.
        unsafe { dst.write_unaligned(bf16_of_f32(self)) }
    }

    #[inline(always)]
    unsafe fn load_f16(src: *const u16) -> Self {
        // SAFETY: the caller's promise.
        f32_of_f16(unsafe { src.read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store_f16(self, dst: *mut u16) {
        // SAFETY: the caller's promise.
        unsafe { dst.write_unaligned(f16_of_f32(self)) }
    }

    #[inline(always)]
    unsafe fn load_bf16_pair(src: *const u16) -> [Self; 2] {
        // SAFETY: the caller's promise.
        unsafe { [Self::load_bf16(src), Self::load_bf16(src.add(1))] }
    }

    #[inline(always)]
    unsafe fn store_bf16_pair([even, odd]: [Self; 2], dst: *mut u16) {
        // SAFETY: the caller's promise.
        unsafe {
            even.store_bf16(dst);
            odd.store_bf16(dst.add(1));
        }
    }

    #[inline(always)]
    fn unzip(pair: [Self; 2]) -> [Self; 2] {
        pair
    }

    #[inline(always)]
    fn zip(pair: [Self; 2]) -> [Self; 2] {
        pair
    }

    #[inline(always)]
    fn unzip_three(registers: [Self; 3]) -> [Self; 3] {
        registers
    }

    #[inline(always)]
    fn zip_three(registers: [Self; 3]) -> [Self; 3] {
        registers
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        self
    }
}
