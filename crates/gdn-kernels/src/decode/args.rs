//! What the host hands over to the decode, and the layout of shared memory.

use crate::split::Divisor;

/// f32, f16, bf16: the number of a dtype in these arguments.
pub const F32: u32 = 0;
/// See [`F32`].
pub const F16: u32 = 1;
/// See [`F32`].
pub const BF16: u32 = 2;

/// One of q, k, v, z, b, a in the projections: for each key head a stretch of features, row by row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Field {
    /// The first key head's features in row 0.
    pub address: u64,
    /// Bytes from a row to the next.
    pub row_stride: u64,
    /// Bytes from a key head's features to the next one's.
    pub head_step: u64,
    /// [`F32`], [`F16`] or [`BF16`].
    pub dtype: u32,
}

/// A vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Vector {
    /// 0: there is none.
    pub address: u64,
    /// Bytes from an element to the next.
    pub stride: u64,
    /// As in [`Field`].
    pub dtype: u32,
}

/// A tensor of D dims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Strided<const D: usize> {
    /// Its first element.
    pub address: u64,
    /// Bytes from an element to the next, for each dim.
    pub strides: [u64; D],
    /// As in [`Field`].
    pub dtype: u32,
}

/// Whole numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Indices {
    /// 0: there are none.
    pub address: u64,
    /// Bytes from a sequence's to the next one's.
    pub row: u64,
    /// Bytes from a column to the next.
    pub column: u64,
    /// Bytes of one: 8, 4 or 1 (without a sign).
    pub size: u32,
}

/// Where states are kept: `D` strides, of slot, token, and those within a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Kept<const D: usize> {
    /// Where to.
    pub to: Strided<D>,
    /// Its slots.
    pub slots: i64,
    /// [`NOTHING`] to [`EACH_IN`].
    pub kind: u32,
    /// Of all but [`NOTHING`] and [`LAST`]: of a sequence and, with [`EACH`], a token.
    pub indices: Indices,
}

/// Nothing is kept.
pub const NOTHING: u32 = 0;
/// The last state, where it was read.
pub const LAST: u32 = 1;
/// The last state, in slot `indices[r]`.
pub const LAST_AT: u32 = 2;
/// The state after token t, in slot `state_indices[r, t]`.
pub const EACH: u32 = 3;
/// The state after token t, at `[indices[r], t]` of another tensor, or `[r, t]` without indices.
pub const EACH_IN: u32 = 4;

/// What the host hands over.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
#[allow(non_snake_case, reason = "the name that the field has in every checkpoint and engine")]
pub struct Args {
    /// By HK.
    pub num_k_heads: Divisor,
    /// By the blocks of a cluster.
    pub cluster: Divisor,
    /// By the blocks that compute one v head.
    pub head_blocks: Divisor,
    /// By the warps of a block that compute one v head.
    pub head_warps: Divisor,
    /// By the rows of a v head that are a block's.
    pub block_rows: Divisor,
    /// DK.
    pub dk: u32,
    /// DV.
    pub dv: u32,
    /// R.
    pub ratio: u32,
    /// T.
    pub tokens: u32,
    /// W.
    pub conv_width: u32,
    /// v heads of a key head that a block computes at a time.
    pub pass_heads: u32,
    /// v heads of a key head that are a block's: with more than one block they are computed all at once.
    pub block_heads: u32,
    /// Pieces of rows that a warp computes, one after the other.
    pub steps: u32,
    /// Whether the gate is a sigmoid rather than a silu.
    pub sigmoid: u32,
    /// See `Layer`.
    pub l2norm_eps: f32,
    /// See `Layer`.
    pub norm_eps: f32,
    /// See `Layer`.
    pub scale: f32,
    /// See `Layer`.
    pub beta_scale: f32,
    /// Columns of `state_indices`.
    pub index_columns: u32,
    /// The most that `num_accepted_tokens` can say.
    pub most_accepted: u32,
    /// Columns of `conv_state`.
    pub conv_columns: u32,
    /// A negative index is padding, and so is this one.
    pub pad_slot_id: i64,
    /// The projections.
    pub q: Field,
    /// Keys lie like queries: so many bytes behind them (which may wrap).
    pub k_behind_q: u64,
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
    /// `[slots, C, columns]`
    pub conv_state: Strided<3>,
    /// Slots of `conv_state`.
    pub conv_slots: i64,
    /// Which windows are kept: slot, token, channel, column.
    pub conv_kept: Kept<4>,
    /// `[slots, HV, DV, DK]`
    pub state: Strided<4>,
    /// Slots of `state`.
    pub slots: i64,
    /// Which states are kept: slot, token, head, row, column.
    pub kept: Kept<5>,
    /// Where things are in shared memory.
    pub room: Room,
    /// `[B, index_columns]`
    pub state_indices: Indices,
    /// `[B]`
    pub num_accepted_tokens: Indices,
}

