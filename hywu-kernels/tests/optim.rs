//! The optimiser: one step by hand, a minimum found, a run resumed bit for bit.

use hywu_core::{Checkpoint, Dtype, TensorWriter};
use hywu_kernels::{
    Device, ParamSet, Tape, Tensor,
    ops::{
        elementwise::{add, cast},
        loss::weighted_mse,
    },
    optim::{Optimizer, Schedule, clip_factor, grad_norm},
    testing::{Place, assert_close, for_each_place, random, widen},
};

fn set(place: Place, values: &[f32]) -> ParamSet {
    let mut set = ParamSet::new();
    set.insert("w", Tensor::new(&[1, values.len()], values.to_vec()).expect("one row"));
    set.insert("b", Tensor::zeros(&[3]));
    set.to_mixed(place.device, place.dtype).expect("the device works")
}

fn host(set: &ParamSet) -> ParamSet {
    set.to(Device::Cpu, Dtype::F32).expect("the device works")
}

fn numbers(set: &ParamSet, name: &str) -> Vec<f32> {
    host(set).get(name).expect("there").data().to_vec()
}

fn optimizer(set: &ParamSet) -> Optimizer {
    Optimizer::new(set, Schedule { warmup: 5, total: 400, peak: 0.05, floor: 0.001 }, 0.0, 1.0, Some(0.9))
        .expect("enough memory")
}

/// Gradients of |w - 1|^2 + |b|^2.
fn grads(place: Place, set: &ParamSet) -> Vec<Tensor> {
    let grad = |(name, t): (&str, &Tensor)| {
        let goal = if name == "w" { 1.0 } else { 0.0 };
        place.tensor(&Tensor::build(t.shape(), |out| {
            out.iter_mut().zip(t.data()).for_each(|(o, x)| *o = 2.0 * (x - goal));
        }))
    };
    host(set).iter().map(grad).collect()
}

#[test]
fn the_first_step_follows_the_formula() {
    for_each_place(|place| {
        let mut params = set(place, &[2.0, -4.0]);
        let schedule = Schedule { warmup: 0, total: 10, peak: 0.01, floor: 0.01 };
        let mut optimizer = Optimizer::new(&params, schedule, 0.1, 100.0, None).expect("enough memory");
        let g = [Tensor::new(&[1, 2], vec![0.5, -3.0]).expect("one row"), Tensor::zeros(&[3])];
        optimizer.step(&mut params, &g.map(|g| place.tensor(&g))).expect("it fits");
        // After bias correction the first step is lr * sign(g), and the decay multiplies by 1 - lr * wd.
        let w = numbers(&params, "w");
        assert!((w[0] - (2.0 * 0.999 - 0.01)).abs() < 1e-6, "{w:?}");
        assert!((w[1] - (-4.0 * 0.999 + 0.01)).abs() < 1e-6, "{w:?}");
    });
}

/// Weights of more than one parallel task, and of ragged sizes: clipping, moments, decay, correction of the bias and average as a plain
/// loop has them.
#[test]
fn many_weights_follow_the_formulas() {
    for_each_place(many_weights);
}

