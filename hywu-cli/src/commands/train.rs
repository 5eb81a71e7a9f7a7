use crate::interrupt;
use anyhow::Result;
use clap::Args;
use hywu::train::{Kind, Progress, Run};
use hywu_kernels::Device;
use indicatif::{ProgressBar, ProgressStyle};
use std::{io::IsTerminal, ops::ControlFlow, path::PathBuf};

/// Train a backbone, a generator, one shared LoRA, or everything
#[derive(Args, Debug)]
pub struct TrainArgs {
    /// What to train
    #[arg(value_enum)]
    kind: KindArg,
    /// The run's settings (TOML; see assets/configs)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Folder of photographs (scripts/fetch_photos.sh makes one)
    #[arg(long, value_name = "DIR")]
    photos: PathBuf,
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
    let mut run = Run::open(kind, &args.config, &args.photos, &args.out, args.resume, args.device.check()?)?;
    // Off until it has been measured on hardware.
    run.use_graphs(std::env::var_os("HYWU_CUDA_GRAPHS").is_some_and(|v| v == "1"));
    if args.profile {
        run.use_profile()?;
    }
    eprintln!("{}: {} parameters", kind.name(), run.task().params().numel());
    let bar = if std::io::stderr().is_terminal() {
        let style = ProgressStyle::with_template("[{bar:30}] step {pos}/{len}, {msg}, {eta} left")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        ProgressBar::new(1).with_style(style)
    } else {
        ProgressBar::hidden()
    };
    let result = run.train(&mut |Progress { step, steps, loss, samples_per_second }| {
        bar.set_length(steps);
        bar.set_position(step);
        bar.set_message(format!("loss {loss:.4}, {samples_per_second:.1} samples/s"));
        if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    result?;
    let waited = 100.0 * run.data_share();
    eprintln!("done: {}; {waited:.1} % of the time waiting for data", args.out.join("model").display());
    if let Some(profile) = run.profile() {
        println!("{profile}");
    }
    Ok(())
}
