//! Launchers of `kernels-cu/attention`: packing of the operands and the forward pass; see `cpu/attention.rs` for what is computed.

mod backward;
mod boxes;
mod schedule;
mod short;
mod warpgroup;
mod warpgroup_backward;

pub use backward::backward;

use super::{Call, Words, blocks, call::BLOCK, pack};
use crate::{
    Error, Result, Tensor,
    ops::attention::{Attention, Entry, Extents, Forward, Layout, NormWeights, Rotary},
};
use hywu_core::Dtype;
use std::f32::consts::LOG2_E;

const OP: &str = "attention";
/// Rows that a group of lanes packs, as in rows.cuh.
const PACKED: usize = 4;
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
    /// Of an entry; where entries are ragged, of all.
    pub tokens: usize,
    channels: usize,
}

impl Rows {
    pub fn of_queries(args: &Attention, layout: &Layout) -> Self {
        let (size1, channels) = (args.batch[1], args.head_dim);
        Self { layout: *layout, size1, heads: args.heads, tokens: args.queries, channels }
    }
    pub fn of_keys(args: &Attention, layout: &Layout) -> Self {
        Self { heads: args.kv_heads, tokens: args.keys, ..Self::of_queries(args, layout) }
    }
    /// The same rows one after the other: [batch0, batch1, head, token, width], where entries are ragged without the first axis.
    pub fn packed(&self, args: &Attention, width: usize) -> Self {
        let (token, head) = (width, self.tokens * width);
        let entry = self.heads * head;
        let batch0 = if args.ragged.is_some() { 0 } else { self.size1 * entry };
        Self { channels: width, layout: Layout { offset: 0, batch: [batch0, entry], token, head }, ..*self }
    }
    /// How many there are along the axes (batch0, batch1, token, head).
    pub fn sizes(&self, args: &Attention) -> [usize; 4] {
        let batch0 = if args.ragged.is_some() { 1 } else { args.batch[0] };
        [batch0, self.size1, self.tokens, self.heads]
    }
    /// How many there are.
    pub fn count(&self, args: &Attention) -> usize {
        self.sizes(args).iter().product()
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

/// The tokens of all entries: the struct `Extents` of the kernels.
pub(super) struct Tables {
    pub extents: Extents,
    entries: Option<Words>,
    limits: Option<Words>,
    /// Entries of the first batch axis where they are ragged.
    ragged: usize,
}

impl Tables {
    pub fn new(args: &Attention, like: &Tensor) -> Result<Self> {
        let extents = args.extents();
        let integers: Vec<usize> = extents.entries.iter().flat_map(integers_of).collect();
        let words = |list: &[usize]| (!list.is_empty()).then(|| Words::sizes(like, list)).transpose();
        Ok(Self {
            entries: words(&integers)?,
            limits: words(&extents.limits)?,
            ragged: if args.ragged.is_some() { args.batch[0] } else { 0 },
            extents,
        })
    }
    /// As the kernels take it.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        let address = |words: Option<&Words>| words.map_or(0, Words::address).to_le_bytes();
        let mut bytes = [address(self.entries.as_ref()), address(self.limits.as_ref())].concat();
        bytes.extend(integers(&integers_of(&self.extents.alike))?);
        bytes.extend(integers(&[self.ragged])?);
        Ok(bytes)
    }
}

/// The struct `Entry` of the kernels.
fn integers_of(entry: &Entry) -> [usize; 5] {
    [entry.query, entry.queries, entry.key, entry.keys, entry.limits]
}

/// Queries, keys, values or gradients of the output, with what happens to a row on its way into a product.
pub(super) struct Operand<'a> {
    pub data: &'a Tensor,
    pub rows: Rows,
    /// Are these rows of keys or values?
    pub keys: bool,
    pub norm: Option<&'a Tensor>,
    pub rotary: Option<&'a Rotary>,
}

/// Rows that a kernel of tiles can copy.
pub(super) struct Source {
    pub data: Tensor,
    pub rows: Rows,
    /// Are these rows of keys or values?
    pub keys: bool,
}

