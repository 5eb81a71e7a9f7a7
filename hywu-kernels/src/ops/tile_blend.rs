//! Blending of overlapping tiles (MultiDiffusion, arXiv 2302.08113).

use crate::Result;

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
pub fn tile_blend(
    tiles: &[f32],
    at: &[TileAt],
    size: usize,
    channels: usize,
    picture: &mut [f32],
    height: usize,
    width: usize,
) -> Result<()> {
    let _ = (tiles, at, size, channels, picture, height, width);
    todo!()
}
