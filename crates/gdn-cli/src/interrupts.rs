//! Signals that ask the command to end. They are noticed between two pieces of work, so that what is
//! half-written goes with it.

use std::sync::{
    Arc, LazyLock,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use anyhow::Context;
use signal_hook::{consts, flag};

/// Somebody asked the command to end. The output's temporary file is removed on the way out.
#[derive(Debug, thiserror::Error)]
#[error("interrupted, {left}")]
pub(crate) struct Interrupted {
    signal: u8,
    /// What there is of the output.
    left: String,
}

impl Interrupted {
    /// What a shell reports of a command that the signal ended.
    pub(crate) fn exit_code(&self) -> u8 {
        128 + self.signal
    }

    /// The same, where something stays.
    pub(crate) fn with_left(&self, left: String) -> Self {
        Self { signal: self.signal, left }
    }
}

/// Ctrl-C, a polite kill, a terminal that goes away, and no more time. SIGQUIT still ends the command where
/// it stands, for a dump of it.
#[cfg(unix)]
const ENDING: [i32; 4] = [consts::SIGINT, consts::SIGTERM, consts::SIGHUP, consts::SIGXCPU];
#[cfg(not(unix))]
const ENDING: [i32; 2] = [consts::SIGINT, consts::SIGTERM];

/// The last such signal, or 0.
static SIGNAL: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);

/// From here on those signals are noticed by [`check_interrupted`] instead of ending the process where it
/// stands, and a file that grows past `ulimit -f` is an error of the write. Under `nohup` a terminal that
/// goes away is still nothing.
pub(crate) fn catch_interrupts() -> anyhow::Result<()> {
    static CAUGHT: AtomicBool = AtomicBool::new(false);
    if CAUGHT.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    let what = "cannot watch for signals";
    for signal in ENDING {
        if !hang_up_is_ignored(signal) {
            flag::register_usize(signal, Arc::clone(&SIGNAL), signal as usize).context(what)?;
        }
    }
    #[cfg(unix)]
    flag::register(consts::SIGXFSZ, Arc::default()).context(what)?;
    Ok(())
}

/// [`Interrupted`], if that is so.
pub(crate) fn check_interrupted() -> Result<(), Interrupted> {
    match SIGNAL.load(Ordering::Relaxed) {
        0 => Ok(()),
        signal => Err(Interrupted { signal: signal as u8, left: "no output was written".to_owned() }),
    }
}

/// Whether this is SIGHUP, and whoever started the process had it ignored, as `nohup` does. (A shell has
/// Ctrl-C ignored in what a script starts in the background, of which nobody who sends it knows.)
#[cfg(unix)]
fn hang_up_is_ignored(signal: i32) -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: it only asks, and fills in what it is given where it returns 0.
    unsafe {
        signal == consts::SIGHUP
            && libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

#[cfg(not(unix))]
fn hang_up_is_ignored(_: i32) -> bool {
    false
}
