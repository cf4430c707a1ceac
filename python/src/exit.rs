//! The interpreter's end, which may come while other threads are inside a call.
//!
//! Before Python 3.14 a daemon thread that asks for the GIL once the interpreter is ending is made to call
//! `pthread_exit`, which unwinds through the frames of whoever asked: here Rust's, which have destructors,
//! with an unwinder that may be another one than libc's. That ends in a crash. So no call of ours asks for
//! the GIL then. Before the interpreter begins to end, [`wait`] lets those finish that gave it up. From then
//! on calls keep it, but for those that run others' code, which may give it up anywhere: Python's, and
//! PyTorch's, whose functions do so even to say whether a tensor is negated. They sleep for ever, as all
//! daemon threads do from Python 3.14 on.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, ThreadId},
    time::{Duration, Instant},
};

use pyo3::{marker::Ungil, prelude::*};

/// Calls that gave up the GIL, or may have, and will ask for it.
static OUTSIDE: AtomicUsize = AtomicUsize::new(0);
/// Whether the interpreter is about to end.
static ENDING: AtomicBool = AtomicBool::new(false);
/// How long an interpreter that ends waits for calls, which take milliseconds but for the Python code that
/// they run.
const PATIENCE: Duration = Duration::from_secs(30);

/// The thread that ends it.
static LAST: OnceLock<ThreadId> = OnceLock::new();

/// What may give up the GIL while it lives: others' code. Never made where the interpreter is about to
/// end under another thread.
pub(crate) struct Outside;

impl Outside {
    pub(crate) fn new(py: Python<'_>) -> Self {
        if is_ending() && LAST.get() != Some(&thread::current().id()) {
            py.detach(|| {
                loop {
                    thread::park()
                }
            });
        }
        OUTSIDE.fetch_add(1, Ordering::SeqCst);
        Self
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        // None where the thread was forked meanwhile.
        let _ = OUTSIDE.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |outside| outside.checked_sub(1));
    }
}

fn is_ending() -> bool {
    ENDING.load(Ordering::SeqCst)
}

/// Does `work` while other threads of Python go on; under the GIL where the interpreter is about to end.
/// `outside` where the caller is so already.
pub(crate) fn detach<T: Ungil>(
    py: Python<'_>,
    outside: Option<&Outside>,
    work: impl Ungil + FnOnce() -> T,
) -> T {
    // With the GIL: `wait` has either not begun, and will see that this call is outside, or has.
    if is_ending() {
        return work();
    }
    let _outside = outside.is_none().then(|| Outside::new(py));
    py.detach(work)
}

/// Has the interpreter call [`wait`] when it ends.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    // Threads that were outside stay with the parent of a fork.
    extern "C" fn forked() {
        OUTSIDE.store(0, Ordering::SeqCst);
    }
    // SAFETY: a function that may be called in a forked child: it stores a number.
    unsafe { libc::pthread_atfork(None, None, Some(forked)) };
    let wait = wrap_pyfunction!(wait, module)?;
    module.py().import("atexit")?.call_method1("register", (wait,)).map(drop)
}

/// Waits until no other thread is outside. On return the GIL is held, and no call gives it up any more.
#[pyfunction]
fn wait(py: Python<'_>) {
    LAST.get_or_init(|| thread::current().id());
    ENDING.store(true, Ordering::SeqCst);
    let start = Instant::now();
    while OUTSIDE.load(Ordering::SeqCst) > 0 && start.elapsed() < PATIENCE {
        py.detach(|| thread::sleep(Duration::from_millis(1)));
    }
}
