//! [`Hopper`] on the host.

use std::{collections::VecDeque, vec, vec::Vec};

use super::{
    Act, Thread,
    schedule::{Flight, Wait},
    sixteen,
};
use crate::gpu::{Bytes16, EMPTY, Hopper};

struct Store {
    to: u64,
    from: u32,
    value: Vec<u8>,
}

/// A thread's bulk stores that are not done.
#[derive(Default)]
pub(super) struct Stores {
    open: Vec<Store>,
    groups: VecDeque<Vec<Store>>,
}

impl Stores {
    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty() && self.groups.iter().all(Vec::is_empty)
    }
}

impl Thread<'_> {
    fn wrong_mbarrier(&self, at: u32, why: &str) -> ! {
        panic!("{} uses an mbarrier at {at} of shared memory, {why}", self.name())
    }

    fn arrive(&self, at: u32, bytes: u32) {
        let mut shared = self.cluster.blocks[self.block].shared.borrow_mut();
        if let Err(why) = shared.arrive(&mut self.cluster.clocks.borrow_mut(), self.id, at, bytes) {
            self.wrong_mbarrier(at, &why)
        }
    }

    /// A block of the cluster, with threads that still run.
    fn of_cluster(&self, rank: u32) -> usize {
        let block = rank as usize;
        assert!(block < self.cluster.blocks.len(), "{} asks for block {rank} of its cluster", self.name());
        let threads = self.cluster.launch.threads as usize;
        let running = self.cluster.running.borrow()[block * threads..][..threads].contains(&true);
        assert!(
            running,
            "{} touches the shared memory of block {rank} of its cluster, which has ended",
            self.name()
        );
        block
    }
}

