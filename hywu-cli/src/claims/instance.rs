//! Instance, not task: does the adapter of one and the same instruction know what only this picture shows, such as its noise level?

use super::{
    report::Interval,
    statistics::{TAIL, quantile},
    structure::components,
    watch::Watch,
};
use crate::pipeline::Editor;
use anyhow::{Result, bail, ensure};
use hywu_core::{Philox, adapter::gram};
use hywu_diffusion::{
    Picture,
    skills::{Phrasing, SKILLS},
};
use nalgebra::{DMatrix, DVector};
use ndarray::Array2;
use serde::{Deserialize, Serialize};

/// Penalties of the ridge regression, in units of the mean variance of the adapters.
const PENALTIES: [f64; 6] = [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0];
/// Fewest photos: one is told from the others, and among these a penalty is chosen by telling one from the rest.
const FEWEST: usize = 3;
/// Seed of the examples; those that measure quality have another.
const EXAMPLES: u64 = 2;
/// Resamples of an interval.
const RESAMPLES: usize = 2000;

/// How well an amount that damaged a picture, and that the instruction doesn't tell, is told by the adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HiddenAmount {
    /// The skill that repairs the damage.
    pub skill: String,
    /// Name of the amount.
    pub amount: String,
    /// Share of its variance on a photo that a ridge regression from the updates, fitted on the other photos, explains; below zero
    /// where it is worse than the mean. The interval is one of 95 % over photos.
    pub r2: Interval,
    /// Pearson's correlation with the first principal component of the skill's updates, whose sign means nothing.
    pub component: f64,
    /// One for each instance.
    pub points: Vec<HiddenPoint>,
}

/// An instance.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HiddenPoint {
    /// Index of the photo.
    pub photo: usize,
    /// The amount.
    pub truth: f64,
    /// What its adapter tells.
    pub told: f64,
    /// First principal component of its adapter.
    pub component: f64,
}

