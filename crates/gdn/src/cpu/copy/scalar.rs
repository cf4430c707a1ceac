//! 8-byte words, on every machine. Without streaming stores: it goes through the caches.

use std::ops::Range;

use super::{Job, Vector};

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
    fn fence() {}
}

/// # Safety
/// As [`super::copy_rows`].
pub(super) unsafe fn copy_rows(job: &Job, rows: Range<usize>, stage: &mut [u8]) {
    // SAFETY: the caller's promises.
    unsafe { super::copy_rows_with::<u64>(job, rows, stage) }
}

/// # Safety
/// As [`super::stream()`].
pub(super) unsafe fn stream(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller's promises.
    unsafe {
        super::stream::<u64>(src, dst, len);
        u64::fence();
    }
}
