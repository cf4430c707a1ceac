//! Kernels that use what a GPU can do, one thing at a time. Tests hold the GPU and the emulator to them, and
//! `cargo xtask ptx` counts their instructions.

pub mod async_copy;
#[cfg(feature = "emulator")]
pub mod cases;
pub mod convergence;
pub mod hopper;
pub mod math;
pub mod tensor_core;
pub mod warp;
pub mod wgmma;

use crate::gpu::Warp;

/// What every probe takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Args {
    /// What it reads.
    pub from: u64,
    /// What it writes.
    pub to: u64,
    /// How many, where it asks.
    pub count: u32,
}

/// Writes, for each block, the wrapping sum of its threads' words, and to every thread the sum of its warp:
/// `to[block * (threads + 1)]`, and after it one word a thread.
///
/// # Safety
/// Blocks of a multiple of 32 threads, at most 1024, with 4 bytes of shared memory a warp; one word a thread
/// readable at `from`, and one a thread and one a block writable at `to`; both multiples of 4.
#[inline(always)]
pub unsafe fn block_sums(gpu: &impl Warp, &Args { from, to, .. }: &Args) {
    let ([block, ..], threads, thread) = (gpu.block(), gpu.threads(), gpu.thread());
    // SAFETY: this thread's word.
    let mut sum = unsafe { gpu.load4(from + u64::from(block * threads + thread) * 4) };
    let mut mask = 16;
    while mask > 0 {
        sum = sum.wrapping_add(gpu.shuffle_xor(sum, mask));
        mask /= 2;
    }
    let to = to + u64::from(block * (threads + 1)) * 4;
    let (warp, lane) = (thread / 32, thread % 32);
    // SAFETY: this thread's own word; the warp's own word of shared memory, and all of them after the
    // barrier; the block's own word.
    unsafe {
        gpu.store4(to + u64::from(1 + thread) * 4, sum);
        if lane == 0 {
            gpu.store_shared4(warp * 4, sum);
        }
        gpu.barrier();
        if thread == 0 {
            let mut total = 0u32;
            let mut warp = 0;
            while warp < threads / 32 {
                total = total.wrapping_add(gpu.load_shared4(warp * 4));
                warp += 1;
            }
            gpu.store4(to, total);
        }
    }
}

/// What [`block_sums`] writes for these words, worked out one by one.
#[cfg(feature = "emulator")]
pub fn expected(words: &[u32], threads: usize) -> std::vec::Vec<u32> {
    let sum = |words: &[u32]| words.iter().fold(0u32, |sum, word| sum.wrapping_add(*word));
    let block = |words: &[u32]| {
        let warps = words.chunks(32).flat_map(|warp| std::iter::repeat_n(sum(warp), warp.len()));
        std::iter::once(sum(words)).chain(warps).collect::<std::vec::Vec<_>>()
    };
    words.chunks(threads).flat_map(block).collect()
}
