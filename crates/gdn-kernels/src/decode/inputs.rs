//! What the rows of S are multiplied with, in shared memory: queries, keys, values, gates. And the windows of
//! the convolution.
//!
//! A lane is two channels at a time: a query's and the key's beside it, or two of v.

use gdn_math::{layer as math, special::exp};

use super::{
    Block, Pass,
    args::{self, Args, Field, GROUPS, Vector},
    conv::{self, Channel, Convolved, TAPS, Taps, Windows},
    element::{bits, far, number, shared, size},
    rows::{Held, Machine},
    slots::Read,
};
use crate::gpu::Bytes16;

/// Two channels of a lane.
#[derive(Clone, Copy, Default)]
pub(super) struct Pair {
    pub(super) channels: [Channel; 2],
    pub(super) there: [bool; 2],
    /// Whether they are of a query and a key, else of v.
    is_qk: bool,
    /// The first one's place in the query, or among the rows of v of the pass.
    i: u32,
}

impl Pair {
    #[inline(always)]
    pub(super) fn is_qk(&self) -> bool {
        self.is_qk
    }
}

/// Rows of v that a warp's lanes are at a time.
const PAIRS: u32 = 64;

impl<G: Machine> Block<'_, G> {
    /// Pairs of channels of a pass: so many times 32 of q and k, and of q, k and v together.
    #[inline(always)]
    pub(super) fn pairs<H: Held>(&self, pass: &Pass) -> (u32, u32) {
        let of_qk = if pass.with_qk { H::PADDED / 32 } else { 0 };
        (of_qk, of_qk + pass.rows.div_ceil(PAIRS))
    }

    /// The lane's pair of channels number `n`.
    #[inline(always)]
    pub(super) fn pair<H: Held>(&self, read: &Read, pass: &Pass, n: u32, of_qk: u32) -> Pair {
        let Self { gpu, args, .. } = self;
        let Args { dk, dv, ref q, ref v, .. } = **args;
        let num_k_heads = args.num_k_heads.get();
        let dtype = if H::PLAIN { args::BF16 } else { q.dtype };
        let bytes = size(dtype);
        let is_qk = n < of_qk;
        let (i, x, channel, there, x_apart, apart);
        if is_qk {
            i = n * 32 + gpu.lane();
            x = self.feature(H::WIDE, &Field { dtype, ..args.q }, i, 0);
            channel = self.head * dk + i;
            there = [H::PLAIN || i < dk; 2];
            x_apart = args.k_behind_q;
            apart = num_k_heads * dk;
        } else {
            i = (n - of_qk) * PAIRS + gpu.lane();
            // A plain call's lanes all have two channels to read.
            let (a, b) =
                if H::PLAIN { (i.min(pass.rows - 1), (i + 32).min(pass.rows - 1)) } else { (i, i + 32) };
            let feature = pass.first * dv + pass.start + a;
            x = self.feature(H::WIDE, &Field { dtype, ..args.v }, feature, 0);
            channel = 2 * num_k_heads * dk + self.head * args.ratio * dv + feature;
            there = [i < pass.rows, i + 32 < pass.rows];
            x_apart = u64::from((b - a) * bytes);
            apart = b - a;
        }
        let stride = if is_qk { q.row_stride } else { v.row_stride };
        let first = Channel::new([H::WIDE, H::PLAIN], args, read, x, stride, dtype, channel);
        let second = Channel::new(
            [H::WIDE, H::PLAIN],
            args,
            read,
            x.wrapping_add(x_apart),
            stride,
            dtype,
            channel + apart,
        );
        Pair { channels: [first, second], there, is_qk, i }
    }

    /// q, k, v and gates, into shared memory, and the windows that nobody else reads.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    pub(super) unsafe fn inputs<H: Held>(&self, read: &Read, windows: &Windows, pass: &Pass) {
        let Self { gpu, args, .. } = self;
        let gpu = *gpu;
        let (warp, warps) = (gpu.thread() / 32, gpu.threads() / 32);
        let (of_qk, all) = self.pairs::<H>(pass);
        // SAFETY: the caller's promises; each place of shared memory is one thread's.
        unsafe {
            let gate_bits = self.first_gates::<H>(pass);
            // Where there are more warps than pairs, several share a pair: each has every so manieth token.
            let (mut n, mut first, mut apart, mut step) = (warp, 0, 1, warps);
            if all < warps {
                (apart, step) = (0, all);
                while step <= warps {
                    apart += 1;
                    step += all;
                }
                while n >= all {
                    n -= all;
                    first += 1;
                }
                if first >= apart {
                    first = args.tokens;
                }
            }
            while n < all {
                let pair = self.pair::<H>(read, pass, n, of_qk);
                let is_read = pair.there.map(|there| there && H::WIDE);
                let taps = Taps::of(gpu, args, &pair.channels, is_read);
                let mut t = first;
                while t < args.tokens {
                    self.convolve::<H>(&pair, &taps, windows, n, t);
                    t += apart;
                }
                n += step;
            }
            self.all_gates::<H>(read, pass, gate_bits);
        }
    }

    /// Two v heads' gates are one warp's: the last warps have the fewest channels.
    #[inline(always)]
    pub(super) fn gates_of_warp(&self) -> u32 {
        (self.gpu.threads() - 1 - self.gpu.thread()) / 32
    }

    /// What the warp's first gates are made of.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    pub(super) unsafe fn first_gates<H: Held>(&self, pass: &Pass) -> [u32; 4] {
        let gates = self.gates_of_warp();
        // SAFETY: the caller's promise.
        if gates < pass.heads.div_ceil(2) { unsafe { self.gate_bits::<H>(pass, gates) } } else { [0; 4] }
    }

    /// The warp's gates, of which the first ones' bits are there.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    pub(super) unsafe fn all_gates<H: Held>(&self, read: &Read, pass: &Pass, first: [u32; 4]) {
        let (mut gates, mut gate_bits) = (self.gates_of_warp(), first);
        let of_gates = pass.heads.div_ceil(2);
        while gates < of_gates {
            // SAFETY: the caller's promise.
            unsafe {
                self.put_gates::<H>(read, pass, gates, gate_bits);
                gates += self.gpu.threads() / 32;
                if gates < of_gates {
                    gate_bits = self.gate_bits::<H>(pass, gates);
                }
            }
        }
    }

    /// The convolution of a pair of channels at a token.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    unsafe fn convolve<H: Held>(&self, pair: &Pair, taps: &Taps, windows: &Windows, n: u32, t: u32) {
        let Self { gpu, args, .. } = self;
        let gpu = *gpu;
        let Pair { channels, there, is_qk, .. } = *pair;
        // Of q and k the cluster's first block keeps the windows.
        let each = if is_qk && self.rank > 0 { 0 } else { windows.each };
        // SAFETY: the caller's promises; each place of shared memory is one thread's.
        unsafe {
            let mut two = [Convolved::default(); 2];
            if H::WIDE {
                two = Convolved::two(gpu, args, (&channels, taps), there, t);
            }
            let mut m = 0;
            while m < 2 {
                if there[m] && !H::WIDE {
                    two[m].result = channels[m].any(gpu, args, t);
                }
                if there[m] && each != 0 {
                    let at = each + far(H::WIDE, u64::from(t), args.conv_kept.to.strides[1]);
                    if H::WIDE {
                        channels[m].put_window(gpu, false, args, at, two[m].window());
                    } else {
                        channels[m].put_inputs(gpu, args, at, t + 1);
                    }
                }
                m += 1;
            }
            let c = [0, 1].map(|m| if there[m] { two[m].result } else { 0.0 });
            self.put_channels::<H>(pair, n, t, c);
            if H::WIDE && t + 1 == args.tokens && !self.rolls::<H>() {
                self.put_last::<H>(pair, windows, two.map(|one| one.window()));
            }
        }
    }

    /// What a pair's convolution came to at a token.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    pub(super) unsafe fn put_channels<H: Held>(&self, pair: &Pair, n: u32, t: u32, c: [f32; 2]) {
        let Self { gpu, room, .. } = self;
        let Pair { there, is_qk, i, .. } = *pair;
        // SAFETY: the caller's promises; each place of shared memory is one thread's.
        unsafe {
            if is_qk {
                self.put_query_and_key::<H>(i, t, c);
                // Of the squares of queries and keys each half of the warp adds up one.
                let is_low = gpu.lane() < 16;
                let squares = [c[0] * c[0], c[1] * c[1]];
                let (mine, theirs) = if is_low { (squares[0], squares[1]) } else { (squares[1], squares[0]) };
                let half = mine + f32::from_bits(gpu.shuffle_xor(theirs.to_bits(), 16));
                let (sum, product) = (gpu.sum::<16>(half), gpu.sum::<32>(c[0] * c[1]));
                let at = room.squares + (t * 3 * GROUPS + n) * 4;
                if gpu.lane() % 16 == 0 {
                    gpu.store_shared4(at + if is_low { 0 } else { GROUPS * 4 }, sum.to_bits());
                }
                if gpu.lane() == 0 {
                    gpu.store_shared4(at + 2 * GROUPS * 4, product.to_bits());
                }
            } else {
                let at = room.v + t * room.rows_bytes + i * 4;
                if there[0] {
                    gpu.store_shared4(at, c[0].to_bits());
                }
                if there[1] {
                    gpu.store_shared4(at + 128, c[1].to_bits());
                }
            }
        }
    }

    /// A pair's windows after the last token, which do not roll: where they go, or where they wait.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    pub(super) unsafe fn put_last<H: Held>(
        &self,
        pair: &Pair,
        windows: &Windows,
        values: [[f32; TAPS - 1]; 2],
    ) {
        let Self { gpu, args, room, .. } = self;
        let later = self.window::<H>(pair);
        let mut m = 0;
        while m < 2 {
            // SAFETY: the caller's promises; each place of shared memory is one thread's.
            unsafe {
                if pair.there[m] && self.keeps_later::<H>() {
                    let mut column = 0;
                    while column < TAPS as u32 - 1 {
                        let at = later[m] + column * room.column_bytes;
                        gpu.store_shared4(at, values[m][column as usize].to_bits());
                        column += 1;
                    }
                } else if pair.there[m] && windows.last != 0 {
                    pair.channels[m].put_window(*gpu, H::PLAIN, args, windows.last, values[m]);
                }
            }
            m += 1;
        }
    }

    /// Whether windows wait in shared memory: others may still read them where they are, and in a cluster
    /// what is stored would be waited for.
    #[inline(always)]
    pub(super) fn keeps_later<H: Held>(&self) -> bool {
        self.blocks > 1 || self.tokens::<H>() > 1
    }

    /// Number `i` of a token's query and key, as the convolution left them.
    ///
    /// # Safety
    /// The places in shared memory are the lane's.
    #[inline(always)]
    unsafe fn put_query_and_key<H: Held>(&self, i: u32, t: u32, [q, k]: [f32; 2]) {
        let Self { gpu, room, .. } = self;
        let line = room.q + t * H::PADDED * 4;
        // SAFETY: the caller's promise.
        unsafe {
            gpu.store_shared4(room.k + (t * H::PADDED + i) * 4, k.to_bits());
            gpu.store_shared4(line + i * 4, q.to_bits());
        }
    }

    /// See [`conv::rolls`].
    #[inline(always)]
    fn rolls<H: Held>(&self) -> bool {
        !H::PLAIN && conv::rolls(self.args)
    }

    /// Where a pair's windows wait in shared memory.
    #[inline(always)]
    fn window<H: Held>(&self, pair: &Pair) -> [u32; 2] {
        let first = self.room.windows + (pair.i + if pair.is_qk { 0 } else { 2 * H::PADDED }) * 4;
        [first, first + if pair.is_qk { H::PADDED } else { 32 } * 4]
    }

    /// The windows after the last token that are not kept yet: those that roll, those of the narrow kernels,
    /// and those that wait in shared memory.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    pub(super) unsafe fn keep_windows<H: Held>(&self, pass: &Pass) {
        let Self { gpu, args, room, .. } = self;
        let gpu = *gpu;
        if self.blocks > 1 {
            // All blocks of the cluster have read their windows.
            gpu.cluster_wait();
        }
        let rolls = !H::WIDE || self.rolls::<H>();
        if args.conv_kept.kind == args::NOTHING || !rolls && !self.keeps_later::<H>() {
            return;
        }
        // SAFETY: the caller's promises.
        unsafe {
            let (read, windows);
            if H::PLAIN {
                read = Read::default();
                let Bytes16([low, high, ..]) = gpu.load_shared16(room.last);
                windows = Windows { last: u64::from(low) | u64::from(high) << 32, each: 0 };
            } else {
                // What was read for this at first was not kept: it is seldom needed.
                let Some(again) = Read::of(gpu, args, self.sequence) else { return };
                read = again;
                windows = Windows::of(gpu, args, &read, self.sequence);
            }
            let (of_qk, all) = self.pairs::<H>(pass);
            let mut n = gpu.thread() / 32;
            while windows.last != 0 && n < all {
                // Of q and k the first block keeps them.
                if self.rank > 0 && n < of_qk {
                    n += gpu.threads() / 32;
                    continue;
                }
                let pair = self.pair::<H>(&read, pass, n, of_qk);
                let later = self.window::<H>(&pair);
                let mut m = 0;
                while m < 2 {
                    let channel = &pair.channels[m];
                    if pair.there[m] && rolls {
                        channel.keep_last(gpu, args, &read, &windows);
                    } else if pair.there[m] {
                        let column = |column: u32| shared(gpu, later[m] + column * room.column_bytes);
                        channel.put_window(
                            gpu,
                            H::PLAIN,
                            args,
                            windows.last,
                            [column(0), column(1), column(2)],
                        );
                    }
                    m += 1;
                }
                n += gpu.threads() / 32;
            }
        }
    }

    /// Of v heads `2 * n` and `2 * n + 1` of a pass, in the lane of a head and token: both, and whether they
    /// are there.
    #[inline(always)]
    fn head_and_token<H: Held>(&self, pass: &Pass, n: u32) -> (u32, u32, bool) {
        let (head, t) = (2 * n + self.gpu.lane() / 16, self.gpu.lane() % 16);
        (head, t, head < pass.heads && t < self.tokens::<H>())
    }

    /// Where that is what decay and beta of two v heads are made of, and whether it is there.
    #[inline(always)]
    pub(super) fn gates_at<H: Held>(&self, pass: &Pass, n: u32) -> ([u64; 4], bool) {
        let args = self.args;
        let (head, t, there) = self.head_and_token::<H>(pass, n);
        let v_head = self.head * args.ratio + pass.first + head;
        let gate = |field: &Field| self.feature(H::WIDE, field, pass.first + head, t);
        let of_head = |vector: &Vector| vector.address + far(H::WIDE, u64::from(v_head), vector.stride);
        ([gate(&args.a), gate(&args.b), of_head(&args.A_log), of_head(&args.dt_bias)], there)
    }

    /// Reads it.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    pub(super) unsafe fn read_gates(&self, at: [u64; 4], there: bool) -> [u32; 4] {
        let Self { gpu, args, .. } = self;
        let dtypes = [args.a.dtype, args.b.dtype, args.A_log.dtype, args.dt_bias.dtype];
        let mut bits = [0; 4];
        let mut i = 0;
        while there && i < 4 {
            // SAFETY: the caller's promise.
            bits[i] = unsafe { self::bits(*gpu, dtypes[i], at[i]) };
            i += 1;
        }
        bits
    }

    /// What decay and beta of two v heads are made of.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    unsafe fn gate_bits<H: Held>(&self, pass: &Pass, n: u32) -> [u32; 4] {
        let (at, there) = self.gates_at::<H>(pass, n);
        // SAFETY: the caller's promise.
        unsafe { self.read_gates(at, there) }
    }

    /// Decay and beta of two v heads, and where their states go, into shared memory.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    unsafe fn put_gates<H: Held>(&self, read: &Read, pass: &Pass, n: u32, [a, b, a_log, dt_bias]: [u32; 4]) {
        let Self { gpu, args, room, .. } = self;
        let gpu = *gpu;
        let (head, t, there) = self.head_and_token::<H>(pass, n);
        let (a, b) = (number(gpu, args.a.dtype, a), number(gpu, args.b.dtype, b));
        let (a_log, dt_bias) =
            (number(gpu, args.A_log.dtype, a_log), number(gpu, args.dt_bias.dtype, dt_bias));
        let decay = exp(math::log_decay(a, a_log, dt_bias));
        let beta = math::beta(b, args.beta_scale);
        if there {
            // SAFETY: the caller's promise; the place is the lane's.
            unsafe {
                let to = args.kept.address(gpu, H::PLAIN, args, self.sequence, read.recurrent, t);
                let words = [decay.to_bits(), beta.to_bits(), to as u32, (to >> 32) as u32];
                gpu.store_shared16(room.gates + (t * args.pass_heads + head) * 16, Bytes16(words));
            }
        }
    }
}
