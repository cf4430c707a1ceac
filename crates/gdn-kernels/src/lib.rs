//! The device code of `gdn`.
//!
//! A kernel here is an ordinary Rust function, generic over [`gpu::Gpu`]: the grid, the block, and the ways to memory. The stock
//! compiler makes PTX of it (`cargo xtask ptx`), which is committed, embedded below and loaded by the driver; with the feature
//! `emulator` the very same function runs on the host, where every access is checked.
//!
//! | file | holds |
//! |---|---|
//! | `gpu.rs` | what a kernel may ask of a GPU |
//! | `nvptx.rs` | the real thing: the only inline assembly |
//! | `emulator.rs` | the same on the host, for tests |
//! | `split.rs` | the split and its inverse, and the arguments a host hands over |
//! | `probe.rs` | a kernel that uses barriers, shuffles and shared memory, to test both implementations |
//! | `entries.rs` | the names under which the driver finds them |
//!
//! No allocation, no dependencies, no panics: a path that can panic would be a call to a function no driver has.

#![no_std]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx, asm_experimental_arch))]

#[cfg(feature = "emulator")]
pub mod emulator;
#[cfg(target_arch = "nvptx64")]
mod entries;
pub mod gpu;
#[cfg(target_arch = "nvptx64")]
mod nvptx;
pub mod probe;
pub mod split;

/// The kernels for GPUs from compute capability 8.0 on. The driver compiles them for the one it has.
#[cfg(not(target_arch = "nvptx64"))]
pub const PTX_SM_80: &str = include_str!("../ptx/sm_80.ptx");

/// The same kernels for compute capability 9.0 and later, which know programmatic dependent launch.
#[cfg(not(target_arch = "nvptx64"))]
pub const PTX_SM_90: &str = include_str!("../ptx/sm_90.ptx");

/// The kernels of [`probe`], which only tests load.
#[cfg(not(target_arch = "nvptx64"))]
pub const PTX_PROBE: &str = include_str!("../ptx/probe.ptx");
