//! Launchers of `kernels-cu/attention/short.cuh`: calls with few queries and keys, of any number of units.

use super::{
    Call, OP, Operands, Rows, WARP, WARP_ROWS, entries, integers, row_grid, score_factor, tile_bytes,
};
use crate::{
    Result, Tensor,
    cuda::elementwise,
    ops::attention::{Attention, Forward, NormWeights},
};
use hywu_core::Dtype;

/// The most queries, and the most keys.
const LONGEST: usize = 64;
/// The most warps of a block.
const WARPS: usize = 4;
/// Bytes of shared memory that a block takes when it takes several units: four such blocks fit into a multiprocessor of Hopper, and the
/// rows of some are on their way while others compute.
const SHARED: usize = 56 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    Forward,
    Backward,
}

/// How a call is launched; a function of its shape and layouts alone, and not of the number of units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Channels of a row in shared memory, and rows of a tile of keys: there is a kernel for each pair.
    width: usize,
    keys: usize,
    /// Rows of a tile of queries.
    queries: usize,
    /// Warps of a unit.
    warps: usize,
    /// Neighbouring units of a block, a power of two.
    together: usize,
    /// Bytes of shared memory.
    shared: usize,
}

/// The plan of a validated call, when these kernels take it.
pub(super) fn plan(args: &Attention, dtype: Dtype, pass: Pass) -> Option<Plan> {
    let few = |tokens| (1..=LONGEST).contains(&tokens);
    let taken = dtype == Dtype::Bf16
        && few(args.queries)
        && few(args.keys)
        && args.head_dim <= 128
        // A block has the queries of one head, and so a part of a shared key's gradient.
        && (pass == Pass::Forward || args.kv_heads == args.heads)
        // A plan by the longest entry would let it show in the others' bits.
        && args.ragged.is_none()
        && [&args.q, &args.k, &args.v, &args.out].iter().all(|layout| {
            Rows::of_queries(args, layout).aligned(super::pack(dtype))
        });
    taken.then(|| sizes(args.queries, args.keys, args.head_dim, pass))
}

fn sizes(queries: usize, keys: usize, head_dim: usize, pass: Pass) -> Plan {
    let width = if head_dim <= 64 { 64 } else { 128 };
    let tile = if keys <= 32 { 32 } else { 64 };
    let groups = queries.div_ceil(WARP_ROWS);
    let rows = groups * WARP_ROWS;
    let (warps, unit) = match pass {
        Pass::Forward => (groups, tile_bytes(rows + 2 * tile, width, Dtype::Bf16)),
        // Gradients of the output too, and the weights and the gradients of the scores.
        Pass::Backward => (
            groups.max(keys.div_ceil(WARP_ROWS)),
            tile_bytes(2 * rows + 2 * tile, width, Dtype::Bf16) + tile_bytes(2 * rows, tile, Dtype::Bf16),
        ),
    };
    let fit = (SHARED / unit).min(WARPS / warps).max(1);
    let together = 1 << fit.ilog2();
    Plan { width, keys: tile, queries: rows, warps, together, shared: together * unit }
}

impl Plan {
    fn grid(&self, args: &Attention) -> Result<[u32; 3]> {
        row_grid(entries(args) * args.heads, self.together)
    }
    fn threads(&self) -> usize {
        self.together * self.warps * WARP
    }
    /// The struct `Sizes` of the kernels.
    fn bytes(&self, args: &Attention) -> Result<Vec<u8>> {
        let mut bytes = integers(&[entries(args) * args.heads, self.together, self.warps, self.queries])?;
        let scale = 1.0 / (args.head_dim as f32).sqrt();
        bytes.extend([score_factor(args.head_dim), scale].iter().flat_map(|x| x.to_le_bytes()));
        Ok(bytes)
    }
    /// The kernel's first arguments: operands, where rows are, what happens to them, tokens.
    fn call(
        &self,
        name: &str,
        args: &Attention,
        operands: &Operands<'_>,
        grad: Option<&Tensor>,
    ) -> Result<Call> {
        let Operands { q, k, v, tables } = operands;
        let name = format!("{name}_{}_{}", self.width, self.keys);
        let mut call = Call::new(OP, &name, q.data)?;
        for data in [q.data, k.data, v.data].into_iter().chain(grad) {
            call = call.tensor(data)?;
        }
        for rows in [&q.rows, &k.rows, &v.rows, &Rows::of_queries(args, &args.out)] {
            call = call.bytes(&rows.bytes()?);
        }
        Ok(call.bytes(&q.change()).bytes(&k.change()).bytes(&tables.bytes()?))
    }
}

/// The forward pass.
pub(super) fn forward(plan: &Plan, args: &Attention, operands: &Operands<'_>) -> Result<Forward> {
    let out = operands.q.data.empty_like(&args.out_shape)?;
    let lse = out.empty_as(&args.lse_shape(), Dtype::F32)?;
    let call = plan.call("attention_few_keys", args, operands, None)?;
    let call = call.tensor(&out)?.tensor_as(&lse, Dtype::F32)?.bytes(&plan.bytes(args)?);
    call.launch(plan.grid(args)?, plan.threads() as u32, plan.shared)?;
    Ok(Forward { out, lse })
}

