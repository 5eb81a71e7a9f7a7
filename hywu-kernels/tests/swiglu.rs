//! Activations against the oracle, forward and backward.

use hywu_kernels::{
    ops::swiglu::{silu, swiglu},
    reference::elementary as oracle,
    testing::{check_gradients, random},
};
use proptest::prelude::*;

#[test]
fn activations() {
    for h in [1, 15, 16, 17, 129] {
        let x = random(1, &[3, 2, 2 * h]);
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

/// Rows enough for several parallel tasks, the last of them ragged.
#[test]
fn more_rows_than_one_task_takes() {
    const ROWS: usize = 4096 + 257;
    let silu_all = |v: &[Vec<f64>]| v[0].iter().map(|&x| oracle::silu(x)).collect();
    check_gradients(&[random(1, &[ROWS, 9])], |t, v| silu(t, &v[0]), silu_all, 6, 1e-5);
    let pairs = random(2, &[ROWS, 2 * 9]);
    check_gradients(&[pairs], |t, v| swiglu(t, &v[0]), |v| oracle::swiglu(&v[0], 2 * 9), 6, 1e-5);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_sizes([batch, rows, c] in [1usize..4, 1..9, 2..70]) {
        let x = random(5, &[batch, rows, 2 * c]);
        check_gradients(&[x], |t, v| swiglu(t, &v[0]), |v| oracle::swiglu(&v[0], 2 * c), 5, 2e-5);
    }
}
