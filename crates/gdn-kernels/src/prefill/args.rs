//! What the host hands over to the prefill, and the layout of scratch and shared memory.

pub use crate::decode::args::{BF16, F16, F32, Field, Indices, Strided, Vector};
use crate::split::Divisor;

/// Tokens of a chunk.
pub const CHUNK: u32 = 64;
/// Rows of S that a warp of the scan has.
pub const WARP_ROWS: u32 = 16;
/// Rows of S whose values lie together in scratch: two warps' worth.
pub const SLICE: u32 = 32;
/// Threads of a block of the norm.
pub const THREADS: u32 = 256;
/// Threads of a block of the preparation.
pub const PREPARE_THREADS: u32 = 192;
/// Threads of a block of the scan whose warps multiply in groups, its rows of S, and the chunks that it has in
/// shared memory.
pub const GROUP_THREADS: u32 = 256;
/// See [`GROUP_THREADS`].
pub const GROUP_ROWS: u32 = 64;
/// See [`GROUP_THREADS`].
pub const GROUP_STAGES: u32 = 3;
/// Threads of a block of the transitions of segments.
pub const TRANSITION_THREADS: u32 = 256;
/// Threads of a block that goes from segment to segment, the most columns of S it takes, its rows of S, and its
/// bytes of shared memory.
pub const COMBINE_THREADS: u32 = 256;
/// See [`COMBINE_THREADS`].
pub const COMBINE_COLUMNS: u32 = 128;
/// See [`COMBINE_THREADS`].
pub const COMBINE_ROWS: u32 = 16;
/// See [`COMBINE_THREADS`].
pub const COMBINE_BYTES: u32 = 2 * COMBINE_HALF;
/// Bytes of S that is handed over from warp to warp: rows in two f16 a number, and of 16 columns of a row a power of
/// two. There is room for two, which take turns.
pub const COMBINE_HALF: u32 = COMBINE_ROWS * COMBINE_COLUMNS * 4 + COMBINE_ROWS * COMBINE_COLUMNS / 16 * 4;
/// Room for what brings M of a v head back.
pub const SCALES_OF_M: u32 = COMBINE_COLUMNS / 16;
/// Threads of a block of the convolution; or twice or half as many, where inputs are read 16 bytes at a time. A thread has at
/// least 8 tokens, and theirs begin at multiples of 8.
pub const CONVOLVE_THREADS: u32 = 64;
/// With so few for heads of up to 128 features, which is 32 tokens a thread, inputs come to shared memory, further ahead than
/// there are registers for. With fewer tokens a thread would begin later by that.
pub const CONVOLVE_AHEAD_THREADS: u32 = CONVOLVE_THREADS / 2;
/// Bytes of shared memory that a thread has for them.
pub const CONVOLVE_BYTES: u32 = 8 * 16;
/// P is stored as so many times what it is. No number of it is larger than 1 and a little: what decays make
/// small is a normal f16 down to 2^-28.
pub const RAISED: f32 = 16384.0;
/// T is stored as so many times what it is, and what it makes of X is so, for no more products on the way from
/// chunk to chunk: X has as much less of the range of f16. No number of it is larger than 2 and a little.
pub const T_RAISED: f32 = 16.0;
/// What S makes of an output is stored as so many times what it is, as what U makes of it is.
pub const OUT_RAISED: f32 = RAISED * T_RAISED;
/// v heads of which a block of the preparation inverts the matrices at a time.
pub const GROUP: u32 = 2;
/// Taps of the convolution, at most.
pub const TAPS: u32 = 4;

