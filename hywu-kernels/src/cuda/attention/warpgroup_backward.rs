//! Launcher of `kernels-cu/attention/warpgroup_backward.cuh`, the backward pass of Hopper.

use super::{OP, Operand, Operands, Rows, entries, integers, score_factor, warpgroup};
use crate::{
    Result, Tensor,
    cuda::{Call, blocks, call::on_gpu, pack},
    ops::attention::Attention,
};
use hywu_core::Dtype;

/// Keys of a block.
const KEYS: usize = 128;
/// Threads of a block: a producer and two that compute.
const THREADS: u32 = 384;
/// Slots of the rings of queries and of gradients of the output.
const STAGES: [usize; 2] = [3, 2];
/// Pieces of a tile's gradient of queries.
const PIECES: usize = 2;

/// What is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// Channels of a row: head_dim, padded.
    width: usize,
    /// Queries of a tile.
    rows: usize,
    /// Tiles of queries that a head has room for.
    tiles: usize,
    /// Blocks of a head's keys, in the longest entry.
    blocks: usize,
}

impl Plan {
    /// `queries`: of an entry, or of all `ragged` ones; `keys`: of the longest entry.
    fn new(head_dim: usize, queries: usize, ragged: Option<usize>, keys: usize) -> Self {
        let width = if head_dim > 64 { 128 } else { 64 };
        let rows = 8192 / width;
        // As first_tile of rows.cuh counts them.
        let tiles = match ragged {
            Some(entries) => queries / rows + entries,
            None => queries.div_ceil(rows),
        };
        Self { width, rows, tiles, blocks: keys.div_ceil(KEYS) }
    }
    /// Rows that a head has room for in the gradient of queries.
    fn room(self) -> usize {
        self.tiles * self.rows
    }
    /// Of so many units, how many take turns with their blocks: twice as many as run at a time, so that a block's turn to add has come when it
    /// starts; with limits twice that, since blocks have the less work the larger their number, and short ones shall come last.
    fn together(self, units: usize, multiprocessors: usize, limits: bool) -> usize {
        let places = if limits { 4 * multiprocessors } else { 2 * multiprocessors };
        let groups = units.div_ceil((places / self.blocks.max(1)).max(1)).max(1);
        units.div_ceil(groups)
    }
    /// Bytes of dynamic shared memory, as `Config` lays it out, and what aligning it may take.
    fn shared(self) -> usize {
        let (own, tile, scores) = (KEYS * self.width * 2, self.rows * self.width * 2, KEYS * self.rows * 2);
        let pieces = PIECES * 64 * 64 * 4;
        let numbers = (2 * STAGES[0] + STAGES[1]) * (self.rows * 4 + 64);
        // The struct `Barriers`: those, what the block works on, rows of the slots, the block's number.
        let slots = STAGES[0] + STAGES[1];
        let barriers = 8 * (1 + 2 * (slots + PIECES)) + 4 * (12 + slots + 1);
        2 * own + slots * tile + 2 * scores + pieces + numbers + barriers + 1024
    }
}

/// Gradients of rows, in f32 and packed but where they went to their operands' tensors; those of queries and keys have yet to be multiplied by 1 / sqrt(head_dim).
pub(super) struct Gradients {
    /// Of queries: in pieces, see rows.cuh, with `room` for so many rows in a head.
    pub q: Tensor,
    pub room: usize,
    /// Of keys: `[rows, width]`.
    pub k: Option<Tensor>,
    /// Of values, the same.
    pub v: Option<Tensor>,
    pub width: usize,
}

/// Where gradients of keys or values go.
enum Target<'a> {
    /// To packed rows in f32.
    Packed(Tensor),
    /// To the operand's rows in its gradient, whole.
    Rows { out: &'a Tensor, rows: Rows, factor: f32 },
}

