#![doc = include_str!("lib.md")]

mod argument;
mod buf;
mod config;
#[cfg(test)]
mod conformance;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dtype;
mod heads;
mod packing;
pub mod reference;
mod repack;
mod rows;
mod split;
pub mod tiling;
mod view;

pub use argument::{ArgumentError, Because};
pub use buf::{Block, BufError, PackedBuf, Pages, UnpackedBuf};
pub use config::{ConfigError, PRESETS};
pub use cpu::{Cpu, merge, merge_fresh, split, split_fresh};
pub use dtype::Dtype;
pub use heads::Heads;
pub use packing::{FeatureMap, Layout, Packing, Run, Segment};
pub use repack::{Move, Projection, RepackError, WeightMap, repack_weight};
pub use rows::{Rows, RowsMut};
pub use split::Direction;
pub use view::{DeviceAddress, Packed, TENSORS, Unpacked, from_order, in_order};
