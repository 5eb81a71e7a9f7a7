//! Adapters on a tape: what a generator hands to a backbone while gradients flow.

use crate::{Device, Result, Tape, Tensor, Var};
use hywu_core::{Adapter, AdapterSpec, ApplyResult, Dtype, Lora};
use indexmap::{IndexMap, IndexSet};

/// The low-rank pair of one module on a tape.
#[derive(Clone, Debug)]
pub struct LoraVar {
    /// [batch, r, in].
    pub a: Var,
    /// [batch, out, r].
    pub b: Var,
    /// Factor on the low-rank term: scale = alpha / rank, times the strength.
    pub scale: f32,
}

/// The adapters of a batch of instances on a tape, by module name.
#[derive(Clone, Debug, Default)]
pub struct LoraVars {
    /// Module name -> pair.
    pub modules: IndexMap<String, LoraVar>,
    /// Modules that go without a pair on purpose.
    skipped: IndexSet<String>,
}

impl LoraVars {
    /// No adapter: the backbone's own weights.
    pub fn none() -> Self {
        Self::default()
    }
    /// The pair of a module, if it has one.
    pub fn get(&self, module: &str) -> Option<&LoraVar> {
        self.modules.get(module)
    }
    /// The pairs of a host adapter that have a module in `spec`, as constants ([`LoraVars::from_adapter`]), and how the two meet. With
    /// `partial`, what is missing is skipped from here on and what is unused left out, as long as something fits.
    ///
    /// # Errors
    /// [`hywu_core::Error::Adapter`] for shapes that don't fit, values that are not finite, anything missing or unused (with
    /// `partial`: nothing that fits).
    pub fn fit(
        adapter: &Adapter,
        spec: &AdapterSpec,
        strength: f32,
        partial: bool,
    ) -> Result<(Self, ApplyResult)> {
        let mut found = adapter.cover(spec)?;
        found.check(partial)?;
        if strength == 0.0 {
            found.skipped.append(&mut found.applied);
        }
        let mut vars = Self::from_adapter(adapter, strength);
        found.unused.iter().for_each(|entry| drop(vars.modules.shift_remove(entry)));
        vars.skipped = found.missing.iter().cloned().collect();
        Ok((vars, found))
    }
    /// How the pairs and the modules of a backbone meet, by name.
    pub fn cover(&self, modules: impl IntoIterator<Item = String>) -> ApplyResult {
        let entries = self.modules.keys().map(String::as_str);
        ApplyResult::of(modules, entries, |module| self.skipped.contains(module))
    }
    /// A host adapter as constants; `strength` multiplies the scale. Strength 0 is no adapter at all, so the
    /// backbone's own output comes out bit for bit.
    pub fn from_adapter(adapter: &Adapter, strength: f32) -> Self {
        if strength == 0.0 {
            return Self::none();
        }
        let pair = |l: &Lora| LoraVar {
            a: Var::constant(Tensor::from_array(&l.lora_a)),
            b: Var::constant(Tensor::from_array(&l.lora_b)),
            scale: adapter.scale * strength,
        };
        let modules = adapter.modules.iter().map(|(n, l)| (n.clone(), pair(l))).collect();
        Self { modules, skipped: IndexSet::new() }
    }
    /// The same adapters as constants on a device.
    ///
    /// # Errors
    /// A device that can't be used, or has not enough memory.
    pub fn to(&self, device: Device, dtype: Dtype) -> Result<Self> {
        let pair = |v: &LoraVar| -> Result<LoraVar> {
            let place = |x: &Var| -> Result<Var> { Ok(Var::constant(x.value().to(device, dtype)?)) };
            Ok(LoraVar { a: place(&v.a)?, b: place(&v.b)?, scale: v.scale })
        };
        let modules = self.modules.iter().map(|(n, v)| Ok((n.clone(), pair(v)?)));
        Ok(Self { modules: modules.collect::<Result<_>>()?, skipped: self.skipped.clone() })
    }
    /// Copies to the host; `scale` is alpha / rank.
    ///
    /// # Errors
    /// Those of the device.
    pub fn to_adapter(&self, scale: f32) -> Result<Adapter> {
        let lora = |v: &LoraVar| -> Result<Lora> {
            Ok(Lora { lora_a: v.a.value().to_array()?, lora_b: v.b.value().to_array()? })
        };
        let modules = self.modules.iter().map(|(n, v)| Ok((n.clone(), lora(v)?)));
        Ok(Adapter { modules: modules.collect::<Result<_>>()?, scale, metadata: Default::default() })
    }
}

/// A frozen model that adapters are generated for. Implement it to train a generator on a backbone of your own: the
/// generator's trainer asks for a condition, writes adapters, and differentiates the loss with respect to them.
pub trait Downstream {
    /// What one training step works on.
    type Batch;
    /// The modules that take an adapter.
    fn adapter_spec(&self) -> &AdapterSpec;
    /// What the generator reads: [instances, 1, length, input_dim].
    fn condition(&self, batch: &Self::Batch) -> Result<Tensor>;
    /// The training loss, a scalar on `tape`, with one adapter per instance of the batch.
    fn loss(&self, tape: &Tape, batch: &Self::Batch, adapters: &LoraVars) -> Result<Var>;
}
