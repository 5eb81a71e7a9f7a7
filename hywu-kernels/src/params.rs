use crate::{Error, Gradients, Result, Tape, Tensor, Var};
use hywu_core::{Checkpoint, Dtype, TensorWriter};
use indexmap::IndexMap;
use std::collections::HashSet;

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
    /// Zeros, under these names and of these shapes.
    ///
    /// # Errors
    /// [`Error::Invalid`] when they take more memory than there is.
    pub fn zeros(shapes: &[(String, Vec<usize>)]) -> Result<Self> {
        check_memory(shapes)?;
        let tensors = shapes.iter().map(|(name, shape)| (name.clone(), Tensor::zeros(shape))).collect();
        Ok(Self { tensors })
    }
    /// The tensors of `checkpoint` with these names and shapes. Nothing is read, and no memory taken, before all of them agree with
    /// the checkpoint's headers.
    ///
    /// # Errors
    /// As [`ParamSet::load`]; more memory than there is.
    pub fn from_checkpoint(
        shapes: &[(String, Vec<usize>)],
        checkpoint: &Checkpoint,
        prefix: &str,
    ) -> Result<Self> {
        check_header(shapes, checkpoint, prefix)?;
        check_memory(shapes)?;
        let mut set = Self::new();
        for (name, _) in shapes {
            set.insert(name, Tensor::from_array(&checkpoint.read(&format!("{prefix}{name}"))?));
        }
        Ok(set)
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
        let shapes: Vec<_> = self.iter().map(|(n, t)| (n.to_owned(), t.shape().to_vec())).collect();
        check_header(&shapes, checkpoint, prefix)?;
        for (name, tensor) in self.tensors.iter_mut() {
            *tensor = Tensor::from_array(&checkpoint.read(&format!("{prefix}{name}"))?);
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

/// Does `checkpoint` hold just these names under `prefix`, in these shapes?
fn check_header(shapes: &[(String, Vec<usize>)], checkpoint: &Checkpoint, prefix: &str) -> Result<()> {
    let wanted: Vec<String> = shapes.iter().map(|(n, _)| format!("{prefix}{n}")).collect();
    let names: HashSet<&str> = wanted.iter().map(String::as_str).collect();
    let missing: Vec<&str> = wanted.iter().map(String::as_str).filter(|n| !checkpoint.contains(n)).collect();
    let unused: Vec<&str> =
        (checkpoint.names().into_iter()).filter(|n| n.starts_with(prefix) && !names.contains(n)).collect();
    if !missing.is_empty() || !unused.is_empty() {
        let what = format!("missing tensors: {}; unused tensors: {}", list(&missing), list(&unused));
        return Err(hywu_core::Error::checkpoint(checkpoint.path(), what).into());
    }
    for (name, (_, shape)) in wanted.iter().zip(shapes) {
        checkpoint.check_shape(name, shape)?;
    }
    Ok(())
}

/// The first names; a checkpoint of another model would fill the screen.
fn list(names: &[&str]) -> String {
    const SHOWN: usize = 16;
    match names.len().checked_sub(SHOWN) {
        None | Some(0) => format!("{names:?}"),
        Some(more) => format!("{:?} and {more} more", &names[..SHOWN]),
    }
}

/// Asks the system for all the memory at once and gives it back: a failed allocation of one tensor would abort the program.
fn check_memory(shapes: &[(String, Vec<usize>)]) -> Result<()> {
    // In f64, which no product of sizes overflows.
    let numel = |shape: &[usize]| shape.iter().map(|&x| x as f64).product::<f64>();
    let numbers: f64 = shapes.iter().map(|(_, shape)| numel(shape)).sum();
    let mut all = Vec::<f32>::new();
    let asked = all.try_reserve_exact(numbers as usize);
    // Else the compiler may leave the unused memory out and call it a success.
    std::hint::black_box(&mut all);
    asked.map_err(|_| {
        let gib = numbers * 4.0 / f64::from(1 << 30);
        Error::invalid("parameters", format!("{gib:.1} GiB of weights are more than this machine's memory"))
    })
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
