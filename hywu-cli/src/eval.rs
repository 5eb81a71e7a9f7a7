//! How well a model edits photos that it never saw, asked in words that it never read.

use crate::{
    model::Model,
    pipeline::{EditOptions, Editor},
};
use anyhow::{Result, bail};
use hywu_core::{Dtype, Philox};
use hywu_diffusion::{
    Picture, SampleOptions, detail_of,
    metrics::{psnr, seam, ssim},
    pixel_position,
    skills::{Example, Phrasing, SKILLS, Skill},
    thumbnail_of,
    tiles::Tiling,
};
use hywu_kernels::{Device, Tape, Tensor, ops::noise::noise_window};
use serde::Serialize;
use std::ops::ControlFlow;

/// Held-out phrasings of each skill that are asked.
const PHRASINGS: usize = 4;
/// Photos that each phrasing is asked for when the choice of the skill is judged.
const ROUTED: usize = 2;
/// Side of the pictures that the choice is judged on.
const ROUTE_SIDE: usize = 64;

/// What is measured.
#[derive(Clone, Debug)]
pub struct EvalOptions {
    /// Photos are cut square and scaled to this side.
    pub side: usize,
    /// Seed of the examples' chance and of the noise.
    pub seed: u64,
    /// How edits are made.
    pub edit: EditOptions,
    /// Indices into [`SKILLS`].
    pub skills: Vec<usize>,
}

impl Default for EvalOptions {
    fn default() -> Self {
        let skills = (0..SKILLS.len()).filter(|&i| !SKILLS[i].arrival).collect();
        Self { side: 256, seed: 0, edit: EditOptions::default(), skills }
    }
}

/// Means over the photos for one skill.
#[derive(Clone, Debug, Serialize)]
pub struct SkillReport {
    /// The skill.
    pub skill: &'static str,
    /// PSNR of the edit against the true edit, dB; absent when all edits are perfect.
    pub psnr: Option<f64>,
    /// SSIM of the edit against the true edit.
    pub ssim: f64,
    /// Steps of the error across tile borders over those elsewhere: 1 when no border shows; absent when there is one tile only.
    pub seam: Option<f64>,
    /// PSNR of doing nothing; absent when nothing is right.
    pub noop_psnr: Option<f64>,
    /// Held-out phrasings that were taken for this skill.
    pub right: usize,
    /// Held-out phrasings asked.
    pub asked: usize,
    /// What the others were taken for.
    pub taken_for: Vec<&'static str>,
}

/// One edit to look at.
pub struct Sample {
    /// Source, edit, truth.
    pub pictures: [Picture; 3],
    /// What was asked.
    pub instruction: String,
}

/// Measures a model on photos, skill by skill. `seen` gets every finished skill with one sample of it; `stop` is asked at every
/// step of every edit.
///
/// # Errors
/// No photos, those of `seen`, or [`hywu_diffusion::Error::Interrupted`] when `stop` says so.
pub fn evaluate(
    editor: &Editor,
    photos: &[Picture],
    options: &EvalOptions,
    stop: &dyn Fn() -> bool,
    seen: &mut dyn FnMut(&SkillReport, Sample) -> Result<()>,
) -> Result<Vec<SkillReport>> {
    if photos.is_empty() {
        bail!("no photos to measure with");
    }
    let photos: Vec<Picture> = photos.iter().map(|p| square(p, options.side)).collect();
    let SampleOptions { tile, overlap, .. } = options.edit.sample;
    let tiling = Tiling::new(options.side, options.side, tile, overlap);
    // A square's borders are the same down and across.
    let borders = tiling.borders(options.side);
    let mut reports = Vec::new();
    for (place, &index) in options.skills.iter().enumerate() {
        let skill = &SKILLS[index];
        let (mut quality, mut similar, mut noop, mut seams) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut sample = None;
        for (i, photo) in photos.iter().enumerate() {
            let mut random = Philox::new(options.seed).stream((index * 1024 + i) as u64);
            let Example { source, target, instruction, .. } =
                skill.example(photo, Phrasing::HeldOut(i), &mut random);
            let mut go = |_: usize, _: usize| match stop() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            };
            let edit = editor.edit(&source, &instruction, None, &options.edit, &mut go)?.picture;
            quality.push(psnr(&edit, &target));
            similar.push(ssim(&edit, &target));
            noop.push(psnr(&source, &target));
            seams.extend(seam(&edit, &target, &borders, &borders));
            if i == place % photos.len() {
                sample = Some(Sample { pictures: [source, edit, target], instruction });
            }
        }
        let mut taken_for = Vec::new();
        let (mut right, mut asked) = (0, 0);
        for (i, photo) in photos.iter().take(ROUTED).enumerate() {
            if stop() {
                return Err(hywu_diffusion::Error::Interrupted.into());
            }
            let seed = options.seed + 1 + i as u64;
            for found in route(editor.model(), skill, photo, options, seed)? {
                asked += 1;
                if found == index {
                    right += 1;
                } else {
                    taken_for.push(SKILLS[found].name);
                }
            }
        }
        let report = SkillReport {
            skill: skill.name,
            psnr: mean(&quality),
            ssim: mean(&similar).unwrap_or(f64::NAN),
            seam: mean(&seams),
            noop_psnr: mean(&noop),
            right,
            asked,
            taken_for,
        };
        let Some(sample) = sample else { bail!("no photos to measure with") };
        seen(&report, sample)?;
        reports.push(report);
    }
    Ok(reports)
}

