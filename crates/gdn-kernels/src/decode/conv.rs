//! The causal convolution of a channel, and the windows that are kept of it. One thread of one block reads a
//! channel's window and writes it.

use gdn_math::{Lanes, layer as math};

use super::{
    args::{self, Args},
    element::{bits, far, load, number, store, store_bf16},
    slots::Read,
};
use crate::gpu::Gpu;

/// The taps of the convolution, where they are held in registers.
pub(super) const TAPS: usize = 4;

/// A channel of the convolution, for one sequence.
#[derive(Clone, Copy, Default)]
pub(super) struct Channel {
    /// Its feature in the sequence's first row.
    pub(super) x: u64,
    pub(super) row_stride: u64,
    pub(super) dtype: u32,
    /// Its number.
    pub(super) channel: u64,
    /// Its first column of the window.
    pub(super) window: u64,
}

impl Channel {
    /// Channel `channel`, whose input in the sequence's first row is at `x`.
    #[inline(always)]
    pub(super) fn new(
        [is_wide, is_plain]: [bool; 2],
        args: &Args,
        read: &Read,
        x: u64,
        row_stride: u64,
        dtype: u32,
        channel: u32,
    ) -> Self {
        let [of_slot, of_channel, of_column] = args.conv_state.strides;
        let channel = u64::from(channel);
        let window = args.conv_state.address
            + far(is_wide, read.conv as u64, of_slot)
            + far(is_wide, channel, of_channel)
            + far(is_wide, u64::from(read.first_column(is_plain, args)), of_column);
        Self { x, row_stride, dtype, channel, window }
    }

    /// Writes a window to the slot at `to`.
    ///
    /// # Safety
    /// The channel is there; nobody reads or writes its window there.
    #[inline(always)]
    pub(super) unsafe fn put_window(
        &self,
        gpu: &impl Gpu,
        is_plain: bool,
        args: &Args,
        to: u64,
        window: [f32; TAPS - 1],
    ) {
        let [.., of_channel, of_column] = args.conv_kept.to.strides;
        let at = to + far(true, self.channel, of_channel);
        let mut i = 0;
        while i + 1 < TAPS {
            let at = at + far(true, i as u64, of_column);
            // SAFETY: the caller's promise.
            unsafe {
                if is_plain {
                    store_bf16(gpu, at, window[i]);
                } else {
                    store(gpu, args.conv_kept.to.dtype, at, window[i]);
                }
            }
            i += 1;
        }
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

    /// The convolution's result for a token, with any number of taps.
    ///
    /// # Safety
    /// The channel is there.
    #[inline(always)]
    pub(super) unsafe fn any(&self, gpu: &impl Gpu, args: &Args, t: u32) -> f32 {
        let [of_channel, of_tap] = args.conv_weight.strides;
        let weight = args.conv_weight.address + self.channel * of_channel;
        let mut sum = 0.0;
        // SAFETY: the caller's promise.
        unsafe {
            if args.conv_bias.address != 0 {
                let at = args.conv_bias.address + self.channel * args.conv_bias.stride;
                sum = load(gpu, args.conv_bias.dtype, at);
            }
            let mut i = 0;
            while i < args.conv_width {
                let tap = load(gpu, args.conv_weight.dtype, weight + u64::from(i) * of_tap);
                sum = Lanes::mul_add(self.input(gpu, args, t + i), tap, sum);
                i += 1;
            }
        }
        math::activation(sum)
    }

    /// Writes W - 1 inputs from `first` on to the slot at `to`. In order, so that a window may move onto
    /// itself.
    ///
    /// # Safety
    /// As [`Channel::put_window`].
    #[inline(always)]
    pub(super) unsafe fn put_inputs(&self, gpu: &impl Gpu, args: &Args, to: u64, first: u32) {
        let [.., of_channel, of_column] = args.conv_kept.to.strides;
        let mut column = 0;
        while column + 1 < args.conv_width {
            // SAFETY: the caller's promise.
            unsafe {
                let x = self.input(gpu, args, first + column);
                let at = to + self.channel * of_channel + u64::from(column) * of_column;
                store(gpu, args.conv_kept.to.dtype, at, x);
            }
            column += 1;
        }
    }

    /// Keeps a channel's window after the last token, which may roll. Columns are moved in order, so it may
    /// move onto itself.
    ///
    /// # Safety
    /// As [`Channel::put_window`].
    #[inline(always)]
    pub(super) unsafe fn keep_last(&self, gpu: &impl Gpu, args: &Args, read: &Read, kept: &Windows) {
        let to = kept.last;
        let (tokens, width) = (args.tokens, args.conv_width);
        let [.., of_channel, of_column] = args.conv_kept.to.strides;
        // Column `old + i` goes to column i for the first `stay`, and the last inputs to those up to
        // `columns`.
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
        while kept.last != 0 && column < columns {
            // SAFETY: the caller's promise.
            unsafe {
                let x = if column < stay {
                    load(gpu, args.conv_state.dtype, from + u64::from(old + column) * from_column)
                } else {
                    load(gpu, self.dtype, self.x + u64::from(tokens - (columns - column)) * self.row_stride)
                };
                store(gpu, args.conv_kept.to.dtype, to + u64::from(column) * of_column, x);
            }
            column += 1;
        }
    }
}

/// Bits of the taps of two channels, and of their biases, on their way.
#[derive(Clone, Copy, Default)]
pub(super) struct Taps {
    apart: [[u32; TAPS]; 2],
    bias: [u32; 2],
}

impl Taps {
    /// Those of two channels. Of those that are not there nothing is read.
    ///
    /// # Safety
    /// The others are there, and have so many taps.
    #[inline(always)]
    pub(super) unsafe fn of(gpu: &impl Gpu, args: &Args, channels: &[Channel; 2], there: [bool; 2]) -> Self {
        let [of_channel, of_tap] = args.conv_weight.strides;
        let mut taps = Self::default();
        let mut m = 0;
        while m < 2 {
            let weight = args.conv_weight.address + far(true, channels[m].channel, of_channel);
            // SAFETY: the caller's promise.
            unsafe {
                if there[m] {
                    let mut i = 0;
                    while i < TAPS {
                        let at = weight + far(true, i as u64, of_tap);
                        taps.apart[m][i] = bits(gpu, args.conv_weight.dtype, at);
                        i += 1;
                    }
                    if args.conv_bias.address != 0 {
                        let at =
                            args.conv_bias.address + far(true, channels[m].channel, args.conv_bias.stride);
                        taps.bias[m] = bits(gpu, args.conv_bias.dtype, at);
                    }
                }
            }
            m += 1;
        }
        taps
    }
}

/// The convolution of [`TAPS`] taps of a channel, at a token.
#[derive(Clone, Copy, Default)]
pub(super) struct Convolved {
    /// The token's input is the last.
    inputs: [f32; TAPS],
    pub(super) result: f32,
}

impl Convolved {
    /// Two channels at token `t`. Of those that are not there nothing is read.
    ///
    /// # Safety
    /// The others are there, and have so many taps.
    #[inline(always)]
    pub(super) unsafe fn two(
        gpu: &impl Gpu,
        args: &Args,
        (channels, taps): (&[Channel; 2], &Taps),
        there: [bool; 2],
        t: u32,
    ) -> [Self; 2] {
        let [.., of_column] = args.conv_state.strides;
        let mut inputs = [[0; TAPS]; 2];
        // Everything is on its way before any of it is used.
        let mut m = 0;
        while m < 2 {
            let Channel { x, row_stride, dtype, window, .. } = channels[m];
            let mut i = 0;
            while there[m] && i < TAPS {
                let place = t + i as u32;
                let of_window = place < TAPS as u32 - 1;
                let at = if of_window {
                    window + far(true, u64::from(place), of_column)
                } else {
                    x + far(true, u64::from(place - (TAPS as u32 - 1)), row_stride)
                };
                // SAFETY: the caller's promise.
                inputs[m][i] =
                    unsafe { bits(gpu, if of_window { args.conv_state.dtype } else { dtype }, at) };
                i += 1;
            }
            m += 1;
        }
        let mut two = [Self::default(); 2];
        let mut m = 0;
        while m < 2 {
            let mut sum = if args.conv_bias.address != 0 {
                number(gpu, args.conv_bias.dtype, taps.bias[m])
            } else {
                0.0
            };
            let mut i = 0;
            while i < TAPS {
                let of_window = t + (i as u32) < TAPS as u32 - 1;
                let dtype = if of_window { args.conv_state.dtype } else { channels[m].dtype };
                let tap = number(gpu, args.conv_weight.dtype, taps.apart[m][i]);
                let input = number(gpu, dtype, inputs[m][i]);
                two[m].inputs[i] = input;
                sum = Lanes::mul_add(input, tap, sum);
                i += 1;
            }
            two[m].result = math::activation(sum);
            m += 1;
        }
        two
    }

