//! How rows divide, for kernels: the structs of `kernels-cu/low_rank_linear/rows.cuh`, and where rows lie in S.

use super::{OP, int};
use crate::{
    Result, Tensor,
    cuda::{Words, call::on_gpu},
    ops::low_rank_linear::Segments,
};
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

/// Rows of zeros before, between and behind the instances in S, as in rows.cuh.
const BAND: usize = 128;
/// A row of S is a multiple of so many elements: whole packs of 16 bytes in any dtype.
const PAD: usize = 8;

/// What devices keep about [`Segments`], uploaded once: tables of a kind on a device.
#[derive(Default)]
pub(crate) struct Tables(Mutex<HashMap<(usize, Kind), Arc<Words>>>);

impl fmt::Debug for Tables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tables")
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    /// `RowTile`s of a height.
    Tiles(usize),
    /// A `Segment` for each that has an adapter.
    Adapters,
    /// A `Segment` for the rows of each weight.
    Weights,
}

impl Tables {
    /// That of a kind where `like` is, made of the numbers of its structs at the first call.
    fn get(&self, like: &Tensor, kind: Kind, make: impl FnOnce() -> Vec<usize>) -> Result<Arc<Words>> {
        let key = (on_gpu(OP, like)?.gpu().ordinal(), kind);
        // The map is never left half-changed.
        let mut tables = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = tables.get(&key) {
            return Ok(table.clone());
        }
        let table = Arc::new(Words::sizes(like, &make())?);
        tables.insert(key, table.clone());
        Ok(table)
    }
}

/// `struct Rows` of rows.cuh and the tables that it points to, which must be kept until the kernel is launched. Without tables the rows
/// have one weight, and the adapters divide them evenly.
pub(super) struct Rows {
    tiles: Option<Arc<Words>>,
    segments: Option<Arc<Words>>,
    m: usize,
    each: usize,
    /// Tiles, or entries.
    pub count: usize,
    /// Rows of the longest tile or entry.
    pub longest: usize,
}

impl Rows {
    /// Tiles of at most `height` rows over `rows` rows, for products whose rows are those of x; `adapters` divide them evenly where there
    /// are no segments.
    ///
    /// # Errors
    /// Not enough memory on the device of `like`.
    pub fn new(
        like: &Tensor,
        segments: Option<&Segments>,
        rows: usize,
        adapters: usize,
        height: usize,
    ) -> Result<Self> {
        let adapted = Self::adapters(like, segments, rows, adapters)?;
        let segments = &*Segments::cover(segments, rows, adapters);
        if segments.is_even().is_some() {
            return Ok(Self { count: rows.div_ceil(height), longest: height, ..adapted });
        }
        let tiles = segments.tables().get(like, Kind::Tiles(height), || tiles(segments, height))?;
        let count = tiles.len() / 5;
        Ok(Self { tiles: Some(tiles), count, longest: height, ..adapted })
    }

    /// The segments that have an adapter as entries, for products over the rows of each.
    ///
    /// # Errors
    /// As [`Rows::new`].
    pub fn adapters(
        like: &Tensor,
        segments: Option<&Segments>,
        rows: usize,
        adapters: usize,
    ) -> Result<Self> {
        let segments = &*Segments::cover(segments, rows, adapters);
        if let Some(adapters) = segments.is_even() {
            let each = rows.checked_div(adapters).unwrap_or(0);
            return Ok(Self { tiles: None, segments: None, m: rows, each, count: adapters, longest: each });
        }
        let table = segments.tables().get(like, Kind::Adapters, || {
            entries(instances(segments).map(|i| [i.row, i.rows, i.adapter, i.low]))
        })?;
        let longest = instances(segments).map(|i| i.rows).max().unwrap_or(0);
        let count = table.len() / 4;
        Ok(Self { tiles: None, segments: Some(table), m: rows, each: 0, count, longest })
    }

    /// The weights that have rows as entries, `adapter` being the weight, for products over the rows of each.
    ///
    /// # Errors
    /// As [`Rows::new`].
    pub fn weights(like: &Tensor, segments: Option<&Segments>, rows: usize) -> Result<Self> {
        let segments = &*Segments::cover(segments, rows, 0);
        if segments.is_even().is_some() {
            return Ok(Self { tiles: None, segments: None, m: rows, each: rows, count: 1, longest: rows });
        }
        let table = segments.tables().get(like, Kind::Weights, || {
            entries(segments.runs().map(|(weight, rows, _)| [rows.start, rows.len(), weight, 0]))
        })?;
        let longest = segments.runs().map(|(_, rows, _)| rows.len()).max().unwrap_or(0);
        let count = table.len() / 4;
        Ok(Self { tiles: None, segments: Some(table), m: rows, each: 0, count, longest })
    }

