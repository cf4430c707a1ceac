//! Moving bytes: the algorithms, written once over [`Vector`]. Each instruction set has a file that
//! instantiates them.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

use super::{cache::reads_best_in_order, isa::Isa};

/// Bytes of a cache line, the unit of streaming stores.
pub(super) const LINE: usize = 64;

/// How far ahead of its loads one long copy prefetches, in bytes.
const AHEAD: usize = 2048;

/// How far ahead of its stores a copy within the caches asks for the lines to write, in bytes: a store that
/// misses the first-level cache waits for its line, and few such waits fit the store buffer. Measured on 1.5
/// MB, of a split: 15.5 us, and 17.4 with a half or double of it, 20.9 without.
const AHEAD_OF_STORES: usize = 1024;

/// How far ahead of its loads a copy in the order of memory prefetches, in bytes, where each segment goes
/// elsewhere. Measured on Zen 4: 256 to 512 are alike, more is up to a tenth slower.
const AHEAD_IN_ORDER: usize = 512;

/// Rows that a copy past the caches moves side by side: several pages of memory are read at a time, as the
/// large `memcpy` of glibc does.
const ROWS_TOGETHER: usize = 4;

/// What such a copy moves of one row before it turns to the next, in bytes, where a row is all one segment: a
/// multiple of [`LINE`]. Measured on a Xeon: 256 to 1024 are alike, 4096 is as slow as whole rows.
const PIECE: usize = 512;

/// The segments of one kind in some rows. Segment `i` of row `n` goes from `src + n * src_stride + i *
/// src_step` to `dst + n * dst_stride + i * dst_step`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lane {
    pub(super) src: *const u8,
    pub(super) dst: *mut u8,
    pub(super) src_stride: usize,
    pub(super) dst_stride: usize,
    pub(super) src_step: usize,
    pub(super) dst_step: usize,
    /// Bytes of a segment.
    pub(super) len: usize,
    /// From where on this lane prefetches for a row to come, at the same stride, as many bytes as it copies.
    /// Lanes of one source share its row out among themselves, so that memory is read in one sweep, whatever
    /// the segments' order.
    pub(super) ahead: *const u8,
    /// Whether it is written past the caches, where the instruction set can.
    pub(super) streamed: bool,
}

impl Lane {
    /// A lane of nothing.
    pub(super) const NONE: Self = Self {
        src: std::ptr::null(),
        dst: std::ptr::null_mut(),
        src_stride: 0,
        dst_stride: 0,
        src_step: 0,
        dst_step: 0,
        len: 0,
        ahead: std::ptr::null(),
        streamed: false,
    };
}

/// Takes lanes, the number of segments each has in a row, and the number of rows.
type CopyLanes = unsafe fn(&[Lane], usize, usize);

/// The algorithms for one instruction set, which this machine has.
pub(super) struct Copier {
    /// For rows that the caches hold: a row goes lane by lane. Nothing is streamed.
    ///
    /// # Safety
    /// Every segment of every lane and row is readable at its source and writable at its destination, and
    /// nothing written overlaps anything read.
    pub(super) copy_cached: CopyLanes,
    /// [`copy_past`](Self::copy_past) with some rows at a time, lane by lane, and those after them
    /// prefetched.
    copy_side_by_side: CopyLanes,
    /// [`copy_past`](Self::copy_past) with one row after the other, segment by segment as the source has
    /// them.
    copy_in_order: CopyLanes,
    /// Copies bytes of any number to any address: whole lines past the caches, what is left at both ends
    /// through them.
    ///
    /// # Safety
    /// So many bytes are readable at the source and writable at the destination, and the two do not overlap.
    pub(super) stream: unsafe fn(*const u8, *mut u8, usize),
    /// Makes what was streamed visible to other threads as ordinary stores are.
    pub(super) fence: fn(),
}

impl Copier {
    /// The algorithms for `isa`, or the scalar ones where this machine does not have it.
    pub(super) fn of(isa: Isa) -> &'static Self {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 if isa.is_available() => &avx512::COPIER,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 if isa.is_available() => &avx2::COPIER,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon if isa.is_available() => &neon::COPIER,
            _ => &scalar::COPIER,
        }
    }

    /// Copies rows that come from memory, in the order in which this machine's processor reads best.
    ///
    /// # Safety
    /// As `copy_cached`; what a streamed lane says of its destination, and its segments' length, are
    /// multiples of [`LINE`].
    pub(super) unsafe fn copy_past(&self, lanes: &[Lane], count: usize, rows: usize) {
        let copy = if reads_best_in_order() { self.copy_in_order } else { self.copy_side_by_side };
        // SAFETY: the caller's promises.
        unsafe { copy(lanes, count, rows) }
    }
}

