//! The filter per patch and its features against the oracle, forward and backward.

use hywu_kernels::{
    Tape, Tensor, Var,
    ops::{
        local_filter::{COEFFICIENTS, FEATURES, HIDDEN, local_filter, pixel_features},
        loss::weighted_sum,
    },
    reference::elementary as oracle,
    testing::{Place, check_gradients_at, check_output, for_each_place, random},
};

#[test]
fn pixel_features_by_their_definitions() {
    // Small ones are mirrored several times; blocks of 128 pixels and warps of patches come out ragged.
    let sizes =
        [(2, 2, 2), (8, 12, 4), (16, 8, 8), (1, 3, 1), (1, 1, 1), (1, 127, 1), (1, 129, 1), (129, 1, 1)];
    for (h, w, p) in sizes.into_iter().chain([(17, 15, 1), (48, 32, 16), (72, 80, 8), (65, 130, 65)]) {
        let source = random(2, &[2, h, w, 3]);
        let expected = |v: &[Vec<f64>]| -> Vec<f64> {
            v[0].chunks(h * w * 3).flat_map(|picture| oracle::pixel_features(picture, h, w, p)).collect()
        };
        for_each_place(|place| {
            let features = |_: &Tape, v: &[Var]| Ok(Var::constant(pixel_features(v[0].value(), p)?));
            check_output(place, std::slice::from_ref(&source), features, expected, 1e-6);
            let got = pixel_features(&place.tensor(&source), p).expect("it divides");
            assert_eq!((got.shape(), got.dtype()), (&[2, h, w, FEATURES][..], place.dtype));
        });
    }
    for_each_place(|place| {
        assert!(pixel_features(&place.tensor(&random(2, &[1, 9, 8, 3])), 8).is_err());
        assert!(pixel_features(&place.tensor(&random(2, &[1, 8, 8, 4])), 8).is_err());
    });
}

#[test]
fn features_of_a_picture_do_not_depend_on_the_others() {
    let (a, b) = (random(4, &[1, 24, 40, 3]), random(5, &[1, 24, 40, 3]));
    let both = |a: &Tensor, b: &Tensor| {
        Tensor::new(&[2, 24, 40, 3], [a.data(), b.data()].concat()).expect("two pictures")
    };
    for_each_place(|place| {
        let features = |x: &Tensor| {
            let features = pixel_features(&place.tensor(x), 8).expect("it divides");
            features.to_host().expect("the device works").data().to_vec()
        };
        let (alone, other) = (features(&a), features(&b));
        assert_eq!(features(&both(&a, &b)), [&alone[..], &other].concat());
        assert_eq!(features(&both(&b, &a)), [&other[..], &alone].concat());
    });
}

fn check_filter(place: Place, shape: [usize; 2], pixels: usize, samples: usize) {
    let [batch, tokens] = shape;
    let features = random(2, &[batch, tokens, pixels * FEATURES]);
    let fixed = place.rounded(&features);
    check_gradients_at(
        place,
        &[random(1, &[batch, tokens, COEFFICIENTS]), random(3, &[batch, tokens, pixels * HIDDEN])],
        |t, v| local_filter(t, &v[0], &features.to_like(v[0].value())?, &v[1]),
        |v| oracle::local_filter(&v[0], &fixed, &v[1], pixels, FEATURES, HIDDEN),
        samples,
        1e-5,
    );
}

#[test]
fn a_filter_per_patch() {
    for_each_place(|place| {
        check_filter(place, [2, 3], 4, 400);
        for pixels in [1, 15, 16, 17, 63, 64, 65, 127, 128, 129] {
            check_filter(place, [1, 3], pixels, 100);
        }
        let tensor = |shape: &[usize]| place.tensor(&random(1, shape));
        let constant = |shape: &[usize]| Var::constant(tensor(shape));
        let features = tensor(&[2, 3, 4 * FEATURES]);
        let (coef, hidden) = (constant(&[2, 3, COEFFICIENTS]), constant(&[2, 3, 4 * HIDDEN]));
        let wrong = constant(&[2, 3, 5]);
        let fails = |coef, hidden| local_filter(&Tape::inference(), coef, &features, hidden).is_err();
        assert!(fails(&wrong, &hidden));
        assert!(fails(&coef, &wrong));
        assert!(!fails(&coef, &hidden));
        let elsewhere = Var::constant(random(1, &[2, 3, COEFFICIENTS]));
        assert_eq!(fails(&elsewhere, &hidden), place != Place::CPU);
    });
}

#[test]
fn a_large_patch_and_many_small_ones() {
    for_each_place(|place| {
        check_filter(place, [1, 1], 4096 + 257, 8);
        check_filter(place, [1, 4096 + 257], 1, 8);
    });
}

/// Output and both gradients of patches of 65 pixels.
fn filter(place: Place, patches: &[[Tensor; 4]]) -> Vec<[Vec<f32>; 3]> {
    let joined = |i: usize| {
        let data: Vec<f32> = patches.iter().flat_map(|p| p[i].data().to_vec()).collect();
        let each = patches[0][i].numel();
        place.tensor(&Tensor::new(&[1, patches.len(), each], data).expect("patches of one size"))
    };
    let tape = Tape::new();
    let (coef, hidden) = (tape.leaf(joined(0)), tape.leaf(joined(2)));
    let out = local_filter(&tape, &coef, &joined(1), &hidden).expect("it fits");
    let loss = weighted_sum(&tape, &out, &joined(3)).expect("it fits");
    let grads = tape.backward(&loss).expect("a scalar");
    let results = [Some(out.value()), grads.get(&coef), grads.get(&hidden)].map(|x| {
        let x = x.expect("a leaf").to_host().expect("the device works");
        let each = x.numel() / patches.len();
        x.data().chunks(each).map(<[f32]>::to_vec).collect::<Vec<_>>()
    });
    (0..patches.len()).map(|i| results.each_ref().map(|r| r[i].clone())).collect()
}

#[test]
fn a_patch_does_not_depend_on_the_others() {
    let sizes = [COEFFICIENTS, 65 * FEATURES, 65 * HIDDEN, 65 * 3];
    let patch = |i: u64| sizes.map(|n| random(10 * i + n as u64, &[n]));
    let mut patches: Vec<_> = (0..5).map(patch).collect();
    for_each_place(|place| {
        let first = filter(place, &patches);
        assert!(first == filter(place, &patches), "two runs differ");
        patches.reverse();
        let mut reversed = filter(place, &patches);
        patches.reverse();
        reversed.reverse();
        assert!(first == reversed, "the order of the patches matters");
    });
}
