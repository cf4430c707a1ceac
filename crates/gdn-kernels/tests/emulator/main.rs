//! The emulator: every fault that it is to find is planted, and found.
#![cfg(feature = "emulator")]
// Every `unsafe` here hands a kernel's access to the emulator, which checks it.
#![allow(clippy::undocumented_unsafe_blocks)]

mod asynchronous;

use std::panic::{AssertUnwindSafe, catch_unwind};

use gdn_kernels::{
    emulator::{Launch, Memory, Place, Thread, run, run_in_step},
    gpu::{Bf16, Bytes16, Gpu, TensorCore, Warp},
};

const ONE_WARP: Launch = Launch::new([1; 3], 32).shared(64);

/// What a kernel works on: an input, a state and scratch of 4 KiB each.
struct Buffers {
    memory: Memory,
    input: u64,
    state: u64,
    scratch: u64,
}

impl Buffers {
    fn new() -> Self {
        let (memory, place) = (Memory::new(), Place::dense(4096));
        let [input, state] = [memory.input(&[0x3c; 4096], place), memory.state(&[0x3c; 4096], place)];
        let scratch = memory.scratch(4096, place);
        Self { memory, input, state, scratch }
    }
}

/// The sentence that a kernel is stopped with; `None` where it runs to its end.
fn sentence(launch: Launch, kernel: impl Fn(&Buffers, &Thread<'_>) + Copy) -> Option<String> {
    let buffers = Buffers::new();
    said(|| run_in_step(&buffers.memory, launch, |gpu| kernel(&buffers, gpu)))
}

/// What stops it.
fn said(run: impl FnOnce()) -> Option<String> {
    let payload = catch_unwind(AssertUnwindSafe(run)).err()?;
    let text = payload.downcast_ref::<String>().cloned();
    Some(text.or_else(|| payload.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap())
}

type Kernel = fn(&Buffers, &Thread<'_>);

/// Holds each kernel to a part of the sentence that stops it, or to one of several that depend on who comes
/// first.
fn found(launch: Launch, kernels: &[(&str, Kernel)]) {
    for (part, kernel) in kernels {
        for seed in 0..4 {
            let sentence = sentence(launch.seed(seed), kernel);
            let sentence = sentence.unwrap_or_else(|| panic!("nothing is wrong, expected: {part}"));
            let found = part.split('|').any(|part| sentence.contains(part));
            assert!(found, "{sentence}\nexpected: {part}");
        }
    }
}

/// That nothing is wrong with kernels.
fn right(launch: Launch, kernels: &[Kernel]) {
    for (i, kernel) in kernels.iter().enumerate() {
        for seed in 0..4 {
            assert_eq!(sentence(launch.seed(seed), kernel), None, "kernel {i}");
        }
    }
}

type Access = fn(&Memory, &Thread<'_>);

#[test]
fn wrong_accesses_are_found() {
    let kernels: [(&str, Access); 10] = [
        ("outside every row", |m, gpu| {
            let gaps = Place { misalignment: 0, row_bytes: 4, row_stride: 8 };
            let _ = unsafe { gpu.load4(m.input(&[0; 8], gaps) + 4) };
        }),
        ("outside every row", |m, gpu| {
            let _ = unsafe { gpu.load4(m.input(&[0; 8], Place::dense(8)) + 8) };
        }),
        ("outside every row", |m, gpu| {
            let _ = unsafe { gpu.load16(m.input(&[0; 15], Place::dense(15))) };
        }),
        ("not a multiple of 4", |m, gpu| {
            let _ = unsafe { gpu.load4(m.input(&[0; 8], Place { misalignment: 2, ..Place::dense(8) })) };
        }),
        ("nobody has written", |m, gpu| {
            let _ = unsafe { gpu.load4(m.output(8, Place::dense(8))) };
        }),
        ("nobody has written", |m, gpu| {
            let _ = unsafe { gpu.load4(m.scratch(8, Place::dense(8))) };
        }),
        ("into an input", |m, gpu| unsafe { gpu.store1(m.input(&[0; 8], Place::dense(8)), 1) }),
        ("stored already", |m, gpu| unsafe {
            let at = m.output(8, Place::dense(8));
            gpu.store4(at, 1);
            gpu.store2(at + 2, 1);
        }),
        ("another value", |m, gpu| unsafe {
            let at = m.agreed(8, Place::dense(8));
            gpu.store4(at, 0x0101_0101);
            gpu.store2(at + 2, 0x0101);
            gpu.store2(at + 2, 0x0102);
        }),
        ("8 bytes into a buffer of 8 bytes", |m, gpu| {
            let _ = unsafe { gpu.load1(m.input(&[0; 8], Place::dense(8)) + 8) };
        }),
    ];
    for (part, kernel) in kernels {
        let sentence = sentence(Launch::new([1; 3], 1), |buffers, gpu| kernel(&buffers.memory, gpu)).unwrap();
        assert!(sentence.contains(part) && sentence.contains("thread 0 of block [0, 0, 0]"), "{sentence}");
    }
}

/// What blocks of one launch read, those of the next one may write.
#[test]
fn launches_come_one_after_the_other() {
    let buffers = Buffers::new();
    let blocks = Launch::new([3, 1, 1], 32);
    for round in 0..2u32 {
        let write = |gpu: &Thread<'_>| unsafe {
            let [block, ..] = gpu.block();
            if block == round {
                gpu.store4(buffers.scratch + u64::from(gpu.thread() * 4), block);
            }
        };
        run_in_step(&buffers.memory, blocks, write);
        let read = |gpu: &Thread<'_>| unsafe {
            assert_eq!(gpu.load4(buffers.scratch + u64::from(gpu.thread() * 4)), round);
        };
        run_in_step(&buffers.memory, blocks, read);
    }
}

/// The race of a decode step in one launch: the blocks of v heads that share a key head's convolution state.
#[test]
fn races_between_blocks_through_a_state_are_found() {
    let blocks = Launch::new([6, 1, 1], 32);
    let at = |gpu: &Thread<'_>, block: u32| u64::from((block * 32 + gpu.thread()) * 4);
    // Each its own: read, then written.
    let own = move |b: &Buffers, gpu: &Thread<'_>| unsafe {
        let at = b.state + at(gpu, gpu.block()[0]);
        gpu.store4(at, gpu.load4(at) + 1);
    };
    assert_eq!(sentence(blocks, own), None);
    // All read the same, and nobody writes it.
    let same = move |b: &Buffers, gpu: &Thread<'_>| unsafe {
        let _ = gpu.load4(b.state + at(gpu, 0));
    };
    assert_eq!(sentence(blocks, same), None);
    // One writes what its sibling reads: found in any order of the two.
    let sibling = move |b: &Buffers, gpu: &Thread<'_>| unsafe {
        let [block, ..] = gpu.block();
        let at = b.state + at(gpu, block / 2);
        let old = gpu.load4(at);
        if block.is_multiple_of(2) {
            gpu.store4(at, old + 1);
        }
    };
    let mut sentences = std::collections::BTreeSet::new();
    for seed in 0..16 {
        let sentence = sentence(blocks.seed(seed), sibling).expect("a race");
        assert!(sentence.contains("another block"), "{sentence}");
        sentences.insert(if sentence.contains("has read") { "read first" } else { "written first" });
    }
    assert_eq!(sentences.len(), 2, "blocks ran in one order alone");
    found(
        blocks,
        &[
            ("another block has written", |b, gpu| unsafe {
                gpu.store4(b.state + u64::from(gpu.thread() * 4), 1)
            }),
            ("another block has written", |b, gpu| unsafe {
                gpu.store4(b.scratch + u64::from(gpu.thread() * 4), 1)
            }),
        ],
    );
    // In the next launch everybody may.
    let buffers = Buffers::new();
    for seed in 0..3 {
        run(&buffers.memory, blocks.seed(seed), |gpu| unsafe {
            let at = buffers.state + at(gpu, (gpu.block()[0] + seed as u32) % 6);
            gpu.store4(at, gpu.load4(at) + 1);
        });
    }
    assert!(buffers.memory.read(buffers.state).0.iter().take(4).eq(&[0x3f, 0x3c, 0x3c, 0x3c]));
}

