//! The inputs of plain calls. What a lane needs it asks for all at once: addresses are worked out before the
//! kernel waits for the one before it, and nothing is used before the last of it was asked for.

use gdn_math::{Lanes, element::f32_of_bf16, layer as math};

use super::{
    Block, Pass,
    args::{self, Args},
    conv::{Channel, TAPS, Windows},
    element::far,
    inputs::Pair,
    norm::RowBits,
    rows::{Held, Machine},
    slots::Read,
};
use crate::gpu::Bytes16;

/// Where that is what a lane begins with.
#[derive(Clone, Copy, Default)]
pub(super) struct Aim {
    /// The pair of channels, as if its windows were those of slot 0.
    pair: Pair,
    has_pair: bool,
    gates: ([u64; 4], bool),
    row: ([u64; 2], bool),
}

/// Bits of it, on their way.
#[derive(Clone, Copy, Default)]
pub(super) struct Asked {
    channels: Bits,
    gates: [u32; 4],
    pub(super) row: RowBits,
}

/// Tokens whose inputs are asked for at once.
const AHEAD: usize = 4;

/// The inputs of two channels at so many tokens.
type Ahead = [[u32; AHEAD]; 2];

/// Bits of two channels: the taps, and the inputs at the first tokens.
#[derive(Clone, Copy, Default)]
struct Bits {
    taps: [u64; 2],
    x: Ahead,
}

/// No slot: those that are there have numbers of 31 bits.
const NO_SLOT: u32 = u32::MAX;

/// The last inputs before a token.
pub(super) type Inputs = [[u32; TAPS - 1]; 2];

impl Channel {
    #[inline(always)]
    pub(super) fn x_at(&self, t: u32) -> u64 {
        self.x + far(true, u64::from(t), self.row_stride)
    }

    #[inline(always)]
    pub(super) fn taps_at(&self, args: &Args) -> u64 {
        args.conv_weight.address + far(true, self.channel, args.conv_weight.strides[0])
    }
}

