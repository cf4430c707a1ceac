//! What is read later is asked for ahead.

use std::ops::Range;

use super::{
    Group,
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
pub(in crate::cpu) struct Upcoming {
    stretches: [Stretch; 5],
    num_rows: usize,
    /// The line that comes next.
    row: usize,
    stretch: usize,
    offset: usize,
}

/// Some bytes of each row.
#[derive(Clone, Copy)]
struct Stretch {
    at: *const u8,
    bytes: usize,
    step: usize,
}

impl Upcoming {
    /// How many there are, at least.
    pub(in crate::cpu) fn lines(&self) -> usize {
        self.num_rows * self.stretches.iter().map(|stretch| stretch.bytes.div_ceil(LINE)).sum::<usize>()
    }

    /// Has so many of them brought near.
    #[inline(always)]
    pub(in crate::cpu) fn bring<L: Register>(&mut self, lines: usize) {
        for _ in 0..lines {
            if self.row == self.num_rows {
                return;
            }
            let stretch = self.stretches[self.stretch];
            if self.offset < stretch.bytes {
                L::prefetch(stretch.at.wrapping_add(self.row * stretch.step + self.offset));
            }
            self.offset += LINE;
            if self.offset >= stretch.bytes {
                self.offset = 0;
                self.stretch += 1;
                if self.stretch == self.stretches.len() {
                    self.stretch = 0;
                    self.row += 1;
                }
            }
        }
    }
}

impl Group<'_> {
    /// Has what a sequence begins with brought near: its window of `conv_state`, where channels lie side by
    /// side, and its first row of the projections.
    #[inline(always)]
    pub(in crate::cpu) fn prefetch<L: Register>(
        &self,
        state: &Operand<*mut u8, Dtype, 3>,
        slot: usize,
        row: usize,
    ) {
        let lines = |start: *const u8, bytes: usize| {
            for offset in (0..bytes + LINE - 1).step_by(LINE) {
                L::prefetch(start.wrapping_add(offset));
            }
        };
        for part in &self.parts {
            lines(at(state, [slot, part.channel, 0]), part.len * step(state, 1));
            lines(features(&part.field, self.head, row), part.len * part.field.dtype.size());
        }
        let z = &self.tokens.z;
        lines(features(z, self.head, row), self.parts[2].len * z.dtype.size());
    }

    /// What some rows end with, their z and their `out`; and the inputs of as many rows after them, where there
    /// are such.
    pub(in crate::cpu) fn upcoming(&self, rows: Range<usize>, has_next: bool) -> Upcoming {
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
        let head = heads.head_v_dim() * out.kind.size();
        let written = Stretch {
            at: at(out, [rows.start, self.head * heads.ratio(), 0]),
            bytes: if step(out, 1) == head { heads.ratio() * head } else { head },
            step: step(out, 0),
        };
        Upcoming {
            stretches: [stretch(&self.tokens.z, rows.start, self.parts[2].len), written, q, k, v],
            num_rows: rows.len(),
            row: 0,
            stretch: 0,
            offset: 0,
        }
    }
}
