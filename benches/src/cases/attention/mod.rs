//! Attention: long sequences, lengths that no tile divides, heads that share keys, masks, norm and rotation, the generator's layers,
//! gradients. Whatever is timed is checked first (`check`).

mod call;
mod check;
mod hard;
mod ladder;
mod shapes;

use super::{Case, Floor};
use crate::timing::Bench;
use call::Call;
use hywu_kernels::{Result, Tensor, ops::attention::Forward};
use shapes::{Pass, Shape};

/// All cases of a device; with `all`, those that no bar depends on too.
pub fn cases(bench: &Bench, all: bool) -> Vec<Case> {
    let bytes = bench.dtype().size() as f64;
    let case = |(pass, shape, bar): shapes::Timed| case(pass, shape, bytes).wide(!bar);
    let mut cases: Vec<Case> = shapes::timed(bench, all).into_iter().map(case).collect();
    cases.extend(ladder::cases(bench, bytes));
    cases
}

/// What a pass must move and compute at least.
fn floor(pass: Pass, shape: Shape, bytes: f64) -> Floor {
    // A multiplication and an addition for every pair and channel, in each of two products.
    let flops = 4.0 * shape.pairs() as f64 * (shape.h * shape.d) as f64;
    let [queries, keys] = [shape.h, shape.kv].map(|heads| bytes * (shape.tokens() * heads * shape.d) as f64);
    // q, k and v are read, and the output is written.
    let forward = 2.0 * queries + 2.0 * keys;
    // q, k, v, the output and its gradient are read, and three gradients are written; five products.
    let backward = 4.0 * queries + 4.0 * keys;
    match pass {
        Pass::Forward => Floor { bytes: forward, flops },
        Pass::Backward => Floor { bytes: backward, flops: 2.5 * flops },
        Pass::Both => Floor { bytes: forward + backward, flops: 3.5 * flops },
    }
}

/// Operands, what the forward pass saved for the backward pass alone, and the gradient of the output.
struct Start {
    call: Call,
    saved: Option<Forward>,
    grad: Tensor,
}

impl Start {
    fn new(bench: &Bench, copy: u64, shape: Shape, pass: Pass) -> Result<Self> {
        let call = Call::new(bench, copy, shape)?;
        let saved = (pass == Pass::Backward).then(|| call.forward()).transpose()?;
        Ok(Self { saved, grad: call.grad(bench, copy)?, call })
    }
    fn run(&self) -> Result<call::Gradients> {
        match &self.saved {
            Some(saved) => self.call.backward(saved, &self.grad),
            None => self.call.on_tape(&self.grad),
        }
    }
}

fn case(pass: Pass, shape: Shape, bytes: f64) -> Case {
    let (name, floor) = (format!("attention/{pass} {shape}"), floor(pass, shape, bytes));
    let case = if pass == Pass::Forward {
        Case::checked(
            name,
            floor,
            move |bench, copy| Call::new(bench, copy, shape),
            |call: &Call| Ok(call.forward()?.out),
            check::output,
        )
    } else {
        Case::checked(
            name,
            floor,
            move |bench, copy| Start::new(bench, copy, shape, pass),
            Start::run,
            |bench, start, got| check::gradients(bench, &start.call, &start.grad, got),
        )
    };
    case.and_hard(move |bench| hard::check(bench, pass, shape))
}
