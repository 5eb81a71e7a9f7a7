//! RMSNorm with modulation against the oracle, forward and backward.

use hywu_kernels::{
    Tape, Tensor, Var,
    ops::{
        loss::weighted_sum,
        low_rank_linear::{Segments, Shrink},
        rms_norm::{Modulation, rms_norm, rms_norm_shrink},
    },
    reference::elementary as oracle,
    testing::{
        Place, assert_same_bits, check_gradients, check_gradients_at, for_each_place, random, shrunk_rows,
        uneven_segments,
    },
};
use proptest::prelude::*;

#[test]
fn rms_norm_with_and_without_modulation() {
    for c in [1, 15, 16, 17, 63, 64, 65, 127, 128, 129] {
        let inputs = [random(1, &[2, 3, c]), random(2, &[c]), random(3, &[2, c]), random(4, &[2, c])];
        check_gradients(
            &inputs,
            |t, v| rms_norm(t, &v[0], Some(&v[1]), 1e-3, Some(Modulation { scale: &v[2], shift: &v[3] })),
            |v| oracle::rms_norm(&v[0], 2, &v[1], 1e-3, &v[2], &v[3]),
            20,
            2e-5,
        );
        let zeros = vec![0.0; c];
        check_gradients(
            &[random(1, &[1, 3, c])],
            |t, v| rms_norm(t, &v[0], None, 1e-3, None),
            |v| oracle::rms_norm(&v[0], 1, &vec![1.0; c], 1e-3, &zeros, &zeros),
            20,
            // The gradient of a row of one channel is a difference of nearly equal numbers.
            if c == 1 { 1e-2 } else { 2e-5 },
        );
    }
}

/// Rows enough for several parallel tasks, the last of them ragged.
#[test]
fn more_rows_than_one_task_takes() {
    let per_entry = |seed| random(seed, &[3, 9]);
    check_gradients(
        &[random(3, &[3, 4096 + 257, 9]), random(6, &[9]), per_entry(7), per_entry(8)],
        |t, v| rms_norm(t, &v[0], Some(&v[1]), 1e-3, Some(Modulation { scale: &v[2], shift: &v[3] })),
        |v| oracle::rms_norm(&v[0], 3, &v[1], 1e-3, &v[2], &v[3]),
        6,
        2e-5,
    );
}

/// Rows of a part of a warp, of a warp, and of blocks of several sizes; ragged and whole packs.
#[test]
fn rows_of_every_width() {
    for c in [2, 8, 192, 256, 260, 513, 520, 1025, 2048, 4096 + 8] {
        check_gradients(
            &[random(1, &[2, 2, c]), random(2, &[c]), random(3, &[2, c]), random(4, &[2, c])],
            |t, v| rms_norm(t, &v[0], Some(&v[1]), 1e-3, Some(Modulation { scale: &v[2], shift: &v[3] })),
            |v| oracle::rms_norm(&v[0], 2, &v[1], 1e-3, &v[2], &v[3]),
            4,
            2e-5,
        );
    }
}

/// The weight alone is trained: its gradient is a sum over all rows, whatever entry they belong to.
#[test]
fn a_weight_over_many_rows() {
    for c in [1, 33, 64, 200] {
        let x = random(1, &[3, (4096 + 257) / 3, c]);
        let zeros = vec![0.0; c];
        for_each_place(|place| {
            let x64 = place.rounded(&x);
            check_gradients_at(
                place,
                &[random(2, &[c])],
                |t, v| rms_norm(t, &place.constant(&x), Some(&v[0]), 1e-3, None),
                |v| oracle::rms_norm(&x64, 1, &v[0], 1e-3, &zeros, &zeros),
                4,
                2e-5,
            );
        });
    }
}

