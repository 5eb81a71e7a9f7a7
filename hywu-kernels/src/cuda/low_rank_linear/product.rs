//! The launch of a product of product.cuh: which tile, how many blocks, where the operands lie.

use super::{OP, int, rows::Rows};
use crate::{
    Result, Tensor,
    cuda::{
        Call, blas, blocks,
        call::{in_grid, on_gpu},
        elementwise::sum_parts,
        pack,
    },
    ops::low_rank_linear::Segments,
};
use hywu_core::Dtype;
use std::sync::OnceLock;

/// Blocks that fill any GPU.
const ENOUGH_BLOCKS: usize = 256;
/// Large tiles are worth it from here on: about one for every multiprocessor.
pub(super) const LARGE_TILES: usize = 128;
/// Length of the parts that a sum over k is cut into where that must not depend on the number of rows.
const PART: usize = 1024;
/// Shortest part otherwise.
const LEAST_PART: usize = 512;

/// How A and B lie in memory: row-major, as they are or transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::cuda) enum Layout {
    /// A B^T: A [m, k], B [n, k].
    Nt,
    /// A B: A [m, k], B [k, n].
    Nn,
    /// A^T B: A [k, m], B [k, n].
    Tn,
}

/// Where products may come from cuBLASLt, as the variable HYWU_CUDA_BLAS says: `0` nowhere, `1` everywhere; unset, in gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Use {
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
    /// Parts of the sum of the longest entry.
    splits: usize,
    /// `split` of product.cuh.
    split: usize,
}

/// Rows and columns of the result of an entry, in so many parts, and entries; k of the longest.
fn plan([m, n, parts, batch]: [usize; 4], k: usize, split: Split) -> Plan {
    let tiles = |tile| m.div_ceil(tile).saturating_mul(n.div_ceil(tile)).saturating_mul(parts);
    let wide = m.min(n) > 64;
    let (splits, split) = match split {
        Split::ByDepth if k >= 2 * PART => (k.div_ceil(PART), PART),
        Split::Never | Split::ByDepth => (1, 0),
        Split::ToFill => {
            // Of the tile that an entry would get by its sizes: the order of its sum must depend on nothing else.
            let most = (ENOUGH_BLOCKS / tiles(if wide { 128 } else { 64 }).max(1)).max(1);
            ((k / LEAST_PART).clamp(1, most), most)
        }
    };
    let large = wide && tiles(128).saturating_mul(batch).saturating_mul(splits) >= LARGE_TILES;
    Plan { tile: if large { 128 } else { 64 }, splits, split }
}

/// A matrix, or one for each weight or adapter: `struct Side` of product.cuh.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    pub tensor: &'a Tensor,
    /// Elements from one matrix to the next.
    pub stride: usize,
    /// Elements from what one part of the columns has of it to what the next has.
    pub part: usize,
    /// Elements of a line.
    pub pitch: usize,
    /// Has it the rows of S?
    pub banded: bool,
}

impl<'a> Operand<'a> {
    /// Rows of x or of y.
    pub fn rows(tensor: &'a Tensor, pitch: usize) -> Self {
        Self { tensor, stride: 0, part: 0, pitch, banded: false }
    }
    /// S or dS.
    pub fn shrunk(tensor: &'a Tensor) -> Self {
        Self { banded: true, ..Self::rows(tensor, tensor.shape()[1]) }
    }
    /// Weights or adapters: the last two axes are a matrix.
    pub fn matrices(tensor: &'a Tensor) -> Self {
        let [lines, pitch] = super::matrix(tensor.shape());
        Self { tensor, stride: lines * pitch, part: 0, pitch, banded: false }
    }
    pub fn by_part(self, part: usize) -> Self {
        Self { part, ..self }
    }

    fn side(&self) -> Result<[u8; 24]> {
        let packs =
            [self.stride, self.part, self.pitch].iter().all(|n| n.is_multiple_of(pack(self.tensor.dtype())));
        let aligned = packs && on_gpu(OP, self.tensor)?.address().is_multiple_of(16);
        side([self.stride, self.part], [self.pitch, usize::from(aligned) + 2 * usize::from(self.banded)])
    }
}