impl<'a> Target<'a> {
    /// `out`: the gradient of the operand's tensor if rows may be written, and the factor that rows take on the way there.
    fn new(
        args: &Attention,
        operand: &Operand<'_>,
        width: usize,
        (out, factor): (Option<&'a Tensor>, f32),
    ) -> Result<Self> {
        // Every key is one of an entry's, so that its row is written, but where keys are masked by their number.
        let plain = operand.norm.is_none() && operand.rotary.is_none() && args.key_lengths.is_none();
        match out.filter(|_| plain && operand.rows.aligned(pack(Dtype::Bf16))) {
            Some(out) => Ok(Self::Rows { out, rows: operand.rows, factor }),
            None => Ok(Self::Packed(operand.data.empty_as(&[operand.rows.count(args), width], Dtype::F32)?)),
        }
    }
    /// The struct `Target` of the kernel.
    fn bytes(&self) -> Result<Vec<u8>> {
        let address = |t: &Tensor| on_gpu(OP, t).map(|view| view.address().to_le_bytes());
        let null = [0; 8];
        let (addresses, rows, factor) = match self {
            Self::Packed(packed) => ([address(packed)?, null], vec![0; 56], 0.0),
            Self::Rows { out, rows, factor } => ([null, address(out)?], rows.bytes()?, *factor),
        };
        let mut bytes = addresses.concat();
        bytes.extend(rows);
        bytes.extend(factor.to_le_bytes());
        bytes.extend([0; 4]);
        Ok(bytes)
    }
    fn packed(self) -> Option<Tensor> {
        match self {
            Self::Packed(packed) => Some(packed),
            Self::Rows { .. } => None,
        }
    }
}

/// The gradients, where they can be computed here. `grad` are the rows of the output's gradient, `delta` its products with the output;
/// `outs`: the gradients of keys' and of values' tensors, where rows may be written.
///
/// # Errors
/// Sizes beyond 2^31, those of the device.
pub(super) fn gradients(
    args: &Attention,
    operands: &Operands<'_>,
    grad: &Operand<'_>,
    lse: &Tensor,
    delta: &Tensor,
    outs: [Option<&Tensor>; 2],
) -> Result<Option<Gradients>> {
    if !warpgroup::fits(args, grad.data)? {
        return Ok(None);
    }
    let tables = &operands.tables;
    let ragged = args.ragged.as_ref().map(|_| args.batch[0]);
    let plan = Plan::new(args.head_dim, args.queries, ragged, tables.extents.most_keys());
    let heads = operands.q.rows.count(args) / args.queries;
    let d_q = lse.empty_like(&[heads, plan.room(), plan.width])?;
    let target = |operand, out, factor| Target::new(args, operand, plan.width, (out, factor));
    let scale = 1.0 / (args.head_dim as f32).sqrt();
    let d_k = target(&operands.k, outs[0], scale)?;
    let d_v = target(&operands.v, outs[1], 1.0)?;
    // Integers: their bits are those of zeros in f32 too.
    let counters = lse.zeros_like(&[1 + heads * plan.tiles * PIECES])?;

    let mapped = |operand, lines| warpgroup::mapped(operand, args, tables, lines);
    let operands = [
        mapped(&operands.q, plan.rows)?,
        mapped(&operands.k, KEYS)?,
        mapped(&operands.v, KEYS)?,
        mapped(grad, plan.rows)?,
    ];
    let mut sizes = Vec::with_capacity(336);
    let address = |t: &Tensor| on_gpu(OP, t).map(|view| view.address().to_le_bytes());
    for tensor in [lse, delta] {
        sizes.extend(address(tensor)?);
    }
    sizes.extend(tables.bytes()?);
    sizes.extend(address(&d_q)?);
    sizes.extend(d_k.bytes()?);
    sizes.extend(d_v.bytes()?);
    sizes.extend(address(&counters)?);
    sizes.extend(score_factor(args.head_dim).to_le_bytes());
    let [heads, kv_heads] = [args.heads, args.kv_heads];
    let [queries, keys] = [args.queries, args.keys];
    let units = entries(args) * kv_heads;
    let multiprocessors = on_gpu(OP, grad.data)?.gpu().properties().multiprocessors as usize;
    let together = plan.together(units, multiprocessors, !tables.extents.limits.is_empty());
    let counts = [args.batch[1], heads, kv_heads, queries, keys, plan.tiles, plan.blocks, units, together];
    sizes.extend(integers(&counts)?);
    let kernel = format!("warpgroup_backward_{}", plan.width);
    let mut call = Call::named(OP, &kernel, grad.data)?;
    for (_, map) in &operands {
        call = call.boxes(&map.boxes)?;
        sizes.extend(map.bytes());
    }
    let grid = blocks(units * plan.blocks, 1)?;
    call.bytes(&sizes).launch([grid, 1, 1], THREADS, plan.shared())?;
    Ok(Some(Gradients { q: d_q, room: plan.room(), k: d_k.packed(), v: d_v.packed(), width: plan.width }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_width_for_every_head_dim() {
        let widths = [8, 64, 72, 128].map(|d| Plan::new(d, 1000, None, 1000).width);
        assert_eq!(widths, [64, 64, 128, 128]);
    }

    #[test]
    fn tiles_cover_the_longest_entry() {
        let plan = Plan::new(128, 129, None, 128);
        assert_eq!(plan, Plan { width: 128, rows: 64, tiles: 3, blocks: 1 });
        assert_eq!(Plan::new(64, 129, None, 129), Plan { width: 64, rows: 128, tiles: 2, blocks: 2 });
        assert_eq!(plan.room(), 192);
    }

    #[test]
    fn ragged_entries_have_tiles_of_their_own() {
        for lengths in [[1, 1, 1], [63, 65, 0], [64, 64, 64], [0, 200, 1]] {
            let total = lengths.iter().sum();
            let plan = Plan::new(128, total, Some(3), 1);
            let (mut query, mut free) = (0, 0);
            for (i, length) in lengths.into_iter().enumerate() {
                let first = query / plan.rows + i;
                assert!(first >= free);
                free = first + length.div_ceil(plan.rows);
                query += length;
            }
            assert!(free <= plan.tiles);
        }
    }

    #[test]
    fn units_take_turns_where_several_run() {
        let together = |units, keys, limits| Plan::new(128, 1, None, keys).together(units, 132, limits);
        let plain = [(5, 1), (64, 512), (64, 4096), (48, 5516), (32, 8192), (16, 16384), (16, 1 << 20)];
        assert_eq!(plain.map(|(units, keys)| together(units, keys, false)), [5, 64, 8, 6, 4, 2, 1]);
        assert_eq!(together(32, 8192, true), 8);
        // Alike groups.
        assert_eq!(together(9, 4096, false), 5);
    }

    #[test]
    fn shared_memory_is_what_a_block_may_have() {
        for head_dim in [64, 128] {
            assert!(Plan::new(head_dim, 1, None, 1).shared() <= 227 << 10);
        }
        let numbers = 8 * (64 * 4 + 64);
        assert_eq!(Plan::new(128, 1, None, 1).shared(), (208 << 10) + numbers + 8 * 15 + 4 * 18 + 1024);
    }
}
