//! Nothing but fused multiply-adds, and nothing but silu: what arithmetic is measured against, as
//! [`copy_bytes`](super::copy_bytes) is for memory.

use std::{
    hint::black_box,
    sync::atomic::{AtomicUsize, Ordering},
};

use gdn_math::{Lanes, special};

use super::{
    Cpu,
    lanes::{Register, Together, WIDEST, for_isa},
};

/// Registers that do not wait for one another. As many as instructions are under way at a time (latency times
/// units: 8 to 10 on x86-64, 16 on large Arm cores), and, with two more, no more than there are registers.
const CHAINS: usize = if cfg!(target_arch = "aarch64") { 16 } else { 12 };

/// Runs of a task's loop.
const TURNS: usize = 1 << 15;

/// Registers whose `silu` are computed one after the other, and those of them side by side.
const REGISTERS: usize = 16;
const SIDE_BY_SIDE: usize = 4;

/// Runs of a task's loop over these registers.
const ROUNDS: usize = 1 << 11;

/// Tasks for each thread, so that one which is late does not hold up the others for long.
const TASKS_PER_THREAD: usize = 4;

/// Does fused multiply-adds of f32 in registers, with the instruction set and by as many threads as `cpu`
/// says, and gives how many: lanes counted one by one. Whoever takes the time knows the peak of this machine,
/// with the clock it has at that moment.
///
/// ```
/// use gdn::cpu::{Cpu, Isa, multiply_add};
/// assert!(multiply_add(&Cpu::new().threads(1).isa(Isa::Scalar)?) > 0);
/// # Ok::<(), gdn::cpu::IsaError>(())
/// ```
pub fn multiply_add(cpu: &Cpu) -> usize {
    let run = for_isa!(cpu.chosen_isa(), multiply_adds(lanes: &AtomicUsize));
    TURNS * CHAINS * share(cpu, run)
}

/// Computes `silu` of f32 that a first-level cache has, with the instruction set and by as many threads as
/// `cpu` says, and gives of how many.
///
/// ```
/// use gdn::cpu::{Cpu, Isa, silu};
/// assert!(silu(&Cpu::new().threads(1).isa(Isa::Scalar)?) > 0);
/// # Ok::<(), gdn::cpu::IsaError>(())
/// ```
pub fn silu(cpu: &Cpu) -> usize {
    let run = for_isa!(cpu.chosen_isa(), silus(lanes: &AtomicUsize));
    ROUNDS * REGISTERS * share(cpu, run)
}

/// Has tasks run on all threads, and gives the sum of their lanes.
fn share(cpu: &Cpu, run: unsafe fn(&AtomicUsize)) -> usize {
    let tasks = TASKS_PER_THREAD * cpu.chosen_threads(usize::MAX);
    let lanes = AtomicUsize::new(0);
    cpu.share(tasks, usize::MAX, |_| {
        // SAFETY: `for_isa` looked at the machine.
        unsafe { run(&lanes) }
    });
    tasks * lanes.into_inner()
}

/// # Safety
/// The machine has L's instruction set.
#[inline(always)]
unsafe fn multiply_adds<L: Register>(lanes: &AtomicUsize) {
    // SAFETY: the caller's promise.
    let zero = unsafe { L::zero() };
    // Towards a fixed point, so that no number becomes infinite or so small that it slows the machine down.
    let (factor, addend) = (zero.splat(black_box(0.5)), zero.splat(black_box(0.75)));
    // Each from memory of its own, lest the compiler sees that they are equal.
    let mut chains: [L; CHAINS] = std::array::from_fn(|_| zero.splat(black_box(1.0)));
    for _ in 0..TURNS {
        for chain in &mut chains {
            *chain = chain.mul_add(factor, addend);
        }
    }
    black_box(chains.iter().map(|chain| chain.sum()).sum::<f32>());
    lanes.store(L::LEN, Ordering::Relaxed);
}

/// # Safety
/// The machine has L's instruction set.
#[inline(always)]
unsafe fn silus<L: Register>(lanes: &AtomicUsize) {
    let numbers = [0.75; REGISTERS * WIDEST];
    // SAFETY: the caller's promise; as many numbers as so many of the widest registers have.
    unsafe {
        let mut sums = Together::<L, SIDE_BY_SIDE>::load(numbers.as_ptr()).splat(0.0);
        for _ in 0..ROUNDS {
            // Lest the compiler sees that they are the same each time.
            let numbers = black_box(&numbers).as_ptr();
            for i in (0..REGISTERS).step_by(SIDE_BY_SIDE) {
                sums = sums.plus(special::silu(Together::load(numbers.add(i * L::LEN))));
            }
        }
        let mut all = [0.0; SIDE_BY_SIDE * WIDEST];
        sums.store(all.as_mut_ptr());
        black_box(all);
    }
    lanes.store(L::LEN, Ordering::Relaxed);
}
