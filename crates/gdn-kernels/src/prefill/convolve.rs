//! The first kernel: split, convolution, silu and l2norm of a head of a chunk, a block for each; nothing is
//! needed of any other. And the convolution's windows where a checkpoint is.

use gdn_math::{Lanes, quick};

use super::{
    args::{ATOM, Args, BF16, CHUNK, CONVOLVE_BYTES, F32, SLICE, TAPS},
    element::{load, load4, of_vector, power, silu, size, store, widened},
    sequence::Sequence,
};
use crate::gpu::{AsyncCopy, Bytes16, TensorCore};

/// Features of a thread.
const WIDTH: u32 = 8;

/// Tokens whose inputs are on their way, and whose numbers are written at once.
const AHEAD: u32 = TAPS;

/// Where inputs land in shared memory: a token's of a warp, and those of [`AHEAD`] tokens, of which there are two that take
/// turns.
const SLOT: u32 = 32 * 16;
const LANDING: u32 = AHEAD * SLOT;
const LANDINGS: u32 = 2;
const _: () = assert!(32 * CONVOLVE_BYTES == LANDINGS * LANDING);

/// How inputs lie in memory.
const WIDE_BF16: u32 = 0;
const WIDE_F16: u32 = 1;
const OTHER: u32 = 2;

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

/// The kernel, for heads of up to `8 * LANES` features. Where it is not for `ANY` inputs they have 16 bits
/// each and are read 16 bytes at a time, there are four taps, which are read together, and no bias. They land in shared memory
/// (`LANDS`), twice as far ahead as there are registers for, or in registers.
///
/// It waits for no kernel before it: it is the first of a call, or of a window. That of a second window may run
/// beside the preparation of the first, whose inputs and outputs it has no part in.
///
/// # Safety
/// The arguments describe tensors that are there and are as it says, and the grid was made for them.
#[inline(always)]
pub unsafe fn run<const LANES: u32, const ANY: bool, const LANDS: bool, G: TensorCore + AsyncCopy>(
    gpu: &G,
    args: &Args,
) {
    let (hk, dk, dv) = (args.num_k_heads.get(), args.dk, args.dv);
    // Values first, queries and keys last: the preparation needs these alone, and what was written last, the second-level
    // cache has. And blocks beside one another go through the same code.
    let (chunks, _) = args.all_heads.divide(gpu.blocks()[0]);
    let values = chunks * args.num_v_heads.get();
    let number = gpu.block()[0];
    let (which, chunk, head);
    let (key_head, feature, dim, channel);
    if number < values {
        (chunk, head) = args.num_v_heads.divide(number);
        let (group, within) = args.ratio.divide(head);
        which = 2;
        (key_head, feature, dim, channel) = (group, within * dv, dv, 2 * hk * dk + head * dv);
    } else {
        let (row, of_keys) = args.num_k_heads.divide(number - values);
        (which, chunk, head) = (row % 2, row / 2, of_keys);
        (key_head, feature, dim, channel) = (head, 0, dk, (which * hk + head) * dk);
    }
    // SAFETY: the caller's promises, here and below.
    unsafe {
        let Some((sequence, before)) = Sequence::of_chunk(gpu, args, args.first_chunk + chunk) else {
            return;
        };
        if sequence.slot < 0 {
            return;
        }
        let tokens = (sequence.len - before).min(u64::from(CHUNK)) as u32;
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
        // First: afterwards nobody needs to know the sequence.
        block.keep_windows();
        match (ANY, args.q.dtype, which) {
            (true, _, 2) => block.convolve::<OTHER, LANDS, LANES, false>(),
            (true, ..) => block.convolve::<OTHER, LANDS, LANES, true>(),
            (_, BF16, 2) => block.convolve::<WIDE_BF16, LANDS, LANES, false>(),
            (_, BF16, _) => block.convolve::<WIDE_BF16, LANDS, LANES, true>(),
            (_, _, 2) => block.convolve::<WIDE_F16, LANDS, LANES, false>(),
            _ => block.convolve::<WIDE_F16, LANDS, LANES, true>(),
        }
    }
}

