//! Repacking: the permutation of features, applied once to the weights that make them.
//!
//! A weight of an input projection is `[out, hidden]`, a row for each feature of `mixed_qkvz` or `mixed_ba`.
//! Once its rows are in contiguous order the GEMM's own output is `[Q | K | V | Z]` or `[B | A]`, and the
//! split is a view.

use std::ops::Range;

use thiserror::Error;

use crate::{
    argument::{ArgumentError, Because},
    heads::Heads,
    packing::{FeatureMap, Layout, Packing},
    rows::{Rows, RowsMut},
    view::overlap,
};

/// The two input projections of the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Projection {
    /// `in_proj_qkvz`, which makes `mixed_qkvz`.
    Qkvz,
    /// `in_proj_ba`, which makes `mixed_ba`.
    Ba,
}

impl Projection {
    /// Both, in the order of the op's arguments.
    pub const ALL: [Self; 2] = [Self::Qkvz, Self::Ba];

    fn map(self, heads: &Heads) -> FeatureMap {
        let layout = Layout::new(*heads, Packing::Interleaved);
        match self {
            Self::Qkvz => layout.qkvz_map(),
            Self::Ba => layout.ba_map(),
        }
    }

    /// The outputs of the projection, the `out` of its weight `[out, hidden]`.
    pub fn features(self, heads: &Heads) -> usize {
        self.map(heads).features()
    }

    /// The outputs in contiguous order that are its first (`qkv`, `b`) and second (`z`, `a`) tensor.
    pub fn tensors(self, heads: &Heads) -> [Range<usize>; 2] {
        self.map(heads).tensors()
    }
}

/// Why a weight cannot be repacked. Nothing has been written.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RepackError {
    /// A block of rows with one scale would have to get two.
    #[error(
        "block {block} of {size} outputs would be made of outputs {first} and {second}, \
         which have the scales of blocks {first_block} and {second_block}"
    )]
    Block {
        /// Outputs that share a scale.
        size: usize,
        /// The block of the result.
        block: usize,
        /// An output of the weight that goes there.
        first: usize,
        /// The block it was in.
        first_block: usize,
        /// Another output that goes there.
        second: usize,
        /// The block that one was in.
        second_block: usize,
    },
    /// More heads than a tensor of that length can follow.
    #[error("num_k_heads = {num_k_heads}: no tensor of {indices} along the outputs can follow so many heads")]
    Heads {
        /// Key heads given.
        num_k_heads: usize,
        /// Blocks, groups or outputs that the tensor has.
        indices: usize,
    },
    /// Outputs that are packed into one element would have to part.
    #[error(
        "outputs {from}..{end} move to {to}, but every {size} outputs are packed together and cannot part",
        end = from + len
    )]
    Group {
        /// Outputs packed together.
        size: usize,
        /// First output that moves.
        from: usize,
        /// Where it goes.
        to: usize,
        /// How many move with it.
        len: usize,
    },
    /// An argument is wrong: a dim, a shape, the size of elements, or memory that overlaps.
    #[error(transparent)]
    Argument(#[from] ArgumentError),
}

/// Outputs that stay side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// The first one, in the weight there is.
    pub from: usize,
    /// The first one, in the repacked weight.
    pub to: usize,
    /// How many.
    pub len: usize,
}

/// Where each output of a projection's weight goes: what [`repack_weight`] applies.
///
/// A map is made for whole weights, `[out, hidden]` with `out` outputs. From it come those for whatever else
/// has a dim that follows the outputs: [`blocks`](Self::blocks) for scales that several outputs share,
/// [`groups`](Self::groups) for elements that hold several outputs,
/// [`destination_part`](Self::destination_part) and [`source_part`](Self::source_part) where the contiguous
/// side is two tensors. A bias, a scale for each output, or the `B` of a LoRA adapter takes the map as it is.
///
/// ```
/// use gdn::{Heads, Packing, Projection, WeightMap};
/// let heads = Heads::new(16, 32, 128, 128)?;
/// let map = WeightMap::new(&heads, Projection::Qkvz, Packing::Contiguous);
/// assert_eq!((map.sources(), map.destinations(), map.moves().len()), (12288, 12288, 64));
/// // Every segment is a multiple of 128 outputs: 128x128 blocks of fp8 move with their scales.
/// assert_eq!(map.blocks(128)?.destinations(), 96);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightMap {
    /// In the order of `to`, without gaps between what could be one move.
    moves: Vec<Move>,
    sources: usize,
    destinations: usize,
}

/// More heads than any model has. What follows so many has an index for each of them.
const MANY_HEADS: usize = 1 << 16;

