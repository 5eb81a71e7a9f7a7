//! Training runs: steps, log, checkpoints, resuming.

mod bank;
mod batches;
mod config;
mod log;
mod rehearsal;
mod skills;
mod task;

pub use config::{
    AdapterConfig, DataConfig, ExtensionConfig, OptimizerConfig, SaveAs, SkillConfig, TrainConfig,
};
pub use rehearsal::Rehearsal;
pub use task::{Kind, Task};

use crate::model::{ModelInfo, SkillInfo};
use anyhow::{Context, Result, bail, ensure};
pub(crate) use batches::Batches;
use hywu_core::{Checkpoint, Dtype, TensorWriter};
use hywu_diffusion::{BatchShape, EditData, Error, PhotoSet, TextEncoder};
use hywu_kernels::{Device, Profile, Replay, optim::Optimizer};
use log::{Log, Window};
use skills::Skills;
use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

const STATE: &str = "state.safetensors";
const CONFIG: &str = "config.toml";
const WEIGHTS: &str = "weights.";
/// Examples that a backbone's condition is calibrated on, and the step, beyond all others, that draws them.
const CALIBRATED: usize = 64;
const CALIBRATION: u64 = 1 << 40;
/// Steps that are not timed: they load kernels and take memory.
const COLD: u64 = 3;

/// How far a run is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Mean loss since the last row of the log.
    pub loss: f64,
    /// Crops a second since the run was started or resumed.
    pub samples_per_second: f64,
}

/// A training run in a folder: `config.toml`, `state.safetensors` (everything that resuming needs), `log.csv`, `loss.svg` and, at
/// every checkpoint, `model/` with the averaged weights.
pub struct Run {
    kind: Kind,
    config: TrainConfig,
    data: Arc<EditData>,
    task: Task,
    optimizer: Optimizer,
    log: Log,
    out: PathBuf,
    /// The model that the run started from.
    parent: ModelInfo,
    /// What the model knows in the end.
    skills: Vec<SkillInfo>,
    /// What the run depends on beside its config, in words.
    given: String,
    data_share: f64,
    graphs: bool,
    replayed: u64,
    profile: Option<Profile>,
}

impl Run {
    /// As [`Run::start`] with the config in a file.
    ///
    /// # Errors
    /// As [`Run::start`] and [`TrainConfig::read`].
    pub fn open(
        kind: Kind,
        config: &Path,
        photos: &Path,
        out: &Path,
        resume: bool,
        device: Device,
    ) -> Result<Self> {
        Self::start(kind, TrainConfig::read(config)?, Some(photos), out, resume, device)
    }

    /// Starts a run in the folder `out`, or goes on with the one that is there: from its last checkpoint, or from the start where
    /// it was stopped before the first. It trains on `device`, in bf16 with weights in f32 where that is a CUDA device; a run may be
    /// resumed on another. Photos are needed for skills of the table.
    ///
    /// # Errors
    /// Photos, pairs, a config or a model to start from that can't be used; a folder that holds a run already, when it is not to be
    /// resumed; one that holds none or another run's, when it is.
    pub fn start(
        kind: Kind,
        config: TrainConfig,
        photos: Option<&Path>,
        out: &Path,
        resume: bool,
        device: Device,
    ) -> Result<Self> {
        let state = out.join(STATE);
        if !resume && state.exists() {
            bail!("{}: there is a run already; --resume goes on with it", state.display());
        }
        let known = out.join(CONFIG);
        if resume && !known.exists() {
            bail!("{}: no such file; there is no run to resume", known.display());
        }
        if resume && !state.exists() && TrainConfig::read(&known)? != config {
            bail!("{}: the run was started with another config", known.display());
        }
        let task = Task::new(kind, &config)?;
        let parent = match &config.start_from {
            Some(name) => ModelInfo::named(name)?,
            None => ModelInfo::default(),
        };
        let photos = photos.map(PhotoSet::open).transpose()?.unwrap_or_default();
        let taught = Skills::open(&config, &parent)?;
        let known = match config.extension {
            // What the parent knows, and which of its generators, decides what is rehearsed and how the model is put together.
            Some(_) => format!(", knowing {}", serde_json::to_string(&parent.skills)?),
            None => String::new(),
        };
        let (pairs, start) = (taught.pairs(), task.fingerprint()?);
        let given = format!("photos {:?}{pairs}, start {start}{known}", photos.names);
        let task = task.to(device, Dtype::Bf16)?;
        let optimizer = optimizer(&task, &config)?;
        let text = TextEncoder::bundled(task.text_len())?;
        let skills = taught.info(&parent, task.number());
        let data = Arc::new(taught.data(photos, text, config.seed)?);
        std::fs::create_dir_all(out).map_err(|e| hywu_core::Error::io(out, e))?;
        hywu_core::remove_leftovers(out)?;
        let log = Log::new(out);
        let to = out.to_owned();
        let mut run = Self {
            kind,
            config,
            data,
            task,
            optimizer,
            log,
            out: to,
            parent,
            skills,
            given,
            data_share: 0.0,
            graphs: false,
            replayed: 0,
            profile: None,
        };
        if state.exists() {
            run.restore(&state)?;
        } else {
            run.log.truncate(0)?;
            let text = toml::to_string(&run.config)?;
            hywu_core::write_atomic(out.join(CONFIG), |w| w.write_all(text.as_bytes()))?;
        }
        Ok(run)
    }

