//! Helpers for tests: places to run a test body at, tolerances that NaN fails, finite differences.

use crate::{
    Device, Result, Tape, Tensor, Var, cuda,
    ops::{
        loss::weighted_sum,
        low_rank_linear::{Segment, Segments, Shrunk},
    },
};
use half::bf16;
use hywu_core::{Dtype, Philox};
use std::{cell::Cell, sync::OnceLock};

/// Relative Frobenius error |actual - expected| / |expected|; NaN when anything is NaN, infinite when the lengths differ.
pub fn relative_error(actual: &[f32], expected: &[f64]) -> f64 {
    if actual.len() != expected.len() {
        return f64::INFINITY;
    }
    let distance = distance(actual, expected);
    if distance == 0.0 { 0.0 } else { distance / norm(expected.iter().copied()) }
}

fn distance(actual: &[f32], expected: &[f64]) -> f64 {
    norm(actual.iter().zip(expected).map(|(&a, e)| f64::from(a) - e))
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|v| v * v).sum::<f64>().sqrt()
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
#[track_caller]
pub fn widen(x: &Tensor) -> Vec<f64> {
    x.to_host().expect("the device works").data().iter().map(|&v| v.into()).collect()
}

/// A device and a dtype: every test of an op runs its one body at each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where.
    pub device: Device,
    /// Type of the operands there.
    pub dtype: Dtype,
}

impl Place {
    /// The CPU, in f32.
    pub const CPU: Self = Self { device: Device::Cpu, dtype: Dtype::F32 };

    /// A tensor of these values there.
    #[track_caller]
    pub fn tensor(self, x: &Tensor) -> Tensor {
        x.to(self.device, self.dtype).expect("the device works")
    }
    /// A constant of these values there.
    #[track_caller]
    pub fn constant(self, x: &Tensor) -> Var {
        Var::constant(self.tensor(x))
    }
    /// The values as they arrive there, for the oracle.
    #[track_caller]
    pub fn rounded(self, x: &Tensor) -> Vec<f64> {
        widen(&self.tensor(x))
    }
}

/// The CPU and, where a CUDA device is present, that device in f32 and in bf16; without one it says so. On a device allocations
/// are guarded: they start as NaN, and what is written beside them is found by [`for_each_place`].
pub fn places() -> Vec<Place> {
    static CUDA: OnceLock<bool> = OnceLock::new();
    let cuda = *CUDA.get_or_init(|| match Device::Cuda(0).check() {
        Ok(_) => {
            cuda::guard_allocations(true);
            true
        }
        Err(e) => {
            // A machine that is meant to have a device must not pass by skipping.
            assert!(std::env::var_os("HYWU_REQUIRE_CUDA").is_none(), "{e}");
            false
        }
    });
    if !cuda {
        println!("SKIPPED: no CUDA device");
        return vec![Place::CPU];
    }
    let on = |dtype| Place { device: Device::Cuda(0), dtype };
    vec![Place::CPU, on(Dtype::F32), on(Dtype::Bf16)]
}

/// Runs `body` with allocations as they are outside tests; those of [`places`] are guarded. For all threads: tests of one process that
/// use a device must take turns.
pub fn unguarded<T>(body: impl FnOnce() -> T) -> T {
    /// Guards again, also when the body panics.
    struct On;
    impl Drop for On {
        fn drop(&mut self) {
            cuda::guard_allocations(true);
        }
    }
    cuda::guard_allocations(false);
    let _on = On;
    body()
}

/// Runs a test body at every one of [`places`]. Panics when something was written beside an allocation meanwhile.
#[track_caller]
pub fn for_each_place(mut body: impl FnMut(Place)) {
    for place in places() {
        body(place);
        place.device.synchronize().expect("the device works");
        let broken = cuda::broken_guards();
        assert!(broken.is_empty(), "at {place:?}: {broken:?}");
    }
}

/// On the CPU: the values that bf16 would hold.
pub fn rounded_to_bf16(x: &Tensor) -> Tensor {
    Tensor::build(x.shape(), |out| {
        out.iter_mut().zip(x.data()).for_each(|(o, &v)| *o = bf16::from_f32(v).to_f32());
    })
}

thread_local! {
    static NAIVE: Cell<bool> = const { Cell::new(false) };
}

/// Runs `body` as a naive bf16 implementation would on the CPU: whatever an op or its gradient computes on this thread is rounded to
/// bf16. With weights that are rounded too it is the measure for what a model computes on a device.
pub fn naive_bf16<T>(body: impl FnOnce() -> T) -> T {
    /// Switches off again, also when the body panics.
    struct Off;
    impl Drop for Off {
        fn drop(&mut self) {
            NAIVE.set(false);
        }
    }
    NAIVE.set(true);
    let _off = Off;
    body()
}

/// What [`naive_bf16`] makes of an op's result; itself elsewhere.
pub(crate) fn as_naive(x: Tensor) -> Tensor {
    if NAIVE.get() && !x.is_cuda() { rounded_to_bf16(&x) } else { x }
}