#[test]
fn races_within_a_block_are_found() {
    found(
        Launch::new([1; 3], 64).shared(256),
        &[
            ("with no barrier between|nobody has written", |_, gpu| unsafe {
                gpu.store_shared4(gpu.thread() / 2 * 4, 1)
            }),
            ("with no barrier between|nobody has written", |_, gpu| unsafe {
                gpu.store_shared4(gpu.thread() * 4, 1);
                gpu.load_shared4((gpu.thread() ^ 32) * 4);
            }),
            // A read by many, and then a write by one of them.
            ("with no barrier between|nobody has written", |_, gpu| unsafe {
                gpu.store_shared4(gpu.thread() * 4, 1);
                gpu.barrier();
                gpu.load_shared4(0);
                gpu.load_shared4(4);
                gpu.store_shared4(gpu.thread() * 4, 2);
            }),
            // A shuffle is no barrier for memory.
            ("with no barrier between|nobody has written", |_, gpu| unsafe {
                gpu.store_shared4(gpu.thread() * 4, 1);
                gpu.shuffle_xor(0, 1);
                gpu.load_shared4((gpu.thread() ^ 1) * 4);
            }),
            // Two bytes of a word.
            ("with no barrier between|nobody has written", |_, gpu| unsafe {
                gpu.store_shared2(gpu.thread() * 2, 1);
                gpu.load_shared4(gpu.thread() / 2 * 4);
            }),
            ("with no barrier between|nobody has written", |b, gpu| unsafe {
                gpu.store4(b.scratch + u64::from(gpu.thread() * 4), 1);
                gpu.load4(b.scratch + u64::from((gpu.thread() ^ 32) * 4));
            }),
            ("with no barrier between|nobody has written", |b, gpu| unsafe {
                let _ = gpu.load4(b.state + u64::from((gpu.thread() ^ 32) * 4));
                gpu.store4(b.state + u64::from(gpu.thread() * 4), 1);
            }),
            // A barrier of one warp orders nothing of the other.
            ("with no barrier between|nobody has written", |_, gpu| unsafe {
                gpu.store_shared4(gpu.thread() * 4, 1);
                gpu.barrier_of(1 + gpu.thread() / 32, 32);
                gpu.load_shared4((gpu.thread() ^ 32) * 4);
            }),
            // Who goes on at a barrier knows nothing of those that wait there.
            ("with no barrier between|nobody has written", |_, gpu| unsafe {
                gpu.store_shared4(gpu.thread() * 4, 1);
                if gpu.thread() < 32 {
                    gpu.barrier_arrive(1, 64);
                    gpu.load_shared4((gpu.thread() ^ 32) * 4);
                } else {
                    gpu.barrier_of(1, 64);
                }
            }),
            ("stored already", |b, gpu| unsafe {
                gpu.store4(b.state + u64::from(gpu.thread() * 4), 1);
                gpu.barrier();
                gpu.store4(b.state + u64::from(gpu.thread() * 4), 1);
            }),
        ],
    );
    right(
        Launch::new([1; 3], 64).shared(256),
        &[
            |_, gpu| unsafe {
                gpu.store_shared4(gpu.thread() * 4, 1);
                gpu.sync_warp();
                gpu.load_shared4((gpu.thread() ^ 1) * 4);
                gpu.barrier();
                gpu.store_shared4((gpu.thread() ^ 32) * 4, 2);
                gpu.barrier_of(3, 64);
                gpu.load_shared4(gpu.thread() * 4);
            },
            // A warp hands over twice and goes on, the other one says when it has read.
            |_, gpu| unsafe {
                let place = gpu.lane() * 4;
                for value in 0..2 {
                    if gpu.thread() < 32 {
                        if value > 0 {
                            gpu.barrier_of(2, 64);
                        }
                        gpu.store_shared4(place, value);
                        gpu.barrier_arrive(1, 64);
                    } else {
                        gpu.barrier_of(1, 64);
                        assert_eq!(gpu.load_shared4(place), value);
                        if value == 0 {
                            gpu.barrier_arrive(2, 64);
                        }
                    }
                }
            },
            |b, gpu| unsafe {
                gpu.store4(b.scratch + u64::from(gpu.thread() * 4), 1);
                gpu.barrier();
                gpu.load4(b.scratch + u64::from((gpu.thread() ^ 32) * 4));
                gpu.barrier();
                gpu.store4(b.scratch + u64::from(gpu.thread() * 4), 1);
            },
        ],
    );
}