/// Where things are in a block's shared memory, in bytes. Sizes of a token; what is not said to be something
/// else is f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Room {
    /// `[padded]`: keys, as the convolution leaves them, and zeros behind.
    pub k: u32,
    /// `[padded]`: queries.
    pub q: u32,
    /// `[heads * block_rows]`: values.
    pub v: u32,
    /// `[heads * block_rows]`: outputs, before the norm.
    pub o: u32,
    /// Bytes of a token's values, or outputs.
    pub rows_bytes: u32,
    /// `[heads][head_pieces]`: sums of the outputs' squares, of each piece of whole heads.
    pub sums: u32,
    /// Bytes of a head's sums, zeros behind included.
    pub head_sums: u32,
    /// Bytes of a token's sums.
    pub sums_bytes: u32,
    /// `[3][8]`: sums of `q * q`, `k * k` and `q * k`, of 32 channels each.
    pub squares: u32,
    /// `[heads]`: decay, beta, and where the state goes, 16 bytes.
    pub gates: u32,
    /// Of all tokens, in a cluster or where there are several: `[3][2 * padded + heads * block_rows]`,
    /// windows that are kept when all have been read.
    pub windows: u32,
    /// Bytes of a column of these.
    pub column_bytes: u32,
    /// Besides, 16 bytes: where the windows go.
    pub last: u32,
    /// Where rows of S land.
    pub landing: u32,
    /// How many bytes all take.
    pub bytes: u32,
}

/// What a [`Room`] is for.
#[derive(Clone, Copy, Debug)]
pub struct RoomFor {
    /// T.
    pub tokens: u32,
    /// Numbers of a query or key, with the zeros behind it.
    pub padded: u32,
    /// Rows of which the outputs' squares are added up by themselves.
    pub sum_rows: u32,
    /// DV.
    pub dv: u32,
    /// v heads at a time, and rows of each.
    pub heads: u32,
    /// See `heads`.
    pub block_rows: u32,
    /// Warps, and bytes of shared memory in which the pieces of each land.
    pub warps: u32,
    /// See `warps`.
    pub landing: u32,
    /// Blocks of a cluster.
    pub blocks: u32,
}

/// Groups of 32 channels of a key, at most.
pub const GROUPS: u32 = 8;

impl Room {
    /// Room for this.
    pub const fn new(of: RoomFor) -> Self {
        let RoomFor { tokens, padded, sum_rows, dv, heads, block_rows, warps, landing, blocks } = of;
        let k_bytes = padded * 4;
        let rows_bytes = (heads * block_rows * 4 + 15) & !15;
        let head_sums = (dv.div_ceil(sum_rows) * 4 + 15) & !15;
        let sums_bytes = heads * head_sums;
        let q = tokens * k_bytes;
        let v = q + tokens * k_bytes;
        let o = v + tokens * rows_bytes;
        let sums = o + tokens * rows_bytes;
        let squares = sums + tokens * sums_bytes;
        let gates = squares + tokens * 3 * GROUPS * 4;
        let windows = gates + tokens * heads * 16;
        let column_bytes = 2 * k_bytes + rows_bytes;
        let last = windows + 3 * column_bytes;
        let start = if blocks > 1 || tokens > 1 { last + 16 } else { windows };
        Self {
            k: 0,
            q,
            v,
            o,
            rows_bytes,
            sums,
            head_sums,
            sums_bytes,
            squares,
            gates,
            windows,
            column_bytes,
            last,
            landing: start,
            bytes: start + warps * landing,
        }
    }
}
