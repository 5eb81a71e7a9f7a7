use crate::{Dtype, Error, Result, parse_json, source::Source};
use safetensors::tensor::{Dtype as Stored, Metadata, TensorInfo};
use serde_json::value::RawValue;
use std::{collections::BTreeMap, path::Path};

/// What a safetensors file says of its tensors: checked, before any of them is read.
#[derive(Debug, Default, PartialEq)]
pub struct Header {
    /// Tensors by name.
    pub tensors: BTreeMap<String, Entry>,
    /// Its `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// Where its bytes start in the file; there are [`Entry::size`] of them.
    pub start: u64,
}

impl Entry {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
    /// Bytes that it takes.
    pub fn size(&self) -> usize {
        self.numel() * self.dtype.size()
    }
}

/// Bytes before the header: its length.
const PREFIX: u64 = 8;
/// Most axes of a tensor.
const MAX_AXES: usize = 16;

impl Header {
    /// Longest header of a checkpoint's file, in bytes.
    pub const MAX_CHECKPOINT: u64 = 100_000_000;
    /// Longest header of an adapter, in bytes.
    pub const MAX_ADAPTER: u64 = 8_000_000;

    /// Reads a file's header of at most `most` bytes. No memory is taken for a longer one.
    pub(crate) fn read(source: &Source, most: u64) -> Result<Self> {
        let (text, length) = header_text(source, most)?;
        Self::parse(&source.path, &text, length)
    }

    /// Parses the JSON text that follows the first eight bytes of a file of `length` bytes; `path` is for the errors.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for anything but a safetensors header (<https://huggingface.co/docs/safetensors>): a name twice, a dtype
    /// other than F32, F16 and BF16, a size that is not its shape's, tensors that overlap or leave holes, a file that is longer or
    /// shorter than they are; names with control characters.
    pub fn parse(path: impl AsRef<Path>, text: &[u8], length: u64) -> Result<Self> {
        let Tensors { tensors, metadata } =
            Tensors::parse(path.as_ref(), text, length, |stored| Dtype::of(stored).is_some())?;
        let data = PREFIX + text.len() as u64;
        let entry = |(name, info): (String, TensorInfo)| {
            let start = data.saturating_add(info.data_offsets.0 as u64);
            Some((name, Entry { dtype: Dtype::of(info.dtype)?, shape: info.shape, start }))
        };
        Ok(Self { tensors: tensors.into_iter().filter_map(entry).collect(), metadata })
    }
}

/// What a header holds, with tensors of any type.
pub(crate) struct Tensors {
    /// In the order of their bytes.
    pub tensors: Vec<(String, TensorInfo)>,
    pub metadata: BTreeMap<String, String>,
}

impl Tensors {
    /// As [`Header::parse`], but with tensors of the types that `takes` says.
    pub fn parse(path: &Path, text: &[u8], length: u64, takes: impl Fn(Stored) -> bool) -> Result<Self> {
        let bad = |what: String| Error::checkpoint(path, what);
        let damaged = |e: &dyn std::fmt::Display| bad(format!("not a valid safetensors file: {e}"));
        let mut json: BTreeMap<String, Box<RawValue>> = parse_json(text).map_err(|e| damaged(&e))?;
        let metadata = match json.remove("__metadata__") {
            Some(metadata) => serde_json::from_str(metadata.get())
                .map_err(|e| damaged(&format_args!("metadata is not text alone: {e}")))?,
            None => BTreeMap::new(),
        };
        let mut tensors = Vec::new();
        for (name, value) in json {
            let info: TensorInfo = serde_json::from_str(value.get()).map_err(|e| {
                bad(format!("tensor `{name}` is not described as in a safetensors file: {e}"))
            })?;
            if !takes(info.dtype) {
                let what =
                    format!("tensor `{name}` has dtype {:?}; F32, F16 and BF16 are supported", info.dtype);
                return Err(bad(what));
            }
            check_name(&name).map_err(&bad)?;
            if info.shape.len() > MAX_AXES {
                let what = format!(
                    "tensor `{name}` has {} axes; at most {MAX_AXES} are supported",
                    info.shape.len()
                );
                return Err(bad(what));
            }
            tensors.push((name, info));
        }
        tensors.sort_by_key(|(_, info)| info.data_offsets);
        // The library checks sizes against shapes, and that each tensor starts where the one before it ends.
        let end = Metadata::new(None, tensors.clone()).map_err(|e| damaged(&e))?.data_len() as u64;
        let held = length.saturating_sub(PREFIX + text.len() as u64);
        match held.cmp(&end) {
            std::cmp::Ordering::Equal => Ok(Self { tensors, metadata }),
            std::cmp::Ordering::Less => {
                Err(bad(format!("truncated: {held} bytes of tensors where its header tells of {end}")))
            }
            std::cmp::Ordering::Greater => {
                Err(bad(format!("{held} bytes of tensors where its header tells of {end}")))
            }
        }
    }
}

/// Names reach terminals, and files that are written are read again.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    if name.contains(char::is_control) {
        return Err(format!("the name of tensor `{name}` holds control characters"));
    }
    Ok(())
}

/// The JSON text of a file's header, of at most `most` bytes, and the length of the file.
pub(crate) fn header_text(source: &Source, most: u64) -> Result<(Vec<u8>, u64)> {
    let bad = |what| Err(Error::checkpoint(&source.path, what));
    let length = source.len()?;
    if length < PREFIX {
        return bad(format!("{length} bytes are too few for a safetensors file"));
    }
    let mut prefix = [0; PREFIX as usize];
    source.read_at(0, &mut prefix)?;
    let header = u64::from_le_bytes(prefix);
    if header > most {
        return bad(format!(
            "not a safetensors file, or its header of {header} bytes is longer than the {most} allowed"
        ));
    }
    if header > length - PREFIX {
        return bad(format!("truncated: a header of {header} bytes in a file of {length}"));
    }
    let mut text = vec![0; header as usize];
    source.read_at(PREFIX, &mut text)?;
    Ok((text, length))
}
