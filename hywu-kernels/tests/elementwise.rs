//! Sums, gates, cutting and joining against the oracle, forward and backward.

use hywu_kernels::{
    Tape, Tensor, Var,
    ops::elementwise::{
        add, add_row, concat_tokens, gated_residual, mask_tokens, mean_tokens, repeat_each, scale,
        slice_channels, slice_tokens,
    },
    reference::elementary as oracle,
    testing::{check_gradients, random},
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_sizes([batch, rows, c] in [1usize..4, 1..9, 2..70]) {
        let inputs = [random(6, &[batch, rows, c]), random(7, &[batch, rows, c]), random(8, &[batch, c])];
        let gate = |v: &[Vec<f64>]| oracle::gated_residual(&v[0], &v[1], &v[2], c);
        check_gradients(&inputs, |t, v| gated_residual(t, &v[0], &v[1], &v[2]), gate, 5, 2e-5);
    }
}
