//! What is read later is asked for ahead.

use std::ops::Range;

use super::{
    Group, Part,
    elements::{at, step},
    features,
};
use crate::{
    cpu::{copy::LINE, lanes::Register},
    dtype::Dtype,
    layer::Field,
    tensor::Operand,
};

/// What is to be read soon, which is asked for a few lines at a time: a processor that waits for many has
/// none left for what it reads now.
pub(in crate::cpu) struct Upcoming<const N: usize> {
    stretches: [Stretch; N],
    num_rows: usize,
    /// The line that comes next.
    row: usize,
    stretch: usize,
    offset: usize,
}

/// What a sequence of decode begins with.
pub(in crate::cpu) type Beginning = Upcoming<11>;
/// What a chunk of prefill ends with, and the next one begins with.
pub(in crate::cpu) type NextChunk = Upcoming<5>;

/// Some bytes of each row.
#[derive(Clone, Copy)]
struct Stretch {
    at: *const u8,
    bytes: usize,
    step: usize,
}

impl Stretch {
    /// Of one row alone.
    fn alone(at: *const u8, bytes: usize) -> Self {
        let before = if bytes > 0 { at.addr() % LINE } else { 0 };
        Self { at: at.wrapping_sub(before), bytes: before + bytes, step: 0 }
    }
}

impl<const N: usize> Upcoming<N> {
    /// Nothing.
    pub(in crate::cpu) fn none() -> Self {
        Self::of([Stretch::alone(std::ptr::null(), 0); N], 0)
    }

    fn of(stretches: [Stretch; N], num_rows: usize) -> Self {
        Self { stretches, num_rows, row: 0, stretch: 0, offset: 0 }
    }

    /// How many there are.
    pub(in crate::cpu) fn lines(&self) -> usize {
        self.num_rows * self.stretches.iter().map(|stretch| stretch.bytes.div_ceil(LINE)).sum::<usize>()
    }

    /// Has so many of them brought near.
    #[inline(always)]
    pub(in crate::cpu) fn bring<L: Register>(&mut self, lines: usize) {
        for _ in 0..lines {
            while self.row < self.num_rows && self.offset >= self.stretches[self.stretch].bytes {
                self.offset = 0;
                self.stretch += 1;
                if self.stretch == self.stretches.len() {
                    self.stretch = 0;
                    self.row += 1;
                }
            }
            if self.row == self.num_rows {
                return;
            }
            let stretch = self.stretches[self.stretch];
            L::prefetch(stretch.at.wrapping_add(self.row * stretch.step + self.offset));
            self.offset += LINE;
        }
    }
}

impl Group<'_> {
    /// What a sequence begins with: its window of `conv_state`, where channels lie side by side, and its first row
    /// of q, k, v, z and `out`. Of the `next_head` its taps, too, where they lie so.
    pub(in crate::cpu) fn beginning(
        &self,
        state: &Operand<*mut u8, Dtype, 3>,
        slot: usize,
        row: usize,
        next_head: bool,
    ) -> Beginning {
        let (weight, out) = (&self.tokens.conv_weight, &self.tokens.out);
        let (heads, head) = (self.tokens.layer.heads(), self.head + usize::from(next_head));
        let channel = |part: &Part<'_>| part.channel + if next_head { part.len } else { 0 };
        let [taps_q, taps_k, taps_v] = self.parts.each_ref().map(|part| {
            let is_dense = step(weight, 0) <= weight.sizes[1] * weight.kind.size();
            let bytes = if next_head && is_dense { part.len * step(weight, 0) } else { 0 };
            Stretch::alone(at(weight, [channel(part), 0]), bytes)
        });
        let [window_q, window_k, window_v] = self.parts.each_ref().map(|part| {
            let is_dense = step(state, 1) <= state.sizes[2] * state.kind.size();
            let bytes = if is_dense { part.len * step(state, 1) } else { 0 };
            Stretch::alone(at(state, [slot, channel(part), 0]), bytes)
        });
        let input = |field: &Field<*mut u8>, len: usize| {
            Stretch::alone(features(field, head, row), len * field.dtype.size())
        };
        let [q, k, v] = self.parts.each_ref().map(|part| input(&part.field, part.len));
        let z = input(&self.tokens.z, self.parts[2].len);
        let written = Stretch::alone(at(out, [row, head * heads.ratio(), 0]), self.written());
        Upcoming::of([taps_q, taps_k, taps_v, window_q, window_k, window_v, q, k, v, z, written], 1)
    }

    /// What some rows end with, their z and their `out`; and the inputs of as many rows after them, where there
    /// are such.
    pub(in crate::cpu) fn upcoming(&self, rows: Range<usize>, has_next: bool) -> NextChunk {
        let stretch = |field: &Field<*mut u8>, row: usize, len: usize| Stretch {
            at: features(field, self.head, row),
            bytes: len * field.dtype.size(),
            step: field.row_stride,
        };
        let [q, k, v] = self
            .parts
            .each_ref()
            .map(|part| stretch(&part.field, rows.end, if has_next { part.len } else { 0 }));
        let (out, heads) = (&self.tokens.out, self.tokens.layer.heads());
        let written = Stretch {
            at: at(out, [rows.start, self.head * heads.ratio(), 0]),
            bytes: self.written(),
            step: step(out, 0),
        };
        Upcoming::of([stretch(&self.tokens.z, rows.start, self.parts[2].len), written, q, k, v], rows.len())
    }

    /// Bytes of a row of `out` from the first value head on: all of them where they lie side by side.
    fn written(&self) -> usize {
        let (out, heads) = (&self.tokens.out, self.tokens.layer.heads());
        let head = heads.head_v_dim() * out.kind.size();
        if step(out, 1) == head { heads.ratio() * head } else { head }
    }
}