/// Mean of the finite values, where there are any: the PSNR of equal pictures is infinite.
fn mean(values: &[f64]) -> Option<f64> {
    let finite: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    (!finite.is_empty()).then(|| finite.iter().sum::<f64>() / finite.len() as f64)
}

/// The middle square of a photo at this side.
pub(crate) fn square(photo: &Picture, side: usize) -> Picture {
    let least = photo.height.min(photo.width);
    let cut = photo.crop((photo.height - least) / 2, (photo.width - least) / 2, least, least);
    cut.resize(side, side)
}

/// Which skill each held-out phrasing is taken for: the one whose first training phrasing, asked for the same small picture,
/// gives the most similar result.
pub(crate) fn route(
    model: &Model,
    skill: &Skill,
    photo: &Picture,
    options: &EvalOptions,
    seed: u64,
) -> Result<Vec<usize>> {
    let start = (photo.height.min(photo.width).saturating_sub(ROUTE_SIDE)) / 2;
    let small = match photo.height.min(photo.width) >= ROUTE_SIDE {
        true => photo.crop(start, start, ROUTE_SIDE, ROUTE_SIDE),
        false => photo.resize(ROUTE_SIDE, ROUTE_SIDE),
    };
    let random = || Philox::new(seed).stream(0);
    let source = skill.example(&small, Phrasing::Canonical, &mut random()).source;
    let mut instructions = Vec::new();
    for known in &options.skills {
        instructions.push(SKILLS[*known].example(&small, Phrasing::Canonical, &mut random()).instruction);
    }
    for i in 0..PHRASINGS {
        instructions.push(skill.example(&small, Phrasing::HeldOut(i), &mut random()).instruction);
    }
    let results = edit_all(model, &source, &instructions, &options.edit)?;
    let (known, asked) = results.split_at(options.skills.len());
    let distance =
        |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum() };
    let nearest = |asked: &Vec<f32>| {
        let found =
            known.iter().enumerate().min_by(|a, b| distance(a.1, asked).total_cmp(&distance(b.1, asked)));
        found.map_or(0, |(i, _)| options.skills[i])
    };
    Ok(asked.iter().map(nearest).collect())
}

/// One small picture edited by several instructions in one batch, each with its own adapter.
fn edit_all(
    model: &Model,
    source: &Picture,
    instructions: &[String],
    edit: &EditOptions,
) -> Result<Vec<Vec<f32>>> {
    let (n, side) = (instructions.len(), source.height);
    let backbone = &model.backbone;
    let mut ids = Vec::new();
    for instruction in instructions {
        ids.extend(model.text.encode(instruction)?);
    }
    let repeated = |p: &Picture| {
        Tensor::build(&[n, p.height, p.width, 3], |out| {
            out.chunks_mut(p.rgb.len().max(1)).for_each(|out| out.copy_from_slice(&p.rgb));
        })
    };
    let views = [repeated(&thumbnail_of(source)?), repeated(&detail_of(source)?)];
    let views: Vec<&Tensor> = views.iter().take(backbone.config.views()).collect();
    let loras = model.adapters(&views, &ids, edit.strength)?;
    let position = Tensor::build(&[n, side, side, 2], |out| {
        for (i, place) in out.chunks_exact_mut(2).enumerate() {
            place.copy_from_slice(&[pixel_position(i / side % side, side), pixel_position(i % side, side)]);
        }
    });
    let tape = Tape::inference();
    let bound = backbone.params.bind(&tape, false)?;
    let text = backbone.text_tokens(&tape, &bound, &ids, n)?;
    let SampleOptions { seed, steps, sampler, .. } = edit.sample;
    // All instructions start from one noise.
    let noise = noise_window(Device::Cpu, seed, 0, 0, side, side, 3)?;
    let noise = repeated(&Picture::from_rgb(side, side, noise.data().to_vec()));
    let there = |x: &Tensor| x.to(text.value().device(), Dtype::F32);
    let (noise, source, position) = (there(&noise)?, there(&repeated(source))?, there(&position)?);
    let predict = |x: &Tensor, t: f32, _last: bool| {
        let t = vec![t; n];
        Ok(backbone.predict(&tape, &bound, x, &source, &position, &t, &text, &loras)?.value().clone())
    };
    let edited = sampler.integrate(steps, noise, predict)?.to_host()?;
    Ok(edited.data().chunks(side * side * 3).map(<[f32]>::to_vec).collect())
}
