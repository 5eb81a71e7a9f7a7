//! How close edits come to the true ones, and who comes closer.

use super::{
    methods::Contender,
    report::{GainRow, Interval, Method, Metric, Quality, ScoreRow, WinRow},
    statistics::{Cells, difference, interval},
    watch::Watch,
};
use crate::pipeline::EditOptions;
use anyhow::{Result, ensure};
use hywu_core::Philox;
use hywu_diffusion::{
    Picture,
    metrics::{gradient_distance, psnr, ssim},
    skills::{Example, Phrasing, SKILLS},
};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

/// A better PSNR counts as this, so that one perfect edit does not decide a mean.
pub const MOST_DB: f64 = 60.0;
/// Seed of the examples, the same for all trainings.
const EXAMPLES: u64 = 0;

/// A test photo and a skill.
pub struct Instance {
    /// Place of the skill in the list.
    pub skill: usize,
    /// Index of the photo.
    pub photo: usize,
    /// What is edited, the true edit, and the words, which no method was trained on.
    pub example: Example,
}

/// Every skill with every photo, photos varying fastest; always the same.
pub fn instances(photos: &[Picture], skills: &[usize]) -> Vec<Instance> {
    let places = (0..skills.len()).flat_map(|skill| (0..photos.len()).map(move |photo| (skill, photo)));
    let make = |(skill, photo): (usize, usize)| {
        let index = skills[skill];
        let mut random = Philox::new(EXAMPLES).stream((index * 1024 + photo) as u64);
        let example = SKILLS[index].example(&photos[photo], Phrasing::HeldOut(photo), &mut random);
        Instance { skill, photo, example }
    };
    places.map(make).collect()
}

/// One edit against the true one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// At most [`MOST_DB`].
    pub psnr: f64,
    /// Of the luma.
    pub ssim: f64,
    /// [`gradient_distance`].
    pub distance: f64,
    /// From text and picture to the adapter.
    pub adapter_ms: f64,
    /// Sampling.
    pub edit_ms: f64,
}

/// PSNR that can be averaged.
///
/// # Errors
/// An edit that is not finite.
pub fn decibels(edit: &Picture, target: &Picture) -> Result<f64> {
    let db = psnr(edit, target);
    ensure!(!db.is_nan(), "an edit holds values that are not finite");
    Ok(db.min(MOST_DB))
}

/// Edits every instance; `keep` gets the edits.
///
/// # Errors
/// Those of an edit and of `keep`.
pub fn scores(
    contender: &Contender,
    instances: &[Instance],
    options: &EditOptions,
    watch: Watch<'_>,
    what: &str,
    keep: &mut dyn FnMut(&Instance, &Picture, f64) -> Result<()>,
) -> Result<Vec<Score>> {
    let mut scores = Vec::new();
    for (done, instance) in instances.iter().enumerate() {
        watch.at(what, done, instances.len())?;
        let Example { source, target, instruction, .. } = &instance.example;
        let edit = contender.edit(source, instruction, instance.skill, options, watch.stop)?;
        let (picture, psnr) = (&edit.picture, decibels(&edit.picture, target)?);
        keep(instance, picture, psnr)?;
        scores.push(Score {
            psnr,
            ssim: ssim(picture, target),
            distance: gradient_distance(picture, target),
            adapter_ms: edit.generating.as_secs_f64() * 1e3,
            edit_ms: edit.sampling.as_secs_f64() * 1e3,
        });
    }
    Ok(scores)
}

/// One value for each photo: the mean over the skills, or that of one skill. `values` are in the order of the instances.
pub fn by_photo(instances: &[Instance], values: &[f64], skill: Option<usize>) -> Vec<f64> {
    let photos = instances.iter().map(|i| i.photo + 1).max().unwrap_or(0);
    let mut sums = vec![(0.0, 0usize); photos];
    for (instance, value) in instances.iter().zip(values) {
        if skill.is_none_or(|skill| skill == instance.skill) {
            sums[instance.photo].0 += value;
            sums[instance.photo].1 += 1;
        }
    }
    sums.into_iter().map(|(sum, count)| sum / count.max(1) as f64).collect()
}

/// All edits of all methods and seeds.
pub struct Comparison<'a> {
    /// What was edited.
    pub instances: &'a [Instance],
    /// Names of the skills.
    pub skills: &'a [String],
    /// For each seed the scores in the order of the instances.
    pub scores: &'a IndexMap<Method, Vec<Vec<Score>>>,
    /// Resamples behind every interval.
    pub resamples: usize,
}

