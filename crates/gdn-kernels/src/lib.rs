//! The device code of `gdn`.
//!
//! A kernel here is an ordinary Rust function, generic over what it asks of a GPU ([`gpu`]). The stock
//! compiler makes PTX of it (`cargo xtask ptx`), which is committed, embedded and loaded by the driver; with
//! the feature `emulator` the very same function runs on the host, where every access is checked.
//!
//! | file | holds |
//! |---|---|
//! | `gpu/` | what a kernel may ask of a GPU, by capability |
//! | `gpu/nvptx/` | the real thing: the only inline assembly |
//! | `gpu/emulator/` | the same on the host, for tests |
//! | `split.rs` | the split and its inverse, and the arguments a host hands over |
//! | `decode/` | the decode: convolution, gates, delta rule and gated norm in one launch |
//! | `prefill/` | the prefill: whole sequences in chunks, as products on tensor cores |
//! | `probe/` | kernels that use each capability, to test both implementations |
//! | `entries.rs` | the names under which the driver finds them |
//! | `modules.rs` | the table of kernels: what they are compiled for, and what must hold of each |
//!
//! No allocation, no dependencies, no panics: a path that can panic would be a call to a function no driver
//! has.

#![no_std]
#![cfg_attr(
    target_arch = "nvptx64",
    feature(abi_ptx, asm_experimental_arch, link_llvm_intrinsics),
    allow(internal_features)
)]

#[cfg(feature = "emulator")]
extern crate std;

pub mod decode;
#[cfg(any(feature = "emulator", target_arch = "nvptx64"))]
pub mod entries;
pub mod gpu;
pub mod prefill;
pub mod probe;
pub mod split;

#[cfg(feature = "emulator")]
pub use gpu::emulator;

/// The PTX in a file.
#[cfg(not(target_arch = "nvptx64"))]
macro_rules! text {
    ($file:literal) => {
        include_str!(concat!("../ptx/", $file))
    };
}

/// The machine's code in a file.
#[cfg(not(target_arch = "nvptx64"))]
macro_rules! code {
    ($file:literal) => {
        include_bytes!(concat!("../ptx/", $file))
    };
}

#[cfg(not(target_arch = "nvptx64"))]
pub mod modules;