impl WeightMap {
    /// To `to` from the other packing.
    pub fn new(heads: &Heads, projection: Projection, to: Packing) -> Self {
        let map = projection.map(heads);
        let moves = map.segments().map(|segment| match to {
            Packing::Contiguous => Move { from: segment.packed, to: segment.unpacked, len: segment.len },
            Packing::Interleaved => Move { from: segment.unpacked, to: segment.packed, len: segment.len },
        });
        Self::of(moves.collect(), map.features(), map.features())
    }

    /// The same for a tensor with so many `indices` along the outputs: rows of a weight, blocks of scales,
    /// packed elements. Heads often come out of files, and a map takes memory for each of them: what no
    /// tensor of that length can follow is refused first.
    ///
    /// # Errors
    /// [`RepackError::Heads`].
    pub fn for_indices(
        heads: &Heads,
        projection: Projection,
        to: Packing,
        indices: usize,
    ) -> Result<Self, RepackError> {
        let num_k_heads = heads.num_k_heads();
        if num_k_heads > indices.max(MANY_HEADS) {
            return Err(RepackError::Heads { num_k_heads, indices });
        }
        Ok(Self::new(heads, projection, to))
    }

    /// Sorts moves by `to` and joins what stays side by side.
    fn of(mut moves: Vec<Move>, sources: usize, destinations: usize) -> Self {
        moves.retain(|m| m.len > 0);
        moves.sort_unstable_by_key(|m| m.to);
        moves.dedup_by(|next, last| {
            let joined = last.from + last.len == next.from && last.to + last.len == next.to;
            last.len += if joined { next.len } else { 0 };
            joined
        });
        Self { moves, sources, destinations }
    }

    /// The outputs of the weight there is.
    pub fn sources(&self) -> usize {
        self.sources
    }

    /// The outputs of the repacked weight.
    pub fn destinations(&self) -> usize {
        self.destinations
    }

    /// Every move, in the order of the repacked weight.
    pub fn moves(&self) -> &[Move] {
        &self.moves
    }

    /// The map to a weight that has the outputs `part` alone: `in_proj_z` out of `in_proj_qkvz`.
    ///
    /// What lies past the last output counts for nothing.
    ///
    /// ```
    /// use gdn::{Heads, Packing, Projection, WeightMap};
    /// let heads = Heads::new(2, 2, 1, 1)?;                    // for each of two heads q k v z
    /// let [qkv, z] = Projection::Qkvz.tensors(&heads);
    /// let map = WeightMap::new(&heads, Projection::Qkvz, Packing::Contiguous).destination_part(z);
    /// let from: Vec<usize> = map.moves().iter().map(|m| m.from).collect();
    /// assert_eq!((from, map.destinations()), (vec![3, 7], 2));
    /// # Ok::<(), gdn::ArgumentError>(())
    /// ```
    pub fn destination_part(&self, part: Range<usize>) -> Self {
        let (start, end) = (part.start, part.end.min(self.destinations));
        let cut = self.moves.iter().map(|&Move { from, to, len }| {
            let (first, last) = (to.max(start), (to + len).min(end));
            Move { from: from + (first - to), to: first - start, len: last.saturating_sub(first) }
        });
        Self::of(cut.collect(), self.sources, end.saturating_sub(start))
    }

    /// The map from a weight that has the outputs `part` alone: what `in_proj_z` gives to `in_proj_qkvz`. It
    /// fills some of the outputs; the other part's map fills the rest.
    ///
    /// What lies past the last output counts for nothing.
    pub fn source_part(&self, part: Range<usize>) -> Self {
        let swap = |map: &Self| {
            let moves = map.moves.iter().map(|&Move { from, to, len }| Move { from: to, to: from, len });
            Self::of(moves.collect(), map.destinations, map.sources)
        };
        swap(&swap(self).destination_part(part))
    }

    /// The map of scales that `size` outputs share, the last block perhaps by fewer: fp8's `weight_scale_inv`
    /// with blocks of 128.
    ///
    /// # Errors
    /// [`RepackError::Block`] where outputs of two blocks would come to lie in one; [`RepackError::Argument`]
    /// for a size of 0.
    pub fn blocks(&self, size: usize) -> Result<Self, RepackError> {
        if size == 0 {
            return Err(ArgumentError::Zero { argument: "size" }.into());
        }
        // For each block of the result, the first output seen that goes there.
        let mut origin: Vec<Option<usize>> = vec![None; self.destinations.div_ceil(size)];
        for m in &self.moves {
            // Outputs that lie in one block before and after.
            let mut done = 0;
            while done < m.len {
                let (from, to) = (m.from + done, m.to + done);
                let first = *origin[to / size].get_or_insert(from);
                if first / size != from / size {
                    return Err(RepackError::Block {
                        size,
                        block: to / size,
                        first,
                        first_block: first / size,
                        second: from,
                        second_block: from / size,
                    });
                }
                done += (size - from % size).min(size - to % size).min(m.len - done);
            }
        }
        let moves = origin.iter().enumerate();
        let moves = moves.filter_map(|(to, from)| from.map(|from| Move { from: from / size, to, len: 1 }));
        Ok(Self::of(moves.collect(), self.sources.div_ceil(size), self.destinations.div_ceil(size)))
    }

