use super::instance;
use crate::output::say;
use anyhow::{Context, Result};
use clap::Args;
use hywu_core::{Adapter, adapter::compare};
use std::path::{Path, PathBuf};

/// Compare two adapters: cosine, norms and distance, as a whole and by module
#[derive(Args, Debug)]
pub struct DiffArgs {
    /// The first adapter
    a: PathBuf,
    /// The second
    b: PathBuf,
    /// Instance of the first, for a batch
    #[arg(long, value_name = "N")]
    instance_a: Option<usize>,
    /// Instance of the second
    #[arg(long, value_name = "N")]
    instance_b: Option<usize>,
    /// Print JSON on standard output
    #[arg(long)]
    json: bool,
}

/// Runs `hywu adapter diff`.
pub fn run(args: &DiffArgs) -> Result<()> {
    let side = |file: &Path, given| -> Result<_> {
        let adapter = Adapter::load(file)?;
        let i = instance(&adapter, given).with_context(|| file.display().to_string())?;
        Ok((adapter, i))
    };
    let ((a, i), (b, j)) = (side(&args.a, args.instance_a)?, side(&args.b, args.instance_b)?);
    let c = compare(&a, &b, (i, j))?;
    if args.json {
        return say(serde_json::to_string_pretty(&c)?);
    }
    let width = c.modules.iter().map(|m| m.name.len()).max().unwrap_or(0).max(6);
    say(format_args!(
        "{:width$}  {:>9}  {:>12}  {:>12}  {:>12}",
        "module", "cosine", "norm a", "norm b", "distance"
    ))?;
    let row = |name: &str, cosine: Option<f64>, a: f64, b: f64, distance: f64| {
        let cosine = cosine.map_or("-".to_owned(), |c| format!("{c:.6}"));
        say(format_args!("{name:width$}  {cosine:>9}  {a:12.5}  {b:12.5}  {distance:12.5}"))
    };
    for m in &c.modules {
        row(&m.name, m.cosine, m.norm_a, m.norm_b, m.distance)?;
    }
    row("all", c.cosine, c.norm_a, c.norm_b, c.distance)?;
    for (which, names) in [("first", &c.only_a), ("second", &c.only_b)] {
        for name in names {
            say(format_args!("only in the {which}: {name}"))?;
        }
    }
    Ok(())
}
