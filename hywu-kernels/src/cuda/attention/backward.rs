//! Launchers of `kernels-cu/attention`: the backward pass; see `cpu/attention_backward.rs` for what is computed.

use super::{
    OP, Operand, Operands, Plan, Source, WARP, WARP_ROWS, entries, integers, row_grid, row_groups,
    score_factor, scratch_bytes, short, tile_bytes, warpgroup_backward, width,
};
use crate::{
    Result, Tensor,
    cuda::{Call, Words, call::BLOCK, elementwise},
    ops::attention::{Attention, Backward, Extents, Forward, Layout, NormWeights, Slots},
};
use hywu_core::Dtype;

/// Blocks that fill any GPU.
const ENOUGH_BLOCKS: usize = 1024;

/// Two tiles of own rows, and two of other rows for every stage, with three numbers per row. Sizes as in backward.cuh.
fn plan(head_dim: usize, dtype: Dtype) -> Plan {
    let width = width(head_dim);
    let rows = if dtype.size() * width > 512 { 32 } else { 64 };
    let others = if width > 64 { 32 } else { 64 };
    let stages = if dtype == Dtype::Bf16 { 2 } else { 1 };
    let tiles = tile_bytes(2 * rows + stages * 2 * others, width, dtype);
    let shared = tiles + stages * 3 * others * 4 + scratch_bytes(rows, others, dtype);
    Plan { width, rows, threads: (rows / WARP_ROWS * WARP) as u32, shared }
}

/// Which rows a launch of `attention_unpack` takes, per axis (batch0, batch1, token, head): the struct `Walk` of the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Walk {
    /// Rows at once, from `base` on: no two of them share an element.
    parallel: [usize; 4],
    /// Rows that are all the same elements, and are added up by the same threads.
    loops: [usize; 4],
    base: [usize; 4],
}

impl Walk {
    /// All rows at once.
    fn all(sizes: [usize; 4]) -> Self {
        Self { parallel: sizes, loops: [1; 4], base: [0; 4] }
    }
    /// Launches, one after the other, none of which meets an element twice at a time.
    fn apart(sizes: [usize; 4], layout: &Layout, head_dim: usize) -> Vec<Self> {
        let strides = [layout.batch[0], layout.batch[1], layout.token, layout.head];
        let mut walk = Self { parallel: [1; 4], loops: [1; 4], base: [0; 4] };
        let mut in_turn = [1; 4];
        // An axis whose stride exceeds all that the smaller ones reach keeps its rows apart.
        let mut reach = head_dim - 1;
        let mut order = [0, 1, 2, 3];
        order.sort_by_key(|&axis| strides[axis]);
        for axis in order {
            let (size, stride) = (sizes[axis], strides[axis]);
            if size <= 1 {
                continue;
            }
            if stride == 0 {
                walk.loops[axis] = size;
            } else if stride > reach {
                walk.parallel[axis] = size;
                reach += (size - 1) * stride;
            } else {
                in_turn[axis] = size;
            }
        }
        let at = |mut i: usize| {
            let base = in_turn.map(|size| {
                let index = i % size;
                i /= size;
                index
            });
            Self { base, ..walk }
        };
        (0..in_turn.iter().product()).map(at).collect()
    }
    fn rows(&self) -> usize {
        self.parallel.iter().product()
    }
    fn bytes(&self) -> Result<Vec<u8>> {
        integers(&[self.parallel, self.loops, self.base].concat())
    }
}

/// Where an operand's gradient goes.
#[derive(Clone, Copy)]
enum Sink<'a> {
    /// Overwritten.
    Write(&'a Tensor),
    /// Added to, in f32.
    Add(&'a Tensor),
}

/// The gradient of packed rows, and how it becomes that of an operand.
struct Packed<'a> {
    args: &'a Attention,
    operands: &'a Operands<'a>,
    operand: &'a Operand<'a>,
    /// One after the other, in f32.
    grad: &'a Tensor,
    width: usize,
    /// Tokens that a unit of a gradient in pieces has room for; 0: it is not in pieces.
    room: usize,
    factor: f32,
}

