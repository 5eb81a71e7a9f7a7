//! Is it the condition? The same trained generator, given something else than the instance, or scaled.

use super::{
    methods::edit,
    quality::{Instance, decibels},
    report::Condition,
    watch::Watch,
};
use crate::{
    model::{Memory, Model, ModelInfo},
    pipeline::{EditOptions, Editor},
};
use anyhow::{Context, Result, bail};
use hywu_core::{Adapter, Dtype, Philox, RandomStream};
use hywu_diffusion::{Backbone, Picture, skills::Example};
use hywu_kernels::{Device, LoraVars};
use serde::{Deserialize, Serialize};

/// What is said to the generator where only the picture is to tell.
const NEUTRAL: &str = "edit the photo";
/// Factors that are measured beside 0, which is the backbone alone, and 1.
pub const STRENGTHS: [f32; 3] = [0.5, 1.5, 2.0];

impl Condition {
    /// Those that are measured; [`Condition::Own`] is what HY-WU's quality is measured with.
    pub const OTHERS: [Self; 5] =
        [Self::OtherSkill, Self::OtherPhoto, Self::Mean, Self::TextOnly, Self::ImageOnly];
}

/// PSNR of every edit with one seed's generator, in the order of the instances.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ablation {
    /// By condition.
    pub conditions: Vec<(Condition, Vec<f64>)>,
    /// By strength.
    pub strengths: Vec<(f32, Vec<f64>)>,
}

/// HY-WU's edits of all instances under every other condition and strength. `backbone` is the frozen one, on the CPU.
///
/// # Errors
/// Too few skills or photos to take another's adapter; those of an edit.
pub fn ablation(
    editor: &Editor,
    backbone: &Backbone,
    instances: &[Instance],
    options: &EditOptions,
    seed: u64,
    watch: Watch<'_>,
) -> Result<Ablation> {
    let recall = |picture: &Picture, instruction: &str| -> Result<Adapter> {
        let recalled = editor.recall(picture, instruction, options.sample.seed)?;
        Ok(recalled.context("the model has no generator")?.adapter)
    };
    let own: Vec<Adapter> =
        instances.iter().map(|i| recall(&i.example.source, &i.example.instruction)).collect::<Result<_>>()?;
    let device = editor.model().backbone.params.device();
    let mean = with_mean(backbone, &own, device)?;
    let mut random = Philox::new(seed).stream(0);
    let mut conditions = Vec::new();
    for condition in Condition::OTHERS {
        let mut psnr = Vec::new();
        for (done, instance) in instances.iter().enumerate() {
            watch.at("other conditions", done, instances.len())?;
            let Example { source, target, instruction, .. } = &instance.example;
            let given = match condition {
                Condition::Own => Some(own[done].clone()),
                Condition::OtherSkill => {
                    let another = |other: &Instance| other.skill != instance.skill;
                    Some(own[pick(instances, another, &mut random)?].clone())
                }
                Condition::OtherPhoto => {
                    let another =
                        |other: &Instance| other.skill == instance.skill && other.photo != instance.photo;
                    Some(own[pick(instances, another, &mut random)?].clone())
                }
                Condition::Mean => None,
                Condition::TextOnly => {
                    let Picture { height, width, .. } = *source;
                    let gray = Picture::from_rgb(height, width, vec![0.0; height * width * 3]);
                    Some(recall(&gray, instruction)?)
                }
                Condition::ImageOnly => Some(recall(source, NEUTRAL)?),
            };
            let editor = if condition == Condition::Mean { &mean } else { editor };
            let edited = edit(editor, source, instruction, given.as_ref(), options, watch.stop)?;
            psnr.push(decibels(&edited.picture, target)?);
        }
        conditions.push((condition, psnr));
    }
    let mut strengths = Vec::new();
    for strength in STRENGTHS {
        let options = EditOptions { strength, ..options.clone() };
        let mut psnr = Vec::new();
        for (done, (instance, adapter)) in instances.iter().zip(&own).enumerate() {
            watch.at("strengths", done, instances.len())?;
            let Example { source, target, instruction, .. } = &instance.example;
            let edited = edit(editor, source, instruction, Some(adapter), &options, watch.stop)?;
            psnr.push(decibels(&edited.picture, target)?);
        }
        strengths.push((strength, psnr));
    }
    Ok(Ablation { conditions, strengths })
}

/// One of those that fit, by chance.
fn pick(
    instances: &[Instance],
    fits: impl Fn(&Instance) -> bool,
    random: &mut RandomStream,
) -> Result<usize> {
    let others: Vec<usize> = (0..instances.len()).filter(|&i| fits(&instances[i])).collect();
    if others.is_empty() {
        bail!("to take another's adapter needs two skills and two test photos at least");
    }
    Ok(others[random.below(others.len())])
}

/// The backbone with the mean of the updates themselves merged in: a low rank would not hold it.
fn with_mean(backbone: &Backbone, adapters: &[Adapter], device: Device) -> Result<Editor> {
    let mut merged = backbone.clone();
    for adapter in adapters {
        merged = merged.merged(&LoraVars::from_adapter(adapter, 1.0 / adapters.len() as f32))?;
    }
    let model = Model::assemble(merged, Memory::None, ModelInfo::default())?;
    Ok(Editor::new(model.to(device, Dtype::Bf16)?))
}
