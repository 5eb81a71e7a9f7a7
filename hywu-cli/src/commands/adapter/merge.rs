use super::{instance, names::NameArgs};
use crate::{interrupt, values};
use anyhow::{Context, Result};
use clap::Args;
use hywu_core::{Adapter, adapter::merge};
use indicatif::{ProgressBar, ProgressStyle};
use std::{io::IsTerminal, ops::ControlFlow, path::PathBuf};

/// Write a checkpoint with an adapter merged into its weights; the original stays as it is
#[derive(Args, Debug)]
pub struct MergeArgs {
    /// The adapter
    file: PathBuf,
    /// A safetensors file, or a folder with model.safetensors or with shards and their index
    #[arg(long, value_name = "CHECKPOINT")]
    base: PathBuf,
    /// The new folder
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    #[command(flatten)]
    names: NameArgs,
    /// Factor on the adapter
    #[arg(long, default_value_t = 1.0, value_name = "F", allow_negative_numbers = true, value_parser = values::finite)]
    strength: f32,
    /// Which instance, for a batch
    #[arg(long, value_name = "N")]
    instance: Option<usize>,
    /// No progress, no messages but errors
    #[arg(long)]
    quiet: bool,
}

/// Runs `hywu adapter merge`.
pub fn run(args: &MergeArgs) -> Result<()> {
    interrupt::install()?;
    let adapter = Adapter::load(&args.file)?.scaled(args.strength)?;
    let instance = instance(&adapter, args.instance)?;
    let bar = if args.quiet || !std::io::stderr().is_terminal() {
        ProgressBar::hidden()
    } else {
        ProgressBar::new(1)
    };
    if let Ok(style) = ProgressStyle::with_template("[{bar:30}] {bytes}/{total_bytes}, {eta} left") {
        bar.set_style(style);
    }
    let report =
        merge(&adapter, instance, &args.names.names()?, &args.base, &args.output, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
            if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
    bar.finish_and_clear();
    let report = report.with_context(|| args.file.display().to_string())?;
    if !args.quiet {
        let (merged, copied, files) = (report.merged, report.copied, report.files);
        eprintln!("{}: {merged} tensors merged, {copied} copied, {files} files", args.output.display());
    }
    Ok(())
}
