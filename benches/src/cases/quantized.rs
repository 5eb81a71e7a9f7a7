//! Linear layers with an adapter whose weight is in eight bits.

use super::{Case, Floor, low_rank::lora};
use crate::timing::Bench;
use hywu_kernels::{
    Device, LoraVar, Result, Tape, Var,
    ops::low_rank_linear::{Format, LowRankLinear, QuantizedWeight},
};

const FORMATS: [(&str, Format); 2] = [("int8", Format::Int8), ("fp8", Format::Fp8)];

/// Rows, inner, outer, rank: few rows read the weight, many multiply.
pub fn cases(bench: &Bench) -> Vec<Case> {
    let rows: &[usize] = match bench.device {
        _ if bench.quick => &[16],
        Device::Cpu => &[16, 1024],
        Device::Cuda(_) => &[1, 16, 64, 4096],
    };
    let width = if bench.quick { 256 } else { 4096 };
    let bytes = bench.dtype().size() as f64;
    let case = |&m| FORMATS.map(|format| case(format, [m, width, width, 16], bytes));
    rows.iter().flat_map(case).collect()
}

struct Inputs {
    x: Var,
    weight: QuantizedWeight,
    lora: LoraVar,
}

fn case((name, format): (&str, Format), [m, k, n, r]: [usize; 4], bytes: f64) -> Case {
    let [rows, inner, outer, rank] = [m, k, n, r].map(|size| size as f64);
    let elements = rows * (inner + outer) + rank * (inner + outer);
    let flops = 2.0 * rows * (inner * outer + rank * (inner + outer));
    Case::op(
        format!("quantized/{name} m{m} k{k} n{n} r{r} b1"),
        Floor { bytes: bytes * elements + inner * outer + 4.0 * outer, flops },
        move |bench, copy| {
            let (seed, small) = (8 * copy, (k as f32).powf(-0.5));
            let weight = bench.tensor(seed + 2, &[n, k], small)?;
            Ok(Inputs {
                x: bench.constant(seed + 1, &[1, m, k], 1.0)?,
                weight: QuantizedWeight::quantize(&weight, format)?.to(bench.device)?,
                lora: lora(bench, seed, [1, r, k, n], 0.5)?,
            })
        },
        |i: &Inputs| -> Result<Var> {
            let (weight, lora) = ((&i.weight).into(), Some(&i.lora));
            LowRankLinear { x: &i.x, weight, bias: None, lora, segments: None, shrunk: None }
                .forward(&Tape::inference())
        },
    )
}