/// One register of bytes.
trait Vector: Copy {
    const BYTES: usize;

    /// # Safety
    /// `BYTES` bytes at `src` are readable, and the machine has the instruction set.
    unsafe fn load(src: *const u8) -> Self;

    /// # Safety
    /// `BYTES` bytes at `dst` are writable, and the machine has the instruction set.
    unsafe fn store(self, dst: *mut u8);

    /// Stores past the caches, where the instruction set can. Seen by other threads after `Copier::fence`.
    ///
    /// # Safety
    /// As [`Vector::store`], and `dst` is a multiple of `BYTES`.
    unsafe fn stream(self, dst: *mut u8);

    /// Has the line of `src` brought near. Any address will do.
    fn prefetch(src: *const u8);

    /// Has the line of `dst` brought near for this core alone, to be written. Any address will do.
    fn prefetch_to_write(dst: *mut u8);
}

/// `prefetchw`, for which Rust has no stable intrinsic. Every x86-64 processor takes it; those before
/// Broadwell do nothing.
#[cfg(target_arch = "x86_64")]
#[expect(clippy::pointers_in_nomem_asm_block, reason = "a hint reads and writes nothing")]
#[inline(always)]
fn prefetchw(dst: *mut u8) {
    // SAFETY: a hint, harmless for any address. It changes no register, no flag and no memory.
    unsafe { std::arch::asm!("prefetchw [{}]", in(reg) dst, options(nomem, nostack, preserves_flags)) }
}

/// # Safety
/// As `Copier::copy_cached`; the machine has the instruction set.
#[inline(always)]
unsafe fn copy_cached<V: Vector>(lanes: &[Lane], count: usize, rows: usize) {
    for n in 0..rows {
        for lane in lanes {
            // SAFETY: row `n` of those the caller vouches for.
            unsafe {
                copy_run::<V>(
                    lane.src.add(n * lane.src_stride),
                    lane.dst.add(n * lane.dst_stride),
                    lane,
                    count,
                )
            }
        }
    }
}

/// # Safety
/// As `Copier::copy_side_by_side`; the machine has the instruction set.
#[inline(always)]
unsafe fn copy_side_by_side<V: Vector>(lanes: &[Lane], count: usize, rows: usize) {
    let piece = if count == 1 { PIECE } else { usize::MAX };
    for first in (0..rows).step_by(ROWS_TOGETHER) {
        let together = first..(first + ROWS_TOGETHER).min(rows);
        for lane in lanes {
            for i in 0..count {
                let mut from = 0;
                while from < lane.len {
                    let len = piece.min(lane.len - from);
                    for n in together.clone() {
                        // SAFETY: a piece of segment `i` of row `n` of those the caller vouches for.
                        unsafe {
                            let src = lane.src.add(n * lane.src_stride + i * lane.src_step + from);
                            let dst = lane.dst.add(n * lane.dst_stride + i * lane.dst_step + from);
                            let ahead = (n + ROWS_TOGETHER) * lane.src_stride + i * lane.len + from;
                            copy_ahead::<V>(lane.streamed, src, dst, len, lane.ahead.wrapping_add(ahead));
                        }
                    }
                    from += len;
                }
            }
        }
    }
}

/// # Safety
/// As `Copier::copy_in_order`; the machine has the instruction set.
#[inline(always)]
unsafe fn copy_in_order<V: Vector>(lanes: &[Lane], count: usize, rows: usize) {
    let ahead = if count == 1 { AHEAD } else { AHEAD_IN_ORDER };
    // A merge reads tensors in which a lane's segments lie one behind the other, a split rows in which the
    // lanes take turns.
    let by_lanes = lanes.iter().all(|lane| lane.src_step == lane.len);
    let (outer, inner) = if by_lanes { (lanes.len(), count) } else { (count, lanes.len()) };
    for n in 0..rows {
        for j in 0..outer {
            for k in 0..inner {
                let (lane, i) = if by_lanes { (&lanes[j], k) } else { (&lanes[k], j) };
                // SAFETY: segment `i` of row `n` of those the caller vouches for.
                unsafe {
                    let src = lane.src.add(n * lane.src_stride + i * lane.src_step);
                    let dst = lane.dst.add(n * lane.dst_stride + i * lane.dst_step);
                    copy_ahead::<V>(lane.streamed, src, dst, lane.len, src.wrapping_add(ahead));
                }
            }
        }
    }
}

/// Copies one segment, and prefetches as many bytes from `ahead` on.
///
/// # Safety
/// As [`copy_segment`]; `dst` and `len` are multiples of [`LINE`] where it is `streamed`.
#[inline(always)]
unsafe fn copy_ahead<V: Vector>(streamed: bool, src: *const u8, dst: *mut u8, len: usize, ahead: *const u8) {
    // SAFETY: the caller's promises.
    unsafe {
        if streamed {
            stream_lines::<V>(src, dst, len, ahead);
        } else {
            prefetch::<V>(ahead, len);
            copy_segment::<V>(src, dst, len);
        }
    }
}

