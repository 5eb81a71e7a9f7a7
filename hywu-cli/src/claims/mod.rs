//! What the paper claims for instance-specific weights, measured anew: from one frozen backbone, on the same batches, every method is
//! trained on skills that contradict each other, and all of them edit photos that they never saw (`hywu eval claims`).

mod condition;
mod conflict;
mod folder;
pub mod forgetting;
mod frozen;
pub mod html;
pub mod instance;
mod kept;
mod memory;
mod methods;
mod phrasing;
mod quality;
pub mod report;
pub mod settings;
mod statistics;
pub mod structure;
mod summary;
mod training;
mod watch;

pub use watch::Watch;

use crate::{
    eval::{EvalOptions, square},
    model::Model,
    pipeline::EditOptions,
};
use anyhow::{Context, Result, ensure};
use condition::{Ablation, STRENGTHS, ablation};
use conflict::{Cosines, conflicts, cosines};
use folder::Folder;
use hywu_core::{Adapter, adapter::gram};
use hywu_diffusion::{
    BatchShape, EditBatch, EditData, PhotoSet, Picture, TextEncoder, load_picture, skills::Phrasing,
};
use hywu_kernels::Device;
use indexmap::IndexMap;
use methods::{Contender, sizes};
use phrasing::Routed;
use quality::{Comparison, Instance, Score, by_photo, instances, scores};
use report::{
    AdapterLabel, Condition, Cost, Curve, Method, MethodReport, Report, Setup, StrengthRow, SweepRow, Variant,
};
use serde::{Deserialize, Serialize};
use settings::Settings;
use statistics::{Cells, difference, interval};
use std::{path::Path, sync::Arc};
use training::{Learner, School, place, rate};

/// Photos that choose the learning rates: the last by name of those to train on.
const VALIDATION: usize = 4;
/// Seed of the validation batches.
const VALIDATION_SEED: u64 = 1 << 32;
/// A step beyond all others.
const ELSEWHERE: u64 = 1 << 40;
const REPORT: &str = "report.json";
const HIDDEN: &str = "hidden.json";

/// What tells a measurement from others in a folder.
#[derive(Serialize)]
struct Given<'a> {
    settings: &'a Settings,
    hash: &'a str,
    trained_on: &'a [String],
    tested_on: &'a [String],
}

/// What one seed has told.
struct Told {
    curves: Vec<Curve>,
    seconds: IndexMap<Method, f64>,
    scores: IndexMap<Method, Vec<Score>>,
    cosines: Vec<Cosines>,
    ablation: Ablation,
    routed: Vec<Routed>,
}

/// Memory of a method, MB.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Memory {
    training: Option<f64>,
    edit: Option<f64>,
}

/// A measurement: how it trains, and what it measures with.
struct Claims<'a> {
    school: School<'a>,
    /// Names of the skills.
    names: Vec<String>,
    /// Test photos, square.
    photos: Vec<Picture>,
    instances: Vec<Instance>,
    data: EditData,
}

