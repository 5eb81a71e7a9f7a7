//! The steps that led to the product in use (`kernels-cu/low_rank_linear/README.md`), S being at hand: and with them the product in use
//! where S is at hand, as behind a norm that made it.

use super::{Case, Layer, Rows, Shape, check, floor};
use crate::timing::Bench;
use hywu_kernels::{
    Error, Result, Tape, Var,
    ops::low_rank_linear::{LADDER, LowRankLinear, Shrunk, ladder_step, shrink},
};

struct Step {
    layer: Layer,
    s: Shrunk,
}

impl Step {
    fn new(bench: &Bench, copy: u64, shape: Shape) -> Result<Self> {
        let layer = Layer::new(bench, copy, shape, shape.r)?;
        let lora = layer.lora.as_ref().ok_or_else(|| Error::invalid("ladder", "a rank of 0"))?;
        Ok(Self { s: shrink(layer.x.value(), lora.a.value(), lora.scale, None)?, layer })
    }
    fn run(&self, step: usize) -> Result<Var> {
        let Layer { x, weight, lora, .. } = &self.layer;
        let b = lora.as_ref().map(|l| l.b.value());
        let b = b.ok_or_else(|| Error::invalid("ladder", "a rank of 0"))?;
        ladder_step(step, x.value(), weight.value(), &self.s, b).map(Var::constant)
    }
    fn in_use(&self) -> Result<Var> {
        let Layer { x, weight, lora, .. } = &self.layer;
        let (lora, shrunk) = (lora.as_ref(), Some(&self.s));
        LowRankLinear { x, weight: weight.into(), bias: None, lora, segments: None, shrunk }
            .forward(&Tape::inference())
    }
}

type Call = dyn Fn(&Step) -> Result<Var>;

/// For a CUDA device; the steps that it has.
pub fn cases(bench: &Bench, bytes: f64) -> Vec<Case> {
    let Ok(Some(device)) = bench.device.properties() else { return Vec::new() };
    let [m, k] = if bench.quick { [136, 72] } else { [4096, 4096] };
    let shape = Shape::new([m, k, k, 16], Rows::Even(1));
    let case = |name, call: Box<Call>| {
        Case::checked(
            name,
            floor(shape, shape.r, bytes),
            move |bench, copy| Step::new(bench, copy, shape),
            move |i: &Step| call(i),
            |bench, i, y| check::rows(bench, &i.layer, y.value()),
        )
    };
    let in_use = case(format!("low_rank_linear/s at hand {shape}"), Box::new(Step::in_use));
    let last = if device.capability == (9, 0) { LADDER.len() } else { 2 };
    let steps = (1..=last).map(|step| {
        case(format!("ladder/{step}_{} {shape}", LADDER[step - 1]), Box::new(move |i: &Step| i.run(step)))
    });
    std::iter::once(in_use).chain(steps).collect()
}
