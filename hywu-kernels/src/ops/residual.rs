//! A residual stream: what the sub-layers of a transformer read through an RMSNorm (arXiv 1910.07467) and add their results to. It is
//! kept in f32 whatever they compute in, and changed in place, at the latest when it is read: for inference, where no gradient needs what it was before.

use crate::{Device, Error, Result, Tensor, testing};
use hywu_core::Dtype;

const OP: &str = "residual";

/// Rows [rows, channels] in f32 that are read and added to piece by piece.
pub struct Stream {
    x: Tensor,
    late: Option<Late>,
}

/// What is yet to be added to all rows from one on: whoever reads them does it, which saves a device a pass over them.
struct Late {
    y: Tensor,
    from: usize,
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
    /// The rows, where they are neighbours.
    pub(crate) fn neighbours(&self) -> Option<std::ops::Range<usize>> {
        let one = self.count == 1 || self.pitch == self.length;
        one.then(|| self.first..self.first + self.rows())
    }
    /// One past the last row; none where that overflows, or where runs overlap.
    pub(crate) fn end(&self) -> Option<usize> {
        if self.pitch < self.length {
            return None;
        }
        let last = self.count.checked_sub(1)?.checked_mul(self.pitch)?;
        self.first.checked_add(last)?.checked_add(self.length)
    }
}

/// Do rows start at multiples of 16 bytes?
fn whole_packs(channels: usize, dtype: Dtype) -> bool {
    (channels * dtype.size()).is_multiple_of(16)
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
        Ok(Self { x, late: None })
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
    ///
    /// # Errors
    /// Those of the device.
    pub fn value(&mut self) -> Result<&Tensor> {
        self.settle()?;
        Ok(&self.x)
    }
    /// The rows, [rows, channels] in f32, and the stream is no more.
    ///
    /// # Errors
    /// Those of the device.
    pub fn into_value(mut self) -> Result<Tensor> {
        self.settle()?;
        Ok(self.x)
    }

    /// x / sqrt(mean(x^2) + eps) * weight of some rows, [rows, channels], rounded to the dtype of `weight` `[channels]`.
    ///
    /// # Errors
    /// Rows outside of the stream, another number of channels, another device, eps that is not positive.
    pub fn read(&mut self, runs: Runs, weight: &Tensor, eps: f32) -> Result<Tensor> {
        let channels = self.x.dim_back(1);
        self.check(runs)?;
        if weight.shape() != [channels] {
            return Err(Error::shape(OP, "weight", weight.shape(), format!("[{channels}]")));
        }
        if eps.is_nan() || eps <= 0.0 {
            return Err(Error::invalid(OP, format!("eps {eps} is not positive")));
        }
        self.beside(weight)?;
        let late = self.late_for(runs, weight.dtype())?;
        self.x.make_unique()?;
        let out = on_device!(weight, residual::read(&mut self.x, runs, late.as_ref(), weight, eps));
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
        if self.late.as_ref().is_some_and(|late| runs.end() > Some(late.from)) {
            self.settle()?;
        }
        let rows = self.x.shape()[0];
        if y.is_cuda() && runs.neighbours() == Some(0..rows) && whole_packs(self.x.dim_back(1), y.dtype()) {
            self.late = Some(Late { y: y.clone(), from: 0 });
            return Ok(());
        }
        self.add_now(runs, y)
    }

    fn add_now(&mut self, runs: Runs, y: &Tensor) -> Result<()> {
        self.x.make_unique()?;
        on_device!(y, residual::add(&mut self.x, runs, y));
        Ok(())
    }
    /// Adds what is late.
    fn settle(&mut self) -> Result<()> {
        let Some(Late { y, from }) = self.late.take() else { return Ok(()) };
        let (rows, channels) = (self.x.shape()[0], self.x.dim_back(1));
        let rest = y.part(from * channels, &[rows - from, channels]);
        self.add_now(Runs::of(from..rows), &rest)
    }
    /// What is to be added to these rows when they are read in `dtype`.
    fn late_for(&mut self, runs: Runs, dtype: Dtype) -> Result<Option<Tensor>> {
        let (rows, channels) = (self.x.shape()[0], self.x.dim_back(1));
        let Some(Late { y, from }) = &mut self.late else { return Ok(None) };
        match runs.neighbours() {
            Some(read) if read.start == *from && y.dtype() == dtype => {
                let part = y.part(read.start * channels, &[read.len(), channels]);
                *from = read.end;
                if read.end == rows {
                    self.late = None;
                }
                Ok(Some(part))
            }
            _ => self.settle().map(|()| None),
        }
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
