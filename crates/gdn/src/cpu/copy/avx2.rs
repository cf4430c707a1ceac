//! Two 32-byte registers a cache line, on x86-64 with AVX2.

use std::{arch::x86_64 as x86, ops::Range};

use super::{Job, Vector};

impl Vector for x86::__m256i {
    const BYTES: usize = 32;

    #[inline(always)]
    unsafe fn load(src: *const u8) -> Self {
        // SAFETY: the caller's promises.
        unsafe { x86::_mm256_loadu_si256(src.cast()) }
    }

    #[inline(always)]
    unsafe fn store(self, dst: *mut u8) {
        // SAFETY: the caller's promises.
        unsafe { x86::_mm256_storeu_si256(dst.cast(), self) }
    }

    #[inline(always)]
    unsafe fn stream(self, dst: *mut u8) {
        // SAFETY: the caller's promises.
        unsafe { x86::_mm256_stream_si256(dst.cast(), self) }
    }

    #[inline(always)]
    fn fence() {
        // SAFETY: every x86-64 machine has SSE, whose instruction this is.
        unsafe { x86::_mm_sfence() }
    }
}

/// # Safety
/// As [`super::copy_rows`]; the machine has AVX2.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn copy_rows(job: &Job, rows: Range<usize>, stage: &mut [u8]) {
    // SAFETY: the caller's promises.
    unsafe { super::copy_rows_with::<x86::__m256i>(job, rows, stage) }
}

/// # Safety
/// As [`super::stream()`]; the machine has AVX2.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn stream(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller's promises.
    unsafe {
        super::stream::<x86::__m256i>(src, dst, len);
        x86::__m256i::fence();
    }
}