/// Tensors between the kernels, for each chunk of a window. The first five are f16, the others f32.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct Scratch {
    /// `[chunks, HK, DK in atoms]` of [`ATOM`] bytes, 64 tokens by 64 numbers each, normed; what is left of the
    /// last atom is zeros. Piece `c` of 16 bytes of row `r` lies at `c ^ (r % 8)`.
    pub q: u64,
    /// As `q`.
    pub k: u64,
    /// `[chunks, HV, DV / SLICE, CHUNK, SLICE]`: values; piece `c` of row `r` lies at `c ^ (r / 2 % 4)`. Then
    /// `[chunks, HV, DV, CHUNK]`: outputs, in their place; piece `c` of row `r` of these lies at `c ^ (r % 8)`.
    pub v: u64,
    /// `[chunks, HV]` atoms: the inverse of I + strictLower(beta e^D K K^T), times [`T_RAISED`].
    pub t: u64,
    /// `[chunks, HV]` atoms: lower(e^D Q K^T), times [`RAISED`].
    pub p: u64,
    /// `[chunks, HV, CHUNK + 1, 4]`: for each token what its value is multiplied with, what is multiplied with
    /// what the state has for its key, less than 0, and added, e^G times [`OUT_RAISED`], and e^(G_last - G), lifted. The
    /// last row is for all tokens: what no value times its beta is larger than, and the power of two that lifts: that
    /// brings the largest of what is left at the chunk's end of the tokens that change S close to 1.
    pub factors: u64,
    /// `[chunks, HK, CHUNK]`: the sums of keys' squares.
    pub k_squares: u64,
    /// `[chunks, HV, CHUNK]`: what a token's values are multiplied with.
    pub v_scales: u64,
    /// `[chunks, HV, DV]`: what a row of outputs is multiplied with.
    pub out_scales: u64,
    /// `[HV, DV, DK]` each, in f32: the states of the sequence that goes on from the window before, and of
    /// the one that goes on in the next.
    pub carry: [u64; 2],
    /// Bytes of all.
    pub bytes: u64,
}

impl Scratch {
    /// From an address, a multiple of 256, for windows of so many chunks.
    pub const fn new(at: u64, chunks: u64, hk: u64, hv: u64, dk: u64, dv: u64) -> Self {
        const TOKENS: u64 = CHUNK as u64;
        let keys = chunks * hk * dk.div_ceil(TOKENS) * ATOM as u64;
        let values = (chunks * hv * TOKENS * dv * 2).next_multiple_of(256);
        let squares = chunks * hv * TOKENS * TOKENS * 2;
        let k = at + keys;
        let v = k + keys;
        let t = v + values;
        let p = t + squares;
        let factors = p + squares;
        let k_squares = factors + chunks * hv * FACTORS as u64;
        let v_scales = k_squares + chunks * hk * TOKENS * 4;
        let out_scales = v_scales + chunks * hv * TOKENS * 4;
        let carry = (out_scales + chunks * hv * dv * 4).next_multiple_of(256);
        let state = hv * dv * dk * 4;
        let bytes = carry + 2 * state - at;
        Self {
            q: at,
            k,
            v,
            t,
            p,
            factors,
            k_squares,
            v_scales,
            out_scales,
            carry: [carry, carry + state],
            bytes,
        }
    }

    /// As the next window has it.
    #[must_use]
    pub const fn next(self) -> Self {
        Self { carry: [self.carry[1], self.carry[0]], ..self }
    }
}

