//! Skills that arrive in groups, one after the other, without the data of those before: what each way to learn them forgets.

use super::{
    Claims,
    report::{Forgetting, ForgettingRow, Interval, Method, SweepRow},
    settings::{Care, schedule},
    statistics::interval,
    training::{place, rate},
};
use crate::{
    model::{Memory, Model, ModelInfo, SkillInfo},
    pipeline::{EditOptions, Editor},
    train::{AdapterConfig, ExtensionConfig, Kind, Task},
};
use anyhow::{Context, Result, ensure};
use hywu_core::{Dtype, Philox};
use hywu_diffusion::{
    Backbone, BatchShape, EditBatch, EditData, Error, KnownSkill, Picture, flow_loss,
    metrics::psnr,
    skills::{Phrasing, SKILLS},
};
use hywu_generator::Generator;
use hywu_kernels::{Device, Tape, optim::Optimizer};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;

/// A perfect edit counts as this, dB.
const BEST: f64 = 60.0;
/// Test photos have streams of their own in every skill.
const PHOTOS: usize = 1024;
/// The step, beyond all others, that draws what a trained backbone's condition is calibrated on.
const CALIBRATION: u64 = 1 << 40;

/// A way to learn one group after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Learner {
    /// All weights of the backbone.
    Full,
    /// One LoRA for everything.
    SharedLora,
    /// A generator that is trained on.
    Sequence,
    /// The same, rehearsing what it knew.
    Rehearsal,
    /// Each group in a generator of its own, which starts from the one before.
    Growing,
}

impl Learner {
    /// All, in the report's order.
    pub const ALL: [Self; 5] = [Self::Full, Self::SharedLora, Self::Sequence, Self::Rehearsal, Self::Growing];

    /// For people.
    pub fn label(self) -> &'static str {
        match self {
            Self::Full => "full fine-tuning",
            Self::SharedLora => "shared LoRA",
            Self::Sequence => "HY-WU in sequence",
            Self::Rehearsal => "HY-WU with rehearsal",
            Self::Growing => "HY-WU growing",
        }
    }

    /// How it keeps what it knew; none where it is no generator.
    fn extension(self) -> Option<ExtensionConfig> {
        let alone = ExtensionConfig { grow: false, share: 0.0, weight: 1.0 };
        match self {
            Self::Full | Self::SharedLora => None,
            Self::Sequence => Some(alone),
            Self::Rehearsal => Some(ExtensionConfig { share: 0.5, ..alone }),
            Self::Growing => Some(ExtensionConfig { grow: true, ..alone }),
        }
    }
}

/// What arrives, and how it is learnt and measured. Learners differ in nothing but how they learn.
#[derive(Clone, Debug)]
pub struct Arrivals {
    /// Indices into [`SKILLS`]: first the skills that are there from the start and are never trained, then each group.
    pub groups: Vec<Vec<usize>>,
    /// Steps for each group.
    pub steps: u64,
    /// What a step sees. With rehearsal a part of the instances is old, so that a step costs the same examples for all.
    pub shape: BatchShape,
    /// How all learn.
    pub care: Care,
    /// Peak learning rates of full fine-tuning, the LoRA and the generator.
    pub rates: [f32; 3],
    /// Rank and alpha, sizes of the generator.
    pub sizes: AdapterConfig,
    /// Batches of the test loss.
    pub batches: u64,
    /// How edits are made.
    pub edit: EditOptions,
    /// Seed of fresh weights and of the examples that measure.
    pub seed: u64,
}

/// What they are learnt with.
pub struct Ground<'a> {
    /// Where every learner starts.
    pub backbone: &'a Backbone,
    /// Photos to learn from; which skills it draws does not matter.
    pub train: &'a EditData,
    /// Photos that are never trained on.
    pub test: &'a EditData,
    /// Such photos to edit.
    pub pictures: &'a [Picture],
    /// Where it is computed.
    pub device: Device,
}

/// A learner on one group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// The group that was learnt last; 0 before the first.
    pub stage: usize,
    /// The group that is measured.
    pub group: usize,
    /// Loss on photos that were never trained on.
    pub loss: f64,
    /// PSNR against the true edit in dB, mean over the group's skills, by photo.
    pub psnr: Vec<f64>,
}

