//! Launchers of `kernels-cu/attention`: packing of the operands and the forward pass; see `cpu/attention.rs` for what is computed.

mod backward;

pub use backward::backward;

mod boxes;
mod extents;
mod warpgroup;

use super::{Call, Words, blocks, call::BLOCK, pack};
use crate::{
    Error, Result, Tensor,
    ops::attention::{Attention, Forward, Layout, NormWeights, Rotary},
};
use hywu_core::Dtype;
use std::f32::consts::LOG2_E;

const OP: &str = "attention";
/// Rows of a warp, and its threads.
const WARP_ROWS: usize = 16;
const WARP: usize = 32;

/// How a kernel over tiles is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Channels of a packed row: head_dim, padded.
    pub width: usize,
    /// Rows of a block.
    pub rows: usize,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory.
    pub shared: usize,
}

/// Channels of a packed row: there is a kernel for each of these widths.
pub(super) fn width(head_dim: usize) -> usize {
    head_dim.next_power_of_two().max(32)
}

/// Bytes of `rows` rows of a tile: a row is followed by 16 bytes.
pub(super) fn tile_bytes(rows: usize, width: usize, dtype: Dtype) -> usize {
    rows * (width * dtype.size() + 16)
}

/// Bytes in which f32 kernels spread the weights of `rows` rows.
pub(super) fn scratch_bytes(rows: usize, others: usize, dtype: Dtype) -> usize {
    if dtype == Dtype::F32 { rows * (others + 4) * 4 } else { 0 }
}

/// Rows of queries, and one tile of keys and one of values. Sizes as in forward.cuh.
fn plan(head_dim: usize, dtype: Dtype) -> Plan {
    let (width, rows) = (width(head_dim), 64);
    let keys = if dtype.size() * width > 512 { 32 } else { 64 };
    let shared = tile_bytes(rows + 2 * keys, width, dtype) + scratch_bytes(rows, keys, dtype);
    Plan { width, rows, threads: (rows / WARP_ROWS * WARP) as u32, shared }
}

/// Where the rows of an operand are: the struct `Rows` of the kernels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    pub layout: Layout,
    /// Size of the second batch axis.
    size1: usize,
    heads: usize,
    pub tokens: usize,
    channels: usize,
}

impl Rows {
    pub fn new(args: &Attention, layout: &Layout, tokens: usize) -> Self {
        Self { layout: *layout, size1: args.batch[1], heads: args.heads, tokens, channels: args.head_dim }
    }
    /// Rows one after the other: [batch0, batch1, head, token, width].
    pub fn packed(args: &Attention, tokens: usize, width: usize) -> Self {
        let (token, head) = (width, tokens * width);
        let batch = [args.batch[1] * args.heads * head, args.heads * head];
        let layout = Layout { offset: 0, batch, token, head };
        Self { channels: width, ..Self::new(args, &layout, tokens) }
    }
    /// As the kernels take it.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        let Layout { offset, batch, token, head } = self.layout;
        // The stride of an axis of one element may be anything; it is multiplied by 0.
        let mut bytes: Vec<u8> = [offset, batch[0], batch[1], token, head]
            .iter()
            .flat_map(|&x| (x as u64).to_le_bytes())
            .collect();
        bytes.extend(integers(&[self.size1, self.heads, self.tokens, self.channels])?);
        Ok(bytes)
    }
    /// Can a kernel copy the rows 16 bytes at a time?
    fn aligned(&self, pack: usize) -> bool {
        let Layout { offset, batch, token, head } = self.layout;
        [offset, batch[0], batch[1], token, head, self.channels].iter().all(|x| x.is_multiple_of(pack))
    }
}

/// Sizes as `int`.
pub(super) fn integers(sizes: &[usize]) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(4 * sizes.len());
    for &size in sizes {
        let size = i32::try_from(size)
            .map_err(|_| Error::invalid(OP, format!("a size of {size} is more than a kernel takes")))?;
        bytes.extend(size.to_le_bytes());
    }
    Ok(bytes)
}

/// Queries, keys, values or gradients of the output, with what happens to a row on its way into a product.
pub(super) struct Operand<'a> {
    pub data: &'a Tensor,
    pub rows: Rows,
    pub norm: Option<&'a Tensor>,
    pub rotary: Option<&'a Rotary>,
    /// Multiplies the row.
    pub factor: f32,
}

/// Rows that a kernel of tiles can copy.
pub(super) struct Source {
    pub data: Tensor,
    pub rows: Rows,
}

impl<'a> Operand<'a> {
    /// Rows that go in as they are.
    pub fn plain(args: &Attention, data: &'a Tensor, layout: &Layout, tokens: usize) -> Self {
        Self { data, rows: Rows::new(args, layout, tokens), norm: None, rotary: None, factor: 1.0 }
    }
    /// The struct `Change` of the kernels.
    pub fn change(&self) -> Vec<u8> {
        let address = |t: Option<&Tensor>| t.and_then(Tensor::view).map_or(0, |view| view.address());
        let tables = self.rotary.map(|r| [&r.cos, &r.sin]);
        [address(self.norm), address(tables.map(|t| t[0])), address(tables.map(|t| t[1]))]
            .iter()
            .flat_map(|a| a.to_le_bytes())
            .collect()
    }
    /// The rows ready for tiles: packed, or where they are when nothing happens to them.
    pub fn source(&self, args: &Attention, width: usize) -> Result<Source> {
        let plain = self.norm.is_none() && self.rotary.is_none() && self.factor == 1.0;
        if plain && self.rows.aligned(pack(self.data.dtype())) {
            return Ok(Source { data: self.data.clone(), rows: self.rows });
        }
        self.packed(args, width)
    }
    /// The rows one after the other, `width` elements each.
    pub fn packed(&self, args: &Attention, width: usize) -> Result<Source> {
        let count = units(args) * self.rows.tokens;
        let rows = Rows::packed(args, self.rows.tokens, width);
        let data = self.data.empty_like(&[count, width])?;
        let call = Call::new(OP, "attention_pack", self.data)?.tensor(self.data)?.bytes(&self.rows.bytes()?);
        let call = call.bytes(&self.change()).float(self.factor).tensor(&data)?;
        call.size(width)?.size(count)?.launch(
            row_grid(count, row_groups(width, self.data.dtype()))?,
            BLOCK,
            0,
        )?;
        Ok(Source { data, rows })
    }
}

