//! Linear layers with low-rank updates, beside those without: rows of one instance or of many, experts, gradients, merging. Whatever is
//! timed is checked first (`check`).

mod check;
mod ladder;
mod policy;
mod shapes;

pub use policy::merge_or_fuse;
pub use shapes::{RAGGED, Rows, Shape, ragged_lengths};

use super::{Case, Floor};
use crate::{backward, timing::Bench};
use hywu_kernels::{
    Device, LoraVar, Tape, Tensor, Var,
    ops::low_rank_linear::{LowRankLinear, Segments, linear, merge, shrink},
};
use shapes::{Experts, experts, shapes};

/// The factor on the update.
const SCALE: f32 = 0.5;

/// All cases of a device; with `all`, every token count with every rank and every number of instances.
pub fn cases(bench: &Bench, all: bool) -> Vec<Case> {
    let bytes = bench.dtype().size() as f64;
    // On the CPU there are few.
    let wide = |shape: Shape| bench.device != Device::Cpu && !shape.of_a_bar();
    let mut cases = Vec::new();
    for shape in shapes(bench, all) {
        // Without an update, whatever the rank and the instances.
        let plain = Shape { r: 0, rows: Rows::Even(1), ..shape };
        let case = plain_layer(plain, bytes).wide(wide(plain));
        if cases.iter().all(|c: &Case| c.name != case.name) {
            cases.push(case);
        }
        cases.push(layer(format!("low_rank_linear/{shape}"), shape, bytes, Layer::forward).wide(wide(shape)));
    }
    cases.extend(shapes::gradients(bench).into_iter().map(|shape| gradients(shape, bytes)));
    cases.extend(experts(bench).into_iter().map(|experts| grouped(experts, bytes)));
    cases.extend(shapes::merges(bench).into_iter().map(|shape| merging(shape, bytes).wide(wide(shape))));
    cases.push(shrinking(shapes::shrink(bench), bytes));
    cases.extend(ladder::cases(bench, bytes));
    cases
}

/// Operands of a layer, and the gradient of its output where gradients are wanted.
pub struct Layer {
    x: Var,
    weight: Var,
    lora: Option<LoraVar>,
    segments: Option<Segments>,
    grad: Option<Tensor>,
}

impl Layer {
    fn new(bench: &Bench, copy: u64, shape: Shape, ranks: usize) -> hywu_kernels::Result<Self> {
        let Shape { m, k, n, .. } = shape;
        let seed = 8 * copy;
        let entries = match shape.rows {
            Rows::Even(b) => b,
            Rows::Ragged => 1,
        };
        Ok(Self {
            x: bench.constant(seed + 1, &[entries, m / entries, k], 1.0)?,
            weight: bench.constant(seed + 2, &[n, k], (k as f32).powf(-0.5))?,
            lora: match ranks {
                0 => None,
                r => Some(lora(bench, seed, [shape.rows.instances(), r, k, n], SCALE)?),
            },
            segments: shape.segments()?,
            grad: None,
        })
    }

    fn forward(&self, tape: &Tape) -> hywu_kernels::Result<Var> {
        let Self { x, weight, lora, segments, .. } = self;
        let (lora, segments) = (lora.as_ref(), segments.as_ref());
        LowRankLinear { x, weight: weight.into(), bias: None, lora, segments, shrunk: None }.forward(tape)
    }
}

/// Random adapters, one an instance.
pub fn lora(
    bench: &Bench,
    seed: u64,
    [instances, rank, inner, outer]: [usize; 4],
    scale: f32,
) -> hywu_kernels::Result<LoraVar> {
    Ok(LoraVar {
        a: bench.constant(seed + 4, &[instances, rank, inner], (inner as f32).powf(-0.5))?,
        b: bench.constant(seed + 5, &[instances, outer, rank], 0.1)?,
        scale,
    })
}

/// What a layer of `ranks` must move and compute at least.
fn floor(shape: Shape, ranks: usize, bytes: f64) -> Floor {
    let [m, k, n, r] = [shape.m, shape.k, shape.n, ranks].map(|x| x as f64);
    let elements = m * (k + n) + n * k + shape.rows.instances() as f64 * r * (k + n);
    Floor { bytes: bytes * elements, flops: 2.0 * m * (k * n + r * (k + n)) }
}

fn plain_layer(shape: Shape, bytes: f64) -> Case {
    let Shape { m, k, n, .. } = shape;
    Case::checked(
        format!("linear/m{m} k{k} n{n}"),
        floor(shape, 0, bytes),
        move |bench, copy| Layer::new(bench, copy, shape, 0),
        |i: &Layer| linear(&Tape::inference(), &i.x, &i.weight, None),
        |bench, i, y| check::rows(bench, i, y.value()),
    )
}

/// The case `name`: `call` computes the output of a layer with an update.
fn layer(
    name: String,
    shape: Shape,
    bytes: f64,
    call: impl Fn(&Layer, &Tape) -> hywu_kernels::Result<Var> + 'static,
) -> Case {
    Case::checked(
        name,
        floor(shape, shape.r, bytes),
        move |bench, copy| Layer::new(bench, copy, shape, shape.r),
        move |i: &Layer| call(i, &Tape::inference()),
        |bench, i, y| check::rows(bench, i, y.value()),
    )
}

