//! The number formats of the wire, bit for bit as the CUDA kernels round them.

/// Channels that share one scale.
pub(crate) const SCALE_BLOCK: usize = 128;

/// Largest finite E4M3 value.
const E4M3_MAX: f32 = 448.0;
const E4M3_MAX_CODE: u32 = 0x7e;
const E4M3_NAN: u8 = 0x7f;

/// Smallest `amax` that a scale is computed from: keeps scales finite for rows of zeros.
const AMAX_FLOOR: f32 = 1e-4;

/// Widens a bf16, exactly.
pub(crate) fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Rounds to bf16, ties to even. Every NaN becomes `0x7fff`, as `cvt.rn.bf16.f32` has it.
pub(crate) fn bf16_from_f32(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    if value.is_nan() {
        0x7fff
    } else {
        (rounded >> 16) as u16
    }
}

/// Rounds to E4M3, ties to even, saturating at ±448 (infinities too). Every NaN becomes
/// `0x7f`, as `cvt.rn.satfinite.e4m3x2.f32` has it.
pub(crate) fn e4m3_from_f32(value: f32) -> u8 {
    let bits = value.to_bits();
    let sign = (bits >> 24) as u8 & 0x80;
    let magnitude = bits & 0x7fff_ffff;
    // Subnormals count in units of 2^-9, which is the last bit of a float32 in [2^14, 2^15): the
    // addition itself rounds. The count 8 is the code of the smallest normal, 2^-6.
    const UNIT_AT: f32 = 16384.0;
    let subnormal = (f32::from_bits(magnitude) + UNIT_AT)
        .to_bits()
        .wrapping_sub(UNIT_AT.to_bits());
    // Normals drop 20 mantissa bits; the carry goes into the exponent, where it belongs.
    let rounded = magnitude + 0x7_ffff + ((magnitude >> 20) & 1);
    let normal = (rounded >> 20)
        .wrapping_sub((127 - 7) << 3)
        .min(E4M3_MAX_CODE);
    // Selections, not branches, so that loops over channels become vector code.
    let finite = if magnitude < 0x3c80_0000 {
        subnormal
    } else {
        normal
    };
    if magnitude > 0x7f80_0000 {
        E4M3_NAN
    } else {
        sign | finite as u8
    }
}

/// How scales are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScaleRounding {
    /// As they come.
    Exact,
    /// Up to a power of two.
    PowerOfTwo,
}

/// Quantises one block of [`SCALE_BLOCK`] bf16 channels to E4M3 and returns the factor that
/// dequantises it.
pub(crate) fn quantize_block(x: &[u16], rounding: ScaleRounding, out: &mut [u8]) -> f32 {
    // Magnitudes order as integers. NaNs are left out of the maximum, as `fmaxf` leaves them.
    let amax = x
        .iter()
        .map(|bits| bits & 0x7fff)
        .map(|magnitude| if magnitude > 0x7f80 { 0 } else { magnitude })
        .max()
        .map_or(0.0, bf16_to_f32)
        .max(AMAX_FLOOR);
    let (scale, inverse) = match rounding {
        ScaleRounding::Exact => (E4M3_MAX / amax, amax * (1.0 / E4M3_MAX)),
        ScaleRounding::PowerOfTwo => {
            let inverse = power_of_two_above(amax * (1.0 / E4M3_MAX));
            (1.0 / inverse, inverse)
        }
    };
    for (&bits, code) in x.iter().zip(out) {
        *code = e4m3_from_f32(bf16_to_f32(bits) * scale);
    }
    inverse
}

/// The smallest power of two that is not below a positive normal `value`.
fn power_of_two_above(value: f32) -> f32 {
    const MANTISSA: u32 = 0x007f_ffff;
    f32::from_bits((value.to_bits() + MANTISSA) & !MANTISSA)
}

