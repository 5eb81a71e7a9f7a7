//! Training all methods in lockstep, each step on one batch, and the search for learning rates.

use super::{
    folder::Folder,
    methods::fresh,
    report::{Curve, Method, SweepRow},
    settings::{Care, Settings, schedule},
    watch::Watch,
};
use crate::train::{Batches, Task};
use anyhow::{Context, Result, bail};
use hywu_core::{Checkpoint, Dtype, TensorWriter};
use hywu_diffusion::{Backbone, EditBatch, EditData, Error};
use hywu_kernels::{Device, ParamSet, Tape, optim::Optimizer};
use serde::{Deserialize, Serialize};
use std::{fs, path::Path, sync::Arc, time::Instant};

/// Points of a training curve.
const POINTS: u64 = 50;
const WEIGHTS: &str = "weights.";
const RECORD: &str = "record";

/// What all trainings of a measurement share.
pub struct School<'a> {
    /// The settings.
    pub settings: &'a Settings,
    /// The frozen backbone, on the CPU.
    pub backbone: &'a Backbone,
    /// The skills, by index.
    pub skills: &'a [usize],
    /// Validation batches.
    pub validation: &'a [EditBatch],
    /// Where finished parts are.
    pub folder: &'a Folder,
    /// Where it is computed.
    pub device: Device,
    /// Who looks on.
    pub watch: Watch<'a>,
}

/// One method in training.
pub struct Learner {
    /// Which.
    pub method: Method,
    /// Peak learning rate.
    pub lr: f32,
    /// What is trained.
    pub task: Task,
    optimizer: Optimizer,
    steps: u64,
    record: Record,
}

/// What a training has told so far.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Record {
    /// Of its own steps; making the batches is not counted.
    seconds: f64,
    curve: Vec<(u64, f64)>,
    sum: f64,
    count: u64,
    /// Why it broke off.
    broken: Option<String>,
}

impl Learner {
    fn new(method: Method, lr: f32, steps: u64, task: Task, care: &Care) -> Result<Self> {
        let Care { weight_decay, clip, ema } = *care;
        let optimizer = Optimizer::new(task.params(), schedule(lr, steps), weight_decay, clip, Some(ema))?;
        Ok(Self { method, lr, task, optimizer, steps, record: Record::default() })
    }

    /// The weights to use.
    pub fn averaged(&self) -> &ParamSet {
        self.optimizer.averaged(self.task.params())
    }

    /// Seconds that its steps took.
    pub fn seconds(&self) -> f64 {
        self.record.seconds
    }

    /// Its curve, with the loss at the end.
    pub fn curve(&self, seed: u64, validation: f64) -> Curve {
        Curve { method: self.method, seed, points: self.record.curve.clone(), validation }
    }

    fn done(&self) -> u64 {
        self.optimizer.adamw.step
    }

    fn goes_on(&self) -> bool {
        self.done() < self.steps && self.record.broken.is_none()
    }

    /// One step.
    ///
    /// # Errors
    /// A gradient that is not finite; nothing is changed then.
    pub fn step(&mut self, batch: &EditBatch) -> Result<()> {
        let start = Instant::now();
        let stats = self.task.step(batch, &mut self.optimizer)?;
        self.record.seconds += start.elapsed().as_secs_f64();
        self.record.sum += f64::from(stats.loss);
        self.record.count += 1;
        let done = self.done();
        if done.is_multiple_of((self.steps / POINTS).max(1)) || done == self.steps {
            self.record.curve.push((done, self.record.sum / self.record.count as f64));
            (self.record.sum, self.record.count) = (0.0, 0);
        }
        Ok(())
    }

    /// Mean loss over these batches with the weights to use.
    ///
    /// # Errors
    /// Batches that don't fit.
    pub fn loss(&self, batches: &[EditBatch]) -> Result<f64> {
        let tape = Tape::inference();
        let bound = self.averaged().bind(&tape, false)?;
        let mut sum = 0.0;
        for batch in batches {
            sum += f64::from(self.task.loss(&tape, &bound, batch)?.value().item()?);
        }
        Ok(sum / batches.len().max(1) as f64)
    }

