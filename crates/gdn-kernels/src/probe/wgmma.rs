//! Products by a warpgroup.

use super::Args;
use crate::gpu::{Accumulators, Float16, K_MAJOR, Lefts, OTHER_MAJOR, Operand, Swizzle, TensorCore, Wgmma};

/// Rows of `a`.
pub const M: u32 = 64;
/// Columns of `a` and rows of `b`.
pub const K: u32 = 64;

/// Brings a matrix of `rows` rows of `columns` elements into shared memory: stretches of 64 columns one after
/// the other, rows of 128 bytes.
///
/// # Safety
/// The matrix is readable at `from`; `at`, a multiple of 1024, begins as many bytes of shared memory.
#[inline(always)]
unsafe fn bring(gpu: &impl Wgmma, from: u64, at: u32, rows: u32, columns: u32) {
    let pieces = columns / 8;
    let mut i = gpu.thread();
    while i < rows * pieces {
        let (row, piece) = (i / pieces, i % pieces);
        let to = at + piece / 8 * rows * 128 + row * 128 + piece % 8 * 16;
        // SAFETY: a piece of the matrix, and one thread's place.
        unsafe { gpu.store_shared16(Swizzle::Bytes128.place(to), gpu.load16(from + u64::from(i) * 16)) }
        i += gpu.threads();
    }
}

/// `d = a b`, 64 x 64 by 64 x n with n twice `N`, in four products one after the other. `a` is there as 64
/// rows of k, or where `A_MAJOR` is [`OTHER_MAJOR`] as 64 k of rows; `b` as n columns of k, or as 64 k of
/// columns.
///
/// # Safety
/// One block of 128 threads. `a` and then `b` are readable at `args.from`, a multiple of 16; `d`, 64 rows of
/// n f32, is writable at `args.to`; there are 8192 bytes and `256 * N` of shared memory.
#[inline(always)]
pub unsafe fn product<T: Float16, const A_MAJOR: bool, const B_MAJOR: bool, const N: usize, G: Wgmma>(
    gpu: &G,
    args: &Args,
) {
    const A_BYTES: u32 = M * K * 2;
    let n = 2 * N as u32;
    let tile = |at: u32, major: bool| {
        // k-major: 8 rows of m or n follow each other at 1024 bytes; the other way 8 k do, and stretches of
        // 64 m or n at 64 k.
        if major == OTHER_MAJOR {
            Operand { leading: K * 128, ..Operand::k_major(at) }
        } else {
            Operand::k_major(at)
        }
    };
    // From one k16 to the next.
    let step = |major: bool| if major == OTHER_MAJOR { 16 * 128 } else { 32 };
    let mut d = Accumulators::<N>::zero();
    // SAFETY: tiles that lie in shared memory, seen by the products after the fence and the barrier.
    unsafe {
        bring(gpu, args.from, 0, M, K);
        let (rows, columns) = if B_MAJOR == OTHER_MAJOR { (K, n) } else { (n, K) };
        bring(gpu, args.from + u64::from(A_BYTES), A_BYTES, rows, columns);
        gpu.fence_async();
        gpu.barrier();
        let (a, b) = (tile(0, A_MAJOR), tile(A_BYTES, B_MAJOR));
        gpu.sums(&mut d);
        gpu.wgmma_begin();
        let mut k = 0;
        while k < 4 {
            let (a, b) = (a.further(k * step(A_MAJOR)), b.further(k * step(B_MAJOR)));
            gpu.wgmma::<T, A_MAJOR, B_MAJOR, N>(&mut d, a, b, k > 0);
            k += 1;
        }
        gpu.wgmma_commit();
        gpu.wgmma_wait::<0>();
        put(gpu, args.to, &mut d);
    }
}

/// Writes the sums, rows of n twice `N`.
///
/// # Safety
/// 64 such rows are writable at `to`; the products were waited for.
#[inline(always)]
unsafe fn put<const N: usize>(gpu: &impl Wgmma, to: u64, d: &mut Accumulators<N>) {
    let (n, thread) = (2 * N as u32, gpu.thread());
    let (warp, g, t) = (thread / 32, thread % 32 / 4, thread % 4);
    let sums = gpu.sums(d);
    let mut i = 0;
    while i < N {
        let j = i as u32;
        let (row, column) = (16 * warp + g + 8 * (j / 2 % 2), 8 * (j / 4) + 2 * t + j % 2);
        // SAFETY: the caller's promise; each thread has its own numbers.
        unsafe { gpu.store4(to + u64::from(row * n + column) * 4, sums[i].to_bits()) };
        i += 1;
    }
}

/// As [`product`], with both matrices as rows of k, or `b` as 64 k of columns: the first half of `a` is in
/// registers, the second goes from there to shared memory, and from there into the products.
///
/// # Safety
/// That of [`product`].
#[inline(always)]
pub unsafe fn left<T: Float16, const B_MAJOR: bool, const N: usize, G: Wgmma + TensorCore>(
    gpu: &G,
    args: &Args,
) {
    const A_BYTES: u32 = M * K * 2;
    let n = 2 * N as u32;
    let (thread, lane) = (gpu.thread(), gpu.lane());
    let (warp, g, t) = (thread / 32, lane / 4, lane % 4);
    let mut d = Accumulators::<N>::zero();
    // SAFETY: as `product`.
    unsafe {
        let mut words = [[0; 4]; 4];
        let mut i = 0;
        while i < 16 {
            let j = i as u32;
            let (row, k) = (16 * warp + g + 8 * (j % 2), j / 4 * 16 + 2 * t + j % 4 / 2 * 8);
            words[i / 4][i % 4] = gpu.load4(args.from + u64::from(row * K + k) * 2);
            i += 1;
        }
        // Of four matrices the first two are eight rows each, the others the same of the next eight k.
        let (matrix, line) = (lane / 8, lane % 8);
        let row = (16 * warp + matrix % 2 * 8 + line) * 128;
        let mut k16 = 2;
        while k16 < 4 {
            let at = Swizzle::Bytes128.place(row + k16 as u32 * 32 + matrix / 2 * 16);
            gpu.store_matrix4(at, words[k16]);
            k16 += 1;
        }
        let (rows, columns) = if B_MAJOR == OTHER_MAJOR { (K, n) } else { (n, K) };
        bring(gpu, args.from + u64::from(A_BYTES), A_BYTES, rows, columns);
        gpu.fence_async();
        gpu.barrier();
        let b = Operand::k_major(A_BYTES);
        let (b, step) =
            if B_MAJOR == OTHER_MAJOR { (Operand { leading: K * 128, ..b }, 16 * 128) } else { (b, 32) };
        let mut a = Lefts::new([words[0], words[1]]);
        gpu.sums(&mut d);
        gpu.lefts(&mut a);
        gpu.wgmma_begin();
        gpu.wgmma_left::<T, B_MAJOR, 2, N>(&mut d, &mut a, 0, b, false);
        gpu.wgmma_left::<T, B_MAJOR, 2, N>(&mut d, &mut a, 1, b.further(step), true);
        let mut k = 2;
        while k < 4 {
            let a = Operand::k_major(0).further(k * 32);
            gpu.wgmma::<T, K_MAJOR, B_MAJOR, N>(&mut d, a, b.further(k * step), true);
            k += 1;
        }
        gpu.wgmma_commit();
        gpu.wgmma_wait::<0>();
        put(gpu, args.to, &mut d);
    }
}
