//! Heads that share keys, entries of different lengths, and which query sees which key.

#![allow(clippy::single_range_in_vec_init, reason = "lists of spans")]

use super::{
    EDGES, ROUNDING, TOLERANCE, backward::check_backward, check, check_any_at, dense, host, norm_weights, on,
    operands, run, to_bf16, with_rotary,
};
use hywu_core::Dtype;
use hywu_kernels::{
    Error, Tensor,
    ops::attention::{Attention, Causal, Layout, NormWeights, Ragged, Wanted, backward, forward},
    reference,
    testing::{Place, assert_close, for_each_place, random, relative_error, widen},
};
use proptest::prelude::*;
use std::ops::Range;

/// Lengths at the edges of tiles, and entries without tokens between them.
const LENGTHS: [usize; 13] = [1, 0, 15, 16, 17, 63, 64, 65, 127, 0, 128, 129, 300];

/// The same call with fewer heads of keys and values, dense.
pub(super) fn grouped(args: Attention, kv_heads: usize) -> Attention {
    let row = kv_heads * args.head_dim;
    let layout = Layout { batch: [args.keys * row, 0], token: row, ..args.k };
    let layout = if args.ragged.is_some() { Layout { batch: [0, 0], ..layout } } else { layout };
    Attention { kv_heads, k: layout, v: layout, ..args }
}

/// Dense entries of these numbers of queries and keys, one behind the other.
fn ragged(queries: &[usize], keys: &[usize], heads: usize, head_dim: usize) -> Attention {
    let offsets = |lengths: &[usize]| {
        let ends = lengths.iter().scan(0, |end, n| {
            *end += n;
            Some(*end)
        });
        std::iter::once(0).chain(ends).collect::<Vec<_>>()
    };
    let mut args = dense(1, queries.iter().sum(), keys.iter().sum(), heads, head_dim);
    args.batch[0] = queries.len();
    for layout in [&mut args.q, &mut args.k, &mut args.v, &mut args.out] {
        layout.batch[0] = 0;
    }
    Attention { ragged: Some(Ragged { queries: offsets(queries), keys: offsets(keys) }), ..args }
}

pub(super) fn causal(args: Attention, spans: &[Range<usize>]) -> Attention {
    Attention { causal: Some(Causal { spans: vec![spans.to_vec()] }), ..args }
}

/// Output and gradients of separate operands: of q, k and v, and of the norm's weights.
pub(super) struct Results {
    pub out: Tensor,
    pub grads: Vec<Tensor>,
}

pub(super) fn results(place: Place, args: &Attention, operands: &[Tensor; 3], norm: bool) -> Results {
    let args = on(args, place.device);
    let inputs = operands.each_ref().map(|x| place.tensor(x));
    let [q, k, v] = inputs.each_ref();
    let weights = norm.then(|| norm_weights(args.head_dim).map(|w| place.tensor(&w)));
    let norm = weights.as_ref().map(|[q, k]| NormWeights { q, k });
    let saved = forward(&args, q, k, v, norm).unwrap();
    let grad = place.tensor(&random(0x77, &args.out_shape));
    let wanted = Wanted { slots: [Some(0), Some(1), Some(2)], norm: norm.is_some() };
    let result = backward(&args, [q, k, v], norm, &saved, &grad, wanted).unwrap();
    let norm = result.norm.into_iter().flat_map(|(q, k)| [q, k]);
    Results { out: host(&saved.out), grads: result.slots.into_iter().chain(norm).map(|g| host(&g)).collect() }
}

