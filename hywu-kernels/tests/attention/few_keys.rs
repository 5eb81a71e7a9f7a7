//! Calls with few queries and keys, which have kernels of their own on a device.

use super::{
    dense, host, layer_axis,
    masks::{causal, check_all, grouped, results},
    operands, run, with_rotary,
};
use hywu_core::Dtype;
use hywu_kernels::{
    Tensor,
    ops::attention::Attention,
    testing::{Place, for_each_place},
};

const EDGES: [usize; 9] = [1, 15, 16, 17, 31, 32, 33, 63, 64];

/// Every length of queries with three of keys.
fn edges() -> impl Iterator<Item = (usize, usize, usize)> {
    (0..27).map(|i| (i, EDGES[i % 9], EDGES[(i % 9 + i / 9 * 4) % 9]))
}

#[test]
fn outputs_and_gradients_at_the_tile_edges() {
    for (i, queries, keys) in edges() {
        let args = dense(1, queries, keys, 1 + i % 3, [64, 8, 128, 72][i % 4]);
        if i % 2 == 0 {
            check_all(&args, 60, false);
        } else {
            check_all(&with_rotary(args), 61, true);
        }
    }
}

#[test]
fn the_layer_axis_of_a_generator() {
    // As its layers call it: 32 tokens, rotation without a norm, heads of 128 or 64 channels; an odd number of units is the last.
    for (batch, layers, positions, heads, head_dim) in
        [(2, 32, 3, 4, 128), (1, 32, 5, 1, 64), (1, 28, 3, 3, 64), (3, 6, 7, 1, 128)]
    {
        let args = with_rotary(layer_axis(batch, layers, positions, heads, head_dim));
        check_all(&args, 62, false);
        check_all(&args, 63, true);
    }
}

#[test]
fn lengths_and_masks_and_shared_heads() {
    let mut args = with_rotary(layer_axis(2, 20, 3, 2, 64));
    args.key_lengths = Some(vec![20, 0, 1, 17, 16, 3]);
    check_all(&args, 64, true);
    check_all(&causal(args, &[5..12, 14..16]), 65, true);
    check_all(&causal(dense(2, 9, 50, 3, 128), &[3..41, 44..46]), 66, false);
    check_all(&with_rotary(grouped(dense(3, 17, 33, 6, 64), 2)), 67, true);
}

/// Twelve rows of queries, 40 of keys, two heads of 8 channels.
fn small() -> (Attention, [Tensor; 3]) {
    let args = dense(1, 12, 40, 2, 8);
    let operands = operands(&args, 68);
    (args, operands)
}

#[test]
fn large_equal_and_hot_logits_of_few_keys() {
    let (args, [mut q, mut k, v]) = small();
    // Logits of +-80.
    let size = (80.0f32 * 8.0f32.sqrt() / 8.0).sqrt();
    for (t, x) in [(0, &mut q), (1, &mut k)] {
        for (i, row) in x.data_mut().chunks_exact_mut(8).enumerate() {
            row.fill(if (i + t) % 3 == 0 { -size } else { size });
        }
    }
    super::check(&args, [&q, &k, &v], None);
    // All equal: the mean of v.
    k.data_mut().fill(size);
    super::check(&args, [&q, &k, &v], None);
    // One hot key.
    k.data_mut().fill(-size);
    k.data_mut()[39 * 16..].fill(size);
    q.data_mut().fill(size);
    let operands = [q, k, v];
    for_each_place(|place| {
        let (out, v) = (run(place, &args, &operands), host(&place.tensor(&operands[2])));
        for row in out.data().chunks_exact(16) {
            assert_eq!(row, &v.data()[39 * 16..]);
        }
    });
}

#[test]
fn infinite_scores_of_few_keys() {
    let (args, [mut q, mut k, v]) = small();
    q.data_mut().fill(1.0);
    k.data_mut().fill(f32::NEG_INFINITY);
    let all = k.clone();
    k.data_mut()[39 * 16..].fill(0.0);
    for_each_place(|place| {
        let out = run(place, &args, &[q.clone(), k.clone(), v.clone()]);
        let rounded = host(&place.tensor(&v));
        assert!(out.data().chunks_exact(16).all(|row| row == &rounded.data()[39 * 16..]));
        let nothing = run(place, &args, &[q.clone(), all.clone(), v.clone()]);
        assert!(nothing.data().iter().all(|x| x.is_nan()));
    });
}

/// Rows of 8 channels that have a NaN in all of them, and in some.
fn nan_rows(x: &Tensor) -> [Vec<usize>; 2] {
    let rows = |bad: fn(&[f32]) -> bool| {
        let rows = x.data().chunks_exact(8).enumerate();
        rows.filter(|(_, row)| bad(row)).map(|(i, _)| i).collect()
    };
    [rows(|row| row.iter().all(|x| x.is_nan())), rows(|row| row.iter().any(|x| x.is_nan()))]
}

#[test]
fn nan_reaches_what_depends_on_it_and_no_other_head() {
    let (args, good) = small();
    let of_head_1 = |tokens: usize| (0..tokens).map(|t| 2 * t + 1).collect::<Vec<_>>();
    for_each_place(|place| {
        for operand in 0..3 {
            let mut bad = good.clone();
            // Token 7 of head 1.
            bad[operand].data_mut()[7 * 16 + 8 + 3] = f32::NAN;
            let r = results(place, &args, &bad, false);
            let [whole, some] = nan_rows(&r.out);
            match operand {
                0 => assert_eq!([whole, some], [vec![15], vec![15]]),
                1 => assert_eq!([whole, some], [of_head_1(12), of_head_1(12)]),
                // Only the channel.
                _ => assert_eq!([whole, some], [vec![], of_head_1(12)]),
            }
            // A row of queries reaches all keys, and a key all queries.
            let keys = nan_rows(&r.grads[1])[0].clone();
            assert_eq!(keys, of_head_1(40), "{place:?} {operand}");
            let queries = nan_rows(&r.grads[0])[0].clone();
            assert_eq!(queries, if operand == 0 { vec![15] } else { of_head_1(12) });
        }
    });
}

#[test]
fn other_units_and_other_lengths_do_not_show() {
    // Position by position of the layer axis, and all positions at once.
    let (layers, positions, heads, d) = (31, 5, 3, 64);
    let args = with_rotary(layer_axis(1, layers, positions, heads, d));
    let all = operands(&args, 69);
    let row = heads * d;
    let position = |x: &Tensor, p: usize| {
        let rows = x.data().chunks_exact(row).skip(p).step_by(positions);
        Tensor::new(&[layers, row], rows.flatten().copied().collect()).unwrap()
    };
    for_each_place(|place: Place| {
        let together = run(place, &args, &all);
        for p in 0..positions {
            let one = with_rotary(dense(1, layers, layers, heads, d));
            let alone = run(place, &one, &all.each_ref().map(|x| position(x, p)));
            assert_eq!(alone.data(), position(&together, p).data());
            if p == 0 && place.dtype == Dtype::Bf16 {
                // Keys behind the valid ones, in tiles of another height.
                let mut longer = dense(1, layers, 60, heads, d);
                longer.key_lengths = Some(vec![layers]);
                let longer = with_rotary(longer);
                let padded = |x: &Tensor| {
                    let mut data = position(x, p).data().to_vec();
                    data.resize(60 * row, f32::NAN);
                    Tensor::new(&[60, row], data).unwrap()
                };
                let operands = [position(&all[0], p), padded(&all[1]), padded(&all[2])];
                assert_eq!(run(place, &longer, &operands).data(), alone.data());
            }
        }
    });
}
