//! Low-rank linear against its oracle, and what must hold bit for bit, at every place.

mod merge;
mod quantized;
mod segments;
mod shrink;

use hywu_core::Dtype;
use hywu_kernels::{
    LoraVar, Tape, Tensor, Var,
    ops::low_rank_linear::{Segments, linear, low_rank_linear},
    reference::low_rank_linear as reference,
    testing::{Place, check_gradients, check_output, for_each_place, places, random},
};

use proptest::prelude::*;

const EDGES: [usize; 10] = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129];
const SCALE: f32 = 0.5;

/// Columns of x around multiples of the 256 that the matrix product sums at a time, each with several ranks.
fn depths() -> impl Iterator<Item = (usize, usize)> {
    [255, 256, 257, 513, 1030].into_iter().flat_map(|inner| [1, 7, 16].map(|rank| (inner, rank)))
}

/// `rows` of x, divided evenly over `adapters`.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    rows: usize,
    inner: usize,
    outer: usize,
    adapters: usize,
    rank: usize,
}

fn oracle(s: Sizes, v: &[Vec<f64>]) -> Vec<f64> {
    let segments = Segments::even(s.rows, s.adapters).expect("divides");
    let sizes = reference::Sizes { inner: s.inner, outer: s.outer, parts: 1, rank: s.rank };
    let v: [&[f64]; 5] = std::array::from_fn(|i| v.get(i).map_or(&[][..], |v| v));
    reference::low_rank_linear(sizes, segments.as_slice(), v, SCALE.into())
}

#[derive(Clone)]
struct Case {
    x: Tensor,
    w: Tensor,
    bias: Tensor,
    a: Tensor,
    b: Tensor,
}

fn update(tape: &Tape, v: &[Var]) -> hywu_kernels::Result<Var> {
    let lora = LoraVar { a: v[3].clone(), b: v[4].clone(), scale: SCALE };
    low_rank_linear(tape, &v[0], &v[1], Some(&v[2]), Some(&lora))
}

fn base(tape: &Tape, v: &[Var]) -> hywu_kernels::Result<Var> {
    linear(tape, &v[0], &v[1], v.get(2))
}

impl Case {
    fn new(batch: usize, tokens: usize, inner: usize, outer: usize, adapters: usize, rank: usize) -> Self {
        Self {
            x: random(1, &[batch, tokens, inner]),
            w: random(2, &[outer, inner]),
            bias: random(3, &[outer]),
            a: random(4, &[adapters, rank, inner]),
            b: random(5, &[adapters, outer, rank]),
        }
    }
    fn inputs(&self) -> [Tensor; 5] {
        [&self.x, &self.w, &self.bias, &self.a, &self.b].map(Clone::clone)
    }
    /// The output at a place, on the host.
    fn run(&self, place: Place) -> Tensor {
        let y = update(&Tape::inference(), &self.inputs().map(|t| place.constant(&t)));
        y.expect("good shapes").value().to_host().expect("the device works")
    }
    /// The output without the update.
    fn base(&self, place: Place) -> Tensor {
        let v = [&self.x, &self.w, &self.bias].map(|t| place.constant(t));
        base(&Tape::inference(), &v).expect("good shapes").value().to_host().expect("the device works")
    }
    /// Output and all gradients at a place, on the host.
    fn all(&self, place: Place) -> Vec<Tensor> {
        let tape = Tape::new();
        let leaves = self.inputs().map(|t| tape.leaf(place.tensor(&t)));
        let y = update(&tape, &leaves).expect("good shapes");
        let weights = place.tensor(&random(6, y.shape()));
        let loss = hywu_kernels::ops::loss::weighted_sum(&tape, &y, &weights).expect("same shape");
        let mut grads = tape.backward(&loss).expect("a scalar");
        let grads = leaves.map(|leaf| grads.take(&leaf).expect("a gradient"));
        [y.value().clone()].into_iter().chain(grads).map(|t| t.to_host().expect("the device works")).collect()
    }
    fn sizes(&self) -> Sizes {
        Sizes {
            rows: self.x.shape()[0] * self.x.shape()[1],
            inner: self.x.shape()[2],
            outer: self.w.shape()[0],
            adapters: self.a.shape()[0],
            rank: self.a.shape()[1],
        }
    }
    fn oracle(&self) -> impl Fn(&[Vec<f64>]) -> Vec<f64> + use<> {
        let s = self.sizes();
        move |v| oracle(s, v)
    }
    fn check(&self) {
        for_each_place(|place| check_output(place, &self.inputs(), update, self.oracle(), 1e-5));
    }
}

