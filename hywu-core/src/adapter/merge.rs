//! W' = W + scale B A, a whole checkpoint at a time.

use super::{
    Adapter, Names,
    matrices::{Pair, some_of},
};
use crate::{
    Dtype, Error, Result,
    checkpoint::{INDEX, Index, SINGLE},
    create_folder_atomic,
};
use half::{bf16, f16};
use indexmap::IndexMap;
use memmap2::Mmap;
use ndarray::{ArrayView2, s};
use safetensors::{
    SafeTensors,
    tensor::{Dtype as Stored, TensorInfo},
};
use std::{
    collections::HashMap,
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeReport {
    /// Tensors that an update was added to.
    pub merged: usize,
    /// Tensors that were copied as they are.
    pub copied: usize,
    /// Files with tensors.
    pub files: usize,
}

/// Scalars of a tensor that are worked on at once, at least a row.
const CHUNK: usize = 1 << 20;
/// Bytes that are copied between two calls of `progress`.
const COPY: usize = 1 << 24;
/// What else of a checkpoint's folder belongs to a model: configs, tokenizer, model code, licences.
const BESIDE: [&str; 6] = ["json", "txt", "model", "jinja", "md", "py"];

/// Writes the checkpoint `base` (a safetensors file, or a folder with `model.safetensors` or with shards and their index) with instance
/// `instance` of the adapter added, into the new folder `output`: the same files with the same headers, every tensor of its own dtype.
/// Sums are f32 and rounded once. `base` is read through memory maps, a few rows at a time, and never written.
///
/// A module `m` is the tensor `m.weight` [out, in] under the name that `names` gives it; a grouped module is one tensor an expert.
/// Configs, tokenizer, model code and licences of the folder are copied too; other formats of the weights, which would be the old ones,
/// are not. `progress` is told the bytes written and their number.
///
/// # Errors
/// [`Error::Adapter`] naming up to ten modules without a tensor, a tensor of another shape with both shapes, or a sum that is not
/// finite in the tensor's dtype; [`Error::Checkpoint`] for a damaged file; [`Error::Io`] when something can't be read or written, or
/// `output` is there already. Nothing is left behind then.
pub fn merge(
    adapter: &Adapter,
    instance: usize,
    names: &Names,
    base: impl AsRef<Path>,
    output: impl AsRef<Path>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<MergeReport> {
    let (base, output) = (base.as_ref(), output.as_ref());
    let pairs = names.to_theirs(adapter, instance)?;
    let files = weight_files(base)?.into_iter().map(Shard::open).collect::<Result<Vec<_>>>()?;
    check(&pairs, &files)?;
    let mut task = Task {
        pairs: &pairs,
        scale: adapter.scale,
        report: MergeReport { merged: 0, copied: 0, files: files.len() },
        written: 0,
        total: files.iter().map(|f| f.map.len() as u64).sum(),
        progress,
    };
    create_folder_atomic(output, |folder| {
        for file in &files {
            task.write(file, folder)?;
        }
        if base.is_dir() {
            copy_beside(base, folder)?;
        }
        Ok(())
    })?;
    Ok(task.report)
}

/// The files that hold the tensors.
fn weight_files(base: &Path) -> Result<Vec<PathBuf>> {
    if !base.is_dir() {
        return Ok(vec![base.to_owned()]);
    }
    if base.join(INDEX).is_file() {
        return Ok(Index::read(base)?.shards().into_iter().map(|shard| base.join(shard)).collect());
    }
    if base.join(SINGLE).is_file() {
        return Ok(vec![base.join(SINGLE)]);
    }
    Err(Error::checkpoint(base, format!("the folder holds neither {SINGLE} nor {INDEX}")))
}

/// A mapped file and its tensors in the order of their bytes. Tensors of any dtype: most are copied only.
struct Shard {
    path: PathBuf,
    map: Mmap,
    /// Where the tensors' bytes begin.
    start: usize,
    tensors: Vec<(String, TensorInfo)>,
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self> {
        let file = File::open(&path).map_err(|e| Error::io(&path, e))?;
        // SAFETY: the map is read only, as every checkpoint's (see `Checkpoint`).
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(&path, e))?;
        let (header, meta) = SafeTensors::read_metadata(&map)
            .map_err(|e| Error::checkpoint(&path, format!("not a valid safetensors file: {e}")))?;
        let mut tensors: Vec<_> = meta.tensors().into_iter().map(|(n, info)| (n, info.clone())).collect();
        tensors.sort_by_key(|(_, info)| info.data_offsets);
        Ok(Self { path, start: header + 8, map, tensors })
    }
}

/// The tensor of a module.
fn tensor_of(module: &str) -> String {
    format!("{module}.weight")
}

/// Every pair must have its tensor, of the right shape and of a dtype that can be summed in.
fn check(pairs: &IndexMap<String, Pair>, files: &[Shard]) -> Result<()> {
    let mut tensors = HashMap::<&str, &TensorInfo>::new();
    for file in files {
        for (name, info) in &file.tensors {
            if tensors.insert(name, info).is_some() {
                return Err(Error::checkpoint(&file.path, format!("tensor `{name}` is in two shards")));
            }
        }
    }
    let missing: Vec<&String> =
        pairs.keys().filter(|module| !tensors.contains_key(tensor_of(module).as_str())).collect();
    if !missing.is_empty() {
        let what = format!("the checkpoint has no weight for {}", some_of(&missing));
        return Err(Error::Adapter(what));
    }
    for (module, pair) in pairs {
        let name = tensor_of(module);
        let Some(info) = tensors.get(name.as_str()) else { continue };
        let wanted = [pair.b.nrows(), pair.a.ncols()];
        if info.shape != wanted {
            let what = format!("tensor `{name}` has shape {:?}, the adapter's is {wanted:?}", info.shape);
            return Err(Error::Adapter(what));
        }
        if dtype_of(info.dtype).is_none() {
            let what =
                format!("tensor `{name}` has dtype {:?}; F32, F16 and BF16 can be merged into", info.dtype);
            return Err(Error::Adapter(what));
        }
    }
    Ok(())
}

fn dtype_of(stored: Stored) -> Option<Dtype> {
    match stored {
        Stored::F32 => Some(Dtype::F32),
        Stored::F16 => Some(Dtype::F16),
        Stored::BF16 => Some(Dtype::Bf16),
        _ => None,
    }
}

struct Task<'a> {
    pairs: &'a IndexMap<String, Pair>,
    scale: f32,
    report: MergeReport,
    written: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl Task<'_> {
    /// A file of the same name in `folder`.
    fn write(&mut self, file: &Shard, folder: &Path) -> Result<()> {
        let name =
            file.path.file_name().ok_or_else(|| Error::checkpoint(&file.path, "it has no file name"))?;
        let path = folder.join(name);
        let fail = |e| Error::io(&path, e);
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&path).map_err(fail)?);
        // The same header word for word: dtypes, shapes and order stay.
        out.write_all(&file.map[..file.start]).map_err(fail)?;
        self.advance(file.start);
        for (name, info) in &file.tensors {
            let bytes = &file.map[file.start + info.data_offsets.0..file.start + info.data_offsets.1];
            let module = name.strip_suffix(".weight").and_then(|module| self.pairs.get(module));
            match (module, dtype_of(info.dtype)) {
                (Some(pair), Some(dtype)) => {
                    self.report.merged += 1;
                    let columns = pair.a.ncols();
                    let rows = (CHUNK / columns).max(1);
                    for (i, chunk) in bytes.chunks(rows * columns * dtype.size()).enumerate() {
                        let end = (i + 1).saturating_mul(rows).min(pair.b.nrows());
                        let b = pair.b.slice(s![i * rows..end, ..]);
                        let sum = add(chunk, dtype, b, pair.a.view(), self.scale);
                        let sum = sum.map_err(|bad| {
                            Error::Adapter(format!("tensor `{name}` would hold {bad} after the merge"))
                        })?;
                        out.write_all(sum.as_deref().unwrap_or(chunk)).map_err(fail)?;
                        self.advance(chunk.len());
                    }
                }
                _ => {
                    self.report.copied += 1;
                    for chunk in bytes.chunks(COPY) {
                        out.write_all(chunk).map_err(fail)?;
                        self.advance(chunk.len());
                    }
                }
            }
        }
        let file = out.into_inner().map_err(|e| fail(e.into_error()))?;
        file.sync_all().map_err(fail)
    }

    fn advance(&mut self, bytes: usize) {
        self.written += bytes as u64;
        (self.progress)(self.written, self.total);
    }
}

