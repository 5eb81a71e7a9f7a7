use anyhow::{Context, Result, bail};
use clap::Args;
use hywu_core::{Checkpoint, Dtype};
use hywu_generator::Generator;
use hywu_kernels::{Device, Tensor};
use std::{path::PathBuf, time::Instant};

/// Run a parameter generator checkpoint on a condition and write the adapter
#[derive(Args, Debug)]
pub struct GenerateArgs {
    /// Folder with config.json and model.safetensors (or shards and their index)
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// Safetensors file with the tensor `condition` (batch, 1, length, input_dim)
    #[arg(long, value_name = "FILE")]
    condition: PathBuf,
    /// The safetensors file to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: Device,
    /// No messages but errors
    #[arg(long)]
    quiet: bool,
}

/// Runs `hywu generate`.
pub fn run(args: &GenerateArgs) -> Result<()> {
    args.device.check()?;
    // A mistyped folder should not cost a long run.
    let folder = args.output.parent().filter(|p| !p.as_os_str().is_empty());
    if let Some(folder) = folder.filter(|f| !f.is_dir()) {
        bail!("{}: the folder {} does not exist", args.output.display(), folder.display());
    }
    let file = Checkpoint::open(&args.condition)?;
    let condition = file.read("condition").context("the condition file needs a tensor named `condition`")?;
    let generator = Generator::load(&args.checkpoint)?.to(args.device, Dtype::Bf16)?;
    let start = Instant::now();
    let mut adapter = generator.generate(&Tensor::from_array(&condition))?;
    adapter.metadata.insert("program".into(), format!("hywu {}", env!("CARGO_PKG_VERSION")));
    adapter.save(&args.output)?;
    if !args.quiet {
        let values: usize = adapter.modules.values().map(|m| m.lora_a.len() + m.lora_b.len()).sum();
        eprintln!(
            "{}: {} modules, {values} values, scale {}, {:.2} s",
            args.output.display(),
            adapter.modules.len(),
            adapter.scale,
            start.elapsed().as_secs_f64()
        );
    }
    Ok(())
}