/// A learner over all stages.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Course {
    /// Which.
    pub learner: Learner,
    /// [`Arrivals::seed`].
    pub seed: u64,
    /// By stage, then by group up to the stage's own.
    pub scores: Vec<Score>,
}

/// Has a learner learn group after group, and measures it after each on all that it should know by then. `progress(stage, step)` may
/// stop it after every step, and after every edit that is measured.
///
/// # Errors
/// Nothing to learn or to measure with, a gradient that is not finite, those of the device; [`Error::Interrupted`] when `progress` says
/// so.
pub fn follow(
    learner: Learner,
    arrivals: &Arrivals,
    ground: &Ground<'_>,
    progress: &mut dyn FnMut(usize, u64) -> ControlFlow<()>,
) -> Result<Course> {
    ensure!(arrivals.groups.len() > 1, "no group of skills arrives");
    ensure!(arrivals.groups.iter().all(|g| !g.is_empty()), "a group without a skill");
    ensure!(!ground.pictures.is_empty(), "no photos to measure with");
    let device = ground.device;
    let mut task = start(learner, arrivals, ground.backbone)?;
    let before = Model::assemble(ground.backbone.clone(), Memory::None, ModelInfo::default())?;
    let mut scores = measure(before, 0, arrivals, ground, progress)?;
    let share = learner.extension().map_or(0.0, |extension| extension.share);
    let mut info = ModelInfo { skills: known(&arrivals.groups[0], 1), ..ModelInfo::default() };
    for stage in 1..arrivals.groups.len() {
        let old = arrivals.groups[..stage].concat().into_iter().map(KnownSkill::Table).collect();
        let data = ground.train.clone().with_skills(arrivals.groups[stage].clone()).rehearsing(old, share)?;
        let mut there = task.to(device, Dtype::Bf16)?;
        let mut optimizer = optimizer(learner, arrivals, &there)?;
        let first = stage as u64 * arrivals.steps;
        for step in 0..arrivals.steps {
            there.step(&data.batch(first + step, arrivals.shape)?, &mut optimizer)?;
            if progress(stage, step + 1).is_break() {
                return Err(Error::Interrupted.into());
            }
        }
        // The averaged weights are the ones that edit, and that the next group goes on from.
        let learnt = optimizer.averaged(there.params());
        *task.params_mut() = learnt.to(Device::Cpu, Dtype::F32)?;
        info.skills.extend(known(&arrivals.groups[stage], task.number()));
        let examples = || data.batch(CALIBRATION, arrivals.shape);
        let model = there.model(learnt, info.clone(), examples)?;
        scores.extend(measure(model, stage, arrivals, ground, progress)?);
        if let Task::Extended(generator, rehearsal) = &mut task {
            let learnt = generator.to(Device::Cpu, Dtype::F32)?;
            rehearsal.teacher = rehearsal.outcome(learnt, &info, ground.backbone)?;
        }
    }
    Ok(Course { learner, seed: arrivals.seed, scores })
}

/// Skills of the table that this generator of a model knows.
fn known(skills: &[usize], generator: usize) -> Vec<SkillInfo> {
    let of = |&i: &usize| SkillInfo { name: SKILLS[i].name.to_owned(), instructions: Vec::new(), generator };
    skills.iter().map(of).collect()
}

/// A learner before the first group, on the CPU.
fn start(learner: Learner, arrivals: &Arrivals, backbone: &Backbone) -> Result<Task> {
    let on = |kind: Kind| Task::on(kind, backbone.clone(), &arrivals.sizes, arrivals.seed);
    let Some(extension) = learner.extension() else {
        return on(if learner == Learner::Full { Kind::Full } else { Kind::Lora });
    };
    // A fresh generator's adapters are no-ops, so that what is kept or rehearsed first is the backbone's own skill.
    let sizes = arrivals.sizes.for_backbone(backbone);
    Task::extend(backbone.clone(), Generator::new(sizes, arrivals.seed)?.into(), extension)
}