/// How long sequences are cut into segments that go forward side by side, and where their states are.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct Segments {
    /// Whether blocks of the scan are for segments; otherwise for sequences, of which none is cut.
    pub is_cut: u32,
    /// Sequences of so many chunks and more are cut.
    pub from: u32,
    /// By the segments of a sequence, which are no shorter and no longer than the next two.
    pub most: Divisor,
    /// By the fewest chunks of a segment that others follow.
    pub shortest: Divisor,
    /// Its most chunks.
    pub longest: u32,
    /// Chunks that a block of the transitions has in shared memory, 2 or 3.
    pub stages: u32,
    /// By the blocks of the transitions for a segment and v head.
    pub slices: Divisor,
    /// By the blocks that go from segment to segment for a sequence and v head.
    pub row_blocks: Divisor,
    /// max(DV, DK)
    pub rows_behind: u32,
    /// For each segment that others follow, of a window: `[HV, DV, DK]`, f32: Z, then the state that the next
    /// one begins with; `[HV, rows_behind, DK]`, f32, of the first segment what the sequence begins with, of
    /// another one M, and there in the place of `[DK, DK]` f32 `[DK / 16, DK / 16, 2, 32, 4]` words, 16 rows by 16
    /// columns as a warp's right side, two f16 each: what is rounded, and what was lost by that; then
    /// `[HV, SCALES_OF_M]`, f32: what brings 16 rows of M back.
    pub places: u64,
    /// Bytes of one.
    pub place_bytes: u64,
    /// The same of the segment that goes on from the window before, and of the one that goes on in the next.
    pub open: [u64; 2],
    /// `[HV, DV, DK]` each, f32: what these two began with.
    pub starts: [u64; 2],
    /// Bytes of all.
    pub bytes: u64,
}

impl Segments {
    /// No sequence is cut.
    pub const NONE: Self = {
        let Some(one) = Divisor::new(1) else { unreachable!() };
        Self {
            is_cut: 0,
            from: u32::MAX,
            most: one,
            shortest: one,
            longest: 1,
            stages: 2,
            slices: one,
            row_blocks: one,
            rows_behind: 0,
            places: 0,
            place_bytes: 0,
            open: [0; 2],
            starts: [0; 2],
            bytes: 0,
        }
    };

    /// With states from an address on, a multiple of 256, for windows of so many chunks; all above is there.
    #[must_use]
    pub const fn at(self, at: u64, chunks: u64, hv: u64, dk: u64, dv: u64) -> Self {
        let behind = if dv > dk { dv } else { dk };
        let scales = hv * SCALES_OF_M as u64 * 4;
        let (state, place_bytes) = (hv * dv * dk * 4, hv * (dv + behind) * dk * 4 + scales);
        let open = at + self.places(chunks) * place_bytes;
        let starts = open + 2 * place_bytes;
        Self {
            rows_behind: behind as u32,
            places: at,
            place_bytes,
            open: [open, open + place_bytes],
            starts: [starts, starts + state],
            bytes: starts + 2 * state - at,
            ..self
        }
    }

    /// Where a v head's M is, or what the sequence begins with, in the place of a segment.
    #[inline(always)]
    pub(super) fn rows_of_m(&self, place: u64, head: u32, args: &Args) -> u64 {
        let row = args.num_v_heads.get() * args.dv + head * self.rows_behind;
        place + u64::from(row) * u64::from(args.dk * 4)
    }

    /// Where what brings its M back is.
    #[inline(always)]
    pub(super) fn scales_of_m(&self, place: u64, head: u32, heads: u32) -> u64 {
        place + self.place_bytes - u64::from((heads - head) * SCALES_OF_M * 4)
    }

    /// Segments that others follow, in a window of so many chunks: one that goes on from the window before,
    /// and those that begin.
    pub const fn places(&self, chunks: u64) -> u64 {
        1 + chunks.div_ceil(self.shortest.get() as u64)
    }

    /// Sequences that are cut, at most, and the one that goes on from the window before.
    pub const fn sequences(&self, chunks: u64) -> u64 {
        2 + chunks.div_ceil(self.from as u64)
    }

    /// As the next window has it.
    #[must_use]
    pub const fn next(self) -> Self {
        let ([a, b], [c, d]) = (self.open, self.starts);
        Self { open: [b, a], starts: [d, c], ..self }
    }
}

