//! S = scale X A^T within the launch of the product that needs it: when, and what `kernels-cu/low_rank_linear/within.cuh` is told.

use super::{int, shrink::Work, warpgroup::Plan};
use crate::{
    Result, Tensor,
    cuda::{Gpu, Memory, call::on_gpu},
};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Rows of S that are counted together, as in rows.cuh.
const BAND: usize = 128;
/// Rows of S that a block computes at a time.
const HEIGHT: usize = 64;
/// Bytes that a multiprocessor reads in a clock where few do, of the 64 that its port takes.
const BYTES: usize = 40;
/// Counters before those of the bands.
const COUNTERS: usize = 5;
/// Bands that there are counters for: more rows than a tile's time would suffice for.
const MOST_BANDS: usize = 4096;
/// Columns of S that a block sums at a time.
const MOST_COLUMNS: usize = 32;
/// k that keeps every warp's ring full.
const LEAST_K: usize = 1024;
/// Bytes of shared memory behind those of the product.
pub(super) const SHARED: usize = 16;

/// May S be computed within a product? `HYWU_CUDA_WITHIN=0` turns it off.
fn on() -> bool {
    static ON: OnceLock<bool> = OnceLock::new();
    *ON.get_or_init(|| std::env::var_os("HYWU_CUDA_WITHIN").is_none_or(|v| v != "0"))
}

/// Clusters that have a tile fewer than the others, or none at all.
pub(super) fn idle(tiles: usize, clusters: usize) -> usize {
    tiles.div_ceil(clusters) * clusters - tiles
}

/// Can these be computed within a product?
pub(super) fn fits(work: &Work) -> bool {
    on() && work.k().is_multiple_of(8)
        && work.k() >= LEAST_K
        && work.columns() <= MOST_COLUMNS
        && work.lines().div_ceil(BAND) <= MOST_BANDS
}

/// Is it done in the time of a tile, which the `idle` clusters have? They read X, `rows` of `k`, and A, `ranks` of `k`, for every window.
pub(super) fn pays(plan: Plan, idle: usize, [rows, k, ranks]: [usize; 3], steps: usize) -> bool {
    let bytes = 2 * k * (rows + rows.div_ceil(HEIGHT) * ranks);
    idle > 0 && bytes.div_ceil(idle * plan.cluster) / BYTES <= plan.clocks(steps)
}

/// `struct Work` of within.cuh; `placing` is its `struct Placing`.
pub(super) fn bytes(work: &Work, x: &Tensor, placing: &[u8], makers: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for tensor in [x, work.a, &work.s] {
        bytes.extend(on_gpu(super::OP, tensor)?.address().to_le_bytes());
    }
    bytes.extend(counters(on_gpu(super::OP, x)?.gpu())?.to_le_bytes());
    bytes.extend(work.sizes()?);
    bytes.extend(placing);
    bytes.extend(int(makers)?.to_le_bytes());
    Ok(bytes)
}

