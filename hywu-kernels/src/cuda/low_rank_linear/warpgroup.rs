//! Launcher of `kernels-cu/low_rank_linear/warpgroup.cuh`, the products of Hopper: which of its kernels, on which grid, with which boxes.

use super::{Layout, OP, int, rows::Rows, shrink::Work, within};
use crate::{
    Result, Tensor,
    cuda::{
        Call, blocks,
        call::{Boxes, on_gpu},
        hopper, pack,
    },
    ops::low_rank_linear::Segments,
};
use hywu_core::Dtype;

/// Rows of a block's tile.
const TILE_ROWS: usize = 128;
/// k of a stage.
const DEPTH: usize = 64;
/// Elements of a box's line, 128 bytes.
const LINE: usize = 64;
/// Bytes of `struct Placing`.
const PLACING: usize = 40;
/// Threads of a block: a producer and two consumers.
const THREADS: u32 = 384;
/// Columns of a tile and blocks of a cluster, of the kernels that there are.
const KERNELS: [(usize, usize); 5] = [(256, 2), (256, 1), (128, 2), (128, 1), (64, 1)];
/// Bytes that the second-level cache delivers to each of all multiprocessors in a clock, at least: what step 7 of the ladder takes
/// (README.md beside the kernels).
const CACHE_BYTES: usize = 46;

/// A kernel and its grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    columns: usize,
    pub cluster: usize,
    /// Slots of the ring.
    stages: usize,
    /// Do results go through shared memory?
    engine_stores: bool,
    pub blocks: usize,
}

impl Plan {
    pub fn new(columns: usize, cluster: usize) -> Self {
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
    /// Blocks of all tiles; `tiles` gives the row tiles of a height.
    fn all_blocks(self, tiles: impl Fn(usize) -> usize, n: usize, parts: usize) -> usize {
        tiles(self.height()).saturating_mul(self.across(n, parts)).saturating_mul(self.cluster)
    }
    /// Blocks that run at once: whole clusters.
    fn at_once(self, multiprocessors: usize) -> usize {
        (multiprocessors / self.cluster * self.cluster).max(self.cluster)
    }
    /// Clocks of a tile: its products, or its boxes from the second-level cache, whichever takes longer; then its stores.
    pub fn clocks(self, steps: usize) -> usize {
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
    /// Steps 3 to 8 of the ladder.
    fn of_step(
        step: usize,
        tiles: impl Fn(usize) -> usize,
        n: usize,
        multiprocessors: usize,
    ) -> (Self, &'static str) {
        let plan = |columns, stages, engine_stores| Self { stages, engine_stores, ..Self::new(columns, 1) };
        let (plan, kernel, stays) = match step {
            3 => (plan(128, 1, false), "ladder_3", false),
            4 => (plan(128, 5, false), "ladder_4", false),
            5 => (plan(256, 4, false), "ladder_5", false),
            6 => (plan(256, 4, false), "ladder_5", true),
            7 => (plan(256, 4, true), "warpgroup_nt_256_1", true),
            _ => (Self::new(256, 2), "warpgroup_nt_256_2", true),
        };
        let most = if stays { plan.at_once(multiprocessors) } else { usize::MAX };
        (Self { blocks: plan.all_blocks(tiles, n, 1).min(most), ..plan }, kernel)
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
        let (blocks, at_once) = (plan.all_blocks(&tiles, n, parts), plan.at_once(multiprocessors));
        let clocks = blocks.div_ceil(at_once).saturating_mul(plan.clocks(steps));
        (clocks, Plan { blocks: blocks.min(at_once), ..plan })
    });
    // Of equals the first, which asks the least of the cache.
    candidates.into_iter().min_by_key(|(clocks, _)| *clocks).map_or(Plan::new(64, 1), |(_, plan)| plan)
}

/// A product in bf16: A B + S B2 + bias.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub layout: Layout,
    /// Rows and columns of the result, and k.
    pub dims: [usize; 3],
    pub a: &'a Tensor,
    /// One matrix for each weight.
    pub b: &'a Tensor,
    pub low_rank: Option<LowRank<'a>>,
    /// `[columns]` for each weight.
    pub bias: Option<&'a Tensor>,
    pub segments: Option<&'a Segments>,
}

