//! Sums, gates, cutting and joining against the oracle, forward and backward.

use hywu_core::Dtype;
use hywu_kernels::{
    Device, Tape, Tensor, Var,
    ops::elementwise::{
        add, add_row, cast, concat_channels, concat_tokens, gated_residual, mask_tokens, mean_tokens,
        repeat_each, scale, slice_channels, slice_tokens, standardise,
    },
    ops::loss::weighted_sum,
    reference::elementary as oracle,
    testing::{Place, check_gradients, check_output, for_each_place, random, rounded_to_bf16, widen},
};
use proptest::prelude::*;

#[test]
fn sums_and_gates() {
    let (x, y) = (random(1, &[2, 5, 7]), random(2, &[2, 5, 7]));
    let sum = |v: &[Vec<f64>]| v[0].iter().zip(&v[1]).map(|(a, b)| a + b).collect();
    check_gradients(&[x.clone(), y.clone()], |t, v| add(t, &v[0], &v[1]), sum, 70, 1e-5);
    let double = |v: &[Vec<f64>]| v[0].iter().map(|a| -2.5 * a).collect();
    check_gradients(std::slice::from_ref(&x), |t, v| scale(t, &v[0], -2.5), double, 70, 1e-5);
    check_gradients(
        &[x.clone(), y, random(3, &[2, 7])],
        |t, v| gated_residual(t, &v[0], &v[1], &v[2]),
        |v| oracle::gated_residual(&v[0], &v[1], &v[2], 7),
        70,
        1e-5,
    );
    let rows = |v: &[Vec<f64>]| v[0].iter().enumerate().map(|(i, a)| a + v[1][i % 7]).collect();
    check_gradients(&[x.clone(), random(4, &[7])], |t, v| add_row(t, &v[0], &v[1]), rows, 70, 1e-5);
    let repeated = |v: &[Vec<f64>]| v[0].chunks(35).flat_map(|c| c.repeat(3)).collect();
    check_gradients(std::slice::from_ref(&x), |t, v| repeat_each(t, &v[0], 3), repeated, 70, 1e-5);
    let mean = |v: &[Vec<f64>]| {
        let entry =
            |x: &[f64]| (0..7).map(|c| x.iter().skip(c).step_by(7).sum::<f64>() / 5.0).collect::<Vec<_>>();
        v[0].chunks(35).flat_map(entry).collect()
    };
    check_gradients(std::slice::from_ref(&x), |t, v| mean_tokens(t, &v[0]), mean, 70, 1e-5);
    let masked = |v: &[Vec<f64>]| {
        (v[0].iter().enumerate()).map(|(i, a)| if i % 35 < [14, 35][i / 35] { *a } else { 0.0 }).collect()
    };
    check_gradients(&[x], |t, v| mask_tokens(t, &v[0], &[2, 5]), masked, 70, 1e-5);
}

#[test]
fn cutting_and_joining() {
    let (x, y) = (random(1, &[2, 3, 4]), random(2, &[2, 5, 4]));
    let joined =
        |v: &[Vec<f64>]| v[0].chunks(12).zip(v[1].chunks(20)).flat_map(|(a, b)| [a, b].concat()).collect();
    check_gradients(&[x, y.clone()], |t, v| concat_tokens(t, &[&v[0], &v[1]]), joined, 40, 1e-5);
    let tokens = |v: &[Vec<f64>]| v[0].chunks(20).flat_map(|a| a[4..16].to_vec()).collect();
    check_gradients(std::slice::from_ref(&y), |t, v| slice_tokens(t, &v[0], 1, 3), tokens, 40, 1e-5);
    let channels = |v: &[Vec<f64>]| v[0].chunks(4).flat_map(|a| a[1..3].to_vec()).collect();
    check_gradients(std::slice::from_ref(&y), |t, v| slice_channels(t, &v[0], 1, 2), channels, 40, 1e-5);
    let (tape, y) = (Tape::inference(), Var::constant(y));
    assert!(slice_tokens(&tape, &y, 4, 2).is_err() && slice_channels(&tape, &y, usize::MAX, 2).is_err());
    assert!(concat_tokens(&tape, &[]).is_err());
}