/// What a thread has of its run of tokens.
struct Run {
    /// The tokens' end, counted from the chunk's start; past it rows are zeros.
    end: u32,
    /// Whether the lane has features. Lanes without have inputs and taps of 0.
    has: bool,
    /// Inputs that are on their way, or where they land; and where the next are that are asked for.
    coming: [[u32; WIDTH as usize]; AHEAD as usize],
    landing: u32,
    next: u64,
    /// Inputs of the last tokens: each token's is at its number.
    window: [[f32; WIDTH as usize]; TAPS as usize],
    taps: [[f32; TAPS as usize]; WIDTH as usize],
    bias: [f32; WIDTH as usize],
    put: Put,
}

/// Where what a lane has of a run of tokens goes.
struct Put {
    /// The row of the token that is next.
    to: u64,
    /// Bytes from a token's row to the next one's.
    row_bytes: u32,
    /// At which byte of the next token's row the lane's 16 are, and how many tokens, as a power of two, have them at
    /// the same place before they move on.
    piece: u32,
    swizzle: u32,
    is_put: bool,
    /// Where the next token's number goes.
    numbers: u64,
    has_numbers: bool,
}

impl Put {
    /// Eight features of the token that is so many behind the next one, of less than eight.
    ///
    /// # Safety
    /// The place is the lane's own.
    #[inline(always)]
    unsafe fn row(&self, gpu: &impl TensorCore, behind: u32, words: [u32; 4]) {
        let piece = self.piece ^ (behind >> self.swizzle) << 4;
        // SAFETY: the caller's promise.
        unsafe {
            gpu.store16(self.to + u64::from(behind * self.row_bytes) + u64::from(piece), Bytes16(words));
        }
    }

    /// Zeros for the next tokens, with which it is done.
    ///
    /// # Safety
    /// As [`Put::row`].
    #[inline(always)]
    unsafe fn zeros(&mut self, gpu: &impl TensorCore) {
        let mut i = 0;
        // SAFETY: the caller's promise.
        unsafe {
            while self.is_put && i < AHEAD {
                self.row(gpu, i, [0; 4]);
                i += 1;
            }
            self.numbers(gpu, [0; AHEAD as usize]);
        }
    }

    /// A number each of the next tokens, with which it is done.
    ///
    /// # Safety
    /// As [`Put::row`].
    #[inline(always)]
    unsafe fn numbers(&mut self, gpu: &impl TensorCore, numbers: [u32; AHEAD as usize]) {
        if self.has_numbers {
            // SAFETY: the caller's promise.
            unsafe { gpu.store16(self.numbers, Bytes16(numbers)) };
        }
        self.numbers += u64::from(AHEAD) * 4;
        self.to += u64::from(AHEAD * self.row_bytes);
        // Of eight rows the second four, and the first four again.
        self.piece ^= (AHEAD >> self.swizzle) << 4;
    }
}

