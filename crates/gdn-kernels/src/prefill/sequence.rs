//! Which tokens and slots a sequence has. Indices are read here, on the device; whatever they say, nothing
//! outside the tensors is touched.

use super::args::{Args, CHUNK, Indices, Strided};
use crate::gpu::Gpu;

/// A sequence of the call.
#[derive(Clone, Copy)]
pub(super) struct Sequence {
    pub(super) number: u32,
    /// Its first token.
    pub(super) start: u64,
    /// Its tokens.
    pub(super) len: u64,
    /// Its first chunk. Those of sequence r begin at `cu_seqlens[r] / CHUNK + r`: no two sequences share one,
    /// and no sum over the sequences before is needed.
    pub(super) first_chunk: u32,
    /// Of its states; -1 for padding.
    pub(super) slot: i64,
    /// Whether it begins with the states of its slot.
    pub(super) is_initial: bool,
}

/// Index `i` of some.
///
/// # Safety
/// There are so many.
#[inline(always)]
unsafe fn index(gpu: &impl Gpu, indices: &Indices, i: u32) -> i64 {
    let at = indices.address + u64::from(i) * indices.row;
    // SAFETY: the caller's promise.
    unsafe {
        match indices.size {
            8 => gpu.load8(at) as i64,
            4 => i64::from(gpu.load4(at) as i32),
            _ => i64::from(gpu.load1(at)),
        }
    }
}

/// Where sequence `i` begins: 0 to N, whatever the entry.
///
/// # Safety
/// There are so many entries.
#[inline(always)]
unsafe fn entry(gpu: &impl Gpu, args: &Args, i: u32) -> u64 {
    // SAFETY: the caller's promise.
    let entry = unsafe { index(gpu, &args.cu_seqlens, i) };
    if entry < 0 { 0 } else { (entry as u64).min(args.num_tokens) }
}

/// The first chunk of sequence `number`.
///
/// # Safety
/// There are so many, and the indices of the arguments are there.
#[inline(always)]
pub(super) unsafe fn first_chunk(gpu: &impl Gpu, args: &Args, number: u32) -> u32 {
    // SAFETY: the caller's promise.
    chunk_of(unsafe { entry(gpu, args, number) }, number)
}

#[inline(always)]
fn chunk_of(entry: u64, number: u32) -> u32 {
    (entry / u64::from(CHUNK)) as u32 + number
}

impl Sequence {
    /// Sequence `number`.
    ///
    /// # Safety
    /// There are so many, and the indices of the arguments are there.
    #[inline(always)]
    pub(super) unsafe fn new(gpu: &impl Gpu, args: &Args, number: u32) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let (start, end) = (entry(gpu, args, number), entry(gpu, args, number + 1));
            let mut slot = i64::from(number);
            if args.state_indices.address != 0 {
                slot = index(gpu, &args.state_indices, number);
            }
            let has = |address: u64, slots: i64| address == 0 || slot < slots;
            let is_there = slot >= 0
                && slot != args.pad_slot_id
                && has(args.conv_state.address, args.conv_slots)
                && has(args.state.address, args.slots);
            let flags = &args.has_initial_state;
            Self {
                number,
                start,
                len: end.saturating_sub(start),
                first_chunk: chunk_of(start, number),
                slot: if is_there || args.state_indices.address == 0 { slot } else { -1 },
                is_initial: flags.address == 0 || index(gpu, flags, number) != 0,
            }
        }
    }

    /// The sequence of a chunk, and the tokens of it before the chunk; `None` for a chunk that nobody has.
    ///
    /// # Safety
    /// As [`Sequence::new`].
    #[inline(always)]
    pub(super) unsafe fn of_chunk(gpu: &impl Gpu, args: &Args, chunk: u32) -> Option<(Self, u64)> {
        // SAFETY: the caller's promise.
        let sequence = unsafe { Self::last_before(gpu, args, chunk) };
        if chunk < sequence.first_chunk {
            return None;
        }
        let before = u64::from(chunk - sequence.first_chunk) * u64::from(CHUNK);
        if before < sequence.len { Some((sequence, before)) } else { None }
    }

    /// The last sequence that begins with a chunk or before it; the first one, where none does.
    ///
    /// # Safety
    /// As [`Sequence::new`].
    #[inline(always)]
    pub(super) unsafe fn last_before(gpu: &impl Gpu, args: &Args, chunk: u32) -> Self {
        let (mut low, mut high) = (0, args.num_sequences);
        // SAFETY: the caller's promise.
        unsafe {
            while high - low > 1 {
                let middle = low + (high - low) / 2;
                if first_chunk(gpu, args, middle) <= chunk {
                    low = middle;
                } else {
                    high = middle;
                }
            }
            Self::new(gpu, args, low)
        }
    }

    /// Its chunks.
    #[inline(always)]
    pub(super) fn chunks(&self) -> u32 {
        self.len.div_ceil(u64::from(CHUNK)) as u32
    }

    /// Where checkpoint `i` of it goes in a tensor of checkpoints, 0 for nowhere.
    ///
    /// # Safety
    /// The indices of the arguments are there.
    #[inline(always)]
    pub(super) unsafe fn checkpoint<const D: usize>(
        &self,
        gpu: &impl Gpu,
        args: &Args,
        i: u32,
        to: &Strided<D>,
    ) -> u64 {
        // SAFETY: the caller's promise.
        let start = unsafe { index(gpu, &args.starts, self.number) };
        let place = start.wrapping_add(i64::from(i));
        if to.address == 0 || start < 0 || place < 0 || place >= args.checkpoint_slots {
            return 0;
        }
        to.address + place as u64 * to.strides[0]
    }
}
