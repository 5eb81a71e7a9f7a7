//! Blending of overlapping tiles (MultiDiffusion, arXiv 2302.08113).

use crate::{Error, Result};
use rayon::prelude::*;

/// Position of a tile in the picture, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileAt {
    /// Top row.
    pub y: usize,
    /// Left column.
    pub x: usize,
}

/// Weighted mean of overlapping tiles: `tiles` [n, size, size, channels] row-major at `at[n]`, each pixel weighted by a
/// separable ramp that falls to its edges, into `picture` [height, width, channels]. Every pixel must be covered.
///
/// # Errors
/// Lengths that don't agree, a tile outside of the picture, a pixel that no tile covers.
pub fn tile_blend(
    tiles: &[f32],
    at: &[TileAt],
    size: usize,
    channels: usize,
    picture: &mut [f32],
    height: usize,
    width: usize,
) -> Result<()> {
    const OP: &str = "tile_blend";
    let each = size * size * channels;
    if each == 0 || tiles.len() != at.len() * each {
        let expected = format!("[{}, {size}, {size}, {channels}]", at.len());
        return Err(Error::shape(OP, "tiles", &[tiles.len()], expected));
    }
    if picture.len() != height * width * channels {
        return Err(Error::shape(
            OP,
            "picture",
            &[picture.len()],
            format!("[{height}, {width}, {channels}]"),
        ));
    }
    if let Some(t) = at.iter().find(|t| t.y + size > height || t.x + size > width) {
        return Err(Error::invalid(
            OP,
            format!("the tile of {size} at {t:?} leaves the picture of {height} x {width}"),
        ));
    }
    let ramp: Vec<f32> = (0..size).map(|i| (i + 1).min(size - i) as f32).collect();
    let uncovered = picture.par_chunks_mut((width * channels).max(1)).enumerate().find_map_any(|(y, row)| {
        row.fill(0.0);
        let mut weight = vec![0.0f32; width];
        // In the order of the tiles, so that the sums don't depend on the threads.
        for (i, t) in at.iter().enumerate().filter(|(_, t)| (t.y..t.y + size).contains(&y)) {
            let line = &tiles[i * each + (y - t.y) * size * channels..][..size * channels];
            for (x, (pixel, rx)) in line.chunks(channels).zip(&ramp).enumerate() {
                let w = ramp[y - t.y] * rx;
                weight[t.x + x] += w;
                let out = &mut row[(t.x + x) * channels..][..channels];
                out.iter_mut().zip(pixel).for_each(|(o, p)| *o += w * p);
            }
        }
        for (pixel, w) in row.chunks_mut(channels).zip(&weight) {
            pixel.iter_mut().for_each(|p| *p /= w);
        }
        weight.iter().position(|&w| w == 0.0).map(|x| (y, x))
    });
    match uncovered {
        Some((y, x)) => Err(Error::invalid(OP, format!("no tile covers the pixel ({y}, {x})"))),
        None => Ok(()),
    }
}
