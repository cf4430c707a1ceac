//! The decode: everything between the layer's two GEMMs for T tokens of each of B sequences, in one launch.
//!
//! A cluster of 1, 2, 4 or 8 blocks does one key head of one sequence, with all its R v heads. The rows of their states, R * DV, are
//! shared out among the blocks; q and k are made by each of them for itself. Eight lanes hold a row of S in their registers from the
//! first token to the last: it is read once and written once, whatever T. Sums over DK are those of the eight lanes, in an order that
//! depends on nothing but the dtype of the state. Sums over DV are taken by a warp from the outputs of all blocks, in an order that
//! depends on nothing at all. So the bits of a result do not depend on the size of the cluster, on B or on the slot.
//!
//! **The window of the convolution.** R v heads share the 2 * DK channels of their key head, and every block of the cluster reads
//! them; one of them writes what is kept, in the same memory. It does so behind a barrier of the cluster that all pass after they have
//! read. Blocks of other clusters have no channel in common with it.
//!
//! **Skipped** is a sequence whose indices are padding or name a slot that is not there, or whose number of accepted tokens
//! cannot be: its rows of `out` become zeros, nothing else is touched. A state that would be kept in such a slot is not kept.

pub mod args;
mod conv;
pub mod element;
mod slots;

use gdn_math::{Lanes, layer as math, special::exp};

use self::{
    args::{Args, Room, Vector},
    conv::Channel,
    element::{Element, load, size, store},
    slots::Read,
};
use crate::gpu::{Bytes16, Gpu, Hopper, SharedWord, Warp};

/// Lanes that hold a row of S.
pub const LANES: u32 = 8;

/// Blocks that a launch may ask for, of `LANES * 4` to so many threads.
pub const MOST_THREADS: u32 = 256;

/// An element of a vector.
///
/// # Safety
/// It is there.
#[inline(always)]
unsafe fn element(gpu: &impl Gpu, vector: &Vector, i: u32) -> f32 {
    // SAFETY: the caller's promise.
    unsafe { load(gpu, vector.dtype, vector.address + u64::from(i) * vector.stride) }
}

/// An f32 of shared memory.
///
/// # Safety
/// That of [`Gpu::load_shared4`].
#[inline(always)]
unsafe fn shared(gpu: &impl Gpu, at: u32) -> f32 {
    // SAFETY: the caller's promise.
    f32::from_bits(unsafe { gpu.load_shared4(at) })
}

/// What one block does.
struct Block<'a, G> {
    gpu: &'a G,
    args: &'a Args,
    room: Room,
    /// Within the cluster, and how many blocks that has.
    rank: u32,
    blocks: u32,
    sequence: u32,
    /// The key head.
    head: u32,
}

/// The v heads of a pass, and the rows of them that are this block's.
#[derive(Clone, Copy)]
struct Pass {
    /// The first v head, within the key head.
    first: u32,
    heads: u32,
    /// Rows of the pass.
    low: u32,
    high: u32,
}

/// The kernel. A state of elements `E`, `V` of them in 16 bytes; rows of up to `CHUNKS` times 8 lanes times V columns, `ROWS` of them
/// side by side in a thread. `WIDE` says that rows are dense, and they and their strides multiples of 16 bytes.
///
/// # Safety
/// A grid of `B * HK` clusters along x of `1 << cluster_shift` blocks, each of a multiple of 32 threads with [`Room`]'s bytes of shared
/// memory. All that the arguments say is there, elements at multiples of their size, and what is kept is written by nobody else
/// meanwhile. No two sequences keep a state in one slot, or one where another one's is read.
#[inline(always)]
pub unsafe fn run<E: Element, const V: usize, const CHUNKS: usize, const ROWS: usize, const WIDE: bool>(
    gpu: &(impl Hopper + Warp),
    args: &Args,
) {
    gpu.let_next_start();
    let [block, ..] = gpu.block();
    let (sequence, head) = args.num_k_heads.divide(block >> args.cluster_shift);
    let padded = LANES * (V * CHUNKS) as u32;
    let block = Block {
        gpu,
        args,
        room: Room::new(args.tokens, padded, args.block_rows, args.pass_heads),
        rank: gpu.cluster_rank(),
        blocks: 1 << args.cluster_shift,
        sequence,
        head,
    };
    gpu.wait_for_previous();
    // SAFETY: the caller's promises.
    unsafe {
        let Some(read) = Read::of(gpu, args, sequence) else {
            block.clear();
            return;
        };
        let mut first = 0;
        while first < args.ratio {
            let heads = (args.ratio - first).min(args.pass_heads);
            let rows = heads * args.dv;
            let low = (block.rank * args.block_rows).min(rows);
            let pass = Pass { first, heads, low, high: (low + args.block_rows).min(rows) };
            block.pass::<E, V, CHUNKS, ROWS, WIDE>(&read, &pass);
            first += args.pass_heads;
        }
    }
}