impl<'a> Operand<'a> {
    /// Rows of queries or of the output that go in as they are.
    pub fn of_queries(args: &Attention, data: &'a Tensor, layout: &Layout) -> Self {
        Self { data, rows: Rows::of_queries(args, layout), keys: false, norm: None, rotary: None }
    }
    /// Rows of keys or of values that go in as they are.
    pub fn of_keys(args: &Attention, data: &'a Tensor, layout: &Layout) -> Self {
        Self { data, rows: Rows::of_keys(args, layout), keys: true, norm: None, rotary: None }
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
    pub fn source(&self, args: &Attention, tables: &Tables, width: usize) -> Result<Source> {
        let plain = self.norm.is_none() && self.rotary.is_none();
        if plain && self.rows.aligned(pack(self.data.dtype())) {
            return Ok(Source { data: self.data.clone(), rows: self.rows, keys: self.keys });
        }
        self.packed(args, tables, width)
    }
    /// The rows one after the other, `width` elements each.
    pub fn packed(&self, args: &Attention, tables: &Tables, width: usize) -> Result<Source> {
        let (count, rows) = (self.rows.count(args), self.rows.packed(args, width));
        let data = self.data.empty_like(&[count, width])?;
        let call = Call::new(OP, "attention_pack", self.data)?.tensor(self.data)?.bytes(&self.rows.bytes()?);
        let call = call.bytes(&self.change()).bytes(&tables.bytes()?).size(usize::from(self.keys))?;
        call.tensor(&data)?.size(width)?.size(count)?.launch(
            row_grid(count, PACKED * row_groups(width, self.data.dtype()))?,
            BLOCK,
            0,
        )?;
        Ok(Source { data, rows, keys: self.keys })
    }
}

/// (batch0, batch1) in all.
pub(super) fn entries(args: &Attention) -> usize {
    args.batch[0] * args.batch[1]
}

/// What products of queries and keys are multiplied by to be exponents of 2.
pub(super) fn score_factor(head_dim: usize) -> f32 {
    LOG2_E / (head_dim as f32).sqrt()
}

/// Rows that a block of a kernel of rows holds at a time: lanes share a row, 16 bytes each.
pub(super) fn row_groups(width: usize, dtype: Dtype) -> usize {
    BLOCK as usize / (width / pack(dtype)).min(WARP)
}

pub(super) fn row_grid(rows: usize, per_block: usize) -> Result<[u32; 3]> {
    Ok([blocks(rows, per_block)?, 1, 1])
}

/// The operands of a call.
pub(super) struct Operands<'a> {
    pub q: Operand<'a>,
    pub k: Operand<'a>,
    pub v: Operand<'a>,
    pub tables: Tables,
}

impl<'a> Operands<'a> {
    pub fn new(
        args: &'a Attention,
        [q, k, v]: [&'a Tensor; 3],
        norm: Option<NormWeights<'a>>,
    ) -> Result<Self> {
        let [rotary_q, rotary_k] = args.rotary.as_ref().map_or([None; 2], |(q, k)| [Some(q), Some(k)]);
        Ok(Self {
            q: Operand { norm: norm.map(|n| n.q), rotary: rotary_q, ..Operand::of_queries(args, q, &args.q) },
            k: Operand { norm: norm.map(|n| n.k), rotary: rotary_k, ..Operand::of_keys(args, k, &args.k) },
            v: Operand::of_keys(args, v, &args.v),
            tables: Tables::new(args, q)?,
        })
    }
    /// Those that are read, ready for tiles.
    pub fn sources(&self, args: &Attention, width: usize) -> Result<[Source; 3]> {
        let source = |operand: &Operand<'_>| operand.source(args, &self.tables, width);
        Ok([source(&self.q)?, source(&self.k)?, source(&self.v)?])
    }
}

pub fn forward(args: &Attention, qkv: [&Tensor; 3], norm: Option<NormWeights<'_>>) -> Result<Forward> {
    let operands = Operands::new(args, qkv, norm)?;
    if let Some(plan) = short::plan(args, qkv[0].dtype(), short::Pass::Forward) {
        return short::forward(&plan, args, &operands);
    }
    if warpgroup::fits(args, qkv[0])? {
        return warpgroup::forward(args, &operands);
    }
    every_device(args, &operands)
}

/// The forward pass by the kernels that every device has.
fn every_device(args: &Attention, operands: &Operands<'_>) -> Result<Forward> {
    let out = operands.q.data.empty_like(&args.out_shape)?;
    let lse = out.empty_as(&args.lse_shape(), Dtype::F32)?;
    let plan = plan(args.head_dim, out.dtype());
    let [q, k, v] = operands.sources(args, plan.width)?;
    let tiles = operands.tables.extents.most_queries().div_ceil(plan.rows);
    let mut call = Call::new(OP, &format!("attention_forward_{}", plan.width), &out)?;
    call = call.tensor(&q.data)?.tensor(&k.data)?.tensor(&v.data)?;
    for rows in [q.rows, k.rows, v.rows, Rows::of_queries(args, &args.out)] {
        call = call.bytes(&rows.bytes()?);
    }
    call = call.bytes(&operands.tables.bytes()?).float(score_factor(args.head_dim));
    call = call.tensor(&out)?.tensor_as(&lse, Dtype::F32)?.size(tiles)?;
    call.launch(row_grid(entries(args) * args.heads * tiles, 1)?, plan.threads, plan.shared)?;
    Ok(Forward { out, lse })
}

/// Step `step` of [`LADDER`](crate::ops::attention::LADDER), whose conditions hold but for device and dtype.
///
/// # Errors
/// No such step, an operand on the host or not bf16, a device that does not have it.
pub fn ladder_step(step: usize, args: &Attention, qkv: [&Tensor; 3]) -> Result<Forward> {
    let operands = Operands::new(args, qkv, None)?;
    match step {
        1 => every_device(args, &operands),
        _ => warpgroup::step(step, args, &operands),
    }
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