impl Hopper for Thread<'_> {
    unsafe fn mbarrier_init(&self, at: u32, arrivals: u32) {
        let mut shared = self.cluster.blocks[self.block].shared.borrow_mut();
        if let Err(why) = shared.mbarrier_init(&self.cluster.clocks.borrow(), self.id, at, arrivals) {
            self.wrong_mbarrier(at, &why)
        }
    }

    fn mbarrier_fence(&self) {
        self.cluster.clocks.borrow_mut().fence(self.id);
    }

    unsafe fn mbarrier_arrive(&self, at: u32) {
        self.arrive(at, 0);
    }

    unsafe fn mbarrier_arrive_expect(&self, at: u32, bytes: u32) {
        self.arrive(at, bytes);
    }

    unsafe fn mbarrier_wait(&self, at: u32, parity: u32) {
        assert!(parity < 2, "{} waits for parity {parity}", self.name());
        let there = {
            let mut shared = self.cluster.blocks[self.block].shared.borrow_mut();
            shared.has_mbarrier(&self.cluster.clocks.borrow(), self.id, at)
        };
        match there {
            Ok(()) => self.wait(Wait::Mbarrier { at, parity }),
            Err(why) => self.wrong_mbarrier(at, &why),
        }
    }

    unsafe fn bulk_copy(&self, to: u32, from: u64, bytes: u32, mbarrier: u32) {
        // Looked at now, read when it lands.
        let mut value = vec![0; bytes as usize];
        let known = self.cluster.clocks.borrow().sum_of(self.id);
        if let Err(why) = self.cluster.engine_reads(&known, from, &mut value) {
            self.wrong("copies", bytes as usize, from, &why);
        }
        let mut shared = self.cluster.blocks[self.block].shared.borrow_mut();
        let clocks = self.cluster.clocks.borrow();
        if let Err(why) = shared.has_mbarrier(&clocks, self.id, mbarrier) {
            self.wrong_mbarrier(mbarrier, &why)
        }
        assert!(
            bytes > 0 && bytes.is_multiple_of(16),
            "{} copies {bytes} bytes, no multiple of 16",
            self.name()
        );
        if let Err(why) = shared.set_out(&clocks, self.id, to, bytes as usize, 16) {
            self.wrong_shared(Act::Store, bytes as usize, to, &why)
        }
        let flight = Flight { block: self.block, thread: self.id, to, from, bytes, mbarrier, known };
        self.cluster.flights.borrow_mut().push(flight);
    }

    fn bring_bulk_near(&self, from: u64, bytes: u32) {
        assert!(
            bytes > 0 && (from | u64::from(bytes)).is_multiple_of(16),
            "{} asks for {bytes} bytes at {from:#x}, no multiples of 16",
            self.name()
        );
    }

    unsafe fn bulk_store(&self, to: u64, from: u32, bytes: u32) {
        assert!(
            bytes > 0 && bytes.is_multiple_of(16),
            "{} stores {bytes} bytes, no multiple of 16",
            self.name()
        );
        assert!(
            from.is_multiple_of(16),
            "{} stores from {from} of shared memory, no multiple of 16",
            self.name()
        );
        let mut value = vec![0; bytes as usize];
        let mut shared = self.cluster.blocks[self.block].shared.borrow_mut();
        if let Err(why) = shared.lend(&self.cluster.clocks.borrow(), self.id, from, &mut value) {
            self.wrong_shared(Act::Load, bytes as usize, from, &why)
        }
        self.stores.borrow_mut().open.push(Store { to, from, value });
    }

    fn bulk_stores_commit(&self) {
        let mut stores = self.stores.borrow_mut();
        let group = std::mem::take(&mut stores.open);
        stores.groups.push_back(group);
    }

    fn bulk_stores_wait<const LEFT: u32>(&self) {
        let mut stores = self.stores.borrow_mut();
        while stores.groups.len() > LEFT as usize {
            for Store { to, from, value } in stores.groups.pop_front().into_iter().flatten() {
                self.cluster.blocks[self.block].shared.borrow_mut().give_back(from, value.len());
                if let Err(why) = self.cluster.memory.store(&self.cluster.who(self.id), to, 16, &value) {
                    self.wrong("stores", value.len(), to, &why);
                }
            }
        }
    }

    fn fence_async(&self) {
        self.cluster.clocks.borrow_mut().fence(self.id);
    }

    fn cluster_rank(&self) -> u32 {
        self.block as u32
    }

    fn cluster_blocks(&self) -> u32 {
        self.cluster.launch.cluster
    }

    fn cluster_arrive(&self) {
        self.cluster.arrive(self.id, false);
    }

    fn cluster_arrive_relaxed(&self) {
        self.cluster.arrive(self.id, true);
    }

    fn cluster_wait(&self) {
        self.cluster.expect_arrived(self.id);
        self.wait(Wait::Cluster);
        // Where the launch names no clusters, the machine's code has the block's barrier in place of it.
        if self.cluster_blocks() == 1 {
            self.wait(Wait::Barrier { number: 0, threads: 0 });
        }
    }

    unsafe fn load_cluster4(&self, at: u32, rank: u32) -> u32 {
        u32::from_ne_bytes(self.load_shared(self.of_cluster(rank), at))
    }

    unsafe fn load_cluster16(&self, at: u32, rank: u32) -> Bytes16 {
        sixteen(self.load_shared(self.of_cluster(rank), at))
    }

    unsafe fn store_cluster4(&self, at: u32, rank: u32, value: u32) {
        self.store_shared(self.of_cluster(rank), at, value.to_ne_bytes());
    }

    unsafe fn send4(&self, at: u32, rank: u32, value: u32) {
        assert!(value != EMPTY, "{} sends what stands for nothing", self.name());
        let mut shared = self.cluster.blocks[self.of_cluster(rank)].shared.borrow_mut();
        if let Err(why) = shared.send(&self.cluster.clocks.borrow(), self.id, at, value) {
            self.wrong_shared(Act::Store, 4, at, &why)
        }
    }

    unsafe fn receive16(&self, at: u32) -> Bytes16 {
        self.wait(Wait::Words { at });
        let mut value = [0; 16];
        let mut shared = self.cluster.blocks[self.block].shared.borrow_mut();
        if let Err(why) = shared.load(&self.cluster.clocks.borrow(), self.id, at, &mut value) {
            self.wrong_shared(Act::Load, 16, at, &why)
        }
        sixteen(value)
    }
}
