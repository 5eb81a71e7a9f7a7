//! Rotary position embedding: its tables.

use crate::{Device, Error, Result, Tensor};
use hywu_core::Dtype;

/// Rotary tables: interleaved pairs (2i, 2i+1) of each head are rotated by the angle of (token, i). They are f32, on the device of the
/// operands.
#[derive(Clone, Debug)]
pub struct Rotary {
    /// [tokens, head_dim / 2].
    pub cos: Tensor,
    /// [tokens, head_dim / 2].
    pub sin: Tensor,
}

impl Rotary {
    /// The same tables on a device, in f32 whatever the operands.
    ///
    /// # Errors
    /// A device that can't be used, or has not enough memory.
    pub fn to(&self, device: Device) -> Result<Self> {
        Ok(Self { cos: self.cos.to(device, Dtype::F32)?, sin: self.sin.to(device, Dtype::F32)? })
    }
    /// The rows of some tokens, in the same memory on a CUDA device.
    ///
    /// # Errors
    /// Tokens that the tables have not.
    pub fn rows(&self, tokens: std::ops::Range<usize>) -> Result<Self> {
        let (count, half) = (self.cos.shape()[0], self.cos.dim_back(1));
        if tokens.start > tokens.end || tokens.end > count {
            let what = format!("the rotary tables have {count} rows, not {tokens:?}");
            return Err(Error::invalid("rotary table", what));
        }
        if tokens.len() == count {
            return Ok(self.clone());
        }
        let part = |table: &Tensor| table.part(tokens.start * half, &[tokens.len(), half]);
        Ok(Self { cos: part(&self.cos), sin: part(&self.sin) })
    }
}

/// Rotary tables for positions with several coordinates: `positions[token]` holds one coordinate per axis, `widths` the channels of
/// each axis (even, sum = head_dim). Axis by axis, the angles of a coordinate u are u / theta^(2m / width) for m in 0..width / 2, with
/// theta = 10000. Frequency and angle are rounded to f32, cos and sin are those of that angle.
///
/// # Errors
/// [`Error::Invalid`] when a width is odd or a position has another number of coordinates than there are axes.
pub fn rotary_table(positions: &[Vec<u32>], widths: &[usize]) -> Result<Rotary> {
    const THETA: f64 = 10_000.0;
    if widths.iter().any(|w| !w.is_multiple_of(2)) {
        return Err(Error::invalid(
            "rotary table",
            format!("axis widths are {widths:?}, expected even numbers"),
        ));
    }
    if let Some(position) = positions.iter().find(|p| p.len() != widths.len()) {
        let what =
            format!("position {position:?} has {} coordinates, expected {}", position.len(), widths.len());
        return Err(Error::invalid("rotary table", what));
    }
    let axis = |&width: &usize| -> Vec<f32> {
        // A float32 power, as its correctly rounded value; then a float32 reciprocal.
        let power = |m| THETA.powf(f64::from((2 * m) as f32 / width as f32)) as f32;
        (0..width / 2).map(|m| 1.0 / power(m)).collect()
    };
    let frequencies: Vec<Vec<f32>> = widths.iter().map(axis).collect();
    let mut angles = Vec::with_capacity(positions.len() * widths.iter().sum::<usize>() / 2);
    for position in positions {
        for (&u, frequencies) in position.iter().zip(&frequencies) {
            angles.extend(frequencies.iter().map(|f| f64::from(u as f32 * f)));
        }
    }
    let shape = [positions.len(), widths.iter().sum::<usize>() / 2];
    let table = |f: fn(f64) -> f64| Tensor::new(&shape, angles.iter().map(|&a| f(a) as f32).collect());
    Ok(Rotary { cos: table(f64::cos)?, sin: table(f64::sin)? })
}
