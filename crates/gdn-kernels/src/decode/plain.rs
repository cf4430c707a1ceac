//! The inputs of plain calls. What a lane needs it asks for all at once: addresses are worked out before the
//! kernel waits for the one before it, and nothing is used before the last of it was asked for.

use gdn_math::{Lanes, element::f32_of_bf16, layer as math};

use super::{
    Block, Pass,
    args::Args,
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
    row: [u64; 2],
}

/// Bits of it, on their way.
#[derive(Clone, Copy, Default)]
pub(super) struct Asked {
    channels: Bits,
    gates: [u32; 4],
    pub(super) row: RowBits,
}

/// Bits of two channels: the taps, and the input at the first token.
#[derive(Clone, Copy, Default)]
struct Bits {
    taps: [u64; 2],
    x: [u32; 2],
}

/// The last inputs before a token.
type Inputs = [[u32; TAPS - 1]; 2];

impl Channel {
    #[inline(always)]
    fn x_at(&self, t: u32) -> u64 {
        self.x + far(true, u64::from(t), self.row_stride)
    }

    #[inline(always)]
    fn taps_at(&self, args: &Args) -> u64 {
        args.conv_weight.address + far(true, self.channel, args.conv_weight.strides[0])
    }
}

impl<G: Machine> Block<'_, G> {
    /// Works out where the lane's inputs are. Nothing is touched.
    #[inline(always)]
    pub(super) fn aim_inputs<H: Held>(&self, pass: &Pass) -> Aim {
        let (of_qk, all) = self.pairs::<H>(pass);
        let warp = self.gpu.thread() / 32;
        let gates = self.gates_of_warp();
        let (at, there) = self.gates_at::<H>(pass, gates);
        let row = self.row_at::<H>(pass, self.first_row().min(pass.rows - 1), 0);
        Aim {
            pair: self.pair::<H>(&Read::default(), pass, warp, of_qk),
            has_pair: warp < all,
            gates: (at, there && gates < pass.heads.div_ceil(2)),
            row,
        }
    }

    /// Asks that what the lane begins with come near, before the kernel before this one is done. A hint: what
    /// that one writes is seen all the same.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    pub(super) unsafe fn bring_near<H: Held>(&self, rows: &H, pass: &Pass, aim: &Aim) {
        let Self { gpu, args, .. } = self;
        let gpu = *gpu;
        // SAFETY: the caller's promises. Which slot it will be the kernel before may still change.
        let slot = Read::by(args, unsafe { Read::peek(gpu, args, self.sequence) });
        if aim.has_pair {
            for channel in aim.pair.channels {
                gpu.bring_near(channel.x);
                gpu.bring_near(channel.taps_at(args));
            }
        }
        let (at, there) = aim.gates;
        if there {
            at.into_iter().for_each(|at| gpu.bring_near(at));
        }
        if self.first_row() < pass.rows {
            aim.row.into_iter().for_each(|at| gpu.bring_near(at));
        }
        if let Some(read) = slot {
            rows.bring_near(
                gpu,
                args.state.address + far(true, read.recurrent as u64, args.state.strides[0]),
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
    pub(super) unsafe fn ask<H: Held>(&self, pass: &Pass, aim: &Aim) -> Asked {
        let mut asked = Asked::default();
        // SAFETY: the caller's promises.
        unsafe {
            if aim.has_pair {
                asked.channels = self.ask_channels(&aim.pair);
            }
            let (at, there) = aim.gates;
            asked.gates = self.read_gates(at, there);
            if self.first_row() < pass.rows {
                asked.row = self.read_row::<H>(aim.row);
            }
        }
        asked
    }

    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    unsafe fn ask_channels(&self, pair: &Pair) -> Bits {
        let Self { gpu, args, .. } = self;
        // SAFETY: the caller's promises: a lane without channels of its own reads another one's.
        unsafe {
            let taps = pair.channels.map(|channel| gpu.load8(channel.taps_at(args)));
            Bits { taps, x: pair.channels.map(|channel| u32::from(gpu.load2(channel.x))) }
        }
    }

    /// The windows in the slot.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    unsafe fn ask_windows(&self, pair: &Pair, slot: u64) -> Inputs {
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

    /// q, k, v and gates, into shared memory, and the windows that nobody else reads.
    ///
    /// # Safety
    /// As [`super::run`].
    #[inline(always)]
    pub(super) unsafe fn plain_inputs<H: Held>(&self, read: &Read, pass: &Pass, aim: &Aim, asked: &Asked) {
        let Self { gpu, args, room, .. } = self;
        let gpu = *gpu;
        let warps = gpu.threads() / 32;
        let (of_qk, all) = self.pairs::<H>(pass);
        let slot = far(true, read.conv as u64, args.conv_state.strides[0]);
        // SAFETY: the caller's promises; each place of shared memory is one thread's.
        unsafe {
            let (mut n, mut pair, mut bits) = (gpu.thread() / 32, aim.pair, asked.channels);
            let mut inputs = Inputs::default();
            if aim.has_pair {
                inputs = self.ask_windows(&pair, slot);
            }
            let mut windows = Windows { last: 0, each: 0 };
            if !self.keeps_later() {
                windows = Windows::plain(gpu, args, read, self.sequence);
            } else if self.gates_of_warp() == 0 {
                let Windows { last, .. } = Windows::plain(gpu, args, read, self.sequence);
                if gpu.lane() == 0 {
                    gpu.store_shared16(room.last, Bytes16([last as u32, (last >> 32) as u32, 0, 0]));
                }
            }
            while n < all {
                // What the next pair begins with is on its way meanwhile.
                let next = n + warps;
                let (mut next_pair, mut next_bits, mut next_inputs) = (pair, bits, inputs);
                if next < all {
                    next_pair = self.pair::<H>(&Read::default(), pass, next, of_qk);
                    next_bits = self.ask_channels(&next_pair);
                    next_inputs = self.ask_windows(&next_pair, slot);
                }
                self.convolve_plain::<H>(&pair, (bits, inputs), &windows, n);
                (n, pair, bits, inputs) = (next, next_pair, next_bits, next_inputs);
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
        windows: &Windows,
        n: u32,
    ) {
        let Self { gpu, args, .. } = self;
        let gpu = *gpu;
        let taps = bits.taps.map(|taps| [0, 16, 32, 48].map(|place| f32_of_bf16((taps >> place) as u16)));
        let mut inputs = inputs.map(|inputs| inputs.map(|bits| f32_of_bf16(bits as u16)));
        let mut x = bits.x;
        let mut t = 0;
        while t < args.tokens {
            let now = x.map(|bits| f32_of_bf16(bits as u16));
            // SAFETY: the caller's promises.
            unsafe {
                if t + 1 < args.tokens {
                    x = pair.channels.map(|channel| u32::from(gpu.load2(channel.x_at(t + 1))));
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
            }
            t += 1;
        }
        // SAFETY: the caller's promises.
        unsafe { self.put_last::<H>(pair, windows, inputs) }
    }
}
