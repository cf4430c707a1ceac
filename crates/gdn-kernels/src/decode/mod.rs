//! The decode: everything between the layer's two GEMMs for T tokens of each of B sequences, in one launch.
//!
//! A block does some v heads of one key head of one sequence: all of them, or, where that leaves the device
//! idle, a share, beside the other blocks of a cluster; a share may be some rows of one v head. A warp
//! computes up to 32 rows of the state of one v head, in pieces: a row is read once and written once,
//! whatever T. Each block makes q and k for itself.
//!
//! Three stages, with a barrier between them, and each thread is someone else in each: convolution and gates
//! (`inputs.rs`: a lane is two channels), the rows of S (`rows.rs`), the gated norm (`norm.rs`: a thread is a
//! row).
//!
//! That is [`run`] here. Plain calls of few blocks have a kernel of their own (`few.rs`), which goes the same way with
//! hardly a loop or a branch, and gives the same bits.
//!
//! **The window of the convolution.** R v heads share the 2 * DK channels of their key head. Where one block
//! does them all, each channel's window is read by one thread and written by that same thread: there is
//! nobody to race with. Where a cluster does, its blocks all read the window, and the first one writes it
//! once the cluster's barrier says that all have read. Blocks of other clusters have no channel in common
//! with it. Sums of squares of rows go round as messages, for which nobody waits but who needs them.
//!
//! **Bits.** Sums over DK are those of the lanes of a row, sums over DV those of pieces, then over pieces,
//! each in an order that depends on nothing but the kernel. So the bits of a result do not depend on the size
//! of the cluster, on B or on the slot.
//!
//! **Skipped** is a sequence whose indices are padding or name a slot that is not there, or whose number of
//! accepted tokens cannot be: its rows of `out` become zeros, nothing else is touched. A state that would be
//! kept in such a slot is not kept.

pub mod args;
mod conv;
pub mod element;
pub mod few;
mod inputs;
mod norm;
mod plain;
mod rows;
mod slots;

use gdn_math::layer as math;

pub use self::rows::{BULK, NARROW, PLAIN, PLAIN_TOKENS, Rows, WIDE, bulk_landing};
use self::{
    args::{Args, Field, GROUPS, Room},
    conv::Windows,
    element::{far, shared, size, store},
    norm::Ready,
    plain::{Aim, Asked},
    rows::{Held, Place, Token},
    slots::Read,
};
use crate::{
    gpu::{Bytes16, EMPTY, Warp},
    split::Divisor,
};

/// Rows of a warp, at most.
pub const WARP_ROWS: u32 = 64;

/// What one block does.
struct Block<'a, G> {
    gpu: &'a G,
    args: &'a Args,
    room: &'a Room,
    sequence: u32,
    /// The key head.
    head: u32,
    /// The first of the sequence's rows of the projections and of `out`.
    row: u64,
    /// Blocks of the cluster, and which of them this is.
    blocks: u32,
    rank: u32,
}

/// What a block does at a time: `heads` v heads from `first` on (within the key head), of each the block's
/// rows from `start` on. They are `rows` in all, and lie side by side: where there are several heads, they
/// are whole.
#[derive(Clone, Copy)]
struct Pass {
    first: u32,
    heads: u32,
    start: u32,
    rows: u32,
    /// Whether queries and keys are still to be made.
    with_qk: bool,
}

/// What one warp does of it: rows `start` to `start + len` of a v head of the pass.
#[derive(Clone, Copy)]
struct Unit {
    head: u32,
    start: u32,
    len: u32,
    /// The first of them among all rows of the pass.
    row: u32,
}

