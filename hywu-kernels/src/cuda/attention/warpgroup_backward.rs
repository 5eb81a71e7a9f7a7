//! Launcher of `kernels-cu/attention/warpgroup_backward.cuh`, the backward pass of Hopper.

use super::{OP, Source, units};
use crate::{
    Result, Tensor,
    cuda::{
        Call, Words, blocks,
        call::{Boxes, on_gpu},
        low_rank_linear::warpgroup::{on, there},
        pack,
    },
    ops::attention::{Attention, Extents},
};
use hywu_core::Dtype;
use std::f32::consts::LOG2_E;

/// Keys of a block.
const KEYS: usize = 128;
/// Threads of a block: a producer and two that compute.
const THREADS: u32 = 384;
/// Channels of a box's line.
const LINE: usize = 64;
/// Slots of the rings of queries and of gradients of the output.
const STAGES: [usize; 2] = [3, 2];
/// Pieces of a tile's gradient of queries.
const PIECES: usize = 2;

/// What is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Channels of a row: head_dim, padded.
    pub width: usize,
    /// Queries of a tile.
    rows: usize,
    /// Tiles of a head's queries, in the longest entry.
    tiles: usize,
    /// Blocks of a head's keys, in the longest entry.
    blocks: usize,
}

impl Plan {
    fn new(head_dim: usize, queries: usize, keys: usize) -> Self {
        let width = if head_dim > 64 { 128 } else { 64 };
        let rows = 128 * 64 / width;
        Self { width, rows, tiles: queries.div_ceil(rows), blocks: keys.div_ceil(KEYS) }
    }
    /// Rows of a head in the gradient of queries.
    pub fn room(self) -> usize {
        self.tiles * self.rows
    }
    /// Bytes of dynamic shared memory, as `Config` lays it out, and what aligning it may take.
    fn shared(self) -> usize {
        let (own, tile, scores) = (KEYS * self.width * 2, self.rows * self.width * 2, KEYS * self.rows * 2);
        let pieces = PIECES * 64 * 64 * 4;
        let numbers = (2 * STAGES[0] + STAGES[1]) * self.rows * 4;
        let barriers = 8 * (1 + 2 * (STAGES[0] + STAGES[1] + PIECES)) + 8;
        2 * own + (STAGES[0] + STAGES[1]) * tile + 2 * scores + pieces + numbers + barriers + 1024
    }
}

/// The kernels' plan, where they compute the gradients of such operands. The lengths have no say, so that they don't show in a row's bits.
///
/// # Errors
/// A tensor on the host.
pub(super) fn plan(args: &Attention, extents: &Extents, like: &Tensor) -> Result<Option<Plan>> {
    let d = args.head_dim;
    let fits = like.dtype() == Dtype::Bf16 && d.is_multiple_of(pack(Dtype::Bf16)) && d <= 128;
    Ok((fits && on() && there(on_gpu(OP, like)?.gpu()))
        .then(|| Plan::new(d, extents.most_queries(), extents.most_keys())))
}

/// What goes in. Queries as they are, without a factor.
pub(super) struct Inputs<'a> {
    pub q: &'a Source,
    pub k: &'a Source,
    pub v: &'a Source,
    /// Gradient of the output.
    pub grad: &'a Source,
    pub lse: &'a Tensor,
    pub delta: &'a Tensor,
}

/// In f32.
pub(super) struct Gradients {
    /// Of queries: `[units, room for tokens, width]` in pieces, see rows.cuh.
    pub q: Tensor,
    /// Of keys: `[units of keys, tokens, width]`.
    pub k: Tensor,
    /// Of values, the same.
    pub v: Tensor,
}