impl Packed<'_> {
    /// Launches one walk and returns, when asked to, the gradient of the norm's weight.
    fn launch(&self, walk: &Walk, sink: Option<Sink<'_>>, norm: Option<&Tensor>) -> Result<Option<Tensor>> {
        let (x, d) = (self.operand.data, self.args.head_dim);
        let width = self.width;
        let (rows, groups) = (walk.rows(), row_groups(width, x.dtype()));
        let per_group = rows.div_ceil(groups * ENOUGH_BLOCKS).max(1);
        let grid = row_grid(rows, groups * per_group)?;
        let partial = norm.map(|_| x.empty_as(&[grid[0] as usize, d], Dtype::F32)).transpose()?;
        let (out, sum) = match sink {
            Some(Sink::Write(out)) => (Some(out), None),
            Some(Sink::Add(sum)) => (None, Some(sum)),
            None => (None, None),
        };
        let call = Call::new(OP, "attention_unpack", x)?.tensor(x)?.bytes(&self.operand.rows.bytes()?);
        let call = call.bytes(&self.operand.change()).tensor_as(self.grad, Dtype::F32)?.float(self.factor);
        let call =
            call.optional(out)?.optional_as(sum, Dtype::F32)?.optional_as(partial.as_ref(), Dtype::F32)?;
        let call = call.bytes(&self.operands.tables.bytes()?).size(usize::from(self.operand.keys))?;
        call.bytes(&walk.bytes()?).size(width)?.size(self.room)?.size(per_group)?.launch(grid, BLOCK, 0)?;
        let (Some(partial), Some(norm)) = (partial, norm) else { return Ok(None) };
        let sum = elementwise::column_sums(&partial, d)?.cast(x.dtype())?;
        Ok(Some(sum.reshape(norm.shape())?))
    }
    /// Takes all rows to the sink; `norm` as in `launch`.
    fn unpack(&self, sink: Option<Sink<'_>>, norm: Option<&Tensor>) -> Result<Option<Tensor>> {
        let sizes = self.operand.rows.sizes(self.args);
        let all = Walk::all(sizes);
        let Some(Sink::Add(_)) = sink else { return self.launch(&all, sink, norm) };
        for walk in Walk::apart(sizes, &self.operand.rows.layout, self.args.head_dim) {
            self.launch(&walk, sink, None)?;
        }
        // Every row once, whatever the rows share.
        match norm {
            Some(_) => self.launch(&all, None, norm),
            None => Ok(None),
        }
    }
}

/// For every entry (one for all, where they are alike) and tile of `rows` keys the first query that sees any of them; empty when all do.
fn first_queries(extents: &Extents, rows: usize, tiles: usize) -> Vec<usize> {
    if extents.limits.is_empty() {
        return Vec::new();
    }
    let of_entry = |i| {
        let entry = extents.entry(i);
        (0..tiles).map(move |tile| extents.first_query(&entry, tile * rows))
    };
    (0..extents.entries.len().max(1)).flat_map(of_entry).collect()
}

/// The kernels over tiles.
struct Tiles<'a> {
    args: &'a Attention,
    operands: &'a Operands<'a>,
    q: Source,
    k: Source,
    v: Source,
    grad: Source,
    lse: &'a Tensor,
    delta: Tensor,
}

