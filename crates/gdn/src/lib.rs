#![doc = include_str!("lib.md")]

// Tests of the crate share files with those outside it.
#[cfg(test)]
extern crate self as gdn;

mod argument;
mod buf;
mod config;
#[cfg(test)]
mod conformance;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod decode;
mod dtype;
mod heads;
mod layer;
mod overlap;
mod packing;
mod prefill;
pub mod reference;
mod repack;
mod rows;
mod split;
mod state;
mod tensor;
pub mod tiling;
mod view;

pub use argument::{ArgumentError, Because};
pub use buf::{Block, BufError, PackedBuf, Pages, UnpackedBuf};
pub use config::{ConfigError, PRESETS};
pub use cpu::{CheckedDecode, Cpu, decode, merge, merge_fresh, prefill, split, split_fresh};
pub use decode::{Decode, MAX_TOKENS};
pub use dtype::Dtype;
pub use heads::Heads;
pub use layer::{Gate, Layer, MAX_CONV_WIDTH, Projections, Weights};
pub use packing::{FeatureMap, Layout, Packing, Run, Segment};
pub use prefill::{CHUNK, Checkpoints, Prefill};
pub use repack::{Move, Projection, RepackError, WeightMap, repack_weight};
pub use rows::{Rows, RowsMut};
pub use split::Direction;
pub use state::{ConvState, Keep, RecurrentState, Slots};
pub use tensor::{Element, Exclusive, Index, IndexType, Indices, Shared, Space, Tensor};
pub use view::{DeviceAddress, Packed, TENSORS, Unpacked, from_order, in_order};
