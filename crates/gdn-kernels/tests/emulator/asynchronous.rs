//! What runs on while threads go on: copies, mbarriers, products of warpgroups; and clusters.

use std::panic::catch_unwind;

use gdn_kernels::{
    emulator::{Launch, Memory, Thread, run},
    gpu::{Accumulators, AsyncCopy, Bf16, Bytes16, EMPTY, Gpu, Hopper, K_MAJOR, Lefts, Operand, Warp, Wgmma},
};

use crate::{found, right, sentence};

#[test]
fn misused_copies_are_found() {
    let four = Launch::new([1; 3], 32).shared(2048);
    found(
        four,
        &[
            ("a copy is in flight", |b, gpu| unsafe {
                gpu.copy16(gpu.thread() * 16, b.input, true);
                gpu.commit_copies();
                let _ = gpu.load_shared16(gpu.thread() * 16);
            }),
            ("a copy is in flight", |b, gpu| unsafe {
                gpu.copy16(gpu.thread() * 16, b.input, true);
                gpu.commit_copies();
                gpu.store_shared4(gpu.thread() * 16, 1);
            }),
            // Waiting for too few groups, and for a group that was not ended.
            ("a copy is in flight", |b, gpu| unsafe {
                gpu.copy16(gpu.thread() * 16, b.input, true);
                gpu.commit_copies();
                gpu.wait_copies::<1>();
                let _ = gpu.load_shared16(gpu.thread() * 16);
            }),
            ("a copy is in flight", |b, gpu| unsafe {
                gpu.copy4(gpu.thread() * 4, b.input, true);
                gpu.wait_copies::<0>();
                let _ = gpu.load_shared4(gpu.thread() * 4);
            }),
            // Another thread's copy, with the wait and without the barrier.
            ("no barrier between", |b, gpu| unsafe {
                gpu.copy16(gpu.thread() * 16, b.input, true);
                gpu.commit_copies();
                gpu.wait_copies::<0>();
                gpu.shuffle_xor(0, 1);
                let _ = gpu.load_shared16((gpu.thread() ^ 1) * 16);
            }),
            ("another copy is in flight|no barrier between", |b, gpu| unsafe {
                gpu.copy16(0, b.input, true);
                gpu.commit_copies();
                gpu.wait_copies::<0>();
            }),
            ("has not waited for", |b, gpu| unsafe {
                gpu.copy16(gpu.thread() * 16, b.input, true);
                gpu.commit_copies();
            }),
            ("copies 16 bytes", |b, gpu| unsafe { gpu.copy16(gpu.thread() * 16, b.input + 4096, true) }),
        ],
    );
    right(
        four,
        &[|b, gpu| unsafe {
            gpu.copy16(gpu.thread() * 16, b.input, true);
            gpu.commit_copies();
            // Nothing is read where nothing is there.
            gpu.copy16(512 + gpu.thread() * 16, 0, false);
            gpu.commit_copies();
            gpu.wait_copies::<1>();
            gpu.barrier();
            assert_eq!(gpu.load_shared16((gpu.thread() ^ 1) * 16).0, [0x3c3c_3c3c; 4]);
            gpu.wait_copies::<0>();
            assert_eq!(gpu.load_shared16(512 + gpu.thread() * 16).0, [0; 4]);
        }],
    );
}

/// One mbarrier at 0, made and seen by all.
fn mbarrier(gpu: &Thread<'_>, arrivals: u32) {
    unsafe {
        if gpu.thread() == 0 {
            gpu.mbarrier_init(0, arrivals);
            gpu.mbarrier_fence();
        }
        gpu.barrier();
    }
}

