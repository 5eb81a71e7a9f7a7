use half::{bf16, f16};
use safetensors::tensor::Dtype as Stored;

/// Element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The nearest value of this type: infinite for one beyond its range, such as 7e4 in f16.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::F32 => x,
            Self::F16 => f16::from_f32(x).to_f32(),
            Self::Bf16 => bf16::from_f32(x).to_f32(),
        }
    }

    /// Where the first finite number is that this type would make infinite.
    pub fn first_beyond(self, values: &[f32]) -> Option<usize> {
        // Halfway from its largest number to what would come next, from where on rounding to even leads out.
        let end = match self {
            Self::F32 => return None,
            Self::F16 => 65_520.0,
            Self::Bf16 => f32::from_bits(0x7f7f_8000),
        };
        values.iter().position(|x| x.is_finite() && x.abs() >= end)
    }

    /// The first of some values that is not finite as this type holds it.
    pub(crate) fn first_not_finite<'a>(self, values: impl IntoIterator<Item = &'a f32>) -> Option<f32> {
        values.into_iter().copied().find(|&x| !self.round(x).is_finite())
    }

    /// Appends values as they are stored: rounded, little-endian.
    pub(crate) fn encode(self, values: &[f32], out: &mut Vec<u8>) {
        match self {
            Self::F32 => out.extend(values.iter().flat_map(|x| x.to_le_bytes())),
            Self::F16 => out.extend(values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes())),
            Self::Bf16 => out.extend(values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes())),
        }
    }

    /// Widens stored elements.
    pub(crate) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        fn fill<const N: usize>(out: &mut [f32], bytes: &[u8], widen: impl Fn([u8; N]) -> f32) {
            let (whole, _) = bytes.as_chunks::<N>();
            out.iter_mut().zip(whole).for_each(|(o, b)| *o = widen(*b));
        }
        match self {
            Self::F32 => fill(out, bytes, f32::from_le_bytes),
            Self::F16 => fill(out, bytes, |b| f16::from_le_bytes(b).to_f32()),
            Self::Bf16 => fill(out, bytes, |b| bf16::from_le_bytes(b).to_f32()),
        }
    }

    /// The type of a file's tensor, if it is one that this project computes with.
    pub(crate) fn of(stored: Stored) -> Option<Self> {
        match stored {
            Stored::F32 => Some(Self::F32),
            Stored::F16 => Some(Self::F16),
            Stored::BF16 => Some(Self::Bf16),
            _ => None,
        }
    }

    /// What the format calls it.
    pub(crate) fn stored(self) -> Stored {
        match self {
            Self::F32 => Stored::F32,
            Self::F16 => Stored::F16,
            Self::Bf16 => Stored::BF16,
        }
    }
}

/// The first element that is NaN, of any type that has NaN.
pub(crate) fn first_nan(bytes: &[u8], dtype: Stored) -> Option<usize> {
    /// Without a branch per element first: nearly always there is none.
    fn find<const N: usize>(bytes: &[u8], nan: impl Fn([u8; N]) -> bool) -> Option<usize> {
        let (all, _) = bytes.as_chunks::<N>();
        let any = all.iter().fold(false, |any, b| any | nan(*b));
        if any { all.iter().position(|b| nan(*b)) } else { None }
    }
    match dtype {
        Stored::F64 => find(bytes, |b| f64::from_le_bytes(b).is_nan()),
        Stored::F32 => find(bytes, |b| f32::from_le_bytes(b).is_nan()),
        // Two numbers of four bytes.
        Stored::C64 => find(bytes, |b| f32::from_le_bytes(b).is_nan()).map(|i| i / 2),
        Stored::F16 => find(bytes, |b| u16::from_le_bytes(b) & 0x7fff > 0x7c00),
        Stored::BF16 => find(bytes, |b| u16::from_le_bytes(b) & 0x7fff > 0x7f80),
        Stored::F8_E5M2 => find(bytes, |[b]| b & 0x7f > 0x7c),
        Stored::F8_E4M3 => find(bytes, |[b]| b & 0x7f == 0x7f),
        Stored::F8_E4M3FNUZ | Stored::F8_E5M2FNUZ => find(bytes, |[b]| b == 0x80),
        Stored::F8_E8M0 => find(bytes, |[b]| b == 0xff),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_is_found_in_every_type_and_infinity_is_not() {
        let f16 = |x: f32| f16::from_f32(x).to_le_bytes().to_vec();
        let bf16 = |x: f32| bf16::from_f32(x).to_le_bytes().to_vec();
        let number = |x: f32| [(Stored::F16, f16(x)), (Stored::BF16, bf16(x))].into_iter();
        let wide = |x: f32| {
            [
                (Stored::F32, x.to_le_bytes().to_vec()),
                (Stored::F64, f64::from(x).to_le_bytes().to_vec()),
                (Stored::C64, [1.0, x].map(f32::to_le_bytes).concat()),
            ]
        };
        let eight = |all: [u8; 5]| {
            let types =
                [Stored::F8_E5M2, Stored::F8_E4M3, Stored::F8_E4M3FNUZ, Stored::F8_E5M2FNUZ, Stored::F8_E8M0];
            types.into_iter().zip(all).map(|(dtype, byte)| (dtype, vec![byte]))
        };
        let nans = number(f32::NAN).chain(number(-f32::NAN)).chain(wide(f32::NAN));
        for (dtype, nan) in nans.chain(eight([0x7d, 0x7f, 0x80, 0x80, 0xff])).chain(eight([0xff; 5]).take(2))
        {
            let zeros = vec![0; 2 * nan.len()];
            assert_eq!(first_nan(&[&zeros[..], &nan, &nan].concat(), dtype), Some(2), "{dtype:?}");
            assert_eq!(first_nan(&zeros, dtype), None, "{dtype:?}");
        }
        let good = [f32::INFINITY, f32::NEG_INFINITY, -0.0, f32::MAX];
        let good = good.into_iter().flat_map(|x| number(x).chain(wide(x)));
        for (dtype, bytes) in good.chain(eight([0x7c, 0x7e, 0xff, 0x7f, 0x80])) {
            assert_eq!(first_nan(&bytes, dtype), None, "{dtype:?} {bytes:?}");
        }
        assert_eq!(first_nan(&[0xff; 8], Stored::I64), None);
    }

    #[test]
    fn what_is_beyond_a_type_is_told() {
        let values = [1.0, 7e4, 3.4e38];
        let all = [Dtype::F32, Dtype::F16, Dtype::Bf16];
        assert_eq!(all.map(|dtype| dtype.first_not_finite(&values)), [None, Some(7e4), Some(3.4e38)]);
        assert_eq!(all.map(|dtype| dtype.first_beyond(&values)), [None, Some(1), Some(2)]);
        // Halfway to what would be the next number.
        assert_eq!(Dtype::F16.first_beyond(&[65519.0, 65520.0]), Some(1));
        assert_eq!(Dtype::F16.first_not_finite(&[65519.0, 65520.0]), Some(65520.0));
        assert!(Dtype::F32.first_not_finite(&[f32::NAN]).is_some_and(f32::is_nan));
        assert_eq!(Dtype::F16.first_beyond(&[f32::NAN, f32::INFINITY]), None);
    }
}
