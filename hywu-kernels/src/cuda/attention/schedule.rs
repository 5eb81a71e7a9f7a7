//! Which block of `kernels-cu/attention/warpgroup.cuh` takes which tiles of queries, where tiles differ in the keys that they see: the
//! longest first, each by the block that has the least to do so far. What a block takes does not show in any row's bits.

use crate::ops::attention::Extents;
use std::{cmp::Reverse, collections::BinaryHeap};

/// Bytes of keys and values that stay in the second-level cache (50 MB, half of it near a multiprocessor) while others come and go.
const CACHED: usize = 16 << 20;
/// What a tile of queries takes beside its tiles of keys, in those: its first scores, its last values and its output run beside
/// little else.
const BESIDE: usize = 3;

/// The tiles of a launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiles {
    /// Queries of a tile.
    pub rows: usize,
    /// Keys of a tile of keys.
    pub keys: usize,
    /// Bytes of a key and its value.
    pub row_bytes: usize,
    /// Tiles that the longest entry's units have.
    pub of_unit: usize,
}

impl Tiles {
    /// What each tile of an entry takes, in tiles of keys.
    fn costs(&self, extents: &Extents, entry: usize) -> Vec<usize> {
        let entry = extents.entry(entry);
        let last = |tile: usize| ((tile + 1) * self.rows).min(entry.queries) - 1;
        let cost = |tile| extents.limit(&entry, last(tile)).div_ceil(self.keys) + BESIDE;
        (0..entry.queries.div_ceil(self.rows)).map(cost).collect()
    }
}

/// The tiles of `blocks` blocks, `[round][block]`: (entry * heads + head) * of_unit + tile, and behind a block's last the number of all tiles
/// that there were if each unit had `of_unit`. None where all entries are alike and their queries see all keys: any order will do.
pub(super) fn schedule(
    extents: &Extents,
    entries: usize,
    heads: usize,
    tiles: &Tiles,
    blocks: usize,
) -> Option<Vec<usize>> {
    if extents.entries.is_empty() && extents.limits.is_empty() {
        return None;
    }
    // Entries with the most keys first, so that the end is made of short tiles; by as many units at a time as the cache holds.
    let mut order: Vec<usize> = (0..entries).collect();
    order.sort_by_key(|&entry| Reverse(extents.entry(entry).keys));
    let mut free: BinaryHeap<_> = (0..blocks).map(|block| Reverse((0, block))).collect();
    let mut taken = vec![Vec::new(); blocks];
    let mut chunk = Vec::new();
    let mut bytes = 0;
    for (i, &entry) in order.iter().enumerate() {
        let costs = tiles.costs(extents, entry);
        let unit_bytes = extents.entry(entry).keys * tiles.row_bytes;
        for head in 0..heads {
            let first = (entry * heads + head) * tiles.of_unit;
            chunk.extend(costs.iter().enumerate().map(|(tile, &cost)| (cost, first + tile)));
            bytes += unit_bytes;
            let last = i + 1 == entries && head + 1 == heads;
            if !last && bytes + unit_bytes <= CACHED {
                continue;
            }
            chunk.sort_by_key(|&(cost, _)| Reverse(cost));
            for (cost, tile) in chunk.drain(..) {
                let mut least = free.peek_mut()?;
                let Reverse((load, block)) = *least;
                *least = Reverse((load + cost, block));
                taken[block].push(tile);
            }
            bytes = 0;
        }
    }
    let rounds = taken.iter().map(Vec::len).max().unwrap_or(0) + 1;
    let none = entries * heads * tiles.of_unit;
    Some(
        (0..rounds)
            .flat_map(|round| taken.iter().map(move |list| list.get(round).copied().unwrap_or(none)))
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::attention::Entry;

    const TILES: Tiles = Tiles { rows: 128, keys: 128, row_bytes: 512, of_unit: 64 };

    /// Entries of these numbers of tokens, one behind the other; with limits, a query sees the keys up to its own.
    fn extents(lengths: &[usize], causal: bool) -> Extents {
        let mut start = 0;
        let entries = lengths.iter().map(|&n| {
            start += n;
            Entry { query: start - n, queries: n, key: start - n, keys: n, limits: start - n }
        });
        let entries: Vec<Entry> = entries.collect();
        let limits = if causal { lengths.iter().flat_map(|&n| 1..=n).collect() } else { vec![] };
        Extents { alike: entries[0], entries, limits }
    }
    /// What the blocks of a schedule take, and that they take every tile once.
    fn loads(lengths: &[usize], causal: bool, heads: usize, blocks: usize) -> Vec<usize> {
        let extents = extents(lengths, causal);
        let list = schedule(&extents, lengths.len(), heads, &TILES, blocks).expect("entries differ");
        let none = lengths.len() * heads * TILES.of_unit;
        let (mut loads, mut seen) = (vec![0; blocks], vec![]);
        for round in list.chunks_exact(blocks) {
            for (load, &number) in loads.iter_mut().zip(round).filter(|(_, number)| **number < none) {
                *load += TILES.costs(&extents, number / TILES.of_unit / heads)[number % TILES.of_unit];
                seen.push(number);
            }
        }
        assert!(
            list[list.len() - blocks..].iter().all(|&number| number == none),
            "a block's list has an end"
        );
        seen.sort_unstable();
        let tiles = |(entry, &n): (usize, &usize)| {
            let numbers = move |head| {
                (0..n.div_ceil(TILES.rows)).map(move |t| (entry * heads + head) * TILES.of_unit + t)
            };
            (0..heads).flat_map(numbers).collect::<Vec<_>>()
        };
        assert_eq!(seen, lengths.iter().enumerate().flat_map(tiles).collect::<Vec<_>>());
        loads
    }

    #[test]
    fn blocks_have_as_much_to_do() {
        for (lengths, causal, heads) in [
            (vec![8192; 2], true, 16),
            (vec![4096, 0, 1, 129, 2000, 8192], false, 16),
            (vec![300, 5000, 0, 8000], true, 7),
        ] {
            let loads = loads(&lengths, causal, heads, 132);
            let (most, mean) = (*loads.iter().max().unwrap(), loads.iter().sum::<usize>() as f64 / 132.0);
            // The longest tile may come last.
            assert!(
                most as f64 <= 1.05 * mean || most <= 64 + BESIDE,
                "{lengths:?}: {most}, on average {mean}"
            );
        }
    }

    #[test]
    fn few_tiles_and_none() {
        assert_eq!(loads(&[1], false, 1, 1), [1 + BESIDE]);
        assert_eq!(loads(&[0, 0], true, 3, 2), [0, 0]);
        assert_eq!(loads(&[128, 129], true, 1, 5).iter().filter(|&&load| load > 0).count(), 3);
    }

    #[test]
    fn equal_tiles_need_no_list() {
        let alike = Extents { entries: vec![], ..extents(&[100], false) };
        assert_eq!(schedule(&alike, 4, 2, &TILES, 8), None);
    }
}
