//! A pipeline of copies from global to shared memory.

use super::Args;
use crate::gpu::AsyncCopy;

/// Tiles of 16 bytes a thread, three buffers, two tiles on their way while one is read; behind the last of
/// `args.count` pieces of 16 bytes there are zeros. Each thread reads what its neighbour's copy brought, and
/// folds it into a word.
///
/// # Safety
/// One block. `args.count` pieces of 16 bytes, and a word a thread, are readable at `args.from`, a multiple
/// of 16; a word a thread is writable at `args.to`; there are 52 bytes of shared memory a thread.
#[inline(always)]
pub unsafe fn pipeline(gpu: &impl AsyncCopy, args: &Args) {
    let (thread, threads) = (gpu.thread(), gpu.threads());
    let place = |tile: u32, thread: u32| (tile % 3 * threads + thread) * 16;
    let words = 48 * threads;
    // SAFETY: pieces that are there; each buffer is read after a wait and a barrier, and copied to again
    // after another barrier.
    unsafe {
        let begin = |tile: u32| {
            let piece = tile * threads + thread;
            let there = piece < args.count;
            gpu.copy16(place(tile, thread), args.from + u64::from(if there { piece } else { 0 }) * 16, there);
        };
        gpu.copy4(words + thread * 4, args.from + u64::from(thread) * 4, true);
        begin(0);
        gpu.commit_copies();
        if threads < args.count {
            begin(1);
        }
        gpu.commit_copies();
        let neighbour = if thread + 1 == threads { 0 } else { thread + 1 };
        let (mut tile, mut sum) = (0, 0u32);
        while tile * threads < args.count {
            gpu.wait_copies::<1>();
            gpu.barrier();
            if tile == 0 {
                sum = gpu.load_shared4(words + neighbour * 4);
            }
            let [a, b, c, d] = gpu.load_shared16(place(tile, neighbour)).0;
            sum = sum
                .wrapping_mul(31)
                .wrapping_add(a ^ b.rotate_left(8) ^ c.rotate_left(16) ^ d.rotate_left(24));
            // The third buffer: it was read before the barrier above, a tile ago.
            if (tile + 2) * threads < args.count {
                begin(tile + 2);
            }
            gpu.commit_copies();
            tile += 1;
        }
        gpu.wait_copies::<0>();
        gpu.store4(args.to + u64::from(thread) * 4, sum);
    }
}