impl Tiles<'_> {
    /// Gradients of the packed rows of x and of y, those that the kernel computes: x and y are the own rows, u and w the others.
    fn launch(
        &self,
        kernel: &str,
        [x, y, u, w]: [&Source; 4],
        writes: [bool; 2],
    ) -> Result<[Option<Tensor>; 2]> {
        let plan = plan(self.args.head_dim, x.data.dtype());
        let tables = &self.operands.tables;
        let shape = [x.rows.count(self.args), plan.width];
        let gradient = |wanted: bool| wanted.then(|| x.data.empty_as(&shape, Dtype::F32)).transpose();
        let (d_x, d_y) = (gradient(writes[0])?, gradient(writes[1])?);
        let mut call = Call::new(OP, &format!("attention_{kernel}_{}", plan.width), &x.data)?;
        for source in [x, y, u, w] {
            call = call.tensor(&source.data)?;
        }
        for source in [x, y, u, w] {
            call = call.bytes(&source.rows.bytes()?);
        }
        let own = if x.keys { tables.extents.most_keys() } else { tables.extents.most_queries() };
        let tiles = own.div_ceil(plan.rows);
        let firsts = if x.keys { first_queries(&tables.extents, plan.rows, tiles) } else { Vec::new() };
        let firsts = (!firsts.is_empty()).then(|| Words::sizes(&x.data, &firsts)).transpose()?;
        call = call.bytes(&tables.bytes()?);
        call = match &firsts {
            Some(firsts) => call.words(firsts),
            None => call.long(0),
        };
        call = call.float(score_factor(self.args.head_dim));
        call = call.tensor_as(self.lse, Dtype::F32)?.tensor_as(&self.delta, Dtype::F32)?;
        call = call.optional_as(d_x.as_ref(), Dtype::F32)?.optional_as(d_y.as_ref(), Dtype::F32)?;
        let blocks = entries(self.args) * x.rows.heads * tiles;
        call.size(tiles)?.launch(row_grid(blocks, 1)?, plan.threads, plan.shared)?;
        Ok([d_x, d_y])
    }
    fn query_gradient(&self) -> Result<Option<Tensor>> {
        let sources = [&self.q, &self.grad, &self.k, &self.v];
        let [d_q, _] = self.launch("query_gradient", sources, [true, false])?;
        Ok(d_q)
    }
    /// Those of keys and values, at least where they are wanted.
    fn key_value_gradients(&self, wanted: [bool; 2]) -> Result<[Option<Tensor>; 2]> {
        let sources = [&self.k, &self.v, &self.q, &self.grad];
        if wanted == [false; 2] {
            return Ok([None, None]);
        }
        if width(self.args.head_dim) < 256 {
            return self.launch("key_value_gradient", sources, [true; 2]);
        }
        let mut gradients = [None, None];
        if wanted[0] {
            [gradients[0], _] = self.launch("key_gradient", sources, [true, false])?;
        }
        if wanted[1] {
            [_, gradients[1]] = self.launch("value_gradient", sources, [false, true])?;
        }
        Ok(gradients)
    }
}

