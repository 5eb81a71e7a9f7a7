//! Launchers of `kernels-cu/low_rank_linear`; see `cpu/low_rank_linear.rs` for what each computes.
//!
//! What a forward pass computes for a row must not depend on the other rows. So its products are summed in an order that depends on k
//! alone, by kernels of our own: cuBLASLt, which chooses an algorithm by the number of rows, takes part in gradients only
//! ([`Use`]).

mod merge;
#[allow(dead_code, reason = "for the kernels to come")]
mod rows;

pub use merge::merge;
pub(crate) use rows::Tables;

use super::{Call, blas, blocks, call::on_gpu, elementwise::sum_parts, pack};
use crate::{Error, Result, Tensor, ops::low_rank_linear::Segments};
use hywu_core::Dtype;
use std::sync::OnceLock;

const OP: &str = "low_rank_linear";
/// Blocks that fill any GPU.
const ENOUGH_BLOCKS: usize = 256;
/// Large tiles are worth it from here on: about one for every multiprocessor.
const LARGE_TILES: usize = 128;
/// Length of the parts that a sum over k is cut into where that must not depend on the number of rows.
const PART: usize = 1024;
/// Shortest part otherwise.
const LEAST_PART: usize = 512;

/// How A and B lie in memory: row-major, as they are or transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Layout {
    /// A B^T: A [m, k], B [n, k].
    Nt,
    /// A B: A [m, k], B [k, n].
    Nn,
    /// A^T B: A [k, m], B [k, n].
    Tn,
}

/// Where products may come from cuBLASLt, as the variable HYWU_CUDA_BLAS says: `0` nowhere, `1` everywhere; unset, in gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Use {
    Nowhere,
    Gradients,
    Everywhere,
}

/// What the environment allows.
fn in_use() -> Use {
    static USE: OnceLock<Use> = OnceLock::new();
    *USE.get_or_init(|| match std::env::var("HYWU_CUDA_BLAS").as_deref() {
        Ok("0") => Use::Nowhere,
        Ok("1") => Use::Everywhere,
        _ => Use::Gradients,
    })
}

/// May the sum over k be cut into parts, added up in order afterwards?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Split {
    /// In one piece.
    Never,
    /// In parts of one length: the order of the sum depends on k alone.
    ByDepth,
    /// Until the tiles of one entry fill the device. The order does not depend on the other entries.
    ToFill,
}

/// The kernel of a product and its grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// Rows and columns of a tile.
    tile: usize,
    /// Tiles of one entry.
    tiles: usize,
    splits: usize,
    /// Steps of k in a split.
    split_steps: usize,
}

/// Elements of k in a step, as in simt.cuh and tensor_core.cuh.
fn depth(dtype: Dtype, tile: usize) -> usize {
    if dtype == Dtype::F32 { 1024 / tile } else { 32 }
}

fn plan(dtype: Dtype, [m, n, batch]: [usize; 3], ks: &[usize], split: Split) -> Plan {
    let k: usize = ks.iter().sum();
    let tiles = |tile| m.div_ceil(tile).saturating_mul(n.div_ceil(tile));
    let most = if split == Split::ToFill { (k / LEAST_PART).max(1) } else { 1 };
    let large = m.min(n) > 64 && tiles(128).saturating_mul(batch).saturating_mul(most) >= LARGE_TILES;
    let tile = if large { 128 } else { 64 };
    let depth = depth(dtype, tile);
    let steps: usize = ks.iter().map(|k| k.div_ceil(depth)).sum();
    let split_steps = match split {
        Split::ByDepth if k >= 2 * PART => PART / depth,
        Split::ToFill => steps.div_ceil((ENOUGH_BLOCKS / tiles(tile)).clamp(1, most)),
        _ => steps,
    };
    Plan { tile, tiles: tiles(tile), splits: steps.div_ceil(split_steps), split_steps }
}

/// A product that is summed: `k` columns of A and rows of B. A tensor of a single matrix serves every entry of the batch.
#[derive(Clone, Copy)]
struct Term<'a> {
    a: &'a Tensor,
    b: &'a Tensor,
    k: usize,
}

/// alpha * (sum of the terms) + bias, for every entry of a batch.
struct Product<'a> {
    layout: Layout,
    /// Rows, columns, entries of the result.
    dims: [usize; 3],
    /// One or two.
    terms: &'a [Term<'a>],
    bias: Option<&'a Tensor>,
    alpha: f32,
    split: Split,
}

