//! FP8 with 4 exponent and 3 mantissa bits: exact decoding, and rounding as the checkpoints' formats define it.
//!
//! The format (OCP "E4M3", PyTorch's `float8_e4m3fn`) has bias 7, subnormals in steps of 2^-9, no infinities, and NaN
//! only in the codes 0x7f and 0xff.

use lapidary_model::FP8_MAX;

/// Smallest normal number, 2^-6.
const MIN_NORMAL: f32 = 1.0 / 64.0;

/// Adding and subtracting it rounds a float below [`MIN_NORMAL`] to a multiple of 2^-9: at 2^14, that is the last bit.
const SUBNORMAL_ROUNDER: f32 = 16384.0;

/// Value of each code.
pub(crate) static DECODED: [f32; 256] = decode_all();

const fn decode_all() -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        values[code] = decode(code as u8);
        code += 1;
    }
    values
}

/// Value of a code.
#[must_use]
pub const fn decode(code: u8) -> f32 {
    let exponent = ((code >> 3) & 15) as u32;
    let mantissa = (code & 7) as u32;
    let magnitude = if code & 0x7f == 0x7f {
        f32::NAN
    } else if exponent == 0 {
        mantissa as f32 / 512.0
    } else {
        f32::from_bits(((exponent + 127 - 7) << 23) | (mantissa << 20))
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The e4m3 number nearest to `x`, ties to even, saturating at ±448; NaN stays NaN.
#[inline(always)]
#[must_use]
pub fn round(x: f32) -> f32 {
    let magnitude = x.abs();
    let bits = magnitude.to_bits();
    // Adds half of the last kept bit, less one unless the kept part is odd: round half to even.
    let normal = f32::from_bits(bits.wrapping_add(0x7_ffff + ((bits >> 20) & 1)) & !0xf_ffff);
    let subnormal = (magnitude + SUBNORMAL_ROUNDER) - SUBNORMAL_ROUNDER;
    let rounded = if magnitude < MIN_NORMAL { subnormal } else { normal };
    let saturated = if rounded > FP8_MAX { FP8_MAX } else { rounded };
    if magnitude.is_nan() { x } else { saturated.copysign(x) }
}

/// Code of the e4m3 number nearest to `x`; as [`round`].
#[inline(always)]
#[must_use]
pub fn encode(x: f32) -> u8 {
    let rounded = round(x);
    let sign = (rounded.to_bits() >> 24) & 0x80;
    let magnitude = rounded.abs();
    let normal = (magnitude.to_bits() >> 20).wrapping_sub((127 - 7) << 3);
    // At 2^14, the last bits of a float count steps of 2^-9.
    let subnormal = (magnitude + SUBNORMAL_ROUNDER).to_bits() & 7;
    let code = if magnitude < MIN_NORMAL { subnormal } else { normal };
    let code = if magnitude.is_nan() { 0x7f } else { code };
    (sign | code) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, literally: the nearest of all finite values, the even code on a tie.
    fn nearest_code(x: f32) -> u8 {
        let x = f64::from(x.clamp(-FP8_MAX, FP8_MAX));
        let distance = |code: u8| (f64::from(decode(code)) - x.abs()).abs();
        let mut best = 0;
        for code in 1..0x7f {
            let nearer = distance(code) < distance(best);
            if nearer || (distance(code) == distance(best) && code % 2 == 0) {
                best = code;
            }
        }
        best | if x.is_sign_negative() { 0x80 } else { 0 }
    }

    fn assert_rounds_to(x: f32, code: u8) {
        assert_eq!(encode(x), code, "{x:e}");
        assert_eq!(round(x).to_bits(), decode(code).to_bits(), "{x:e}");
    }

    #[test]
    fn decoding_follows_the_definition_and_encoding_inverts_it() {
        assert_eq!(
            [decode(0x7e), decode(0x08), decode(0x01), decode(0xb8)],
            [448.0, 1.0 / 64.0, 1.0 / 512.0, -1.0]
        );
        for code in (0..=255).filter(|code| code & 0x7f != 0x7f) {
            assert_rounds_to(decode(code), code);
        }
        assert!(decode(0x7f).is_nan() && decode(0xff).is_nan() && round(f32::NAN).is_nan());
        assert_eq!(encode(f32::NAN) & 0x7f, 0x7f);
    }

    #[test]
    fn every_boundary_rounds_to_the_nearest_and_ties_go_to_even() {
        for code in 0..0x7e_u8 {
            let (low, high) = (decode(code), decode(code + 1));
            let middle = (low + high) / 2.0;
            let even = if code % 2 == 0 { code } else { code + 1 };
            for sign in [0, 0x80] {
                let signed = |x: f32| if sign == 0 { x } else { -x };
                assert_rounds_to(signed(middle.next_down()), code | sign);
                assert_rounds_to(signed(middle), even | sign);
                assert_rounds_to(signed(middle.next_up()), (code + 1) | sign);
            }
        }
        for x in [448.0, 449.0, 464.0, 480.0, 1e9, f32::INFINITY] {
            assert_rounds_to(x, 0x7e);
            assert_rounds_to(-x, 0xfe);
        }
    }

    #[test]
    fn every_half_precision_sized_step_rounds_to_the_nearest() {
        // Every float whose low 12 bits are 0 or 1: all signs, exponents and 11 mantissa bits, and just above each.
        for high in (0..=u32::MAX >> 12).step_by(7) {
            for bits in [high << 12, (high << 12) | 1] {
                let x = f32::from_bits(bits);
                if !x.is_nan() {
                    assert_rounds_to(x, nearest_code(x));
                }
            }
        }
    }
}
