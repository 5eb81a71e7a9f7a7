//! The text tower's first lessons: which skill, strength and colours an instruction names.

use crate::{
    Backbone, Error, Picture, Result, TextEncoder,
    skills::{HUES, Phrasing, SKILLS},
};
use hywu_core::{Dtype, Philox, RandomStream};
use hywu_kernels::{
    Device, ParamSet, Tape, Tensor,
    ops::{elementwise::cast, loss::weighted_mse, low_rank_linear::linear},
    optim::{Optimizer, Schedule},
};
use std::ops::ControlFlow;

/// Instructions a step.
const BATCH: usize = 256;
/// What is told apart: skills, weaker and stronger, the colour replaced, the new colour.
const CLASSES: usize = SKILLS.len() + 2 + 2 * HUES.len();
/// Side of the picture that examples are made of; only their words are used.
const SIDE: usize = 8;

/// Trains the text tower (nothing else) for `steps` steps to name what an instruction asks for, in the squared error of a linear
/// read-out that is thrown away. From the diffusion loss alone it learns that only slowly, for a wrong guess between two subtle
/// edits costs little. After every step `progress(done, loss)` may stop it; the
/// backbone is then left as it was.
///
/// # Errors
/// A tower of other sizes than the encoder's; [`Error::Interrupted`] when `progress` says so.
pub fn learn_instructions(
    backbone: &mut Backbone,
    encoder: &TextEncoder,
    skills: &[usize],
    steps: u64,
    seed: u64,
    progress: &mut dyn FnMut(u64, f32) -> ControlFlow<()>,
) -> Result<()> {
    let (device, dtype) = (backbone.params.device(), backbone.params.dtype());
    let mut whole = backbone.params.to(Device::Cpu, Dtype::F32)?;
    let mut params = ParamSet::new();
    for (name, tensor) in whole.iter().filter(|(name, _)| Backbone::in_text_tower(name)) {
        params.insert(name, tensor.clone());
    }
    let width = backbone.config.width;
    params.insert("read_out.weight", Tensor::zeros(&[CLASSES, width]));
    params.insert("read_out.bias", Tensor::zeros(&[CLASSES]));
    let mut params = params.to_mixed(device, dtype)?;
    let schedule = Schedule { warmup: 20, total: steps, peak: 2e-3, floor: 1e-4 };
    let mut optimizer = Optimizer::new(&params, schedule, 0.01, 1.0, None)?;
    for step in 0..steps {
        let mut random = Philox::new(seed).stream(step);
        let photo =
            Picture::from_rgb(SIDE, SIDE, (0..SIDE * SIDE * 3).map(|_| random.range(-1.0, 1.0)).collect());
        let mut ids = Vec::new();
        let mut target = Tensor::zeros(&[BATCH, CLASSES]);
        for row in target.data_mut().chunks_mut(CLASSES) {
            ids.extend(encoder.encode(&draw(skills, &photo, row, &mut random))?);
        }
        let tape = Tape::new();
        let leaves = params.bind(&tape, true)?;
        let mut bound = backbone.params.bind(&tape, false)?;
        for (name, _) in params.iter().filter(|(name, _)| Backbone::in_text_tower(name)) {
            bound.set(name, leaves.get(name)?.clone());
        }
        let text = backbone.text_tokens(&tape, &bound, &ids, BATCH)?;
        let summary = backbone.summary(&tape, &text)?;
        let named =
            linear(&tape, &summary, leaves.get("read_out.weight")?, Some(leaves.get("read_out.bias")?))?;
        // Squared errors summed over the classes: one wrong name costs about 2.
        let named = cast(&tape, &named, Dtype::F32)?;
        let target = target.to(device, Dtype::F32)?;
        let loss = weighted_mse(&tape, &named, &target, &[CLASSES as f32; BATCH])?;
        let value = loss.value().item()?;
        let grads = leaves.take_grads(&mut tape.backward(&loss)?)?;
        drop((leaves, bound, text, summary, named, loss));
        optimizer.step(&mut params, &grads)?;
        if progress(step + 1, value).is_break() {
            return Err(Error::Interrupted);
        }
    }
    let trained = params.to(Device::Cpu, Dtype::F32)?;
    for (name, tensor) in whole.iter_mut() {
        if Backbone::in_text_tower(name) {
            *tensor = trained.get(name)?.clone();
        }
    }
    backbone.params = whole.to_mixed(device, dtype)?;
    Ok(())
}

/// One instruction and, in `row`, what it names.
fn draw(skills: &[usize], photo: &Picture, row: &mut [f32], random: &mut RandomStream) -> String {
    let skill = skills[random.below(skills.len())];
    let example = SKILLS[skill].example(photo, Phrasing::Train, random);
    let (grades, from, to) = (SKILLS.len(), SKILLS.len() + 2, SKILLS.len() + 2 + HUES.len());
    row[skill] = 1.0;
    row[grades] = f32::from(example.meaning.strength < 1.0);
    row[grades + 1] = f32::from(example.meaning.strength > 1.0);
    let colours = [(from, example.meaning.from), (to, example.meaning.to)];
    colours.into_iter().for_each(|(start, hue)| {
        if let Some(hue) = hue {
            row[start + hue] = 1.0;
        }
    });
    example.instruction
}