/// The second term of a product.
#[derive(Clone, Copy)]
pub(super) struct LowRank<'a> {
    /// Banded.
    pub s: &'a Tensor,
    /// One matrix for each adapter: [columns, ranks] for [`Layout::Nt`], [ranks, columns] for [`Layout::Nn`].
    pub b: &'a Tensor,
    pub adapters: usize,
    /// Ranks of a part.
    pub ranks: usize,
    /// Parts of the columns.
    pub parts: usize,
}

impl LowRank<'_> {
    /// Zeros before the ranks of a part in its box of S, which starts at a whole pack.
    fn before(&self, part: usize) -> usize {
        part * self.ranks % pack(Dtype::Bf16)
    }

    /// k of S B2: what the part that needs most has before its ranks, and these.
    fn depth(&self) -> usize {
        (0..self.parts).map(|part| self.before(part) + self.ranks).max().unwrap_or(0)
    }

    /// B as the copy engine takes it.
    ///
    /// # Errors
    /// Not enough memory; sizes beyond what a kernel takes.
    fn placed(&self, layout: Layout) -> Result<Placed> {
        let pitch = self.depth().next_multiple_of(pack(Dtype::Bf16));
        if layout != Layout::Nt || pitch == self.ranks {
            return Ok(Placed { b: self.b.clone(), placing: None });
        }
        let (lines, n) = (self.b.numel() / self.ranks, self.b.numel() / self.ranks / self.adapters);
        let b = self.b.empty_like(&[lines, pitch])?;
        let mut placing = [0; PLACING];
        let longs = [on_gpu(OP, self.b)?.address(), on_gpu(OP, &b)?.address(), lines as u64];
        for (to, value) in placing.chunks_mut(8).zip(longs) {
            to.copy_from_slice(&value.to_le_bytes());
        }
        for (to, size) in placing[24..].chunks_mut(4).zip([n, n / self.parts, self.ranks, pitch]) {
            to.copy_from_slice(&int(size)?.to_le_bytes());
        }
        Ok(Placed { b, placing: Some(placing) })
    }
}

/// B of the second term with lines of whole packs, in which the ranks lie as in the box of S.
struct Placed {
    b: Tensor,
    /// `struct Placing` of placing.cuh, where that has yet to be done.
    placing: Option<[u8; PLACING]>,
}

impl Placed {
    /// By a launch of its own.
    ///
    /// # Errors
    /// Those of the device.
    fn run(&self) -> Result<()> {
        let Some(placing) = self.placing else { return Ok(()) };
        let call = Call::named(OP, "place_ranks", &self.b)?.bytes(&placing);
        call.over(self.b.numel(), pack(Dtype::Bf16))
    }
}

