//! The first kernel: split, convolution, silu and l2norm of a head of a chunk, a block for each; nothing is
//! needed of any other. And the convolution's windows where a checkpoint is.

use gdn_math::{Lanes, quick};

use super::{
    args::{Args, CHUNK, TAPS},
    element::{load, load4, of_vector, power, size, store},
    sequence::Sequence,
};
use crate::gpu::TensorCore;

/// A block's part of the call.
struct Block<'a, G> {
    gpu: &'a G,
    args: &'a Args,
    sequence: Sequence,
    /// The tokens of the sequence before the chunk, and those of the chunk.
    before: u64,
    tokens: u32,
    /// The chunk within the window.
    chunk: u32,
    /// q (0), k (1) or v (2).
    which: u32,
    /// Of q's, k's or v's heads which one.
    head: u32,
    /// The key head's features, and the first of them that are this head's.
    key_head: u32,
    feature: u32,
    dim: u32,
    /// The first channel.
    channel: u32,
}

/// The kernel, for heads of up to `128 * SLOTS` features.
///
/// # Safety
/// The arguments describe tensors that are there, and the grid was made for them.
#[inline(always)]
pub unsafe fn run<const SLOTS: usize, G: TensorCore>(gpu: &G, args: &Args) {
    gpu.wait_for_previous();
    let (chunk, number) = args.all_heads.divide(gpu.block()[0]);
    let (hk, dk, dv) = (args.num_k_heads.get(), args.dk, args.dv);
    // SAFETY: the caller's promises, here and below.
    unsafe {
        let Some((sequence, before)) = Sequence::of_chunk(gpu, args, args.first_chunk + chunk) else {
            return;
        };
        if sequence.slot < 0 {
            return;
        }
        let tokens = (sequence.len - before).min(u64::from(CHUNK)) as u32;
        let (which, head) = if number < 2 * hk {
            if number < hk { (0, number) } else { (1, number - hk) }
        } else {
            (2, number - 2 * hk)
        };
        let (mut key_head, mut feature, mut dim, mut channel) = (head, 0, dk, number * dk);
        if which == 2 {
            let (group, within) = args.ratio.divide(head);
            (key_head, feature, dim, channel) = (group, within * dv, dv, 2 * hk * dk + head * dv);
        }
        let block = Block {
            gpu,
            args,
            sequence,
            before,
            tokens,
            chunk,
            which,
            head,
            key_head,
            feature,
            dim,
            channel,
        };
        // Each warp has a run of tokens. Its length is not told to the compiler, which would unroll it.
        let run = CHUNK * 32 / gpu.threads().max(32);
        block.convolve::<SLOTS>(gpu.thread() / 32 * run, run);
        block.keep_windows();
    }
}

