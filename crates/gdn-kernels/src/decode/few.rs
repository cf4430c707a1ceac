//! Calls of few blocks: plain ones of one token, with heads of [`HEAD`] numbers and one v head, or some of its rows, a
//! block of a cluster. Where there are so few blocks a call takes as long as one block's chain of instructions, so there
//! is hardly a loop and hardly a branch here: a warp has one pair of channels at most, and a thread one row of the norm.
//!
//! The last warps have the channels, the first one the gates, the first ones the rows of S, and the last ones the norm.
//! So the warps of the norm, which have few rows of S or none, know their gate before the outputs come.
//!
//! Results have the bits of the other kernels. The window of the convolution is no race for the reason that `mod.rs` gives:
//! the first block of a cluster writes it behind the cluster's second barrier, at which each block arrives when it has read it.
//! Each barrier is reached at one place of the code.

use gdn_math::{Lanes, Straight, element::f32_of_bf16, layer as math, special::exp};

use super::{
    Block, Pass,
    args::{Args, Field, GROUPS, Vector},
    conv::{TAPS, Windows},
    element::{far, number, shared, store_bf16},
    inputs::Pair,
    norm::{add_four, added_up},
    plain::Inputs,
    rows::{BULK, Held, Machine, Place, Token, bulk_landing},
    slots::Read,
};
use crate::gpu::{Bytes16, EMPTY};

/// DK and DV.
pub const HEAD: u32 = 128;

/// Warps of a block, and those of them that have rows of S, each as many.
pub const WARPS: u32 = 6;
/// See [`WARPS`].
pub const ROW_WARPS: u32 = 4;

/// Pairs of channels of a query and a key.
const QK_PAIRS: u32 = HEAD / 32;

/// Sums of squares of a v head: of 8 rows each.
const SUMS: u32 = HEAD / 8;

/// Whether a layer's numbers are such as the quotients and roots here are right for ([`Straight`]): all that there is.
#[inline(always)]
pub fn takes(l2norm_eps: f32, norm_eps: f32, scale: f32) -> bool {
    let is_usual = |eps: f32| (1e-30..1.0).contains(&eps);
    is_usual(l2norm_eps) && is_usual(norm_eps) && (1e-9..1e9).contains(&scale)
}

/// Rows of S of a block that are asked to come near before the kernel before is done. More of them hold up what else is asked
/// for, where that kernel lets nobody start early.
const NEAR: u32 = 64;

/// The barrier between the rows of S and the norm, for the warps that have one of them.
const OUTPUTS: u32 = 1;

/// Where that is what a lane begins with. A lane without channels or without a row of the norm has another one's: what
/// it asks for does no harm, and there is no branch.
struct Aim {
    /// As if its windows were those of slot 0.
    pair: Pair,
    gates: [u64; 4],
    row: [u64; 2],
}

/// Which of a block's warps this is.
struct Role {
    /// The number of its pair of channels.
    pair: u32,
    has_pair: bool,
    /// The first has the gates; the last one has the least to do before the first barrier.
    has_gates: bool,
    has_least: bool,
    has_rows: bool,
    has_norm: bool,
    /// Threads that have rows of S or of the norm.
    at_outputs: u32,
}

/// What a row of the norm is multiplied with.
struct Factors {
    weight: f32,
    gate: f32,
}

