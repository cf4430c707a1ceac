//! The capabilities on the host: whole grids, thread by thread, every access checked.
//!
//! Kernels run as they are. What they do wrong stops the test with a sentence that names the thread and the
//! address:
//!
//! - an access outside every buffer or outside shared memory, at a wrong alignment, or to memory nobody
//!   wrote;
//! - a second store to a byte of an output or of a state;
//! - a byte of a state that one block writes and another one touches: blocks run in any order, here in a
//!   random one that [`Launch::seed`] chooses;
//! - a race: two threads touch the same memory, one of them writes, and no barrier orders the two;
//! - a touch of memory that an earlier launch writes, or a write to what it reads, where that launch may still run:
//!   beside this one ([`Launch::beside`]), or until [`Gpu::wait_for_previous`] ([`Launch::early`]);
//! - a touch of memory to which an asynchronous copy is on its way, or a write to memory that a product or a
//!   bulk store still reads; copies land as late as the waits allow;
//! - a barrier, shuffle, product or mbarrier that threads wait at in vain.
//!
//! Buffers know which of their bytes were stored to, so that a test can tell what a kernel left out.
//!
//! Each thread is a coroutine with its own stack, and goes on until it waits. Everything that a warp or four
//! of them do together is one mechanism: all bring their registers, a function runs over all of them, all go
//! on.
//!
//! What the hardware does and this does not show: time, the order of stores of different threads to different
//! places, and how far a block may run ahead of another one.

mod async_copy;
mod hopper;
mod logistic;
mod memory;
mod order;
mod schedule;
mod shared;
pub mod sums;
mod tensor_core;
mod warp;
mod wgmma;

use core::cell::RefCell;
use std::vec::Vec;

use corosensei::Yielder;
use gdn_math::element;

pub use logistic::Logistic;
pub use memory::{Memory, POISON, Place};

use self::{
    async_copy::Copies,
    hopper::Stores,
    schedule::{Cluster, Random, Wait},
    shared::Act,
};
use super::{Bytes16, Gpu};

const WARP: usize = 32;

/// A grid to run.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks: x, y, z.
    pub blocks: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory of a block.
    pub shared_bytes: u32,
    /// Blocks of a cluster, neighbours along x.
    pub cluster: u32,
    /// Chooses the order in which blocks run and threads take turns.
    pub seed: u64,
    /// See [`Launch::beside`].
    pub beside: u64,
    /// See [`Launch::early`].
    pub early: usize,
}

impl Launch {
    /// Without shared memory and clusters.
    pub const fn new(blocks: [u32; 3], threads: u32) -> Self {
        Self { blocks, threads, shared_bytes: 0, cluster: 1, seed: 0, beside: 0, early: 0 }
    }

    /// With so much shared memory a block.
    #[must_use]
    pub const fn shared(self, shared_bytes: u32) -> Self {
        Self { shared_bytes, ..self }
    }

    /// With so many blocks a cluster.
    #[must_use]
    pub const fn cluster(self, cluster: u32) -> Self {
        Self { cluster, ..self }
    }

    /// In another order.
    #[must_use]
    pub const fn seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// While launches before it may still run, as on another stream: bit i is the launch i + 1 before. What they did
    /// to states and scratch is followed as far as nobody has touched it since.
    #[must_use]
    pub const fn beside(self, beside: u64) -> Self {
        Self { beside, ..self }
    }

    /// Early: the launch so many before, which is the one before on its stream, lets it start
    /// ([`Gpu::let_next_start`]). What that one did is done for a thread that has waited
    /// ([`Gpu::wait_for_previous`]), or knows of one that has; so is what it has waited for itself. 0: not early.
    #[must_use]
    pub const fn early(self, early: usize) -> Self {
        Self { early, ..self }
    }

    /// Runs every cluster, in a random order.
    fn each_cluster(&self, memory: &Memory, mut act: impl FnMut(&Cluster<'_>)) {
        let Self { blocks: [x, y, z], threads, shared_bytes, cluster, .. } = *self;
        assert!((1..=1024).contains(&threads), "{threads} threads in a block, there can be 1 to 1024");
        assert!(x > 0 && y > 0 && z > 0, "an empty grid is refused by the driver: {:?}", self.blocks);
        assert!(x < 1 << 31 && y <= 65_535 && z <= 65_535, "too large a grid: {:?}", self.blocks);
        assert!(shared_bytes <= 227 << 10, "{shared_bytes} bytes of shared memory, there are 227 KiB");
        assert!((1..=8).contains(&cluster), "{cluster} blocks in a cluster, there can be 1 to 8");
        assert!(x.is_multiple_of(cluster), "{x} blocks are not made of clusters of {cluster}");
        memory.begin(self.beside, self.early);
        let across = u64::from(x / cluster);
        let mut order: Vec<u64> = (0..across * u64::from(y) * u64::from(z)).collect();
        Random::new(self.seed).shuffle(&mut order);
        let mut state = Cluster::new(memory, self);
        for i in order {
            let (row, i) = (i / across, i % across);
            let (z, y) = (row / u64::from(y), row % u64::from(y));
            state.restart([i as u32 * cluster, y as u32, z as u32]);
            act(&state);
            state.ends();
        }
    }
}

/// One thread of the grid, as its kernel sees it.
pub struct Thread<'a> {
    cluster: &'a Cluster<'a>,
    /// Within the cluster.
    id: usize,
    block: usize,
    thread: u32,
    copies: RefCell<Copies>,
    stores: RefCell<Stores>,
    /// How it gives way to the others; `None` in a grid whose threads run one after the other.
    yielder: Option<&'a Yielder<(), Wait>>,
}

