use crate::{AtomicFile, Dtype, Error, Result, checkpoint::beyond, header::check_name};
use half::bf16;
use indexmap::IndexMap;
use ndarray::{CowArray, IxDyn};
use serde_json::{Map, Value, json};
use std::{
    collections::BTreeMap,
    io::{Seek, SeekFrom, Write},
    path::Path,
};

/// Longest header that readers of the format take.
const MAX_HEADER: usize = 100_000_000;
/// Numbers that are converted at a time.
const CHUNK: usize = 1 << 14;

/// A safetensors file that is larger than memory should hold: names, dtypes and shapes are known first, values come piece by piece. It
/// appears whole at the end, or not at all.
pub struct TensorFile {
    file: AtomicFile,
    places: IndexMap<String, Place>,
    /// Where the next byte goes, and bytes of values so far.
    at: u64,
    written: u64,
    bytes: u64,
}

struct Place {
    dtype: Dtype,
    start: u64,
    len: usize,
}

/// What stands where in a file, before any of it is written.
struct Layout {
    /// Everything before the values.
    head: Vec<u8>,
    places: IndexMap<String, Place>,
    /// Bytes of values.
    bytes: u64,
}

impl Layout {
    fn new(
        path: &Path,
        tensors: impl IntoIterator<Item = (String, Dtype, Vec<usize>)>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let bad = |what: String| Error::checkpoint(path, what);
        let mut header = Map::new();
        if !metadata.is_empty() {
            header.insert("__metadata__".into(), json!(metadata));
        }
        let (mut places, mut end) = (IndexMap::new(), 0u64);
        for (name, dtype, shape) in tensors {
            check_name(&name).map_err(&bad)?;
            let len = shape.iter().try_fold(1usize, |n, &x| n.checked_mul(x));
            let Some((len, bytes)) = len.and_then(|n| Some((n, n.checked_mul(dtype.size())?))) else {
                return Err(bad(format!("tensor `{name}` of shape {shape:?} is too large")));
            };
            let start = end;
            end += bytes as u64;
            let entry = json!({"dtype": dtype.stored(), "shape": shape, "data_offsets": [start, end]});
            header.insert(name.clone(), entry);
            if places.insert(name.clone(), Place { dtype, start, len }).is_some() {
                return Err(bad(format!("tensor `{name}` comes twice")));
            }
        }
        let mut text = Value::from(header).to_string().into_bytes();
        // Values start at a multiple of 8.
        text.resize(text.len().next_multiple_of(8), b' ');
        if text.len() > MAX_HEADER {
            return Err(bad(format!("{} tensors have a header of {} bytes", places.len(), text.len())));
        }
        let head = [&(text.len() as u64).to_le_bytes()[..], &text].concat();
        places.values_mut().for_each(|place| place.start += head.len() as u64);
        Ok(Self { head, places, bytes: end })
    }
}

impl TensorFile {
    /// A file with these tensors, which lie in it in this order: pieces that come in order are written without seeking.
    ///
    /// # Errors
    /// [`Error::Io`] when the file can't be made or the disk has no room for it; [`Error::Checkpoint`] for a name that comes twice or
    /// holds control characters, or so many tensors that no reader would take the header.
    pub fn create(
        path: impl AsRef<Path>,
        tensors: impl IntoIterator<Item = (String, Dtype, Vec<usize>)>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let path = path.as_ref();
        let Layout { head, places, bytes } = Layout::new(path, tensors, metadata)?;
        let mut file = AtomicFile::create(path)?;
        let at = head.len() as u64;
        file.reserve(at + bytes)?;
        file.write_all(&head).map_err(|e| Error::io(path, e))?;
        Ok(Self { file, places, at, written: 0, bytes })
    }

