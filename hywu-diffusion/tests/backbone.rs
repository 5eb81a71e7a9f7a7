//! The mini backbone and its samplers: shapes, what must hold bit for bit, and that training lowers the loss.

use hywu_diffusion::{
    Backbone, BackboneConfig, EditBatch, MiniDownstream, Picture, SampleOptions, edit_picture, flow_loss,
};
use hywu_kernels::{
    Downstream, LoraVar, LoraVars, Tape, Tensor, Var,
    optim::{Optimizer, Schedule},
    testing::random,
};
use std::ops::ControlFlow;

fn config() -> BackboneConfig {
    BackboneConfig {
        width: 64,
        layers: 2,
        head_dim: 32,
        mlp_hidden: 96,
        text_dim: 16,
        ..BackboneConfig::default()
    }
}

/// A backbone whose output is not just its input: every zero-initialised weight gets small random values.
fn backbone() -> Backbone {
    let mut backbone = Backbone::new(config(), random(1, &[50, 16]), 7).expect("a good config");
    for (i, (_, tensor)) in backbone.params.iter_mut().enumerate() {
        if tensor.data().iter().all(|&v| v == 0.0) {
            let noise = random(100 + i as u64, tensor.shape());
            tensor.data_mut().iter_mut().zip(noise.data()).for_each(|(t, n)| *t = 0.05 * n);
        }
    }
    backbone
}

fn ids(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| i * 7 % 50).collect()
}

fn picture(height: usize, width: usize) -> Picture {
    let rgb = random(5, &[height, width, 3]).data().iter().map(|v| (0.4 * v).clamp(-1.0, 1.0)).collect();
    Picture::from_rgb(height, width, rgb)
}

fn adapters(backbone: &Backbone, batch: usize, zero: bool) -> LoraVars {
    let spec = backbone.adapter_spec(4, 4.0);
    let mut vars = LoraVars::none();
    for layer in 0..spec.layers {
        for (i, m) in spec.modules.iter().enumerate() {
            let mut b = random((layer * 10 + i) as u64, &[batch, m.out_dim, 4]);
            b.data_mut().iter_mut().for_each(|v| *v *= if zero { 0.0 } else { 0.1 });
            let a = Var::constant(random((layer * 20 + i) as u64, &[batch, 4, m.in_dim]));
            vars.modules.insert(spec.module_name(layer, i), LoraVar { a, b: Var::constant(b), scale: 1.0 });
        }
    }
    vars
}

fn edit(backbone: &Backbone, picture: &Picture, adapters: &LoraVars, options: &SampleOptions) -> Picture {
    let ids = ids(backbone.config.text_len);
    let done =
        edit_picture(backbone, picture, &ids, adapters, options, &mut |_, _| ControlFlow::Continue(()));
    done.expect("a good call")
}

#[test]
fn pictures_of_any_size_keep_it() {
    let backbone = backbone();
    let options = SampleOptions { steps: 1, ..SampleOptions::default() };
    for (h, w) in [(1, 1), (3, 200), (64, 64), (70, 130)] {
        let out = edit(&backbone, &picture(h, w), &LoraVars::none(), &options);
        assert_eq!((out.height, out.width, out.rgb.len()), (h, w, h * w * 3));
        assert!(out.rgb.iter().all(|v| (-1.0..=1.0).contains(v)));
    }
}

#[test]
fn zero_lora_b_is_no_adapter_and_another_adapter_is_another_picture() {
    let backbone = backbone();
    let options = SampleOptions { steps: 2, ..SampleOptions::default() };
    let source = picture(70, 100);
    let base = edit(&backbone, &source, &LoraVars::none(), &options);
    assert_eq!(base.rgb, edit(&backbone, &source, &adapters(&backbone, 1, true), &options).rgb);
    assert_ne!(base.rgb, edit(&backbone, &source, &adapters(&backbone, 1, false), &options).rgb);
}

#[test]
fn tiles_at_once_and_threads_do_not_change_a_bit() {
    let backbone = backbone();
    let source = picture(100, 150);
    let run = |batch, threads| {
        let options = SampleOptions { steps: 2, batch, ..SampleOptions::default() };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        pool.install(|| edit(&backbone, &source, &LoraVars::none(), &options)).rgb
    };
    let first = run(16, 2);
    assert_eq!(first, run(1, 2));
    assert_eq!(first, run(5, 1));
}

