//! Which tokens the entries have and which keys a query sees, on the device: `kernels-cu/attention/extents.cuh`.

use super::integers;
use crate::{
    Result, Tensor,
    cuda::Words,
    ops::attention::{Attention, Entry, Extents},
};

/// In device memory, where they are lists.
pub(super) struct Tables {
    entries: Option<Words>,
    limits: Option<Words>,
    alike: Entry,
    batch1: usize,
}

/// The struct `Entry` of the kernels.
fn words(e: &Entry) -> [usize; 5] {
    [e.query, e.queries, e.key, e.keys, e.limits]
}

impl Tables {
    /// Where `like` is.
    ///
    /// # Errors
    /// A tensor on the host, sizes beyond 2^31, not enough memory.
    pub fn new(like: &Tensor, args: &Attention, extents: &Extents) -> Result<Self> {
        let list = |values: &[usize]| (!values.is_empty()).then(|| Words::sizes(like, values)).transpose();
        let entries: Vec<usize> = extents.entries.iter().flat_map(words).collect();
        let alike = Entry { query: 0, queries: args.queries, key: 0, keys: args.keys, limits: 0 };
        Ok(Self { entries: list(&entries)?, limits: list(&extents.limits)?, alike, batch1: args.batch[1] })
    }
    /// The struct `Extents` of the kernels.
    ///
    /// # Errors
    /// Sizes beyond 2^31.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        let address = |words: &Option<Words>| words.as_ref().map_or(0, Words::address).to_le_bytes();
        let mut bytes = [address(&self.entries), address(&self.limits)].concat();
        bytes.extend(integers(&words(&self.alike))?);
        bytes.extend(integers(&[self.batch1])?);
        Ok(bytes)
    }
}
