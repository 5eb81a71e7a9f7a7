//! The generator's parameter tokens: grid, splitting and cutting, against plain indexing, with gradients.

use hywu_core::{AdapterSpec, Module};
use hywu_kernels::{
    Tape, Var,
    ops::{
        elementwise::concat_tokens,
        parameter_tokens::{detokenise, repeat_batch, split_tokens, token_grid},
    },
    testing::{check_gradients, for_each_place, random, widen},
};
use proptest::prelude::*;

#[test]
fn the_grid_is_the_sum_of_both_positions() {
    let (s, a, c, n) = (3, 2, 5, 4);
    let oracle = |v: &[Vec<f64>]| {
        let at =
            |layer: usize, s_: usize, j: usize, i: usize| v[0][(s_ * a + j) * c + i] + v[1][layer * c + i];
        let places = (0..n).flat_map(|l| (0..s).flat_map(move |s_| (0..a).map(move |j| (l, s_, j))));
        places
            .flat_map(|(l, s_, j)| (0..c).map(move |i| (l, s_, j, i)))
            .map(|(l, s_, j, i)| at(l, s_, j, i))
            .collect()
    };
    let inputs = [random(1, &[s * a, c]), random(2, &[n, c])];
    check_gradients(&inputs, |t, v| token_grid(t, &v[0], &v[1], a), oracle, 100, 1e-5);
    let bad = |hw: &[usize], layer: &[usize], a: usize| {
        let (hw, layer) = (Var::constant(random(1, hw)), Var::constant(random(1, layer)));
        assert!(token_grid(&Tape::inference(), &hw, &layer, a).is_err(), "{hw:?}");
    };
    bad(&[7, 5], &[4, 5], 2);
    bad(&[6, 5], &[4, 6], 2);
    bad(&[6, 5], &[4, 5], 0);
}

/// Widths at the edges of packs, layers and places enough for several parts of the sums.
#[test]
fn grids_of_every_width() {
    for (c, places, layers) in [
        (1, 300, 3),
        (15, 4, 2),
        (16, 4, 70),
        (17, 6, 2),
        (63, 2, 5),
        (64, 130, 3),
        (65, 3, 3),
        (129, 2, 300),
    ] {
        let oracle = |v: &[Vec<f64>]| {
            let layer = |l: &[f64]| v[0].iter().enumerate().map(|(i, h)| h + l[i % c]).collect::<Vec<_>>();
            v[1].chunks(c).flat_map(layer).collect()
        };
        let inputs = [random(1, &[places, c]), random(2, &[layers, c])];
        check_gradients(&inputs, |t, v| token_grid(t, &v[0], &v[1], 1), oracle, 6, 1e-5);
    }
}

