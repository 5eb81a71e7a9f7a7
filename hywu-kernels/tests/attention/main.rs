//! Attention against its f64 oracle.

mod backward;
mod few_keys;
mod masks;

use half::bf16;
use hywu_core::Dtype;
use hywu_kernels::{
    Device, Error, Tensor,
    ops::attention::{
        Attention, Layout, NormWeights, QkNorm, Rotary, Wanted, attention, backward, forward, rotary_table,
    },
    reference,
    testing::{Place, assert_close, check_output, for_each_place, random, widen},
};
use proptest::prelude::*;

const TOLERANCE: f64 = 1e-5;
const EDGES: [usize; 10] = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129];

/// [batch, tokens, heads, head_dim] for every operand.
fn dense(batch: usize, queries: usize, keys: usize, heads: usize, head_dim: usize) -> Attention {
    let row = heads * head_dim;
    let layout = |tokens| Layout { offset: 0, batch: [tokens * row, 0], token: row, head: head_dim };
    Attention {
        batch: [batch, 1],
        queries,
        keys,
        heads,
        kv_heads: heads,
        head_dim,
        q: layout(queries),
        k: layout(keys),
        v: layout(keys),
        out: layout(queries),
        out_shape: vec![batch, queries, row],
        key_lengths: None,
        ragged: None,
        causal: None,
        rotary: None,
    }
}

/// A fused projection: q, k and v side by side in [batch, tokens, 3 * heads * head_dim].
fn fused(batch: usize, tokens: usize, heads: usize, head_dim: usize) -> Attention {
    let mut args = dense(batch, tokens, tokens, heads, head_dim);
    let row = heads * head_dim;
    let layout = |offset| Layout { offset, batch: [3 * tokens * row, 0], token: 3 * row, head: head_dim };
    (args.q, args.k, args.v) = (layout(0), layout(row), layout(2 * row));
    args
}

/// The layer axis of [batch, layers, positions, heads * head_dim]: every position attends over layers.
fn layer_axis(batch: usize, layers: usize, positions: usize, heads: usize, head_dim: usize) -> Attention {
    let row = heads * head_dim;
    let mut args = dense(batch, layers, layers, heads, head_dim);
    args.batch = [batch, positions];
    let layout =
        Layout { offset: 0, batch: [layers * positions * row, row], token: positions * row, head: head_dim };
    (args.q, args.k, args.v, args.out) = (layout, layout, layout, layout);
    args.out_shape = vec![batch, layers, positions, row];
    args
}

fn with_rotary(mut args: Attention) -> Attention {
    let table = |tokens: usize, from: usize| {
        let positions: Vec<_> = (0..tokens).map(|t| vec![(from + 3 * t) as u32]).collect();
        rotary_table(&positions, &[args.head_dim]).unwrap()
    };
    args.rotary = Some((table(args.queries, 0), table(args.keys, 5)));
    args
}

/// Random operands of a dense call.
fn operands(args: &Attention, seed: u64) -> [Tensor; 3] {
    let entries = if args.ragged.is_some() { 1 } else { args.batch[0] } * args.batch[1];
    let shape = |tokens, heads| [entries, tokens, heads * args.head_dim];
    [
        random(seed, &shape(args.queries, args.heads)),
        random(seed + 1, &shape(args.keys, args.kv_heads)),
        random(seed + 2, &shape(args.keys, args.kv_heads)),
    ]
}

/// Weights around 1.
fn norm_weights(d: usize) -> [Tensor; 2] {
    [1, 2].map(|seed| {
        let mut weight = random(seed, &[d]);
        weight.data_mut().iter_mut().for_each(|w| *w = 1.0 + 0.3 * *w);
        weight
    })
}

/// The same call with its tables on a device.
fn on(args: &Attention, device: Device) -> Attention {
    let table = |r: &Rotary| r.to(device).unwrap();
    Attention { rotary: args.rotary.as_ref().map(|(q, k)| (table(q), table(k))), ..args.clone() }
}

