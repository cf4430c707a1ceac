//! The names under which the driver finds the kernels, and the panic handler that none of them reaches.

/// Splits and merges, by the bytes of a word and the rows of a thread: `gdn_split_16x2`. The narrow ones, for tensors that are not
/// aligned to 16 bytes, take words of any size.
#[cfg(not(probe))]
mod splits {
    use crate::{nvptx::Nvptx, split};

    macro_rules! entries {
        ($($name:ident: $wide:literal, $merge:literal, $rows:literal;)*) => {$(
            /// # Safety
            /// What [`split::run`] asks.
            #[unsafe(no_mangle)]
            pub unsafe extern "ptx-kernel" fn $name(args: split::Args) {
                // SAFETY: the caller's promise.
                unsafe { split::run::<$wide, $merge, $rows>(&Nvptx, &args) }
            }
        )*};
    }

    entries! {
        gdn_split_16x1: true, false, 1;
        gdn_split_16x2: true, false, 2;
        gdn_split_narrow: false, false, 4;
        gdn_merge_16x1: true, true, 1;
        gdn_merge_16x2: true, true, 2;
        gdn_merge_narrow: false, true, 4;
    }
}

/// # Safety
/// What [`crate::probe::block_sums`] asks.
#[cfg(probe)]
#[unsafe(no_mangle)]
pub unsafe extern "ptx-kernel" fn gdn_probe_block_sums(from: u64, to: u64) {
    // SAFETY: the caller's promise.
    unsafe { crate::probe::block_sums(&crate::nvptx::Nvptx, from, to) }
}

/// Not reached: `cargo xtask ptx` refuses PTX that calls a function.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
