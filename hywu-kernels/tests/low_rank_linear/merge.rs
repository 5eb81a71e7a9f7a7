//! Merging an adapter into a weight, against the oracle and against fused calls.

use hywu_kernels::{
    LoraVar, Tape, Tensor, Var,
    ops::low_rank_linear::{Apply, Load, Prepared, Segment, linear, low_rank_linear, merge},
    reference::low_rank_linear as reference,
    testing::{assert_near, check_output, for_each_place, random, widen},
};
use proptest::prelude::*;

const SCALE: f32 = 0.75;

/// Outer, inner, rank, parts.
type Sizes = [usize; 4];

fn oracle([outer, inner, rank, parts]: Sizes, v: &[Vec<f64>]) -> Vec<f64> {
    reference::merge(reference::Sizes { inner, outer, parts, rank }, [&v[0], &v[1], &v[2]], SCALE.into())
}

fn inputs([outer, inner, rank, parts]: Sizes) -> [Tensor; 3] {
    let weight = random(1, &[outer, inner]);
    [weight, random(2, &[1, parts * rank, inner]), random(3, &[1, outer, rank])]
}

fn bits(x: &Tensor) -> Vec<u32> {
    x.to_host().expect("the device works").data().iter().map(|v| v.to_bits()).collect()
}

fn check(sizes: Sizes) {
    for_each_place(|place| {
        let [outer, _, rank, parts] = sizes;
        let merged = |_: &Tape, v: &[Var]| {
            let merged = merge(v[0].value(), v[1].value(), v[2].value(), SCALE)?;
            assert_eq!(merged.dtype(), place.dtype);
            Ok(Var::constant(merged))
        };
        check_output(place, &inputs(sizes), merged, |v| oracle(sizes, v), 1e-5);
        assert!(outer.is_multiple_of(parts) && rank > 0);
    });
}

#[test]
fn sizes_at_the_edges_of_tiles() {
    for n in [1, 15, 16, 17, 63, 64, 65, 127, 128, 129] {
        check([n, 130, 16, 1]);
        check([66, n, 16, 1]);
        check([70, 72, n, 1]);
        check([3 * n, n + 1, 5, 3]);
    }
}

/// Sizes whose rows are whole 16 bytes, with several tiles both ways and both parts of a SwiGLU.
#[test]
fn several_tiles() {
    for [outer, inner, rank, parts] in
        [[192, 264, 16, 1], [257, 136, 64, 1], [320, 256, 8, 2], [130, 8, 4, 2], [512, 1032, 33, 4]]
    {
        check([outer, inner, rank, parts]);
    }
}

#[test]
fn many_elements() {
    check([1030, 4096 + 257, 16, 1]);
}

/// Small integers: every sum is exact, so every place has the same values.
#[test]
fn small_integers_are_exact() {
    for sizes @ [outer, inner, rank, parts] in [[130, 72, 16, 1], [66, 129, 7, 2]] {
        let whole = |seed, shape: &[usize]| {
            let mut x = random(seed, shape);
            x.data_mut().iter_mut().for_each(|v| *v = v.round().clamp(-2.0, 2.0));
            x
        };
        let weight = whole(1, &[outer, inner]);
        // Times a scale of three quarters they stay whole.
        let mut a = whole(2, &[1, parts * rank, inner]);
        a.data_mut().iter_mut().for_each(|v| *v *= 4.0);
        let b = whole(3, &[1, outer, rank]);
        let expected = oracle(sizes, &[&weight, &a, &b].map(widen));
        for_each_place(|place| {
            let [w, a, b] = [&weight, &a, &b].map(|x| place.tensor(x));
            assert_eq!(widen(&merge(&w, &a, &b, SCALE).expect("it fits")), expected, "at {place:?}");
        });
    }
}

/// -0 as well.
#[test]
fn no_update_keeps_the_bits_and_the_original() {
    for_each_place(|place| {
        let [mut weight, a, b] = inputs([66, 129, 5, 1]);
        weight.data_mut()[..3].copy_from_slice(&[-0.0, 0.0, f32::MIN_POSITIVE]);
        let [weight, a, b] = [weight, a, b].map(|x| place.tensor(&x));
        let before = bits(&weight);
        let zero = b.zeros_like(b.shape()).expect("memory");
        for (b, scale) in [(&zero, SCALE), (&zero, -SCALE), (&b, 0.0), (&b, -0.0)] {
            assert_eq!(bits(&merge(&weight, &a, b, scale).expect("it fits")), before, "at {place:?}");
        }
        let merged = merge(&weight, &a, &b, SCALE).expect("it fits");
        assert_ne!(bits(&merged), before);
        assert_eq!(bits(&weight), before, "the original is not touched");
        // Axes of one adapter are optional, and two runs give one result.
        let (a, b) = (a.reshape(&[5, 129]).expect("as many"), b.reshape(&[66, 5]).expect("as many"));
        assert_eq!(bits(&merge(&weight, &a, &b, SCALE).expect("it fits")), bits(&merged));
    });
}

/// What is not a number stays one, and stays in its column (of A) or row (of B).
#[test]
fn nan_is_not_lost() {
    for_each_place(|place| {
        let [weight, mut a, b] = inputs([20, 40, 3, 1]);
        a.data_mut()[40 + 7] = f32::NAN;
        let [weight, a, b] = [weight, a, b].map(|x| place.tensor(&x));
        let merged = widen(&merge(&weight, &a, &b, SCALE).expect("it fits"));
        for (i, v) in merged.iter().enumerate() {
            assert_eq!(v.is_nan(), i % 40 == 7, "at {place:?}, element {i}");
        }
    });
}