fn host(x: &Tensor) -> Tensor {
    x.to_host().unwrap()
}

/// The output at `place`, on the host.
fn run(place: Place, args: &Attention, operands: &[Tensor; 3]) -> Tensor {
    let [q, k, v] = operands.each_ref().map(|x| place.tensor(x));
    host(&forward(&on(args, place.device), &q, &k, &v, None).unwrap().out)
}

/// The output at `place` against the oracle.
#[track_caller]
fn check_at(place: Place, args: &Attention, [q, k, v]: [&Tensor; 3], norm: Option<&[Tensor; 2]>) {
    let mut inputs = vec![q.clone(), k.clone(), v.clone()];
    inputs.extend(norm.into_iter().flatten().cloned());
    let there = on(args, place.device);
    check_output(
        place,
        &inputs,
        |tape, x| {
            let norm = x.get(3).zip(x.get(4)).map(|(q, k)| QkNorm { q: q.clone(), k: k.clone() });
            let out = attention(tape, &there, &x[0], &x[1], &x[2], norm.as_ref())?;
            assert_eq!(out.shape(), there.out_shape);
            Ok(out)
        },
        |x| {
            let norm = x.get(3).zip(x.get(4)).map(|(q, k)| (q.as_slice(), k.as_slice()));
            reference::attention::attention(args, &x[0], &x[1], &x[2], norm)
        },
        TOLERANCE,
    );
}

#[track_caller]
fn check(args: &Attention, operands: [&Tensor; 3], norm: Option<&[Tensor; 2]>) {
    for_each_place(|place| check_at(place, args, operands, norm));
}

/// What rounding a result to bf16 can make: half a unit of every element.
const ROUNDING: f64 = 1.0 / 256.0;

/// As [`check_at`], for random shapes: in bf16 against an oracle that rounds where the kernels do, as a single draw of a naive
/// implementation's errors is no bound for few elements.
#[track_caller]
fn check_any_at(place: Place, args: &Attention, operands: &[Tensor; 3], norm: Option<&[Tensor; 2]>) {
    let [q, k, v] = operands;
    if place.dtype == Dtype::F32 {
        return check_at(place, args, [q, k, v], norm);
    }
    let weights = norm.map(|n| n.each_ref().map(|w| place.tensor(w)));
    let weights = weights.as_ref().map(|[q, k]| NormWeights { q, k });
    let inputs = operands.each_ref().map(|x| place.tensor(x));
    let out = forward(&on(args, place.device), &inputs[0], &inputs[1], &inputs[2], weights).unwrap().out;
    let [q, k, v] = inputs.each_ref().map(widen);
    let weights = weights.map(|n| (widen(n.q), widen(n.k)));
    let weights = weights.as_ref().map(|(q, k)| (q.as_slice(), k.as_slice()));
    let zeros = vec![0.0; out.numel()];
    let expected =
        reference::attention::gradients(args, [&q, &k, &v], weights, (Some(&zeros), &zeros), false, to_bf16)
            .out;
    assert_close(host(&out).data(), &expected, ROUNDING);
}

fn to_bf16(x: f64) -> f64 {
    bf16::from_f64(x).into()
}

#[track_caller]
fn check_dense(args: &Attention, seed: u64, norm: bool) {
    let [q, k, v] = operands(args, seed);
    let weights = norm_weights(args.head_dim);
    check(args, [&q, &k, &v], norm.then_some(&weights));
}

#[test]
fn every_length_around_the_tile_edges() {
    for_each_place(|place| {
        for (i, queries) in EDGES.into_iter().enumerate() {
            for (j, keys) in EDGES.into_iter().enumerate() {
                // On a device two of every ten pairs, so that each length is there twice.
                if place == Place::CPU || (i + 10 - j) % 10 % 7 == 0 {
                    let args = dense(1, queries, keys, 2, [32, 64, 128][(i + j) % 3]);
                    let [q, k, v] = operands(&args, 1);
                    check_at(place, &args, [&q, &k, &v], None);
                }
            }
        }
    });
}

