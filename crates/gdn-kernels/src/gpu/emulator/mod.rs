//! [`Gpu`] on the host: whole grids, thread by thread, every access checked.
//!
//! Kernels run as they are. An access outside every buffer, at a wrong alignment, to memory nobody wrote, or a store to a byte that
//! another thread has stored to already, stops the test with a sentence that names the thread and the address. Buffers know which of
//! their bytes were stored to, so that a test can tell what a kernel left out.
//!
//! Each thread is a coroutine with its own stack. Those of a block take turns, from one barrier or shuffle to the next; a thread that
//! does not come to a barrier or shuffle the others wait at is reported, and so are shared words that two threads touch without a
//! barrier between.

extern crate std;

use core::cell::{Cell, RefCell};
use std::{format, string::String, vec, vec::Vec};

use corosensei::{Coroutine, CoroutineResult, Yielder, stack::DefaultStack};

use super::{Bytes16, Gpu, Warp};

/// What fills a buffer before anything is stored to it.
pub const POISON: u8 = 0xA5;
/// No two buffers are nearer to one another than this.
const GAP: u64 = 1 << 20;
const WARP: usize = 32;
const STACK_BYTES: usize = 64 << 10;

/// A grid to run.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks: x, y, z.
    pub blocks: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory of a block.
    pub shared_bytes: u32,
}

/// Global memory: buffers at addresses of their own, which are no addresses of the host.
#[derive(Default)]
pub struct Memory {
    buffers: RefCell<Vec<Buffer>>,
    last: Cell<usize>,
}

/// Rows of bytes, and nothing between them: the gap between two rows belongs to nobody and takes no memory.
struct Buffer {
    address: u64,
    row_bytes: usize,
    row_stride: u64,
    bytes: Vec<u8>,
    /// One a byte: how often it was stored to.
    stored: Vec<u8>,
    /// Whether it is there to be read. Else what was stored can be read.
    input: bool,
}

/// How the bytes of a buffer lie.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Bytes past a multiple of 256 at which the buffer begins.
    pub misalignment: u64,
    /// Bytes of a row.
    pub row_bytes: usize,
    /// Bytes from a row to the next, at least `row_bytes`.
    pub row_stride: u64,
}

impl Place {
    /// All in one piece.
    pub fn dense(bytes: usize) -> Self {
        Self { misalignment: 0, row_bytes: bytes, row_stride: bytes as u64 }
    }
}

impl Buffer {
    fn end(&self) -> u64 {
        let rows = self.bytes.len().div_ceil(self.row_bytes.max(1)) as u64;
        self.address + rows * self.row_stride
    }

    /// Where in `bytes` the bytes at an address are, if they all are in one row.
    fn find(&self, at: u64, bytes: usize) -> Option<usize> {
        let offset = at.checked_sub(self.address)?;
        let (row, within) =
            (offset.checked_div(self.row_stride)?, offset.checked_rem(self.row_stride)? as usize);
        let start = usize::try_from(row).ok()?.checked_mul(self.row_bytes)?.checked_add(within)?;
        (within + bytes <= self.row_bytes && start + bytes <= self.bytes.len()).then_some(start)
    }
}

impl Memory {
    /// No buffers.
    pub fn new() -> Self {
        Self::default()
    }

    /// A buffer that kernels read. Its address.
    pub fn input(&self, bytes: &[u8], place: Place) -> u64 {
        self.add(bytes.to_vec(), place, true)
    }

    /// A buffer that kernels write, full of [`POISON`]. Its address.
    pub fn output(&self, bytes: usize, place: Place) -> u64 {
        self.add(vec![POISON; bytes], place, false)
    }

    fn add(&self, bytes: Vec<u8>, place: Place, input: bool) -> u64 {
        let mut buffers = self.buffers.borrow_mut();
        // Past 2^32, so that an address cut to 32 bits hits nothing.
        let end = buffers.last().map_or(1 << 33, Buffer::end);
        let Place { misalignment, row_bytes, row_stride } = place;
        let address = (end + GAP).next_multiple_of(256) + misalignment;
        buffers.push(Buffer { address, row_bytes, row_stride, stored: vec![0; bytes.len()], bytes, input });
        address
    }

    /// The rows of the buffer at `address` one after the other, and how often each byte was stored to.
    ///
    /// # Panics
    /// Where no buffer begins at `address`.
    pub fn read(&self, address: u64) -> (Vec<u8>, Vec<u8>) {
        let buffers = self.buffers.borrow();
        let buffer =
            buffers.iter().find(|b| b.address == address).expect("the address a buffer was made with");
        (buffer.bytes.clone(), buffer.stored.clone())
    }