/// Prefetches the lines of `len` bytes from `src` on, which need not be anybody's.
#[inline(always)]
fn prefetch<V: Vector>(src: *const u8, len: usize) {
    for at in (0..len).step_by(LINE) {
        V::prefetch(src.wrapping_add(at));
    }
}

/// Prefetches the lines of `len` bytes from `dst` on for writing; they need not be anybody's.
#[inline(always)]
fn prefetch_to_write<V: Vector>(dst: *mut u8, len: usize) {
    for at in (0..len).step_by(LINE) {
        V::prefetch_to_write(dst.wrapping_add(at));
    }
}

/// Copies the segments of one row. The lengths that models have get loops of their own, unrolled.
///
/// # Safety
/// `count` of the lane's segments, from `src` and `dst` on, are readable and writable, the two sides do not
/// overlap, and the machine has the instruction set.
#[inline(always)]
unsafe fn copy_run<V: Vector>(src: *const u8, dst: *mut u8, lane: &Lane, count: usize) {
    /// # Safety
    /// As [`copy_run`], for segments of `N * size_of::<T>()` bytes. Of whole registers, lines are asked for
    /// ahead.
    #[inline(always)]
    unsafe fn fixed<V: Vector, T: Copy, const N: usize>(
        src: *const u8,
        dst: *mut u8,
        steps: (usize, usize),
        count: usize,
    ) {
        let len = size_of::<[T; N]>();
        let ahead = (AHEAD_OF_STORES / len).max(1) * steps.1;
        for i in 0..count {
            let (src, dst) = (src.wrapping_add(i * steps.0), dst.wrapping_add(i * steps.1));
            if len >= V::BYTES {
                prefetch_to_write::<V>(dst.wrapping_add(ahead), len);
            }
            // SAFETY: segment `i` of those the caller vouches for.
            unsafe { dst.cast::<[T; N]>().write_unaligned(src.cast::<[T; N]>().read_unaligned()) }
        }
    }
    let Lane { src_step, dst_step, len, .. } = *lane;
    let steps = (src_step, dst_step);
    // SAFETY: the caller's promises; each arm's elements make up the segment.
    unsafe {
        match len {
            1 => fixed::<V, u8, 1>(src, dst, steps, count),
            2 => fixed::<V, u16, 1>(src, dst, steps, count),
            4 => fixed::<V, u32, 1>(src, dst, steps, count),
            6 => fixed::<V, u16, 3>(src, dst, steps, count),
            8 => fixed::<V, u64, 1>(src, dst, steps, count),
            12 => fixed::<V, u32, 3>(src, dst, steps, count),
            16 => fixed::<V, u64, 2>(src, dst, steps, count),
            _ if len == V::BYTES => fixed::<V, V, 1>(src, dst, steps, count),
            _ if len == 2 * V::BYTES => fixed::<V, V, 2>(src, dst, steps, count),
            _ if len == 3 * V::BYTES => fixed::<V, V, 3>(src, dst, steps, count),
            _ if len == 4 * V::BYTES => fixed::<V, V, 4>(src, dst, steps, count),
            _ if len == 6 * V::BYTES => fixed::<V, V, 6>(src, dst, steps, count),
            _ if len == 8 * V::BYTES => fixed::<V, V, 8>(src, dst, steps, count),
            _ if len == 12 * V::BYTES => fixed::<V, V, 12>(src, dst, steps, count),
            _ => {
                for i in 0..count {
                    copy_segment::<V>(src.add(i * src_step), dst.add(i * dst_step), len);
                }
            }
        }
    }
}

