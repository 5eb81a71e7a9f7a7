use crate::{Error, Result, write_atomic};
use half::{bf16, f16};
use ndarray::{ArrayD, IxDyn};
use safetensors::{SafeTensors, tensor::Dtype as Stored};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    path::{Component, Path, PathBuf},
    sync::Arc,
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

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

enum Bytes {
    Mapped(memmap2::Mmap),
    Static(&'static [u8]),
}

impl Bytes {
    fn get(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
        }
    }
}

struct Entry {
    file: Arc<Bytes>,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// Tensors in a safetensors file, a folder with `model.safetensors`, a sharded folder with
/// `model.safetensors.index.json`, or embedded bytes.
///
/// Files are memory-mapped; every header is checked when opened; shard names may not leave the folder, but a shard may be a link.
pub struct Checkpoint {
    path: PathBuf,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Checkpoint({}, {} tensors)", self.path.display(), self.entries.len())
    }
}

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

impl Checkpoint {
    /// Opens a file or a folder.
    ///
    /// # Errors
    /// [`Error::Io`] when something can't be read; [`Error::Checkpoint`] for a damaged file, an unsupported dtype, an index
    /// that disagrees with its shards, or a shard name that would leave the folder.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut this = Self { path: path.to_owned(), entries: BTreeMap::new(), metadata: BTreeMap::new() };
        if !path.is_dir() {
            this.add(path, map(path)?)?;
        } else if path.join(INDEX).is_file() {
            this.open_shards(path)?;
        } else if path.join(SINGLE).is_file() {
            this.add(&path.join(SINGLE), map(&path.join(SINGLE))?)?;
        } else {
            return Err(Error::checkpoint(path, format!("the folder holds neither {SINGLE} nor {INDEX}")));
        }
        Ok(this)
    }

    /// Reads bytes that live in the binary; `name` stands for the path in errors.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when the bytes are damaged.
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<Self> {
        let mut this = Self { path: name.into(), entries: BTreeMap::new(), metadata: BTreeMap::new() };
        this.add(Path::new(name), Bytes::Static(bytes))?;
        Ok(this)
    }

    fn open_shards(&mut self, folder: &Path) -> Result<()> {
        let file = folder.join(INDEX);
        let index = Index::read(folder)?;
        for name in index.shards() {
            let shard = folder.join(name);
            let before: Vec<String> = self.entries.keys().cloned().collect();
            self.add(&shard, map(&shard)?)?;
            let listed = |n: &String| index.weight_map.get(n).is_some_and(|shard| shard == name);
            if let Some(extra) = self.entries.keys().find(|n| !before.contains(n) && !listed(n)) {
                return Err(Error::checkpoint(&shard, format!("tensor `{extra}` is not in the index")));
            }
        }
        if let Some((missing, shard)) = index.weight_map.iter().find(|(n, _)| !self.entries.contains_key(*n))
        {
            return Err(Error::checkpoint(
                &file,
                format!("tensor `{missing}` is not in its shard `{shard}`"),
            ));
        }
        Ok(())
    }

    fn add(&mut self, path: &Path, bytes: Bytes) -> Result<()> {
        let file = Arc::new(bytes);
        let all = file.get();
        let bad = |e: safetensors::SafeTensorError| {
            Error::checkpoint(path, format!("not a valid safetensors file: {e}"))
        };
        let (header, meta) = SafeTensors::read_metadata(all).map_err(bad)?;
        let start = header + 8;
        for (name, info) in meta.tensors() {
            let dtype = match info.dtype {
                Stored::F32 => Dtype::F32,
                Stored::F16 => Dtype::F16,
                Stored::BF16 => Dtype::Bf16,
                other => {
                    let what =
                        format!("tensor `{name}` has dtype {other:?}; F32, F16 and BF16 are supported");
                    return Err(Error::checkpoint(path, what));
                }
            };
            let (from, to) = info.data_offsets;
            let entry = Entry {
                file: file.clone(),
                dtype,
                shape: info.shape.clone(),
                start: start + from,
                end: start + to,
            };
            if self.entries.insert(name.clone(), entry).is_some() {
                return Err(Error::checkpoint(path, format!("tensor `{name}` is in two shards")));
            }
        }
        for (k, v) in meta.metadata().iter().flatten() {
            self.metadata.insert(k.clone(), v.clone());
        }
        Ok(())
    }

    /// Where it came from.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// Tensor names, sorted.
    pub fn names(&self) -> Vec<&str> {
        self.entries.keys().map(String::as_str).collect()
    }
    /// Does it hold `name`?
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }
    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries
            .get(name)
            .ok_or_else(|| Error::checkpoint(&self.path, format!("no tensor named `{name}`")))
    }
    /// Shape and stored type of a tensor.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when there is none of that name.
    pub fn info(&self, name: &str) -> Result<(Vec<usize>, Dtype)> {
        let entry = self.entry(name)?;
        Ok((entry.shape.clone(), entry.dtype))
    }
    /// A tensor converted to f32. NaN or infinity is an error that names the tensor.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when it is missing or not finite.
    pub fn read(&self, name: &str) -> Result<ArrayD<f32>> {
        let entry = self.entry(name)?;
        let bytes = &entry.file.get()[entry.start..entry.end];
        let data: Vec<f32> = match entry.dtype {
            Dtype::F32 => {
                bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::Bf16 => {
                bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
        };
        if let Some(i) = data.iter().position(|x| !x.is_finite()) {
            let what = format!("tensor `{name}` holds {} at element {i}", data[i]);
            return Err(Error::checkpoint(&self.path, what));
        }
        ArrayD::from_shape_vec(IxDyn(&entry.shape), data)
            .map_err(|e| Error::checkpoint(&self.path, format!("tensor `{name}`: {e}")))
    }
    /// Checks a tensor's shape without reading it.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when it is missing, with both shapes when they differ.
    pub fn check_shape(&self, name: &str, shape: &[usize]) -> Result<()> {
        let entry = self.entry(name)?;
        if entry.shape == shape {
            return Ok(());
        }
        let what = format!("tensor `{name}` has shape {:?}, expected {shape:?}", entry.shape);
        Err(Error::checkpoint(&self.path, what))
    }
    /// Like [`Checkpoint::read`], and the shape must be `shape`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with both shapes when they differ.
    pub fn read_shaped(&self, name: &str, shape: &[usize]) -> Result<ArrayD<f32>> {
        self.check_shape(name, shape)?;
        self.read(name)
    }
    /// The `__metadata__` of the file (of all shards, merged).
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

/// `model.safetensors.index.json`: tensor name -> shard.
#[derive(serde::Deserialize)]
pub(crate) struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads the index of a folder.
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        let file = folder.join(INDEX);
        let text = std::fs::read(&file).map_err(|e| Error::io(&file, e))?;
        let index: Self = serde_json::from_slice(&text)
            .map_err(|e| Error::checkpoint(&file, format!("not a shard index: {e}")))?;
        for name in index.shards() {
            // The name comes out of a downloaded file, so it must be a plain one. What stands under it is the owner's: in a Hugging
            // Face cache every shard is a link to ../../blobs.
            let plain = Path::new(name).components().collect::<Vec<_>>();
            if !matches!(plain[..], [Component::Normal(_)]) || name.contains(['/', '\\']) {
                return Err(Error::checkpoint(&file, format!("shard name `{name}` leaves the folder")));
            }
        }
        Ok(index)
    }

    /// The shards, each once, sorted.
    pub(crate) fn shards(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }
}

