//! Matrix products with and without an adapter per batch entry.

use super::{Case, Floor};
use crate::timing::Bench;
use hywu_kernels::{
    LoraVar, Result, Tape, Var,
    ops::low_rank_linear::{linear, low_rank_linear},
};

/// Batch, rows of an entry, inner, outer, rank.
const SHAPES: [[usize; 5]; 5] = [
    [1, 1024, 4096, 4096, 16],
    [32, 84, 192, 576, 8],
    [32, 84, 192, 1024, 8],
    [32, 84, 512, 192, 8],
    [1, 64, 768, 256, 8],
];
/// Those of a large model, for a device.
const LARGE: [[usize; 5]; 4] = [
    [1, 4096, 4096, 4096, 16],
    [1, 16384, 1024, 4096, 16],
    [1, 4096, 4096, 6144, 16],
    [16, 4096, 4096, 4096, 16],
];

pub fn cases(large: bool, bytes: f64) -> Vec<Case> {
    let shapes = SHAPES.iter().chain(if large { &LARGE[..] } else { &[] });
    shapes.flat_map(|&shape| [case(shape, true, bytes), case(shape, false, bytes)]).collect()
}

struct Inputs {
    x: Var,
    weight: Var,
    bias: Var,
    lora: Option<LoraVar>,
}

fn case([b, m, k, n, r]: [usize; 5], adapters: bool, bytes: f64) -> Case {
    let (rows, rank) = ((b * m) as f64, if adapters { r as f64 } else { 0.0 });
    let (inner, outer) = (k as f64, n as f64);
    let elements = rows * (inner + outer) + outer * inner + outer + b as f64 * rank * (inner + outer);
    let flops = 2.0 * rows * (inner * outer + rank * (inner + outer));
    let bench = if adapters { "low_rank_linear" } else { "linear" };
    Case::op(
        format!("{bench}/b{b} m{m} k{k} n{n} r{r}"),
        Floor { bytes: bytes * elements, flops },
        move |bench, copy| {
            let seed = 8 * copy;
            Ok(Inputs {
                x: bench.constant(seed + 1, &[b, m, k], 1.0)?,
                weight: bench.constant(seed + 2, &[n, k], (k as f32).powf(-0.5))?,
                bias: bench.constant(seed + 3, &[n], 1.0)?,
                lora: if adapters { Some(lora(bench, seed, [b, r, k, n], 0.5)?) } else { None },
            })
        },
        |i: &Inputs| {
            let tape = Tape::inference();
            match &i.lora {
                Some(lora) => low_rank_linear(&tape, &i.x, &i.weight, Some(&i.bias), Some(lora)),
                None => linear(&tape, &i.x, &i.weight, Some(&i.bias)),
            }
        },
    )
}

/// Random adapters, one a batch entry.
pub fn lora(
    bench: &Bench,
    seed: u64,
    [batch, rank, inner, outer]: [usize; 4],
    scale: f32,
) -> Result<LoraVar> {
    Ok(LoraVar {
        a: bench.constant(seed + 4, &[batch, rank, inner], (inner as f32).powf(-0.5))?,
        b: bench.constant(seed + 5, &[batch, outer, rank], 0.1)?,
        scale,
    })
}