#[test]
fn tile_edges_match_the_oracle() {
    for n in EDGES {
        Case::new(2, n, 33, 20, 2, 4).check();
        Case::new(1, 7, n, 18, 1, 3).check();
        Case::new(4, 3, 21, n, 2, 16).check();
    }
    Case::new(1, 4096 + 257, 96, 40, 1, 2).check();
    // Large enough for the large tiles of a device, ragged and not.
    Case::new(1, 1409, 41, 1409, 1, 3).check();
    Case::new(2, 704, 40, 1408, 2, 8).check();
    Case::new(2, 70, 513, 129, 2, 64).check();
}

/// Whatever is left of k for the last pass, the low-rank term belongs to that pass alone, and to the rows of its own adapter: groups
/// of 5, 13 and 29 rows, and of 2 x 7, end inside a tile of any kernel.
#[test]
fn the_update_is_added_once_however_deep() {
    for (inner, rank) in depths() {
        for tokens in [5, 13, 29] {
            Case::new(3, tokens, inner, 37, 3, rank).check();
        }
        Case::new(6, 7, inner, 70, 3, rank).check();
    }
}

/// bf16 has 8 bits: the values fit in 3, and the sums over 700 of them, which don't, are rounded once.
#[test]
fn small_integers_are_exact() {
    let whole = |seed, shape: &[usize]| {
        let mut t = random(seed, shape);
        t.data_mut().iter_mut().for_each(|v| *v = (*v * 2.0).round());
        t
    };
    let (x, w) = (whole(1, &[1, 100, 700]), whole(2, &[90, 700]));
    for_each_place(|place| {
        let y = base(&Tape::inference(), &[place.constant(&x), place.constant(&w)]).expect("good shapes");
        let y = y.value().to_host().expect("the device works");
        for (i, row) in x.data().chunks(700).enumerate() {
            for (o, weights) in w.data().chunks(700).enumerate() {
                let sum: f32 = row.iter().zip(weights).map(|(a, b)| a * b).sum();
                let sum = place.tensor(&Tensor::scalar(sum)).item().expect("the device works");
                assert_eq!(y.data()[i * 90 + o], sum, "at {place:?}: row {i}, column {o}");
            }
        }
    });
}

#[test]
fn gradients_match_finite_differences() {
    // The second and third case sum over more than 512 rows and more than 512 columns of y.
    for (case, samples) in [
        (Case::new(4, 5, 19, 23, 2, 3), 60),
        (Case::new(2, 515, 20, 15, 2, 7), 20),
        (Case::new(2, 8, 20, 515, 2, 7), 20),
        (Case::new(2, 16, 32, 24, 1, 8), 20),
    ] {
        check_gradients(&case.inputs(), update, case.oracle(), samples, 1e-5);
        let [x, w, bias, _, _] = case.inputs();
        let s = Sizes { adapters: 0, ..case.sizes() };
        let plain = |v: &[Vec<f64>]| oracle(s, v);
        check_gradients(&[x, w, bias], base, plain, samples, 1e-5);
    }
}

/// Sums so long that a device cuts them into parts: S over 2100 columns of x, dW, dA and dB over 2100 rows, dS over 2100 columns of y.
#[test]
fn long_sums_match() {
    for case in [
        Case::new(1, 3, 2100, 5, 1, 8),
        Case::new(1, 2100, 6, 5, 1, 8),
        Case::new(1, 3, 5, 2100, 1, 8),
        Case::new(2, 1050, 8, 8, 2, 8),
    ] {
        check_gradients(&case.inputs(), update, case.oracle(), 12, 1e-5);
    }
}

#[test]
fn zero_lora_b_is_the_base() {
    for_each_place(|place| {
        for (inner, rank) in depths().chain([(100, 8)]) {
            let mut case = Case::new(2, 65, inner, 70, 2, rank);
            case.b.data_mut().fill(0.0);
            assert_eq!(case.run(place).data(), case.base(place).data(), "{inner} columns, rank {rank}");
        }
    });
}

/// Five entries in reverse order.
fn reversed(t: &Tensor) -> Tensor {
    let each = t.numel() / 5;
    let mut out = t.clone();
    out.data_mut().chunks_mut(each).zip(t.data().chunks(each).rev()).for_each(|(o, x)| o.copy_from_slice(x));
    out
}

/// The first of five entries.
fn first(t: &Tensor) -> Tensor {
    let mut shape = t.shape().to_vec();
    shape[0] = 1;
    Tensor::new(&shape, t.data()[..t.numel() / 5].to_vec()).expect("a fifth")
}

