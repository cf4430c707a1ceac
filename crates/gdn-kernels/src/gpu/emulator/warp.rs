//! [`Warp`] on the host.

use super::{Thread, WARP, schedule::Company};
use crate::gpu::Warp;

/// The lane whose value each lane gets.
#[derive(Clone, Copy)]
enum From {
    Xor(u32),
    Lane(u32),
    Up(u32),
    Down(u32),
}

impl From {
    fn of(self, lane: usize) -> usize {
        let other = match self {
            Self::Xor(mask) => lane ^ mask as usize,
            Self::Lane(other) => other as usize % WARP,
            Self::Up(distance) => lane.wrapping_sub(distance as usize),
            Self::Down(distance) => lane + distance as usize,
        };
        if other < WARP { other } else { lane }
    }
}

impl Thread<'_> {
    fn shuffle_from(&self, value: u32, from: From) -> u32 {
        self.collective(WARP, "a shuffle", (value, from), |_, registers| {
            let values: [u32; WARP] = core::array::from_fn(|lane| registers[lane].0);
            for (lane, (value, from)) in registers.iter_mut().map(|registers| &mut **registers).enumerate() {
                *value = values[from.of(lane)];
            }
        })
        .0
    }
}

impl Warp for Thread<'_> {
    fn shuffle_xor(&self, value: u32, mask: u32) -> u32 {
        self.shuffle_from(value, From::Xor(mask))
    }

    fn shuffle(&self, value: u32, lane: u32) -> u32 {
        self.shuffle_from(value, From::Lane(lane))
    }

    fn shuffle_up(&self, value: u32, distance: u32) -> u32 {
        self.shuffle_from(value, From::Up(distance))
    }

    fn shuffle_down(&self, value: u32, distance: u32) -> u32 {
        self.shuffle_from(value, From::Down(distance))
    }

    fn uniform(&self, value: u32) -> u32 {
        self.collective(WARP, "uniform", value, |_, registers| {
            let differs = registers.iter().any(|value| **value != *registers[0]);
            assert!(!differs, "the lanes of a warp have unlike values of what is said to be uniform");
        })
    }

    fn ballot(&self, yes: bool) -> u32 {
        self.collective(WARP, "a ballot", u32::from(yes), |_, registers| {
            let all = registers.iter().enumerate().fold(0, |all, (lane, yes)| all | **yes << lane);
            registers.iter_mut().for_each(|yes| **yes = all);
        })
    }

    fn sync_warp(&self) {
        self.collective(WARP, "sync_warp", (), |&Company { cluster, first, .. }, registers| {
            let members: std::vec::Vec<usize> = (first..first + registers.len()).collect();
            cluster.clocks.borrow_mut().meet(&members);
        });
    }
}
