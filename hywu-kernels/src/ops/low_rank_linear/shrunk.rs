//! S = scale X A^T, computed apart from the layer that uses it.

use super::{OP, Segments};
use crate::{Error, LoraVar, Result, Tensor, cuda::low_rank_linear as cuda, ops::together};

/// scale X A^T of a layer with adapters; see [`LowRankLinear::shrunk`](super::LowRankLinear::shrunk).
#[derive(Clone, Debug)]
pub struct Shrunk {
    /// As [`shrunk_shape`] says.
    s: Tensor,
    rows: usize,
    ranks: usize,
    scale: f32,
}

impl Shrunk {
    /// Is it of so many rows, over which so many adapters divide evenly, and ranks?
    pub(super) fn is_for(&self, rows: usize, adapters: usize, ranks: usize) -> bool {
        let shape = shrunk_shape(&self.s, None, rows, adapters, ranks);
        [self.rows, self.ranks] == [rows, ranks] && self.s.shape() == shape
    }

    pub(crate) fn tensor(&self) -> &Tensor {
        &self.s
    }

    /// Rows of x, and ranks.
    pub(crate) fn size(&self) -> [usize; 2] {
        [self.rows, self.ranks]
    }

    /// Is it that of a layer with these?
    pub(super) fn check(&self, x: &Tensor, lora: &LoraVar, segments: Option<&Segments>) -> Result<()> {
        together(OP, &[x, &self.s])?;
        let (adapters, ranks, rows) = (lora.a.shape()[0], lora.a.shape()[1], x.numel() / x.dim_back(1));
        if [self.rows, self.ranks] != [rows, ranks] {
            let expected = format!("rows and ranks [{rows}, {ranks}]");
            return Err(Error::shape(OP, "X A^T, computed ahead,", &[self.rows, self.ranks], expected));
        }
        if self.scale != lora.scale {
            let what = format!("X A^T was computed with scale {}, lora's is {}", self.scale, lora.scale);
            return Err(Error::invalid(OP, what));
        }
        if self.s.shape() != shrunk_shape(x, segments, rows, adapters, ranks) {
            return Err(Error::invalid(OP, "X A^T was computed for other segments"));
        }
        Ok(())
    }
}

/// The shape of S where `like` is: the rows of x and the ranks, with bands and padding on a CUDA device (`kernels-cu/low_rank_linear/
/// rows.cuh`), which are zero.
pub(crate) fn shrunk_shape(
    like: &Tensor,
    segments: Option<&Segments>,
    rows: usize,
    adapters: usize,
    ranks: usize,
) -> [usize; 2] {
    match like.is_cuda() {
        true => cuda::banded(segments, rows, adapters, ranks),
        false => [rows, ranks],
    }
}

/// What scale X A^T is to be computed with, for a [`LowRankLinear`](super::LowRankLinear) that has the same.
#[derive(Clone, Copy, Debug)]
pub struct Shrink<'a> {
    /// A: [adapters, P r, in].
    pub a: &'a Tensor,
    /// Of the adapters.
    pub scale: f32,
    /// Whose adapter each row has; without segments the adapters divide the rows evenly.
    pub segments: Option<&'a Segments>,
}

impl<'a> Shrink<'a> {
    /// For a layer with these adapters and segments.
    pub fn by(lora: &'a LoraVar, segments: Option<&'a Segments>) -> Self {
        Self { a: lora.a.value(), scale: lora.scale, segments }
    }

    /// That of `x` [.., in].
    ///
    /// # Errors
    /// Shapes that don't agree, an empty operand, a scale that is not finite.
    pub fn of(&self, x: &Tensor) -> Result<Shrunk> {
        self.validate(x, x.dim_back(1))?;
        let s = on_device!(x, low_rank_linear::shrink(x, self.a, self.scale, self.segments));
        Ok(self.shrunk(x, s))
    }

    /// Can it be computed of as many rows as `like` has, of `columns` each, where `like` is?
    pub(crate) fn validate(&self, like: &Tensor, columns: usize) -> Result<()> {
        let Self { a, scale, segments } = *self;
        let &[adapters, _, inner] = a.shape() else {
            return Err(Error::shape(OP, "lora_a", a.shape(), "[adapters, rank, in]"));
        };
        if a.numel() == 0 || like.numel() == 0 || columns != inner {
            let expected = format!("[.., {inner}], not empty, as lora_a {:?}", a.shape());
            return Err(Error::shape(OP, "x", like.shape(), expected));
        }
        let rows = like.numel() / like.dim_back(1);
        match segments {
            None if !rows.is_multiple_of(adapters) => {
                let what = format!("{rows} rows don't divide evenly over {adapters} adapters");
                return Err(Error::invalid(OP, what));
            }
            Some(s) if s.rows() != rows || s.adapters() > adapters => {
                let (of, in_use) = (s.rows(), s.adapters());
                let what =
                    format!("segments of {of} rows and {in_use} adapters; x has {rows}, lora_a {adapters}");
                return Err(Error::invalid(OP, what));
            }
            _ => {}
        }
        if !scale.is_finite() {
            return Err(Error::invalid(OP, format!("scale {scale} is not finite")));
        }
        together(OP, &[like, a])
    }

    /// What was computed so of the rows of `x`.
    pub(crate) fn shrunk(&self, x: &Tensor, s: Tensor) -> Shrunk {
        Shrunk { s, rows: x.numel() / x.dim_back(1), ranks: self.a.shape()[1], scale: self.scale }
    }
}

/// [`Shrink::of`] x.
///
/// # Errors
/// As [`Shrink::of`].
pub fn shrink(x: &Tensor, a: &Tensor, scale: f32, segments: Option<&Segments>) -> Result<Shrunk> {
    Shrink { a, scale, segments }.of(x)
}
