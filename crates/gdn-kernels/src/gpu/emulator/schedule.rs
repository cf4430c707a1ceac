//! The threads of a cluster, each a coroutine, and when each may go on.

use core::{
    any::TypeId,
    cell::{Cell, RefCell},
    ptr::NonNull,
};
use std::{format, string::String, vec, vec::Vec};

use corosensei::{Coroutine, CoroutineResult, Yielder, stack::DefaultStack};

use super::{
    Launch, Thread, WARP,
    memory::{Memory, Who},
    order::{Arrival, Clocks, Known, Waits},
    shared::Shared,
    wgmma::Products,
};

const STACK_BYTES: usize = 256 << 10;

/// Barriers of a block.
const BARRIERS: usize = 16;

/// Those that are at a barrier and went on, and how many threads it is for.
#[derive(Default)]
struct Ahead {
    arrivals: Vec<Arrival>,
    threads: u32,
}

/// What a thread waits for.
#[derive(Clone, Copy)]
pub(super) enum Wait {
    /// A barrier of the block; all threads of it where `threads` is 0.
    Barrier { number: u32, threads: u32 },
    /// All threads of the cluster, to arrive.
    Cluster,
    /// The others of its warp or warpgroup.
    Collective(Call),
    /// A phase of an mbarrier of its own block.
    Mbarrier { at: u32, parity: u32 },
    /// Four words of shared memory of its own block that are sent.
    Words { at: u32 },
}

/// What a thread brings to a collective: registers on its stack, which stay where they are until all have
/// come and the function has run.
#[derive(Clone, Copy)]
pub(super) struct Call {
    name: &'static str,
    lanes: usize,
    registers: NonNull<()>,
    kind: TypeId,
    /// Runs the function of the first over the registers of all.
    ///
    /// # Safety
    /// All registers are of this call's kind, and nobody else touches them.
    run: unsafe fn(&Company<'_>, &[NonNull<()>]),
}

/// The threads that do something together.
pub(super) struct Company<'a> {
    pub(super) cluster: &'a Cluster<'a>,
    /// Their block within the cluster.
    pub(super) block: usize,
    /// The first of them within the cluster.
    pub(super) first: usize,
}

struct Task<R> {
    registers: R,
    act: fn(&Company<'_>, &mut [&mut R]),
}

unsafe fn run<R>(company: &Company<'_>, tasks: &[NonNull<()>]) {
    // SAFETY: the caller's promise; they are on different stacks.
    let mut tasks: Vec<&mut Task<R>> =
        tasks.iter().map(|task| unsafe { task.cast::<Task<R>>().as_mut() }).collect();
    let Some(act) = tasks.first().map(|task| task.act) else { return };
    let mut registers: Vec<&mut R> = tasks.iter_mut().map(|task| &mut task.registers).collect();
    act(company, &mut registers);
}

/// Random numbers, the same ones for a seed.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// One below `end`.
    pub(super) fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 32) as usize * end) >> 32
    }

    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// A bulk copy on its way.
pub(super) struct Flight {
    pub(super) block: usize,
    pub(super) thread: usize,
    pub(super) to: u32,
    pub(super) from: u64,
    pub(super) bytes: u32,
    pub(super) mbarrier: u32,
    /// What the thread knew and did.
    pub(super) known: Known,
}

/// A block as it runs.
pub(super) struct Block {
    /// Within the grid.
    pub(super) index: [u32; 3],
    pub(super) shared: RefCell<Shared>,
    /// Those of each warpgroup.
    pub(super) products: RefCell<Vec<Products>>,
}

/// The cluster's barrier: for each thread how often it arrived and left, and who came to each of its phases.
struct Gathering {
    phases: Vec<Phase>,
    arrived: Vec<usize>,
    left: Vec<usize>,
}

#[derive(Default)]
struct Phase {
    /// In the order of the threads once all have come.
    arrivals: Vec<Arrival>,
    gathered: Option<Known>,
}

impl Gathering {
    fn new(threads: usize) -> Self {
        Self { phases: Vec::new(), arrived: vec![0; threads], left: vec![0; threads] }
    }
}

