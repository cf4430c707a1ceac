//! Moving bytes: the algorithms, written once over [`Vector`]. Each instruction set has a file that instantiates them.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

use std::ops::Range;

use super::{
    isa::Isa,
    job::{Job, LINE, Segments, Stage},
};

/// One register of bytes.
trait Vector: Copy {
    const BYTES: usize;

    /// # Safety
    /// `BYTES` bytes at `src` are readable, and the machine has the instruction set.
    unsafe fn load(src: *const u8) -> Self;

    /// # Safety
    /// `BYTES` bytes at `dst` are writable, and the machine has the instruction set.
    unsafe fn store(self, dst: *mut u8);

    /// Stores past the caches, where the instruction set can. Seen by other threads after [`Vector::fence`].
    ///
    /// # Safety
    /// As [`Vector::store`], and `dst` is a multiple of `BYTES`.
    unsafe fn stream(self, dst: *mut u8);

    /// Makes what was streamed visible as ordinary stores are.
    fn fence();
}

/// Copies the given rows of a job, `rows_per_iter` at a time.
///
/// # Safety
/// The job's pointers are what [`Job`] says; `isa` is available; no two calls at a time have a row in common. `stage` has
/// [`Job::stage_bytes`].
pub(super) unsafe fn copy_rows(isa: Isa, job: &Job, rows: Range<usize>, stage: &mut [u8]) {
    // SAFETY: the caller's promises, and each function needs just the instruction set that selects it.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::copy_rows(job, rows, stage),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::copy_rows(job, rows, stage),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::copy_rows(job, rows, stage),
            _ => scalar::copy_rows(job, rows, stage),
        }
    }
}

/// Copies `src` to `dst` with streaming stores.
///
/// # Safety
/// `isa` is available.
pub(super) unsafe fn stream_slice(isa: Isa, src: &[u8], dst: &mut [u8]) {
    let len = src.len().min(dst.len());
    let (src, dst) = (src.as_ptr(), dst.as_mut_ptr());
    // SAFETY: two slices of at least `len` bytes, one of them exclusive; the instruction set as the caller promises.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::stream(src, dst, len),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::stream(src, dst, len),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::stream(src, dst, len),
            _ => scalar::stream(src, dst, len),
        }
    }
}

/// The loops over rows, heads and kinds. A tile of rows goes projection by projection, and within one row the segments go in
/// the order of the packed side, so that one of the two sides is read or written in one sweep.
///
/// # Safety
/// As [`copy_rows`].
#[inline(always)]
unsafe fn copy_rows_with<V: Vector>(job: &Job, rows: Range<usize>, stage: &mut [u8]) {
    let stages = job.stages(stage);
    let mut start = rows.start;
    while start < rows.end {
        let tile = start..(start + job.rows_per_iter).min(rows.end);
        // SAFETY: `tile` is part of `rows`; every address is a row's start plus an offset that lies in the row (`Job`),
        // or the same within a stage, which has room for `rows_per_iter` rows.
        unsafe {
            for group in &job.groups {
                for n in tile.clone() {
                    let row_of = |target: usize| match (stages[target], &job.targets()[target]) {
                        (Some(Stage(stage)), target) => stage.add((n - tile.start) * target.row_bytes),
                        (None, target) => target.ptr.add(n * target.row_stride),
                    };
                    if group.longest() <= SHORT {
                        for copy in group.copies() {
                            let src = copy.src.add(n * copy.src_stride);
                            copy_short_run(src, row_of(copy.target).add(copy.offset), copy, group.count);
                        }
                        continue;
                    }
                    for i in 0..group.count {
                        for copy in group.copies() {
                            let src = copy.src.add(n * copy.src_stride + i * copy.src_step);
                            let dst = row_of(copy.target).add(copy.offset + i * copy.dst_step);
                            if job.targets()[copy.target].streamed() {
                                stream_lines::<V>(src, dst, copy.len);
                            } else {
                                copy_segment::<V>(src, dst, copy.len);
                            }
                        }
                    }
                }
            }
            for (stage, target) in stages.iter().zip(job.targets()) {
                let Some(Stage(stage)) = *stage else { continue };
                // Dense rows are one stretch of lines, others are streamed one by one.
                let (rows, bytes) = match target.row_stride == target.row_bytes {
                    true => (1, tile.len() * target.row_bytes),
                    false => (tile.len(), target.row_bytes),
                };
                for k in 0..rows {
                    let dst = target.ptr.add((tile.start + k) * target.row_stride);
                    stream::<V>(stage.add(k * target.row_bytes), dst, bytes);
                }
            }
        }
        start = tile.end;
    }
    V::fence();
}

/// Segments of at most this many bytes are moved kind by kind, without vectors.
const SHORT: usize = 16;

