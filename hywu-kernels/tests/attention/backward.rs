//! Gradients, alone and of operands that share elements.

use super::{ROUNDING, dense, fused, host, norm_weights, on, operands, run, to_bf16, with_rotary};
use hywu_core::Dtype;
use hywu_kernels::{
    Result, Tape, Tensor, Var,
    ops::{
        attention::{Attention, Layout, NormWeights, QkNorm, Wanted, attention, backward, forward},
        loss::weighted_sum,
    },
    reference::{self, attention::Gradients},
    testing::{Place, assert_close, check_gradients_at, for_each_place, random, relative_error, widen},
};

/// Gradients of every distinct operand (and of the norm's weights). `sources` says which input each of q, k and v is read from.
///
/// In f32 they are compared to differences of the oracle. In bf16 what rounding does depends on where the kernels round, more than on
/// the operands: there all elements are compared to an oracle that rounds at the same places.
#[track_caller]
pub(super) fn check_backward(
    args: &Attention,
    mut inputs: Vec<Tensor>,
    sources: [usize; 3],
    norm: bool,
    samples: usize,
) {
    if norm {
        inputs.extend(norm_weights(args.head_dim));
    }
    let n = inputs.len();
    let run = |tape: &Tape, vars: &[Var]| -> Result<Var> {
        let [q, k, v] = sources.map(|i| &vars[i]);
        let norm = norm.then(|| QkNorm { q: vars[n - 2].clone(), k: vars[n - 1].clone() });
        attention(tape, &on(args, q.value().device()), q, k, v, norm.as_ref())
    };
    let output = |x: &[Vec<f64>]| {
        let [q, k, v] = sources.map(|i| x[i].as_slice());
        let norm = norm.then(|| (x[n - 2].as_slice(), x[n - 1].as_slice()));
        reference::attention::attention(args, q, k, v, norm)
    };
    for_each_place(|place| {
        if place.dtype == Dtype::F32 {
            return check_gradients_at(place, &inputs, run, output, samples, 1e-4);
        }
        let tape = Tape::new();
        let leaves: Vec<Var> = inputs.iter().map(|x| tape.leaf(place.tensor(x))).collect();
        let out = run(&tape, &leaves).unwrap();
        let grad = place.tensor(&random(0x77, out.shape()));
        let loss = weighted_sum(&tape, &out, &grad).unwrap();
        let mut grads = tape.backward(&loss).unwrap();
        let x: Vec<Vec<f64>> = inputs.iter().map(|x| place.rounded(x)).collect();
        let weights = norm.then(|| (x[n - 2].as_slice(), x[n - 1].as_slice()));
        let gradients = |out: Option<&[f64]>, narrowed| {
            let (operands, grad) = (sources.map(|i| x[i].as_slice()), widen(&grad));
            reference::attention::gradients(args, operands, weights, (out, &grad), narrowed, to_bf16)
        };
        // Kernels may do any of these.
        let saved = widen(out.value());
        let any = [(Some(&*saved), false), (None, false), (Some(&*saved), true), (None, true)];
        let any = any.map(|(out, narrowed)| gradients(out, narrowed));
        assert_close(host(out.value()).data(), &any[0].out, ROUNDING);
        for (i, leaf) in leaves.iter().enumerate() {
            let of_leaf = |expected: &Gradients| {
                if norm && i >= n - 2 {
                    return expected.norm[i + 2 - n].clone();
                }
                let mut sum = vec![0.0; x[i].len()];
                for (_, d) in sources.iter().zip(&expected.operands).filter(|(source, _)| **source == i) {
                    sum.iter_mut().zip(d).for_each(|(sum, d)| *sum += d);
                }
                sum
            };
            let got = host(&grads.take(leaf).unwrap());
            let any = any.each_ref().map(of_leaf);
            let near = |expected: &Vec<f64>| relative_error(got.data(), expected) <= ROUNDING;
            let expected = any.iter().find(|e| near(e)).unwrap_or(&any[0]);
            assert_close(got.data(), expected, ROUNDING);
        }
    });
}

#[test]
fn gradients_of_separate_operands() {
    for (queries, keys, d) in [(1, 3, 2), (5, 7, 16), (17, 15, 6), (49, 20, 8), (6, 130, 34)] {
        let args = dense(2, queries, keys, 2, d);
        check_backward(&args, operands(&args, 15).to_vec(), [0, 1, 2], false, 12);
        check_backward(&with_rotary(args.clone()), operands(&args, 16).to_vec(), [0, 1, 2], true, 12);
    }
}

#[test]
fn gradients_across_blocks_of_queries_and_keys() {
    let args = with_rotary(dense(1, 97, 260, 1, 16));
    check_backward(&args, operands(&args, 17).to_vec(), [0, 1, 2], true, 8);
}

#[test]
fn gradients_of_a_fused_projection() {
    let args = with_rotary(fused(2, 13, 2, 16));
    check_backward(&args, vec![random(18, &[2, 13, 96])], [0, 0, 0], true, 40);
    check_backward(&args, vec![random(18, &[2, 13, 96])], [0, 0, 0], false, 40);
    // Room between the projections gets gradient zero.
    let mut args = fused(1, 5, 1, 8);
    for l in [&mut args.q, &mut args.k, &mut args.v] {
        l.token = 40;
        l.batch[0] = 200;
    }
    check_backward(&args, vec![random(19, &[5, 40])], [0, 0, 0], true, 200);
    // A fused projection of keys and values.
    let mut args = dense(2, 6, 9, 2, 8);
    (args.k.token, args.k.batch[0]) = (32, 9 * 32);
    args.v = Layout { offset: 16, ..args.k };
    check_backward(&args, vec![random(20, &[2, 6, 16]), random(21, &[2, 9, 32])], [0, 1, 1], false, 40);
}