/// Blocks that run together; one, where the launch names no clusters.
pub(super) struct Cluster<'a> {
    pub(super) memory: &'a Memory,
    pub(super) launch: &'a Launch,
    pub(super) blocks: Vec<Block>,
    /// Its number, of all that ever ran.
    pub(super) number: u32,
    pub(super) clocks: RefCell<Clocks>,
    pub(super) waits: RefCell<Waits>,
    /// By blocks and barriers.
    ahead: RefCell<Vec<Ahead>>,
    pub(super) flights: RefCell<Vec<Flight>>,
    gathering: RefCell<Gathering>,
    /// Threads that have not returned.
    pub(super) running: RefCell<Vec<bool>>,
    pub(super) random: RefCell<Random>,
}

impl<'a> Cluster<'a> {
    pub(super) fn new(memory: &'a Memory, launch: &'a Launch) -> Self {
        let threads = launch.threads as usize;
        let all = threads * launch.cluster as usize;
        let block = |_| Block {
            index: [0; 3],
            shared: RefCell::new(Shared::new(launch.shared_bytes as usize)),
            products: RefCell::new((0..threads.div_ceil(4 * WARP)).map(|_| Products::default()).collect()),
        };
        Self {
            memory,
            launch,
            blocks: (0..launch.cluster).map(block).collect(),
            number: 0,
            clocks: RefCell::new(Clocks::new(all)),
            waits: RefCell::default(),
            ahead: RefCell::new((0..launch.cluster as usize * BARRIERS).map(|_| Ahead::default()).collect()),
            flights: RefCell::default(),
            gathering: RefCell::new(Gathering::new(all)),
            running: RefCell::new(vec![true; all]),
            random: RefCell::new(Random::new(launch.seed)),
        }
    }

    /// Becomes the cluster whose first block has this index.
    pub(super) fn restart(&mut self, [x, y, z]: [u32; 3]) {
        self.number = self.memory.next_cluster();
        self.clocks.get_mut().reset();
        self.waits.get_mut().reset();
        self.ahead.get_mut().iter_mut().for_each(|ahead| *ahead = Ahead::default());
        self.flights.get_mut().clear();
        *self.gathering.get_mut() = Gathering::new(self.running.get_mut().len());
        self.running.get_mut().fill(true);
        for (rank, block) in (0..).zip(&mut self.blocks) {
            block.index = [x + rank, y, z];
            block.shared.get_mut().reset();
            block.products.get_mut().iter_mut().for_each(|products| *products = Products::default());
        }
    }

