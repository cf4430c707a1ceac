//! 8-byte words, on every machine. Without streaming stores: it goes through the caches.

use super::{Copier, Lane, Vector};

pub(super) static COPIER: Copier =
    Copier { copy_cached, copy_side_by_side, copy_in_order, stream, fence: || {} };

impl Vector for u64 {
    const BYTES: usize = 8;

    #[inline(always)]
    unsafe fn load(src: *const u8) -> Self {
        // SAFETY: the caller's promises.
        unsafe { src.cast::<u64>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, dst: *mut u8) {
        // SAFETY: the caller's promises.
        unsafe { dst.cast::<u64>().write_unaligned(self) }
    }

    #[inline(always)]
    unsafe fn stream(self, dst: *mut u8) {
        // SAFETY: the caller's promises.
        unsafe { dst.cast::<u64>().write_unaligned(self) }
    }

    #[inline(always)]
    fn prefetch(_: *const u8) {}

    #[inline(always)]
    fn prefetch_to_write(_: *mut u8) {}
}

/// # Safety
/// As `Copier::copy_cached`.
unsafe fn copy_cached(lanes: &[Lane], count: usize, rows: usize) {
    // SAFETY: the caller's promises.
    unsafe { super::copy_cached::<u64>(lanes, count, rows) }
}

/// # Safety
/// As `Copier::copy_side_by_side`.
unsafe fn copy_side_by_side(lanes: &[Lane], count: usize, rows: usize) {
    // SAFETY: the caller's promises.
    unsafe { super::copy_side_by_side::<u64>(lanes, count, rows) }
}

/// # Safety
/// As `Copier::copy_in_order`.
unsafe fn copy_in_order(lanes: &[Lane], count: usize, rows: usize) {
    // SAFETY: the caller's promises.
    unsafe { super::copy_in_order::<u64>(lanes, count, rows) }
}

/// # Safety
/// As `Copier::stream`.
unsafe fn stream(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller's promises.
    unsafe { super::stream::<u64>(src, dst, len) }
}