/// All elements of the output and of the gradients against the oracle, which rounds where the kernels do.
#[track_caller]
pub(super) fn check_all_at(place: Place, args: &Attention, operands: &[Tensor; 3], norm: bool) {
    let weights = norm.then(|| norm_weights(args.head_dim).map(|w| place.rounded(&w)));
    let weights = weights.as_ref().map(|[q, k]| (q.as_slice(), k.as_slice()));
    let values = operands.each_ref().map(|x| place.rounded(x));
    let values = values.each_ref().map(|x| x.as_slice());
    let Results { out, grads } = results(place, args, operands, norm);
    let grad = place.rounded(&random(0x77, &args.out_shape));
    let exact = place.dtype == Dtype::F32;
    let round = |x| if exact { x } else { to_bf16(x) };
    let gradients = |(out, narrowed): (Option<&[f64]>, bool)| {
        reference::attention::gradients(args, values, weights, (out, &grad), narrowed, round)
    };
    // Kernels may compute from the saved output, or from all weights of a row; and gradients of scores from rounded weights.
    let saved = widen(&out);
    let expected =
        [(Some(&*saved), false), (None, false), (Some(&*saved), true), (None, true)].map(gradients);
    assert_close(out.data(), &expected[0].out, if exact { TOLERANCE } else { ROUNDING });
    let all: Vec<Vec<&Vec<f64>>> =
        expected.iter().map(|e| e.operands.iter().chain(&e.norm).collect()).collect();
    // A gradient whose terms cancel is as exact as its terms: a tenth of all is what it counts for at least.
    let size = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let largest = all[0][..3].iter().map(|x| size(x)).fold(0.0, f64::max);
    for (i, grad) in grads.iter().enumerate() {
        let error = |expected: &Vec<f64>| match size(expected) {
            0.0 => size(&widen(grad)),
            own => relative_error(grad.data(), expected) * own,
        };
        let errors: Vec<f64> = all.iter().map(|all| error(all[i])).collect();
        let own = size(all[0][i]);
        let most = if exact { 2.0 * TOLERANCE } else { ROUNDING } * own.max(0.1 * largest);
        assert!(
            errors.iter().any(|e| *e <= most),
            "at {place:?}: gradient {i}: errors {errors:?} > {most:e}, the whole is {own:e}"
        );
    }
}

#[track_caller]
pub(super) fn check_all(args: &Attention, seed: u64, norm: bool) {
    let operands = operands(args, seed);
    for_each_place(|place| check_all_at(place, args, &operands, norm));
}

#[test]
fn heads_that_share_keys() {
    for (i, (queries, keys)) in [(1, 1), (17, 65), (65, 16), (129, 130)].into_iter().enumerate() {
        for kv_heads in [1, 2, 4] {
            let args = grouped(dense(2, queries, keys, 4, [32, 64, 20, 128][i]), kv_heads);
            check_all(&args, 40, false);
            check_all(&with_rotary(args), 41, true);
        }
    }
    let args = with_rotary(grouped(dense(1, 5, 9, 6, 8), 2));
    check_backward(&args, operands(&args, 42).to_vec(), [0, 1, 2], true, 20);
}

#[test]
fn a_shared_head_is_as_if_every_query_head_had_its_own() {
    let (tokens, d) = (70, 32);
    let args = causal(grouped(dense(2, tokens, tokens, 4, d), 2), &[10..40]);
    let [q, k, v] = operands(&args, 43);
    let repeated = |x: &Tensor| {
        let rows = x.data().chunks_exact(d).flat_map(|row| [row, row]).flatten().copied().collect();
        Tensor::new(&[2, tokens, 4 * d], rows).unwrap()
    };
    let own = Attention { causal: args.causal.clone(), ..dense(2, tokens, tokens, 4, d) };
    let of_own = [q.clone(), repeated(&k), repeated(&v)];
    for_each_place(|place| {
        let shared = run(place, &args, &[q.clone(), k.clone(), v.clone()]);
        assert_eq!(shared.data(), run(place, &own, &of_own).data());
    });
}

#[test]
fn causal_at_the_tile_edges() {
    for (i, queries) in EDGES.into_iter().enumerate() {
        for keys in [queries, queries + 1, queries + 63 + i] {
            check_all(&causal(dense(1, queries, keys, 2, [32, 64, 128][i % 3]), &[]), 44, false);
        }
    }
    check_all(&with_rotary(causal(dense(2, 300, 300, 1, 48), &[])), 45, true);
    check_all(&causal(dense(1, 1, 600, 2, 64), &[]), 46, false);
    let args = with_rotary(causal(dense(2, 13, 17, 2, 8), &[]));
    check_backward(&args, operands(&args, 47).to_vec(), [0, 1, 2], true, 20);
}

