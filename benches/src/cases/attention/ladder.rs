//! The steps that led to the forward pass in use (`kernels-cu/attention/README.md`).

use super::{Call, Case, Pass, Shape, check, floor};
use crate::timing::Bench;
use hywu_kernels::ops::attention::{LADDER, ladder_step};

/// For a CUDA device; the steps that it has.
pub fn cases(bench: &Bench, bytes: f64) -> Vec<Case> {
    let Ok(Some(device)) = bench.device.properties() else { return Vec::new() };
    let shape = if bench.quick { Shape::plain(128, 200, 2, 1) } else { Shape::plain(128, 4096, 16, 4) };
    let last = if device.capability == (9, 0) { LADDER.len() } else { 1 };
    let case = |step: usize| {
        Case::checked(
            format!("ladder/attention {step}_{} {shape}", LADDER[step - 1]),
            floor(Pass::Forward, shape, bytes),
            move |bench, copy| Call::new(bench, copy, shape),
            move |call: &Call| {
                let [q, k, v] = &call.operands;
                Ok(ladder_step(step, &call.args, q, k, v)?.out)
            },
            check::output,
        )
    };
    (1..=last).map(case).collect()
}