    /// The struct; `pitch` is the length of a row of S.
    ///
    /// # Errors
    /// Sizes beyond 2^31.
    pub fn bytes(&self, pitch: usize) -> Result<[u8; 32]> {
        let mut bytes = [0; 32];
        let address = |table: &Option<Arc<Words>>| table.as_ref().map_or(0, |t| t.address());
        bytes[..8].copy_from_slice(&address(&self.tiles).to_le_bytes());
        bytes[8..16].copy_from_slice(&address(&self.segments).to_le_bytes());
        for (to, size) in bytes[16..].chunks_mut(4).zip([self.m, self.each, self.count, pitch]) {
            to.copy_from_slice(&int(size)?.to_le_bytes());
        }
        Ok(bytes)
    }
}

/// A segment with an adapter: `struct Segment` of rows.cuh.
#[derive(Clone, Copy)]
struct Instance {
    row: usize,
    rows: usize,
    adapter: usize,
    low: usize,
}

fn instances(segments: &Segments) -> impl Iterator<Item = Instance> {
    let adapted = segments.placed().filter_map(|(row, s)| Some((row, s.rows, s.adapter?)));
    adapted.scan(BAND, |low, (row, rows, adapter)| {
        let instance = Instance { row, rows, adapter, low: *low };
        *low += rows + BAND;
        Some(instance)
    })
}

fn entries(of: impl Iterator<Item = [usize; 4]>) -> Vec<usize> {
    of.flatten().collect()
}

/// `RowTile`s, of five numbers.
fn tiles(segments: &Segments, height: usize) -> Vec<usize> {
    let (mut tiles, instances) = (Vec::new(), instances(segments).collect::<Vec<_>>());
    for (weight, rows, _) in segments.runs() {
        for row in rows.clone().step_by(height) {
            let end = rows.end.min(row + height);
            let first = instances.partition_point(|i| i.row + i.rows <= row);
            let last = instances.partition_point(|i| i.row < end);
            tiles.extend([row, end, weight, first, last]);
        }
    }
    tiles
}

/// Rows and row length of S on a device, for so many `ranks` of all parts.
pub(crate) fn banded(segments: Option<&Segments>, rows: usize, adapters: usize, ranks: usize) -> [usize; 2] {
    let segments = Segments::cover(segments, rows, adapters);
    let end = instances(&segments).last().map_or(BAND, |i| i.low + i.rows + BAND);
    [end, ranks.next_multiple_of(PAD)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::low_rank_linear::Segment;

    fn segments(list: &[(usize, usize, Option<usize>)]) -> Segments {
        let segment = |&(rows, weight, adapter)| Segment { rows, weight, adapter };
        Segments::new(&list.iter().map(segment).collect::<Vec<_>>()).expect("good segments")
    }

    #[test]
    fn tiles_lie_within_a_weight_and_know_their_instances() {
        let s = segments(&[(5, 1, Some(7)), (3, 1, None), (60, 1, Some(2)), (70, 0, Some(3)), (2, 3, None)]);
        let instances: Vec<_> = instances(&s).map(|i| [i.row, i.rows, i.adapter, i.low]).collect();
        assert_eq!(instances, [[0, 5, 7, 128], [8, 60, 2, 261], [68, 70, 3, 449]]);
        assert_eq!(banded(Some(&s), 140, 0, 12), [449 + 70 + 128, 16]);
        let tiles = tiles(&s, 64);
        let tiles: Vec<&[usize]> = tiles.chunks(5).collect();
        let expected = [
            [0, 64, 1, 0, 2],
            [64, 68, 1, 1, 2],
            [68, 132, 0, 2, 3],
            [132, 138, 0, 2, 3],
            [138, 140, 3, 3, 3],
        ];
        assert_eq!(tiles, expected);
    }

    #[test]
    fn an_even_division_is_as_the_kernel_computes_it() {
        for adapters in [0, 1, 4] {
            assert_eq!(
                banded(None, 80, adapters, 8)[0],
                128 + if adapters > 0 { 80 + 128 * adapters } else { 0 }
            );
        }
        let s = Segments::even(80, 4).expect("divides");
        for (i, instance) in instances(&s).enumerate() {
            assert_eq!([instance.row, instance.rows, instance.adapter], [i * 20, 20, i]);
            assert_eq!(instance.low, i * (20 + BAND) + BAND);
        }
    }
}