/// Gradients of a layer: of x, A and B, the weight being frozen.
pub struct LayerGradients {
    y: Var,
    x: Tensor,
    a: Tensor,
    b: Tensor,
}

fn gradients(shape: Shape, bytes: f64) -> Case {
    let forward = floor(shape, shape.r, bytes);
    // x, W and dY are read again, dX is written; the products of the forward pass, those of dX and those of dA and dB.
    let [m, k, n, r] = [shape.m, shape.k, shape.n, shape.r].map(|x| x as f64);
    let bytes = forward.bytes + bytes * (m * (2.0 * k + n) + n * k);
    let flops = 2.0 * forward.flops + 2.0 * m * r * (k + n);
    Case::checked(
        format!("low_rank_linear/fwd+bwd {shape}"),
        Floor { bytes, flops },
        move |bench, copy| {
            let layer = Layer::new(bench, copy, shape, shape.r)?;
            let mut y_shape = layer.x.shape().to_vec();
            y_shape[2] = shape.n;
            Ok(Layer { grad: Some(bench.tensor(8 * copy + 6, &y_shape, 1.0)?), ..layer })
        },
        |i: &Layer| {
            let missing = || hywu_kernels::Error::invalid("cases", "there is no gradient");
            let tape = Tape::new();
            let leaf = |v: &Var| tape.leaf(v.value().clone());
            let lora = i.lora.as_ref().ok_or_else(missing)?;
            let lora = LoraVar { a: leaf(&lora.a), b: leaf(&lora.b), scale: lora.scale };
            let x = leaf(&i.x);
            let layer = Layer {
                x: x.clone(),
                weight: i.weight.clone(),
                lora: Some(lora.clone()),
                segments: i.segments.clone(),
                grad: None,
            };
            let y = layer.forward(&tape)?;
            let mut grads = backward(tape, &y, i.grad.as_ref().ok_or_else(missing)?)?;
            let mut take = |v: &Var| grads.take(v).ok_or_else(missing);
            Ok(LayerGradients { x: take(&x)?, a: take(&lora.a)?, b: take(&lora.b)?, y })
        },
        check::gradients,
    )
}

/// Rows sorted by expert, each expert with a weight and an adapter of its own.
fn grouped(experts: Experts, bytes: f64) -> Case {
    let shape = experts.shape();
    let [k, n, e] = [shape.k, shape.n, experts.experts].map(|x| x as f64);
    let ranks = experts.parts * shape.r;
    let forward = floor(Shape { rows: Rows::Even(1), ..shape }, 0, bytes);
    let adapters = e * (ranks as f64 * k + shape.r as f64 * n);
    let low = 2.0 * shape.m as f64 * (ranks as f64 * k + shape.r as f64 * n);
    let moved = forward.bytes + bytes * ((e - 1.0) * k * n + adapters);
    Case::checked(
        format!("low_rank_linear/{experts}"),
        Floor { bytes: moved, flops: forward.flops + low },
        move |bench, copy| {
            let Shape { m, k, n, r, .. } = shape;
            let (e, seed) = (experts.experts, 8 * copy);
            Ok(Layer {
                x: bench.constant(seed + 1, &[1, m, k], 1.0)?,
                weight: bench.constant(seed + 2, &[e, n, k], (k as f32).powf(-0.5))?,
                lora: Some(LoraVar {
                    a: bench.constant(seed + 4, &[e, ranks, k], (k as f32).powf(-0.5))?,
                    b: bench.constant(seed + 5, &[e, n, r], 0.1)?,
                    scale: SCALE,
                }),
                segments: Some(Segments::new(&experts.segments())?),
                grad: None,
            })
        },
        |i: &Layer| i.forward(&Tape::inference()),
        |bench, i, y| check::rows(bench, i, y.value()),
    )
}

/// W + scale B A.
fn merging(shape: Shape, bytes: f64) -> Case {
    let Shape { k, n, r, .. } = shape;
    let [inner, outer, rank] = [k, n, r].map(|x| x as f64);
    let elements = 2.0 * inner * outer + rank * (inner + outer);
    Case::checked(
        format!("low_rank_linear/merge k{k} n{n} r{r}"),
        Floor { bytes: bytes * elements, flops: 2.0 * inner * outer * rank },
        // The rows of x don't matter.
        move |bench, copy| Layer::new(bench, copy, Shape { m: 1, rows: Rows::Even(1), ..shape }, r),
        |i: &Layer| match &i.lora {
            Some(l) => merge(i.weight.value(), l.a.value(), l.b.value(), l.scale),
            None => Ok(i.weight.value().clone()),
        },
        check::merged,
    )
}

/// S = scale X A^T alone. What it computes is checked with the layers that use it.
fn shrinking(shape: Shape, bytes: f64) -> Case {
    let Shape { m, k, r, .. } = shape;
    let [rows, inner, rank] = [m, k, r].map(|x| x as f64);
    Case::op(
        format!("low_rank_linear/shrink m{m} k{k} r{r}"),
        Floor { bytes: bytes * (rows * (inner + rank) + rank * inner), flops: 2.0 * rows * inner * rank },
        move |bench, copy| {
            let a = bench.tensor(8 * copy + 4, &[1, r, k], (k as f32).powf(-0.5))?;
            Ok((bench.tensor(8 * copy + 1, &[1, m, k], 1.0)?, a))
        },
        |(x, a): &(Tensor, Tensor)| shrink(x, a, SCALE, None),
    )
}