#[test]
fn what_does_not_fit_is_an_error() {
    let [weight, a, b] = inputs([6, 4, 2, 1]);
    let fails = |w: &Tensor, a: &Tensor, b: &Tensor, scale: f32, word: &str| {
        let error = merge(w, a, b, scale).expect_err(word).to_string();
        assert!(error.contains(word), "{error}");
    };
    fails(&Tensor::zeros(&[6]), &a, &b, 1.0, "weight");
    fails(&Tensor::zeros(&[0, 4]), &a, &b, 1.0, "weight");
    fails(&weight, &Tensor::zeros(&[1, 2, 5]), &b, 1.0, "lora_a");
    fails(&weight, &Tensor::zeros(&[1, 3, 4]), &b, 1.0, "lora_a");
    // Four parts do not divide six rows.
    fails(&weight, &Tensor::zeros(&[1, 8, 4]), &b, 1.0, "lora_a");
    fails(&weight, &Tensor::zeros(&[2, 2, 4]), &b, 1.0, "lora_a");
    fails(&weight, &a, &Tensor::zeros(&[2, 6, 2]), 1.0, "lora_b");
    fails(&weight, &a, &Tensor::zeros(&[1, 6, 0]), 1.0, "lora_b");
    fails(&weight, &a, &b, f32::NAN, "scale");
}

/// A layer gives the same output whichever way it applies its adapter; in bf16 but for the rounding of the merged weight.
#[test]
fn fused_and_merged_layers_agree() {
    let [rows, outer, inner, rank] = [33, 72, 40, 4];
    for_each_place(|place| {
        let [weight, a, b] = inputs([outer, inner, rank, 1]);
        let (x, bias) = (random(4, &[1, rows, inner]), random(5, &[outer]));
        let values = [&weight, &a, &b, &x, &bias].map(|t| place.rounded(t));
        let with = |weight: &[f64], adapter| {
            let sizes = reference::Sizes { inner, outer, parts: 1, rank };
            let segment = Segment { rows, weight: 0, adapter };
            let operands = [&values[3], weight, &values[4], &values[1], &values[2]];
            reference::low_rank_linear(sizes, &[segment], operands, SCALE.into())
        };
        let expected = with(&values[0], Some(0));
        // A naive merge rounds the weight.
        let naive = |_| {
            let weight = oracle([outer, inner, rank, 1], &values);
            let weight = Tensor::build(&[weight.len()], |out| {
                out.iter_mut().zip(&weight).for_each(|(o, w)| *o = *w as f32);
            });
            with(&place.rounded(&weight), None)
        };
        let [w, a, b, x, bias] = [&weight, &a, &b, &x, &bias].map(|t| place.constant(t));
        let lora = LoraVar { a, b, scale: SCALE };
        let tape = Tape::inference();
        for apply in [Apply::Fused, Apply::Merged, Apply::Auto] {
            let layer =
                Prepared::new(&w, Some(&lora), apply, Load { calls: 1000, rows }).expect("it can be merged");
            assert_eq!(layer.is_plain(), apply != Apply::Fused, "a thousand calls pay");
            let y = layer.forward(&tape, &x, Some(&bias)).expect("it fits");
            let y = y.value().to_host().expect("the device works");
            assert_near(place, y.data(), &expected, naive, 1e-5);
        }
        let plain = Prepared::new(&w, None, Apply::Merged, Load { calls: 1, rows }).expect("no adapter");
        let y = plain.forward(&tape, &x, None).expect("it fits");
        assert_eq!(bits(y.value()), bits(linear(&tape, &x, &w, None).expect("it fits").value()));
    });
}

/// Where gradients are wanted, or every instance has its own adapter, nothing is merged unasked, and asked it is an error.
#[test]
fn auto_never_merges_what_it_must_not() {
    let load = Load { calls: 1_000_000, rows: 1_000_000 };
    let [weight, a, b] = inputs([6, 4, 2, 1]);
    let tape = Tape::new();
    let (w, l) = (Var::constant(weight.clone()), |a: &Var, b: &Var| LoraVar {
        a: a.clone(),
        b: b.clone(),
        scale: 1.0,
    });
    let (a, b) = (Var::constant(a), Var::constant(b));
    let (a_leaf, b_leaf) = (tape.leaf(a.value().clone()), tape.leaf(b.value().clone()));
    let two = l(&Var::constant(random(1, &[2, 2, 4])), &Var::constant(random(1, &[2, 6, 2])));
    let refused = [
        (tape.leaf(weight), l(&a, &b)),
        (w.clone(), l(&a_leaf, &b)),
        (w.clone(), l(&a, &b_leaf)),
        (w.clone(), two),
    ];
    for (w, lora) in &refused {
        assert!(!Prepared::new(w, Some(lora), Apply::Auto, load).expect("fused").is_plain());
        assert!(Prepared::new(w, Some(lora), Apply::Merged, load).is_err());
        assert!(Prepared::new(w, Some(lora), Apply::Fused, load).is_ok());
    }
    assert!(Prepared::new(&w, Some(&l(&a, &b)), Apply::Auto, load).expect("merged").is_plain());
    // The input's gradient does not need the adapter.
    let x = tape.leaf(random(7, &[1, 3, 4]));
    let merged = Prepared::new(&w, Some(&l(&a, &b)), Apply::Merged, load).expect("merged");
    let y = merged.forward(&tape, &x, None).expect("it fits");
    let fused = low_rank_linear(&tape, &x, &w, None, Some(&l(&a, &b))).expect("it fits");
    assert!(y.requires_grad() && fused.requires_grad());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    #[test]
    fn any_sizes([outer, inner, rank, parts] in [1usize..90, 1..150, 1..40, 1..4]) {
        check([outer * parts, inner, rank, parts]);
    }
}
