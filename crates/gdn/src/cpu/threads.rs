//! [`Executor`]: threads that are not rayon's; and work shared out among threads of either kind.

use std::sync::atomic::{AtomicUsize, Ordering};

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
    /// when all calls have. There are no more chunks than the call may have threads. The same number is best
    /// given to the same thread each time, whose cache may still have the rows.
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
    ///
    /// Each thread has a share of its own, the same one each time, and goes on with what is left of the others'.
    /// So one that is late, or whose core has other work, holds nobody up for longer than a task.
    pub(super) fn share(&self, tasks: usize, bytes: usize, task: impl Fn(usize) + Sync) {
        let threads = self.chosen_threads(bytes).min(tasks);
        if threads <= 1 {
            return (0..tasks).for_each(task);
        }
        let shares = threads.min(MOST_SHARES);
        // How many of each share were begun.
        let begun = [const { AtomicUsize::new(0) }; MOST_SHARES];
        let work = |thread: usize| {
            for share in (0..shares).map(|i| (thread % shares + i) % shares) {
                let (start, end) = (share * tasks / shares, (share + 1) * tasks / shares);
                // Asked first, so that nothing overflows, however often an executor calls.
                while begun[share].load(Ordering::Relaxed) < end - start {
                    let i = start + begun[share].fetch_add(1, Ordering::Relaxed);
                    if i < end {
                        task(i);
                    }
                }
            }
        };
        match self.executor {
            None => (0..threads).into_par_iter().with_max_len(1).for_each(work),
            Some(executor) => {
                executor.execute(threads, &work);
                // Whatever the executor made of it.
                work(0);
            }
        }
    }
}

/// Shares that tasks are cut into; where there are more threads, some begin with the same one.
const MOST_SHARES: usize = 64;

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

#[cfg(test)]
mod tests {
    use std::{
        collections::HashSet,
        sync::Mutex,
        thread,
        time::{Duration, Instant},
    };

    use super::*;

    type Work<'a> = &'a (dyn Fn(usize) + Sync);

    fn scoped(chunks: usize, work: Work<'_>) {
        thread::scope(|scope| (0..chunks).for_each(|i| drop(scope.spawn(move || work(i)))));
    }

    #[test]
    fn every_task_is_done_once_whatever_the_executor_does() {
        let each = |chunks: usize, work: Work<'_>| (0..chunks).for_each(work);
        let backwards = |chunks: usize, work: Work<'_>| (0..chunks).rev().for_each(work);
        let idle = |_: usize, _: Work<'_>| {};
        let crowded = |chunks: usize, work: Work<'_>| {
            thread::scope(|scope| {
                (0..3).for_each(|_| {
                    drop(scope.spawn(move || (0..chunks + 2).chain([usize::MAX]).for_each(work)))
                });
            });
        };
        let executors: [Option<&dyn Executor>; 6] =
            [None, Some(&each), Some(&backwards), Some(&scoped), Some(&idle), Some(&crowded)];
        for executor in executors {
            for threads in [1, 2, 3, MOST_SHARES, MOST_SHARES + 1] {
                for tasks in [0, 1, 2, 7, 64, 65, 300] {
                    let cpu = Cpu { executor, ..Cpu::new().threads(threads) };
                    let done: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    cpu.share(tasks, 0, |i| _ = done[i].fetch_add(1, Ordering::Relaxed));
                    let done: Vec<usize> = done.into_iter().map(AtomicUsize::into_inner).collect();
                    assert!(done.iter().all(|times| *times == 1), "{threads} threads: {done:?}");
                }
            }
        }
    }

    #[test]
    fn no_more_threads_of_a_pool_than_asked_for() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(5).build().unwrap();
        for threads in [1, 2, 3] {
            let seen = Mutex::new(HashSet::new());
            pool.install(|| {
                Cpu::new().threads(threads).share(100, 1 << 30, |_| {
                    seen.lock().unwrap().insert(thread::current().id());
                    thread::sleep(Duration::from_micros(200));
                });
            });
            let seen = seen.into_inner().unwrap().len();
            assert!(seen <= threads, "{seen} threads, {threads} were asked for");
        }
    }

    /// Its first task waits until all others are done.
    #[test]
    fn a_thread_that_is_held_up_holds_nobody_up() {
        let own = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        for executor in [None, Some(&scoped as &dyn Executor)] {
            let done = AtomicUsize::new(0);
            let started = Instant::now();
            own.install(|| {
                Cpu { executor, ..Cpu::new().threads(2) }.share(100, 0, |i| {
                    while i == 0 && done.load(Ordering::Relaxed) < 99 {
                        assert!(started.elapsed() < Duration::from_secs(60), "{done:?} tasks were done");
                        thread::yield_now();
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                });
            });
        }
    }
}