impl Product<'_> {
    /// Can it be computed here? The number of rows has no say, so that it does not show in a row's bits.
    ///
    /// # Errors
    /// A tensor on the host.
    pub fn fits(&self) -> Result<bool> {
        let [m, n, k] = self.dims;
        let parts = self.low_rank.map_or(1, |l| l.parts);
        // Lines of k and of columns are whole packs; where A lies across k its rows are columns of memory.
        let lines = match self.layout {
            Layout::Nt | Layout::Nn => [k, n / parts, n],
            Layout::Tn => [m, n, n],
        };
        let bf16 = self.a.dtype() == Dtype::Bf16;
        Ok(bf16
            && lines.iter().all(|l| l.is_multiple_of(pack(Dtype::Bf16)))
            && hopper::on()
            && hopper::there(on_gpu(OP, self.a)?.gpu()))
    }

    /// Are there tiles for most of the multiprocessors?
    ///
    /// # Errors
    /// A tensor on the host.
    pub fn fills(&self) -> Result<bool> {
        Ok(2 * self.plan()?.blocks > multiprocessors(self.a)?)
    }

    fn plan(&self) -> Result<Plan> {
        let [m, n, _] = self.dims;
        let parts = self.low_rank.map_or(1, |l| l.parts);
        let tiles = |height| row_tiles(self.segments, m, height);
        Ok(plan(tiles, [n, parts], self.steps(), multiprocessors(self.a)?))
    }

    /// Steps of a tile with rows of one adapter.
    fn steps(&self) -> usize {
        self.dims[2].div_ceil(DEPTH) + self.low_rank.map_or(0, |l| l.depth().div_ceil(DEPTH))
    }

    /// Into a new tensor.
    ///
    /// # Errors
    /// Sizes beyond 2^31, those of the device.
    pub fn run(&self, shape: &[usize]) -> Result<Tensor> {
        let plan = self.plan()?;
        self.launch(plan, &plan.name(self.layout), None, shape)
    }

    /// The same with S of A, which is computed too: what `work` has, not yet computed, is the second term's. None, and nothing done, where
    /// a launch of its own is better. No bit of S or of the result shows it.
    ///
    /// # Errors
    /// As [`Product::run`].
    pub fn run_with_s(&self, work: &Work, shape: &[usize]) -> Result<Option<Tensor>> {
        let ([m, n, k], plan) = (self.dims, self.plan()?);
        let parts = self.low_rank.map_or(1, |l| l.parts);
        let wide = (self.layout, plan.columns, plan.cluster) == (Layout::Nt, 256, 2);
        if !wide || !within::fits(work) {
            return Ok(None);
        }
        let blocks = plan.at_once(multiprocessors(self.a)?);
        let tiles = plan.all_blocks(|height| row_tiles(self.segments, m, height), n, parts) / plan.cluster;
        let idle = within::idle(tiles, blocks / plan.cluster);
        if !within::pays(plan, idle, [m, k, work.ranks()], self.steps()) {
            return Ok(None);
        }
        self.launch_with_s(Plan { blocks, ..plan }, work, idle, shape).map(Some)
    }

    /// By so many clusters that compute S before their tiles.
    ///
    /// # Errors
    /// As [`Product::run`].
    pub fn launch_with_s(&self, plan: Plan, work: &Work, makers: usize, shape: &[usize]) -> Result<Tensor> {
        let kernel = format!("{}_s", plan.name(self.layout));
        self.launch(plan, &kernel, Some((work, makers)), shape)
    }

    /// The same by a step of the ladder, from 3 on.
    ///
    /// # Errors
    /// As [`Product::run`].
    pub fn run_step(&self, step: usize, shape: &[usize]) -> Result<Tensor> {
        let [m, n, _] = self.dims;
        let tiles = |height| row_tiles(self.segments, m, height);
        let (plan, kernel) = Plan::of_step(step, tiles, n, multiprocessors(self.a)?);
        self.launch(plan, kernel, None, shape)
    }

    /// `with_s`: what the kernels that compute S too have to do, and how many clusters do it.
    fn launch(
        &self,
        plan: Plan,
        kernel: &str,
        with_s: Option<(&Work, usize)>,
        shape: &[usize],
    ) -> Result<Tensor> {
        let [m, n, k] = self.dims;
        let out = self.a.empty_like(shape)?;
        let adapters = self.low_rank.map_or(0, |l| l.adapters);
        let rows = Rows::new(self.a, self.segments, m, adapters, plan.height())?;
        let of_a = match self.layout {
            Layout::Nt | Layout::Nn => boxes(self.a, [k, m], k, [DEPTH, TILE_ROWS])?,
            Layout::Tn => boxes(self.a, [m, k], m, [LINE, DEPTH])?,
        };
        let of_b = |tensor, k: usize| match self.layout {
            Layout::Nt => boxes(
                tensor,
                [k, n],
                k.next_multiple_of(pack(Dtype::Bf16)),
                [DEPTH, plan.columns / plan.cluster],
            ),
            Layout::Nn | Layout::Tn => boxes(tensor, [n, k], n, [LINE, DEPTH]),
        };
        let b = of_b(self.b, k)?;
        let flat = Boxes {
            address: on_gpu(OP, &out)?.address(),
            dims: vec![n as u64, m as u64],
            pitches: vec![2 * n as u64],
            size: vec![LINE as u32, 64],
        };
        let mut call = Call::named(OP, kernel, self.a)?.boxes(&of_a)?.boxes(&b)?;
        // Alive until the launch: memory that is given back may be taken by work that comes later only.
        let placed = self.low_rank.map(|low| low.placed(self.layout)).transpose()?;
        let (mut pitch, mut k2) = (0, 0);
        call = match self.low_rank.zip(placed.as_ref()) {
            None => call.boxes(&of_a)?.boxes(&b)?,
            Some((low, placed)) => {
                [pitch, k2] = [low.s.dim_back(1), low.depth()];
                let (ranks, lines) = (low.ranks * low.parts, low.s.numel() / pitch);
                call.boxes(&boxes(low.s, [ranks, lines], pitch, [DEPTH, TILE_ROWS])?)?
                    .boxes(&of_b(&placed.b, k2)?)?
            }
        };
        let mut sizes = rows.bytes(pitch)?.to_vec();
        let address = |t: Option<&Tensor>| t.map_or(Ok(0), |t| on_gpu(OP, t).map(|v| v.address()));
        sizes.extend(address(self.bias)?.to_le_bytes());
        sizes.extend(address(Some(&out))?.to_le_bytes());
        let (ranks, parts) = self.low_rank.map_or((0, 1), |l| (l.ranks, l.parts));
        for size in [n, k, k2, ranks, parts] {
            sizes.extend(int(size)?.to_le_bytes());
        }
        let grid = [blocks(plan.blocks, 1)?, 1, 1];
        call = call.boxes(&flat)?.bytes(&sizes);
        let mut shared = plan.shared();
        match (with_s, &placed) {
            (Some((work, makers)), placed) => {
                let placing = placed.as_ref().and_then(|p| p.placing).unwrap_or([0; PLACING]);
                call = call.bytes(&within::bytes(work, self.a, &placing, makers)?);
                shared += within::SHARED;
            }
            (None, Some(placed)) => placed.run()?,
            (None, None) => {}
        }
        call.launch(grid, THREADS, shared)?;
        Ok(out)
    }
}

