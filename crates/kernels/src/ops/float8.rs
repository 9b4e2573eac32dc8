//! Floats of 8 and 4 bits: bit patterns to `f32` and back.

use lightering_units::DType;

/// Layout of a narrow float.
struct Format {
    mantissa: u32,
    bias: i32,
    /// Largest finite value as bits without the sign.
    max: u8,
    /// Bits without the sign of infinity, if there is one.
    infinity: Option<u8>,
    /// Bits of NaN, if there is one.
    nan: Option<u8>,
    /// Bit of the sign.
    sign: u8,
    /// −0 does not exist.
    unsigned_zero: bool,
}

const fn format(dtype: DType) -> Format {
    match dtype {
        DType::F8E4M3FN => Format {
            mantissa: 3,
            bias: 7,
            max: 0x7e,
            infinity: None,
            nan: Some(0x7f),
            sign: 0x80,
            unsigned_zero: false,
        },
        DType::F8E4M3FNUZ => Format {
            mantissa: 3,
            bias: 8,
            max: 0x7f,
            infinity: None,
            nan: Some(0x80),
            sign: 0x80,
            unsigned_zero: true,
        },
        DType::F8E5M2 => Format {
            mantissa: 2,
            bias: 15,
            max: 0x7b,
            infinity: Some(0x7c),
            nan: Some(0x7f),
            sign: 0x80,
            unsigned_zero: false,
        },
        DType::F8E5M2FNUZ => Format {
            mantissa: 2,
            bias: 16,
            max: 0x7f,
            infinity: None,
            nan: Some(0x80),
            sign: 0x80,
            unsigned_zero: true,
        },
        _ => Format {
            mantissa: 1,
            bias: 1,
            max: 0x07,
            infinity: None,
            nan: None,
            sign: 0x08,
            unsigned_zero: false,
        },
    }
}

/// The value of a bit pattern of one of the four 8-bit float types or `F4E2M1`.
pub fn decode(dtype: DType, bits: u8) -> f32 {
    let f = format(dtype);
    if f.unsigned_zero && bits == 0x80 {
        return f32::NAN;
    }
    let magnitude = bits & (f.sign - 1);
    let value = if f.infinity == Some(magnitude) {
        f32::INFINITY
    } else if !f.unsigned_zero && magnitude > f.max {
        f32::NAN
    } else {
        let exponent = i32::from(magnitude >> f.mantissa);
        let fraction = (magnitude & ((1 << f.mantissa) - 1)) as f32 / (1 << f.mantissa) as f32;
        if exponent == 0 {
            fraction * 2f32.powi(1 - f.bias)
        } else {
            (1.0 + fraction) * 2f32.powi(exponent - f.bias)
        }
    };
    if bits & f.sign != 0 { -value } else { value }
}

/// The bit pattern nearest to `x`, ties to even. Out-of-range values become the largest finite value when
/// `saturate`, else infinity or, without one, NaN (`F4E2M1` always saturates).
pub fn encode(dtype: DType, x: f32, saturate: bool) -> u8 {
    let f = format(dtype);
    let sign = if x.is_sign_negative() { f.sign } else { 0 };
    if x.is_nan() {
        return match f.nan {
            Some(nan) if f.unsigned_zero => nan,
            Some(nan) => nan | sign,
            // ONNX says that NaN becomes the largest value with positive sign where there is no NaN.
            None => f.max,
        };
    }
    let beyond = || {
        if saturate || f.nan.is_none() {
            return f.max | sign;
        }
        match (f.infinity, f.nan) {
            (Some(infinity), _) => infinity | sign,
            (None, Some(nan)) if f.unsigned_zero => nan,
            (None, nan) => nan.unwrap_or(f.max) | sign,
        }
    };
    let magnitude = x.abs();
    if magnitude.is_infinite() {
        return beyond();
    }
    // The position in units of the last place of the value's binade gives the rounded bits directly, because
    // bit patterns of positive floats count upwards through binades.
    let exponent = if magnitude == 0.0 {
        1 - f.bias
    } else {
        (((magnitude.to_bits() >> 23) as i32) - 127).max(1 - f.bias)
    };
    let unit = 2f64.powi(exponent - f.mantissa as i32);
    let steps = (f64::from(magnitude) / unit).round_ties_even() as u32;
    let base = ((exponent + f.bias - 1) as u32) << f.mantissa;
    let bits = base + steps;
    if bits > u32::from(f.max) {
        return beyond();
    }
    let bits = bits as u8;
    if bits == 0 && f.unsigned_zero { 0 } else { bits | sign }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_survives_a_round_trip() {
        for dtype in [DType::F8E4M3FN, DType::F8E4M3FNUZ, DType::F8E5M2, DType::F8E5M2FNUZ] {
            for bits in 0..=255u8 {
                let x = decode(dtype, bits);
                let back = encode(dtype, x, false);
                assert!(
                    back == bits || (x.is_nan() && decode(dtype, back).is_nan()),
                    "{dtype} {bits:#x} {x}"
                );
            }
        }
        for bits in 0..16u8 {
            assert_eq!(encode(DType::F4E2M1, decode(DType::F4E2M1, bits), true), bits);
        }
    }

    #[test]
    fn known_values() {
        assert_eq!(decode(DType::F8E4M3FN, 0x7e), 448.0);
        assert_eq!(decode(DType::F8E5M2, 0x7b), 57344.0);
        assert_eq!(decode(DType::F8E4M3FNUZ, 0x7f), 240.0);
        assert_eq!(decode(DType::F4E2M1, 7), 6.0);
        assert_eq!(encode(DType::F8E4M3FN, 1e6, true), 0x7e);
        assert_eq!(encode(DType::F8E4M3FN, 1e6, false), 0x7f);
        assert_eq!(encode(DType::F8E5M2, 1e6, false), 0x7c);
    }
}
