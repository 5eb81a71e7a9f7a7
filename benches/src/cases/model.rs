//! Calls of the backbone and whole training steps.

use super::{Case, Floor, low_rank::lora};
use crate::{
    Result, normal,
    timing::{Bench, Times},
};
use hywu_core::Dtype;
use hywu_diffusion::{Backbone, BackboneConfig};
use hywu_kernels::{
    LoraVars, Tape, Tensor,
    ops::{
        local_filter::{COEFFICIENTS, FEATURES, HIDDEN},
        loss::weighted_mse,
    },
    optim::{Optimizer, Schedule},
};

pub fn cases(cuda: bool, quick: bool, bytes: f64) -> Vec<Case> {
    let shape = |batch, size, rank, train| Shape { batch, size, rank, train, graph: false };
    let graph = |shape| Shape { graph: true, ..shape };
    let mut cases = vec![
        ("backbone/forward b32 64px", shape(32, 64, None, false)),
        ("backbone/forward b32 64px r8", shape(32, 64, Some(8), false)),
        ("backbone/forward b8 128px", shape(8, 128, None, false)),
        ("backbone/train step b32 64px", shape(32, 64, None, true)),
        ("backbone/train step b32 64px graph", graph(shape(32, 64, None, true))),
    ];
    if quick {
        cases = vec![
            ("backbone/forward b1 64px r8", shape(1, 64, Some(8), false)),
            ("backbone/train step b1 64px", shape(1, 64, None, true)),
            ("backbone/train step b1 64px graph", graph(shape(1, 64, None, true))),
        ];
    }
    // The CPU has no graphs.
    cases.retain(|(_, s)| cuda || !s.graph);
    cases.into_iter().map(|(name, s)| Case::new(name, s.floor(bytes), move |b, f| s.run(b, f))).collect()
}

fn new_backbone() -> Result<Backbone> {
    Ok(Backbone::new(BackboneConfig::default(), normal(1, &[1000, 64], 1.0), 0)?)
}

/// Number of weights of the backbone: both sides of a comparison must agree on it.
///
/// # Errors
/// None in practice.
pub fn parameters() -> Result<usize> {
    Ok(new_backbone()?.params.numel())
}

/// `batch` tiles of `size` pixels, with adapters of that rank per tile; a forward pass or a training step.
#[derive(Clone, Copy)]
struct Shape {
    batch: usize,
    size: usize,
    rank: Option<usize>,
    train: bool,
    /// Launched as a whole.
    graph: bool,
}

/// Inputs of a call, in f32 as a sampler or a loader has them.
struct Pictures {
    x_t: Tensor,
    source: Tensor,
    position: Tensor,
    target: Tensor,
}

impl Shape {
    fn floor(self, bytes: f64) -> Floor {
        let c = BackboneConfig::default();
        let (w, h, text, p2) = (c.width, c.mlp_hidden, c.text_len, c.patch * c.patch);
        let image = self.size * self.size / p2;
        let block = |tokens: usize| 2 * tokens * (4 * w * w + 3 * h * w) + 4 * tokens * tokens * w;
        let ends = image * w * (8 * p2 + 3 * p2 + COEFFICIENTS) + text * c.text_dim * w + 10 * w * w;
        let filter = image * p2 * (FEATURES * HIDDEN + 3 * (FEATURES + HIDDEN));
        // Inner and outer sides of the four projections.
        let adapters = self.rank.unwrap_or(0) * c.layers * (8 * w + 3 * h);
        let entry = c.layers * block(image + text) + c.text_layers * block(text) + 2 * (ends + filter);
        let forward = (self.batch * (entry + 2 * (image + text) * adapters)) as f64;
        let weights = parameters().unwrap_or(0) as f64;
        let pictures = 4 * 11 * self.batch * self.size * self.size;
        let moved = pictures as f64 + bytes * (weights + (self.batch * adapters) as f64);
        match self.train {
            false => Floor { bytes: moved, flops: forward },
            // Gradients once, weights and both moments in and out in f32.
            true => Floor { bytes: moved + weights * (bytes + 24.0), flops: 3.0 * forward },
        }
    }

    fn pictures(self, bench: &Bench, copy: u64) -> Result<Pictures> {
        let picture = |seed, channels| {
            let shape = [self.batch, self.size, self.size, channels];
            normal(8 * copy + seed, &shape, 1.0).to(bench.device, Dtype::F32)
        };
        let (x_t, source, position) = (picture(2, 3)?, picture(3, 3)?, picture(4, 2)?);
        Ok(Pictures { x_t, source, position, target: picture(5, 3)? })
    }

    fn adapters(self, bench: &Bench, backbone: &Backbone) -> Result<LoraVars> {
        let mut adapters = LoraVars::none();
        let Some(rank) = self.rank else { return Ok(adapters) };
        let spec = backbone.adapter_spec(rank, rank as f32);
        for layer in 0..spec.layers {
            for (i, m) in spec.modules.iter().enumerate() {
                let pair = lora(bench, 0, [self.batch, rank, m.in_dim, m.out_dim], 1.0)?;
                adapters.modules.insert(spec.module_name(layer, i), pair);
            }
        }
        Ok(adapters)
    }

    fn run(self, bench: &Bench, floor: Floor) -> Result<Times> {
        let batch = self.batch;
        let mut backbone = new_backbone()?.to(bench.device, bench.dtype())?;
        let ids: Vec<u32> = (0..batch * backbone.config.text_len).map(|i| (i * 37 % 1000) as u32).collect();
        let t: Vec<f32> = (0..batch).map(|i| i as f32 / batch as f32).collect();
        let adapters = self.adapters(bench, &backbone)?;
        let pictures = |copy| self.pictures(bench, copy);
        if !self.train {
            let tape = Tape::inference();
            let bound = backbone.params.bind(&tape, false)?;
            return bench.time(2.0, floor.bytes, pictures, |i: &Pictures| {
                let text = backbone.text_tokens(&tape, &bound, &ids, batch)?;
                let args = (&i.x_t, &i.source, &i.position);
                Ok(backbone.predict(&tape, &bound, args.0, args.1, args.2, &t, &text, &adapters)?)
            });
        }
        let schedule = Schedule { warmup: 10, total: 1000, peak: 1e-3, floor: 1e-4 };
        let mut optimizer = Optimizer::new(&backbone.params, schedule, 0.01, 1.0, None)?;
        let mut replay = self.graph.then(|| bench.device.replay());
        let mut step = |i: &Pictures| -> Result<_> {
            let tape = Tape::new();
            let bound = backbone.params.bind(&tape, true)?;
            let text = backbone.text_tokens(&tape, &bound, &ids, batch)?;
            let args = (&i.x_t, &i.source, &i.position);
            let y = backbone.predict(&tape, &bound, args.0, args.1, args.2, &t, &text, &adapters)?;
            let loss = weighted_mse(&tape, &y, &i.target, &vec![1.0; batch])?;
            let grads = bound.take_grads(&mut tape.backward(&loss)?)?;
            drop(bound);
            Ok(optimizer.step(&mut backbone.params, &grads)?)
        };
        bench.time(4.0, floor.bytes, pictures, |i: &Pictures| match &mut replay {
            Some(replay) => replay.run(|| step(i)),
            None => step(i),
        })
    }
}
