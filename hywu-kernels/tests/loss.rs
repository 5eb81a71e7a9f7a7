//! Training losses against the oracle, forward and backward.

use hywu_kernels::{
    Tape,
    ops::loss::{weighted_mse, weighted_sum},
    reference::elementary as oracle,
    testing::{check_gradients, check_gradients_at, for_each_place, random, widen},
};

#[test]
fn weighted_loss() {
    let target = random(2, &[3, 10]);
    let t64: Vec<f64> = target.data().iter().map(|&v| v.into()).collect();
    check_gradients(
        &[random(1, &[3, 10])],
        |t, v| weighted_mse(t, &v[0], &target.to_like(v[0].value())?, &[0.5, 2.0, 1.0]),
        |v| vec![oracle::weighted_mse(&v[0], &t64, &[0.5, 2.0, 1.0])],
        30,
        1e-5,
    );
}

/// Several blocks of sums, the last of them ragged; entries of odd sizes.
#[test]
fn losses_of_every_size() {
    for (batch, each) in [(1, 1), (300, 1), (40, 3), (2, 17), (3, 1365), (2, 4096 + 257), (5, 8192 + 1)] {
        let shape = [batch, each];
        let target = random(2, &shape);
        let weight: Vec<f32> = (0..batch).map(|b| 0.5 + b as f32).collect();
        for_each_place(|place| {
            let t64 = place.rounded(&target);
            let there = place.tensor(&target);
            check_gradients_at(
                place,
                &[random(1, &shape)],
                |t, v| weighted_mse(t, &v[0], &there, &weight),
                |v| {
                    let weight: Vec<f64> = weight.iter().map(|&w| w.into()).collect();
                    vec![oracle::weighted_mse(&v[0], &t64, &weight)]
                },
                4,
                1e-4,
            );
        });
    }
}

#[test]
fn the_gradient_of_a_weighted_sum_is_the_weights() {
    for_each_place(|place| {
        for n in [1, 16, 129, 4096 + 257] {
            let tape = Tape::new();
            let (x, weights) = (tape.leaf(place.tensor(&random(1, &[n]))), place.tensor(&random(2, &[n])));
            let loss = weighted_sum(&tape, &x, &weights).expect("one shape");
            let expected: f64 = widen(x.value()).iter().zip(widen(&weights)).map(|(x, w)| x * w).sum();
            let size: f64 = widen(x.value()).iter().zip(widen(&weights)).map(|(x, w)| (x * w).abs()).sum();
            let got = f64::from(loss.value().item().expect("a scalar"));
            assert!((got - expected).abs() <= 1e-6 * size, "{got}, expected {expected}");
            let grad = tape.backward(&loss).expect("a scalar").take(&x).expect("a leaf");
            assert_eq!(widen(&grad), widen(&weights));
        }
    });
}
