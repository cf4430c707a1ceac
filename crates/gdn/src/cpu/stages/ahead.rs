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
    stretches: [Stretch; 4],
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

    /// Has so many of them brought into the second-level cache.
    #[inline(always)]
    pub(in crate::cpu) fn bring<L: Register>(&mut self, lines: usize) {
        for _ in 0..lines {
            if self.row == self.num_rows {
                return;
            }
            let stretch = self.stretches[self.stretch];
            L::prefetch_for_later(stretch.at.wrapping_add(self.row * stretch.step + self.offset));
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

    /// What is read of rows of the projections.
    pub(in crate::cpu) fn upcoming(&self, rows: Range<usize>) -> Upcoming {
        let stretch = |field: &Field<*mut u8>, len: usize| Stretch {
            at: features(field, self.head, rows.start),
            bytes: len * field.dtype.size(),
            step: field.row_stride,
        };
        let [q, k, v] = &self.parts;
        let stretches = [(&q.field, q.len), (&k.field, k.len), (&v.field, v.len), (&self.tokens.z, v.len)];
        Upcoming {
            stretches: stretches.map(|(field, len)| stretch(field, len)),
            num_rows: rows.len(),
            row: 0,
            stretch: 0,
            offset: 0,
        }
    }
}