    /// A file's name tells its rate as well: of a sweep there are several.
    fn file(&self) -> String {
        format!("{}-{:e}.safetensors", self.method.name(), self.lr)
    }

    fn store(&self, path: &Path) -> Result<()> {
        let mut writer = TensorWriter::new();
        self.task.params().store(&mut writer, WEIGHTS, Dtype::F32)?;
        self.optimizer.store(self.task.params(), &mut writer)?;
        writer.meta(RECORD, serde_json::to_string(&self.record)?);
        Ok(writer.write(path)?)
    }

    fn restore(&mut self, path: &Path) -> Result<()> {
        let file = Checkpoint::open(path)?;
        let record = file.metadata().get(RECORD);
        let record =
            record.with_context(|| format!("{}: no `{RECORD}`: not a training state", path.display()))?;
        self.record = serde_json::from_str(record).with_context(|| path.display().to_string())?;
        self.task.params_mut().load(&file, WEIGHTS)?;
        self.optimizer.load(self.task.params(), &file)?;
        Ok(())
    }
}

impl School<'_> {
    /// The peak learning rate of every trained method, and how it was found: each rate for its steps with the first seed, in lockstep,
    /// and the lowest validation loss wins.
    ///
    /// # Errors
    /// A method that learns at no rate; those of training.
    pub fn sweep(&self, data: &Arc<EditData>) -> Result<Vec<SweepRow>> {
        const PLACE: &str = "sweep";
        let rows = self.folder.once("sweep.json", || {
            let mut learners = Vec::new();
            for method in Method::TRAINED {
                let Some(sweep) = self.settings.sweep(method) else { continue };
                // With one rate there is nothing to find out.
                for &lr in sweep.peaks.iter().filter(|_| sweep.peaks.len() > 1) {
                    learners.push(self.learner(method, lr, sweep.steps, self.settings.seeds[0])?);
                }
            }
            self.train(&mut learners, data, PLACE, true)?;
            let mut rows = Vec::new();
            for learner in &learners {
                // Weights that have blown up may give an error instead of a number.
                let loss = match learner.record.broken {
                    Some(_) => None,
                    None => learner.loss(self.validation).ok().filter(|loss| loss.is_finite()),
                };
                let Learner { method, lr, steps, .. } = *learner;
                rows.push(SweepRow { method, lr, steps, loss, chosen: false });
            }
            choose(&mut rows);
            for learner in &learners {
                if !rows.iter().any(|row| row.method == learner.method && row.chosen) {
                    let why = learner.record.broken.as_deref().unwrap_or("its loss is not finite");
                    bail!("{} learns at none of its rates: {why}", learner.method.label());
                }
            }
            Ok(rows)
        })?;
        // Its checkpoints are of no use any more.
        let place = self.folder.path(PLACE);
        if place.exists() {
            fs::remove_dir_all(&place).map_err(|e| hywu_core::Error::io(&place, e))?;
        }
        Ok(rows)
    }

    /// Every trained method with its rate, after all steps.
    ///
    /// # Errors
    /// A gradient that is not finite; a folder that can't be written; [`Error::Interrupted`].
    pub fn learn(&self, data: &Arc<EditData>, sweep: &[SweepRow], seed: u64) -> Result<Vec<Learner>> {
        let mut learners = Vec::new();
        for method in Method::TRAINED {
            let Some(lr) = rate(self.settings, sweep, method) else { continue };
            learners.push(self.learner(method, lr, self.settings.steps, seed)?);
        }
        self.train(&mut learners, data, &place(seed), false)?;
        Ok(learners)
    }

    /// A method before its first step.
    ///
    /// # Errors
    /// Sizes that can't work; a device that has not enough memory.
    pub fn learner(&self, method: Method, lr: f32, steps: u64, seed: u64) -> Result<Learner> {
        let task = fresh(method, self.backbone, self.settings, self.skills, seed)?;
        let task = task.to(self.device, Dtype::Bf16)?;
        Learner::new(method, lr, steps, task, &self.settings.optimizer)
    }

    /// Trains to the end, from where the files in `place` say. With `lenient` a learner that fails breaks off alone.
    fn train(
        &self,
        learners: &mut [Learner],
        data: &Arc<EditData>,
        place: &str,
        lenient: bool,
    ) -> Result<()> {
        let files: Vec<String> = learners.iter().map(|l| format!("{place}/{}", l.file())).collect();
        for (learner, file) in learners.iter_mut().zip(&files) {
            let path = self.folder.path(file);
            if path.exists() {
                learner.restore(&path)?;
            }
        }
        let first = learners.iter().filter(|l| l.goes_on()).map(Learner::done).min();
        let (Some(first), Some(steps)) = (first, learners.iter().map(|l| l.steps).max()) else {
            return Ok(());
        };
        let ahead = (self.device != Device::Cpu).then_some(self.device);
        let mut batches = Batches::new(data, &self.settings.data(), first..steps, ahead)?;
        for step in first..steps {
            let batch = batches.next(step)?;
            for learner in learners.iter_mut().filter(|l| l.goes_on() && l.done() == step) {
                if let Err(e) = learner.step(&batch) {
                    if !lenient {
                        return Err(e.context(learner.method.label()));
                    }
                    learner.record.broken = Some(format!("{e:#}"));
                }
            }
            let done = step + 1;
            (self.watch.tell)(&format!("training {place}"), done, steps);
            let stop = (self.watch.stop)();
            if done.is_multiple_of(self.settings.checkpoint_every) || done == steps || stop {
                for (learner, file) in learners.iter().zip(&files) {
                    self.folder.make_room(file)?;
                    learner.store(&self.folder.path(file))?;
                }
            }
            if stop && done < steps {
                return Err(Error::Interrupted.into());
            }
        }
        Ok(())
    }
}