/// Some rows of W + scale B A, in W's dtype; none where nothing is added, so that such rows keep their bits. An error is the first sum
/// that is not finite.
fn add(
    rows: &[u8],
    dtype: Dtype,
    b: ArrayView2<'_, f32>,
    a: ArrayView2<'_, f32>,
    scale: f32,
) -> std::result::Result<Option<Vec<u8>>, f32> {
    // Fused experts have zeros in the half of B that is another pair's.
    let used = |k: &usize| b.column(*k).iter().any(|&x| x != 0.0);
    let first = (0..b.ncols()).find(used);
    let last = (0..b.ncols()).rfind(used);
    let (Some(first), Some(last)) = (first, last) else { return Ok(None) };
    if scale == 0.0 {
        return Ok(None);
    }
    let update = b.slice(s![.., first..=last]).dot(&a.slice(s![first..=last, ..]));
    let mut sum = Vec::with_capacity(rows.len());
    for (w, u) in rows.chunks_exact(dtype.size()).zip(&update) {
        // Not finite in the stored dtype is what counts: 65504 + 100 is infinite in f16.
        let (value, bytes): (f32, [u8; 4]) = match (dtype, w) {
            (Dtype::F32, &[p, q, r, s]) => {
                let value = f32::from_le_bytes([p, q, r, s]) + scale * u;
                (value, value.to_le_bytes())
            }
            (Dtype::F16, &[p, q]) => {
                let value = f16::from_f32(f16::from_le_bytes([p, q]).to_f32() + scale * u);
                let [p, q] = value.to_le_bytes();
                (value.to_f32(), [p, q, 0, 0])
            }
            (Dtype::Bf16, &[p, q]) => {
                let value = bf16::from_f32(bf16::from_le_bytes([p, q]).to_f32() + scale * u);
                let [p, q] = value.to_le_bytes();
                (value.to_f32(), [p, q, 0, 0])
            }
            // Chunks are of the dtype's size.
            _ => continue,
        };
        if !value.is_finite() {
            return Err(value);
        }
        sum.extend_from_slice(&bytes[..dtype.size()]);
    }
    Ok(Some(sum))
}

/// Copies what else belongs to the model.
fn copy_beside(base: &Path, folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(base).map_err(|e| Error::io(base, e))? {
        let path = entry.map_err(|e| Error::io(base, e))?.path();
        let Some(name) = path.file_name() else { continue };
        let text = name.to_string_lossy();
        let known = path.extension().is_some_and(|e| BESIDE.iter().any(|b| e == *b));
        let licence = ["LICENSE", "LICENCE", "NOTICE"].iter().any(|n| text.starts_with(n));
        // An index of other files, such as pytorch_model.bin.index.json, would point to what is not there.
        let other_index = text.ends_with(".index.json") && text != INDEX;
        if path.is_file() && (known || licence) && !other_index && !text.starts_with('.') {
            std::fs::copy(&path, folder.join(name)).map_err(|e| Error::io(&path, e))?;
        }
    }
    Ok(())
}
