//! `hywu adapter`: adapters as files.

mod combine;
mod compare;
mod formats;
mod merge;
mod names;
mod show;

use anyhow::Result;
use clap::{Args, Subcommand};
use hywu::provenance::{PROGRAM, PROGRAM_KEY};
use hywu_core::Adapter;

/// Look at adapters, compare and combine them, exchange them with other programs, merge them into checkpoints
#[derive(Args, Debug)]
pub struct AdapterArgs {
    #[command(subcommand)]
    command: AdapterCommand,
}

#[derive(Subcommand, Debug)]
enum AdapterCommand {
    Inspect(show::InspectArgs),
    Diff(compare::DiffArgs),
    Export(formats::ExportArgs),
    Import(formats::ImportArgs),
    Merge(merge::MergeArgs),
    Average(combine::AverageArgs),
    Scale(combine::ScaleArgs),
}

/// Runs `hywu adapter`.
pub fn run(args: &AdapterArgs) -> Result<()> {
    match &args.command {
        AdapterCommand::Inspect(args) => show::run(args),
        AdapterCommand::Diff(args) => compare::run(args),
        AdapterCommand::Export(args) => formats::export(args),
        AdapterCommand::Import(args) => formats::import(args),
        AdapterCommand::Merge(args) => merge::run(args),
        AdapterCommand::Average(args) => combine::average(args),
        AdapterCommand::Scale(args) => combine::scale(args),
    }
}

/// Which instance of an adapter is meant: the given one, or the only one.
fn instance(adapter: &Adapter, given: Option<usize>) -> Result<usize> {
    match (given, adapter.batch()) {
        (Some(i), _) => Ok(i),
        (None, 0 | 1) => Ok(0),
        (None, n) => {
            anyhow::bail!("the adapter holds {n} instances; choose one with --instance 0 to {}", n - 1)
        }
    }
}

/// Marks what this program has written.
fn sign(adapter: &mut Adapter) {
    adapter.metadata.insert(PROGRAM_KEY.into(), PROGRAM.into());
}
