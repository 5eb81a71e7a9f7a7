//! Is a held-out phrasing taken for the right skill?

use super::{report::PhrasingRow, watch::Watch};
use crate::{
    eval::{EvalOptions, route},
    model::Model,
};
use anyhow::Result;
use hywu_diffusion::{Picture, skills::SKILLS};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

/// What the phrasings of one skill were taken for on one photo: places in the list of skills.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Routed {
    /// Place of the skill that was asked for.
    pub skill: usize,
    /// Index of the photo.
    pub photo: usize,
    /// One for each phrasing.
    pub taken_for: Vec<usize>,
}

/// Asks every held-out phrasing on every photo, as [`crate::eval::evaluate`] does.
///
/// # Errors
/// Those of an edit.
pub fn routed(
    model: &Model,
    photos: &[Picture],
    options: &EvalOptions,
    watch: Watch<'_>,
) -> Result<Vec<Routed>> {
    let mut all = Vec::new();
    for (place, &skill) in options.skills.iter().enumerate() {
        for (photo, picture) in photos.iter().enumerate() {
            watch.at("phrasings", place * photos.len() + photo, options.skills.len() * photos.len())?;
            let found = route(model, &SKILLS[skill], picture, options, options.seed + 1 + photo as u64)?;
            let at = |found: usize| options.skills.iter().position(|s| *s == found).unwrap_or(place);
            all.push(Routed { skill: place, photo, taken_for: found.into_iter().map(at).collect() });
        }
    }
    Ok(all)
}

/// Share of right choices by photo, of one seed.
pub fn accuracy(routed: &[Routed]) -> Vec<f64> {
    let photos = routed.iter().map(|r| r.photo + 1).max().unwrap_or(0);
    let share = |photo: usize| {
        let of = routed.iter().filter(|r| r.photo == photo);
        let (right, asked) = of.fold((0, 0), |(right, asked), r| {
            (right + r.taken_for.iter().filter(|t| **t == r.skill).count(), asked + r.taken_for.len())
        });
        right as f64 / asked.max(1) as f64
    };
    (0..photos).map(share).collect()
}

/// The report's rows, over all seeds.
pub fn rows(seeds: &[Vec<Routed>], skills: &[String]) -> Vec<PhrasingRow> {
    let row = |(place, skill): (usize, &String)| {
        let mut row = PhrasingRow { skill: skill.clone(), asked: 0, right: 0, taken_for: IndexMap::new() };
        for taken in seeds.iter().flatten().filter(|r| r.skill == place).flat_map(|r| &r.taken_for) {
            row.asked += 1;
            match *taken == place {
                true => row.right += 1,
                false => *row.taken_for.entry(skills[*taken].clone()).or_default() += 1,
            }
        }
        row
    };
    skills.iter().enumerate().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn right_choices_are_counted_by_photo_and_by_skill() {
        let of = |skill, photo, taken_for: &[usize]| Routed { skill, photo, taken_for: taken_for.to_vec() };
        let seed = vec![of(0, 0, &[0, 1]), of(1, 0, &[1, 1]), of(0, 1, &[1, 1]), of(1, 1, &[1, 1])];
        assert_eq!(accuracy(&seed), [0.75, 0.5]);
        let rows = rows(&[seed], &["a".to_owned(), "b".to_owned()]);
        assert_eq!((rows[0].asked, rows[0].right, rows[1].right), (4, 1, 4));
        assert_eq!(rows[0].taken_for, IndexMap::from([("b".to_owned(), 3)]));
    }
}
