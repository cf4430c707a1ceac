//! The arithmetic of `gdn-math` on a thread: the same bits as on the host. And the one function that each kind of GPU has its
//! own numbers for.

use gdn_math::{
    Lanes, quick,
    special::{exp, log1p, sigmoid, silu, softplus},
};

use super::Args;
use crate::gpu::Gpu;

/// Words that [`functions`] writes for each thread.
pub const WORDS: usize = 10;

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

/// `Gpu::logistic` of each number.
///
/// # Safety
/// `args.count` numbers are readable at `args.from`, and as many writable at `args.to`.
#[inline(always)]
pub unsafe fn logistics(gpu: &impl Gpu, args: &Args) {
    let [block, ..] = gpu.block();
    let i = block * gpu.threads() + gpu.thread();
    if i < args.count {
        // SAFETY: this thread's own numbers.
        unsafe {
            let place = f32::from_bits(gpu.load4(args.from + 4 * u64::from(i)));
            gpu.store4(args.to + 4 * u64::from(i), gpu.logistic(place).to_bits());
        }
    }
}
