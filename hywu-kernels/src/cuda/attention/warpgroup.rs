//! Launcher of `kernels-cu/attention/warpgroup.cuh`, the forward pass on Hopper: which of its kernels, on which grid, with which boxes.

use super::{
    OP, Operand, Operands, Rows, Source, Tables,
    boxes::{LINE_CHANNELS, Map},
    entries, integers, score_factor, width,
};
use crate::{
    Error, Result, Tensor,
    cuda::{Call, blocks, call::on_gpu, hopper},
    ops::attention::{Attention, Forward},
};
use hywu_core::Dtype;

/// Queries of a warpgroup, and threads.
const GROUP_ROWS: usize = 64;
const GROUP_THREADS: usize = 128;
/// Bytes of keys and values that stay in the second-level cache (50 MB, half of it near a multiprocessor) while others come and go.
const CACHED: usize = 16 << 20;

/// A kernel and its grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// Channels of a row, padded.
    width: usize,
    /// Keys of a tile.
    keys: usize,
    /// Warpgroups that multiply.
    consumers: usize,
    /// Slots of the rings of keys and of values.
    stages: usize,
    /// Tiles of queries of an entry.
    tiles: usize,
    /// Units (batch0, batch1, head) whose tiles are taken together.
    chunk: usize,
    blocks: usize,
}

impl Plan {
    /// For `units` of at most `queries` and `keys`; `limited`: do queries see different keys?
    fn new(
        head_dim: usize,
        limited: bool,
        units: usize,
        [queries, keys]: [usize; 2],
        multiprocessors: usize,
    ) -> Self {
        let (width, tile, consumers, stages) = match (head_dim, limited) {
            (..=64, _) => (64, 128, 3, 4),
            (..=96, true) => (96, 128, 2, 3),
            (..=96, false) => (96, 176, 2, 2),
            (_, true) => (128, 128, 2, 3),
            (_, false) => (128, 176, 2, 2),
        };
        let tiles = queries.div_ceil(consumers * GROUP_ROWS);
        // Where tiles differ, the longest come first, of as many units as the cache holds; else one unit after the other.
        let unit_bytes = 4 * width * keys;
        let chunk = if limited { (CACHED / unit_bytes.max(1)).clamp(1, units.max(1)) } else { 1 };
        let blocks = units.saturating_mul(tiles).min(multiprocessors);
        Self { width, keys: tile, consumers, stages, tiles, chunk, blocks }
    }
    fn name(self) -> String {
        format!("warpgroup_{}_{}", self.width, self.keys)
    }
    fn threads(self) -> u32 {
        (GROUP_THREADS * (self.consumers + 1)) as u32
    }
    /// Bytes of dynamic shared memory: queries, keys and values, the barriers, and what aligning the first may take.
    fn shared(self) -> usize {
        let row = 2 * self.width.next_multiple_of(LINE_CHANNELS);
        let rows = self.consumers * GROUP_ROWS + 2 * self.stages * self.keys;
        rows * row + 8 * (4 * self.stages + self.consumers) + 1024
    }
}

/// Can it be computed here? What decides it is the same for all entries of a batch, and the number of tokens has no say unless there
/// are none: so it does not show in a row's bits.
///
/// # Errors
/// A tensor on the host.
pub(super) fn fits(args: &Attention, q: &Tensor) -> Result<bool> {
    let some = args.queries > 0 && args.keys > 0 && args.heads > 0 && !args.batch.contains(&0);
    let fits = q.dtype() == Dtype::Bf16 && args.head_dim <= 128 && some;
    Ok(fits && hopper::on() && hopper::there(on_gpu(OP, q)?.gpu()))
}

/// The rows of an operand with their boxes of `tokens` rows: where they are if the engine takes them so, or packed.
fn mapped(operand: &Operand<'_>, args: &Attention, tables: &Tables, tokens: usize) -> Result<(Source, Map)> {
    let width = width(args.head_dim);
    let source = operand.source(args, tables, width)?;
    if let Some(map) = Map::new(args, &source.data, &source.rows, tokens)? {
        return Ok((source, map));
    }
    let source = operand.packed(args, tables, width)?;
    let map = Map::new(args, &source.data, &source.rows, tokens)?;
    let map = map.ok_or_else(|| Error::invalid(OP, "packed rows that the engine can't copy"))?;
    Ok((source, map))
}