/// Where a device's counters are. They are zero between launches, of which one runs at a time; made at the first call, they live as long
/// as the process.
fn counters(gpu: &'static Gpu) -> Result<u64> {
    static ALL: Mutex<Vec<(usize, Memory)>> = Mutex::new(Vec::new());
    // The list is never left half-changed.
    let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, memory)) = all.iter().find(|(n, _)| *n == gpu.ordinal()) {
        return Ok(memory.address());
    }
    let bytes = 4 * (COUNTERS + MOST_BANDS);
    let memory = gpu.allocate(bytes)?;
    gpu.zero(&memory, 0, bytes)?;
    let address = memory.address();
    all.push((gpu.ordinal(), memory));
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::{super::expand_on_hopper, *};
    use crate::{
        ops::low_rank_linear::{Segment, Segments, Shrink},
        testing::{Place, places, random},
    };
    use hywu_core::Dtype;

    #[test]
    fn those_with_a_tile_fewer_are_idle() {
        assert_eq!(idle(256, 66), 8);
        assert_eq!(idle(264, 66), 0);
        assert_eq!(idle(40, 66), 26);
        assert_eq!(idle(1, 1), 0);
    }

    #[test]
    fn it_pays_where_a_tile_takes_longer() {
        let pays = |idle, m, k: usize| pays(Plan::new(256, 2), idle, [m, k, 16], k.div_ceil(64) + 1);
        assert!(pays(8, 4096, 4096));
        assert!(pays(8, 4096, 1024));
        assert!(!pays(6, 4096, 4096));
        assert!(!pays(0, 1, 4096));
        assert!(!pays(60, 100_000, 4096));
    }

    /// Operands of a layer whose adapters are those of `segments`, or divide the rows evenly.
    struct Case {
        place: Place,
        segments: Option<Segments>,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        a: Tensor,
        b: Tensor,
        parts: usize,
    }

    impl Case {
        fn new(
            place: Place,
            segments: Option<Segments>,
            [m, k, n]: [usize; 3],
            [parts, rank]: [usize; 2],
        ) -> Self {
            let tensor = |seed, shape: &[usize]| place.tensor(&random(seed, shape));
            let (x, weight, bias) = (tensor(1, &[m, k]), tensor(2, &[n, k]), tensor(3, &[n]));
            let (a, b) = (tensor(4, &[4, parts * rank, k]), tensor(5, &[4, n, rank]));
            Self { place, segments, x, weight, bias, a, b, parts }
        }

        /// S and Y, S before Y; then, by `with_s`, in one launch. Where both are done they are the same bits.
        fn check(
            &self,
            with_s: impl Fn(&super::super::warpgroup::Product, &Work) -> Result<Option<Tensor>>,
        ) -> bool {
            let segments = self.segments.as_ref();
            let by = Shrink { a: &self.a, scale: 0.5, segments };
            let (m, n) = (self.x.shape()[0], self.weight.shape()[0]);
            let work = || Work::new(&self.x, m, by, 1).expect("enough memory");
            let host = |t: &Tensor| t.to_host().expect("the device works");
            let s = work().run(&self.x).expect("the device works");
            let product = |s| {
                expand_on_hopper(
                    &self.x,
                    &self.weight,
                    Some(&self.bias),
                    Some((s, &self.b, self.parts)),
                    segments,
                )
            };
            assert!(product(&s).fits().expect("on a device"));
            let y = product(&s).run(&[m, n]).expect("the device works");
            let within = work();
            let Some(got) = with_s(&product(&within.s), &within).expect("the device works") else {
                return false;
            };
            assert_eq!(host(&got).data(), host(&y).data(), "Y at {:?}", self.place);
            assert_eq!(host(&within.s).data(), host(&s).data(), "S at {:?}", self.place);
            true
        }
    }

    /// A place with the kernels of Hopper.
    fn hopper() -> Option<Place> {
        let place = places().into_iter().find(|place| place.dtype == Dtype::Bf16)?;
        let tensor = place.tensor(&Tensor::zeros(&[8]));
        crate::cuda::hopper::there(on_gpu("test", &tensor).expect("on a device").gpu()).then_some(place)
    }

    /// Whoever computes it, however many they are, and with whatever grid.
    #[test]
    fn s_within_is_s_before_bit_for_bit() {
        let Some(place) = hopper() else { return };
        let list = [(65, Some(1)), (3, None), (300, Some(2)), (19, Some(0)), (129, Some(3))];
        let segment = |(rows, adapter)| Segment { rows, weight: 0, adapter };
        let ragged = Segments::new(&list.map(segment)).expect("good segments");
        for (segments, k, n, parts, rank) in [
            (Some(ragged.clone()), 1024, 264, 1, 4),
            (None, 1544, 520, 1, 16),
            (Some(ragged.clone()), 1032, 272, 2, 5),
            (Some(ragged), 1096, 520, 1, 24),
            (None, 1024, 272, 2, 16),
        ] {
            let case = Case::new(place, segments, [516, k, n], [parts, rank]);
            for [clusters, makers] in [[1, 1], [3, 1], [3, 2], [9, 2], [9, 9]] {
                let mut plan = Plan::new(256, 2);
                plan.blocks = 2 * clusters;
                let shape = [516, n];
                assert!(case.check(|p, work| p.launch_with_s(plan, work, makers, &shape).map(Some)));
            }
        }
    }

    /// Twice, as a launch leaves the counters as it found them.
    #[test]
    fn where_it_pays_it_is_done() {
        let Some(place) = hopper() else { return };
        let case = Case::new(place, None, [1024, 1024, 4096], [1, 16]);
        for _ in 0..2 {
            assert_eq!(case.check(|p, work| p.run_with_s(work, &[1024, 4096])), on());
        }
        // Rows enough for all, which would wait for S.
        let case = Case::new(place, None, [2048, 1024, 256], [1, 16]);
        assert!(!case.check(|p, work| p.run_with_s(work, &[2048, 256])));
    }
}