/// The kernel: `H` holds the rows of the state, of which each warp that has some has so many pieces, one after the other. Where
/// these come by bulk copies, so many are sent for at first, and the others when the inputs of the convolution are there.
///
/// # Safety
/// As [`super::run`], with more than one block a cluster, of [`WARPS`] warps each, and one v head a block, or some of its
/// rows: as many as its warps have; DK and DV are [`HEAD`], and of the layer's numbers [`takes`] says yes.
#[inline(always)]
pub unsafe fn run<H: Held, const PIECES: u32, const FIRST: u32>(gpu: &impl Machine, args: &Args) {
    gpu.let_next_start();
    let [number, ..] = gpu.block();
    let block = Block::new::<H>(gpu, args, number, [args.cluster, args.num_k_heads]);
    // SAFETY: the caller's promises.
    unsafe {
        // Which slot it will be the kernel before may still change: this is for hints.
        let first = Read::peek(gpu, args, block.sequence);
        let pass = block.pass_few(ROW_WARPS * PIECES * H::PIECE);
        let role = block.role(&pass);
        if role.has_least {
            // The sums of squares that others send are empty. Behind the wait for this they are, and the others have begun.
            if gpu.lane() < SUMS {
                gpu.store_shared4(block.room.sums + gpu.lane() * 4, EMPTY);
            }
            gpu.cluster_arrive();
        } else {
            gpu.cluster_arrive_relaxed();
        }
        let place = block.place_few::<H, PIECES>(&pass);
        if H::KIND == BULK && role.has_rows {
            H::ready::<PIECES>(gpu, &place);
        }
        let mut rows = H::aim(gpu, args, &place);
        let aim = block.aim_few::<H>(&pass, &role);
        block.bring_few_near(&rows, &aim, first, (NEAR / (ROW_WARPS * H::PIECE)).min(PIECES));
        gpu.wait_for_previous();
        // All that is read is asked for before any of it is used, and what is needed first comes first.
        let index = Read::ask(gpu, args, block.sequence);
        let channels = aim.pair.channels;
        let taps = channels.map(|channel| gpu.load8(channel.taps_at(args)));
        let x = channels.map(|channel| gpu.load2(channel.x_at(0)));
        let gates = block.read_gates(aim.gates, true);
        let row = aim.row.map(|at| gpu.load2(at));
        let Some(read) = Read::by(args, index) else {
            gpu.cluster_wait();
            block.clear::<H>(&pass);
            return;
        };
        let windows = block.ask_windows(&aim.pair, far(true, read.conv as u64, args.conv_state.strides[0]));
        rows.begin(
            gpu,
            args,
            args.state.address + far(true, read.recurrent as u64, args.state.strides[0]),
            FIRST,
        );
        // The others' sums are empty, and they have begun.
        gpu.cluster_wait();
        let (c, kept) = convolved(x, taps, windows);
        let kept = kept.map(|[low, high]| gpu.bf16_pair(low, high));
        if role.has_pair {
            block.put_channels::<H>(&aim.pair, role.pair, 0, c);
        }
        if role.has_gates {
            block.put_few_gates(&read, gates);
        }
        rows.begin_rest(gpu, FIRST);
        gpu.barrier();
        // The block has read all its windows. One warp says so for all, and waits a while for that: the first without rows of S.
        if gpu.thread() / 32 == ROW_WARPS {
            gpu.cluster_arrive();
        } else {
            gpu.cluster_arrive_relaxed();
        }
        let mut factors = Factors { weight: 0.0, gate: 0.0 };
        let mut to = 0;
        if role.has_rows {
            to = block.compute_rows::<H, PIECES>(&place, &mut rows);
        } else {
            factors = block.factors(row);
        }
        if role.has_norm {
            gpu.barrier_of(OUTPUTS, role.at_outputs);
        } else if role.has_rows {
            gpu.barrier_arrive(OUTPUTS, role.at_outputs);
        }
        if role.has_rows {
            rows.keep(gpu, args, PIECES - 1, to, false);
        }
        if role.has_norm {
            if role.has_rows {
                factors = block.factors(row);
            }
            block.norm_row(&pass, &factors);
        }
        // All blocks of the cluster have read their windows.
        gpu.cluster_wait();
        if role.has_pair {
            block.put_few_windows(&aim.pair, kept);
        }
    }
}

/// The convolution of two channels, and their windows after the token, column by column.
#[inline(always)]
fn convolved(x: [u16; 2], taps: [u64; 2], windows: Inputs) -> ([f32; 2], [[f32; 2]; TAPS - 1]) {
    let mut c = [0.0; 2];
    let mut kept = [[0.0; 2]; TAPS - 1];
    let mut m = 0;
    while m < 2 {
        let tap = |i: usize| f32_of_bf16((taps[m] >> (i * 16)) as u16);
        let inputs = windows[m].map(|bits| f32_of_bf16(bits as u16));
        let now = f32_of_bf16(x[m]);
        let mut sum = 0.0;
        let mut i = 0;
        while i < TAPS - 1 {
            sum = Lanes::mul_add(inputs[i], tap(i), sum);
            i += 1;
        }
        let Straight(result) = math::activation(Straight(Lanes::mul_add(now, tap(TAPS - 1), sum)));
        c[m] = result;
        (kept[0][m], kept[1][m], kept[2][m]) = (inputs[1], inputs[2], now);
        m += 1;
    }
    (c, kept)
}

