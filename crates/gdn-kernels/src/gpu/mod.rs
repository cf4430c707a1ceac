//! What a kernel may ask of the machine it runs on, by capability.
//!
//! | trait | gives | from |
//! |---|---|---|
//! | [`Gpu`] | indices, the barrier, global and shared memory | compute capability 8.0 |
//! | [`Warp`] | what the 32 lanes of a warp do together | 8.0 |
//! | [`AsyncCopy`] | copies from global to shared memory that run on while the thread goes on | 8.0 |
//! | [`TensorCore`] | products of small matrices by a warp | 8.0 |
//! | [`Hopper`] | mbarriers, bulk copies, clusters | 9.0 |
//! | [`Wgmma`] | products of larger matrices by four warps | 9.0 alone |
//!
//! Each has two implementations, in files of the same names: `nvptx/` is the real thing, `emulator/` the
//! host.

mod async_copy;
#[cfg(feature = "emulator")]
pub mod emulator;
mod hopper;
#[cfg(target_arch = "nvptx64")]
pub(crate) mod nvptx;
mod tensor_core;
mod warp;
mod wgmma;

pub use async_copy::AsyncCopy;
pub use hopper::{EMPTY, Hopper};
pub use tensor_core::{Bf16, F16, Float16, TensorCore};
pub use warp::Warp;
pub use wgmma::{Accumulators, K_MAJOR, Lefts, OTHER_MAJOR, Operand, Swizzle, Wgmma};

/// One thread's view of a GPU. Kernels take `&impl Gpu`; on the real thing every method is an instruction or
/// two.
///
/// Addresses of global memory are plain numbers, as the host hands them over. Shared memory is one block of
/// bytes for each thread block, addressed from 0, which is a multiple of 1024 bytes.
pub trait Gpu {
    /// This thread within its block.
    fn thread(&self) -> u32;
    /// Threads of a block.
    fn threads(&self) -> u32;
    /// This block within the grid: x, y, z.
    fn block(&self) -> [u32; 3];
    /// This block within the grid along x, asked for anew: nothing that comes of it is what was computed
    /// before and held in registers.
    fn block_anew(&self) -> u32;
    /// Blocks of the grid: x, y, z.
    fn blocks(&self) -> [u32; 3];

    /// Waits until every thread of the block is here. What they wrote before, all can read after. All threads
    /// must come.
    fn barrier(&self);
    /// Waits at one of the barriers 1 to 15 until `threads` threads of the block are there, a multiple of 32;
    /// whole warps come. Different numbers of threads at one barrier, or warps that come twice, are mistakes.
    fn barrier_of(&self, number: u32, threads: u32);
    /// Is one of the `threads` at a barrier 1 to 15, and goes on: those that wait there
    /// ([`Gpu::barrier_of`], with the same number) see what this thread did before. A warp arrives again only
    /// when the barrier has opened.
    fn barrier_arrive(&self, number: u32, threads: u32);

    /// From here on the next kernel of the stream may start its blocks, if it was launched to do so; it sees
    /// what this one writes only after its own [`Gpu::wait_for_previous`].
    fn let_next_start(&self);
    /// Waits until the kernel before this one in the stream is done and its writes are seen. Where this
    /// kernel was launched the ordinary way there is nothing to wait for.
    fn wait_for_previous(&self);

    /// The f32 of an f16. Of a NaN it is not said which.
    fn f32_of_f16(&self, bits: u16) -> f32;
    /// Two numbers to the nearest f16, ties to even, the first in the low half. NaN becomes 0x7fff.
    fn f16_pair(&self, low: f32, high: f32) -> u32;
    /// Two numbers to the nearest bf16, as [`Gpu::f16_pair`].
    fn bf16_pair(&self, low: f32, high: f32) -> u32;

    /// `1 / (1 + 2^(place - 32))` by what the machine has for powers of two and for inverses, within 4e-7 of it where `place` is
    /// from 8 to 128 ([`LOGISTIC`]); 1 below, 0 from there on, NaN of NaN. Last places differ from one kind of GPU to another, and
    /// a place has few enough values for all of them to be tried.
    fn logistic(&self, place: f32) -> f32;

    /// The same number, of which the compiler does not know that it is: what is computed from it is not
    /// computed ahead of time, where it would take up registers.
    fn unforeseen(&self, number: u64) -> u64;

