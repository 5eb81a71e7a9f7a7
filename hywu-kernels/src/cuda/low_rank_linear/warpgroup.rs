//! Launcher of `kernels-cu/low_rank_linear/warpgroup.cuh`, the products of Hopper: which of its kernels, on which grid, with which boxes.

use super::Layout;

/// Rows of a block's tile.
const TILE_ROWS: usize = 128;
/// k of a stage.
const DEPTH: usize = 64;
/// Threads of a block: a producer and two consumers.
const THREADS: u32 = 384;
/// Columns of a tile and blocks of a cluster, of the kernels that there are.
const KERNELS: [(usize, usize); 4] = [(256, 2), (128, 2), (128, 1), (64, 1)];
/// Bytes that the second-level cache delivers to a multiprocessor in a clock: 6 TB/s over 132 of them at 1.755 GHz.
const CACHE_BYTES: usize = 26;

/// A kernel and its grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    columns: usize,
    cluster: usize,
    /// Slots of the ring.
    stages: usize,
    /// Do results go through shared memory?
    engine_stores: bool,
    blocks: usize,
}

impl Plan {
    fn new(columns: usize, cluster: usize) -> Self {
        let stages = match columns {
            256 => 4,
            128 => 5,
            _ => 6,
        };
        Self { columns, cluster, stages, engine_stores: true, blocks: 0 }
    }
    /// Rows of a cluster's tile.
    fn height(self) -> usize {
        TILE_ROWS * self.cluster
    }
    /// Tiles across `n` columns in equal parts.
    fn across(self, n: usize, parts: usize) -> usize {
        (n / parts).div_ceil(self.columns) * parts
    }
    /// Clocks of a tile: its products, or its boxes from the second-level cache, whichever takes longer; then its stores.
    fn clocks(self, steps: usize) -> usize {
        let boxes = (TILE_ROWS + self.columns / self.cluster) * 2 * DEPTH;
        let stores = TILE_ROWS * self.columns * 2 / CACHE_BYTES;
        steps * (4 * self.columns).max(boxes / CACHE_BYTES) + stores
    }
    /// Bytes of dynamic shared memory: the stages, the boxes of the stores, the barriers, and what aligning the first may take.
    fn shared(self) -> usize {
        let line = 2 * DEPTH;
        let stores = if self.engine_stores { 4 * 64 * line } else { 0 };
        self.stages * (TILE_ROWS + self.columns) * line + stores + 16 * self.stages + 1024
    }
    fn name(self, layout: Layout) -> String {
        let layout = match layout {
            Layout::Nt => "nt",
            Layout::Nn => "nn",
            Layout::Tn => "tn",
        };
        format!("warpgroup_{layout}_{}_{}", self.columns, self.cluster)
    }
}

/// The kernel that is done first, by waves of tiles and clocks of a tile; `tiles` gives the row tiles of a height. No choice changes bits.
fn plan(
    tiles: impl Fn(usize) -> usize,
    [n, parts]: [usize; 2],
    steps: usize,
    multiprocessors: usize,
) -> Plan {
    let candidates = KERNELS.map(|(columns, cluster)| {
        let plan = Plan::new(columns, cluster);
        let blocks = tiles(plan.height()).saturating_mul(plan.across(n, parts)).saturating_mul(cluster);
        let at_once = (multiprocessors / cluster * cluster).max(cluster);
        let clocks = blocks.div_ceil(at_once).saturating_mul(plan.clocks(steps));
        (clocks, Plan { blocks: blocks.min(at_once), ..plan })
    });
    // Of equals the first, which asks the least of the cache.
    candidates.into_iter().min_by_key(|(clocks, _)| *clocks).map_or(Plan::new(64, 1), |(_, plan)| plan)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on_h100([m, k, n]: [usize; 3]) -> Plan {
        plan(|height| m.div_ceil(height), [n, 1], k.div_ceil(DEPTH) + 1, 132)
    }

    #[test]
    fn large_products_share_their_columns() {
        let plan = on_h100([4096, 4096, 4096]);
        assert_eq!(plan, Plan { columns: 256, cluster: 2, stages: 4, engine_stores: true, blocks: 132 });
        assert_eq!(plan.name(Layout::Nt), "warpgroup_nt_256_2");
        assert_eq!(on_h100([176_512, 4096, 16_384]).columns, 256);
    }

    #[test]
    fn few_rows_get_small_tiles() {
        assert_eq!(on_h100([256, 4096, 4096]).columns, 64);
        assert_eq!(on_h100([256, 4096, 4096]).blocks, 128);
        assert_eq!(on_h100([1, 64, 8]), Plan { blocks: 1, ..Plan::new(64, 1) });
        assert_eq!(on_h100([0, 64, 8]).blocks, 0);
    }

    #[test]
    fn grids_are_whole_clusters() {
        for multiprocessors in [1, 7, 78, 114, 131, 132] {
            for m in [1, 100, 129, 300, 1000, 5000] {
                for n in [8, 200, 576, 4096] {
                    let p = plan(|height| m.div_ceil(height), [n, 1], 10, multiprocessors);
                    assert!(p.blocks > 0 && p.blocks.is_multiple_of(p.cluster), "{p:?}");
                }
            }
        }
    }

    #[test]
    fn parts_have_tiles_of_their_own() {
        assert_eq!(Plan::new(256, 1).across(600, 2), 4);
        assert_eq!(Plan::new(256, 1).across(600, 1), 3);
    }

    #[test]
    fn shared_memory_is_what_a_block_may_have() {
        for (columns, cluster) in KERNELS {
            assert!(Plan::new(columns, cluster).shared() <= 227 << 10);
        }
        assert_eq!(Plan::new(256, 2).shared(), 4 * 48 * 1024 + 32 * 1024 + 64 + 1024);
    }
}
