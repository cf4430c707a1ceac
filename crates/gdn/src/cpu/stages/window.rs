//! The windows of `conv_state`, read and kept for one key head.

use super::{
    Group,
    elements::{at, load, load_columns, step, store, store_columns},
    features,
};
use crate::{cpu::lanes::Register, dtype::Dtype, tensor::Operand};

impl Group<'_> {
    /// Takes what lies before the tokens to come from a window of `conv_state`: columns `first` to `first + W
    /// - 2` of a slot. `None` for zeros.
    ///
    /// # Safety
    /// The window can be read; the machine has L's instruction set.
    #[inline(always)]
    pub(in crate::cpu) unsafe fn read_window<L: Register>(
        &mut self,
        window: Option<(&Operand<*mut u8, Dtype, 3>, usize, usize)>,
    ) {
        let before = self.tokens.layer.conv_width - 1;
        for part in &mut self.parts {
            let row = part.row;
            let Some((state, slot, first)) = window else {
                part.inputs[..before * row].fill(0.0);
                continue;
            };
            // Columns that lie side by side are read together, and a first one that is not asked for goes to
            // where nobody reads it.
            let (sizes, size) = (state.sizes, state.kind.size());
            let unread = if sizes[2] == before + 1 && step(state, 2) == size { first } else { 0 };
            let (inputs, line) = (part.inputs.as_mut_ptr(), self.line.as_mut_ptr());
            let src = at(state, [slot, part.channel, first - unread]);
            let steps = [step(state, 1), step(state, 2)];
            let dst = |column: usize| match column.checked_sub(unread) {
                // SAFETY: a row of the scratch memory.
                Some(column) => unsafe { inputs.add(column * row) },
                None => line,
            };
            // SAFETY: the caller's promise; rows of the scratch memory, the line as long as any part.
            unsafe { load_columns::<L>(state.kind, src, steps, part.len, before + unread, dst) };
        }
    }

    /// Writes some columns, no more than there are inputs: those up to token `upto` of those taken last.
    /// `steps` are bytes from a channel and from a column to the next.
    ///
    /// # Safety
    /// The window can be written; the machine has L's instruction set.
    #[inline(always)]
    pub(in crate::cpu) unsafe fn write_window<L: Register>(
        &self,
        window: *mut u8,
        dtype: Dtype,
        steps: [usize; 2],
        columns: usize,
        upto: usize,
    ) {
        let first = self.tokens.layer.conv_width - 1 + upto - columns;
        for part in &self.parts {
            let src = |column: usize| part.inputs[(first + column) * part.row..].as_ptr();
            let dst = window.wrapping_add(part.channel * steps[0]);
            // SAFETY: the caller's promise; rows of the scratch memory.
            unsafe { store_columns::<L>(dtype, src, part.len, columns, dst, steps) };
        }
    }

    /// Brings a slot of `conv_state` up to date: column `old + i` of slot `from` (without one, zeros) goes to
    /// column i of slot `to` for the first `kept` columns, and the inputs of the last tokens, of `num_tokens`
    /// from row `first` on, go to the columns up to `columns`.
    ///
    /// # Safety
    /// Both slots can be read and written and the rows read, `old` is at least 1 where the slots are one, and
    /// the columns are there. The machine has L's instruction set.
    #[allow(clippy::too_many_arguments, reason = "a move with its two ends")]
    #[inline(always)]
    pub(in crate::cpu) unsafe fn roll_window<L: Register>(
        &mut self,
        state: &Operand<*mut u8, Dtype, 3>,
        [from, to]: [Option<usize>; 2],
        old: usize,
        kept: usize,
        columns: usize,
        first: usize,
        num_tokens: usize,
    ) {
        let (Some(to), channel_step) = (to, step(state, 1)) else { return };
        let size = state.kind.size();
        // Where a channel's columns lie side by side and channels likewise, all that stays moves as one
        // stretch.
        let is_stretch =
            columns == state.sizes[2] && step(state, 2) == size && channel_step == columns * size;
        for part in &self.parts {
            let mut next = 0;
            if let (Some(from), true) = (from, is_stretch && kept > 0) {
                let src = at(state, [from, part.channel, old]);
                let bytes = part.len * channel_step - old * size;
                // SAFETY: the part's columns but the first `old`.
                unsafe { std::ptr::copy(src, at(state, [to, part.channel, 0]), bytes) };
                next = kept;
            }
            for column in next..columns {
                let dst = at(state, [to, part.channel, column]);
                let line = self.line.as_mut_ptr();
                // SAFETY: the caller's promises; the line is as long as any part.
                unsafe {
                    if column >= kept {
                        let token = num_tokens - (columns - column);
                        let src = features(&part.field, self.head, first + token);
                        load::<L>(part.field.dtype, src, part.field.dtype.size(), part.len, line);
                    } else if let Some(from) = from {
                        let src = at(state, [from, part.channel, old + column]);
                        load::<L>(state.kind, src, channel_step, part.len, line);
                    } else {
                        std::slice::from_raw_parts_mut(line, part.len).fill(0.0);
                    }
                    store::<L>(state.kind, line, part.len, dst, channel_step);
                }
            }
        }
    }

    /// Keeps the last inputs as what lies before the tokens to come.
    pub(in crate::cpu) fn keep_inputs(&mut self, num_tokens: usize) {
        let before = self.tokens.layer.conv_width - 1;
        for part in &mut self.parts {
            let row = part.row;
            part.inputs.copy_within(num_tokens * row..(num_tokens + before) * row, 0);
        }
    }
}
