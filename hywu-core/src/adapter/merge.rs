//! W' = W + scale B A, a whole checkpoint at a time.

use super::{Adapter, Base, Names, matrices::Pair};
use crate::{
    ApplyResult, Dtype, Error, Result, create_folder_atomic, dtype::first_nan, files::INDEX,
    index::shard_path, raw::RawFile,
};
use indexmap::IndexMap;
use ndarray::{ArrayView2, s};
use safetensors::tensor::TensorInfo;
use std::{
    fs::File,
    io::{BufWriter, Write},
    ops::ControlFlow,
    path::Path,
};

/// How to merge.
#[derive(Clone, Debug)]
pub struct MergeOptions<'a> {
    /// What modules are called in the checkpoint.
    pub names: &'a Names,
    /// Which instance of a batch.
    pub instance: usize,
    /// Merge what fits of an adapter that has entries without a weight, or leaves out some layers or experts of what it is for.
    pub partial: bool,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergeReport {
    /// How the adapter and the checkpoint met, under the checkpoint's names.
    pub coverage: ApplyResult,
    /// Tensors that an update was added to.
    pub merged: usize,
    /// Tensors that were copied as they are.
    pub copied: usize,
    /// Files with tensors.
    pub files: usize,
}

/// Bytes of a tensor that are worked on at once, at least a row where something is added.
const CHUNK: usize = 1 << 22;
/// What else of a checkpoint's folder belongs to a model: configs, tokenizer, model code, licences.
const BESIDE: [&str; 6] = ["json", "txt", "model", "jinja", "md", "py"];

/// Writes the checkpoint `base` (a safetensors file, or a folder with `model.safetensors` or with shards and their index) with an
/// instance of the adapter added, into the new folder `output`: the same files with the same headers, every tensor of its own dtype.
/// Sums are f32 and rounded once. `base` is read a few rows at a time, and never written; tensors may be of any type, as most are copied
/// only.
///
/// A module `m` is the tensor `m.weight` [out, in] under the name that [`MergeOptions::names`] gives it; a grouped module is one tensor
/// an expert. What the adapter has for one layer or expert it must have for all of them, unless [`MergeOptions::partial`].
/// Configs, tokenizer, model code and licences of the folder are copied too; other formats of the weights, which would be the old ones,
/// are not. `progress` is told the bytes written and their number, and may end the work.
///
/// # Errors
/// [`Error::Adapter`] naming up to ten modules without an entry and entries without a module (with `partial`: if nothing fits), a tensor
/// of another shape with both shapes, or a sum that is not finite in the tensor's dtype; [`Error::Checkpoint`] for a damaged file, an
/// index that disagrees with its shards, or a tensor that holds NaN (infinity may be meant, such as in a mask that is only copied);
/// [`Error::Io`] when something can't be read or written, or `output` is there already; [`Error::Interrupted`] when `progress` says so.
/// Nothing is left behind then.
pub fn merge(
    adapter: &Adapter,
    base: impl AsRef<Path>,
    output: impl AsRef<Path>,
    options: &MergeOptions<'_>,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<MergeReport> {
    let (base, output) = (base.as_ref(), output.as_ref());
    let pairs = options.names.to_theirs(adapter, options.instance)?;
    let files = RawFile::open_all(base)?;
    let coverage = Base::of(&files).cover(&pairs, None)?;
    coverage.check(options.partial)?;
    for (name, info) in files.iter().flat_map(|f| &f.tensors) {
        addition(&pairs, name, info)?;
    }
    let mut task = Task {
        pairs: &pairs,
        scale: adapter.scale,
        report: MergeReport { coverage, merged: 0, copied: 0, files: files.len() },
        written: 0,
        total: files.iter().flat_map(|f| &f.tensors).map(|(_, info)| size(info) as u64).sum(),
        progress,
    };
    create_folder_atomic(output, |folder| -> Result<()> {
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

/// What is added to a tensor, if anything, which must be of a type that can be summed in.
fn addition<'a>(
    pairs: &'a IndexMap<String, Pair>,
    name: &str,
    info: &TensorInfo,
) -> Result<Option<(&'a Pair, Dtype)>> {
    let Some(pair) = name.strip_suffix(".weight").and_then(|module| pairs.get(module)) else {
        return Ok(None);
    };
    let bad = || {
        let dtype = info.dtype;
        Error::Adapter(format!("tensor `{name}` has dtype {dtype:?}; F32, F16 and BF16 can be merged into"))
    };
    Ok(Some((pair, Dtype::of(info.dtype).ok_or_else(bad)?)))
}

struct Task<'a> {
    pairs: &'a IndexMap<String, Pair>,
    scale: f32,
    report: MergeReport,
    written: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64) -> ControlFlow<()>,
}

