//! The op on the CPU against the oracle: every instruction set this machine has, every road to memory,
//! poisoned outputs and guards around and between all rows.

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};

use gdn::{
    Cpu, Heads, Layout, Packing,
    cpu::{Executor, Isa, Stores},
    reference,
};
use proptest::prelude::*;
use support::{Case, Shape};

/// Splits, holds the result to the oracle, merges it into fresh poison, and holds that to the same oracle.
fn there_and_back(layout: &Layout, num_rows: usize, sizes: [usize; 2], shapes: [Shape; 6], cpu: &Cpu) {
    let Layout { heads, packing } = *layout;
    let mut case = Case::packed(&heads, num_rows, sizes, shapes);
    let (from, to) = case.for_split();
    gdn::split(layout, from, to, cpu).unwrap();
    case.assert_guards();
    reference::check(&heads, packing, &case.read_packed(), &case.read_unpacked()).unwrap();

    case.poison_packed(&heads, num_rows, sizes, [shapes[0], shapes[1]]);
    let (from, to) = case.for_merge();
    gdn::merge(layout, from, to, cpu).unwrap();
    case.assert_guards();
    reference::check(&heads, packing, &case.read_packed(), &case.read_unpacked()).unwrap();
    let original = Case::packed(&heads, num_rows, sizes, shapes);
    for n in 0..num_rows {
        assert_eq!(case.mixed_qkvz.rows().row(n), original.mixed_qkvz.rows().row(n));
        assert_eq!(case.mixed_ba.rows().row(n), original.mixed_ba.rows().row(n));
    }
}

/// Every way of doing the work there is on this machine.
fn every_cpu() -> Vec<Cpu<'static>> {
    let mut cpus = Vec::new();
    for isa in Isa::ALL {
        let Ok(cpu) = Cpu::new().isa(isa) else {
            eprintln!("skipped: this machine has no {isa}");
            continue;
        };
        for stores in [Stores::Cached, Stores::Streaming] {
            cpus.push(cpu.stores(stores).threads(1));
        }
    }
    cpus
}

#[test]
fn sizes_that_straddle_every_vector_and_line() {
    // Segments of 1 to 330 bytes, one at a time, at every kind of alignment.
    for cpu in every_cpu() {
        for dim in (1..=100).chain([127, 128, 129, 191, 192, 193, 255, 256, 257, 320, 330]) {
            let heads = Heads::new(2, 2, dim, dim).unwrap();
            for packing in Packing::ALL {
                for misalignment in [0, 1, 16, 63] {
                    let shape = Shape { misalignment, padding: 0 };
                    there_and_back(&Layout::new(heads, packing), 2, [1, 1], [shape; 6], &cpu);
                }
            }
        }
    }
}

#[test]
fn rows_that_straddle_every_tile() {
    let heads = Heads::new(2, 6, 32, 32).unwrap();
    for cpu in every_cpu() {
        for rows_per_iter in [0, 1, 2, 3, 8, 1000] {
            for threads in [1, 2, 3, 7] {
                let cpu = cpu.threads(threads).rows_per_iter(rows_per_iter);
                for num_rows in [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33] {
                    let layout = Layout::new(heads, Packing::Interleaved);
                    there_and_back(&layout, num_rows, [2, 2], [Shape::default(); 6], &cpu);
                }
            }
        }
    }
}

#[test]
fn the_models_own_heads() {
    for cpu in every_cpu() {
        for (hk, hv, dk, dv) in [(16, 32, 128, 128), (16, 48, 128, 128), (4, 8, 96, 96), (1, 8, 128, 64)] {
            for packing in Packing::ALL {
                let layout = Layout::new(Heads::new(hk, hv, dk, dv).unwrap(), packing);
                for sizes in [[2, 2], [4, 4], [1, 2], [2, 4]] {
                    for misalignment in [0, 16] {
                        there_and_back(&layout, 5, sizes, [Shape { misalignment, padding: 0 }; 6], &cpu);
                    }
                }
            }
        }
    }
}

#[test]
fn automatic_choices() {
    // Enough for several threads and for streaming stores.
    let layout = Layout::new(Heads::new(16, 32, 128, 128).unwrap(), Packing::Interleaved);
    for num_rows in [0, 1, 64, 3000] {
        there_and_back(&layout, num_rows, [2, 4], [Shape::default(); 6], &Cpu::new());
    }
    for threads in [1, 2, 4, 16, 64, 1000] {
        let cpu = Cpu::new().threads(threads);
        assert!(!cpu.chosen_streaming(8 << 20), "a thread's share of a cache, by {threads} threads");
        assert!(cpu.chosen_streaming((32 << 20) + 1), "more than all have, by {threads} threads");
    }
}

