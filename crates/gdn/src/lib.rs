#![doc = include_str!("lib.md")]

mod buf;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod heads;
mod packing;
pub mod reference;
mod repack;
mod rows;
mod split;
pub mod tiling;

pub use buf::{Block, BufError, PackedBuf, Pages, UnpackedBuf};
pub use cpu::Cpu;
pub use heads::{Heads, HeadsError, PRESETS};
pub use packing::{FeatureMap, Layout, Packing, Run, Segment, UnknownPacking};
pub use repack::{Move, Projection, RepackError, WeightMap, repack_weight};
pub use rows::{Rows, RowsError, RowsMut};
pub use split::{
    Packed, PackedMut, SplitError, Unpacked, UnpackedMut, merge, merge_fresh, split, split_fresh,
};