fn map(path: &Path) -> Result<Bytes> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    // SAFETY: the map is read only. Another process that truncates the file while it is mapped would end this one
    // with SIGBUS; checkpoints are written by renaming, never in place.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
    Ok(Bytes::Mapped(map))
}

/// Collects named tensors and writes one safetensors file atomically.
#[derive(Default)]
pub struct TensorWriter {
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
    metadata: BTreeMap<String, String>,
}

impl TensorWriter {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }
    /// Adds a tensor; `data` is row-major and converted to `dtype` (round to nearest even).
    pub fn add(&mut self, name: impl Into<String>, shape: &[usize], data: &[f32], dtype: Dtype) -> &mut Self {
        let bytes = match dtype {
            Dtype::F32 => data.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Dtype::F16 => data.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            Dtype::Bf16 => data.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        };
        self.tensors.insert(name.into(), (dtype, shape.to_vec(), bytes));
        self
    }
    /// Adds a metadata pair.
    pub fn meta(&mut self, key: impl Into<String>, value: impl Into<String>) -> &mut Self {
        self.metadata.insert(key.into(), value.into());
        self
    }
    /// Writes the file.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a shape that is not its data's; [`Error::Io`] when the file can't be written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let bad = |e: safetensors::SafeTensorError| Error::checkpoint(path, e.to_string());
        let stored = |d| match d {
            Dtype::F32 => Stored::F32,
            Dtype::F16 => Stored::F16,
            Dtype::Bf16 => Stored::BF16,
        };
        let mut views = Vec::new();
        for (name, (dtype, shape, bytes)) in &self.tensors {
            let view =
                safetensors::tensor::TensorView::new(stored(*dtype), shape.clone(), bytes).map_err(bad)?;
            views.push((name, view));
        }
        let metadata = (!self.metadata.is_empty()).then(|| self.metadata.clone().into_iter().collect());
        let mut bytes = safetensors::serialize(views, metadata).map_err(bad)?;
        sort_metadata(&mut bytes).map_err(|e| Error::checkpoint(path, e.to_string()))?;
        write_atomic(path, |w| w.write_all(&bytes))
    }
}

/// The library writes metadata in random order; equal contents should be equal bytes. Sorting does not change the header's
/// length.
fn sort_metadata(file: &mut [u8]) -> serde_json::Result<()> {
    let (length, rest) = file.split_at_mut(8);
    let length = length.iter().rev().fold(0, |n, b| n << 8 | usize::from(*b));
    let Some(header) = rest.get_mut(..length) else { return Ok(()) };
    let mut parsed: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(header)?;
    if let Some(metadata) = parsed.get_mut("__metadata__").and_then(|m| m.as_object_mut()) {
        metadata.sort_keys();
    }
    let sorted = serde_json::to_vec(&parsed)?;
    if sorted.len() <= header.len() {
        header.fill(b' ');
        header[..sorted.len()].copy_from_slice(&sorted);
    }
    Ok(())
}