/// Trains and measures everything that `settings` say, in the folder `out`, and writes `report.json` and the page
/// [`html::FILE`] there. What is finished there is
/// not done again; a training goes on from its last checkpoint.
///
/// The frozen backbone is that of `model`, whose adapters are not used; without it one is trained first, as `settings` say, or it is
/// the bundled model's if they don't. `photos` is the folder to train on, of which the last four by name only choose the learning
/// rates; `heldout` holds those that measure.
///
/// # Errors
/// Photos that can't be used, or fewer than two to measure with and five to train on; a folder that holds another measurement; a
/// gradient that is not finite; [`hywu_diffusion::Error::Interrupted`] when `watch` says so.
pub fn measure(
    settings: &Settings,
    model: Option<&Model>,
    photos: &Path,
    heldout: &Path,
    out: &Path,
    device: Device,
    watch: Watch<'_>,
) -> Result<Report> {
    let mut train = PhotoSet::open(photos)?;
    let count = train.names.len();
    ensure!(count > VALIDATION, "{}: {count} photos; at least 5 are needed", photos.display());
    let validation = train.split_off(VALIDATION);
    let (trained_on, validated_on) = (train.names.clone(), validation.names.clone());
    let (tested_on, test_pictures) = test_photos(heldout, settings.measure.side)?;
    // What the report says of the backbone is true of the one that was taken.
    let taken =
        Settings { backbone: settings.backbone.clone().filter(|_| model.is_none()), ..settings.clone() };
    let settings = &taken;
    let own;
    let model = match model {
        Some(model) => model,
        None => {
            own = match &settings.backbone {
                Some(config) => frozen::train(config, photos, out, device, watch)?,
                None => Model::bundled()?,
            };
            &own
        }
    };
    let given = Given { settings, hash: &model.hash, trained_on: &trained_on, tested_on: &tested_on };
    let folder = Folder::open(out, &given)?;
    let names = settings.skills();
    let skills = EditData::skills(&names)?;
    let text = || TextEncoder::bundled(model.backbone.config.text_len);
    let data = EditData::new(train, &names, text()?, 0)?.without_combinations();
    let validation = EditData::new(validation, &names, text()?, VALIDATION_SEED)?
        .without_combinations()
        .with_phrasing(Phrasing::Canonical);
    let batch = |step| validation.batch(step, settings.shape())?.to(device);
    let validation: Vec<EditBatch> =
        (0..settings.measure.validation_batches).map(batch).collect::<hywu_diffusion::Result<_>>()?;
    let school = School {
        settings,
        backbone: &model.backbone,
        skills: &skills,
        validation: &validation,
        folder: &folder,
        device,
        watch,
    };
    let instances = instances(&test_pictures, &skills);
    let claims = Claims { school, names, photos: test_pictures, instances, data };
    let sweep = claims.school.sweep(&claims.data_of(settings.seeds[0]))?;
    let told: Vec<Told> =
        settings.seeds.iter().map(|&seed| claims.seed(&sweep, seed)).collect::<Result<_>>()?;
    let setup = Setup {
        model: model.info.name.clone(),
        hash: model.hash.clone(),
        device: device.to_string(),
        settings: settings.clone(),
        pairs: settings.pairs.clone(),
        trained_on,
        validated_on,
        tested_on,
        adapters: kept::ADAPTERS.to_owned(),
    };
    let test = EditData::new(PhotoSet::open(heldout)?, &claims.names, text()?, VALIDATION_SEED)?
        .with_phrasing(Phrasing::Canonical);
    let forgetting = claims.forgetting(&sweep, &test)?;
    let mut report = claims.report(setup, sweep, &told)?;
    let lost = |f: &report::Forgetting| f.lost.get(forgetting::Learner::Growing.label()).copied();
    report.summary.forgetting_db = forgetting.as_ref().and_then(lost);
    report.forgetting = forgetting;
    folder.write(REPORT, &report)?;
    html::write(&report, out)?;
    Ok(report)
}

/// Names of the photos of a folder, and their middle squares.
fn test_photos(folder: &Path, side: usize) -> Result<(Vec<String>, Vec<Picture>)> {
    let names = PhotoSet::open(folder)?.names;
    ensure!(names.len() >= 2, "{}: {} photo; at least 2 are needed", folder.display(), names.len());
    let load = |name: &String| Ok(square(&load_picture(folder.join(name))?, side));
    let photos = names.iter().map(load).collect::<Result<_>>()?;
    Ok((names, photos))
}