impl Product<'_> {
    /// `struct Side` of product.cuh, for a matrix of lines of `length`.
    fn side(&self, tensor: &Tensor, lines: usize, length: usize) -> Result<[u8; 16]> {
        let entry = lines * length;
        debug_assert!(tensor.numel() == entry || tensor.numel() == entry * self.dims[2]);
        let stride = if tensor.numel() == entry { 0 } else { entry as u64 };
        let aligned =
            length.is_multiple_of(pack(tensor.dtype())) && on_gpu(OP, tensor)?.address().is_multiple_of(16);
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&stride.to_le_bytes());
        bytes[8..12].copy_from_slice(&int(length)?.to_le_bytes());
        bytes[12..].copy_from_slice(&i32::from(aligned).to_le_bytes());
        Ok(bytes)
    }

    /// `struct Sizes` of product.cuh.
    fn sizes(&self, plan: Plan) -> Result<Vec<u8>> {
        let [m, n, _] = self.dims;
        let mut bytes = Vec::new();
        for i in 0..2 {
            let Some(&Term { a, b, k }) = self.terms.get(i) else {
                bytes.extend([0; 32]);
                continue;
            };
            let (a_side, b_side) = match self.layout {
                Layout::Nt => (self.side(a, m, k)?, self.side(b, n, k)?),
                Layout::Nn => (self.side(a, m, k)?, self.side(b, k, n)?),
                Layout::Tn => (self.side(a, k, m)?, self.side(b, k, n)?),
            };
            bytes.extend(a_side.into_iter().chain(b_side));
        }
        let k = |i: usize| int(self.terms.get(i).map_or(0, |term| term.k));
        for value in [int(m)?, int(n)?, k(0)?, k(1)?] {
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend(self.alpha.to_le_bytes());
        bytes.extend(int(plan.split_steps)?.to_le_bytes());
        Ok(bytes)
    }

    /// By our own kernel.
    fn run(&self, shape: &[usize]) -> Result<Tensor> {
        let [m, n, batch] = self.dims;
        let first = self.terms[0];
        let dtype = first.a.dtype();
        let ks: Vec<usize> = self.terms.iter().map(|term| term.k).collect();
        let plan = plan(dtype, self.dims, &ks, self.split);
        let parts = plan.splits > 1;
        debug_assert!(!parts || self.bias.is_none());
        let out = match parts {
            true => first.a.empty_as(&[plan.splits, batch * m * n], Dtype::F32)?,
            false => first.a.empty_like(shape)?,
        };
        let (name, shared) = kernel(self.layout, dtype, plan.tile);
        let second = self.terms.get(1);
        let call = Call::new(OP, &name, first.a)?.tensor(first.a)?.tensor(first.b)?;
        let call = call.optional(second.map(|term| term.a))?.optional(second.map(|term| term.b))?;
        let call = match parts {
            true => call.optional(None)?.optional(None)?.tensor_as(&out, Dtype::F32)?,
            false => call.tensor(&out)?.optional(self.bias)?.optional(None)?,
        };
        let in_grid = |n: usize, what: &str| match n {
            0..=65535 => Ok(n as u32),
            _ => Err(Error::invalid(OP, format!("{n} {what} are more than a launch takes"))),
        };
        let grid =
            [blocks(plan.tiles, 1)?, in_grid(batch, "adapters")?, in_grid(plan.splits, "parts of a sum")?];
        let threads = if dtype == Dtype::Bf16 && plan.tile == 64 { 128 } else { 256 };
        call.bytes(&self.sizes(plan)?).launch(grid, threads, shared)?;
        if parts { sum_parts(&out, first.a, shape, self.alpha) } else { Ok(out) }
    }

    /// By cuBLASLt where it may be used for this: the first term and the bias, added to the other term, which is rounded before. By our
    /// own kernel otherwise.
    fn run_with(&self, using: Use, shape: &[usize]) -> Result<Tensor> {
        let Term { a, b, k } = self.terms[0];
        let n = self.dims[1];
        if a.dtype() != Dtype::Bf16 || in_use() < using {
            return self.run(shape);
        }
        let Some(blas) = blas::of(on_gpu(OP, a)?.gpu())? else { return self.run(shape) };
        let out = match self.terms.get(1..).filter(|rest| !rest.is_empty()) {
            Some(terms) => Product { terms, bias: None, ..*self }.run(shape)?,
            None => a.empty_like(shape)?,
        };
        // B serves every entry, so all rows are those of one product.
        let dims = [out.numel() / n, n, k];
        match blas.product((self.layout, dims), [a, b], self.bias, &out, self.terms.len() > 1)? {
            true => Ok(out),
            false => self.run(out.shape()),
        }
    }
}

