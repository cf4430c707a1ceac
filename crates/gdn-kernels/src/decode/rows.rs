//! The rows of S that a warp computes: from memory to registers, through the tokens, and back.

use core::marker::PhantomData;

use gdn_math::{Lanes, layer as math};

use super::{
    args::Args,
    element::{Element, bits, far, number, shared, store},
};
use crate::gpu::{AsyncCopy, Bytes16, Hopper, SharedWord, Warp};

/// Pieces of rows that have room in shared memory, the one that is computed included.
const STAGES: u32 = 2;

/// What the kernels ask of the machine.
pub trait Machine: Hopper + Warp + AsyncCopy {}

impl<G: Hopper + Warp + AsyncCopy> Machine for G {}

/// Some rows of a v head, which a warp computes piece by piece.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// The v head, and the first row.
    pub head: u32,
    /// See `head`.
    pub start: u32,
    /// How many.
    pub len: u32,
    /// Where the warp's pieces land in shared memory.
    pub landing: u32,
}

/// What a warp's rows have in common at a token.
#[derive(Clone, Copy, Debug)]
pub struct Token {
    /// See gdn-math.
    pub decay: f32,
    /// See gdn-math.
    pub beta: f32,
    /// What brings the query and the key to their lengths.
    pub q_scale: f32,
    /// See `q_scale`.
    pub k_scale: f32,
    /// The query times the key, as the convolution left them.
    pub q_k: f32,
    /// Where the query, the key, and values and outputs of the warp's first row are in shared memory.
    pub q: u32,
    /// See `q`.
    pub k: u32,
    /// See `q`.
    pub v: u32,
    /// See `q`.
    pub o: u32,
}

/// Rows of any strides, and convolutions of any width.
pub const NARROW: u32 = 0;
/// Rows are dense, at multiples of 16 bytes, the convolution has 4 taps, and strides and numbers of slots
/// have 31 bits.
pub const WIDE: u32 = 1;
/// Besides, q, k, v, z, the convolution's weight and states, the norm's weight and `out` are bf16, indices
/// have 4 bytes, taps lie side by side at a multiple of 8 bytes, there is no bias, the window has 3 columns,
/// no number of accepted tokens is given, rows have as many columns as the kernel, v heads are whole
/// pieces, and there is one token. What else a call may be costs instructions even where it is not.
pub const PLAIN: u32 = 2;
/// The same but for several tokens.
pub const PLAIN_TOKENS: u32 = 3;
/// As [`PLAIN`], and the rows of a v head lie one behind the other, here and in shared memory, where a warp's pieces come by
/// bulk copies: no lane spends instructions on them, and all have room. For `few.rs`, which orders how many are on their way.
pub const BULK: u32 = 4;

/// How a warp holds rows. All lanes come to each of these functions together.
pub trait Held: Sized {
    /// Rows of a piece, which is held in registers.
    const PIECE: u32;
    /// Parts of a piece, of each of which the outputs' squares are added up by themselves: so many as make kernels with
    /// larger pieces give the bits of those with smaller ones.
    const PARTS: u32;
    /// Numbers of a query or key, with the zeros behind it.
    const PADDED: u32;
    /// Bytes of a piece.
    const PIECE_BYTES: u32;
    /// Bytes of shared memory in which a warp's pieces land: of [`BULK`] ones [`bulk_landing`] says how many.
    const LANDING: u32;
    /// [`NARROW`], [`WIDE`], [`PLAIN`], [`PLAIN_TOKENS`] or [`BULK`].
    const KIND: u32;
    /// Whether this is any but a [`NARROW`] one.
    const WIDE: bool = Self::KIND != NARROW;
    /// Whether this is a [`PLAIN`], [`PLAIN_TOKENS`] or [`BULK`] one.
    const PLAIN: bool = Self::KIND >= PLAIN;
    /// Whether there is one token.
    const ONE: bool = Self::KIND == PLAIN || Self::KIND == BULK;

    /// Works out where the rows are in a slot. Nothing is touched.
    fn aim(gpu: &impl Machine, args: &Args, place: &Place) -> Self;

    /// Makes what so many [`BULK`] pieces of a warp that has rows arrive at. Its other lanes may wait there behind a barrier.
    ///
    /// # Safety
    /// As [`Held::begin`].
    unsafe fn ready<const PIECES: u32>(gpu: &impl Machine, place: &Place);

