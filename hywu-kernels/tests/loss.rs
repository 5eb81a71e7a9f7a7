//! Training losses against the oracle, forward and backward.

use hywu_kernels::{
    ops::loss::weighted_mse,
    reference::elementary as oracle,
    testing::{check_gradients, random},
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
