use crate::Result;
use ndarray::ArrayD;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// Element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
}

/// Tensors in a safetensors file, a folder with `model.safetensors`, a sharded folder with
/// `model.safetensors.index.json`, or embedded bytes.
///
/// Files are memory-mapped; every header is checked when opened; shard names may not leave the folder.
pub struct Checkpoint {
    path: PathBuf,
}

impl Checkpoint {
    /// Opens a file or a folder.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Ok(Self { path: path.as_ref().to_owned() })
    }
    /// Reads bytes that live in the binary; `name` stands for the path in errors.
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<Self> {
        let _ = (name, bytes);
        todo!()
    }
    /// Where it came from.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// Tensor names, sorted.
    pub fn names(&self) -> Vec<&str> {
        todo!()
    }
    /// Does it hold `name`?
    pub fn contains(&self, name: &str) -> bool {
        let _ = name;
        todo!()
    }
    /// Shape and stored type of a tensor.
    pub fn info(&self, name: &str) -> Result<(Vec<usize>, Dtype)> {
        let _ = name;
        todo!()
    }
    /// A tensor converted to f32. NaN or infinity is an error that names the tensor.
    pub fn read(&self, name: &str) -> Result<ArrayD<f32>> {
        let _ = name;
        todo!()
    }
    /// Like [`Checkpoint::read`], and the shape must be `shape`.
    pub fn read_shaped(&self, name: &str, shape: &[usize]) -> Result<ArrayD<f32>> {
        let _ = (name, shape);
        todo!()
    }
    /// The `__metadata__` of the file (of all shards, merged).
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        todo!()
    }
}

/// Collects named tensors and writes one safetensors file atomically.
#[derive(Default)]
pub struct TensorWriter {}

impl TensorWriter {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }
    /// Adds a tensor; `data` is row-major and converted to `dtype` (round to nearest even).
    pub fn add(&mut self, name: impl Into<String>, shape: &[usize], data: &[f32], dtype: Dtype) -> &mut Self {
        let _ = (name.into(), shape, data, dtype);
        todo!()
    }
    /// Adds a metadata pair.
    pub fn meta(&mut self, key: impl Into<String>, value: impl Into<String>) -> &mut Self {
        let _ = (key.into(), value.into());
        todo!()
    }
    /// Writes the file.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let _ = path.as_ref();
        todo!()
    }
}