    /// Bytes of a file with these tensors and this metadata; `path` is for the errors.
    pub(crate) fn size(
        path: &Path,
        tensors: impl IntoIterator<Item = (String, Dtype, Vec<usize>)>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<u64> {
        let layout = Layout::new(path, tensors, metadata)?;
        Ok(layout.head.len() as u64 + layout.bytes)
    }

    /// Writes a file of arrays whole: the widest type first, so that every value lies at a multiple of its size, then by name.
    pub(crate) fn write_whole(
        path: &Path,
        mut arrays: Vec<(String, Dtype, CowArray<'_, f32, IxDyn>)>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<()> {
        arrays.sort_by(|(x, t, _), (y, u, _)| u.size().cmp(&t.size()).then_with(|| x.cmp(y)));
        let tensors =
            arrays.iter().map(|(name, dtype, array)| (name.clone(), *dtype, array.shape().to_vec()));
        let mut file = Self::create(path, tensors, metadata)?;
        for (name, _, array) in &arrays {
            match array.as_slice() {
                Some(values) => file.put(name, 0, values)?,
                None => file.put(name, 0, &array.iter().copied().collect::<Vec<_>>())?,
            }
        }
        file.finish()
    }

    /// Writes elements `start ..` of a tensor, rounded to its dtype.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for elements that the tensor has not, and for finite ones that its dtype would make infinite; [`Error::Io`]
    /// when the disk is full.
    pub fn put(&mut self, name: &str, start: usize, values: &[f32]) -> Result<()> {
        let dtype = self.seek(name, start, values.len())?;
        if let Some(i) = dtype.first_beyond(values) {
            return Err(beyond(self.file.path(), name, start + i, values[i], dtype));
        }
        let mut bytes = Vec::with_capacity(CHUNK * dtype.size());
        for values in values.chunks(CHUNK) {
            bytes.clear();
            dtype.encode(values, &mut bytes);
            self.append(&bytes)?;
        }
        Ok(())
    }

    /// Writes elements `start ..` of a tensor that is stored in bf16.
    ///
    /// # Errors
    /// As [`TensorFile::put`]; a tensor of another dtype.
    pub fn put_bf16(&mut self, name: &str, start: usize, values: &[bf16]) -> Result<()> {
        let dtype = self.seek(name, start, values.len())?;
        if dtype != Dtype::Bf16 {
            return Err(Error::checkpoint(self.file.path(), format!("tensor `{name}` is {dtype:?}")));
        }
        let mut bytes = Vec::with_capacity(CHUNK * 2);
        for values in values.chunks(CHUNK) {
            bytes.clear();
            bytes.extend(values.iter().flat_map(|x| x.to_le_bytes()));
            self.append(&bytes)?;
        }
        Ok(())
    }

    fn seek(&mut self, name: &str, start: usize, len: usize) -> Result<Dtype> {
        let path = self.file.path();
        let place = self.places.get(name).filter(|p| start.checked_add(len).is_some_and(|end| end <= p.len));
        let Some(place) = place else {
            return Err(Error::checkpoint(path, format!("tensor `{name}` has no elements {start} + {len}")));
        };
        let to = place.start + (start * place.dtype.size()) as u64;
        if to != self.at {
            self.file.seek(SeekFrom::Start(to)).map_err(|e| Error::io(self.file.path(), e))?;
            self.at = to;
        }
        Ok(place.dtype)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| Error::io(self.file.path(), e))?;
        self.at += bytes.len() as u64;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Lets the file appear.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when not as much was written as the tensors have; [`Error::Io`] when the disk is full.
    pub fn finish(self) -> Result<()> {
        if self.written != self.bytes {
            let what = format!("{} of {} bytes were written", self.written, self.bytes);
            return Err(Error::checkpoint(self.file.path(), what));
        }
        self.file.commit()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Checkpoint;

    fn tensors() -> [(String, Dtype, Vec<usize>); 3] {
        [("b", Dtype::Bf16, vec![2, 3]), ("a", Dtype::F32, vec![]), ("c", Dtype::F16, vec![4])]
            .map(|(name, dtype, shape)| (name.to_owned(), dtype, shape))
    }

    #[test]
    fn pieces_in_any_order_make_a_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x.safetensors");
        let metadata = [("k".to_owned(), "v".to_owned())].into();
        let mut file = TensorFile::create(&path, tensors(), &metadata).expect("writable");
        file.put("b", 4, &[5.0, 6.0]).expect("there");
        file.put("c", 0, &[0.5; 4]).expect("there");
        file.put_bf16("b", 0, &[1.0, 2.0, 3.0, 4.0].map(bf16::from_f32)).expect("there");
        file.put("a", 0, &[7.0]).expect("there");
        assert!(!path.exists());
        file.finish().expect("whole");
        let read = Checkpoint::open(&path).expect("a good file");
        let values = |name| read.read(name).expect("there").iter().copied().collect::<Vec<_>>();
        assert_eq!(values("b"), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!((values("a"), values("c")), (vec![7.0], vec![0.5; 4]));
        assert_eq!(read.info("b").expect("there"), (vec![2, 3], Dtype::Bf16));
        assert_eq!(*read.metadata(), metadata);
        let mut part = [0; 4];
        read.read_stored("b", 8, &mut part).expect("there");
        assert_eq!(part, [0xa0, 0x40, 0xc0, 0x40]);
        assert!(read.read_stored("b", 9, &mut part).is_err());
    }

    #[test]
    fn unfinished_files_leave_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x.safetensors");
        let mut file = TensorFile::create(&path, tensors(), &BTreeMap::new()).expect("writable");
        for (name, start, len) in [("b", 5, 2), ("b", usize::MAX, 2), ("d", 0, 1)] {
            assert!(file.put(name, start, &vec![0.0; len]).is_err(), "{name} {start}");
        }
        assert!(file.put_bf16("a", 0, &[bf16::ZERO]).is_err());
        // The largest that is rounded down, and the least that is not.
        for (name, start, most, over) in [("b", 2, 3.394e38, 3.397e38), ("c", 3, 65_519.0, -65_520.0)] {
            let e = file.put(name, start, &[over]).expect_err("infinite").to_string();
            assert!(e.contains(&format!("`{name}`")) && e.contains(&format!("element {start}")), "{e}");
            assert_eq!(file.written, 0);
            file.put(name, start, &[most]).expect("finite");
            file.written = 0;
        }
        file.put("b", 0, &[0.0; 6]).expect("there");
        let e = file.finish().expect_err("two are missing").to_string();
        assert!(e.contains("12 of 24 bytes"), "{e}");
        assert_eq!(std::fs::read_dir(folder.path()).expect("readable").count(), 0);
        let twice = tensors().into_iter().chain(tensors().into_iter().take(1));
        assert!(TensorFile::create(&path, twice, &BTreeMap::new()).is_err());
    }
}
