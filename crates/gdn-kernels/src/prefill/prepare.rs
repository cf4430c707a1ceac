//! The second kernel: the gates, and per v head the masked Q K^T and the inverse of I + strictLower(beta e^D
//! K K^T), a block for each chunk and key head; so that what is left are products.
//!
//! Of the inverse's 16 x 16 blocks those on the diagonal are made by substitution in f32, a thread a column,
//! and those below by products of numbers that are split in two f16 each, which have 22 bits together: within
//! some 2^-20 of 1 whatever the keys (`docs/gpu-kernels.md`). It is rounded once, when it is stored, as
//! [`T_RAISED`] times itself.

use gdn_math::{Lanes, layer as math, quick, special::exp};

use super::{
    args::{
        ATOM, Args, CHUNK, DIAGONAL_ROW, FACTORS, Field, GROUP, OUT_RAISED, PREPARE_THREADS, PrepareRoom,
        RAISED, SIDE, SIDES, T_RAISED, Vector, padded,
    },
    element::{Element, size},
    sequence::Sequence,
    tiles::{Tile, split},
};
use crate::gpu::{AsyncCopy, Bytes16, F16, Swizzle, TensorCore};

const WARPS: u32 = PREPARE_THREADS / 32;
/// Logs below this are as good: their exponentials are 0.
const LEAST_LOG: f32 = -100.0;

/// What the gates of two tokens of a v head are made of.
#[derive(Clone, Copy, Default)]
struct Inputs {
    a: [Element; 2],
    b: [Element; 2],
    a_log: Element,
    dt_bias: Element,
}

/// Two f32 side by side.
#[inline(always)]
fn both([first, second]: [f32; 2]) -> u64 {
    u64::from(first.to_bits()) | u64::from(second.to_bits()) << 32
}

/// A block's part of the call.
struct Block<'a, G> {
    gpu: &'a G,
    args: &'a Args,
    room: PrepareRoom,
    sequence: Sequence,
    /// The tokens of the sequence before the chunk, and those of the chunk.
    before: u64,
    tokens: u32,
    /// The chunk within the window.
    chunk: u32,
    head: u32,
}

/// The kernel.
///
/// # Safety
/// The arguments describe tensors that are there, and the grid and shared memory were made for them.
#[inline(always)]
pub unsafe fn run<G: TensorCore + AsyncCopy>(gpu: &G, args: &Args) {
    // From the window's last chunk to its first: what the convolution wrote last, the second-level cache has.
    let (chunk, head) = args.num_k_heads.divide(gpu.blocks()[0] - 1 - gpu.block()[0]);
    // SAFETY: the caller's promises, here and below.
    unsafe {
        let found = Sequence::of_chunk(gpu, args, args.first_chunk + chunk);
        let Some((sequence, before)) = found.filter(|(sequence, _)| sequence.slot >= 0) else {
            // Whoever waits for this kernel waits for those before it, too.
            gpu.wait_for_previous();
            return;
        };
        let tokens = (sequence.len - before).min(u64::from(CHUNK)) as u32;
        let room = PrepareRoom::new(args.dk, args.ratio.get());
        let block = Block { gpu, args, room, sequence, before, tokens, chunk, head };
        let inputs = block.begin();
        gpu.wait_copies::<0>();
        gpu.barrier();
        block.gates(inputs);
        gpu.sync_warp();
        // Where there are many v heads, q and k are copied and multiplied anew for each group of them: to
        // keep the products there are no registers.
        let mut first = 0;
        loop {
            block.group(first);
            first += GROUP;
            if first >= args.ratio.get() {
                break;
            }
            gpu.barrier();
            block.fetch();
            gpu.wait_copies::<0>();
            gpu.barrier();
        }
    }
}

