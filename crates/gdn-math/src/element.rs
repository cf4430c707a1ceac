//! bf16 and f16 to and from f32, by their bits. To the narrower type: to nearest, ties to even, overflow to
//! infinity, NaN to a quiet NaN.

/// The f32 of a bf16.
#[inline(always)]
pub const fn f32_of_bf16(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// The bf16 nearest to an f32.
#[inline(always)]
pub const fn bf16_of_f32(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return ((bits >> 16) | 0x40) as u16;
    }
    // Half of the last place that stays, less one where that place is even already.
    (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// The f32 of an f16.
#[inline(always)]
pub const fn f32_of_f16(bits: u16) -> f32 {
    let sign = ((bits & 0x8000) as u32) << 16;
    let magnitude = (bits & 0x7fff) as u32;
    if magnitude >= 0x7c00 {
        // Infinity and NaN, which becomes quiet.
        let quiet = if magnitude > 0x7c00 { 0x0040_0000 } else { 0 };
        return f32::from_bits(sign | 0x7f80_0000 | ((magnitude & 0x3ff) << 13) | quiet);
    }
    // With the exponent of an f16 read as one of an f32 the value is 2^-112 of what it should be, subnormal
    // numbers included.
    let scaled = f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23);
    f32::from_bits(sign | scaled.to_bits())
}

/// The f16 nearest to an f32.
#[inline(always)]
pub const fn f16_of_f32(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = ((bits >> 16) & 0x8000) as u16;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return sign | 0x7e00 | ((magnitude >> 13) & 0x3ff) as u16;
    }
    if magnitude >= 0x4780_0000 {
        // 65536 and above.
        return sign | 0x7c00;
    }
    if magnitude < 0x3880_0000 {
        // Below 2^-14 the last place is 2^-24. Added to 0.5, whose last place that is, the sum is rounded as
        // it should be.
        let sum = f32::from_bits(magnitude) + 0.5;
        return sign | (sum.to_bits() - 0x3f00_0000) as u16;
    }
    let rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    sign | ((rounded - (112 << 23)) >> 13) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_16_bit_number_there_and_back() {
        for bits in 0..=u16::MAX {
            let (b, h) = (half::bf16::from_bits(bits), half::f16::from_bits(bits));
            assert!(
                f32_of_bf16(bits).to_bits() == b.to_f32().to_bits()
                    || b.is_nan() && f32_of_bf16(bits).is_nan()
            );
            assert!(
                f32_of_f16(bits).to_bits() == h.to_f32().to_bits() || h.is_nan() && f32_of_f16(bits).is_nan()
            );
            if !b.is_nan() {
                assert_eq!(bf16_of_f32(b.to_f32()), bits);
            }
            if !h.is_nan() {
                assert_eq!(f16_of_f32(h.to_f32()), bits);
            }
        }
    }

    #[test]
    fn rounding_is_that_of_the_crate_half() {
        // All exponents, with mantissas around each place where rounding turns.
        for high in 0..=u16::MAX {
            for low in [0u32, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xefff, 0xffff] {
                let value = f32::from_bits((u32::from(high) << 16) | low);
                let (b, h) = (half::bf16::from_f32(value), half::f16::from_f32(value));
                if value.is_nan() {
                    assert!(
                        f32_of_bf16(bf16_of_f32(value)).is_nan() && f32_of_f16(f16_of_f32(value)).is_nan()
                    );
                } else {
                    assert_eq!(
                        (bf16_of_f32(value), f16_of_f32(value)),
                        (b.to_bits(), h.to_bits()),
                        "{value:e}"
                    );
                }
            }
        }
    }
}
