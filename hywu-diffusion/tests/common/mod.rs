//! What the backbone's tests share: a small backbone that does something, and inputs for it.

#![allow(dead_code, reason = "every test file uses a part")]

use hywu_diffusion::{Backbone, BackboneConfig, EditBatch, Picture, sizes_of_edits};
use hywu_kernels::{LoraVar, LoraVars, Tape, Tensor, Var, testing::random};

pub const VOCABULARY: usize = 50;

pub fn config() -> BackboneConfig {
    BackboneConfig {
        width: 64,
        layers: 2,
        head_dim: 32,
        mlp_hidden: 96,
        text_dim: 16,
        ..BackboneConfig::default()
    }
}

/// As it starts: the identity.
pub fn fresh() -> Backbone {
    Backbone::new(config(), random(1, &[VOCABULARY, 16]), 7).unwrap()
}

/// A backbone whose output is not just its input: every zero-initialised weight gets small random values.
pub fn backbone() -> Backbone {
    let mut backbone = fresh();
    for (i, (_, tensor)) in backbone.params.iter_mut().enumerate() {
        if tensor.data().iter().all(|&v| v == 0.0) {
            *tensor = scaled(100 + i as u64, tensor.shape(), 0.05);
        }
    }
    backbone
}

pub fn scaled(seed: u64, shape: &[usize], factor: f32) -> Tensor {
    let mut x = random(seed, shape);
    x.data_mut().iter_mut().for_each(|v| *v *= factor);
    x
}

pub fn ids(n: usize) -> Vec<u32> {
    (0..n).map(|i| (i * 7 % VOCABULARY) as u32).collect()
}

pub fn picture(height: usize, width: usize) -> Picture {
    let mut rgb = scaled(5, &[height, width, 3], 0.4);
    rgb.data_mut().iter_mut().for_each(|v| *v = v.clamp(-1.0, 1.0));
    Picture::from_rgb(height, width, rgb.data().to_vec())
}

/// Adapters of rank 4 for `instances`, lora_b times `factor`.
pub fn adapters(backbone: &Backbone, instances: usize, factor: f32) -> LoraVars {
    let spec = backbone.adapter_spec(4, 4.0);
    let mut vars = LoraVars::none();
    for (i, name) in spec.module_names().enumerate() {
        let m = &spec.modules[i % spec.modules.len()];
        let a = scaled(200 + i as u64, &[instances, 4, m.in_dim], 0.2);
        let b = scaled(300 + i as u64, &[instances, m.out_dim, 4], factor);
        vars.modules.insert(name, LoraVar { a: Var::constant(a), b: Var::constant(b), scale: spec.scale() });
    }
    vars
}

/// The same adapters as variables of a tape.
pub fn trainable(tape: &Tape, adapters: &LoraVars) -> LoraVars {
    let mut vars = adapters.clone();
    for pair in vars.modules.values_mut() {
        pair.a = tape.leaf(pair.a.value().clone());
        pair.b = tape.leaf(pair.b.value().clone());
    }
    vars
}

/// Inputs of `predict` without the text.
pub struct Inputs {
    pub x_t: Tensor,
    pub source: Tensor,
    pub position: Tensor,
    pub t: Vec<f32>,
}

pub fn inputs(batch: usize, height: usize, width: usize) -> Inputs {
    Inputs {
        x_t: random(11, &[batch, height, width, 3]),
        source: scaled(12, &[batch, height, width, 3], 0.4),
        position: scaled(13, &[batch, height, width, 2], 0.5),
        t: (0..batch).map(|b| (b as f32 + 0.3) / (batch as f32 + 0.5)).collect(),
    }
}

/// One prediction without a tape, text of `instances`.
pub fn predict(backbone: &Backbone, x: &Inputs, instances: usize, adapters: &LoraVars) -> Tensor {
    let tape = Tape::inference();
    let bound = backbone.params.bind(&tape, false).expect("on the CPU");
    let ids = ids(instances * backbone.config.text_len);
    let text = backbone.text_tokens(&tape, &bound, &ids, instances).unwrap();
    let Inputs { x_t, source, position, t } = x;
    backbone.predict(&tape, &bound, x_t, source, position, t, &text, adapters).unwrap().value().clone()
}

/// Four instances of two crops each; the edit inverts.
pub fn batch(backbone: &Backbone, seed: u64) -> EditBatch {
    let (instances, crops) = (4, 2);
    let shape = [instances * crops, 16, 24];
    let with = |channels: usize| [shape.as_slice(), &[channels]].concat();
    let source = scaled(seed, &with(3), 0.4);
    let mut target = source.clone();
    target.data_mut().iter_mut().for_each(|v| *v = -*v);
    EditBatch {
        instances,
        crops,
        thumbnail: scaled(seed + 1, &[instances, 64, 64, 3], 0.4),
        detail: scaled(seed + 2, &[instances, 64, 64, 3], 0.4),
        text: ids(instances * backbone.config.text_len),
        edits: sizes_of_edits(&source, &target),
        source,
        target,
        position: scaled(seed + 3, &with(2), 0.5),
        skills: vec![0; instances],
        rehearsed: 0,
        seed,
    }
}
