//! Hashes of contents, for provenance and for the adapter cache.

use anyhow::Result;
use hywu_core::{Adapter, Checkpoint, Dtype, Error};
use hywu_diffusion::Picture;
use hywu_kernels::{Device, ParamSet};
use ndarray::ArrayD;
use rayon::prelude::*;

/// A BLAKE3 hash over parts. Every part ends with its length, so that different parts never look alike put together.
pub struct ContentHash(blake3::Hasher);

impl ContentHash {
    /// Of contents of this kind; those of another kind have other hashes.
    pub fn new(kind: &str) -> Self {
        let mut hash = Self(blake3::Hasher::new());
        hash.text(kind);
        hash
    }

    /// Adds a text.
    pub fn text(&mut self, part: &str) -> &mut Self {
        self.0.update(part.as_bytes());
        self.length(part.len() as u64)
    }

    /// Adds words of 32 bits.
    pub fn words(&mut self, part: impl IntoIterator<Item = u32>) -> &mut Self {
        // BLAKE3 is fast on long inputs only.
        let (mut block, mut filled, mut length) = ([0; 1 << 14], 0, 0);
        for word in part {
            if filled == block.len() {
                self.0.update(&block);
                filled = 0;
            }
            block[filled..filled + 4].copy_from_slice(&word.to_le_bytes());
            filled += 4;
            length += 4;
        }
        self.0.update(&block[..filled]);
        self.length(length)
    }

    /// Adds the sizes of an array and its values, bit by bit.
    pub fn array<'a>(&mut self, shape: &[usize], values: impl IntoIterator<Item = &'a f32>) -> &mut Self {
        self.words(shape.iter().flat_map(|n| [*n as u32, (*n as u64 >> 32) as u32]));
        self.words(values.into_iter().map(|v| v.to_bits()))
    }

    fn length(&mut self, bytes: u64) -> &mut Self {
        self.0.update(&bytes.to_le_bytes());
        self
    }

    /// The hash, 64 hexadecimal digits.
    pub fn finish(&self) -> String {
        self.0.finalize().to_hex().to_string()
    }
}

/// Of named weights, wherever they are, in their order.
///
/// # Errors
/// Those of the device.
pub fn of_weights<'a>(sets: impl IntoIterator<Item = &'a ParamSet>) -> Result<String> {
    let mut hash = ContentHash::new("weights");
    for set in sets {
        for (name, tensor) in set.to(Device::Cpu, Dtype::F32)?.iter() {
            hash.text(name).array(tensor.shape(), tensor.data());
        }
    }
    Ok(hash.finish())
}

/// Bytes at either end of a tensor that are read and hashed. The published generator has 16 GB: to read all of it for this would
/// take longer than a pass on a GPU.
const PIECE: usize = 1 << 20;

/// Of both ends of a checkpoint's tensors as they are stored, in whatever shards, their sizes, and the config that goes with them.
///
/// # Errors
/// A file that can't be read; [`Error::Interrupted`] when `stop` says so, which is asked before every piece of a tensor.
pub fn of_checkpoint(config: &str, file: &Checkpoint, stop: impl Fn() -> bool + Sync) -> Result<String> {
    let tensor = |name: &&str| -> Result<String> {
        let (shape, dtype) = file.info(name)?;
        let mut hash = ContentHash::new("tensor");
        hash.text(name).text(&format!("{dtype:?} {shape:?}"));
        let size = shape.iter().product::<usize>() * dtype.size();
        let mut piece = vec![0; PIECE.min(size)];
        let starts = if size <= 2 * PIECE { vec![0, PIECE] } else { vec![0, size - PIECE] };
        for start in starts.into_iter().filter(|start| *start < size) {
            if stop() {
                return Err(Error::Interrupted.into());
            }
            let piece = &mut piece[..PIECE.min(size - start)];
            file.read_stored(name, start, piece)?;
            hash.0.update(piece);
        }
        Ok(hash.length(size as u64).finish())
    };
    // Tensor by tensor, on all cores: the largest checkpoints have many of nearly the same size.
    let tensors = file.names().par_iter().map(tensor).collect::<Result<Vec<_>>>()?;
    let mut hash = ContentHash::new("checkpoint");
    hash.text(config);
    tensors.iter().for_each(|tensor| {
        hash.text(tensor);
    });
    Ok(hash.finish())
}

/// Of a condition that a generator is given.
pub fn of_condition(condition: &ArrayD<f32>) -> String {
    ContentHash::new("condition").array(condition.shape(), condition).finish()
}

/// Of an adapter's pairs, in whatever order, and its scale; not of its metadata.
pub fn of_adapter(adapter: &Adapter) -> String {
    let mut hash = ContentHash::new("adapter");
    hash.array(&[], [&adapter.scale]);
    let mut modules: Vec<_> = adapter.modules.iter().collect();
    modules.sort_by_key(|(name, _)| *name);
    for (name, lora) in modules {
        hash.text(name);
        for array in [&lora.lora_a, &lora.lora_b] {
            hash.array(array.shape(), array);
        }
    }
    hash.finish()
}

/// Of a picture's colours; a generator sees no alpha.
pub fn of_picture(picture: &Picture) -> String {
    ContentHash::new("picture").array(&[picture.height, picture.width, 3], &picture.rgb).finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_run_into_each_other() {
        let texts = |parts: &[&str]| {
            let mut hash = ContentHash::new("test");
            parts.iter().for_each(|part| {
                hash.text(part);
            });
            hash.finish()
        };
        let all = [&["ab", "c"][..], &["a", "bc"], &["abc"], &["abc", ""], &["", "abc"], &[]].map(texts);
        let different: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(different.len(), all.len());
        assert!(all.iter().all(|hash| hash.len() == 64));
        let shaped = |shape: &[usize]| ContentHash::new("test").array(shape, &[0.0; 6]).finish();
        assert_ne!(shaped(&[2, 3]), shaped(&[3, 2]));
    }

    #[test]
    fn long_parts_are_hashed_whole() {
        let words = |n: u32, last: u32| ContentHash::new("test").words((1..n).chain([last])).finish();
        // Around the size of a block.
        for n in [4095, 4096, 4097, 9000] {
            assert_ne!(words(n, 0), words(n, 1), "{n}");
            assert_ne!(words(n, n), words(n + 1, n + 1), "{n}");
            // As if it were added in one piece.
            let bytes: Vec<u8> = (1..=n).flat_map(u32::to_le_bytes).collect();
            let mut whole = ContentHash::new("test");
            whole.0.update(&bytes);
            assert_eq!(words(n, n), whole.length(bytes.len() as u64).finish(), "{n}");
        }
    }
}
