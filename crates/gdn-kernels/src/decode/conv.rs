//! The causal convolution of a channel, and the windows that are kept of it. One thread of one block reads a channel's
//! window and writes it.

use gdn_math::{Lanes, layer as math};

use super::{
    args::{self, Args, Field},
    element::{bits, load, number, size, store},
    slots::Read,
};
use crate::gpu::Gpu;

/// The taps of the convolution, where they are held in registers.
const TAPS: usize = 4;

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

/// What a channel's convolution begins with, on its way: bits of its taps, window, first input and bias.
pub(super) struct Start {
    taps: [u32; TAPS],
    window: [u32; TAPS - 1],
    first: u32,
    bias: u32,
}

impl Channel {
    /// Channel `channel`, which is feature `i` of a key head's in a field, or in one that lies so many bytes behind it.
    #[inline(always)]
    #[allow(clippy::too_many_arguments, reason = "each is one number of the channel's place")]
    pub(super) fn new(
        args: &Args,
        read: &Read,
        field: &Field,
        behind: u64,
        row: u64,
        head: u32,
        i: u32,
        channel: u32,
    ) -> Self {
        let [of_slot, of_channel, of_column] = args.conv_state.strides;
        let channel = u64::from(channel);
        let x = field.address.wrapping_add(behind)
            + row * field.row_stride
            + u64::from(head) * field.head_step
            + u64::from(i * size(field.dtype));
        let window = args.conv_state.address
            + read.conv as u64 * of_slot
            + channel * of_channel
            + u64::from(read.first_column(args)) * of_column;
        Self { x, row_stride: field.row_stride, dtype: field.dtype, channel, window }
    }

    /// Reads what the convolution of [`TAPS`] taps begins with.
    ///
    /// # Safety
    /// The channel is there, and has so many taps.
    #[inline(always)]
    pub(super) unsafe fn start(&self, gpu: &impl Gpu, args: &Args) -> Start {
        let [of_channel, of_tap] = args.conv_weight.strides;
        let [.., of_column] = args.conv_state.strides;
        let weight = args.conv_weight.address + self.channel * of_channel;
        let mut start = Start { taps: [0; TAPS], window: [0; TAPS - 1], first: 0, bias: 0 };
        // SAFETY: the caller's promise.
        unsafe {
            start.first = bits(gpu, self.dtype, self.x);
            let mut i = 0;
            while i + 1 < TAPS {
                let at = self.window + i as u64 * of_column;
                start.window[i] = bits(gpu, args.conv_state.dtype, at);
                i += 1;
            }
            let mut i = 0;
            while i < TAPS {
                start.taps[i] = bits(gpu, args.conv_weight.dtype, weight + i as u64 * of_tap);
                i += 1;
            }
            if args.conv_bias.address != 0 {
                let at = args.conv_bias.address + self.channel * args.conv_bias.stride;
                start.bias = bits(gpu, args.conv_bias.dtype, at);
            }
        }
        start
    }

    /// The convolution's result for each token, and the windows that are kept beside the state. What is left in the
    /// window after the last token.
    ///
    /// # Safety
    /// As [`Channel::start`].
    #[inline(always)]
    pub(super) unsafe fn run<G: Gpu>(
        &self,
        gpu: &G,
        args: &Args,
        start: Start,
        kept: &Windows,
        mut put: impl FnMut(u32, f32),
    ) -> [f32; TAPS - 1] {
        let mut taps = [0.0; TAPS];
        let mut inputs = [0.0; TAPS];
        let mut i = 0;
        while i < TAPS {
            taps[i] = number(gpu, args.conv_weight.dtype, start.taps[i]);
            i += 1;
        }
        let mut i = 0;
        while i + 1 < TAPS {
            inputs[i + 1] = number(gpu, args.conv_state.dtype, start.window[i]);
            i += 1;
        }
        let bias =
            if args.conv_bias.address != 0 { number(gpu, args.conv_bias.dtype, start.bias) } else { 0.0 };
        let (mut next, mut t) = (start.first, 0);
        while t < args.tokens {
            let mut i = 0;
            while i + 1 < TAPS {
                inputs[i] = inputs[i + 1];
                i += 1;
            }
            inputs[TAPS - 1] = number(gpu, self.dtype, next);
            if t + 1 < args.tokens {
                // SAFETY: the caller's promise.
                next = unsafe { bits(gpu, self.dtype, self.x + u64::from(t + 1) * self.row_stride) };
            }
            let mut sum = bias;
            let mut i = 0;
            while i < TAPS {
                sum = Lanes::mul_add(inputs[i], taps[i], sum);
                i += 1;
            }
            put(t, math::activation(sum));
            if kept.each != 0 {
                let at = kept.each + u64::from(t) * args.conv_kept.to.strides[1];
                // SAFETY: the caller's promise.
                unsafe { self.put_window(gpu, args, at, [inputs[1], inputs[2], inputs[3]]) }
            }
            t += 1;
        }
        [inputs[1], inputs[2], inputs[3]]
    }