fn many_weights(place: Place) {
    const STEPS: u64 = 4;
    let shapes = [&[3, 7001][..], &[20_011], &[5, 1]];
    let mut params = ParamSet::new();
    for (i, shape) in shapes.into_iter().enumerate() {
        params.insert(i.to_string(), random(i as u64, shape));
    }
    let start: Vec<Vec<f64>> = params.iter().map(|(_, p)| widen(p)).collect();
    let mut params = params.to_mixed(place.device, place.dtype).expect("the device works");
    let schedule = Schedule { warmup: 2, total: 10, peak: 0.05, floor: 0.001 };
    let mut optimizer = Optimizer::new(&params, schedule, 0.1, 1.5, Some(0.3)).expect("enough memory");
    let (mut weights, mut average) = (start.clone(), start.clone());
    let mut moments: Vec<Vec<[f64; 2]>> = start.iter().map(|p| vec![[0.0; 2]; p.len()]).collect();
    let [beta1, beta2] = [optimizer.adamw.beta1, optimizer.adamw.beta2].map(f64::from);
    for step in 0..STEPS {
        let grad = |(i, s): (usize, &&[usize])| place.tensor(&random(10 + 3 * step + i as u64, s));
        let grads: Vec<Tensor> = shapes.iter().enumerate().map(grad).collect();
        optimizer.step(&mut params, &grads).expect("finite");
        let lr = f64::from(schedule.lr(step));
        let square: f64 = grads.iter().flat_map(widen).map(|g| g * g).sum();
        let clip = 1.5 / square.sqrt();
        let n = (step + 1) as f64;
        let [correct1, correct2] = [beta1, beta2].map(|b| 1.0 - b.powf(n));
        let ema = f64::from(0.3f32).min((1.0 + n) / (10.0 + n));
        for (i, grad) in grads.iter().enumerate() {
            let decay = if shapes[i].len() == 2 { 1.0 - lr * 0.1 } else { 1.0 };
            for (j, g) in widen(grad).into_iter().enumerate() {
                let (w, e, [m, v]) = (&mut weights[i][j], &mut average[i][j], &mut moments[i][j]);
                let g = g * clip;
                *m = beta1 * *m + (1.0 - beta1) * g;
                *v = beta2 * *v + (1.0 - beta2) * g * g;
                *w = *w * decay - lr * (*m / correct1) / ((*v / correct2).sqrt() + 1e-8);
                *e += (1.0 - ema) * (*w - *e);
            }
        }
    }
    // What changed, not the weights, whose size would hide a wrong step.
    let change = |set: &ParamSet| -> Vec<f32> {
        let set = host(set);
        let all = set.iter().zip(&start);
        all.flat_map(|((_, p), s)| widen(p).into_iter().zip(s).map(|(p, s)| (p - s) as f32)).collect()
    };
    let expected = |after: &[Vec<f64>]| -> Vec<f64> {
        let all = after.iter().flatten().zip(start.iter().flatten());
        all.map(|(p, s)| p - s).collect()
    };
    assert_close(&change(&params), &expected(&weights), 1e-5);
    assert_close(&change(optimizer.averaged(&params)), &expected(&average), 1e-5);
    let moment = |k: usize| moments.iter().flatten().map(|m| m[k]).collect::<Vec<f64>>();
    let [m, v] = optimizer.adamw.moments(&params).expect("the device works");
    assert_close(&m, &moment(0), 1e-5);
    assert_close(&v, &moment(1), 1e-5);
    assert_eq!(optimizer.adamw.step, STEPS);
}

#[test]
fn what_is_frozen_stays_to_the_bit() {
    for_each_place(|place| {
        let mut params = ParamSet::new();
        for (i, name) in ["kept", "trained"].into_iter().enumerate() {
            params.insert(name, random(i as u64, &[3, 7]));
        }
        let start = params.clone();
        params.freeze(|name| name == "kept");
        let mut params = params.to_mixed(place.device, place.dtype).expect("the device works");
        let schedule = Schedule { warmup: 0, total: 10, peak: 0.05, floor: 0.05 };
        let mut optimizer = Optimizer::new(&params, schedule, 0.1, 1.0, Some(0.3)).expect("enough memory");
        for _ in 0..3 {
            let tape = Tape::new();
            let bound = params.bind(&tape, true).expect("it fits");
            let [kept, trained] = ["kept", "trained"].map(|name| bound.get(name).expect("there"));
            let sum = add(&tape, kept, trained).expect("of one shape");
            let sum = cast(&tape, &sum, Dtype::F32).expect("it fits");
            let goal = Tensor::zeros(&[3, 7]).to(place.device, Dtype::F32).expect("the device works");
            let loss = weighted_mse(&tape, &sum, &goal, &[1.0; 3]).expect("of one shape");
            let grads = bound.take_grads(&mut tape.backward(&loss).expect("it runs")).expect("it fits");
            drop(bound);
            optimizer.step(&mut params, &grads).expect("finite");
        }
        for set in [&params, optimizer.averaged(&params)] {
            assert_eq!(numbers(set, "kept"), start.get("kept").expect("there").data());
            assert_ne!(numbers(set, "trained"), start.get("trained").expect("there").data());
        }
    });
}

#[test]
fn a_minimum_is_found() {
    for_each_place(|place| {
        let mut params = set(place, &[3.0, -2.0, 0.5]);
        let mut optimizer = optimizer(&params);
        for _ in 0..400 {
            let g = grads(place, &params);
            optimizer.step(&mut params, &g).expect("finite");
        }
        assert!(numbers(&params, "w").iter().all(|w| (w - 1.0).abs() < 1e-2));
        assert!(numbers(optimizer.averaged(&params), "w").iter().all(|w| (w - 1.0).abs() < 1e-2));
    });
}

