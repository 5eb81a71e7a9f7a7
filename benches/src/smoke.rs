//! Every op once, forward and backward, at ragged shapes and in every dtype of the device: what compute-sanitizer looks at. Whether the
//! values are right is the tests' matter; here they only have to be finite.

use crate::{Result, attempt, backward, normal};
use hywu_core::{AdapterSpec, Dtype, Module};
use hywu_diffusion::{Backbone, BackboneConfig};
use hywu_kernels::{
    Device, LoraVar, LoraVars, ParamSet, Tape, Tensor, Var,
    ops::{
        attention::{Attention, Causal, Layout, QkNorm, Ragged, attention, rotary_table},
        elementwise::{
            add, add_row, cast, concat_channels, concat_tokens, gated_residual, mask_tokens, mean_tokens,
            repeat_each, scale, slice_channels, slice_tokens, standardise,
        },
        embedding::embedding,
        local_filter::{COEFFICIENTS, FEATURES, HIDDEN, local_filter, pixel_features},
        loss::{weighted_mse, weighted_sum},
        low_rank_linear::{
            Format, LowRankLinear, QuantizedWeight, Segment, Segments, low_rank_linear, merge,
        },
        parameter_tokens::{detokenise, repeat_batch, split_tokens, token_grid},
        patchify::{patchify, unpatchify},
        rms_norm::{Modulation, rms_norm},
        swiglu::{silu, swiglu},
    },
    optim::{Optimizer, Schedule},
};

/// Sizes beside the edges of tiles.
const EDGES: [usize; 4] = [1, 17, 65, 129];

struct Smoke<'a> {
    device: Device,
    dtype: Dtype,
    only: &'a str,
    ran: usize,
    failed: usize,
}

/// Runs everything whose name starts with `only`; says on standard error what failed, and returns how much that was.
pub fn run(device: Device, only: &str) -> usize {
    let dtypes: &[Dtype] = if device == Device::Cpu { &[Dtype::F32] } else { &[Dtype::Bf16, Dtype::F32] };
    let (mut ran, mut failed) = (0, 0);
    for &dtype in dtypes {
        let mut smoke = Smoke { device, dtype, only, ran: 0, failed: 0 };
        smoke.elementwise();
        smoke.norms_and_losses();
        smoke.linear();
        smoke.attention();
        smoke.pictures();
        smoke.generator();
        smoke.check("optim", |smoke| smoke.optimiser());
        smoke.check("backbone", |smoke| smoke.training_step());
        ran += smoke.ran;
        failed += smoke.failed;
    }
    eprintln!("smoke: {ran} checks on {device}, {failed} failed");
    failed
}

fn finite(what: &str, x: &Tensor) -> Result<()> {
    match x.to_host()?.data().iter().all(|v| v.is_finite()) {
        true => Ok(()),
        false => Err(format!("{what} {:?} is not finite", x.shape()).into()),
    }
}

