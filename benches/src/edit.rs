//! Whole edits through the library, as `hywu edit` makes them, without starting a process for each.

use crate::Result;
use hywu::{
    model::Model,
    pipeline::{EditOptions, Editor},
};
use hywu_core::{Dtype, Philox};
use hywu_diffusion::Picture;
use hywu_kernels::Device;
use serde_json::{Value, json};
use std::{ops::ControlFlow, time::Instant};

/// Sides of the pictures; the largest has four megapixels.
const SIDES: [usize; 2] = [512, 2048];

/// Gradients and a little noise.
fn picture(side: usize) -> Picture {
    let mut noise = vec![0.0; side * side * 3];
    Philox::new(side as u64).fill_normal(0, 0, &mut noise);
    for (i, v) in noise.iter_mut().enumerate() {
        let (pixel, channel) = (i / 3, i % 3);
        let (y, x) = ((pixel / side) as f32, (pixel % side) as f32);
        let ramp = [x, y, 0.5 * (x + y)][channel] / side as f32;
        *v = (1.6 * ramp - 0.8 + 0.05 * *v).clamp(-1.0, 1.0);
    }
    Picture::from_rgb(side, side, noise)
}

/// Edits pictures of every size `repetitions` times with the bundled model; seconds of each edit. The first of a size also pays for
/// loading kernels and for memory.
///
/// # Errors
/// Those of the model and the device.
pub fn run(device: Device, repetitions: usize) -> Result<Vec<Value>> {
    let editor = Editor::new(Model::bundled()?.to(device, Dtype::Bf16)?);
    let options = EditOptions::default();
    let mut rows = Vec::new();
    for side in SIDES {
        let picture = picture(side);
        let (mut wall, mut generating, mut sampling) = (Vec::new(), Vec::new(), Vec::new());
        let mut change = 0.0;
        for _ in 0..repetitions {
            let start = Instant::now();
            let go_on = &mut |_: usize, _: usize| ControlFlow::Continue(());
            let edit = editor.edit(&picture, "make it warmer", None, &options, go_on)?;
            wall.push(start.elapsed().as_secs_f64());
            generating.push(edit.generating.as_secs_f64());
            sampling.push(edit.sampling.as_secs_f64());
            change = edit.change;
        }
        rows.push(json!({
            "case": format!("{side}x{side}, {} steps", options.sample.steps),
            "seconds": wall, "generating_s": generating, "sampling_s": sampling, "mean_change": change,
        }));
    }
    Ok(rows)
}
