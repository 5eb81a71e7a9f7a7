use super::{Backbone, LAYERS};
use crate::Result;
use hywu_core::{AdapterSpec, Error, Module};
use hywu_kernels::{
    LoraVar, LoraVars,
    ops::low_rank_linear::{Load, merge, merging_gain},
};

impl Backbone {
    /// The modules that take an adapter: attention and MLP projections of every layer.
    pub fn adapter_spec(&self, rank: usize, alpha: f32) -> AdapterSpec {
        let c = &self.config;
        let module = |(path, out_dim, in_dim): (&str, usize, usize)| Module {
            path: path.to_owned(),
            in_dim,
            out_dim,
            experts: None,
        };
        AdapterSpec {
            prefix: LAYERS.to_owned(),
            layers: c.layers,
            rank,
            alpha,
            modules: c.projections().map(module).to_vec(),
        }
    }

    /// Adapters must cover every module of [`Backbone::adapter_spec`] that they don't skip and nothing else, or be empty.
    pub(super) fn check_adapters(&self, adapters: &LoraVars, batch: usize) -> Result<()> {
        let Some(first) = adapters.modules.values().next() else { return Ok(()) };
        let spec = self.adapter_spec(1, 1.0);
        adapters.cover(spec.module_names()).strict()?;
        let instances = first.a.shape().first().copied().unwrap_or(0);
        if instances == 0 || !batch.is_multiple_of(instances) {
            let what = format!("{instances} instances do not divide a batch of {batch}");
            return Err(Error::Adapter(what).into());
        }
        for (name, module) in spec.named_modules() {
            let Some(pair) = adapters.get(&name) else { continue };
            module.check_pair(&name, instances, pair.a.shape(), pair.b.shape())?;
            if !pair.scale.is_finite() {
                return Err(Error::Adapter(format!("`{name}` has scale {}", pair.scale)).into());
            }
        }
        Ok(())
    }

    /// The same backbone with one instance's adapters merged into its weights ([`merge`]), which it then does not take any more. Weights
    /// that are kept in f32 and computed with in bf16 are rounded with the update in them, once.
    ///
    /// # Errors
    /// Adapters that don't fit the modules of [`Backbone::adapter_spec`], or of several instances.
    pub fn merged(&self, adapters: &LoraVars) -> Result<Self> {
        self.check_adapters(adapters, 1)?;
        let mut merged = self.clone();
        for (name, pair) in &adapters.modules {
            let name = format!("{name}.weight");
            let weight = self.params.get(&name)?;
            let (a, b) = (pair.a.value().cast(weight.dtype())?, pair.b.value().cast(weight.dtype())?);
            merged.params.insert(name, merge(weight, &a, &b, pair.scale)?);
        }
        Ok(merged)
    }

    /// Is it worth it to merge adapters, before so many calls with `tiles` of `size` x `size` pixels each?
    pub(crate) fn merging_pays(&self, adapters: &LoraVars, calls: usize, tiles: usize, size: usize) -> bool {
        let side = size / self.config.patch;
        let load = Load { calls, rows: tiles * (side * side + self.config.text_len) };
        let gain = |pair: &LoraVar| match (pair.a.shape(), pair.b.shape()) {
            ([_, _, inner], [_, outer, rank]) => {
                merging_gain([*outer, *inner], *rank, load, self.params.device())
            }
            _ => 0.0,
        };
        adapters.modules.values().map(gain).sum::<f64>() > 0.0
    }
}