#[test]
fn wrong_uses_of_shared_memory_are_found() {
    found(
        ONE_WARP,
        &[
            ("nobody has written", |_, gpu| {
                let _ = unsafe { gpu.load_shared4(4) };
            }),
            // Half of it was.
            ("nobody has written", |_, gpu| unsafe {
                gpu.store_shared2(gpu.thread() % 2 * 4, 1);
                let _ = gpu.load_shared4(gpu.thread() % 2 * 4);
            }),
            ("outside the 64 bytes", |_, gpu| unsafe { gpu.store_shared4(64 + 4 * gpu.thread(), 1) }),
            ("outside the 64 bytes", |_, gpu| unsafe {
                gpu.store_shared16(64 + 16 * gpu.thread(), Bytes16([0; 4]))
            }),
            ("not a multiple of 16", |_, gpu| unsafe { gpu.store_shared16(8, Bytes16([0; 4])) }),
        ],
    );
    let stopped = catch_unwind(|| run(&Memory::new(), ONE_WARP, |gpu| gpu.barrier()));
    assert!(stopped.unwrap_err().downcast_ref::<&str>().unwrap().contains("run_in_step"));
}

#[test]
fn waits_in_vain_are_found() {
    found(
        Launch::new([1; 3], 64).shared(64),
        &[
            ("thread 5 of block [0, 0, 0] on: has returned", |_, gpu| {
                if gpu.thread() != 5 {
                    gpu.shuffle_xor(0, 1);
                }
            }),
            ("on: has returned", |_, gpu| {
                if gpu.thread() != 63 {
                    gpu.barrier();
                }
            }),
            // As many threads, but one warp at a barrier and one at a shuffle.
            ("wait for one another in vain", |_, gpu| {
                if gpu.thread() == 0 {
                    gpu.barrier();
                } else {
                    gpu.shuffle_xor(0, 1);
                }
            }),
            ("unlike values", |_, gpu| {
                gpu.uniform(gpu.thread() / 16);
            }),
            ("comes to", |_, gpu| {
                if gpu.thread() % 32 == 7 {
                    gpu.ballot(true);
                } else {
                    gpu.shuffle_xor(0, 1);
                }
            }),
            ("comes to", |_, gpu| {
                if gpu.thread() % 32 < 16 {
                    gpu.mma::<Bf16>([0; 4], [0; 2], [0.0; 4]);
                } else {
                    gpu.sync_warp();
                }
            }),
            ("waits at barrier 2", |_, gpu| gpu.barrier_of(1 + gpu.thread() / 32, 64)),
            ("for 64 threads, and", |_, gpu| gpu.barrier_of(1, 64 - gpu.thread() / 32 * 32)),
            ("at which nobody waits", |_, gpu| {
                if gpu.thread() < 32 {
                    gpu.barrier_arrive(1, 64);
                }
            }),
            ("has arrived there before", |_, gpu| {
                if gpu.thread() < 32 {
                    gpu.barrier_arrive(1, 64);
                    gpu.barrier_arrive(1, 64);
                } else {
                    gpu.barrier_of(1, 64);
                }
            }),
            ("others arrived for 64|threads are at barrier", |_, gpu| {
                if gpu.thread() < 32 {
                    gpu.barrier_arrive(1, 64);
                } else {
                    gpu.barrier_of(1, 32);
                }
            }),
        ],
    );
    let half_a_warp = sentence(Launch::new([1; 3], 48), |_, gpu| {
        gpu.shuffle_xor(0, 1);
    });
    assert!(half_a_warp.unwrap().contains("no multiple of 32"));
}

