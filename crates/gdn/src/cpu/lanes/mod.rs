//! Registers of f32: [`Register`] is [`Lanes`] that go to memory and come from it. A file an instruction set.

#[cfg(all(target_arch = "x86_64", not(without_avx2)))]
mod avx2;
#[cfg(all(target_arch = "x86_64", not(without_avx512)))]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
mod together;

#[cfg(all(target_arch = "x86_64", not(without_avx2)))]
pub(super) use avx2::F32x8;
#[cfg(all(target_arch = "x86_64", not(without_avx512)))]
pub(super) use avx512::F32x16;
use gdn_math::Lanes;
#[cfg(target_arch = "aarch64")]
pub(super) use neon::F32x4;
pub(super) use together::Together;

/// The widest register, in f32. Rows of scratch memory are a multiple of it long, so that every instruction
/// set walks them in whole registers.
pub(super) const WIDEST: usize = 16;

/// A register of f32 of one instruction set.
pub(super) trait Register: Lanes {
    /// Zeros.
    ///
    /// # Safety
    /// The machine has the instruction set.
    unsafe fn zero() -> Self;

    /// # Safety
    /// The machine has the instruction set, and `LEN` f32 are readable at `src`, at any alignment.
    unsafe fn load(src: *const f32) -> Self;

    /// # Safety
    /// `LEN` f32 are writable at `dst`, at any alignment.
    unsafe fn store(self, dst: *mut f32);

    /// # Safety
    /// The machine has the instruction set, and `LEN` bf16 are readable at `src`, at any alignment.
    unsafe fn load_bf16(src: *const u16) -> Self;

    /// # Safety
    /// `LEN` bf16 are writable at `dst`, at any alignment.
    unsafe fn store_bf16(self, dst: *mut u16);

    /// # Safety
    /// The machine has the instruction set, and `LEN` f16 are readable at `src`, at any alignment.
    unsafe fn load_f16(src: *const u16) -> Self;

    /// # Safety
    /// `LEN` f16 are writable at `dst`, at any alignment.
    unsafe fn store_f16(self, dst: *mut u16);

    /// `2 * LEN` bf16, as [`unzip`](Self::unzip) gives them: those at even places, and those at odd ones. Two
    /// numbers lie in 32 bits, and a shift and a mask are all that takes them apart.
    ///
    /// # Safety
    /// The machine has the instruction set, and `2 * LEN` bf16 are readable at `src`, at any alignment.
    unsafe fn load_bf16_pair(src: *const u16) -> [Self; 2];

    /// The inverse, for lanes of which none is NaN.
    ///
    /// # Safety
    /// `2 * LEN` bf16 are writable at `dst`, at any alignment.
    unsafe fn store_bf16_pair(pair: [Self; 2], dst: *mut u16);

    /// Of the lanes of two registers, one after the other, those at even places and those at odd ones.
    fn unzip(pair: [Self; 2]) -> [Self; 2];

    /// The inverse of [`unzip`](Self::unzip).
    fn zip(pair: [Self; 2]) -> [Self; 2];

    /// Of the lanes of three registers, one after the other, every third one, from the first, the second and
    /// the third on.
    fn unzip_three(registers: [Self; 3]) -> [Self; 3];

    /// The inverse of [`unzip_three`](Self::unzip_three).
    fn zip_three(registers: [Self; 3]) -> [Self; 3];

    /// Has the line of `src` brought near, where the instruction set can. Any address will do.
    #[inline(always)]
    fn prefetch(src: *const u8) {
        let _ = src;
    }

    /// The sum of the lanes, halves first: lane i and lane i + LEN/2, and so on.
    fn sum(self) -> f32;

    /// The [`sum`](Self::sum) of each.
    #[inline(always)]
    fn four_sums([a, b, c, d]: [Self; 4]) -> [f32; 4] {
        [a.sum(), b.sum(), c.sum(), d.sum()]
    }
}

