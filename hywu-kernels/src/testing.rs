//! Helpers for tests: tolerances that NaN fails, finite differences.

use crate::{Result, Tape, Tensor, Var, ops::loss::weighted_sum};
use hywu_core::Philox;

/// Relative Frobenius error |actual - expected| / |expected|; NaN when anything is NaN, infinite when the lengths differ.
pub fn relative_error(actual: &[f32], expected: &[f64]) -> f64 {
    if actual.len() != expected.len() {
        return f64::INFINITY;
    }
    let difference: f64 = actual.iter().zip(expected).map(|(&a, e)| (f64::from(a) - e).powi(2)).sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() }
}

/// Panics unless both have one length and the relative Frobenius error is <= `tolerance` (NaN fails); names the worst element.
#[track_caller]
pub fn assert_close(actual: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len(), "lengths differ");
    let error = relative_error(actual, expected);
    if error.is_nan() || error > tolerance {
        let distance = |i: usize| (f64::from(actual[i]) - expected[i]).abs();
        let worst = (0..actual.len()).max_by(|&i, &j| distance(i).total_cmp(&distance(j))).unwrap_or(0);
        panic!(
            "relative error {error:e} > {tolerance:e}; worst at {worst}: got {}, expected {}",
            actual[worst], expected[worst]
        );
    }
}

/// Random normal tensor.
pub fn random(seed: u64, shape: &[usize]) -> Tensor {
    Tensor::build(shape, |out| Philox::new(seed).fill_normal(0, 0, out))
}

/// Widens to f64, for the oracles.
pub fn widen(x: &Tensor) -> Vec<f64> {
    x.data().iter().map(|&v| v.into()).collect()
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
    let mut values: Vec<Vec<f64>> = inputs.iter().map(widen).collect();
    let tape = Tape::new();
    let leaves: Vec<Var> = inputs.iter().map(|x| tape.leaf(x.clone())).collect();
    let out = f(&tape, &leaves).expect("the op runs");
    assert_close(out.value().data(), &oracle(&values), 1e-5);
    let weights = random(0x77, out.shape());
    let loss = weighted_sum(&tape, &out, &weights).expect("same shape");
    let mut grads = tape.backward(&loss).expect("a scalar loss");
    let objective = |values: &[Vec<f64>]| -> f64 {
        oracle(values).iter().zip(weights.data()).map(|(y, &w)| y * f64::from(w)).sum()
    };
    let mut places = Philox::new(0x9a).stream(1);
    for i in 0..inputs.len() {
        let grad = grads.take(&leaves[i]).unwrap_or_else(|| Tensor::zeros(inputs[i].shape()));
        let (mut got, mut expected) = (Vec::new(), Vec::new());
        for sample in 0..samples.min(inputs[i].numel()) {
            let all = samples >= inputs[i].numel();
            let at = if all { sample } else { places.below(inputs[i].numel()) };
            let (old, h) = (values[i][at], 1e-5 * values[i][at].abs().max(1.0));
            values[i][at] = old + h;
            let above = objective(&values);
            values[i][at] = old - h;
            let below = objective(&values);
            values[i][at] = old;
            got.push(grad.data()[at]);
            expected.push((above - below) / (2.0 * h));
        }
        let error = relative_error(&got, &expected);
        assert!(
            error <= tolerance,
            "gradient of input {i}: relative error {error:e} > {tolerance:e}\n{got:?}\n{expected:?}"
        );
    }
}
