//! The backbone that every method starts from.

use super::Watch;
use crate::{
    model::Model,
    train::{Kind, Run, TrainConfig},
};
use anyhow::Result;
use hywu_kernels::Device;
use std::{ops::ControlFlow, path::Path};

const PLACE: &str = "backbone";

/// Trains a backbone from nothing in the folder `out` of a measurement, or goes on with the one that is there. All photos of the folder
/// `photos` teach it, those too that choose the methods' learning rates later.
///
/// # Errors
/// Photos or a config that can't be used; a folder that holds one of another config;
/// [`hywu_diffusion::Error::Interrupted`] when `watch` says so.
pub fn train(
    config: &TrainConfig,
    photos: &Path,
    out: &Path,
    device: Device,
    watch: Watch<'_>,
) -> Result<Model> {
    let folder = out.join(PLACE);
    let begun = Run::is_in(&folder);
    let mut run = Run::start(Kind::Backbone, config.clone(), Some(photos), &folder, begun, device)?;
    run.train(&mut |at| match watch.at("training the backbone", at.step as usize, at.steps as usize) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    })?;
    Model::load(folder.join("model"))
}
