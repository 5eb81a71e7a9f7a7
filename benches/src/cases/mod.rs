//! What is timed: one [`Case`] each, under the names that `peer/torch_peer.py` uses too.

mod attention;
mod generator;
pub mod low_rank;
mod memory;
mod model;
mod quantized;
mod samples;

pub use model::parameters;

use crate::{
    Result,
    timing::{Bench, Times},
};
use hywu_kernels::Device;
use std::rc::Rc;

/// What a call must move and compute at least.
#[derive(Clone, Copy, Debug, Default)]
pub struct Floor {
    /// Bytes of all inputs and outputs.
    pub bytes: f64,
    /// Floating point operations, an addition and a multiplication each one.
    pub flops: f64,
}

type Run = dyn Fn(&Bench) -> Result<Times>;
type Check = dyn Fn(&Bench) -> Result<()>;

/// Something to time.
pub struct Case {
    /// `bench/case`.
    pub name: String,
    /// What it must move and compute.
    pub floor: Floor,
    /// Timed in the first round only.
    pub is_once: bool,
    is_wide: bool,
    run: Box<Run>,
    check: Option<Box<Check>>,
    hard: Option<Box<Check>>,
}

impl Case {
    fn new(
        name: impl Into<String>,
        floor: Floor,
        run: impl Fn(&Bench, Floor) -> Result<Times> + 'static,
    ) -> Self {
        let run = Box::new(move |bench: &Bench| run(bench, floor));
        Self { name: name.into(), floor, is_once: false, is_wide: false, run, check: None, hard: None }
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
    /// An op whose result is checked before it is timed.
    fn checked<I, O>(
        name: impl Into<String>,
        floor: Floor,
        inputs: impl Fn(&Bench, u64) -> hywu_kernels::Result<I> + 'static,
        call: impl Fn(&I) -> hywu_kernels::Result<O> + 'static,
        check: impl Fn(&Bench, &I, &O) -> Result<()> + 'static,
    ) -> Self {
        let (inputs, call) = (Rc::new(inputs), Rc::new(call));
        let (of_check, called) = (inputs.clone(), call.clone());
        let case = Self::op(name, floor, move |bench, copy| inputs(bench, copy), move |inputs| call(inputs));
        let check = move |bench: &Bench| {
            let first = of_check(bench, 0)?;
            check(bench, &first, &called(&first)?)
        };
        Self { check: Some(Box::new(check)), ..case }
    }
    /// With a check of operands that are hard to get right.
    fn and_hard(self, check: impl Fn(&Bench) -> Result<()> + 'static) -> Self {
        Self { hard: Some(Box::new(check)), ..self }
    }
    /// One of many, that no bar depends on: it is timed for a shorter time, and in the first round only.
    fn wide(self, is_wide: bool) -> Self {
        Self { is_once: is_wide, is_wide, ..self }
    }
    /// Checks its result; false where there is no check.
    ///
    /// # Errors
    /// A wrong result; those of the op and the device.
    pub fn check(&self, bench: &Bench) -> Result<bool> {
        self.check.as_ref().map_or(Ok(false), |check| check(bench).map(|()| true))
    }
    /// Checks its result from operands that are hard to get right; false where there is no such check.
    ///
    /// # Errors
    /// As [`Case::check`].
    pub fn check_hard(&self, bench: &Bench) -> Result<bool> {
        self.hard.as_ref().map_or(Ok(false), |check| check(bench).map(|()| true))
    }
    /// Checks and times it, with all of a device's memory to itself.
    ///
    /// # Errors
    /// A wrong result; those of the op and the device.
    pub fn run(&self, bench: &Bench) -> Result<Times> {
        bench.device.trim()?;
        self.check(bench)?;
        let bench = if self.is_wide { &bench.shorter() } else { bench };
        (self.run)(bench)
    }
}

/// All cases of a device; `all_shapes` of low-rank linear and attention, too.
pub fn all(bench: &Bench, all_shapes: bool) -> Vec<Case> {
    let bytes = bench.dtype().size() as f64;
    let cuda = bench.device != Device::Cpu;
    let mut cases = low_rank::cases(bench, all_shapes);
    cases.extend(attention::cases(bench, all_shapes));
    cases.extend(generator::cases(bench));
    cases.extend(quantized::cases(bench));
    cases.extend(model::cases(cuda, bench.quick, bytes));
    if cuda {
        cases.extend(memory::cases(bench.quick, bytes));
    }
    cases
}
