//! Small functions that vectorise.

/// e^x to about 2e-7 relative; 0 below -104, infinite above 89, NaN for NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // x = n ln 2 + r, |r| <= ln 2 / 2, ln 2 in two parts so that n ln 2 is exact; e^r by its Taylor series.
    if x < -104.0 {
        return 0.0;
    }
    if x > 89.0 || x.is_nan() {
        return x + f32::INFINITY;
    }
    let n = (x * std::f32::consts::LOG2_E + 12_582_912.0) - 12_582_912.0;
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let p = 1.0
        + r * (1.0
            + r * (0.5
                + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0 + r / 5040.0))))));
    // Two factors: 2^n alone leaves the range of normal numbers at both ends.
    let half = n as i32 / 2;
    let power = |k: i32| f32::from_bits(((k + 127) as u32) << 23);
    p * power(half) * power(n as i32 - half)
}

/// Sum of products in eight lanes, in one fixed order.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a8.remainder().iter().zip(b8.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a8.zip(b8) {
        for i in 0..8 {
            lanes[i] += a[i] * b[i];
        }
    }
    lanes.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn exp_is_accurate_everywhere() {
        for i in -8_700_000..=8_800_000 {
            let x = i as f32 * 1e-5;
            let (got, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got - expected).abs() <= 3e-7 * expected, "{x}: {got} against {expected}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(1000.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }
}