impl<G: Hopper + Warp> Block<'_, G> {
    /// The first of the sequence's rows of the projections and of `out`.
    #[inline(always)]
    fn row(&self) -> u64 {
        u64::from(self.sequence) * u64::from(self.args.tokens)
    }

    /// Waits for all blocks of the cluster.
    #[inline(always)]
    fn wait(&self) {
        if self.blocks > 1 {
            self.gpu.cluster_barrier();
        } else {
            self.gpu.barrier();
        }
    }

    /// Where an output is: row `row` of the v heads from `first` on, at token `t`.
    #[inline(always)]
    fn out(&self, first: u32, row: u32, t: u32) -> u64 {
        let (j, i) = self.args.head_v_dim.divide(row);
        let [of_token, of_head, of_element] = self.args.out.strides;
        self.args.out.address
            + (self.row() + u64::from(t)) * of_token
            + u64::from(self.head * self.args.ratio + first + j) * of_head
            + u64::from(i) * of_element
    }

    /// Zeros in the rows of a sequence that is skipped.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn clear(&self) {
        let rows = self.args.ratio * self.args.dv;
        let mut t = 0;
        while t < self.args.tokens {
            let mut row = self.rank * self.gpu.threads() + self.gpu.thread();
            while row < rows {
                // SAFETY: the caller's promise; each element is one thread's.
                unsafe { store(self.gpu, self.args.out.dtype, self.out(0, row, t), 0.0) }
                row += self.blocks * self.gpu.threads();
            }
            t += 1;
        }
    }

    /// Channel `i` of q and k side by side.
    #[inline(always)]
    fn channel_of_qk(&self, read: &Read, i: u32) -> Channel {
        let Args { dk, q, k, .. } = self.args;
        let keys = self.args.num_k_heads.get() * dk;
        let (field, i, channel) =
            if i < *dk { (q, i, self.head * dk + i) } else { (k, i - dk, keys + self.head * dk + i - dk) };
        Channel::new(self.args, read, field, self.row(), self.head, i, channel)
    }

    /// The channel of row `row` of a pass.
    #[inline(always)]
    fn channel_of_v(&self, read: &Read, pass: &Pass, row: u32) -> Channel {
        let Args { dk, dv, ratio, v, .. } = self.args;
        let i = pass.first * dv + row;
        let channel = 2 * self.args.num_k_heads.get() * dk + self.head * ratio * dv + i;
        Channel::new(self.args, read, v, self.row(), self.head, i, channel)
    }

    /// Some v heads.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn pass<E: Element, const V: usize, const CHUNKS: usize, const ROWS: usize, const WIDE: bool>(
        &self,
        read: &Read,
        pass: &Pass,
    ) {
        // SAFETY: the caller's promises. Shared memory is written before a barrier and read behind it.
        unsafe {
            let padded = LANES * (V * CHUNKS) as u32;
            let mut rows = Rows::<V, CHUNKS, ROWS>::new(self.gpu, pass.low);
            let mut is_prepared = false;
            while !is_prepared || rows.start < pass.high {
                // The first rows are on their way while the convolution is computed.
                rows.load::<E, WIDE, _>(self, read, pass);
                if !is_prepared {
                    if self.args.conv_width == 4 {
                        self.convolve::<4>(read, pass, padded);
                    } else {
                        self.convolve::<0>(read, pass, padded);
                    }
                    self.gates(read, pass);
                    // Here every block has read the window of q and k.
                    self.wait();
                    if pass.first == 0 {
                        self.norm_qk(padded);
                        self.gpu.barrier();
                    }
                    is_prepared = true;
                }
                // A block without rows has been here for the sake of the others.
                if rows.start < pass.high {
                    rows.recur::<E, WIDE, _>(self, pass);
                }
                rows.start += self.gpu.threads() / LANES * ROWS as u32;
            }
            self.keep_windows(read, pass);
            self.wait();
            self.finish(pass);
            // Nobody ends, or begins the next pass, before all have read this one's outputs.
            if self.blocks > 1 || pass.first + pass.heads < self.args.ratio {
                self.wait();
            }
        }
    }

    /// q, k and v, convolved, into shared memory.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn convolve<const W: usize>(&self, read: &Read, pass: &Pass, padded: u32) {
        let Self { gpu, args, room, .. } = self;
        let (thread, threads, dk) = (gpu.thread(), gpu.threads(), args.dk);
        let of_qk = if pass.first == 0 { 2 * dk } else { 0 };
        let mut i = thread;
        // SAFETY: the caller's promises; each place is one thread's.
        unsafe {
            while i < of_qk + (pass.high - pass.low) {
                let (channel, to, step) = if i < of_qk {
                    let to = if i < dk { room.q + i * 4 } else { room.k + (i - dk) * 4 };
                    (self.channel_of_qk(read, i), to, padded * 4)
                } else {
                    let row = i - of_qk;
                    (self.channel_of_v(read, pass, pass.low + row), room.v + row * 4, args.block_rows * 4)
                };
                let mut t = 0;
                while t < args.tokens {
                    let c = channel.convolved::<W>(*gpu, args, t);
                    gpu.store_shared4(to + t * step, c.to_bits());
                    t += 1;
                }
                i += threads;
            }
            let mut t = 0;
            while t < 2 * args.tokens && pass.first == 0 {
                let mut i = dk + thread;
                while i < padded {
                    gpu.store_shared4(room.q + (t * padded + i) * 4, 0);
                    i += threads;
                }
                t += 1;
            }
        }
    }

    /// Decay and beta of each token and v head, and where each token's state goes. By the last threads: the first ones have more to
    /// convolve.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn gates(&self, read: &Read, pass: &Pass) {
        let Self { gpu, args, room, .. } = self;
        let mut n = gpu.threads() - 1 - gpu.thread();
        // SAFETY: the caller's promises; each place is one thread's.
        unsafe {
            if pass.first == 0 && n < args.tokens {
                let to = args.kept.address(*gpu, args, self.sequence, read.recurrent, n);
                gpu.store_shared8(room.to + n * 8, to);
            }
            while n < args.tokens * pass.heads {
                let (mut t, mut j) = (0, n);
                while j >= pass.heads {
                    (t, j) = (t + 1, j - pass.heads);
                }
                let row = self.row() + u64::from(t);
                let gate = |field: &args::Field| {
                    let at = field.address
                        + row * field.row_stride
                        + u64::from(self.head) * field.head_step
                        + u64::from((pass.first + j) * size(field.dtype));
                    load(*gpu, field.dtype, at)
                };
                let head = self.head * args.ratio + pass.first + j;
                let (a_log, dt_bias) = (element(*gpu, &args.A_log, head), element(*gpu, &args.dt_bias, head));
                let decay = exp(math::log_decay(gate(&args.a), a_log, dt_bias));
                let beta = math::beta(gate(&args.b), args.beta_scale);
                let pair = u64::from(decay.to_bits()) | u64::from(beta.to_bits()) << 32;
                gpu.store_shared8(room.gates + (t * args.pass_heads + j) * 8, pair);
                n += gpu.threads();
            }
        }
    }

    /// Brings q and k to their lengths, a warp a row.
    ///
    /// # Safety
    /// As [`run`]; they are in shared memory, for all to see.
    #[inline(always)]
    unsafe fn norm_qk(&self, padded: u32) {
        let Self { gpu, args, room, .. } = self;
        let mut row = gpu.thread() / 32;
        while row < 2 * args.tokens {
            let line = room.q + row * padded * 4;
            let mut sum = 0.0;
            let mut i = gpu.lane();
            // SAFETY: the caller's promises; each number is one lane's.
            unsafe {
                while i < args.dk {
                    let x = shared(*gpu, line + i * 4);
                    sum = Lanes::mul_add(x, x, sum);
                    i += 32;
                }
                let scale = if row < args.tokens { args.scale } else { 1.0 };
                let factor = math::l2_scale(gpu.sum::<32>(sum), args.l2norm_eps, scale);
                let mut i = gpu.lane();
                while i < args.dk {
                    let x = shared(*gpu, line + i * 4);
                    gpu.store_shared4(line + i * 4, (x * factor).to_bits());
                    i += 32;
                }
            }
            row += gpu.threads() / 32;
        }
    }

    /// The windows of the channels of this block, and of its part of those that the cluster shares.
    ///
    /// # Safety
    /// As [`run`]; all blocks of the cluster have read them.
    #[inline(always)]
    unsafe fn keep_windows(&self, read: &Read, pass: &Pass) {
        let Self { gpu, args, .. } = self;
        if args.conv_kept.kind == args::NOTHING {
            return;
        }
        // SAFETY: the caller's promises; each channel is one thread's.
        unsafe {
            let mut i = self.rank * gpu.threads() + gpu.thread();
            while i < 2 * args.dk && pass.first == 0 {
                self.channel_of_qk(read, i).keep(*gpu, args, read, self.sequence);
                i += self.blocks * gpu.threads();
            }
            let mut row = pass.low + gpu.thread();
            while row < pass.high {
                self.channel_of_v(read, pass, row).keep(*gpu, args, read, self.sequence);
                row += gpu.threads();
            }
        }
    }

    /// The gated norm of this block's rows, a warp a head and token. The sum goes over the whole head, whosever its rows are.
    ///
    /// # Safety
    /// As [`run`]; the outputs of all blocks are in shared memory, for all to see.
    #[inline(always)]
    unsafe fn finish(&self, pass: &Pass) {
        let Self { gpu, args, room, .. } = self;
        if pass.low >= pass.high {
            return;
        }
        let (from, _) = args.head_v_dim.divide(pass.low);
        let (last, _) = args.head_v_dim.divide(pass.high - 1);
        let heads = last + 1 - from;
        let mut n = gpu.thread() / 32;
        while n < args.tokens * heads {
            let (mut t, mut j) = (0, from + n);
            while j > last {
                (t, j) = (t + 1, j - heads);
            }
            let outputs = room.o + t * args.block_rows * 4;
            let mut sum = 0.0;
            let mut i = gpu.lane();
            // SAFETY: the caller's promises; each output is one lane's.
            unsafe {
                while i < args.dv {
                    let (rank, at) = args.of_block.divide(j * args.dv + i);
                    let at = outputs + at * 4;
                    let o =
                        if rank == self.rank { gpu.load_shared4(at) } else { gpu.load_cluster4(at, rank) };
                    let o = f32::from_bits(o);
                    sum = Lanes::mul_add(o, o, sum);
                    i += 32;
                }
                let scale = math::rms_scale(gpu.sum::<32>(sum), args.dv as f32, args.norm_eps);
                let z = args.z.address
                    + (self.row() + u64::from(t)) * args.z.row_stride
                    + u64::from(self.head) * args.z.head_step;
                let gate = if args.sigmoid == 0 { math::Gate::Silu } else { math::Gate::Sigmoid };
                let mut i = gpu.lane();
                while i < args.dv {
                    let row = j * args.dv + i;
                    if row >= pass.low && row < pass.high {
                        let o = shared(*gpu, outputs + (row - pass.low) * 4);
                        let at = z + u64::from((pass.first * args.dv + row) * size(args.z.dtype));
                        let z = load(*gpu, args.z.dtype, at);
                        let weight = element(*gpu, &args.norm_weight, i);
                        let y = math::gated(o, scale, weight, z, gate);
                        store(*gpu, args.out.dtype, self.out(pass.first, row, t), y);
                    }
                    i += 32;
                }
            }
            n += gpu.threads() / 32;
        }
    }
}

