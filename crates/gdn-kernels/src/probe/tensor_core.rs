//! Products by a warp, with what is multiplied in registers or out of shared memory.

use super::Args;
use crate::gpu::{Float16, TensorCore};

/// Bytes that a block reads: `a`, 16 rows of 16; `b`, 8 columns of 16; `c`, 16 rows of 8 f32.
pub const READ: u64 = 512 + 256 + 512;
/// Bytes of a product.
pub const WRITTEN: u64 = 512;

/// Rows and columns of this lane's numbers of a 16 x 8 accumulator.
#[inline(always)]
fn of_lane(lane: u32, i: u32) -> u64 {
    let (row, column) = (lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2);
    u64::from(row * 8 + column)
}

/// # Safety
/// The accumulator is readable at `at`.
#[inline(always)]
unsafe fn load_sums(gpu: &impl TensorCore, at: u64) -> [f32; 4] {
    let lane = gpu.lane();
    // SAFETY: the caller's promise.
    let load = |i| f32::from_bits(unsafe { gpu.load4(at + 4 * of_lane(lane, i)) });
    [load(0), load(1), load(2), load(3)]
}

/// # Safety
/// The accumulator is writable at `at`.
#[inline(always)]
unsafe fn store_sums(gpu: &impl TensorCore, at: u64, sums: [f32; 4]) {
    let lane = gpu.lane();
    for (i, sum) in (0..).zip(sums) {
        // SAFETY: the caller's promise; each number is one lane's.
        unsafe { gpu.store4(at + 4 * of_lane(lane, i), sum.to_bits()) }
    }
}

/// `d = a b + c`, a warp a block.
///
/// # Safety
/// Blocks of 32 threads, with [`READ`] bytes each readable at `args.from` and [`WRITTEN`] writable at
/// `args.to`.
#[inline(always)]
pub unsafe fn product<T: Float16, G: TensorCore>(gpu: &G, args: &Args) {
    let [block, ..] = gpu.block();
    let from = args.from + u64::from(block) * READ;
    let (g, t) = (u64::from(gpu.lane() / 4), u64::from(gpu.lane() % 4));
    // SAFETY: this block's bytes.
    unsafe {
        let a = |row: u64, k: u64| gpu.load4(from + row * 32 + k * 2);
        let b = |k: u64| gpu.load4(from + 512 + g * 32 + k * 2);
        let a = [a(g, 2 * t), a(g + 8, 2 * t), a(g, 2 * t + 8), a(g + 8, 2 * t + 8)];
        let b = [b(2 * t), b(2 * t + 8)];
        let d = gpu.mma::<T>(a, b, load_sums(gpu, from + 768));
        store_sums(gpu, args.to + u64::from(block) * WRITTEN, d);
    }
}

/// The same twice, with `a` and `b` out of shared memory: as they are, and out of their transposes.
///
/// # Safety
/// As [`product`], with twice [`WRITTEN`] bytes and 1536 bytes of shared memory.
#[inline(always)]
pub unsafe fn products_of_matrices<T: Float16, G: TensorCore>(gpu: &G, args: &Args) {
    const B: u32 = 512;
    const A_TRANSPOSED: u32 = 768;
    const B_TRANSPOSED: u32 = 1280;
    let [block, ..] = gpu.block();
    let (from, lane) = (args.from + u64::from(block) * READ, gpu.lane());
    let to = args.to + u64::from(block) * 2 * WRITTEN;
    // SAFETY: this block's bytes; each lane's own places of shared memory before the barrier, anybody's after
    // it.
    unsafe {
        gpu.store_shared16(lane * 16, gpu.load16(from + u64::from(lane) * 16));
        if lane < 16 {
            gpu.store_shared16(B + lane * 16, gpu.load16(from + u64::from(B + lane * 16)));
        }
        // Half a row of `a`, and for half of the lanes half a column of `b`, element by element.
        let (row, k) = (lane / 2, lane % 2 * 8);
        let mut i = 0;
        while i < 8 {
            let element = gpu.load2(from + u64::from(row * 32 + (k + i) * 2));
            gpu.store_shared2(A_TRANSPOSED + (k + i) * 32 + row * 2, element);
            if lane < 16 {
                let element = gpu.load2(from + u64::from(B + row * 32 + (k + i) * 2));
                gpu.store_shared2(B_TRANSPOSED + (k + i) * 16 + row * 2, element);
            }
            i += 1;
        }
        gpu.barrier();
        let c = load_sums(gpu, from + 768);
        let (within, matrix) = (lane % 8, lane / 8);
        let a = gpu.load_matrix4::<false>((within + 8 * (matrix % 2)) * 32 + matrix / 2 * 16);
        let b = gpu.load_matrix2::<false>(B + within * 32 + matrix % 2 * 16);
        store_sums(gpu, to, gpu.mma::<T>(a, b, c));
        let a = gpu.load_matrix4::<true>(A_TRANSPOSED + (within + 8 * (matrix / 2)) * 32 + matrix % 2 * 16);
        let b = gpu.load_matrix2::<true>(B_TRANSPOSED + (within + 8 * (matrix % 2)) * 16);
        store_sums(gpu, to + WRITTEN, gpu.mma::<T>(a, b, c));
    }
}
