//! The names under which the driver finds the kernels, and the same functions on the emulator.

// A build for the device is of one op.
#[allow(unused_imports)]
use crate::{
    decode::{self, BULK, NARROW, PLAIN, PLAIN_TOKENS, Rows, WIDE, args::Args as DecodeArgs, element::F32},
    gpu::{Bf16, F16, K_MAJOR, OTHER_MAJOR},
    prefill::{
        self,
        args::{Args as PrefillArgs, ScanRoom},
    },
    probe, split,
};

/// Kernels of an op: `name(arguments) = function;` or, with shared memory of a size that is known,
/// `name(arguments) shared bytes = function;`, or with where it begins in a register
/// `name(arguments) shared held = function;`. A function takes a GPU and a reference to the arguments.
macro_rules! kernels {
    ($op:literal: $($name:ident($args:ty) $(shared $bytes:tt)? = $run:path;)*) => {$(
        #[cfg(all(target_arch = "nvptx64", op = $op))]
        mod $name {
            use super::*;

            kernels!(@shared $name $($bytes)?);

            /// # Safety
            /// What the function asks that it runs.
            #[unsafe(no_mangle)]
            pub unsafe extern "ptx-kernel" fn $name(args: $args) {
                // SAFETY: the caller's promise.
                unsafe { $run(&crate::gpu::nvptx::Nvptx::<Memory>::new(), &args) }
            }
        }

        /// # Safety
        /// The emulator checks every access.
        // Inlined, so that it is compiled where it is run and nowhere else: all of them take minutes.
        #[cfg(feature = "emulator")]
        #[inline]
        pub unsafe fn $name(gpu: &crate::emulator::Thread<'_>, args: &$args) {
            // SAFETY: the emulator checks every access.
            unsafe { $run(gpu, args) }
        }
    )*};
    (@shared $name:ident) => { type Memory = crate::gpu::nvptx::Dynamic; };
    (@shared $name:ident held) => { type Memory = crate::gpu::nvptx::InRegister; };
    (@shared $name:ident $bytes:literal) => {
        core::arch::global_asm!(concat!(".shared .align 1024 .b8 ", stringify!($name), "_shared[", $bytes, "];"));

        struct Memory;

        impl crate::gpu::nvptx::Shared for Memory {
            #[inline(always)]
            fn find() -> Self {
                Self
            }

            #[inline(always)]
            fn base(&self) -> u32 {
                let base: u32;
                // SAFETY: the address of what is declared above.
                unsafe {
                    core::arch::asm!(concat!("mov.u32 {}, ", stringify!($name), "_shared;"),
                        out(reg32) base, options(pure, nomem, nostack));
                }
                base
            }
        }
    };
}

// Splits and merges, by the bytes of a word and the rows of a thread. The narrow ones, for tensors that are
// not aligned to 16 bytes, take words of any size.
kernels! { "split":
    gdn_split_16x1(split::Args) = split::run::<true, false, 1>;
    gdn_split_16x2(split::Args) = split::run::<true, false, 2>;
    gdn_split_narrow(split::Args) = split::run::<false, false, 4>;
    gdn_merge_16x1(split::Args) = split::run::<true, true, 1>;
    gdn_merge_16x2(split::Args) = split::run::<true, true, 2>;
    gdn_merge_narrow(split::Args) = split::run::<false, true, 4>;
}