/// # Safety
/// `count` segments of `copy.len <= SHORT` bytes at the steps from `src` and `dst` are readable and writable.
#[inline(always)]
unsafe fn copy_short_run(src: *const u8, dst: *mut u8, copy: &Segments, count: usize) {
    /// # Safety
    /// As the outer function, for segments of `size_of::<T>()` bytes.
    #[inline(always)]
    unsafe fn run<T: Copy>(src: *const u8, src_step: usize, dst: *mut u8, dst_step: usize, count: usize) {
        for i in 0..count {
            // SAFETY: segment `i` of those the caller vouches for.
            unsafe {
                dst.add(i * dst_step)
                    .cast::<T>()
                    .write_unaligned(src.add(i * src_step).cast::<T>().read_unaligned());
            }
        }
    }
    let Segments { src_step, dst_step, .. } = *copy;
    // SAFETY: the caller's promises; the type has as many bytes as the segment.
    unsafe {
        match copy.len {
            1 => run::<u8>(src, src_step, dst, dst_step, count),
            2 => run::<u16>(src, src_step, dst, dst_step, count),
            4 => run::<u32>(src, src_step, dst, dst_step, count),
            8 => run::<u64>(src, src_step, dst, dst_step, count),
            16 => run::<u128>(src, src_step, dst, dst_step, count),
            len => {
                for i in 0..count {
                    copy_short(src.add(i * src_step), dst.add(i * dst_step), len);
                }
            }
        }
    }
}

/// Copies up to 16 bytes as two loads and stores that meet or overlap.
///
/// # Safety
/// `len <= 16` bytes are readable at `src` and writable at `dst`, and the two do not overlap.
#[inline(always)]
unsafe fn copy_short(src: *const u8, dst: *mut u8, len: usize) {
    /// # Safety
    /// As the outer function, and `size_of::<T>() <= len <= 2 * size_of::<T>()`.
    #[inline(always)]
    unsafe fn ends<T: Copy>(src: *const u8, dst: *mut u8, len: usize) {
        let last = len - size_of::<T>();
        // SAFETY: both ends lie within `len` bytes.
        unsafe {
            let (head, tail) = (src.cast::<T>().read_unaligned(), src.add(last).cast::<T>().read_unaligned());
            dst.cast::<T>().write_unaligned(head);
            dst.add(last).cast::<T>().write_unaligned(tail);
        }
    }
    // SAFETY: the caller's promises, and each arm's type fits its lengths.
    unsafe {
        match len {
            0 => {}
            1 => *dst = *src,
            2..4 => ends::<u16>(src, dst, len),
            4..8 => ends::<u32>(src, dst, len),
            _ => ends::<u64>(src, dst, len),
        }
    }
}

/// Copies a segment of any length through the caches.
///
/// # Safety
/// `len` bytes are readable at `src` and writable at `dst`, the two do not overlap, and the machine has the instruction set.
#[inline(always)]
unsafe fn copy_segment<V: Vector>(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: every access lies within `len` bytes.
    unsafe {
        if len < V::BYTES {
            let mut at = 0;
            while at + SHORT <= len {
                copy_short(src.add(at), dst.add(at), SHORT);
                at += SHORT;
            }
            copy_short(src.add(at), dst.add(at), len - at);
            return;
        }
        let mut at = 0;
        while at + 4 * V::BYTES <= len {
            let four: [V; 4] = std::array::from_fn(|i| V::load(src.add(at + i * V::BYTES)));
            for (i, v) in four.into_iter().enumerate() {
                v.store(dst.add(at + i * V::BYTES));
            }
            at += 4 * V::BYTES;
        }
        while at + V::BYTES <= len {
            V::load(src.add(at)).store(dst.add(at));
            at += V::BYTES;
        }
        if at < len {
            // The last register reaches back over bytes that are already there.
            let last = len - V::BYTES;
            V::load(src.add(last)).store(dst.add(last));
        }
    }
}

/// Streams whole lines.
///
/// # Safety
/// As [`copy_segment`]; `dst` and `len` are multiples of [`LINE`].
#[inline(always)]
unsafe fn stream_lines<V: Vector>(src: *const u8, dst: *mut u8, len: usize) {
    const { assert!(LINE.is_multiple_of(V::BYTES)) };
    let mut at = 0;
    while at < len {
        // SAFETY: every access lies within `len` bytes, and `dst + at` is a multiple of a line, so of `V::BYTES`.
        unsafe {
            let mut i = 0;
            while i < LINE {
                V::load(src.add(at + i)).stream(dst.add(at + i));
                i += V::BYTES;
            }
        }
        at += LINE;
    }
}

/// Streams bytes of any length to any address: whole lines past the caches, what is left at both ends through them.
///
/// # Safety
/// As [`copy_segment`].
#[inline(always)]
unsafe fn stream<V: Vector>(src: *const u8, dst: *mut u8, len: usize) {
    let head = dst.align_offset(LINE).min(len);
    let lines = (len - head) / LINE * LINE;
    let tail = head + lines;
    // SAFETY: the three parts make up the whole, and the middle one begins on a line.
    unsafe {
        copy_segment::<V>(src, dst, head);
        stream_lines::<V>(src.add(head), dst.add(head), lines);
        copy_segment::<V>(src.add(tail), dst.add(tail), len - tail);
    }
}
