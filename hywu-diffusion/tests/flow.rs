//! The flow-matching loss: its parts, its gradients, and that training lowers it.

mod common;

use common::{adapters, backbone, batch, fresh, trainable};
use hywu_diffusion::{Backbone, EditBatch, MiniDownstream, Noised, flow_loss};
use hywu_kernels::{
    Bound, Downstream, LoraVars, ParamSet, Tape, Tensor, Var,
    optim::{Optimizer, Schedule},
    testing::random,
};

#[test]
fn noise_mixes_with_the_target_as_t_says() {
    let target = random(3, &[2000, 4]);
    let Noised { x_t, t, weight } = Noised::draw(&target, 9).unwrap();
    // 0.5 * E sigmoid(N(-0.8, 1)) = 0.1699; the noise that x_t implies is standard normal.
    let mean = t.iter().sum::<f32>() / t.len() as f32;
    assert!((mean - 0.1699).abs() < 0.02, "{mean}");
    let starts = t.iter().filter(|t| **t == 0.0).count();
    assert!((920..1080).contains(&starts), "{starts}");
    let mut square = 0.0;
    for b in 0..2000 {
        assert!((0.0..1.0).contains(&t[b]));
        assert!((weight[b] - 1.0 / (1.0 - t[b]).max(0.5).powi(2)).abs() < 1e-4 * weight[b]);
        for i in 4 * b..4 * b + 4 {
            let noise = f64::from((x_t.data()[i] - t[b] * target.data()[i]) / (1.0 - t[b]));
            square += noise * noise;
        }
    }
    assert!((square / 8000.0 - 1.0).abs() < 0.1, "{square}");
    assert_eq!(x_t.data(), Noised::draw(&target, 9).unwrap().x_t.data());
    assert_ne!(x_t.data(), Noised::draw(&target, 10).unwrap().x_t.data());
    // A member's draw does not depend on how many follow.
    let first = Tensor::new(&[1, 4], target.data()[..4].to_vec()).unwrap();
    assert_eq!(Noised::draw(&first, 9).unwrap().x_t.data(), &x_t.data()[..4]);
}

#[test]
fn the_loss_of_the_identity_is_known() {
    let backbone = fresh();
    let batch = batch(&backbone, 4);
    let tape = Tape::inference();
    let bound = backbone.params.bind(&tape, false).expect("on the CPU");
    let loss =
        flow_loss(&tape, &backbone, &bound, &batch, &LoraVars::none()).unwrap().value().item().unwrap();
    let weight = Noised::draw(&batch.target, batch.seed).unwrap().weight;
    let size = batch.source.numel() / weight.len();
    let error = |b: usize| {
        let pairs = batch.source.data().iter().zip(batch.target.data()).skip(b * size).take(size);
        pairs.map(|(s, t)| f64::from(s - t).powi(2)).sum::<f64>() / size as f64
    };
    let expected: f64 =
        (0..weight.len()).map(|b| f64::from(weight[b]) * error(b) / (error(b) + 0.02).sqrt()).sum::<f64>()
            / weight.len() as f64;
    assert!((f64::from(loss) - expected).abs() < 1e-5 * expected, "{loss} {expected}");
}

/// The loss with everything a constant.
fn loss(backbone: &Backbone, params: &ParamSet, batch: &EditBatch, lora: &LoraVars) -> f64 {
    let tape = Tape::inference();
    let bound = params.bind(&tape, false).expect("on the CPU");
    flow_loss(&tape, backbone, &bound, batch, lora).unwrap().value().item().unwrap().into()
}

/// Compares |g| over a random half of a weight's elements with the loss's own slope in that direction.
fn check_slope(name: &str, value: &Tensor, grad: &Tensor, at: impl Fn(Tensor) -> f64) {
    let mask = random(77, value.shape());
    let direction: Vec<f32> =
        grad.data().iter().zip(mask.data()).map(|(&g, &m)| if m > 0.0 { g } else { 0.0 }).collect();
    let square: f64 = direction.iter().map(|&g| f64::from(g).powi(2)).sum();
    assert!(square > 0.0, "{name}: no gradient");
    // The loss is f32: a step that moves it by about a percent stands clear of rounding.
    let h = 0.01 / square;
    let moved = |h: f64| {
        let data = value.data().iter().zip(&direction).map(|(v, d)| v + h as f32 * d).collect();
        at(Tensor::new(value.shape(), data).unwrap())
    };
    let slope = (moved(h) - moved(-h)) / (2.0 * h);
    assert!((slope / square - 1.0).abs() < 0.02, "{name}: slope {slope}, gradient says {square}");
}