fn optimizer(learner: Learner, arrivals: &Arrivals, task: &Task) -> Result<Optimizer> {
    let Care { weight_decay, clip, ema } = arrivals.care;
    let [full, lora, generator] = arrivals.rates;
    let peak = match learner {
        Learner::Full => full,
        Learner::SharedLora => lora,
        Learner::Sequence | Learner::Rehearsal | Learner::Growing => generator,
    };
    let schedule = schedule(peak, arrivals.steps);
    Ok(Optimizer::new(task.params(), schedule, weight_decay, clip, Some(ema))?)
}

/// The scores of a model on the groups up to `stage`.
fn measure(
    model: Model,
    stage: usize,
    arrivals: &Arrivals,
    ground: &Ground<'_>,
    progress: &mut dyn FnMut(usize, u64) -> ControlFlow<()>,
) -> Result<Vec<Score>> {
    let editor = Editor::new(model.to(ground.device, Dtype::Bf16)?);
    let mut scores = Vec::new();
    for (group, skills) in arrivals.groups.iter().enumerate().take(stage + 1) {
        let data = ground.test.clone().with_skills(skills.clone()).without_combinations();
        let mut loss = 0.0;
        for batch in 0..arrivals.batches {
            loss += f64::from(test_loss(editor.model(), &data.batch(batch, arrivals.shape)?)?);
        }
        let mut by_photo = Vec::new();
        for (i, picture) in ground.pictures.iter().enumerate() {
            let mut sum = 0.0;
            for &skill in skills {
                let mut random = Philox::new(arrivals.seed).stream((skill * PHOTOS + i) as u64);
                let example = SKILLS[skill].example(picture, Phrasing::HeldOut(i), &mut random);
                let mut go =
                    |_: usize, _: usize| progress(stage, if stage == 0 { 0 } else { arrivals.steps });
                let edit =
                    editor.edit(&example.source, &example.instruction, None, &arrivals.edit, &mut go)?;
                sum += psnr(&edit.picture, &example.target).min(BEST);
            }
            by_photo.push(sum / skills.len() as f64);
        }
        scores.push(Score { stage, group, loss: loss / arrivals.batches.max(1) as f64, psnr: by_photo });
    }
    Ok(scores)
}

/// The training loss of a model on a batch.
fn test_loss(model: &Model, batch: &EditBatch) -> Result<f32> {
    let backbone = &model.backbone;
    let adapters = model.adapters(&batch.views(backbone.config.views()), &batch.text, 1.0)?;
    let tape = Tape::inference();
    let bound = backbone.params.bind(&tape, false)?;
    Ok(flow_loss(&tape, backbone, &bound, batch, &adapters)?.value().item()?)
}

