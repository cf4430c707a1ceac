//! The shape of a kernel with a tail: some lanes store, all lanes do something together, some lanes store
//! again.
//!
//! `cargo xtask ptx` counts what they do together, in the PTX and in the machine's own code, and sees that
//! the count is wrong where the compiler is left to itself: it makes a copy for each arm of the divergent
//! branch.

use super::Args;
use crate::gpu::{Bf16, Bytes16, TensorCore, Warp};

/// Stores `first` before and what `together` gives after it, in the threads below `args.count`, one word each
/// and `threads` apart.
///
/// # Safety
/// `2 * threads` words are writable at `args.to`.
#[inline(always)]
unsafe fn guarded<G: Warp>(gpu: &G, args: &Args, together: impl FnOnce(&G, u32) -> u32) {
    let thread = gpu.thread();
    let at = args.to + u64::from(thread) * 4;
    let in_range = thread < args.count;
    if in_range {
        // SAFETY: this thread's first word.
        unsafe { gpu.store4(at, thread) }
    }
    let value = together(gpu, thread);
    if in_range {
        // SAFETY: its second one.
        unsafe { gpu.store4(at + u64::from(gpu.threads()) * 4, value) }
    }
}

/// A barrier and a shuffle.
///
/// # Safety
/// One block of a multiple of 32 threads; twice as many words are writable at `args.to`.
#[inline(always)]
pub unsafe fn barrier_and_shuffle(gpu: &impl Warp, args: &Args) {
    // SAFETY: the caller's promise.
    unsafe {
        guarded(gpu, args, |gpu, thread| {
            gpu.barrier();
            gpu.shuffle_xor(thread, 16)
        });
    }
}

/// A product.
///
/// # Safety
/// That of [`barrier_and_shuffle`].
#[inline(always)]
pub unsafe fn product(gpu: &impl TensorCore, args: &Args) {
    // SAFETY: the caller's promise.
    unsafe {
        guarded(gpu, args, |gpu, thread| {
            // 1 + thread / 128, and 1.
            let word = 0x3f80_3f80 | thread;
            let [a, ..] = gpu.mma::<Bf16>([word; 4], [word; 2], [0.0; 4]);
            a.to_bits()
        });
    }
}

/// Four matrices out of shared memory.
///
/// # Safety
/// That of [`barrier_and_shuffle`], and 512 bytes of shared memory a warp.
#[inline(always)]
pub unsafe fn matrices(gpu: &impl TensorCore, args: &Args) {
    // SAFETY: the caller's promise; each lane's own 16 bytes are written before the barrier and read by its
    // warp after it.
    unsafe {
        guarded(gpu, args, |gpu, thread| {
            gpu.store_shared16(thread * 16, Bytes16([thread; 4]));
            gpu.barrier();
            let [a, b, c, d] = gpu.load_matrix4::<false>(thread * 16);
            a ^ b << 8 ^ c << 16 ^ d << 24
        });
    }
}