    fn access<R>(
        &self,
        at: u64,
        bytes: usize,
        act: impl FnOnce(&mut Buffer, usize) -> Result<R, String>,
    ) -> Result<R, String> {
        if !at.is_multiple_of(bytes as u64) {
            return Err(format!("not a multiple of {bytes}"));
        }
        let mut buffers = self.buffers.borrow_mut();
        let last = self.last.get();
        let found = buffers.get(last).and_then(|b| Some((last, b.find(at, bytes)?)));
        let search = || buffers.iter().enumerate().find_map(|(i, b)| Some((i, b.find(at, bytes)?)));
        let Some((i, offset)) = found.or_else(search) else {
            return Err(String::from("outside every row of every buffer"));
        };
        self.last.set(i);
        let buffer = &mut buffers[i];
        act(buffer, offset)
    }

    fn load<const BYTES: usize>(&self, at: u64) -> Result<[u8; BYTES], String> {
        self.access(at, BYTES, |buffer, offset| {
            let range = offset..offset + BYTES;
            if !buffer.input && buffer.stored[range.clone()].contains(&0) {
                return Err(String::from("of bytes that nobody has written"));
            }
            let mut value = [0; BYTES];
            value.copy_from_slice(&buffer.bytes[range]);
            Ok(value)
        })
    }

    fn store<const BYTES: usize>(&self, at: u64, value: [u8; BYTES]) -> Result<(), String> {
        self.access(at, BYTES, |buffer, offset| {
            if buffer.input {
                return Err(String::from("into an input"));
            }
            let range = offset..offset + BYTES;
            if buffer.stored[range.clone()] != [0; BYTES] {
                return Err(String::from("of a byte that was stored already"));
            }
            buffer.stored[range.clone()].fill(1);
            buffer.bytes[range].copy_from_slice(&value);
            Ok(())
        })
    }
}

/// What a thread waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    Barrier,
    BarrierOf { number: u32, threads: u32 },
    Warp { value: u32, op: WarpOp },
}

/// What a warp does together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WarpOp {
    Xor(u32),
    From(u32),
    Up(u32),
    Down(u32),
    Ballot,
    Sync,
}

/// Two bytes of shared memory: their value, who touched it last, and in which stretch between two barriers.
#[derive(Clone, Copy, Default)]
struct SharedHalf {
    value: u16,
    writer: Option<(u32, u32)>,
    reader: Option<(u32, u32)>,
}

struct Block {
    shared: RefCell<Vec<SharedHalf>>,
    /// Barriers passed so far.
    stretch: Cell<u32>,
}

/// One thread of the grid, as its kernel sees it.
pub struct Thread<'a> {
    memory: &'a Memory,
    launch: Launch,
    block: [u32; 3],
    thread: u32,
    of_block: &'a Block,
    /// How it gives way to the others of its block; `None` in a grid whose threads run one after the other.
    yielder: Option<&'a Yielder<u32, Wait>>,
}

