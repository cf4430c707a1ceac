//! Which chunks a block has: those of a sequence in the window, or of one of its segments.
//!
//! A long sequence is cut into segments of whole chunks, which go forward side by side: what a segment makes
//! of the state that it begins with is `S -> S M + Z`, row by row. The preparation of that
//! ([`transition`](super::transition)) brings Z and M forward, from zeros without and from the identity with
//! no values, [`combine`](super::combine) goes from segment to segment, and the scan makes the outputs, each
//! segment from the state that it begins with. How a sequence is cut depends on its chunks and the
//! layer's heads alone.

use super::{
    args::{Args, Segments},
    sequence::{Sequence, first_chunk},
};
use crate::gpu::Gpu;

/// What a block goes through.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub(super) sequence: Sequence,
    /// Of the sequence's segments this one. A sequence that is not cut is one.
    pub(super) index: u32,
    /// The segment's first chunk.
    pub(super) first: u32,
    /// The one after its last.
    pub(super) end: u32,
    /// Its chunks of the window.
    pub(super) from: u32,
    pub(super) to: u32,
    /// Whether it is the sequence's last segment.
    pub(super) is_last: bool,
    /// Whether there is any of it in the window, and a slot for its states.
    pub(super) is_there: bool,
}

/// The chunks of a segment of a sequence with so many.
#[inline(always)]
pub(super) fn length(args: &Args, chunks: u32) -> u32 {
    let Segments { from, most, shortest, longest, .. } = &args.segments;
    if chunks < *from {
        return chunks.max(1);
    }
    most.divide(chunks + most.get() - 1).0.min(*longest).max(shortest.get())
}

/// Rounded down. Nobody divides by zero, and the compiler need not know.
#[inline(always)]
fn divide(number: u32, by: u32) -> u32 {
    number.checked_div(by).unwrap_or(0)
}

impl Part {
    /// That of group `group` of the scan's blocks: a sequence, or where sequences are cut, one of their
    /// segments.
    ///
    /// The parts of sequence r are numbered from r on: what goes on from the window before first, then by
    /// where they begin in the window, in steps of the shortest segment. No two are one number. Those of a
    /// sequence alone are numbered one after the other, so that there are no blocks without one.
    ///
    /// # Safety
    /// The indices of the arguments are there.
    #[inline(always)]
    pub(super) unsafe fn of_group(gpu: &impl Gpu, args: &Args, group: u32) -> Self {
        let (window, shortest) = (args.first_chunk, &args.segments.shortest);
        // SAFETY: the caller's promise.
        unsafe {
            if args.segments.is_cut == 0 {
                return Self::new(args, Sequence::new(gpu, args, group), 0);
            }
            let number = |sequence: u32| {
                let first = first_chunk(gpu, args, sequence);
                if first < window { sequence } else { sequence + 1 + shortest.divide(first - window).0 }
            };
            let (mut low, mut high) = (0, args.num_sequences);
            while high - low > 1 {
                let middle = low + (high - low) / 2;
                if number(middle) <= group {
                    low = middle;
                } else {
                    high = middle;
                }
            }
            let sequence = Sequence::new(gpu, args, low);
            let length = length(args, sequence.chunks());
            // The segment that has the window's first chunk, or the first that begins at `at` or behind.
            let mut index = divide(window.saturating_sub(sequence.first_chunk), length);
            // Where it is to begin, and in how many chunks.
            let (mut at, mut within) = (0, if sequence.first_chunk < window { window } else { 0 });
            if args.num_sequences == 1 {
                (index, within) = (index + group, u32::MAX);
            } else if group > low {
                at = (group - low - 1).saturating_mul(shortest.get()).saturating_add(window);
                within = shortest.get();
                let before = at.saturating_sub(sequence.first_chunk);
                index = divide(before.saturating_add(length - 1), length);
            }
            let mut part = Self::new(args, sequence, index);
            part.is_there &= part.first.wrapping_sub(at) < within;
            part
        }
    }

    /// The segment that place `place` of the window's is for: 0 for the one that goes on from the window
    /// before, then by where they begin in the window, in steps of the shortest segment. Only those that
    /// others follow have a place. Of a sequence alone as [`Part::of_group`].
    ///
    /// # Safety
    /// As [`Part::of_group`].
    #[inline(always)]
    pub(super) unsafe fn of_place(gpu: &impl Gpu, args: &Args, place: u32) -> Self {
        let (window, shortest) = (args.first_chunk, args.segments.shortest.get());
        if args.num_sequences == 1 {
            // SAFETY: the caller's promise.
            let sequence = unsafe { Sequence::new(gpu, args, 0) };
            let mut part = Self::behind(args, sequence, place);
            part.is_there &= !part.is_last;
            return part;
        }
        // A segment that others follow is as long as the shortest, so it has the last chunk of its step.
        let chunk = if place == 0 { window } else { window + place * shortest - 1 };
        // SAFETY: the caller's promise.
        let sequence = unsafe { Sequence::last_before(gpu, args, chunk) };
        let mut part = Self::containing(args, sequence, chunk);
        let before = chunk.wrapping_sub(part.first);
        part.is_there &= !part.is_last && chunk < part.end;
        part.is_there &= if place == 0 { part.first < window } else { before < shortest };
        part
    }