impl<G: Machine> Block<'_, G> {
    /// Works out where the lane's inputs are. Nothing is touched.
    #[inline(always)]
    pub(super) fn aim_inputs<H: Held>(&self, pass: &Pass) -> Aim {
        let (of_qk, all) = self.pairs::<H>(pass);
        let n = self.gpu.thread() / 32;
        let gates = self.gates_of_warp();
        let (at, there) = self.gates_at::<H>(pass, gates);
        Aim {
            pair: self.pair::<H>(&Read::default(), pass, n, of_qk),
            has_pair: n < all,
            gates: (at, there && gates < pass.heads.div_ceil(2)),
            row: self.first_row_at::<H>(pass),
        }
    }

    /// Asks that what the lane begins with come near, before the kernel before this one is done. A hint: what
    /// that one writes is seen all the same.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    pub(super) unsafe fn bring_near<H: Held>(&self, rows: &H, aim: &Aim) {
        let Self { gpu, args, .. } = self;
        let gpu = *gpu;
        // SAFETY: the caller's promises. Which slot it will be the kernel before may still change.
        let slot = Read::by(args, unsafe { Read::peek(gpu, args, self.sequence) });
        if aim.has_pair {
            for channel in aim.pair.channels {
                gpu.bring_near(channel.x_at(0));
                gpu.bring_near(channel.taps_at(args));
            }
        }
        let (at, there) = aim.gates;
        if there {
            at.into_iter().for_each(|at| gpu.bring_near(at));
        }
        let (at, there) = aim.row;
        if there {
            at.into_iter().for_each(|at| gpu.bring_near(at));
        }
        if let Some(read) = slot {
            rows.bring_near(
                gpu,
                args.state.address + far(true, read.recurrent as u64, args.state.strides[0]),
                0,
            );
            let slot = far(true, read.conv as u64, args.conv_state.strides[0]);
            if aim.has_pair {
                for channel in aim.pair.channels {
                    gpu.bring_near(channel.window + slot);
                }
            }
        }
    }

    /// Asks for all that does not depend on the slot.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    pub(super) unsafe fn ask<H: Held>(&self, aim: &Aim) -> Asked {
        let mut asked = Asked::default();
        // SAFETY: the caller's promises.
        unsafe {
            if aim.has_pair {
                asked.channels = self.ask_channels::<H>(&aim.pair);
            }
            let (at, there) = aim.gates;
            asked.gates = self.read_gates(at, there);
            let (at, there) = aim.row;
            if there {
                asked.row = self.read_row::<H>(at);
            }
        }
        asked
    }

    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    unsafe fn ask_channels<H: Held>(&self, pair: &Pair) -> Bits {
        let Self { gpu, args, .. } = self;
        // SAFETY: the caller's promises: a lane without channels of its own reads another one's.
        unsafe {
            let taps = pair.channels.map(|channel| gpu.load8(channel.taps_at(args)));
            let mut x = Ahead::default();
            let mut t = 0;
            while t < if H::ONE { 1 } else { AHEAD } {
                let [a, b] = self.ask_token::<H>(pair, t as u32);
                (x[0][t], x[1][t]) = (a, b);
                t += 1;
            }
            Bits { taps, x }
        }
    }

    /// The inputs at a token, if it is there.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    unsafe fn ask_token<H: Held>(&self, pair: &Pair, t: u32) -> [u32; 2] {
        if t >= self.tokens::<H>() {
            return [0; 2];
        }
        // SAFETY: the caller's promises, and as above.
        pair.channels.map(|channel| u32::from(unsafe { self.gpu.load2(channel.x_at(t)) }))
    }

    /// The windows in the slot.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    pub(super) unsafe fn ask_windows(&self, pair: &Pair, slot: u64) -> Inputs {
        let of_column = self.args.conv_state.strides[2];
        pair.channels.map(|channel| {
            let mut inputs = [0; TAPS - 1];
            let mut i = 0;
            while i < TAPS - 1 {
                let at = channel.window + slot + far(true, i as u64, of_column);
                // SAFETY: the caller's promise, and as above.
                inputs[i] = u32::from(unsafe { self.gpu.load2(at) });
                i += 1;
            }
            inputs
        })
    }

    /// Asks for the windows of the lane's first pair, now that the slot is known.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    pub(super) unsafe fn ask_first_windows(&self, read: &Read, aim: &Aim) -> Inputs {
        let slot = far(true, read.conv as u64, self.args.conv_state.strides[0]);
        // SAFETY: the caller's promise.
        if aim.has_pair { unsafe { self.ask_windows(&aim.pair, slot) } } else { Inputs::default() }
    }

    /// q, k, v and gates, into shared memory, and the windows that nobody else reads.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    pub(super) unsafe fn plain_inputs<H: Held>(
        &self,
        read: &Read,
        pass: &Pass,
        (aim, asked): (&Aim, &Asked),
        mut inputs: Inputs,
    ) {
        let Self { gpu, args, room, .. } = self;
        let gpu = *gpu;
        let warps = gpu.threads() / 32;
        let (of_qk, all) = self.pairs::<H>(pass);
        let slot = far(true, read.conv as u64, args.conv_state.strides[0]);
        // SAFETY: the caller's promises; each place of shared memory is one thread's.
        unsafe {
            let (mut n, mut pair, mut bits) = (gpu.thread() / 32, aim.pair, asked.channels);
            let mut windows = Windows { last: 0, each: 0 };
            // The slot for the windows after each token: one word of its number is held.
            let mut each = NO_SLOT;
            if !self.keeps_later::<H>() {
                windows = Windows::plain(gpu, args, read, self.sequence);
            } else {
                if self.gates_of_warp() == 0 {
                    let Windows { last, .. } = Windows::plain(gpu, args, read, self.sequence);
                    if gpu.lane() == 0 {
                        gpu.store_shared16(room.last, Bytes16([last as u32, (last >> 32) as u32, 0, 0]));
                    }
                }
                if !H::ONE && args.conv_kept.kind == args::EACH_IN {
                    each = args.conv_kept.slot(gpu, true, args, self.sequence, read.conv, 0) as u32;
                }
            }
            let begun = |n| {
                let pair = self.pair::<H>(&Read::default(), pass, n, of_qk);
                (pair, self.ask_channels::<H>(&pair), self.ask_windows(&pair, slot))
            };
            while n < all {
                let next = n + warps;
                let mut rest = (pair, bits, inputs);
                // It is on its way meanwhile, where there are registers for it.
                if H::ONE && next < all {
                    rest = begun(next);
                }
                self.convolve_plain::<H>(&pair, (bits, inputs), (&windows, each), n);
                if !H::ONE && next < all {
                    rest = begun(next);
                }
                n = next;
                (pair, bits, inputs) = rest;
            }
            self.all_gates::<H>(read, pass, asked.gates);
        }
    }

    /// The convolution of a pair of channels, token after token.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    unsafe fn convolve_plain<H: Held>(
        &self,
        pair: &Pair,
        (bits, inputs): (Bits, Inputs),
        (windows, each): (&Windows, u32),
        n: u32,
    ) {
        let Self { gpu, args, .. } = self;
        let gpu = *gpu;
        let taps = bits.taps.map(|taps| [0, 16, 32, 48].map(|place| f32_of_bf16((taps >> place) as u16)));
        let mut inputs = inputs.map(|inputs| inputs.map(|bits| f32_of_bf16(bits as u16)));
        // Of q and k the cluster's first block keeps the windows.
        let is_kept = each != NO_SLOT && !(pair.is_qk() && self.rank > 0);
        let mut x = bits.x;
        let mut t = 0;
        while t < self.tokens::<H>() {
            let now = x.map(|x| f32_of_bf16(x[0] as u16));
            // SAFETY: the caller's promises.
            unsafe {
                if !H::ONE {
                    let later = self.ask_token::<H>(pair, t + AHEAD as u32);
                    x = [0, 1].map(|m| [x[m][1], x[m][2], x[m][3], later[m]]);
                }
                let mut c = [0.0; 2];
                let mut m = 0;
                while m < 2 {
                    let mut i = 0;
                    while i < TAPS - 1 {
                        c[m] = Lanes::mul_add(inputs[m][i], taps[m][i], c[m]);
                        i += 1;
                    }
                    c[m] = math::activation(Lanes::mul_add(now[m], taps[m][TAPS - 1], c[m]));
                    inputs[m] = [inputs[m][1], inputs[m][2], now[m]];
                    m += 1;
                }
                self.put_channels::<H>(pair, n, t, c);
                if is_kept && t + 1 < self.tokens::<H>() {
                    let slot = gpu.unforeseen(u64::from(each));
                    self.put_each(pair, args.conv_kept.at(true, slot, t), inputs);
                }
            }
            t += 1;
        }
        // SAFETY: the caller's promises.
        unsafe { self.put_last::<H>(pair, windows, inputs) }
    }

    /// A pair's windows after a token that others follow.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    unsafe fn put_each(&self, pair: &Pair, to: u64, values: [[f32; TAPS - 1]; 2]) {
        let mut m = 0;
        while m < 2 {
            if pair.there[m] {
                // SAFETY: the caller's promise.
                unsafe { pair.channels[m].put_window(self.gpu, true, self.args, to, values[m]) }
            }
            m += 1;
        }
    }
}