/// Turns a square of as many registers as each has lanes, the first ones: lane j of register i goes to lane i
/// of register j. The others stay what they are.
#[inline(always)]
pub(super) fn turned<L: Register>(mut registers: [L; WIDEST]) -> [L; WIDEST] {
    // Numbered by register, then by lane, each pass brings the first bit of every number behind its last.
    let half = L::LEN / 2;
    let mut passes = 1;
    while passes < L::LEN {
        let before = registers;
        for i in 0..half {
            let [low, high] = L::zip([before[i], before[i + half]]);
            (registers[2 * i], registers[2 * i + 1]) = (low, high);
        }
        passes *= 2;
    }
    registers
}

/// A function that is generic over a [`Register`], compiled for the instruction set `$isa`, or for the scalar
/// one where this machine does not have it. With `tiled` it is generic over the rows and registers, too, of a
/// tile that a matrix product holds, with operands no more than there are registers; and over the rows that such
/// tiles leave of [`PREFILL_BLOCK`](crate::cpu::PREFILL_BLOCK).
///
/// Chores leave out what they would compile for long and not run: `--cfg without_avx512`, and `--cfg without_avx2` with it.
macro_rules! for_isa {
    ($isa:expr, $function:ident($($name:ident: $type:ty),*)) => {
        $crate::cpu::lanes::for_isa!(@ $isa, $function, [], [], [], [], ($($name: $type),*))
    };
    ($isa:expr, tiled $function:ident($($name:ident: $type:ty),*)) => {
        $crate::cpu::lanes::for_isa!(
            @ $isa, $function, [, 8, 2, 0], [, 6, 2, 4], [, 4, 4, 0], [, 4, 4, 0], ($($name: $type),*)
        )
    };
    (
        @ $isa:expr, $function:ident,
        [$($avx512:tt)*], [$($avx2:tt)*], [$($neon:tt)*], [$($scalar:tt)*],
        ($($name:ident: $type:ty),*)
    ) => {{
        #[cfg(all(target_arch = "x86_64", not(without_avx512)))]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
        unsafe fn avx512($($name: $type),*) {
            // SAFETY: the caller's promises.
            unsafe { $function::<$crate::cpu::lanes::F32x16 $($avx512)*>($($name),*) }
        }
        #[cfg(all(target_arch = "x86_64", not(without_avx2)))]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2($($name: $type),*) {
            // SAFETY: the caller's promises.
            unsafe { $function::<$crate::cpu::lanes::F32x8 $($avx2)*>($($name),*) }
        }
        #[cfg(target_arch = "aarch64")]
        #[target_feature(enable = "neon")]
        unsafe fn neon($($name: $type),*) {
            // SAFETY: the caller's promises.
            unsafe { $function::<$crate::cpu::lanes::F32x4 $($neon)*>($($name),*) }
        }
        unsafe fn scalar($($name: $type),*) {
            // SAFETY: the caller's promises.
            unsafe { $function::<f32 $($scalar)*>($($name),*) }
        }
        let isa: $crate::cpu::Isa = $isa;
        let function: unsafe fn($($type),*) = match isa {
            #[cfg(all(target_arch = "x86_64", not(without_avx512)))]
            $crate::cpu::Isa::Avx512 if isa.is_available() => avx512,
            #[cfg(all(target_arch = "x86_64", not(without_avx2)))]
            $crate::cpu::Isa::Avx2 if isa.is_available() => avx2,
            #[cfg(target_arch = "aarch64")]
            $crate::cpu::Isa::Neon if isa.is_available() => neon,
            _ => scalar,
        };
        function
    }};
}
pub(super) use for_isa;

/// An element of a tensor in memory.
pub(super) trait Element: Copy {
    /// Bytes of it.
    const BYTES: usize;

    /// # Safety
    /// As [`Register::load`], for this element.
    unsafe fn load<L: Register>(src: *const u8) -> L;

    /// # Safety
    /// As [`Register::store`], for this element.
    unsafe fn store<L: Register>(register: L, dst: *mut u8);

    /// Whether [`store_pair`](Self::store_pair) takes less time where no lane is NaN.
    const NAN_TAKES_TIME: bool = false;