    /// The map of elements that each hold `size` outputs: the eight 4-bit numbers in an `int32` of GPTQ's
    /// `qzeros` or of AWQ's `qweight`.
    ///
    /// # Errors
    /// [`RepackError::Group`] where such outputs would part; [`RepackError::Argument`] for a size of 0.
    pub fn groups(&self, size: usize) -> Result<Self, RepackError> {
        if size == 0 {
            return Err(ArgumentError::Zero { argument: "size" }.into());
        }
        for &Move { from, to, len } in &self.moves {
            if !(from.is_multiple_of(size) && to.is_multiple_of(size) && len.is_multiple_of(size)) {
                return Err(RepackError::Group { size, from, to, len });
            }
        }
        let moves =
            self.moves.iter().map(|m| Move { from: m.from / size, to: m.to / size, len: m.len / size });
        Ok(Self::of(moves.collect(), self.sources / size, self.destinations / size))
    }
}

/// Repacks a weight in memory: outputs are rows (`dim = 0`, `[out, hidden]`) or columns (`dim = 1`, `[hidden,
/// out]`).
///
/// Elements are opaque, of any size. A vector over the outputs (a bias, a scale for each) is a weight of one
/// column. What `map` does not fill (see [`WeightMap::source_part`]) stays as it is. Of a tensor-parallel
/// rank's weight the map is that of the rank's [heads](Heads::shard): the shard of a repacked weight equals
/// the repacked shard.
///
/// ```
/// use gdn::{Heads, Packing, Projection, Rows, RowsMut, WeightMap, repack_weight};
/// let heads = Heads::new(2, 2, 1, 1)?;                        // for each of two heads q k v z
/// let map = WeightMap::new(&heads, Projection::Qkvz, Packing::Contiguous);
/// let weight: Vec<f32> = (0..8 * 3).map(|i| (i / 3) as f32).collect();        // eight outputs, hidden size 3
/// let mut repacked = vec![0f32; 8 * 3];
/// repack_weight(&map, 0, Rows::new(&weight, 8, 3)?, RowsMut::new(&mut repacked, 8, 3)?)?;
/// let order: Vec<f32> = repacked.chunks(3).map(|row| row[0]).collect();
/// assert_eq!(order, [0., 4., 1., 5., 2., 6., 3., 7.]);        // q q k k v v z z
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`RepackError::Argument`], before anything is written.
pub fn repack_weight(
    map: &WeightMap,
    dim: usize,
    from: Rows<'_>,
    mut to: RowsMut<'_>,
) -> Result<(), RepackError> {
    let outputs = || Because::Need("the outputs".to_owned());
    let like_from = || Because::Argument("from");
    let check = |argument, unit, got, expected, because: &dyn Fn() -> Because| match got == expected {
        true => Ok(()),
        false => Err(ArgumentError::Length { argument, unit, got, expected, because: because() }),
    };
    match dim {
        0 => {
            check("from", "rows", from.num_rows(), map.sources, &outputs)?;
            check("to", "rows", to.num_rows(), map.destinations, &outputs)?;
            check("to", "columns", to.features(), from.features(), &like_from)?;
        }
        1 => {
            check("from", "columns", from.features(), map.sources, &outputs)?;
            check("to", "rows", to.num_rows(), from.num_rows(), &like_from)?;
            check("to", "columns", to.features(), map.destinations, &outputs)?;
        }
        _ => {
            let (got, expected) = (dim.to_string(), "0 or 1".to_owned());
            return Err(ArgumentError::Value { argument: "dim", got, expected }.into());
        }
    }
    let size = from.element_size();
    if to.element_size() != size {
        let got = to.element_size();
        return Err(ArgumentError::ElementSize { argument: "to", got, other: "from", expected: size }.into());
    }
    if let Some((address, bytes)) = overlap(&to.view, &from.view) {
        return Err(ArgumentError::Overlap { argument: "to", other: "from", address, bytes }.into());
    }
    if dim == 0 {
        for i in map.moves.iter().flat_map(|m| (0..m.len).map(|i| (m.from + i, m.to + i))) {
            if let Some(source) = from.row(i.0) {
                to.write(i.1, 0, source)?;
            }
        }
    } else {
        for n in 0..from.num_rows() {
            if let Some(source) = from.row(n) {
                for m in &map.moves {
                    to.write(n, m.to * size, &source[m.from * size..][..m.len * size])?;
                }
            }
        }
    }
    Ok(())
}