/// Every operand may be absent, and every one may be a constant.
#[test]
fn any_operand_may_be_missing_or_constant() {
    let (x, w) = (random(1, &[2, 70, 24]), random(2, &[24]));
    let (scale, shift) = (random(3, &[2, 24]), random(4, &[2, 24]));
    let ones = vec![1.0; 24];
    check_gradients(
        &[x.clone(), scale.clone(), shift.clone()],
        |t, v| rms_norm(t, &v[0], None, 1e-3, Some(Modulation { scale: &v[1], shift: &v[2] })),
        |v| oracle::rms_norm(&v[0], 2, &ones, 1e-3, &v[1], &v[2]),
        10,
        2e-5,
    );
    for_each_place(|place| {
        let [w_, scale_, shift_] = [&w, &scale, &shift].map(|t| place.constant(t));
        let [w, scale, shift] = [&w, &scale, &shift].map(|t| place.rounded(t));
        let modulation = Modulation { scale: &scale_, shift: &shift_ };
        check_gradients_at(
            place,
            std::slice::from_ref(&x),
            |t, v| {
                let Modulation { scale, shift } = modulation;
                rms_norm(t, &v[0], Some(&w_), 1e-3, Some(Modulation { scale, shift }))
            },
            |v| oracle::rms_norm(&v[0], 2, &w, 1e-3, &scale, &shift),
            10,
            2e-5,
        );
    });
    let tape = Tape::inference();
    let (x, none) = (Var::constant(x), Var::constant(Tensor::zeros(&[2, 0, 24])));
    assert!(rms_norm(&tape, &none, None, 1e-3, None).is_err());
    assert!(rms_norm(&tape, &x, None, 0.0, None).is_err());
    assert!(rms_norm(&tape, &x, Some(&Var::constant(Tensor::zeros(&[23]))), 1e-3, None).is_err());
}

/// The output and all gradients of the entries `order` of a batch of five, entry by entry (the weight's, which sums over the batch, last).
fn of_entries(place: Place, order: &[usize]) -> Vec<Vec<f32>> {
    const ROWS: usize = 300;
    const C: usize = 72;
    let pick = |seed, each: usize, shape: &[usize]| {
        let all = random(seed, &[5, each]);
        let data = order.iter().flat_map(|&b| all.data()[b * each..][..each].to_vec()).collect();
        place.tensor(&Tensor::new(shape, data).expect("whole entries"))
    };
    let n = order.len();
    let tape = Tape::new();
    let x = tape.leaf(pick(1, ROWS * C, &[n, ROWS, C]));
    let (scale, shift) = (tape.leaf(pick(2, C, &[n, C])), tape.leaf(pick(3, C, &[n, C])));
    let w = tape.leaf(place.tensor(&random(4, &[C])));
    let out = rms_norm(&tape, &x, Some(&w), 1e-5, Some(Modulation { scale: &scale, shift: &shift }))
        .expect("it runs");
    let loss = weighted_sum(&tape, &out, &pick(5, ROWS * C, &[n, ROWS, C])).expect("one shape");
    let grads = tape.backward(&loss).expect("a scalar");
    let host = |t: &Tensor| t.to_host().expect("the device works").data().to_vec();
    let parts = [host(out.value()), host(grads.get(&x).expect("a leaf"))];
    let sums = [&scale, &shift].map(|v| host(grads.get(v).expect("a leaf")));
    let mut entries: Vec<Vec<f32>> = (0..n)
        .map(|b| {
            parts.iter().chain(&sums).flat_map(|p| p[p.len() / n * b..][..p.len() / n].to_vec()).collect()
        })
        .collect();
    entries.push(host(grads.get(&w).expect("a leaf")));
    entries
}

#[test]
fn equal_input_gives_equal_bits_whatever_the_batch() {
    for_each_place(|place| {
        let all = of_entries(place, &[0, 1, 2, 3, 4]);
        assert_eq!(all, of_entries(place, &[0, 1, 2, 3, 4]));
        let permuted = of_entries(place, &[3, 0, 4, 2, 1]);
        for (i, b) in [3, 0, 4, 2, 1].into_iter().enumerate() {
            assert_eq!(permuted[i], all[b]);
        }
        assert_eq!(of_entries(place, &[2])[0], all[2]);
    });
}

