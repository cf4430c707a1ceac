//! The decode: everything between the layer's two GEMMs for T tokens of each of B sequences, in one launch.
//!
//! A cluster of 1, 2, 4 or 8 blocks does one key head of one sequence, with all its R v heads. A warp computes up to 32
//! rows of the state of one v head, in pieces: a row is read once and written once, whatever T. The convolution's
//! channels of q and k are shared out among all threads of the cluster, which hand the results to each of its blocks;
//! the channels of v are those of the rows of a warp.
//!
//! **The window of the convolution.** R v heads share the 2 * DK channels of their key head. Each channel's window is
//! read by one thread of the cluster and written by that same thread, behind its reads: there is nobody to race with.
//! Blocks of other clusters have no channel in common with it.
//!
//! **Bits.** Sums over DK are those of the lanes of a row, sums over DV those of pieces, then over pieces, each in an
//! order that depends on nothing but the kernel. So the bits of a result do not depend on the size of the cluster, on
//! B or on the slot.
//!
//! **Skipped** is a sequence whose indices are padding or name a slot that is not there, or whose number of accepted
//! tokens cannot be: its rows of `out` become zeros, nothing else is touched. A state that would be kept in such a slot
//! is not kept.

pub mod args;
mod conv;
pub mod element;
mod rows;
mod slots;

use gdn_math::{Lanes, layer as math, special::exp};

use self::{
    args::{Args, Field, Room, Vector},
    conv::{Channel, Windows},
    element::{Element, load, shared, size, store},
    rows::{Rows, Token},
    slots::Read,
};
use crate::gpu::{AsyncCopy, Gpu, Hopper, Warp};

/// Rows of a warp, at most: each lane has one in the convolution of v and in the norm.
pub const WARP_ROWS: u32 = 32;

/// An element of a vector.
///
/// # Safety
/// It is there.
#[inline(always)]
unsafe fn element(gpu: &impl Gpu, vector: &Vector, i: u32) -> f32 {
    // SAFETY: the caller's promise.
    unsafe { load(gpu, vector.dtype, vector.address + u64::from(i) * vector.stride) }
}

/// What one block does.
struct Block<'a, G> {
    gpu: &'a G,
    args: &'a Args,
    room: Room,
    sequence: u32,
    /// The key head.
    head: u32,
    /// The first of the sequence's rows of the projections and of `out`.
    row: u64,
    /// v heads of the cluster at a time, in pieces of rows.
    pieces: u32,
}

/// What one warp does of some v heads: rows `start` to `start + len` of one of them.
#[derive(Clone, Copy)]
struct Unit {
    /// The v head, within the key head.
    head: u32,
    start: u32,
    len: u32,
    /// The first of its pieces, among those of the cluster, and the first of its head.
    piece: u32,
    head_piece: u32,
}

/// The kernel: states of elements `E`, rows as [`Rows`] has them.
///
/// # Safety
/// A grid of `B * HK` clusters along x of `1 << cluster_shift` blocks, each of whole warps with [`Room`]'s bytes of
/// shared memory. All that the arguments say is there, elements at multiples of their size, and what is kept is
/// written by nobody else meanwhile. No two sequences keep a state in one slot, or one where another one's is read.
#[inline(always)]
pub unsafe fn run<
    E: Element,
    const LANES: u32,
    const V: usize,
    const CHUNKS: usize,
    const ROWS: usize,
    const WIDE: bool,
>(
    gpu: &(impl Hopper + Warp + AsyncCopy),
    args: &Args,
) {
    gpu.let_next_start();
    if gpu.cluster_blocks() > 1 {
        gpu.cluster_arrive_relaxed();
    }
    let [block, ..] = gpu.block();
    let (sequence, head) = args.num_k_heads.divide(block >> args.cluster_shift);
    let padded = Rows::<E, LANES, V, CHUNKS, ROWS, WIDE>::PADDED;
    let landing = Rows::<E, LANES, V, CHUNKS, ROWS, WIDE>::LANDING;
    let pieces = args.pass_heads * args.head_warps.get() * args.steps;
    let block = Block {
        gpu,
        args,
        room: Room::new(args.tokens, padded, gpu.threads() / 32, pieces, landing),
        sequence,
        head,
        row: u64::from(sequence) * u64::from(args.tokens),
        pieces,
    };
    gpu.wait_for_previous();
    // SAFETY: the caller's promises.
    unsafe {
        if let Some(read) = Read::of(gpu, args, sequence) {
            let mut first = 0;
            loop {
                block.heads::<E, LANES, V, CHUNKS, ROWS, WIDE>(&read, first);
                first += args.pass_heads;
                // The wide kernels are for heads that are computed all at once.
                if WIDE || first >= args.ratio {
                    break;
                }
                // What the next heads write in shared memory has been read.
                block.wait();
            }
        } else {
            block.clear();
            if gpu.cluster_blocks() > 1 {
                gpu.cluster_wait();
            }
        }
    }
}

