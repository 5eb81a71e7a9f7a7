//! Low-rank linear at the shapes of the bundled backbone and of a large model: plain, one adapter, an adapter per instance, and
//! with gradients.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hywu_kernels::{
    LoraVar, Tape, Tensor, Var,
    ops::{
        loss::weighted_sum,
        low_rank_linear::{linear, low_rank_linear},
    },
    testing::random,
};
use std::hint::black_box;

fn benches(c: &mut Criterion) {
    let mut group = c.benchmark_group("low_rank_linear");
    for [b, m, k, n, r] in
        [[32, 84, 192, 576, 8], [32, 84, 192, 1024, 8], [32, 84, 512, 192, 8], [1, 1024, 4096, 4096, 16]]
    {
        let case = format!("b{b} m{m} k{k} n{n} r{r}");
        let (x, w) = (random(1, &[b, m, k]), random(2, &[n, k]));
        let lora = |instances: usize, var: &dyn Fn(Tensor) -> Var| LoraVar {
            a: var(random(3, &[instances, r, k])),
            b: var(random(4, &[instances, n, r])),
            scale: 0.5,
        };
        group.throughput(Throughput::Elements((b * m * k * n) as u64));
        let (xc, wc, tape) = (Var::constant(x.clone()), Var::constant(w.clone()), Tape::inference());
        group.bench_function(BenchmarkId::new("plain", &case), |bench| {
            bench.iter(|| black_box(linear(&tape, &xc, &wc, None).expect("shapes agree")));
        });
        for instances in if b > 1 { vec![1, b] } else { vec![1] } {
            let lora = lora(instances, &Var::constant);
            group.bench_function(BenchmarkId::new(format!("{instances} adapters"), &case), |bench| {
                bench.iter(|| {
                    black_box(low_rank_linear(&tape, &xc, &wc, None, Some(&lora)).expect("shapes agree"))
                });
            });
        }
        let weights = random(5, &[b, m, n]);
        group.bench_function(BenchmarkId::new("gradients of x and adapter", &case), |bench| {
            bench.iter(|| {
                let tape = Tape::new();
                let (x, lora) = (tape.leaf(x.clone()), lora(b, &|t| tape.leaf(t)));
                let y = low_rank_linear(&tape, &x, &wc, None, Some(&lora)).expect("shapes agree");
                let loss = weighted_sum(&tape, &y, &weights).expect("shapes agree");
                black_box(tape.backward(&loss).expect("a scalar").take(&lora.a))
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = all;
    config = Criterion::default().sample_size(10);
    targets = benches
}
criterion_main!(all);