impl<G: Machine> Block<'_, G> {
    /// What the block does: so many rows of a v head.
    #[inline(always)]
    fn pass_few(&self, rows: u32) -> Pass {
        let (first, part) = self.args.head_blocks.divide(self.rank);
        Pass { first, heads: 1, start: part * rows, rows, with_qk: true }
    }

    /// The warp's rows of S, if it has some.
    #[inline(always)]
    fn place_few<H: Held, const PIECES: u32>(&self, pass: &Pass) -> Place {
        let warp = self.gpu.thread() / 32;
        let rows = PIECES * H::PIECE;
        let landing = if H::KIND == BULK { bulk_landing(PIECES, H::PIECE_BYTES) } else { H::LANDING };
        Place {
            head: self.head * self.args.ratio + pass.first,
            start: pass.start + warp * rows,
            len: if warp < ROW_WARPS { rows } else { 0 },
            landing: self.room.landing + warp * landing,
        }
    }

    /// What this warp has.
    #[inline(always)]
    fn role(&self, pass: &Pass) -> Role {
        let warp = self.gpu.thread() / 32;
        let pairs = QK_PAIRS + pass.rows.div_ceil(64);
        let of_norm = pass.rows / 32;
        let has_pair = warp + pairs >= WARPS;
        Role {
            pair: if has_pair { warp + pairs - WARPS } else { 0 },
            has_pair,
            has_gates: warp == 0,
            has_least: warp + 1 == WARPS,
            has_rows: warp < ROW_WARPS,
            has_norm: warp + of_norm >= WARPS,
            at_outputs: (ROW_WARPS + of_norm).min(WARPS) * 32,
        }
    }

    /// Works out where the lane's inputs are. Nothing is touched.
    #[inline(always)]
    fn aim_few<H: Held>(&self, pass: &Pass, role: &Role) -> Aim {
        let args = self.args;
        let gate = |field: &Field| self.feature(true, field, pass.first, 0);
        let v_head = u64::from(self.head * args.ratio + pass.first);
        let of_head = |vector: &Vector| vector.address + far(true, v_head, vector.stride);
        Aim {
            pair: self.pair::<H>(&Read::default(), pass, role.pair, QK_PAIRS),
            gates: [gate(&args.a), gate(&args.b), of_head(&args.A_log), of_head(&args.dt_bias)],
            row: self.row_at::<H>(pass, self.first_row().min(pass.rows - 1), 0),
        }
    }

    /// Asks that what the lane begins with come near, before the kernel before this one is done. A hint: what
    /// that one writes is seen all the same.
    #[inline(always)]
    fn bring_few_near<H: Held>(&self, rows: &H, aim: &Aim, first: i64, pieces: u32) {
        let Self { gpu, args, .. } = self;
        let gpu = *gpu;
        for channel in aim.pair.channels {
            gpu.bring_near(channel.x_at(0));
            gpu.bring_near(channel.taps_at(args));
        }
        aim.gates.into_iter().chain(aim.row).for_each(|at| gpu.bring_near(at));
        if let Some(read) = Read::by(args, first) {
            let state = args.state.address + far(true, read.recurrent as u64, args.state.strides[0]);
            rows.bring_near(gpu, state, pieces);
            let slot = far(true, read.conv as u64, args.conv_state.strides[0]);
            for channel in aim.pair.channels {
                gpu.bring_near(channel.window + slot);
            }
        }
    }

    /// Decay and beta of the v head, and where its state and the windows go, into shared memory.
    ///
    /// # Safety
    /// As [`run`]; the warp alone comes here.
    #[inline(always)]
    unsafe fn put_few_gates(&self, read: &Read, [a, b, a_log, dt_bias]: [u32; 4]) {
        let Self { gpu, args, room, sequence, .. } = self;
        let gpu = *gpu;
        let of = |bits: u32, dtype: u32| Straight(number(gpu, dtype, bits));
        let (a, b) = (of(a, args.a.dtype), of(b, args.b.dtype));
        let (a_log, dt_bias) = (of(a_log, args.A_log.dtype), of(dt_bias, args.dt_bias.dtype));
        let Straight(decay) = exp(math::log_decay(a, a_log, dt_bias));
        let Straight(beta) = math::beta(b, Straight(args.beta_scale));
        // SAFETY: the caller's promises; each place is one lane's.
        unsafe {
            let to = args.kept.address(gpu, true, args, *sequence, read.recurrent, 0);
            let Windows { last, .. } = Windows::plain(gpu, args, read, *sequence);
            if gpu.lane() == 0 {
                let words = [decay.to_bits(), beta.to_bits(), to as u32, (to >> 32) as u32];
                gpu.store_shared16(room.gates, Bytes16(words));
                gpu.store_shared16(room.last, Bytes16([last as u32, (last >> 32) as u32, 0, 0]));
            }
        }
    }

    /// The warp's rows of S: outputs to shared memory, sums of their squares to all that need them, and states to memory but
    /// for the last piece. Where that goes.
    ///
    /// # Safety
    /// As [`run`]; what the rows are multiplied with is in shared memory, for all to see.
    #[inline(always)]
    unsafe fn compute_rows<H: Held, const PIECES: u32>(&self, place: &Place, rows: &mut H) -> u64 {
        let Self { gpu, args, room, .. } = self;
        let gpu = *gpu;
        // SAFETY: the caller's promises.
        unsafe {
            let sum = |kind: u32| {
                let Bytes16(groups) = gpu.load_shared16(room.squares + kind * GROUPS * 4);
                groups.into_iter().fold(0.0, |sum, group| sum + f32::from_bits(group))
            };
            let [of_q, of_k, q_k] = [sum(0), sum(1), sum(2)];
            let Bytes16([decay, beta, low, high]) = gpu.load_shared16(room.gates);
            let scale = |sum: f32, scale: f32| {
                math::l2_scale(Straight(sum), Straight(args.l2norm_eps), Straight(scale)).0
            };
            let row = gpu.thread() / 32 * PIECES * H::PIECE;
            let token = Token {
                decay: f32::from_bits(decay),
                beta: f32::from_bits(beta),
                q_scale: scale(of_q, args.scale),
                k_scale: scale(of_k, 1.0),
                q_k,
                q: room.q,
                k: room.k,
                v: room.v + row * 4,
                o: room.o + row * 4,
            };
            let to = u64::from(low) | u64::from(high) << 32;
            let mut step = 0;
            while step < PIECES {
                rows.take(gpu, args, step);
                let squares = rows.token(gpu, step, &token);
                let at = room.sums + (place.start / H::PIECE + step) * H::PARTS * 4;
                self.put_squares(at, squares[0]);
                if H::PARTS > 1 {
                    self.put_squares(at + 4, squares[1]);
                }
                if step + 1 < PIECES {
                    rows.keep(gpu, args, step, to, false);
                }
                step += 1;
            }
            to
        }
    }

    /// What the thread's row of the norm is multiplied with, out of the bits of the norm's weight and of z.
    #[inline(always)]
    fn factors(&self, [weight, z]: [u16; 2]) -> Factors {
        let Straight(gate) = math::gate_factor(Straight(f32_of_bf16(z)), self.gate());
        Factors { weight: f32_of_bf16(weight), gate }
    }

    /// The thread's row of the norm.
    ///
    /// # Safety
    /// As [`run`]; the output is in shared memory, for all to see, and sums of squares are or come.
    #[inline(always)]
    unsafe fn norm_row(&self, pass: &Pass, factors: &Factors) {
        let Self { gpu, args, room, .. } = self;
        let row = self.first_row();
        let to = self.out(true, pass.first, pass.start + row, 0);
        // SAFETY: the caller's promises; each element is one thread's.
        unsafe {
            let o = shared(*gpu, room.o + row * 4);
            let fours = gpu.receive64(room.sums);
            let mut sums = [0.0; 4];
            for four in fours {
                add_four(&mut sums, four);
            }
            let sum = Straight(added_up(sums));
            // A quotient by a power of two is a product.
            let mean = sum.times(Straight(1.0 / HEAD as f32));
            let Straight(scale) = math::rms_scale(mean, Straight(1.0), Straight(args.norm_eps));
            store_bf16(*gpu, to, math::gated_by(o, scale, factors.weight, factors.gate));
        }
    }

    /// Keeps a pair's windows, of which each word is a column.
    ///
    /// # Safety
    /// As [`run`]; all blocks of the cluster have read them.
    #[inline(always)]
    unsafe fn put_few_windows(&self, pair: &Pair, kept: [u32; TAPS - 1]) {
        let Self { gpu, args, room, .. } = self;
        // SAFETY: the caller's promises; of q and k the first block keeps the windows.
        unsafe {
            let Bytes16([low, high, ..]) = gpu.load_shared16(room.last);
            let last = u64::from(low) | u64::from(high) << 32;
            if last == 0 || pair.is_qk() && self.rank > 0 {
                return;
            }
            let [.., of_channel, of_column] = args.conv_kept.to.strides;
            let mut m = 0;
            while m < 2 {
                let at = last + far(true, pair.channels[m].channel, of_channel);
                let mut i = 0;
                while pair.there[m] && i < TAPS - 1 {
                    gpu.store2(at + far(true, i as u64, of_column), (kept[i] >> (16 * m)) as u16);
                    i += 1;
                }
                m += 1;
            }
        }
    }
}
