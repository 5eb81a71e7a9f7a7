//! Helpers for tests: tolerances that NaN fails, finite differences.

use crate::{Result, Tape, Tensor, Var};

/// Relative Frobenius error |actual - expected| / |expected|; NaN when anything is NaN.
pub fn relative_error(actual: &[f32], expected: &[f64]) -> f64 {
    let _ = (actual, expected);
    todo!()
}

/// Panics unless both have one length and the relative Frobenius error is <= `tolerance` (NaN fails); names the worst element.
#[track_caller]
pub fn assert_close(actual: &[f32], expected: &[f64], tolerance: f64) {
    let _ = (actual, expected, tolerance);
    todo!()
}

/// Random normal tensor.
pub fn random(seed: u64, shape: &[usize]) -> Tensor {
    let _ = (seed, shape);
    todo!()
}

/// Checks the tape's gradients of sum(w * f(inputs)) (w random) against the oracle's central differences: `oracle` computes the same
/// output in f64 from the inputs' values. Every input is perturbed at up to `samples` random places.
#[track_caller]
pub fn check_gradients(
    inputs: &[Tensor],
    f: impl Fn(&Tape, &[Var]) -> Result<Var>,
    oracle: impl Fn(&[Vec<f64>]) -> Vec<f64>,
    samples: usize,
    tolerance: f64,
) {
    let _ = (inputs, &f, &oracle, samples, tolerance);
    todo!()
}