#[test]
fn gradients_agree_with_differences() {
    let backbone = backbone();
    let batch = batch(&backbone, 5);
    let lora = adapters(&backbone, 4, 0.1);
    let tape = Tape::new();
    let bound: Bound = backbone.params.bind(&tape, true).expect("on the CPU");
    let vars = trainable(&tape, &lora);
    let out = flow_loss(&tape, &backbone, &bound, &batch, &vars).unwrap();
    let grads = tape.backward(&out).unwrap();
    for (name, value) in backbone.params.iter() {
        if name.starts_with("condition.") {
            assert!(grads.get(bound.get(name).unwrap()).is_none(), "{name} is calibrated, not trained");
            continue;
        }
        // The large ones of both towers, and one of every kind.
        if name.contains("layers.1") || !name.contains("layers") {
            let grad = grads.get(bound.get(name).unwrap()).unwrap();
            check_slope(name, value, grad, |moved| {
                let mut params = backbone.params.clone();
                params.insert(name, moved);
                loss(&backbone, &params, &batch, &lora)
            });
        }
    }
    for (name, pair) in &vars.modules {
        let with = |name: &str, a: Option<Tensor>, b: Option<Tensor>| {
            let mut lora = lora.clone();
            let pair = &mut lora.modules[name];
            pair.a = a.map_or_else(|| pair.a.clone(), Var::constant);
            pair.b = b.map_or_else(|| pair.b.clone(), Var::constant);
            loss(&backbone, &backbone.params, &batch, &lora)
        };
        let (a, b) = (grads.get(&pair.a).unwrap(), grads.get(&pair.b).unwrap());
        check_slope(&format!("{name}.lora_a"), pair.a.value(), a, |moved| with(name, Some(moved), None));
        check_slope(&format!("{name}.lora_b"), pair.b.value(), b, |moved| with(name, None, Some(moved)));
    }
}

fn bits(params: &ParamSet) -> Vec<u32> {
    params.iter().flat_map(|(_, t)| t.data().iter().map(|v| v.to_bits())).collect()
}

#[test]
fn training_adapters_reaches_them_alone() {
    let downstream = MiniDownstream::new(backbone(), 4, 8.0).unwrap();
    let backbone = &downstream.backbone;
    let before = bits(&backbone.params);
    let batch = batch(backbone, 1);
    assert_eq!(downstream.condition(&batch).unwrap().shape(), [4, 1, 2 * (64 + 20), 64]);
    assert_eq!(downstream.adapter_spec(), &backbone.adapter_spec(4, 8.0));
    // Gradient descent on the pairs alone lowers the loss of a fixed batch.
    let mut lora = adapters(backbone, 4, 0.0);
    let mut losses = Vec::new();
    for _ in 0..8 {
        let tape = Tape::new();
        let vars = trainable(&tape, &lora);
        let out = downstream.loss(&tape, &batch, &vars).unwrap();
        losses.push(out.value().item().unwrap());
        let grads = tape.backward(&out).unwrap();
        for (pair, var) in lora.modules.values_mut().zip(vars.modules.values()) {
            let step = |x: &Var, var: &Var| {
                let g = grads.get(var).unwrap();
                let data = x.value().data().iter().zip(g.data()).map(|(x, g)| x - g).collect();
                Var::constant(Tensor::new(x.shape(), data).unwrap())
            };
            (pair.a, pair.b) = (step(&pair.a, &var.a), step(&pair.b, &var.b));
        }
    }
    assert!(losses[7] < 0.99 * losses[0], "{losses:?}");
    assert_eq!(before, bits(&backbone.params));
    // Without adapters that want a gradient the frozen backbone leaves nothing to differentiate.
    let tape = Tape::new();
    let out = downstream.loss(&tape, &batch, &lora).unwrap();
    assert!(!out.requires_grad());
    assert!(MiniDownstream::new(fresh(), 0, 1.0).is_err());
}

