use super::{instance, names::NameArgs};
use crate::{interrupt, output::warn, values};
use anyhow::{Context, Result};
use clap::Args;
use hywu_core::{
    Adapter,
    adapter::{MergeOptions, merge},
};
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
    /// Merge what fits, though the adapter has modules that the checkpoint lacks, or leaves out some of its layers or experts
    #[arg(long)]
    allow_partial: bool,
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
    let names = args.names.names()?;
    let options = MergeOptions { names: &names, instance, partial: args.allow_partial };
    let report = merge(&adapter, &args.base, &args.output, &options, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    let report = report.with_context(|| args.file.display().to_string())?;
    if !args.quiet {
        if !report.coverage.is_complete() {
            warn(format_args!("{}: {}", args.file.display(), report.coverage));
        }
        let (merged, copied, files) = (report.merged, report.copied, report.files);
        eprintln!("{}: {merged} tensors merged, {copied} copied, {files} files", args.output.display());
    }
    Ok(())
}
