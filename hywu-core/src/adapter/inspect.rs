//! What an adapter consists of.

use super::{
    Adapter,
    low_rank::{Sum, effective_rank},
};
use crate::{Error, Result};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::BTreeMap;

/// One instance of an adapter.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InstanceReport {
    /// Frobenius norm of the whole update: the root of the sum of the squares below.
    pub norm: f64,
    /// By name, numbers in names by value.
    pub modules: Vec<ModuleReport>,
    /// Layers: names up to and including their first number. Modules without a number are in none.
    pub layers: Vec<LayerReport>,
}

/// One module of an instance.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModuleReport {
    /// Its name.
    pub name: String,
    /// Number of experts of a grouped module.
    pub experts: Option<usize>,
    /// Rank r of the tensors.
    pub rank: usize,
    /// Input width.
    pub in_dim: usize,
    /// Output width.
    pub out_dim: usize,
    /// Frobenius norm of scale B A, over all experts.
    pub norm: f64,
    /// exp of the entropy of the singular values of B A as shares of their sum (Roy and Vetterli 2007): 0..=r; for a grouped module
    /// the mean over its experts.
    pub effective_rank: f64,
}

/// All modules of a layer together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerReport {
    /// Its name, e.g. `model.layers.3`.
    pub layer: String,
    /// Frobenius norm.
    pub norm: f64,
}

/// A report for each instance.
///
/// # Errors
/// Those of [`Adapter::check_pairs`].
pub fn inspect(adapter: &Adapter) -> Result<Vec<InstanceReport>> {
    adapter.check_pairs()?;
    (0..adapter.batch()).map(|instance| report(adapter, instance)).collect()
}

fn report(adapter: &Adapter, instance: usize) -> Result<InstanceReport> {
    let mut names: Vec<&String> = adapter.modules.keys().collect();
    names.sort_by_cached_key(|name| natural(name));
    let module = |name: &&String| -> Result<ModuleReport> {
        let lora = &adapter.modules[*name];
        let pairs = lora.matrices(instance);
        let first = pairs.first().ok_or_else(|| Error::Adapter(format!("`{name}` has no expert")))?;
        let (mut square, mut ranks) = (0.0, 0.0);
        for pair in &pairs {
            let values = Sum::new(&[(f64::from(adapter.scale), *pair)]).singular_values()?;
            square += values.iter().map(|s| s * s).sum::<f64>();
            ranks += effective_rank(&values);
        }
        Ok(ModuleReport {
            name: (*name).clone(),
            experts: lora.experts(),
            rank: first.a.nrows(),
            in_dim: first.a.ncols(),
            out_dim: first.b.nrows(),
            norm: square.sqrt(),
            effective_rank: ranks / pairs.len() as f64,
        })
    };
    let modules = names.par_iter().map(module).collect::<Result<Vec<_>>>()?;
    let mut layers = BTreeMap::<Vec<Part>, (String, f64)>::new();
    for module in &modules {
        if let Some(layer) = layer(&module.name) {
            let entry = layers.entry(natural(layer)).or_insert_with(|| (layer.to_owned(), 0.0));
            entry.1 += module.norm * module.norm;
        }
    }
    let layers = layers.into_values().map(|(layer, square)| LayerReport { layer, norm: square.sqrt() });
    let norm = modules.iter().map(|m| m.norm * m.norm).sum::<f64>().sqrt();
    Ok(InstanceReport { norm, layers: layers.collect(), modules })
}

/// The name up to and including its first all-digit part.
fn layer(name: &str) -> Option<&str> {
    let mut end = 0;
    for part in name.split('.') {
        end += part.len();
        if !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()) {
            return name.get(..end);
        }
        end += 1;
    }
    None
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Number(u64),
    Text(String),
}

/// Sorts `layers.2` before `layers.10`.
fn natural(name: &str) -> Vec<Part> {
    let part = |p: &str| p.parse().map_or_else(|_| Part::Text(p.to_owned()), Part::Number);
    name.split('.').map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_end_at_the_first_number() {
        assert_eq!(layer("model.layers.12.mlp.experts.3.w1"), Some("model.layers.12"));
        assert_eq!(layer("3.q"), Some("3"));
        assert_eq!(layer("head.w1"), None);
        assert_eq!(layer("a..1"), Some("a..1"));
        assert!(natural("l.2.q") < natural("l.10.q"));
    }
}