    /// Asks that the global memory at `address` be brought into the second-level cache. Nothing is read:
    /// there need not be anything.
    fn bring_near(&self, address: u64);
    /// Reads 4 bytes that somebody else may be writing, the kernel before this one: nobody knows what, and no
    /// cache keeps it.
    ///
    /// # Safety
    /// `address` is a multiple of 4, and so many bytes from it are readable.
    unsafe fn peek4(&self, address: u64) -> u32;

    /// Reads 16 bytes of global memory in one access.
    ///
    /// # Safety
    /// `address` is a multiple of 16, and so many bytes from it are readable.
    unsafe fn load16(&self, address: u64) -> Bytes16;
    /// Reads 8 bytes.
    ///
    /// # Safety
    /// `address` is a multiple of 8, and so many bytes from it are readable.
    unsafe fn load8(&self, address: u64) -> u64;
    /// Reads 4 bytes.
    ///
    /// # Safety
    /// `address` is a multiple of 4, and so many bytes from it are readable.
    unsafe fn load4(&self, address: u64) -> u32;
    /// Reads 2 bytes.
    ///
    /// # Safety
    /// `address` is a multiple of 2, and so many bytes from it are readable.
    unsafe fn load2(&self, address: u64) -> u16;
    /// Reads a byte.
    ///
    /// # Safety
    /// The byte at `address` is readable.
    unsafe fn load1(&self, address: u64) -> u8;

    /// Reads 4 bytes where `four` says so, else 2, without a branch.
    ///
    /// # Safety
    /// `address` is a multiple of so many, and so many bytes from it are readable.
    unsafe fn load4_or_2(&self, address: u64, four: bool) -> u32;
    /// Writes 16 bytes of global memory in one access.
    ///
    /// # Safety
    /// `address` is a multiple of 16, and so many bytes from it are writable and no other thread's.
    unsafe fn store16(&self, address: u64, value: Bytes16);
    /// Writes 8 bytes.
    ///
    /// # Safety
    /// `address` is a multiple of 8, and so many bytes from it are writable and no other thread's.
    unsafe fn store8(&self, address: u64, value: u64);
    /// Writes 4 bytes.
    ///
    /// # Safety
    /// `address` is a multiple of 4, and so many bytes from it are writable and no other thread's.
    unsafe fn store4(&self, address: u64, value: u32);
    /// Writes 2 bytes.
    ///
    /// # Safety
    /// `address` is a multiple of 2, and so many bytes from it are writable and no other thread's.
    unsafe fn store2(&self, address: u64, value: u16);
    /// Writes a byte.
    ///
    /// # Safety
    /// The byte at `address` is writable and no other thread's.
    unsafe fn store1(&self, address: u64, value: u8);

    /// Writes 4 bytes where `four` says so, else the lower 2, without a branch.
    ///
    /// # Safety
    /// `address` is a multiple of so many, and so many bytes from it are writable and no other thread's.
    unsafe fn store4_or_2(&self, address: u64, value: u32, four: bool);

    /// Reads 16 bytes of shared memory.
    ///
    /// # Safety
    /// `at` is a multiple of 16, and so many bytes from it lie within the block's shared memory and were
    /// written, by this thread or before a barrier that both passed.
    unsafe fn load_shared16(&self, at: u32) -> Bytes16;
    /// Writes 16 bytes of shared memory.
    ///
    /// # Safety
    /// `at` is a multiple of 16, so many bytes from it lie within the block's shared memory, and no other
    /// thread touches them between the barriers before and after.
    unsafe fn store_shared16(&self, at: u32, value: Bytes16);

    /// Reads 8 bytes of shared memory.
    ///
    /// # Safety
    /// `at` is a multiple of 8, and so many bytes from it lie within the block's shared memory and were
    /// written, by this thread or before a barrier that both passed.
    unsafe fn load_shared8(&self, at: u32) -> u64;
    /// Writes 8 bytes of shared memory.
    ///
    /// # Safety
    /// `at` is a multiple of 8, so many bytes from it lie within the block's shared memory, and no other
    /// thread touches them between the barriers before and after.
    unsafe fn store_shared8(&self, at: u32, value: u64);