#[test]
fn an_edit_can_be_stopped() {
    let (backbone, source) = (backbone(), picture(64, 64));
    let options = SampleOptions { steps: 50, ..SampleOptions::default() };
    let ids = ids(backbone.config.text_len);
    let stop = edit_picture(&backbone, &source, &ids, &LoraVars::none(), &options, &mut |step, _| {
        if step >= 1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!(stop.expect_err("stopped").to_string(), "interrupted");
}

fn batch(seed: u64, backbone: &Backbone) -> EditBatch {
    let (instances, crops) = (4, 2);
    let mut source = random(seed, &[8, 64, 64, 3]);
    source.data_mut().iter_mut().for_each(|v| *v = (0.4 * *v).clamp(-1.0, 1.0));
    let mut target = source.clone();
    target.data_mut().iter_mut().for_each(|v| *v = -*v);
    EditBatch {
        instances,
        crops,
        thumbnail: random(seed, &[4, 64, 64, 3]),
        detail: random(seed, &[4, 64, 64, 3]),
        text: ids(instances * backbone.config.text_len),
        source,
        target,
        position: Tensor::zeros(&[8, 64, 64, 2]),
        skills: vec![0; 4],
        seed,
    }
}

#[test]
fn thirty_steps_lower_the_loss() {
    let mut backbone = Backbone::new(config(), random(1, &[50, 16]), 7).expect("a good config");
    let schedule = Schedule { warmup: 3, total: 30, peak: 5e-3, floor: 1e-3 };
    let mut optimizer = Optimizer::new(&backbone.params, schedule, 0.0, 1.0, None);
    let mut losses = Vec::new();
    for step in 0..30 {
        let batch = batch(step % 3, &backbone);
        let tape = Tape::new();
        let bound = backbone.params.bind(&tape, true);
        let loss = flow_loss(&tape, &backbone, &bound, &batch, &LoraVars::none()).expect("a good batch");
        losses.push(loss.value().item().expect("a scalar"));
        let grads = bound.take_grads(&mut tape.backward(&loss).expect("a loss"));
        drop((bound, loss));
        optimizer.step(&mut backbone.params, &grads).expect("finite");
    }
    let mean = |part: &[f32]| part.iter().sum::<f32>() / part.len() as f32;
    assert!(mean(&losses[27..]) < 0.5 * mean(&losses[..3]), "{losses:?}");
}

#[test]
fn the_loss_reaches_the_adapters_and_the_frozen_weights_stay() {
    let downstream = MiniDownstream::new(backbone(), 4, 4.0).expect("a good rank");
    let before: Vec<u32> = downstream
        .backbone
        .params
        .iter()
        .flat_map(|(_, t)| t.data().iter().map(|v| v.to_bits()).collect::<Vec<_>>())
        .collect();
    let batch = batch(1, &downstream.backbone);
    let condition = downstream.condition(&batch).expect("a good batch");
    assert_eq!(condition.shape(), [4, 1, 2 * (64 + downstream.backbone.config.text_len), 64]);
    let tape = Tape::new();
    let mut vars = adapters(&downstream.backbone, 4, false);
    for lora in vars.modules.values_mut() {
        lora.a = tape.leaf(lora.a.value().clone());
        lora.b = tape.leaf(lora.b.value().clone());
    }
    let loss = downstream.loss(&tape, &batch, &vars).expect("a good batch");
    let grads = tape.backward(&loss).expect("a loss");
    for (name, lora) in &vars.modules {
        for var in [&lora.a, &lora.b] {
            assert!(grads.get(var).is_some_and(|g| g.data().iter().any(|&v| v != 0.0)), "{name}");
        }
    }
    let after: Vec<u32> = downstream
        .backbone
        .params
        .iter()
        .flat_map(|(_, t)| t.data().iter().map(|v| v.to_bits()).collect::<Vec<_>>())
        .collect();
    assert_eq!(before, after);
}