#[test]
fn a_diamond_sums_both_paths_and_a_vector_is_no_loss() {
    let tape = Tape::new();
    let x = tape.leaf(Tensor::scalar(3.0));
    let y = add(&tape, &scale(&tape, &x, 2.0).expect("finite"), &scale(&tape, &x, 5.0).expect("finite"))
        .expect("scalars");
    assert_eq!(tape.backward(&y).expect("a scalar").get(&x).expect("a leaf").data(), [7.0]);
    let tape = Tape::new();
    let x = tape.leaf(Tensor::zeros(&[2]));
    assert!(tape.backward(&x).is_err());
    assert!(!Tape::inference().leaf(Tensor::scalar(1.0)).requires_grad());
}

/// Rows enough for several parallel tasks, the last of them ragged.
#[test]
fn more_rows_than_one_task_takes() {
    let (x, y) = (random(3, &[3, 4096 + 257, 9]), random(4, &[3, 4096 + 257, 9]));
    check_gradients(
        &[x, y, random(5, &[3, 9])],
        |t, v| gated_residual(t, &v[0], &v[1], &v[2]),
        |v| oracle::gated_residual(&v[0], &v[1], &v[2], 9),
        6,
        1e-5,
    );
}

#[test]
fn channels_join() {
    for widths in [[1, 1, 1], [3, 16, 5], [8, 8, 16], [64, 1, 63], [128, 192, 64]] {
        let inputs: Vec<Tensor> =
            widths.iter().enumerate().map(|(i, &n)| random(i as u64, &[2, 3, n])).collect();
        let joined = |v: &[Vec<f64>]| {
            (0..6)
                .flat_map(|r| (0..3).flat_map(move |i| v[i][r * widths[i]..][..widths[i]].to_vec()))
                .collect()
        };
        check_gradients(&inputs, |t, v| concat_channels(t, &[&v[0], &v[1], &v[2]]), joined, 20, 1e-5);
    }
    let (tape, x) = (Tape::inference(), Var::constant(random(1, &[2, 3, 4])));
    let [fewer, none] = [&[2, 2, 4], &[2, 3, 0]].map(|s| Var::constant(Tensor::zeros(s)));
    assert!(concat_channels(&tape, &[]).is_err() && concat_channels(&tape, &[&x, &fewer]).is_err());
    assert!(concat_channels(&tape, &[&x, &none]).is_err());
}

#[test]
fn constants_are_standardised() {
    for_each_place(|place| {
        for n in [1, 15, 16, 17, 63, 64, 65, 129] {
            let (x, mean, factor) = (random(1, &[2, 5, n]), random(2, &[n]), random(3, &[n]));
            check_output(
                place,
                &[x, mean, factor],
                |_, v| Ok(Var::constant(standardise(v[0].value(), v[1].value(), v[2].value())?)),
                |v| v[0].iter().enumerate().map(|(i, x)| (x - v[1][i % n]) * v[2][i % n]).collect(),
                1e-5,
            );
        }
    });
    let x = random(1, &[2, 5]);
    assert!(standardise(&x, &Tensor::zeros(&[4]), &Tensor::zeros(&[5])).is_err());
}

/// More of them than a grid has blocks along y and z.
#[test]
fn means_of_very_many_entries() {
    let x = random(1, &[66_000, 2, 3]);
    let means =
        |v: &[Vec<f64>]| v[0].chunks(6).flat_map(|x| (0..3).map(move |c| 0.5 * (x[c] + x[3 + c]))).collect();
    for_each_place(|place| {
        check_output(place, std::slice::from_ref(&x), |t, v| mean_tokens(t, &v[0]), means, 1e-6);
    });
}

