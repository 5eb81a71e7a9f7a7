use crate::{
    Error, Header, Result,
    files::{Named, open_all},
    header::{Tensors, header_text},
    source::Source,
};
use safetensors::tensor::TensorInfo;
use std::{collections::BTreeMap, path::Path};

/// A safetensors file as other programs write it: with tensors of any type, which [`crate::Checkpoint`] would not open. For what copies
/// them, or needs names, shapes and single values only.
pub(crate) struct RawFile {
    source: Source,
    /// The JSON text.
    pub header: Vec<u8>,
    /// In the order of their bytes.
    pub tensors: Vec<(String, TensorInfo)>,
    pub metadata: BTreeMap<String, String>,
}

impl RawFile {
    pub fn open(path: &Path, most: u64) -> Result<Self> {
        Self::parse(Source::open(path)?, most)
    }

    /// The same of bytes in memory or in a file, with a header of at most `most` bytes.
    pub fn parse(source: Source, most: u64) -> Result<Self> {
        let (header, length) = header_text(&source, most)?;
        let Tensors { tensors, metadata } = Tensors::parse(&source.path, &header, length, |_| true)?;
        Ok(Self { source, header, tensors, metadata })
    }

    /// The file, or the files of a folder.
    pub fn open_all(path: &Path) -> Result<Vec<Self>> {
        open_all(path, |file| Self::open(file, Header::MAX_CHECKPOINT))
    }

    pub fn path(&self) -> &Path {
        &self.source.path
    }

    /// The bytes of a tensor.
    pub fn read(&self, info: &TensorInfo) -> Result<Vec<u8>> {
        let (mut bytes, size) = (Vec::new(), info.data_offsets.1 - info.data_offsets.0);
        bytes.try_reserve_exact(size).map_err(|_| {
            Error::checkpoint(
                self.path(),
                format!("a tensor of {size} bytes is more than this machine's memory"),
            )
        })?;
        bytes.resize(size, 0);
        self.read_at(info, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `out` with bytes of a tensor, from `at` on.
    pub fn read_at(&self, info: &TensorInfo, at: usize, out: &mut [u8]) -> Result<()> {
        self.source.read_at((8 + self.header.len() + info.data_offsets.0 + at) as u64, out)
    }
}

impl Named for RawFile {
    fn path(&self) -> &Path {
        self.path()
    }
    fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|(name, _)| name.as_str())
    }
}