// By the dtype of the state and the columns that a row of it has at most. The narrow ones take rows of any
// strides and alignment, and convolutions of any width.
kernels! { "decode":
    gdn_decode_f32_64(DecodeArgs) = decode::run::<Rows<F32, 8, 4, 2, 2, WIDE>>;
    gdn_decode_f32_128(DecodeArgs) = decode::run::<Rows<F32, 8, 4, 4, 2, WIDE>>;
    gdn_decode_f32_256(DecodeArgs) = decode::run::<Rows<F32, 16, 4, 4, 2, WIDE>>;
    gdn_decode_f32_narrow(DecodeArgs) = decode::run::<Rows<F32, 16, 1, 16, 1, NARROW>>;
    gdn_decode_f16_64(DecodeArgs) = decode::run::<Rows<F16, 8, 8, 1, 2, WIDE>>;
    gdn_decode_f16_128(DecodeArgs) = decode::run::<Rows<F16, 8, 8, 2, 2, WIDE>>;
    gdn_decode_f16_256(DecodeArgs) = decode::run::<Rows<F16, 16, 8, 2, 2, WIDE>>;
    gdn_decode_f16_narrow(DecodeArgs) = decode::run::<Rows<F16, 16, 1, 16, 1, NARROW>>;
    gdn_decode_bf16_64(DecodeArgs) = decode::run::<Rows<Bf16, 8, 8, 1, 2, WIDE>>;
    gdn_decode_bf16_128(DecodeArgs) = decode::run::<Rows<Bf16, 8, 8, 2, 2, WIDE>>;
    gdn_decode_bf16_256(DecodeArgs) = decode::run::<Rows<Bf16, 16, 8, 2, 2, WIDE>>;
    gdn_decode_f32_64_plain(DecodeArgs) = decode::run::<Rows<F32, 8, 4, 2, 2, PLAIN>>;
    gdn_decode_f32_96_plain(DecodeArgs) = decode::run::<Rows<F32, 8, 4, 3, 2, PLAIN>>;
    gdn_decode_f32_128_plain(DecodeArgs) = decode::run::<Rows<F32, 8, 4, 4, 2, PLAIN>>;
    gdn_decode_f32_256_plain(DecodeArgs) = decode::run::<Rows<F32, 16, 4, 4, 2, PLAIN>>;
    gdn_decode_bf16_64_plain(DecodeArgs) = decode::run::<Rows<Bf16, 8, 8, 1, 2, PLAIN>>;
    gdn_decode_bf16_96_plain(DecodeArgs) = decode::run::<Rows<Bf16, 4, 8, 3, 1, PLAIN>>;
    gdn_decode_bf16_128_plain(DecodeArgs) = decode::run::<Rows<Bf16, 8, 8, 2, 2, PLAIN>>;
    gdn_decode_bf16_256_plain(DecodeArgs) = decode::run::<Rows<Bf16, 16, 8, 2, 2, PLAIN>>;
    gdn_decode_f32_64_tokens(DecodeArgs) = decode::run::<Rows<F32, 8, 4, 2, 2, PLAIN_TOKENS>>;
    gdn_decode_f32_96_tokens(DecodeArgs) = decode::run::<Rows<F32, 8, 4, 3, 2, PLAIN_TOKENS>>;
    gdn_decode_f32_128_tokens(DecodeArgs) = decode::run::<Rows<F32, 8, 4, 4, 2, PLAIN_TOKENS>>;
    gdn_decode_f32_256_tokens(DecodeArgs) = decode::run::<Rows<F32, 16, 4, 4, 2, PLAIN_TOKENS>>;
    gdn_decode_bf16_64_tokens(DecodeArgs) = decode::run::<Rows<Bf16, 8, 8, 1, 2, PLAIN_TOKENS>>;
    gdn_decode_bf16_96_tokens(DecodeArgs) = decode::run::<Rows<Bf16, 4, 8, 3, 1, PLAIN_TOKENS>>;
    gdn_decode_bf16_128_tokens(DecodeArgs) = decode::run::<Rows<Bf16, 8, 8, 2, 2, PLAIN_TOKENS>>;
    gdn_decode_bf16_256_tokens(DecodeArgs) = decode::run::<Rows<Bf16, 16, 8, 2, 2, PLAIN_TOKENS>>;
    gdn_decode_bf16_128_tokens_large(DecodeArgs) = decode::run::<Rows<Bf16, 8, 8, 2, 4, PLAIN_TOKENS>>;
    gdn_decode_bf16_narrow(DecodeArgs) = decode::run::<Rows<Bf16, 16, 1, 16, 1, NARROW>>;
}

// Of few blocks, by the dtype of the state and a block's rows of it.
kernels! { "decode_few":
    gdn_decode_f32_few_32(DecodeArgs) shared held = decode::few::run::<Rows<F32, 8, 4, 4, 2, BULK>, 1, 1>;
    gdn_decode_f32_few_64(DecodeArgs) shared held = decode::few::run::<Rows<F32, 8, 4, 4, 4, BULK>, 1, 1>;
    gdn_decode_f32_few_128(DecodeArgs) shared held = decode::few::run::<Rows<F32, 8, 4, 4, 2, PLAIN>, 4, 4>;
    gdn_decode_bf16_few_32(DecodeArgs) shared held = decode::few::run::<Rows<Bf16, 8, 8, 2, 2, BULK>, 1, 1>;
    gdn_decode_bf16_few_64(DecodeArgs) shared held = decode::few::run::<Rows<Bf16, 8, 8, 2, 4, BULK>, 1, 1>;
    gdn_decode_bf16_few_128(DecodeArgs) shared held = decode::few::run::<Rows<Bf16, 8, 8, 2, 4, BULK>, 2, 2>;
}

