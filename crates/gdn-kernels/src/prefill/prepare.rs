//! The second kernel: the gates, and per v head the masked Q K^T and the inverse of I + strictLower(beta e^D
//! K K^T), a block for each chunk and key head; so that what is left are products.
//!
//! The inverse is made by substitution in f32, a thread a column, 16 rows at a time: exact to the last places
//! of an f32 whatever the keys, where products of f16 are not (`docs/gpu-kernels.md`). It is rounded once,
//! when it is stored. It takes the place of the matrix: row l of the inverse up to its diagonal and column l
//! of the matrix below it lie side by side in one row.

use gdn_math::{Lanes, layer as math, special::exp};

use super::{
    args::{Args, CHUNK, Field, GROUP, PrepareRoom, SQUARE, THREADS, padded},
    element::{load, of_vector, size},
    sequence::Sequence,
};
use crate::gpu::{AsyncCopy, Bytes16, F16, TensorCore};

const WARPS: u32 = THREADS / 32;
/// f32 between the two halves of a row: none of their 16 bytes are the same.
const SPACE: u32 = 4;
/// Logs below this are as good: their exponentials are 0.
const LEAST_LOG: f32 = -100.0;

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
    gpu.wait_for_previous();
    let (chunk, head) = args.num_k_heads.divide(gpu.block()[0]);
    // SAFETY: the caller's promises, here and below.
    unsafe {
        let Some((sequence, before)) = Sequence::of_chunk(gpu, args, args.first_chunk + chunk) else {
            return;
        };
        if sequence.slot < 0 {
            return;
        }
        let tokens = (sequence.len - before).min(u64::from(CHUNK)) as u32;
        let room = PrepareRoom::new(args.dk, args.ratio.get());
        let block = Block { gpu, args, room, sequence, before, tokens, chunk, head };
        block.fetch();
        block.gates();
        gpu.wait_copies::<0>();
        gpu.barrier();
        block.factors();
        block.products();
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

    /// Begins to copy q and k.
    #[inline(always)]
    unsafe fn fetch(&self) {
        let Self { gpu, args, room, .. } = self;
        let words = args.dk / 8;
        let head =
            u64::from(self.chunk * args.num_k_heads.get() + self.head) * u64::from(CHUNK * args.dk * 2);
        let mut i = gpu.thread();
        while i < CHUNK * words {
            let (row, word) = args.key_words.divide(i);
            let to = row * padded(args.dk) + word * 16;
            // SAFETY: as `run`.
            unsafe {
                gpu.copy16(room.q + to, args.scratch.q + head + u64::from(i * 16), true);
                gpu.copy16(room.k + to, args.scratch.k + head + u64::from(i * 16), true);
            }
            i += gpu.threads();
        }
        gpu.commit_copies();
    }

    /// Decays' logs, summed from the chunk's start, and beta. What lies past the sequence's end has neither.
    #[inline(always)]
    unsafe fn gates(&self) {
        let Self { gpu, args, .. } = self;
        let (lane, mut h) = (gpu.lane(), gpu.thread() / 32);
        while h < args.ratio.get() {
            let head = self.head * args.ratio.get() + h;
            // SAFETY: as `run`.
            unsafe {
                let a_log = of_vector(*gpu, &args.A_log, head);
                let dt_bias = of_vector(*gpu, &args.dt_bias, head);
                let mut logs = [0.0; 2];
                let mut n = 0;
                while n < 2 {
                    let token = 2 * lane + n as u32;
                    let mut beta = 0.0;
                    if token < self.tokens {
                        let at = |field: &Field| {
                            field.address
                                + self.row(token) * field.row_stride
                                + u64::from(self.head) * field.head_step
                                + u64::from(h * size(field.dtype))
                        };
                        let a = load(*gpu, args.a.dtype, at(&args.a));
                        let b = load(*gpu, args.b.dtype, at(&args.b));
                        logs[n] = math::log_decay(a, a_log, dt_bias).at_least(LEAST_LOG);
                        beta = math::beta(b, args.beta_scale);
                    }
                    gpu.store_shared4(self.room.beta + (h * CHUNK + token) * 4, beta.to_bits());
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
                let g = self.room.g + (h * CHUNK + 2 * lane) * 4;
                // The first of the two is the sum without the second, as an f32 adds up: differences stay at
                // most 0.
                let first = (sum - logs[1]).at_least(sum);
                gpu.store_shared8(g, u64::from(first.to_bits()) | u64::from(sum.to_bits()) << 32);
            }
            h += WARPS;
        }
    }

    /// What the scan multiplies each token with.
    #[inline(always)]
    unsafe fn factors(&self) {
        let Self { gpu, args, room, .. } = self;
        let mut i = gpu.thread();
        while i < args.ratio.get() * CHUNK {
            let (h, token) = (i / CHUNK, i % CHUNK);
            // SAFETY: as `run`; the barrier before is past.
            unsafe {
                let read = |array: u32, i: u32| f32::from_bits(gpu.load_shared4(array + i * 4));
                let (g, mut beta) = (read(room.g, i), read(room.beta, i));
                // A key of zeros finds and changes nothing. Without its value no size is lost to it.
                let key = u64::from(self.chunk * args.num_k_heads.get() + self.head) * u64::from(CHUNK);
                let squares = gpu.load4(args.scratch.k_squares + (key + u64::from(token)) * 4);
                if f32::from_bits(squares) == 0.0 {
                    beta = 0.0;
                }
                // The exponential of half the log twice: it is not 0 as long as an f32 can be.
                let decay = |log: f32| {
                    let half = exp(log.at_most(0.0) * 0.5);
                    half * half
                };
                let from_start = decay(g);
                let to_end = decay(read(room.g, h * CHUNK + CHUNK - 1) - g);
                let place = self.v_head(h) * u64::from(CHUNK) + u64::from(token);
                let v_scale = f32::from_bits(gpu.load4(args.scratch.v_scales + place * 4));
                let four = [beta * v_scale, beta * from_start, from_start, to_end];
                gpu.store16(args.scratch.factors + place * 16, Bytes16(four.map(f32::to_bits)));
            }
            i += gpu.threads();
        }
    }

    /// K K^T and Q K^T, and of them for each v head the inverse and the masked product. Of the 64 x 64 each
    /// warp has 16 rows and 32 columns.
    #[inline(always)]
    unsafe fn products(&self) {
        let Self { gpu, args, room, .. } = self;
        let (warp, lane) = (gpu.thread() / 32, gpu.lane());
        let (rows, columns) = (warp % 4 * 16, warp / 4 * 32);
        let (matrix, line) = (lane / 8, lane % 8);
        let (mut kk, mut qk) = ([[0.0; 4]; 4], [[0.0; 4]; 4]);
        let mut k16 = 0;
        while k16 < args.dk / 16 {
            // SAFETY: as `run`; the barrier before is past.
            unsafe {
                let left = (rows + matrix % 2 * 8 + line) * padded(args.dk) + (k16 * 16 + matrix / 2 * 8) * 2;
                let of_k = gpu.load_matrix4::<false>(room.k + left);
                let of_q = gpu.load_matrix4::<false>(room.q + left);
                let mut pair = 0;
                while pair < 2 {
                    let right = (columns + pair as u32 * 16 + matrix / 2 * 8 + line) * padded(args.dk)
                        + (k16 * 16 + matrix % 2 * 8) * 2;
                    let [b0, b1, b2, b3] = gpu.load_matrix4::<false>(room.k + right);
                    kk[2 * pair] = gpu.mma::<F16>(of_k, [b0, b1], kk[2 * pair]);
                    kk[2 * pair + 1] = gpu.mma::<F16>(of_k, [b2, b3], kk[2 * pair + 1]);
                    qk[2 * pair] = gpu.mma::<F16>(of_q, [b0, b1], qk[2 * pair]);
                    qk[2 * pair + 1] = gpu.mma::<F16>(of_q, [b2, b3], qk[2 * pair + 1]);
                    pair += 1;
                }
            }
            k16 += 1;
            // Keeps the compiler from unrolling, for which there are no registers.
            gpu.sync_warp();
        }
        let mut first = 0;
        while first < args.ratio.get() {
            let heads = (args.ratio.get() - first).min(GROUP);
            let mut n = 0;
            while n < heads {
                // SAFETY: as above.
                unsafe { self.masked(first + n, n, [rows, columns], &kk, &qk) };
                n += 1;
            }
            gpu.barrier();
            if warp < 2 * heads {
                // SAFETY: as above.
                unsafe { self.invert(room.squares + warp / 2 * CHUNK * SQUARE * 4, warp % 2) };
            }
            gpu.barrier();
            let mut n = 0;
            while n < heads {
                // SAFETY: as above.
                unsafe { self.put_inverse(first + n, n) };
                n += 1;
            }
            gpu.barrier();
            first += GROUP;
        }
    }

    /// For v head `h` beta e^D K K^T below the diagonal, into the `n`th square, by columns; and e^D Q K^T up
    /// to the diagonal.
    #[inline(always)]
    unsafe fn masked(
        &self,
        h: u32,
        n: u32,
        [rows, columns]: [u32; 2],
        kk: &[[f32; 4]; 4],
        qk: &[[f32; 4]; 4],
    ) {
        let Self { gpu, args, room, .. } = self;
        // The lane's own number, in a way that keeps places from being kept from head to head: there are no
        // registers for them.
        let lane = gpu.shuffle_xor(gpu.lane(), 0);
        let (line, pair) = (lane / 4, lane % 4 * 2);
        let square = room.squares + n * CHUNK * SQUARE * 4;
        let p = args.scratch.p + self.v_head(h) * u64::from(CHUNK * CHUNK * 2);
        let mut half = 0;
        while half < 2 {
            let i = rows + line + half as u32 * 8;
            // SAFETY: as `run`; what is read was written before a barrier.
            unsafe {
                let read = |array: u32, i: u32| f32::from_bits(gpu.load_shared4(array + (h * CHUNK + i) * 4));
                let (g, beta) = (read(room.g, i), read(room.beta, i));
                let mut tile = 0;
                while tile < 4 {
                    let j = columns + tile as u32 * 8 + pair;
                    let mut masked = [0.0; 2];
                    let mut c = 0;
                    while c < 2 {
                        let j = j + c as u32;
                        if j <= i {
                            let decay = exp((g - read(room.g, j)).at_most(0.0));
                            masked[c] = decay * qk[tile][2 * half + c];
                            if j < i {
                                let m = beta * (decay * kk[tile][2 * half + c]);
                                gpu.store_shared4(square + (j * SQUARE + i + SPACE) * 4, m.to_bits());
                            }
                        }
                        c += 1;
                    }
                    let two = gpu.pack_f16(masked[0], masked[1]);
                    gpu.store4(p + u64::from((i * CHUNK + j) * 2), two);
                    tile += 1;
                }
            }
            half += 1;
        }
    }

    /// The inverse of I and what is below the diagonal of a square, a thread a column, `half` of them a warp.
    #[inline(always)]
    unsafe fn invert(&self, square: u32, half: u32) {
        let gpu = self.gpu;
        let column = half * 32 + gpu.lane();
        let at = |row: u32, i: u32| square + (row * SQUARE + i) * 4;
        // SAFETY: as `run`. Of a row what is left of the diagonal is the inverse's, each column its thread's;
        // the rest is read alone, and was written before a barrier.
        unsafe {
            let mut block = half * 2;
            while block < 4 {
                let first = block * 16;
                let mut sums = [0.0f32; 16];
                let mut i = 0;
                while i < 16 {
                    sums[i] = if first + i as u32 == column { 1.0 } else { 0.0 };
                    i += 1;
                }
                let mut l = half * 32;
                while l < first {
                    let mut t = 0.0;
                    if l >= column {
                        t = f32::from_bits(gpu.load_shared4(at(l, column)));
                    }
                    let mut four = 0;
                    while four < 4 {
                        let Bytes16(m) = gpu.load_shared16(at(l, first + four as u32 * 4 + SPACE));
                        let mut i = 0;
                        while i < 4 {
                            let sum = &mut sums[4 * four + i];
                            *sum = f32::from_bits(m[i]).neg_mul_add(t, *sum);
                            i += 1;
                        }
                        four += 1;
                    }
                    l += 1;
                    // Keeps the compiler from unrolling, for which there are no registers.
                    gpu.sync_warp();
                }
                let mut l = 0;
                while l < 15 {
                    let mut four = l / 4;
                    while four < 4 {
                        if four * 4 > l {
                            let Bytes16(m) =
                                gpu.load_shared16(at(first + l as u32, first + four as u32 * 4 + SPACE));
                            let mut i = 0;
                            while i < 4 {
                                sums[4 * four + i] =
                                    f32::from_bits(m[i]).neg_mul_add(sums[l], sums[4 * four + i]);
                                i += 1;
                            }
                        } else {
                            let mut i = l + 1;
                            while i < four * 4 + 4 {
                                let m = gpu.load_shared4(at(first + l as u32, first + i as u32 + SPACE));
                                sums[i] = f32::from_bits(m).neg_mul_add(sums[l], sums[i]);
                                i += 1;
                            }
                        }
                        four += 1;
                    }
                    l += 1;
                }
                let mut i = 0;
                while i < 16 {
                    if first + i as u32 >= column {
                        gpu.store_shared4(at(first + i as u32, column), sums[i].to_bits());
                    }
                    i += 1;
                }
                block += 1;
            }
        }
    }

    /// Rounds an inverse, each thread 16 columns of a row.
    #[inline(always)]
    unsafe fn put_inverse(&self, h: u32, n: u32) {
        let Self { gpu, args, room, .. } = self;
        let (row, first) = (gpu.thread() / 4, gpu.thread() % 4 * 16);
        let t = args.scratch.t + self.v_head(h) * u64::from(CHUNK * CHUNK * 2);
        let square = room.squares + n * CHUNK * SQUARE * 4;
        let mut half = 0;
        while half < 2 {
            let first = first + half * 8;
            let mut words = [0; 4];
            let mut two = 0;
            while two < 4 {
                let column = first + two as u32 * 2;
                // SAFETY: as `run`; what is read was written before a barrier.
                unsafe {
                    let read = |column: u32| {
                        if column > row {
                            return 0.0;
                        }
                        f32::from_bits(gpu.load_shared4(square + (row * SQUARE + column) * 4))
                    };
                    words[two] = gpu.pack_f16(read(column), read(column + 1));
                }
                two += 1;
            }
            // SAFETY: as above.
            unsafe { gpu.store16(t + u64::from((row * CHUNK + first) * 2), Bytes16(words)) };
            half += 1;
        }
    }
}
