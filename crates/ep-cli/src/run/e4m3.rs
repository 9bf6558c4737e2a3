//! Decoding of E4M3, the 8-bit float that dispatch sends.

/// The values of the 256 codes: 1 sign, 4 exponent bits (bias 7), 3 mantissa bits; no infinities,
/// and only `S.1111.111` is NaN.
pub(crate) const VALUES: [f32; 256] = values();

const fn values() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = decode(code as u8);
        code += 1;
    }
    table
}

const fn decode(code: u8) -> f32 {
    let exponent = (code >> 3) & 15;
    let mantissa = code & 7;
    if code & 0x7f == 0x7f {
        return f32::NAN;
    }
    let magnitude = if exponent == 0 {
        // Subnormals count in steps of 2⁻⁹.
        mantissa as f32 * f32::from_bits((127 - 9) << 23)
    } else {
        f32::from_bits(((exponent as u32 + 127 - 7) << 23) | ((mantissa as u32) << 20))
    };
    if code & 0x80 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn landmarks() {
        assert_eq!(VALUES[0x00], 0.0);
        assert_eq!(VALUES[0x01], 0.001_953_125);
        assert_eq!(VALUES[0x07], 0.013_671_875);
        assert_eq!(VALUES[0x08], 0.015_625);
        assert_eq!(VALUES[0x38], 1.0);
        assert_eq!(VALUES[0x39], 1.125);
        assert_eq!(VALUES[0x7e], 448.0);
        assert_eq!(VALUES[0xfe], -448.0);
        assert!(VALUES[0x7f].is_nan() && VALUES[0xff].is_nan());
        assert!(VALUES[0x80] == 0.0 && VALUES[0x80].is_sign_negative());
    }

    #[test]
    fn codes_of_one_sign_ascend() {
        assert!(VALUES[..0x7f].is_sorted());
        assert!(VALUES[0x80..0xff].iter().rev().is_sorted());
    }
}