#[test]
fn threads_that_are_not_ours() {
    type Work<'a> = &'a (dyn Fn(usize) + Sync);
    let each = |chunks: usize, work: Work<'_>| (0..chunks).for_each(work);
    let backwards = |chunks: usize, work: Work<'_>| (0..chunks).rev().for_each(work);
    let scoped = |chunks: usize, work: Work<'_>| {
        std::thread::scope(|scope| (0..chunks).for_each(|i| drop(scope.spawn(move || work(i)))));
    };
    // What an executor should not do, and what must not matter: nothing, everything at the same time as
    // somebody else, too much.
    let idle = |_: usize, _: Work<'_>| {};
    let crowded = |chunks: usize, work: Work<'_>| {
        std::thread::scope(|scope| {
            (0..3).for_each(|_| drop(scope.spawn(move || (0..chunks + 2).for_each(work))))
        });
    };
    let layout = Layout::new(Heads::new(2, 6, 32, 32).unwrap(), Packing::Interleaved);
    let executors: [&dyn Executor; 5] = [&each, &backwards, &scoped, &idle, &crowded];
    for executor in executors {
        for threads in [1, 2, 3, 7] {
            for num_rows in [0, 1, 2, 3, 8, 17] {
                let cpu = Cpu::new().threads(threads).executor(executor);
                there_and_back(&layout, num_rows, [2, 2], [Shape::default(); 6], &cpu);
            }
        }
    }
}

#[test]
fn an_executor_is_asked_once_for_each_chunk() {
    /// An engine's own threads, and a count of what they were given.
    struct Pool {
        threads: rayon::ThreadPool,
        chunks: AtomicUsize,
    }

    impl Executor for Pool {
        fn execute(&self, chunks: usize, work: &(dyn Fn(usize) + Sync)) {
            self.chunks.fetch_add(chunks, Ordering::Relaxed);
            self.threads.scope(|scope| {
                (0..chunks).for_each(|i| scope.spawn(move |_| work(i)));
            });
        }
    }

    let threads = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let pool = Pool { threads, chunks: AtomicUsize::new(0) };
    let layout = Layout::new(Heads::new(2, 2, 8, 8).unwrap(), Packing::Contiguous);
    let cpu = Cpu::new().threads(3).executor(&pool);
    there_and_back(&layout, 9, [2, 2], [Shape::default(); 6], &cpu);
    assert_eq!(pool.chunks.load(Ordering::Relaxed), 2 * 3, "a split and a merge of three chunks");
}

fn shape() -> impl Strategy<Value = Shape> {
    (prop_oneof![Just(0), 0usize..70], prop_oneof![Just(0), 0usize..64])
        .prop_map(|(padding, misalignment)| Shape { padding, misalignment })
}

fn heads() -> impl Strategy<Value = Heads> {
    (1usize..7, 1usize..6, 1usize..140, 1usize..140)
        .prop_map(|(hk, ratio, dk, dv)| Heads::new(hk, hk * ratio, dk, dv).unwrap())
}

fn packing() -> impl Strategy<Value = Packing> {
    prop::sample::select(Packing::ALL.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_shape(
        heads in heads(), packing in packing(), num_rows in 0usize..12,
        sizes in [prop::sample::select(vec![1usize, 2, 4, 8, 3, 16]), prop::sample::select(vec![1usize, 2, 4, 8])],
        shapes in [shape(), shape(), shape(), shape(), shape(), shape()],
        rows_per_iter in 0usize..6, threads in 0usize..5, cpu in prop::sample::select(every_cpu()),
    ) {
        let cpu = cpu.threads(threads).rows_per_iter(rows_per_iter);
        there_and_back(&Layout::new(heads, packing), num_rows, sizes, shapes, &cpu);
    }

    #[test]
    fn the_maps_are_bijections(heads in heads(), packing in packing()) {
        let layout = Layout::new(heads, packing);
        for (map, features, place) in [
            (layout.qkvz_map(), heads.qkvz_features(), reference::place_of_qkvz as fn(&Heads, Packing, usize) -> _),
            (layout.ba_map(), heads.ba_features(), reference::place_of_ba),
        ] {
            let (mut packed, mut unpacked) = (vec![0; features], vec![0; features]);
            let [first, second] = map.tensors();
            prop_assert_eq!((first.start, second.end, map.features()), (0, features, features));
            for segment in map.segments() {
                let end = segment.unpacked + segment.len;
                prop_assert!(segment.unpacked >= first.end || end <= first.end, "crosses from one tensor into the other");
                for i in 0..segment.len {
                    packed[segment.packed + i] += 1;
                    unpacked[segment.unpacked + i] += 1;
                    let (tensor, feature) = place(&heads, packing, segment.packed + i);
                    prop_assert_eq!([0, first.end][tensor] + feature, segment.unpacked + i);
                }
            }
            prop_assert!(packed.iter().chain(&unpacked).all(|times| *times == 1), "a feature is moved once");
            // Coalesced: no segment could have been part of the one before it.
            let mut segments: Vec<_> = map.segments().collect();
            segments.sort_by_key(|segment| segment.packed);
            for pair in segments.windows(2) {
                let adjacent = pair[0].unpacked + pair[0].len == pair[1].unpacked;
                prop_assert!(!adjacent || pair[1].unpacked == first.end);
            }
        }
    }
}