impl Claims<'_> {
    /// The training data of a seed.
    fn data_of(&self, seed: u64) -> Arc<EditData> {
        Arc::new(self.data.clone().with_seed(seed))
    }

    fn options(&self) -> EditOptions {
        EditOptions { sample: self.school.settings.sample(), ..EditOptions::default() }
    }

    /// Trains with one seed and measures what comes out.
    fn seed(&self, sweep: &[SweepRow], seed: u64) -> Result<Told> {
        let (data, place) = (self.data_of(seed), place(seed));
        let learners = self.school.learn(&data, sweep, seed)?;
        let mut curves = Vec::new();
        for learner in &learners {
            let name = format!("{place}/validation-{}.json", learner.method.name());
            let loss = self.school.folder.once(&name, || learner.loss(self.school.validation))?;
            curves.push(learner.curve(seed, loss));
        }
        let cosines = self.cosines(&data, &learners, seed)?;
        let mut scores = IndexMap::new();
        for method in Method::ALL {
            scores.insert(method, self.scores(&data, &learners, method, seed)?);
        }
        let hywu = self.contender(&data, &learners, Method::Hywu)?;
        let ablation = self.school.folder.once(&format!("{place}/condition.json"), || {
            let backbone = self.school.backbone;
            ablation(hywu.editor(), backbone, &self.instances, &self.options(), seed, self.school.watch)
        })?;
        let routed = self.school.folder.once(&format!("{place}/phrasing.json"), || {
            let photos = &self.photos[..self.photos.len().min(self.school.settings.measure.routed_photos)];
            let skills = self.school.skills.to_vec();
            let options = EvalOptions { edit: self.options(), skills, ..EvalOptions::default() };
            phrasing::routed(hywu.editor().model(), photos, &options, self.school.watch)
        })?;
        if seed == self.school.settings.seeds[0] {
            self.school.folder.once("adapters.json", || {
                let count = self.school.settings.measure.adapters;
                kept::adapters(
                    hywu.editor(),
                    &self.photos,
                    self.school.skills,
                    count,
                    self.school.folder,
                    self.school.watch,
                )
            })?;
            self.school.folder.once(HIDDEN, || {
                let (skills, draws) = (self.school.skills, self.school.settings.measure.draws);
                instance::hidden_amounts(hywu.editor(), &self.photos, skills, draws, self.school.watch)
            })?;
        }
        let seconds = learners.iter().map(|l| (l.method, l.seconds())).collect();
        Ok(Told { curves, seconds, scores, cosines, ablation, routed })
    }

    /// A method with what it has learnt.
    fn contender(&self, data: &EditData, learners: &[Learner], method: Method) -> Result<Contender> {
        let learner = learners.iter().find(|l| Some(l.method) == method.trained_as());
        let trained = learner.map(|l| (&l.task, l.averaged()));
        let shape = BatchShape { crops: 1, ..self.school.settings.shape() };
        let batch = || data.batch(ELSEWHERE, shape);
        Contender::new(method, self.school.backbone, trained, self.school.skills, self.school.device, batch)
    }

    /// The scores of a method, and one edit of each skill to look at.
    fn scores(&self, data: &EditData, learners: &[Learner], method: Method, seed: u64) -> Result<Vec<Score>> {
        self.school.folder.once(&format!("{}/quality-{}.json", place(seed), method.name()), || {
            let contender = self.contender(data, learners, method)?;
            let first = seed == self.school.settings.seeds[0];
            let mut keep = |instance: &Instance, edit: &Picture, _: f64| -> Result<()> {
                if first && instance.photo == self.shown(instance.skill) {
                    let name = kept::picture_name(&self.names[instance.skill], method.name());
                    kept::keep_picture(self.school.folder, &name, edit)?;
                }
                Ok(())
            };
            let what = format!("seed {seed}: edits of {}", method.label());
            scores(&contender, &self.instances, &self.options(), self.school.watch, &what, &mut keep)
        })
    }

    /// The photo that a skill is shown on.
    fn shown(&self, skill: usize) -> usize {
        skill % self.photos.len()
    }

    /// Cosines of gradients on the shared weights, before and after training.
    fn cosines(&self, data: &EditData, learners: &[Learner], seed: u64) -> Result<Vec<Cosines>> {
        self.school.folder.once(&format!("{}/conflict.json", place(seed)), || {
            let load = (self.school.settings.measure.conflict_batches, self.school.settings.shape());
            let mut all = Vec::new();
            for learner in learners.iter().filter(|l| matches!(l.method, Method::Full | Method::SharedLora)) {
                let before = self.school.learner(learner.method, learner.lr, 1, seed)?;
                for (trained, task) in [(true, &learner.task), (false, &before.task)] {
                    all.push(cosines(
                        learner.method,
                        trained,
                        task,
                        data,
                        self.school.skills,
                        load,
                        self.school.watch,
                    )?);
                }
            }
            Ok(all)
        })
    }

    /// Memory of every method: one step of training, one edit.
    fn memory(&self, sweep: &[SweepRow]) -> Result<IndexMap<Method, Memory>> {
        self.school.folder.once("memory.json", || {
            let (seed, mut all) = (self.school.settings.seeds[0], IndexMap::new());
            let data = self.data_of(seed);
            let batch = data.batch(ELSEWHERE, self.school.settings.shape())?.to(self.school.device)?;
            let instance = self.instances.first().context("nothing was measured")?;
            for method in Method::ALL {
                self.school.watch.at("memory", all.len(), Method::ALL.len())?;
                let mut memory = Memory::default();
                if let Some(lr) =
                    rate(self.school.settings, sweep, method).filter(|_| method != Method::Routed)
                {
                    memory.training = memory::taken(self.school.device, || {
                        self.school.learner(method, lr, 1, seed)?.step(&batch)
                    })?;
                }
                let fresh = match method.trained_as() {
                    Some(trained) => vec![self.school.learner(trained, 1e-3, 1, seed)?],
                    None => Vec::new(),
                };
                let contender = self.contender(&data, &fresh, method)?;
                drop(fresh);
                memory.edit = memory::taken(self.school.device, || {
                    let (source, words) = (&instance.example.source, &instance.example.instruction);
                    contender.edit(source, words, instance.skill, &self.options(), self.school.watch.stop)?;
                    Ok(())
                })?;
                all.insert(method, memory);
            }
            Ok(all)
        })
    }

    /// Puts it all together.
    fn report(&self, setup: Setup, sweep: Vec<SweepRow>, told: &[Told]) -> Result<Report> {
        let resamples = self.school.settings.measure.resamples;
        let mut scores: IndexMap<Method, Vec<Vec<Score>>> = IndexMap::new();
        for method in Method::ALL {
            scores.insert(method, told.iter().filter_map(|t| t.scores.get(&method).cloned()).collect());
        }
        let comparison =
            Comparison { instances: &self.instances, skills: &self.names, scores: &scores, resamples };
        let memory = self.memory(&sweep)?;
        let (mut methods, mut cost) = (Vec::new(), Vec::new());
        for method in Method::ALL {
            let parameters = match method.trained_as() {
                Some(trained) => methods::fresh(
                    trained,
                    self.school.backbone,
                    self.school.settings,
                    self.school.skills,
                    0,
                )?
                .params()
                .numel(),
                None => 0,
            };
            let rank = sizes(method, self.school.backbone, self.school.settings)?.map(|sizes| sizes.rank);
            let (label, lr) = (method.label().to_owned(), rate(self.school.settings, &sweep, method));
            methods.push(MethodReport { method, label, rank, parameters, lr });
            let Memory { training, edit } = memory.get(&method).copied().unwrap_or_default();
            let trained = |t: &Told| method.trained_as().and_then(|m| t.seconds.get(&m)).copied();
            let mean = |value: fn(&Score) -> f64| {
                let all: Vec<f64> = scores[&method].iter().flatten().map(value).collect();
                all.iter().sum::<f64>() / all.len().max(1) as f64
            };
            cost.push(Cost {
                method,
                parameters,
                training_seconds: told.iter().filter_map(trained).fold(0.0, |a, b| a + b)
                    / told.len().max(1) as f64,
                adapter_ms: mean(|s| s.adapter_ms),
                edit_ms: mean(|s| s.edit_ms),
                training_mb: training,
                edit_mb: edit,
            });
        }
        let seeds: Vec<Vec<Cosines>> = told.iter().map(|t| t.cosines.clone()).collect();
        let conflict = conflicts(&seeds, &self.names, &self.pairs(), resamples);
        let (condition, strength) = self.variants(&comparison, told);
        let routed: Vec<Vec<Routed>> = told.iter().map(|t| t.routed.clone()).collect();
        let accuracy: Cells = routed.iter().map(|seed| phrasing::accuracy(seed)).collect();
        let summary = summary::summary(&comparison, &conflict, &condition, &accuracy);
        let mut pictures = Vec::new();
        for (skill, name) in self.names.iter().enumerate() {
            let at = |i: &Instance| i.skill == skill && i.photo == self.shown(skill);
            let index = self.instances.iter().position(at).context("a skill without an example")?;
            let Instance { photo, example, .. } = &self.instances[index];
            let first = |method: Method| Some((method, scores[&method].first()?.get(index)?.psnr));
            let psnr = Method::ALL.into_iter().filter_map(first).collect();
            pictures.push(kept::picture_row(self.school.folder, name, *photo, example, psnr)?);
        }
        let folder = self.school.folder;
        let adapters: Vec<AdapterLabel> = folder.once("adapters.json", || Ok(Vec::new()))?;
        let structure = folder.once("structure.json", || {
            structure::structure(&gram(&[Adapter::load(folder.path(kept::ADAPTERS))?])?, &adapters)
        })?;
        Ok(Report {
            summary,
            setup,
            methods,
            sweep,
            curves: told.iter().flat_map(|t| t.curves.iter().cloned()).collect(),
            quality: comparison.quality(),
            conflict,
            condition,
            strength,
            phrasing: phrasing::rows(&routed, &self.names),
            cost,
            forgetting: None,
            adapters,
            structure,
            hidden: folder.once(HIDDEN, || Ok(Vec::new()))?,
            pictures,
        })
    }

    /// HY-WU under other conditions and strengths.
    fn variants(&self, comparison: &Comparison<'_>, told: &[Told]) -> (Vec<Variant>, Vec<StrengthRow>) {
        let resamples = self.school.settings.measure.resamples;
        let of = |psnr: &dyn Fn(&Told) -> Vec<f64>| -> Cells {
            told.iter().map(|t| by_photo(&self.instances, &psnr(t), None)).collect()
        };
        let own = comparison.cells(Method::Hywu, None, |s| s.psnr);
        let variant = |condition: Condition, cells: &Cells| Variant {
            condition,
            psnr: interval(cells, resamples),
            loss: interval(&difference(&own, cells), resamples),
        };
        let mut conditions = vec![variant(Condition::Own, &own)];
        for (i, condition) in Condition::OTHERS.into_iter().enumerate() {
            conditions.push(variant(condition, &of(&|t| t.ablation.conditions[i].1.clone())));
        }
        let row = |strength, cells: &Cells| StrengthRow { strength, psnr: interval(cells, resamples) };
        let mut strengths: Vec<StrengthRow> = (0..STRENGTHS.len())
            .map(|i| row(STRENGTHS[i], &of(&|t| t.ablation.strengths[i].1.clone())))
            .collect();
        strengths.push(row(0.0, &comparison.cells(Method::None, None, |s| s.psnr)));
        strengths.push(row(1.0, &own));
        strengths.sort_by(|a, b| a.strength.total_cmp(&b.strength));
        (conditions, strengths)
    }

    /// Places of the skills of every pair.
    fn pairs(&self) -> Vec<[usize; 2]> {
        let at = |name: &String| self.names.iter().position(|n| n == name).unwrap_or(0);
        self.school.settings.pairs.iter().map(|pair| pair.each_ref().map(at)).collect()
    }
}