fn int(value: usize) -> Result<i32> {
    i32::try_from(value)
        .map_err(|_| Error::invalid(OP, format!("a size of {value} is more than a kernel takes")))
}

/// The kernel's name and its dynamic shared memory: the stages of tensor_core.cuh.
fn kernel(layout: Layout, dtype: Dtype, tile: usize) -> (String, usize) {
    let (along, across) = (tile * (32 + 8), 32 * (tile + 8));
    let (name, stage) = match layout {
        Layout::Nt => ("nt", along + along),
        Layout::Nn => ("nn", along + across),
        Layout::Tn => ("tn", across + across),
    };
    let stages = 3 * stage * dtype.size();
    (format!("product_{name}_{tile}"), if dtype == Dtype::Bf16 { stages } else { 0 })
}

/// Only an even division yet.
fn even(segments: Option<&Segments>, parts: usize, weight: &[usize]) -> Result<()> {
    let weights: usize = weight[..weight.len() - 2].iter().product();
    match segments.is_none_or(|s| s.is_even().is_some()) && parts == 1 && weights == 1 {
        true => Ok(()),
        false => Err(Error::invalid(OP, "segments, experts and parts are not there on CUDA devices yet")),
    }
}

pub(crate) fn banded(
    _segments: Option<&Segments>,
    rows: usize,
    _adapters: usize,
    ranks: usize,
) -> [usize; 2] {
    [rows, ranks]
}

pub fn shrink(x: &Tensor, a: &Tensor, scale: f32, segments: Option<&Segments>) -> Result<Tensor> {
    even(segments, 1, &[1, 1])?;
    let (adapters, rank, inner) = (a.shape()[0], a.shape()[1], a.shape()[2]);
    let rows = x.numel() / inner;
    let product = Product {
        layout: Layout::Nt,
        dims: [rows / adapters, rank, adapters],
        terms: &[Term { a: x, b: a, k: inner }],
        bias: None,
        alpha: scale,
        split: Split::ByDepth,
    };
    product.run(&[rows, rank])
}

pub fn expand(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    low_rank: Option<(&Tensor, &Tensor, usize)>,
    segments: Option<&Segments>,
    shape: &[usize],
) -> Result<Tensor> {
    even(segments, low_rank.map_or(1, |l| l.2), weight.shape())?;
    let (outer, inner) = (weight.shape()[0], weight.shape()[1]);
    let adapters = low_rank.map_or(1, |(_, b, _)| b.shape()[0]);
    let base = Term { a: x, b: weight, k: inner };
    let update = low_rank.map(|(s, b, _)| Term { a: s, b, k: b.shape()[2] });
    let product = Product {
        layout: Layout::Nt,
        dims: [x.numel() / inner / adapters, outer, adapters],
        // [X | S] [W | B]^T: the update is a few more steps of the same sum.
        terms: &[Some(base), update].into_iter().flatten().collect::<Vec<_>>(),
        bias,
        alpha: 1.0,
        split: Split::Never,
    };
    product.run_with(Use::Everywhere, shape)
}

pub fn shrink_gradient(
    grad: &Tensor,
    b: &Tensor,
    scale: f32,
    parts: usize,
    segments: Option<&Segments>,
) -> Result<Tensor> {
    even(segments, parts, &[1, 1])?;
    let (adapters, outer, rank) = (b.shape()[0], b.shape()[1], b.shape()[2]);
    let rows = grad.numel() / outer;
    let product = Product {
        layout: Layout::Nn,
        dims: [rows / adapters, rank, adapters],
        terms: &[Term { a: grad, b, k: outer }],
        bias: None,
        alpha: scale,
        split: Split::ByDepth,
    };
    product.run(&[rows, rank])
}

pub fn expand_gradient(
    grad: &Tensor,
    weight: &Tensor,
    low_rank: Option<(&Tensor, &Tensor)>,
    segments: Option<&Segments>,
    shape: &[usize],
) -> Result<Tensor> {
    even(segments, 1, weight.shape())?;
    let (outer, inner) = (weight.shape()[0], weight.shape()[1]);
    let adapters = low_rank.map_or(1, |(_, a)| a.shape()[0]);
    let base = Term { a: grad, b: weight, k: outer };
    let update = low_rank.map(|(ds, a)| Term { a: ds, b: a, k: a.shape()[1] });
    let product = Product {
        layout: Layout::Nn,
        dims: [grad.numel() / outer / adapters, inner, adapters],
        terms: &[Some(base), update].into_iter().flatten().collect::<Vec<_>>(),
        bias: None,
        alpha: 1.0,
        split: Split::Never,
    };
    product.run_with(Use::Gradients, shape)
}