    /// `2 * LEN` elements, in the order of lanes that is quickest to load: see [`arranged`](Self::arranged).
    ///
    /// # Safety
    /// As [`Register::load`], for so many of this element.
    #[inline(always)]
    unsafe fn load_pair<L: Register>(src: *const u8) -> [L; 2] {
        // SAFETY: the caller's promise.
        unsafe { [Self::load(src), Self::load(src.wrapping_add(L::LEN * Self::BYTES))] }
    }

    /// The inverse of [`load_pair`](Self::load_pair). With `NUMBERS` for lanes of which none is NaN, where
    /// that [takes time](Self::NAN_TAKES_TIME).
    ///
    /// # Safety
    /// As [`Register::store`], for so many of this element.
    #[inline(always)]
    unsafe fn store_pair<L: Register, const NUMBERS: bool>(pair: [L; 2], dst: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe {
            Self::store(pair[0], dst);
            Self::store(pair[1], dst.wrapping_add(L::LEN * Self::BYTES));
        }
    }

    /// From the order of memory to that of [`load_pair`](Self::load_pair).
    #[inline(always)]
    fn arranged<L: Register>(pair: [L; 2]) -> [L; 2] {
        pair
    }

    /// The inverse of [`arranged`](Self::arranged).
    #[inline(always)]
    fn restored<L: Register>(pair: [L; 2]) -> [L; 2] {
        pair
    }

    /// # Safety
    /// One element is readable at `src`, at any alignment.
    unsafe fn read(src: *const u8) -> f32;

    /// # Safety
    /// One element is writable at `dst`, at any alignment.
    unsafe fn write(value: f32, dst: *mut u8);
}

/// 32 bits.
#[derive(Clone, Copy)]
pub(super) struct F32;
/// The upper 16 bits of an f32.
#[derive(Clone, Copy)]
pub(super) struct Bf16;
/// IEEE 754's 16 bits.
#[derive(Clone, Copy)]
pub(super) struct F16;

macro_rules! element {
    ($element:ty, $bits:ty, $load:ident, $store:ident, $read:expr, $write:expr, { $($pairs:item)* }) => {
        impl Element for $element {
            const BYTES: usize = size_of::<$bits>();

            #[inline(always)]
            unsafe fn load<L: Register>(src: *const u8) -> L {
                // SAFETY: the caller's promise.
                unsafe { L::$load(src.cast()) }
            }

            #[inline(always)]
            unsafe fn store<L: Register>(register: L, dst: *mut u8) {
                // SAFETY: the caller's promise.
                unsafe { register.$store(dst.cast()) }
            }

            #[inline(always)]
            unsafe fn read(src: *const u8) -> f32 {
                // SAFETY: the caller's promise.
                $read(unsafe { src.cast::<$bits>().read_unaligned() })
            }

            #[inline(always)]
            unsafe fn write(value: f32, dst: *mut u8) {
                // SAFETY: the caller's promise.
                unsafe { dst.cast::<$bits>().write_unaligned($write(value)) }
            }

            $($pairs)*
        }
    };
}