/// scale X A^T as plain rows [rows, ranks] on the host, for the same segments and number of adapters. Panics where a device has something
/// other than zeros between, before or behind the rows of the instances, or behind the ranks.
#[track_caller]
pub fn shrunk_rows(shrunk: &Shrunk, segments: Option<&Segments>, adapters: usize) -> Tensor {
    /// As in `kernels-cu/low_rank_linear/rows.cuh`.
    const BAND: usize = 128;
    let s = shrunk.tensor().to_host().expect("the device works");
    let [rows, ranks] = shrunk.size();
    if !shrunk.tensor().is_cuda() {
        assert_eq!(s.shape(), [rows, ranks]);
        return s;
    }
    let segments = Segments::cover(segments, rows, adapters);
    let pitch = ranks.next_multiple_of(8);
    let mut lines = s.data().chunks_exact(pitch);
    let zeros = |lines: &mut std::slice::ChunksExact<'_, f32>| {
        for i in 0..BAND {
            let line = lines.next().expect("a band");
            assert!(line.iter().all(|v| *v == 0.0), "row {i} of a band: {line:?}");
        }
    };
    let mut plain = Tensor::zeros(&[rows, ranks]);
    let out = plain.data_mut();
    zeros(&mut lines);
    for (first, segment) in segments.placed().filter(|(_, s)| s.adapter.is_some()) {
        for row in first..first + segment.rows {
            let (values, padding) = lines.next().expect("a row").split_at(ranks);
            assert!(padding.iter().all(|v| *v == 0.0), "padding of row {row}: {padding:?}");
            out[row * ranks..][..ranks].copy_from_slice(values);
        }
        zeros(&mut lines);
    }
    assert_eq!(lines.next(), None);
    plain
}

/// Segments of one weight: uneven ones, with an adapter each; and some without.
pub fn uneven_segments() -> [Segments; 2] {
    let all = [(1, 2), (15, 0), (16, 6), (17, 1), (31, 3), (33, 5), (129, 4)].map(|(n, i)| (n, Some(i)));
    [&all[..], &[(30, Some(1)), (6, None), (14, Some(0))]].map(|list| {
        let segment = |&(rows, adapter)| Segment { rows, weight: 0, adapter };
        Segments::new(&list.iter().map(segment).collect::<Vec<_>>()).expect("good segments")
    })
}

/// Panics where two runs differ in a bit, or give what is not finite.
#[track_caller]
pub fn assert_same_bits(one: &[Tensor], two: &[Tensor], what: &str) {
    assert_eq!(one.len(), two.len(), "{what}");
    for (i, (one, two)) in one.iter().zip(two).enumerate() {
        assert!(one.data().iter().all(|v| v.is_finite()), "result {i} {what}");
        assert!(one.data() == two.data(), "result {i} {what}");
    }
}

fn largest(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().fold(0.0, |m, v| if v.is_nan() || v > m { v } else { m })
}

/// Half the distance from |v| to the next bf16: what rounding to it may add.
fn half_unit(v: f64) -> f64 {
    // 8 bits, the first of which is 1.
    if v == 0.0 { 0.0 } else { 2f64.powf(v.abs().log2().floor() - 8.0) }
}

/// Values that differ as rounding once more to bf16 would make them differ, drawn by `seed`.
fn jittered(values: &[Vec<f64>], seed: u64) -> Vec<Vec<f64>> {
    let mut random = Philox::new(0xb16).stream(seed);
    let mut jitter = |v: &f64| v + half_unit(*v) * f64::from(random.range(-1.0, 1.0));
    values.iter().map(|x| x.iter().map(&mut jitter).collect()).collect()
}

/// So many errors of the naive implementation are looked at, that the largest does not depend on luck.
const NAIVE_ERRORS: usize = 256;
/// But in no more draws than these.
const MOST_DRAWS: usize = 16;

/// Panics unless `actual` is as near to `expected` as it must be at `place` (NaN fails). In f32 the relative Frobenius error is at most
/// `tolerance`. In bf16 the largest error is at most twice that of a naive bf16 implementation, which rounds its operands once more and
/// its result: `naive(seed)` gives the oracle's values for such operands.
#[track_caller]
pub fn assert_near(
    place: Place,
    actual: &[f32],
    expected: &[f64],
    mut naive: impl FnMut(u64) -> Vec<f64>,
    tolerance: f64,
) {
    if place.dtype == Dtype::F32 {
        return assert_close(actual, expected, tolerance);
    }
    assert_eq!(actual.len(), expected.len(), "lengths differ");
    let size = largest(expected.iter().map(|e| e.abs()));
    let draws = NAIVE_ERRORS.div_ceil(expected.len().max(1)).min(MOST_DRAWS);
    // At least half a unit of the largest value is allowed: the naive result may be exact by chance.
    let mut rounding = half_unit(size);
    for seed in 0..draws as u64 {
        let errors = naive(seed).into_iter().zip(expected);
        rounding = largest(errors.map(|(n, e)| (f64::from(bf16::from_f64(n)) - e).abs()).chain([rounding]));
    }
    let bound = 2.0 * rounding + 1e-6 * size;
    let distance = |i: usize| (f64::from(actual[i]) - expected[i]).abs();
    let error = largest((0..actual.len()).map(distance));
    if error.is_nan() || bound.is_nan() || error > bound {
        let worst = (0..actual.len()).max_by(|&i, &j| distance(i).total_cmp(&distance(j))).unwrap_or(0);
        panic!(
            "at {place:?}: error {error:e} > {bound:e}; worst at {worst}: got {}, expected {}",
            actual[worst], expected[worst]
        );
    }
}

