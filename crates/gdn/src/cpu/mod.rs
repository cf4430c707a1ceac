//! The CPU backend, and [`Cpu`], the choices a caller has.

mod cache;
mod chunk;
mod copy;
mod decode;
mod isa;
mod lanes;
mod peak;
mod prefill;
mod recurrence;
mod scratch;
mod slots;
mod split;
mod stages;
mod threads;

use std::{fmt, num::NonZeroUsize};

use rayon::prelude::*;

use self::copy::{Copier, LINE};

pub use cache::{Cache, caches, last_level_bytes};
pub use chunk::BLOCK as PREFILL_BLOCK;
pub use decode::{CheckedDecode, decode};
pub use isa::{Isa, IsaError};
pub use peak::{multiply_add, silu};
pub use prefill::prefill;
pub use split::{merge, merge_fresh, split, split_fresh};
pub use threads::Executor;

/// How results are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Stores {
    /// Streaming for outputs that no cache would hold, cached for smaller ones.
    #[default]
    Auto,
    /// Through the caches.
    Cached,
    /// Past the caches, where the instruction set can.
    Streaming,
}

/// How the CPU is to do the work: a small value, made once or for each call.
///
/// The default chooses everything by itself. Every choice gives the same bits.
///
/// ```
/// use gdn::cpu::{Cpu, Isa};
/// let cpu = Cpu::new().threads(2).isa(Isa::Scalar)?;
/// # Ok::<(), gdn::cpu::IsaError>(())
/// ```
#[derive(Clone, Copy, Default)]
pub struct Cpu<'a> {
    threads: Option<NonZeroUsize>,
    executor: Option<&'a dyn Executor>,
    isa: Option<Isa>,
    rows_per_iter: Option<NonZeroUsize>,
    stores: Stores,
}

/// The least bytes (read and written together) worth a thread's waking up.
const BYTES_PER_THREAD: usize = 1 << 20;
/// What a thread may count on having of a last-level cache that others share. Measured: from here on
/// streaming was never slower.
const CACHE_BYTES_PER_THREAD: usize = 8 << 20;
/// What all threads together may count on. Measured with 16 threads: ordinary stores take as long as streaming
/// ones for 25 MB, and 1.1 and 1.5 times as long for 50 and 75 MB.
const CACHE_BYTES: usize = 32 << 20;

impl fmt::Debug for Cpu<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { threads, executor, isa, rows_per_iter, stores } = self;
        f.debug_struct("Cpu")
            .field("threads", threads)
            .field("executor", &executor.map(|_| "the caller's"))
            .field("isa", isa)
            .field("rows_per_iter", rows_per_iter)
            .field("stores", stores)
            .finish()
    }
}

impl<'a> Cpu<'a> {
    /// Everything automatic.
    pub fn new() -> Self {
        Self::default()
    }

    /// At most this many threads, those of the rayon pool the call is made in (the global one, else); 0 is
    /// automatic: as many as the pool has, and one where there is too little work to share.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = NonZeroUsize::new(threads);
        self
    }

    /// The work of more than one thread goes through `executor` instead of rayon: for engines with threads of
    /// their own, which would otherwise compete with rayon's. To be used with [`threads`](Self::threads), as
    /// only the caller knows how many threads the executor has.
    ///
    /// ```
    /// use gdn::Cpu;
    /// let scoped = |chunks: usize, work: &(dyn Fn(usize) + Sync)| {
    ///     std::thread::scope(|scope| {
    ///         (0..chunks).for_each(|i| { scope.spawn(move || work(i)); });
    ///     });
    /// };
    /// let cpu = Cpu::new().threads(2).executor(&scoped);
    /// # let _ = cpu;
    /// ```
    #[must_use]
    pub fn executor(mut self, executor: &'a dyn Executor) -> Self {
        self.executor = Some(executor);
        self
    }

    /// This instruction set instead of the best one.
    ///
    /// # Errors
    /// [`IsaError`].
    pub fn isa(mut self, isa: Isa) -> Result<Self, IsaError> {
        self.isa = Some(isa.checked()?);
        Ok(self)
    }

    /// So many rows at a time instead of as many as [`tiling::plan`](crate::tiling::plan) finds to fit the
    /// cache; 0 is automatic.
    #[must_use]
    pub fn rows_per_iter(mut self, rows: usize) -> Self {
        self.rows_per_iter = NonZeroUsize::new(rows);
        self
    }

    /// How results are stored.
    #[must_use]
    pub fn stores(mut self, stores: Stores) -> Self {
        self.stores = stores;
        self
    }

    /// The instruction set a call will use.
    pub fn chosen_isa(&self) -> Isa {
        self.isa.unwrap_or_else(Isa::detect)
    }

    /// The threads a call that reads and writes `bytes` in all will use.
    pub fn chosen_threads(&self, bytes: usize) -> usize {
        match self.threads {
            Some(threads) => threads.get(),
            // Asking for the pool would start it.
            None if bytes < 2 * BYTES_PER_THREAD => 1,
            None => rayon::current_num_threads().min(bytes / BYTES_PER_THREAD),
        }
    }

    /// Whether a call that writes `bytes` will stream them: automatically where they are more than the
    /// last-level cache has, or than what of it is likely to stay there: 8 MiB a thread, 32 MiB in all.
    pub fn chosen_streaming(&self, bytes: usize) -> bool {
        match self.stores {
            Stores::Streaming => true,
            Stores::Cached => false,
            Stores::Auto => {
                let threads = self.chosen_threads(bytes.saturating_mul(2));
                let share = CACHE_BYTES_PER_THREAD.saturating_mul(threads).min(CACHE_BYTES);
                bytes > CACHE_BYTES_PER_THREAD && bytes > share.min(last_level_bytes().unwrap_or(share))
            }
        }
    }
}

/// A plain copy of bytes by as many threads as `cpu` says, with `memcpy` or with streaming stores: what the
/// ops are measured against. Copies as many bytes as the shorter slice has.
pub fn copy_bytes(src: &[u8], dst: &mut [u8], cpu: &Cpu) {
    let bytes = src.len().min(dst.len());
    let stream = cpu.chosen_streaming(bytes);
    let isa = cpu.chosen_isa();
    let copy = |(src, dst): (&[u8], &mut [u8])| {
        if stream {
            let copier = Copier::of(isa);
            // SAFETY: the chunks of two slices, one of them exclusive, are of one length.
            unsafe { (copier.stream)(src.as_ptr(), dst.as_mut_ptr(), src.len()) }
            (copier.fence)();
        } else {
            dst.copy_from_slice(src);
        }
    };
    let (src, dst) = (&src[..bytes], &mut dst[..bytes]);
    match cpu.chosen_threads(2 * bytes) {
        1 => copy((src, dst)),
        threads => {
            let chunk = bytes.div_ceil(threads).next_multiple_of(LINE);
            src.par_chunks(chunk).zip(dst.par_chunks_mut(chunk)).with_max_len(1).for_each(copy);
        }
    }
}