/// What the host hands over.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
#[allow(non_snake_case, reason = "the name that the field has in every checkpoint and engine")]
pub struct Args {
    /// N.
    pub num_tokens: u64,
    /// B.
    pub num_sequences: u32,
    /// The first chunk of this window.
    pub first_chunk: u32,
    /// The chunk after its last.
    pub end_chunk: u32,
    /// By HK.
    pub num_k_heads: Divisor,
    /// By HV.
    pub num_v_heads: Divisor,
    /// By 2 HK + HV.
    pub all_heads: Divisor,
    /// By the 16 bytes of a key. No kernel asks for it any more. Where arguments lie decides how ptxas gives the scan's
    /// registers out: without it the scan has to be measured anew.
    pub key_words: Divisor,
    /// By the blocks of the scan for a v head.
    pub slices: Divisor,
    /// By DK.
    pub head_k_dim: Divisor,
    /// By R * DV.
    pub group_v_dim: Divisor,
    /// By R.
    pub ratio: Divisor,
    /// DK.
    pub dk: u32,
    /// DV.
    pub dv: u32,
    /// W, at most [`TAPS`].
    pub conv_width: u32,
    /// Chunks that the scan has in shared memory, 1 to 3.
    pub stages: u32,
    /// Whether the gate is a sigmoid rather than a silu.
    pub sigmoid: u32,
    /// Whether rows of q, k, v, z and of the taps begin at multiples of four elements, and the taps are four
    /// and dense.
    pub wide: u32,
    /// 1 where rows of z begin at multiples of four elements, 2 of eight.
    pub wide_z: u32,
    /// The same of rows of `out`, whose columns are dense.
    pub wide_out: u32,
    /// The same of rows or columns of `state`, whichever are dense.
    pub wide_state: u32,
    /// The same of `checkpoints`.
    pub wide_checkpoints: u32,
    /// See `Layer`.
    pub l2norm_eps: f32,
    /// See `Layer`.
    pub norm_eps: f32,
    /// See `Layer`.
    pub scale: f32,
    /// See `Layer`.
    pub beta_scale: f32,
    /// A negative index is padding, and so is this one.
    pub pad_slot_id: i64,
    /// `[B + 1]`
    pub cu_seqlens: Indices,
    /// `[B]`
    pub has_initial_state: Indices,
    /// `[B, ...]`
    pub state_indices: Indices,
    /// The projections. Those of q, k and v have one row stride and one dtype.
    pub q: Field,
    /// See `q`.
    pub k: Field,
    /// See `q`.
    pub v: Field,
    /// See `q`.
    pub z: Field,
    /// See `q`.
    pub b: Field,
    /// See `q`.
    pub a: Field,
    /// `[C, W]`
    pub conv_weight: Strided<2>,
    /// `[C]`
    pub conv_bias: Vector,
    /// `[HV]`
    pub A_log: Vector,
    /// `[HV]`
    pub dt_bias: Vector,
    /// `[DV]`
    pub norm_weight: Vector,
    /// `[N, HV, DV]`
    pub out: Strided<3>,
    /// `[slots, C, columns]`; address 0: there is none.
    pub conv_state: Strided<3>,
    /// Slots of `conv_state`.
    pub conv_slots: i64,
    /// Columns of `conv_state`.
    pub conv_columns: u32,
    /// Whether there are checkpoints.
    pub has_checkpoints: u32,
    /// By the chunks from a checkpoint to the next.
    pub every: Divisor,
    /// `[slots, HV, DV, DK]`; address 0: there is none.
    pub state: Strided<4>,
    /// Slots of `state`.
    pub slots: i64,
    /// `[B]`
    pub starts: Indices,
    /// `[checkpoints, HV, DV, DK]`
    pub checkpoints: Strided<4>,
    /// `[checkpoints, C, columns]`; address 0: there are none.
    pub windows: Strided<3>,
    /// How many checkpoints there is room for.
    pub checkpoint_slots: i64,
    /// Columns of `windows`.
    pub window_columns: u32,
    /// Tensors between the kernels.
    pub scratch: Scratch,
    /// Long sequences.
    pub segments: Segments,
}