impl Smoke<'_> {
    fn tensor(&self, seed: u64, shape: &[usize]) -> Result<Tensor> {
        Ok(normal(seed, shape, 1.0).to(self.device, self.dtype)?)
    }

    fn check(&mut self, name: &str, f: impl FnOnce(&Self) -> Result<()>) {
        if !name.starts_with(self.only) {
            return;
        }
        self.ran += 1;
        // A launch that failed comes out here, not at some later op.
        if let Err(e) = attempt(|| f(self).and_then(|()| Ok(self.device.synchronize()?))) {
            self.failed += 1;
            eprintln!("{name} in {:?}: {e}", self.dtype);
        }
    }

    /// An op with gradients of all its inputs, of these shapes.
    fn op(
        &mut self,
        name: &str,
        shapes: &[&[usize]],
        f: impl Fn(&Tape, &[Var]) -> hywu_kernels::Result<Var>,
    ) {
        self.check(name, |smoke| {
            let tape = Tape::new();
            let mut vars = Vec::new();
            for (seed, shape) in shapes.iter().enumerate() {
                vars.push(tape.leaf(smoke.tensor(seed as u64, shape)?));
            }
            let y = f(&tape, &vars)?;
            finite("the output", y.value())?;
            let grad = normal(99, y.shape(), 1.0).to_like(y.value())?;
            let mut grads = backward(tape, &y, &grad)?;
            for (i, var) in vars.iter().enumerate() {
                if let Some(grad) = grads.take(var) {
                    finite(&format!("the gradient of input {i}"), &grad)?;
                }
            }
            Ok(())
        });
    }

    fn elementwise(&mut self) {
        for n in EDGES {
            let (wide, row, gate): (&[_], &[_], &[_]) = (&[2, n, n + 2], &[n + 2], &[2, n + 2]);
            self.op("elementwise/add", &[wide, wide], |t, v| add(t, &v[0], &v[1]));
            self.op("elementwise/scale", &[wide], |t, v| scale(t, &v[0], 0.75));
            self.op("elementwise/gated_residual", &[wide, wide, gate], |t, v| {
                gated_residual(t, &v[0], &v[1], &v[2])
            });
            self.op("elementwise/add_row", &[wide, row], |t, v| add_row(t, &v[0], &v[1]));
            self.op("elementwise/concat_tokens", &[wide, &[2, 3, n + 2]], |t, v| {
                concat_tokens(t, &[&v[0], &v[1]])
            });
            self.op("elementwise/concat_channels", &[wide, &[2, n, 3]], |t, v| {
                concat_channels(t, &[&v[0], &v[1]])
            });
            self.op("elementwise/slice_tokens", &[wide], |t, v| slice_tokens(t, &v[0], n / 2, n - n / 2));
            self.op("elementwise/slice_channels", &[wide], |t, v| slice_channels(t, &v[0], 1, n));
            self.op("elementwise/repeat_each", &[wide], |t, v| repeat_each(t, &v[0], 3));
            self.op("elementwise/mask_tokens", &[wide], |t, v| mask_tokens(t, &v[0], &[n, n / 2]));
            self.op("elementwise/mean_tokens", &[wide], |t, v| mean_tokens(t, &v[0]));
            self.op("elementwise/cast", &[wide], |t, v| {
                cast(t, &v[0], Dtype::F32).and_then(|x| cast(t, &x, Dtype::Bf16))
            });
            self.check("elementwise/standardise", |s| {
                let (x, row) = (s.tensor(1, wide)?, s.tensor(2, row)?);
                finite("the output", &standardise(&x, &row, &row)?)
            });
        }
    }

    fn norms_and_losses(&mut self) {
        for n in EDGES {
            let (x, channels, batch): (&[_], &[_], &[_]) = (&[2, 3, n], &[n], &[2, n]);
            self.op("rms_norm/plain", &[x], |t, v| rms_norm(t, &v[0], None, 1e-6, None));
            self.op("rms_norm/modulated", &[x, channels, batch, batch], |t, v| {
                let modulation = Some(Modulation { scale: &v[2], shift: &v[3] });
                rms_norm(t, &v[0], Some(&v[1]), 1e-6, modulation)
            });
            self.op("swiglu/swiglu", &[&[2, 3, 2 * n]], |t, v| swiglu(t, &v[0]));
            self.op("swiglu/silu", &[x], |t, v| silu(t, &v[0]));
            for name in ["loss/weighted_mse", "loss/weighted_sum"] {
                self.check(name, |s| {
                    let tape = Tape::new();
                    let (x, target) = (tape.leaf(s.tensor(1, x)?), s.tensor(2, x)?);
                    let loss = match name {
                        "loss/weighted_mse" => weighted_mse(&tape, &x, &target, &[1.0, 0.5])?,
                        _ => weighted_sum(&tape, &x, &target)?,
                    };
                    finite("the loss", loss.value())?;
                    let grad = tape.backward(&loss)?.take(&x).ok_or("there is no gradient")?;
                    finite("the gradient", &grad)
                });
            }
        }
    }

    fn linear(&mut self) {
        // Rows of an entry, inner, outer, rank, adapters; also the widths of the bundled model.
        let shapes = [
            [1, 1, 1, 1, 2],
            [17, 65, 129, 3, 2],
            [65, 17, 65, 16, 1],
            [129, 129, 17, 17, 2],
            [84, 192, 576, 8, 2],
            [65, 136, 72, 24, 2],
        ];
        for [m, k, n, r, adapters] in shapes {
            let (x, w, b): (&[_], &[_], &[_]) = (&[2, m, k], &[n, k], &[n]);
            self.op("low_rank_linear/plain", &[x, w, b], |t, v| {
                low_rank_linear(t, &v[0], &v[1], Some(&v[2]), None)
            });
            let pair: [&[_]; 2] = [&[adapters, r, k], &[adapters, n, r]];
            self.op("low_rank_linear/adapters", &[x, w, b, pair[0], pair[1]], |t, v| {
                let lora = LoraVar { a: v[3].clone(), b: v[4].clone(), scale: 0.5 };
                low_rank_linear(t, &v[0], &v[1], Some(&v[2]), Some(&lora))
            });
            self.check("low_rank_linear/merge", |s| {
                let (w, a, b) = (s.tensor(1, w)?, s.tensor(2, &[1, r, k])?, s.tensor(3, &[1, n, r])?);
                finite("the merged weight", &merge(&w, &a, &b, 0.5)?)
            });
        }
        // Ragged segments of three experts, the columns in two parts.
        let segment = |rows, weight, adapter| Segment { rows, weight, adapter };
        let segments = [
            segment(17, 2, Some(1)),
            segment(65, 2, None),
            segment(300, 0, Some(3)),
            segment(1, 0, Some(0)),
            segment(129, 1, Some(2)),
        ];
        for [k, n, r] in [[65, 34, 7], [192, 576, 16]] {
            let x: &[usize] = &[512, k];
            self.op(
                "low_rank_linear/segments",
                &[x, &[3, n, k], &[3, n], &[4, 2 * r, k], &[4, n, r]],
                |t, v| {
                    let segments = Segments::new(&segments)?;
                    let lora = LoraVar { a: v[3].clone(), b: v[4].clone(), scale: 0.5 };
                    let (bias, lora, segments) = (Some(&v[2]), Some(&lora), Some(&segments));
                    let weight = (&v[1]).into();
                    LowRankLinear { x: &v[0], weight, bias, lora, segments, shrunk: None }.forward(t)
                },
            );
            let device = self.device;
            for format in [Format::Int8, Format::Fp8] {
                self.op("low_rank_linear/quantized", &[x, &[3, n], &[4, 2 * r, k], &[4, n, r]], |t, v| {
                    let weight =
                        QuantizedWeight::quantize(&normal(1, &[3, n, k], 1.0), format)?.to(device)?;
                    let segments = Segments::new(&segments)?;
                    let lora = LoraVar { a: v[2].clone(), b: v[3].clone(), scale: 0.5 };
                    let (bias, lora, segments) = (Some(&v[1]), Some(&lora), Some(&segments));
                    let weight = (&weight).into();
                    LowRankLinear { x: &v[0], weight, bias, lora, segments, shrunk: None }.forward(t)
                });
            }
        }
    }

    fn attention(&mut self) {
        for d in [64, 128, 24] {
            for tokens in EDGES {
                let heads = 2;
                let width = heads * d;
                let part = |i: usize, parts: usize| Layout {
                    offset: i * width,
                    batch: [tokens * parts * width, 0],
                    token: parts * width,
                    head: d,
                };
                let plain = Attention {
                    batch: [2, 1],
                    queries: tokens,
                    keys: tokens,
                    heads,
                    kv_heads: heads,
                    head_dim: d,
                    q: part(0, 3),
                    k: part(1, 3),
                    v: part(2, 3),
                    out: part(0, 1),
                    out_shape: vec![2, tokens, width],
                    key_lengths: None,
                    ragged: None,
                    causal: None,
                    rotary: None,
                };
                let qkv: &[usize] = &[2, tokens, 3 * width];
                self.op("attention/plain", &[qkv], |t, v| attention(t, &plain, &v[0], &v[0], &v[0], None));
                let device = self.device;
                self.op("attention/masked, rotated, normed", &[qkv, &[d], &[d]], |t, v| {
                    let positions: Vec<Vec<u32>> = (0..tokens as u32).map(|i| vec![i, i / 2]).collect();
                    let table = rotary_table(&positions, &[d / 2; 2])?.to(device)?;
                    let args = Attention {
                        key_lengths: Some(vec![tokens, tokens / 2]),
                        rotary: Some((table.clone(), table)),
                        ..plain.clone()
                    };
                    let norm = QkNorm { q: v[1].clone(), k: v[2].clone() };
                    attention(t, &args, &v[0], &v[0], &v[0], Some(&norm))
                });
                // Two entries of one projection [query heads | key | value]; a picture stands at the start of both.
                let (first, row) = (tokens.div_ceil(3), width + 2 * d);
                let part = |offset: usize, token: usize| Layout { offset, batch: [0, 0], token, head: d };
                let grouped = Attention {
                    queries: tokens + first,
                    keys: tokens + first,
                    kv_heads: 1,
                    q: part(0, row),
                    k: part(width, row),
                    v: part(width + d, row),
                    out: part(0, width),
                    out_shape: vec![tokens + first, width],
                    ragged: Some(Ragged {
                        queries: vec![0, first, tokens + first],
                        keys: vec![0, first, tokens + first],
                    }),
                    causal: Some(Causal { spans: vec![std::iter::once(0..first).collect()] }),
                    ..plain.clone()
                };
                self.op("attention/grouped, ragged, causal", &[&[tokens + first, row]], |t, v| {
                    attention(t, &grouped, &v[0], &v[0], &v[0], None)
                });
            }
        }
    }

    fn pictures(&mut self) {
        for [p, rows, columns] in [[1, 1, 17], [8, 3, 2], [4, 5, 1]] {
            let (h, w) = (p * rows, p * columns);
            self.op("patchify/patchify", &[&[2, h, w, 3]], |t, v| patchify(t, &v[0], p));
            self.op("patchify/unpatchify", &[&[2, rows * columns, 3 * p * p]], |t, v| {
                unpatchify(t, &v[0], p, h, w)
            });
            self.check("local_filter/features", |s| {
                let source = normal(1, &[2, h, w, 3], 1.0).to(s.device, Dtype::F32)?;
                finite("the output", &pixel_features(&source, p)?)
            });
            let (tokens, pixels) = (rows * columns, p * p);
            let features = self.tensor(1, &[2, tokens, pixels * FEATURES]);
            let shapes: [&[usize]; 2] = [&[2, tokens, COEFFICIENTS], &[2, tokens, pixels * HIDDEN]];
            if let Ok(features) = features {
                self.op("local_filter/filter", &shapes, |t, v| local_filter(t, &v[0], &features, &v[1]));
            }
        }
        for width in EDGES {
            // Rows that come up twice: their gradients add up.
            let ids = [3, 0, 3, 16, 1, 3];
            self.op("embedding", &[&[17, width]], |t, v| embedding(t, &v[0], &ids, &[2, 3]));
        }
    }

    fn generator(&mut self) {
        for c in EDGES {
            self.op("parameter_tokens/grid", &[&[6, c], &[4, c]], |t, v| token_grid(t, &v[0], &v[1], 2));
            let rows: &[usize] = &[2, 2, 5, 2, c];
            self.op("parameter_tokens/split", &[rows], |t, v| Ok(split_tokens(t, &v[0], 2)?.1));
            self.op("parameter_tokens/repeat", &[&[1, 3, c]], |t, v| repeat_batch(t, &v[0], 3));
            let module = Module { path: "m".into(), in_dim: c, out_dim: 3, experts: None };
            let spec = AdapterSpec {
                prefix: "layers.".into(),
                layers: 2,
                rank: 2,
                alpha: 2.0,
                modules: vec![module],
            };
            let (a, b) = (c.div_ceil(4), 1);
            self.op("parameter_tokens/cut", &[&[2, 2, a, 2, 4], &[2, 2, b, 2, 4]], |t, v| {
                let pairs = detokenise(t, &spec, &v[0], &v[1])?;
                let parts: Vec<&Var> = pairs.modules.values().map(|pair| &pair.a).collect();
                concat_tokens(t, &parts)
            });
        }
    }

    fn optimiser(&self) -> Result<()> {
        let mut params = ParamSet::new();
        let shapes: [&[usize]; 4] = [&[1], &[17, 65], &[129], &[65, 129]];
        for (i, shape) in shapes.iter().enumerate() {
            params.insert(format!("w{i}"), normal(i as u64, shape, 1.0));
        }
        let mut params = params.to_mixed(self.device, self.dtype)?;
        let schedule = Schedule { warmup: 1, total: 10, peak: 1e-3, floor: 1e-4 };
        let mut optimizer = Optimizer::new(&params, schedule, 0.01, 1.0, Some(0.99))?;
        for step in 0..2 {
            let grads: Result<Vec<Tensor>> = (shapes.iter().enumerate())
                .map(|(i, shape)| self.tensor(10 * step + i as u64, shape))
                .collect();
            optimizer.step(&mut params, &grads?)?;
        }
        optimizer.averaged(&params).iter().try_for_each(|(name, weight)| finite(name, weight))
    }

    /// One training step of a tiny backbone with an adapter for each instance.
    fn training_step(&self) -> Result<()> {
        let config = BackboneConfig {
            patch: 4,
            width: 24,
            layers: 1,
            head_dim: 8,
            mlp_hidden: 20,
            text_dim: 8,
            text_len: 5,
            text_layers: 1,
            detail_view: false,
            condition_pool: 1,
        };
        let (batch, h, w) = (2, 12, 20);
        let table = normal(1, &[20, config.text_dim], 1.0);
        let mut backbone = Backbone::new(config, table, 0)?.to(self.device, self.dtype)?;
        let picture =
            |seed, channels| normal(seed, &[batch, h, w, channels], 1.0).to(self.device, Dtype::F32);
        let (x_t, source, position, target) =
            (picture(2, 3)?, picture(3, 3)?, picture(4, 2)?, picture(5, 3)?);
        let tape = Tape::new();
        let mut adapters = LoraVars::none();
        let spec = backbone.adapter_spec(3, 3.0);
        for (i, m) in spec.modules.iter().enumerate() {
            let leaf = |seed, shape: &[usize]| {
                Ok::<_, Box<dyn std::error::Error>>(tape.leaf(self.tensor(seed, shape)?))
            };
            let (a, b) = (leaf(6, &[batch, 3, m.in_dim])?, leaf(7, &[batch, m.out_dim, 3])?);
            adapters.modules.insert(spec.module_name(0, i), LoraVar { a, b, scale: 1.0 });
        }
        let bound = backbone.params.bind(&tape, true)?;
        let text = backbone.text_tokens(&tape, &bound, &[1, 5, 7, 0, 0, 2, 3, 0, 0, 0], batch)?;
        let y = backbone.predict(&tape, &bound, &x_t, &source, &position, &[0.3, 0.9], &text, &adapters)?;
        finite("the prediction", y.value())?;
        let loss = weighted_mse(&tape, &y, &target, &[1.0, 1.0])?;
        let grads = bound.take_grads(&mut tape.backward(&loss)?)?;
        drop(bound);
        let schedule = Schedule { warmup: 1, total: 10, peak: 1e-3, floor: 1e-4 };
        let mut optimizer = Optimizer::new(&backbone.params, schedule, 0.01, 1.0, Some(0.99))?;
        optimizer.step(&mut backbone.params, &grads)?;
        backbone.params.iter().try_for_each(|(name, weight)| finite(name, weight))
    }
}
