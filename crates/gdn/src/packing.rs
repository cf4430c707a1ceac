//! [`Packing`] and [`FeatureMap`]: the permutation of features that split, merge and repacking all follow.

use std::{fmt, ops::Range, str::FromStr};

use crate::{argument::ArgumentError, heads::Heads};

/// How the input projections of the layer lay out one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Packing {
    /// Qwen3-Next: for each key head `[q: DK | k: DK | v: R*DV | z: R*DV]` and `[b: R | a: R]`.
    Interleaved,
    /// Qwen3.5 and Qwen3.6: `[Q: HK*DK | K: HK*DK | V: HV*DV | Z: HV*DV]` and `[B: HV | A: HV]`.
    Contiguous,
}

impl Packing {
    /// Both, in the order of their appearance.
    pub const ALL: [Self; 2] = [Self::Interleaved, Self::Contiguous];

    /// `"interleaved"` or `"contiguous"`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Interleaved => "interleaved",
            Self::Contiguous => "contiguous",
        }
    }
}

impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Packing {
    type Err = ArgumentError;

    fn from_str(name: &str) -> Result<Self, ArgumentError> {
        Self::ALL
            .into_iter()
            .find(|packing| packing.name() == name)
            .ok_or_else(|| ArgumentError::unknown_name("packing", name, "'interleaved' or 'contiguous'"))
    }
}

/// What one row of the packed tensors looks like: the heads and how they are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// The four numbers.
    pub heads: Heads,
    /// The order of the features.
    pub packing: Packing,
}

impl Layout {
    /// Both parts together.
    pub fn new(heads: Heads, packing: Packing) -> Self {
        Self { heads, packing }
    }

    /// The map from a row of `mixed_qkvz` to a row of `mixed_qkv` followed by a row of `z`.
    pub fn qkvz_map(&self) -> FeatureMap {
        let dk = self.heads.head_k_dim();
        let r_dv = self.heads.ratio() * self.heads.head_v_dim();
        self.map(&[dk, dk, r_dv, r_dv], self.heads.qkv_features())
    }

    /// The map from a row of `mixed_ba` to a row of `b` followed by a row of `a`.
    pub fn ba_map(&self) -> FeatureMap {
        let r = self.heads.ratio();
        self.map(&[r, r], self.heads.num_v_heads())
    }

    /// `kinds` are the features of each kind that one key head has, in the order of the packed row; unpacked,
    /// each kind has all its heads side by side. `boundary` is where the second tensor begins there.
    #[inline(always)]
    fn map(&self, kinds: &[usize], boundary: usize) -> FeatureMap {
        let hk = self.heads.num_k_heads();
        let head: usize = kinds.iter().sum();
        let mut map = FeatureMap {
            runs: [Run::NONE; 4],
            used: 0,
            count: 1,
            packed_step: 0,
            features: hk * head,
            boundary,
        };
        let mut before = 0;
        if self.packing == Packing::Interleaved && hk > 1 {
            (map.count, map.packed_step) = (hk, head);
            for &len in kinds {
                map.runs[map.used] = Run { packed: before, unpacked: hk * before, len };
                map.used += 1;
                before += len;
            }
        } else {
            // Both rows are in the same order: one segment for each tensor.
            for end in [boundary, map.features] {
                map.runs[map.used] = Run { packed: before, unpacked: before, len: end - before };
                map.used += 1;
                before = end;
            }
        }
        map
    }
}

/// The segments of one kind (queries, keys, values, gates), [`FeatureMap::count`] of them and all of `len`
/// features. Segment `i` ties the features from `packed + i * packed_step` on to those from `unpacked + i *
/// len` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First feature of segment 0 in the packed row.
    pub packed: usize,
    /// First feature of segment 0 in the unpacked row.
    pub unpacked: usize,
    /// Features of one segment.
    pub len: usize,
}

impl Run {
    const NONE: Self = Self { packed: 0, unpacked: 0, len: 0 };
}

/// One stretch of features that lies in one piece on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First feature in the packed row.
    pub packed: usize,
    /// First feature in the unpacked row.
    pub unpacked: usize,
    /// How many features.
    pub len: usize,
}

/// The bijection between the features of a packed row and those of the unpacked row, as coalesced segments.
///
/// The unpacked row is two tensors' rows one after the other: `[mixed_qkv | z]` or `[b | a]`. No segment
/// crosses from one into the other. Split reads the segments from packed to unpacked, merge from unpacked to
/// packed, and repacking a checkpoint applies them once to the rows of a weight. As heads are all alike, the
/// segments come as at most four [`Run`]s, whatever the number of heads: a map is a small `Copy` value, and
/// making one allocates nothing.
///
/// ```
/// use gdn::{Heads, Layout, Packing};
/// let heads = Heads::new(16, 32, 128, 128)?;
/// assert_eq!(Layout::new(heads, Packing::Interleaved).qkvz_map().segments().count(), 64);
/// assert_eq!(Layout::new(heads, Packing::Contiguous).qkvz_map().segments().count(), 2);
/// # Ok::<(), gdn::ArgumentError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureMap {
    runs: [Run; 4],
    used: usize,
    count: usize,
    packed_step: usize,
    features: usize,
    boundary: usize,
}

impl FeatureMap {
    /// Features of a row, the same number on both sides.
    pub fn features(&self) -> usize {
        self.features
    }

    /// The features of the unpacked row that make up its first (`mixed_qkv`, `b`) and second (`z`, `a`)
    /// tensor.
    pub fn tensors(&self) -> [Range<usize>; 2] {
        [0..self.boundary, self.boundary..self.features]
    }

    /// The runs, in the order of both rows.
    pub fn runs(&self) -> &[Run] {
        &self.runs[..self.used]
    }

    /// Segments of each run: the key heads, or 1 where every kind is in one piece already.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Features from a segment of a run to the next in the packed row: those of all kinds of one key head.
    pub fn packed_step(&self) -> usize {
        self.packed_step
    }

    /// Every segment, in the order of the unpacked row.
    pub fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        self.runs().iter().flat_map(move |&Run { packed, unpacked, len }| {
            (0..self.count).map(move |i| Segment {
                packed: packed + i * self.packed_step,
                unpacked: unpacked + i * len,
                len,
            })
        })
    }
}
