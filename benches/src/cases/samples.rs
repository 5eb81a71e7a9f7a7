//! Sampled values of a result beside what they should be, by the rules of [`hywu_kernels::testing`].

use crate::{Result, timing::Bench};
use hywu_core::Philox;
use hywu_kernels::{
    Tape, Tensor, Var,
    ops::elementwise::slice_tokens,
    testing::{Place, assert_near, rounded_to_bf16},
};

/// Places drawn at random.
const DRAWN: usize = 8;

/// Values, what they should be, and what a naive implementation in bf16 gives.
#[derive(Default)]
pub struct Samples {
    actual: Vec<f32>,
    expected: Vec<f64>,
    naive: Vec<f64>,
}

impl Samples {
    /// As many of each.
    pub fn add(&mut self, actual: &[f32], expected: &[f64], naive: &[f64]) {
        self.actual.extend(actual);
        self.expected.extend(expected);
        self.naive.extend(naive);
    }

    /// With others.
    pub fn and(mut self, other: Self) -> Self {
        self.add(&other.actual, &other.expected, &other.naive);
        self
    }

    /// An error where they are not near enough: in f32 when the relative Frobenius error exceeds `tolerance`, in bf16 when the largest
    /// error exceeds twice the naive implementation's.
    pub fn check(self, bench: &Bench, what: &str, tolerance: f64) -> Result<()> {
        let place = Place { device: bench.device, dtype: bench.dtype() };
        // It panics where they are not.
        crate::attempt(|| {
            assert_near(place, &self.actual, &self.expected, |_| self.naive.clone(), tolerance);
            Ok(())
        })
        .map_err(|e| format!("{what} is wrong: {e}").into())
    }
}

/// To the nearest bf16.
pub fn rounded(values: &[f64]) -> Vec<f64> {
    let single = Tensor::build(&[values.len()], |out| {
        out.iter_mut().zip(values).for_each(|(o, v)| *o = *v as f32);
    });
    wide(rounded_to_bf16(&single).data())
}

pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| v.into()).collect()
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    // Eight sums, which a compiler turns into vectors.
    let mut sums = [0.0; 8];
    let (a, b) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a.zip(b) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f64>() + rest
}

/// So many lines of `width` elements of a tensor from number `first` on, from the device that has it.
pub fn lines(x: &Tensor, width: usize, first: usize, count: usize) -> Result<Vec<f32>> {
    let x = Var::constant(x.reshape(&[1, x.numel() / width, width])?);
    Ok(slice_tokens(&Tape::inference(), &x, first, count)?.value().to_host()?.data().to_vec())
}

/// One of them.
pub fn line(x: &Tensor, width: usize, i: usize) -> Result<Vec<f32>> {
    lines(x, width, i, 1)
}

/// Some of `n`, in order: first, last, random ones, and `more`.
pub fn sampled(n: usize, more: impl IntoIterator<Item = usize>) -> Vec<usize> {
    let mut random = Philox::new(0x5a).stream(n as u64);
    let drawn: Vec<usize> = (0..DRAWN).map(|_| random.below(n)).collect();
    let mut all: Vec<usize> = drawn.into_iter().chain([0, n - 1]).chain(more).filter(|i| *i < n).collect();
    all.sort_unstable();
    all.dedup();
    all
}
