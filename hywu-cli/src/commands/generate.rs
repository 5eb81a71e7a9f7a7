use crate::{
    interrupt,
    progress::{self, Watch},
    values,
};
use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, ValueEnum};
use hywu::{
    hash::{of_checkpoint, of_condition},
    provenance,
};
use hywu_core::{Checkpoint, Dtype};
use hywu_generator::{
    Error, GeneratorConfig, Inference, Limits, Progress, RandomCheckpoint, Size, write_random_checkpoint,
};
use hywu_kernels::{Device, Tensor};
use std::{ops::ControlFlow, path::Path, path::PathBuf};

/// Run a parameter generator checkpoint on a condition and write the adapter
///
/// Or write a random checkpoint, with --random-checkpoint: size and speed can then be tried without trained weights.
#[derive(Args, Debug)]
pub struct GenerateArgs {
    /// Folder with config.json and model.safetensors (or shards and their index)
    #[arg(long, value_name = "DIR", required_unless_present = "random_checkpoint")]
    checkpoint: Option<PathBuf>,
    /// Safetensors file with the tensor `condition` (batch, 1, length, input_dim)
    #[arg(long, value_name = "FILE", required_unless_present = "random_checkpoint")]
    condition: Option<PathBuf>,
    /// The safetensors file to write; with --random-checkpoint the folder
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", conflicts_with = "random_checkpoint")]
    device: Device,
    /// Type of the values written, and of the arithmetic on a CUDA device (the CPU computes in f32). Default: f32 on the CPU, bf16 there
    #[arg(long, conflicts_with = "random_checkpoint")]
    dtype: Option<Type>,
    /// Most memory to take, e.g. 6GB or 512MiB; of the device's own on a CUDA device, where a checkpoint that
    /// does not fit is read while it is used
    #[arg(long, value_name = "BYTES", value_parser = values::bytes, conflicts_with = "random_checkpoint")]
    max_memory: Option<u64>,
    /// Write a checkpoint with random weights, and a condition: of a size (published, 1/4, 1/16, 1/64) or of a config.json
    #[arg(long, value_name = "SIZE|CONFIG", conflicts_with_all = ["checkpoint", "condition"])]
    random_checkpoint: Option<String>,
    /// Seed of the random weights
    #[arg(long, default_value_t = 0, requires = "random_checkpoint")]
    seed: u64,
    /// No messages but errors
    #[arg(long)]
    quiet: bool,
}

/// `--dtype`.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Type {
    F32,
    Bf16,
}

/// Largest shard of a random checkpoint.
const SHARD: u64 = 4_000_000_000;
/// Tokens of a random condition for a config of the user's own.
const CONDITION: usize = 1000;

/// Runs `hywu generate`.
pub fn run(args: &GenerateArgs) -> Result<()> {
    interrupt::install()?;
    match (&args.random_checkpoint, &args.checkpoint, &args.condition) {
        (Some(what), ..) => write_random(args, what),
        (None, Some(checkpoint), Some(condition)) => generate(args, checkpoint, condition),
        // clap asks for both.
        _ => bail!("--checkpoint and --condition are needed"),
    }
}

fn generate(args: &GenerateArgs, checkpoint: &Path, condition: &Path) -> Result<()> {
    args.device.check()?;
    // A mistyped folder should not cost a long run.
    let folder = args.output.parent().filter(|p| !p.as_os_str().is_empty());
    if let Some(folder) = folder.filter(|f| !f.is_dir()) {
        bail!("{}: the folder {} does not exist", args.output.display(), folder.display());
    }
    let file = Checkpoint::open(condition)?;
    let condition = file.read("condition").context("the condition file needs a tensor named `condition`")?;
    let condition_hash = of_condition(&condition);
    let condition = {
        // One copy is enough from here on.
        let array = condition;
        Tensor::from_array(&array)
    };
    let dtype = match (args.dtype, args.device) {
        (Some(Type::F32), _) | (None, Device::Cpu) => Dtype::F32,
        (Some(Type::Bf16), _) | (None, Device::Cuda(_)) => Dtype::Bf16,
    };
    let limits = Limits { memory: args.max_memory, rows: None };
    if let Some(most) = args.max_memory {
        args.device.limit_memory(usize::try_from(most).unwrap_or(usize::MAX))?;
    }
    let batch = condition.shape().first().copied().unwrap_or(1);
    let sizes = (batch, condition.dim_back(2));
    let open = || Inference::open(checkpoint, args.device, dtype, limits, sizes);
    let inference = match args.device {
        // Nothing is read yet.
        Device::Cpu => open(),
        Device::Cuda(_) => progress::waiting(args.quiet, "reading the weights", open),
    };
    let inference = inference.map_err(|e| match e {
        Error::Memory { least, .. } if args.max_memory.is_none() && args.device == Device::Cpu => {
            anyhow!("{e} of what the system has free; --max-memory {least} takes them all the same")
        }
        e => e.into(),
    })?;
    let metadata = provenance::of_generator(hash_of(checkpoint)?, condition_hash);
    let mut watch = Watch::new(args.quiet);
    let done =
        inference.generate_file(&condition, &args.output, dtype, &metadata, &mut |at| show(&mut watch, at));
    let taken = watch.finish();
    done?;
    if !args.quiet {
        let spec = inference.spec();
        let values: usize = spec.parameters().iter().map(|p| p.numel()).sum();
        eprintln!(
            "{}: {} modules, {} values, scale {}, {:.2} s",
            args.output.display(),
            spec.module_names().count(),
            batch * spec.layers * values,
            spec.scale(),
            taken.as_secs_f64()
        );
    }
    Ok(())
}

/// Of the config and all weights, which are read once more for it.
fn hash_of(folder: &Path) -> Result<String> {
    let config = serde_json::to_string(&GeneratorConfig::read(folder.join("config.json"))?)?;
    of_checkpoint(&config, &Checkpoint::open(folder)?, interrupt::requested)
}

fn write_random(args: &GenerateArgs, what: &str) -> Result<()> {
    let (config, condition) = match what.parse::<Size>() {
        Ok(size) => (GeneratorConfig::scaled(size), size.condition_length()),
        Err(e) if !Path::new(what).exists() => bail!("{e}, and there is no such file"),
        Err(_) => (GeneratorConfig::read(what)?, CONDITION),
    };
    let checkpoint = RandomCheckpoint { config: &config, seed: args.seed, condition, shard: SHARD };
    let mut watch = Watch::new(args.quiet);
    let done = write_random_checkpoint(&checkpoint, &args.output, &mut |at| show(&mut watch, at));
    let taken = watch.finish();
    done?;
    if !args.quiet {
        let weights: usize = config.weights()?.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        eprintln!(
            "{}: {weights} random weights, and a condition of {condition} tokens, {:.2} s",
            args.output.display(),
            taken.as_secs_f64()
        );
    }
    Ok(())
}

fn show(watch: &mut Watch, at: Progress) -> ControlFlow<()> {
    watch.at(at.done, at.total);
    if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}