/// For each of `skills` (indices into [`SKILLS`]) damages every photo `draws` times, asks for the repair in the same words, and
/// regresses the amounts that chance drew on the adapters. Skills without such an amount are passed over. Fewer than three photos or two
/// draws tell nothing.
///
/// # Errors
/// A model without a generator, those of [`Editor::recall`], or [`hywu_diffusion::Error::Interrupted`] when `watch` says so.
pub fn hidden_amounts(
    editor: &Editor,
    photos: &[Picture],
    skills: &[usize],
    draws: usize,
    watch: Watch<'_>,
) -> Result<Vec<HiddenAmount>> {
    if photos.len() < FEWEST || draws < 2 {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for (place, &index) in skills.iter().enumerate() {
        let skill = &SKILLS[index];
        let (mut adapters, mut of, mut amounts) = (Vec::new(), Vec::new(), Vec::new());
        for (photo, picture) in photos.iter().enumerate() {
            for draw in 0..draws {
                watch.at(
                    "hidden amounts",
                    (place * photos.len() + photo) * draws + draw,
                    skills.len() * photos.len() * draws,
                )?;
                let stream = ((index * photos.len() + photo) * draws + draw) as u64;
                let mut random = Philox::new(EXAMPLES).stream(stream);
                let example = skill.example(picture, Phrasing::Canonical, &mut random);
                if example.hidden.is_empty() {
                    break;
                }
                let Some(recalled) = editor.recall(&example.source, &example.instruction, 0)? else {
                    bail!("the model has no generator");
                };
                adapters.push(recalled.adapter);
                of.push(photo);
                amounts.push(example.hidden);
            }
        }
        let Some(first) = amounts.first() else { continue };
        let gram = gram(&adapters)?;
        for (k, (amount, _)) in first.iter().enumerate() {
            let truth: Vec<f64> = amounts.iter().map(|drawn| f64::from(drawn[k].1)).collect();
            found.push(tell(skill.name, amount, &gram, &of, &truth)?);
        }
    }
    Ok(found)
}

/// Regresses `truth` on updates with these inner products; `of` are the photos.
fn tell(skill: &str, amount: &str, gram: &Array2<f64>, of: &[usize], truth: &[f64]) -> Result<HiddenAmount> {
    ensure!(gram.iter().all(|v| v.is_finite()), "{skill}: the inner products of the adapters are not finite");
    let photos: Vec<usize> = (0..=of.iter().copied().max().unwrap_or(0)).filter(|p| of.contains(p)).collect();
    let all: Vec<usize> = (0..of.len()).collect();
    let mut told = vec![0.0; of.len()];
    // Squared errors of the regression and of the mean, by photo.
    let mut errors = Vec::new();
    for &photo in &photos {
        let (own, others) = split(&all, of, photo);
        let penalty = chosen_penalty(gram, &others, of, truth);
        let guesses = predict(gram, &others, &own, truth, penalty);
        let mean = mean_of(truth, &others);
        let mut sums = (0.0, 0.0);
        for (&i, guess) in own.iter().zip(guesses) {
            told[i] = guess;
            sums.0 += (truth[i] - guess).powi(2);
            sums.1 += (truth[i] - mean).powi(2);
        }
        errors.push(sums);
    }
    let parts = components(gram, 1);
    let first: Vec<f64> =
        (0..of.len()).map(|i| parts.as_ref().map_or(0.0, |p| p.coordinates[(i, 0)])).collect();
    let points = (0..of.len()).map(|i| HiddenPoint {
        photo: of[i],
        truth: truth[i],
        told: told[i],
        component: first[i],
    });
    Ok(HiddenAmount {
        skill: skill.into(),
        amount: amount.into(),
        r2: explained(&errors),
        component: pearson(&first, truth),
        points: points.collect(),
    })
}

/// Those of this photo, and the others.
fn split(instances: &[usize], of: &[usize], photo: usize) -> (Vec<usize>, Vec<usize>) {
    instances.iter().copied().partition(|&i| of[i] == photo)
}

fn mean_of(values: &[f64], chosen: &[usize]) -> f64 {
    chosen.iter().map(|&i| values[i]).sum::<f64>() / chosen.len().max(1) as f64
}

/// The penalty that tells each photo of `train` best from its others.
fn chosen_penalty(gram: &Array2<f64>, train: &[usize], of: &[usize], truth: &[f64]) -> f64 {
    let mut photos: Vec<usize> = train.iter().map(|&i| of[i]).collect();
    photos.dedup();
    let error = |penalty: f64| -> f64 {
        let of_photo = |&photo: &usize| {
            let (own, others) = split(train, of, photo);
            let guesses = predict(gram, &others, &own, truth, penalty);
            own.iter().zip(guesses).map(|(&i, guess)| (truth[i] - guess).powi(2)).sum::<f64>()
        };
        photos.iter().map(of_photo).sum()
    };
    let errors = PENALTIES.map(error);
    let best = (0..PENALTIES.len()).min_by(|&a, &b| errors[a].total_cmp(&errors[b]));
    PENALTIES[best.unwrap_or(0)]
}

/// Ridge regression with an intercept, in the space that `gram` holds the inner products of: fitted on `train`, told for `test`.
fn predict(gram: &Array2<f64>, train: &[usize], test: &[usize], truth: &[f64], penalty: f64) -> Vec<f64> {
    let n = train.len();
    let mean = mean_of(truth, train);
    let row_mean = |i: usize| train.iter().map(|&t| gram[(i, t)]).sum::<f64>() / n.max(1) as f64;
    let means: Vec<f64> = train.iter().map(|&t| row_mean(t)).collect();
    let middle = means.iter().sum::<f64>() / n.max(1) as f64;
    let mut kernel = DMatrix::from_fn(n, n, |i, j| gram[(train[i], train[j])] - means[i] - means[j] + middle);
    let ridge = penalty * kernel.trace() / n.max(1) as f64;
    (0..n).for_each(|i| kernel[(i, i)] += ridge);
    // Equal adapters tell nothing: the mean is the answer.
    let Some(factors) = kernel.cholesky() else { return vec![mean; test.len()] };
    let weights = factors.solve(&DVector::from_iterator(n, train.iter().map(|&t| truth[t] - mean)));
    let tell = |&s: &usize| {
        let own = row_mean(s);
        let terms = train.iter().zip(&means).zip(weights.iter());
        mean + terms.map(|((&t, m), w)| (gram[(s, t)] - own - m + middle) * w).sum::<f64>()
    };
    test.iter().map(tell).collect()
}

/// 1 - (errors of the regression) / (errors of the mean), from both by photo, with an interval over resampled photos.
fn explained(errors: &[(f64, f64)]) -> Interval {
    let share = |chosen: &mut dyn Iterator<Item = (f64, f64)>| {
        let (left, all) = chosen.fold((0.0, 0.0), |sum, e| (sum.0 + e.0, sum.1 + e.1));
        if all > 0.0 { 1.0 - left / all } else { 0.0 }
    };
    let mut random = Philox::new(0).stream(0);
    let resample = |_| share(&mut (0..errors.len()).map(|_| errors[random.below(errors.len())]));
    let mut shares: Vec<f64> = (0..RESAMPLES).map(resample).collect();
    shares.sort_by(f64::total_cmp);
    let mean = share(&mut errors.iter().copied());
    Interval { mean, lo: quantile(&shares, TAIL).min(mean), hi: quantile(&shares, 1.0 - TAIL).max(mean) }
}

/// Pearson's correlation; zero where one of them is constant.
fn pearson(x: &[f64], y: &[f64]) -> f64 {
    let n = x.len().max(1) as f64;
    let (mx, my) = (x.iter().sum::<f64>() / n, y.iter().sum::<f64>() / n);
    let sum = |f: &dyn Fn(f64, f64) -> f64| x.iter().zip(y).map(|(a, b)| f(a - mx, b - my)).sum::<f64>();
    let (xx, yy, xy) = (sum(&|a, _| a * a), sum(&|_, b| b * b), sum(&|a, b| a * b));
    if xx > 0.0 && yy > 0.0 { xy / (xx * yy).sqrt() } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 6 photos, 8 draws: a vector that depends on the photo, on the amount by `gain`, and on chance.
    fn made(gain: f64) -> (Array2<f64>, Vec<usize>, Vec<f64>) {
        let mut random = Philox::new(3).stream(0);
        let mut normal = move || f64::from(random.normal());
        let (mut points, mut of, mut truth) = (Vec::new(), Vec::new(), Vec::new());
        for photo in 0..6 {
            let base: Vec<f64> = (0..12).map(|_| normal()).collect();
            for _ in 0..8 {
                let amount = normal();
                let mut point: Vec<f64> = base.iter().map(|b| b + 0.1 * normal()).collect();
                point[0] += gain * amount;
                points.push(point);
                of.push(photo);
                truth.push(3.0 + amount);
            }
        }
        let dot = |i: usize, j: usize| -> f64 { points[i].iter().zip(&points[j]).map(|(a, b)| a * b).sum() };
        (Array2::from_shape_fn((48, 48), |(i, j)| dot(i, j)), of, truth)
    }

    #[test]
    fn an_amount_that_moves_the_adapter_is_told() {
        let (gram, of, truth) = made(6.0);
        let found = tell("denoise", "sigma", &gram, &of, &truth).expect("finite");
        assert!(found.r2.mean > 0.8 && found.r2.lo > 0.5 && found.r2.lo <= found.r2.mean, "{:?}", found.r2);
        assert!(found.r2.hi <= 1.0 && found.component.abs() > 0.9, "{}", found.component);
        let errors: f64 = found.points.iter().map(|p| (p.truth - p.told).powi(2)).sum();
        assert!(errors / 48.0 < 0.2, "{errors}");
    }

    #[test]
    fn an_amount_that_leaves_no_trace_is_not() {
        let (gram, of, truth) = made(0.0);
        let found = tell("denoise", "sigma", &gram, &of, &truth).expect("finite");
        assert!(found.r2.mean < 0.2 && found.component.abs() < 0.5, "{found:?}");
    }

    #[test]
    fn a_photo_is_never_told_from_itself() {
        // Every photo has an amount of its own, and adapters that tell photos apart and nothing else.
        let of: Vec<usize> = (0..24).map(|i| i / 4).collect();
        let truth: Vec<f64> = of.iter().map(|&p| (p * p % 7) as f64).collect();
        let gram = Array2::from_shape_fn((24, 24), |(i, j)| f64::from(of[i] == of[j]));
        let found = tell("fog", "air", &gram, &of, &truth).expect("finite");
        assert!(found.r2.mean <= 1e-9, "{:?}", found.r2);
    }

    #[test]
    fn equal_adapters_tell_the_mean() {
        let (_, of, truth) = made(0.0);
        let found = tell("denoise", "sigma", &Array2::ones((48, 48)), &of, &truth).expect("finite");
        assert!(found.r2.mean.abs() < 1e-9 && found.component == 0.0, "{found:?}");
    }

    #[test]
    fn the_regression_finds_a_plane() {
        // y = 2 a - b + 1, noiseless.
        let points: Vec<[f64; 2]> = (0..20).map(|i| [f64::from(i % 5), f64::from(i / 5)]).collect();
        let truth: Vec<f64> = points.iter().map(|p| 2.0 * p[0] - p[1] + 1.0).collect();
        let gram = Array2::from_shape_fn((20, 20), |(i, j)| {
            points[i][0] * points[j][0] + points[i][1] * points[j][1]
        });
        let (train, test): (Vec<usize>, Vec<usize>) = (0..20).partition(|i| i % 3 != 0);
        for (guess, i) in predict(&gram, &train, &test, &truth, 1e-9).iter().zip(test) {
            assert!((guess - truth[i]).abs() < 1e-5, "{guess} {}", truth[i]);
        }
    }
}