pub fn weight_gradient(
    left: &Tensor,
    right: &Tensor,
    segments: Option<&Segments>,
    shape: &[usize],
) -> Result<Tensor> {
    even(segments, 1, shape)?;
    row_products(left, right, shape)
}
pub fn a_gradient(ds: &Tensor, x: &Tensor, segments: Option<&Segments>, shape: &[usize]) -> Result<Tensor> {
    even(segments, 1, &[1, 1])?;
    row_products(ds, x, shape)
}
pub fn b_gradient(
    grad: &Tensor,
    s: &Tensor,
    parts: usize,
    segments: Option<&Segments>,
    shape: &[usize],
) -> Result<Tensor> {
    even(segments, parts, &[1, 1])?;
    row_products(grad, s, shape)
}

fn row_products(left: &Tensor, right: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let (m, n) = (shape[shape.len() - 2], shape[shape.len() - 1]);
    let entries: usize = shape[..shape.len() - 2].iter().product();
    let product = Product {
        layout: Layout::Tn,
        dims: [m, n, entries],
        terms: &[Term { a: left, b: right, k: left.numel() / m / entries }],
        bias: None,
        alpha: 1.0,
        split: Split::ToFill,
    };
    // The weight itself: one product.
    if shape.len() == 2 { product.run_with(Use::Gradients, shape) } else { product.run(shape) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_problems_get_small_tiles() {
        let plan = |dims, k| plan(Dtype::Bf16, dims, &[k], Split::Never);
        assert_eq!(plan([4096, 3072, 1], 3072), Plan { tile: 128, tiles: 768, splits: 1, split_steps: 96 });
        assert_eq!(plan([256, 192, 1], 192).tile, 64);
        assert_eq!(plan([4096, 64, 8], 192).tile, 64);
        assert_eq!(plan([64, 4096, 8], 192).tile, 64);
        assert_eq!(plan([65, 129, 1], 33), Plan { tile: 64, tiles: 6, splits: 1, split_steps: 2 });
        assert_eq!(plan([1, 1, 1], 1), Plan { tile: 64, tiles: 1, splits: 1, split_steps: 1 });
    }

    #[test]
    fn the_order_of_a_forward_sum_depends_on_k_alone() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for k in [1, 31, 192, 1023, 2047, 2048, 3072, 12288] {
                for (dims, other) in [([1, 16, 1], [40_000, 16, 1]), ([50, 160, 5], [70_000, 160, 64])] {
                    let parts = |dims| {
                        let plan = plan(dtype, dims, &[k], Split::ByDepth);
                        // One split reaches to the end, however many steps that is.
                        let length =
                            if plan.splits > 1 { plan.split_steps * depth(dtype, plan.tile) } else { k };
                        (plan.splits, length)
                    };
                    assert_eq!(parts(dims), parts(other), "k = {k}");
                }
            }
        }
    }

    #[test]
    fn deep_products_fill_the_device_but_not_with_slivers() {
        let fill = |dims, k| plan(Dtype::Bf16, dims, &[k], Split::ToFill);
        // A gradient of 768 x 192 over 16384 rows: 12 tiles, 21 parts of each.
        assert_eq!(fill([768, 192, 1], 16384), Plan { tile: 128, tiles: 12, splits: 21, split_steps: 25 });
        assert_eq!(fill([16, 3072, 4], 4096).splits, 5);
        assert_eq!(fill([4096, 4096, 1], 4096).splits, 1);
        assert_eq!(fill([16, 16, 1], 500).splits, 1);
        // Other entries do not change the order of the sum.
        assert_eq!(fill([16, 3072, 1], 4096).splits, fill([16, 3072, 64], 4096).splits);
        for k in 1..3000 {
            let p = fill([16, 300, 2], k);
            assert!((p.splits - 1) * p.split_steps < k.div_ceil(32), "no split is empty");
            assert!(p.splits * p.split_steps >= k.div_ceil(32), "nothing is left out");
        }
    }

    #[test]
    fn shared_memory_is_what_an_sm80_has() {
        for layout in [Layout::Nt, Layout::Nn, Layout::Tn] {
            for tile in [64, 128] {
                assert!(kernel(layout, Dtype::Bf16, tile).1 <= 80 << 10);
                assert_eq!(kernel(layout, Dtype::F32, tile).1, 0);
            }
        }
        assert_eq!(kernel(Layout::Nt, Dtype::Bf16, 128), ("product_nt_128".to_owned(), 61_440));
    }
}
