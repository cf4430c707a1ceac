//! One 64-byte register a cache line, on x86-64 with AVX-512F.

use std::arch::x86_64 as x86;

use super::{Copier, Lane, Vector};

pub(super) static COPIER: Copier = Copier { copy_cached, copy_side_by_side, copy_in_order, stream, fence };

impl Vector for x86::__m512i {
    const BYTES: usize = 64;

    #[inline(always)]
    unsafe fn load(src: *const u8) -> Self {
        // SAFETY: the caller's promises.
        unsafe { x86::_mm512_loadu_si512(src.cast()) }
    }

    #[inline(always)]
    unsafe fn store(self, dst: *mut u8) {
        // SAFETY: the caller's promises.
        unsafe { x86::_mm512_storeu_si512(dst.cast(), self) }
    }

    #[inline(always)]
    unsafe fn stream(self, dst: *mut u8) {
        // SAFETY: the caller's promises.
        unsafe { x86::_mm512_stream_si512(dst.cast(), self) }
    }

    #[inline(always)]
    fn prefetch(src: *const u8) {
        // SAFETY: a prefetch of any address is harmless, and every x86-64 machine has SSE, whose instruction
        // it is.
        unsafe { x86::_mm_prefetch::<{ x86::_MM_HINT_T0 }>(src.cast()) }
    }

    #[inline(always)]
    fn prefetch_to_write(dst: *mut u8) {
        super::prefetchw(dst);
    }
}

/// # Safety
/// As `Copier::copy_cached`; the machine has AVX-512F.
#[target_feature(enable = "avx512f")]
unsafe fn copy_cached(lanes: &[Lane], count: usize, rows: usize) {
    // SAFETY: the caller's promises.
    unsafe { super::copy_cached::<x86::__m512i>(lanes, count, rows) }
}

/// # Safety
/// As `Copier::copy_side_by_side`; the machine has AVX-512F.
#[target_feature(enable = "avx512f")]
unsafe fn copy_side_by_side(lanes: &[Lane], count: usize, rows: usize) {
    // SAFETY: the caller's promises.
    unsafe { super::copy_side_by_side::<x86::__m512i>(lanes, count, rows) }
}

/// # Safety
/// As `Copier::copy_in_order`; the machine has AVX-512F.
#[target_feature(enable = "avx512f")]
unsafe fn copy_in_order(lanes: &[Lane], count: usize, rows: usize) {
    // SAFETY: the caller's promises.
    unsafe { super::copy_in_order::<x86::__m512i>(lanes, count, rows) }
}

/// # Safety
/// As `Copier::stream`; the machine has AVX-512F.
#[target_feature(enable = "avx512f")]
unsafe fn stream(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller's promises.
    unsafe { super::stream::<x86::__m512i>(src, dst, len) }
}

fn fence() {
    // SAFETY: every x86-64 machine has SSE, whose instruction this is.
    unsafe { x86::_mm_sfence() }
}