fn side(longs: [usize; 2], ints: [usize; 2]) -> Result<[u8; 24]> {
    let mut bytes = [0; 24];
    for (to, value) in bytes.chunks_mut(8).zip(longs) {
        to.copy_from_slice(&(value as u64).to_le_bytes());
    }
    for (to, value) in bytes[16..].chunks_mut(4).zip(ints) {
        to.copy_from_slice(&int(value)?.to_le_bytes());
    }
    Ok(bytes)
}

/// What a product's rows or sums are over.
pub(super) enum Over<'a> {
    /// The rows of x, so many, each with its weight and adapter.
    Rows { segments: Option<&'a Segments>, rows: usize, adapters: usize },
    /// Entries that each have a matrix.
    Entries(Rows),
}

/// alpha * (A B + A2 B2) + bias: see product.cuh.
pub(super) struct Product<'a> {
    pub layout: Layout,
    pub over: Over<'a>,
    /// Rows (Tn only) and columns of a part of the result, and k (other than Tn).
    pub dims: [usize; 3],
    pub parts: usize,
    /// The first term.
    pub a: Operand<'a>,
    pub b: Operand<'a>,
    /// The second: A2, B2 and its k.
    pub low_rank: Option<(Operand<'a>, Operand<'a>, usize)>,
    pub bias: Option<&'a Tensor>,
    /// Of the result: elements from matrix to matrix and from part to part, and of a line.
    pub out: [usize; 3],
    pub alpha: f32,
}