#[test]
fn permuting_the_batch_permutes_the_rows_bit_for_bit() {
    for_each_place(|place| {
        for (inner, rank) in depths().chain([(200, 8), (2100, 8)]) {
            let case = Case::new(5, 50, inner, 60, 5, rank);
            let change = |f: fn(&Tensor) -> Tensor| Case {
                x: f(&case.x),
                a: f(&case.a),
                b: f(&case.b),
                ..case.clone()
            };
            let y = case.run(place);
            assert_eq!(reversed(&y).data(), change(reversed).run(place).data());
            // One entry alone gives the same rows as in the batch.
            assert_eq!(first(&y).data(), change(first).run(place).data());
        }
        // So many rows and columns that a device takes large tiles for the batch, small ones for an entry.
        let case = Case::new(5, 300, 70, 1300, 1, 4);
        let alone = Case { x: first(&case.x), ..case.clone() };
        assert_eq!(first(&case.run(place)).data(), alone.run(place).data());
        assert_eq!(first(&case.base(place)).data(), alone.base(place).data());
    });
}

#[test]
fn gradients_of_an_adapter_do_not_depend_on_the_others() {
    for_each_place(|place| {
        let case = Case::new(5, 600, 24, 20, 5, 4);
        let alone = Case { x: first(&case.x), a: first(&case.a), b: first(&case.b), ..case.clone() };
        // The gradient of y is the same for the first entry.
        let (all, one) = (case.all(place), alone.all(place));
        for (what, i) in [("y", 0), ("dx", 1), ("da", 4), ("db", 5)] {
            assert_eq!(first(&all[i]).data(), one[i].data(), "{what} at {place:?}");
        }
    });
}

/// x, w, bias, a, b and the gradient of y, in f64.
type Values = [Vec<f64>; 6];

/// A matrix by its elements.
fn table(rows: usize, columns: usize, f: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    (0..rows * columns).map(|i| f(i / columns, i % columns)).collect()
}

/// scale S and scale dS.
fn shrunk(s: Sizes, [x, _, _, a, b, dy]: &Values) -> [Vec<f64>; 2] {
    let adapter = |row: usize| row / (s.rows / s.adapters);
    let of_x = |row: usize, r: usize| -> f64 {
        let a = &a[(adapter(row) * s.rank + r) * s.inner..];
        (0..s.inner).map(|i| x[row * s.inner + i] * a[i]).sum()
    };
    let of_dy = |row: usize, r: usize| -> f64 {
        let b = &b[adapter(row) * s.outer * s.rank + r..];
        (0..s.outer).map(|o| dy[row * s.outer + o] * b[o * s.rank]).sum()
    };
    let scale = f64::from(SCALE);
    [
        table(s.rows, s.rank, |row, r| scale * of_x(row, r)),
        table(s.rows, s.rank, |row, r| scale * of_dy(row, r)),
    ]
}

/// y, dx, dw, dbias, da and db: what stems from S or dS, and the rest.
fn parts(s: Sizes, [x, w, bias, a, b, dy]: &Values, [low, dlow]: &[Vec<f64>; 2]) -> [[Vec<f64>; 6]; 2] {
    let adapter = |row: usize| row / (s.rows / s.adapters);
    // left^T right over the rows of every group.
    let products = |(left, m): (&[f64], usize), (right, n): (&[f64], usize), groups: usize| {
        let each = s.rows / groups;
        table(groups * m, n, |i, j| {
            let row = |k| i / m * each + k;
            (0..each).map(|k| left[row(k) * m + i % m] * right[row(k) * n + j]).sum()
        })
    };
    let update = [
        table(s.rows, s.outer, |row, o| {
            let b = &b[(adapter(row) * s.outer + o) * s.rank..];
            (0..s.rank).map(|r| low[row * s.rank + r] * b[r]).sum()
        }),
        table(s.rows, s.inner, |row, i| {
            let a = &a[adapter(row) * s.rank * s.inner + i..];
            (0..s.rank).map(|r| dlow[row * s.rank + r] * a[r * s.inner]).sum()
        }),
        vec![0.0; w.len()],
        vec![0.0; bias.len()],
        products((dlow, s.rank), (x, s.inner), s.adapters),
        products((dy, s.outer), (low, s.rank), s.adapters),
    ];
    let base = [
        table(s.rows, s.outer, |row, o| {
            bias[o] + (0..s.inner).map(|i| x[row * s.inner + i] * w[o * s.inner + i]).sum::<f64>()
        }),
        table(s.rows, s.inner, |row, i| {
            (0..s.outer).map(|o| dy[row * s.outer + o] * w[o * s.inner + i]).sum()
        }),
        products((dy, s.outer), (x, s.inner), 1),
        table(1, s.outer, |_, o| (0..s.rows).map(|row| dy[row * s.outer + o]).sum()),
        vec![0.0; a.len()],
        vec![0.0; b.len()],
    ];
    [update, base]
}