/// The kernel: `H` holds the rows of the state.
///
/// # Safety
/// A grid of `B * HK` clusters along x, of blocks of whole warps with [`Room`]'s bytes of shared memory each;
/// more than one block a cluster only on devices that have clusters, and for wide kernels. All that the
/// arguments say is there, elements at multiples of their size, and what is kept is written by nobody else
/// meanwhile. No two sequences keep a state in one slot, or one where another one's is read.
#[inline(always)]
pub unsafe fn run<H: Held>(gpu: &impl rows::Machine, args: &Args) {
    gpu.let_next_start();
    // What needs no memory is worked out while the kernel before this one may still be at work.
    let [number, ..] = gpu.block();
    let block = Block::new::<H>(gpu, args, number, [args.cluster, args.num_k_heads]);
    let mut pass = block.first_pass();
    // SAFETY: the caller's promises.
    unsafe {
        block.empty_sums::<H>();
        if block.blocks > 1 {
            // Behind the wait for this the others' sums are empty, and they have begun.
            gpu.cluster_arrive();
        }
        let mut rows = block.aim::<H>(&pass);
        let aim = if H::PLAIN { block.aim_inputs::<H>(&pass) } else { Aim::default() };
        if H::PLAIN && block.blocks > 1 {
            // Where blocks are few each one's chain of waits is what a call takes.
            block.bring_near(&rows, &aim);
        }
        gpu.wait_for_previous();
        let (read, asked);
        if H::PLAIN {
            let index = Read::ask(gpu, args, block.sequence);
            asked = block.ask::<H>(&aim);
            read = Read::by(args, index);
        } else {
            asked = Asked::default();
            read = Read::of(gpu, args, block.sequence);
        }
        // All blocks of a cluster find the same.
        let Some(read) = read else {
            if block.blocks > 1 {
                gpu.cluster_wait();
            }
            let mut next = Some(pass);
            while let Some(pass) = next {
                block.clear::<H>(&pass);
                next = block.pass_behind(&pass);
            }
            return;
        };
        block.compute::<H>(&read, &pass, &mut rows, (&aim, &asked));
        // The wide kernels are for heads that are computed all at once.
        while let (false, Some(next)) = (H::WIDE, block.pass_behind(&pass)) {
            pass = next;
            // What the next heads write in shared memory has been read.
            gpu.barrier();
            let mut rows = block.aim::<H>(&pass);
            block.compute::<H>(&read, &pass, &mut rows, (&aim, &asked));
        }
    }
}

impl<'a, G: rows::Machine> Block<'a, G> {
    /// Block `number` of the grid.
    #[inline(always)]
    fn new<H: Held>(gpu: &'a G, args: &'a Args, number: u32, [cluster, num_k_heads]: [Divisor; 2]) -> Self {
        let (group, rank) = cluster.divide(number);
        let (sequence, head) = num_k_heads.divide(group);
        let tokens = if H::ONE { 1 } else { args.tokens };
        let row = u64::from(sequence) * u64::from(tokens);
        let blocks = if H::WIDE { args.cluster.get() } else { 1 };
        Block { gpu, args, room: &args.room, sequence, head, row, blocks, rank }
    }

    /// T.
    #[inline(always)]
    fn tokens<H: Held>(&self) -> u32 {
        if H::ONE { 1 } else { self.args.tokens }
    }

    /// The first v heads that the block computes.
    #[inline(always)]
    fn first_pass(&self) -> Pass {
        let Args { head_blocks, block_rows, block_heads, pass_heads, .. } = self.args;
        let (share, part) = head_blocks.divide(self.rank);
        let first = share * block_heads;
        let heads = (*pass_heads).min(self.args.ratio - first);
        Pass { first, heads, start: part * block_rows.get(), rows: heads * block_rows.get(), with_qk: true }
    }

    /// Those behind, where a block computes them one after the other. It is then the only one of its key
    /// head.
    #[inline(always)]
    fn pass_behind(&self, pass: &Pass) -> Option<Pass> {
        let Args { block_rows, pass_heads, ratio, .. } = self.args;
        let first = pass.first + pass_heads;
        let heads = (*pass_heads).min(ratio.saturating_sub(first));
        let behind = Pass { first, heads, rows: heads * block_rows.get(), with_qk: false, ..*pass };
        (self.blocks == 1 && heads > 0).then_some(behind)
    }

    /// Where row `row` of v head `head` (within the key head) of `out` is, at token `t`.
    #[inline(always)]
    fn out(&self, is_wide: bool, head: u32, row: u32, t: u32) -> u64 {
        let [of_token, of_head, of_element] = self.args.out.strides;
        self.args.out.address
            + far(is_wide, self.row + u64::from(t), of_token)
            + far(is_wide, u64::from(self.head * self.args.ratio + head), of_head)
            + far(is_wide, u64::from(row), of_element)
    }

    /// Where feature `i` of the key head is in a field, at token `t`.
    #[inline(always)]
    fn feature(&self, is_wide: bool, field: &Field, i: u32, t: u32) -> u64 {
        field.address
            + far(is_wide, self.row + u64::from(t), field.row_stride)
            + far(is_wide, u64::from(self.head), field.head_step)
            + u64::from(i * size(field.dtype))
    }