impl Args {
    /// Of q (0), k (1) or v (2) where the first key head's features are in row 0, and bytes from a key head's
    /// to the next one's.
    #[inline(always)]
    pub(super) fn field(&self, which: u32) -> (u64, u64) {
        // Not a choice among references: the arguments would be copied to memory of the thread's.
        let all = |i: u32| 0u64.wrapping_sub(u64::from(which == i));
        let pick = |q: u64, k: u64, v: u64| q & all(0) | k & all(1) | v & all(2);
        let Self { q, k, v, .. } = self;
        (pick(q.address, k.address, v.address), pick(q.head_step, k.head_step, v.head_step))
    }
}

/// Bytes of a row of so many f16 in shared memory: 16 more, so that rows that are read together lie in other
/// banks.
#[inline(always)]
pub const fn padded(columns: u32) -> u32 {
    columns * 2 + 16
}

/// Rows and columns of a block of the matrices that the preparation inverts.
pub const SIDE: u32 = 16;
/// Blocks along the side of a matrix.
pub const SIDES: u32 = CHUNK / SIDE;
/// Bytes from a row of a block on the diagonal in f32 to the next.
pub const DIAGONAL_ROW: u32 = SIDE * 4 + 16;

/// Where things are in the shared memory of a block of the preparation, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct PrepareRoom {
    /// `[R][CHUNK]`, f32: the decays' logs, summed from the chunk's start.
    pub g: u32,
    /// `[R][CHUNK]`, f32.
    pub beta: u32,
    /// `[GROUP][CHUNK]`, f32: the decay from the first row of a row's block to the row, times [`RAISED`].
    pub to_rows: u32,
    /// `[GROUP][SIDES (SIDES - 1) / 2][SIDE]`, f32: those from the columns left of a row of blocks to its
    /// first row; of each row of blocks as many as are left of the diagonal.
    pub from_columns: u32,
    /// As in [`Scratch::q`].
    pub q: u32,
    /// As `q`.
    pub k: u32,
    /// `[GROUP][PrepareRoom::HEAD]`, in the place of q and k.
    pub heads: u32,
    /// How many bytes all take.
    pub bytes: u32,
}

impl PrepareRoom {
    /// Bytes of a block in f16: its numbers rounded, and what was lost by that.
    pub const TILE: u32 = 2 * Self::LOST;
    /// From a number to what was lost.
    pub const LOST: u32 = SIDE * SIDE * 2;
    /// Of a head the blocks on the diagonal, by columns, in f32, behind all blocks in f16.
    pub const DIAGONAL: u32 = SIDES * (SIDES + 1) / 2 * Self::TILE;
    /// Of a head a whole matrix on its way out: `[CHUNK][CHUNK, padded]`, f16.
    pub const OUT: u32 = Self::DIAGONAL + SIDES * SIDE * DIAGONAL_ROW;
    /// Bytes of a head.
    pub const HEAD: u32 = Self::OUT + CHUNK * padded(CHUNK);
    /// Factors of the columns of a head.
    pub const COLUMNS: u32 = SIDES * (SIDES - 1) / 2 * SIDE;

    /// Bytes of the keys of a chunk.
    #[inline(always)]
    pub const fn keys(dk: u32) -> u32 {
        dk.div_ceil(CHUNK) * ATOM
    }

    /// For keys of `dk` numbers, `ratio` v heads a key head.
    #[inline(always)]
    pub const fn new(dk: u32, ratio: u32) -> Self {
        let beta = ratio * CHUNK * 4;
        let to_rows = 2 * beta;
        let from_columns = to_rows + GROUP * CHUNK * 4;
        let q = from_columns + GROUP * Self::COLUMNS * 4;
        let keys = Self::keys(dk);
        let heads = (if ratio < GROUP { ratio } else { GROUP }) * Self::HEAD;
        let most = if heads < 2 * keys { 2 * keys } else { heads };
        Self { g: 0, beta, to_rows, from_columns, q, k: q + keys, heads: q, bytes: q + most }
    }
}