#[test]
fn a_launch_reads_what_the_one_before_wrote() {
    let memory = Memory::new();
    let [first, second] = [memory.output(128, Place::dense(128)), memory.output(128, Place::dense(128))];
    let launch = Launch::new([1; 3], 32);
    run(&memory, launch, |gpu| unsafe { gpu.store4(first + u64::from(gpu.thread() * 4), gpu.thread()) });
    run(&memory, launch, |gpu| unsafe {
        let value = gpu.load4(first + u64::from((gpu.thread() ^ 1) * 4));
        gpu.store4(second + u64::from(gpu.thread() * 4), value);
    });
    assert_eq!(memory.read(second).0[..4], 1u32.to_ne_bytes());
    let reads_its_own = catch_unwind(AssertUnwindSafe(|| {
        run(&memory, launch, |gpu| unsafe {
            gpu.store4(first + u64::from(gpu.thread() * 4), 0);
            let _ = gpu.load4(first + u64::from(gpu.thread() * 4));
        });
    }));
    assert!(reads_its_own.unwrap_err().downcast_ref::<String>().unwrap().contains("only written"));
}

const TWO_BLOCKS: Launch = Launch::new([2, 1, 1], 64);

/// What stops three launches of the same memory, of which the second begins early.
fn of_three(third: Launch, [first, second, last]: [Kernel; 3]) -> Option<String> {
    let buffers = Buffers::new();
    said(|| {
        run_in_step(&buffers.memory, TWO_BLOCKS, |gpu| first(&buffers, gpu));
        run_in_step(&buffers.memory, TWO_BLOCKS.early(1), |gpu| second(&buffers, gpu));
        run_in_step(&buffers.memory, third, |gpu| last(&buffers, gpu));
    })
}