// The convolution by the numbers that a head has at most, and with inputs that come further ahead; the scan by those of a key,
// and by the tiles of S that are in registers.
kernels! { "prefill":
    gdn_prefill_convolve_128(PrefillArgs) = prefill::convolve::run::<16, false, false, _>;
    gdn_prefill_convolve_128_ahead(PrefillArgs) = prefill::convolve::run::<16, false, true, _>;
    gdn_prefill_convolve_256(PrefillArgs) = prefill::convolve::run::<32, false, false, _>;
    gdn_prefill_convolve_any(PrefillArgs) = prefill::convolve::run::<32, true, false, _>;
    gdn_prefill_prepare(PrefillArgs) = prefill::prepare::run;
    gdn_prefill_scan_64(PrefillArgs) = prefill::scan::run::<8, 8, _>;
    gdn_prefill_scan_96(PrefillArgs) = prefill::scan::run::<12, 12, _>;
    gdn_prefill_scan_128(PrefillArgs) = prefill::scan::run::<16, 16, _>;
    gdn_prefill_scan_192(PrefillArgs) = prefill::scan::run::<24, { ScanRoom::own_tiles(192) as usize }, _>;
    gdn_prefill_scan_256(PrefillArgs) = prefill::scan::run::<32, { ScanRoom::own_tiles(256) as usize }, _>;
    gdn_prefill_norm(PrefillArgs) = prefill::norm::run;
    gdn_prefill_transition_64(PrefillArgs) = prefill::transition::run::<8, _>;
    gdn_prefill_transition_96(PrefillArgs) = prefill::transition::run::<12, _>;
    gdn_prefill_transition_128(PrefillArgs) = prefill::transition::run::<16, _>;
    gdn_prefill_combine(PrefillArgs) = prefill::combine::run;
}

// On compute capability 9.0 four warps multiply together.
kernels! { "prefill_wgmma":
    gdn_prefill_scan_group_64(PrefillArgs) = prefill::scan::run_by_group::<8, 1, _>;
    gdn_prefill_scan_group_96(PrefillArgs) = prefill::scan::run_by_group::<12, 2, _>;
    gdn_prefill_scan_group_128(PrefillArgs) = prefill::scan::run_by_group::<16, 2, _>;
    gdn_prefill_transition_group_64(PrefillArgs) = prefill::transition_group::run::<8, 1, _>;
    gdn_prefill_transition_group_96(PrefillArgs) = prefill::transition_group::run::<12, 2, _>;
    gdn_prefill_transition_group_128(PrefillArgs) = prefill::transition_group::run::<16, 2, _>;
}

kernels! { "convergence":
    gdn_convergence_barrier_and_shuffle(probe::Args) = probe::convergence::barrier_and_shuffle;
    gdn_convergence_product(probe::Args) = probe::convergence::product;
    gdn_convergence_matrices(probe::Args) = probe::convergence::matrices;
}

kernels! { "probe":
    gdn_probe_block_sums(probe::Args) = probe::block_sums;
    gdn_probe_block_sums_static(probe::Args) shared 128 = probe::block_sums;
    gdn_probe_lanes(probe::Args) = probe::warp::lanes;
    gdn_probe_pairs_of_warps(probe::Args) = probe::warp::pairs_of_warps;
    gdn_probe_math(probe::Args) = probe::math::functions;
    gdn_probe_logistics(probe::Args) = probe::math::logistics;
    gdn_probe_product_bf16(probe::Args) = probe::tensor_core::product::<Bf16, _>;
    gdn_probe_product_f16(probe::Args) = probe::tensor_core::product::<F16, _>;
    gdn_probe_matrices_bf16(probe::Args) shared 1536 = probe::tensor_core::products_of_matrices::<Bf16, _>;
    gdn_probe_matrices_f16(probe::Args) shared 1536 = probe::tensor_core::products_of_matrices::<F16, _>;
    gdn_probe_pipeline(probe::Args) = probe::async_copy::pipeline;
}

kernels! { "probe_hopper":
    gdn_probe_bulk(probe::Args) = probe::hopper::bulk;
    gdn_probe_cluster(probe::Args) = probe::hopper::cluster;
}

kernels! { "probe_wgmma":
    gdn_probe_wgmma_bf16_n32(probe::Args) = probe::wgmma::product::<Bf16, K_MAJOR, K_MAJOR, 16, _>;
    gdn_probe_wgmma_f16_n64(probe::Args) = probe::wgmma::product::<F16, K_MAJOR, K_MAJOR, 32, _>;
    gdn_probe_wgmma_bf16_n128(probe::Args) = probe::wgmma::product::<Bf16, K_MAJOR, OTHER_MAJOR, 64, _>;
    gdn_probe_wgmma_f16_n128(probe::Args) = probe::wgmma::product::<F16, OTHER_MAJOR, K_MAJOR, 64, _>;
    gdn_probe_wgmma_bf16_n192(probe::Args) = probe::wgmma::product::<Bf16, OTHER_MAJOR, OTHER_MAJOR, 96, _>;
    gdn_probe_wgmma_f16_n256(probe::Args) = probe::wgmma::product::<F16, K_MAJOR, OTHER_MAJOR, 128, _>;
    gdn_probe_wgmma_left_f16_n64(probe::Args) = probe::wgmma::left::<F16, K_MAJOR, 32, _>;
    gdn_probe_wgmma_left_bf16_n128(probe::Args) = probe::wgmma::left::<Bf16, OTHER_MAJOR, 64, _>;
}

/// Not reached: `cargo xtask ptx` refuses PTX that calls a function.
#[cfg(target_arch = "nvptx64")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