#[test]
fn a_batch_repeats_and_tokens_split() {
    let x = random(3, &[1, 2, 3]);
    check_gradients(&[x], |t, v| repeat_batch(t, &v[0], 3), |v| v[0].repeat(3), 10, 1e-5);
    let rows = random(4, &[2, 2, 5, 2, 3]);
    // [b, N, T, r, c]: the first two of five tokens, then the rest.
    let part = |from: usize, to: usize| {
        move |v: &[Vec<f64>]| -> Vec<f64> {
            v[0].chunks(30).flat_map(|layer| layer[6 * from..6 * to].to_vec()).collect()
        }
    };
    let rows = std::slice::from_ref(&rows);
    check_gradients(rows, |t, v| split_tokens(t, &v[0], 2).map(|s| s.0), part(0, 2), 120, 1e-5);
    check_gradients(rows, |t, v| split_tokens(t, &v[0], 2).map(|s| s.1), part(2, 5), 120, 1e-5);
    let five = Var::constant(rows[0].clone());
    assert!(split_tokens(&Tape::inference(), &five, 5).is_err());
    assert!(repeat_batch(&Tape::inference(), &five, 2).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Any map: the parameters of a layer are the row-major content of their tokens, one after the other, the rest of each last
    /// token dropped.
    #[test]
    fn tokens_become_parameters_in_order(
        batch in 1usize..3, layers in 1usize..4, rank in 1usize..5, width in 1usize..9,
        modules in prop::collection::vec((1usize..20, 1usize..20, prop::option::of(1usize..4)), 1..4),
    ) {
        let modules: Vec<Module> = modules.into_iter().enumerate()
            .map(|(i, (in_dim, out_dim, experts))| Module { path: format!("m{i}"), in_dim, out_dim, experts })
            .collect();
        let spec = AdapterSpec { prefix: "l.".into(), layers, rank, alpha: 1.0, modules };
        let area = rank * width;
        let size = |m: &Module, n: usize| n * rank * m.experts.unwrap_or(1);
        let count = |dim: fn(&Module) -> usize| -> usize {
            spec.modules.iter().map(|m| size(m, dim(m)).div_ceil(area)).sum()
        };
        let (ca, cb) = (count(|m| m.in_dim), count(|m| m.out_dim));
        let a = random(1, &[batch, layers, ca, rank, width]);
        let b = random(2, &[batch, layers, cb, rank, width]);
        for_each_place(|place| {
        let (va, vb) = (place.constant(&a), place.constant(&b));
        let [a, b] = [&va, &vb].map(|v| widen(v.value()));
        let vars = detokenise(&Tape::inference(), &spec, &va, &vb).expect("good sizes");
        assert_eq!(vars.modules.len(), layers * spec.modules.len());
        for layer in 0..layers {
            let (mut at_a, mut at_b) = (0, 0);
            for (i, m) in spec.modules.iter().enumerate() {
                let pair = vars.get(&spec.module_name(layer, i)).expect("every module");
                for (got, all, count, at, n) in
                    [(&pair.a, &a, ca, &mut at_a, size(m, m.in_dim)), (&pair.b, &b, cb, &mut at_b, size(m, m.out_dim))]
                {
                    let got = widen(got.value());
                    for entry in 0..batch {
                        let start = (entry * layers + layer) * count * area + *at;
                        assert_eq!(got[entry * n..(entry + 1) * n], all[start..start + n]);
                    }
                    *at += n.div_ceil(area) * area;
                }
            }
        }
        });
    }
}

#[test]
fn gradients_of_cut_tokens() {
    let module = |path: &str, in_dim, out_dim| Module { path: path.into(), in_dim, out_dim, experts: None };
    let modules = vec![module("x", 7, 5), module("y", 3, 9)];
    let spec = AdapterSpec { prefix: "l.".into(), layers: 2, rank: 2, alpha: 1.0, modules };
    // 4 channels: lora_a takes ceil(14 / 8) + 1 tokens, lora_b 2 + 3.
    let inputs = [random(1, &[2, 2, 3, 2, 4]), random(2, &[2, 2, 5, 2, 4])];
    let last = |t: &Tape, v: &[Var]| {
        let vars = detokenise(t, &spec, &v[0], &v[1])?;
        Ok(vars.get("l.1.y").expect("there").b.clone())
    };
    // Layer 1, after the two tokens of x: 18 numbers.
    let oracle = |v: &[Vec<f64>]| v[1].chunks(80).flat_map(|entry| entry[56..74].to_vec()).collect();
    check_gradients(&inputs, last, oracle, 400, 1e-5);
}

/// Every parameter at once, so that each adds its own part to the gradient of the tokens.
#[test]
fn gradients_of_all_modules_and_experts() {
    let module =
        |path: &str, in_dim, out_dim, experts| Module { path: path.into(), in_dim, out_dim, experts };
    let modules = vec![module("x", 7, 5, None), module("e", 3, 4, Some(3)), module("y", 3, 9, None)];
    let spec = AdapterSpec { prefix: "l.".into(), layers: 2, rank: 2, alpha: 1.0, modules };
    // 4 channels: a token holds 8 numbers. lora_a takes 2 + 3 + 1 tokens, lora_b 2 + 3 + 3.
    let inputs = [random(1, &[2, 2, 6, 2, 4]), random(2, &[2, 2, 8, 2, 4])];
    let all = |t: &Tape, v: &[Var]| {
        let vars = detokenise(t, &spec, &v[0], &v[1])?;
        let experts = vars.get("l.1.e").expect("there");
        assert_eq!((experts.a.shape(), experts.b.shape()), (&[2, 3, 2, 3][..], &[2, 3, 4, 2][..]));
        let flat = |x: &Var| x.reshape(&[2, x.value().numel() / 2, 1]);
        let parts = vars.modules.values().flat_map(|pair| [flat(&pair.a), flat(&pair.b)]);
        let parts = parts.collect::<hywu_kernels::Result<Vec<Var>>>()?;
        concat_tokens(t, &parts.iter().collect::<Vec<_>>())
    };
    // Where lora_a and lora_b of x, e and y lie in a layer's 48 and 64 numbers.
    let places = [(0..14, 0..10), (16..34, 16..40), (40..46, 40..58)];
    let oracle = |v: &[Vec<f64>]| {
        let layer = |a: &[f64], b: &[f64]| -> Vec<f64> {
            places.iter().flat_map(|(at_a, at_b)| [&a[at_a.clone()], &b[at_b.clone()]].concat()).collect()
        };
        v[0].chunks(48).zip(v[1].chunks(64)).flat_map(|(a, b)| layer(a, b)).collect()
    };
    check_gradients(&inputs, all, oracle, 400, 1e-5);
}