impl<G: TensorCore> Block<'_, G> {
    /// The sequence's row `token`, counted from the chunk's start.
    #[inline(always)]
    fn row(&self, token: u32) -> u64 {
        self.sequence.start + self.before + u64::from(token)
    }

    /// Where the head's first feature is in row 0.
    #[inline(always)]
    fn x(&self) -> u64 {
        let (x, head_step) = self.args.field(self.which);
        x + u64::from(self.key_head) * head_step + u64::from(self.feature * size(self.args.q.dtype))
    }

    /// A run of tokens: convolved, normed or scaled, and put where products find them.
    #[inline(always)]
    unsafe fn convolve<const SLOTS: usize>(&self, first: u32, run: u32) {
        let Self { gpu, args, dim, channel, .. } = *self;
        let is_key = self.which < 2;
        let (dtype, row_stride) = (args.q.dtype, args.q.row_stride);
        let (wide, element) = (args.wide != 0, u64::from(size(dtype)));
        let column = |slot: usize| (gpu.lane() + slot as u32 * 32) * 4;
        let x = self.x();
        // SAFETY: as `run`.
        unsafe {
            let mut taps = [[[0.0f32; TAPS as usize]; 4]; SLOTS];
            let mut bias = [[0.0f32; 4]; SLOTS];
            let missing = TAPS - args.conv_width;
            let mut slot = 0;
            while slot < SLOTS {
                let mut i = 0;
                while i < 4 && column(slot) < dim {
                    let channel = u64::from(channel + column(slot) + i as u32);
                    let weight = &args.conv_weight;
                    let at = weight.address + channel * weight.strides[0];
                    if wide {
                        taps[slot][i] = load4(gpu, weight.dtype, at, 0, true);
                    } else {
                        let mut tap = 0;
                        while tap < TAPS {
                            if tap >= missing {
                                let at = at + u64::from(tap - missing) * weight.strides[1];
                                taps[slot][i][tap as usize % 4] = load(gpu, weight.dtype, at);
                            }
                            tap += 1;
                        }
                    }
                    if args.conv_bias.address != 0 {
                        bias[slot][i] = of_vector(gpu, &args.conv_bias, channel as u32);
                    }
                    i += 1;
                }
                slot += 1;
            }
            // The inputs before the token's own, oldest first.
            let mut inputs = [[[0.0f32; 4]; TAPS as usize]; SLOTS];
            let mut back = 1;
            while back < TAPS {
                let mut slot = 0;
                while slot < SLOTS {
                    if column(slot) < dim && back < args.conv_width {
                        inputs[slot][(TAPS - 1 - back) as usize] =
                            self.input_before(x, first, back, channel, column(slot));
                    }
                    slot += 1;
                }
                back += 1;
            }
            // The next token's input is on its way while this one's is worked with.
            let input = |slot: usize, token: u32| {
                if column(slot) < dim && token < self.tokens {
                    let at = x + self.row(token) * row_stride + u64::from(column(slot)) * element;
                    return load4(gpu, dtype, at, element, wide);
                }
                [0.0; 4]
            };
            let mut next = [[0.0f32; 4]; SLOTS];
            let mut slot = 0;
            while slot < SLOTS {
                next[slot] = input(slot, first);
                slot += 1;
            }
            let mut token = first;
            while token < first + run {
                let mut slot = 0;
                while slot < SLOTS {
                    inputs[slot][TAPS as usize - 1] = next[slot];
                    if token + 1 < first + run {
                        next[slot] = input(slot, token + 1);
                    }
                    slot += 1;
                }
                let mut values = [[0.0f32; 4]; SLOTS];
                let (mut squares, mut largest) = (0.0, 0.0f32);
                let mut slot = 0;
                while slot < SLOTS {
                    if column(slot) < dim && token < self.tokens {
                        let mut i = 0;
                        while i < 4 {
                            let mut sum = bias[slot][i];
                            let mut tap = 0;
                            while tap < TAPS as usize {
                                if tap as u32 >= missing {
                                    sum = Lanes::mul_add(inputs[slot][tap][i], taps[slot][i][tap], sum);
                                }
                                tap += 1;
                            }
                            let c = quick::silu(sum);
                            squares = Lanes::mul_add(c, c, squares);
                            largest = largest.max(c.abs());
                            values[slot][i] = c;
                            i += 1;
                        }
                        let mut tap = 0;
                        while tap + 1 < TAPS as usize {
                            inputs[slot][tap] = inputs[slot][tap + 1];
                            tap += 1;
                        }
                    }
                    slot += 1;
                }
                let place = (u64::from(self.chunk), u64::from(token), u64::from(CHUNK));
                let of_key = (place.0 * u64::from(args.num_k_heads.get()) + u64::from(self.head)) * place.2;
                let of_value = (place.0 * u64::from(args.num_v_heads.get()) + u64::from(self.head)) * place.2;
                let factor = if is_key {
                    let sum = gpu.sum::<32>(squares);
                    if self.which == 1 && gpu.lane() == 0 {
                        gpu.store4(args.scratch.k_squares + (of_key + place.1) * 4, sum.to_bits());
                    }
                    quick::inverse_root(sum + args.l2norm_eps)
                } else {
                    let mut mask = 16;
                    while mask > 0 {
                        largest = largest.max(f32::from_bits(gpu.shuffle_xor(largest.to_bits(), mask)));
                        mask /= 2;
                    }
                    let (up, down) = power(largest);
                    if gpu.lane() == 0 {
                        gpu.store4(args.scratch.v_scales + (of_value + place.1) * 4, down.to_bits());
                    }
                    up
                };
                let mut slot = 0;
                while slot < SLOTS {
                    let column = column(slot);
                    if column < dim {
                        let [a, b, c, d] = values[slot].map(|value| value * factor);
                        let four = u64::from(gpu.pack_f16(a, b)) | u64::from(gpu.pack_f16(c, d)) << 32;
                        let to = if is_key {
                            let to = if self.which == 0 { args.scratch.q } else { args.scratch.k };
                            to + ((of_key + place.1) * u64::from(dim) + u64::from(column)) * 2
                        } else {
                            let slice =
                                u64::from(column / 32 * CHUNK + token) * 64 + u64::from(column % 32 * 2);
                            args.scratch.v + of_value * u64::from(dim * 2) + slice
                        };
                        gpu.store8(to, four);
                    }
                    slot += 1;
                }
                token += 1;
            }
        }
    }

    /// Four inputs `back` tokens before token `first` of the chunk: of the sequence's, or of its window.
    #[inline(always)]
    unsafe fn input_before(&self, x: u64, first: u32, back: u32, channel: u32, column: u32) -> [f32; 4] {
        let Self { gpu, args, .. } = *self;
        let (dtype, row_stride) = (args.q.dtype, args.q.row_stride);
        let element = u64::from(size(dtype));
        let at = self.before + u64::from(first);
        // SAFETY: as `run`.
        unsafe {
            if at >= u64::from(back) {
                // Where the chunk ends before the run begins, nothing is computed with these.
                if first >= self.tokens {
                    return [0.0; 4];
                }
                let row = self.sequence.start + at - u64::from(back);
                let at = x + row * row_stride + u64::from(column) * element;
                return load4(gpu, dtype, at, element, args.wide != 0);
            }
            let state = &args.conv_state;
            if state.address == 0 || !self.sequence.is_initial {
                return [0.0; 4];
            }
            // The window's last column is one token before the first.
            let [of_slot, of_channel, of_column] = state.strides;
            let at = state.address
                + self.sequence.slot as u64 * of_slot
                + u64::from(channel + column) * of_channel
                + (u64::from(args.conv_columns) + at - u64::from(back)) * of_column;
            load4(gpu, state.dtype, at, of_channel, false)
        }
    }

    /// The last inputs up to the chunk's end, where a checkpoint is.
    #[inline(always)]
    unsafe fn keep_windows(&self) {
        let Self { gpu, args, .. } = *self;
        let (to, dtype) = (&args.windows, args.q.dtype);
        let chunks = self.chunk + args.first_chunk - self.sequence.first_chunk + 1;
        let (number, rest) = args.every.divide(chunks);
        if to.address == 0 || self.tokens < CHUNK || rest != 0 {
            return;
        }
        // SAFETY: as `run`; a chunk has more tokens than a window.
        unsafe {
            let at = self.sequence.checkpoint(gpu, args, number - 1, to);
            if at == 0 {
                return;
            }
            let mut i = gpu.thread();
            while i < self.dim {
                let x = self.x() + u64::from(i * size(dtype));
                let mut back = 1;
                while back < args.conv_width {
                    let value = load(gpu, dtype, x + self.row(CHUNK - back) * args.q.row_stride);
                    let column = u64::from(args.window_columns - back);
                    let at = at + u64::from(self.channel + i) * to.strides[1] + column * to.strides[2];
                    store(gpu, to.dtype, at, value);
                    back += 1;
                }
                i += gpu.threads();
            }
        }
    }
}
