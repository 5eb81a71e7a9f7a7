//! Ops that are bound by memory: what they read and write is far larger than a cache.

use super::{Case, Floor};
use crate::{backward, normal, timing::Bench};
use hywu_core::Dtype;
use hywu_kernels::{
    ParamSet, Result, Tape, Tensor, Var,
    ops::{
        elementwise::{add, add_row, cast, gated_residual, scale},
        embedding::embedding,
        local_filter::{COEFFICIENTS, FEATURES, HIDDEN, local_filter},
        loss::weighted_mse,
        patchify::patchify,
        rms_norm::{Modulation, rms_norm},
        swiglu::{silu, swiglu},
    },
    optim::{Optimizer, Schedule},
};
use std::cell::RefCell;

const EPS: f32 = 1e-6;

pub fn cases(quick: bool, bytes: f64) -> Vec<Case> {
    let shape = if quick { [2, 16, 256] } else { [16, 1024, 2048] };
    let mut cases = elementwise(shape, bytes);
    cases.extend(norm_and_activations(shape, bytes));
    cases.extend(gathers(quick, bytes));
    cases.push(optimiser(if quick { 1 << 16 } else { 1 << 24 }, bytes));
    cases
}

/// A case that moves `passes` times the elements of [b, t, c].
fn pass<I, O>(
    name: &str,
    [b, t, c]: [usize; 3],
    passes: f64,
    bytes: f64,
    inputs: impl Fn(&Bench, u64) -> Result<I> + 'static,
    call: impl Fn(&I) -> Result<O> + 'static,
) -> Case {
    let floor = Floor { bytes: passes * bytes * (b * t * c) as f64, flops: 0.0 };
    Case::op(format!("{name} b{b} t{t} c{c}"), floor, inputs, call)
}

/// `N` tensors of one shape.
fn several<const N: usize>(bench: &Bench, copy: u64, shape: &[usize]) -> Result<[Var; N]> {
    let vars =
        (0..N as u64).map(|i| bench.constant(8 * copy + i, shape, 1.0)).collect::<Result<Vec<Var>>>()?;
    vars.try_into().map_err(|_| hywu_kernels::Error::invalid("cases", "another number of tensors"))
}

fn elementwise(shape @ [b, _, c]: [usize; 3], bytes: f64) -> Vec<Case> {
    let one = move |bench: &Bench, copy| bench.constant(copy, &shape, 1.0);
    let row = move |bench: &Bench, copy| Ok((one(bench, copy)?, bench.tensor(copy + 1, &[c], 1.0)?));
    vec![
        pass(
            "elementwise/add",
            shape,
            3.0,
            bytes,
            move |bench, copy| several(bench, copy, &shape),
            |[x, y]: &[Var; 2]| add(&Tape::inference(), x, y),
        ),
        pass("elementwise/scale", shape, 2.0, bytes, one, |x| scale(&Tape::inference(), x, 0.75)),
        pass(
            "elementwise/gated_residual",
            shape,
            3.0,
            bytes,
            move |bench, copy| Ok((several(bench, copy, &shape)?, bench.constant(copy, &[b, c], 1.0)?)),
            |([x, y], gate): &([Var; 2], Var)| gated_residual(&Tape::inference(), x, y, gate),
        ),
        pass("elementwise/add_row", shape, 2.0, bytes, row, |(x, row)| {
            add_row(&Tape::inference(), x, &Var::constant(row.clone()))
        }),
        // The gradient of the row alone: sums over all rows.
        pass("elementwise/add_row fwd+bwd", shape, 3.0, bytes, row, |(x, row)| {
            let tape = Tape::new();
            let row = tape.leaf(row.clone());
            let y = add_row(&tape, x, &row)?;
            Ok((backward(tape, &y, x.value())?.take(&row), y))
        }),
        pass("elementwise/cast to f32", shape, 1.0 + 4.0 / bytes, bytes, one, |x| {
            cast(&Tape::inference(), x, Dtype::F32)
        }),
        pass(
            "loss/weighted_mse",
            shape,
            2.0,
            bytes,
            move |bench, copy| several(bench, copy, &shape),
            move |[x, y]: &[Var; 2]| weighted_mse(&Tape::inference(), x, y.value(), &vec![1.0; b]),
        ),
    ]
}

struct Norm {
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
}

impl Norm {
    fn new(bench: &Bench, copy: u64, shape @ [b, _, c]: [usize; 3]) -> Result<Self> {
        let tensor = |i, shape: &[usize]| bench.tensor(8 * copy + i, shape, 1.0);
        Ok(Self {
            x: tensor(0, &shape)?,
            grad: tensor(1, &shape)?,
            weight: tensor(2, &[c])?,
            scale: tensor(3, &[b, c])?,
            shift: tensor(4, &[b, c])?,
        })
    }
    fn forward(&self, tape: &Tape) -> Result<([Var; 4], Var)> {
        let [x, weight, scale, shift] =
            [&self.x, &self.weight, &self.scale, &self.shift].map(|t| tape.leaf(t.clone()));
        let modulation = Some(Modulation { scale: &scale, shift: &shift });
        let y = rms_norm(tape, &x, Some(&weight), EPS, modulation)?;
        Ok(([x, weight, scale, shift], y))
    }
}