#[test]
fn misused_mbarriers_and_bulk_copies_are_found() {
    let launch = Launch::new([1; 3], 64).shared(2048);
    found(
        launch,
        &[
            ("there is no mbarrier", |_, gpu| unsafe { gpu.mbarrier_arrive(8) }),
            ("made with no barrier between|there is no mbarrier", |_, gpu| unsafe {
                if gpu.thread() == 0 {
                    gpu.mbarrier_init(0, 64);
                }
                gpu.mbarrier_arrive(0);
            }),
            ("which are an mbarrier's", |_, gpu| unsafe {
                mbarrier(gpu, 64);
                let _ = gpu.load_shared4(4);
            }),
            ("parity 0 of the mbarrier", |_, gpu| unsafe {
                mbarrier(gpu, 65);
                gpu.mbarrier_arrive(0);
                gpu.mbarrier_wait(0, 0);
            }),
            ("parity 0 of the mbarrier", |b, gpu| unsafe {
                mbarrier(gpu, 1);
                if gpu.thread() == 0 {
                    gpu.mbarrier_arrive_expect(0, 32);
                    gpu.bulk_copy(128, b.input, 16, 0);
                }
                gpu.mbarrier_wait(0, 0);
            }),
            ("a copy is in flight", |b, gpu| unsafe {
                mbarrier(gpu, 1);
                if gpu.thread() == 0 {
                    gpu.mbarrier_arrive_expect(0, 16);
                    gpu.bulk_copy(128, b.input, 16, 0);
                    let _ = gpu.load_shared4(128);
                }
                gpu.mbarrier_wait(0, 0);
            }),
            // Reading what another thread waited for: the first warp tells the second only after it has read.
            ("with no barrier between|a copy is in flight", |b, gpu| unsafe {
                mbarrier(gpu, 1);
                if gpu.thread() == 0 {
                    gpu.mbarrier_arrive_expect(0, 16);
                    gpu.bulk_copy(128, b.input, 16, 0);
                }
                if gpu.thread() < 32 {
                    gpu.mbarrier_wait(0, 0);
                } else {
                    for _ in 0..20 {
                        gpu.shuffle_xor(0, 1);
                    }
                    let _ = gpu.load_shared4(128);
                }
                gpu.barrier();
            }),
            ("nobody has waited for", |b, gpu| unsafe {
                mbarrier(gpu, 1);
                if gpu.thread() == 0 {
                    gpu.mbarrier_arrive_expect(0, 16);
                    gpu.bulk_copy(128, b.input, 16, 0);
                }
            }),
            // Filled again while others still read: the mbarrier that says it is empty is not waited for.
            ("has read, with no barrier between", |b, gpu| unsafe {
                mbarrier(gpu, 1);
                if gpu.thread() == 0 {
                    gpu.mbarrier_arrive_expect(0, 16);
                    gpu.bulk_copy(128, b.input, 16, 0);
                }
                gpu.mbarrier_wait(0, 0);
                let _ = gpu.load_shared4(128);
                if gpu.thread() == 0 {
                    gpu.barrier_of(1, 32);
                    gpu.mbarrier_arrive_expect(0, 16);
                    gpu.bulk_copy(128, b.input, 16, 0);
                } else if gpu.thread() < 32 {
                    gpu.barrier_of(1, 32);
                }
                gpu.mbarrier_wait(0, 1);
            }),
            // A state that is written while its bytes are still to be read, by others than who has them copied.
            ("has read, with no barrier between|has written, with no barrier between", |b, gpu| unsafe {
                mbarrier(gpu, 1);
                if gpu.thread() == 0 {
                    gpu.mbarrier_arrive_expect(0, 16);
                    gpu.bulk_copy(128, b.state, 16, 0);
                } else if gpu.thread() == 1 {
                    gpu.store4(b.state, 1);
                }
                gpu.mbarrier_wait(0, 0);
            }),
            // One that was written before, of which who has it copied does not know.
            ("has written, with no barrier between|has read, with no barrier between", |b, gpu| unsafe {
                mbarrier(gpu, 1);
                if gpu.thread() == 40 {
                    gpu.store4(b.state, 1);
                } else if gpu.thread() == 0 {
                    gpu.mbarrier_arrive_expect(0, 16);
                    gpu.bulk_copy(128, b.state, 16, 0);
                }
                gpu.mbarrier_wait(0, 0);
            }),
            ("no multiples of 16", |b, gpu| gpu.bring_bulk_near(b.state + 8, 16)),
            ("without a fence_async", |b, gpu| unsafe {
                gpu.store_shared4(gpu.thread() * 4, 1);
                gpu.barrier();
                if gpu.thread() == 0 {
                    gpu.bulk_store(b.scratch, 0, 256);
                    gpu.bulk_stores_commit();
                    gpu.bulk_stores_wait::<0>();
                }
            }),
            ("still reads", |b, gpu| unsafe {
                gpu.store_shared4(gpu.thread() * 4, 1);
                gpu.fence_async();
                gpu.barrier();
                if gpu.thread() == 0 {
                    gpu.bulk_store(b.scratch, 0, 256);
                    gpu.bulk_stores_commit();
                    gpu.store_shared4(0, 2);
                }
            }),
            ("has not waited for", |b, gpu| unsafe {
                gpu.store_shared4(gpu.thread() * 4, 1);
                gpu.fence_async();
                gpu.barrier();
                if gpu.thread() == 0 {
                    gpu.bulk_store(b.scratch, 0, 256);
                    gpu.bulk_stores_commit();
                }
            }),
        ],
    );
    right(
        launch,
        &[|b, gpu| unsafe {
            mbarrier(gpu, 1);
            for phase in 0..3 {
                if gpu.thread() == 0 {
                    gpu.mbarrier_arrive_expect(0, 16);
                    gpu.bulk_copy(128, b.input, 16, 0);
                }
                gpu.mbarrier_wait(0, phase % 2);
                let _ = gpu.load_shared4(128);
                gpu.barrier();
            }
            // Who waits for a copy may write where it came from.
            if gpu.thread() == 0 {
                gpu.bring_bulk_near(b.state, 16);
                gpu.mbarrier_arrive_expect(0, 16);
                gpu.bulk_copy(128, b.state, 16, 0);
            }
            gpu.mbarrier_wait(0, 1);
            if (8..12).contains(&gpu.thread()) {
                gpu.store4(b.state + u64::from(gpu.thread() - 8) * 4, 1);
            }
        }],
    );
}