#[test]
fn spans_see_themselves_whole() {
    let lists: [&[Range<usize>]; 7] = [
        &[0..1],
        &[0..300],
        &[3..5, 5..6, 6..70, 70..200],
        &[60..68, 120..140, 250..300],
        &[63..64, 64..65, 127..129],
        &[1..299],
        &[0..64, 64..128, 128..192],
    ];
    for (i, spans) in lists.into_iter().enumerate() {
        check_all(&causal(dense(1, 300, 300, 2, [32, 64, 128][i % 3]), spans), 48, false);
        // Queries that start in the middle.
        check_all(&causal(grouped(dense(2, 71, 300, 2, 16), 1), spans), 49, true);
    }
    let spans = vec![vec![2..9], vec![], vec![0..4, 4..13]];
    let args = Attention { causal: Some(Causal { spans }), ..with_rotary(dense(3, 13, 13, 2, 8)) };
    check_backward(&args, operands(&args, 50).to_vec(), [0, 1, 2], true, 20);
}

#[test]
fn a_span_over_everything_is_no_mask() {
    let plain = dense(2, 129, 129, 2, 64);
    let masked = causal(plain.clone(), &[0..129]);
    let operands = operands(&plain, 51);
    for_each_place(|place| {
        let (one, two) = (results(place, &plain, &operands, true), results(place, &masked, &operands, true));
        assert_eq!(one.out.data(), two.out.data());
        assert!(one.grads.iter().zip(&two.grads).all(|(a, b)| a.data() == b.data()));
    });
}

#[test]
fn key_lengths_and_a_mask() {
    let mut args = causal(grouped(dense(5, 90, 130, 2, 32), 1), &[20..80, 100..130]);
    args.key_lengths = Some(vec![130, 0, 1, 64, 101]);
    check_all(&args, 52, false);
    check_all(&with_rotary(args.clone()), 53, true);
    let operands = operands(&args, 54);
    for_each_place(|place| {
        let Results { out, grads } = results(place, &args, &operands, false);
        let entry = |x: &Tensor, i: usize| x.data()[x.numel() / 5 * i..x.numel() / 5 * (i + 1)].to_vec();
        for x in [&out, &grads[0], &grads[1], &grads[2]] {
            assert!(entry(x, 1).iter().all(|&x| x == 0.0));
        }
        assert!(entry(&grads[1], 3)[64 * 32..].iter().all(|&x| x == 0.0));
    });
}

#[test]
fn entries_of_different_lengths() {
    let mut keys = LENGTHS;
    keys.rotate_left(3);
    let more: Vec<usize> = LENGTHS.iter().zip(keys).map(|(&q, k)| q.max(k)).collect();
    check_all(&ragged(&LENGTHS, &LENGTHS, 2, 64), 55, false);
    check_all(&with_rotary(grouped(ragged(&LENGTHS, &keys, 4, 32), 2)), 56, true);
    check_all(&causal(ragged(&LENGTHS, &more, 1, 128), &[]), 57, false);
    let spans = |n: &usize| vec![n / 3..n / 2, n / 2..n - n / 8];
    let spans: Vec<_> =
        more.iter().map(|n| spans(n).into_iter().filter(|s| !s.is_empty()).collect()).collect();
    let args = grouped(ragged(&LENGTHS, &more, 2, 48), 1);
    check_all(&with_rotary(Attention { causal: Some(Causal { spans }), ..args }), 58, true);
    let args = with_rotary(ragged(&[3, 0, 9, 1], &[5, 4, 9, 0], 2, 8));
    check_backward(&args, operands(&args, 59).to_vec(), [0, 1, 2], true, 30);
}

#[test]
fn entries_of_different_lengths_in_strided_tensors() {
    // A fused projection of queries, a key and a value: [tokens, 2 heads of queries | key | value], for each of two second batches.
    let (lengths, d) = ([5, 40, 0, 17], 24);
    let total: usize = lengths.iter().sum();
    let mut args = grouped(ragged(&lengths, &lengths, 2, d), 1);
    args.batch[1] = 2;
    let layout = |offset| Layout { offset, batch: [0, total * 4 * d], token: 4 * d, head: d };
    (args.q, args.k, args.v) = (layout(0), layout(2 * d), layout(3 * d));
    args.out.batch[1] = total * 2 * d;
    args.out_shape = vec![2, total, 2 * d];
    let args = causal(with_rotary(args), &[]);
    let qkv = random(60, &[2, total, 4 * d]);
    check(&args, [&qkv, &qkv, &qkv], Some(&norm_weights(d)));
    check_backward(&args, vec![qkv], [0, 0, 0], true, 60);
    // Values that both heads read.
    let mut args = ragged(&[5, 7], &[4, 9], 2, 8);
    args.v = Layout { token: 8, head: 0, ..args.v };
    check_backward(
        &args,
        vec![random(61, &[12, 16]), random(62, &[13, 16]), random(63, &[13, 8])],
        [0, 1, 2],
        true,
        40,
    );
}