/// Bytes of 16 rows of 8 columns of S in f32.
pub const TILE: u32 = WARP_ROWS * 8 * 4;
/// Bytes of 64 rows of 128 bytes each, as `wgmma` takes a matrix.
pub const ATOM: u32 = 64 * 128;
/// Bytes of what the rows of a block by groups are multiplied with.
pub const SCALES: u32 = GROUP_ROWS * 4;
/// Bytes of the factors of a chunk.
pub const FACTORS: u32 = (CHUNK + 1) * 16;

/// Where things of one chunk are in the shared memory of a block of the scan, in bytes. Matrices of 64 rows
/// are padded, or for products by four warps together as they are in scratch.
///
/// The first three have as many bytes as all warps' rows of S in f32, which come through here.
#[derive(Clone, Copy, Debug)]
pub struct ScanRoom {
    /// `[CHUNK][DK]`
    pub q: u32,
    /// As `q`.
    pub k: u32,
    /// `[CHUNK][CHUNK]`
    pub t: u32,
    /// As `t`.
    pub p: u32,
    /// `[CHUNK][4]`, f32. For four warps together they are in [`GroupRoom`].
    pub factors: u32,
    /// `[slices][CHUNK][SLICE, padded]`
    pub v: u32,
    /// How many bytes all take.
    pub bytes: u32,
}

impl ScanRoom {
    /// For keys of `dk` numbers, `slices` times [`SLICE`] rows of S.
    #[inline(always)]
    pub const fn new(dk: u32, slices: u32, by_group: bool) -> Self {
        let (keys, square) = if by_group {
            (dk.div_ceil(CHUNK) * ATOM, ATOM)
        } else {
            (CHUNK * padded(dk), CHUNK * padded(CHUNK))
        };
        let k = keys;
        let t = 2 * k;
        let p = t + square;
        let factors = p + square;
        if by_group {
            return Self { q: 0, k, t, p, factors, v: factors, bytes: factors + slices * CHUNK * SLICE * 2 };
        }
        let v = factors + CHUNK * 16;
        Self { q: 0, k, t, p, factors, v, bytes: v + slices * CHUNK * padded(SLICE) }
    }

    /// Of a warp's rows of S so many tiles of 8 columns are in registers. Those of longer rows, for which there
    /// are none, are in shared memory.
    #[inline(always)]
    pub const fn own_tiles(dk: u32) -> u32 {
        if dk <= 128 { dk / 8 } else { 8 }
    }

    /// Bytes of the others.
    #[inline(always)]
    pub const fn beyond(dk: u32) -> u32 {
        (dk / 8 - Self::own_tiles(dk)) * TILE
    }

    /// Bytes through which a warp with rows of S hands over to the one that makes its outputs: S, U, and what
    /// brings rows of them back.
    #[inline(always)]
    pub const fn handed(dk: u32) -> u32 {
        dk / 16 * 512 + 2048 + WARP_ROWS * 4
    }

    /// Bytes of a block's shared memory.
    #[inline(always)]
    pub const fn all(dk: u32, slices: u32, by_group: bool, stages: u32) -> u32 {
        let stages = stages * Self::new(dk, slices, by_group).bytes;
        if by_group {
            return stages + GroupRoom::new(dk, 0).bytes;
        }
        stages + slices * (SLICE / WARP_ROWS) * (Self::handed(dk) + Self::beyond(dk))
    }
}

/// Where things of one chunk are in the shared memory of a block of the transitions, in bytes. Rows of Z come
/// through here too.
#[derive(Clone, Copy, Debug)]
pub struct TransitionRoom {
    /// `[CHUNK][DK, padded]`
    pub k: u32,
    /// `[CHUNK][CHUNK, padded]`
    pub t: u32,
    /// `[CHUNK + 1][4]`, f32.
    pub factors: u32,
    /// `[slices][CHUNK][SLICE, padded]`
    pub v: u32,
    /// How many bytes all take.
    pub bytes: u32,
}