#[test]
fn misused_clusters_are_found() {
    let launch = Launch::new([4, 1, 1], 32).shared(256).cluster(2);
    found(
        launch,
        &[
            ("with no barrier between", |_, gpu| unsafe {
                gpu.store_shared4(gpu.thread() * 4, 1);
                gpu.cluster_barrier();
                // The own block's barrier does not order the other block's read and this write.
                let _ = gpu.load_cluster4(gpu.thread() * 4, gpu.cluster_rank() ^ 1);
                gpu.barrier();
                gpu.store_shared4(gpu.thread() * 4, 2);
                gpu.cluster_barrier();
            }),
            ("which has ended", |_, gpu| unsafe {
                gpu.store_shared4(gpu.thread() * 4, 1);
                gpu.cluster_barrier();
                if gpu.cluster_rank() == 0 {
                    for _ in 0..200 {
                        gpu.shuffle_xor(0, 1);
                    }
                    let _ = gpu.load_cluster4(0, 1);
                }
            }),
            ("block 2 of its cluster", |_, gpu| {
                let _ = unsafe { gpu.load_cluster4(0, 2) };
            }),
            ("waits at the cluster's barrier", |_, gpu| {
                if gpu.cluster_rank() == 0 {
                    gpu.cluster_barrier();
                }
            }),
            ("has not waited since", |_, gpu| {
                gpu.cluster_arrive();
                gpu.cluster_arrive();
            }),
            ("has not arrived there", |_, gpu| gpu.cluster_wait()),
            // What is done after an arrival is not told by it.
            ("with no barrier between", |_, gpu| unsafe {
                gpu.cluster_arrive();
                gpu.store_shared4(gpu.thread() * 4, 1);
                gpu.cluster_wait();
                let _ = gpu.load_cluster4(gpu.thread() * 4, gpu.cluster_rank() ^ 1);
                gpu.cluster_barrier();
            }),
            // The window of the decode: all blocks read it, and one of them writes it too soon.
            ("block", |b, gpu| unsafe {
                let at = b.state + u64::from(gpu.block()[0] / 2 * 128 + gpu.thread() * 4);
                let _ = gpu.load4(at);
                gpu.cluster_arrive();
                if gpu.cluster_rank() == 0 {
                    gpu.store4(at, 1);
                }
                gpu.cluster_wait();
            }),
        ],
    );
    right(
        launch,
        &[|b, gpu| unsafe {
            let at = b.state + u64::from(gpu.block()[0] / 2 * 128 + gpu.thread() * 4);
            let _ = gpu.load4(at);
            gpu.cluster_arrive();
            gpu.store_shared4(gpu.thread() * 4, 1);
            gpu.cluster_wait();
            if gpu.cluster_rank() == 0 {
                gpu.store4(at, 1);
            }
        }],
    );
    found(
        launch,
        &[
            // Nobody says that there is room, or not before it is sent.
            ("where no message", |_, gpu| unsafe {
                gpu.store_shared4(gpu.thread() * 4, 1);
                gpu.cluster_barrier();
                gpu.send4(gpu.thread() * 4, gpu.cluster_rank() ^ 1, 1);
                let _ = gpu.receive16(gpu.thread() / 4 * 16);
            }),
            ("with no barrier between|where no message", |_, gpu| unsafe {
                gpu.cluster_barrier();
                gpu.store_shared4(gpu.thread() * 4, EMPTY);
                gpu.barrier();
                gpu.send4(gpu.thread() * 4, gpu.cluster_rank() ^ 1, 1);
                let _ = gpu.receive16(gpu.thread() / 4 * 16);
            }),
            // A second one there.
            ("with no barrier between|where no message", |_, gpu| unsafe {
                gpu.store_shared4(gpu.thread() * 4, EMPTY);
                gpu.cluster_barrier();
                gpu.send4(0, gpu.cluster_rank() ^ 1, 1);
                gpu.cluster_barrier();
            }),
            ("waits for what is sent", |_, gpu| unsafe {
                gpu.store_shared4(gpu.thread() * 4, EMPTY);
                gpu.cluster_barrier();
                if gpu.thread() > 0 {
                    gpu.send4(gpu.thread() * 4, gpu.cluster_rank() ^ 1, 1);
                }
                let _ = gpu.receive16(gpu.thread() / 4 * 16);
            }),
            ("sends what stands for nothing", |_, gpu| unsafe {
                gpu.store_shared4(gpu.thread() * 4, EMPTY);
                gpu.cluster_barrier();
                gpu.send4(gpu.thread() * 4, gpu.cluster_rank() ^ 1, EMPTY);
            }),
            // A message says nothing of what was written before it.
            ("with no barrier between", |_, gpu| unsafe {
                gpu.store_shared4(gpu.thread() * 4, EMPTY);
                gpu.cluster_barrier();
                gpu.store_cluster4(128 + gpu.thread() * 4, gpu.cluster_rank() ^ 1, 2);
                gpu.send4(gpu.thread() * 4, gpu.cluster_rank() ^ 1, 1);
                let _ = gpu.receive16(gpu.thread() / 4 * 16);
                let _ = gpu.load_shared4(128 + gpu.thread() * 4);
                gpu.cluster_barrier();
            }),
        ],
    );
    right(
        launch,
        &[|_, gpu| unsafe {
            gpu.store_shared4(gpu.thread() * 4, EMPTY);
            gpu.cluster_barrier();
            gpu.send4(gpu.thread() * 4, gpu.cluster_rank() ^ 1, gpu.thread());
            let Bytes16(words) = gpu.receive16(gpu.thread() / 4 * 16);
            assert_eq!(words[gpu.thread() as usize % 4], gpu.thread());
        }],
    );
    // Where there are no clusters, it is the block's barrier: half of a block waits there in vain.
    found(
        Launch::new([2, 1, 1], 64).shared(256),
        &[("waits at barrier 0", |_, gpu| {
            gpu.cluster_arrive();
            if gpu.thread() < 32 {
                gpu.cluster_wait();
            }
        })],
    );
    let uneven = catch_unwind(|| run(&Memory::new(), Launch::new([3, 1, 1], 32).cluster(2), |_| {}));
    assert!(uneven.unwrap_err().downcast_ref::<String>().unwrap().contains("clusters of 2"));
}