/// The exponent byte (UE8M0) of a power of two.
pub(crate) fn ue8m0(power_of_two: f32) -> u8 {
    (power_of_two.to_bits() >> 23) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the definition of the format: 4 exponent bits of bias 7, 3 mantissa bits.
    fn e4m3_to_f64(code: u8) -> f64 {
        let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
        let (exponent, mantissa) = (i32::from(code >> 3) & 15, f64::from(code & 7));
        match (exponent, code & 7) {
            (15, 7) => f64::NAN,
            (0, _) => sign * mantissa / 512.0,
            _ => sign * (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
        }
    }

    #[test]
    fn e4m3_keeps_every_value_of_the_format() {
        for code in 0..=255u8 {
            let value = e4m3_to_f64(code) as f32;
            let expected = if value.is_nan() { E4M3_NAN } else { code };
            assert_eq!(e4m3_from_f32(value), expected, "{value}");
        }
        assert_eq!(e4m3_from_f32(-f32::NAN), E4M3_NAN);
    }

    #[test]
    fn e4m3_rounds_to_the_nearest_and_ties_to_even() {
        for low in 0..0x7eu8 {
            let high = low + 1;
            let middle = ((e4m3_to_f64(low) + e4m3_to_f64(high)) / 2.0) as f32;
            let even = if low % 2 == 0 { low } else { high };
            for (value, code) in [
                (middle, even),
                (middle.next_down(), low),
                (middle.next_up(), high),
            ] {
                assert_eq!(e4m3_from_f32(value), code, "{value}");
                assert_eq!(e4m3_from_f32(-value), code | 0x80, "-{value}");
            }
        }
    }

    #[test]
    fn e4m3_saturates() {
        for value in [448.0, 448.1, 464.0, 465.0, 1e30, f32::MAX, f32::INFINITY] {
            assert_eq!(e4m3_from_f32(value), 0x7e);
            assert_eq!(e4m3_from_f32(-value), 0xfe);
        }
        for value in [0.0, f32::MIN_POSITIVE, 1e-45, 1.0 / 1024.0] {
            assert_eq!(e4m3_from_f32(value), 0);
            assert_eq!(e4m3_from_f32(-value), 0x80);
        }
    }

    #[test]
    fn bf16_agrees_with_the_half_crate() {
        for high in 0..=u16::MAX {
            assert_eq!(
                bf16_to_f32(high).to_bits(),
                half::bf16::from_bits(high).to_f32_const().to_bits() & !quiet_bit(high)
                    | (u32::from(high) << 16 & quiet_bit(high)),
            );
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(high) << 16 | low);
                if value.is_nan() {
                    assert_eq!(bf16_from_f32(value), 0x7fff);
                } else {
                    assert_eq!(bf16_from_f32(value), half::bf16::from_f32(value).to_bits());
                }
            }
        }
    }

    /// `half` makes signalling NaNs quiet when it widens them; a copy of bits does not.
    fn quiet_bit(bits: u16) -> u32 {
        if bits & 0x7fff > 0x7f80 {
            0x0040_0000
        } else {
            0
        }
    }

    fn block(first: f32, rest: f32) -> Vec<u16> {
        let mut x = vec![bf16_from_f32(rest); SCALE_BLOCK];
        x[0] = bf16_from_f32(first);
        x
    }

    #[test]
    fn the_largest_channel_meets_the_largest_code() {
        let mut q = vec![0; SCALE_BLOCK];
        let inverse = quantize_block(&block(-7.0, 3.5), ScaleRounding::Exact, &mut q);
        assert_eq!(inverse, 7.0 * (1.0 / 448.0));
        assert_eq!((q[0], q[1]), (0xfe, 0x76));
    }

    #[test]
    fn powers_of_two_round_up_and_stay() {
        let mut q = vec![0; SCALE_BLOCK];
        let mut scale = |amax| quantize_block(&block(amax, 0.0), ScaleRounding::PowerOfTwo, &mut q);
        assert_eq!(scale(448.0), 1.0);
        assert_eq!(scale(450.0), 2.0);
        assert_eq!(scale(3.5), 2f32.powi(-7));
        // The floor: 1e-4 / 448 lies between 2^-23 and 2^-22.
        assert_eq!(scale(0.0), 2f32.powi(-22));
        assert_eq!(ue8m0(2f32.powi(-22)), 127 - 22);
        assert_eq!(ue8m0(1.0), 127);
    }

    #[test]
    fn zeros_keep_their_signs_and_nans_do_not() {
        for rounding in [ScaleRounding::Exact, ScaleRounding::PowerOfTwo] {
            let mut q = vec![1; SCALE_BLOCK];
            quantize_block(&vec![0x8000; SCALE_BLOCK], rounding, &mut q);
            assert!(q.iter().all(|&code| code == 0x80));

            let mut x = block(1.0, 1.0);
            x[3] = 0xffc1;
            x[4] = 0x7fc0;
            let inverse = quantize_block(&x, rounding, &mut q);
            assert!(inverse.is_finite());
            assert_eq!((q[3], q[4]), (0x7f, 0x7f));

            let mut x = block(f32::NEG_INFINITY, -1.0);
            x[2] = 0x7f80;
            assert_eq!(quantize_block(&x, rounding, &mut q), f32::INFINITY);
            assert_eq!((q[0], q[1], q[2]), (0x7f, 0x80, 0x7f));
        }
    }
}