    /// Was a run started in this folder?
    pub fn is_in(folder: &Path) -> bool {
        folder.join(CONFIG).exists()
    }

    /// The weights that are trained, as they stand.
    pub fn task(&self) -> &Task {
        &self.task
    }

    /// Launches a step as a whole where the device can ([`Device::replay`]); the numbers are those of our own kernels then, without
    /// cuBLASLt.
    pub fn use_graphs(&mut self, on: bool) {
        self.graphs = on;
    }

    /// Times what a device does in every step but the first few.
    ///
    /// # Errors
    /// On the CPU there is nothing to time.
    pub fn use_profile(&mut self) -> Result<()> {
        let profile = self.task.params().device().profile()?;
        self.profile = Some(profile.context("a profile is of a CUDA device; this run is on the CPU")?);
        Ok(())
    }

    /// What was timed, if anything.
    pub fn profile(&self) -> Option<&Profile> {
        self.profile.as_ref()
    }

    /// Steps since the run was started or resumed that were launched as a whole.
    pub fn replayed(&self) -> u64 {
        self.replayed
    }

    /// The share of the time since the run was started or resumed that steps waited for their data.
    pub fn data_share(&self) -> f64 {
        self.data_share
    }

    /// Steps until the end. After every step `progress` may stop the run, which then leaves a checkpoint.
    ///
    /// # Errors
    /// A gradient that is not finite, a disk that is full; [`Error::Interrupted`] when `progress` says so.
    pub fn train(&mut self, progress: &mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<()> {
        let (first, steps) = (self.optimizer.adamw.step, self.config.steps);
        let mut samples = 0;
        if first == 0 {
            let mut before = |_: u64, loss: f32| {
                progress(Progress { step: 0, steps, loss: loss.into(), samples_per_second: 0.0 })
            };
            self.task.prepare(self.kind, &self.config, &mut before)?;
            self.optimizer = optimizer(&self.task, &self.config)?;
        }
        let device = self.task.params().device();
        let ahead = match device {
            Device::Cpu => None,
            // A graph is of one thread's work: what others send in between would break it up.
            _ if self.graphs => Some(Device::Cpu),
            _ => Some(device),
        };
        // One for each shape of a batch; the shapes take turns.
        let mut replays: Vec<(BatchShape, Replay)> = Vec::new();
        let mut batches =
            Batches::new(&self.data, &self.config.data, self.optimizer.adamw.step..steps, ahead)?;
        let start = Instant::now();
        while self.optimizer.adamw.step < steps {
            let step = self.optimizer.adamw.step;
            let shape = self.config.data.shape(step);
            let batch = batches.next(step)?;
            let (task, optimizer) = (&mut self.task, &mut self.optimizer);
            // The batches of an extension pass through the host, which no graph can.
            let graphs = self.graphs && self.config.extension.is_none();
            let mut work = || {
                if graphs {
                    let at = replays.iter().position(|(of, _)| *of == shape).unwrap_or_else(|| {
                        replays.push((shape, device.replay()));
                        replays.len() - 1
                    });
                    replays[at].1.run(|| task.step(&batch, optimizer))
                } else {
                    task.step(&batch, optimizer)
                }
            };
            let stats = match &mut self.profile {
                Some(profile) if step >= first + COLD => profile.run(work)?,
                _ => work()?,
            };
            self.replayed = replays.iter().map(|(_, replay)| replay.replayed()).sum();
            // A crop counts by its area, in crops of the config's size.
            samples += shape.instances * shape.crops * (shape.crop * shape.crop)
                / (self.config.data.crop * self.config.data.crop);
            let rate = samples as f64 / start.elapsed().as_secs_f64();
            self.data_share = batches.waited().as_secs_f64() / start.elapsed().as_secs_f64();
            let done = step + 1;
            self.log.window.add(&stats);
            let mean = self.log.window.loss();
            if done.is_multiple_of(self.config.log_every) || done == steps {
                self.log.row(done, &stats.step, rate)?;
            }
            let stop =
                progress(Progress { step: done, steps, loss: mean, samples_per_second: rate }).is_break();
            if done.is_multiple_of(self.config.checkpoint_every) || done == steps || stop {
                self.checkpoint()?;
            }
            if stop && done < steps {
                return Err(Error::Interrupted.into());
            }
        }
        if first == steps {
            self.checkpoint()?;
        }
        Ok(())
    }

    fn checkpoint(&self) -> Result<()> {
        let step = self.optimizer.adamw.step;
        let mut writer = TensorWriter::new();
        self.task.params().store(&mut writer, WEIGHTS, Dtype::F32)?;
        self.optimizer.store(self.task.params(), &mut writer)?;
        writer.meta("kind", self.kind.name());
        writer.meta("config", toml::to_string(&self.config)?);
        writer.meta("given", &self.given);
        writer.meta("window", serde_json::to_string(&self.log.window)?);
        writer.write(self.out.join(STATE))?;
        let o = &self.config;
        let mut info = ModelInfo {
            name: o.name.clone(),
            licence: "MIT OR Apache-2.0".into(),
            data_sources: self.parent.data_sources.clone(),
            training: self.parent.training.clone(),
            skills: self.skills.clone(),
        };
        info.training.push(format!("{}: step {step} of {}, seed {}", self.kind.name(), o.steps, o.seed));
        for source in &o.data.sources {
            if !info.data_sources.contains(source) {
                info.data_sources.push(source.clone());
            }
        }
        let shape = BatchShape { instances: CALIBRATED, crops: 1, ..self.config.data.shape(0) };
        let examples = || self.data.batch(CALIBRATION, shape);
        let model = self.task.model(self.optimizer.averaged(self.task.params()), info, examples)?;
        model.save(self.out.join("model"), o.save_as.into())?;
        self.log.plot(self.kind.name())
    }

    fn restore(&mut self, state: &Path) -> Result<()> {
        let file = Checkpoint::open(state)?;
        let meta = |key: &str| {
            file.metadata()
                .get(key)
                .with_context(|| format!("{}: no `{key}`: not a training state", state.display()))
        };
        let kind = meta("kind")?;
        ensure!(
            kind == self.kind.name(),
            "{}: a run of `{kind}`, not `{}`",
            state.display(),
            self.kind.name()
        );
        let config = TrainConfig::parse(meta("config")?).with_context(|| state.display().to_string())?;
        ensure!(
            config == self.config,
            "{}: the run was started with another config; its own is {}",
            state.display(),
            self.out.join(CONFIG).display()
        );
        ensure!(
            *meta("given")? == self.given,
            "{}: the run was started with other photos or from another model: {}",
            state.display(),
            meta("given")?
        );
        let window: Window =
            serde_json::from_str(meta("window")?).with_context(|| state.display().to_string())?;
        self.task.params_mut().load(&file, WEIGHTS)?;
        self.optimizer.load(self.task.params(), &file)?;
        self.log.window = window;
        self.log.truncate(self.optimizer.adamw.step)
    }
}

/// Fresh state for the weights of a task.
fn optimizer(task: &Task, config: &TrainConfig) -> Result<Optimizer> {
    let o = &config.optimizer;
    Ok(Optimizer::new(task.params(), config.schedule(), o.weight_decay, o.clip, o.ema)?)
}
