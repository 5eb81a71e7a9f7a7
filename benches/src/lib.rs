//! Benchmarks: criterion benches of single ops in `benches/`, the comparison with PyTorch in `peer/` and [`cases`], whole edits in
//! `edit_time.py` and [`edit`], committed results in `runs/`. The README beside this crate lists the commands.

pub mod cases;
pub mod edit;
pub mod smoke;
pub mod timing;

use hywu_kernels::{Gradients, Tape, Tensor, Var, testing::random};
use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::OnceLock,
};

/// Errors of kernels and of models alike.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Random normal values times `factor`, on the CPU. They repeat after four million, which no kernel can notice: what would make
/// arithmetic cheaper is zeros and equal rows.
pub fn normal(seed: u64, shape: &[usize], factor: f32) -> Tensor {
    /// A prime, so that no two rows of a matrix are alike.
    const PERIOD: usize = 4_194_301;
    static VALUES: OnceLock<Tensor> = OnceLock::new();
    let values = VALUES.get_or_init(|| random(1, &[PERIOD])).data();
    let start = (seed as usize).wrapping_mul(1_000_003) % PERIOD;
    Tensor::build(shape, |out| {
        let values = values.iter().cycle().skip(start);
        out.iter_mut().zip(values).for_each(|(o, v)| *o = v * factor);
    })
}

/// Gradients of sum(`grad` * y) without computing that sum, as PyTorch's `y.backward(grad)`: nothing but the backward pass is timed.
///
/// # Errors
/// Those of the ops on the tape.
pub fn backward(tape: Tape, y: &Var, grad: &Tensor) -> hywu_kernels::Result<Gradients> {
    let (y_, grad_) = (y.clone(), grad.clone());
    let start = tape.push(grad.empty_like(&[])?, &[y], move |_, grads| grads.accumulate(&y_, grad_));
    tape.backward(&start)
}

/// Runs `f`; a panic becomes an error, so that one case that fails does not lose the others.
///
/// # Errors
/// Those of `f`.
pub fn attempt<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    let text = |panic: Box<dyn Any + Send>| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(other) => other.downcast::<&str>().map_or("panicked".into(), |text| (*text).into()),
    };
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| Err(text(panic).into()))
}
