//! The threads for arrays of frameworks that have none of their own to lend.

use std::sync::{Arc, Mutex, PoisonError};

use gdn::Cpu;
use pyo3::{PyResult, exceptions::PyRuntimeError};
use rayon::{ThreadPool, ThreadPoolBuilder};

/// The least bytes (read, and as many written) for which more than one thread is thought of.
const WORTH_SHARING: usize = 1 << 20;

struct Pool {
    threads: Arc<ThreadPool>,
    /// A pool is of one process: a fork takes its memory along, not its threads.
    process: u32,
}

/// Calls `work` with a [`Cpu`] of as many threads as the machine has, where there is enough for them to do.
pub(crate) fn with<T: Send>(bytes: usize, work: impl FnOnce(&Cpu) -> PyResult<T> + Send) -> PyResult<T> {
    let threads = match bytes {
        ..WORTH_SHARING => 1,
        _ => std::thread::available_parallelism().map_or(1, Into::into),
    };
    if threads == 1 {
        return work(&Cpu::new().threads(1));
    }
    pool(threads)?.install(|| work(&Cpu::new()))
}

/// The pool of this process with so many threads.
fn pool(threads: usize) -> PyResult<Arc<ThreadPool>> {
    static POOL: Mutex<Option<Pool>> = Mutex::new(None);
    let process = std::process::id();
    let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    match &*pool {
        Some(Pool { threads: found, process: of })
            if *of == process && found.current_num_threads() == threads =>
        {
            return Ok(Arc::clone(found));
        }
        // Its threads are the parent's: dropped, it would wait for them for ever.
        Some(Pool { process: of, .. }) if *of != process => std::mem::forget(pool.take()),
        _ => {}
    }
    let made = ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("gdn-{i}"))
        .build()
        .map_err(|e| PyRuntimeError::new_err(format!("cannot start {threads} threads: {e}")))?;
    let made = Arc::new(made);
    *pool = Some(Pool { threads: Arc::clone(&made), process });
    Ok(made)
}