#[test]
fn gradients_with_masked_keys() {
    let mut args = with_rotary(dense(3, 6, 20, 1, 8));
    args.key_lengths = Some(vec![0, 20, 3]);
    check_backward(&args, operands(&args, 22).to_vec(), [0, 1, 2], true, 60);
}

#[test]
fn gradients_of_elements_that_several_rows_read() {
    // Two heads of queries on one head of keys and values, and one batch of keys for all.
    let mut args = dense(3, 5, 7, 2, 8);
    for l in [&mut args.k, &mut args.v] {
        *l = Layout { offset: 0, batch: [0, 0], token: 8, head: 0 };
    }
    check_backward(
        &args,
        vec![random(23, &[3, 5, 16]), random(24, &[7, 8]), random(25, &[7, 8])],
        [0, 1, 2],
        true,
        40,
    );
    // Windows of two rows of 4 that overlap.
    let mut args = dense(1, 5, 7, 2, 8);
    for l in [&mut args.k, &mut args.v] {
        *l = Layout { offset: 0, batch: [0, 0], token: 4, head: 32 };
    }
    let windows = |seed| random(seed, &[64]);
    check_backward(&args, vec![random(35, &[5, 16]), windows(36), windows(37)], [0, 1, 2], true, 40);
    // Keys that are values that are queries.
    let args = dense(2, 9, 9, 2, 8);
    check_backward(&args, vec![random(26, &[2, 9, 16])], [0, 0, 0], false, 60);
}

#[test]
fn only_what_is_wanted() {
    for d in [16, 130] {
        for_each_place(|place| only_what_is_wanted_at(place, d));
    }
}

fn only_what_is_wanted_at(place: Place, head_dim: usize) {
    let args = on(&with_rotary(dense(2, 19, 33, 2, head_dim)), place.device);
    let [q, k, v] = operands(&args, 27).map(|x| place.tensor(&x));
    let [wq, wk] = norm_weights(head_dim).map(|w| place.tensor(&w));
    let norm = Some(NormWeights { q: &wq, k: &wk });
    let saved = forward(&args, &q, &k, &v, norm).unwrap();
    let grad = place.tensor(&random(28, &args.out_shape));
    let run = |slots, norm_too| {
        let wanted = Wanted { slots, norm: norm_too };
        backward(&args, [&q, &k, &v], norm, &saved, &grad, wanted).unwrap()
    };
    let all = run([Some(0), Some(1), Some(2)], true);
    for i in 0..3 {
        let mut slots = [None; 3];
        slots[i] = Some(0);
        let one = run(slots, false);
        assert_eq!(one.slots.len(), 1);
        assert_eq!(host(&one.slots[0]).data(), host(&all.slots[i]).data());
        assert!(one.norm.is_none());
    }
    let weights = run([None; 3], true).norm.unwrap();
    let all_weights = all.norm.unwrap();
    assert_eq!(host(&weights.0).data(), host(&all_weights.0).data());
    assert_eq!(host(&weights.1).data(), host(&all_weights.1).data());
}

#[test]
fn empty_calls() {
    for_each_place(|place| {
        let none = dense(2, 0, 5, 1, 4);
        assert_eq!(run(place, &none, &operands(&none, 29)).numel(), 0);
        let args = dense(2, 3, 0, 1, 4);
        let [q, k, v] = operands(&args, 30).map(|x| place.tensor(&x));
        let saved = forward(&args, &q, &k, &v, None).unwrap();
        assert_eq!(host(&saved.out).data(), [0.0; 24]);
        // The keys' tensor has elements that no key uses.
        let wanted = Wanted { slots: [Some(0), Some(1), None], norm: false };
        let grads = backward(&args, [&q, &q, &v], None, &saved, &q, wanted).unwrap().slots;
        assert!(grads.iter().all(|g| host(g).data() == [0.0; 24]));
    });
}

#[test]
fn gradients_of_masked_rows_are_zero_whatever_they_hold() {
    let mut args = with_rotary(dense(2, 9, 20, 1, 8));
    args.key_lengths = Some(vec![0, 7]);
    let [mut q, mut k, mut v] = operands(&args, 33);
    q.data_mut()[..9 * 8].fill(f32::NAN);
    for x in [&mut k, &mut v] {
        x.data_mut()[..20 * 8].fill(f32::NAN);
        x.data_mut()[27 * 8..].fill(f32::NAN);
    }
    for_each_place(|place| {
        let args = on(&args, place.device);
        let [q, k, v] = [&q, &k, &v].map(|x| place.tensor(x));
        let [wq, wk] = norm_weights(8).map(|w| place.tensor(&w));
        let norm = Some(NormWeights { q: &wq, k: &wk });
        let saved = forward(&args, &q, &k, &v, norm).unwrap();
        let grad = place.tensor(&random(34, &args.out_shape));
        let wanted = Wanted { slots: [Some(0), Some(1), Some(2)], norm: true };
        let result = backward(&args, [&q, &k, &v], norm, &saved, &grad, wanted).unwrap();
        let [dq, dk, dv] = [0, 1, 2].map(|i| host(&result.slots[i]));
        let zero = |x: &[f32]| x.iter().all(|&x| x == 0.0);
        assert!(zero(&dq.data()[..9 * 8]));
        for d in [&dk, &dv] {
            assert!(zero(&d.data()[..20 * 8]) && zero(&d.data()[27 * 8..]));
        }
        let (wq, wk) = result.norm.unwrap();
        for d in [&dq, &dk, &dv, &host(&wq), &host(&wk)] {
            assert!(d.data().iter().all(|x| x.is_finite()) && !zero(d.data()));
        }
    });
}
