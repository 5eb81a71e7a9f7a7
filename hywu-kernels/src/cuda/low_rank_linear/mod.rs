//! Launchers of `kernels-cu/low_rank_linear`; see `cpu/low_rank_linear.rs` for what each computes. S and dS lie in bands, as
//! `kernels-cu/low_rank_linear/rows.cuh` says.
//!
//! What a forward pass computes for a row must not depend on the other rows. So its products are summed in an order that depends on k
//! alone, by kernels of our own: cuBLASLt, which chooses an algorithm by the number of rows, takes part in gradients only
//! ([`Use`]).

pub(crate) mod ladder;
mod merge;
mod product;
mod quantized;
mod rows;
mod shrink;
mod warpgroup;
mod within;

pub use merge::merge;
pub(super) use product::Layout;
pub(crate) use quantized::{Packed, dequantize};
pub(crate) use rows::{Tables, banded};
pub(super) use shrink::Beside;

use crate::{
    Error, Result, Tensor,
    ops::low_rank_linear::{Segments, Shrink, Weight, matrix},
};
use hywu_core::Dtype;
use product::{Operand, Over, Product, Use};
use rows::Rows;
use std::borrow::Cow;

const OP: &str = "low_rank_linear";

fn int(value: usize) -> Result<i32> {
    i32::try_from(value)
        .map_err(|_| Error::invalid(OP, format!("a size of {value} is more than a kernel takes")))
}

/// How many matrices there are.
fn matrices(shape: &[usize]) -> usize {
    shape[..shape.len() - 2].iter().product()
}

pub fn shrink(x: &Tensor, a: &Tensor, scale: f32, segments: Option<&Segments>) -> Result<Tensor> {
    if x.dtype() == Dtype::Bf16 {
        return shrink::shrink(x, a, scale, segments);
    }
    let [ranks, inner] = matrix(a.shape());
    let (rows, adapters) = (x.numel() / inner, a.shape()[0]);
    let shape = banded(segments, rows, adapters, ranks);
    let product = Product {
        layout: Layout::Nt,
        over: Over::Entries(Rows::adapters(x, segments, rows, adapters)?),
        dims: [0, ranks, inner],
        parts: 1,
        a: Operand::rows(x, inner),
        b: Operand::matrices(a),
        low_rank: None,
        bias: None,
        out: [0, 0, shape[1]],
        alpha: scale,
    };
    product.run(&shape)
}

impl Weight<'_> {
    /// In this dtype: a weight in eight bits is widened, all of it.
    fn dense(&self, dtype: Dtype) -> Result<Cow<'_, Tensor>> {
        Ok(match *self {
            Weight::Dense(weight) => Cow::Borrowed(weight.value()),
            Weight::Quantized(weight) => Cow::Owned(dequantize(weight, dtype)?),
        })
    }
}

/// S, B and the number of parts.
type Update<'a> = (&'a Tensor, &'a Tensor, usize);

/// [`expand`] by the kernels that every device has: `weight` has `outer` rows.
fn expand_product<'a>(
    x: &'a Tensor,
    weight: Operand<'a>,
    outer: usize,
    bias: Option<&'a Tensor>,
    low_rank: Option<Update<'a>>,
    segments: Option<&'a Segments>,
) -> Product<'a> {
    let inner = x.dim_back(1);
    let parts = low_rank.map_or(1, |(_, _, parts)| parts);
    let (part, adapters) = (outer / parts, low_rank.map_or(0, |(_, b, _)| b.shape()[0]));
    Product {
        layout: Layout::Nt,
        over: Over::Rows { segments, rows: x.numel() / inner, adapters },
        dims: [0, part, inner],
        parts,
        a: Operand::rows(x, inner),
        b: weight.by_part(part * weight.pitch),
        // [X | S] [W | B]^T: the update is a few more steps of the same sum.
        low_rank: low_rank.map(|(s, b, _)| {
            let rank = b.shape()[2];
            (Operand::shrunk(s).by_part(rank), Operand::matrices(b).by_part(part * rank), rank)
        }),
        bias,
        out: [0, part, outer],
        alpha: 1.0,
    }
}