/// Overwrites the gradients of q, k and v, those that are wanted, and returns those of the norm's weights `norm`. No two rows of the
/// gradients share an element.
pub(super) fn backward(
    plan: &Plan,
    args: &Attention,
    operands: &Operands<'_>,
    [grad, lse]: [&Tensor; 2],
    wanted: [Option<&Tensor>; 3],
    norm: Option<NormWeights<'_>>,
) -> Result<Option<(Tensor, Tensor)>> {
    let grid = plan.grid(args)?;
    let partial = || grad.empty_as(&[grid[0] as usize, args.head_dim], Dtype::F32);
    let partials = norm.map(|_| Ok::<_, crate::Error>([partial()?, partial()?])).transpose()?;
    let mut call = plan.call("attention_few_keys_gradient", args, operands, Some(grad))?;
    call = call.tensor_as(lse, Dtype::F32)?;
    for tensor in wanted {
        call = call.optional(tensor)?;
    }
    for i in 0..2 {
        call = call.optional_as(partials.as_ref().map(|p| &p[i]), Dtype::F32)?;
    }
    call.bytes(&plan.bytes(args)?).launch(grid, plan.threads() as u32, plan.shared)?;
    let sum = |partial: &Tensor, weight: &Tensor| {
        elementwise::column_sums(partial, args.head_dim)?.cast(grad.dtype())?.reshape(weight.shape())
    };
    let (Some(norm), Some([q, k])) = (norm, partials) else { return Ok(None) };
    Ok(Some((sum(&q, norm.q)?, sum(&k, norm.k)?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::attention::{Causal, Layout, Ragged};

    fn args(queries: usize, keys: usize, heads: usize, head_dim: usize) -> Attention {
        let row = heads * head_dim;
        let layout = |tokens| Layout { offset: 0, batch: [tokens * row, 0], token: row, head: head_dim };
        Attention {
            batch: [2, 1],
            queries,
            keys,
            heads,
            kv_heads: heads,
            head_dim,
            q: layout(queries),
            k: layout(keys),
            v: layout(keys),
            out: layout(queries),
            out_shape: vec![2, queries, row],
            key_lengths: None,
            ragged: None,
            causal: None,
            rotary: None,
        }
    }

    #[test]
    fn few_keys_of_whole_packs() {
        let taken =
            |a: &Attention, dtype| [Pass::Forward, Pass::Backward].map(|p| plan(a, dtype, p).is_some());
        let bf16 = |a: &Attention| taken(a, Dtype::Bf16);
        let good = args(32, 32, 4, 128);
        assert_eq!(bf16(&good), [true; 2]);
        assert_eq!(taken(&good, Dtype::F32), [false; 2]);
        for (queries, keys, head_dim, expected) in [
            (1, 1, 8, true),
            (64, 64, 128, true),
            (65, 64, 128, false),
            (64, 65, 128, false),
            (0, 1, 64, false),
            (1, 0, 64, false),
            (32, 32, 136, false),
            (32, 32, 60, false),
        ] {
            assert_eq!(bf16(&args(queries, keys, 4, head_dim)), [expected; 2], "{queries} {keys} {head_dim}");
        }
        let lengths = Attention { key_lengths: Some(vec![3, 0]), ..good.clone() };
        assert_eq!(bf16(&lengths), [true; 2]);
        let ragged = Ragged { queries: vec![0, 1, 32], keys: vec![0, 2, 32] };
        assert_eq!(bf16(&Attention { ragged: Some(ragged), ..good.clone() }), [false; 2]);
        assert_eq!(bf16(&Attention { causal: Some(Causal::default()), ..good.clone() }), [true; 2]);
        assert_eq!(bf16(&Attention { kv_heads: 2, ..good.clone() }), [true, false]);
        let mut odd = good.clone();
        odd.k.offset = 4;
        assert_eq!(bf16(&odd), [false; 2]);
        // The number of units does not decide.
        assert_eq!(
            plan(&Attention { batch: [1, 5516], ..good.clone() }, Dtype::Bf16, Pass::Forward),
            plan(&good, Dtype::Bf16, Pass::Forward)
        );
    }

    #[test]
    fn units_share_a_block() {
        // Two units of 96 rows of 128 channels and 16 bytes.
        let layers = Plan { width: 128, keys: 32, queries: 32, warps: 2, together: 2, shared: 2 * 96 * 272 };
        assert_eq!(sizes(32, 32, 128, Pass::Forward), layers);
        // 128 rows, and 64 of 32 weights.
        let gradient = Plan { together: 1, shared: 128 * 272 + 64 * 80, ..layers };
        assert_eq!(sizes(32, 32, 128, Pass::Backward), gradient);
        // Every size fits, and has a warp for each of its rows.
        for (queries, keys) in (1..=LONGEST).flat_map(|q| (1..=LONGEST).map(move |k| (q, k))) {
            for (head_dim, pass) in [(64, Pass::Forward), (128, Pass::Backward), (128, Pass::Forward)] {
                let plan = sizes(queries, keys, head_dim, pass);
                assert!(plan.shared <= 99 << 10 && plan.threads() <= WARPS * WARP, "{plan:?}");
                assert!(plan.together == 1 || plan.shared <= SHARED, "{plan:?}");
                assert!(plan.queries >= queries && plan.keys >= keys && plan.warps * WARP_ROWS >= queries);
                assert!(pass == Pass::Forward || plan.warps * WARP_ROWS >= keys);
            }
        }
    }
}
