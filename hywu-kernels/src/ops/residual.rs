//! A residual stream: what the sub-layers of a transformer read through an RMSNorm (arXiv 1910.07467) and add their results to. It is
//! kept in f32 whatever they compute in, and changed in place: for inference, where no gradient needs what it was before.

use crate::{Device, Error, Result, Tensor, testing};
use hywu_core::Dtype;

const OP: &str = "residual";

/// Rows [rows, channels] in f32 that are read and added to piece by piece.
pub struct Stream {
    x: Tensor,
}

/// Some rows of a stream: runs of neighbours, evenly spaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Runs {
    /// The first row.
    pub first: usize,
    /// Number of runs.
    pub count: usize,
    /// Rows of a run.
    pub length: usize,
    /// Rows from the start of a run to that of the next, at least `length`.
    pub pitch: usize,
}

impl Runs {
    /// One run.
    pub fn of(rows: std::ops::Range<usize>) -> Self {
        Self { first: rows.start, count: 1, length: rows.len(), pitch: rows.len() }
    }
    /// Rows in all.
    pub fn rows(&self) -> usize {
        self.count * self.length
    }
    /// One past the last row; none where that overflows, or where runs overlap.
    fn end(&self) -> Option<usize> {
        if self.pitch < self.length {
            return None;
        }
        let last = self.count.checked_sub(1)?.checked_mul(self.pitch)?;
        self.first.checked_add(last)?.checked_add(self.length)
    }
}

impl Stream {
    /// Zeros on a device.
    ///
    /// # Errors
    /// A device that can't be used, or has not enough memory; no rows or no channels.
    pub fn zeros(device: Device, rows: usize, channels: usize) -> Result<Self> {
        if rows == 0 || channels == 0 {
            return Err(Error::shape(OP, "stream", &[rows, channels], "at least one row of one channel"));
        }
        let mut x = Tensor::empty(device, &[rows, channels], Dtype::F32)?;
        x.clear()?;
        Ok(Self { x })
    }
    /// A copy of [rows, channels] in f32, `times` times one after the other.
    ///
    /// # Errors
    /// Another shape or dtype; not enough memory.
    pub fn repeated(x: &Tensor, times: usize) -> Result<Self> {
        let &[rows, channels] = x.shape() else {
            return Err(Error::shape(OP, "stream", x.shape(), "[rows, channels]"));
        };
        let mut stream = Self::zeros(x.device(), rows * times, channels)?;
        for i in 0..times {
            stream.add(Runs::of(i * rows..(i + 1) * rows), x)?;
        }
        Ok(stream)
    }
    /// The rows, [rows, channels] in f32.
    pub fn value(&self) -> &Tensor {
        &self.x
    }
    /// The rows, [rows, channels] in f32, and the stream is no more.
    pub fn into_value(self) -> Tensor {
        self.x
    }

    /// x / sqrt(mean(x^2) + eps) * weight of some rows, [rows, channels], rounded to the dtype of `weight` `[channels]`.
    ///
    /// # Errors
    /// Rows outside of the stream, another number of channels, another device, eps that is not positive.
    pub fn read(&self, runs: Runs, weight: &Tensor, eps: f32) -> Result<Tensor> {
        let channels = self.x.dim_back(1);
        self.check(runs)?;
        if weight.shape() != [channels] {
            return Err(Error::shape(OP, "weight", weight.shape(), format!("[{channels}]")));
        }
        if eps.is_nan() || eps <= 0.0 {
            return Err(Error::invalid(OP, format!("eps {eps} is not positive")));
        }
        self.beside(weight)?;
        let out = on_device!(self.x, residual::read(&self.x, runs, weight, eps));
        Ok(testing::as_naive(out))
    }

    /// Adds `y`, with as many elements as the rows have, to some rows.
    ///
    /// # Errors
    /// Rows outside of the stream, another number of elements, another device.
    pub fn add(&mut self, runs: Runs, y: &Tensor) -> Result<()> {
        self.check(runs)?;
        let expected = runs.rows() * self.x.dim_back(1);
        if y.numel() != expected {
            return Err(Error::shape(OP, "y", y.shape(), format!("{expected} elements")));
        }
        self.beside(y)?;
        self.x.make_unique()?;
        on_device!(y, residual::add(&mut self.x, runs, y));
        Ok(())
    }

    fn check(&self, runs: Runs) -> Result<()> {
        match runs.end() {
            Some(end) if end <= self.x.shape()[0] && runs.length > 0 => Ok(()),
            _ => Err(Error::invalid(OP, format!("a stream {:?} has not the rows {runs:?}", self.x.shape()))),
        }
    }
    fn beside(&self, other: &Tensor) -> Result<()> {
        if other.device() == self.x.device() {
            return Ok(());
        }
        let what = format!("the stream is on {}, an operand on {}", self.x.device(), other.device());
        Err(Error::invalid(OP, what))
    }
}
