use super::sign;
use crate::values;
use anyhow::{Result, bail};
use clap::Args;
use hywu::provenance::SCALED_BY;
use hywu_core::{Adapter, adapter::average as average_of};
use std::path::PathBuf;

/// Write the mean of several adapters: of their updates, which adds up their ranks
#[derive(Args, Debug)]
pub struct AverageArgs {
    /// The adapters
    #[arg(required = true, num_args = 1..)]
    files: Vec<PathBuf>,
    /// The safetensors file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// A weight for each, divided by their sum; equal ones if not given
    #[arg(long, value_name = "W,W,..", value_delimiter = ',', value_parser = values::finite)]
    weights: Vec<f32>,
    /// Cut every module to the nearest update of this rank
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u16).range(1..=1024))]
    rank: Option<u16>,
}

/// Runs `hywu adapter average`.
pub fn average(args: &AverageArgs) -> Result<()> {
    let n = args.files.len();
    let weights = if args.weights.is_empty() { vec![1.0; n] } else { args.weights.clone() };
    if weights.len() != n {
        bail!("--weights has {} numbers for {n} adapters", weights.len());
    }
    let adapters = args.files.iter().map(Adapter::load).collect::<Result<Vec<_>, _>>()?;
    let (mut adapter, lost) = average_of(&adapters, &weights, args.rank.map(usize::from))?;
    sign(&mut adapter);
    adapter.metadata.insert("average_of".into(), n.to_string());
    adapter.save(&args.output)?;
    if args.rank.is_some() {
        eprintln!("{}: left out {:.3} % of the norm", args.output.display(), lost * 100.0);
    }
    Ok(())
}

/// Write an adapter that is weaker or stronger
#[derive(Args, Debug)]
pub struct ScaleArgs {
    /// The adapter
    file: PathBuf,
    /// What its scale is multiplied by
    #[arg(long, value_name = "F", allow_negative_numbers = true, value_parser = values::finite)]
    by: f32,
    /// The safetensors file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

/// Runs `hywu adapter scale`.
pub fn scale(args: &ScaleArgs) -> Result<()> {
    let mut adapter = Adapter::load(&args.file)?.scaled(args.by)?;
    // The rest of the provenance is that of the original. Factors of several times stand one behind the other.
    let before = adapter.metadata.remove(SCALED_BY).map(|factor| factor + " * ");
    adapter.metadata.insert(SCALED_BY.into(), before.unwrap_or_default() + &args.by.to_string());
    Ok(adapter.save(&args.output)?)
}