#[test]
fn more_than_one_block_of_keys() {
    for keys in [255, 256, 257, 511, 512, 513] {
        check_dense(&dense(1, 25, keys, 1, 64), 2, false);
    }
    check_dense(&dense(1, 3, 4096 + 257, 1, 64), 3, false);
    check_dense(&with_rotary(dense(1, 2, 4096 + 257, 2, 32)), 4, true);
}

#[test]
fn every_kind_of_head_dim() {
    for d in [2, 4, 6, 8, 10, 14, 16, 18, 30, 34, 48, 66, 80, 96, 130, 254, 256] {
        check_dense(&with_rotary(dense(1, 7, 19, 2, d)), 5, true);
        check_dense(&dense(2, 19, 7, 1, d), 6, false);
    }
}

#[test]
fn norm_and_rotation_of_a_fused_projection() {
    for tokens in [1, 17, 84] {
        let args = with_rotary(fused(2, tokens, 3, 64));
        let qkv = random(7, &[2, tokens, 3 * 3 * 64]);
        check(&args, [&qkv, &qkv, &qkv], Some(&norm_weights(64)));
        check(&args, [&qkv, &qkv, &qkv], None);
    }
}

#[test]
fn layer_axis_without_a_copy() {
    let args = with_rotary(layer_axis(2, 6, 9, 2, 32));
    let shape = [2, 6, 9, 64];
    check(&args, [&random(1, &shape), &random(2, &shape), &random(3, &shape)], None);
}

#[test]
fn key_lengths_mask_and_a_row_without_keys_is_zero() {
    let mut args = dense(4, 10, 40, 2, 32);
    args.key_lengths = Some(vec![40, 0, 1, 17]);
    let [q, k, v] = operands(&args, 8);
    check(&args, [&q, &k, &v], None);
    for_each_place(|place| {
        // What is masked can be anything.
        let before = run(place, &args, &[q.clone(), k.clone(), v.clone()]);
        let mut anything = v.clone();
        anything.data_mut()[40 * 64..80 * 64].fill(f32::NAN);
        let after = run(place, &args, &[q.clone(), k.clone(), anything]);
        assert_eq!(before.data(), after.data());
        assert!(after.data()[10 * 64..20 * 64].iter().all(|&x| x == 0.0));
        // The masked tail is as if it were not there.
        let row = |from: usize, len: usize, x: &Tensor| {
            Tensor::new(&[1, len / 64, 64], x.data()[from..from + len].to_vec()).unwrap()
        };
        let alone = run(
            place,
            &dense(1, 10, 17, 2, 32),
            &[row(3 * 10 * 64, 640, &q), row(3 * 40 * 64, 17 * 64, &k), row(3 * 40 * 64, 17 * 64, &v)],
        );
        assert_eq!(alone.data(), &before.data()[30 * 64..]);
    });
}

#[test]
fn large_equal_and_hot_logits() {
    let args = dense(1, 20, 300, 1, 64);
    // Logits of +-80: the rows of q and k are +-1 times one direction.
    let [mut q, mut k, v] = operands(&args, 9);
    let size = (80.0f32 * 8.0 / 64.0).sqrt();
    for (t, x) in [(0, &mut q), (1, &mut k)] {
        for (i, row) in x.data_mut().chunks_exact_mut(64).enumerate() {
            row.fill(if (i + t) % 3 == 0 { -size } else { size });
        }
    }
    check(&args, [&q, &k, &v], None);
    // All logits equal: the mean of v.
    k.data_mut().fill(size);
    check(&args, [&q, &k, &v], None);
    // One hot key in the second block, far above all others.
    k.data_mut().fill(-size);
    k.data_mut()[299 * 64..].fill(size);
    q.data_mut().fill(size);
    let operands = [q, k, v];
    for_each_place(|place| {
        let (out, v) = (run(place, &args, &operands), host(&place.tensor(&operands[2])));
        for row in out.data().chunks_exact(64) {
            assert_eq!(row, &v.data()[299 * 64..]);
        }
    });
}