    /// Of the segments that end in the window the first of the `number`th sequence that is cut; 0 for the
    /// sequence that goes on from the window before. Of a sequence alone, which is the only number, its own.
    ///
    /// # Safety
    /// As [`Part::of_group`].
    #[inline(always)]
    pub(super) unsafe fn of_sequence(gpu: &impl Gpu, args: &Args, number: u32) -> Self {
        let (window, from) = (args.first_chunk, args.segments.from);
        if args.num_sequences == 1 {
            // SAFETY: the caller's promise.
            let sequence = unsafe { Sequence::new(gpu, args, 0) };
            let mut part = Self::behind(args, sequence, 0);
            part.is_there &= part.sequence.chunks() >= from;
            return part;
        }
        // A sequence that is cut has a multiple of so many chunks, and is found by its first.
        let multiple = divide(window + from - 1, from) * from;
        let chunk = if number == 0 { window } else { multiple + (number - 1) * from };
        // SAFETY: the caller's promise.
        let sequence = unsafe { Sequence::last_before(gpu, args, chunk) };
        let first = sequence.first_chunk;
        let mut part = Self::containing(args, sequence, first.max(window));
        part.is_there &= sequence.chunks() >= from && chunk < first + sequence.chunks();
        part.is_there &=
            if number == 0 { first < window } else { first >= window && chunk.wrapping_sub(first) < from };
        part
    }

    /// The segment of a sequence that is so many behind the window's first.
    #[inline(always)]
    fn behind(args: &Args, sequence: Sequence, number: u32) -> Self {
        let first = Self::containing(args, sequence, args.first_chunk);
        Self::new(args, sequence, first.index + number)
    }

    /// The segment of a sequence that has a chunk.
    #[inline(always)]
    fn containing(args: &Args, sequence: Sequence, chunk: u32) -> Self {
        let before = chunk.saturating_sub(sequence.first_chunk);
        Self::new(args, sequence, divide(before, length(args, sequence.chunks())))
    }

    /// Segment `index` of a sequence.
    #[inline(always)]
    fn new(args: &Args, sequence: Sequence, index: u32) -> Self {
        let chunks = sequence.chunks();
        let length = length(args, chunks);
        let first = sequence.first_chunk.wrapping_add(index.wrapping_mul(length));
        let sequence_end = sequence.first_chunk + chunks;
        let end = (first + length).min(sequence_end);
        // A sequence without tokens has the number of a chunk too.
        let last = end.max(first + 1) - 1;
        let is_there = sequence.slot >= 0
            && (index == 0 || first < sequence_end)
            && last >= args.first_chunk
            && first < args.end_chunk;
        Self {
            sequence,
            index,
            first,
            end,
            from: first.max(args.first_chunk),
            to: end.min(args.end_chunk),
            is_last: end == sequence_end,
            is_there,
        }
    }

    /// From this segment to the last one.
    #[inline(always)]
    pub(super) fn walk(&self, args: &Args) -> Walk {
        let chunks = self.sequence.chunks();
        let start = self.sequence.first_chunk;
        Walk { start, end: start + chunks, length: length(args, chunks), first: self.first }
    }

    /// Whether its last chunk is in the window, or before.
    #[inline(always)]
    pub(super) fn ends(&self, args: &Args) -> bool {
        self.end.max(self.first + 1) <= args.end_chunk
    }

    /// Whether it was begun in a window before.
    #[inline(always)]
    pub(super) fn goes_on(&self) -> bool {
        self.from > self.first
    }

    /// Where Z of a segment is that others follow, and behind that of all heads M: of one that ends in the
    /// window. Z becomes the state that the next one begins with.
    #[inline(always)]
    pub(super) fn made(&self, args: &Args) -> u64 {
        made(args, self.first)
    }

    /// Where the state is that a segment behind others begins with.
    #[inline(always)]
    pub(super) fn begins_with(&self, args: &Args) -> u64 {
        if self.first <= args.first_chunk {
            return args.segments.starts[0];
        }
        let before = Self::new(args, self.sequence, self.index.saturating_sub(1));
        before.made(args)
    }
}

/// Of the segment that begins with chunk `first`.
#[inline(always)]
fn made(args: &Args, first: u32) -> u64 {
    let Segments { places, place_bytes, shortest, .. } = &args.segments;
    let window = args.first_chunk;
    let place = if first < window { 0 } else { 1 + shortest.divide(first - window).0 };
    places + u64::from(place) * place_bytes
}

/// From segment to segment of a sequence.
pub(super) struct Walk {
    /// The sequence's first chunk, and the one after its last.
    start: u32,
    end: u32,
    /// Chunks of a segment.
    length: u32,
    /// The segment's first.
    first: u32,
}

impl Walk {
    #[inline(always)]
    pub(super) fn is_first(&self) -> bool {
        self.first == self.start
    }

    /// Whether the segment ends in the window and others follow.
    #[inline(always)]
    pub(super) fn is_made(&self, args: &Args) -> bool {
        let end = self.first + self.length;
        end <= args.end_chunk && end < self.end
    }

    /// Whether the segment, which is not the first, ends in the next window or behind.
    #[inline(always)]
    pub(super) fn is_open(&self, args: &Args) -> bool {
        !self.is_first() && (self.first + self.length).min(self.end) > args.end_chunk
    }

    /// See [`Part::made`].
    #[inline(always)]
    pub(super) fn made(&self, args: &Args) -> u64 {
        made(args, self.first)
    }

    /// To the next one.
    #[inline(always)]
    pub(super) fn go_on(&mut self) {
        self.first += self.length;
    }
}
