use crate::{Device, Error, Gradients, Result, Tape, Tensor, Var};
use hywu_core::{Checkpoint, Dtype, TensorWriter};
use indexmap::IndexMap;
use std::collections::HashSet;

/// The named weights of a model, in a fixed order.
#[derive(Clone, Default)]
pub struct ParamSet {
    tensors: IndexMap<String, Tensor>,
    /// On a CUDA device: all weights in one tensor, of which `tensors` are parts, so that a step over all is one launch.
    flat: Option<Tensor>,
    /// What [`ParamSet::bind`] hands out, where that is not how the weights are kept.
    computing_in: Option<Dtype>,
    /// Names of those that training leaves as they are.
    frozen: HashSet<String>,
}

/// Where weights start in a flat tensor: at multiples of so many elements, as kernels read 16 bytes at a time.
const ALIGN: usize = 64;

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
        Ok(Self { tensors, ..Self::default() })
    }
    /// The same weights on a device, kept and computed with in `dtype` (on the CPU always f32).
    ///
    /// # Errors
    /// A device that can't be used, or has not enough memory.
    pub fn to(&self, device: Device, dtype: Dtype) -> Result<Self> {
        if device == Device::Cpu {
            let host = match &self.flat {
                // One transfer for all.
                Some(flat) => {
                    let flat = flat.to_host()?;
                    let parts = self.parts();
                    let part = |(start, t): (usize, &Tensor)| flat.part(start, t.shape());
                    self.tensors.keys().cloned().zip(parts.zip(self.tensors.values()).map(part)).collect()
                }
                None => {
                    let host = |(n, t): (&String, &Tensor)| Ok((n.clone(), t.to_host()?));
                    self.tensors.iter().map(host).collect::<Result<_>>()?
                }
            };
            return Ok(Self { tensors: host, frozen: self.frozen.clone(), ..Self::default() });
        }
        if let Some(flat) = self.flat.as_ref().filter(|flat| flat.device() == device) {
            return Ok(self.parts_of(flat.cast(dtype)?, None));
        }
        let host = self.to(Device::Cpu, Dtype::F32)?;
        let flat = Tensor::build(&[host.flat_len()], |out| {
            out.fill(0.0);
            for (start, t) in host.parts().zip(host.tensors.values()) {
                out[start..start + t.numel()].copy_from_slice(t.data());
            }
        });
        Ok(self.parts_of(flat.to(device, dtype)?, None))
    }
    /// The same weights on a device, kept in f32 and computed with in `dtype` (mixed precision, arXiv 1710.03740), as training needs;
    /// on the CPU f32 for both.
    ///
    /// # Errors
    /// As [`ParamSet::to`].
    pub fn to_mixed(&self, device: Device, dtype: Dtype) -> Result<Self> {
        let kept = self.to(device, Dtype::F32)?;
        Ok(Self { computing_in: (device != Device::Cpu).then_some(dtype), ..kept })
    }
    /// These weights as parts of another flat tensor.
    fn parts_of(&self, flat: Tensor, computing_in: Option<Dtype>) -> Self {
        let part =
            |(start, (name, t)): (usize, (&String, &Tensor))| (name.clone(), flat.part(start, t.shape()));
        let tensors = self.parts().zip(&self.tensors).map(part).collect();
        Self { tensors, flat: Some(flat), computing_in, frozen: self.frozen.clone() }
    }
    /// Where each weight starts in a flat tensor.
    fn parts(&self) -> impl Iterator<Item = usize> {
        self.tensors.values().scan(0, |at, t| {
            let start = *at;
            *at += t.numel().next_multiple_of(ALIGN);
            Some(start)
        })
    }
    /// Elements of a flat tensor.
    fn flat_len(&self) -> usize {
        self.tensors.values().map(|t| t.numel().next_multiple_of(ALIGN)).sum()
    }
    /// Elements of what [`ParamSet::pack`] makes.
    pub(crate) fn packed_len(&self) -> usize {
        if self.flat.is_some() { self.flat_len() } else { self.numel() }
    }
    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.tensors.values().next().map_or(Device::Cpu, Tensor::device)
    }
    /// Type of what [`ParamSet::bind`] hands out, and so of the arithmetic.
    pub fn dtype(&self) -> Dtype {
        let kept = self.tensors.values().next().map_or(Dtype::F32, Tensor::dtype);
        self.computing_in.unwrap_or(kept)
    }
    /// All weights in one tensor on their device, in f32 and shared with nobody, for writing in place; and where each starts.
    ///
    /// # Errors
    /// Weights on the CPU, or that were not brought to their device together.
    pub(crate) fn flat_mut(&mut self) -> Result<(&Tensor, Vec<usize>)> {
        let starts = self.parts().collect();
        if let Some(flat) = &self.flat
            // The parts are not sharers: they are these same weights.
            && flat.sharers() > 1 + self.tensors.len()
        {
            let mut copy = flat.clone();
            copy.make_unique()?;
            *self = self.parts_of(copy, self.computing_in);
        }
        match &self.flat {
            Some(flat) if flat.dtype() == Dtype::F32 => Ok((flat, starts)),
            _ => Err(Error::invalid(
                "parameters",
                "weights to train on a device are brought there by to_mixed()",
            )),
        }
    }
    /// A flat tensor beside the weights, such as an optimiser's moments, from one number per weight in the order of the set.
    ///
    /// # Errors
    /// Another number of numbers; not enough memory on a device.
    pub(crate) fn pack(&self, numbers: &[f32]) -> Result<Tensor> {
        if numbers.len() != self.numel() {
            return Err(Error::shape(
                "parameters",
                "numbers",
                &[numbers.len()],
                format!("[{}]", self.numel()),
            ));
        }
        if self.flat.is_none() {
            return Tensor::new(&[numbers.len()], numbers.to_vec());
        }
        let mut from = 0;
        Tensor::build(&[self.flat_len()], |out| {
            out.fill(0.0);
            for (start, t) in self.parts().zip(self.tensors.values()) {
                out[start..start + t.numel()].copy_from_slice(&numbers[from..from + t.numel()]);
                from += t.numel();
            }
        })
        .to(self.device(), Dtype::F32)
    }
    /// The inverse of [`ParamSet::pack`].
    ///
    /// # Errors
    /// Those of the device.
    pub(crate) fn unpack(&self, flat: &Tensor) -> Result<Vec<f32>> {
        let flat = flat.to_host()?;
        if self.flat.is_none() {
            return Ok(flat.data().to_vec());
        }
        let part = |(start, t): (usize, &Tensor)| flat.data()[start..start + t.numel()].iter().copied();
        Ok(self.parts().zip(self.tensors.values()).flat_map(part).collect())
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
    /// Adds or replaces a weight. On a device they are then no longer one piece of memory: [`ParamSet::to_mixed`] makes them so again.
    pub fn insert(&mut self, name: impl Into<String>, tensor: Tensor) {
        self.tensors.insert(name.into(), tensor);
        self.flat = None;
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
    /// All weights for writing, in order; as [`ParamSet::insert`] on a device.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut Tensor)> {
        self.flat = None;
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
    /// The weights whose names `frozen` picks stay as they are from now on: [`ParamSet::bind`] makes them constants, and weight decay
    /// passes them by.
    pub fn freeze(&mut self, frozen: impl Fn(&str) -> bool) {
        self.frozen = self.tensors.keys().filter(|name| frozen(name)).cloned().collect();
    }
    /// Which weights decay in training, in order: matrices (two axes or more) that are not frozen.
    pub(crate) fn decaying(&self) -> Vec<bool> {
        self.tensors.iter().map(|(name, t)| t.shape().len() >= 2 && !self.frozen.contains(name)).collect()
    }
    /// Puts every weight on a tape: as leaves when they are to be trained, as constants when frozen.
    ///
    /// # Errors
    /// Not enough memory on a device for a copy in the dtype that is computed in.
    pub fn bind(&self, tape: &Tape, trainable: bool) -> Result<Bound> {
        let dtype = self.dtype();
        let whole = match &self.flat {
            // One launch for all.
            Some(flat) if flat.dtype() != dtype => Some(self.parts_of(flat.cast(dtype)?, None)),
            _ => None,
        };
        let var = |(n, t): (&String, &Tensor)| {
            let t = t.cast(dtype)?;
            let trainable = trainable && !self.frozen.contains(n);
            Ok((n.clone(), if trainable { tape.leaf(t) } else { Var::constant(t) }))
        };
        let vars = whole.as_ref().unwrap_or(self).tensors.iter().map(var).collect::<Result<_>>()?;
        Ok(Bound { vars })
    }
    /// Replaces every weight by the tensor of the same name in `checkpoint`; shapes must agree.
    ///
    /// # Errors
    /// A missing tensor, a wrong shape, NaN or infinity, or tensors under `prefix` that no weight uses (both sets are listed).
    pub fn load(&mut self, checkpoint: &Checkpoint, prefix: &str) -> Result<()> {
        let shapes: Vec<_> = self.iter().map(|(n, t)| (n.to_owned(), t.shape().to_vec())).collect();
        check_header(&shapes, checkpoint, prefix)?;
        let mut read = Self { frozen: self.frozen.clone(), ..Self::default() };
        for name in self.tensors.keys() {
            read.insert(name, Tensor::from_array(&checkpoint.read(&format!("{prefix}{name}"))?));
        }
        let kept = self.tensors.values().next().map_or(Dtype::F32, Tensor::dtype);
        *self = Self { computing_in: self.computing_in, ..read.to(self.device(), kept)? };
        Ok(())
    }
    /// Adds every weight to a file.
    ///
    /// # Errors
    /// Those of the device.
    pub fn store(&self, writer: &mut TensorWriter, prefix: &str, dtype: Dtype) -> Result<()> {
        for (name, tensor) in self.to(Device::Cpu, Dtype::F32)?.iter() {
            writer.add(format!("{prefix}{name}"), tensor.shape(), tensor.data(), dtype);
        }
        Ok(())
    }
}

/// Does `checkpoint` hold just these names under `prefix`, in these shapes? Nothing is read but the headers.
///
/// # Errors
/// Missing and unused names, both listed, or the first wrong shape beside the right one.
pub fn check_header(shapes: &[(String, Vec<usize>)], checkpoint: &Checkpoint, prefix: &str) -> Result<()> {
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
    ///
    /// # Errors
    /// Not enough memory on a device.
    pub fn take_grads(&self, grads: &mut Gradients) -> Result<Vec<Tensor>> {
        let take = |v: &Var| match grads.take(v) {
            Some(grad) => Ok(grad),
            None => v.value().zeros_like(v.shape()),
        };
        self.vars.values().map(take).collect()
    }
    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.vars.values().next().map_or(Device::Cpu, |v| v.value().device())
    }
    /// Type of the weights, and so of the arithmetic.
    pub fn dtype(&self) -> Dtype {
        self.vars.values().next().map_or(Dtype::F32, |v| v.value().dtype())
    }
}