#[test]
fn infinite_scores() {
    let args = dense(1, 1, 300, 1, 2);
    let [mut q, mut k, v] = operands(&args, 9);
    q.data_mut().copy_from_slice(&[1.0, 0.0]);
    k.data_mut().fill(0.0);
    // Minus infinity for the whole first block of keys is weight zero.
    k.data_mut().iter_mut().step_by(2).take(299).for_each(|k| *k = f32::NEG_INFINITY);
    let mut all = k.clone();
    all.data_mut()[598] = f32::NEG_INFINITY;
    for_each_place(|place| {
        let rounded = host(&place.tensor(&v));
        assert_eq!(run(place, &args, &[q.clone(), k.clone(), v.clone()]).data(), &rounded.data()[598..]);
        let nothing = run(place, &args, &[q.clone(), all.clone(), v.clone()]);
        assert!(nothing.data().iter().all(|x| x.is_nan()));
    });
}

#[test]
fn nan_reaches_the_rows_that_see_it() {
    let args = dense(1, 30, 300, 2, 32);
    let [q, k, v] = operands(&args, 10);
    let nan_heads = |out: &Tensor| -> Vec<bool> {
        out.data().chunks_exact(32).map(|row| row.iter().all(|x| x.is_nan())).collect()
    };
    let any_nan = |out: &Tensor| out.data().iter().filter(|x| x.is_nan()).count();
    for_each_place(|place| {
        let mut bad = q.clone();
        bad.data_mut()[25 * 64 + 40] = f32::NAN;
        let out = run(place, &args, &[bad, k.clone(), v.clone()]);
        assert_eq!((any_nan(&out), nan_heads(&out)[25 * 2 + 1]), (32, true));
        for key in [0, 150, 299] {
            let mut bad = k.clone();
            bad.data_mut()[key * 64 + 3] = f32::NAN;
            let out = run(place, &args, &[q.clone(), bad, v.clone()]);
            assert!(nan_heads(&out).chunks_exact(2).all(|heads| heads == [true, false]));
            let mut bad = v.clone();
            bad.data_mut()[key * 64 + 3] = f32::NAN;
            let out = run(place, &args, &[q.clone(), k.clone(), bad]);
            assert_eq!(any_nan(&out), 30);
            assert!(out.data().iter().skip(3).step_by(64).all(|x| x.is_nan()));
        }
    });
}

/// Output, gradient of a fused projection and gradients of the norm's weights.
fn everything(place: Place, args: &Attention, qkv: &Tensor, grad: &Tensor) -> [Vec<f32>; 4] {
    let (args, qkv, grad) = (on(args, place.device), place.tensor(qkv), place.tensor(grad));
    let [q, k] = norm_weights(args.head_dim).map(|w| place.tensor(&w));
    let norm = Some(NormWeights { q: &q, k: &k });
    let saved = forward(&args, &qkv, &qkv, &qkv, norm).unwrap();
    let wanted = Wanted { slots: [Some(0); 3], norm: true };
    let result = backward(&args, [&qkv; 3], norm, &saved, &grad, wanted).unwrap();
    let (dq, dk) = result.norm.unwrap();
    [&saved.out, &result.slots[0], &dq, &dk].map(|t| host(t).data().to_vec())
}

#[test]
fn the_rest_of_the_batch_does_not_show() {
    for (tokens, heads) in [(65, 2), (32, 3)] {
        let (width, out_width) = (3 * heads * 32, heads * 32);
        let args = with_rotary(fused(3, tokens, heads, 32));
        let (qkv, grad) = (random(11, &[3, tokens, width]), random(12, &[3, tokens, out_width]));
        let turned = |x: &Tensor| {
            let mut data = x.data().to_vec();
            data.rotate_left(x.numel() / 3);
            Tensor::new(x.shape(), data).unwrap()
        };
        for_each_place(|place| {
            let once = everything(place, &args, &qkv, &grad);
            assert_eq!(once, everything(place, &args, &qkv, &grad));
            let [out, d_qkv, _, _] = once;
            let [turned_out, turned_d_qkv, _, _] = everything(place, &args, &turned(&qkv), &turned(&grad));
            for (x, y) in [(out, turned_out), (d_qkv, turned_d_qkv)] {
                let third = x.len() / 3;
                assert_eq!(x[third..], y[..2 * third]);
                assert_eq!(x[..third], y[2 * third..]);
            }
        });
    }
}