    /// Asks that the first pieces, of the slot at `state`, come near: of [`BULK`] ones so many.
    fn bring_near(&self, gpu: &impl Machine, state: u64, pieces: u32);

    /// Begins to read the first pieces, of the slot at `state`: of [`BULK`] ones so many.
    ///
    /// # Safety
    /// The rows are there, and the shared memory is the warp's alone.
    unsafe fn begin(&mut self, gpu: &impl Machine, args: &Args, state: u64, pieces: u32);

    /// Begins to read the [`BULK`] pieces from number `first` on; others are read as they are taken.
    ///
    /// # Safety
    /// As [`Held::begin`], after it.
    unsafe fn begin_rest(&self, gpu: &impl Machine, first: u32);

    /// Piece `step`, into registers. Pieces are taken in order.
    ///
    /// # Safety
    /// As [`Held::begin`].
    unsafe fn take(&mut self, gpu: &impl Machine, args: &Args, step: u32);

    /// The next token on the piece: outputs to shared memory, the state in registers. The sums of its outputs'
    /// squares, part by part, in all lanes.
    ///
    /// # Safety
    /// As [`Held::begin`]; what `token` names is in shared memory for all to see, and outputs are nobody
    /// else's.
    unsafe fn token(&mut self, gpu: &impl Machine, step: u32, token: &Token) -> [f32; 2];

    /// Writes the piece to the slot at `to`, if that is not 0. Where tokens follow (`more`), what is left of
    /// it in the state's dtype is what they find.
    ///
    /// # Safety
    /// As [`Held::begin`]; the slot's rows are to be written.
    unsafe fn keep(&mut self, gpu: &impl Machine, args: &Args, step: u32, to: u64, more: bool);
}

/// Bytes of shared memory in which so many pieces land by bulk copies, with an mbarrier behind them for each.
pub const fn bulk_landing(pieces: u32, piece_bytes: u32) -> u32 {
    pieces * piece_bytes + (pieces * 8).next_multiple_of(16)
}

/// The delta rule for a row: its output, and what it adds to the state for each number of the key. `of_k` and
/// `of_q` are the row's products with the key and the query, before the token. The row that the token leaves
/// is `decay * S + added * k`, so its product with the query needs no second look at it.
#[inline(always)]
fn output_and_added(token: &Token, of_k: f32, of_q: f32, v: f32) -> (f32, f32) {
    let r = token.decay * (token.k_scale * of_k);
    let added = math::correction(token.beta, v, r) * token.k_scale;
    (token.q_scale * Lanes::mul_add(added, token.q_k, token.decay * of_q), added)
}

/// Rows of which `LANES` lanes hold one, each `CHUNKS` times `V` columns of it, and each of the warp's groups
/// of so many lanes `ROWS` rows.
///
/// But for [`NARROW`] ones, V columns are 16 bytes that lie dense in memory at a multiple of 16; a piece is
/// then on its way to shared memory while the one before it is computed, and no lane touches there what is
/// another one's. [`BULK`] ones lie there as in memory.
pub struct Rows<E, const LANES: u32, const V: usize, const CHUNKS: usize, const ROWS: usize, const KIND: u32>
{
    len: u32,
    /// The lane's first row of the first piece, at its first column (within the slot, until that is known),
    /// and bytes to the next row and column.
    from: u64,
    of_row: u64,
    of_column: u64,
    /// The same from where a token's state goes.
    to: u64,
    /// Where the lane's part of a piece lands.
    landing: u32,
    /// Of [`BULK`] ones, the mbarrier of the first piece.
    landed: u32,
    s: [[[f32; V]; CHUNKS]; ROWS],
    element: PhantomData<E>,
}

