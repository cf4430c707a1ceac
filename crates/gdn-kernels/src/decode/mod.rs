//! The decode: everything between the layer's two GEMMs for T tokens of each of B sequences, in one launch.
//!
//! A block does some v heads of one key head of one sequence: all of them, or, where that leaves the device idle, a
//! share, beside the other blocks of a cluster. A warp computes up to 32 rows of the state of one v head, in pieces: a
//! row is read once and written once, whatever T. Each block makes q and k for itself; the channels of v are those of
//! the rows of a warp.
//!
//! **The window of the convolution.** R v heads share the 2 * DK channels of their key head. Where one block does them
//! all, each channel's window is read by one thread and written by that same thread: there is nobody to race with. Where
//! a cluster does, its blocks all read the window, and the first one writes it once the cluster's barrier says that all
//! have read. Blocks of other clusters have no channel in common with it.
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
    element::{Element, bits, number, shared, size, store},
    rows::{Rows, Token},
    slots::Read,
};
use crate::gpu::{AsyncCopy, Hopper, Warp};

/// Rows of a warp, at most: each lane has one in the convolution of v and in the norm.
pub const WARP_ROWS: u32 = 32;

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
    /// Blocks of the cluster, and which of them this is.
    blocks: u32,
    rank: u32,
    /// Pieces of rows of the v heads that are computed at a time.
    pieces: u32,
}

/// What one warp does of some v heads: rows `start` to `start + len` of one of them.
#[derive(Clone, Copy)]
struct Unit {
    /// The v head, within the key head.
    head: u32,
    start: u32,
    len: u32,
    /// The first of its pieces, among those of the block, and the first of its head.
    piece: u32,
    head_piece: u32,
}

/// The kernel: states of elements `E`, rows as `Rows` has them.
///
/// # Safety
/// A grid of `B * HK` clusters along x, of blocks of whole warps with [`Room`]'s bytes of shared memory each; more than
/// one block a cluster only on devices that have clusters, and with `2 * DK` threads each. All that the arguments say is there, elements at multiples of their size, and what is kept is
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
    let [block, ..] = gpu.block();
    let (group, rank) = args.cluster.divide(block);
    let (sequence, head) = args.num_k_heads.divide(group);
    let padded = Rows::<E, LANES, V, CHUNKS, ROWS, WIDE>::PADDED;
    let landing = Rows::<E, LANES, V, CHUNKS, ROWS, WIDE>::LANDING;
    let pieces = args.pass_heads * args.head_warps.get() * args.steps;
    let block = Block {
        gpu,
        args,
        room: Room::new(args.tokens, padded, gpu.threads() / 32, pieces, landing, args.cluster.get()),
        sequence,
        head,
        row: u64::from(sequence) * u64::from(args.tokens),
        blocks: args.cluster.get(),
        rank,
        pieces,
    };
    gpu.wait_for_previous();
    // SAFETY: the caller's promises.
    unsafe {
        // All blocks of a cluster find the same.
        let Some(read) = Read::of(gpu, args, sequence) else {
            block.clear();
            return;
        };
        let (mut first, end) = block.heads();
        loop {
            block.compute::<E, LANES, V, CHUNKS, ROWS, WIDE>(&read, first, end);
            first += args.pass_heads;
            // The wide kernels are for heads that are computed all at once.
            if WIDE || first >= end {
                break;
            }
            // What the next heads write in shared memory has been read.
            gpu.barrier();
        }
    }
}