    /// The window after the token.
    #[inline(always)]
    pub(super) fn window(&self) -> [f32; TAPS - 1] {
        [self.inputs[1], self.inputs[2], self.inputs[3]]
    }
}

/// Where the windows of a sequence go: addresses of slots, 0 for nowhere.
#[derive(Clone, Copy)]
pub(super) struct Windows {
    /// The one after the last token, in `conv_state`.
    pub(super) last: u64,
    /// Those after each token, elsewhere: the first one's.
    pub(super) each: u64,
}

impl Windows {
    /// # Safety
    /// The indices of the arguments are there.
    #[inline(always)]
    pub(super) unsafe fn of(gpu: &impl Gpu, args: &Args, read: &Read, sequence: u32) -> Self {
        let kept = &args.conv_kept;
        let is_each = kept.kind == args::EACH_IN;
        let token = if is_each { 0 } else { args.tokens - 1 };
        // SAFETY: the caller's promise.
        let to = unsafe { kept.address(gpu, false, args, sequence, read.conv, token) };
        if is_each { Self { last: 0, each: to } } else { Self { last: to, each: 0 } }
    }

    /// What a plain call keeps after its last token, if anything; windows after each token are kept where that is
    /// worked out.
    ///
    /// # Safety
    /// As [`Windows::of`].
    #[inline(always)]
    pub(super) unsafe fn plain(gpu: &impl Gpu, args: &Args, read: &Read, sequence: u32) -> Self {
        // SAFETY: the caller's promise.
        let last = unsafe { args.conv_kept.address(gpu, true, args, sequence, read.conv, args.tokens - 1) };
        Self { last, each: 0 }
    }
}

/// Whether a window is more than what the convolution reads and the next call's begins with: it has more
/// columns, or some of the last call's tokens go.
#[inline(always)]
pub(super) fn rolls(args: &Args) -> bool {
    args.num_accepted_tokens.address != 0 || args.conv_columns + 1 > args.conv_width
}
