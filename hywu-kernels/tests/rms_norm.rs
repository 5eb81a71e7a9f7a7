//! RMSNorm with modulation against the oracle, forward and backward.

use hywu_kernels::{
    ops::rms_norm::{Modulation, rms_norm},
    reference::elementary as oracle,
    testing::{check_gradients, random},
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
