//! Launcher of `kernels-cu/attention/warpgroup.cuh`, the forward pass on Hopper: which of its kernels, on which grid, with which boxes.

use super::{
    OP, Operand, Operands, Rows, Source, Tables,
    boxes::{LINE_CHANNELS, Map},
    entries, integers, schedule, score_factor, width,
};
use crate::{
    Error, Result, Tensor,
    cuda::{Call, Words, blocks, call::on_gpu, hopper},
    ops::attention::{Attention, Forward, LADDER},
};
use hywu_core::Dtype;

/// Queries of a warpgroup, and threads.
const GROUP_ROWS: usize = 64;
const GROUP_THREADS: usize = 128;

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
    blocks: usize,
}

impl Plan {
    /// For `units` (batch0, batch1, head) of at most `queries`; `narrow`: with tiles of 128 keys, because queries see different keys, or
    /// there are no more.
    fn new(head_dim: usize, narrow: bool, units: usize, queries: usize, multiprocessors: usize) -> Self {
        let (width, tile, consumers, stages) = match (head_dim, narrow) {
            (..=64, _) => (64, 128, 3, 4),
            (..=96, true) => (96, 128, 2, 3),
            (..=96, false) => (96, 176, 2, 2),
            (_, true) => (128, 128, 2, 3),
            (_, false) => (128, 176, 2, 2),
        };
        let tiles = queries.div_ceil(consumers * GROUP_ROWS);
        let blocks = units.saturating_mul(tiles).min(multiprocessors);
        Self { width, keys: tile, consumers, stages, tiles, blocks }
    }
    /// Steps from 2 on of the ladder, for 128 channels and queries that all see the same keys.
    fn of_step(step: usize, units: usize, queries: usize, multiprocessors: usize) -> (Self, String) {
        let plan = Self::new(128, false, units, queries, multiprocessors);
        match step {
            2..=4 => (Self { keys: 128, ..plan }, format!("attention_ladder_{step}")),
            5 => (plan, plan.name()),
            _ => (plan, format!("attention_ladder_{step}")),
        }
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
        rows * row + 8 * (4 * self.stages + 2 * self.consumers) + 1024
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
pub(super) fn mapped(
    operand: &Operand<'_>,
    args: &Attention,
    tables: &Tables,
    tokens: usize,
) -> Result<(Source, Map)> {
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

/// Are tiles of 128 keys better? Where entries are ragged the longest must not decide for the others, as with other tiles a row has other
/// bits.
fn narrow(args: &Attention) -> bool {
    args.causal.is_some() || (args.ragged.is_none() && args.keys <= 128)
}

/// The forward pass of arguments that fit.
///
/// # Errors
/// Sizes beyond 2^31, those of the device.
pub(super) fn forward(args: &Attention, operands: &Operands<'_>) -> Result<Forward> {
    let (units, queries, multiprocessors) = sizes(args, operands)?;
    let plan = Plan::new(args.head_dim, narrow(args), units, queries, multiprocessors);
    launch(args, operands, plan, &plan.name())
}

/// The same by a step of the ladder, from 2 on, of arguments that it takes.
///
/// # Errors
/// As [`forward`]; no such step, or a device or dtype that does not have it.
pub(super) fn step(step: usize, args: &Attention, operands: &Operands<'_>) -> Result<Forward> {
    let there = hopper::there(on_gpu(OP, operands.q.data)?.gpu());
    if !(2..=LADDER.len()).contains(&step) || operands.q.data.dtype() != Dtype::Bf16 || !there {
        let all = LADDER.len();
        let text = format!("step {step} of the ladder: there are {all}, for bf16 on compute capability 9.0");
        return Err(Error::invalid(OP, text));
    }
    let (units, queries, multiprocessors) = sizes(args, operands)?;
    let (plan, kernel) = Plan::of_step(step, units, queries, multiprocessors);
    launch(args, operands, plan, &kernel)
}

/// Units, most queries of an entry, multiprocessors.
fn sizes(args: &Attention, operands: &Operands<'_>) -> Result<(usize, usize, usize)> {
    let multiprocessors = on_gpu(OP, operands.q.data)?.gpu().properties().multiprocessors as usize;
    Ok((entries(args) * args.heads, operands.tables.extents.most_queries(), multiprocessors))
}

fn launch(args: &Attention, operands: &Operands<'_>, plan: Plan, kernel: &str) -> Result<Forward> {
    let Operands { q, k, v, tables } = operands;
    let units = entries(args) * args.heads;
    let out = q.data.empty_like(&args.out_shape)?;
    let lse = out.empty_as(&args.lse_shape(), Dtype::F32)?;

    // Norm and rotation of queries are the kernel's, which reads a query once; keys are changed once and read often.
    let plain = Operand::of_queries(args, q.data, &args.q);
    // The sources are alive until the launch: memory that is given back may be taken by work that comes later only.
    let (_q, q_map) = mapped(&plain, args, tables, GROUP_ROWS)?;
    let (_k, k_map) = mapped(k, args, tables, plan.keys)?;
    let (_v, v_map) = mapped(v, args, tables, plan.keys)?;
    let count = units * plan.tiles;
    let tiles = schedule::Tiles {
        rows: plan.consumers * GROUP_ROWS,
        keys: plan.keys,
        row_bytes: 4 * plan.width,
        of_unit: plan.tiles,
    };
    let list = schedule::schedule(&tables.extents, entries(args), args.heads, &tiles, plan.blocks);
    let list = list.map(|list| Words::sizes(q.data, &list)).transpose()?;

    let address = |t: &Tensor| on_gpu(OP, t).map(|view| view.address().to_le_bytes());
    let mut sizes = tables.bytes()?;
    sizes.extend(Rows::of_queries(args, &args.out).bytes()?);
    for map in [&q_map, &k_map, &v_map] {
        sizes.extend(map.bytes());
    }
    sizes.extend(q.change());
    sizes.extend(address(&out)?);
    sizes.extend(address(&lse)?);
    sizes.extend(list.as_ref().map_or(0, Words::address).to_le_bytes());
    sizes.extend(score_factor(args.head_dim).to_le_bytes());
    sizes.extend(integers(&[args.heads / args.kv_heads, plan.tiles, count])?);
    let mut call = Call::named(OP, kernel, &out)?;
    for map in [&q_map, &k_map, &v_map] {
        call = call.boxes(&map.boxes)?;
    }
    call.bytes(&sizes).launch([blocks(plan.blocks, 1)?, 1, 1], plan.threads(), plan.shared())?;
    Ok(Forward { out, lse })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Device,
        ops::attention::{Causal, Layout},
        reference, testing,
    };

    /// [1, tokens, heads, head_dim] for every operand; two query heads share a key head.
    fn dense(queries: usize, keys: usize, heads: usize, head_dim: usize) -> Attention {
        let layout = |heads| Layout { offset: 0, batch: [0; 2], token: heads * head_dim, head: head_dim };
        Attention {
            batch: [1, 1],
            queries,
            keys,
            heads,
            kv_heads: heads / 2,
            head_dim,
            q: layout(heads),
            k: layout(heads / 2),
            v: layout(heads / 2),
            out: layout(heads),
            out_shape: vec![queries, heads * head_dim],
            key_lengths: None,
            ragged: None,
            causal: None,
            rotary: None,
        }
    }

    /// By grids from one block to one for each tile, and by the ladder where it applies.
    fn run(args: &Attention, device: Device) -> Result<()> {
        let operand = |seed, tokens, heads| {
            let x = testing::random(seed, &[tokens, heads * args.head_dim]);
            x.to(device, Dtype::Bf16)
        };
        let q = operand(1, args.queries, args.heads)?;
        let (k, v) = (operand(2, args.keys, args.kv_heads)?, operand(3, args.keys, args.kv_heads)?);
        assert!(fits(args, &q)?);
        let operands = Operands::new(args, [&q, &k, &v], None)?;
        let limited = args.causal.is_some();
        let (units, queries, multiprocessors) = sizes(args, &operands)?;
        let plan = Plan::new(args.head_dim, narrow(args), units, queries, multiprocessors);
        let mut results = Vec::new();
        for blocks in [1, 3, 4, units * plan.tiles] {
            let plan = Plan { blocks, ..plan };
            results.push(launch(args, &operands, plan, &plan.name())?);
        }
        for result in &results[1..] {
            testing::assert_same_bits(&[result.out.to_host()?], &[results[0].out.to_host()?], "output");
            testing::assert_same_bits(&[result.lse.to_host()?], &[results[0].lse.to_host()?], "sums");
        }
        if !limited && args.head_dim == 128 {
            for step in 1..=LADDER.len() {
                results.push(super::super::ladder_step(step, args, [&q, &k, &v])?);
            }
        }
        let host = |t: &Tensor| t.to_host().map(|t| testing::widen(&t));
        let expected = reference::attention::attention(args, &host(&q)?, &host(&k)?, &host(&v)?, None);
        for result in &results {
            // Weights and outputs are rounded to bf16.
            testing::assert_close(result.out.to_host()?.data(), &expected, 1.0 / 256.0);
        }
        Ok(())
    }

    #[test]
    fn every_grid_gives_the_same_bits() {
        let Some(device) = testing::places().iter().find(|p| p.dtype == Dtype::Bf16).map(|p| p.device) else {
            return;
        };
        let causal = |spans| Some(Causal { spans: vec![spans] });
        for (head_dim, sizes, causal) in [
            (64, [400, 1100], None),
            (64, [600, 700], causal(vec![100..350, 351..640])),
            (96, [300, 900], None),
            (80, [300, 300], causal(vec![])),
            (128, [400, 1000], None),
            (128, [130, 77], None),
            (128, [520, 800], causal(vec![200..333, 500..501])),
        ] {
            let args = Attention { causal, ..dense(sizes[0], sizes[1], 4, head_dim) };
            run(&args, device).expect("the device works");
        }
    }

    #[test]
    fn shared_memory_is_what_a_block_may_have() {
        for head_dim in (2..=128).step_by(2) {
            for limited in [false, true] {
                let plan = Plan::new(head_dim, limited, 16, 4096, 132);
                assert!(plan.shared() <= 227 << 10, "{plan:?}");
                assert!(plan.width >= head_dim && plan.keys.is_multiple_of(16));
            }
        }
        let plan = Plan::new(128, false, 16, 4096, 132);
        assert_eq!((plan.name().as_str(), plan.threads()), ("warpgroup_128_176", 384));
        assert_eq!(plan.shared(), 32 * 1024 + 4 * 176 * 256 + 96 + 1024);
    }

    #[test]
    fn blocks_stay_where_there_are_more_tiles() {
        let plan = |units, queries| Plan::new(128, false, units, queries, 132);
        assert_eq!((plan(16, 4096).tiles, plan(16, 4096).blocks), (32, 132));
        assert_eq!((plan(1, 129).tiles, plan(1, 129).blocks), (2, 2));
        assert_eq!(plan(3, 1).blocks, 3);
    }
}