#[test]
fn a_resumed_run_is_the_same_run() {
    for_each_place(|place| {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let file = dir.path().join("state.safetensors");
        let mut params = set(place, &[3.0, -2.0, 0.5]);
        let mut first = optimizer(&params);
        for _ in 0..10 {
            let g = grads(place, &params);
            first.step(&mut params, &g).expect("finite");
        }
        let mut writer = TensorWriter::new();
        params.store(&mut writer, "params.", Dtype::F32).expect("the device works");
        first.store(&params, &mut writer).expect("the device works");
        writer.write(&file).expect("writable");

        let state = Checkpoint::open(&file).expect("readable");
        let mut resumed = set(place, &[0.0; 3]);
        resumed.load(&state, "params.").expect("the same weights");
        let mut second = optimizer(&resumed);
        second.load(&resumed, &state).expect("the same state");
        for _ in 0..10 {
            let g = grads(place, &params);
            first.step(&mut params, &g).expect("finite");
            let g = grads(place, &resumed);
            second.step(&mut resumed, &g).expect("finite");
        }
        for name in ["w", "b"] {
            assert_eq!(numbers(&params, name), numbers(&resumed, name));
        }
        assert_eq!(numbers(first.averaged(&params), "w"), numbers(second.averaged(&resumed), "w"));

        let mut other = ParamSet::new();
        other.insert("v", Tensor::zeros(&[2]));
        let e = other.load(&state, "params.").expect_err("other weights").to_string();
        assert!(e.contains("missing") && e.contains("params.v") && e.contains("params.w"), "{e}");
    });
}

#[test]
fn bad_gradients_change_nothing() {
    for_each_place(|place| {
        let mut params = set(place, &[3.0]);
        let mut optimizer = optimizer(&params);
        let mut g: Vec<Tensor> = grads(place, &params).iter().map(|g| g.to_host().expect("works")).collect();
        g[0].data_mut()[0] = f32::NAN;
        let g: Vec<Tensor> = g.iter().map(|g| place.tensor(g)).collect();
        assert!(optimizer.step(&mut params, &g).expect_err("NaN").to_string().contains("NaN"));
        assert_eq!((numbers(&params, "w"), optimizer.adamw.step), (vec![3.0], 0));
        assert_eq!(optimizer.adamw.moments(&params).expect("works"), [vec![0.0; 4], vec![0.0; 4]]);
        assert!(optimizer.step(&mut params, &g[..1]).is_err());
    });
}

/// Neither another set's state nor gradients from elsewhere are taken for these weights'.
#[test]
fn what_belongs_to_other_weights_is_an_error() {
    for_each_place(|place| {
        let mut small = set(place, &[3.0]);
        let mut large = set(place, &[3.0; 500]);
        let g = grads(place, &large);
        let e = optimizer(&small).step(&mut large, &g).expect_err("a state of other weights").to_string();
        assert!(e.contains("state"), "{e}");
        let mut here = optimizer(&host(&small));
        let g = grads(place, &small);
        if place.device != Device::Cpu {
            let e = here.step(&mut host(&small), &g).expect_err("gradients on a device").to_string();
            assert!(e.contains("a gradient is on cuda:0, the weights are on cpu"), "{e}");
            assert!(here.step(&mut small, &g).is_err());
            assert!(grad_norm(&[Tensor::zeros(&[1]), g[0].clone()]).is_err());
            // Weights that were exchanged one by one lie in no one piece of memory that a step could be taken in.
            let mut optimizer = optimizer(&small);
            small
                .iter_mut()
                .for_each(|(_, t)| *t = Tensor::zeros(&[1]).to(place.device, Dtype::F32).expect("works"));
            assert!(optimizer.step(&mut small, &g).is_err());
        }
    });
}

/// Sets share their weights until one of them is written.
#[test]
fn a_copy_is_not_trained() {
    for_each_place(|place| {
        let mut params = set(place, &[3.0, -2.0, 0.5]);
        let copy = params.clone();
        let mut optimizer = optimizer(&params);
        let g = grads(place, &params);
        optimizer.step(&mut params, &g).expect("finite");
        assert_eq!(numbers(&copy, "w"), [3.0, -2.0, 0.5]);
        assert_ne!(numbers(&params, "w"), [3.0, -2.0, 0.5]);
    });
}

#[test]
fn clipping_and_schedule() {
    for_each_place(|place| {
        let g = [random(1, &[1000]), Tensor::full(&[10], 3.0)].map(|g| place.tensor(&g));
        let norm = g.iter().flat_map(widen).map(|x| x.powi(2)).sum::<f64>().sqrt();
        assert!((grad_norm(&g).expect("the device works") - norm).abs() < 1e-6 * norm);
    });
    assert_eq!((clip_factor(0.5, 1.0), clip_factor(4.0, 1.0)), (1.0, 0.25));
    let schedule = Schedule { warmup: 4, total: 104, peak: 1.0, floor: 0.1 };
    assert_eq!((schedule.lr(0), schedule.lr(3), schedule.lr(4)), (0.25, 1.0, 1.0));
    assert!(
        (schedule.lr(54) - 0.55).abs() < 1e-6
            && (schedule.lr(104) - 0.1).abs() < 1e-6
            && schedule.lr(9999) == 0.1
    );
}