/// Runs a kernel whose threads do not wait for one another over a whole grid, thread after thread.
///
/// # Panics
/// At the first thing a kernel does wrong, and where `launch` is none that a driver takes.
pub fn run(memory: &Memory, launch: Launch, kernel: impl Fn(&Thread<'_>)) {
    launch.each_cluster(memory, |cluster| {
        for id in 0..(launch.threads * launch.cluster) as usize {
            let thread = Thread::new(cluster, id, None);
            kernel(&thread);
            thread.ends();
        }
    });
}

/// Runs any kernel over a whole grid, the threads of a cluster in turns.
///
/// # Panics
/// As [`run`], and where threads wait for one another in vain.
pub fn run_in_step(memory: &Memory, launch: Launch, kernel: impl Fn(&Thread<'_>) + Copy) {
    launch.each_cluster(memory, |cluster| cluster.run(&kernel));
}

impl<'a> Thread<'a> {
    fn new(cluster: &'a Cluster<'a>, id: usize, yielder: Option<&'a Yielder<(), Wait>>) -> Self {
        let threads = cluster.launch.threads as usize;
        let (block, thread) = (id / threads, (id % threads) as u32);
        Self { cluster, id, block, thread, copies: RefCell::default(), stores: RefCell::default(), yielder }
    }

    /// The kernel has returned.
    fn ends(&self) {
        let waited = self.copies.borrow().is_empty() && self.stores.borrow().is_empty();
        assert!(
            waited,
            "{} has returned, and copies of it are in flight that it has not waited for",
            self.name()
        );
    }

    fn name(&self) -> std::string::String {
        self.cluster.name(self.id)
    }

    fn wrong(&self, what: &str, bytes: usize, at: u64, why: &str) -> ! {
        let nearest = self.cluster.memory.nearest(at);
        panic!("{} {what} {bytes} bytes at {at:#x}{nearest}: {why}", self.name())
    }

    fn load<const BYTES: usize>(&self, at: u64) -> [u8; BYTES] {
        let mut value = [0; BYTES];
        match self.cluster.memory.load(&self.cluster.who(self.id), at, BYTES as u64, &mut value) {
            Ok(()) => value,
            Err(why) => self.wrong("loads", BYTES, at, &why),
        }
    }

    fn store<const BYTES: usize>(&self, at: u64, value: [u8; BYTES]) {
        if let Err(why) = self.cluster.memory.store(&self.cluster.who(self.id), at, BYTES as u64, &value) {
            self.wrong("stores", BYTES, at, &why)
        }
    }

    fn wrong_shared(&self, act: Act, bytes: usize, at: u32, why: &str) -> ! {
        let what = if act == Act::Load { "loads" } else { "stores" };
        panic!("{} {what} {bytes} bytes at {at} of shared memory, {why}", self.name())
    }

    fn load_shared<const BYTES: usize>(&self, block: usize, at: u32) -> [u8; BYTES] {
        let mut value = [0; BYTES];
        let mut shared = self.cluster.blocks[block].shared.borrow_mut();
        if let Err(why) = shared.load(&self.cluster.clocks.borrow(), self.id, at, &mut value) {
            self.wrong_shared(Act::Load, BYTES, at, &why)
        }
        value
    }

    fn store_shared<const BYTES: usize>(&self, block: usize, at: u32, value: [u8; BYTES]) {
        let mut shared = self.cluster.blocks[block].shared.borrow_mut();
        if let Err(why) = shared.store(&self.cluster.clocks.borrow(), self.id, at, &value) {
            self.wrong_shared(Act::Store, BYTES, at, &why)
        }
    }
}

impl Gpu for Thread<'_> {
    fn thread(&self) -> u32 {
        self.thread
    }

    fn threads(&self) -> u32 {
        self.cluster.launch.threads
    }

    fn block(&self) -> [u32; 3] {
        self.cluster.blocks[self.block].index
    }

    fn blocks(&self) -> [u32; 3] {
        self.cluster.launch.blocks
    }

    fn barrier(&self) {
        self.wait(Wait::Barrier { number: 0, threads: 0 });
    }

    fn barrier_of(&self, number: u32, threads: u32) {
        assert!((1..16).contains(&number), "{} waits at barrier {number}, there are 1 to 15", self.name());
        self.wait(Wait::Barrier { number, threads });
    }

    fn barrier_arrive(&self, number: u32, threads: u32) {
        assert!((1..16).contains(&number), "{} arrives at barrier {number}, there are 1 to 15", self.name());
        self.cluster.arrive_at(self.id, number, threads);
    }

    fn let_next_start(&self) {
        let Cluster { memory, clocks, waits, .. } = self.cluster;
        if !waits.borrow().known_to(&clocks.borrow(), self.id) {
            memory.has_not_waited(false);
        }
    }

    fn wait_for_previous(&self) {
        self.cluster.waits.borrow_mut().add(&self.cluster.clocks.borrow(), self.id);
    }

    fn f32_of_f16(&self, bits: u16) -> f32 {
        element::f32_of_f16(bits)
    }

    fn f16_pair(&self, low: f32, high: f32) -> u32 {
        pair(low, high, element::f16_of_f32)
    }

    fn bf16_pair(&self, low: f32, high: f32) -> u32 {
        pair(low, high, element::bf16_of_f32)
    }

    fn logistic(&self, place: f32) -> f32 {
        self.cluster.memory.logistic.at(place)
    }

    fn block_anew(&self) -> u32 {
        let [block, ..] = self.block();
        block
    }

    fn bring_near(&self, _address: u64) {}

    unsafe fn peek4(&self, address: u64) -> u32 {
        u32::from_ne_bytes(self.load(address))
    }

    fn unforeseen(&self, number: u64) -> u64 {
        number
    }

    unsafe fn load16(&self, address: u64) -> Bytes16 {
        sixteen(self.load(address))
    }

    unsafe fn load8(&self, address: u64) -> u64 {
        u64::from_ne_bytes(self.load(address))
    }

    unsafe fn load4(&self, address: u64) -> u32 {
        u32::from_ne_bytes(self.load(address))
    }

    unsafe fn load2(&self, address: u64) -> u16 {
        u16::from_ne_bytes(self.load(address))
    }

    unsafe fn load1(&self, address: u64) -> u8 {
        let [byte] = self.load(address);
        byte
    }

    unsafe fn load4_or_2(&self, address: u64, four: bool) -> u32 {
        if four {
            u32::from_ne_bytes(self.load(address))
        } else {
            u32::from(u16::from_ne_bytes(self.load(address)))
        }
    }

    unsafe fn store4_or_2(&self, address: u64, value: u32, four: bool) {
        if four {
            self.store(address, value.to_ne_bytes());
        } else {
            self.store(address, (value as u16).to_ne_bytes());
        }
    }

    unsafe fn store16(&self, address: u64, value: Bytes16) {
        self.store(address, bytes(value));
    }

    unsafe fn store8(&self, address: u64, value: u64) {
        self.store(address, value.to_ne_bytes());
    }

    unsafe fn store4(&self, address: u64, value: u32) {
        self.store(address, value.to_ne_bytes());
    }

    unsafe fn store2(&self, address: u64, value: u16) {
        self.store(address, value.to_ne_bytes());
    }

    unsafe fn store1(&self, address: u64, value: u8) {
        self.store(address, [value]);
    }

    unsafe fn load_shared16(&self, at: u32) -> Bytes16 {
        sixteen(self.load_shared(self.block, at))
    }

    unsafe fn store_shared16(&self, at: u32, value: Bytes16) {
        self.store_shared(self.block, at, bytes(value));
    }

    unsafe fn load_shared8(&self, at: u32) -> u64 {
        u64::from_ne_bytes(self.load_shared(self.block, at))
    }

    unsafe fn store_shared8(&self, at: u32, value: u64) {
        self.store_shared(self.block, at, value.to_ne_bytes());
    }

    unsafe fn load_shared4(&self, at: u32) -> u32 {
        u32::from_ne_bytes(self.load_shared(self.block, at))
    }

    unsafe fn store_shared4(&self, at: u32, value: u32) {
        self.store_shared(self.block, at, value.to_ne_bytes());
    }

    unsafe fn load_shared2(&self, at: u32) -> u16 {
        u16::from_ne_bytes(self.load_shared(self.block, at))
    }

    unsafe fn store_shared2(&self, at: u32, value: u16) {
        self.store_shared(self.block, at, value.to_ne_bytes());
    }
}

/// Two numbers as 16 bits each. A NaN is what the machine makes of it.
fn pair(low: f32, high: f32, narrow: fn(f32) -> u16) -> u32 {
    let [low, high] = [low, high].map(|x| if x.is_nan() { 0x7fff } else { u32::from(narrow(x)) });
    low | high << 16
}

fn sixteen(bytes: [u8; 16]) -> Bytes16 {
    Bytes16(core::array::from_fn(|i| u32::from_ne_bytes([0, 1, 2, 3].map(|j| bytes[4 * i + j]))))
}

fn bytes(Bytes16(words): Bytes16) -> [u8; 16] {
    let mut bytes = [0; 16];
    for (four, word) in bytes.chunks_mut(4).zip(words) {
        four.copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}
