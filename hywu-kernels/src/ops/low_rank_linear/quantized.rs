//! Weights in eight bits: codes, and an f32 scale for each output channel.

use super::OP;
use crate::{Device, Error, Result, Tensor, cuda::low_rank_linear::Packed};
use hywu_core::Dtype;
use rayon::prelude::*;
use std::{fmt, sync::Arc};

/// What the codes of a [`QuantizedWeight`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// Integers -127 ..= 127, two's complement.
    Int8,
    /// Floats of 4 bits of exponent and 3 of mantissa, up to 448 and without infinities (E4M3 of arXiv 2209.05433).
    Fp8,
}

/// The bits of an e4m3 lie at the end of an f32's exponent and the start of its mantissa; the exponents count from 7 and from 127.
const E4M3: f32 = f32::from_bits((127 + 127 - 7) << 23);

/// The value of an e4m3, exact. NaN codes, 0x7f and 0xff, are not among those of weights.
fn decode_e4m3(code: u8) -> f32 {
    let bits = u32::from(code & 0x7f) << 20 | u32::from(code & 0x80) << 24;
    // Subnormals become normal here.
    f32::from_bits(bits) * E4M3
}

/// The nearest e4m3, of two the even one; beyond 448 the largest.
fn encode_e4m3(value: f32) -> u8 {
    let size = value.abs().min(448.0);
    let code = match size < 1.0 / 64.0 {
        // Subnormals are multiples of 2^-9; eight of them are the code of the smallest normal number.
        true => (size * 512.0).round_ties_even() as u32,
        false => {
            let bits = size.to_bits();
            // What carries goes to the exponent.
            ((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20) - ((127 - 7) << 3)
        }
    };
    code as u8 | if value.is_sign_negative() { 0x80 } else { 0 }
}

impl Format {
    /// The largest value of a code.
    pub fn largest(self) -> f32 {
        match self {
            Self::Int8 => 127.0,
            Self::Fp8 => 448.0,
        }
    }
    /// The code that is nearest to a finite value.
    fn encode(self, value: f32) -> u8 {
        match self {
            Self::Int8 => value.round_ties_even().clamp(-127.0, 127.0) as i8 as u8,
            Self::Fp8 => encode_e4m3(value),
        }
    }
    /// scale * code, rounded to f32.
    pub(crate) fn widen(self, codes: &[u8], scale: f32, out: &mut [f32]) {
        let both = out.iter_mut().zip(codes);
        match self {
            Self::Int8 => both.for_each(|(o, &code)| *o = f32::from(code as i8) * scale),
            Self::Fp8 => both.for_each(|(o, &code)| *o = decode_e4m3(code) * scale),
        }
    }
}

/// A frozen weight of a [`LowRankLinear`](super::LowRankLinear): element (o, i) is `scale_o * code_oi`. Clones share the memory.
///
/// On the CPU a layer computes as with [`QuantizedWeight::dequantize`], bit for bit, without a copy of all of it. On a CUDA device a bf16
/// layer multiplies the codes themselves and then by the scale. Its gradient of x takes a copy of the weight, made for the call and
/// rounded to bf16; a layer of f32 takes one in f32 both ways, which is slow.
#[derive(Clone)]
pub struct QuantizedWeight {
    format: Format,
    shape: Vec<usize>,
    codes: Codes,
    /// The shape without its last axis, f32 also on devices.
    scales: Tensor,
}

#[derive(Clone)]
enum Codes {
    /// In the order of the shape.
    Host(Arc<[u8]>),
    Cuda(Packed),
}

impl QuantizedWeight {
    /// Rounds a weight, [out, in] or [experts, out, in], wherever it is, to the nearest codes; the result is on the CPU. The largest
    /// element of an output channel gets the largest code, so elements are off by at most scale / 2 (int8), or 1/16 of themselves
    /// where they are not below scale / 64 (fp8).
    ///
    /// # Errors
    /// Another shape, an element that is not finite; those of the weight's device.
    pub fn quantize(weight: &Tensor, format: Format) -> Result<Self> {
        let inner = check_shape(weight.shape())?;
        let host = weight.to_host()?;
        let mut codes = vec![0; host.numel()];
        let one = |(values, codes): (&[f32], &mut [u8])| {
            if !values.iter().all(|v| v.is_finite()) {
                return None;
            }
            let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            // A scale that is not normal would have few bits itself.
            let scale = (largest / format.largest()).max(f32::MIN_POSITIVE);
            codes.iter_mut().zip(values).for_each(|(code, v)| *code = format.encode(v / scale));
            Some(scale)
        };
        let rows = host.data().par_chunks(inner).zip(codes.par_chunks_mut(inner));
        let scales: Vec<Option<f32>> = rows.map(one).collect();
        if let Some(row) = scales.iter().position(Option::is_none) {
            return Err(Error::invalid(OP, format!("{} of the weight is not finite", named(&host, row))));
        }
        let scales =
            Tensor::new(&weight.shape()[..weight.shape().len() - 1], scales.into_iter().flatten().collect())?;
        Ok(Self { format, shape: weight.shape().to_vec(), codes: Codes::Host(codes.into()), scales })
    }

    /// From codes in the order of `shape`, [out, in] or [experts, out, in], and a scale for each of its rows, on the CPU.
    ///
    /// # Errors
    /// Lengths that are not those of the shape; a scale that is negative or not finite, a code that is NaN.
    pub fn from_parts(format: Format, shape: &[usize], codes: Vec<u8>, scales: Vec<f32>) -> Result<Self> {
        let inner = check_shape(shape)?;
        if codes.len() != shape.iter().product::<usize>() {
            return Err(Error::shape(OP, "codes", &[codes.len()], format!("as many as {shape:?}")));
        }
        if scales.len() != codes.len() / inner {
            return Err(Error::shape(OP, "scales", &[scales.len()], format!("[{}]", codes.len() / inner)));
        }
        if let Some(row) = scales.iter().position(|s| !s.is_finite() || *s < 0.0) {
            let what = format!("scale {row} of the weight is {}, not finite and at least 0", scales[row]);
            return Err(Error::invalid(OP, what));
        }
        if format == Format::Fp8
            && let Some(at) = codes.iter().position(|code| code & 0x7f == 0x7f)
        {
            return Err(Error::invalid(OP, format!("code {at} of the weight is NaN")));
        }
        let scales = Tensor::new(&shape[..shape.len() - 1], scales)?;
        Ok(Self { format, shape: shape.to_vec(), codes: Codes::Host(codes.into()), scales })
    }

    /// [out, in], or [experts, out, in].
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    /// What the codes are.
    pub fn format(&self) -> Format {
        self.format
    }
    /// The scales: the shape without its last axis.
    pub fn scales(&self) -> &Tensor {
        &self.scales
    }
    /// Where it is.
    pub fn device(&self) -> Device {
        self.scales.device()
    }
    /// Memory that it takes.
    pub fn bytes(&self) -> usize {
        let codes = match &self.codes {
            Codes::Host(codes) => codes.len(),
            Codes::Cuda(packed) => packed.bytes(),
        };
        codes + 4 * self.scales.numel()
    }
    /// The same weight on a device; shares the memory where it is there.
    ///
    /// # Errors
    /// A device that can't be used, or has not enough memory.
    pub fn to(&self, device: Device) -> Result<Self> {
        if device == self.device() {
            return Ok(self.clone());
        }
        let host = self.host_codes()?;
        let codes = match device {
            Device::Cpu => Codes::Host(host),
            Device::Cuda(n) => Codes::Cuda(Packed::upload(n, &host, self.inner())?),
        };
        Ok(Self { codes, scales: self.scales.to(device, Dtype::F32)?, ..self.clone() })
    }
    /// The elements scale * code in f32, where this is.
    ///
    /// # Errors
    /// Not enough memory on a device.
    pub fn dequantize(&self) -> Result<Tensor> {
        match &self.codes {
            Codes::Host(codes) => {
                let inner = self.inner();
                Ok(Tensor::build(&self.shape, |out| {
                    let rows = out.par_chunks_mut(inner).zip(codes.par_chunks(inner)).zip(self.scales.data());
                    rows.for_each(|((out, codes), scale)| self.format.widen(codes, *scale, out));
                }))
            }
            Codes::Cuda(_) => crate::cuda::low_rank_linear::dequantize(self, Dtype::F32),
        }
    }

    /// Codes in the order of the shape; see `cpu/low_rank_linear.rs`.
    ///
    /// # Panics
    /// For one on a CUDA device.
    pub(crate) fn codes(&self) -> &[u8] {
        match &self.codes {
            Codes::Host(codes) => codes,
            Codes::Cuda(_) => panic!("the codes of {self:?} are in device memory"),
        }
    }
    /// The codes on a CUDA device.
    pub(crate) fn packed(&self) -> Result<&Packed> {
        match &self.codes {
            Codes::Cuda(packed) => Ok(packed),
            Codes::Host(_) => Err(Error::invalid(OP, format!("{self:?} is on the host, x on a CUDA device"))),
        }
    }
    fn host_codes(&self) -> Result<Arc<[u8]>> {
        match &self.codes {
            Codes::Host(codes) => Ok(codes.clone()),
            Codes::Cuda(packed) => Ok(packed.download(self.inner())?.into()),
        }
    }
    fn inner(&self) -> usize {
        self.shape[self.shape.len() - 1]
    }
}

impl fmt::Debug for QuantizedWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QuantizedWeight{:?} {:?} on {}", self.shape, self.format, self.device())
    }
}