/// The rows of S that a thread holds its columns of.
struct Rows<const V: usize, const CHUNKS: usize, const ROWS: usize> {
    /// The first of those that the block has in its registers.
    start: u32,
    /// Of this thread's rows the first, from `start` on; its lane among those of a row.
    group: u32,
    lane: u32,
    /// From one of its rows to the next.
    step: u32,
    s: [[[f32; V]; CHUNKS]; ROWS],
}

impl<const V: usize, const CHUNKS: usize, const ROWS: usize> Rows<V, CHUNKS, ROWS> {
    #[inline(always)]
    fn new(gpu: &impl Gpu, start: u32) -> Self {
        let (group, step) = (gpu.thread() / LANES, gpu.threads() / LANES);
        Self { start, group, lane: gpu.thread() % LANES, step, s: [[[0.0; V]; CHUNKS]; ROWS] }
    }

    /// Which row the thread's `n`th is.
    #[inline(always)]
    fn row<const WIDE: bool>(&self, n: usize) -> u32 {
        // Where DK is not dense, DV is: a thread's rows are neighbours in memory.
        let n = n as u32;
        self.start + if WIDE { self.group + n * self.step } else { self.group * ROWS as u32 + n }
    }

    /// The first column of a chunk.
    #[inline(always)]
    fn column(&self, chunk: usize) -> u32 {
        (chunk as u32 * LANES + self.lane) * V as u32
    }