    /// Zeros in the rows of a sequence that is skipped.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn clear<H: Held>(&self, pass: &Pass) {
        let mut i = self.gpu.thread();
        while i < pass.rows {
            let (head, row) = self.args.block_rows.divide(i);
            let mut t = 0;
            while t < self.tokens::<H>() {
                let at = self.out(H::WIDE, pass.first + head, pass.start + row, t);
                // SAFETY: the caller's promise; each element is one thread's.
                unsafe { store(self.gpu, self.args.out.dtype, at, 0.0) }
                t += 1;
            }
            i += self.gpu.threads();
        }
    }

    /// What a warp does of a pass.
    #[inline(always)]
    fn unit(&self, pass: &Pass, piece_rows: u32, warp: u32) -> Unit {
        let args = self.args;
        let (head, of_head) = args.head_warps.divide(warp);
        let (before, rows) = (of_head * args.steps * piece_rows, args.block_rows.get());
        let len =
            if head < pass.heads { rows.saturating_sub(before).min(args.steps * piece_rows) } else { 0 };
        Unit { head, start: pass.start + before, len, row: head * rows + before }
    }

    /// The warp's rows of a pass, where they are in a slot.
    #[inline(always)]
    fn aim<H: Held>(&self, pass: &Pass) -> H {
        let Self { gpu, args, room, .. } = self;
        let unit = self.unit(pass, H::PIECE, gpu.thread() / 32);
        let head = self.head * args.ratio + pass.first + unit.head;
        let landing = room.landing + gpu.thread() / 32 * H::LANDING;
        H::aim(*gpu, args, &Place { head, start: unit.start, len: unit.len, landing })
    }

    /// The sums of squares, before any is there: those that others send are empty, those behind the last
    /// piece are zeros.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn empty_sums<H: Held>(&self) {
        let Self { gpu, args, room, .. } = self;
        let pieces = args.dv.div_ceil(H::PIECE / H::PARTS);
        let first = if args.head_blocks.get() > 1 { 0 } else { pieces };
        let mut i = gpu.thread();
        while i < self.tokens::<H>() * args.pass_heads {
            let mut piece = first;
            while piece * 4 < room.head_sums {
                let at = room.sums + i * room.head_sums + piece * 4;
                // SAFETY: the caller's promise; each is one thread's.
                unsafe { gpu.store_shared4(at, if piece < pieces { EMPTY } else { 0 }) }
                piece += 1;
            }
            i += gpu.threads();
        }
    }

    /// A pass, from states to outputs.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn compute<H: Held>(&self, read: &Read, pass: &Pass, rows: &mut H, (aim, asked): (&Aim, &Asked)) {
        let Self { gpu, args, room, .. } = self;
        let gpu = *gpu;
        let (warp, warps) = (gpu.thread() / 32, gpu.threads() / 32);
        // SAFETY: the caller's promises. Shared memory is written before a barrier and read behind it.
        unsafe {
            // Everything that is read from far away is sent for before any of it is used.
            let state = args.state.address + far(H::WIDE, read.recurrent as u64, args.state.strides[0]);
            // What comes in order comes first that is needed first.
            let inputs = if H::PLAIN { self.ask_first_windows(read, aim) } else { plain::Inputs::default() };
            rows.begin(gpu, args, state, 0);
            if pass.with_qk && self.blocks > 1 {
                // The others' sums are empty, and they have begun.
                gpu.cluster_wait();
            }
            let row;
            if H::PLAIN {
                // One word is held where two would be. They come before the windows do.
                row = asked.row.packed().unforeseen(gpu);
                self.plain_inputs::<H>(read, pass, (aim, asked), inputs);
            } else {
                let windows = Windows::of(gpu, args, read, self.sequence);
                row = self.row_bits::<H>(pass);
                self.inputs::<H>(read, &windows, pass);
            }
            gpu.barrier();
            if self.blocks > 1 {
                // The block has read all its windows. One warp says so for all, the first without rows if there
                // is one: it waits a while for that.
                if warp == (args.head_warps.get() * pass.heads).min(warps - 1) {
                    gpu.cluster_arrive();
                } else {
                    gpu.cluster_arrive_relaxed();
                }
            }
            // Made again rather than held in registers.
            let unit = self.unit(pass, H::PIECE, gpu.unforeseen(u64::from(warp)) as u32);
            let (scales, q_k) = self.lengths::<H>();
            let pieces = unit.len.div_ceil(H::PIECE);
            let has_rows = self.first_row() < pass.rows * self.tokens::<H>();
            let mut last = 0;
            let mut step = 0;
            while step < pieces {
                rows.take(gpu, args, step);
                let mut next = 0;
                while next < self.tokens::<H>() {
                    // The compiler would hold every address by itself in a register, and make a loop of its
                    // own for the last token.
                    let t = if H::ONE { 0 } else { gpu.unforeseen(u64::from(next)) as u32 };
                    let gates = room.gates + (t * args.pass_heads + unit.head) * 16;
                    let Bytes16([decay, beta, low, high]) = gpu.load_shared16(gates);
                    let token = Token {
                        decay: f32::from_bits(decay),
                        beta: f32::from_bits(beta),
                        q_scale: of_lane(gpu, scales, 2 * t),
                        k_scale: of_lane(gpu, scales, 2 * t + 1),
                        q_k: of_lane(gpu, q_k, 2 * t),
                        q: room.q + t * H::PADDED * 4,
                        k: room.k + t * H::PADDED * 4,
                        v: room.v + t * room.rows_bytes + unit.row * 4,
                        o: room.o + t * room.rows_bytes + unit.row * 4,
                    };
                    let squares = rows.token(gpu, step, &token);
                    let piece = (unit.start / H::PIECE + step) * H::PARTS;
                    let at = room.sums + t * room.sums_bytes + unit.head * room.head_sums + piece * 4;
                    self.put_squares(at, squares[0]);
                    if H::PARTS > 1 {
                        self.put_squares(at + 4, squares[1]);
                    }
                    let is_last = t + 1 == self.tokens::<H>();
                    let to = u64::from(low) | u64::from(high) << 32;
                    // In a cluster nobody waits for the last piece's way to memory.
                    if self.blocks > 1 && is_last && step + 1 == pieces {
                        last = to;
                    } else {
                        rows.keep(gpu, args, step, to, !is_last);
                    }
                    next = t + 1;
                }
                step += 1;
            }
            // Warps without rows have time for what the norm begins with, and the others no registers.
            let mut ready = Ready::NONE;
            if pieces == 0 && has_rows {
                ready = self.ready::<H>(pass, row);
            }
            gpu.barrier();
            if self.blocks > 1 && pieces > 0 {
                rows.keep(gpu, args, pieces - 1, last, false);
            }
            if H::PLAIN {
                // Made again rather than held in registers.
                let by =
                    [args.cluster, args.num_k_heads].map(|by| by.unforeseen(|shift| gpu.unforeseen(shift)));
                let block = Block::new::<H>(gpu, args, gpu.block_anew(), by);
                let pass = block.first_pass();
                if pieces > 0 && has_rows {
                    ready = block.ready::<H>(&pass, row);
                }
                block.norm::<H>(&pass, ready);
                block.keep_windows::<H>(&pass);
            } else {
                if pieces > 0 && has_rows {
                    ready = self.ready::<H>(pass, row);
                }
                self.norm::<H>(pass, ready);
                self.keep_windows::<H>(pass);
            }
        }
    }

    /// The sum of the squares of a piece's outputs, to all blocks that have rows of its v head.
    ///
    /// # Safety
    /// The place is the piece's.
    #[inline(always)]
    unsafe fn put_squares(&self, at: u32, squares: f32) {
        let Self { gpu, args, .. } = self;
        let (lane, blocks) = (gpu.lane(), args.head_blocks.get());
        // Of what is not a number it does not matter which.
        let bits = if squares.to_bits() == EMPTY { f32::NAN.to_bits() } else { squares.to_bits() };
        // SAFETY: the caller's promise; all blocks of the cluster have begun, and end when they have received
        // what is sent to them.
        unsafe {
            if blocks == 1 {
                if lane == 0 {
                    gpu.store_shared4(at, bits);
                }
            } else if lane < blocks {
                let (share, _) = args.head_blocks.divide(self.rank);
                gpu.send4(at, share * blocks + lane, bits);
            }
        }
    }

    /// What brings each token's query and key to their lengths, token t's in lanes 2t and 2t + 1, and the
    /// product of both.
    ///
    /// # Safety
    /// As [`run`]; the sums of squares are in shared memory, for all to see.
    #[inline(always)]
    unsafe fn lengths<H: Held>(&self) -> (f32, f32) {
        let Self { gpu, args, room, .. } = self;
        let (t, side) = ((gpu.lane() / 2).min(self.tokens::<H>() - 1), gpu.lane() % 2);
        let sum_of = |kind: u32| {
            let at = room.squares + (t * 3 + kind) * GROUPS * 4;
            let mut sum = 0.0;
            let mut group = 0;
            while group < H::PADDED / 32 {
                // SAFETY: the caller's promise.
                sum += unsafe { shared(*gpu, at + group * 4) };
                group += 1;
            }
            sum
        };
        let scale = if side == 0 { args.scale } else { 1.0 };
        (math::l2_scale(sum_of(side), args.l2norm_eps, scale), sum_of(2))
    }
}

/// The number that lane `lane` has.
#[inline(always)]
fn of_lane(gpu: &impl Warp, value: f32, lane: u32) -> f32 {
    f32::from_bits(gpu.shuffle(value.to_bits(), lane))
}
