//! Activations against the oracle, forward and backward.

use hywu_kernels::{
    Tape, Tensor, Var,
    ops::{
        loss::weighted_sum,
        low_rank_linear::{Segments, Shrink},
        swiglu::{silu, swiglu, swiglu_shrink},
    },
    reference::elementary as oracle,
    testing::{
        Place, assert_same_bits, check_gradients, for_each_place, random, shrunk_rows, uneven_segments,
    },
};
use proptest::prelude::*;

#[test]
fn activations() {
    for h in [1, 15, 16, 17, 63, 64, 65, 127, 128, 129] {
        let mut x = random(1, &[3, 2, 2 * h]);
        // Gates at the ends of what exp takes.
        for (i, gate) in [90.0, -90.0, 0.0, -20.0].into_iter().enumerate() {
            x.data_mut()[2 * h * i + h] = gate;
        }
        check_gradients(&[x], |t, v| swiglu(t, &v[0]), |v| oracle::swiglu(&v[0], 2 * h), 30, 1e-5);
    }
    let mut x = random(1, &[4, 30]);
    x.data_mut()[..4].copy_from_slice(&[90.0, -90.0, 0.0, -20.0]);
    check_gradients(
        &[x],
        |t, v| silu(t, &v[0]),
        |v| v[0].iter().map(|&x| oracle::silu(x)).collect(),
        120,
        1e-5,
    );
}

#[test]
fn silu_of_every_size() {
    for n in [0, 1, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 2047, 2049] {
        let silu_all = |v: &[Vec<f64>]| v[0].iter().map(|&x| oracle::silu(x)).collect();
        check_gradients(&[random(n as u64, &[n])], |t, v| silu(t, &v[0]), silu_all, 10, 1e-5);
    }
}

/// What exp can't take becomes the limit, not NaN.
#[test]
fn large_values_have_limits() {
    for_each_place(|place| {
        let x = Tensor::new(&[6], vec![1e4, -1e4, 200.0, -200.0, 3e38, -3e38]).expect("six");
        let tape = Tape::new();
        let leaf = tape.leaf(place.tensor(&x));
        let y = silu(&tape, &leaf).expect("it runs");
        let rounded: Vec<f32> = place.rounded(&x).iter().map(|&v| v as f32).collect();
        let host = |t: &Tensor| t.to_host().expect("the device works").data().to_vec();
        assert_eq!(host(y.value()), [rounded[0], 0.0, 200.0, 0.0, rounded[4], 0.0]);
        let ones = y.value().full_like(&[6], 1.0).expect("memory");
        let loss = weighted_sum(&tape, &y, &ones).expect("one shape");
        let grads = tape.backward(&loss).expect("a scalar");
        assert_eq!(host(grads.get(&leaf).expect("a leaf")), [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]);
    });
}

/// Rows enough for several parallel tasks, the last of them ragged.
#[test]
fn more_rows_than_one_task_takes() {
    const ROWS: usize = 4096 + 257;
    let silu_all = |v: &[Vec<f64>]| v[0].iter().map(|&x| oracle::silu(x)).collect();
    check_gradients(&[random(1, &[ROWS, 9])], |t, v| silu(t, &v[0]), silu_all, 6, 1e-5);
    let pairs = random(2, &[ROWS, 2 * 9]);
    check_gradients(&[pairs], |t, v| swiglu(t, &v[0]), |v| oracle::swiglu(&v[0], 2 * 9), 6, 1e-5);
}

/// SwiGLU with scale y A^T beside it is the two, one after the other, in every bit: the output, what is computed ahead and the gradient.
fn check_shrink(place: Place, [batch, rows, h]: [usize; 3], ranks: usize, of: Option<&Segments>) {
    let adapters = of.map_or(batch, Segments::adapters);
    let (x, a) = (random(1, &[batch, rows, 2 * h]), place.tensor(&random(2, &[adapters, ranks, h])));
    let shrink = Shrink { a: &a, scale: 0.75, segments: of };
    let run = |fused: bool| {
        let tape = Tape::new();
        let x = tape.leaf(place.tensor(&x));
        let (y, s) = match fused {
            true => swiglu_shrink(&tape, &x, &shrink).expect("it runs"),
            false => {
                let y = swiglu(&tape, &x).expect("it runs");
                let s = shrink.of(y.value()).expect("it runs");
                (y, s)
            }
        };
        let loss = weighted_sum(&tape, &y, &place.tensor(&random(3, y.shape()))).expect("one shape");
        let grads = tape.backward(&loss).expect("a scalar");
        let both =
            [y.value(), grads.get(&x).expect("a leaf")].map(|t| t.to_host().expect("the device works"));
        let [y, dx] = both;
        [y, dx, shrunk_rows(&s, of, adapters)]
    };
    assert_same_bits(&run(true), &run(false), &format!("at {place:?}: {h} channels, {ranks} ranks"));
}

#[test]
fn a_shrink_beside_it_changes_no_bit() {
    let [ragged, partly] = uneven_segments();
    for_each_place(|place| {
        for h in [8, 24, 63, 64, 65, 192, 513, 2056] {
            check_shrink(place, [2, 19, h], 16, None);
        }
        for ranks in [1, 4, 7, 17, 64, 65, 128] {
            check_shrink(place, [3, 16, 72], ranks, None);
        }
        check_shrink(place, [2, 121, 72], 12, Some(&ragged));
        check_shrink(place, [2, 25, 72], 12, Some(&partly));
    });
    let (x, a) = (Var::constant(Tensor::zeros(&[2, 3, 8])), Tensor::zeros(&[2, 4, 8]));
    let shrink = Shrink { a: &a, scale: 1.0, segments: None };
    assert!(swiglu_shrink(&Tape::inference(), &x, &shrink).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_sizes([batch, rows, c] in [1usize..4, 1..9, 2..70]) {
        let x = random(5, &[batch, rows, 2 * c]);
        check_gradients(&[x], |t, v| swiglu(t, &v[0]), |v| oracle::swiglu(&v[0], 2 * c), 5, 2e-5);
    }
}
