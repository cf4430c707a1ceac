//! 16-byte registers, on 64-bit Arm. Its non-temporal stores have no stable intrinsic, so it streams through
//! the caches.

use std::arch::aarch64 as arm;

use super::{Copier, Lane, Vector};

pub(super) static COPIER: Copier =
    Copier { copy_cached, copy_side_by_side, copy_in_order, stream, fence: || {} };

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
    fn prefetch(_: *const u8) {}

    #[inline(always)]
    fn prefetch_to_write(_: *mut u8) {}
}

/// # Safety
/// As `Copier::copy_cached`; the machine has NEON.
#[target_feature(enable = "neon")]
unsafe fn copy_cached(lanes: &[Lane], count: usize, rows: usize) {
    // SAFETY: the caller's promises.
    unsafe { super::copy_cached::<arm::uint8x16_t>(lanes, count, rows) }
}

/// # Safety
/// As `Copier::copy_side_by_side`; the machine has NEON.
#[target_feature(enable = "neon")]
unsafe fn copy_side_by_side(lanes: &[Lane], count: usize, rows: usize) {
    // SAFETY: the caller's promises.
    unsafe { super::copy_side_by_side::<arm::uint8x16_t>(lanes, count, rows) }
}

/// # Safety
/// As `Copier::copy_in_order`; the machine has NEON.
#[target_feature(enable = "neon")]
unsafe fn copy_in_order(lanes: &[Lane], count: usize, rows: usize) {
    // SAFETY: the caller's promises.
    unsafe { super::copy_in_order::<arm::uint8x16_t>(lanes, count, rows) }
}

/// # Safety
/// As `Copier::stream`; the machine has NEON.
#[target_feature(enable = "neon")]
unsafe fn stream(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller's promises.
    unsafe { super::stream::<arm::uint8x16_t>(src, dst, len) }
}