pub fn backward(
    args: &Attention,
    qkv: [&Tensor; 3],
    norm: Option<NormWeights<'_>>,
    saved: &Forward,
    grad: &Tensor,
    slots: &Slots<'_>,
) -> Result<Backward> {
    let nothing = entries(args) * args.heads * args.queries * args.keys == 0;
    let sums = !slots.once;
    let tensor = |&(shape, whole): &(&[usize], bool)| match (sums, whole && !nothing) {
        (true, _) => grad.empty_as(&[0], Dtype::F32)?.zeros_like(shape),
        (false, true) => grad.empty_like(shape),
        (false, false) => grad.zeros_like(shape),
    };
    let tensors: Vec<Tensor> = slots.tensors.iter().map(tensor).collect::<Result<_>>()?;
    let norm_weights = norm.filter(|_| slots.wanted.norm);
    if nothing {
        let zeros = |w: &Tensor| w.zeros_like(w.shape());
        let norm: Result<_> = norm_weights.map(|n| Ok((zeros(n.q)?, zeros(n.k)?))).transpose();
        let slots = tensors.iter().map(|t| t.cast(grad.dtype())).collect::<Result<_>>()?;
        return Ok(Backward { slots, norm: norm? });
    }

    let operands = Operands::new(args, qkv, norm)?;
    let [q_slot, k_slot, v_slot] = slots.wanted.slots;
    if slots.once
        && let Some(plan) = short::plan(args, grad.dtype(), short::Pass::Backward)
    {
        let written = slots.wanted.slots.map(|slot| slot.map(|s| &tensors[s]));
        let norm = short::backward(&plan, args, &operands, [grad, &saved.lse], written, norm_weights)?;
        return Ok(Backward { slots: tensors, norm });
    }
    let width = width(args.head_dim);
    let gradients = Operand::of_queries(args, grad, &args.out);
    let count = gradients.rows.count(args);
    let delta = grad.empty_as(&[count], Dtype::F32)?;
    let call = Call::new(OP, "attention_delta", grad)?.tensor(&saved.out)?.tensor(grad)?;
    let call =
        call.bytes(&gradients.rows.bytes()?).tensor_as(&delta, Dtype::F32)?.size(width)?.size(count)?;
    call.launch(row_grid(count, row_groups(width, grad.dtype()))?, BLOCK, 0)?;

    let wants = |slot: Option<usize>| slot.is_some() || norm_weights.is_some();
    let wanted = [wants(q_slot), wants(k_slot), v_slot.is_some()];
    let outs = [k_slot, v_slot].map(|slot| slot.filter(|_| !sums).map(|s| &tensors[s]));
    let found = warpgroup_backward::gradients(args, &operands, &gradients, &saved.lse, &delta, outs)?;
    let ([d_q, d_k, d_v], width, room) = match found {
        Some(found) => ([Some(found.q), found.k, found.v], found.width, found.room),
        None => {
            let [q, k, v] = operands.sources(args, width)?;
            let grad = gradients.source(args, &operands.tables, width)?;
            let tiles = Tiles { args, operands: &operands, q, k, v, grad, lse: &saved.lse, delta };
            let d_q = if wanted[0] { tiles.query_gradient()? } else { None };
            let [d_k, d_v] = tiles.key_value_gradients([wanted[1], wanted[2]])?;
            ([d_q, d_k, d_v], width, 0)
        }
    };

    let unpack = |operand, grad: Option<Tensor>, factor, slot: Option<usize>, norm: Option<&Tensor>, room| {
        let Some(grad) = &grad else { return Ok(None) };
        let sink = slot.map(|s| if sums { Sink::Add(&tensors[s]) } else { Sink::Write(&tensors[s]) });
        if sink.is_none() && norm.is_none() {
            return Ok(None);
        }
        Packed { args, operands: &operands, operand, grad, width, room, factor }.unpack(sink, norm)
    };
    let factor = 1.0 / (args.head_dim as f32).sqrt();
    let weight_q = unpack(&operands.q, d_q, factor, q_slot, norm_weights.map(|n| n.q), room)?;
    let weight_k = unpack(&operands.k, d_k, factor, k_slot, norm_weights.map(|n| n.k), 0)?;
    unpack(&operands.v, d_v, 1.0, v_slot, None, 0)?;
    let slots = tensors.iter().map(|t| t.cast(grad.dtype())).collect::<Result<_>>()?;
    Ok(Backward { slots, norm: weight_q.zip(weight_k) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_fit_into_shared_memory() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for head_dim in (2..=256).step_by(2) {
                let plan = plan(head_dim, dtype);
                assert!(plan.shared <= 163 << 10, "{plan:?}");
                assert_eq!(plan.threads as usize * WARP_ROWS, plan.rows * WARP);
            }
        }
        // Own rows, and two stages of 2 x 32 other rows, of 128 channels and 16 bytes.
        let bf16 = Plan { width: 128, rows: 64, threads: 128, shared: 256 * 272 + 768 };
        assert_eq!(plan(128, Dtype::Bf16), bf16);
        // 32 own rows and 32 others of 256 channels and 16 bytes, 32 rows of 32 weights and 16 bytes.
        let f32 = Plan { width: 256, rows: 32, threads: 64, shared: 128 * 1040 + 384 + 32 * 144 };
        assert_eq!(plan(256, Dtype::F32), f32);
    }

    #[test]
    fn rows_that_share_elements_are_kept_apart() {
        let layout = |batch, token, head| Layout { offset: 3, batch, token, head };
        // Dense: all at once.
        let dense = Walk::apart([2, 1, 5, 3], &layout([120, 0], 24, 8), 8);
        assert_eq!(dense, [Walk::all([2, 1, 5, 3])]);
        // One row for all batch entries and heads: added up by the same threads.
        let shared = Walk::apart([2, 1, 5, 3], &layout([0, 0], 8, 0), 8);
        assert_eq!(shared, [Walk { parallel: [1, 1, 5, 1], loops: [2, 1, 1, 3], base: [0; 4] }]);
        // Overlapping tokens: one after the other.
        let windows = Walk::apart([2, 1, 3, 2], &layout([100, 0], 4, 8), 8);
        assert_eq!(windows.len(), 3);
        assert!(
            windows.iter().enumerate().all(|(i, w)| w.base == [0, 0, i, 0] && w.parallel == [2, 1, 1, 2])
        );
    }
}