#[test]
fn thirty_steps_lower_the_loss() {
    let mut backbone = fresh();
    let schedule = Schedule { warmup: 3, total: 30, peak: 5e-3, floor: 1e-3 };
    let mut optimizer = Optimizer::new(&backbone.params, schedule, 0.0, 1.0, None).expect("on the CPU");
    let mut losses = Vec::new();
    for step in 0..30 {
        let batch = batch(&backbone, step % 3);
        let tape = Tape::new();
        let bound = backbone.params.bind(&tape, true).expect("on the CPU");
        let loss = flow_loss(&tape, &backbone, &bound, &batch, &LoraVars::none()).unwrap();
        losses.push(loss.value().item().unwrap());
        let grads = bound.take_grads(&mut tape.backward(&loss).unwrap()).expect("on the CPU");
        drop((bound, loss));
        optimizer.step(&mut backbone.params, &grads).unwrap();
    }
    let mean = |part: &[f32]| part.iter().sum::<f32>() / part.len() as f32;
    assert!(mean(&losses[27..]) < 0.5 * mean(&losses[..3]), "{losses:?}");
}

/// The loss of `student` on a lesson of `teacher`, whose adapters are those of the instances that rehearse.
fn lesson_loss(
    downstream: &MiniDownstream,
    batch: &EditBatch,
    teacher: &LoraVars,
    weight: f32,
    student: &LoraVars,
) -> f32 {
    let lesson = downstream.lesson(batch, teacher, weight).expect("adapters that fit");
    let loss = downstream.lesson_loss(&Tape::inference(), &lesson, student).expect("adapters that fit");
    loss.value().item().expect("a scalar")
}

#[test]
fn who_equals_his_teacher_has_nothing_to_learn() {
    let downstream = MiniDownstream::new(backbone(), 4, 4.0).unwrap();
    let new = batch(&downstream.backbone, 6);
    let old = EditBatch { rehearsed: 4, target: new.source.clone(), ..new.clone() };
    let [teacher, other] = [0.1, 0.11].map(|factor| adapters(&downstream.backbone, 4, factor));
    assert_eq!(lesson_loss(&downstream, &old, &teacher, 1.0, &teacher), 0.0);
    let loss = lesson_loss(&downstream, &old, &teacher, 1.0, &other);
    assert!(loss > 0.0);
    let twice = lesson_loss(&downstream, &old, &teacher, 2.0, &other);
    assert!((twice - 2.0 * loss).abs() < 1e-5 * twice, "{loss} {twice}");
    // The placeholder is never looked at.
    let placeholder = EditBatch { target: new.target.clone(), ..old };
    assert_eq!(lesson_loss(&downstream, &placeholder, &teacher, 1.0, &other), loss);
    // Without a rehearsal it is the training loss.
    let plain = downstream.loss(&Tape::inference(), &new, &other).unwrap().value().item().unwrap();
    assert_eq!(lesson_loss(&downstream, &new, &LoraVars::none(), 1.0, &other), plain);
    // Half and half: what the second half has to learn is what it had to learn before.
    let half = EditBatch { rehearsed: 2, ..new.clone() };
    let two = |vars: &LoraVars| {
        let mut vars = vars.clone();
        for pair in vars.modules.values_mut() {
            for x in [&mut pair.a, &mut pair.b] {
                let mut shape = x.shape().to_vec();
                shape[0] = 2;
                let size = shape.iter().product();
                *x = Var::constant(Tensor::new(&shape, x.value().data()[..size].to_vec()).unwrap());
            }
        }
        vars
    };
    let first = new.first(2).unwrap();
    let own = lesson_loss(&downstream, &half, &two(&teacher), 0.0, &other);
    let first = downstream.loss(&Tape::inference(), &first, &two(&other)).unwrap().value().item().unwrap();
    assert!((own - (plain - 0.5 * first)).abs() < 1e-5 * plain, "{own} {plain} {first}");
}
