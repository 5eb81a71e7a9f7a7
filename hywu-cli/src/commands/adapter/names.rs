use anyhow::{Context, Result};
use clap::Args;
use hywu_core::{
    adapter::{ModuleMap, Names},
    read_text,
};
use std::path::PathBuf;

/// Longest module map, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// What modules are called elsewhere.
#[derive(Args, Debug)]
pub struct NameArgs {
    /// Modules there: as the backbone has them (qkv_proj, gate_and_up_proj), or one for each projection (q_proj, k_proj, v_proj, ..)
    #[arg(long, value_enum, default_value = "fused")]
    layout: LayoutArg,
    /// With `--layout split`: rows of q, k and v in one group of qkv_proj, e.g. 512,128,128 for 4 heads of 128 channels to a key/value
    /// head, or the rows of all q, all k and all v
    #[arg(long, value_name = "Q,K,V", value_parser = qkv_rows)]
    qkv_rows: Option<[usize; 3]>,
    /// Rules for names: TOML with a [[module]] for each, with ours = ".." and theirs = "..", {layer} for a number, a list where one
    /// side is fused from parts, and rows = [..] of each part in a group
    #[arg(long, value_name = "MAP.toml")]
    module_map: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum LayoutArg {
    /// The backbone's modules
    Fused,
    /// A module for each projection
    Split,
}

impl NameArgs {
    pub fn names(&self) -> Result<Names> {
        let map = match &self.module_map {
            Some(file) => {
                let text = read_text(file, MAX_BYTES)?;
                toml::from_str(&text).with_context(|| format!("{}: not a module map", file.display()))?
            }
            None => ModuleMap::default(),
        };
        Ok(match self.layout {
            LayoutArg::Fused => Names::fused(&map)?,
            LayoutArg::Split => Names::split(&map, self.qkv_rows)?,
        })
    }
}

fn qkv_rows(text: &str) -> Result<[usize; 3], String> {
    let rows: Vec<usize> = text.split(',').filter_map(|n| n.trim().parse().ok()).collect();
    let three = <[usize; 3]>::try_from(rows).ok().filter(|_| text.split(',').count() == 3);
    three.ok_or_else(|| "three whole numbers are expected, e.g. 512,128,128".into())
}
