use crate::Result;
use serde::{Deserialize, Serialize};

/// Which modules of a backbone get a low-rank update: the ordered `pg_mapping` of a generator's `config.json`,
/// expanded. Order is meaning: it decides which parameter token writes what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterSpec {
    /// Put before the layer index in tensor names, e.g. `model.layers.`.
    pub prefix: String,
    /// Number of backbone layers.
    pub layers: usize,
    /// Rank r >= 1.
    pub rank: usize,
    /// LoRA alpha; the scale is alpha / rank.
    pub alpha: f32,
    /// The expanded modules of one layer, in order.
    pub modules: Vec<Module>,
}

/// One module with a low-rank update.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Module {
    /// Path below the layer, e.g. `self_attn.qkv_proj` or `mlp.experts.w1`.
    pub path: String,
    /// Input width: lora_a is [r, in_dim].
    pub in_dim: usize,
    /// Output width: lora_b is [out_dim, r].
    pub out_dim: usize,
    /// Number of experts of a grouped module; lora_a is then [experts, r, in_dim].
    pub experts: Option<usize>,
}

/// lora_A or lora_B.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParameterKind {
    /// The down projection.
    LoraA,
    /// The up projection.
    LoraB,
}

/// One generated parameter of a layer, in token order (all lora_A, then all lora_B).
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Index into [`AdapterSpec::modules`].
    pub module: usize,
    /// lora_A or lora_B.
    pub kind: ParameterKind,
    /// Shape without batch: [r, in], [out, r], [E, r, in] or [E, out, r].
    pub shape: Vec<usize>,
}

impl AdapterSpec {
    /// alpha / rank.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }
    /// Reads an ordered `pg_mapping` object (FORMAT.md section 1); JSON order is kept.
    ///
    /// # Errors
    /// Zero rank, zero widths, unknown entry types, duplicate paths.
    pub fn from_mapping(
        prefix: &str,
        layers: usize,
        rank: usize,
        alpha: f32,
        mapping: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<Self> {
        let _ = (prefix, layers, rank, alpha, mapping);
        todo!()
    }
    /// Checks every number; called by the readers.
    pub fn validate(&self) -> Result<()> {
        todo!()
    }
    /// The parameters of one layer in token order (FORMAT.md section 3, with its substring rule).
    pub fn parameters(&self) -> Vec<Parameter> {
        todo!()
    }
    /// `{prefix}{layer}.{path}`.
    pub fn module_name(&self, layer: usize, module: usize) -> String {
        format!("{}{layer}.{}", self.prefix, self.modules[module].path)
    }
    /// Every module name, layer-major.
    pub fn module_names(&self) -> impl Iterator<Item = String> + '_ {
        (0..self.layers).flat_map(move |n| (0..self.modules.len()).map(move |m| self.module_name(n, m)))
    }
}
