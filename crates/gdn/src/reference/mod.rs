//! The oracles, slow and obvious: tests and benchmarks hold every backend to them, and `gdn verify` files;
//! nothing else uses them.

pub mod layer;
mod split;

pub use split::{Place, check, place_of_ba, place_of_qkvz};
