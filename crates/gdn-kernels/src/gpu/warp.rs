//! [`Warp`]: what the 32 lanes of a warp do together.

use super::Gpu;

/// A warp: threads `32 * w` to `32 * w + 31` of the block. All 32 lanes must come to each of these together;
/// a block has a multiple of 32 threads.
pub trait Warp: Gpu {
    /// The `value` of the lane whose number differs in the bits of `mask`.
    fn shuffle_xor(&self, value: u32, mask: u32) -> u32;
    /// The `value` of lane `lane % 32`, which every lane may choose by itself.
    fn shuffle(&self, value: u32, lane: u32) -> u32;
    /// The `value` of the lane `distance` below, the lane's own where there is none.
    fn shuffle_up(&self, value: u32, distance: u32) -> u32;
    /// The `value` of the lane `distance` above, the lane's own where there is none.
    fn shuffle_down(&self, value: u32, distance: u32) -> u32;
    /// Which lanes say yes: bit `n` is lane `n`.
    fn ballot(&self, yes: bool) -> u32;
    /// Waits until all lanes are here. What they wrote before, all can read after. Shuffles do not give that.
    fn sync_warp(&self);

    /// A `value` that all lanes have alike, in a register of the warp's: what is worked out from it, as where the sides of
    /// a product lie, is worked out once for all of them. What it is where they do not have it alike nobody knows.
    fn uniform(&self, value: u32) -> u32;

    /// This thread within its warp.
    #[inline(always)]
    fn lane(&self) -> u32 {
        self.thread() % 32
    }

    /// The sum over neighbouring lanes, `LANES` (2, 4, 8, 16 or 32) at a time: the same bits in all of them,
    /// as `a + b` is `b + a`.
    #[inline(always)]
    fn sum<const LANES: u32>(&self, value: f32) -> f32 {
        let (mut sum, mut mask) = (value, LANES / 2);
        while mask > 0 {
            sum += f32::from_bits(self.shuffle_xor(sum.to_bits(), mask));
            mask /= 2;
        }
        sum
    }
}
