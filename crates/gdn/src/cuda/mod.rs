//! NVIDIA GPUs: each op as one kernel launch or a few, on the caller's stream and memory.
//!
//! The kernels are Rust, compiled to PTX beforehand, embedded, and compiled by the driver for the device when
//! they are first used ([`Gpu::warmup`]); for compute capability 9.0 machine code is embedded too. Nothing but the driver is needed, and that only when a device is
//! asked for: a build with the feature `cuda` runs everywhere.
//!
//! Layers, each over the one below:
//!
//! | for | call | takes |
//! |---|---|---|
//! | Rust programs | [`split()`], [`merge()`], [`decode()`], [`prefill()`] | views of cudarc's slices, checked and ordered |
//! | tools | [`split_host`], [`merge_host`], [`decode_host`], [`prefill_host`] | the CPU's own views, copied there and back |
//! | engines, other languages | [`Gpu::split_raw`], [`Gpu::merge_raw`], [`Gpu::decode_raw`], [`Gpu::prefill_raw`] | device pointers and a `CUstream` |
//! | all | [`Gpu`], [`devices`] | a device, its context, its kernels |
//!
//! ```no_run
//! use gdn::{Heads, Layout, Packed, Packing, Unpacked, cuda};
//!
//! let layout = Layout::new(Heads::preset("Qwen3-Next-80B-A3B")?, Packing::Interleaved);
//! let (heads, tokens) = (layout.heads, 64);
//! let gpu = cuda::Gpu::new(0)?;
//! let stream = gpu.stream();
//! let qkvz = stream.alloc_zeros::<u16>(tokens * heads.qkvz_features())?;       // bf16 from your GEMM
//! let ba = stream.alloc_zeros::<u16>(tokens * heads.ba_features())?;
//! let mut qkv = stream.alloc_zeros::<u16>(tokens * heads.qkv_features())?;
//! let mut z = stream.alloc_zeros::<u16>(tokens * heads.z_features())?;
//! let mut b = stream.alloc_zeros::<u16>(tokens * heads.num_v_heads())?;
//! let mut a = stream.alloc_zeros::<u16>(tokens * heads.num_v_heads())?;
//! cuda::split(
//!     &layout,
//!     Packed {
//!         mixed_qkvz: cuda::Rows::new(&qkvz, tokens, heads.qkvz_features())?,
//!         mixed_ba: cuda::Rows::new(&ba, tokens, heads.ba_features())?,
//!     },
//!     Unpacked {
//!         mixed_qkv: cuda::RowsMut::new(&mut qkv, tokens, heads.qkv_features())?,
//!         z: cuda::RowsMut::new(&mut z, tokens, heads.z_features())?,
//!         b: cuda::RowsMut::new(&mut b, tokens, heads.num_v_heads())?,
//!         a: cuda::RowsMut::new(&mut a, tokens, heads.num_v_heads())?,
//!     },
//!     &gpu,
//! )?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod bench;
pub(crate) mod decode;
mod device;
mod error;
mod host;
mod launch;
mod module;
pub(crate) mod prefill;
pub(crate) mod segments;
pub(crate) mod share;
mod side;
mod slices;
pub(crate) mod split;
mod staged;
mod views;

pub use bench::Bench;
/// The crate of driver calls whose slices and streams are used here, for programs that need the same version.
pub use cudarc;
pub use decode::{DecodePlan, check_decode, decode, decode_supports};
pub use device::{DeviceInfo, Gpu, devices};
pub use error::CudaError;
pub use prefill::{prefill, prefill_scratch_bytes, prefill_supports};
pub use slices::{Read, Write};
pub use split::{merge, merge_host, split, split_host};
pub use staged::{decode_host, prefill_host};
pub use views::{RawRows, Rows, RowsMut};
