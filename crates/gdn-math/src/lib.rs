//! The arithmetic that the CPU and the GPU share: numbers in, numbers out, no memory.
//!
//! Everything is written once over [`Lanes`]: a register of f32 on the CPU, one f32 of one thread on a GPU.
//! Each formula is a fixed sequence of correctly rounded operations (add, multiply, fused multiply-add,
//! divide, square root), which a compiler may not reorder, so the same inputs give the same bits on every
//! instruction set and on a GPU. Sums over a head are the caller's: their order differs from machine to
//! machine.
//!
//! | file | holds |
//! |---|---|
//! | `lanes.rs` | [`Lanes`]: what a register of f32 must be able to do, and one f32 as the simplest of them |
//! | `element.rs` | bf16 and f16 to and from f32, by their bits |
//! | `special.rs` | exp, log1p, sigmoid, silu, softplus |
//! | `quick.rs` | exp and inverse root for what is rounded to 16 bits afterwards |
//! | `straight.rs` | [`Straight`]: an f32 that divides and takes roots without a branch, with the same bits |
//! | `layer.rs` | the formulas of the layer: decay, beta, convolution, the delta rule's step, the two norms |
//!
//! No dependencies. On the host it uses `std` for one thing, the fused multiply-add of an f32.

#![no_std]
#![cfg_attr(target_arch = "nvptx64", feature(core_intrinsics), allow(internal_features))]

#[cfg(not(target_arch = "nvptx64"))]
extern crate std;

pub mod element;
mod lanes;
pub mod layer;
pub mod quick;
pub mod special;
mod straight;

pub use lanes::Lanes;
pub use straight::Straight;