/// (batch0, batch1, head) in all.
pub(super) fn units(args: &Attention) -> usize {
    args.batch[0] * args.batch[1] * args.heads
}

/// Rows that a block of a kernel of rows holds at a time: lanes share a row, 16 bytes each.
pub(super) fn row_groups(width: usize, dtype: Dtype) -> usize {
    BLOCK as usize / (width / pack(dtype)).min(WARP)
}

pub(super) fn row_grid(rows: usize, per_block: usize) -> Result<[u32; 3]> {
    Ok([blocks(rows, per_block)?, 1, 1])
}

/// The operands of a call. Queries carry log2(e) / sqrt(head_dim), so scores are exponents of 2.
pub(super) struct Operands<'a> {
    pub q: Operand<'a>,
    pub k: Operand<'a>,
    pub v: Operand<'a>,
    /// Keys per batch entry, where they differ.
    pub lengths: Option<Words>,
}

impl<'a> Operands<'a> {
    pub fn new(
        args: &'a Attention,
        [q, k, v]: [&'a Tensor; 3],
        norm: Option<NormWeights<'a>>,
    ) -> Result<Self> {
        let [rotary_q, rotary_k] = args.rotary.as_ref().map_or([None; 2], |(q, k)| [Some(q), Some(k)]);
        let lengths = args.key_lengths.as_ref().map(|lengths| Words::sizes(q, lengths)).transpose()?;
        Ok(Self {
            q: Operand {
                norm: norm.map(|n| n.q),
                rotary: rotary_q,
                factor: LOG2_E / (args.head_dim as f32).sqrt(),
                ..Operand::plain(args, q, &args.q, args.queries)
            },
            k: Operand {
                norm: norm.map(|n| n.k),
                rotary: rotary_k,
                ..Operand::plain(args, k, &args.k, args.keys)
            },
            v: Operand::plain(args, v, &args.v, args.keys),
            lengths,
        })
    }
}

impl Call {
    /// Integers in device memory, or a null pointer.
    pub(super) fn optional_words(self, words: Option<&Words>) -> Self {
        match words {
            Some(words) => self.words(words),
            None => self.long(0),
        }
    }
}

pub fn forward(args: &Attention, qkv: [&Tensor; 3], norm: Option<NormWeights<'_>>) -> Result<Forward> {
    if warpgroup::fits(args, qkv[0])? {
        return warpgroup::forward(args, qkv, norm);
    }
    let out = qkv[0].empty_like(&args.out_shape)?;
    let lse = out.empty_as(&[args.batch[0], args.batch[1], args.heads, args.queries], Dtype::F32)?;
    let plan = plan(args.head_dim, out.dtype());
    let operands = Operands::new(args, qkv, norm)?;
    let sources = [&operands.q, &operands.k, &operands.v];
    let [q, k, v] = sources.map(|operand| operand.source(args, plan.width));
    let (q, k, v) = (q?, k?, v?);
    let tiles = args.queries.div_ceil(plan.rows);
    let mut call = Call::new(OP, &format!("attention_forward_{}", plan.width), &out)?;
    call = call.tensor(&q.data)?.tensor(&k.data)?.tensor(&v.data)?;
    for rows in [q.rows, k.rows, v.rows, Rows::new(args, &args.out, args.queries)] {
        call = call.bytes(&rows.bytes()?);
    }
    call = call.optional_words(operands.lengths.as_ref()).tensor(&out)?.tensor_as(&lse, Dtype::F32)?;
    call.size(tiles)?.launch(row_grid(units(args) * tiles, 1)?, plan.threads, plan.shared)?;
    Ok(Forward { out, lse })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_head_dim_has_a_width() {
        assert_eq!([2, 32, 34, 64, 80, 128, 130, 256].map(width), [32, 32, 64, 64, 128, 128, 256, 256]);
    }

    #[test]
    fn tiles_fit_into_shared_memory() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for head_dim in (2..=256).step_by(2) {
                let plan = plan(head_dim, dtype);
                assert!(plan.shared <= 163 << 10, "{plan:?}");
                assert_eq!(plan.threads as usize * WARP_ROWS, plan.rows * WARP);
            }
        }
        // 192 rows of 64 channels and 16 bytes.
        let bf16 = Plan { width: 64, rows: 64, threads: 128, shared: 192 * 144 };
        assert_eq!(plan(64, Dtype::Bf16), bf16);
        // 128 rows of 256 channels and 16 bytes, 64 rows of 32 weights and 16 bytes.
        let f32 = Plan { width: 256, rows: 64, threads: 128, shared: 128 * 1040 + 64 * 144 };
        assert_eq!(plan(256, Dtype::F32), f32);
    }

    #[test]
    fn rows_share_a_block() {
        assert_eq!([32, 64, 128, 256].map(|w| row_groups(w, Dtype::Bf16)), [64, 32, 16, 8]);
        assert_eq!([32, 64, 128, 256].map(|w| row_groups(w, Dtype::F32)), [32, 16, 8, 8]);
    }
}