impl<G: TensorCore + AsyncCopy> Block<'_, G> {
    /// The sequence's row `token`, counted from the chunk's start.
    #[inline(always)]
    fn row(&self, token: u32) -> u64 {
        self.sequence.start + self.before + u64::from(token)
    }

    /// The number of a v head of the key head's, among those of all chunks.
    #[inline(always)]
    fn v_head(&self, h: u32) -> u64 {
        let ratio = self.args.ratio.get();
        u64::from(self.chunk) * u64::from(self.args.num_v_heads.get()) + u64::from(self.head * ratio + h)
    }

    /// Begins to copy q and k, as they lie in scratch.
    #[inline(always)]
    unsafe fn fetch(&self) {
        let Self { gpu, args, room, .. } = self;
        let bytes = PrepareRoom::keys(args.dk);
        let head = u64::from(self.chunk * args.num_k_heads.get() + self.head) * u64::from(bytes);
        let mut at = gpu.thread() * 16;
        while at < bytes {
            let from = head + u64::from(at);
            // SAFETY: as `run`.
            unsafe {
                gpu.copy16(room.q + at, args.scratch.q + from, true);
                gpu.copy16(room.k + at, args.scratch.k + from, true);
            }
            at += gpu.threads() * 16;
        }
        gpu.commit_copies();
    }

    /// What the gates of two tokens of v head `h` are made of, but for what the convolution made.
    #[inline(always)]
    unsafe fn inputs(&self, h: u32) -> Inputs {
        let Self { gpu, args, .. } = self;
        let head = self.head * args.ratio.get() + h;
        let token = 2 * gpu.lane();
        // SAFETY: as `run`.
        unsafe {
            let one = |field: &Field, token: u32| {
                // What lies past the sequence's end is not used.
                let at = field.address
                    + self.row(token.min(self.tokens - 1)) * field.row_stride
                    + u64::from(self.head) * field.head_step
                    + u64::from(h * size(field.dtype));
                Element::read(*gpu, field.dtype, at)
            };
            let of_head = |vector: &Vector| {
                Element::read(*gpu, vector.dtype, vector.address + u64::from(head) * vector.stride)
            };
            Inputs {
                a: [one(&args.a, token), one(&args.a, token + 1)],
                b: [one(&args.b, token), one(&args.b, token + 1)],
                a_log: of_head(&args.A_log),
                dt_bias: of_head(&args.dt_bias),
            }
        }
    }

    /// Begins to copy q and k, and asks for what the gates of the warp's first v head are made of.
    #[inline(always)]
    unsafe fn begin(&self) -> Inputs {
        let Self { gpu, args, .. } = self;
        let h = gpu.thread() / 32;
        // SAFETY: as `run`.
        unsafe {
            gpu.wait_for_previous();
            gpu.let_next_start();
            self.fetch();
            if h < args.ratio.get() { self.inputs(h) } else { Inputs::default() }
        }
    }

    /// Decays' logs, summed from the chunk's start, and beta; a warp a v head. What lies past the sequence's end has
    /// no decay and no beta.
    #[inline(always)]
    unsafe fn gates(&self, inputs: Inputs) {
        let Self { gpu, args, room, .. } = self;
        let (lane, mut h, mut next) = (gpu.lane(), gpu.thread() / 32, inputs);
        // SAFETY: as `run`.
        unsafe {
            while h < args.ratio.get() {
                let inputs = next;
                if h + WARPS < args.ratio.get() {
                    next = self.inputs(h + WARPS);
                }
                let a_log = inputs.a_log.value(*gpu, args.A_log.dtype);
                let dt_bias = inputs.dt_bias.value(*gpu, args.dt_bias.dtype);
                let (mut logs, mut betas) = ([0.0; 2], [0.0; 2]);
                let mut n = 0;
                while n < 2 {
                    if 2 * lane + (n as u32) < self.tokens {
                        let a = inputs.a[n].value(*gpu, args.a.dtype);
                        let b = inputs.b[n].value(*gpu, args.b.dtype);
                        logs[n] = math::log_decay(a, a_log, dt_bias).at_least(LEAST_LOG);
                        betas[n] = math::beta(b, args.beta_scale);
                    }
                    n += 1;
                }
                let (mut sum, mut distance) = (logs[0] + logs[1], 1);
                while distance < 32 {
                    let below = f32::from_bits(gpu.shuffle_up(sum.to_bits(), distance));
                    if lane >= distance {
                        sum += below;
                    }
                    distance *= 2;
                }
                // The first of the two is the sum without the second, as an f32 adds up: differences stay at
                // most 0.
                let g = [(sum - logs[1]).at_least(sum), sum];
                let at = (h * CHUNK + 2 * lane) * 4;
                gpu.store_shared8(room.g + at, both(g));
                gpu.store_shared8(room.beta + at, both(betas));
                h += WARPS;
            }
        }
    }

    /// What the convolution made of two tokens of v head `h`, two f32 each: the key's squares and what the values
    /// were scaled by.
    #[inline(always)]
    unsafe fn convolved(&self, lane: u32, h: u32) -> [u64; 2] {
        let Self { gpu, args, .. } = self;
        let key = u64::from(self.chunk * args.num_k_heads.get() + self.head) * u64::from(CHUNK);
        let place = |row: u64| (row + u64::from(2 * lane)) * 4;
        // SAFETY: as `run`.
        unsafe {
            [
                gpu.load8(args.scratch.k_squares + place(key)),
                gpu.load8(args.scratch.v_scales + place(self.v_head(h) * u64::from(CHUNK))),
            ]
        }
    }

    /// What the scan multiplies each token of v head `h` with; by a warp.
    #[inline(always)]
    unsafe fn factors(&self, lane: u32, h: u32, [k_squares, v_scales]: [u64; 2]) {
        let Self { gpu, args, room, .. } = self;
        let of_token = |two: u64, n: usize| f32::from_bits((two >> (32 * n)) as u32);
        // SAFETY: as `run`; the gates were made before a barrier.
        unsafe {
            let at = h * CHUNK * 4 + lane * 8;
            let (g, betas) = (gpu.load_shared8(room.g + at), gpu.load_shared8(room.beta + at));
            let last = f32::from_bits(gpu.load_shared4(room.g + (h * CHUNK + CHUNK - 1) * 4));
            let factors = args.scratch.factors + self.v_head(h) * u64::from(FACTORS);
            let (mut largest, mut left, mut n) = (0.0f32, 0.0f32, 0);
            let mut fours = [[0.0; 4]; 2];
            while n < 2 {
                // A key of zeros finds and changes nothing. Without its value no size is lost to it.
                let beta = if of_token(k_squares, n) == 0.0 { 0.0 } else { of_token(betas, n) };
                // The exponential of half the log twice: it is not 0 as long as an f32 can be.
                let decay = |log: f32| {
                    let half = exp(log.at_most(0.0) * 0.5);
                    half * half
                };
                let g = of_token(g, n);
                let (from_start, to_end) = (decay(g), decay(last - g));
                let value = beta * of_token(v_scales, n);
                largest = largest.max(value.abs());
                left = left.max(if value == 0.0 { 0.0 } else { to_end });
                fours[n] = [value, -beta * from_start, from_start * OUT_RAISED, to_end];
                n += 1;
            }
            let mut mask = 16;
            while mask > 0 {
                largest = largest.max(f32::from_bits(gpu.shuffle_xor(largest.to_bits(), mask)));
                left = left.max(f32::from_bits(gpu.shuffle_xor(left.to_bits(), mask)));
                mask /= 2;
            }
            // What is left is 0 to 1.
            let lift = (254 - (left.to_bits() >> 23).clamp(127 - 60, 127)) << 23;
            let mut n = 0;
            while n < 2 {
                let [.., to_end] = &mut fours[n];
                *to_end *= f32::from_bits(lift);
                let at = factors + u64::from((2 * lane + n as u32) * 16);
                gpu.store16(at, Bytes16(fours[n].map(f32::to_bits)));
                n += 1;
            }
            if lane == 0 {
                // Values were brought to less than 2^15.
                let four = [(largest * 32768.0).to_bits(), lift, 0, 0];
                gpu.store16(factors + u64::from(CHUNK * 16), Bytes16(four));
            }
        }
    }

    /// For v head `h`, the `n`th of its group, the decays between blocks of a matrix, in two factors that are at
    /// most 1, the second times [`RAISED`]; by a warp.
    #[inline(always)]
    unsafe fn decays(&self, lane: u32, h: u32, n: u32) {
        let Self { gpu, room, .. } = self;
        let mut i = lane;
        while i < CHUNK + PrepareRoom::COLUMNS {
            // SAFETY: as `run`; the warp, or all before a barrier, made the gates.
            unsafe {
                let g = |i: u32| f32::from_bits(gpu.load_shared4(room.g + (h * CHUNK + i) * 4));
                let (to, log, times);
                if i < CHUNK {
                    to = room.to_rows + (n * CHUNK + i) * 4;
                    log = g(i) - g(i / SIDE * SIDE);
                    times = RAISED;
                } else {
                    let column = i - CHUNK;
                    let rows = if column < SIDE { 1 } else { 2 + u32::from(column >= 3 * SIDE) };
                    to = room.from_columns + (n * PrepareRoom::COLUMNS + column) * 4;
                    log = g(rows * SIDE) - g(column - columns_before(rows));
                    times = 1.0;
                }
                gpu.store_shared4(to, (quick::exp(log.at_most(0.0)) * times).to_bits());
            }
            i += 32;
        }
    }

    /// K K^T and Q K^T, and of them for some v heads the inverse and the masked product. Of the blocks on and
    /// below the diagonal each warp has two of a row, or one.
    #[inline(always)]
    unsafe fn group(&self, first: u32) {
        let Self { gpu, args, room, .. } = self;
        // The thread's own number, in a way that keeps places from being kept from group to group: there are
        // no registers for them.
        let thread = gpu.unforeseen(u64::from(first) << 32 | u64::from(gpu.thread())) as u32;
        let (warp, lane) = (thread / 32, thread % 32);
        // The blocks' row, and the first one's column: 2 2, 0 0, 3 0, 3 2, 2 0, 1 0. The first two warps, which
        // have one block each, have gates to make.
        let row = (0x12_3302 >> (4 * warp)) & 15;
        let column = (0x00_2002 >> (4 * warp)) & 15;
        let heads = (args.ratio.get() - first).min(GROUP);
        if warp < heads {
            // SAFETY: as `run`.
            unsafe { self.decays(lane, first + warp, warp) };
        }
        let (matrix, line) = (lane / 8, lane % 8);
        let (mut kk, mut qk) = ([[[0.0; 4]; 2]; 2], [[[0.0; 4]; 2]; 2]);
        // Rows of 128 bytes, and in each the piece of 16 of the first columns, see `Scratch::q`. What is left of the
        // last 64 columns is zeros.
        let left = (row * SIDE + matrix % 2 * 8 + line) * 128;
        let right = (column * SIDE + matrix / 2 * 8 + line) * 128;
        let (of_left, of_right) = ((line ^ (matrix / 2)) * 16, (line ^ (matrix % 2)) * 16);
        let mut atom = 0;
        while atom < PrepareRoom::keys(args.dk) {
            let mut k16 = 0;
            while k16 < CHUNK / 16 {
                // SAFETY: as `run`; the barrier before is past.
                unsafe {
                    let left = atom + left + (of_left ^ (k16 * 32));
                    let of_k = gpu.load_matrix4::<false>(room.k + left);
                    let of_q = gpu.load_matrix4::<false>(room.q + left);
                    let mut block = 0;
                    while block < 2 {
                        let at = room.k + atom + right + block as u32 * SIDE * 128 + (of_right ^ (k16 * 32));
                        let [b0, b1, b2, b3] = gpu.load_matrix4::<false>(at);
                        kk[block][0] = gpu.mma::<F16>(of_k, [b0, b1], kk[block][0]);
                        kk[block][1] = gpu.mma::<F16>(of_k, [b2, b3], kk[block][1]);
                        qk[block][0] = gpu.mma::<F16>(of_q, [b0, b1], qk[block][0]);
                        qk[block][1] = gpu.mma::<F16>(of_q, [b2, b3], qk[block][1]);
                        block += 1;
                    }
                }
                k16 += 1;
            }
            atom += ATOM;
        }
        let matrices = self.v_head(first) * u64::from(CHUNK * CHUNK * 2);
        // Q and K are read no longer.
        gpu.barrier();
        let mut n = 0;
        while n < heads {
            let mut block = 0;
            while block < 2 {
                let column = column + block as u32;
                if column <= row {
                    // SAFETY: as above.
                    unsafe { self.masked(lane, first + n, n, [row, column], &kk[block], &qk[block]) };
                }
                block += 1;
            }
            n += 1;
        }
        gpu.barrier();
        // SAFETY: as above.
        unsafe {
            if thread < heads * CHUNK {
                self.invert(thread);
            } else {
                let (thread, threads) = (thread - heads * CHUNK, PREPARE_THREADS - heads * CHUNK);
                let (h, mut convolved) = (first + thread / 32, [0; 2]);
                if thread / 32 < heads {
                    convolved = self.convolved(lane, h);
                }
                self.put(heads, args.scratch.p + matrices, thread, threads);
                if thread / 32 < heads {
                    self.factors(lane, h, convolved);
                }
            }
            gpu.barrier();
            if warp < heads * (SIDES - 1) {
                self.merge(lane, warp / (SIDES - 1), warp % (SIDES - 1));
            }
            gpu.barrier();
            self.put(heads, args.scratch.t + matrices, thread, PREPARE_THREADS);
        }
    }

    /// For v head `h`, the `n`th of its group, a block of beta e^D K K^T below the diagonal, and of e^D Q K^T
    /// up to it, both times [`RAISED`]; of a block on the diagonal the first as it is.
    #[inline(always)]
    unsafe fn masked(
        &self,
        lane: u32,
        h: u32,
        n: u32,
        [row, column]: [u32; 2],
        kk: &[Tile; 2],
        qk: &[Tile; 2],
    ) {
        let Self { gpu, room, .. } = self;
        let (line, pair) = (lane / 4, lane % 4 * 2);
        let head = room.heads + n * PrepareRoom::HEAD;
        let from_columns =
            room.from_columns + (n * PrepareRoom::COLUMNS + columns_before(row) + column * SIDE + pair) * 4;
        let out = head + PrepareRoom::OUT + column * SIDE * 2 + pair * 2;
        // SAFETY: as `run`; what is read was written before a barrier.
        unsafe {
            let read = |array: u32, i: u32| f32::from_bits(gpu.load_shared4(array + i * 4));
            let mut tile = 0;
            while tile < 2 {
                let j = tile as u32 * 8 + pair;
                let mut half = 0;
                while half < 2 {
                    let i = line + half as u32 * 8;
                    let place = row * SIDE + i;
                    let beta = read(room.beta, h * CHUNK + place);
                    let mut decays = [0.0; 2];
                    if column < row {
                        let to_row = read(room.to_rows, n * CHUNK + place);
                        let two = gpu.load_shared8(from_columns + tile as u32 * 32);
                        decays = [two as u32, (two >> 32) as u32].map(|d| f32::from_bits(d) * to_row);
                    } else {
                        let g = read(room.g, h * CHUNK + place);
                        let two = gpu.load_shared8(room.g + (h * CHUNK + column * SIDE + j) * 4);
                        let logs = [two as u32, (two >> 32) as u32].map(f32::from_bits);
                        let mut c = 0;
                        while c < 2 {
                            if j + c as u32 <= i {
                                decays[c] = quick::exp((g - logs[c]).at_most(0.0)) * RAISED;
                            }
                            c += 1;
                        }
                    }
                    let (kk, qk) = (&kk[tile], &qk[tile]);
                    let p = gpu.pack_f16(decays[0] * qk[2 * half], decays[1] * qk[2 * half + 1]);
                    gpu.store_shared4(out + place * padded(CHUNK) + tile as u32 * 16, p);
                    let m = [beta * (decays[0] * kk[2 * half]), beta * (decays[1] * kk[2 * half + 1])];
                    if column < row {
                        let [kept, lost] = split(*gpu, m);
                        let at = head + tile_of(row, column) + in_tile(i, tile as u32) + pair * 2;
                        gpu.store_shared4(at, kept);
                        gpu.store_shared4(at + PrepareRoom::LOST, lost);
                    } else {
                        let mut c = 0;
                        while c < 2 {
                            let j = j + c as u32;
                            let m = if j < i { m[c] / RAISED } else { 0.0 };
                            let at = (row * SIDE + j) * DIAGONAL_ROW + i * 4;
                            gpu.store_shared4(head + PrepareRoom::DIAGONAL + at, m.to_bits());
                            c += 1;
                        }
                    }
                    half += 1;
                }
                tile += 1;
            }
        }
    }

    /// The inverse of I and a block on the diagonal, times [`T_RAISED`], by substitution, a thread a column;
    /// transposed.
    #[inline(always)]
    unsafe fn invert(&self, thread: u32) {
        let Self { gpu, room, .. } = self;
        let (n, block, column) = (thread / CHUNK, thread % CHUNK / SIDE, thread % SIDE);
        let head = room.heads + n * PrepareRoom::HEAD;
        let from = head + PrepareRoom::DIAGONAL + block * SIDE * DIAGONAL_ROW;
        let mut x = [0.0f32; SIDE as usize];
        let mut i = 0;
        while i < SIDE as usize {
            x[i] = if i as u32 == column { T_RAISED } else { 0.0 };
            i += 1;
        }
        // SAFETY: as `run`; what is read was written before a barrier.
        unsafe {
            let mut l = 0;
            while l < SIDE as usize - 1 {
                let mut four = (l + 1) / 4;
                while four < SIDE as usize / 4 {
                    let Bytes16(m) = gpu.load_shared16(from + l as u32 * DIAGONAL_ROW + four as u32 * 16);
                    let mut i = 0;
                    while i < 4 {
                        if 4 * four + i > l {
                            x[4 * four + i] = f32::from_bits(m[i]).neg_mul_add(x[l], x[4 * four + i]);
                        }
                        i += 1;
                    }
                    four += 1;
                }
                l += 1;
            }
            let mut half = 0;
            while half < 2 {
                let (mut kept, mut lost) = ([0; 4], [0; 4]);
                let mut two = 0;
                while two < 4 {
                    let i = 8 * half + 2 * two;
                    [kept[two], lost[two]] = split(*gpu, [x[i], x[i + 1]]);
                    two += 1;
                }
                let at = head + tile_of(block, block) + in_tile(column, half as u32);
                gpu.store_shared16(at, Bytes16(kept));
                gpu.store_shared16(at + PrepareRoom::LOST, Bytes16(lost));
                half += 1;
            }
        }
    }

    /// Of the `n`th head's inverse T the blocks of a column, from the diagonal's down, a warp: `T_ij = -T_ii
    /// (M_ij T_jj + M_ij+1 T_j+1,j + ...)`, transposed: what one product leaves is the left side of the next.
    /// M is [`RAISED`] and T is [`T_RAISED`], and so are the sums in brackets, which are no larger than T: what
    /// a key finds, times beta, of what another one left.
    #[inline(always)]
    unsafe fn merge(&self, lane: u32, n: u32, column: u32) {
        let Self { gpu, room, .. } = self;
        let (matrix, line) = (lane / 8, lane % 8);
        let head = room.heads + n * PrepareRoom::HEAD;
        let left = in_tile(matrix % 2 * 8 + line, matrix / 2);
        let right = in_tile(matrix / 2 * 8 + line, matrix % 2);
        // SAFETY: as `run`; what is read was written before a barrier.
        unsafe {
            let on_diagonal = |i: u32| {
                let at = head + tile_of(i, i) + left;
                [gpu.load_matrix4::<false>(at), gpu.load_matrix4::<false>(at + PrepareRoom::LOST)]
            };
            // T_jj and what is below it, transposed.
            let mut of_column = [[[0; 4]; 2]; SIDES as usize - 1];
            of_column[0] = on_diagonal(column);
            self.stage(lane, head, [column, column], of_column[0][0]);
            if column + 2 == SIDES {
                let [last, _] = on_diagonal(SIDES - 1);
                self.stage(lane, head, [SIDES - 1, SIDES - 1], last);
            }
            let mut below = 1;
            while below < SIDES as usize {
                let row = column + below as u32;
                if row < SIDES {
                    let mut sums = [[0.0; 4]; 2];
                    let mut i = 0;
                    while i < below {
                        let at = head + tile_of(row, column + i as u32) + right;
                        let m = [
                            gpu.load_matrix4::<false>(at),
                            gpu.load_matrix4::<false>(at + PrepareRoom::LOST),
                        ];
                        product(*gpu, &of_column[i], &m, &mut sums);
                        i += 1;
                    }
                    let sums = left_side(*gpu, &sums, -1.0 / RAISED);
                    let at = head + tile_of(row, row) + left;
                    let inverse =
                        [gpu.load_matrix4::<true>(at), gpu.load_matrix4::<true>(at + PrepareRoom::LOST)];
                    let mut block = [[0.0; 4]; 2];
                    product(*gpu, &sums, &inverse, &mut block);
                    let block = left_side(*gpu, &block, 1.0 / T_RAISED);
                    self.stage(lane, head, [row, column], block[0]);
                    if below + 1 < SIDES as usize {
                        of_column[below] = block;
                    }
                }
                below += 1;
            }
        }
    }

    /// Puts a block of the inverse, which is there transposed as a left side, where it is on its way out.
    #[inline(always)]
    unsafe fn stage(&self, lane: u32, head: u32, [row, column]: [u32; 2], words: [u32; 4]) {
        let gpu = self.gpu;
        let (line, pair) = (lane / 4, lane % 4 * 2);
        let mut word = 0;
        while word < 4 {
            let (i, j) = (pair + word as u32 / 2 * 8, line + word as u32 % 2 * 8);
            let at = head + PrepareRoom::OUT + (row * SIDE + i) * padded(CHUNK) + (column * SIDE + j) * 2;
            // SAFETY: as `run`.
            unsafe {
                gpu.store_shared2(at, words[word] as u16);
                gpu.store_shared2(at + padded(CHUNK), (words[word] >> 16) as u16);
            }
            word += 1;
        }
    }

    /// Writes the matrices of some heads that are on their way out, zeros above the blocks of the diagonal.
    #[inline(always)]
    unsafe fn put(&self, heads: u32, to: u64, thread: u32, threads: u32) {
        let Self { gpu, room, .. } = self;
        let words = CHUNK / 8;
        let (mut row, word) = (thread / words, thread % words);
        // A multiple of 8 rows further on they are swizzled alike.
        let mut to = to + u64::from(Swizzle::Bytes128.place(thread * 16));
        while row < heads * CHUNK {
            let mut eight = Bytes16([0; 4]);
            // SAFETY: as `run`; what is read was written before a barrier.
            unsafe {
                if word * 8 / SIDE <= row % CHUNK / SIDE {
                    let at = room.heads + row / CHUNK * PrepareRoom::HEAD + PrepareRoom::OUT;
                    eight = gpu.load_shared16(at + row % CHUNK * padded(CHUNK) + word * 16);
                }
                gpu.store16(to, eight);
            }
            row += threads / words;
            to += u64::from(threads * 16);
        }
    }
}