    /// Reads 4 bytes of shared memory.
    ///
    /// # Safety
    /// `at` is a multiple of 4, and so many bytes from it lie within the block's shared memory and were
    /// written, by this thread or before a barrier that both passed.
    unsafe fn load_shared4(&self, at: u32) -> u32;
    /// Writes 4 bytes of shared memory.
    ///
    /// # Safety
    /// `at` is a multiple of 4, so many bytes from it lie within the block's shared memory, and no other
    /// thread touches them between the barriers before and after.
    unsafe fn store_shared4(&self, at: u32, value: u32);

    /// Reads 2 bytes of shared memory.
    ///
    /// # Safety
    /// `at` is a multiple of 2, and so many bytes from it lie within the block's shared memory and were
    /// written, by this thread or before a barrier that both passed.
    unsafe fn load_shared2(&self, at: u32) -> u16;
    /// Writes 2 bytes of shared memory.
    ///
    /// # Safety
    /// `at` is a multiple of 2, so many bytes from it lie within the block's shared memory, and no other
    /// thread touches them between the barriers before and after.
    unsafe fn store_shared2(&self, at: u32, value: u16);
}

/// Where [`Gpu::logistic`] is neither 1 nor 0, and where it is 1/2.
pub const LOGISTIC: core::ops::Range<f32> = 8.0..128.0;
/// See [`LOGISTIC`].
pub const LOGISTIC_MIDDLE: f32 = 32.0;

/// 16 bytes that travel together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct Bytes16(pub [u32; 4]);

/// What one access moves: 16, 8, 4, 2 or 1 bytes.
pub trait Word: Copy {
    /// How many.
    const BYTES: u32;

    /// Reads one from global memory.
    ///
    /// # Safety
    /// `address` is a multiple of [`Word::BYTES`], and so many bytes from it are readable.
    unsafe fn load(gpu: &impl Gpu, address: u64) -> Self;

    /// Writes one to global memory.
    ///
    /// # Safety
    /// `address` is a multiple of [`Word::BYTES`], and so many bytes from it are writable and no other
    /// thread's.
    unsafe fn store(self, gpu: &impl Gpu, address: u64);
}

/// What one access to shared memory moves: 16, 8, 4 or 2 bytes.
pub trait SharedWord: Word {
    /// Reads one.
    ///
    /// # Safety
    /// That of [`Gpu::load_shared4`], for [`Word::BYTES`].
    unsafe fn load_shared(gpu: &impl Gpu, at: u32) -> Self;

    /// Writes one.
    ///
    /// # Safety
    /// That of [`Gpu::store_shared4`], for [`Word::BYTES`].
    unsafe fn store_shared(self, gpu: &impl Gpu, at: u32);
}

macro_rules! word {
    ($($word:ty, $bytes:literal, $load:ident, $store:ident;)*) => {$(
        impl Word for $word {
            const BYTES: u32 = $bytes;

            #[inline(always)]
            unsafe fn load(gpu: &impl Gpu, address: u64) -> Self {
                // SAFETY: the caller's promise.
                unsafe { gpu.$load(address) }
            }

            #[inline(always)]
            unsafe fn store(self, gpu: &impl Gpu, address: u64) {
                // SAFETY: the caller's promise.
                unsafe { gpu.$store(address, self) }
            }
        }
    )*};
}

word! {
    Bytes16, 16, load16, store16;
    u64, 8, load8, store8;
    u32, 4, load4, store4;
    u16, 2, load2, store2;
    u8, 1, load1, store1;
}

macro_rules! shared_word {
    ($($word:ty, $load:ident, $store:ident;)*) => {$(
        impl SharedWord for $word {
            #[inline(always)]
            unsafe fn load_shared(gpu: &impl Gpu, at: u32) -> Self {
                // SAFETY: the caller's promise.
                unsafe { gpu.$load(at) }
            }

            #[inline(always)]
            unsafe fn store_shared(self, gpu: &impl Gpu, at: u32) {
                // SAFETY: the caller's promise.
                unsafe { gpu.$store(at, self) }
            }
        }
    )*};
}

shared_word! {
    Bytes16, load_shared16, store_shared16;
    u64, load_shared8, store_shared8;
    u32, load_shared4, store_shared4;
    u16, load_shared2, store_shared2;
}