/// Sums in so many parts that threads share an element's, of elements that are not whole blocks.
#[test]
fn means_of_very_many_tokens() {
    let (tokens, c) = (1300, 257);
    let x = random(2, &[2, tokens, c]);
    let mean = |entry: &[f64], i: usize| entry.iter().skip(i).step_by(c).sum::<f64>() / tokens as f64;
    let means = |v: &[Vec<f64>]| {
        v[0].chunks(tokens * c).flat_map(|entry| (0..c).map(move |i| mean(entry, i))).collect()
    };
    for_each_place(|place| {
        check_output(place, std::slice::from_ref(&x), |t, v| mean_tokens(t, &v[0]), means, 1e-6);
    });
}

/// The gradient comes back in the dtype of the operand.
#[test]
fn casts_there_and_back() {
    for_each_place(|place| {
        for n in [1, 7, 8, 9, 15, 16, 17, 127, 128, 129, 4096 + 257] {
            for dtype in [Dtype::F32, Dtype::Bf16] {
                let tape = Tape::new();
                let x = tape.leaf(place.tensor(&random(1, &[n])));
                let y = cast(&tape, &x, dtype).expect("the device works");
                let arrived = if place.device == Device::Cpu { Dtype::F32 } else { dtype };
                assert_eq!(y.value().dtype(), arrived);
                let expected = x.value().to_host().expect("the device works");
                let narrow = arrived == Dtype::Bf16;
                let expected = if narrow { rounded_to_bf16(&expected) } else { expected };
                assert_eq!(widen(y.value()), widen(&expected));
                let weights = random(2, &[n]).to_like(y.value()).expect("the device works");
                let loss = weighted_sum(&tape, &y, &weights).expect("one shape");
                let grad = tape.backward(&loss).expect("a scalar").take(&x).expect("a leaf");
                assert_eq!(grad.dtype(), x.value().dtype());
                let weights = weights.to_like(x.value()).expect("the device works");
                assert_eq!(widen(&grad), widen(&weights));
            }
        }
        let x = Var::constant(place.tensor(&random(1, &[3])));
        assert!(cast(&Tape::inference(), &x, Dtype::F16).is_err());
    });
}

/// Sums over the rows of an entry have the same bits in every batch.
#[test]
fn an_entry_does_not_depend_on_its_batch() {
    const ROWS: usize = 600;
    const C: usize = 40;
    let run = |place: Place, entries: &[usize]| -> Vec<Vec<f64>> {
        let pick = |seed, each: usize, shape: &[usize]| {
            let all = random(seed, &[24, each]);
            let data = entries.iter().flat_map(|&b| all.data()[b * each..][..each].to_vec()).collect();
            place.tensor(&Tensor::new(shape, data).expect("whole entries"))
        };
        let n = entries.len();
        let tape = Tape::new();
        let y = Var::constant(pick(1, ROWS * C, &[n, ROWS, C]));
        let gate = tape.leaf(pick(2, C, &[n, C]));
        let out = gated_residual(&tape, &y, &y, &gate).expect("it runs");
        let mean = mean_tokens(&tape, &out).expect("tokens");
        let loss = weighted_sum(&tape, &out, &pick(3, ROWS * C, &[n, ROWS, C])).expect("one shape");
        let grad = tape.backward(&loss).expect("a scalar").take(&gate).expect("a leaf");
        let (mean, grad) = (widen(mean.value()), widen(&grad));
        (0..n).map(|b| [&mean[b * C..][..C], &grad[b * C..][..C]].concat()).collect()
    };
    for_each_place(|place| {
        let all = run(place, &(0..24).collect::<Vec<_>>());
        assert_eq!(run(place, &[17, 5]), [all[17].clone(), all[5].clone()]);
        assert_eq!(run(place, &[9])[0], all[9]);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_sizes([batch, rows, c] in [1usize..4, 1..9, 2..70]) {
        let inputs = [random(6, &[batch, rows, c]), random(7, &[batch, rows, c]), random(8, &[batch, c])];
        let gate = |v: &[Vec<f64>]| oracle::gated_residual(&v[0], &v[1], &v[2], c);
        check_gradients(&inputs, |t, v| gated_residual(t, &v[0], &v[1], &v[2]), gate, 5, 2e-5);
    }
}