    pub(super) fn who(&self, thread: usize) -> Who<'_> {
        Who { cluster: self.number, thread, clocks: &self.clocks, waits: &self.waits }
    }

    /// All threads have returned.
    pub(super) fn ends(&self) {
        let mut blocks = (0..self.blocks.len()).map(|i| i * self.threads()..(i + 1) * self.threads());
        if !blocks.all(|threads| self.waits.borrow().any_of(threads)) {
            self.memory.has_not_waited(true);
        }
    }

    fn threads(&self) -> usize {
        self.launch.threads as usize
    }

    /// A thread for a message.
    pub(super) fn name(&self, thread: usize) -> String {
        let (block, thread) = (thread / self.threads(), thread % self.threads());
        format!("thread {thread} of block {:?}", self.blocks[block].index)
    }

    /// Runs its threads to their ends.
    pub(super) fn run(&self, kernel: &(impl Fn(&Thread<'_>) + Copy)) {
        let all = self.running.borrow().len();
        let coroutines: Vec<_> = (0..all)
            .map(|id| {
                let body = move |yielder: &Yielder<(), Wait>, (): ()| {
                    let thread = Thread::new(self, id, Some(yielder));
                    kernel(&thread);
                    thread.ends();
                };
                // SAFETY: the coroutines are dropped below, before anything they borrow goes.
                unsafe { Coroutine::with_stack_unchecked(stack(), body) }
            })
            .collect();
        let mut turns = Turns {
            cluster: self,
            coroutines,
            waits: vec![None; all],
            come: vec![0; all.div_ceil(WARP)],
            ready: (0..all).collect(),
        };
        turns.take();
        for coroutine in turns.coroutines {
            STACKS.with_borrow_mut(|stacks| stacks.push(coroutine.into_stack()));
        }
    }

    /// A thread arrives at a barrier of its block and goes on.
    pub(super) fn arrive_at(&self, thread: usize, number: u32, threads: u32) {
        let place = thread / self.threads() * BARRIERS + number as usize;
        let ahead = &mut self.ahead.borrow_mut()[place];
        assert!(
            ahead.arrivals.iter().all(|arrival| arrival.thread() != thread),
            "{} arrives at barrier {number} and has arrived there before, and it has not opened",
            self.name(thread)
        );
        assert!(
            ahead.arrivals.is_empty() || ahead.threads == threads,
            "{} arrives at barrier {number} for {threads} threads, others for {}",
            self.name(thread),
            ahead.threads
        );
        ahead.threads = threads;
        ahead.arrivals.push(self.clocks.borrow_mut().arrive(thread));
    }

    /// A thread arrives at the cluster's barrier.
    pub(super) fn arrive(&self, thread: usize, relaxed: bool) {
        let mut gathering = self.gathering.borrow_mut();
        let Gathering { phases, arrived, left } = &mut *gathering;
        assert!(
            arrived[thread] == left[thread],
            "{} arrives at the cluster's barrier and has not waited since it did so before",
            self.name(thread)
        );
        if phases.len() == arrived[thread] {
            phases.push(Phase::default());
        }
        let mut clocks = self.clocks.borrow_mut();
        let arrival = if relaxed { clocks.arrive_relaxed(thread) } else { clocks.arrive(thread) };
        phases[arrived[thread]].arrivals.push(arrival);
        arrived[thread] += 1;
    }

    /// That a thread that will wait for the cluster has arrived.
    pub(super) fn expect_arrived(&self, thread: usize) {
        let gathering = self.gathering.borrow();
        assert!(
            gathering.arrived[thread] > gathering.left[thread],
            "{} waits at the cluster's barrier and has not arrived there",
            self.name(thread)
        );
    }

    /// Whether all have arrived for whom a thread waits, which then leaves.
    fn leaves(&self, thread: usize) -> bool {
        let mut gathering = self.gathering.borrow_mut();
        let Gathering { phases, left, .. } = &mut *gathering;
        let Phase { arrivals, gathered } = &mut phases[left[thread]];
        let mut clocks = self.clocks.borrow_mut();
        if arrivals.len() < left.len() {
            return false;
        }
        let gathered = gathered.get_or_insert_with(|| {
            arrivals.sort_by_key(Arrival::thread);
            clocks.gathered(arrivals)
        });
        clocks.leave(&arrivals[thread], gathered);
        left[thread] += 1;
        true
    }

    /// What the engine reads of global memory for a thread that knew this when it set it to work.
    pub(super) fn engine_reads(&self, known: &Known, from: u64, value: &mut [u8]) -> Result<(), String> {
        let engine = self.who(self.clocks.borrow().engine());
        Clocks::engine_works_for(&self.clocks, known, || self.memory.load(&engine, from, 16, value))
    }

    /// Lands a bulk copy, one at random. Whether there was one.
    fn land_one(&self) -> bool {
        let flight = {
            let mut flights = self.flights.borrow_mut();
            if flights.is_empty() {
                return false;
            }
            let i = self.random.borrow_mut().below(flights.len());
            flights.swap_remove(i)
        };
        let Flight { block, thread, to, from, bytes, mbarrier, known } = flight;
        let mut value = vec![0; bytes as usize];
        if let Err(why) = self.engine_reads(&known, from, &mut value) {
            panic!("a bulk copy of {} reads {bytes} bytes at {from:#x}: {why}", self.name(thread));
        }
        let (mut shared, mut clocks) = (self.blocks[block].shared.borrow_mut(), self.clocks.borrow_mut());
        let engine = clocks.engine();
        shared.land(&clocks, engine, to, &value);
        shared.landed(&mut clocks, mbarrier, bytes);
        true
    }
}

std::thread_local! {
    /// Stacks of threads that have ended, for the next ones.
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

fn stack() -> DefaultStack {
    let old = STACKS.with_borrow_mut(Vec::pop);
    old.unwrap_or_else(|| DefaultStack::new(STACK_BYTES).expect("memory for a stack"))
}

/// The threads of a cluster and what they wait for.
struct Turns<'a> {
    cluster: &'a Cluster<'a>,
    coroutines: Vec<Coroutine<(), Wait, (), DefaultStack>>,
    waits: Vec<Option<Wait>>,
    /// By warps: lanes that wait at a collective.
    come: Vec<usize>,
    ready: Vec<usize>,
}

impl Turns<'_> {
    fn take(&mut self) {
        loop {
            let mut now = std::mem::take(&mut self.ready);
            self.cluster.random.borrow_mut().shuffle(&mut now);
            for thread in now {
                self.waits[thread] = match self.coroutines[thread].resume(()) {
                    CoroutineResult::Yield(wait) => Some(wait),
                    CoroutineResult::Return(()) => {
                        self.cluster.running.borrow_mut()[thread] = false;
                        None
                    }
                };
                if let Some(Wait::Collective(_)) = self.waits[thread] {
                    self.come[thread / WARP] += 1;
                }
            }
            self.collectives();
            self.barriers();
            self.mbarriers();
            self.words();
            if self.ready.is_empty() {
                if self.waits.iter().all(Option::is_none) {
                    let left = self.cluster.flights.borrow();
                    assert!(
                        left.is_empty(),
                        "{} has returned, and a bulk copy of it is in flight that nobody has waited for",
                        left.first().map_or(String::new(), |flight| self.cluster.name(flight.thread))
                    );
                    let ahead = self.cluster.ahead.borrow();
                    let alone = ahead.iter().position(|ahead| !ahead.arrivals.is_empty());
                    assert!(
                        alone.is_none(),
                        "a block ends whose threads arrived at barrier {}, at which nobody waits",
                        alone.unwrap_or(0) % BARRIERS
                    );
                    return;
                }
                // Copies land as late as they can: when nobody can go on without.
                if !self.cluster.land_one() {
                    self.in_vain();
                }
            }
        }
    }

    fn call(&self, thread: usize) -> Option<Call> {
        match self.waits[thread] {
            Some(Wait::Collective(call)) => Some(call),
            _ => None,
        }
    }

    /// Runs those for which all have come.
    fn collectives(&mut self) {
        for warp in 0..self.come.len() {
            if self.come[warp] < WARP {
                continue;
            }
            let start = warp * WARP;
            let Some(call) = self.call(start) else { continue };
            let within = start % self.cluster.threads();
            let members = start..start + call.lanes;
            let whole = within.is_multiple_of(call.lanes)
                && (start / WARP..members.end.div_ceil(WARP)).all(|warp| self.come.get(warp) == Some(&WARP));
            if !whole {
                continue;
            }
            let registers: Vec<NonNull<()>> = members
                .clone()
                .map(|thread| {
                    let other = self.call(thread).expect("those that have come");
                    assert!(
                        (other.name, other.kind, other.lanes) == (call.name, call.kind, call.lanes),
                        "{} comes to {}, and {} to {}",
                        self.cluster.name(start),
                        call.name,
                        self.cluster.name(thread),
                        other.name
                    );
                    other.registers
                })
                .collect();
            let block = start / self.cluster.threads();
            // SAFETY: all of the same kind, on the stacks of threads that wait.
            unsafe { (call.run)(&Company { cluster: self.cluster, block, first: start }, &registers) };
            for warp in members.start / WARP..members.end / WARP {
                self.come[warp] = 0;
            }
            self.go_on(members);
        }
    }

    fn go_on(&mut self, threads: impl IntoIterator<Item = usize>) {
        for thread in threads {
            self.waits[thread] = None;
            self.ready.push(thread);
        }
    }

    /// Opens those at which all have come.
    fn barriers(&mut self) {
        let threads = self.cluster.threads();
        let all = self.waits.len();
        for start in (0..all).step_by(threads) {
            let mut come = [const { Vec::new() }; BARRIERS];
            for thread in start..start + threads {
                if let Some(Wait::Barrier { number, threads }) = self.waits[thread] {
                    assert!(
                        (number as usize) < BARRIERS,
                        "{} waits at barrier {number}, there are 16",
                        self.cluster.name(thread)
                    );
                    come[number as usize].push((thread, threads));
                }
            }
            for (number, come) in come.into_iter().enumerate() {
                let Some((first, expected)) = come.first().copied() else { continue };
                for (thread, other) in &come {
                    assert!(
                        *other == expected,
                        "{} waits at barrier {number} for {expected} threads, and {} for {other}",
                        self.cluster.name(first),
                        self.cluster.name(*thread)
                    );
                }
                let ahead = &mut self.cluster.ahead.borrow_mut()[start / threads * BARRIERS + number];
                assert!(
                    ahead.arrivals.is_empty() || ahead.threads == expected,
                    "{} waits at barrier {number} for {expected} threads, others arrived for {}",
                    self.cluster.name(first),
                    ahead.threads
                );
                let expected = if number == 0 { threads } else { expected as usize };
                let all = come.len() + ahead.arrivals.len();
                assert!(
                    number == 0 || expected.is_multiple_of(WARP) && all <= expected,
                    "{all} threads are at barrier {number} for {expected}, a multiple of 32",
                );
                if all == expected {
                    let members: Vec<usize> = come.into_iter().map(|(thread, _)| thread).collect();
                    let mut clocks = self.cluster.clocks.borrow_mut();
                    if !ahead.arrivals.is_empty() {
                        let known = clocks.gathered(&ahead.arrivals);
                        clocks.learn(first, &known);
                        ahead.arrivals.clear();
                    }
                    clocks.meet(&members);
                    drop(clocks);
                    self.go_on(members);
                }
            }
        }
        for thread in 0..all {
            if matches!(self.waits[thread], Some(Wait::Cluster)) && self.cluster.leaves(thread) {
                self.go_on([thread]);
            }
        }
    }

    fn mbarriers(&mut self) {
        for thread in 0..self.waits.len() {
            let Some(Wait::Mbarrier { at, parity }) = self.waits[thread] else { continue };
            let shared = &self.cluster.blocks[thread / self.cluster.threads()].shared;
            let passed =
                shared.borrow_mut().passed(&mut self.cluster.clocks.borrow_mut(), thread, at, parity);
            match passed {
                Ok(true) => self.go_on([thread]),
                Ok(false) => {}
                Err(why) => panic!("{} waits at {at} of shared memory, {why}", self.cluster.name(thread)),
            }
        }
    }

    /// Lets those go on that have all they wait for.
    fn words(&mut self) {
        for thread in 0..self.waits.len() {
            let Some(Wait::Words { at }) = self.waits[thread] else { continue };
            let shared = self.cluster.blocks[thread / self.cluster.threads()].shared.borrow();
            let are_there = shared.are_there(at);
            drop(shared);
            if are_there {
                self.go_on([thread]);
            }
        }
    }

    /// Nobody can go on.
    fn in_vain(&self) -> ! {
        let mut lines = Vec::new();
        let mut last = String::new();
        for (thread, wait) in self.waits.iter().enumerate() {
            let what = match wait {
                None => String::from("has returned"),
                Some(Wait::Barrier { number, .. }) => format!("waits at barrier {number}"),
                Some(Wait::Cluster) => String::from("waits at the cluster's barrier"),
                Some(Wait::Collective(call)) => format!("waits for the others at {}", call.name),
                Some(Wait::Mbarrier { at, parity }) => {
                    format!("waits for parity {parity} of the mbarrier at {at}")
                }
                Some(Wait::Words { at }) => format!("waits for what is sent to {at} of shared memory"),
            };
            if what != last {
                lines.push(format!("from {} on: {what}", self.cluster.name(thread)));
                last = what;
            }
        }
        panic!("threads wait for one another in vain. {}", lines.join("; "))
    }
}

impl Thread<'_> {
    pub(super) fn wait(&self, wait: Wait) {
        match self.yielder {
            Some(yielder) => yielder.suspend(wait),
            None => panic!("a wait in a grid whose threads run one after the other: use run_in_step"),
        }
    }

    /// Comes together with the other lanes of the warp (32) or warpgroup (128); `act` runs once, over the
    /// registers of all, in the order of the lanes. What it left in this thread's.
    pub(super) fn collective<R: 'static>(
        &self,
        lanes: usize,
        name: &'static str,
        registers: R,
        act: fn(&Company<'_>, &mut [&mut R]),
    ) -> R {
        assert!(
            (self.cluster.launch.threads as usize).is_multiple_of(lanes),
            "{name} in a block of {} threads, which is no multiple of {lanes}",
            self.cluster.launch.threads
        );
        let task = Cell::new(Task { registers, act });
        self.wait(Wait::Collective(Call {
            name,
            lanes,
            registers: NonNull::from(&task).cast(),
            kind: TypeId::of::<R>(),
            run: run::<R>,
        }));
        task.into_inner().registers
    }
}