impl Product<'_> {
    /// By our own kernel, into `shape`; what no block writes is zero.
    pub fn run(&self, shape: &[usize]) -> Result<Tensor> {
        let (like, dtype, across) = (self.a.tensor, self.a.tensor.dtype(), self.layout == Layout::Tn);
        let [m, n, k] = self.dims;
        let plan = match &self.over {
            Over::Rows { rows, .. } => plan([*rows, n, self.parts, 1], k, Split::Never),
            Over::Entries(e) if across => plan([m, n, self.parts, e.count], e.longest, Split::ToFill),
            Over::Entries(e) => plan([e.longest, n, self.parts, e.count], k, Split::ByDepth),
        };
        let tiles;
        let (rows, entries, high) = match &self.over {
            Over::Rows { segments, rows, adapters } => {
                tiles = Rows::new(like, *segments, *rows, *adapters, plan.tile)?;
                (&tiles, 1, tiles.count)
            }
            Over::Entries(e) => (e, e.count, if across { m } else { e.longest }.div_ceil(plan.tile)),
        };
        let whole = match &self.over {
            Over::Rows { .. } => true,
            Over::Entries(e) => across && e.count == super::matrices(shape),
        };
        let in_parts = plan.splits > 1;
        debug_assert!(!in_parts || self.bias.is_none());
        let plane: usize = shape.iter().product();
        let mut out = match in_parts {
            true => like.empty_as(&[plan.splits, plane], Dtype::F32)?,
            false => like.empty_like(shape)?,
        };
        if !whole {
            out.clear()?;
        }
        let second = self.low_rank.as_ref();
        let (name, shared) = kernel(self.layout, dtype, plan.tile);
        let call = Call::new(OP, &name, like)?.tensor(like)?.tensor(self.b.tensor)?;
        let call = call.optional(second.map(|s| s.0.tensor))?.optional(second.map(|s| s.1.tensor))?;
        let call = match in_parts {
            true => call.optional(None)?.optional(None)?.tensor_as(&out, Dtype::F32)?,
            false => call.tensor(&out)?.optional(self.bias)?.optional(None)?,
        };
        let blocks = blocks(high.saturating_mul(self.parts).saturating_mul(n.div_ceil(plan.tile)), 1)?;
        let grid = [blocks, in_grid(OP, entries, "adapters")?, in_grid(OP, plan.splits, "parts of a sum")?];
        let threads = if dtype == Dtype::Bf16 && plan.tile == 64 { 128 } else { 256 };
        call.bytes(&self.sizes(plan.split, rows, plane)?).launch(grid, threads, shared)?;
        if in_parts { sum_parts(&out, like, shape, self.alpha) } else { Ok(out) }
    }

    /// `struct Sizes` of product.cuh.
    pub fn sizes(&self, split: usize, rows: &Rows, plane: usize) -> Result<Vec<u8>> {
        let [m, n, k] = self.dims;
        let (a2, b2, k2) = match &self.low_rank {
            Some((a2, b2, k2)) => (a2.side()?, b2.side()?, *k2),
            None => ([0; 24], [0; 24], 0),
        };
        let [stride, part, pitch] = self.out;
        let out = side([stride, part], [pitch, 0])?;
        let mut bytes: Vec<u8> = [self.a.side()?, self.b.side()?, a2, b2, out].concat();
        bytes.extend(rows.bytes(self.low_rank.map_or(0, |(a2, ..)| a2.pitch))?);
        bytes.extend((plane as u64).to_le_bytes());
        let over_entries = usize::from(matches!(self.over, Over::Entries(_)));
        for value in [m, n, k, k2, self.parts, over_entries, self.parts * n, split, LEAST_PART] {
            bytes.extend(int(value)?.to_le_bytes());
        }
        bytes.extend(self.alpha.to_le_bytes());
        Ok(bytes)
    }

    /// By cuBLASLt where it may be used for this, is there, and there is one weight and one term: two would be rounded one after the other.
    pub fn by_blas(&self, using: Use, weights: usize, shape: &[usize]) -> Result<Option<Tensor>> {
        let (a, b) = (self.a.tensor, self.b.tensor);
        if a.dtype() != Dtype::Bf16 || in_use() < using || weights != 1 || self.low_rank.is_some() {
            return Ok(None);
        }
        let Some(blas) = blas::of(on_gpu(OP, a)?.gpu())? else { return Ok(None) };
        let out = a.empty_like(shape)?;
        // All rows are those of one product.
        let [m, n, k] = match self.layout {
            Layout::Tn => [self.dims[0], self.dims[1], a.numel() / self.dims[0]],
            Layout::Nt | Layout::Nn => [a.numel() / self.dims[2], self.parts * self.dims[1], self.dims[2]],
        };
        Ok(blas.product((self.layout, [m, n, k]), [a, b], self.bias, &out)?.then_some(out))
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_problems_get_small_tiles() {
        let tile = |dims| plan(dims, 192, Split::Never).tile;
        assert_eq!(plan([4096, 3072, 1, 1], 3072, Split::Never), Plan { tile: 128, splits: 1, split: 0 });
        assert_eq!(tile([4096, 1536, 2, 1]), 128);
        assert_eq!(tile([256, 192, 1, 1]), 64);
        assert_eq!(tile([4096, 64, 1, 8]), 64);
        assert_eq!(tile([64, 4096, 1, 8]), 64);
        assert_eq!(tile([65, 129, 1, 1]), 64);
        assert_eq!(tile([1, 1, 1, 1]), 64);
        assert_eq!(tile([0, 0, 1, 0]), 64);
    }

    #[test]
    fn the_order_of_a_forward_sum_depends_on_k_alone() {
        for k in [1, 31, 192, 1023, 2047, 2048, 3072, 12288] {
            for (dims, other) in
                [([1, 16, 1, 1], [40_000, 16, 1, 1]), ([50, 160, 1, 5], [70_000, 160, 1, 64])]
            {
                let [one, two] = [dims, other].map(|dims| plan(dims, k, Split::ByDepth));
                assert_eq!((one.splits, one.split), (two.splits, two.split), "k = {k}");
                assert!(one.splits == 1 || one.splits * one.split >= k && (one.splits - 1) * one.split < k);
            }
        }
    }

    #[test]
    fn deep_products_fill_the_device_but_not_with_slivers() {
        let fill = |dims, k| plan(dims, k, Split::ToFill);
        // A gradient of 768 x 192 over 16384 rows: 12 tiles, 21 parts of each.
        assert_eq!(fill([768, 192, 1, 1], 16384), Plan { tile: 128, splits: 21, split: 21 });
        assert_eq!(fill([16, 3072, 1, 4], 4096).splits, 5);
        assert_eq!(fill([4096, 4096, 1, 1], 4096).splits, 1);
        assert_eq!(fill([16, 16, 1, 1], 500).splits, 1);
        // Neither other entries nor the longest of them change the order of an entry's sum.
        for dims in [[16, 3072], [128, 3072], [130, 150], [1300, 40]] {
            let [m, n] = dims;
            assert_eq!(fill([m, n, 1, 1], 700).split, fill([m, n, 1, 64], 40_000).split);
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
