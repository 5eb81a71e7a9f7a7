//! `LoraConfig` of PEFT: in `adapter_config.json`, and in the metadata of diffusers' files.

use super::Theirs;
use crate::{Error, Result};
use regex::{Regex, RegexBuilder};
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// Options under which an adapter is more than its pairs, or is not for a plain weight [out, in]. Each is refused unless it is absent,
/// null, false, empty or what is given here.
const REFUSED: [(&str, Option<&str>); 14] = [
    ("use_dora", None),
    ("bias", Some("none")),
    ("lora_bias", None),
    ("modules_to_save", None),
    ("layer_replication", None),
    ("fan_in_fan_out", None),
    ("trainable_token_indices", None),
    ("target_parameters", None),
    ("alora_invocation_tokens", None),
    ("use_qalora", None),
    ("use_bdlora", None),
    ("kasa_config", None),
    ("arrow_config", None),
    ("monteclora_config", None),
];

/// Initialisations that take something away from the base weights, so that the pair fits only a base changed in the same way.
const BASE_CHANGING: [&str; 5] = ["pissa", "olora", "loftq", "corda", "lora_ga"];

/// What decides the scale of each module.
#[derive(Deserialize)]
pub(super) struct LoraConfig {
    #[serde(default = "eight")]
    r: usize,
    #[serde(default = "eight_alpha")]
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    rank_pattern: Option<Map<String, Value>>,
    #[serde(default)]
    alpha_pattern: Option<Map<String, Value>>,
    #[serde(skip)]
    ranks: Patterns,
    #[serde(skip)]
    alphas: Patterns,
}

/// PEFT's own defaults.
fn eight() -> usize {
    8
}
fn eight_alpha() -> f64 {
    8.0
}

/// Most patterns of a config: one for each expert of a large model.
const MAX_PATTERNS: usize = 1 << 13;
/// Most bytes that a pattern may take compiled, many times what a module's name takes: `(a{999}){999}` has a few characters too.
const PATTERN_BYTES: usize = 1 << 17;

/// Regular expressions and their values, the first that fits counts.
type Patterns = Vec<(Regex, f64)>;

impl LoraConfig {
    /// Reads the fields that matter; what can't be honoured is refused by name.
    pub(super) fn parse(fields: &Map<String, Value>) -> Result<Self, String> {
        match fields.get("peft_type").and_then(Value::as_str) {
            Some("LORA") | None => {}
            Some(other) => return Err(format!("peft_type {other} is not supported, only LORA")),
        }
        for (field, harmless) in REFUSED {
            let empty = match fields.get(field) {
                None | Some(Value::Null | Value::Bool(false)) => true,
                Some(Value::String(text)) => text.is_empty() || Some(text.as_str()) == harmless,
                Some(Value::Array(all)) => all.is_empty(),
                Some(Value::Object(all)) => all.is_empty(),
                Some(_) => false,
            };
            if !empty {
                return Err(format!("{field} = {} is not supported", fields[field]));
            }
        }
        if let Some(init) = fields.get("init_lora_weights").and_then(Value::as_str)
            && BASE_CHANGING.iter().any(|name| init.starts_with(name))
        {
            return Err(format!(
                "init_lora_weights = \"{init}\" is not supported: it changes the base weights too; PEFT can convert such an adapter \
                 when it saves it"
            ));
        }
        let mut config: Self =
            serde_json::from_value(Value::Object(fields.clone())).map_err(|e| e.to_string())?;
        config.ranks = patterns("rank_pattern", config.rank_pattern.take())?;
        config.alphas = patterns("alpha_pattern", config.alpha_pattern.take())?;
        Ok(config)
    }

    /// alpha / r of a module, or alpha / sqrt(r) of a rank-stabilised one. `rank` is that of its tensors.
    pub(super) fn scale(&self, module: &str, rank: usize) -> Result<f64, String> {
        let of = |all: &Patterns, otherwise: f64| {
            all.iter().find(|(pattern, _)| pattern.is_match(module)).map_or(otherwise, |(_, value)| *value)
        };
        let said = of(&self.ranks, self.r as f64);
        if said != rank as f64 {
            return Err(format!("module `{module}` has rank {rank}, the config says {said}"));
        }
        let alpha = of(&self.alphas, self.lora_alpha);
        Ok(alpha / if self.use_rslora { said.sqrt() } else { said })
    }
}

/// PEFT looks for a pattern at the end of a module's name, behind a dot or at its start.
fn patterns(field: &str, all: Option<Map<String, Value>>) -> Result<Patterns, String> {
    let all = all.unwrap_or_default();
    if all.len() > MAX_PATTERNS {
        return Err(format!("{field} has {} patterns, at most {MAX_PATTERNS}", all.len()));
    }
    let one = |(pattern, value): (String, Value)| {
        let number =
            value.as_f64().ok_or_else(|| format!("{field}: `{pattern}` is {value}, not a number"))?;
        let regex = RegexBuilder::new(&format!("^(?:.*\\.)?(?:{pattern})$"))
            .size_limit(PATTERN_BYTES)
            .build()
            .map_err(|e| match e {
                regex::Error::CompiledTooBig(_) => format!("{field}: `{pattern}` is too large compiled"),
                _ => format!("{field}: `{pattern}` is not a supported regular expression"),
            })?;
        Ok((regex, number))
    };
    all.into_iter().map(one).collect()
}

/// The config of what is written.
pub(super) fn describe(theirs: &Theirs) -> Result<Map<String, Value>> {
    let mut ranks: Vec<usize> = theirs.pairs.values().map(|p| p.rank()).collect();
    ranks.sort_unstable();
    // The most frequent rank, the smallest of several.
    let runs = ranks.chunk_by(|x, y| x == y).map(|run| (run.len(), run[0]));
    let (_, rank) = runs.rev().max_by_key(|(n, _)| *n).unwrap_or((0, 0));
    let (mut rank_pattern, mut alpha_pattern) = (Map::new(), Map::new());
    for (name, pair) in theirs.pairs.iter().filter(|(_, p)| p.rank() != rank) {
        let pattern = format!("^{}", regex::escape(name));
        rank_pattern.insert(pattern.clone(), json!(pair.rank()));
        alpha_pattern.insert(pattern, number(theirs.alpha(pair.rank())));
    }
    let fields = json!({
        "peft_type": "LORA", "task_type": null, "base_model_name_or_path": null, "inference_mode": true,
        "r": rank, "lora_alpha": number(theirs.alpha(rank)), "lora_dropout": 0.0, "use_rslora": false, "use_dora": false,
        "bias": "none", "fan_in_fan_out": false, "init_lora_weights": true, "modules_to_save": null,
        "target_modules": theirs.pairs.keys().collect::<Vec<_>>(),
        "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
    });
    match fields {
        Value::Object(fields) => Ok(fields),
        _ => Err(Error::Adapter("the config is no object".into())),
    }
}

/// A whole number as such.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}