/// The same by the kernels of Hopper.
fn expand_on_hopper<'a>(
    x: &'a Tensor,
    weight: &'a Tensor,
    bias: Option<&'a Tensor>,
    low_rank: Option<Update<'a>>,
    segments: Option<&'a Segments>,
) -> warpgroup::Product<'a> {
    let [outer, inner] = matrix(weight.shape());
    warpgroup::Product {
        layout: Layout::Nt,
        dims: [x.numel() / inner, outer, inner],
        a: x,
        b: weight,
        low_rank: low_rank.map(|(s, b, parts)| warpgroup::LowRank {
            s,
            b,
            adapters: b.shape()[0],
            ranks: b.shape()[2],
            parts,
        }),
        bias,
        segments,
    }
}

/// [`shrink()`], then [`expand`]: S and Y.
pub fn shrink_expand(
    x: &Tensor,
    weight: Weight<'_>,
    bias: Option<&Tensor>,
    by: Shrink<'_>,
    (b, parts): (&Tensor, usize),
    shape: &[usize],
) -> Result<(Tensor, Tensor)> {
    let Shrink { a, scale, segments } = by;
    let s = match weight {
        Weight::Dense(weight) if x.dtype() == Dtype::Bf16 => {
            let work = shrink::Work::new(x, x.numel() / x.dim_back(1), by, 1)?;
            let term = Some((&work.s, b, parts));
            let product = expand_on_hopper(x, weight.value(), bias, term, segments);
            if product.fits()?
                && let Some(out) = product.run_with_s(&work, shape)?
            {
                return Ok((work.s, out));
            }
            work.run(x)?
        }
        _ => shrink(x, a, scale, segments)?,
    };
    let out = expand(x, weight, bias, Some((&s, b, parts)), segments, shape)?;
    Ok((s, out))
}

pub fn expand(
    x: &Tensor,
    weight: Weight<'_>,
    bias: Option<&Tensor>,
    low_rank: Option<Update>,
    segments: Option<&Segments>,
    shape: &[usize],
) -> Result<Tensor> {
    let [outer, _] = matrix(weight.shape());
    if let Weight::Quantized(weight) = weight
        && x.dtype() == Dtype::Bf16
    {
        let codes = Operand::codes(weight);
        return quantized::expand(&expand_product(x, codes, outer, bias, low_rank, segments), weight, shape);
    }
    let weight = &*weight.dense(x.dtype())?;
    let product = expand_product(x, Operand::matrices(weight), outer, bias, low_rank, segments);
    if let Some(out) = product.by_blas(Use::Everywhere, matrices(weight.shape()), shape)? {
        return Ok(out);
    }
    let on_hopper = expand_on_hopper(x, weight, bias, low_rank, segments);
    if on_hopper.fits()? { on_hopper.run(shape) } else { product.run(shape) }
}

pub fn shrink_gradient(
    grad: &Tensor,
    b: &Tensor,
    scale: f32,
    parts: usize,
    segments: Option<&Segments>,
) -> Result<Tensor> {
    if grad.dtype() == Dtype::Bf16 {
        return shrink::shrink_gradient(grad, b, scale, parts, segments);
    }
    let [outer, rank] = matrix(b.shape());
    let (rows, adapters, part) = (grad.numel() / outer, b.shape()[0], outer / parts);
    let shape = banded(segments, rows, adapters, parts * rank);
    let product = Product {
        layout: Layout::Nn,
        over: Over::Entries(Rows::adapters(grad, segments, rows, adapters)?),
        dims: [0, rank, part],
        parts,
        a: Operand::rows(grad, outer).by_part(part),
        b: Operand::matrices(b).by_part(part * rank),
        low_rank: None,
        bias: None,
        out: [0, rank, shape[1]],
        alpha: scale,
    };
    product.run(&shape)
}