impl<E: Element, const LANES: u32, const V: usize, const CHUNKS: usize, const ROWS: usize, const KIND: u32>
    Rows<E, LANES, V, CHUNKS, ROWS, KIND>
{
    /// Rows of the warp side by side.
    const GROUPS: u32 = 32 / LANES;
    /// From a lane's chunk to its next one in shared memory, and from its row.
    const OF_CHUNK: u32 = if KIND == BULK { LANES * 16 } else { 512 };
    const OF_ROW: u32 = CHUNKS as u32 * 512;

    /// Whether the lanes that hold rows share out these among them once products are added up, so that each works out one
    /// row's output and addition, not all of them the same ones.
    const SHARES_ROWS: bool = Self::PLAIN && (ROWS == 4 || ROWS == 2 && KIND != BULK);

    /// [`Held::token`] from the lanes' own parts of the products with the key and the query on, where [`Self::SHARES_ROWS`]. The same
    /// numbers are added up in the same order, so the bits are the same.
    ///
    /// # Safety
    /// As [`Held::token`].
    #[inline(always)]
    unsafe fn token_of_shared_rows(
        &mut self,
        gpu: &impl Machine,
        step: u32,
        token: &Token,
        k: &[[f32; V]; CHUNKS],
        mut products: [[f32; 2]; ROWS],
    ) -> [f32; 2] {
        let lane = gpu.lane();
        let sum = |own: f32, sent: f32, mask| own + f32::from_bits(gpu.shuffle_xor(sent.to_bits(), mask));
        let (mut mask, mut rows) = (LANES / 2, ROWS);
        // Half of the rows go to the lanes on the other side, and come from there.
        while rows > 1 {
            let (upper, half) = (lane & mask != 0, rows / 2);
            let mut n = 0;
            while n < half {
                let (low, high) = (products[n], products[n + half]);
                let (own, sent) = if upper { (high, low) } else { (low, high) };
                products[n] = [sum(own[0], sent[0], mask), sum(own[1], sent[1], mask)];
                n += 1;
            }
            (mask, rows) = (mask / 2, half);
        }
        let [of_k, of_q] = &mut products[0];
        while mask > 0 {
            (*of_k, *of_q) = (sum(*of_k, *of_k, mask), sum(*of_q, *of_q, mask));
            mask /= 2;
        }
        // Neighbours that hold one row.
        let each_row = LANES / ROWS as u32;
        let own = lane % LANES / each_row;
        let at = (step * Self::PIECE + own * Self::GROUPS + lane / LANES) * 4;
        // SAFETY: the caller's promise.
        let v = unsafe { shared(gpu, token.v + at) };
        let (o, added) = output_and_added(token, *of_k, *of_q, v);
        if lane.is_multiple_of(each_row) {
            // SAFETY: the caller's promise.
            unsafe { gpu.store_shared4(token.o + at, o.to_bits()) }
        }
        let mut n = 0;
        while n < ROWS {
            let from = lane / LANES * LANES + n as u32 * each_row;
            let added = f32::from_bits(gpu.shuffle(added.to_bits(), from));
            let s = &mut self.s[n];
            each_number::<V, CHUNKS>(|c, x| {
                s[c][x] = Lanes::mul_add(k[c][x], added, s[c][x] * token.decay);
            });
            n += 1;
        }
        // Two rows make a part.
        let mut squares = sum(o * o, o * o, each_row);
        let mut mask = LANES;
        while mask < 32 {
            squares = sum(squares, squares, mask);
            mask *= 2;
        }
        if Self::PARTS == 1 {
            return [squares, 0.0];
        }
        let other = f32::from_bits(gpu.shuffle_xor(squares.to_bits(), LANES / 2));
        if lane & (LANES / 2) != 0 { [other, squares] } else { [squares, other] }
    }

    /// Whether the lane's `n`th row of a piece is there.
    #[inline(always)]
    fn has(&self, gpu: &impl Machine, step: u32, n: usize) -> bool {
        Self::PLAIN || step * Self::PIECE + n as u32 * Self::GROUPS + gpu.lane() / LANES < self.len
    }

    /// From the lane's first row of the first piece to its `n`th of this one.
    #[inline(always)]
    fn distance(step: u32, n: usize) -> u64 {
        u64::from(step * Self::PIECE + n as u32 * Self::GROUPS)
    }

    /// Whether column `v` of the lane's chunk `c` is there.
    #[inline(always)]
    fn has_column(gpu: &impl Machine, args: &Args, c: usize, v: usize) -> bool {
        Self::PLAIN || ((c as u32 * LANES + gpu.lane() % LANES) * V as u32 + v as u32) < args.dk
    }

    /// Begins to copy a piece, if there is one more.
    ///
    /// # Safety
    /// As [`Held::begin`].
    #[inline(always)]
    unsafe fn send_for(&self, gpu: &impl Machine, args: &Args, step: u32) {
        let stage = self.landing + step % STAGES * Self::PIECE_BYTES;
        let is_there = step * Self::PIECE < self.len;
        let mut n = 0;
        while is_there && n < ROWS {
            let from = self.from + far(Self::WIDE, Self::distance(step, n), self.of_row);
            let mut c = 0;
            while c < CHUNKS {
                let there = self.has(gpu, step, n) && Self::has_column(gpu, args, c, 0);
                // SAFETY: the caller's promise; nothing is read of what is not there.
                unsafe {
                    gpu.copy16(
                        stage + n as u32 * Self::OF_ROW + c as u32 * Self::OF_CHUNK,
                        from + u64::from(c as u32 * LANES * 16),
                        there,
                    );
                }
                c += 1;
            }
            n += 1;
        }
        gpu.commit_copies();
    }

    /// Begins to copy a piece by one lane, if there is one more.
    ///
    /// # Safety
    /// As [`Held::begin`].
    #[inline(always)]
    unsafe fn bulk(&self, gpu: &impl Machine, step: u32) {
        if gpu.lane() == 0 && step * Self::PIECE < self.len {
            let (before, landed) = (step * Self::PIECE_BYTES, self.landed + step * 8);
            // SAFETY: the caller's promise; the lane made the mbarrier, and the first row is its own.
            unsafe {
                gpu.mbarrier_arrive_expect(landed, Self::PIECE_BYTES);
                gpu.bulk_copy(
                    self.landing + before,
                    self.from + u64::from(before),
                    Self::PIECE_BYTES,
                    landed,
                );
            }
        }
    }

    /// The lane's columns of a query or key.
    ///
    /// # Safety
    /// The line is in shared memory, for all to see.
    #[inline(always)]
    unsafe fn line(gpu: &impl Machine, line: u32) -> [[f32; V]; CHUNKS] {
        let mut numbers = [[0.0; V]; CHUNKS];
        let at = line + gpu.lane() % LANES * V as u32 * 4;
        let mut c = 0;
        while c < CHUNKS {
            let at = at + c as u32 * LANES * V as u32 * 4;
            let mut v = 0;
            while v < V {
                // SAFETY: the caller's promise.
                unsafe {
                    if V.is_multiple_of(4) {
                        let Bytes16(four) = Bytes16::load_shared(gpu, at + v as u32 * 4);
                        let mut i = 0;
                        while i < 4 {
                            numbers[c][(v + i) % V] = f32::from_bits(four[i]);
                            i += 1;
                        }
                        v += 4;
                    } else {
                        numbers[c][v] = shared(gpu, at + v as u32 * 4);
                        v += 1;
                    }
                }
            }
            c += 1;
        }
        numbers
    }
}

