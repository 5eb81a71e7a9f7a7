use crate::{Adapter, AdapterSpec, Error, Module, Result, error::some_of};
use indexmap::IndexSet;
use std::fmt;

/// How the entries of an adapter and the modules of a backbone meet. Every module is in one of `applied`, `skipped` and `missing`, every
/// entry in one of `applied` and `unused`; each list keeps the order of its side.
///
/// A name that is in one set only is how an adapter silently does nothing, so [`ApplyResult::strict`] is what everything asks for
/// that was not told otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApplyResult {
    /// Modules with an entry, which is applied.
    pub applied: Vec<String>,
    /// Modules that are left as they are on purpose.
    pub skipped: Vec<String>,
    /// Modules without an entry.
    pub missing: Vec<String>,
    /// Entries that no module takes.
    pub unused: Vec<String>,
}

impl ApplyResult {
    /// Compares the names of both sides; `skips` says which modules may go without an entry.
    pub fn of<'a>(
        modules: impl IntoIterator<Item = String>,
        entries: impl IntoIterator<Item = &'a str>,
        skips: impl Fn(&str) -> bool,
    ) -> Self {
        let entries: IndexSet<&str> = entries.into_iter().collect();
        let mut taken = vec![false; entries.len()];
        let mut found = Self::default();
        for module in modules {
            let list = match entries.get_index_of(module.as_str()) {
                Some(entry) => {
                    taken[entry] = true;
                    &mut found.applied
                }
                None if skips(&module) => &mut found.skipped,
                None => &mut found.missing,
            };
            list.push(module);
        }
        let unused = entries.iter().zip(taken).filter(|(_, taken)| !taken);
        found.unused = unused.map(|(name, _)| (*name).to_owned()).collect();
        found
    }

    /// Is nothing missing and nothing unused?
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty() && self.unused.is_empty()
    }

    /// Nothing may be missing or unused.
    ///
    /// # Errors
    /// [`Error::Adapter`] with up to ten names of both sets and how many more there are.
    pub fn strict(&self) -> Result<()> {
        if self.is_complete() { Ok(()) } else { Err(Error::Adapter(self.to_string())) }
    }

    /// [`ApplyResult::strict`], or [`ApplyResult::partial`] where that was asked for.
    ///
    /// # Errors
    /// Theirs.
    pub fn check(&self, partial: bool) -> Result<()> {
        if partial { self.partial() } else { self.strict() }
    }

    /// At least something must be applied: an adapter of which nothing fits is for another backbone.
    ///
    /// # Errors
    /// [`Error::Adapter`], as [`ApplyResult::strict`] tells it.
    pub fn partial(&self) -> Result<()> {
        if self.applied.is_empty() { Err(Error::Adapter(self.to_string())) } else { Ok(()) }
    }
}

/// One line: what is missing and unused, and what remains.
impl fmt::Display for ApplyResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let modules = self.applied.len() + self.skipped.len() + self.missing.len();
        write!(f, "{} of {modules} modules have an entry", self.applied.len())?;
        for (what, names) in [("missing modules", &self.missing), ("unused entries", &self.unused)] {
            if !names.is_empty() {
                write!(f, "; {what}: {}", some_of(names))?;
            }
        }
        Ok(())
    }
}

impl Adapter {
    /// Compares the adapter with the modules of `spec`. What meets must fit: shapes, for any rank, and finite values.
    ///
    /// # Errors
    /// [`Error::Adapter`] that names the module with its shapes and the expected ones, or with the first value that is not finite.
    pub fn cover(&self, spec: &AdapterSpec) -> Result<ApplyResult> {
        if !self.scale.is_finite() {
            return Err(Error::Adapter(format!("scale {} is not finite", self.scale)));
        }
        let batch = self.batch();
        for (name, module) in spec.named_modules() {
            let Some(lora) = self.modules.get(&name) else { continue };
            module.check_pair(&name, batch, lora.lora_a.shape(), lora.lora_b.shape())?;
            if let Some(bad) = lora.lora_a.iter().chain(&lora.lora_b).find(|x| !x.is_finite()) {
                return Err(Error::Adapter(format!("`{name}` holds {bad}")));
            }
        }
        Ok(ApplyResult::of(spec.module_names(), self.modules.keys().map(String::as_str), |_| false))
    }
}

impl Module {
    /// Checks the shapes of a pair for this module, of any rank, `instances` of it one behind the other.
    ///
    /// # Errors
    /// [`Error::Adapter`] with the shapes and the expected ones.
    pub fn check_pair(&self, name: &str, instances: usize, lora_a: &[usize], lora_b: &[usize]) -> Result<()> {
        // Any rank will do, as long as both sides have it.
        let rank = lora_a.len().checked_sub(2).map_or(0, |axis| lora_a[axis]);
        let shape = |matrix: [usize; 2]| -> Vec<usize> {
            [instances].into_iter().chain(self.experts).chain(matrix).collect()
        };
        if rank > 0
            && instances > 0
            && lora_a == shape([rank, self.in_dim])
            && lora_b == shape([self.out_dim, rank])
        {
            return Ok(());
        }
        let [batch, input, output] = [instances.max(1), self.in_dim, self.out_dim];
        let front = self.experts.map_or(format!("{batch}"), |experts| format!("{batch}, {experts}"));
        Err(Error::Adapter(format!(
            "`{name}` has lora_A {lora_a:?} and lora_B {lora_b:?}, expected [{front}, r, {input}] and [{front}, {output}, r]"
        )))
    }
}
