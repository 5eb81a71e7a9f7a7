//! What is timed is right: sampled rows of the result against sums in f64 from the inputs' values, by the rules of
//! [`hywu_kernels::testing`]. In bf16 the largest error is at most twice that of a naive implementation, which rounds S, both products and
//! their sum.

use super::{Layer, LayerGradients};
use crate::{
    Result,
    cases::samples::{Samples, dot, line, rounded, sampled, wide},
    timing::Bench,
};
use hywu_kernels::{
    LoraVar, Tensor,
    ops::low_rank_linear::{Segment, Segments},
};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Tolerance in f32, as in the op's tests.
const TOLERANCE: f64 = 1e-5;

/// Adds a sum of two products, which a naive implementation rounds one by one.
fn add_sum(samples: &mut Samples, actual: &[f32], base: &[f64], low: &[f64], naive_low: &[f64]) {
    let expected: Vec<f64> = base.iter().zip(low).map(|(b, l)| b + l).collect();
    let naive: Vec<f64> = rounded(base).iter().zip(rounded(naive_low)).map(|(b, l)| b + l).collect();
    samples.add(actual, &expected, &naive);
}

/// First row, end, weight and adapter of a run of rows.
type Run = (usize, usize, usize, Option<usize>);

fn runs(layer: &Layer) -> Result<Vec<Run>> {
    let rows = layer.x.value().numel() / layer.x.value().dim_back(1);
    let even = || Segments::even(rows, layer.lora.as_ref().map_or(0, |l| l.a.shape()[0]));
    let segments = layer.segments.clone().map_or_else(even, Ok)?;
    let mut first = 0;
    let run = |s: &Segment| {
        first += s.rows;
        (first - s.rows, first, s.weight, s.adapter)
    };
    Ok(segments.as_slice().iter().map(run).collect())
}

/// The rows that are looked at, by weight: also those at both sides of some borders between instances.
fn sampled_rows(runs: &[Run]) -> BTreeMap<usize, Vec<(usize, Option<usize>)>> {
    let rows = runs.last().map_or(0, |run| run.1);
    let borders = [1, runs.len() / 2, runs.len() - 1].map(|i| runs[i.min(runs.len() - 1)].0);
    let mut by_weight = BTreeMap::<usize, Vec<_>>::new();
    for row in sampled(rows, borders.into_iter().flat_map(|b| [b, b.saturating_sub(1)])) {
        if let Some(run) = runs.iter().find(|run| (run.0..run.1).contains(&row)) {
            by_weight.entry(run.2).or_default().push((row, run.3));
        }
    }
    by_weight
}

/// One adapter on the host: A [parts * rank, in], B [out, rank], scale.
struct Pair {
    a: Vec<f64>,
    b: Vec<f64>,
    inner: usize,
    rank: usize,
    parts: usize,
    scale: f64,
}

impl Pair {
    fn of(lora: &LoraVar, adapter: usize) -> Result<Self> {
        let (&[_, ranks, inner], &[_, outer, rank]) = (lora.a.shape(), lora.b.shape()) else {
            return Err("an adapter has three axes".into());
        };
        let a = wide(&line(lora.a.value(), ranks * inner, adapter)?);
        let b = wide(&line(lora.b.value(), outer * rank, adapter)?);
        Ok(Self { a, b, inner, rank, parts: ranks / rank, scale: lora.scale.into() })
    }

    /// scale A x.
    fn shrink(&self, x: &[f64]) -> Vec<f64> {
        self.a.chunks_exact(self.inner).map(|a| self.scale * dot(a, x)).collect()
    }

    /// B s, each part of the rows of B with its own part of s.
    fn expand(&self, s: &[f64]) -> Vec<f64> {
        let each = self.b.len() / self.rank / self.parts;
        let row = |(o, b): (usize, &[f64])| dot(b, &s[o / each * self.rank..][..self.rank]);
        self.b.chunks_exact(self.rank).enumerate().map(row).collect()
    }
}