/// Tiles of `a` and `b` for a product with n = 8, at 0 and at 8192, stored and fenced.
fn tiles(gpu: &Thread<'_>) -> [Operand; 2] {
    for i in 0..5 {
        let at = (i * 128 + gpu.thread()) * 16;
        if at < 8192 + 1024 {
            unsafe { gpu.store_shared16(at, Bytes16([0x3f80_3f80; 4])) }
        }
    }
    gpu.fence_async();
    gpu.barrier();
    [Operand::k_major(0), Operand::k_major(8192)]
}

fn product(gpu: &Thread<'_>, d: &mut Accumulators<4>, [a, b]: [Operand; 2]) {
    unsafe { gpu.wgmma::<Bf16, K_MAJOR, K_MAJOR, 4>(d, a, b, true) }
}

fn product_left(gpu: &Thread<'_>, d: &mut Accumulators<4>, a: &mut Lefts<1>, b: Operand) {
    unsafe { gpu.wgmma_left::<Bf16, K_MAJOR, 1, 4>(d, a, 0, b, true) }
}

/// Ones.
fn left() -> Lefts<1> {
    Lefts::new([[0x3f80_3f80; 4]])
}

#[test]
fn misused_left_sides_are_found() {
    let launch = Launch::new([1; 3], 128).shared(8192 + 1024);
    found(
        launch,
        &[
            ("left side that was written with no wgmma_begin", |_, gpu| {
                let ([_, b], mut d, mut a) = (tiles(gpu), Accumulators::zero(), left());
                gpu.sums(&mut d);
                gpu.wgmma_begin();
                product_left(gpu, &mut d, &mut a, b);
            }),
            ("left side that was written with no wgmma_begin", |_, gpu| {
                let ([_, b], mut d, mut a) = (tiles(gpu), Accumulators::zero(), left());
                gpu.sums(&mut d);
                gpu.wgmma_begin();
                gpu.lefts(&mut a)[0] = [0; 4];
                product_left(gpu, &mut d, &mut a, b);
            }),
            ("touches the left side of a product that it has not waited for", |_, gpu| {
                let ([_, b], mut d, mut a) = (tiles(gpu), Accumulators::zero(), left());
                gpu.sums(&mut d);
                gpu.lefts(&mut a);
                gpu.wgmma_begin();
                product_left(gpu, &mut d, &mut a, b);
                gpu.wgmma_commit();
                gpu.wgmma_wait::<1>();
                gpu.lefts(&mut a);
            }),
            ("stores a row of a matrix at 9216 of shared memory", |_, gpu| unsafe {
                gpu.store_matrix4(8960 + gpu.lane() * 16, [0; 4]);
            }),
            ("with no barrier between", |_, gpu| unsafe {
                gpu.store_matrix4(gpu.thread() % 32 * 16, [0; 4]);
            }),
        ],
    );
    right(
        launch,
        &[|_, gpu| {
            let ([a_at, b], mut d, mut a) = (tiles(gpu), Accumulators::zero(), left());
            for round in 1..3 {
                gpu.sums(&mut d);
                gpu.lefts(&mut a);
                gpu.wgmma_begin();
                product_left(gpu, &mut d, &mut a, b);
                product(gpu, &mut d, [a_at, b]);
                gpu.wgmma_commit();
                gpu.wgmma_wait::<0>();
                assert_eq!(*gpu.sums(&mut d), [32.0 * round as f32; 4]);
            }
        }],
    );
}

