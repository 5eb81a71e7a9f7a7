use crate::output::say;
use anyhow::Result;
use clap::Args;
use hywu_core::{
    Adapter, Plain,
    adapter::{InstanceReport, inspect},
};
use std::path::PathBuf;

/// Show modules, ranks, norms, effective ranks, scale and provenance
#[derive(Args, Debug)]
pub struct InspectArgs {
    /// The adapter (safetensors)
    file: PathBuf,
    /// Print JSON on standard output
    #[arg(long)]
    json: bool,
}

/// Runs `hywu adapter inspect`.
pub fn run(args: &InspectArgs) -> Result<()> {
    let adapter = Adapter::load(&args.file)?;
    let instances = inspect(&adapter)?;
    let values: usize = adapter.modules.values().map(|m| m.lora_a.len() + m.lora_b.len()).sum();
    let file = args.file.to_string_lossy();
    if args.json {
        let whole = serde_json::json!({
            "file": file, "scale": adapter.scale, "values": values, "metadata": adapter.metadata, "instances": instances,
        });
        return say(serde_json::to_string_pretty(&whole)?);
    }
    say(format_args!("{file}: {} modules, {values} values, scale {}", adapter.modules.len(), adapter.scale))?;
    for (key, value) in &adapter.metadata {
        say(format_args!("  {}: {}", Plain(key), Plain(value)))?;
    }
    for (i, instance) in instances.iter().enumerate() {
        if instances.len() > 1 {
            say(format_args!("\ninstance {i}"))?;
        }
        table(instance)?;
    }
    Ok(())
}

fn table(instance: &InstanceReport) -> Result<()> {
    let width = instance.modules.iter().map(|m| m.name.len()).max().unwrap_or(0).max(6);
    say(format_args!(
        "\n{:width$}  {:>7}  {:>4}  {:>14}  {:>6}  {:>12}",
        "module", "experts", "rank", "in -> out", "eff.", "norm"
    ))?;
    for m in &instance.modules {
        let experts = m.experts.map_or("-".to_owned(), |e| e.to_string());
        let dims = format!("{} -> {}", m.in_dim, m.out_dim);
        say(format_args!(
            "{:width$}  {experts:>7}  {:>4}  {dims:>14}  {:6.2}  {:12.5}",
            m.name, m.rank, m.effective_rank, m.norm
        ))?;
    }
    say(format_args!("\n{:width$}  {:>12}", "layer", "norm"))?;
    for l in &instance.layers {
        say(format_args!("{:width$}  {:12.5}", l.layer, l.norm))?;
    }
    say(format_args!("{:width$}  {:12.5}", "all", instance.norm))
}
