//! From noise to the edited picture.

use crate::{
    Backbone, Error, Picture, Result,
    tiles::{Layout, Tiling, pad_reflect},
};
use hywu_core::Dtype;
use hywu_kernels::{
    LoraVars, Tape, Tensor, Var,
    ops::{
        elementwise::{concat_tokens, lerp, mean_of},
        low_rank_linear::Apply,
        noise::noise_window,
    },
};
use rayon::prelude::*;
use std::ops::ControlFlow;

/// Side of the condition's views in pixels.
pub const VIEW: usize = 64;

/// Method that follows the velocity v = (x_hat - x_t) / (1 - t) from t = 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sampler {
    /// One evaluation a step.
    #[default]
    Euler,
    /// Two evaluations a step, but one in the last; second order.
    Heun,
}

impl Sampler {
    /// How often the backbone sees the whole picture.
    pub fn evaluations(self, steps: usize) -> usize {
        match self {
            Self::Euler => steps,
            Self::Heun => (2 * steps).saturating_sub(1),
        }
    }

    /// Integrates over a uniform grid of `steps` >= 1 from `x` at t = 0; `predict(x_t, t, last)` gives x_hat. The last step's
    /// velocity leads exactly to x_hat, which is returned.
    ///
    /// # Errors
    /// Those of `predict`, and no steps.
    pub fn integrate(
        self,
        steps: usize,
        mut x: Tensor,
        mut predict: impl FnMut(&Tensor, f32, bool) -> Result<Tensor>,
    ) -> Result<Tensor> {
        for i in 0..steps {
            let last = i + 1 == steps;
            let x_hat = predict(&x, i as f32 / steps as f32, last)?;
            if last {
                return Ok(x_hat);
            }
            // step * v = (x_hat - x) / (steps - i), since 1 - t = (steps - i) * step.
            let rate = 1.0 / (steps - i) as f32;
            let euler = lerp(&x, &x_hat, rate)?;
            x = match self {
                Self::Euler => euler,
                Self::Heun => {
                    let ahead = predict(&euler, (i + 1) as f32 / steps as f32, false)?;
                    let rate_ahead = 1.0 / (steps - i - 1) as f32;
                    // x + step / 2 * (v + v_ahead) = (x + euler + step * v_ahead) / 2
                    mean_of(&x, &lerp(&euler, &ahead, rate_ahead)?)?
                }
            };
        }
        Err(Error::Invalid("the sampler needs at least one step".into()))
    }
}

/// How a picture is sampled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SampleOptions {
    /// Seed of the noise.
    pub seed: u64,
    /// Steps from noise to image.
    pub steps: usize,
    /// Method.
    pub sampler: Sampler,
    /// Largest side of the square tiles in pixels, a multiple of 8.
    pub tile: usize,
    /// Least number of pixels that neighbouring tiles share.
    pub overlap: usize,
    /// Tiles that go through the backbone at once; a matter of memory only, the result is the same.
    pub batch: usize,
    /// How the adapter is applied; the result is the same but for rounding.
    pub apply: Apply,
}

impl Default for SampleOptions {
    fn default() -> Self {
        let (sampler, apply) = (Sampler::Euler, Apply::Fused);
        Self { seed: 0, steps: 2, sampler, tile: 0, overlap: 0, batch: 0, apply }.with_tile(128)
    }
}

impl SampleOptions {
    /// Another tile size, with the overlap and batch that suit it.
    pub fn with_tile(self, tile: usize) -> Self {
        let pixels = tile.saturating_mul(tile).max(1);
        Self { tile, overlap: 16.min(tile / 4), batch: (16 * 64 * 64 / pixels).max(1), ..self }
    }

    /// Checks every number.
    ///
    /// # Errors
    /// Names the field, its value and what would be right.
    pub fn validate(&self) -> Result<()> {
        let Self { steps, tile, overlap, batch, .. } = *self;
        if !(1..=1000).contains(&steps) {
            return Err(Error::Invalid(format!("steps is {steps}, expected 1..=1000")));
        }
        if !(8..=512).contains(&tile) || !tile.is_multiple_of(8) {
            return Err(Error::Invalid(format!("tile is {tile}, expected a multiple of 8 in 8..=512")));
        }
        if overlap > tile / 2 {
            return Err(Error::Invalid(format!(
                "overlap is {overlap}, expected at most {}, half a tile",
                tile / 2
            )));
        }
        if batch == 0 {
            return Err(Error::Invalid("batch is 0, expected at least 1 tile".into()));
        }
        Ok(())
    }
}