#[test]
fn the_number_of_threads_does_not_show() {
    // One unit: cut into runs of queries by the number of threads.
    for (batch, heads) in [(1, 1), (2, 3)] {
        let args = with_rotary(fused(batch, 129, heads, 32));
        let qkv = random(13, &[batch, 129, 96 * heads]);
        let grad = random(14, &[batch, 129, 32 * heads]);
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| everything(Place::CPU, &args, &qkv, &grad))
        };
        let one = with(1);
        assert_eq!(one, with(2));
        assert_eq!(one, with(7));
    }
}

#[test]
fn bad_arguments_are_typed_errors() {
    for_each_place(bad_arguments);
}

fn bad_arguments(place: Place) {
    let good = dense(2, 3, 5, 2, 8);
    let [q, k, v] = operands(&good, 31).map(|x| place.tensor(&x));
    let shape = |args: &Attention| matches!(forward(args, &q, &k, &v, None), Err(Error::Shape { .. }));
    let invalid = |args: &Attention| matches!(forward(args, &q, &k, &v, None), Err(Error::Invalid { .. }));
    let change = |f: fn(&mut Attention)| {
        let mut args = good.clone();
        f(&mut args);
        args
    };
    assert!(forward(&good, &q, &k, &v, None).is_ok());
    assert!(invalid(&change(|a| a.head_dim = 7)));
    assert!(invalid(&change(|a| a.head_dim = 0)));
    assert!(invalid(&change(|a| a.head_dim = 258)));
    assert!(shape(&change(|a| a.q.offset = 1)));
    assert!(shape(&change(|a| a.k.token = 17)));
    assert!(shape(&change(|a| a.v.head = 9)));
    assert!(shape(&change(|a| a.k.batch[0] = usize::MAX)));
    assert!(shape(&change(|a| a.k.offset = usize::MAX)));
    assert!(shape(&change(|a| a.out.offset = 1)));
    assert!(shape(&change(|a| a.out.head = 0)));
    assert!(shape(&change(|a| a.out_shape = vec![2, 3, 17])));
    assert!(shape(&change(|a| a.key_lengths = Some(vec![5]))));
    assert!(invalid(&change(|a| a.key_lengths = Some(vec![5, 6]))));
    let table = |tokens, half| {
        let cos = Tensor::zeros(&[tokens, half]).to(place.device, Dtype::F32).unwrap();
        Rotary { sin: cos.clone(), cos }
    };
    for (tokens_q, tokens_k, half, right) in
        [(3, 5, 4, true), (2, 5, 4, false), (3, 4, 4, false), (3, 5, 3, false)]
    {
        let args = Attention { rotary: Some((table(tokens_q, half), table(tokens_k, half))), ..good.clone() };
        assert_eq!(shape(&args), !right);
    }
    let [w8, w7] = [8, 7].map(|n| place.tensor(&Tensor::zeros(&[n])));
    let normed =
        |q_weight, k_weight| forward(&good, &q, &k, &v, Some(NormWeights { q: q_weight, k: k_weight }));
    assert!(normed(&w8, &w8).is_ok());
    assert!(matches!(normed(&w7, &w8), Err(Error::Shape { .. })));
    assert!(matches!(normed(&w8, &w7), Err(Error::Shape { .. })));
    let saved = forward(&good, &q, &k, &v, None).unwrap();
    let back = |slots, grad: &Tensor| {
        backward(&good, [&q, &k, &v], None, &saved, grad, Wanted { slots, norm: false })
    };
    assert!(back([Some(0), Some(1), Some(2)], &saved.out).is_ok());
    assert!(matches!(back([Some(0), None, Some(2)], &saved.out), Err(Error::Invalid { .. })));
    assert!(matches!(back([Some(usize::MAX), None, None], &saved.out), Err(Error::Invalid { .. })));
    assert!(matches!(back([Some(0), Some(0), None], &saved.out), Err(Error::Shape { .. })));
    assert!(back([Some(0), None, None], &q.reshape(&[96]).unwrap()).is_ok());
    assert!(matches!(back([Some(0), None, None], &k), Err(Error::Shape { .. })));
    if place != Place::CPU {
        // Operands and tables must be together.
        let elsewhere = forward(&good, &q, &host(&k), &v, None);
        assert!(matches!(elsewhere, Err(Error::Invalid { .. })));
        assert!(invalid(&with_rotary(good.clone())));
        assert!(forward(&on(&with_rotary(good.clone()), place.device), &q, &k, &v, None).is_ok());
    }
}

