//! The filter per patch and its features against the oracle, forward and backward.

use hywu_kernels::{
    Tape, Var,
    ops::local_filter::{COEFFICIENTS, FEATURES, HIDDEN, local_filter, pixel_features},
    reference::elementary as oracle,
    testing::{assert_close, check_gradients, random, widen},
};

#[test]
fn pixel_features_by_their_definitions() {
    for (h, w, p) in [(2, 2, 2), (8, 12, 4), (16, 8, 8), (1, 3, 1)] {
        let source = random(2, &[2, h, w, 3]);
        let got = pixel_features(&source, p).expect("it divides");
        assert_eq!(got.shape(), [2, h, w, FEATURES]);
        let wide = widen(&source);
        let expected: Vec<f64> =
            wide.chunks(h * w * 3).flat_map(|picture| oracle::pixel_features(picture, h, w, p)).collect();
        assert_close(got.data(), &expected, 1e-6);
    }
    assert!(pixel_features(&random(2, &[1, 9, 8, 3]), 8).is_err());
    assert!(pixel_features(&random(2, &[1, 8, 8, 4]), 8).is_err());
}

#[test]
fn a_filter_per_patch() {
    let features = random(2, &[2, 3, 4 * FEATURES]);
    let fixed = widen(&features);
    check_gradients(
        &[random(1, &[2, 3, COEFFICIENTS]), random(3, &[2, 3, 4 * HIDDEN])],
        |t, v| local_filter(t, &v[0], &features, &v[1]),
        move |v| oracle::local_filter(&v[0], &fixed, &v[1], 4, FEATURES, HIDDEN),
        400,
        1e-5,
    );
    let constant = |shape: &[usize]| Var::constant(random(1, shape));
    let (coef, hidden) = (constant(&[2, 3, COEFFICIENTS]), constant(&[2, 3, 4 * HIDDEN]));
    let wrong = constant(&[2, 3, 5]);
    let fails = |coef, hidden| local_filter(&Tape::inference(), coef, &features, hidden).is_err();
    assert!(fails(&wrong, &hidden));
    assert!(fails(&coef, &wrong));
    assert!(!fails(&coef, &hidden));
}