impl TransitionRoom {
    /// For keys of `dk` numbers.
    #[inline(always)]
    pub const fn new(dk: u32) -> Self {
        let t = CHUNK * padded(dk);
        let factors = t + CHUNK * padded(CHUNK);
        let v = factors + FACTORS;
        let slices = TRANSITION_THREADS / 32 * WARP_ROWS / SLICE;
        Self { k: 0, t, factors, v, bytes: v + slices * CHUNK * padded(SLICE) }
    }
}

/// The same where four warps multiply together. Matrices are as in scratch.
#[derive(Clone, Copy, Debug)]
pub struct TransitionGroupRoom {
    /// Of a chunk: `[DK, in atoms]`.
    pub k: u32,
    /// An atom.
    pub t: u32,
    /// `[slices][CHUNK][SLICE]`
    pub v: u32,
    /// Bytes of a chunk.
    pub stage: u32,
    /// Behind all chunks: of each the factors.
    pub factors: u32,
    /// Of each the mbarrier at which its copies arrive, then the one at which warps do that need it no more.
    pub landed: u32,
    /// How many bytes all take.
    pub bytes: u32,
}

impl TransitionGroupRoom {
    /// Chunks in shared memory: one that each group of four warps is at, which may be one apart, and the next two.
    pub const STAGES: u32 = 4;

    /// For keys of `dk` numbers.
    #[inline(always)]
    pub const fn new(dk: u32) -> Self {
        let t = dk.div_ceil(CHUNK) * ATOM;
        let v = t + ATOM;
        let stage = v + TRANSITION_THREADS / 32 * WARP_ROWS * CHUNK * 2;
        let factors = Self::STAGES * stage;
        let landed = factors + Self::STAGES * FACTORS;
        Self { k: 0, t, v, stage, factors, landed, bytes: landed + Self::STAGES * 16 }
    }
}

/// What groups of warps that multiply together hand over to each other, in bytes of shared memory; 64 rows
/// each.
#[derive(Clone, Copy, Debug)]
pub struct GroupRoom {
    /// `[DK, in atoms]`, f16.
    pub s: u32,
    /// `[CHUNK]`, f16.
    pub u: u32,
    /// As `u`: outputs on their way out.
    pub o: u32,
    /// `[2]`, f32: what rows of outputs are multiplied with, of a chunk and of the one before.
    pub scales: u32,
    /// Of each stage the factors.
    pub factors: u32,
    /// Of each stage the mbarrier at which its copies arrive.
    pub landed: u32,
    /// Where it ends.
    pub bytes: u32,
}

impl GroupRoom {
    /// For keys of `dk` numbers, from `at` on.
    #[inline(always)]
    pub const fn new(dk: u32, at: u32) -> Self {
        let u = at + dk.div_ceil(CHUNK) * ATOM;
        let o = u + ATOM;
        let scales = o + ATOM;
        let factors = scales + 2 * SCALES;
        let landed = factors + GROUP_STAGES * FACTORS;
        Self { s: at, u, o, scales, factors, landed, bytes: landed + GROUP_STAGES * 8 }
    }
}

/// Bytes of a row of S in shared memory.
#[inline(always)]
pub const fn state_row(dk: u32) -> u32 {
    (dk + 8) * 4
}

/// Bytes of a token's gates in shared memory: those of two tokens side by side lie in other banks.
#[inline(always)]
pub const fn gates_row(dv: u32) -> u32 {
    if dv.is_multiple_of(64) { dv * 2 + 64 } else { dv * 2 }
}

/// Bytes of shared memory of a block of the norm: outputs, what they are multiplied with, weights, gates.
#[inline(always)]
pub const fn norm_bytes(dv: u32) -> u32 {
    dv * (CHUNK * 2 + 8) + CHUNK * gates_row(dv)
}
