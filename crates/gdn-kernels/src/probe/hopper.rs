//! mbarriers, bulk copies there and back, and clusters.

use super::Args;
use crate::gpu::{Bytes16, EMPTY, Hopper};

/// Where the buffers of [`bulk`] begin, behind its mbarriers.
const BUFFERS: u32 = 128;

/// `args.count` tiles of 16 bytes a thread, brought by bulk copies into two buffers, each with an mbarrier
/// that says it is full and one that says it is empty. Each thread reads its neighbour's piece and folds it
/// into a word; the words go back by a bulk store.
///
/// # Safety
/// One block, of a multiple of 32 threads. The tiles are readable at `args.from`, a word a thread writable at
/// `args.to`, both multiples of 16; there are 128 bytes of shared memory and 36 a thread.
#[inline(always)]
pub unsafe fn bulk(gpu: &impl Hopper, args: &Args) {
    let (thread, threads) = (gpu.thread(), gpu.threads());
    let tile_bytes = threads * 16;
    let (full, empty) = (|tile: u32| tile % 2 * 8, |tile: u32| 16 + tile % 2 * 8);
    let buffer = |tile: u32| BUFFERS + tile % 2 * tile_bytes;
    let out = BUFFERS + 2 * tile_bytes;
    // SAFETY: mbarriers of their own bytes; a buffer is read when it is full and filled when it is empty.
    unsafe {
        if thread == 0 {
            let mut k = 0;
            while k < 2 {
                gpu.mbarrier_init(full(k), 1);
                gpu.mbarrier_init(empty(k), threads);
                k += 1;
            }
            gpu.mbarrier_fence();
        }
        gpu.barrier();
        let begin = |tile: u32| {
            gpu.mbarrier_arrive_expect(full(tile), tile_bytes);
            let from = args.from + u64::from(tile) * u64::from(tile_bytes);
            // In two pieces, to have several on their way to one mbarrier.
            let half = tile_bytes / 2;
            gpu.bulk_copy(buffer(tile), from, half, full(tile));
            gpu.bulk_copy(buffer(tile) + half, from + u64::from(half), tile_bytes - half, full(tile));
        };
        if thread == 0 {
            let mut tile = 0;
            while tile < 2 && tile < args.count {
                begin(tile);
                tile += 1;
            }
        }
        let neighbour = if thread + 1 == threads { 0 } else { thread + 1 };
        let (mut tile, mut sum) = (0, 0u32);
        while tile < args.count {
            gpu.mbarrier_wait(full(tile), tile / 2 % 2);
            let [a, b, c, d] = gpu.load_shared16(buffer(tile) + neighbour * 16).0;
            sum = sum
                .wrapping_mul(31)
                .wrapping_add(a ^ b.rotate_left(8) ^ c.rotate_left(16) ^ d.rotate_left(24));
            gpu.mbarrier_arrive(empty(tile));
            if thread == 0 && tile + 2 < args.count {
                gpu.mbarrier_wait(empty(tile), tile / 2 % 2);
                begin(tile + 2);
            }
            tile += 1;
        }
        gpu.store_shared4(out + thread * 4, sum);
        gpu.fence_async();
        gpu.barrier();
        if thread == 0 {
            gpu.bulk_store(args.to, out, threads * 4);
            gpu.bulk_stores_commit();
            gpu.bulk_stores_wait::<0>();
        }
    }
}

/// Words that [`cluster`] writes for each thread.
pub const WORDS: u32 = 5;

/// Blocks of a cluster read one another's shared memory, write to it, and send messages: one word each way and
/// a piece of 16 bytes.
///
/// # Safety
/// Clusters of blocks along x, blocks of a multiple of 4 threads. A word a thread is readable at `args.from`,
/// [`WORDS`] a thread writable at `args.to`; there are 12 bytes of shared memory a thread.
#[inline(always)]
pub unsafe fn cluster(gpu: &impl Hopper, args: &Args) {
    let [block, ..] = gpu.block();
    let (thread, threads) = (gpu.thread(), gpu.threads());
    let i = u64::from(block * threads + thread);
    let (rank, blocks) = (gpu.cluster_rank(), gpu.cluster_blocks());
    let next = if rank + 1 == blocks { 0 } else { rank + 1 };
    // SAFETY: each thread's own places before the cluster's barrier, anybody's after it; nobody ends before
    // the last one.
    unsafe {
        let value = gpu.load4(args.from + 4 * i);
        gpu.store_shared4(thread * 4, value);
        gpu.store_shared4((2 * threads + thread) * 4, EMPTY);
        gpu.cluster_barrier();
        gpu.send4((2 * threads + thread) * 4, next, value & 0xffff | rank << 16);
        let Bytes16(sent) = gpu.receive16((2 * threads + thread / 4 * 4) * 4);
        let theirs = gpu.load_cluster4(thread * 4, next);
        let [a, b, c, d] = gpu.load_cluster16(thread / 4 * 16, next).0;
        gpu.store_cluster4((threads + thread) * 4, next, value.rotate_left(rank));
        gpu.cluster_barrier();
        let got = gpu.load_shared4((threads + thread) * 4);
        let sent = sent.into_iter().fold(0u32, |all, word| all.rotate_left(7) ^ word);
        let words = [theirs, a.wrapping_add(b) ^ c.wrapping_add(d), got, rank << 16 | blocks, sent];
        for (k, word) in (0..).zip(words) {
            gpu.store4(args.to + (u64::from(WORDS) * i + k) * 4, word);
        }
    }
}
