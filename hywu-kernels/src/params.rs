use crate::{Error, Gradients, Result, Tape, Tensor, Var};
use hywu_core::{Checkpoint, Dtype, TensorWriter};
use indexmap::IndexMap;

/// The named weights of a model, in a fixed order.
#[derive(Clone, Default)]
pub struct ParamSet {
    tensors: IndexMap<String, Tensor>,
}

impl ParamSet {
    /// No weights yet.
    pub fn new() -> Self {
        Self::default()
    }
    /// Adds or replaces a weight.
    pub fn insert(&mut self, name: impl Into<String>, tensor: Tensor) {
        self.tensors.insert(name.into(), tensor);
    }
    /// A weight.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is none of that name.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.tensors
            .get(name)
            .ok_or_else(|| Error::invalid("parameters", format!("no weight named `{name}`")))
    }
    /// All weights, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(n, t)| (n.as_str(), t))
    }
    /// All weights for writing, in order.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut Tensor)> {
        self.tensors.iter_mut().map(|(n, t)| (n.as_str(), t))
    }
    /// Number of weights.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }
    /// Is it empty?
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }
    /// Number of scalars.
    pub fn numel(&self) -> usize {
        self.tensors.values().map(Tensor::numel).sum()
    }
    /// Puts every weight on a tape: as leaves when they are to be trained, as constants when frozen.
    pub fn bind(&self, tape: &Tape, trainable: bool) -> Bound {
        let var = |t: &Tensor| if trainable { tape.leaf(t.clone()) } else { Var::constant(t.clone()) };
        Bound { vars: self.tensors.iter().map(|(n, t)| (n.clone(), var(t))).collect() }
    }
    /// Replaces every weight by the tensor of the same name in `checkpoint`; shapes must agree.
    ///
    /// # Errors
    /// A missing tensor, a wrong shape, NaN or infinity, or tensors under `prefix` that no weight uses (both sets are listed).
    pub fn load(&mut self, checkpoint: &Checkpoint, prefix: &str) -> Result<()> {
        let wanted: Vec<String> = self.tensors.keys().map(|n| format!("{prefix}{n}")).collect();
        let missing: Vec<&str> =
            wanted.iter().map(String::as_str).filter(|n| !checkpoint.contains(n)).collect();
        let unused: Vec<&str> = (checkpoint.names().into_iter())
            .filter(|n| n.strip_prefix(prefix).is_some_and(|n| !self.tensors.contains_key(n)))
            .collect();
        if !missing.is_empty() || !unused.is_empty() {
            let what = format!("missing tensors: {missing:?}; unused tensors: {unused:?}");
            return Err(hywu_core::Error::checkpoint(checkpoint.path(), what).into());
        }
        for (name, tensor) in self.tensors.iter_mut() {
            *tensor =
                Tensor::from_array(&checkpoint.read_shaped(&format!("{prefix}{name}"), tensor.shape())?);
        }
        Ok(())
    }
    /// Adds every weight to a file.
    pub fn store(&self, writer: &mut TensorWriter, prefix: &str, dtype: Dtype) {
        for (name, tensor) in self.iter() {
            writer.add(format!("{prefix}{name}"), tensor.shape(), tensor.data(), dtype);
        }
    }
}

/// Weights on a tape.
pub struct Bound {
    vars: IndexMap<String, Var>,
}

impl Bound {
    /// A weight.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is none of that name.
    pub fn get(&self, name: &str) -> Result<&Var> {
        self.vars.get(name).ok_or_else(|| Error::invalid("parameters", format!("no weight named `{name}`")))
    }
    /// Replaces one weight, e.g. by a perturbed copy.
    pub fn set(&mut self, name: &str, var: Var) {
        self.vars.insert(name.to_owned(), var);
    }
    /// Takes the gradients of all weights out, in the order of the set; zeros where the loss does not depend on one.
    pub fn take_grads(&self, grads: &mut Gradients) -> Vec<Tensor> {
        self.vars.values().map(|v| grads.take(v).unwrap_or_else(|| Tensor::zeros(v.shape()))).collect()
    }
}