/// The norm with scale y A^T beside it is the two, one after the other, in every bit: the output, what is computed ahead and the gradients.
fn check_shrink(place: Place, [batch, rows, c]: [usize; 3], ranks: usize, of: Option<&Segments>) {
    let adapters = of.map_or(batch, Segments::adapters);
    let [x, w, scale, shift] = [&[batch, rows, c][..], &[c], &[batch, c], &[batch, c]].map(|s| random(1, s));
    let a = place.tensor(&random(2, &[adapters, ranks, c]));
    let shrink = Shrink { a: &a, scale: 0.75, segments: of };
    for (weighted, modulated) in [(true, true), (true, false), (false, true), (false, false)] {
        let run = |fused: bool| {
            let tape = Tape::new();
            let leaves = [&x, &w, &scale, &shift].map(|t| tape.leaf(place.tensor(t)));
            let [x, w, scale, shift] = &leaves;
            let (w, modulation) = (weighted.then_some(w), modulated.then_some(Modulation { scale, shift }));
            let (y, s) = match fused {
                true => rms_norm_shrink(&tape, x, w, 1e-3, modulation, &shrink).expect("it runs"),
                false => {
                    let y = rms_norm(&tape, x, w, 1e-3, modulation).expect("it runs");
                    let s = shrink.of(y.value()).expect("it runs");
                    (y, s)
                }
            };
            let loss = weighted_sum(&tape, &y, &place.tensor(&random(3, y.shape()))).expect("one shape");
            let mut grads = tape.backward(&loss).expect("a scalar");
            let grads = leaves.iter().filter_map(|leaf| grads.take(leaf));
            let all: Vec<Tensor> = [y.value().clone()].into_iter().chain(grads).collect();
            let all = all.iter().map(|t| t.to_host().expect("the device works")).collect::<Vec<_>>();
            all.into_iter().chain([shrunk_rows(&s, of, adapters)]).collect::<Vec<_>>()
        };
        let what = format!("at {place:?}: {c} channels, {ranks} ranks, {weighted}, {modulated}");
        assert_same_bits(&run(true), &run(false), &what);
    }
}

#[test]
fn a_shrink_beside_it_changes_no_bit() {
    let [ragged, partly] = uneven_segments();
    for_each_place(|place| {
        for c in [8, 24, 63, 64, 65, 192, 256, 264, 513, 2056, 4104, 8200] {
            check_shrink(place, [2, 19, c], 16, None);
        }
        for ranks in [1, 4, 7, 17, 64, 65, 128] {
            check_shrink(place, [3, 16, 72], ranks, None);
        }
        check_shrink(place, [2, 121, 72], 12, Some(&ragged));
        check_shrink(place, [2, 25, 72], 12, Some(&partly));
    });
    let (x, a) = (Var::constant(Tensor::zeros(&[2, 3, 8])), Tensor::zeros(&[2, 4, 9]));
    let shrink = Shrink { a: &a, scale: 1.0, segments: None };
    assert!(rms_norm_shrink(&Tape::inference(), &x, None, 1e-3, None, &shrink).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_sizes([batch, rows, c] in [1usize..4, 1..9, 2..70]) {
        let inputs = [random(1, &[batch, rows, c]), random(2, &[c]), random(3, &[batch, c]), random(4, &[batch, c])];
        check_gradients(
            &inputs,
            |t, v| rms_norm(t, &v[0], Some(&v[1]), 1e-3, Some(Modulation { scale: &v[2], shift: &v[3] })),
            |v| oracle::rms_norm(&v[0], batch, &v[1], 1e-3, &v[2], &v[3]),
            5,
            1e-4,
        );
    }
}
