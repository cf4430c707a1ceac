//! [`AsyncCopy`] on the host: copies land when their thread waits for them, and not sooner.

use std::{collections::VecDeque, vec, vec::Vec};

use super::Thread;
use crate::gpu::AsyncCopy;

struct Copy {
    to: u32,
    from: Option<u64>,
    bytes: usize,
}

/// A thread's copies in flight.
#[derive(Default)]
pub(super) struct Copies {
    open: Vec<Copy>,
    groups: VecDeque<Vec<Copy>>,
}

impl Copies {
    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty() && self.groups.iter().all(Vec::is_empty)
    }
}

impl Thread<'_> {
    fn copy(&self, to: u32, from: u64, there: bool, bytes: usize) {
        let from = there.then_some(from);
        if let Some(from) = from {
            // Looked at now, read when it lands.
            self.read_source(from, bytes);
        }
        let mut shared = self.cluster.blocks[self.block].shared.borrow_mut();
        if let Err(why) = shared.set_out(&self.cluster.clocks.borrow(), self.id, to, bytes, bytes as u32) {
            panic!("{} copies {bytes} bytes to {to} of shared memory, {why}", self.name());
        }
        self.copies.borrow_mut().open.push(Copy { to, from, bytes });
    }

    fn read_source(&self, from: u64, bytes: usize) -> Vec<u8> {
        let mut value = vec![0; bytes];
        let memory = self.cluster.memory;
        if let Err(why) = memory.load(&self.cluster.who(self.id), from, bytes as u64, &mut value) {
            self.wrong("copies", bytes, from, &why);
        }
        value
    }
}

impl AsyncCopy for Thread<'_> {
    unsafe fn copy16(&self, to: u32, from: u64, there: bool) {
        self.copy(to, from, there, 16);
    }

    unsafe fn copy4(&self, to: u32, from: u64, there: bool) {
        self.copy(to, from, there, 4);
    }

    fn commit_copies(&self) {
        let mut copies = self.copies.borrow_mut();
        let group = std::mem::take(&mut copies.open);
        copies.groups.push_back(group);
    }

    fn wait_copies<const LEFT: u32>(&self) {
        let mut copies = self.copies.borrow_mut();
        while copies.groups.len() > LEFT as usize {
            for Copy { to, from, bytes } in copies.groups.pop_front().into_iter().flatten() {
                let value = from.map_or_else(|| vec![0; bytes], |from| self.read_source(from, bytes));
                let mut shared = self.cluster.blocks[self.block].shared.borrow_mut();
                shared.land(&self.cluster.clocks.borrow(), self.id, to, &value);
            }
        }
    }
}