/// The output of a layer.
pub fn rows(bench: &Bench, layer: &Layer, y: &Tensor) -> Result<()> {
    let &[.., outer, inner] = layer.weight.shape() else {
        return Err("a weight has two axes or more".into());
    };
    let mut samples = Samples::default();
    for (weight, rows) in sampled_rows(&runs(layer)?) {
        let weight = line(layer.weight.value(), outer * inner, weight)?;
        let mut xs = Vec::new();
        for (row, _) in &rows {
            xs.push(wide(&line(layer.x.value(), inner, *row)?));
        }
        // Of every row of W, its products with all x.
        let products = |w: &[f32]| -> Vec<f64> {
            let w = wide(w);
            xs.iter().map(|x| dot(&w, x)).collect()
        };
        let products: Vec<Vec<f64>> = weight.par_chunks_exact(inner).map(products).collect();
        for (i, ((row, adapter), x)) in rows.iter().zip(&xs).enumerate() {
            let base: Vec<f64> = products.iter().map(|p| p[i]).collect();
            let (mut low, mut naive) = (vec![0.0; outer], vec![0.0; outer]);
            if let (Some(lora), Some(adapter)) = (&layer.lora, adapter) {
                let pair = Pair::of(lora, *adapter)?;
                let s = pair.shrink(x);
                (low, naive) = (pair.expand(&s), pair.expand(&rounded(&s)));
            }
            add_sum(&mut samples, &line(y, outer, *row)?, &base, &low, &naive);
        }
    }
    samples.check(bench, "the output", TOLERANCE)
}

/// A merged weight.
pub fn merged(bench: &Bench, layer: &Layer, merged: &Tensor) -> Result<()> {
    let (Some(lora), &[outer, inner]) = (&layer.lora, layer.weight.shape()) else {
        return Err("a weight and an adapter are merged".into());
    };
    let pair = Pair::of(lora, 0)?;
    let mut samples = Samples::default();
    for row in sampled(outer, []) {
        let mut low = vec![0.0; inner];
        for (b, a) in pair.b[row * pair.rank..].iter().zip(pair.a.chunks_exact(inner)) {
            low.iter_mut().zip(a).for_each(|(l, a)| *l += pair.scale * b * a);
        }
        let base = wide(&line(layer.weight.value(), inner, row)?);
        add_sum(&mut samples, &line(merged, inner, row)?, &base, &low, &low);
    }
    samples.check(bench, "the merged weight", TOLERANCE)
}