    /// Reads the rows from `start` on, those that there are.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn load<E: Element, const WIDE: bool, G: Hopper + Warp>(
        &mut self,
        block: &Block<'_, G>,
        read: &Read,
        pass: &Pass,
    ) {
        let args = block.args;
        let [of_slot, of_head, of_row, of_column] = args.state.strides;
        let base = args.state.address
            + read.recurrent as u64 * of_slot
            + u64::from(block.head * args.ratio + pass.first) * of_head;
        let mut bytes = [[Bytes16([0; 4]); CHUNKS]; ROWS];
        let mut n = 0;
        while n < ROWS {
            let row = self.row::<WIDE>(n);
            let (j, i) = args.head_v_dim.divide(row);
            let at = base + u64::from(j) * of_head + u64::from(i) * of_row;
            let mut c = 0;
            while c < CHUNKS {
                let column = self.column(c);
                // SAFETY: the caller's promise.
                unsafe {
                    if WIDE {
                        if row < pass.high && column < args.dk {
                            bytes[n][c] = block.gpu.load16(at + u64::from(column * E::BYTES));
                        }
                    } else {
                        let mut v = 0;
                        while v < V {
                            let column = column + v as u32;
                            self.s[n][c][v] = 0.0;
                            if row < pass.high && column < args.dk {
                                self.s[n][c][v] = E::load(block.gpu, at + u64::from(column) * of_column);
                            }
                            v += 1;
                        }
                    }
                }
                c += 1;
            }
            n += 1;
        }
        if WIDE {
            let mut n = 0;
            while n < ROWS {
                let mut c = 0;
                while c < CHUNKS {
                    let mut v = 0;
                    while v < V {
                        self.s[n][c][v] = E::of(bytes[n][c], v);
                        v += 1;
                    }
                    c += 1;
                }
                n += 1;
            }
        }
    }

    /// The thread's columns of a line of q or k.
    ///
    /// # Safety
    /// As [`run`]; the line is in shared memory, for all to see.
    #[inline(always)]
    unsafe fn line(&self, gpu: &impl Gpu, line: u32) -> [[f32; V]; CHUNKS] {
        let mut numbers = [[0.0; V]; CHUNKS];
        let mut c = 0;
        while c < CHUNKS {
            let mut v = 0;
            while v < V {
                // SAFETY: the caller's promise.
                let Bytes16(four) =
                    unsafe { Bytes16::load_shared(gpu, line + (self.column(c) + v as u32) * 4) };
                let mut i = 0;
                while i < 4 {
                    numbers[c][(v + i) % V] = f32::from_bits(four[i]);
                    i += 1;
                }
                v += 4;
            }
            c += 1;
        }
        numbers
    }

    /// All tokens on the rows that are loaded.
    ///
    /// # Safety
    /// As [`run`]; q, k, v, gates and addresses are in shared memory, for all to see.
    #[inline(always)]
    unsafe fn recur<E: Element, const WIDE: bool, G: Hopper + Warp>(
        &mut self,
        block: &Block<'_, G>,
        pass: &Pass,
    ) {
        let Block { gpu, args, room, .. } = block;
        let mut t = 0;
        while t < args.tokens {
            // SAFETY: the caller's promises.
            unsafe {
                let to = gpu.load_shared8(room.to + t * 8);
                let padded = LANES * (V * CHUNKS) as u32;
                let k = self.line(*gpu, room.k + t * padded * 4);
                let q = self.line(*gpu, room.q + t * padded * 4);
                let mut n = 0;
                while n < ROWS {
                    let row = self.row::<WIDE>(n);
                    // Lanes of rows that are not there go along with those of the others.
                    let is_there = row < pass.high;
                    let near = if is_there { row } else { pass.low };
                    let (j, i) = args.head_v_dim.divide(near);
                    let gates = gpu.load_shared8(room.gates + (t * args.pass_heads + j) * 8);
                    let (decay, beta) = (f32::from_bits(gates as u32), f32::from_bits((gates >> 32) as u32));
                    let place = (t * args.block_rows + near - pass.low) * 4;
                    let v = shared(*gpu, room.v + place);
                    let s = &mut self.s[n];
                    let mut sum = 0.0;
                    each::<V, CHUNKS>(|c, x| sum = Lanes::mul_add(s[c][x], k[c][x], sum));
                    let r = decay * gpu.sum::<{ LANES }>(sum);
                    let correction = math::correction(beta, v, r);
                    let mut sum = 0.0;
                    each::<V, CHUNKS>(|c, x| {
                        s[c][x] = Lanes::mul_add(k[c][x], correction, s[c][x] * decay);
                        sum = Lanes::mul_add(s[c][x], q[c][x], sum);
                    });
                    let o = gpu.sum::<{ LANES }>(sum);
                    if is_there && self.lane == 0 {
                        gpu.store_shared4(room.o + place, o.to_bits());
                    }
                    if is_there && to != 0 {
                        let [.., of_head, of_row, of_column] = args.kept.to.strides;
                        let head = block.head * args.ratio + pass.first + j;
                        let at = to + u64::from(head) * of_head + u64::from(i) * of_row;
                        self.store::<E, WIDE>(*gpu, args, n, at, of_column);
                    }
                    let s = &mut self.s[n];
                    each::<V, CHUNKS>(|c, x| s[c][x] = E::rounded(s[c][x]));
                    n += 1;
                }
            }
            t += 1;
        }
    }

    /// Writes the thread's columns of its `n`th row.
    ///
    /// # Safety
    /// As [`run`]; the row at `at` is one to be written.
    #[inline(always)]
    unsafe fn store<E: Element, const WIDE: bool>(
        &self,
        gpu: &impl Gpu,
        args: &Args,
        n: usize,
        at: u64,
        of_column: u64,
    ) {
        let mut c = 0;
        while c < CHUNKS {
            let column = self.column(c);
            // SAFETY: the caller's promise.
            unsafe {
                if WIDE {
                    if column < args.dk {
                        gpu.store16(at + u64::from(column * E::BYTES), E::packed(&self.s[n][c]));
                    }
                } else {
                    let mut v = 0;
                    while v < V {
                        let column = column + v as u32;
                        if column < args.dk {
                            E::store(gpu, at + u64::from(column) * of_column, self.s[n][c][v]);
                        }
                        v += 1;
                    }
                }
            }
            c += 1;
        }
    }
}

/// Every column of a thread, in the order in which they are added up.
#[inline(always)]
fn each<const V: usize, const CHUNKS: usize>(mut f: impl FnMut(usize, usize)) {
    let mut c = 0;
    while c < CHUNKS {
        let mut v = 0;
        while v < V {
            f(c, v);
            v += 1;
        }
        c += 1;
    }
}
