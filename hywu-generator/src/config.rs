use hywu_core::{AdapterSpec, Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// `config.json` of a generator (FORMAT.md section 1); unknown keys are ignored, absent ones have the published defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GeneratorConfig {
    /// Layers N of the base model that get an adapter.
    pub num_base_model_layers: usize,
    /// Rank r, the height of a parameter token.
    pub rank: usize,
    /// LoRA alpha; the scale is alpha / rank.
    pub alpha: f32,
    /// Width t of a parameter token.
    pub token_dim: usize,
    /// Width of the generator's output rows; must equal `token_dim`.
    pub output_dim: usize,
    /// Rank rows that share one transformer position.
    pub dim_accumulation: usize,
    /// Transformer width d.
    pub d_model: usize,
    /// Head width.
    pub head_dim: usize,
    /// Transformer blocks K.
    pub num_pg_layers: usize,
    /// Width of the condition.
    pub input_dim: usize,
    /// Put before the layer index in the output's names.
    pub prefix: String,
    /// Which modules get an adapter, in order; absent or null means the published map.
    pub pg_mapping: Option<Map<String, Value>>,
}

impl Default for GeneratorConfig {
    fn default() -> Self {
        Self {
            num_base_model_layers: 32,
            rank: 16,
            alpha: 64.0,
            token_dim: 1024,
            output_dim: 1024,
            dim_accumulation: 4,
            d_model: 4096,
            head_dim: 128,
            num_pg_layers: 24,
            input_dim: 4096,
            prefix: "model.layers.".into(),
            pg_mapping: None,
        }
    }
}

/// The map of a config without one, in its own order.
const DEFAULT_MAPPING: &str = r#"{
"self_attn.qkv_proj": {"lora_A_dim": 4096, "lora_B_dim": 6144},
"self_attn.o_proj": {"lora_A_dim": 4096, "lora_B_dim": 4096},
"mlp.shared_mlp.gate_and_up_proj": {"lora_A_dim": 4096, "lora_B_dim": 6144},
"mlp.shared_mlp.down_proj": {"lora_A_dim": 3072, "lora_B_dim": 4096},
"mlp.experts": {"type": "grouped", "num_experts": 64, "sub_weights": {
  "w1": {"lora_A_dim": 4096, "lora_B_dim": 3072},
  "w2": {"lora_A_dim": 3072, "lora_B_dim": 4096},
  "w3": {"lora_A_dim": 4096, "lora_B_dim": 3072}}}}"#;

impl GeneratorConfig {
    /// Parses and checks a `config.json`; the order of `pg_mapping` is kept.
    ///
    /// # Errors
    /// [`Error::Config`] that names the key and its value.
    pub fn from_json(text: &[u8]) -> Result<Self> {
        let config: Self =
            serde_json::from_slice(text).map_err(|e| Error::Config(format!("config.json: {e}")))?;
        config.spec()?;
        Ok(config)
    }

    /// Checks every number and expands the map.
    ///
    /// # Errors
    /// [`Error::Config`] that names the key and its value.
    pub fn spec(&self) -> Result<AdapterSpec> {
        let bad = |what: String| Err(Error::Config(what));
        for (key, value) in [
            ("num_base_model_layers", self.num_base_model_layers),
            ("rank", self.rank),
            ("token_dim", self.token_dim),
            ("dim_accumulation", self.dim_accumulation),
            ("d_model", self.d_model),
            ("head_dim", self.head_dim),
            ("input_dim", self.input_dim),
        ] {
            if value == 0 {
                return bad(format!("{key} is 0; it must be at least 1"));
            }
        }
        let (r, a, d, hd) = (self.rank, self.dim_accumulation, self.d_model, self.head_dim);
        if self.output_dim != self.token_dim {
            return bad(format!("output_dim {} must equal token_dim {}", self.output_dim, self.token_dim));
        }
        if !r.is_multiple_of(a) || !d.is_multiple_of(a) {
            return bad(format!("dim_accumulation {a} must divide rank {r} and d_model {d}"));
        }
        if !d.is_multiple_of(hd) || !hd.is_multiple_of(4) {
            return bad(format!("head_dim {hd} must divide d_model {d} and be a multiple of 4"));
        }
        let default = || serde_json::from_str(DEFAULT_MAPPING).map_err(|e| Error::Config(e.to_string()));
        let mapping = self.pg_mapping.clone().map_or_else(default, Ok)?;
        AdapterSpec::from_mapping(&self.prefix, self.num_base_model_layers, r, self.alpha, &mapping)
    }
}
