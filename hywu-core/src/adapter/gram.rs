//! Inner products of many updates.

use super::{Adapter, Matrices};
use crate::{Error, Result};
use ndarray::{Array2, ArrayView2, s};
use rayon::prelude::*;

/// Every instance of every adapter, in order, with every other: G[i, j] = <scale_i B_i A_i, scale_j B_j A_j>, summed over modules and
/// experts, in f64. Distances, cosines and principal components of the updates are functions of it. [n, n], symmetric.
///
/// No B A is formed: <B_i A_i, B_j A_j> is the sum of (A_i A_j^T) o (B_i^T B_j), r x r each, and all of these are two products of
/// stacked factors.
///
/// # Errors
/// [`Error::Adapter`] when modules or their widths and experts are not the same in all; those of [`Adapter::check_pairs`].
pub fn gram(adapters: &[Adapter]) -> Result<Array2<f64>> {
    for adapter in adapters {
        adapter.check_pairs()?;
    }
    let instances: Vec<(&Adapter, usize)> =
        adapters.iter().flat_map(|a| (0..a.batch()).map(move |i| (a, i))).collect();
    let mut sum = Array2::zeros((instances.len(), instances.len()));
    let Some(first) = adapters.first() else { return Ok(sum) };
    if let Some(other) = adapters.iter().find(|a| a.modules.len() != first.modules.len()) {
        let what = format!("{} modules in one and {} in another", first.modules.len(), other.modules.len());
        return Err(Error::Adapter(what));
    }
    for name in first.modules.keys() {
        let pairs = instances.iter().map(|(a, i)| {
            let lora = a.modules.get(name);
            lora.map(|l| l.matrices(*i))
                .ok_or_else(|| Error::Adapter(format!("`{name}` is not in all of them")))
        });
        let pairs = pairs.collect::<Result<Vec<_>>>()?;
        let shape = |p: &[Matrices<'_>]| (p.len(), p[0].b.nrows(), p[0].a.ncols());
        if let Some(other) = pairs.iter().find(|p| shape(p) != shape(&pairs[0])) {
            let (x, y) = (shape(&pairs[0]), shape(other));
            return Err(Error::Adapter(format!("`{name}` differs: (experts, out, in) is {x:?} and {y:?}")));
        }
        for expert in 0..pairs[0].len() {
            let own: Vec<Matrices<'_>> = pairs.iter().map(|p| p[expert]).collect();
            sum += &products(&own);
        }
    }
    let scales: Vec<f64> = instances.iter().map(|(a, _)| f64::from(a.scale)).collect();
    // The upper triangle is the truth.
    Ok(Array2::from_shape_fn(sum.dim(), |(i, j)| sum[(i.min(j), i.max(j))] * scales[i] * scales[j]))
}

/// <B_i A_i, B_j A_j> for j >= i, zero elsewhere.
fn products(pairs: &[Matrices<'_>]) -> Array2<f64> {
    let mut starts = vec![0];
    starts.extend(pairs.iter().scan(0, |end, p| {
        *end += p.a.nrows();
        Some(*end)
    }));
    let stack = |width: usize, part: &dyn Fn(&Matrices<'_>) -> Array2<f64>| {
        let mut all = Array2::zeros((starts[pairs.len()], width));
        for (pair, &start) in pairs.iter().zip(&starts) {
            all.slice_mut(s![start..start + pair.a.nrows(), ..]).assign(&part(pair));
        }
        all
    };
    let wide = |m: ArrayView2<'_, f32>| m.mapv(f64::from);
    let a = stack(pairs[0].a.ncols(), &|p| wide(p.a));
    let b = stack(pairs[0].b.nrows(), &|p| wide(p.b.t()));
    let rows: Vec<Vec<f64>> = (0..pairs.len())
        .into_par_iter()
        .map(|i| {
            let (start, end) = (starts[i], starts[i + 1]);
            let with_later = |m: &Array2<f64>| m.slice(s![start..end, ..]).dot(&m.slice(s![start.., ..]).t());
            let both = with_later(&a) * with_later(&b);
            let block = |j: usize| both.slice(s![.., starts[j] - start..starts[j + 1] - start]).sum();
            (0..pairs.len()).map(|j| if j < i { 0.0 } else { block(j) }).collect()
        })
        .collect();
    Array2::from_shape_fn((pairs.len(), pairs.len()), |(i, j)| rows[i][j])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Lora, Philox};
    use ndarray::ArrayD;

    fn random(seed: u64, batch: usize, rank: usize, scale: f32) -> Adapter {
        let mut random = Philox::new(seed).stream(0);
        let mut tensor = |shape: &[usize]| ArrayD::from_shape_simple_fn(shape, || random.normal());
        let plain = Lora { lora_a: tensor(&[batch, rank, 5]), lora_b: tensor(&[batch, 7, rank]) };
        let grouped = Lora { lora_a: tensor(&[batch, 2, rank, 4]), lora_b: tensor(&[batch, 2, 3, rank]) };
        let modules = [("plain".to_owned(), plain), ("grouped".to_owned(), grouped)].into_iter().collect();
        Adapter { modules, scale, metadata: Default::default() }
    }

    /// The whole update of an instance, formed.
    fn formed(adapter: &Adapter, instance: usize) -> Vec<f64> {
        let matrices = adapter.modules.values().flat_map(|l| l.matrices(instance));
        let update =
            |m: Matrices<'_>| m.b.mapv(f64::from).dot(&m.a.mapv(f64::from)) * f64::from(adapter.scale);
        matrices.flat_map(|m| update(m).into_iter().collect::<Vec<f64>>()).collect()
    }

    #[test]
    fn products_are_those_of_the_formed_updates() {
        let adapters = [random(1, 2, 3, 0.5), random(2, 1, 6, 2.0), random(3, 3, 1, -1.0)];
        let gram = gram(&adapters).expect("they fit");
        let all: Vec<Vec<f64>> = adapters.iter().flat_map(|a| (0..a.batch()).map(|i| formed(a, i))).collect();
        assert_eq!(gram.dim(), (6, 6));
        for (i, x) in all.iter().enumerate() {
            for (j, y) in all.iter().enumerate() {
                let dot: f64 = x.iter().zip(y).map(|(x, y)| x * y).sum();
                let size = gram[(i, i)].sqrt() * gram[(j, j)].sqrt();
                assert!((gram[(i, j)] - dot).abs() <= 1e-12 * size, "{i} {j}: {} and {dot}", gram[(i, j)]);
                assert_eq!(gram[(i, j)], gram[(j, i)]);
            }
        }
    }

    #[test]
    fn other_modules_and_widths_are_refused() {
        let (a, mut b) = (random(1, 1, 2, 1.0), random(2, 1, 2, 1.0));
        b.modules.shift_remove("plain");
        assert!(gram(&[a.clone(), b]).is_err());
        let mut wide = a.clone();
        wide.modules.insert(
            "plain".into(),
            Lora { lora_a: ArrayD::zeros(vec![1, 2, 6]), lora_b: ArrayD::zeros(vec![1, 7, 2]) },
        );
        let message = gram(&[a, wide]).expect_err("5 and 6 inputs").to_string();
        assert!(message.contains("plain") && message.contains("(1, 7, 6)"), "{message}");
    }
}
