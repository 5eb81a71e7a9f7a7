//! This project's side of the CPU comparison with PyTorch: prints `{"threads": n, "parameters": those of the backbone,
//! "ms": {case: median milliseconds}}`.
//! `benches/peer/torch_peer.py` runs the same cases; `benches/peer/compare_cpu.py` runs both in turn.

use hywu_diffusion::{Backbone, BackboneConfig};
use hywu_kernels::{
    LoraVar, LoraVars, Result, Tape, Tensor, Var,
    ops::{
        attention::{Attention, Layout, attention},
        loss::weighted_mse,
        low_rank_linear::{linear, low_rank_linear},
    },
    optim::{Optimizer, Schedule},
    testing::random,
};
use std::{error::Error, time::Instant};

/// Median of many calls after a warm-up, in milliseconds; the same rule as PyTorch's side.
fn median_ms(seconds: f64, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    for _ in 0..3 {
        f()?;
    }
    let (start, mut times) = (Instant::now(), Vec::new());
    while times.len() < 7 || (start.elapsed().as_secs_f64() < seconds && times.len() < 1000) {
        let t = Instant::now();
        f()?;
        times.push(t.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(1e3 * times[times.len() / 2])
}

/// Random normal values times `factor`.
fn scaled(seed: u64, shape: &[usize], factor: f32) -> Tensor {
    let mut x = random(seed, shape);
    x.data_mut().iter_mut().for_each(|v| *v *= factor);
    x
}

fn constant(seed: u64, shape: &[usize], factor: f32) -> Var {
    Var::constant(scaled(seed, shape, factor))
}

fn lora(batch: usize, rank: usize, inner: usize, outer: usize, scale: f32) -> LoraVar {
    let a = constant(4, &[batch, rank, inner], (inner as f32).powf(-0.5));
    LoraVar { a, b: constant(5, &[batch, outer, rank], 0.1), scale }
}

/// (with adapters, without).
fn low_rank_linear_ms([b, m, k, n, r]: [usize; 5]) -> Result<(f64, f64)> {
    let (x, bias) = (constant(1, &[b, m, k], 1.0), constant(3, &[n], 1.0));
    let weight = constant(2, &[n, k], (k as f32).powf(-0.5));
    let adapter = lora(b, r, k, n, 0.5);
    let tape = Tape::inference();
    let with = median_ms(1.0, || low_rank_linear(&tape, &x, &weight, Some(&bias), Some(&adapter)).map(drop))?;
    let without = median_ms(1.0, || linear(&tape, &x, &weight, Some(&bias)).map(drop))?;
    Ok((with, without))
}

/// Fused projection [b, t, 3 h d] -> [b, t, h d]; (forward, forward and backward).
fn attention_ms([b, t, h, d]: [usize; 4]) -> Result<(f64, f64)> {
    let qkv = scaled(1, &[b, t, 3 * h * d], 1.0);
    let at = |part: usize, parts: usize| Layout {
        offset: part * h * d,
        batch: [t * parts * h * d, 0],
        token: parts * h * d,
        head: d,
    };
    let args = Attention {
        batch: [b, 1],
        queries: t,
        keys: t,
        heads: h,
        head_dim: d,
        q: at(0, 3),
        k: at(1, 3),
        v: at(2, 3),
        out: at(0, 1),
        out_shape: vec![b, t, h * d],
        key_lengths: None,
        rotary: None,
    };
    let x = Var::constant(qkv.clone());
    let forward = median_ms(1.0, || attention(&Tape::inference(), &args, &x, &x, &x, None).map(drop))?;
    let target = scaled(2, &[b, t, h * d], 1.0);
    let train = median_ms(1.0, || {
        let tape = Tape::new();
        let x = tape.leaf(qkv.clone());
        let y = attention(&tape, &args, &x, &x, &x, None)?;
        let loss = weighted_mse(&tape, &y, &target, &vec![1.0; b])?;
        tape.backward(&loss).map(drop)
    })?;
    Ok((forward, train))
}

fn new_backbone() -> Result<Backbone, hywu_diffusion::Error> {
    Backbone::new(BackboneConfig::default(), scaled(1, &[1000, 64], 1.0), 0)
}

/// One call of the backbone on `batch` tiles of `size` pixels, with adapters of that rank per tile, or a whole training step.
fn backbone_ms(batch: usize, size: usize, rank: Option<usize>, train: bool) -> Result<f64, Box<dyn Error>> {
    let mut backbone = new_backbone()?;
    let ids: Vec<u32> = (0..batch * backbone.config.text_len).map(|i| (i * 37 % 1000) as u32).collect();
    let picture = |seed, channels| scaled(seed, &[batch, size, size, channels], 1.0);
    let (x_t, source, position, target) = (picture(2, 3), picture(3, 3), picture(4, 2), picture(5, 3));
    let t: Vec<f32> = (0..batch).map(|i| i as f32 / batch as f32).collect();
    let mut adapters = LoraVars::none();
    if let Some(rank) = rank {
        let spec = backbone.adapter_spec(rank, rank as f32);
        for layer in 0..spec.layers {
            for (i, m) in spec.modules.iter().enumerate() {
                adapters
                    .modules
                    .insert(spec.module_name(layer, i), lora(batch, rank, m.in_dim, m.out_dim, 1.0));
            }
        }
    }
    if !train {
        let tape = Tape::inference();
        let bound = backbone.params.bind(&tape, false)?;
        return Ok(median_ms(2.0, || {
            let text = backbone.text_tokens(&tape, &bound, &ids, batch).map_err(kernel)?;
            let p = backbone.predict(&tape, &bound, &x_t, &source, &position, &t, &text, &adapters);
            p.map(drop).map_err(kernel)
        })?);
    }
    let schedule = Schedule { warmup: 10, total: 1000, peak: 1e-3, floor: 1e-4 };
    let mut optimizer = Optimizer::new(&backbone.params, schedule, 0.01, 1.0, None)?;
    Ok(median_ms(4.0, || {
        let tape = Tape::new();
        let bound = backbone.params.bind(&tape, true)?;
        let text = backbone.text_tokens(&tape, &bound, &ids, batch).map_err(kernel)?;
        let y = backbone
            .predict(&tape, &bound, &x_t, &source, &position, &t, &text, &adapters)
            .map_err(kernel)?;
        let loss = weighted_mse(&tape, &y, &target, &vec![1.0; batch])?;
        let grads = bound.take_grads(&mut tape.backward(&loss)?)?;
        drop(bound);
        optimizer.step(&mut backbone.params, &grads).map(drop)
    })?)
}

fn kernel(e: hywu_diffusion::Error) -> hywu_kernels::Error {
    hywu_kernels::Error::invalid("backbone", e.to_string())
}

fn main() -> Result<(), Box<dyn Error>> {
    let threads: usize = std::env::args().nth(1).map_or(Ok(2), |n| n.parse())?;
    // The main thread is one of the workers: handing every call to another thread costs more than a small op.
    rayon::ThreadPoolBuilder::new().num_threads(threads).use_current_thread().build_global()?;
    let mut rows = Vec::new();
    let mut row = |name: String, ms: f64| rows.push(format!("  \"{name}\": {ms:.4}"));
    let linears = [
        [1, 1024, 4096, 4096, 16],
        [32, 84, 192, 576, 8],
        [32, 84, 192, 1024, 8],
        [32, 84, 512, 192, 8],
        [1, 64, 768, 256, 8],
    ];
    for shape @ [b, m, k, n, r] in linears {
        let (with, without) = low_rank_linear_ms(shape)?;
        row(format!("low_rank_linear/b{b} m{m} k{k} n{n} r{r}"), with);
        row(format!("linear/b{b} m{m} k{k} n{n} r{r}"), without);
    }
    for shape @ [b, t, h, d] in [[32, 84, 3, 64], [16, 276, 3, 64], [1, 1024, 4, 64]] {
        let (forward, train) = attention_ms(shape)?;
        row(format!("attention/fwd b{b} t{t} h{h} d{d}"), forward);
        row(format!("attention/fwd+bwd b{b} t{t} h{h} d{d}"), train);
    }
    row("backbone/forward b32 64px".into(), backbone_ms(32, 64, None, false)?);
    row("backbone/forward b32 64px r8".into(), backbone_ms(32, 64, Some(8), false)?);
    row("backbone/forward b8 128px".into(), backbone_ms(8, 128, None, false)?);
    row("backbone/train step b32 64px".into(), backbone_ms(32, 64, None, true)?);
    let parameters = new_backbone()?.params.numel();
    let cases = rows.join(",\n");
    println!("{{\"threads\": {threads}, \"parameters\": {parameters}, \"ms\": {{\n{cases}\n}}}}");
    Ok(())
}