/// Edits a picture of any size with one adapter (or none): same size out, alpha carried over, values clamped to [-1, 1].
///
/// The picture is cut into overlapping tiles that share one noise field; at every step the predictions of all tiles are blended
/// before the whole of x_t moves on (MultiDiffusion, arXiv 2302.08113), so there are no seams. The last prediction, which is the
/// result, is a mean over four layouts of the tiles, so that the borders of patches don't show either ([`Tiling`]). Before each
/// batch of tiles `progress(done, total)`, in batches of tiles over all steps, may stop the edit. Result and memory do not depend on the number
/// of threads, nor the result on `options.batch`.
///
/// # Errors
/// Options that can't work, an empty picture, ids or adapters that don't fit; [`Error::Interrupted`] when `progress` says so.
pub fn edit_picture(
    backbone: &Backbone,
    picture: &Picture,
    ids: &[u32],
    adapters: &LoraVars,
    options: &SampleOptions,
    progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Picture> {
    options.validate()?;
    check_picture(picture)?;
    let Picture { height, width, .. } = *picture;
    // Everything stays where the backbone is, in f32; only the finished picture comes back.
    let device = backbone.params.device();
    let tiling = Tiling::new(height, width, options.tile, options.overlap).on(device)?;
    let canvas = [tiling.height, tiling.width, 3];
    let source = pad_reflect(picture, Tiling::MARGIN, tiling.height, tiling.width);
    let source = Tensor::new(&canvas, source.rgb)?.to(device, Dtype::F32)?;
    let batches = |layout: &Layout| layout.at.len().div_ceil(options.batch);
    let earlier = options.sampler.evaluations(options.steps) - 1;
    let total = earlier * batches(&tiling.layouts[0]) + tiling.layouts.iter().map(batches).sum::<usize>();
    let merges = match options.apply {
        Apply::Fused => false,
        Apply::Merged => true,
        Apply::Auto => {
            let tiles = options.batch.min(tiling.layouts[0].at.len());
            backbone.merging_pays(adapters, total, tiles, tiling.size)
        }
    };
    let merged;
    let (backbone, adapters) = if merges {
        merged = backbone.merged(adapters)?;
        (&merged, &LoraVars::none())
    } else {
        (backbone, adapters)
    };
    let tape = Tape::inference();
    let bound = backbone.params.bind(&tape, false)?;
    let text = backbone.text_tokens(&tape, &bound, ids, 1)?;
    let mut done = 0;
    let mut look = |x: &Tensor, t: f32, layout: &Layout| {
        let tile = [tiling.size, tiling.size, 3];
        let mut seen = Vec::new();
        for at in layout.at.chunks(options.batch) {
            if progress(done, total).is_break() {
                return Err(Error::Interrupted);
            }
            let x_t = tiling.gather(x, at)?;
            let view = tiling.gather(&source, at)?;
            let position = tiling.positions(at)?;
            let t = vec![t; at.len()];
            let x_hat = backbone.predict(&tape, &bound, &x_t, &view, &position, &t, &text, adapters)?;
            seen.push(x_hat.reshape(&[1, at.len(), tile.iter().product()])?);
            done += 1;
        }
        let all = concat_tokens(&tape, &seen.iter().collect::<Vec<&Var>>())?;
        Ok(all.value().reshape(&[layout.at.len(), tile[0], tile[1], tile[2]])?)
    };
    let predict = |x: &Tensor, t: f32, last: bool| {
        if !last {
            let layout = &tiling.layouts[0];
            return tiling.blend(layout, &look(x, t, layout)?);
        }
        let mut mean = x.zeros_like(x.shape())?;
        for layout in &tiling.layouts {
            tiling.add(layout, &look(x, t, layout)?, &mut mean)?;
        }
        Ok(mean)
    };
    let noise = noise_window(device, options.seed, 0, 0, tiling.height, tiling.width, 3)?;
    let edited = options.sampler.integrate(options.steps, noise, predict)?.to_host()?;
    // Breaking is pointless now; this only shows that all is done.
    let _ = progress(total, total);
    let mut rgb = vec![0.0; height * width * 3];
    let rows = edited.data().par_chunks_exact(tiling.width * 3).skip(Tiling::MARGIN);
    rgb.par_chunks_exact_mut(width * 3).zip(rows).for_each(|(out, row)| {
        let row = &row[Tiling::MARGIN * 3..];
        out.iter_mut().zip(row).for_each(|(o, v)| *o = v.clamp(-1.0, 1.0));
    });
    Ok(Picture { alpha: picture.alpha.clone(), ..Picture::from_rgb(height, width, rgb) })
}

/// The whole picture in 64 x 64 pixels.
///
/// # Errors
/// An empty picture.
pub fn thumbnail_of(picture: &Picture) -> Result<Picture> {
    check_picture(picture)?;
    Ok(picture.resize(VIEW, VIEW))
}

/// The 64 x 64 pixels around the centre at native resolution; what is smaller is continued by reflection.
///
/// # Errors
/// An empty picture.
pub fn detail_of(picture: &Picture) -> Result<Picture> {
    check_picture(picture)?;
    let (h, w) = (picture.height.min(VIEW), picture.width.min(VIEW));
    let centre = picture.crop((picture.height - h) / 2, (picture.width - w) / 2, h, w);
    Ok(pad_reflect(&centre, 0, VIEW, VIEW))
}

/// The condition of one picture and instruction, [1, 1, length, width]: see [`Backbone::condition`].
///
/// # Errors
/// An empty picture, or ids that don't fit.
pub fn condition_of(backbone: &Backbone, picture: &Picture, ids: &[u32]) -> Result<Tensor> {
    let thumbnail = thumbnail_of(picture)?.to_tensor();
    if !backbone.config.detail_view {
        return backbone.condition(&[&thumbnail], ids);
    }
    backbone.condition(&[&thumbnail, &detail_of(picture)?.to_tensor()], ids)
}

fn check_picture(picture: &Picture) -> Result<()> {
    let Picture { height, width, .. } = *picture;
    let expected = height.checked_mul(width).and_then(|n| n.checked_mul(3));
    if height == 0 || width == 0 || expected != Some(picture.rgb.len()) {
        let got = picture.rgb.len();
        return Err(Error::Invalid(format!("a picture of {height} x {width} pixels holds {got} values")));
    }
    Ok(())
}