impl<G: TensorCore + AsyncCopy> Block<'_, G> {
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

    /// A run of tokens: convolved, normed (`IS_KEY`: of queries and keys) or scaled, and put where products find them. So
    /// many lanes have a token's features, each [`WIDTH`].
    #[inline(always)]
    unsafe fn convolve<const FORM: u32, const LANDS: bool, const LANES: u32, const IS_KEY: bool>(&self) {
        let Self { gpu, args, dim, .. } = *self;
        // A multiple of 8, see `CONVOLVE_THREADS`. That a block has threads the compiler need not know.
        let len = (CHUNK * LANES).checked_div(gpu.threads()).unwrap_or(CHUNK);
        let first = gpu.thread() / LANES * len;
        let own = gpu.lane() % LANES * WIDTH;
        let x =
            self.x() + u64::from(own) * u64::from(size(args.q.dtype)) + self.row(first) * args.q.row_stride;
        let mut run = Run {
            end: self.tokens.min(first + len),
            has: own < dim,
            coming: [[0; WIDTH as usize]; AHEAD as usize],
            landing: gpu.thread() / 32 * (32 * CONVOLVE_BYTES) + gpu.lane() * 16,
            next: x,
            window: [[0.0; WIDTH as usize]; TAPS as usize],
            taps: [[0.0; TAPS as usize]; WIDTH as usize],
            bias: [0.0; WIDTH as usize],
            put: self.put::<LANES, IS_KEY>(first, own),
        };
        // SAFETY: as `run`.
        unsafe {
            let mut i = 0;
            while i < if LANDS { LANDINGS * AHEAD } else { AHEAD } {
                let is_there = run.has && first + i < run.end;
                if LANDS {
                    gpu.copy16(run.landing + i * SLOT, run.next, is_there);
                    if i % AHEAD == AHEAD - 1 {
                        gpu.commit_copies();
                    }
                } else if is_there {
                    run.coming[i as usize] = self.input::<FORM>(run.next);
                }
                run.next += args.q.row_stride;
                i += 1;
            }
            // Those of the tokens before, too, come from further away than the weights: they are asked for first.
            let mut before = [[0; WIDTH as usize]; TAPS as usize - 1];
            let all_before = self.before + u64::from(first) >= u64::from(TAPS - 1);
            if run.has && first < run.end && all_before {
                before = [3, 2, 1].map(|back| self.input::<FORM>(x - back * args.q.row_stride));
            }
            if run.has {
                (run.taps, run.bias) = self.weights::<FORM>(own);
            }
            if run.has && first < run.end {
                // Widened here and not above, where it would wait for them before the weights are asked for.
                if all_before {
                    run.window[0] = self.widened::<FORM>(before[0]);
                    run.window[1] = self.widened::<FORM>(before[1]);
                    run.window[2] = self.widened::<FORM>(before[2]);
                } else {
                    self.fill_window::<FORM>(x, first, own, &mut run.window);
                }
            }
            // All tokens of all lanes are there nearly always: then there is nothing to ask on the way, and what a token waits
            // for is behind what the next one has to do.
            let mut left = len;
            if FORM != OTHER && gpu.ballot(run.end < first + len) == 0 {
                while left > 0 {
                    left -= AHEAD;
                    self.next_four::<FORM, LANDS, LANES, IS_KEY>(&mut run, [AHEAD, left]);
                }
            } else {
                let mut there = run.end.saturating_sub(first);
                while left > 0 {
                    left -= AHEAD;
                    let of_these = there.min(AHEAD);
                    there -= of_these;
                    // Whether a run of the warp goes on.
                    if gpu.ballot(of_these > 0) != 0 {
                        self.next_four::<FORM, LANDS, LANES, IS_KEY>(&mut run, [of_these, there]);
                    } else {
                        run.put.zeros(gpu);
                    }
                }
            }
            // For those past the end, zeros.
            if LANDS {
                gpu.wait_copies::<0>();
            }
        }
    }

    /// The next tokens of a run, of which so many are there, and so many after them. Rows of others are zeros.
    #[inline(always)]
    unsafe fn next_four<const FORM: u32, const LANDS: bool, const LANES: u32, const IS_KEY: bool>(
        &self,
        run: &mut Run,
        [of_these, behind]: [u32; 2],
    ) {
        let Self { gpu, args, .. } = *self;
        let mut numbers = [0; AHEAD as usize];
        let mut i = 0;
        // SAFETY: as `run`.
        unsafe {
            if LANDS {
                gpu.wait_copies::<{ LANDINGS - 1 }>();
            }
            while i < AHEAD as usize {
                let mut values = [[0.0f32; WIDTH as usize]; 2];
                let mut n = 0;
                while n < 2 {
                    let at = i + n;
                    let newest = (at + TAPS as usize - 1) % TAPS as usize;
                    let slot = run.landing + at as u32 * SLOT;
                    if LANDS {
                        let Bytes16([a, b, c, d]) = gpu.load_shared16(slot);
                        run.coming[at] = [a, b, c, d, 0, 0, 0, 0];
                    }
                    run.window[newest] = self.widened::<FORM>(run.coming[at]);
                    let mut c = 0;
                    while c < WIDTH as usize {
                        let (mut sum, mut tap) = (run.bias[c], 0);
                        while tap < TAPS as usize {
                            if FORM != OTHER || tap as u32 + args.conv_width >= TAPS {
                                let input = run.window[(at + tap) % TAPS as usize][c];
                                sum = Lanes::mul_add(input, run.taps[c][tap], sum);
                            }
                            tap += 1;
                        }
                        values[n][c] = silu(gpu, sum);
                        c += 1;
                    }
                    // Here, where what was there before is needed no longer: its registers are free, and nothing is
                    // moved when this has come.
                    if LANDS {
                        // Where there is none, zeros: that is faster than to ask.
                        let is_there = run.has && at as u32 + (LANDINGS - 1) * AHEAD < behind;
                        gpu.copy16(slot, run.next, is_there);
                    } else if run.has && (at as u32) < behind {
                        run.coming[at] = self.input::<FORM>(run.next);
                    }
                    run.next += args.q.row_stride;
                    n += 1;
                }
                let (kept, factors) =
                    if IS_KEY { self.keys::<LANES>(&values) } else { self.values::<LANES>(&values) };
                n = 0;
                while n < 2 {
                    let mut words = [0; 4];
                    if ((i + n) as u32) < of_these {
                        let [a, b, c, d, e, f, g, h] = values[n].map(|value| value * factors[n]);
                        words =
                            [gpu.pack_f16(a, b), gpu.pack_f16(c, d), gpu.pack_f16(e, f), gpu.pack_f16(g, h)];
                        numbers[i + n] = kept[n].to_bits();
                    }
                    if run.put.is_put {
                        run.put.row(gpu, (i + n) as u32, words);
                    }
                    n += 1;
                }
                i += 2;
            }
            if LANDS {
                gpu.commit_copies();
                run.landing ^= LANDING;
            }
            run.put.numbers(gpu, numbers);
        }
    }

    /// Where a lane's features of a run of tokens go, the first of which is `own`.
    #[inline(always)]
    fn put<const LANES: u32, const IS_KEY: bool>(&self, first: u32, own: u32) -> Put {
        let Self { gpu, args, dim, .. } = *self;
        let place =
            |heads: u32| (u64::from(self.chunk) * u64::from(heads) + u64::from(self.head)) * u64::from(CHUNK);
        let is_first = gpu.lane() % LANES == 0;
        if IS_KEY {
            let place = place(args.num_k_heads.get());
            let scratch = if self.which == 0 { args.scratch.q } else { args.scratch.k };
            // Whole atoms are written.
            let whole = dim.next_multiple_of(CHUNK);
            Put {
                to: scratch
                    + place * u64::from(whole * 2)
                    + u64::from(own / CHUNK * ATOM + first * CHUNK * 2),
                row_bytes: CHUNK * 2,
                piece: own / WIDTH % 8 * 16,
                swizzle: 0,
                is_put: own < whole,
                numbers: args.scratch.k_squares + (place + u64::from(first)) * 4,
                has_numbers: is_first && self.which == 1,
            }
        } else {
            let place = place(args.num_v_heads.get());
            Put {
                to: args.scratch.v
                    + place * u64::from(dim * 2)
                    + u64::from((own / SLICE * CHUNK + first) * SLICE * 2),
                row_bytes: SLICE * 2,
                piece: own / WIDTH % 4 * 16,
                swizzle: 1,
                is_put: own < dim,
                numbers: args.scratch.v_scales + (place + u64::from(first)) * 4,
                has_numbers: is_first,
            }
        }
    }

    /// Of two queries or keys the sums of squares, and what they are multiplied with.
    #[inline(always)]
    fn keys<const LANES: u32>(&self, values: &[[f32; WIDTH as usize]; 2]) -> ([f32; 2], [f32; 2]) {
        let squares = values.map(|values| {
            let (mut sum, mut i) = (0.0, 0);
            while i < WIDTH as usize {
                sum = Lanes::mul_add(values[i], values[i], sum);
                i += 1;
            }
            sum
        });
        let sum = self.together::<LANES>(squares, |a, b| a + b);
        let factor = quick::inverse_root(sum + self.args.l2norm_eps);
        (self.both::<LANES>(sum), self.both::<LANES>(factor))
    }

    /// What two tokens' values are multiplied with afterwards, and before.
    #[inline(always)]
    fn values<const LANES: u32>(&self, values: &[[f32; WIDTH as usize]; 2]) -> ([f32; 2], [f32; 2]) {
        let largest = values.map(|values| {
            let (mut largest, mut i) = (0.0f32, 0);
            while i < WIDTH as usize {
                largest = largest.max(values[i].abs());
                i += 1;
            }
            largest
        });
        let (factor, back) = power(self.together::<LANES>(largest, f32::max));
        (self.both::<LANES>(back), self.both::<LANES>(factor))
    }

    /// What two tokens' lanes have, taken together: half of the lanes end with the first token's, the others with the second's.
    #[inline(always)]
    fn together<const LANES: u32>(&self, [first, second]: [f32; 2], join: impl Fn(f32, f32) -> f32) -> f32 {
        let gpu = self.gpu;
        let of = |x: f32, mask| f32::from_bits(gpu.shuffle_xor(x.to_bits(), mask));
        let is_second = gpu.lane() & (LANES / 2) != 0;
        let (own, sent) = if is_second { (second, first) } else { (first, second) };
        let (mut all, mut mask) = (join(own, of(sent, LANES / 2)), LANES / 4);
        while mask > 0 {
            all = join(all, of(all, mask));
            mask /= 2;
        }
        all
    }

    /// What [`Self::together`] left, of both tokens in all lanes.
    #[inline(always)]
    fn both<const LANES: u32>(&self, own: f32) -> [f32; 2] {
        let other = f32::from_bits(self.gpu.shuffle_xor(own.to_bits(), LANES / 2));
        if self.gpu.lane() & (LANES / 2) != 0 { [other, own] } else { [own, other] }
    }

    /// The taps, oldest input's first, and the bias of some channels.
    #[inline(always)]
    unsafe fn weights<const FORM: u32>(
        &self,
        column: u32,
    ) -> ([[f32; TAPS as usize]; WIDTH as usize], [f32; WIDTH as usize]) {
        let Self { gpu, args, .. } = *self;
        let weight = &args.conv_weight;
        let mut taps = [[0.0f32; TAPS as usize]; WIDTH as usize];
        let mut bias = [0.0f32; WIDTH as usize];
        let missing = TAPS - args.conv_width;
        let channel = self.channel + column;
        let at = weight.address + u64::from(channel) * weight.strides[0];
        let mut i = 0;
        // SAFETY: as `run`.
        unsafe {
            if FORM != OTHER {
                // One branch for all of them.
                if weight.dtype == F32 {
                    while i < WIDTH as usize {
                        let Bytes16(words) = gpu.load16(at + i as u64 * weight.strides[0]);
                        taps[i] = words.map(f32::from_bits);
                        i += 1;
                    }
                } else {
                    while i < WIDTH as usize {
                        let four = gpu.load8(at + i as u64 * weight.strides[0]);
                        [taps[i][0], taps[i][1]] = widened(gpu, weight.dtype, four as u32);
                        [taps[i][2], taps[i][3]] = widened(gpu, weight.dtype, (four >> 32) as u32);
                        i += 1;
                    }
                }
                return (taps, bias);
            }
            while i < WIDTH as usize {
                let at = at + i as u64 * weight.strides[0];
                let mut tap = 0;
                while tap < TAPS {
                    if tap >= missing {
                        let at = at + u64::from(tap - missing) * weight.strides[1];
                        taps[i][tap as usize] = load(gpu, weight.dtype, at);
                    }
                    tap += 1;
                }
                if args.conv_bias.address != 0 {
                    bias[i] = of_vector(gpu, &args.conv_bias, channel + i as u32);
                }
                i += 1;
            }
        }
        (taps, bias)
    }

    /// A token's inputs, as they lie in memory: two in a word, or as f32.
    #[inline(always)]
    unsafe fn input<const FORM: u32>(&self, at: u64) -> [u32; WIDTH as usize] {
        let Self { gpu, args, .. } = *self;
        // SAFETY: as `run`.
        unsafe {
            if FORM == OTHER {
                let element = u64::from(size(args.q.dtype));
                let four = |at: u64| load4(gpu, args.q.dtype, at, element, args.wide != 0).map(f32::to_bits);
                let ([a, b, c, d], [e, f, g, h]) = (four(at), four(at + 4 * element));
                return [a, b, c, d, e, f, g, h];
            }
            let Bytes16([a, b, c, d]) = gpu.load16(at);
            [a, b, c, d, 0, 0, 0, 0]
        }
    }

    /// What [`Self::input`] read.
    #[inline(always)]
    fn widened<const FORM: u32>(&self, words: [u32; WIDTH as usize]) -> [f32; WIDTH as usize] {
        if FORM == OTHER {
            return words.map(f32::from_bits);
        }
        let mut all = [0.0; WIDTH as usize];
        let mut i = 0;
        while i < WIDTH as usize / 2 {
            [all[2 * i], all[2 * i + 1]] = if FORM == WIDE_BF16 {
                [f32::from_bits(words[i] << 16), f32::from_bits(words[i] & 0xffff_0000)]
            } else {
                self.gpu.unpack_f16(words[i])
            };
            i += 1;
        }
        all
    }

    /// The inputs before token `first` of the chunk, a token that is there and whose own are at `x`, where not all of
    /// them are the sequence's: of those that are, or of its window.
    #[inline(always)]
    unsafe fn fill_window<const FORM: u32>(
        &self,
        x: u64,
        first: u32,
        column: u32,
        window: &mut [[f32; WIDTH as usize]; TAPS as usize],
    ) {
        let Self { gpu, args, .. } = *self;
        let tokens_before = self.before + u64::from(first);
        let row_stride = args.q.row_stride;
        // SAFETY: as `run`.
        unsafe {
            let state = &args.conv_state;
            let [of_slot, of_channel, of_column] = state.strides;
            let has_window = state.address != 0 && self.sequence.is_initial;
            let mut back = 1;
            while back < TAPS {
                let to = &mut window[(TAPS - 1 - back) as usize];
                if tokens_before >= u64::from(back) {
                    *to = self.widened::<FORM>(self.input::<FORM>(x - u64::from(back) * row_stride));
                } else if has_window && back < args.conv_width {
                    // The window's last column is one token before the first.
                    let at = state.address
                        + self.sequence.slot as u64 * of_slot
                        + u64::from(self.channel + column) * of_channel
                        + (u64::from(args.conv_columns) + tokens_before - u64::from(back)) * of_column;
                    let [a, b, c, d] = load4(gpu, state.dtype, at, of_channel, false);
                    let [e, f, g, h] = load4(gpu, state.dtype, at + 4 * of_channel, of_channel, false);
                    *to = [a, b, c, d, e, f, g, h];
                }
                back += 1;
            }
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