#[test]
fn rotary_tables() {
    // Two axes of widths 8 and 4; frequencies 10000^(-2m / width).
    let table = rotary_table(&[vec![0, 0], vec![3, 12_500]], &[8, 4]).unwrap();
    assert_eq!(table.cos.shape(), [2, 6]);
    assert_eq!(
        (table.cos.data()[..6].to_vec(), table.sin.data()[..6].to_vec()),
        (vec![1.0; 6], vec![0.0; 6])
    );
    let angles = [3.0, 0.3, 0.03, 0.003, 12_500.0, 125.0f64];
    for (i, angle) in angles.into_iter().enumerate() {
        assert!((f64::from(table.cos.data()[6 + i]) - angle.cos()).abs() < 1e-5, "angle {angle}");
        assert!((f64::from(table.sin.data()[6 + i]) - angle.sin()).abs() < 1e-5, "angle {angle}");
    }
    // The angle is rounded to f32: 12500 * 10000^(-2/128) = 10824.6.. has a spacing of 2^-10.
    let table = rotary_table(&[vec![12_500]], &[128]).unwrap();
    let rounded = 12_500.0f32 * (1.0 / 10_000.0f64.powf(2.0 / 128.0) as f32);
    assert_eq!(table.cos.data()[1], f64::from(rounded).cos() as f32);
    let exact = 12_500.0 / 10_000.0f64.powf(2.0 / 128.0);
    assert!((f64::from(rounded) - exact).abs() > 1e-5);
    assert!(matches!(rotary_table(&[vec![1]], &[3]), Err(Error::Invalid { .. })));
    assert!(matches!(rotary_table(&[vec![1, 2]], &[4]), Err(Error::Invalid { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Any sizes, any order of the axes of every operand.
    #[test]
    fn any_shape_and_order_of_axes(
        sizes in [1usize..4, 1..4, 1..40, 1..40, 1..4, 1..21],
        orders in prop::array::uniform4(Just([0usize, 1, 2, 3]).prop_shuffle()),
        norm: bool,
        rotary: bool,
    ) {
        let [b0, b1, queries, keys, heads, half] = sizes;
        let mut args = dense(b0, queries, keys, heads, 2 * half);
        args.batch[1] = b1;
        let layout = |order: [usize; 4], tokens| {
            let sizes = [b0, b1, tokens, heads];
            let mut strides = [0; 4];
            let mut next = 2 * half;
            for axis in order {
                strides[axis] = next;
                next *= sizes[axis];
            }
            Layout { offset: 0, batch: [strides[0], strides[1]], token: strides[2], head: strides[3] }
        };
        args.q = layout(orders[0], queries);
        args.k = layout(orders[1], keys);
        args.v = layout(orders[2], keys);
        args.out = layout(orders[3], queries);
        args.out_shape = vec![b0 * b1 * queries * heads * 2 * half];
        let args = if rotary { with_rotary(args) } else { args };
        let operands = operands(&args, 32);
        let weights = norm.then(|| norm_weights(2 * half));
        for_each_place(|place| check_any_at(place, &args, &operands, weights.as_ref()));
    }
}