/// The report of courses of all learners and seeds over the same groups; `interval` takes PSNR (or its loss) by seed and photo.
///
/// # Errors
/// Courses that are not over these groups.
pub fn report(
    courses: &[Course],
    groups: &[Vec<usize>],
    interval: &dyn Fn(&Vec<Vec<f64>>) -> Interval,
) -> Result<Forgetting> {
    let last = groups.len().saturating_sub(1);
    let (mut rows, mut lost, mut end) = (Vec::new(), IndexMap::new(), IndexMap::new());
    for learner in Learner::ALL {
        let of: Vec<&Course> = courses.iter().filter(|c| c.learner == learner).collect();
        if of.is_empty() {
            continue;
        }
        let at = |stage: usize, group: usize| -> Result<Vec<&Score>> {
            let there = |s: &&Score| (s.stage, s.group) == (stage, group);
            let found: Vec<&Score> = of.iter().filter_map(|c| c.scores.iter().find(there)).collect();
            ensure!(
                found.len() == of.len(),
                "{}: no score of group {group} at stage {stage}",
                learner.label()
            );
            Ok(found)
        };
        for stage in 0..=last {
            for group in 0..=stage {
                let scores = at(stage, group)?;
                let loss = scores.iter().map(|s| s.loss).sum::<f64>() / scores.len() as f64;
                let psnr = interval(&scores.iter().map(|s| s.psnr.clone()).collect());
                rows.push(ForgettingRow { learner: learner.label().into(), stage, group, loss, psnr });
            }
        }
        if last == 0 {
            continue;
        }
        // By seed and photo: the mean over the earlier groups of what each has lost since it was learnt, and that over all of what each
        // is in the end.
        let mut cells: Vec<Vec<f64>> = at(last, 0)?.iter().map(|s| vec![0.0; s.psnr.len()]).collect();
        let mut ends = cells.clone();
        for group in 0..=last {
            let now_and_then = at(last, group)?.into_iter().zip(at(group, group)?);
            for ((cells, ends), (now, then)) in cells.iter_mut().zip(&mut ends).zip(now_and_then) {
                ensure!(
                    then.psnr.len() == cells.len() && now.psnr.len() == cells.len(),
                    "{}: courses over different photos",
                    learner.label()
                );
                for (photo, (then, now)) in then.psnr.iter().zip(&now.psnr).enumerate() {
                    // The last group has lost nothing yet.
                    cells[photo] += (then - now) / last as f64;
                    ends[photo] += now / (last + 1) as f64;
                }
            }
        }
        lost.insert(learner.label().to_owned(), interval(&cells));
        end.insert(learner.label().to_owned(), interval(&ends));
    }
    let names = |group: &Vec<usize>| group.iter().map(|&i| SKILLS[i].name.to_owned()).collect();
    Ok(Forgetting { groups: groups.iter().map(names).collect(), rows, lost, end })
}

impl Claims<'_> {
    /// What every learner forgets, with every seed; none where the settings leave it out. `test` has the photos that measure.
    ///
    /// # Errors
    /// As [`follow`].
    pub(super) fn forgetting(&self, sweep: &[SweepRow], test: &EditData) -> Result<Option<Forgetting>> {
        let (school, settings) = (&self.school, self.school.settings);
        if settings.measure.forgetting_steps == 0 {
            return Ok(None);
        }
        let groups = groups(&settings.pairs)?;
        let best = |method: Method| rate(settings, sweep, method).context("a method without a learning rate");
        let rates = [best(Method::Full)?, best(Method::SharedLora)?, best(Method::Hywu)?];
        let total = settings.measure.forgetting_steps * (groups.len() as u64 - 1);
        let mut courses: Vec<Course> = Vec::new();
        for &seed in &settings.seeds {
            let arrivals = Arrivals {
                groups: groups.clone(),
                steps: settings.measure.forgetting_steps,
                shape: settings.shape(),
                care: settings.optimizer.clone(),
                rates,
                sizes: settings.generator.clone(),
                batches: settings.measure.validation_batches,
                edit: self.options(),
                seed,
            };
            let data = self.data_of(seed);
            let (backbone, pictures, device) = (school.backbone, &self.photos, school.device);
            let ground = Ground { backbone, train: &data, test, pictures, device };
            for learner in Learner::ALL {
                let label = learner.label();
                let what = format!("seed {seed}: what {label} forgets");
                let mut progress = |stage: usize, step: u64| {
                    let done = stage.saturating_sub(1) as u64 * arrivals.steps + step;
                    match school.watch.at(&what, done as usize, total as usize) {
                        Ok(()) => ControlFlow::Continue(()),
                        Err(_) => ControlFlow::Break(()),
                    }
                };
                let name =
                    format!("{}/forgetting-{}.json", place(seed), label.replace(' ', "-").to_lowercase());
                courses
                    .push(school.folder.once(&name, || follow(learner, &arrivals, &ground, &mut progress))?);
            }
        }
        let resamples = settings.measure.resamples;
        Ok(Some(report(&courses, &groups, &|cells| interval(cells, resamples))?))
    }
}

/// Skills that every model has from the start.
const BASE: [&str; 10] = [
    "keep",
    "brighter",
    "darker",
    "more contrast",
    "less contrast",
    "saturate",
    "warmer",
    "cooler",
    "sepia",
    "invert",
];
/// Groups that arrive.
const STAGES: usize = 5;