/// Runs a kernel that has no barriers and no shuffles over a whole grid, thread after thread.
///
/// # Panics
/// At the first thing a kernel does wrong, and where `launch` is none that a driver takes.
pub fn run(memory: &Memory, launch: Launch, kernel: impl Fn(&Thread<'_>)) {
    for_each_block(launch, |block, of_block| {
        for thread in 0..launch.threads {
            kernel(&Thread { memory, launch, block, thread, of_block, yielder: None });
        }
    });
}

/// Runs any kernel over a whole grid, the threads of a block in turns.
///
/// # Panics
/// As [`run`], and where threads wait for one another in vain.
pub fn run_in_step(memory: &Memory, launch: Launch, kernel: impl Fn(&Thread<'_>) + Copy) {
    for_each_block(launch, |block, of_block| {
        let coroutines = (0..launch.threads).map(|thread| {
            let stack = DefaultStack::new(STACK_BYTES).expect("memory for a stack");
            let body = move |yielder: &Yielder<u32, Wait>, _: u32| {
                kernel(&Thread { memory, launch, block, thread, of_block, yielder: Some(yielder) });
            };
            // SAFETY: `in_step` takes the coroutines and drops them before anything they borrow goes.
            unsafe { Coroutine::with_stack_unchecked(stack, body) }
        });
        in_step(of_block, coroutines.collect());
    });
}

fn for_each_block(launch: Launch, act: impl Fn([u32; 3], &Block)) {
    let Launch { blocks: [x, y, z], threads, shared_bytes } = launch;
    assert!((1..=1024).contains(&threads), "{threads} threads in a block, there can be 1 to 1024");
    assert!(x > 0 && y > 0 && z > 0, "an empty grid is refused by the driver: {:?}", launch.blocks);
    assert!(x < 1 << 31 && y <= 65_535 && z <= 65_535, "too large a grid: {:?}", launch.blocks);
    for z in 0..z {
        for y in 0..y {
            for x in 0..x {
                let shared = RefCell::new(vec![SharedHalf::default(); shared_bytes as usize / 2]);
                act([x, y, z], &Block { shared, stretch: Cell::new(0) });
            }
        }
    }
}

/// Runs the threads of one block to their ends, from wait to wait.
fn in_step(block: &Block, mut coroutines: Vec<Coroutine<u32, Wait, (), DefaultStack>>) {
    let mut waits: Vec<Option<Wait>> = vec![None; coroutines.len()];
    let mut resume = |i: usize, input: u32, waits: &mut [Option<Wait>]| {
        waits[i] = match coroutines[i].resume(input) {
            CoroutineResult::Yield(wait) => Some(wait),
            CoroutineResult::Return(()) => None,
        };
    };
    for i in 0..waits.len() {
        resume(i, 0, &mut waits);
    }
    while waits.iter().any(Option::is_some) {
        let mut moved = false;
        for start in (0..waits.len()).step_by(WARP) {
            let warp = start..(start + WARP).min(waits.len());
            if !waits[warp.clone()].iter().any(|wait| matches!(wait, Some(Wait::Warp { .. }))) {
                continue;
            }
            let values: Vec<(u32, WarpOp)> = waits[warp.clone()]
                .iter()
                .enumerate()
                .map(|(lane, wait)| match wait {
                    Some(Wait::Warp { value, op }) => (*value, *op),
                    other => panic!(
                        "a shuffle that lane {lane} of the warp at thread {start} is not part of: {other:?}"
                    ),
                })
                .collect();
            assert!(values.len() == WARP, "a shuffle in a warp of {} lanes", values.len());
            let ballot = values.iter().enumerate().fold(0, |all, (lane, (value, _))| all | value << lane);
            for (lane, (_, op)) in values.iter().enumerate() {
                let from = match *op {
                    WarpOp::Xor(mask) => lane ^ mask as usize & (WARP - 1),
                    WarpOp::From(other) => other as usize % WARP,
                    WarpOp::Up(distance) => lane.checked_sub(distance as usize).unwrap_or(lane),
                    WarpOp::Down(distance) if lane + (distance as usize) < WARP => lane + distance as usize,
                    _ => lane,
                };
                let value = if *op == WarpOp::Ballot { ballot } else { values[from].0 };
                resume(start + lane, value, &mut waits);
            }
            moved = true;
        }
        for number in 1..16 {
            let come = |wait: &Option<Wait>| match wait {
                Some(Wait::BarrierOf { number: at, threads }) if *at == number => Some(*threads),
                _ => None,
            };
            let threads: Vec<u32> = waits.iter().filter_map(come).collect();
            if threads.first().is_some_and(|first| *first as usize == threads.len()) {
                block.stretch.set(block.stretch.get() + 1);
                for i in 0..waits.len() {
                    if come(&waits[i]).is_some() {
                        resume(i, 0, &mut waits);
                    }
                }
                moved = true;
            }
        }
        // Everybody who is left waits at the barrier.
        if !moved {
            assert!(
                waits.iter().flatten().all(|wait| *wait == Wait::Barrier),
                "threads wait for one another in vain: {waits:?}"
            );
            block.stretch.set(block.stretch.get() + 1);
            for i in 0..waits.len() {
                if waits[i].is_some() {
                    resume(i, 0, &mut waits);
                }
            }
        }
    }
}

impl Thread<'_> {
    fn wait(&self, wait: Wait) -> u32 {
        match self.yielder {
            Some(yielder) => yielder.suspend(wait),
            None => panic!("{wait:?} in a grid whose threads run one after the other: use run_in_step"),
        }
    }

    fn wrong(&self, what: &str, bytes: usize, at: u64, why: &str) -> ! {
        let (Self { block, thread, .. }, memory) = (self, self.memory.buffers.borrow());
        let nearest = memory.iter().rev().find(|b| b.address <= at).map_or(String::new(), |b| {
            format!(", {} bytes into a buffer of {} bytes", at - b.address, b.bytes.len())
        });
        panic!("thread {thread} of block {block:?} {what} {bytes} bytes at {at:#x}{nearest}: {why}")
    }

    fn load<const BYTES: usize>(&self, at: u64) -> [u8; BYTES] {
        match self.memory.load(at) {
            Ok(value) => value,
            Err(why) => self.wrong("loads", BYTES, at, &why),
        }
    }

    fn store<const BYTES: usize>(&self, at: u64, value: [u8; BYTES]) {
        if let Err(why) = self.memory.store(at, value) {
            self.wrong("stores", BYTES, at, &why)
        }
    }

    /// The halfwords of an access.
    fn shared<const BYTES: usize>(&self, at: u32, mut act: impl FnMut(&mut SharedHalf, (u32, u32), usize)) {
        let mut shared = self.of_block.shared.borrow_mut();
        let bytes = shared.len() * 2;
        let first = at as usize / 2;
        let Some(halves) =
            shared.get_mut(first..first + BYTES / 2).filter(|_| at.is_multiple_of(BYTES as u32))
        else {
            panic!("thread {} touches word {at} of {bytes} bytes of shared memory", self.thread);
        };
        for (i, half) in halves.iter_mut().enumerate() {
            act(half, (self.thread, self.of_block.stretch.get()), i);
        }
    }

    fn load_shared<const BYTES: usize>(&self, at: u32) -> [u8; BYTES] {
        let mut value = [0; BYTES];
        self.shared::<BYTES>(at, |half, me, i| {
            assert!(
                half.writer.is_some(),
                "thread {} reads word {at} of shared memory, which nobody has written",
                me.0
            );
            assert!(
                !self.races(half.writer),
                "threads {} and {:?} race for word {at} of shared memory",
                me.0,
                half.writer
            );
            half.reader = Some(me);
            value[2 * i..][..2].copy_from_slice(&half.value.to_ne_bytes());
        });
        value
    }

    fn store_shared<const BYTES: usize>(&self, at: u32, value: [u8; BYTES]) {
        self.shared::<BYTES>(at, |half, me, i| {
            let races = self.races(half.writer) || self.races(half.reader);
            assert!(!races, "thread {} writes word {at} of shared memory, which another one uses", me.0);
            let value = u16::from_ne_bytes([value[2 * i], value[2 * i + 1]]);
            *half = SharedHalf { value, writer: Some(me), reader: None };
        });
    }

    /// Whether somebody else did that in this stretch.
    fn races(&self, other: Option<(u32, u32)>) -> bool {
        other.is_some_and(|(thread, stretch)| thread != self.thread && stretch == self.of_block.stretch.get())
    }
}

impl Gpu for Thread<'_> {
    fn thread(&self) -> u32 {
        self.thread
    }

    fn threads(&self) -> u32 {
        self.launch.threads
    }

    fn block(&self) -> [u32; 3] {
        self.block
    }

    fn blocks(&self) -> [u32; 3] {
        self.launch.blocks
    }

    fn barrier(&self) {
        self.wait(Wait::Barrier);
    }

    fn barrier_of(&self, number: u32, threads: u32) {
        self.wait(Wait::BarrierOf { number, threads });
    }

    fn let_next_start(&self) {}

    fn wait_for_previous(&self) {}

    unsafe fn load16(&self, address: u64) -> Bytes16 {
        let bytes: [u8; 16] = self.load(address);
        sixteen(bytes)
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
        sixteen(self.load_shared(at))
    }

    unsafe fn store_shared16(&self, at: u32, value: Bytes16) {
        self.store_shared(at, bytes(value));
    }

    unsafe fn load_shared8(&self, at: u32) -> u64 {
        u64::from_ne_bytes(self.load_shared(at))
    }

    unsafe fn store_shared8(&self, at: u32, value: u64) {
        self.store_shared(at, value.to_ne_bytes());
    }

    unsafe fn load_shared4(&self, at: u32) -> u32 {
        u32::from_ne_bytes(self.load_shared(at))
    }

    unsafe fn store_shared4(&self, at: u32, value: u32) {
        self.store_shared(at, value.to_ne_bytes());
    }

    unsafe fn load_shared2(&self, at: u32) -> u16 {
        u16::from_ne_bytes(self.load_shared(at))
    }

    unsafe fn store_shared2(&self, at: u32, value: u16) {
        self.store_shared(at, value.to_ne_bytes());
    }
}

impl Warp for Thread<'_> {
    fn shuffle_xor(&self, value: u32, mask: u32) -> u32 {
        self.wait(Wait::Warp { value, op: WarpOp::Xor(mask) })
    }

    fn shuffle(&self, value: u32, lane: u32) -> u32 {
        self.wait(Wait::Warp { value, op: WarpOp::From(lane) })
    }

    fn shuffle_up(&self, value: u32, distance: u32) -> u32 {
        self.wait(Wait::Warp { value, op: WarpOp::Up(distance) })
    }

    fn shuffle_down(&self, value: u32, distance: u32) -> u32 {
        self.wait(Wait::Warp { value, op: WarpOp::Down(distance) })
    }

    fn ballot(&self, yes: bool) -> u32 {
        self.wait(Wait::Warp { value: u32::from(yes), op: WarpOp::Ballot })
    }

    fn sync_warp(&self) {
        self.wait(Wait::Warp { value: 0, op: WarpOp::Sync });
    }
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
