use crate::output::say;
use anyhow::Result;
use clap::Args;
use hywu_core::{Checkpoint, Plain};
use std::path::PathBuf;

/// List the tensors of a checkpoint or adapter, with their norms
#[derive(Args, Debug)]
pub struct InspectArgs {
    /// A safetensors file, or a folder with one or with shards
    file: PathBuf,
    /// Print JSON on standard output
    #[arg(long)]
    json: bool,
}

/// What is told of a tensor.
struct Row {
    name: String,
    shape: Vec<usize>,
    dtype: String,
    norm: f64,
    rms: f64,
}

/// Runs `hywu inspect`.
pub fn run(args: &InspectArgs) -> Result<()> {
    let checkpoint = Checkpoint::open(&args.file)?;
    let mut rows = Vec::new();
    for name in checkpoint.names() {
        let (shape, dtype) = checkpoint.info(name)?;
        let data = checkpoint.read(name)?;
        let square: f64 = data.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let rms = (square / data.len().max(1) as f64).sqrt();
        rows.push(Row {
            name: name.to_owned(),
            shape,
            dtype: format!("{dtype:?}"),
            norm: square.sqrt(),
            rms,
        });
    }
    let layers = layers(&rows);
    let values: usize = rows.iter().map(|r| r.shape.iter().product::<usize>()).sum();
    if args.json {
        let tensors: Vec<_> = (rows.iter())
            .map(|r| serde_json::json!({"name": r.name, "shape": r.shape, "dtype": r.dtype, "norm": r.norm, "rms": r.rms}))
            .collect();
        let layers: Vec<_> =
            layers.iter().map(|(name, norm)| serde_json::json!({"layer": name, "norm": norm})).collect();
        let whole = serde_json::json!({
            "file": args.file.to_string_lossy(), "metadata": checkpoint.metadata(), "values": values, "tensors": tensors, "layers": layers,
        });
        return say(serde_json::to_string_pretty(&whole)?);
    }
    say(format_args!("{}: {} tensors, {values} values", args.file.display(), rows.len()))?;
    for (key, value) in checkpoint.metadata() {
        say(format_args!("  {}: {}", Plain(key), Plain(value)))?;
    }
    let width = rows.iter().map(|r| r.name.len()).max().unwrap_or(0);
    say(format_args!(
        "\n{:width$}  {:>18}  {:>5}  {:>12}  {:>10}",
        "tensor", "shape", "dtype", "norm", "rms"
    ))?;
    for r in &rows {
        let shape = format!("{:?}", r.shape);
        say(format_args!("{:width$}  {shape:>18}  {:>5}  {:12.5}  {:10.6}", r.name, r.dtype, r.norm, r.rms))?;
    }
    if !layers.is_empty() {
        say(format_args!("\n{:width$}  {:>12}", "layer", "norm"))?;
        for (name, norm) in layers {
            say(format_args!("{name:width$}  {norm:12.5}"))?;
        }
    }
    Ok(())
}

/// Norms by layer: names up to and including their first all-digit part, in numeric order.
fn layers(rows: &[Row]) -> Vec<(String, f64)> {
    let mut sums = std::collections::BTreeMap::<(String, u64), f64>::new();
    for row in rows {
        let parts: Vec<&str> = row.name.split('.').collect();
        let number = parts.iter().enumerate().find_map(|(i, p)| p.parse::<u64>().ok().map(|n| (i, n)));
        if let Some((i, n)) = number {
            *sums.entry((parts[..i].join("."), n)).or_default() += row.norm * row.norm;
        }
    }
    sums.into_iter().map(|((prefix, n), square)| (format!("{prefix}.{n}"), square.sqrt())).collect()
}