/// The most bytes that [`copy_short`] moves.
const SHORT: usize = 16;

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
/// `len` bytes are readable at `src` and writable at `dst`, the two do not overlap, and the machine has the
/// instruction set.
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
            prefetch_to_write::<V>(dst.wrapping_add(at + AHEAD_OF_STORES), 4 * V::BYTES);
            let four: [V; 4] = std::array::from_fn(|i| V::load(src.add(at + i * V::BYTES)));
            for (i, v) in four.into_iter().enumerate() {
                v.store(dst.add(at + i * V::BYTES));
            }
            at += 4 * V::BYTES;
        }
        while at + V::BYTES <= len {
            V::prefetch_to_write(dst.wrapping_add(at + AHEAD_OF_STORES));
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

/// Streams whole lines, and prefetches as many from `ahead` on.
///
/// # Safety
/// As [`copy_segment`]; `dst` and `len` are multiples of [`LINE`].
#[inline(always)]
unsafe fn stream_lines<V: Vector>(src: *const u8, dst: *mut u8, len: usize, ahead: *const u8) {
    const { assert!(LINE.is_multiple_of(V::BYTES)) };
    let mut at = 0;
    while at < len {
        // SAFETY: every access lies within `len` bytes, and `dst + at` is a multiple of a line, so of
        // `V::BYTES`.
        unsafe {
            V::prefetch(ahead.wrapping_add(at));
            let mut i = 0;
            while i < LINE {
                V::load(src.add(at + i)).stream(dst.add(at + i));
                i += V::BYTES;
            }
        }
        at += LINE;
    }
}

/// # Safety
/// As `Copier::stream`; the machine has the instruction set.
#[inline(always)]
unsafe fn stream<V: Vector>(src: *const u8, dst: *mut u8, len: usize) {
    let head = dst.align_offset(LINE).min(len);
    let lines = (len - head) / LINE * LINE;
    let tail = head + lines;
    // SAFETY: the three parts make up the whole, and the middle one begins on a line.
    unsafe {
        copy_segment::<V>(src, dst, head);
        stream_lines::<V>(src.add(head), dst.add(head), lines, src.wrapping_add(head + AHEAD));
        copy_segment::<V>(src.add(tail), dst.add(tail), len - tail);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Block, Pages};

    /// What lies where no lane writes, and is to stay.
    const POISON: u8 = 0xA5;

    /// Rows of one side: bytes from one to the next, and for each lane where segment 0 begins and the step
    /// from it to the next.
    fn side(lens: &[usize], count: usize, gap: usize, packed: bool) -> (usize, Vec<(usize, usize)>) {
        let head: usize = lens.iter().sum();
        let before = |k: usize| lens[..k].iter().sum::<usize>();
        let lane = |k: usize| if packed { (before(k), head) } else { (count * before(k), lens[k]) };
        (count * head + gap, (0..lens.len()).map(lane).collect())
    }

    proptest! {
        /// Both orders, whichever this machine's processor reads best, and the copy within the caches move
        /// every byte to its place and no other.
        #[test]
        fn every_order_of_every_isa_moves_the_same_bytes(
            units in prop::collection::vec(1usize..=9, 1..=4),
            unit in prop::sample::select(vec![1, 2, 4, 24, LINE, 129, 4 * LINE]),
            count in 1usize..=5, rows in 0usize..=9, gaps in (0usize..3, 0usize..3), split: bool,
        ) {
            let lens: Vec<usize> = units.iter().map(|units| units * unit).collect();
            let (src_stride, src_at) = side(&lens, count, gaps.0 * unit, split);
            let (dst_stride, dst_at) = side(&lens, count, gaps.1 * unit, !split);
            let mut source = Block::new(rows * src_stride, Pages::Ordinary).unwrap();
            for (byte, i) in source.bytes_mut().iter_mut().zip(0u32..) {
                *byte = (i.wrapping_mul(0x9e37_79b9) >> 24) as u8;
            }
            let source = source.bytes();
            let mut target = Block::new(rows * dst_stride, Pages::Ordinary).unwrap();
            let mut expected = vec![POISON; target.bytes().len()];
            for n in 0..rows {
                for (k, &len) in lens.iter().enumerate() {
                    for i in 0..count {
                        let from = n * src_stride + src_at[k].0 + i * src_at[k].1;
                        let to = n * dst_stride + dst_at[k].0 + i * dst_at[k].1;
                        expected[to..to + len].copy_from_slice(&source[from..from + len]);
                    }
                }
            }
            for isa in Isa::available() {
                let copier = Copier::of(isa);
                let orders = [
                    ("cached", copier.copy_cached),
                    ("side by side", copier.copy_side_by_side),
                    ("in order", copier.copy_in_order),
                ];
                for (order, copy) in orders {
                    target.bytes_mut().fill(POISON);
                    let (src, dst) = (source.as_ptr(), target.bytes_mut().as_mut_ptr());
                    let lane = |k: usize| Lane {
                        src: src.wrapping_add(src_at[k].0),
                        dst: dst.wrapping_add(dst_at[k].0),
                        src_stride,
                        dst_stride,
                        src_step: src_at[k].1,
                        dst_step: dst_at[k].1,
                        len: lens[k],
                        ahead: src,
                        streamed: order != "cached" && unit.is_multiple_of(LINE),
                    };
                    let lanes: Vec<Lane> = (0..lens.len()).map(lane).collect();
                    // SAFETY: two blocks with room for so many rows; streamed lanes are made of whole lines.
                    unsafe { copy(&lanes, count, rows) }
                    (copier.fence)();
                    prop_assert!(target.bytes() == expected, "{isa}, {order}");
                }
            }
        }
    }
}