/// Every element of the output and of all gradients has an error that is bounded by its own products: sums in f32 cost a little of their
/// sizes; in bf16 scale S, scale dS and the result are rounded once, each by at most 1/256 of itself, and nothing else is.
fn check_elements(place: Place, case: &Case) {
    let s = case.sizes();
    let [x, w, bias, a, b] = case.inputs().map(|t| place.rounded(&t));
    let values = [x, w, bias, a, b, place.rounded(&random(6, &[s.rows, s.outer]))];
    let size = |v: Vec<f64>| -> Vec<f64> { v.into_iter().map(f64::abs).collect() };
    let sizes = values.clone().map(size);
    let low = shrunk(s, &values);
    let [update, base] = parts(s, &values, &low);
    let [update_size, _] = parts(s, &sizes, &low.map(size));
    let [update_terms, base_terms] = parts(s, &sizes, &shrunk(s, &sizes));
    // A little more than 1/256: the roundings act on each other.
    let unit = if place.dtype == Dtype::Bf16 { 1.0 / 255.0 } else { 0.0 };
    for (n, (what, got)) in ["y", "dx", "dw", "dbias", "da", "db"].iter().zip(case.all(place)).enumerate() {
        assert_eq!(got.numel(), base[n].len(), "{what}");
        for (i, &got) in got.data().iter().enumerate() {
            let expected = update[n][i] + base[n][i];
            let error = (f64::from(got) - expected).abs();
            let bound =
                unit * (expected.abs() + update_size[n][i]) + 2e-5 * (update_terms[n][i] + base_terms[n][i]);
            assert!(
                error <= bound,
                "{what}[{i}] of {s:?} at {place:?}: got {got}, expected {expected} within {bound:e}"
            );
        }
    }
}

#[test]
fn every_element_is_as_near_as_its_roundings_allow() {
    for_each_place(|place| {
        check_elements(place, &Case::new(3, 3, 29, 62, 3, 16));
        check_elements(place, &Case::new(1, 3, 2100, 5, 1, 2));
        check_elements(place, &Case::new(1, 2100, 6, 5, 1, 2));
        check_elements(place, &Case::new(4, 70, 64, 72, 2, 8));
    });
}

#[test]
fn two_runs_are_equal() {
    for_each_place(|place| {
        for case in [Case::new(2, 700, 70, 50, 2, 5), Case::new(3, 9, 64, 2056, 3, 8)] {
            for (one, two) in case.all(place).iter().zip(case.all(place)) {
                assert_eq!(one.data(), two.data(), "at {place:?}");
            }
        }
    });
}

#[test]
fn threads_do_not_change_a_bit() {
    let pools =
        [1, 2, 3, 7].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("threads"));
    let deep = depths().map(|(inner, rank)| Case::new(3, 85, inner, 90, 3, rank));
    for case in deep.chain([Case::new(3, 200, 300, 90, 1, 8)]) {
        let alone = pools[0].install(|| case.run(Place::CPU));
        for pool in &pools[1..] {
            let y = pool.install(|| case.run(Place::CPU));
            assert_eq!(y.data(), alone.data(), "{} threads: {:?}", pool.current_num_threads(), case.sizes());
        }
    }
}

#[test]
fn nan_reaches_its_row_alone() {
    for_each_place(|place| {
        for inner in [64, 63] {
            let mut case = Case::new(1, 30, inner, 40, 1, 4);
            case.x.data_mut()[inner * 17 + 3] = f32::NAN;
            for (i, row) in case.run(place).data().chunks(40).enumerate() {
                assert_eq!(row.iter().all(|v| v.is_nan()), i == 17);
                assert_eq!(row.iter().any(|v| v.is_nan()), i == 17);
            }
        }
    });
}

#[test]
fn wrong_shapes_are_named() {
    let refused = |case: Case, name: &str| {
        let e = update(&Tape::inference(), &case.inputs().map(Var::constant));
        let text = e.expect_err("refused").to_string();
        assert!(text.contains(name), "{text}");
    };
    let good = || Case::new(4, 3, 8, 6, 2, 2);
    refused(Case { w: random(1, &[6, 9]), ..good() }, "x");
    refused(Case { bias: random(1, &[5]), ..good() }, "bias");
    refused(Case { a: random(1, &[3, 2, 8]), ..good() }, "lora_a");
    refused(Case { a: random(1, &[2, 0, 8]), ..good() }, "lora_a");
    refused(Case { b: random(1, &[2, 6, 3]), ..good() }, "lora_b");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if places().len() > 1 { 16 } else { 60 }))]

    /// Any sizes, forward and backward.
    #[test]
    fn any_sizes(
        (adapters, each) in (1usize..4, 1usize..4),
        [tokens, inner, outer] in [1usize..40, 1..70, 1..70],
        rank in 1usize..20,
    ) {
        let case = Case::new(adapters * each, tokens, inner, outer, adapters, rank);
        for_each_place(|place| check_elements(place, &case));
    }
}