/// Of the factors of columns those that belong to rows of blocks before `row`.
#[inline(always)]
fn columns_before(row: u32) -> u32 {
    row * row.saturating_sub(1) / 2 * SIDE
}

/// Where a block on or below the diagonal begins among a head's.
#[inline(always)]
fn tile_of(row: u32, column: u32) -> u32 {
    (row * (row + 1) / 2 + column) * PrepareRoom::TILE
}

/// Where 8 numbers of a row of a block are: of no 8 rows in a row two lie in one bank.
#[inline(always)]
fn in_tile(row: u32, half: u32) -> u32 {
    row * SIDE * 2 + (half ^ (row / 4 % 2)) * 16
}

/// A block of accumulators as a left side, split, times a power of two.
#[inline(always)]
fn left_side(gpu: &impl TensorCore, tiles: &[Tile; 2], factor: f32) -> [[u32; 4]; 2] {
    let (mut kept, mut lost) = ([0; 4], [0; 4]);
    let mut word = 0;
    while word < 4 {
        let tile = &tiles[word / 2];
        let two = [tile[word % 2 * 2] * factor, tile[word % 2 * 2 + 1] * factor];
        [kept[word], lost[word]] = split(gpu, two);
        word += 1;
    }
    [kept, lost]
}

/// Adds the product of two blocks, both split: all but what is lost by both.
#[inline(always)]
fn product(gpu: &impl TensorCore, left: &[[u32; 4]; 2], right: &[[u32; 4]; 2], sums: &mut [Tile; 2]) {
    let mut add = |a: [u32; 4], [b0, b1, b2, b3]: [u32; 4]| {
        sums[0] = gpu.mma::<F16>(a, [b0, b1], sums[0]);
        sums[1] = gpu.mma::<F16>(a, [b2, b3], sums[1]);
    };
    add(left[0], right[1]);
    add(left[1], right[0]);
    add(left[0], right[0]);
}
