//! The cases on the emulated GPU, which checks every access.

use gdn_kernels::{
    emulator::{self, Memory, Place},
    split,
};

use super::{Case, Tensor, table, what};
use crate::{
    cuda::split::{Job, Profile},
    split::{Direction, Plan},
    view::{DeviceAddress, Geometry, View, from_order},
};

/// The tensors at these addresses.
pub(super) fn raw(tensors: &[Tensor; 6], addresses: [u64; 6]) -> [View<DeviceAddress>; 6] {
    std::array::from_fn(|i| {
        let Tensor { element_size, num_rows, features, shape, .. } = tensors[i];
        let geometry = Geometry::new(num_rows, features, features + shape.padding, element_size).unwrap();
        View { address: DeviceAddress(addresses[i]), geometry }
    })
}

/// Runs a case on the emulated GPU and holds it to the oracle.
fn emulate(case: &Case, tensors: &[Tensor; 6], direction: Direction, profile: Profile) {
    let memory = Memory::new();
    let addresses: [u64; 6] = std::array::from_fn(|i| {
        let tensor = &tensors[i];
        let place = Place {
            misalignment: tensor.shape.misalignment as u64,
            row_bytes: tensor.row_bytes(),
            row_stride: tensor.row_stride() as u64,
        };
        if direction.written().contains(&i) {
            memory.output(tensor.rows.len(), place)
        } else {
            memory.input(&tensor.rows, place)
        }
    });
    let views = raw(tensors, addresses);
    let (packed, unpacked) = from_order(views.each_ref());
    let plan = Plan::new(&case.layout(), direction, packed, unpacked).unwrap();
    let Some(job) = Job::new(&plan, profile).unwrap() else {
        assert_eq!(case.num_rows, 0, "{case:?}: nothing to launch");
        return;
    };
    let [x, y] = job.shape.blocks;
    let launch = emulator::Launch::new([x, y, 1], job.shape.threads);
    // SAFETY: the emulator checks every access.
    emulator::run(&memory, launch, |gpu| unsafe {
        match (job.wide, job.shape.rows, job.merge) {
            (true, 1, false) => split::run::<true, false, 1>(gpu, &job.args),
            (true, 2, false) => split::run::<true, false, 2>(gpu, &job.args),
            (false, 4, false) => split::run::<false, false, 4>(gpu, &job.args),
            (true, 1, true) => split::run::<true, true, 1>(gpu, &job.args),
            (true, 2, true) => split::run::<true, true, 2>(gpu, &job.args),
            (false, 4, true) => split::run::<false, true, 4>(gpu, &job.args),
            other => panic!("there is no kernel for {other:?}"),
        }
    });
    for i in direction.written() {
        let (rows, stored) = memory.read(addresses[i]);
        assert!(stored.iter().all(|times| *times == 1), "{}: bytes were left out", what(case, direction, i));
        assert!(rows == tensors[i].rows, "{}: differs from the oracle", what(case, direction, i));
    }
}

/// A device that looks smaller than it is takes other kernels, and one that takes fewer blocks, slices.
pub(super) fn profiles() -> [Profile; 3] {
    let [one, h200] = [1, 132].map(Profile::of);
    [one, h200, Profile { most_blocks: 60_000, ..one }]
}

#[test]
fn on_the_emulator() {
    for case in table() {
        let tensors = case.tensors();
        for direction in Direction::ALL {
            for profile in profiles() {
                // One grid in one piece and one in slices is enough of many rows.
                if case.num_rows < 1000 || profile.multiprocessors == 1 {
                    emulate(&case, &tensors, direction, profile);
                }
            }
        }
    }
}

#[test]
fn every_kernel_is_in_the_table() {
    let mut seen = std::collections::BTreeSet::new();
    let mut sliced = false;
    for case in table() {
        let layout = case.layout();
        let tensors = case.shapes();
        let addresses: [u64; 6] =
            std::array::from_fn(|i| ((i as u64 + 1) << 40) + case.shapes[i].misalignment as u64);
        let views = raw(&tensors, addresses);
        let (packed, unpacked) = from_order(views.each_ref());
        let plan = Plan::new(&layout, Direction::Split, packed, unpacked).unwrap();
        for profile in profiles() {
            if let Some(job) = Job::new(&plan, profile).unwrap() {
                seen.insert((job.wide, job.shape.rows, job.args.qkvz_word, job.args.ba_word));
                sliced |= job.shape.blocks[1] > 1;
            }
        }
    }
    assert!(sliced);
    for rows in [1, 2] {
        assert!(seen.iter().any(|s| (s.0, s.1) == (true, rows)), "16 bytes wide, {rows} rows: {seen:?}");
    }
    for word in [1, 2, 4, 8, 16] {
        assert!(seen.iter().any(|s| s.2 == word), "qkvz by {word} bytes: {seen:?}");
        assert!(seen.iter().any(|s| s.3 == word), "ba by {word} bytes: {seen:?}");
    }
}
