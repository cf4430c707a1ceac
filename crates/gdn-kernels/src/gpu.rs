//! [`Gpu`]: what a kernel may ask of the machine it runs on.

/// One thread's view of a GPU. Kernels take `&impl Gpu`; on the real thing every method is an instruction or two.
///
/// Addresses of global memory are plain numbers, as the host hands them over. Shared memory is one block of bytes for each
/// thread block, addressed from 0.
pub trait Gpu {
    /// This thread within its block.
    fn thread(&self) -> u32;
    /// Threads of a block.
    fn threads(&self) -> u32;
    /// This block within the grid: x, y, z.
    fn block(&self) -> [u32; 3];
    /// Blocks of the grid: x, y, z.
    fn blocks(&self) -> [u32; 3];

    /// Waits until every thread of the block that has not returned is here. What they wrote before, all can read after.
    fn barrier(&self);
    /// The `value` of the lane of this warp whose number differs in the bits of `mask`. All 32 lanes must come here together.
    fn shuffle_xor(&self, value: u32, mask: u32) -> u32;

    /// From here on the next kernel of the stream may start its blocks, if it was launched to do so; it sees what this one
    /// writes only after its own [`Gpu::wait_for_previous`].
    fn let_next_start(&self);
    /// Waits until the kernel before this one in the stream is done and its writes are seen. Where this kernel was launched the
    /// ordinary way there is nothing to wait for.
    fn wait_for_previous(&self);

    /// Reads a word of shared memory.
    ///
    /// # Safety
    /// `at` is a multiple of 4, and the 4 bytes from it lie within the block's shared memory and were written, by this thread or
    /// before a barrier.
    unsafe fn load_shared(&self, at: u32) -> u32;
    /// Writes a word of shared memory.
    ///
    /// # Safety
    /// `at` is a multiple of 4, the 4 bytes from it lie within the block's shared memory, and no other thread reads or writes them
    /// before the next barrier.
    unsafe fn store_shared(&self, at: u32, value: u32);

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
}

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
    /// `address` is a multiple of [`Word::BYTES`], and so many bytes from it are writable and no other thread's.
    unsafe fn store(self, gpu: &impl Gpu, address: u64);
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
