//! Attention at the shapes of the bundled backbone, of the generator and of a long sequence.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hywu_kernels::{
    Tensor,
    ops::attention::{Attention, Layout, NormWeights, Rotary, Wanted, backward, forward, rotary_table},
    testing::random,
};
use std::hint::black_box;

struct Case {
    name: String,
    args: Attention,
    /// One fused projection, or queries, keys and values.
    operands: Vec<Tensor>,
    norm: bool,
}

/// A dense [batch, tokens, heads, head_dim] tensor, or one of three side by side.
fn layout(tokens: usize, row: usize, head_dim: usize, offset: usize) -> Layout {
    Layout { offset, batch: [tokens * row, 0], token: row, head: head_dim }
}

fn tables(tokens: usize, head_dim: usize) -> Rotary {
    let positions: Vec<_> = (0..tokens).map(|t| vec![t as u32]).collect();
    rotary_table(&positions, &[head_dim]).expect("one axis of even width")
}

/// [batch, queries, heads * 64] on [batch, keys, heads * 64].
fn dense(name: &str, batch: usize, queries: usize, keys: usize, heads: usize, rotary: bool) -> Case {
    let row = heads * 64;
    let k = layout(keys, row, 64, 0);
    let q = layout(queries, row, 64, 0);
    let args = Attention {
        batch: [batch, 1],
        queries,
        keys,
        heads,
        kv_heads: heads,
        head_dim: 64,
        q,
        k,
        v: k,
        out: q,
        out_shape: vec![batch, queries, row],
        key_lengths: None,
        ragged: None,
        causal: None,
        rotary: rotary.then(|| (tables(queries, 64), tables(keys, 64))),
    };
    let operands = vec![
        random(1, &[batch, queries, row]),
        random(2, &[batch, keys, row]),
        random(3, &[batch, keys, row]),
    ];
    let name = format!("{name} b{batch} {queries}x{keys} h{heads} d64");
    Case { name, args, operands, norm: false }
}

/// The backbone's fused projection with QK norm and rotation.
fn fused(batch: usize, tokens: usize) -> Case {
    let mut case = dense("backbone", batch, tokens, tokens, 3, true);
    let row = 3 * 64;
    [case.args.q, case.args.k, case.args.v] = [0, 1, 2].map(|i| layout(tokens, 3 * row, 64, i * row));
    case.operands = vec![random(4, &[batch, tokens, 3 * row])];
    case.norm = true;
    case
}

/// The generator's attention over layers, strided through [batch, layers, positions, channels].
fn layer_axis(batch: usize, layers: usize, positions: usize, heads: usize) -> Case {
    let mut case = dense("layers", batch * positions, layers, layers, heads, true);
    let row = heads * 64;
    case.args.batch = [batch, positions];
    let strided =
        Layout { offset: 0, batch: [layers * positions * row, row], token: positions * row, head: 64 };
    (case.args.q, case.args.k, case.args.v, case.args.out) = (strided, strided, strided, strided);
    case
}

fn attention(c: &mut Criterion) {
    let cases = [
        fused(16, 84),
        fused(64, 84),
        fused(16, 276),
        layer_axis(16, 6, 84, 4),
        dense("positions", 96, 84, 84, 4, true),
        dense("cross", 16, 504, 170, 4, true),
        dense("long", 1, 1024, 1024, 4, false),
    ];
    let mut group = c.benchmark_group("attention");
    for Case { name, args, operands, norm } in &cases {
        let [q, k, v] = [0, 1, 2].map(|i| &operands[i.min(operands.len() - 1)]);
        let slots = if operands.len() == 1 { [Some(0); 3] } else { [Some(0), Some(1), Some(2)] };
        let weight = Tensor::full(&[64], 1.0);
        let weights = norm.then_some(NormWeights { q: &weight, k: &weight });
        // Two products of 2 operations per score and channel; the backward pass has five.
        let scores = args.batch[0] * args.batch[1] * args.heads * args.queries * args.keys;
        let flops = (4 * scores * args.head_dim) as u64;
        group.throughput(Throughput::Elements(flops));
        group.bench_function(BenchmarkId::new("forward", name), |b| {
            b.iter(|| forward(black_box(args), q, k, v, weights));
        });
        let saved = forward(args, q, k, v, weights).expect("valid shapes");
        group.throughput(Throughput::Elements(flops * 5 / 2));
        group.bench_function(BenchmarkId::new("backward", name), |b| {
            let wanted = Wanted { slots, norm: *norm };
            b.iter(|| backward(black_box(args), [q, k, v], weights, &saved, &saved.out, wanted));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(std::time::Duration::from_secs(1));
    targets = attention
}
criterion_main!(benches);
