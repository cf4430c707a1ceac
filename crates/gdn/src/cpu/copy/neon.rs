//! 16-byte registers, on 64-bit Arm. Its non-temporal stores have no stable intrinsic, so it streams through the caches.

use std::{arch::aarch64 as arm, ops::Range};

use super::{Job, Vector};

impl Vector for arm::uint8x16_t {
    const BYTES: usize = 16;

    #[inline(always)]
    unsafe fn load(src: *const u8) -> Self {
        // SAFETY: the caller's promises.
        unsafe { arm::vld1q_u8(src) }
    }

    #[inline(always)]
    unsafe fn store(self, dst: *mut u8) {
        // SAFETY: the caller's promises.
        unsafe { arm::vst1q_u8(dst, self) }
    }

    #[inline(always)]
    unsafe fn stream(self, dst: *mut u8) {
        // SAFETY: the caller's promises.
        unsafe { arm::vst1q_u8(dst, self) }
    }

    #[inline(always)]
    fn fence() {}
}

/// # Safety
/// As [`super::copy_rows`]; the machine has NEON.
#[target_feature(enable = "neon")]
pub(super) unsafe fn copy_rows(job: &Job, rows: Range<usize>, stage: &mut [u8]) {
    // SAFETY: the caller's promises.
    unsafe { super::copy_rows_with::<arm::uint8x16_t>(job, rows, stage) }
}

/// # Safety
/// As [`super::stream()`]; the machine has NEON.
#[target_feature(enable = "neon")]
pub(super) unsafe fn stream(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller's promises.
    unsafe {
        super::stream::<arm::uint8x16_t>(src, dst, len);
        arm::uint8x16_t::fence();
    }
}
