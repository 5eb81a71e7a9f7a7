//! Pictures to patches and back against the oracle, forward and backward.

use hywu_kernels::{
    Tape, Var,
    ops::patchify::{patchify, unpatchify},
    testing::{check_gradients, for_each_place, random, widen},
};
use proptest::prelude::*;

#[test]
fn patches_there_and_back() {
    let image = random(1, &[2, 16, 24, 3]);
    let tape = Tape::inference();
    let patches = patchify(&tape, &Var::constant(image.clone()), 8).expect("sizes that 8 divides");
    assert_eq!(patches.shape(), [2, 6, 192]);
    // Patch (1, 2) of the second picture, pixel (3, 5), channel 1.
    let direct = image.data()[((16 + 8 + 3) * 24 + 16 + 5) * 3 + 1];
    assert_eq!(patches.value().data()[(6 + 3 + 2) * 192 + (3 * 8 + 5) * 3 + 1], direct);
    assert_eq!(unpatchify(&tape, &patches, 8, 16, 24).expect("the same").value().data(), image.data());
    assert!(patchify(&tape, &Var::constant(image), 7).is_err());
    let order: Vec<f64> = patches.value().data().iter().map(|&v| v.into()).collect();
    let there = random(1, &[2, 16, 24, 3]);
    check_gradients(&[there], |t, v| patchify(t, &v[0], 8), |v| permuted(&v[0], &order), 20, 1e-5);
    let back = random(2, &[2, 6, 192]);
    check_gradients(&[back], |t, v| unpatchify(t, &v[0], 8, 16, 24), |v| joined(&v[0]), 60, 1e-5);
}

/// Patches of a 2 x 16 x 24 x 3 picture, by index arithmetic.
fn permuted(image: &[f64], like: &[f64]) -> Vec<f64> {
    let at = |i: usize| {
        let (b, t, e) = (i / 1152, i / 192 % 6, i % 192);
        let (y, x) = (t / 3 * 8 + e / 24, t % 3 * 8 + e / 3 % 8);
        image[((b * 16 + y) * 24 + x) * 3 + e % 3]
    };
    (0..like.len()).map(at).collect()
}

/// The 2 x 16 x 24 x 3 picture of patches, by index arithmetic.
fn joined(patches: &[f64]) -> Vec<f64> {
    let at = |i: usize| {
        let (b, y, x, c) = (i / 1152, i / 72 % 16, i / 3 % 24, i % 3);
        patches[(b * 6 + y / 8 * 3 + x / 8) * 192 + (y % 8 * 8 + x % 8) * 3 + c]
    };
    (0..patches.len()).map(at).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn there_and_back_is_the_picture(batch in 1usize..4, p in 1usize..9, channels in 1usize..9) {
        for_each_place(|place| {
            let image = place.constant(&random(9, &[batch, 2 * p, 3 * p, channels]));
            let tape = Tape::inference();
            let patches = patchify(&tape, &image, p).expect("it divides");
            let back = unpatchify(&tape, &patches, p, 2 * p, 3 * p).expect("it divides");
            let host = widen(image.value());
            assert_eq!(widen(back.value()), host);
            // Patch after patch, line after line.
            let starts = (0..batch * 6 * p).map(|i| {
                let (patch, y) = (i / p, i % p);
                let (entry, row, column) = (patch / 6, patch % 6 / 3, patch % 3);
                (((entry * 2 + row) * p + y) * 3 + column) * p * channels
            });
            let expected: Vec<f64> = starts.flat_map(|at| host[at..at + p * channels].to_vec()).collect();
            assert_eq!(widen(patches.value()), expected);
        });
    }
}
