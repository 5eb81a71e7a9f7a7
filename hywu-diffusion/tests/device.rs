//! The backbone on a CUDA device against itself on the CPU. In bf16 the error is at most twice that of a naive bf16 implementation, which
//! rounds the weights and the result of every op.

mod common;

use common::{Inputs, adapters, backbone, batch, fresh, ids, inputs, picture, predict};
use hywu_core::Dtype;
use hywu_diffusion::{Backbone, Picture, SampleOptions, edit_picture, flow_loss};
use hywu_kernels::{
    Device, LoraVars, ParamSet, Tape, Tensor,
    optim::{Optimizer, Schedule},
    testing::{Place, for_each_place, naive_bf16, rounded_to_bf16},
};
use std::ops::ControlFlow;

/// Runs the body at every place that is a device.
fn for_each_device(mut body: impl FnMut(Place)) {
    for_each_place(|place| {
        if place.device != Device::Cpu {
            body(place);
        }
    });
}

/// The same weights as bf16 holds them, on the CPU.
fn rounded(params: &ParamSet) -> ParamSet {
    let mut rounded = ParamSet::new();
    params.iter().for_each(|(name, t)| rounded.insert(name, rounded_to_bf16(t)));
    rounded
}

/// The same backbone with such weights.
fn as_bf16(backbone: &Backbone) -> Backbone {
    let mut naive = backbone.clone();
    naive.params = rounded(&backbone.params);
    naive
}

fn host(x: &Tensor) -> Tensor {
    x.to_host().expect("the device works")
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |m, (a, b)| if (a - b).abs() <= m { m } else { (a - b).abs() })
}

/// Root of the mean square of the differences.
fn error(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    (a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f32>() / a.len() as f32).sqrt()
}

fn predicted(backbone: &Backbone, x: &Inputs, place: Place) -> Tensor {
    let there = backbone.to(place.device, place.dtype).expect("the device works");
    let pairs = adapters(backbone, 3, 0.2).to(place.device, place.dtype).expect("the device works");
    host(&predict(&there, x, 3, &pairs))
}

#[test]
fn a_prediction_is_the_same() {
    let backbone = backbone();
    let x = inputs(6, 24, 40);
    let expected = predicted(&backbone, &x, Place::CPU);
    let naive = naive_bf16(|| predicted(&as_bf16(&backbone), &x, Place::CPU));
    for_each_device(|place| {
        let got = predicted(&backbone, &x, place);
        let (error, allowed) = match place.dtype {
            Dtype::F32 => (distance(got.data(), expected.data()), 1e-4),
            _ => (error(got.data(), expected.data()), 2.0 * error(naive.data(), expected.data())),
        };
        println!("{place:?}: error {error:e}, allowed {allowed:e}");
        assert!(error <= allowed, "{place:?}: {error:e} > {allowed:e}");
        assert_eq!(got.data(), predicted(&backbone, &x, place).data(), "two runs differ");
    });
}

fn edited(backbone: &Backbone, source: &Picture, place: Place, batch: usize) -> Picture {
    let there = backbone.to(place.device, place.dtype).expect("the device works");
    let pairs = adapters(backbone, 1, 0.2).to(place.device, place.dtype).expect("the device works");
    let options = SampleOptions { steps: 2, batch, ..SampleOptions::default().with_tile(64) };
    let ids = ids(backbone.config.text_len);
    edit_picture(&there, source, &ids, &pairs, &options, &mut |_, _| ControlFlow::Continue(()))
        .expect("an edit")
}

#[test]
fn an_edit_is_the_same_in_any_batches() {
    let (backbone, source) = (backbone(), picture(70, 100));
    let expected = edited(&backbone, &source, Place::CPU, 4);
    let naive = naive_bf16(|| edited(&as_bf16(&backbone), &source, Place::CPU, 4));
    for_each_device(|place| {
        let got = edited(&backbone, &source, place, 4);
        let (error, naive) = (error(&got.rgb, &expected.rgb), error(&naive.rgb, &expected.rgb));
        let allowed = if place.dtype == Dtype::F32 { 1e-5 } else { 2.0 * naive };
        println!("{place:?}: error {error:e}, allowed {allowed:e}");
        assert!(error <= allowed, "{place:?}: {error:e} > {allowed:e}");
        assert_eq!(got, edited(&backbone, &source, place, 1), "the batch shows");
    });
}

/// Losses of 50 steps from the same seed; naively the arithmetic sees rounded weights, while those that the optimiser moves are f32.
fn losses(place: Place, naive: bool) -> Vec<f32> {
    let mut backbone = fresh().to(place.device, place.dtype).expect("the device works");
    let schedule = Schedule { warmup: 3, total: 50, peak: 2e-3, floor: 5e-4 };
    let mut optimizer = Optimizer::new(&backbone.params, schedule, 0.01, 1.0, None).expect("enough memory");
    let step = |step: u64| {
        let batch = batch(&backbone, step % 3);
        let tape = Tape::new();
        let seen = if naive { rounded(&backbone.params) } else { backbone.params.clone() };
        let bound = seen.bind(&tape, true).expect("enough memory");
        let loss = flow_loss(&tape, &backbone, &bound, &batch, &LoraVars::none()).expect("it fits");
        let value = loss.value().clone();
        let grads = bound.take_grads(&mut tape.backward(&loss).expect("a loss")).expect("enough memory");
        drop((bound, loss, seen));
        optimizer.step(&mut backbone.params, &grads).expect("finite");
        value.item().expect("the device works")
    };
    (0..50).map(step).collect()
}

#[test]
fn training_follows_the_same_curve() {
    let expected = losses(Place::CPU, false);
    let naive = naive_bf16(|| distance(&losses(Place::CPU, true), &expected));
    for_each_device(|place| {
        let got = losses(place, false);
        let error = distance(&got, &expected);
        let allowed = if place.dtype == Dtype::F32 { 1e-3 * expected[0] } else { 2.0 * naive };
        println!("{place:?}: error {error:e}, allowed {allowed:e}, losses {} -> {}", got[0], got[49]);
        assert!(error <= allowed, "{place:?}: {error:e} > {allowed:e}\n{got:?}\n{expected:?}");
    });
}