fn multiprocessors(tensor: &Tensor) -> Result<usize> {
    Ok(on_gpu(OP, tensor)?.gpu().properties().multiprocessors as usize)
}

/// Row tiles of a height: those of every weight's rows.
fn row_tiles(segments: Option<&Segments>, rows: usize, height: usize) -> usize {
    match segments {
        Some(s) => s.runs().map(|(_, rows, _)| rows.len().div_ceil(height)).sum(),
        None => rows.div_ceil(height),
    }
}

/// Boxes of matrices one behind the other: `dims` [length of a line, lines], `pitch` elements from line to line.
fn boxes(tensor: &Tensor, dims: [usize; 2], pitch: usize, size: [usize; 2]) -> Result<Boxes> {
    let line = pitch as u64 * 2;
    let matrix = line * dims[1] as u64;
    let view = on_gpu(OP, tensor)?;
    let count = (view.bytes() as u64).checked_div(matrix).unwrap_or(0);
    debug_assert_eq!(count * matrix, view.bytes() as u64, "{dims:?} of {:?}", tensor.shape());
    Ok(Boxes {
        address: view.address(),
        dims: vec![dims[0] as u64, dims[1] as u64, count],
        pitches: vec![line, matrix],
        size: vec![size[0] as u32, size[1] as u32, 1],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, testing};

    fn on_h100([m, k, n]: [usize; 3]) -> Plan {
        plan(|height| m.div_ceil(height), [n, 1], k.div_ceil(DEPTH) + 1, 132)
    }

    /// A product with adapters that divide the rows evenly, in f32 on the host.
    struct Case {
        layout: Layout,
        dims: [usize; 3],
        adapters: usize,
        ranks: usize,
    }

    impl Case {
        /// A, B, S and B2, each by its lines.
        fn operands(&self) -> [Tensor; 4] {
            let ([m, n, k], r, count) = (self.dims, self.ranks.max(1), self.adapters);
            let random = |seed, shape: &[usize]| testing::rounded_to_bf16(&testing::random(seed, shape));
            match self.layout {
                Layout::Nt => {
                    [random(1, &[m, k]), random(2, &[n, k]), random(3, &[m, r]), random(4, &[count, n, r])]
                }
                Layout::Nn => {
                    [random(1, &[m, k]), random(2, &[k, n]), random(3, &[m, r]), random(4, &[count, r, n])]
                }
                Layout::Tn => {
                    [random(1, &[k, m]), random(2, &[k, n]), random(3, &[m, r]), random(4, &[count, r, n])]
                }
            }
        }
        fn expected(&self, [a, b, s, b2]: &[Tensor; 4], bias: &Tensor) -> Vec<f64> {
            let ([m, n, k], r) = (self.dims, self.ranks);
            let at = |t: &Tensor, i: usize| f64::from(t.data()[i]);
            let across = |b: &Tensor, from: usize, j: usize, depth: usize, q: usize| match self.layout {
                Layout::Nt => at(b, (from * n + j) * depth + q),
                _ => at(b, (from * depth + q) * n + j),
            };
            let element = |i: usize, j: usize| {
                let row = |q| at(a, if self.layout == Layout::Tn { q * m + i } else { i * k + q });
                let base: f64 = (0..k).map(|q| row(q) * across(b, 0, j, k, q)).sum();
                let adapter = i / (m / self.adapters);
                let low: f64 = (0..r).map(|q| at(s, i * r + q) * across(b2, adapter, j, r, q)).sum();
                at(bias, j) + base + low
            };
            (0..m * n).map(|i| element(i / n, i % n)).collect()
        }
        /// By every kernel on small and large grids, and by the ladder.
        fn run(&self, device: Device) -> Result<()> {
            let ([m, n, _], r) = (self.dims, self.ranks);
            let operands = self.operands();
            let bias = testing::rounded_to_bf16(&testing::random(5, &[n]));
            let expected = self.expected(&operands, &bias);
            // S with its bands.
            let [lines, pitch] = super::super::rows::banded(None, m, self.adapters, r.max(1));
            let mut banded = Tensor::zeros(&[lines, pitch]);
            for (i, row) in operands[2].data().chunks(r.max(1)).enumerate() {
                let line = i + 128 * (i / (m / self.adapters) + 1);
                banded.data_mut()[line * pitch..][..row.len()].copy_from_slice(row);
            }
            let on_device = |t: &Tensor| t.to(device, Dtype::Bf16);
            let [a, b, s, b2] = [&operands[0], &operands[1], &banded, &operands[3]].map(on_device);
            let (a, b, s, b2, bias) = (a?, b?, s?, b2?, on_device(&bias)?);
            let low_rank =
                (r > 0).then_some(LowRank { s: &s, b: &b2, adapters: self.adapters, ranks: r, parts: 1 });
            let product = Product {
                layout: self.layout,
                dims: self.dims,
                a: &a,
                b: &b,
                low_rank,
                bias: Some(&bias),
                segments: None,
            };
            assert!(product.fits()?);
            let mut results = vec![product.run(&[m, n])?];
            for (columns, cluster) in KERNELS {
                let plan = Plan::new(columns, cluster);
                let all = plan.all_blocks(|height| row_tiles(None, m, height), n, 1);
                for blocks in [cluster, all] {
                    let plan = Plan { blocks, ..plan };
                    results.push(product.launch(plan, &plan.name(self.layout), None, &[m, n])?);
                }
            }
            if self.layout == Layout::Nt {
                for step in 3..=8 {
                    results.push(product.run_step(step, &[m, n])?);
                }
            }
            let results = results.iter().map(Tensor::to_host).collect::<Result<Vec<_>>>()?;
            for (i, result) in results.iter().enumerate() {
                assert_eq!(
                    result.data(),
                    results[0].data(),
                    "result {i} of {:?} {:?}",
                    self.layout,
                    self.dims
                );
            }
            for (i, (&got, &expected)) in results[0].data().iter().zip(&expected).enumerate() {
                // Half a unit of bf16, and what sums in f32 cost.
                let bound = expected.abs() / 256.0 + 1e-4;
                assert!(
                    (f64::from(got) - expected).abs() <= bound,
                    "element {i}: {got}, expected {expected}"
                );
            }
            Ok(())
        }
    }

    #[test]
    fn every_kernel_and_grid_gives_the_same_bits() {
        let Some(device) = testing::places().iter().find(|p| p.dtype == Dtype::Bf16).map(|p| p.device) else {
            return;
        };
        for (dims, adapters, ranks) in [
            ([64, 64, 64], 1, 0),
            ([136, 200, 72], 1, 0),
            ([304, 264, 136], 2, 16),
            ([520, 520, 72], 4, 4),
            ([264, 72, 8], 3, 72),
        ] {
            for layout in [Layout::Nt, Layout::Nn, Layout::Tn] {
                // There is no second term where A lies across k.
                if layout != Layout::Tn || ranks == 0 {
                    Case { layout, dims, adapters, ranks }.run(device).expect("the device works");
                }
            }
        }
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

    /// 540 rows of an expert fill five blocks' tiles better than three pairs'.
    #[test]
    fn experts_get_tiles_of_fewer_rows() {
        let plan = plan(|height| 64 * 540usize.div_ceil(height), [6144, 2], 65, 132);
        assert_eq!((plan.columns, plan.cluster), (256, 1));
    }

    #[test]
    fn grids_are_whole_clusters() {
        for multiprocessors in [1, 7, 78, 114, 131, 132] {
            for m in [1usize, 100, 129, 300, 1000, 5000] {
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
