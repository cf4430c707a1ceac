//! The causal convolution of a channel, and the windows that are kept of it.

use gdn_math::{Lanes, layer as math};

use super::{
    args::{self, Args, Field},
    element::{load, size, store},
    slots::Read,
};
use crate::gpu::Gpu;

/// A channel of the convolution, for one sequence.
#[derive(Clone, Copy)]
pub(super) struct Channel {
    /// Its feature in the sequence's first row.
    x: u64,
    row_stride: u64,
    dtype: u32,
    /// Its number.
    channel: u64,
    /// Its first column of the window.
    window: u64,
}

impl Channel {
    /// Channel `channel`, which is feature `i` of a key head's in a field.
    #[inline(always)]
    pub(super) fn new(
        args: &Args,
        read: &Read,
        field: &Field,
        row: u64,
        head: u32,
        i: u32,
        channel: u32,
    ) -> Self {
        let [of_slot, of_channel, of_column] = args.conv_state.strides;
        let channel = u64::from(channel);
        let x = field.address
            + row * field.row_stride
            + u64::from(head) * field.head_step
            + u64::from(i * size(field.dtype));
        let window = args.conv_state.address
            + read.conv as u64 * of_slot
            + channel * of_channel
            + u64::from(read.first_column(args)) * of_column;
        Self { x, row_stride: field.row_stride, dtype: field.dtype, channel, window }
    }

    /// Input `i`: W - 1 of the window, then those of the call.
    ///
    /// # Safety
    /// It is one of them.
    #[inline(always)]
    unsafe fn input(&self, gpu: &impl Gpu, args: &Args, i: u32) -> f32 {
        let before = args.conv_width - 1;
        let [.., of_column] = args.conv_state.strides;
        // SAFETY: the caller's promise.
        unsafe {
            if i < before {
                load(gpu, args.conv_state.dtype, self.window + u64::from(i) * of_column)
            } else {
                load(gpu, self.dtype, self.x + u64::from(i - before) * self.row_stride)
            }
        }
    }

    /// silu of the convolution at token `t`. `W` taps, or those of the arguments where it is 0.
    ///
    /// # Safety
    /// The channel and the token are there.
    #[inline(always)]
    pub(super) unsafe fn convolved<const W: usize>(&self, gpu: &impl Gpu, args: &Args, t: u32) -> f32 {
        let [of_channel, of_tap] = args.conv_weight.strides;
        let weight = args.conv_weight.address + self.channel * of_channel;
        // SAFETY: the caller's promise.
        unsafe {
            let tap = |i: u32| load(gpu, args.conv_weight.dtype, weight + u64::from(i) * of_tap);
            let mut sum = 0.0;
            if args.conv_bias.address != 0 {
                let at = args.conv_bias.address + self.channel * args.conv_bias.stride;
                sum = load(gpu, args.conv_bias.dtype, at);
            }
            if W > 0 {
                // All are on their way before the first is used.
                let (mut taps, mut inputs) = ([0.0; W], [0.0; W]);
                let mut i = 0;
                while i < W {
                    taps[i] = tap(i as u32);
                    inputs[i] = self.input(gpu, args, t + i as u32);
                    i += 1;
                }
                let mut i = 0;
                while i < W {
                    sum = Lanes::mul_add(inputs[i], taps[i], sum);
                    i += 1;
                }
            } else {
                let mut i = 0;
                while i < args.conv_width {
                    sum = Lanes::mul_add(self.input(gpu, args, t + i), tap(i), sum);
                    i += 1;
                }
            }
            math::activation(sum)
        }
    }

    /// Keeps the channel's windows. One thread moves a channel's columns, in order, so a window may move onto itself.
    ///
    /// # Safety
    /// The channel is there; whoever else reads its window has done so.
    #[inline(always)]
    pub(super) unsafe fn keep(&self, gpu: &impl Gpu, args: &Args, read: &Read, sequence: u32) {
        let kept = &args.conv_kept;
        let (tokens, width) = (args.tokens, args.conv_width);
        let [.., of_channel, of_column] = kept.to.strides;
        // SAFETY: the caller's promise.
        unsafe {
            if kept.kind == args::EACH_IN {
                let mut t = 0;
                while t < tokens {
                    let to = kept.address(gpu, args, sequence, read.conv, t);
                    let mut column = 0;
                    while to != 0 && column + 1 < width {
                        let x = self.input(gpu, args, t + 1 + column);
                        let at = to + self.channel * of_channel + u64::from(column) * of_column;
                        store(gpu, kept.to.dtype, at, x);
                        column += 1;
                    }
                    t += 1;
                }
                return;
            }
            let to = kept.address(gpu, args, sequence, read.conv, tokens - 1);
            if to == 0 {
                return;
            }
            // Column `old + i` goes to column i for the first `stay`, and the last inputs to those up to `columns`.
            let (old, stay, columns) = if read.accepted > 0 {
                (
                    read.accepted,
                    width.saturating_sub(2),
                    (width + tokens).saturating_sub(2).min(args.conv_columns),
                )
            } else {
                (tokens, args.conv_columns.saturating_sub(tokens), args.conv_columns)
            };
            let [of_slot, from_channel, from_column] = args.conv_state.strides;
            let from = args.conv_state.address + read.conv as u64 * of_slot + self.channel * from_channel;
            let to = to + self.channel * of_channel;
            let mut column = 0;
            while column < columns {
                let x = if column < stay {
                    load(gpu, args.conv_state.dtype, from + u64::from(old + column) * from_column)
                } else {
                    load(gpu, self.dtype, self.x + u64::from(tokens - (columns - column)) * self.row_stride)
                };
                store(gpu, kept.to.dtype, to + u64::from(column) * of_column, x);
                column += 1;
            }
        }
    }
}