impl<G: Hopper + Warp + AsyncCopy> Block<'_, G> {
    /// The v heads of the key head that are this block's: the first, and the one behind the last.
    #[inline(always)]
    fn heads(&self) -> (u32, u32) {
        let first = self.rank * self.args.block_heads;
        (first, (first + self.args.block_heads).min(self.args.ratio))
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
        let (first, end) = self.heads();
        let mut t = 0;
        while t < self.args.tokens {
            let mut head = first;
            while head < end {
                let mut row = self.gpu.thread();
                while row < self.args.dv {
                    // SAFETY: the caller's promise; each element is one thread's.
                    unsafe { store(self.gpu, self.args.out.dtype, self.out(head, row, t), 0.0) }
                    row += self.gpu.threads();
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
    fn unit(&self, first: u32, end: u32, piece_rows: u32) -> Unit {
        let Self { gpu, args, .. } = self;
        let (head, of_head) = args.head_warps.divide(gpu.thread() / 32);
        let start = of_head * args.steps * piece_rows;
        let is_there = head < args.pass_heads && first + head < end;
        let len = if is_there { args.dv.saturating_sub(start).min(args.steps * piece_rows) } else { 0 };
        let head_piece = head * args.head_warps.get() * args.steps;
        Unit { head: first + head, start, len, piece: head_piece + of_head * args.steps, head_piece }
    }

    /// The v heads from `first` on, as many as are computed at a time, up to `end`.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn compute<
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
        end: u32,
    ) {
        let Self { gpu, args, room, .. } = self;
        let gpu = *gpu;
        let piece_rows = Rows::<E, LANES, V, CHUNKS, ROWS, WIDE>::PIECE;
        let padded = Rows::<E, LANES, V, CHUNKS, ROWS, WIDE>::PADDED;
        let landing = Rows::<E, LANES, V, CHUNKS, ROWS, WIDE>::LANDING;
        let (warp, warps, lane) = (gpu.thread() / 32, gpu.threads() / 32, gpu.lane());
        let with_qk = WIDE || first == self.heads().0;
        let unit = self.unit(first, end, piece_rows);
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
            let gates = self.gate_bits(&unit, v_head);
            let (weight, z) = if has_row {
                let weight = &args.norm_weight;
                let at = weight.address + u64::from(unit.start + lane) * weight.stride;
                (bits(gpu, weight.dtype, at), self.z(&unit, 0))
            } else {
                (0, 0)
            };
            self.convolve::<WIDE>(read, &windows, &unit, with_qk, padded);
            let gates = self.gates(read, gates);
            gpu.barrier();

            let lengths = self.lengths(padded);
            let mut step = 0;
            while step * piece_rows < unit.len {
                rows.compute(gpu, args, step, |t| Token {
                    decay: of_lane(gpu, gates.decay, t),
                    beta: of_lane(gpu, gates.beta, t),
                    q_scale: of_lane(gpu, lengths, 2 * t),
                    k_scale: of_lane(gpu, lengths, 2 * t + 1),
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
                    gpu.store_shared4(room.sums + piece * 4, sum.to_bits());
                }
                t += 1;
            }
            gpu.barrier();

            // The gated norm of the lane's row.
            let pieces = args.dv.div_ceil(piece_rows);
            let weight = number(gpu, args.norm_weight.dtype, weight);
            let (mut z, mut t) = (z, 0);
            while unit.len > 0 && t < args.tokens {
                let next = if has_row && t + 1 < args.tokens { self.z(&unit, t + 1) } else { 0 };
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
                    let z = number(gpu, args.z.dtype, z);
                    let y = math::gated(shared(gpu, o(t)), scale, weight, z, gate);
                    store(gpu, args.out.dtype, self.out(unit.head, unit.start + lane, t), y);
                }
                z = next;
                t += 1;
            }
            self.keep_windows::<WIDE>(&unit, with_qk);
        }
    }

    /// The bits of the gate's input of the lane's row at a token.
    ///
    /// # Safety
    /// As [`run`]; the row is there.
    #[inline(always)]
    unsafe fn z(&self, unit: &Unit, t: u32) -> u32 {
        let Args { dv, z, .. } = self.args;
        let at = self.feature(z, unit.head * dv + unit.start + self.gpu.lane(), t);
        // SAFETY: the caller's promise.
        unsafe { bits(self.gpu, z.dtype, at) }
    }

    /// What decay and beta of a v head are made of: token t's in lane t.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn gate_bits(&self, unit: &Unit, v_head: u32) -> [u32; 4] {
        let Self { gpu, args, .. } = self;
        let t = gpu.lane().min(args.tokens - 1);
        if unit.len == 0 {
            return [0; 4];
        }
        // SAFETY: the caller's promises.
        unsafe {
            let gate = |field: &Field| bits(*gpu, field.dtype, self.feature(field, unit.head, t));
            let of_head = |vector: &Vector| {
                bits(*gpu, vector.dtype, vector.address + u64::from(v_head) * vector.stride)
            };
            [gate(&args.a), gate(&args.b), of_head(&args.A_log), of_head(&args.dt_bias)]
        }
    }

    /// Decay and beta of the v head, and where its state goes: token t's in lane t.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn gates(&self, read: &Read, [a, b, a_log, dt_bias]: [u32; 4]) -> Gates {
        let Self { gpu, args, .. } = self;
        let gpu = *gpu;
        let t = gpu.lane().min(args.tokens - 1);
        let (a, b) = (number(gpu, args.a.dtype, a), number(gpu, args.b.dtype, b));
        let (a_log, dt_bias) =
            (number(gpu, args.A_log.dtype, a_log), number(gpu, args.dt_bias.dtype, dt_bias));
        Gates {
            decay: exp(math::log_decay(a, a_log, dt_bias)),
            beta: math::beta(b, args.beta_scale),
            // SAFETY: the caller's promise.
            to: unsafe { args.kept.address(gpu, args, self.sequence, read.recurrent, t) },
        }
    }

    /// q, k and v, convolved, into shared memory, and the windows that nobody else reads.
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
        let (mut i, step) = (gpu.thread(), gpu.threads());
        let of_qk = if with_qk { 2 * dk } else { 0 };
        let of_v = self.channel_of_v(read, unit);
        let has_row = lane < unit.len;
        let values = room.v + (gpu.thread() / 32 * WARP_ROWS + lane) * 4;
        let put_v = |t: u32, c: f32| {
            // SAFETY: one lane's place.
            unsafe { gpu.store_shared4(values + t * (gpu.threads() * 4), c.to_bits()) }
        };
        // SAFETY: the shared memory is one thread's.
        let put = |to: u32, c: f32| unsafe { gpu.store_shared4(to, c.to_bits()) };
        // Of q and k the cluster's first block keeps the windows.
        let of_block = if self.rank == 0 { windows.without_last() } else { Windows::NONE };
        let keeps = windows.last != 0 && !conv::rolls(args);
        // Where other blocks read a window, it waits here until they have.
        let later = room.windows + gpu.thread() * 4;
        // SAFETY: the caller's promises; each place is one thread's.
        unsafe {
            if WIDE {
                let start_of_v = if has_row { Some(of_v.start(gpu, args)) } else { None };
                let mut channel = self.channel_of_qk(read, i.min(2 * dk - 1));
                let mut start = if i < of_qk { Some(channel.start(gpu, args)) } else { None };
                if let Some(start) = start_of_v {
                    let window = of_v.run(gpu, args, start, windows, put_v);
                    if keeps {
                        of_v.put_window(gpu, args, windows.last, window);
                    }
                }
                while let Some(given) = start {
                    let to = if i < dk { room.q + i * 4 } else { room.k + (i - dk) * 4 };
                    let window = channel.run(gpu, args, given, &of_block, |t, c| put(to + t * padded * 4, c));
                    if self.blocks > 1 {
                        let mut column = 0;
                        while column < 3 {
                            put(later + column * step * 4, window[column as usize]);
                            column += 1;
                        }
                    } else if keeps {
                        channel.put_window(gpu, args, windows.last, window);
                    }
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
                while i < of_qk {
                    let to = if i < dk { room.q + i * 4 } else { room.k + (i - dk) * 4 };
                    self.channel_of_qk(read, i)
                        .run_any(gpu, args, &of_block, |t, c| put(to + t * padded * 4, c));
                    i += step;
                }
            }
            if self.blocks > 1 {
                // What this thread read it has used.
                gpu.cluster_arrive();
            }
            if !has_row {
                let mut t = 0;
                while t < args.tokens {
                    put_v(t, 0.0);
                    t += 1;
                }
            }
            // Zeros behind queries and keys.
            let mut line = 0;
            while dk < padded && with_qk && line < 2 * args.tokens {
                let mut i = dk + gpu.thread();
                while i < padded {
                    put(room.q + (line * padded + i) * 4, 0.0);
                    i += gpu.threads();
                }
                line += 1;
            }
        }
    }

    /// The windows after the last token that are not kept yet: those that roll, those of the narrow kernels, and, in a
    /// cluster, those of q and k.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn keep_windows<const WIDE: bool>(&self, unit: &Unit, with_qk: bool) {
        let Self { gpu, args, room, .. } = self;
        let gpu = *gpu;
        if self.blocks > 1 {
            // All blocks have read the windows of q and k.
            gpu.cluster_wait();
        }
        let rolls = !WIDE || conv::rolls(args);
        if args.conv_kept.kind == args::NOTHING || !rolls && self.blocks == 1 {
            return;
        }
        // SAFETY: the caller's promises.
        unsafe {
            // What was read for this at first was not kept: it is seldom needed.
            let Some(read) = Read::of(gpu, args, self.sequence) else { return };
            let windows = Windows::of(gpu, args, &read, self.sequence);
            let mut i = gpu.thread();
            let of_qk = if with_qk && self.rank == 0 { 2 * args.dk } else { 0 };
            if !rolls {
                if i < of_qk && windows.last != 0 {
                    let column = |column: u32| shared(gpu, room.windows + (column * gpu.threads() + i) * 4);
                    let window = [column(0), column(1), column(2)];
                    self.channel_of_qk(&read, i).put_window(gpu, args, windows.last, window);
                }
                return;
            }
            if gpu.lane() < unit.len {
                self.channel_of_v(&read, unit).keep_last(gpu, args, &read, &windows);
            }
            while i < of_qk {
                self.channel_of_qk(&read, i).keep_last(gpu, args, &read, &windows);
                i += gpu.threads();
            }
        }
    }

    /// What brings each token's query and key to their lengths: token t's in lanes 2t and 2t + 1.
    ///
    /// # Safety
    /// As [`run`]; they are in shared memory, for all to see.
    #[inline(always)]
    unsafe fn lengths(&self, padded: u32) -> f32 {
        let Self { gpu, args, room, .. } = self;
        let (gpu, mut mine) = (*gpu, 0.0);
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
            let mut mask = 16;
            while mask > 0 {
                let other = sums.map(|sum| f32::from_bits(gpu.shuffle_xor(sum.to_bits(), mask)));
                sums = [sums[0] + other[0], sums[1] + other[1]];
                mask /= 2;
            }
            if gpu.lane() / 2 == t {
                mine = if gpu.lane().is_multiple_of(2) { sums[0] } else { sums[1] };
            }
            t += 1;
        }
        let scale = if gpu.lane().is_multiple_of(2) { args.scale } else { 1.0 };
        math::l2_scale(mine, args.l2norm_eps, scale)
    }
}

/// Of a v head, in lane t what belongs to token t.
#[derive(Clone, Copy)]
struct Gates {
    decay: f32,
    beta: f32,
    to: u64,
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
