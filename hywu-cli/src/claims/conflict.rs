//! Do skills pull shared weights in opposite directions?

use super::{
    report::{Conflict, Method},
    statistics::{Cells, interval},
    watch::Watch,
};
use crate::train::Task;
use anyhow::Result;
use hywu_diffusion::{BatchShape, EditData};
use serde::{Deserialize, Serialize};

/// Steps beyond all others draw these batches.
const FIRST: u64 = 1 << 39;

/// Cosines of the gradients on one method's weights, with one seed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cosines {
    /// Whose weights.
    pub method: Method,
    /// After training, or before.
    pub trained: bool,
    /// Between skills, in the order of the list.
    pub cosine: Vec<Vec<f64>>,
}

/// Cosines between the gradients of the skills on the weights of `task` as they stand, each the mean over `batches` batches of the
/// skill alone.
///
/// # Errors
/// Those of the gradients.
pub fn cosines(
    method: Method,
    trained: bool,
    task: &Task,
    data: &EditData,
    skills: &[usize],
    (batches, shape): (u64, BatchShape),
    watch: Watch<'_>,
) -> Result<Cosines> {
    let mut gradients = Vec::new();
    for (done, &skill) in skills.iter().enumerate() {
        let data = data.clone().with_skills(vec![skill]);
        let mut sum: Vec<f32> = Vec::new();
        for batch in 0..batches {
            watch.at("gradients", done, skills.len())?;
            let batch = data.batch(FIRST + batch, shape)?.to(task.params().device())?;
            let (_, grads) = task.gradients(&batch)?;
            let mut flat = Vec::new();
            for grad in &grads {
                flat.extend_from_slice(grad.to_host()?.data());
            }
            match sum.is_empty() {
                true => sum = flat,
                false => sum.iter_mut().zip(flat).for_each(|(s, g)| *s += g),
            }
        }
        gradients.push(sum);
    }
    Ok(Cosines { method, trained, cosine: matrix(&gradients) })
}

/// Cosines between vectors; 0 with a vector of zeros, 1 on the diagonal.
fn matrix(vectors: &[Vec<f32>]) -> Vec<Vec<f64>> {
    let product = |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum() };
    let norms: Vec<f64> = vectors.iter().map(|v| product(v, v).sqrt()).collect();
    let cosine = |i: usize, j: usize| match norms[i] * norms[j] {
        _ if i == j => 1.0,
        0.0 => 0.0,
        norm => product(&vectors[i], &vectors[j]) / norm,
    };
    (0..vectors.len()).map(|i| (0..vectors.len()).map(|j| cosine(i, j)).collect()).collect()
}

/// The report's rows: `seeds` holds the same matrices for every seed, `pairs` the places of the skills that contradict each other.
pub fn conflicts(
    seeds: &[Vec<Cosines>],
    skills: &[String],
    pairs: &[[usize; 2]],
    resamples: usize,
) -> Vec<Conflict> {
    let n = skills.len();
    let everyone: Vec<[usize; 2]> = (0..n).flat_map(|i| (i + 1..n).map(move |j| [i, j])).collect();
    let kinds = seeds.first().map_or(0, Vec::len);
    let row = |kind: usize| {
        let of: Vec<&Cosines> = seeds.iter().filter_map(|seed| seed.get(kind)).collect();
        let over = |pairs: &[[usize; 2]]| {
            let cells = of.iter().map(|seed| pairs.iter().map(|[i, j]| seed.cosine[*i][*j]).collect());
            interval(&cells.collect::<Cells>(), resamples)
        };
        let mean = |i: usize, j: usize| of.iter().map(|s| s.cosine[i][j]).sum::<f64>() / of.len() as f64;
        Conflict {
            method: of[0].method,
            trained: of[0].trained,
            skills: skills.to_vec(),
            cosine: (0..n).map(|i| (0..n).map(|j| mean(i, j)).collect()).collect(),
            conflicting: over(pairs),
            all: over(&everyone),
        }
    };
    (0..kinds).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosines_of_known_vectors() {
        let vectors = [vec![1.0, 0.0], vec![-2.0, 0.0], vec![3.0, 4.0], vec![0.0, 0.0]];
        let found = matrix(&vectors);
        assert_eq!(found[0], [1.0, -1.0, 0.6, 0.0]);
        assert_eq!(found[2][0], found[0][2]);
        assert_eq!(found[3], [0.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn pairs_and_all_are_averaged_over_seeds() {
        let of = |x: f64| Cosines {
            method: Method::Full,
            trained: true,
            cosine: vec![vec![1.0, x, 0.5], vec![x, 1.0, 0.5], vec![0.5, 0.5, 1.0]],
        };
        let skills = ["a", "b", "c"].map(str::to_owned);
        let rows = conflicts(&[vec![of(-0.2)], vec![of(-0.4)]], &skills, &[[0, 1]], 500);
        assert_eq!(rows.len(), 1);
        let row = &rows[0];
        assert!((row.conflicting.mean + 0.3).abs() < 1e-12 && (row.all.mean - 0.7 / 3.0).abs() < 1e-12);
        assert!(row.conflicting.lo < -0.35 && row.conflicting.hi > -0.25, "{:?}", row.conflicting);
        assert!((row.cosine[1][0] + 0.3).abs() < 1e-12);
    }
}
