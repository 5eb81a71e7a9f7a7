use crate::{Error, Result, check_range};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

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

/// Widest input or output of a module.
const MAX_WIDTH: usize = 1 << 20;
const MAX_EXPERTS: usize = 4096;
const MAX_MODULES: usize = 1024;
const MAX_ALPHA: f32 = 65536.0;
/// Most scalars of one parameter; fits a usize of 32 bits.
const MAX_SCALARS: u64 = 1 << 31;
/// Longest prefix or module path, in bytes.
const MAX_NAME: usize = 256;

// All limits lie far above any published model. Below them no product of sizes overflows.
impl AdapterSpec {
    /// Most backbone layers.
    pub const MAX_LAYERS: usize = 1024;
    /// Largest rank.
    pub const MAX_RANK: usize = 1024;

    /// alpha / rank.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }

    /// Reads an ordered `pg_mapping` object (FORMAT.md section 1); JSON order is kept.
    ///
    /// # Errors
    /// [`crate::Error::Config`] for numbers out of range, unknown entry types, duplicate paths.
    pub fn from_mapping(
        prefix: &str,
        layers: usize,
        rank: usize,
        alpha: f32,
        mapping: &Map<String, Value>,
    ) -> Result<Self> {
        let mut modules = Vec::new();
        for (path, value) in mapping {
            let entry: Entry = serde_json::from_value(value.clone())
                .map_err(|e| Error::Config(format!("pg_mapping entry `{path}`: {e}")))?;
            match (entry.kind.as_deref(), entry.dims, entry.sub_weights) {
                (None, Dims { lora_a_dim: Some(in_dim), lora_b_dim: Some(out_dim) }, None) => {
                    modules.push(Module { path: path.clone(), in_dim, out_dim, experts: None });
                }
                (Some("grouped"), _, Some(subs)) => {
                    let experts = entry.num_experts.ok_or_else(|| {
                        Error::Config(format!("pg_mapping entry `{path}` needs `num_experts`"))
                    })?;
                    for (name, dims) in subs {
                        let dims: Dims = serde_json::from_value(Value::Object(dims))
                            .map_err(|e| Error::Config(format!("pg_mapping entry `{path}.{name}`: {e}")))?;
                        let (Some(in_dim), Some(out_dim)) = (dims.lora_a_dim, dims.lora_b_dim) else {
                            let what = format!(
                                "pg_mapping entry `{path}.{name}` needs `lora_A_dim` and `lora_B_dim`"
                            );
                            return Err(Error::Config(what));
                        };
                        let path = format!("{path}.{name}");
                        modules.push(Module { path, in_dim, out_dim, experts: Some(experts) });
                    }
                }
                _ => {
                    return Err(Error::Config(format!(
                        "pg_mapping entry `{path}` is neither plain (lora_A_dim, lora_B_dim) nor of type \"grouped\" with \
                         num_experts and sub_weights"
                    )));
                }
            }
        }
        let spec = Self { prefix: prefix.to_owned(), layers, rank, alpha, modules };
        spec.validate()?;
        Ok(spec)
    }

    /// Checks every number; called by the readers.
    ///
    /// # Errors
    /// [`crate::Error::Config`] that names the module, the value and its range.
    pub fn validate(&self) -> Result<()> {
        let bad = |what: String| Err(Error::Config(what));
        check_range("rank", self.rank, 1..=Self::MAX_RANK)?;
        check_range("number of layers", self.layers, 1..=Self::MAX_LAYERS)?;
        check_range("alpha", self.alpha, 0.0..=MAX_ALPHA)?;
        check_range("length of prefix", self.prefix.len(), 0..=MAX_NAME)?;
        if self.modules.is_empty() {
            return bad("pg_mapping names no module".into());
        }
        check_range("number of modules in pg_mapping", self.modules.len(), 1..=MAX_MODULES)?;
        for (i, m) in self.modules.iter().enumerate() {
            check_range("length of a module path", m.path.len(), 0..=MAX_NAME)?;
            if m.path.is_empty() || m.path.contains("lora_A") || m.path.contains("lora_B") {
                return bad(format!("module path `{}` is empty or holds lora_A or lora_B", m.path));
            }
            if self.modules[..i].iter().any(|o| o.path == m.path) {
                return bad(format!("module `{}` is listed twice", m.path));
            }
            let check =
                |field, value, max| check_range(format!("module `{}`: {field}", m.path), value, 1..=max);
            let experts = m.experts.unwrap_or(1);
            check("lora_A_dim", m.in_dim, MAX_WIDTH)?;
            check("lora_B_dim", m.out_dim, MAX_WIDTH)?;
            check("num_experts", experts, MAX_EXPERTS)?;
            let scalars = [experts, self.rank, m.in_dim.max(m.out_dim)].map(|x| x as u64).iter().product();
            let field = format!("module `{}`: num_experts x rank x lora_A_dim or lora_B_dim", m.path);
            check_range(field, scalars, 1..=MAX_SCALARS)?;
        }
        Ok(())
    }

    /// The parameters of one layer in token order: all lora_A, then all lora_B, in module order (FORMAT.md section 3). A module
    /// whose path holds an earlier module's path moves up right behind that one, as in the published program.
    pub fn parameters(&self) -> Vec<Parameter> {
        let first =
            |path: &str| self.modules.iter().position(|m| path.contains(m.path.as_str())).unwrap_or(0);
        let mut order: Vec<usize> = (0..self.modules.len()).collect();
        order.sort_by_cached_key(|&i| first(&self.modules[i].path));
        let parameter = |&i: &usize, kind| {
            let m = &self.modules[i];
            let matrix = match kind {
                ParameterKind::LoraA => [self.rank, m.in_dim],
                ParameterKind::LoraB => [m.out_dim, self.rank],
            };
            Parameter { module: i, kind, shape: m.experts.into_iter().chain(matrix).collect() }
        };
        let all = |kind| order.iter().map(move |i| parameter(i, kind));
        all(ParameterKind::LoraA).chain(all(ParameterKind::LoraB)).collect()
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

impl Parameter {
    /// Number of scalars.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
    /// Parameter tokens of `area` = rank * token_dim >= 1 scalars it takes.
    pub fn tokens(&self, area: usize) -> usize {
        self.numel().div_ceil(area)
    }
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(flatten)]
    dims: Dims,
    num_experts: Option<usize>,
    sub_weights: Option<indexmap::IndexMap<String, Map<String, Value>>>,
}

#[derive(Deserialize)]
struct Dims {
    #[serde(rename = "lora_A_dim")]
    lora_a_dim: Option<usize>,
    #[serde(rename = "lora_B_dim")]
    lora_b_dim: Option<usize>,
}