impl<G: Hopper + Warp + AsyncCopy> Block<'_, G> {
    /// Waits for all blocks of the cluster.
    #[inline(always)]
    fn wait(&self) {
        if self.gpu.cluster_blocks() > 1 {
            self.gpu.cluster_barrier();
        } else {
            self.gpu.barrier();
        }
    }

    /// Writes to the same place of all blocks of the cluster.
    ///
    /// # Safety
    /// As [`Gpu::store_shared4`], for each of them; they have all begun.
    #[inline(always)]
    unsafe fn tell(&self, at: u32, value: f32) {
        let blocks = self.gpu.cluster_blocks();
        // SAFETY: the caller's promise.
        unsafe {
            if blocks == 1 {
                self.gpu.store_shared4(at, value.to_bits());
                return;
            }
            let mut rank = 0;
            while rank < blocks {
                self.gpu.store_cluster4(at, rank, value.to_bits());
                rank += 1;
            }
        }
    }

    /// This thread among those of the cluster, and how many they are.
    #[inline(always)]
    fn thread_of_cluster(&self) -> (u32, u32) {
        let threads = self.gpu.threads();
        (self.gpu.cluster_rank() * threads + self.gpu.thread(), self.gpu.cluster_blocks() * threads)
    }

    /// Where row `row` of v head `head` (within the key head) of `out` is, at token `t`.
    #[inline(always)]
    fn out(&self, head: u32, row: u32, t: u32) -> u64 {
        let [of_token, of_head, of_element] = self.args.out.strides;
        self.args.out.address
            + (self.row + u64::from(t)) * of_token
            + u64::from(self.head * self.args.ratio + head) * of_head
            + u64::from(row) * of_element
    }

    /// Where feature `i` of the key head is in a field, at token `t`.
    #[inline(always)]
    fn feature(&self, field: &Field, i: u32, t: u32) -> u64 {
        field.address
            + (self.row + u64::from(t)) * field.row_stride
            + u64::from(self.head) * field.head_step
            + u64::from(i * size(field.dtype))
    }

    /// Zeros in the rows of a sequence that is skipped.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn clear(&self) {
        let (thread, threads) = self.thread_of_cluster();
        let mut t = 0;
        while t < self.args.tokens {
            let mut head = 0;
            while head < self.args.ratio {
                let mut row = thread;
                while row < self.args.dv {
                    // SAFETY: the caller's promise; each element is one thread's.
                    unsafe { store(self.gpu, self.args.out.dtype, self.out(head, row, t), 0.0) }
                    row += threads;
                }
                head += 1;
            }
            t += 1;
        }
    }

    /// Channel `i` of q and k side by side.
    #[inline(always)]
    fn channel_of_qk(&self, read: &Read, i: u32) -> Channel {
        let Args { dk, q, k_behind_q, .. } = self.args;
        let is_key = i >= *dk;
        let (i, before) = if is_key { (i - dk, self.args.num_k_heads.get() * dk) } else { (i, 0) };
        let behind = if is_key { *k_behind_q } else { 0 };
        let channel = before + self.head * dk + i;
        Channel::new(self.args, read, q, behind, self.row, self.head, i, channel)
    }

    /// The channel of the lane's row.
    #[inline(always)]
    fn channel_of_v(&self, read: &Read, unit: &Unit) -> Channel {
        let Args { dk, dv, ratio, v, .. } = self.args;
        let i = unit.head * dv + unit.start + self.gpu.lane();
        let channel = 2 * self.args.num_k_heads.get() * dk + self.head * ratio * dv + i;
        Channel::new(self.args, read, v, 0, self.row, self.head, i, channel)
    }

    /// What this warp does of the v heads from `first` on.
    #[inline(always)]
    fn unit(&self, first: u32, piece_rows: u32) -> Unit {
        let Self { gpu, args, .. } = self;
        let warp = gpu.cluster_rank() * (gpu.threads() / 32) + gpu.thread() / 32;
        let (head, of_head) = args.head_warps.divide(warp);
        let start = of_head * args.steps * piece_rows;
        let is_there = head < args.pass_heads && first + head < args.ratio;
        let len = if is_there { args.dv.saturating_sub(start).min(args.steps * piece_rows) } else { 0 };
        let head_piece = head * args.head_warps.get() * args.steps;
        Unit { head: first + head, start, len, piece: head_piece + of_head * args.steps, head_piece }
    }

    /// The v heads from `first` on, as many as are computed at a time.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn heads<
        E: Element,
        const LANES: u32,
        const V: usize,
        const CHUNKS: usize,
        const ROWS: usize,
        const WIDE: bool,
    >(
        &self,
        read: &Read,
        first: u32,
    ) {
        let Self { gpu, args, room, .. } = self;
        let gpu = *gpu;
        let piece_rows = Rows::<E, LANES, V, CHUNKS, ROWS, WIDE>::PIECE;
        let padded = Rows::<E, LANES, V, CHUNKS, ROWS, WIDE>::PADDED;
        let landing = Rows::<E, LANES, V, CHUNKS, ROWS, WIDE>::LANDING;
        let (warp, warps, lane) = (gpu.thread() / 32, gpu.threads() / 32, gpu.lane());
        let unit = self.unit(first, piece_rows);
        let v_head = self.head * args.ratio + unit.head;
        let has_row = lane < unit.len;
        // SAFETY: the caller's promises. Shared memory is written before a barrier and read behind it.
        unsafe {
            // Everything that is read from far away is sent for before any of it is used.
            let state = args.state.address + read.recurrent as u64 * args.state.strides[0];
            let mut rows = Rows::<E, LANES, V, CHUNKS, ROWS, WIDE>::begin(
                gpu,
                args,
                state,
                v_head,
                unit.start,
                unit.len,
                room.landing + warp * landing,
            );
            let windows = Windows::of(gpu, args, read, self.sequence);
            let gates = if unit.len > 0 { self.gates(read, &unit, v_head) } else { Gates::NONE };
            let (weight, mut z) = if has_row {
                (element(gpu, &args.norm_weight, unit.start + lane), self.z(&unit, 0))
            } else {
                (0.0, 0.0)
            };
            self.convolve::<WIDE>(read, &windows, &unit, first == 0, padded);
            self.wait();

            let lengths = self.lengths(padded);
            let mut step = 0;
            while step * piece_rows < unit.len {
                rows.compute(gpu, args, step, |t| Token {
                    decay: of_lane(gpu, gates.decay, t),
                    beta: of_lane(gpu, gates.beta, t),
                    q_scale: of_lane(gpu, lengths[0], t),
                    k_scale: of_lane(gpu, lengths[1], t),
                    to: u64::from(gpu.shuffle(gates.to as u32, t))
                        | u64::from(gpu.shuffle((gates.to >> 32) as u32, t)) << 32,
                    q: room.q + t * padded * 4,
                    k: room.k + t * padded * 4,
                    v: room.v + (t * warps + warp) * WARP_ROWS * 4,
                    o: room.o + (t * warps + warp) * WARP_ROWS * 4,
                });
                step += 1;
            }
            gpu.sync_warp();

            // Sums of squares, piece by piece.
            let o = |t: u32| room.o + ((t * warps + warp) * WARP_ROWS + lane) * 4;
            let mut t = 0;
            while t < args.tokens {
                let o = if has_row { shared(gpu, o(t)) } else { 0.0 };
                let sum = sum_of(gpu, o * o, piece_rows);
                if has_row && lane.is_multiple_of(piece_rows) {
                    let piece = t * self.pieces + unit.piece + lane / piece_rows;
                    self.tell(room.sums + piece * 4, sum);
                }
                t += 1;
            }
            self.wait();

            // The gated norm of the lane's row.
            let pieces = args.dv.div_ceil(piece_rows);
            let mut t = 0;
            while unit.len > 0 && t < args.tokens {
                let next = if has_row && t + 1 < args.tokens { self.z(&unit, t + 1) } else { 0.0 };
                let mut sum = 0.0;
                let mut i = lane;
                while i < pieces {
                    sum += shared(gpu, room.sums + (t * self.pieces + unit.head_piece + i) * 4);
                    i += 32;
                }
                let sum = gpu.sum::<32>(sum);
                if has_row {
                    let scale = math::rms_scale(sum, args.dv as f32, args.norm_eps);
                    let gate = if args.sigmoid == 0 { math::Gate::Silu } else { math::Gate::Sigmoid };
                    let y = math::gated(shared(gpu, o(t)), scale, weight, z, gate);
                    store(gpu, args.out.dtype, self.out(unit.head, unit.start + lane, t), y);
                }
                z = next;
                t += 1;
            }
            if windows.rolls {
                self.roll(read, &windows, &unit, first == 0);
            }
        }
    }

    /// The gate's input of the lane's row at a token.
    ///
    /// # Safety
    /// As [`run`]; the row is there.
    #[inline(always)]
    unsafe fn z(&self, unit: &Unit, t: u32) -> f32 {
        let Args { dv, z, .. } = self.args;
        let at = self.feature(z, unit.head * dv + unit.start + self.gpu.lane(), t);
        // SAFETY: the caller's promise.
        unsafe { load(self.gpu, z.dtype, at) }
    }

    /// Decay and beta of the v head, and where its state goes: token t's in lane t.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn gates(&self, read: &Read, unit: &Unit, v_head: u32) -> Gates {
        let Self { gpu, args, .. } = self;
        let t = gpu.lane().min(args.tokens - 1);
        // SAFETY: the caller's promises.
        unsafe {
            let gate = |field: &Field| load(*gpu, field.dtype, self.feature(field, unit.head, t));
            let (a, b) = (gate(&args.a), gate(&args.b));
            let (a_log, dt_bias) = (element(*gpu, &args.A_log, v_head), element(*gpu, &args.dt_bias, v_head));
            Gates {
                decay: exp(math::log_decay(a, a_log, dt_bias)),
                beta: math::beta(b, args.beta_scale),
                to: args.kept.address(*gpu, args, self.sequence, read.recurrent, t),
            }
        }
    }

    /// q, k and v, convolved, into shared memory, and the windows that do not roll.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn convolve<const WIDE: bool>(
        &self,
        read: &Read,
        windows: &Windows,
        unit: &Unit,
        with_qk: bool,
        padded: u32,
    ) {
        let Self { gpu, args, room, .. } = self;
        let (gpu, dk, lane) = (*gpu, args.dk, gpu.lane());
        let (mut i, step) = self.thread_of_cluster();
        let of_qk = if with_qk { 2 * dk } else { 0 };
        let of_v = self.channel_of_v(read, unit);
        let has_row = lane < unit.len;
        let values = room.v + (gpu.thread() / 32 * WARP_ROWS + lane) * 4;
        let put_v = |t: u32, c: f32| {
            // SAFETY: one lane's place.
            unsafe { gpu.store_shared4(values + t * (gpu.threads() * 4), c.to_bits()) }
        };
        // SAFETY: the caller's promises; each place is one thread's.
        unsafe {
            if WIDE {
                let start_of_v = if has_row { Some(of_v.start(gpu, args)) } else { None };
                let mut channel = self.channel_of_qk(read, i.min(2 * dk - 1));
                let mut start = if i < of_qk { Some(channel.start(gpu, args)) } else { None };
                if let Some(start) = start_of_v {
                    of_v.run(gpu, args, start, windows, put_v);
                }
                if with_qk && gpu.cluster_blocks() > 1 {
                    gpu.cluster_wait();
                }
                while let Some(given) = start {
                    let to = if i < dk { room.q + i * 4 } else { room.k + (i - dk) * 4 };
                    channel.run(gpu, args, given, windows, |t, c| self.tell(to + t * padded * 4, c));
                    i += step;
                    start = None;
                    if i < of_qk {
                        channel = self.channel_of_qk(read, i);
                        start = Some(channel.start(gpu, args));
                    }
                }
            } else {
                if has_row {
                    of_v.run_any(gpu, args, windows, put_v);
                }
                if with_qk && gpu.cluster_blocks() > 1 {
                    gpu.cluster_wait();
                }
                while i < of_qk {
                    let to = if i < dk { room.q + i * 4 } else { room.k + (i - dk) * 4 };
                    self.channel_of_qk(read, i)
                        .run_any(gpu, args, windows, |t, c| self.tell(to + t * padded * 4, c));
                    i += step;
                }
            }
            if !has_row {
                let mut t = 0;
                while t < args.tokens {
                    put_v(t, 0.0);
                    t += 1;
                }
            }
            // Zeros behind queries and keys: of each block its own.
            let mut line = 0;
            while dk < padded && with_qk && line < 2 * args.tokens {
                let mut i = dk + gpu.thread();
                while i < padded {
                    gpu.store_shared4(room.q + (line * padded + i) * 4, 0);
                    i += gpu.threads();
                }
                line += 1;
            }
        }
    }

    /// What brings each token's query and key to their lengths: token t's in lane t.
    ///
    /// # Safety
    /// As [`run`]; they are in shared memory, for all to see.
    #[inline(always)]
    unsafe fn lengths(&self, padded: u32) -> [f32; 2] {
        let Self { gpu, args, room, .. } = self;
        let (gpu, mut factors) = (*gpu, [0.0; 2]);
        let mut t = 0;
        while t < args.tokens {
            let mut sums = [0.0; 2];
            let mut i = gpu.lane();
            while i < padded {
                let at = (t * padded + i) * 4;
                // SAFETY: the caller's promise.
                let (q, k) = unsafe { (shared(gpu, room.q + at), shared(gpu, room.k + at)) };
                sums = [Lanes::mul_add(q, q, sums[0]), Lanes::mul_add(k, k, sums[1])];
                i += 32;
            }
            let sums = [gpu.sum::<32>(sums[0]), gpu.sum::<32>(sums[1])];
            if gpu.lane() == t {
                factors = [
                    math::l2_scale(sums[0], args.l2norm_eps, args.scale),
                    math::l2_scale(sums[1], args.l2norm_eps, 1.0),
                ];
            }
            t += 1;
        }
        factors
    }

    /// The rolling windows of the channels of this thread.
    ///
    /// # Safety
    /// As [`run`]; it has read them.
    #[inline(always)]
    unsafe fn roll(&self, read: &Read, windows: &Windows, unit: &Unit, with_qk: bool) {
        let Self { gpu, args, .. } = self;
        let (mut i, step) = self.thread_of_cluster();
        let of_qk = if with_qk { 2 * args.dk } else { 0 };
        // SAFETY: the caller's promise.
        unsafe {
            if gpu.lane() < unit.len {
                self.channel_of_v(read, unit).roll(*gpu, args, read, windows.rolling());
            }
            while i < of_qk {
                self.channel_of_qk(read, i).roll(*gpu, args, read, windows.rolling());
                i += step;
            }
        }
    }
}

/// Of a v head, in lane t what belongs to token t.
#[derive(Clone, Copy)]
struct Gates {
    decay: f32,
    beta: f32,
    to: u64,
}

impl Gates {
    const NONE: Self = Self { decay: 0.0, beta: 0.0, to: 0 };
}

/// The number that lane `lane` has.
#[inline(always)]
fn of_lane(gpu: &impl Warp, value: f32, lane: u32) -> f32 {
    f32::from_bits(gpu.shuffle(value.to_bits(), lane))
}

/// The sum over neighbouring lanes, `lanes` (a power of two) at a time.
#[inline(always)]
fn sum_of(gpu: &impl Warp, value: f32, lanes: u32) -> f32 {
    match lanes {
        4 => gpu.sum::<4>(value),
        8 => gpu.sum::<8>(value),
        _ => gpu.sum::<16>(value),
    }
}