    /// Writes a window to the slot at `to`.
    ///
    /// # Safety
    /// The channel is there; nobody reads or writes its window there.
    #[inline(always)]
    pub(super) unsafe fn put_window(&self, gpu: &impl Gpu, args: &Args, to: u64, window: [f32; TAPS - 1]) {
        let [.., of_channel, of_column] = args.conv_kept.to.strides;
        let at = to + self.channel * of_channel;
        let mut i = 0;
        while i + 1 < TAPS {
            // SAFETY: the caller's promise.
            unsafe { store(gpu, args.conv_kept.to.dtype, at + i as u64 * of_column, window[i]) }
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

    /// [`Channel::run`] for any number of taps.
    ///
    /// # Safety
    /// The channel is there.
    #[inline(always)]
    pub(super) unsafe fn run_any<G: Gpu>(
        &self,
        gpu: &G,
        args: &Args,
        kept: &Windows,
        mut put: impl FnMut(u32, f32),
    ) {
        let [of_channel, of_tap] = args.conv_weight.strides;
        let weight = args.conv_weight.address + self.channel * of_channel;
        let mut t = 0;
        while t < args.tokens {
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
            put(t, math::activation(sum));
            t += 1;
        }
        let mut t = 0;
        while kept.each != 0 && t < args.tokens {
            let to = kept.each + u64::from(t) * args.conv_kept.to.strides[1];
            // SAFETY: the caller's promise.
            unsafe { self.put_inputs(gpu, args, to, t + 1) }
            t += 1;
        }
    }

    /// Writes W - 1 inputs from `first` on to the slot at `to`. In order, so that a window may move onto itself.
    ///
    /// # Safety
    /// As [`Channel::put_window`].
    #[inline(always)]
    unsafe fn put_inputs(&self, gpu: &impl Gpu, args: &Args, to: u64, first: u32) {
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

    /// Keeps a channel's window after the last token, which may roll. Columns are moved in order, so it may move onto
    /// itself.
    ///
    /// # Safety
    /// As [`Channel::put_window`].
    #[inline(always)]
    pub(super) unsafe fn keep_last(&self, gpu: &impl Gpu, args: &Args, read: &Read, kept: &Windows) {
        let to = kept.last;
        let (tokens, width) = (args.tokens, args.conv_width);
        let [.., of_channel, of_column] = args.conv_kept.to.strides;
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

/// Where the windows of a sequence go: addresses of slots, 0 for nowhere.
#[derive(Clone, Copy)]
pub(super) struct Windows {
    /// The one after the last token, in `conv_state`.
    pub(super) last: u64,
    /// Those after each token, elsewhere: the first one's.
    each: u64,
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
        let to = unsafe { kept.address(gpu, args, sequence, read.conv, token) };
        if is_each { Self { last: 0, each: to } } else { Self { last: to, each: 0 } }
    }

    /// The same, but for the one after the last token.
    pub(super) fn without_last(&self) -> Self {
        Self { last: 0, ..*self }
    }

    /// For a thread whose channels another one keeps.
    pub(super) const NONE: Self = Self { last: 0, each: 0 };
}

/// Whether a window is more than what the convolution reads and the next call's begins with: it has more columns, or
/// some of the last call's tokens go.
#[inline(always)]
pub(super) fn rolls(args: &Args) -> bool {
    args.num_accepted_tokens.address != 0 || args.conv_columns + 1 > args.conv_width
}
