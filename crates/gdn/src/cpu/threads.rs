//! [`Executor`]: threads that are not rayon's; and work shared out among threads of either kind.

use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use super::Cpu;

/// Threads of the caller's own, as an engine's pool: an object, lent to a [`Cpu`] for as long as that is
/// used.
///
/// A function or closure of the same arguments is an executor too.
///
/// ```
/// use gdn::cpu::{Cpu, Executor};
///
/// struct Pool(rayon::ThreadPool);
///
/// impl Executor for Pool {
///     fn execute(&self, chunks: usize, work: &(dyn Fn(usize) + Sync)) {
///         self.0.broadcast(|context| {
///             (context.index()..chunks).step_by(context.num_threads()).for_each(work);
///         });
///     }
/// }
///
/// let pool = Pool(rayon::ThreadPoolBuilder::new().num_threads(2).build()?);
/// let cpu = Cpu::new().threads(2).executor(&pool);
/// # let _ = cpu;
/// # Ok::<(), rayon::ThreadPoolBuildError>(())
/// ```
pub trait Executor: Sync {
    /// Calls `work` for each number below `chunks`, on as many threads at a time as it likes, and returns
    /// when all calls have. The same number is best given to the same thread each time, whose cache may still
    /// have the rows.
    ///
    /// What an executor makes of this is no matter of safety: a number that it calls twice is worked on once,
    /// and one that it leaves out is worked on by the thread of the call.
    fn execute(&self, chunks: usize, work: &(dyn Fn(usize) + Sync));
}

impl<F: Fn(usize, &(dyn Fn(usize) + Sync)) + Sync> Executor for F {
    fn execute(&self, chunks: usize, work: &(dyn Fn(usize) + Sync)) {
        self(chunks, work);
    }
}

impl Cpu<'_> {
    /// Has `task` called once for each number below `tasks`, on the threads of a call that reads and writes
    /// `bytes` in all.
    pub(super) fn share(&self, tasks: usize, bytes: usize, task: impl Fn(usize) + Sync) {
        match (self.chosen_threads(bytes).min(tasks), self.executor) {
            (0 | 1, _) => (0..tasks).for_each(&task),
            (_, None) => (0..tasks).into_par_iter().with_max_len(1).for_each(&task),
            (_, Some(executor)) => {
                // Whatever an executor makes of its task: twice at a time would be a race.
                let taken: Vec<AtomicBool> = (0..tasks).map(|_| AtomicBool::new(false)).collect();
                let once = |i: usize| {
                    if taken.get(i).is_some_and(|taken| !taken.swap(true, Ordering::Relaxed)) {
                        task(i);
                    }
                };
                executor.execute(tasks, &once);
                (0..tasks).for_each(once);
            }
        }
    }
}

/// What threads may see of a call: addresses, which only its tasks follow, each of which answers for how.
pub(super) struct Sent<T>(T);

// SAFETY: as above.
unsafe impl<T> Sync for Sent<T> {}

impl<T: Copy> Sent<T> {
    pub(super) fn new(addresses: T) -> Self {
        Self(addresses)
    }

    pub(super) fn get(&self) -> T {
        self.0
    }
}

/// Rows of a state that are worth a task of their own: whole panels of every instruction set.
const SLICE: usize = 32;

/// How many slices the `rows` of a state are cut into where there are `tasks` for `threads`, and the rows of
/// one.
pub(super) fn slices(rows: usize, tasks: usize, threads: usize) -> (usize, usize) {
    let wanted = if tasks == 0 || tasks >= threads { 1 } else { threads.div_ceil(tasks) };
    let len = rows.div_ceil(wanted).next_multiple_of(SLICE);
    (rows.div_ceil(len), len)
}