impl Comparison<'_> {
    /// Values of a method by seed and photo.
    pub fn cells(&self, method: Method, skill: Option<usize>, value: impl Fn(&Score) -> f64) -> Cells {
        let seed = |scores: &Vec<Score>| {
            by_photo(self.instances, &scores.iter().map(&value).collect::<Vec<_>>(), skill)
        };
        self.scores.get(&method).into_iter().flatten().map(seed).collect()
    }

    /// PSNR of HY-WU minus that of another method.
    pub fn gain(&self, against: Method, skill: Option<usize>) -> Cells {
        let cells = |method| self.cells(method, skill, |s| s.psnr);
        difference(&cells(Method::Hywu), &cells(against))
    }

    /// The share of HY-WU's edits that are better, the same and worse than those of another method.
    pub fn shares(&self, against: Method, metric: Metric) -> [Cells; 3] {
        let nobody = Vec::new();
        let of = |method| self.scores.get(&method).unwrap_or(&nobody);
        let pairs = of(Method::Hywu).iter().zip(of(against));
        let outcomes: Vec<Vec<Outcome>> = pairs
            .map(|(ours, theirs)| ours.iter().zip(theirs).map(|(a, b)| metric.outcome(a, b)).collect())
            .collect();
        [Outcome::Good, Outcome::Same, Outcome::Bad].map(|wanted| {
            let seed = |outcomes: &Vec<Outcome>| {
                let is = outcomes.iter().map(|o| f64::from(u8::from(*o == wanted))).collect::<Vec<_>>();
                by_photo(self.instances, &is, None)
            };
            outcomes.iter().map(seed).collect()
        })
    }

    fn interval(&self, cells: &Cells) -> Interval {
        interval(cells, self.resamples)
    }

    /// The tables of the report.
    pub fn quality(&self) -> Quality {
        let mut quality = Quality { scores: Vec::new(), wins: Vec::new(), gains: Vec::new() };
        let places = || std::iter::once(None).chain((0..self.skills.len()).map(Some));
        let name = |place: Option<usize>| place.map(|place| self.skills[place].clone());
        for &method in self.scores.keys() {
            for place in places() {
                let of = |value: fn(&Score) -> f64| self.interval(&self.cells(method, place, value));
                let (psnr, ssim, distance) = (of(|s| s.psnr), of(|s| s.ssim), of(|s| s.distance));
                quality.scores.push(ScoreRow { method, skill: name(place), psnr, ssim, distance });
            }
        }
        for &against in self.scores.keys().filter(|m| **m != Method::Hywu) {
            for metric in [Metric::Psnr, Metric::Ssim, Metric::Distance] {
                let [good, same, bad] = self.shares(against, metric).map(|cells| self.interval(&cells));
                quality.wins.push(WinRow { against, metric, good, same, bad });
            }
            for place in places() {
                let gain = self.interval(&self.gain(against, place));
                quality.gains.push(GainRow { against, skill: name(place), gain });
            }
        }
        quality
    }
}

/// How a pair of edits ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Good,
    Same,
    Bad,
}

impl Metric {
    fn outcome(self, ours: &Score, theirs: &Score) -> Outcome {
        let (ahead, same) = match self {
            Self::Psnr => (ours.psnr - theirs.psnr, 0.1),
            Self::Ssim => (ours.ssim - theirs.ssim, 0.002),
            Self::Distance => (theirs.distance - ours.distance, 0.002),
        };
        match ahead {
            ahead if ahead > same => Outcome::Good,
            ahead if ahead < -same => Outcome::Bad,
            _ => Outcome::Same,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(skill: usize, photo: usize) -> Instance {
        let photo_of_one = Picture::from_rgb(1, 1, vec![0.0; 3]);
        let example = SKILLS[0].example(&photo_of_one, Phrasing::Canonical, &mut Philox::new(0).stream(0));
        Instance { skill, photo, example }
    }

    fn score(psnr: f64) -> Score {
        Score { psnr, ssim: 0.5, distance: 0.5, adapter_ms: 0.0, edit_ms: 0.0 }
    }

    #[test]
    fn pairs_are_won_lost_or_the_same() {
        let instances = [instance(0, 0), instance(0, 1), instance(1, 0), instance(1, 1)];
        let of = |psnr: [f64; 4]| vec![psnr.map(score).to_vec()];
        let scores = IndexMap::from([
            (Method::Full, of([20.0, 20.0, 20.0, 20.0])),
            (Method::Hywu, of([21.0, 20.05, 19.0, 22.0])),
        ]);
        let skills = ["a".to_owned(), "b".to_owned()];
        let all = Comparison { instances: &instances, skills: &skills, scores: &scores, resamples: 200 };
        assert_eq!(all.cells(Method::Hywu, Some(1), |s| s.psnr), [[19.0, 22.0]]);
        let gain = all.gain(Method::Full, None);
        assert!((gain[0][0] - 0.0).abs() < 1e-9 && (gain[0][1] - 1.025).abs() < 1e-9, "{gain:?}");
        let quality = all.quality();
        let row = quality.wins.iter().find(|w| w.metric == Metric::Psnr).expect("there");
        assert_eq!([row.good.mean, row.same.mean, row.bad.mean], [0.5, 0.25, 0.25]);
        // By SSIM all are the same.
        let row = quality.wins.iter().find(|w| w.metric == Metric::Ssim).expect("there");
        assert_eq!(row.same, Interval { mean: 1.0, lo: 1.0, hi: 1.0 });
        // Two methods, each for all skills and for two; one opponent.
        assert_eq!((quality.scores.len(), quality.gains.len()), (6, 3));
        assert_eq!(
            Metric::Distance.outcome(&Score { distance: 0.4, ..score(0.0) }, &score(0.0)),
            Outcome::Good
        );
    }

    #[test]
    fn examples_are_the_same_every_time() {
        let photo = Picture::from_rgb(8, 8, (0..192).map(|i| (i % 7) as f32 / 3.5 - 1.0).collect());
        let photos = [photo.clone(), photo];
        let (a, b) = (instances(&photos, &[3, 14]), instances(&photos, &[3, 14]));
        assert_eq!(a.len(), 4);
        for (a, b) in a.iter().zip(&b) {
            assert_eq!(a.example.source, b.example.source);
            assert_eq!(a.example.instruction, b.example.instruction);
        }
        assert_eq!((a[1].skill, a[1].photo, a[2].skill, a[2].photo), (0, 1, 1, 0));
    }
}
