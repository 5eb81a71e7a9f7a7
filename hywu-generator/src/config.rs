use hywu_core::{AdapterSpec, Error, ParameterKind, Result, check_range, parse_json, read_small};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::Path;

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

/// Widest token, transformer and condition.
const MAX_WIDTH: usize = 1 << 16;
const MAX_BLOCKS: usize = 256;
/// The widest heads that attention takes.
const MAX_HEAD: usize = 256;
/// Most positions N * S (published: 176,512): the rotary tables hold a position as f32, exact up to here.
const MAX_POSITIONS: u64 = 1 << 24;
/// Most scalars N * T * r * t that are generated for an instance (published: 0.72 G).
const MAX_GENERATED: u64 = 1 << 32;
/// Most weights (published: 8.1 G).
const MAX_WEIGHTS: u64 = 1 << 36;

/// Derived sizes.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    /// Tokens of a layer: of lora_A, of both.
    pub a: usize,
    pub t: usize,
    /// Positions of a token, of a layer.
    pub w: usize,
    pub s: usize,
    /// Channels of a rank row.
    pub c: usize,
}

impl GeneratorConfig {
    /// Longest `config.json`, in bytes.
    pub const MAX_BYTES: u64 = 1 << 20;

    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// A file that can't be read or is longer than [`GeneratorConfig::MAX_BYTES`]; what [`GeneratorConfig::from_json`] finds, with its name.
    pub fn read(file: impl AsRef<Path>) -> Result<Self> {
        let text = read_small(&file, Self::MAX_BYTES)?;
        Self::from_json(&text).map_err(|e| Error::checkpoint(&file, e.to_string()))
    }

    /// Parses and checks a `config.json`; the order of `pg_mapping` is kept.
    ///
    /// # Errors
    /// [`Error::Config`] that names the key, its value and its range, or the key that is there twice.
    pub fn from_json(text: &[u8]) -> Result<Self> {
        let config: Self = parse_json(text).map_err(|e| Error::Config(format!("config.json: {e}")))?;
        config.weights()?;
        Ok(config)
    }

    /// The map of a config without one.
    pub(crate) fn default_mapping() -> Map<String, Value> {
        // A constant, which the tests of the published config read.
        serde_json::from_str(DEFAULT_MAPPING).unwrap_or_default()
    }

    /// Checks every number and expands the map.
    ///
    /// # Errors
    /// [`Error::Config`] that names the key, its value and its range.
    pub fn spec(&self) -> Result<AdapterSpec> {
        Ok(self.sizes()?.0)
    }

