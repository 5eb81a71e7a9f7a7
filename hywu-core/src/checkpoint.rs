use crate::{
    Dtype, Entry, Error, Header, Result,
    files::{Named, open_all},
    source::Source,
    write_atomic,
};
use ndarray::{ArrayD, IxDyn};
use std::{
    borrow::Cow,
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

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
        for file in open_all(path, |file| Opened::read(Source::open(file)?, most))? {
            this.add(file);
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
        this.add(Opened::read(Source::memory(name, bytes), most)?);
        Ok(this)
    }

    fn empty(path: &Path) -> Self {
        Self { path: path.to_owned(), entries: BTreeMap::new(), metadata: BTreeMap::new() }
    }

    /// Its names are in no other file.
    fn add(&mut self, Opened { source, header }: Opened) {
        let source = Arc::new(source);
        let entries = header.tensors.into_iter().map(|(name, entry)| (name, (source.clone(), entry)));
        self.entries.extend(entries);
        self.metadata.extend(header.metadata);
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

/// A file whose header was read and checked.
struct Opened {
    source: Source,
    header: Header,
}

impl Opened {
    fn read(source: Source, most: u64) -> Result<Self> {
        let header = Header::read(&source, most)?;
        Ok(Self { source, header })
    }
}

impl Named for Opened {
    fn path(&self) -> &Path {
        &self.source.path
    }
    fn names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }
}

/// Elements that are read at a time: while they are in the cache they are converted and looked at.
const PIECE: usize = 1 << 16;

/// Elements `start ..` of a tensor, at most [`PIECE`].
fn read_piece(source: &Source, entry: &Entry, name: &str, start: usize, out: &mut [f32]) -> Result<()> {
    let size = entry.dtype.size();
    let mut bytes = vec![0; out.len() * size];
    source.read_at(entry.start + (start * size) as u64, &mut bytes)?;
    entry.dtype.decode(&bytes, out);
    if !all_finite(out)
        && let Some(i) = out.iter().position(|x| !x.is_finite())
    {
        return Err(not_finite(&source.path, name, start + i, out[i]));
    }
    Ok(())
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
    /// The first value that its type can't hold: tensor, element, value.
    beyond: Option<(String, usize, f32, Dtype)>,
}

impl TensorWriter {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }
    /// Adds a tensor; `data` is row-major and converted to `dtype` (round to nearest even).
    pub fn add(&mut self, name: impl Into<String>, shape: &[usize], data: &[f32], dtype: Dtype) -> &mut Self {
        let (name, mut bytes) = (name.into(), Vec::with_capacity(data.len() * dtype.size()));
        dtype.encode(data, &mut bytes);
        if let (None, Some(i)) = (&self.beyond, dtype.first_beyond(data)) {
            self.beyond = Some((name.clone(), i, data[i], dtype));
        }
        self.tensors.insert(name, (dtype, shape.to_vec(), bytes));
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
    /// [`Error::Checkpoint`] for a shape that is not its data's, or a number beyond the range of the type that it was to be stored in;
    /// [`Error::Io`] when the file can't be written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        if let Some((name, i, value, dtype)) = &self.beyond {
            return Err(beyond(path, name, *i, *value, *dtype));
        }
        let bad = |e: safetensors::SafeTensorError| Error::checkpoint(path, e.to_string());
        let mut views = Vec::new();
        for (name, (dtype, shape, bytes)) in &self.tensors {
            let view =
                safetensors::tensor::TensorView::new(dtype.stored(), shape.clone(), bytes).map_err(bad)?;
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
