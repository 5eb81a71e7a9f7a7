use crate::{
    Entry, Error, Header, Index, Result, index::shard_path, read_small, source::Source, write_atomic,
};
use half::{bf16, f16};
use ndarray::{ArrayD, IxDyn};
use safetensors::tensor::Dtype as Stored;
use std::{
    borrow::Cow,
    collections::BTreeMap,
    path::{Path, PathBuf},
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
    /// Where the first finite number is that this dtype would make infinite.
    pub fn first_beyond(self, values: &[f32]) -> Option<usize> {
        // Halfway from its largest number to what would come next, from where on rounding to even leads out.
        let end = match self {
            Self::F32 => return None,
            Self::F16 => 65_520.0,
            Self::Bf16 => f32::from_bits(0x7f7f_8000),
        };
        values.iter().position(|x| x.is_finite() && x.abs() >= end)
    }
}

/// Tensors in a safetensors file, a folder with `model.safetensors`, a sharded folder with
/// `model.safetensors.index.json`, or bytes in memory.
///
/// Every header is read and checked when it is opened, tensors when they are asked for. Files must stay as they are meanwhile: one
/// that shrinks is an error when a tensor is read. Shards may not lie outside the folder.
pub struct Checkpoint {
    path: PathBuf,
    entries: BTreeMap<String, (Arc<Source>, Entry)>,
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
    /// [`Error::Io`] when something can't be read; [`Error::Checkpoint`] for a damaged file, a header of more than
    /// [`Header::MAX_CHECKPOINT`] bytes, an unsupported dtype, an index that disagrees with its shards, or a shard that is missing or
    /// outside the folder.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_within(path, Header::MAX_CHECKPOINT)
    }

    /// The same, with headers of at most `most` bytes: an adapter's is short ([`Header::MAX_ADAPTER`]).
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_within(path: impl AsRef<Path>, most: u64) -> Result<Self> {
        let path = path.as_ref();
        let mut this = Self::empty(path);
        if !path.is_dir() {
            this.add(Source::open(path)?, most)?;
        } else if path.join(INDEX).is_file() {
            this.open_shards(path, most)?;
        } else if path.join(SINGLE).is_file() {
            this.add(Source::open(&path.join(SINGLE))?, most)?;
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
        Self::from_bytes(name, bytes, Header::MAX_CHECKPOINT)
    }

    /// Reads bytes in memory, with a header of at most `most` bytes; `name` stands for the path in errors.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when the bytes are damaged.
    pub fn from_bytes(name: &str, bytes: impl Into<Cow<'static, [u8]>>, most: u64) -> Result<Self> {
        let mut this = Self::empty(Path::new(name));
        this.add(Source::memory(name, bytes), most)?;
        Ok(this)
    }

    fn empty(path: &Path) -> Self {
        Self { path: path.to_owned(), entries: BTreeMap::new(), metadata: BTreeMap::new() }
    }

    fn open_shards(&mut self, folder: &Path, most: u64) -> Result<()> {
        let file = folder.join(INDEX);
        let index = Index::parse(&file, &read_small(&file, Index::MAX_BYTES)?)?;
        for (name, tensors) in index.shards() {
            let source = self.add(Source::open(&shard_path(&file, folder, name)?)?, most)?;
            let held = |tensor: &&str| {
                self.entries.get(*tensor).is_some_and(|(there, _)| Arc::ptr_eq(there, &source))
            };
            if let Some(missing) = tensors.iter().find(|t| !held(t)) {
                return Err(Error::checkpoint(
                    &file,
                    format!("tensor `{missing}` is not in its shard `{name}`"),
                ));
            }
        }
        if let Some((extra, (source, _))) =
            self.entries.iter().find(|(name, _)| !index.weight_map.contains_key(*name))
        {
            return Err(Error::checkpoint(&source.path, format!("tensor `{extra}` is not in the index")));
        }
        Ok(())
    }

    fn add(&mut self, source: Source, most: u64) -> Result<Arc<Source>> {
        let header = Header::read(&source, most)?;
        let source = Arc::new(source);
        for (name, entry) in header.tensors {
            if let Some((other, _)) = self.entries.get(&name) {
                let what = format!("tensor `{name}` is also in {}", other.path.display());
                return Err(Error::checkpoint(&source.path, what));
            }
            self.entries.insert(name, (source.clone(), entry));
        }
        self.metadata.extend(header.metadata);
        Ok(source)
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
    fn entry(&self, name: &str) -> Result<&(Arc<Source>, Entry)> {
        self.entries
            .get(name)
            .ok_or_else(|| Error::checkpoint(&self.path, format!("no tensor named `{name}`")))
    }
    /// Shape and stored type of a tensor.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when there is none of that name.
    pub fn info(&self, name: &str) -> Result<(Vec<usize>, Dtype)> {
        let (_, entry) = self.entry(name)?;
        Ok((entry.shape.clone(), entry.dtype))
    }
    /// A tensor converted to f32. NaN or infinity is an error that names the tensor.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when it is missing, not finite or larger than the memory, or its file has shrunk; [`Error::Io`] when the
    /// file can't be read.
    pub fn read(&self, name: &str) -> Result<ArrayD<f32>> {
        let (source, entry) = self.entry(name)?;
        let bad = |what: String| Error::checkpoint(&source.path, format!("tensor `{name}` {what}"));
        let (mut data, numel) = (Vec::<f32>::new(), entry.numel());
        data.try_reserve_exact(numel)
            .map_err(|_| bad(format!("of {:?} is more than this machine's memory", entry.shape)))?;
        for start in (0..numel).step_by(PIECE) {
            data.resize(numel.min(start + PIECE), 0.0);
            read_piece(source, entry, name, start, &mut data[start..])?;
        }
        ArrayD::from_shape_vec(IxDyn(&entry.shape), data).map_err(|e| bad(e.to_string()))
    }
    /// As [`Checkpoint::read`], into a slice of its length.
    ///
    /// # Errors
    /// As [`Checkpoint::read`]; [`Error::Checkpoint`] for another length.
    pub fn read_into(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let (source, entry) = self.entry(name)?;
        if entry.numel() != out.len() {
            let what = format!("tensor `{name}` has {} numbers, not {}", entry.numel(), out.len());
            return Err(Error::checkpoint(&source.path, what));
        }
        for (i, piece) in out.chunks_mut(PIECE).enumerate() {
            read_piece(source, entry, name, i * PIECE, piece)?;
        }
        Ok(())
    }
    /// Bytes `start ..` of a tensor as it is stored: row-major, little-endian, unchecked.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when it is missing or has not so many bytes, or its file has shrunk; [`Error::Io`] when the file can't be read.
    pub fn read_stored(&self, name: &str, start: usize, out: &mut [u8]) -> Result<()> {
        let (source, entry) = self.entry(name)?;
        if start.checked_add(out.len()).is_none_or(|end| end > entry.size()) {
            let what = format!("tensor `{name}` has {} bytes, not {start} + {}", entry.size(), out.len());
            return Err(Error::checkpoint(&source.path, what));
        }
        source.read_at(entry.start + start as u64, out)
    }
    /// The error for a tensor whose element `i` is NaN or infinite.
    pub fn not_finite(&self, name: &str, i: usize, value: f32) -> Error {
        let path = self.entries.get(name).map_or(&self.path, |(source, _)| &source.path);
        not_finite(path, name, i, value)
    }
    /// The error for a tensor whose finite element `i` is infinite in `dtype`.
    pub fn beyond(&self, name: &str, i: usize, value: f32, dtype: Dtype) -> Error {
        let path = self.entries.get(name).map_or(&self.path, |(source, _)| &source.path);
        beyond(path, name, i, value, dtype)
    }
    /// Checks a tensor's shape without reading it.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when it is missing, with both shapes when they differ.
    pub fn check_shape(&self, name: &str, shape: &[usize]) -> Result<()> {
        let (source, entry) = self.entry(name)?;
        if entry.shape == shape {
            return Ok(());
        }
        let what = format!("tensor `{name}` has shape {:?}, expected {shape:?}", entry.shape);
        Err(Error::checkpoint(&source.path, what))
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

/// Elements that are read at a time: while they are in the cache they are converted and looked at.
const PIECE: usize = 1 << 16;

/// Elements `start ..` of a tensor, at most [`PIECE`].
fn read_piece(source: &Source, entry: &Entry, name: &str, start: usize, out: &mut [f32]) -> Result<()> {
    let size = entry.dtype.size();
    let mut bytes = vec![0; out.len() * size];
    source.read_at(entry.start + (start * size) as u64, &mut bytes)?;
    convert(&bytes, entry.dtype, out);
    if !all_finite(out)
        && let Some(i) = out.iter().position(|x| !x.is_finite())
    {
        return Err(not_finite(&source.path, name, start + i, out[i]));
    }
    Ok(())
}

/// Widens little-endian elements.
pub(crate) fn convert(bytes: &[u8], dtype: Dtype, out: &mut [f32]) {
    fn fill<const N: usize>(out: &mut [f32], bytes: &[u8], widen: impl Fn([u8; N]) -> f32) {
        let (whole, _) = bytes.as_chunks();
        out.iter_mut().zip(whole).for_each(|(o, b)| *o = widen(*b));
    }
    match dtype {
        Dtype::F32 => fill(out, bytes, f32::from_le_bytes),
        Dtype::F16 => fill(out, bytes, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::Bf16 => fill(out, bytes, |b| bf16::from_le_bytes(b).to_f32()),
    }
}

fn not_finite(path: &Path, name: &str, i: usize, value: f32) -> Error {
    Error::checkpoint(path, format!("tensor `{name}` holds {value} at element {i}"))
}

pub(crate) fn beyond(path: &Path, name: &str, i: usize, value: f32, dtype: Dtype) -> Error {
    let what =
        format!("tensor `{name}` holds {value:e} at element {i}, which is beyond the range of {dtype:?}");
    Error::checkpoint(path, what)
}

/// Without a branch per element: the bits of infinity and NaN, less the sign, are the largest.
pub(crate) fn all_finite(data: &[f32]) -> bool {
    data.iter().fold(0, |most: u32, x| most.max(x.abs().to_bits())) < f32::INFINITY.to_bits()
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
