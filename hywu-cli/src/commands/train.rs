use crate::{interrupt, progress::Parts};
use anyhow::{Context, Result, ensure};
use clap::Args;
use hywu::train::{ExtensionConfig, Kind, Progress, Run, SkillConfig, TrainConfig};
use hywu_kernels::Device;
use std::{ops::ControlFlow, path::PathBuf};

/// Train a backbone, a generator, one shared LoRA, or everything
#[derive(Args, Debug)]
pub struct TrainArgs {
    /// What to train
    #[arg(value_enum)]
    kind: KindArg,
    /// The run's settings (TOML; see assets/configs); with --extend there are some in the binary
    #[arg(long, value_name = "FILE", required_unless_present = "extend")]
    config: Option<PathBuf>,
    /// Folder of photographs (scripts/fetch_photos.sh makes one); not needed for skills that bring pairs
    #[arg(long, value_name = "DIR", required_unless_present_any = ["pairs", "skills"])]
    photos: Option<PathBuf>,
    /// For generator: a model (`bundled`, or a model folder) that learns more, and keeps what it knows
    #[arg(long, value_name = "bundled|DIR")]
    extend: Option<PathBuf>,
    /// Skills of your own (TOML: `[[skill]]` with name, pairs = DIR, instructions = [..])
    #[arg(long, value_name = "FILE")]
    skills: Option<PathBuf>,
    /// A skill of your own: folder of pictures before and after the edit, NAME-before.jpg and NAME-after.jpg, or before/NAME.jpg and
    /// after/NAME.jpg; it is called as the folder
    #[arg(long, value_name = "DIR", requires = "instruction")]
    pairs: Option<PathBuf>,
    /// A way to ask for the edit of --pairs; may be given several times
    #[arg(long, value_name = "TEXT", requires = "pairs")]
    instruction: Vec<String>,
    /// Folder of the run: state, log, loss plot and model
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Go on with the run in that folder
    #[arg(long)]
    resume: bool,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: Device,
    /// Time what a CUDA device does in a step, and print a table at the end; the steps take a little longer
    #[arg(long)]
    profile: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum KindArg {
    /// A backbone from nothing
    Backbone,
    /// A generator of adapters, through a frozen backbone
    Generator,
    /// One adapter for everything, on a frozen backbone
    Lora,
    /// All weights of a backbone, further
    Full,
}

/// Runs `hywu train`.
pub fn run(args: &TrainArgs) -> Result<()> {
    let kind = match args.kind {
        KindArg::Backbone => Kind::Backbone,
        KindArg::Generator => Kind::Generator,
        KindArg::Lora => Kind::Lora,
        KindArg::Full => Kind::Full,
    };
    interrupt::install()?;
    let config = config(kind, args)?;
    let mut run =
        Run::start(kind, config, args.photos.as_deref(), &args.out, args.resume, args.device.check()?)?;
    // Off until it has been measured on hardware.
    run.use_graphs(std::env::var_os("HYWU_CUDA_GRAPHS").is_some_and(|v| v == "1"));
    if args.profile {
        run.use_profile()?;
    }
    eprintln!("{}: {} parameters", kind.name(), run.task().params().numel());
    let parts = Parts::new();
    let result = run.train(&mut |Progress { step, steps, loss, samples_per_second }| {
        parts.at("training", &format!("loss {loss:.4}, {samples_per_second:.1} samples/s"), step, steps);
        if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    parts.finish();
    result?;
    let waited = 100.0 * run.data_share();
    eprintln!("done: {}; {waited:.1} % of the time waiting for data", args.out.join("model").display());
    if let Some(profile) = run.profile() {
        println!("{profile}");
    }
    Ok(())
}

/// The settings of the file or of the binary, with what the other arguments say.
fn config(kind: Kind, args: &TrainArgs) -> Result<TrainConfig> {
    let mut config = match &args.config {
        Some(file) => TrainConfig::read(file)?,
        None => TrainConfig::extend()?,
    };
    if let Some(model) = &args.extend {
        ensure!(
            kind == Kind::Generator,
            "--extend is for `train generator`, not for `train {}`",
            kind.name()
        );
        config.start_from = Some(model.clone());
        config.extension.get_or_insert(ExtensionConfig::default());
    }
    if let Some(file) = &args.skills {
        config.skill.extend(SkillConfig::read(file)?);
    }
    if let Some(pairs) = &args.pairs {
        let name = pairs.canonicalize().map_err(|e| hywu_core::Error::io(pairs, e))?;
        let name =
            name.file_name().context("--pairs is no folder with a name")?.to_string_lossy().into_owned();
        config.skill.push(SkillConfig { name, pairs: pairs.clone(), instructions: args.instruction.clone() });
    }
    ensure!(
        args.extend.is_none() || args.config.is_some() || !config.skill.is_empty(),
        "nothing to learn: --extend needs --skills, --pairs or --config"
    );
    Ok(config)
}