    pub(crate) fn sizes(&self) -> Result<(AdapterSpec, Shape)> {
        let bad = |what: String| Err(Error::Config(what));
        for (key, value, max) in [
            ("num_base_model_layers", self.num_base_model_layers, AdapterSpec::MAX_LAYERS),
            ("rank", self.rank, AdapterSpec::MAX_RANK),
            ("token_dim", self.token_dim, MAX_WIDTH),
            ("output_dim", self.output_dim, MAX_WIDTH),
            ("dim_accumulation", self.dim_accumulation, AdapterSpec::MAX_RANK),
            ("d_model", self.d_model, MAX_WIDTH),
            ("head_dim", self.head_dim, MAX_HEAD),
            ("num_pg_layers", self.num_pg_layers, MAX_BLOCKS),
            ("input_dim", self.input_dim, MAX_WIDTH),
        ] {
            check_range(key, value, 1..=max)?;
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
        let mapping = self.pg_mapping.clone().unwrap_or_else(Self::default_mapping);
        let spec =
            AdapterSpec::from_mapping(&self.prefix, self.num_base_model_layers, r, self.alpha, &mapping)?;
        let shape = self.shape(&spec)?;
        Ok((spec, shape))
    }

    /// Every key and the map lie in their ranges here.
    fn shape(&self, spec: &AdapterSpec) -> Result<Shape> {
        let (n, r, acc, width) =
            (self.num_base_model_layers, self.rank, self.dim_accumulation, self.token_dim);
        let (area, parameters) = (r * width, spec.parameters());
        let tokens = |kind| -> u64 {
            parameters.iter().filter(|p| p.kind == kind).map(|p| p.tokens(area) as u64).sum()
        };
        let a = tokens(ParameterKind::LoraA);
        let t = a + tokens(ParameterKind::LoraB);
        let w = r / acc;
        let field =
            format!("positions (num_base_model_layers {n} x {t} tokens x rank {r} / dim_accumulation {acc})");
        check_range(field, product([n as u64, t, w as u64]), 1..=MAX_POSITIONS)?;
        let field = format!(
            "generated numbers (num_base_model_layers {n} x {t} tokens x rank {r} x token_dim {width})"
        );
        check_range(field, product([n as u64, t, area as u64]), 1..=MAX_GENERATED)?;
        let (a, t) = (a as usize, t as usize);
        Ok(Shape { a, t, w, s: t * w, c: self.d_model / acc })
    }

    /// Batch and length of a condition of this shape.
    pub(crate) fn batch_and_length(&self, condition: &[usize]) -> crate::Result<(usize, usize)> {
        match *condition {
            [b, 1, l, i] | [b, l, i] if i == self.input_dim && b > 0 && l > 0 => Ok((b, l)),
            _ => {
                let expected = format!("[batch, 1, length, {0}] or [batch, length, {0}]", self.input_dim);
                let what = format!("shape {condition:?}, expected {expected}");
                Err(crate::Error::Condition(what))
            }
        }
    }

    /// Names and shapes of the weights (FORMAT.md section 2).
    ///
    /// # Errors
    /// [`Error::Config`] that names the key, its value and its range.
    pub fn weights(&self) -> Result<Vec<(String, Vec<usize>)>> {
        let (_, Shape { t, c, .. }) = self.sizes()?;
        let (d, p) = (self.d_model, self.output_dim);
        let mut weights = Vec::new();
        let mut put = |name: String, shape: &[usize]| weights.push((name, shape.to_vec()));
        let mut matrix = |name: &str, out: usize, inner: usize| {
            put(format!("{name}.weight"), &[out, inner]);
            put(format!("{name}.bias"), &[out]);
        };
        matrix("hidden_in", d, self.input_dim);
        matrix("model.proj_out_A", p, c);
        matrix("model.proj_out_B", p, c);
        for i in 0..self.num_pg_layers {
            for kind in ["self_attn_n", "self_attn_hw", "self_attn_cross"] {
                for w in ["W_q", "W_k", "W_v", "W_o"] {
                    matrix(&format!("model.blocks.{i}.{kind}.{w}"), d, d);
                }
            }
            matrix(&format!("model.blocks.{i}.feed_forward.fc1"), 4 * d, d);
            matrix(&format!("model.blocks.{i}.feed_forward.fc2"), d, 4 * d);
        }
        put("model.hw_pos.weight".into(), &[t * self.rank, c]);
        put("model.layer_pos.weight".into(), &[self.num_base_model_layers, c]);
        let norms =
            (0..self.num_pg_layers).flat_map(|i| (1..=4).map(move |n| format!("model.blocks.{i}.norm{n}")));
        let outside = ["input", "tokens", "final"].map(|n| format!("model.norm_{n}"));
        for name in outside.into_iter().chain(norms) {
            put(format!("{name}.weight"), &[d]);
        }
        let numel = |shape: &[usize]| product(shape.iter().map(|&x| x as u64));
        let total = weights.iter().fold(0, |sum: u64, (_, shape)| sum.saturating_add(numel(shape)));
        let field = format!("weights (d_model {d}, num_pg_layers {})", self.num_pg_layers);
        check_range(field, total, 1..=MAX_WEIGHTS)?;
        Ok(weights)
    }
}

/// The largest u64 instead of an overflow.
pub(crate) fn product(factors: impl IntoIterator<Item = u64>) -> u64 {
    factors.into_iter().fold(1, u64::saturating_mul)
}