pub fn expand_gradient(
    grad: &Tensor,
    weight: Weight<'_>,
    low_rank: Option<(&Tensor, &Tensor)>,
    segments: Option<&Segments>,
    shape: &[usize],
) -> Result<Tensor> {
    let [outer, inner] = matrix(weight.shape());
    let adapters = low_rank.map_or(0, |(_, a)| a.shape()[0]);
    // A weight in eight bits is rounded here, once.
    let weight = &*weight.dense(grad.dtype())?;
    let product = Product {
        layout: Layout::Nn,
        over: Over::Rows { segments, rows: grad.numel() / outer, adapters },
        dims: [0, inner, outer],
        parts: 1,
        a: Operand::rows(grad, outer),
        b: Operand::matrices(weight),
        low_rank: low_rank.map(|(ds, a)| (Operand::shrunk(ds), Operand::matrices(a), a.shape()[1])),
        bias: None,
        out: [0, 0, inner],
        alpha: 1.0,
    };
    let on_hopper = warpgroup::Product {
        layout: Layout::Nn,
        dims: [grad.numel() / outer, inner, outer],
        a: grad,
        b: weight,
        low_rank: low_rank.map(|(s, b)| warpgroup::LowRank { s, b, adapters, ranks: b.shape()[1], parts: 1 }),
        bias: None,
        segments,
    };
    if let Some(out) = product.by_blas(Use::Gradients, matrices(weight.shape()), shape)? {
        return Ok(out);
    }
    if on_hopper.fits()? { on_hopper.run(shape) } else { product.run(shape) }
}

pub fn weight_gradient(
    left: &Tensor,
    right: &Tensor,
    segments: Option<&Segments>,
    shape: &[usize],
) -> Result<Tensor> {
    let [m, n] = matrix(shape);
    let entries = Rows::weights(left, segments, left.numel() / m)?;
    let product = row_products(Operand::rows(left, m), Operand::rows(right, n), 1, entries, shape);
    if let Some(out) = product.by_blas(Use::Gradients, matrices(shape), shape)? {
        return Ok(out);
    }
    let on_hopper = warpgroup::Product {
        layout: Layout::Tn,
        dims: [m, n, left.numel() / m],
        a: left,
        b: right,
        low_rank: None,
        bias: None,
        segments: None,
    };
    let one = matrices(shape) == 1 && segments.is_none_or(|s| s.is_even().is_some());
    // Few tiles of long sums are better cut into parts.
    if one && on_hopper.fits()? && on_hopper.fills()? { on_hopper.run(shape) } else { product.run(shape) }
}

pub fn a_gradient(ds: &Tensor, x: &Tensor, segments: Option<&Segments>, shape: &[usize]) -> Result<Tensor> {
    let inner = shape[2];
    let entries = Rows::adapters(x, segments, x.numel() / inner, shape[0])?;
    row_products(Operand::shrunk(ds), Operand::rows(x, inner), 1, entries, shape).run(shape)
}

pub fn b_gradient(
    grad: &Tensor,
    s: &Tensor,
    parts: usize,
    segments: Option<&Segments>,
    shape: &[usize],
) -> Result<Tensor> {
    let [outer, rank] = matrix(shape);
    let entries = Rows::adapters(grad, segments, grad.numel() / outer, shape[0])?;
    let (grad, s) = (Operand::rows(grad, outer).by_part(outer / parts), Operand::shrunk(s).by_part(rank));
    row_products(grad, s, parts, entries, shape).run(shape)
}

/// L^T R over the rows of every entry, into its matrix of `shape` [.., m, n], of which part p of m belongs to part p of both.
fn row_products<'a>(
    left: Operand<'a>,
    right: Operand<'a>,
    parts: usize,
    entries: Rows,
    shape: &[usize],
) -> Product<'a> {
    let [m, n] = matrix(shape);
    Product {
        layout: Layout::Tn,
        over: Over::Entries(entries),
        dims: [m / parts, n, 0],
        parts,
        a: left,
        b: right,
        low_rank: None,
        bias: None,
        out: [m * n, m / parts * n, n],
        alpha: 1.0,
    }
}