fn norm_and_activations(shape @ [b, t, c]: [usize; 3], bytes: f64) -> Vec<Case> {
    let wide = [b, t, 2 * c];
    vec![
        pass(
            "rms_norm/modulated fwd",
            shape,
            2.0,
            bytes,
            move |bench, copy| Norm::new(bench, copy, shape),
            |i: &Norm| i.forward(&Tape::inference()),
        ),
        // Backward reads x and the gradient again and writes x's.
        pass(
            "rms_norm/modulated fwd+bwd",
            shape,
            5.0,
            bytes,
            move |bench, copy| Norm::new(bench, copy, shape),
            |i: &Norm| {
                let tape = Tape::new();
                let (vars, y) = i.forward(&tape)?;
                let mut grads = backward(tape, &y, &i.grad)?;
                Ok((vars.map(|v| grads.take(&v)), y))
            },
        ),
        pass(
            "swiglu/fwd",
            shape,
            3.0,
            bytes,
            move |bench, copy| bench.constant(copy, &wide, 1.0),
            |x: &Var| swiglu(&Tape::inference(), x),
        ),
        pass(
            "swiglu/fwd+bwd",
            shape,
            8.0,
            bytes,
            move |bench, copy| Ok((bench.tensor(copy, &wide, 1.0)?, bench.tensor(copy + 1, &shape, 1.0)?)),
            |(x, grad)| {
                let tape = Tape::new();
                let x = tape.leaf(x.clone());
                let y = swiglu(&tape, &x)?;
                Ok((backward(tape, &y, grad)?.take(&x), y))
            },
        ),
        pass(
            "swiglu/silu",
            shape,
            2.0,
            bytes,
            move |bench, copy| bench.constant(copy, &shape, 1.0),
            |x: &Var| silu(&Tape::inference(), x),
        ),
    ]
}

fn gathers(quick: bool, bytes: f64) -> Vec<Case> {
    let [b, side] = if quick { [1, 64] } else { [16, 1024] };
    let elements = (b * side * side * 3) as f64;
    let patches = Case::op(
        format!("patchify/b{b} {side}px p8"),
        Floor { bytes: 2.0 * bytes * elements, flops: 0.0 },
        move |bench, copy| bench.constant(copy, &[b, side, side, 3], 1.0),
        |x: &Var| patchify(&Tape::inference(), x, 8),
    );
    let [entries, width, count] = if quick { [512, 64, 1024] } else { [49408, 1024, 65536] };
    let lookup = Case::op(
        format!("embedding/n{entries} c{width} ids{count}"),
        Floor { bytes: 2.0 * bytes * (count * width) as f64, flops: 0.0 },
        move |bench, copy| {
            // A multiplicative hash spreads the rows; the same ones come up in PyTorch's program.
            let ids: Vec<u32> =
                (0..count as u64).map(|i| (i * 2_654_435_761 % entries as u64) as u32).collect();
            Ok((bench.constant(copy, &[entries, width], 1.0)?, ids))
        },
        move |(table, ids)| embedding(&Tape::inference(), table, ids, &[count]),
    );
    let [b, n, p2] = if quick { [1, 64, 64] } else { [16, 1024, 64] };
    let each = p2 * (FEATURES + HIDDEN + 3) + COEFFICIENTS;
    let filter = Case::op(
        format!("local_filter/fwd b{b} t{n}"),
        Floor { bytes: bytes * (b * n * each) as f64, flops: (6 * b * n * p2 * (FEATURES + HIDDEN)) as f64 },
        move |bench, copy| {
            let tensor = |i, each| bench.constant(4 * copy + i, &[b, n, each], 1.0);
            Ok([tensor(0, COEFFICIENTS)?, tensor(1, p2 * FEATURES)?, tensor(2, p2 * HIDDEN)?])
        },
        |[coef, features, hidden]: &[Var; 3]| {
            local_filter(&Tape::inference(), coef, features.value(), hidden)
        },
    );
    vec![patches, lookup, filter]
}

/// Norm, clipping, AdamW and the average of `weights` weights in sixteen matrices, with gradients as mixed precision makes them.
fn optimiser(weights: usize, bytes: f64) -> Case {
    const MATRICES: usize = 16;
    let side = (weights / MATRICES).isqrt();
    // Gradients are read for the norm and for the step; weights, two moments and the average are read and written in f32.
    let floor = Floor { bytes: weights as f64 * (2.0 * bytes + 32.0), flops: 0.0 };
    Case::op(
        format!("optim/step with average n{weights}"),
        floor,
        move |bench, copy| {
            let mut params = ParamSet::new();
            for i in 0..MATRICES {
                params.insert(format!("w{i}"), normal(i as u64, &[side, side], 0.02));
            }
            let params = params.to_mixed(bench.device, bench.dtype())?;
            let schedule = Schedule { warmup: 10, total: 100_000, peak: 1e-3, floor: 1e-4 };
            let optimizer = Optimizer::new(&params, schedule, 0.01, 1.0, Some(0.999))?;
            let grads: Result<Vec<Tensor>> =
                (0..MATRICES as u64).map(|i| bench.tensor(copy + i, &[side, side], 1.0)).collect();
            Ok((RefCell::new((params, optimizer)), grads?))
        },
        |(state, grads)| {
            let (params, optimizer) = &mut *state.borrow_mut();
            optimizer.step(params, grads)
        },
    )
}