/// The entry's part of a tensor of rows.
fn part(x: &Tensor, offsets: &[usize], entry: usize) -> Tensor {
    let width = x.numel() / offsets[offsets.len() - 1];
    let data = x.data()[offsets[entry] * width..offsets[entry + 1] * width].to_vec();
    Tensor::new(&[data.len() / width, width], data).unwrap()
}

#[test]
fn an_entry_does_not_depend_on_the_others() {
    let keys: Vec<usize> = LENGTHS.iter().map(|n| n + n / 4).collect();
    let spans = |n: usize| if n > 30 { vec![10..n / 2] } else { vec![] };
    let all = grouped(ragged(&LENGTHS, &keys, 4, 32), 2);
    let spans_of_all = keys.iter().map(|&n| spans(n)).collect();
    let all = Attention { causal: Some(Causal { spans: spans_of_all }), ..with_rotary(all) };
    let inputs = operands(&all, 64);
    let grad = random(0x77, &all.out_shape);
    let Some(Ragged { queries, keys: offsets }) = &all.ragged else { unreachable!("ragged") };
    for_each_place(|place| {
        let together = gradients(place, &all, &inputs, &grad);
        for (i, &n) in LENGTHS.iter().enumerate() {
            let alone = Attention { rotary: all.rotary.clone(), ..grouped(dense(1, n, keys[i], 4, 32), 2) };
            let alone = causal(alone, &spans(keys[i]));
            let [q, k, v] = inputs.each_ref();
            let own = [part(q, queries, i), part(k, offsets, i), part(v, offsets, i)];
            let results = gradients(place, &alone, &own, &part(&grad, queries, i));
            for (which, (alone, all)) in results.iter().zip(&together).enumerate() {
                let offsets = if which < 2 { queries } else { offsets };
                assert_eq!(alone.data(), part(all, offsets, i).data(), "entry {i}, result {which}");
            }
        }
    });
}

/// The output and the gradients of queries, keys and values.
fn gradients(place: Place, args: &Attention, operands: &[Tensor; 3], grad: &Tensor) -> [Tensor; 4] {
    let args = on(args, place.device);
    let [q, k, v] = operands.each_ref().map(|x| place.tensor(x));
    let saved = forward(&args, &q, &k, &v, None).unwrap();
    let wanted = Wanted { slots: [Some(0), Some(1), Some(2)], norm: false };
    let slots = backward(&args, [&q, &k, &v], None, &saved, &place.tensor(grad), wanted).unwrap().slots;
    [&saved.out, &slots[0], &slots[1], &slots[2]].map(host)
}

#[test]
fn two_runs_give_the_same_bits_whatever_the_number_of_threads() {
    let args = with_rotary(causal(grouped(ragged(&LENGTHS, &LENGTHS, 6, 32), 2), &[]));
    let (inputs, grad) = (operands(&args, 65), random(0x77, &args.out_shape));
    let data = |place| gradients(place, &args, &inputs, &grad).map(|x| x.data().to_vec());
    for_each_place(|place| assert_eq!(data(place), data(place)));
    for threads in [1, 7] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(pool.install(|| data(Place::CPU)), data(Place::CPU));
    }
}

#[test]
fn gradients_of_many_tiles_and_blocks_of_keys() {
    for d in [64, 128] {
        let args = grouped(dense(1, 321, 257, 2, d), 1);
        check_all(&args, 67, false);
        check_all(&causal(grouped(dense(1, 260, 321, 2, d), 1), &[40..200]), 68, false);
    }
}

#[test]
fn gradients_of_weights_that_are_one_or_equal() {
    for d in [64, 128] {
        let args = dense(1, 130, 129, 1, d);
        let [mut q, mut k, v] = operands(&args, 69);
        let equal = Tensor::new(k.shape(), k.data()[..d].repeat(129)).unwrap();
        for_each_place(|place| check_all_at(place, &args, &[q.clone(), equal.clone(), v.clone()], false));
        // Scores of some tens.
        for x in [&mut q, &mut k] {
            x.data_mut().iter_mut().for_each(|x| *x *= 4.0);
        }
        for_each_place(|place| check_all_at(place, &args, &[q.clone(), k.clone(), v.clone()], false));
    }
}

