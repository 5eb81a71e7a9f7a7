use crate::{
    Dtype, Error, Header, Index, Result,
    checkpoint::{INDEX, SINGLE},
    header::read_text,
    index::shard_path,
    parse_json, read_small,
    source::Source,
};
use safetensors::tensor::{Dtype as Stored, Metadata, TensorInfo};
use std::{collections::BTreeMap, path::Path};

/// A safetensors file as other programs write it: with tensors of any type, which [`crate::Checkpoint`] would not open. For what copies
/// them, or needs single values only.
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
        let bad = |what: String| Error::checkpoint(&source.path, what);
        let (header, length) = read_text(&source, most)?;
        let parsed: Metadata =
            parse_json(&header).map_err(|e| bad(format!("not a valid safetensors file: {e}")))?;
        let (told, held) = (parsed.data_len() as u64, length - 8 - header.len() as u64);
        if told != held {
            return Err(bad(format!("{held} bytes of tensors where its header tells of {told}")));
        }
        let mut tensors: Vec<_> = parsed.tensors().into_iter().map(|(n, info)| (n, info.clone())).collect();
        tensors.sort_by_key(|(_, info)| info.data_offsets);
        let metadata = parsed.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
        Ok(Self { source, header, tensors, metadata })
    }

    /// The file, or the files of a folder.
    pub fn open_all(path: &Path) -> Result<Vec<Self>> {
        let index = path.join(INDEX);
        let files = if !path.is_dir() {
            vec![path.to_owned()]
        } else if index.is_file() {
            let parsed = Index::parse(&index, &read_small(&index, Index::MAX_BYTES)?)?;
            let shard = |name: &&str| shard_path(&index, path, name);
            parsed.shards().keys().map(shard).collect::<Result<Vec<_>>>()?
        } else if path.join(SINGLE).is_file() {
            vec![path.join(SINGLE)]
        } else {
            return Err(Error::checkpoint(path, format!("the folder holds neither {SINGLE} nor {INDEX}")));
        };
        files.iter().map(|file| Self::open(file, Header::MAX_CHECKPOINT)).collect()
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

/// The type, if it is one that this project computes with.
pub(crate) fn dtype_of(stored: Stored) -> Option<Dtype> {
    match stored {
        Stored::F32 => Some(Dtype::F32),
        Stored::F16 => Some(Dtype::F16),
        Stored::BF16 => Some(Dtype::Bf16),
        _ => None,
    }
}
