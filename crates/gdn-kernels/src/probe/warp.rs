//! What the lanes of a warp tell one another.

use super::Args;
use crate::gpu::Warp;

/// Words that [`lanes`] writes for each thread.
pub const WORDS: u32 = 7;

/// Shuffles of every kind, a ballot, a sum of 8 lanes and what the warp has alike: one word each.
///
/// # Safety
/// Blocks of a multiple of 32 threads; a word a thread readable at `args.from`, and [`WORDS`] a thread
/// writable at `args.to`.
#[inline(always)]
pub unsafe fn lanes(gpu: &impl Warp, args: &Args) {
    let [block, ..] = gpu.block();
    let i = u64::from(block * gpu.threads() + gpu.thread());
    // SAFETY: this thread's word.
    let value = unsafe { gpu.load4(args.from + 4 * i) };
    let number = (value % 1000) as f32 * 0.37;
    let words = [
        gpu.shuffle_xor(value, 5),
        gpu.shuffle(value, gpu.lane() * 7 + 3),
        gpu.shuffle_up(value, 3),
        gpu.shuffle_down(value, 5),
        gpu.ballot(value % 3 == 0),
        gpu.sum::<8>(number).to_bits(),
        gpu.uniform(gpu.shuffle(value, 9)),
    ];
    for (k, word) in (0..).zip(words) {
        // SAFETY: this thread's own words.
        unsafe { gpu.store4(args.to + (u64::from(WORDS) * i + k) * 4, word) }
    }
}

/// Warps two by two: each pair has a named barrier of its own, and exchanges words through shared memory;
/// then lanes of a warp do.
///
/// # Safety
/// As [`lanes`], with a word a thread writable, blocks of a multiple of 64 threads, at most 896, and 4 bytes
/// of shared memory a thread.
#[inline(always)]
pub unsafe fn pairs_of_warps(gpu: &impl Warp, args: &Args) {
    let [block, ..] = gpu.block();
    let thread = gpu.thread();
    let i = u64::from(block * gpu.threads() + thread);
    let (pair, other) = (thread / 64, thread ^ 32);
    // SAFETY: this thread's words; that of the other warp between two barriers of the pair, that of another
    // lane between two of the warp.
    unsafe {
        gpu.store_shared4(thread * 4, gpu.load4(args.from + 4 * i));
        gpu.barrier_of(1 + pair, 64);
        let theirs = gpu.load_shared4(other * 4);
        gpu.barrier_of(1 + pair, 64);
        gpu.store_shared4(thread * 4, theirs);
        gpu.sync_warp();
        let neighbours = gpu.load_shared4((thread ^ 1) * 4);
        gpu.store4(args.to + 4 * i, theirs ^ neighbours.rotate_left(7));
    }
}