/// Columns of a weight.
fn check_shape(shape: &[usize]) -> Result<usize> {
    match shape {
        [.., inner] if matches!(shape.len(), 2 | 3) && !shape.contains(&0) => Ok(*inner),
        _ => Err(Error::shape(OP, "weight", shape, "[out, in] or [experts, out, in], not empty")),
    }
}

/// What row of a weight that is, in words.
fn named(weight: &Tensor, row: usize) -> String {
    match *weight.shape() {
        [_, outer, _] => format!("row {} of expert {}", row % outer, row / outer),
        _ => format!("row {row}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition: sign, exponent from 7, mantissa; exponent 0 is subnormal.
    fn defined(code: u8) -> f64 {
        let (sign, exponent, mantissa) = (code >> 7, i32::from(code >> 3 & 15), f64::from(code & 7));
        let size = match exponent {
            0 => mantissa / 8.0 * 2f64.powi(-6),
            e => (1.0 + mantissa / 8.0) * 2f64.powi(e - 7),
        };
        if sign == 1 { -size } else { size }
    }

    /// All codes but NaN.
    fn codes() -> impl Iterator<Item = u8> {
        (0..=255).filter(|code| code & 0x7f != 0x7f)
    }

    #[test]
    fn every_code_has_the_value_that_defines_it() {
        for code in codes() {
            let value = decode_e4m3(code);
            assert_eq!(f64::from(value), defined(code), "{code:#x}");
            assert_eq!(value.is_sign_negative(), code > 0x7f, "{code:#x}");
            assert_eq!(encode_e4m3(value), code);
        }
        for value in -127..=127i8 {
            assert_eq!(Format::Int8.encode(value.into()), value as u8);
        }
    }

    /// Between every two neighbours: at the middle, which goes to the even one, just beside it, and close to both.
    #[test]
    fn every_rounding_is_to_the_nearest_and_ties_are_to_even() {
        for low in 0..0x7e {
            let (a, b) = (decode_e4m3(low), decode_e4m3(low + 1));
            let middle = (a + b) / 2.0;
            let even = low + (low & 1);
            for (value, code) in [
                (middle, even),
                (middle.next_down(), low),
                (middle.next_up(), low + 1),
                (a.next_up(), low),
                (b.next_down(), low + 1),
            ] {
                assert_eq!(encode_e4m3(value), code, "{value}");
                assert_eq!(encode_e4m3(-value), code | 0x80, "-{value}");
            }
        }
        for value in [448.0, 449.0, 464.0, 465.0, 1e30, f32::MAX] {
            assert_eq!(encode_e4m3(value), 0x7e);
            assert_eq!(encode_e4m3(-value), 0xfe);
        }
        for (value, code) in
            [(0.0, 0), (-0.0, 0x80), (f32::MIN_POSITIVE, 0), (1e-45, 0), (0.000_976_562_6, 1)]
        {
            assert_eq!(encode_e4m3(value), code, "{value}");
        }
        for (value, code) in [(0.5, 0), (1.5, 2), (-2.5, -2), (126.6, 127), (127.4, 127), (-1e9, -127i8)] {
            assert_eq!(Format::Int8.encode(value) as i8, code, "{value}");
        }
    }
}
