//! The emulator: what a kernel may do works as on the GPU, and what it must not do is found.
#![cfg(feature = "emulator")]
// Every `unsafe` here hands a kernel's access to the emulator, which checks it.
#![allow(clippy::undocumented_unsafe_blocks)]

use std::panic::{AssertUnwindSafe, catch_unwind};

use gdn_kernels::{
    emulator::{Launch, Memory, Place, Thread, run, run_in_step},
    gpu::{Gpu, Warp},
    probe,
};

const ONE_WARP: Launch = Launch { blocks: [1, 1, 1], threads: 32, shared_bytes: 64 };

/// The sentence that a kernel is stopped with.
fn complaint(launch: Launch, kernel: impl Fn(&Memory, &Thread<'_>) + Copy) -> String {
    let memory = Memory::new();
    let stopped = catch_unwind(AssertUnwindSafe(|| run_in_step(&memory, launch, |gpu| kernel(&memory, gpu))));
    let payload = stopped.expect_err("the kernel is wrong");
    payload
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| payload.downcast_ref::<&str>().map(|s| (*s).to_owned()))
        .unwrap()
}

#[test]
fn barriers_shuffles_and_shared_memory() {
    for (blocks, threads) in [(1, 32), (3, 64), (2, 1024)] {
        let words: Vec<u32> = (0..blocks * threads).map(|i| i * i + 7).collect();
        let memory = Memory::new();
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let from = memory.input(&bytes, Place::dense(bytes.len()));
        let written = (blocks * (threads + 1) * 4) as usize;
        let to = memory.output(written, Place::dense(written));
        let launch = Launch { blocks: [blocks, 1, 1], threads, shared_bytes: threads / 32 * 4 };
        // SAFETY: the emulator checks every access.
        run_in_step(&memory, launch, |gpu| unsafe {
            probe::block_sums(gpu, &probe::Args { from, to, count: 0 })
        });
        let (bytes, stored) = memory.read(to);
        assert!(stored.iter().all(|times| *times == 1));
        let got: Vec<u32> =
            bytes.chunks(4).map(|four| u32::from_ne_bytes(four.try_into().unwrap())).collect();
        assert_eq!(got, probe::expected(&words, threads as usize));
    }
}

type Kernel = fn(&Memory, &Thread<'_>);

#[test]
fn wrong_accesses_are_found() {
    let kernels: [(&str, Kernel); 8] = [
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
        ("into an input", |m, gpu| unsafe { gpu.store1(m.input(&[0; 8], Place::dense(8)), 1) }),
        ("stored already", |m, gpu| unsafe {
            let at = m.output(8, Place::dense(8));
            gpu.store4(at, 1);
            gpu.store2(at + 2, 1);
        }),
        ("8 bytes into a buffer of 8 bytes", |m, gpu| {
            let _ = unsafe { gpu.load1(m.input(&[0; 8], Place::dense(8)) + 8) };
        }),
    ];
    for (part, kernel) in kernels {
        let complaint = complaint(Launch { threads: 1, ..ONE_WARP }, kernel);
        assert!(complaint.contains(part) && complaint.contains("thread 0 of block [0, 0, 0]"), "{complaint}");
    }
}

#[test]
fn wrong_company_is_found() {
    let races = complaint(ONE_WARP, |_, gpu| unsafe {
        gpu.store_shared4(gpu.thread() / 2 * 4, 1);
    });
    assert!(races.contains("which another one uses"), "{races}");
    let unordered = complaint(ONE_WARP, |_, gpu| unsafe {
        if gpu.thread() == 0 {
            gpu.store_shared4(0, 1);
        }
        gpu.load_shared4(0);
    });
    assert!(unordered.contains("race for word 0"), "{unordered}");
    let unwritten = complaint(ONE_WARP, |_, gpu| {
        let _ = unsafe { gpu.load_shared4(4) };
    });
    assert!(unwritten.contains("nobody has written"), "{unwritten}");
    let outside = complaint(ONE_WARP, |_, gpu| unsafe { gpu.store_shared4(64 + 4 * gpu.thread(), 1) });
    assert!(outside.contains("word 64 of 64 bytes"), "{outside}");
    let alone = complaint(ONE_WARP, |_, gpu| {
        if gpu.thread() != 5 {
            gpu.shuffle_xor(0, 1);
        }
    });
    assert!(alone.contains("lane 5"), "{alone}");
}

#[test]
fn threads_that_wait_need_to_take_turns() {
    let stopped = catch_unwind(|| run(&Memory::new(), ONE_WARP, |gpu| gpu.barrier()));
    assert!(stopped.unwrap_err().downcast_ref::<String>().unwrap().contains("run_in_step"));
}