/// The forward pass of arguments that fit.
///
/// # Errors
/// Sizes beyond 2^31, those of the device.
pub(super) fn forward(args: &Attention, operands: &Operands<'_>) -> Result<Forward> {
    let Operands { q, k, v, tables } = operands;
    let multiprocessors = on_gpu(OP, q.data)?.gpu().properties().multiprocessors as usize;
    let (extents, units) = (&tables.extents, entries(args) * args.heads);
    let most = [extents.most_queries(), extents.most_keys()];
    let plan = Plan::new(args.head_dim, !extents.limits.is_empty(), units, most, multiprocessors);
    let out = q.data.empty_like(&args.out_shape)?;
    let lse = out.empty_as(&args.lse_shape(), Dtype::F32)?;

    // Norm and rotation of queries are the kernel's, which reads a query once; keys are changed once and read often.
    let plain = Operand::of_queries(args, q.data, &args.q);
    // The sources are alive until the launch: memory that is given back may be taken by work that comes later only.
    let (_q, q_map) = mapped(&plain, args, tables, GROUP_ROWS)?;
    let (_k, k_map) = mapped(k, args, tables, plan.keys)?;
    let (_v, v_map) = mapped(v, args, tables, plan.keys)?;
    let out_rows = Rows::of_queries(args, &args.out);
    let out_map = Map::new(args, &out, &out_rows, GROUP_ROWS)?;

    let address = |t: &Tensor| on_gpu(OP, t).map(|view| view.address().to_le_bytes());
    let mut sizes = tables.bytes()?;
    sizes.extend(out_rows.bytes()?);
    // Any boxes will do for what is not used.
    let out_boxes = out_map.as_ref().unwrap_or(&q_map);
    for map in [&q_map, &k_map, &v_map, out_boxes] {
        sizes.extend(map.bytes());
    }
    sizes.extend(q.change());
    sizes.extend(address(&out)?);
    sizes.extend(address(&lse)?);
    sizes.extend(score_factor(args.head_dim).to_le_bytes());
    sizes.extend(integers(&[
        units,
        args.heads / args.kv_heads,
        plan.tiles,
        plan.chunk,
        units * plan.tiles,
        usize::from(out_map.is_some()),
    ])?);
    // A struct's size is a multiple of 8.
    sizes.extend([0; 4]);
    let mut call = Call::named(OP, &plan.name(), &out)?;
    for map in [&q_map, &k_map, &v_map, out_boxes] {
        call = call.boxes(&map.boxes)?;
    }
    call.bytes(&sizes).launch([blocks(plan.blocks, 1)?, 1, 1], plan.threads(), plan.shared())?;
    Ok(Forward { out, lse })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_memory_is_what_a_block_may_have() {
        for head_dim in (2..=128).step_by(2) {
            for limited in [false, true] {
                let plan = Plan::new(head_dim, limited, 16, [4096; 2], 132);
                assert!(plan.shared() <= 227 << 10, "{plan:?}");
                assert!(plan.width >= head_dim && plan.keys.is_multiple_of(16));
            }
        }
        let plan = Plan::new(128, false, 16, [4096; 2], 132);
        assert_eq!((plan.name().as_str(), plan.threads()), ("warpgroup_128_176", 384));
        assert_eq!(plan.shared(), 32 * 1024 + 4 * 176 * 256 + 80 + 1024);
    }

    #[test]
    fn blocks_stay_where_there_are_more_tiles() {
        let plan = |units, queries| Plan::new(128, false, units, [queries, 4096], 132);
        assert_eq!((plan(16, 4096).tiles, plan(16, 4096).blocks), (32, 132));
        assert_eq!((plan(1, 129).tiles, plan(1, 129).blocks), (2, 2));
        assert_eq!(plan(3, 1).blocks, 3);
    }

    #[test]
    fn tiles_of_different_lengths_are_taken_by_chunks_of_units() {
        let chunk = |units, keys| Plan::new(128, true, units, [keys; 2], 132).chunk;
        assert_eq!([chunk(64, 4096), chunk(64, 32768), chunk(3, 1024), chunk(64, 1 << 20)], [8, 1, 3, 1]);
        assert_eq!(Plan::new(128, false, 64, [4096; 2], 132).chunk, 1);
    }
}