/// Where the parts of a seed are.
pub fn place(seed: u64) -> String {
    format!("seed-{seed}")
}

/// Marks the lowest loss of every method.
fn choose(rows: &mut [SweepRow]) {
    for method in Method::TRAINED {
        let tried = rows.iter_mut().filter(|row| row.method == method);
        let best =
            tried.filter_map(|row| row.loss.map(|loss| (row, loss))).min_by(|a, b| a.1.total_cmp(&b.1));
        if let Some((row, _)) = best {
            row.chosen = true;
        }
    }
}

/// The chosen peak learning rate of a method; none for one that is not trained.
pub fn rate(settings: &Settings, sweep: &[SweepRow], method: Method) -> Option<f32> {
    let trained = method.trained_as()?;
    let found = sweep.iter().find(|row| row.method == trained && row.chosen).map(|row| row.lr);
    found.or_else(|| settings.sweep(trained)?.peaks.first().copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_loss_is_chosen_by_method() {
        let row = |method, lr, loss| SweepRow { method, lr, steps: 1, loss, chosen: false };
        let mut rows = [
            row(Method::Full, 1e-4, Some(0.3)),
            row(Method::Full, 1e-3, Some(0.2)),
            row(Method::Full, 1e-2, None),
            row(Method::Hywu, 1e-3, Some(0.1)),
            row(Method::Hywu, 2e-3, Some(0.4)),
        ];
        choose(&mut rows);
        assert_eq!(rows.each_ref().map(|r| r.chosen), [false, true, false, true, false]);
        let settings = Settings::parse(Settings::QUICK).expect("bundled");
        assert_eq!(rate(&settings, &rows, Method::Full), Some(1e-3));
        assert_eq!(rate(&settings, &rows, Method::None), None);
        // Nothing was swept for the bank: its first rate, for the routed one too.
        assert_eq!(rate(&settings, &rows, Method::Routed), Some(settings.rates.bank.peaks[0]));
    }
}