/// Where a thread has four bytes to itself.
fn own(gpu: &Thread<'_>) -> u64 {
    let [block, ..] = gpu.block();
    u64::from(block * gpu.threads() + gpu.thread()) * 4
}

fn read(gpu: &Thread<'_>, at: u64) {
    let _ = unsafe { gpu.load4(at) };
}

#[test]
fn what_a_launch_before_still_does_is_found() {
    const NOTHING: Kernel = |_, gpu| gpu.wait_for_previous();
    const WRITES: Kernel = |b, gpu| unsafe { gpu.store4(b.scratch + own(gpu), 1) };
    const READS: Kernel = |b, gpu| read(gpu, b.state + own(gpu));
    const WAITS_AND_READS: Kernel = |b, gpu| {
        gpu.wait_for_previous();
        read(gpu, b.scratch + own(gpu));
    };
    let early = TWO_BLOCKS.early(1);
    let (is_written, is_read) =
        ("which a launch before has written that may still run", "which a launch before has read that may");
    let wrong: [(&str, [Kernel; 2]); 5] = [
        (
            is_written,
            [WRITES, |b, gpu| {
                read(gpu, b.scratch + own(gpu));
                gpu.wait_for_previous();
            }],
        ),
        (is_written, [WRITES, |b, gpu| unsafe { gpu.store4(b.scratch + own(gpu), 2) }]),
        (is_read, [READS, |b, gpu| unsafe { gpu.store4(b.state + own(gpu), 2) }]),
        // Which several have read.
        (
            is_read,
            [
                |b, gpu| read(gpu, b.state),
                |b, gpu| {
                    if own(gpu) == 0 {
                        unsafe { gpu.store4(b.state, 2) };
                    }
                },
            ],
        ),
        // Another thread has waited, and nothing says so.
        (
            is_written,
            [WRITES, |b, gpu| {
                if gpu.thread() == 0 {
                    gpu.wait_for_previous();
                } else {
                    read(gpu, b.scratch + own(gpu));
                }
            }],
        ),
    ];
    for (part, [first, second]) in wrong {
        let found =
            of_three(TWO_BLOCKS, [first, second, NOTHING]).unwrap_or_else(|| panic!("expected: {part}"));
        assert!(found.contains(part), "{found}\nexpected: {part}");
    }
    let right: [[Kernel; 3]; 4] = [
        [WRITES, WAITS_AND_READS, WAITS_AND_READS],
        [READS, |b, gpu| read(gpu, b.state + own(gpu)), NOTHING],
        [
            WRITES,
            |b, gpu| {
                if gpu.thread() == 0 {
                    gpu.wait_for_previous();
                }
                gpu.barrier();
                read(gpu, b.scratch + own(gpu));
            },
            NOTHING,
        ],
        // Who lets the next launch start when it has waited itself.
        [
            WRITES,
            |_, gpu| {
                gpu.wait_for_previous();
                gpu.let_next_start();
            },
            |b, gpu| read(gpu, b.scratch + own(gpu)),
        ],
    ];
    for (i, kernels) in right.into_iter().enumerate() {
        assert_eq!(of_three(early, kernels), None, "kernel {i}");
    }
    // The second launch lets the third start, and then waits for the first; or it does not wait at all.
    let lets: Kernel = |_, gpu| {
        gpu.let_next_start();
        gpu.wait_for_previous();
    };
    let reads: Kernel = |b, gpu| read(gpu, b.scratch + own(gpu));
    let waits_not: Kernel = |_, gpu| {
        let [block, ..] = gpu.block();
        if block == 0 {
            gpu.wait_for_previous();
        }
    };
    assert_eq!(of_three(early, [WRITES, lets, WAITS_AND_READS]), None);
    assert_eq!(of_three(TWO_BLOCKS, [WRITES, waits_not, reads]), None);
    for (second, third) in [(lets, reads), (waits_not, WAITS_AND_READS)] {
        assert!(of_three(early, [WRITES, second, third]).unwrap().contains(is_written));
    }
    // On another stream.
    assert!(of_three(TWO_BLOCKS.beside(2), [WRITES, NOTHING, WAITS_AND_READS]).unwrap().contains(is_written));
    assert_eq!(of_three(TWO_BLOCKS.beside(1), [WRITES, NOTHING, WAITS_AND_READS]), None);
}