#[test]
fn what_is_not_a_number_reaches_the_gradients() {
    let (tokens, d) = (200, 64);
    let args = dense(1, tokens, tokens, 1, d);
    let (inputs, grad) = (operands(&args, 70), random(0x77, &args.out_shape));
    for_each_place(|place| {
        let mut bad = grad.clone();
        bad.data_mut()[150 * d] = f32::NAN;
        let [_, q, k, v] = gradients(place, &args, &inputs, &bad);
        for (query, row) in q.data().chunks_exact(d).enumerate() {
            assert!(row.iter().all(|x| x.is_nan() == (query == 150)));
        }
        assert!(k.data().iter().all(|x| x.is_nan()));
        assert!(
            v.data().chunks_exact(d).all(|row| row[0].is_nan() && row[1..].iter().all(|x| x.is_finite()))
        );
    });
}

#[test]
fn what_a_query_does_not_see_does_not_reach_it() {
    let (tokens, d) = (300, 32);
    let args = causal(dense(1, tokens, tokens, 2, d), &[100..150]);
    let [q, k, v] = operands(&args, 66);
    let sees = |query: usize, key| key <= query || ((100..150).contains(&query) && (100..150).contains(&key));
    for_each_place(|place| {
        for key in [0, 17, 120, 149, 150, 299] {
            let mut bad = k.clone();
            bad.data_mut()[key * 2 * d + 3] = f32::NAN;
            let out = run(place, &args, &[q.clone(), bad, v.clone()]);
            for (query, row) in out.data().chunks_exact(2 * d).enumerate() {
                assert!(row[..d].iter().all(|x| x.is_nan() == sees(query, key)), "{query} {key}");
                assert!(row[d..].iter().all(|x| x.is_finite()));
            }
            // A value reaches all rows that see it, and none that are far from doing so.
            let mut bad = v.clone();
            bad.data_mut()[key * 2 * d + 3] = f32::NAN;
            let out = run(place, &args, &[q.clone(), k.clone(), bad]);
            for (query, row) in out.data().chunks_exact(2 * d).enumerate() {
                assert!(!sees(query, key) || row[3].is_nan());
                assert!(query + 200 > key || row.iter().all(|x| x.is_finite()) || sees(query, key));
                assert!(row[4..].iter().all(|x| x.is_finite()));
            }
        }
    });
    // Whatever is behind the keys of an entry.
    let mut args = Attention { key_lengths: Some(vec![77]), ..args };
    let (mut k, mut v) = (k, v);
    for x in [&mut k, &mut v] {
        x.data_mut()[77 * 2 * d..].fill(f32::NAN);
    }
    for spans in [args.causal.clone(), None] {
        args.causal = spans;
        for_each_place(|place| {
            let Results { out, grads } = results(place, &args, &[q.clone(), k.clone(), v.clone()], true);
            assert!(out.data().iter().chain(grads.iter().flat_map(|g| g.data())).all(|x| x.is_finite()));
        });
    }
}

#[test]
fn large_and_hot_logits_behind_a_mask() {
    // The keys that are masked for most rows score far above the others.
    let (tokens, d) = (200, 64);
    let args = causal(dense(1, tokens, tokens, 1, d), &[]);
    let [mut q, mut k, v] = operands(&args, 67);
    let size = (80.0f32 * 8.0 / 64.0).sqrt();
    q.data_mut().fill(size);
    for (t, row) in k.data_mut().chunks_exact_mut(d).enumerate() {
        row.fill(if t % 50 == 49 { size } else { -size });
    }
    check_all_at(Place::CPU, &args, &[q.clone(), k.clone(), v.clone()], false);
    check(&args, [&q, &k, &v], None);
    // All equal: a row is the mean of the values so far.
    k.data_mut().fill(1.0);
    check(&args, [&q, &k, &v], None);
}