/// Gradients of the rows: those of queries and keys have yet to be multiplied by the factor of the scores, 1 / sqrt(head_dim).
///
/// # Errors
/// Sizes beyond 2^31, those of the device.
pub(super) fn gradients(
    args: &Attention,
    extents: &Extents,
    plan: Plan,
    inputs: &Inputs<'_>,
) -> Result<Gradients> {
    let [b0, b1] = args.batch;
    let entries = b0 * b1;
    let heads = if args.ragged.is_some() { b1 } else { entries } * args.kv_heads;
    let like = inputs.lse;
    let d_q = like.empty_as(&[units(args), plan.room(), plan.width], Dtype::F32)?;
    let d_k = like.empty_as(&[heads, args.keys, plan.width], Dtype::F32)?;
    let d_v = d_k.empty_like(d_k.shape())?;
    // Bits that are zero in any type.
    let counters = like.empty_as(&[0], Dtype::F32)?.zeros_like(&[1 + units(args) * plan.tiles * PIECES])?;
    let entry_table = (!extents.entries.is_empty())
        .then(|| {
            let words = |e: &crate::ops::attention::Entry| [e.query, e.queries, e.key, e.keys, e.limits];
            Words::sizes(like, &extents.entries.iter().flat_map(words).collect::<Vec<_>>())
        })
        .transpose()?;
    let limit_table =
        (!extents.limits.is_empty()).then(|| Words::sizes(like, &extents.limits)).transpose()?;

    let mut call =
        Call::named(OP, &format!("attention_warpgroup_backward_{}", plan.width), &inputs.q.data)?;
    for (source, lines) in
        [(inputs.q, plan.rows), (inputs.k, KEYS), (inputs.v, KEYS), (inputs.grad, plan.rows)]
    {
        call = call.boxes(&boxes(args, source, lines)?)?;
    }
    let mut sizes = Vec::with_capacity(128);
    let address = |t: &Tensor| on_gpu(OP, t).map(|view| view.address());
    let table = |words: &Option<Words>| words.as_ref().map_or(0, Words::address);
    let tensors = [inputs.lse, inputs.delta];
    for pointer in [address(tensors[0])?, address(tensors[1])?, table(&entry_table), table(&limit_table)] {
        sizes.extend(pointer.to_le_bytes());
    }
    for tensor in [&d_q, &d_k, &d_v, &counters] {
        sizes.extend(address(tensor)?.to_le_bytes());
    }
    sizes.extend((LOG2_E / (args.head_dim as f32).sqrt()).to_le_bytes());
    let ragged = usize::from(args.ragged.is_some());
    sizes.extend(super::integers(&[
        b1,
        args.heads,
        args.kv_heads,
        args.queries,
        args.keys,
        plan.tiles,
        plan.blocks,
        ragged,
    ])?);
    let grid = blocks(entries * args.kv_heads * plan.blocks, 1)?;
    call.bytes(&sizes).launch([grid, 1, 1], THREADS, plan.shared())?;
    Ok(Gradients { q: d_q, k: d_k, v: d_v })
}

/// Boxes of `lines` tokens of a head: axes are channels, tokens, heads and the two of the batch.
fn boxes(args: &Attention, source: &Source, lines: usize) -> Result<Boxes> {
    let rows = &source.rows;
    let layout = rows.layout;
    let b0 = if args.ragged.is_some() { 1 } else { args.batch[0] };
    let axes =
        [(rows.tokens, layout.token), (rows.heads, layout.head), (args.batch[1], layout.batch[1]), (b0, layout.batch[0])];
    // The stride of an axis of one element may be anything; the engine wants multiples of 16 bytes.
    let pitch = |&(size, stride): &(usize, usize)| if size == 1 { 16 } else { 2 * stride as u64 };
    Ok(Boxes {
        address: on_gpu(OP, &source.data)?.address() + 2 * layout.offset as u64,
        dims: [rows.channels].into_iter().chain(axes.iter().map(|a| a.0)).map(|n| n as u64).collect(),
        pitches: axes.iter().map(pitch).collect(),
        size: vec![LINE as u32, lines as u32, 1, 1, 1],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_width_for_every_head_dim() {
        let widths = [8, 64, 72, 128].map(|d| Plan::new(d, 1000, 1000).width);
        assert_eq!(widths, [64, 64, 128, 128]);
    }

    #[test]
    fn tiles_cover_the_longest_entry() {
        assert_eq!(Plan::new(128, 129, 128), Plan { width: 128, rows: 64, tiles: 3, blocks: 1 });
        assert_eq!(Plan::new(64, 129, 129), Plan { width: 64, rows: 128, tiles: 2, blocks: 2 });
        assert_eq!(Plan::new(64, 129, 129).room(), 256);
    }

    #[test]
    fn shared_memory_is_what_a_block_may_have() {
        for head_dim in [64, 128] {
            assert!(Plan::new(head_dim, 1, 1).shared() <= 227 << 10);
        }
        let numbers = 8 * 64 * 4;
        assert_eq!(Plan::new(128, 1, 1).shared(), (208 << 10) + numbers + 8 * 15 + 8 + 1024);
    }
}