impl<E: Element, const LANES: u32, const V: usize, const CHUNKS: usize, const ROWS: usize, const KIND: u32>
    Held for Rows<E, LANES, V, CHUNKS, ROWS, KIND>
{
    const PIECE: u32 = Self::GROUPS * ROWS as u32;
    const PARTS: u32 = if ROWS > 2 { 2 } else { 1 };
    const PADDED: u32 = LANES * (V * CHUNKS) as u32;
    const PIECE_BYTES: u32 = (ROWS * CHUNKS) as u32 * 512;
    const LANDING: u32 = if Self::WIDE { STAGES * Self::PIECE_BYTES } else { 0 };
    const KIND: u32 = KIND;

    #[inline(always)]
    fn aim(gpu: &impl Machine, args: &Args, place: &Place) -> Self {
        let (row, column) = (place.start + gpu.lane() / LANES, gpu.lane() % LANES * V as u32);
        let [_, of_head, of_row, of_column] = args.state.strides;
        let [.., to_head, to_row, to_column] = args.kept.to.strides;
        let at = |[of_head, of_row, of_column]: [u64; 3]| {
            far(Self::WIDE, u64::from(place.head), of_head)
                + far(Self::WIDE, u64::from(row), of_row)
                + far(Self::WIDE, u64::from(column), of_column)
        };
        Self {
            len: place.len,
            from: at([of_head, of_row, of_column]),
            of_row,
            of_column,
            to: at([to_head, to_row, to_column]),
            landing: place.landing
                + if KIND == BULK {
                    (gpu.lane() / LANES * CHUNKS as u32 * LANES + gpu.lane() % LANES) * 16
                } else {
                    gpu.lane() * 16
                },
            landed: place.landing + place.len / Self::PIECE * Self::PIECE_BYTES,
            s: [[[0.0; V]; CHUNKS]; ROWS],
            element: PhantomData,
        }
    }

    #[inline(always)]
    unsafe fn ready<const PIECES: u32>(gpu: &impl Machine, place: &Place) {
        if gpu.lane() == 0 {
            let mut step = 0;
            while step < PIECES {
                // SAFETY: the caller's promise.
                unsafe { gpu.mbarrier_init(place.landing + PIECES * Self::PIECE_BYTES + step * 8, 1) }
                step += 1;
            }
            gpu.mbarrier_fence();
        }
    }

    #[inline(always)]
    fn bring_near(&self, gpu: &impl Machine, state: u64, pieces: u32) {
        let mut step = 0;
        if KIND == BULK {
            // The first lane's row is the warp's first.
            if gpu.lane() == 0 && self.len > 0 {
                gpu.bring_bulk_near(state + self.from, pieces * Self::PIECE_BYTES);
            }
            return;
        }
        while step < STAGES && step * Self::PIECE < self.len {
            let mut n = 0;
            while n < ROWS {
                let from = state + self.from + far(Self::WIDE, Self::distance(step, n), self.of_row);
                let mut c = 0;
                while c < CHUNKS {
                    gpu.bring_near(from + u64::from(c as u32 * LANES * 16));
                    c += 1;
                }
                n += 1;
            }
            step += 1;
        }
    }

    #[inline(always)]
    unsafe fn begin(&mut self, gpu: &impl Machine, args: &Args, state: u64, pieces: u32) {
        self.from += state;
        let mut step = 0;
        while KIND == BULK && step < pieces {
            // SAFETY: the caller's promise.
            unsafe { self.bulk(gpu, step) }
            step += 1;
        }
        while KIND != BULK && Self::WIDE && step < STAGES {
            // SAFETY: the caller's promise.
            unsafe { self.send_for(gpu, args, step) }
            step += 1;
        }
    }

    #[inline(always)]
    unsafe fn begin_rest(&self, gpu: &impl Machine, first: u32) {
        let mut step = first;
        while KIND == BULK && step * Self::PIECE < self.len {
            // SAFETY: the caller's promise.
            unsafe { self.bulk(gpu, step) }
            step += 1;
        }
    }

    #[inline(always)]
    unsafe fn take(&mut self, gpu: &impl Machine, args: &Args, step: u32) {
        if KIND == BULK {
            // SAFETY: the caller's promise.
            unsafe { gpu.mbarrier_wait(self.landed + step * 8, 0) }
        } else if Self::WIDE {
            gpu.wait_copies::<{ STAGES - 1 }>();
        }
        let stage = self.landing + if KIND == BULK { step } else { step % STAGES } * Self::PIECE_BYTES;
        let of_column = gpu.unforeseen(self.of_column);
        let mut n = 0;
        while n < ROWS {
            let mut c = 0;
            while c < CHUNKS {
                // SAFETY: what the lane sent for has landed; elsewhere the caller's promise.
                unsafe {
                    let bytes = if Self::WIDE {
                        Bytes16::load_shared(gpu, stage + n as u32 * Self::OF_ROW + c as u32 * Self::OF_CHUNK)
                    } else {
                        Bytes16([0; 4])
                    };
                    let mut v = 0;
                    while v < V {
                        self.s[n][c][v] = if Self::WIDE {
                            E::of(gpu, bytes, v)
                        } else if self.has(gpu, step, n) && Self::has_column(gpu, args, c, v) {
                            let at = self.from
                                + far(Self::WIDE, Self::distance(step, n), self.of_row)
                                + (c as u64 * u64::from(LANES) * V as u64 + v as u64) * of_column;
                            number(gpu, E::DTYPE, bits(gpu, E::DTYPE, at))
                        } else {
                            0.0
                        };
                        v += 1;
                    }
                }
                c += 1;
            }
            n += 1;
        }
        if Self::WIDE && KIND != BULK {
            // SAFETY: the caller's promise; the stage was read above.
            unsafe { self.send_for(gpu, args, step + STAGES) }
        }
    }

    #[inline(always)]
    unsafe fn token(&mut self, gpu: &impl Machine, step: u32, token: &Token) -> [f32; 2] {
        // SAFETY: the caller's promise.
        let (k, q) = unsafe { (Self::line(gpu, token.k), Self::line(gpu, token.q)) };
        // A row's products with the key and the query.
        let mut products = [[0.0; 2]; ROWS];
        let mut n = 0;
        while n < ROWS {
            products[n] = [dot(&self.s[n], &k), dot(&self.s[n], &q)];
            n += 1;
        }
        if Self::SHARES_ROWS {
            // SAFETY: the caller's promise.
            return unsafe { self.token_of_shared_rows(gpu, step, token, &k, products) };
        }
        let mut mask = LANES / 2;
        while mask > 0 {
            let mut n = 0;
            while n < ROWS {
                let other = products[n].map(|sum| f32::from_bits(gpu.shuffle_xor(sum.to_bits(), mask)));
                products[n] = [products[n][0] + other[0], products[n][1] + other[1]];
                n += 1;
            }
            mask /= 2;
        }
        let mut squares = [0.0; 2];
        let mut n = 0;
        while n < ROWS {
            let row = step * Self::PIECE + n as u32 * Self::GROUPS + gpu.lane() / LANES;
            // Where there is no row, another one's value does no harm.
            let at = if Self::PLAIN { row } else { row.min(self.len - 1) } * 4;
            // SAFETY: the caller's promise.
            let v = unsafe { shared(gpu, token.v + at) };
            let (o, added) = output_and_added(token, products[n][0], products[n][1], v);
            let s = &mut self.s[n];
            each_number::<V, CHUNKS>(|c, x| {
                s[c][x] = Lanes::mul_add(k[c][x], added, s[c][x] * token.decay);
            });
            if self.has(gpu, step, n) && gpu.lane().is_multiple_of(LANES) {
                // SAFETY: the caller's promise.
                unsafe { gpu.store_shared4(token.o + at, o.to_bits()) }
            }
            squares[n * Self::PARTS as usize / ROWS] += if self.has(gpu, step, n) { o * o } else { 0.0 };
            n += 1;
        }
        let mut mask = LANES;
        while mask < 32 {
            let mut part = 0;
            while part < Self::PARTS as usize {
                squares[part] += f32::from_bits(gpu.shuffle_xor(squares[part].to_bits(), mask));
                part += 1;
            }
            mask *= 2;
        }
        squares
    }

    #[inline(always)]
    unsafe fn keep(&mut self, gpu: &impl Machine, args: &Args, step: u32, to: u64, more: bool) {
        let [.., to_row, to_column] = args.kept.to.strides;
        let to_column = gpu.unforeseen(to_column);
        let mut n = 0;
        while n < ROWS {
            let is_kept = to != 0 && self.has(gpu, step, n);
            let row = to + self.to + far(Self::WIDE, Self::distance(step, n), to_row);
            let mut c = 0;
            while c < CHUNKS {
                let bytes = E::packed(gpu, &self.s[n][c]);
                // SAFETY: the caller's promise.
                unsafe {
                    if Self::WIDE {
                        if is_kept && Self::has_column(gpu, args, c, 0) {
                            gpu.store16(row + u64::from(c as u32 * LANES * 16), bytes);
                        }
                    } else {
                        let mut v = 0;
                        while v < V {
                            if is_kept && Self::has_column(gpu, args, c, v) {
                                let column = c as u64 * u64::from(LANES) * V as u64 + v as u64;
                                store(gpu, E::DTYPE, row + column * to_column, self.s[n][c][v]);
                            }
                            v += 1;
                        }
                    }
                }
                let mut v = 0;
                while more && E::BYTES < 4 && v < V {
                    self.s[n][c][v] = E::of(gpu, bytes, v);
                    v += 1;
                }
                c += 1;
            }
            n += 1;
        }
    }
}

/// The lane's part of a product of rows: four sums side by side, which come together at the end.
#[inline(always)]
fn dot<const V: usize, const CHUNKS: usize>(a: &[[f32; V]; CHUNKS], b: &[[f32; V]; CHUNKS]) -> f32 {
    let mut sums = [0.0; 4];
    each_number::<V, CHUNKS>(|c, x| {
        let i = (c * V + x) % 4;
        sums[i] = Lanes::mul_add(a[c][x], b[c][x], sums[i]);
    });
    (sums[0] + sums[1]) + (sums[2] + sums[3])
}

/// Every column of a lane, in the order in which they are added up.
#[inline(always)]
fn each_number<const V: usize, const CHUNKS: usize>(mut f: impl FnMut(usize, usize)) {
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
