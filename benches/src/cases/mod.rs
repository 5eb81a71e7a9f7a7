//! What is timed: one [`Case`] each, under the names that `peer/torch_peer.py` uses too.

mod attention;
mod linear;
mod memory;
mod model;
mod quantized;

pub use model::parameters;

use crate::{
    Result,
    timing::{Bench, Times},
};
use hywu_kernels::Device;

/// What a call must move and compute at least.
#[derive(Clone, Copy, Debug, Default)]
pub struct Floor {
    /// Bytes of all inputs and outputs.
    pub bytes: f64,
    /// Floating point operations, an addition and a multiplication each one.
    pub flops: f64,
}

type Run = dyn Fn(&Bench) -> Result<Times>;

/// Something to time.
pub struct Case {
    /// `bench/case`.
    pub name: String,
    /// What it must move and compute.
    pub floor: Floor,
    run: Box<Run>,
}

impl Case {
    fn new(
        name: impl Into<String>,
        floor: Floor,
        run: impl Fn(&Bench, Floor) -> Result<Times> + 'static,
    ) -> Self {
        Self { name: name.into(), floor, run: Box::new(move |bench| run(bench, floor)) }
    }
    /// A single op: `inputs` makes a copy of its inputs, `call` runs it.
    fn op<I, O>(
        name: impl Into<String>,
        floor: Floor,
        inputs: impl Fn(&Bench, u64) -> hywu_kernels::Result<I> + 'static,
        call: impl Fn(&I) -> hywu_kernels::Result<O> + 'static,
    ) -> Self {
        Self::new(name, floor, move |bench, floor| {
            bench.time(1.0, floor.bytes, |copy| Ok(inputs(bench, copy)?), |inputs| Ok(call(inputs)?))
        })
    }
    /// Times it.
    ///
    /// # Errors
    /// Those of the op and the device.
    pub fn run(&self, bench: &Bench) -> Result<Times> {
        (self.run)(bench)
    }
}

/// All cases of a device.
pub fn all(bench: &Bench) -> Vec<Case> {
    let bytes = bench.dtype().size() as f64;
    let cuda = bench.device != Device::Cpu;
    let mut cases = linear::cases(cuda && !bench.quick, bytes);
    cases.extend(quantized::cases(bench));
    cases.extend(attention::cases(cuda, bench.quick, bytes));
    cases.extend(model::cases(cuda, bench.quick, bytes));
    if cuda {
        cases.extend(memory::cases(bench.quick, bytes));
    }
    cases
}