element!(F32, f32, load, store, std::convert::identity, std::convert::identity, {});
element!(F16, u16, load_f16, store_f16, gdn_math::element::f32_of_f16, gdn_math::element::f16_of_f32, {});
element!(Bf16, u16, load_bf16, store_bf16, gdn_math::element::f32_of_bf16, gdn_math::element::bf16_of_f32, {
    const NAN_TAKES_TIME: bool = true;

    #[inline(always)]
    unsafe fn load_pair<L: Register>(src: *const u8) -> [L; 2] {
        // SAFETY: the caller's promise.
        unsafe { L::load_bf16_pair(src.cast()) }
    }

    #[inline(always)]
    unsafe fn store_pair<L: Register, const NUMBERS: bool>(pair: [L; 2], dst: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe {
            if NUMBERS {
                L::store_bf16_pair(pair, dst.cast());
            } else {
                let [first, second] = L::zip(pair);
                first.store_bf16(dst.cast());
                second.store_bf16(dst.cast::<u16>().wrapping_add(L::LEN));
            }
        }
    }

    #[inline(always)]
    fn arranged<L: Register>(pair: [L; 2]) -> [L; 2] {
        L::unzip(pair)
    }

    #[inline(always)]
    fn restored<L: Register>(pair: [L; 2]) -> [L; 2] {
        L::zip(pair)
    }
});

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;

    /// Every exponent with both signs, mantissas around each place where rounding turns; NaN too.
    fn numbers() -> impl Iterator<Item = f32> {
        (0..=u16::MAX).step_by(16).flat_map(|high| {
            [0u32, 1, 0x7fff, 0x8000, 0x8001, 0x1_7fff, 0x1_8000, 0xf_8000, 0xf_8001, 0xf_ffff]
                .map(|low| f32::from_bits((u32::from(high) << 16) + low))
        })
    }

    #[inline(always)]
    unsafe fn pairs<L: Register>(numbers: &[f32]) {
        let len = 2 * L::LEN;
        for given in numbers.chunks_exact(len) {
            let mut bits = vec![0xA5A5u16; len];
            // SAFETY: `len` of each; the machine has the instruction set.
            let back = unsafe {
                let pair = L::unzip([L::load(given.as_ptr()), L::load(given[L::LEN..].as_ptr())]);
                if given.iter().any(|x| x.is_nan()) {
                    Bf16::store_pair::<L, false>(pair, bits.as_mut_ptr().cast());
                } else {
                    Bf16::store_pair::<L, true>(pair, bits.as_mut_ptr().cast());
                }
                let [first, second] = L::zip(L::load_bf16_pair(bits.as_ptr()));
                let mut back = vec![0.0; len];
                first.store(back.as_mut_ptr());
                second.store(back[L::LEN..].as_mut_ptr());
                back
            };
            let expected: Vec<u16> = given.iter().map(|x| gdn_math::element::bf16_of_f32(*x)).collect();
            assert_eq!(bits, expected, "{given:?}");
            let back: Vec<u32> = back.iter().map(|x| x.to_bits()).collect();
            assert_eq!(back, expected.iter().map(|x| u32::from(*x) << 16).collect::<Vec<_>>());
        }
    }

    #[inline(always)]
    unsafe fn halves<L: Register>(numbers: &[f32]) {
        use gdn_math::element::{f16_of_f32, f32_of_f16};
        for given in numbers.chunks_exact(L::LEN) {
            let (mut bits, mut back) = (vec![0xA5A5u16; L::LEN], vec![0.0; L::LEN]);
            // SAFETY: `LEN` of each; the machine has the instruction set.
            unsafe {
                L::load(given.as_ptr()).store_f16(bits.as_mut_ptr());
                L::load_f16(bits.as_ptr()).store(back.as_mut_ptr());
            }
            for ((x, bits), back) in given.iter().zip(bits).zip(back) {
                assert!(bits == f16_of_f32(*x), "{x:e} is {bits:#06x}");
                assert!(back.to_bits() == f32_of_f16(bits).to_bits(), "{bits:#06x} is {back:e}");
            }
        }
    }

    #[inline(always)]
    unsafe fn orders<L: Register>(_: &[f32]) {
        let lanes: Vec<f32> = (0..4 * L::LEN).map(|i| i as f32 + 0.5).collect();
        // SAFETY: as many lanes as four registers have; the machine has the instruction set.
        unsafe {
            let [a, b, c, d]: [L; 4] = std::array::from_fn(|i| L::load(lanes[i * L::LEN..].as_ptr()));
            let read = |register: L| {
                let mut lanes = vec![0.0; L::LEN];
                register.store(lanes.as_mut_ptr());
                lanes
            };
            for (i, part) in L::unzip([a, b]).into_iter().enumerate() {
                assert_eq!(read(part), (0..L::LEN).map(|l| lanes[2 * l + i]).collect::<Vec<_>>());
            }
            for (i, part) in L::unzip_three([a, b, c]).into_iter().enumerate() {
                assert_eq!(read(part), (0..L::LEN).map(|l| lanes[3 * l + i]).collect::<Vec<_>>());
            }
            for (i, part) in L::zip(L::unzip([a, b])).into_iter().enumerate() {
                assert_eq!(read(part), lanes[i * L::LEN..][..L::LEN]);
            }
            for (i, part) in L::zip_three(L::unzip_three([a, b, c])).into_iter().enumerate() {
                assert_eq!(read(part), lanes[i * L::LEN..][..L::LEN]);
            }
            // Numbers whose sum depends on the order.
            let uneven = [a, b, c, d].map(|register| zero_over(register));
            assert_eq!(L::four_sums(uneven), uneven.map(|register| register.sum()));
        }
    }

    #[inline(always)]
    unsafe fn squares<L: Register>(_: &[f32]) {
        let numbers: Vec<f32> = (0..WIDEST * L::LEN).map(|i| i as f32 - 20.5).collect();
        // SAFETY: a register for each of the rows; the machine has the instruction set.
        unsafe {
            let mut rows = [L::zero(); WIDEST];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = L::load(numbers[i * L::LEN..].as_ptr());
            }
            for (i, row) in turned(rows).into_iter().enumerate() {
                let mut lanes = vec![0.0; L::LEN];
                row.store(lanes.as_mut_ptr());
                let column = |j: usize| numbers[if i < L::LEN { j * L::LEN + i } else { i * L::LEN + j }];
                assert_eq!(lanes, (0..L::LEN).map(column).collect::<Vec<_>>(), "row {i}");
            }
        }
    }

    /// A formula of all operations.
    #[inline(always)]
    fn formula<L: Lanes>(x: L) -> L {
        let half = x.splat(0.5);
        let root = x.times(x).plus(half).root().at_least(half).at_most(x.splat(30.0));
        let fused = gdn_math::special::exp(x).mul_add(root, x.minus(half)).over(half.neg_mul_add(x, root));
        x.if_greater(half, fused.negated(), fused)
    }

    #[inline(always)]
    unsafe fn together<L: Register>(_: &[f32]) {
        let numbers: Vec<f32> = (0..3 * L::LEN).map(|i| i as f32 * 0.37 - 4.0).collect();
        let mut got = vec![0.0; numbers.len()];
        // SAFETY: three registers of each; the machine has the instruction set.
        unsafe { formula(Together::<L, 3>::load(numbers.as_ptr())).store(got.as_mut_ptr()) };
        for (x, got) in numbers.into_iter().zip(got) {
            assert_eq!(formula(x).to_bits(), got.to_bits(), "{x}");
        }
    }

    #[inline(always)]
    fn zero_over<L: Register>(register: L) -> L {
        register.splat(1.0).over(register)
    }

    #[test]
    fn pairs_of_registers_round_as_one_number_does() {
        let all: Vec<f32> = numbers().collect();
        let none_nan: Vec<f32> = numbers().filter(|x| !x.is_nan()).collect();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let pairs = for_isa!(isa, pairs(numbers: &[f32]));
            // SAFETY: `for_isa` looked at the machine.
            unsafe {
                pairs(&all);
                pairs(&none_nan);
            }
        }
    }

    #[test]
    fn registers_of_f16_are_rounded_as_one_number_is() {
        let all: Vec<f32> = (0..=u16::MAX).map(gdn_math::element::f32_of_f16).chain(numbers()).collect();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let halves = for_isa!(isa, halves(numbers: &[f32]));
            // SAFETY: `for_isa` looked at the machine.
            unsafe { halves(&all) };
        }
    }

    #[test]
    fn lanes_are_put_in_order_and_back() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let orders = for_isa!(isa, orders(numbers: &[f32]));
            let squares = for_isa!(isa, squares(numbers: &[f32]));
            let together = for_isa!(isa, together(numbers: &[f32]));
            // SAFETY: `for_isa` looked at the machine.
            unsafe {
                orders(&[]);
                squares(&[]);
                together(&[]);
            }
        }
    }
}
