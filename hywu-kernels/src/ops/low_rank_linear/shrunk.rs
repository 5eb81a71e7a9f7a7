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
    /// For `rows` of x, `ranks` (all parts) and this scale; `s` has the [`shrunk_shape`].
    pub(crate) fn new(s: Tensor, rows: usize, ranks: usize, scale: f32) -> Self {
        Self { s, rows, ranks, scale }
    }

    pub(crate) fn tensor(&self) -> &Tensor {
        &self.s
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

/// scale X A^T for a [`LowRankLinear`](super::LowRankLinear): `x` [.., in], `a` [adapters, P r, in]. Without segments the adapters divide
/// the rows evenly.
///
/// # Errors
/// Shapes that don't agree, an empty operand, a scale that is not finite.
pub fn shrink(x: &Tensor, a: &Tensor, scale: f32, segments: Option<&Segments>) -> Result<Shrunk> {
    let &[adapters, ranks, inner] = a.shape() else {
        return Err(Error::shape(OP, "lora_a", a.shape(), "[adapters, rank, in]"));
    };
    if a.numel() == 0 || x.numel() == 0 || x.dim_back(1) != inner {
        return Err(Error::shape(
            OP,
            "x",
            x.shape(),
            format!("[.., {inner}], not empty, as lora_a {:?}", a.shape()),
        ));
    }
    let rows = x.numel() / inner;
    let fits = match segments {
        None => rows.is_multiple_of(adapters),
        Some(s) => s.rows() == rows && s.adapters() <= adapters,
    };
    if !fits {
        let what = match segments {
            None => format!("{rows} rows don't divide evenly over {adapters} adapters"),
            Some(s) => {
                let (of, in_use) = (s.rows(), s.adapters());
                format!("segments of {of} rows and {in_use} adapters; x has {rows}, lora_a {adapters}")
            }
        };
        return Err(Error::invalid(OP, what));
    }
    if !scale.is_finite() {
        return Err(Error::invalid(OP, format!("scale {scale} is not finite")));
    }
    together(OP, &[x, a])?;
    let s = on_device!(x, low_rank_linear::shrink(x, a, scale, segments));
    Ok(Shrunk::new(s, rows, ranks, scale))
}
