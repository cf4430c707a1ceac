//! The arithmetic of `gdn-math` on a thread: the same bits as on the host.

use gdn_math::{
    Lanes, quick,
    special::{exp, log1p, sigmoid, silu, softplus},
};

use super::Args;
use crate::gpu::Gpu;

/// Words that [`functions`] writes for each thread.
pub const WORDS: usize = 12;

/// What [`functions`] makes of a number.
#[inline(always)]
pub fn all(x: f32) -> [f32; WORDS] {
    let positive = x.magnitude();
    [
        exp(x),
        log1p(exp(positive.negated())),
        sigmoid(x),
        silu(x),
        softplus(x),
        positive.root(),
        x.over(positive.plus(3.0)),
        x.mul_add(x, positive),
        quick::exp(x),
        quick::sigmoid(x),
        quick::silu(x),
        quick::inverse_root(positive),
    ]
}

/// `all` of each number.
///
/// # Safety
/// `args.count` numbers are readable at `args.from`, and [`WORDS`] times as many words writable at `args.to`.
#[inline(always)]
pub unsafe fn functions(gpu: &impl Gpu, args: &Args) {
    let [block, ..] = gpu.block();
    let i = block * gpu.threads() + gpu.thread();
    if i < args.count {
        // SAFETY: this thread's number.
        let x = f32::from_bits(unsafe { gpu.load4(args.from + 4 * u64::from(i)) });
        for (k, y) in (0..).zip(all(x)) {
            // SAFETY: this thread's own words.
            unsafe { gpu.store4(args.to + (WORDS as u64 * u64::from(i) + k) * 4, y.to_bits()) }
        }
    }
}

/// Mantissas that a thread of [`inverses`] tries.
pub const MANTISSAS: u32 = 4096;

/// Tries `quick::inverse` on numbers of every mantissa, [`MANTISSAS`] a thread, at both ends of what it is for: how many
/// thread by thread are not the nearest to the inverse.
///
/// # Safety
/// A word for each thread is writable at `args.to`.
#[inline(always)]
pub unsafe fn inverses(gpu: &impl Gpu, args: &Args) {
    let [block, ..] = gpu.block();
    let thread = block * gpu.threads() + gpu.thread();
    let (mut wrong, mut i) = (0, 0);
    while i < MANTISSAS {
        let mantissa = (thread * MANTISSAS + i) % (1 << 23);
        for power in [-120, 0, 121] {
            let x = f32::from_bits(((127 + power) as u32) << 23 | mantissa);
            wrong += u32::from(quick::inverse(x).to_bits() != 1.0f32.over(x).to_bits());
        }
        i += 1;
    }
    // SAFETY: this thread's own word.
    unsafe { gpu.store4(args.to + 4 * u64::from(thread), wrong) }
}