/// Checks an op's output at `place` against its oracle, which computes it in f64 from the inputs' values.
#[track_caller]
pub fn check_output(
    place: Place,
    inputs: &[Tensor],
    f: impl Fn(&Tape, &[Var]) -> Result<Var>,
    oracle: impl Fn(&[Vec<f64>]) -> Vec<f64>,
    tolerance: f64,
) {
    let constants: Vec<Var> = inputs.iter().map(|x| place.constant(x)).collect();
    let values: Vec<Vec<f64>> = inputs.iter().map(|x| place.rounded(x)).collect();
    let out =
        f(&Tape::inference(), &constants).expect("the op runs").value().to_host().expect("the device works");
    assert_near(place, out.data(), &oracle(&values), |seed| oracle(&jittered(&values, seed)), tolerance);
}

/// Checks, at every one of [`places`], an op's output and the tape's gradients of sum(w * f(inputs)) (w random) against the oracle's
/// values and central differences: `oracle` computes the same output in f64 from the inputs' values. Every input is perturbed at up to
/// `samples` random places.
#[track_caller]
pub fn check_gradients(
    inputs: &[Tensor],
    f: impl Fn(&Tape, &[Var]) -> Result<Var>,
    oracle: impl Fn(&[Vec<f64>]) -> Vec<f64>,
    samples: usize,
    tolerance: f64,
) {
    for_each_place(|place| check_gradients_at(place, inputs, &f, &oracle, samples, tolerance));
}

/// [`check_gradients`] at one place.
#[track_caller]
pub fn check_gradients_at(
    place: Place,
    inputs: &[Tensor],
    f: impl Fn(&Tape, &[Var]) -> Result<Var>,
    oracle: impl Fn(&[Vec<f64>]) -> Vec<f64>,
    samples: usize,
    tolerance: f64,
) {
    check_output(place, inputs, &f, &oracle, 1e-5);
    let mut values: Vec<Vec<f64>> = inputs.iter().map(|x| place.rounded(x)).collect();
    let tape = Tape::new();
    let leaves: Vec<Var> = inputs.iter().map(|x| tape.leaf(place.tensor(x))).collect();
    let out = f(&tape, &leaves).expect("the op runs");
    let weights = random(0x77, out.shape()).to_like(out.value()).expect("the device works");
    let loss = weighted_sum(&tape, &out, &weights).expect("same shape");
    let mut grads = tape.backward(&loss).expect("a scalar loss");
    let weights = widen(&weights);
    // Where each input is perturbed.
    let mut random_places = Philox::new(0x9a).stream(1);
    let at: Vec<Vec<usize>> = inputs
        .iter()
        .map(|x| match samples >= x.numel() {
            true => (0..x.numel()).collect(),
            false => (0..samples).map(|_| random_places.below(x.numel())).collect(),
        })
        .collect();
    let objective =
        |values: &[Vec<f64>]| -> f64 { oracle(values).iter().zip(&weights).map(|(y, w)| y * w).sum() };
    let differences = |values: &mut [Vec<f64>], i: usize| -> Vec<f64> {
        let difference = |&at: &usize| {
            let (old, h) = (values[i][at], 1e-5 * values[i][at].abs().max(1.0));
            values[i][at] = old + h;
            let above = objective(values);
            values[i][at] = old - h;
            let below = objective(values);
            values[i][at] = old;
            (above - below) / (2.0 * h)
        };
        at[i].iter().map(difference).collect()
    };
    for i in 0..inputs.len() {
        let grad = grads.take(&leaves[i]).map(|g| g.to_host().expect("the device works"));
        let grad = grad.unwrap_or_else(|| Tensor::zeros(inputs[i].shape()));
        let got: Vec<f32> = at[i].iter().map(|&at| grad.data()[at]).collect();
        let expected = differences(&mut values, i);
        if place.dtype == Dtype::F32 {
            // The few may be small ones, sums that cancelled: the error is relative to what as many of the whole gradient hold.
            let share = (got.len() as f64 / grad.numel().max(1) as f64).sqrt();
            let whole = norm(grad.data().iter().map(|&g| g.into())) * share;
            let scale = norm(expected.iter().copied()).max(whole).max(f64::MIN_POSITIVE);
            let error = distance(&got, &expected) / scale;
            assert!(
                error <= tolerance,
                "at {place:?}: gradient of input {i}: relative error {error:e} > {tolerance:e}\n{got:?}\n{expected:?}"
            );
        } else {
            let naive = |seed| differences(&mut jittered(&values, seed), i);
            assert_near(place, &got, &expected, naive, tolerance);
        }
    }
}
