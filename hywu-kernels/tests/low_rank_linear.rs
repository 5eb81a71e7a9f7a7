//! Low-rank linear against its oracle, and what must hold bit for bit.

use hywu_kernels::{
    LoraVar, Tape, Tensor, Var,
    ops::low_rank_linear::{linear, low_rank_linear},
    reference::low_rank_linear::{Sizes, low_rank_linear as oracle},
    testing::{assert_close, check_gradients, random, widen},
};

use proptest::prelude::*;

const EDGES: [usize; 10] = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129];

/// Columns of x around the 512 that the matrix product sums in one pass, each with several ranks.
fn depths() -> impl Iterator<Item = (usize, usize)> {
    [511, 512, 513, 1030].into_iter().flat_map(|inner| [1, 7, 16].map(|rank| (inner, rank)))
}

struct Case {
    x: Tensor,
    w: Tensor,
    bias: Tensor,
    a: Tensor,
    b: Tensor,
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
    fn run(&self) -> Tensor {
        let c = |t: &Tensor| Var::constant(t.clone());
        let lora = LoraVar { a: c(&self.a), b: c(&self.b), scale: 0.5 };
        let y =
            low_rank_linear(&Tape::inference(), &c(&self.x), &c(&self.w), Some(&c(&self.bias)), Some(&lora));
        y.expect("good shapes").value().clone()
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
    fn check(&self) {
        let [x, w, bias, a, b] = [&self.x, &self.w, &self.bias, &self.a, &self.b].map(widen);
        assert_close(self.run().data(), &oracle(self.sizes(), &x, &w, &bias, &a, &b, 0.5), 1e-5);
    }
}

#[test]
fn tile_edges_match_the_oracle() {
    for n in EDGES {
        Case::new(2, n, 33, 20, 2, 4).check();
        Case::new(1, 7, n, 18, 1, 3).check();
        Case::new(4, 3, 21, n, 2, 16).check();
    }
    Case::new(1, 4096 + 257, 300, 40, 1, 2).check();
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

#[test]
fn small_integers_are_exact() {
    let whole = |seed, shape: &[usize]| {
        let mut t = random(seed, shape);
        t.data_mut().iter_mut().for_each(|v| *v = (*v * 2.0).round());
        t
    };
    let (x, w) = (whole(1, &[1, 100, 700]), whole(2, &[90, 700]));
    let y = linear(&Tape::inference(), &Var::constant(x.clone()), &Var::constant(w.clone()), None)
        .expect("good shapes");
    for (i, row) in x.data().chunks(700).enumerate() {
        for (o, weights) in w.data().chunks(700).enumerate() {
            let sum: f32 = row.iter().zip(weights).map(|(a, b)| a * b).sum();
            assert_eq!(y.value().data()[i * 90 + o], sum);
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    // The second and third case sum over more than 512 rows and more than 512 columns of y.
    for (case, samples) in [
        (Case::new(4, 5, 19, 23, 2, 3), 60),
        (Case::new(2, 515, 20, 15, 2, 7), 20),
        (Case::new(2, 8, 20, 515, 2, 7), 20),
    ] {
        let s = case.sizes();
        check_gradients(
            &[case.x, case.w, case.bias, case.a, case.b],
            |tape, v| {
                let lora = LoraVar { a: v[3].clone(), b: v[4].clone(), scale: 0.5 };
                low_rank_linear(tape, &v[0], &v[1], Some(&v[2]), Some(&lora))
            },
            |v| oracle(s, &v[0], &v[1], &v[2], &v[3], &v[4], 0.5),
            samples,
            1e-5,
        );
    }
}

#[test]
fn zero_lora_b_is_the_base() {
    let c = |t: &Tensor| Var::constant(t.clone());
    for (inner, rank) in depths().chain([(100, 8)]) {
        let mut case = Case::new(2, 65, inner, 70, 2, rank);
        case.b.data_mut().fill(0.0);
        let base =
            linear(&Tape::inference(), &c(&case.x), &c(&case.w), Some(&c(&case.bias))).expect("good shapes");
        assert_eq!(case.run().data(), base.value().data(), "{inner} columns, rank {rank}");
    }
}

#[test]
fn permuting_the_batch_permutes_the_rows_bit_for_bit() {
    depths().chain([(200, 8)]).for_each(|(inner, rank)| permute(Case::new(5, 50, inner, 60, 5, rank)));
}

fn permute(case: Case) {
    let swap = |t: &Tensor| {
        let each = t.numel() / 5;
        let mut out = t.clone();
        out.data_mut()
            .chunks_mut(each)
            .zip(t.data().chunks(each).rev())
            .for_each(|(o, x)| o.copy_from_slice(x));
        out
    };
    let other = Case {
        x: swap(&case.x),
        a: swap(&case.a),
        b: swap(&case.b),
        w: case.w.clone(),
        bias: case.bias.clone(),
    };
    assert_eq!(swap(&case.run()).data(), other.run().data());
    // One entry alone gives the same rows as in the batch.
    let first = |t: &Tensor| {
        let mut shape = t.shape().to_vec();
        shape[0] = 1;
        Tensor::new(&shape, t.data()[..t.numel() / 5].to_vec()).expect("a fifth")
    };
    let alone = Case {
        x: first(&case.x),
        a: first(&case.a),
        b: first(&case.b),
        w: case.w.clone(),
        bias: case.bias.clone(),
    };
    assert_eq!(alone.run().data(), first(&case.run()).data());
}

#[test]
fn threads_do_not_change_a_bit() {
    let pools =
        [1, 2, 3, 7].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("threads"));
    let deep = depths().map(|(inner, rank)| Case::new(3, 85, inner, 90, 3, rank));
    for case in deep.chain([Case::new(3, 200, 300, 90, 1, 8)]) {
        let alone = pools[0].install(|| case.run());
        for pool in &pools[1..] {
            let y = pool.install(|| case.run());
            assert_eq!(y.data(), alone.data(), "{} threads: {:?}", pool.current_num_threads(), case.sizes());
        }
    }
}

#[test]
fn nan_reaches_its_row_alone() {
    let mut case = Case::new(1, 30, 64, 40, 1, 4);
    case.x.data_mut()[64 * 17 + 3] = f32::NAN;
    for (i, row) in case.run().data().chunks(40).enumerate() {
        assert_eq!(row.iter().all(|v| v.is_nan()), i == 17);
        assert_eq!(row.iter().any(|v| v.is_nan()), i == 17);
    }
}

#[test]
fn wrong_shapes_are_named() {
    let refused = |case: Case, name: &str| {
        let c = |t: &Tensor| Var::constant(t.clone());
        let lora = LoraVar { a: c(&case.a), b: c(&case.b), scale: 0.5 };
        let e =
            low_rank_linear(&Tape::inference(), &c(&case.x), &c(&case.w), Some(&c(&case.bias)), Some(&lora));
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
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Any sizes, forward and backward.
    #[test]
    fn any_sizes(
        (adapters, each) in (1usize..4, 1usize..4),
        [tokens, inner, outer] in [1usize..40, 1..70, 1..70],
        rank in 1usize..20,
    ) {
        let case = Case::new(adapters * each, tokens, inner, outer, adapters, rank);
        case.check();
        let inputs = [&case.x, &case.w, &case.bias, &case.a, &case.b].map(Clone::clone);
        let run = |t: &Tape, v: &[Var]| {
            let lora = LoraVar { a: v[3].clone(), b: v[4].clone(), scale: 0.5 };
            low_rank_linear(t, &v[0], &v[1], Some(&v[2]), Some(&lora))
        };
        let sizes = case.sizes();
        check_gradients(&inputs, run, |v| oracle(sizes, &v[0], &v[1], &v[2], &v[3], &v[4], 0.5), 3, 2e-5);
    }
}
