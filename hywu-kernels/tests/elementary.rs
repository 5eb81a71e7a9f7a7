//! The small ops against their oracles, forward and backward.

use hywu_kernels::{
    Tape, Tensor, Var,
    ops::{
        elementwise::{
            add, add_row, concat_tokens, gated_residual, mask_tokens, mean_tokens, repeat_each, scale,
            slice_channels, slice_tokens,
        },
        embedding::embedding,
        local_filter::{COEFFICIENTS, FEATURES, HIDDEN, local_filter, pixel_features},
        loss::weighted_mse,
        noise::noise_window,
        patchify::{patchify, unpatchify},
        rms_norm::{Modulation, rms_norm},
        swiglu::{silu, swiglu},
        tile_blend::{TileAt, tile_blend},
        timestep::timestep_embedding,
    },
    reference::elementary as oracle,
    testing::{assert_close, check_gradients, random, widen},
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
    let (x, y) = (random(3, &[3, ROWS, 9]), random(4, &[3, ROWS, 9]));
    let per_entry = |seed| random(seed, &[3, 9]);
    check_gradients(
        &[x.clone(), y, per_entry(5)],
        |t, v| gated_residual(t, &v[0], &v[1], &v[2]),
        |v| oracle::gated_residual(&v[0], &v[1], &v[2], 9),
        6,
        1e-5,
    );
    check_gradients(
        &[x, random(6, &[9]), per_entry(7), per_entry(8)],
        |t, v| rms_norm(t, &v[0], Some(&v[1]), 1e-3, Some(Modulation { scale: &v[2], shift: &v[3] })),
        |v| oracle::rms_norm(&v[0], 3, &v[1], 1e-3, &v[2], &v[3]),
        6,
        2e-5,
    );
}

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
fn lookup() {
    let ids = [3, 0, 3, 1];
    let rows = |v: &[Vec<f64>]| ids.iter().flat_map(|&i| v[0][i as usize * 5..][..5].to_vec()).collect();
    check_gradients(&[random(1, &[4, 5])], |t, v| embedding(t, &v[0], &ids, &[2, 2]), rows, 20, 1e-5);
    let table = Var::constant(random(1, &[4, 5]));
    assert!(
        embedding(&Tape::inference(), &table, &[4], &[1])
            .expect_err("no such entry")
            .to_string()
            .contains('4')
    );
}

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

#[test]
fn weighted_loss() {
    let target = random(2, &[3, 10]);
    let t64: Vec<f64> = target.data().iter().map(|&v| v.into()).collect();
    check_gradients(
        &[random(1, &[3, 10])],
        |t, v| weighted_mse(t, &v[0], &target, &[0.5, 2.0, 1.0]),
        |v| vec![oracle::weighted_mse(&v[0], &t64, &[0.5, 2.0, 1.0])],
        30,
        1e-5,
    );
}

#[test]
fn noise_does_not_depend_on_the_window() {
    let whole = noise_window(7, 0, 0, 40, 50, 3);
    let part = noise_window(7, 11, 13, 20, 30, 3);
    for y in 0..20 {
        assert_eq!(part.data()[y * 90..(y + 1) * 90], whole.data()[((y + 11) * 50 + 13) * 3..][..90]);
    }
    assert_ne!(noise_window(8, 0, 0, 4, 4, 3).data(), noise_window(7, 0, 0, 4, 4, 3).data());
}

#[test]
fn blended_tiles_of_one_picture_are_that_picture() {
    let (h, w, size) = (20, 25, 8);
    let picture = random(1, &[h, w, 3]);
    let starts = |n: usize| (0..n - size).step_by(5).chain([n - size]).collect::<Vec<_>>();
    let at: Vec<TileAt> =
        starts(h).iter().flat_map(|&y| starts(w).into_iter().map(move |x| TileAt { y, x })).collect();
    let mut tiles = Vec::new();
    for t in &at {
        for y in t.y..t.y + size {
            tiles.extend_from_slice(&picture.data()[(y * w + t.x) * 3..][..size * 3]);
        }
    }
    let mut out = vec![f32::NAN; h * w * 3];
    tile_blend(&tiles, &at, size, 3, &mut out, h, w).expect("covered");
    let worst = out.iter().zip(picture.data()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-5, "{worst}");
    let e = tile_blend(&tiles[..192], &at[..1], size, 3, &mut out, h, w)
        .expect_err("mostly uncovered")
        .to_string();
    assert!(e.contains("covers"), "{e}");
    assert!(tile_blend(&tiles[..192], &[TileAt { y: 13, x: 0 }], size, 3, &mut out, h, w).is_err());
}

#[test]
fn timestep_zero_is_cos_one_sin_zero() {
    let e = timestep_embedding(&[0.0, 0.5], 8);
    assert_eq!(e.shape(), [2, 8]);
    assert_eq!(e.data()[..8], [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
    assert!((f64::from(e.data()[12]) - 500f64.sin()).abs() < 1e-6);
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Any sizes: norm, gates, sums and patches, forward and backward.
    #[test]
    fn any_sizes([batch, rows, c] in [1usize..4, 1..9, 2..70], p in 1usize..5) {
        let inputs = [random(1, &[batch, rows, c]), random(2, &[c]), random(3, &[batch, c]), random(4, &[batch, c])];
        check_gradients(
            &inputs,
            |t, v| rms_norm(t, &v[0], Some(&v[1]), 1e-3, Some(Modulation { scale: &v[2], shift: &v[3] })),
            |v| oracle::rms_norm(&v[0], batch, &v[1], 1e-3, &v[2], &v[3]),
            5,
            1e-4,
        );
        let x = random(5, &[batch, rows, 2 * c]);
        check_gradients(&[x], |t, v| swiglu(t, &v[0]), |v| oracle::swiglu(&v[0], 2 * c), 5, 2e-5);
        let inputs = [random(6, &[batch, rows, c]), random(7, &[batch, rows, c]), random(8, &[batch, c])];
        let gate = |v: &[Vec<f64>]| oracle::gated_residual(&v[0], &v[1], &v[2], c);
        check_gradients(&inputs, |t, v| gated_residual(t, &v[0], &v[1], &v[2]), gate, 5, 2e-5);
        // Patches there and back are the picture.
        let image = Var::constant(random(9, &[batch, 2 * p, 3 * p, 3]));
        let tape = Tape::inference();
        let patches = patchify(&tape, &image, p).expect("it divides");
        let back = unpatchify(&tape, &patches, p, 2 * p, 3 * p).expect("it divides");
        prop_assert_eq!(back.value().data(), image.value().data());
    }
}