/// Gradients of a layer whose rows divide evenly: dX at sampled rows, dB and dA at sampled columns of dY and X.
pub fn gradients(bench: &Bench, layer: &Layer, got: &LayerGradients) -> Result<()> {
    rows(bench, layer, got.y.value())?;
    let (Some(lora), Some(dy), &[outer, inner]) = (&layer.lora, &layer.grad, layer.weight.shape()) else {
        return Err("gradients are those of a layer with an adapter".into());
    };
    let (x, dy) = (layer.x.value().to_host()?, dy.to_host()?);
    let weight = layer.weight.value().to_host()?;
    let rank = lora.b.value().dim_back(1);
    let (mut dxs, mut das, mut dbs) = (Samples::default(), Samples::default(), Samples::default());
    let runs = runs(layer)?;
    let by_weight = sampled_rows(&runs);
    for &(first, end, _, adapter) in &runs {
        let adapter = adapter.ok_or("every row has an adapter")?;
        let pair = Pair::of(lora, adapter)?;
        // scale dY B
        let shrink_gradient = |dy: &[f32]| {
            let mut ds = vec![0.0; rank];
            for (dy, b) in dy.iter().zip(pair.b.chunks_exact(rank)) {
                ds.iter_mut().zip(b).for_each(|(d, b)| *d += pair.scale * f64::from(*dy) * b);
            }
            ds
        };
        let dy_rows = &dy.data()[first * outer..end * outer];
        let x_rows = &x.data()[first * inner..end * inner];
        let ds: Vec<Vec<f64>> = dy_rows.par_chunks_exact(outer).map(shrink_gradient).collect();
        let s: Vec<Vec<f64>> = x_rows.par_chunks_exact(inner).map(|x| pair.shrink(&wide(x))).collect();
        for (row, _) in by_weight.values().flatten().filter(|(row, _)| (first..end).contains(row)) {
            let mut base = vec![0.0; inner];
            for (dy, w) in dy.data()[row * outer..][..outer].iter().zip(weight.data().chunks_exact(inner)) {
                base.iter_mut().zip(w).for_each(|(sum, w)| *sum += f64::from(*dy) * f64::from(*w));
            }
            let low = |ds: &[f64]| {
                let mut low = vec![0.0; inner];
                for (d, a) in ds.iter().zip(pair.a.chunks_exact(inner)) {
                    low.iter_mut().zip(a).for_each(|(sum, a)| *sum += d * a);
                }
                low
            };
            let ds = &ds[row - first];
            add_sum(&mut dxs, &line(&got.x, inner, *row)?, &base, &low(ds), &low(&rounded(ds)));
        }
        // A column of dY or X with S or dS: [rows] x [rows, rank].
        let products = |values: &[f32], width: usize, column: usize, right: &[Vec<f64>]| -> Vec<f64> {
            let mut sums = vec![0.0; rank];
            for (line, right) in values.chunks_exact(width).zip(right) {
                sums.iter_mut().zip(right).for_each(|(sum, r)| *sum += f64::from(line[column]) * r);
            }
            sums
        };
        let naive = |right: &[Vec<f64>]| -> Vec<Vec<f64>> { right.iter().map(|r| rounded(r)).collect() };
        let (naive_s, naive_ds) = (naive(&s), naive(&ds));
        let db = line(&got.b, outer * rank, adapter)?;
        for o in sampled(outer, []) {
            let [exact, naive] = [&s, &naive_s].map(|s| products(dy_rows, outer, o, s));
            dbs.add(&db[o * rank..][..rank], &exact, &naive);
        }
        let da = line(&got.a, rank * inner, adapter)?;
        for i in sampled(inner, []) {
            let [exact, naive] = [&ds, &naive_ds].map(|ds| products(x_rows, inner, i, ds));
            let actual: Vec<f32> = da[i..].iter().step_by(inner).copied().collect();
            das.add(&actual, &exact, &naive);
        }
    }
    dxs.check(bench, "the gradient of x", TOLERANCE)?;
    das.check(bench, "the gradient of A", TOLERANCE)?;
    dbs.check(bench, "the gradient of B", TOLERANCE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::low_rank;
    use hywu_kernels::{Device, Tape};

    /// A check that nothing can fail would show nothing.
    #[test]
    fn what_is_wrong_is_found() {
        let bench = Bench::new(Device::Cpu, true);
        for shape in low_rank::shapes::shapes(&bench, false) {
            let layer = Layer::new(&bench, 0, shape, shape.r).expect("it fits");
            let y = layer.forward(&Tape::inference()).expect("it fits");
            rows(&bench, &layer, y.value()).expect("right");
            for at in [0, shape.m * shape.n - 1] {
                for wrong in [f32::NAN, 100.0] {
                    let mut y = y.value().clone();
                    y.data_mut()[at] += wrong;
                    assert!(rows(&bench, &layer, &y).is_err(), "{shape}: {wrong} at {at}");
                }
            }
            let other = Layer {
                lora: Some(
                    low_rank::lora(&bench, 8, [shape.rows.instances(), shape.r, 24, 48], 0.5)
                        .expect("it fits"),
                ),
                ..layer
            };
            assert!(rows(&bench, &other, y.value()).is_err(), "{shape}: another adapter");
        }
    }
}
