//! The prefill: any number of tokens of any number of sequences through everything between the layer's two
//! GEMMs, in chunks of 64 tokens, in four kernels for each window of chunks: [`convolve`] and [`prepare`],
//! which need no state, [`scan`], from chunk to chunk, and [`norm`]. Grids depend on N and B alone; which
//! chunk is whose the kernels read from `cu_seqlens`.

pub mod args;
mod chain;
pub mod combine;
pub mod convolve;
mod element;
mod group;
pub mod norm;
mod outputs;
pub mod prepare;
mod rows;
pub mod scan;
mod segment;
mod sequence;
mod states;
mod tiles;
pub mod transition;
pub mod transition_group;