#[test]
fn refusals_say_why() {
    let good = dense(2, 4, 4, 4, 8);
    let inputs = operands(&good, 68);
    for_each_place(|place| {
        let [q, k, v] = inputs.each_ref().map(|x| place.tensor(x));
        let refused = |args: Attention, why: &str| {
            let error = forward(&args, &q, &k, &v, None).expect_err("refused");
            assert!(matches!(error, Error::Shape { .. } | Error::Invalid { .. }));
            assert!(error.to_string().contains(why), "{error}");
        };
        refused(Attention { kv_heads: 3, ..good.clone() }, "4 heads are no multiple of 3 key heads");
        refused(Attention { kv_heads: 0, ..good.clone() }, "key heads");
        refused(Attention { kv_heads: 8, ..good.clone() }, "key heads");
        refused(causal(good.clone(), &[3..5]), "spans");
        refused(causal(Attention { keys: 3, ..good.clone() }, &[]), "4 queries and 3 keys");
        let offsets = Some(Ragged { queries: vec![0, 3, 4], keys: vec![0, 1, 4] });
        refused(Attention { ragged: offsets.clone(), ..good.clone() }, "stride of the first batch axis");
        let flat = |l: Layout| Layout { batch: [0, 0], ..l };
        let args = Attention {
            ragged: offsets,
            q: flat(good.q),
            k: flat(good.k),
            v: flat(good.v),
            out: flat(good.out),
            out_shape: vec![4, 32],
            ..good.clone()
        };
        assert!(forward(&args, &q, &k, &v, None).is_ok());
        refused(causal(args.clone(), &[]), "3 queries and 1 keys");
        refused(Attention { out_shape: vec![8, 32], ..args }, "output");
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Any entries, heads, mask and order of the axes.
    #[test]
    fn any_entries_and_masks(
        lengths in prop::collection::vec((0usize..90, 0usize..90), 1..4),
        size1 in 1usize..3,
        heads in (1usize..4, 1usize..4),
        half in 1usize..21,
        is_ragged: bool,
        is_causal: bool,
        has_lengths: bool,
        cuts in prop::collection::vec((0usize..90, any::<bool>()), 0..6),
        heads_first: [bool; 4],
        norm: bool,
        rotary: bool,
    ) {
        let (kv_heads, d) = (heads.0, 2 * half);
        let heads = heads.0 * heads.1;
        // A causal query stands at a key.
        let keys = lengths.iter().map(|&(q, k)| if is_causal { q.max(k) } else { k });
        let keys: Vec<usize> = keys.collect();
        let queries: Vec<usize> = lengths.iter().map(|l| l.0).collect();
        let mut args = match is_ragged {
            true => ragged(&queries, &keys, heads, d),
            false => dense(lengths.len(), queries[0], keys[0], heads, d),
        };
        (args.kv_heads, args.batch[1]) = (kv_heads, size1);
        let entries = if is_ragged { 0 } else { 1 };
        let layout = |heads_first: bool, tokens: usize, heads: usize| {
            let size = tokens * heads * d;
            let batch = [entries * size1 * size, size];
            match heads_first {
                true => Layout { offset: 0, batch, token: d, head: tokens * d },
                false => Layout { offset: 0, batch, token: heads * d, head: d },
            }
        };
        args.q = layout(heads_first[0], args.queries, heads);
        args.k = layout(heads_first[1], args.keys, kv_heads);
        args.v = layout(heads_first[2], args.keys, kv_heads);
        args.out = layout(heads_first[3], args.queries, heads);
        let batch0 = if is_ragged { 1 } else { lengths.len() };
        args.out_shape = vec![batch0 * size1, args.queries, heads * d];
        if is_causal {
            // Every second piece between the cuts, or more of them, is a span.
            let spans = |n: usize| {
                let mut cuts: Vec<(usize, bool)> = cuts.iter().map(|&(at, span)| (at.min(n), span)).collect();
                cuts.sort_unstable();
                let pieces = cuts.windows(2).filter(|w| w[0].1 && w[0].0 < w[1].0);
                pieces.map(|w| w[0].0..w[1].0).collect()
            };
            let lengths = if is_ragged { &keys[..] } else { &keys[..1] };
            args.causal = Some(Causal { spans: lengths.iter().map(|&n| spans(n)).collect() });
        }
        if has_lengths && !is_ragged {
            let n = lengths.len() * size1;
            args.key_lengths = Some((0..n).map(|i| (args.keys * (i + 1) + i) / n).map(|l| l.min(args.keys)).collect());
        }
        let args = if rotary { with_rotary(args) } else { args };
        let inputs = operands(&args, 69);
        let weights = norm.then(|| norm_weights(d));
        for_each_place(|place| {
            check_all_at(place, &args, &inputs, norm);
            check_any_at(place, &args, &inputs, weights.as_ref());
        });
    }
}