/// The groups of [`Arrivals`]: the plain looks first, then `pairs` of conflicting skills in their order, dealt to five groups (fewer,
/// where there are fewer pairs).
///
/// # Errors
/// A name that is no skill's.
pub fn groups(pairs: &[[String; 2]]) -> Result<Vec<Vec<usize>>> {
    let arriving: Vec<Vec<usize>> =
        pairs.iter().map(|pair| Ok(EditData::skills(pair)?)).collect::<Result<_>>()?;
    let base: Vec<String> = BASE.map(str::to_owned).into();
    let mut base = EditData::skills(&base)?;
    base.retain(|skill| !arriving.iter().flatten().any(|other| other == skill));
    let mut groups = vec![base];
    groups.extend(arriving.chunks(arriving.len().div_ceil(STAGES).max(1)).map(<[Vec<usize>]>::concat));
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hywu_diffusion::{BackboneConfig, PhotoSet, TextEncoder, load_picture};

    fn samples() -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/samples")
    }

    fn arrivals(steps: u64) -> Arrivals {
        let index = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
            EditData::skills(&names).expect("known")
        };
        Arrivals {
            groups: vec![index(&["keep"]), index(&["invert"]), index(&["brighter", "sepia"])],
            steps,
            shape: BatchShape { instances: 4, crops: 1, crop: 16 },
            care: Care { weight_decay: 0.0, clip: 1.0, ema: 0.5 },
            rates: [1e-2; 3],
            sizes: AdapterConfig {
                rank: 2,
                alpha: 2.0,
                token_dim: 16,
                dim_accumulation: 2,
                d_model: 16,
                head_dim: 8,
                blocks: 1,
            },
            batches: 1,
            edit: EditOptions {
                sample: hywu_diffusion::SampleOptions { steps: 1, ..Default::default() },
                ..EditOptions::default()
            },
            seed: 3,
        }
    }

    #[test]
    fn every_learner_goes_through_all_stages() {
        let config = BackboneConfig {
            width: 16,
            layers: 2,
            head_dim: 8,
            mlp_hidden: 32,
            text_layers: 1,
            ..Default::default()
        };
        let mut backbone =
            Backbone::new(config, TextEncoder::table().expect("bundled"), 1).expect("good sizes");
        // A fresh one is the identity, through which adapters learn nothing.
        for (i, (_, tensor)) in backbone.params.iter_mut().enumerate() {
            if tensor.data().iter().all(|&v| v == 0.0) {
                Philox::new(2).fill_normal(i as u64, 0, tensor.data_mut());
                tensor.data_mut().iter_mut().for_each(|v| *v *= 0.05);
            }
        }
        let text = TextEncoder::bundled(backbone.config.text_len).expect("bundled");
        let photos = PhotoSet::open(samples()).expect("the samples");
        let data = EditData::new(photos, &[], text, 1).expect("skills");
        let pictures = [load_picture(samples().join("coffee.png")).expect("a sample").resize(64, 64)];
        let ground = Ground {
            backbone: &backbone,
            train: &data,
            test: &data,
            pictures: &pictures,
            device: Device::Cpu,
        };
        let arrivals = arrivals(3);
        let mut courses = Vec::new();
        for learner in Learner::ALL {
            let mut steps = 0;
            let mut progress = |stage: usize, step: u64| {
                steps += u64::from(stage > 0 && step < 3);
                ControlFlow::Continue(())
            };
            courses.push(follow(learner, &arrivals, &ground, &mut progress).expect("a course"));
            assert_eq!(steps, 2 * 2, "{learner:?}");
        }
        // All start from one backbone, and each has learnt something of its own by the end. Only the one that grows learns a group
        // just as the one in sequence does.
        let first: Vec<&Score> = courses.iter().map(|c| &c.scores[0]).collect();
        assert!(first.iter().all(|s| *s == first[0]));
        for (i, course) in courses.iter().enumerate() {
            let places: Vec<_> = course.scores.iter().map(|s| (s.stage, s.group)).collect();
            assert_eq!(places, [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]);
            assert!(course.scores.iter().all(|s| s.loss.is_finite() && s.psnr.len() == 1));
            assert!(courses[..i].iter().all(|c| c.scores[4..] != course.scores[4..]), "{:?}", course.learner);
        }
        // One that grows keeps what it knew: the gate has nothing to mistake here.
        let of = |learner: Learner, stage: usize, group: usize| -> &Score {
            let course = courses.iter().find(|c| c.learner == learner).expect("followed");
            course.scores.iter().find(|s| (s.stage, s.group) == (stage, group)).expect("measured")
        };
        assert_eq!(of(Learner::Growing, 1, 1).psnr, of(Learner::Growing, 2, 1).psnr);
        assert_ne!(of(Learner::Sequence, 1, 1).psnr, of(Learner::Sequence, 2, 1).psnr);
        let mean = |cells: &Vec<Vec<f64>>| {
            let mean = cells.iter().flatten().sum::<f64>() / cells.iter().flatten().count() as f64;
            Interval { mean, lo: mean, hi: mean }
        };
        let report = report(&courses, &arrivals.groups, &mean).expect("whole courses");
        assert_eq!((report.rows.len(), report.lost.len()), (5 * 6, 5));
        assert_eq!(report.groups[2], ["brighter", "sepia"]);
        let stop = &mut |_: usize, _: u64| ControlFlow::Break(());
        let stopped = follow(Learner::Full, &arrivals, &ground, stop).expect_err("stopped");
        assert!(matches!(stopped.downcast_ref(), Some(Error::Interrupted)), "{stopped:#}");
    }

    #[test]
    fn what_is_lost_is_counted_from_where_it_was_learnt() {
        // Two photos; group 0 falls from 30 and 40 by 2 and 4 dB, group 1 from 20 and 20 by 1 and 3.
        let score = |stage, group, psnr: [f64; 2]| Score { stage, group, loss: 1.0, psnr: psnr.into() };
        let course = Course {
            learner: Learner::Sequence,
            seed: 0,
            scores: vec![
                score(0, 0, [30.0, 40.0]),
                score(1, 0, [29.0, 39.0]),
                score(1, 1, [20.0, 20.0]),
                score(2, 0, [28.0, 36.0]),
                score(2, 1, [19.0, 17.0]),
                score(2, 2, [10.0, 10.0]),
            ],
        };
        let seen =
            |cells: &Vec<Vec<f64>>| Interval { mean: cells[0][0], lo: cells[0][1], hi: cells.len() as f64 };
        let groups = vec![vec![0], vec![1], vec![2]];
        let found = report(std::slice::from_ref(&course), &groups, &seen).expect("a whole course");
        assert_eq!(found.lost["HY-WU in sequence"], Interval { mean: 1.5, lo: 3.5, hi: 1.0 });
        let end = found.end["HY-WU in sequence"];
        assert!((end.mean - 19.0).abs() < 1e-9 && (end.lo - 21.0).abs() < 1e-9, "{end:?}");
        let cut = Course { scores: course.scores[..5].to_vec(), ..course };
        let error = report(&[cut], &groups, &seen).expect_err("a cut course").to_string();
        assert!(error.contains("group 2 at stage 2"), "{error}");
    }

    #[test]
    fn pairs_are_dealt_to_five_groups() {
        let pairs: Vec<[String; 2]> = [["blur", "deblur"], ["grain", "denoise"], ["sepia", "colourise"]]
            .map(|p| p.map(str::to_owned))
            .into();
        let three = groups(&pairs).expect("known");
        let names = |g: &Vec<usize>| g.iter().map(|&i| SKILLS[i].name).collect::<Vec<_>>();
        assert_eq!(three.len(), 4);
        assert!(names(&three[0]).contains(&"keep") && !names(&three[0]).contains(&"sepia"));
        assert_eq!(names(&three[2]), ["grain", "denoise"]);
        let seven = groups(&[pairs.clone(), pairs.clone(), pairs[..1].to_vec()].concat()).expect("known");
        assert_eq!(seven.iter().skip(1).map(Vec::len).collect::<Vec<_>>(), [4, 4, 4, 2]);
        assert!(groups(&[["blur".into(), "levitate".into()]]).is_err());
    }
}