impl Task<'_> {
    /// A file of the same name in `folder`.
    fn write(&mut self, file: &RawFile, folder: &Path) -> Result<()> {
        let name =
            file.path().file_name().ok_or_else(|| Error::checkpoint(file.path(), "it has no file name"))?;
        let path = folder.join(name);
        let fail = |e| Error::io(&path, e);
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&path).map_err(fail)?);
        // The same header word for word: types, shapes and order stay.
        out.write_all(&(file.header.len() as u64).to_le_bytes()).map_err(fail)?;
        out.write_all(&file.header).map_err(fail)?;
        let mut buffer = Vec::new();
        for (name, info) in &file.tensors {
            let merging = addition(self.pairs, name, info)?;
            // Whole rows where something is added.
            let row = merging.map_or(1, |(pair, dtype)| pair.a.ncols() * dtype.size());
            let chunk = (CHUNK / row).max(1) * row;
            for at in (0..size(info)).step_by(chunk) {
                buffer.resize(chunk.min(size(info) - at), 0);
                file.read_at(info, at, &mut buffer)?;
                if let Some(i) = first_nan(&buffer, info.dtype) {
                    let i = at * 8 / info.dtype.bitsize() + i;
                    let what = format!("tensor `{name}` holds NaN at element {i}");
                    return Err(Error::checkpoint(file.path(), what));
                }
                if let Some((pair, dtype)) = merging {
                    let rows = at / row..(at + buffer.len()) / row;
                    let b = pair.b.slice(s![rows, ..]);
                    add(&mut buffer, dtype, b, pair.a.view(), self.scale).map_err(|bad| {
                        Error::Adapter(format!("tensor `{name}` would hold {bad} after the merge"))
                    })?;
                }
                out.write_all(&buffer).map_err(fail)?;
                self.written += buffer.len() as u64;
                if (self.progress)(self.written, self.total).is_break() {
                    return Err(Error::Interrupted);
                }
            }
            match merging {
                Some(_) => self.report.merged += 1,
                None => self.report.copied += 1,
            }
        }
        let file = out.into_inner().map_err(|e| fail(e.into_error()))?;
        file.sync_all().map_err(fail)
    }
}

/// Bytes of a tensor.
fn size(info: &TensorInfo) -> usize {
    info.data_offsets.1 - info.data_offsets.0
}

/// Some rows of W become W + scale B A, in W's type. Where nothing is added they keep their bits. An error is the first sum that is not
/// finite in that type: 65504 + 100 is infinite in f16.
fn add(
    rows: &mut Vec<u8>,
    dtype: Dtype,
    b: ArrayView2<'_, f32>,
    a: ArrayView2<'_, f32>,
    scale: f32,
) -> std::result::Result<(), f32> {
    // Fused experts have zeros in the half of B that is another pair's.
    let used = |k: &usize| b.column(*k).iter().any(|&x| x != 0.0);
    let (first, last) = ((0..b.ncols()).find(used), (0..b.ncols()).rfind(used));
    let (Some(first), Some(last)) = (first, last) else { return Ok(()) };
    if scale == 0.0 {
        return Ok(());
    }
    let update = b.slice(s![.., first..=last]).dot(&a.slice(s![first..=last, ..]));
    let mut sums = vec![0.0; update.len()];
    dtype.decode(rows, &mut sums);
    sums.iter_mut().zip(&update).for_each(|(w, u)| *w += scale * u);
    match dtype.first_not_finite(&sums) {
        Some(bad) => Err(bad),
        None => {
            rows.clear();
            dtype.encode(&sums, rows);
            Ok(())
        }
    }
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
            // A link may lead where a shard's may, and no further.
            let outside = |_| Error::checkpoint(&path, "it is a link that leaves the folder");
            let from = shard_path(&path, base, &text).map_err(outside)?;
            std::fs::copy(&from, folder.join(name)).map_err(|e| Error::io(&path, e))?;
        }
    }
    Ok(())
}