#[test]
fn misused_products_of_warpgroups_are_found() {
    let launch = Launch::new([1; 3], 128).shared(8192 + 1024);
    found(
        launch,
        &[
            ("has not waited for", |_, gpu| {
                let (tiles, mut d) = (tiles(gpu), Accumulators::zero());
                gpu.wgmma_begin();
                product(gpu, &mut d, tiles);
                gpu.wgmma_commit();
                let _ = gpu.sums(&mut d);
            }),
            ("still reads", |_, gpu| unsafe {
                let (tiles, mut d) = (tiles(gpu), Accumulators::zero());
                gpu.wgmma_begin();
                product(gpu, &mut d, tiles);
                gpu.wgmma_commit();
                gpu.wgmma_wait::<1>();
                gpu.store_shared4(gpu.thread() * 4, 0);
            }),
            ("no wgmma_begin", |_, gpu| {
                let (tiles, mut d) = (tiles(gpu), Accumulators::zero());
                product(gpu, &mut d, tiles);
            }),
            ("no wgmma_begin", |_, gpu| {
                let (tiles, mut d) = (tiles(gpu), Accumulators::zero());
                gpu.wgmma_begin();
                product(gpu, &mut d, tiles);
                gpu.wgmma_commit();
                gpu.wgmma_wait::<0>();
                gpu.sums(&mut d)[0] = 1.0;
                product(gpu, &mut d, tiles);
            }),
            ("without a fence_async", |_, gpu| unsafe {
                let (tiles, mut d) = (tiles(gpu), Accumulators::zero());
                gpu.store_shared4(gpu.thread() * 4, 0);
                gpu.barrier();
                gpu.wgmma_begin();
                product(gpu, &mut d, tiles);
            }),
            ("with no barrier between", |_, gpu| unsafe {
                let (tiles, mut d) = (tiles(gpu), Accumulators::zero());
                gpu.store_shared4(gpu.thread() * 4, 0);
                gpu.fence_async();
                gpu.wgmma_begin();
                product(gpu, &mut d, tiles);
            }),
            ("nobody has written", |_, gpu| {
                let mut d = Accumulators::zero();
                gpu.wgmma_begin();
                product(gpu, &mut d, [Operand::k_major(0); 2]);
            }),
            ("outside the 9216 bytes", |_, gpu| {
                let ([a, b], mut d) = (tiles(gpu), Accumulators::zero());
                gpu.wgmma_begin();
                product(gpu, &mut d, [a, b.further(1024)]);
            }),
            ("different operands", |_, gpu| {
                let ([a, b], mut d) = (tiles(gpu), Accumulators::zero());
                gpu.wgmma_begin();
                product(gpu, &mut d, [a, b.further(gpu.thread() / 64 * 32)]);
            }),
        ],
    );
    right(
        launch,
        &[|_, gpu| {
            let (tiles, mut d) = (tiles(gpu), Accumulators::zero());
            for round in 1..3 {
                gpu.sums(&mut d);
                gpu.wgmma_begin();
                product(gpu, &mut d, tiles);
                product(gpu, &mut d, tiles);
                gpu.wgmma_commit();
                gpu.wgmma_wait::<0>();
                assert_eq!(*gpu.sums(&mut d), [32.0 * round as f32; 4]);
            }
        }],
    );
    let half = sentence(Launch::new([1; 3], 64), |_, gpu| gpu.wgmma_begin());
    assert!(half.unwrap().contains("no multiple of 128"));
}
