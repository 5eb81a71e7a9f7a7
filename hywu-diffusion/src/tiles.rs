//! Pictures of any size as overlapping square tiles.

use crate::{Picture, backbone::pixel_position};
use hywu_kernels::{Tensor, ops::tile_blend::TileAt};
use rayon::prelude::*;

pub use hywu_kernels::ops::local_filter::reflect;

/// Starts of tiles of `size` that cover `n` >= `size` pixels with at least `overlap` in common with the next: evenly spread, the
/// last one ends at the edge.
pub fn tile_starts(n: usize, size: usize, overlap: usize) -> Vec<usize> {
    let room = n.saturating_sub(size);
    let gaps = room.div_ceil(size.saturating_sub(overlap).max(1));
    if gaps == 0 {
        return vec![0];
    }
    (0..=gaps).map(|i| (i * room + gaps / 2) / gaps).collect()
}

/// Tiles start on this grid: their patches coincide, and with them the blocks of JPEG files.
const GRID: usize = 8;

/// A picture laid out as tiles. It is padded by reflection to at least one tile and to the grid of 8 pixels; a tile knows where
/// in the picture it is.
#[derive(Clone, Debug)]
pub struct Tiling {
    /// Rows after padding.
    pub height: usize,
    /// Columns after padding.
    pub width: usize,
    /// Side of a tile in pixels.
    pub size: usize,
    /// Where the tiles are.
    pub at: Vec<TileAt>,
    /// Position channel of every padded row: that of the row it mirrors.
    rows: Vec<f32>,
    /// Position channel of every padded column.
    columns: Vec<f32>,
}

impl Tiling {
    /// Lays tiles of `size` (a multiple of 8) over `height` x `width` pixels (each at least 1).
    pub fn new(height: usize, width: usize, size: usize, overlap: usize) -> Self {
        let padded = |n: usize| n.max(size).next_multiple_of(GRID);
        let (padded_height, padded_width) = (padded(height), padded(width));
        let starts = |n: usize| -> Vec<usize> {
            let starts = tile_starts(n / GRID, size / GRID, overlap.div_ceil(GRID));
            starts.into_iter().map(|start| start * GRID).collect()
        };
        let (ys, xs) = (starts(padded_height), starts(padded_width));
        let at = ys.iter().flat_map(|&y| xs.iter().map(move |&x| TileAt { y, x })).collect();
        let positions =
            |padded: usize, n: usize| (0..padded).map(|i| pixel_position(reflect(i, n), n)).collect();
        Self {
            height: padded_height,
            width: padded_width,
            size,
            at,
            rows: positions(padded_height, height),
            columns: positions(padded_width, width),
        }
    }

    /// Tiles of a padded field [height, width, channels]: [tiles, size, size, channels].
    pub fn gather(&self, field: &[f32], channels: usize, tiles: &[TileAt]) -> Tensor {
        let (s, row) = (self.size, self.size * channels);
        Tensor::build(&[tiles.len(), s, s, channels], |out| {
            out.par_chunks_mut(row).enumerate().for_each(|(i, out)| {
                let at = tiles[i / s];
                let start = ((at.y + i % s) * self.width + at.x) * channels;
                out.copy_from_slice(&field[start..start + row]);
            });
        })
    }

    /// Position channels of tiles: [tiles, size, size, 2], (y, x) in the whole picture.
    pub fn positions(&self, tiles: &[TileAt]) -> Tensor {
        let s = self.size;
        Tensor::build(&[tiles.len(), s, s, 2], |out| {
            out.par_chunks_mut(s * 2).enumerate().for_each(|(i, out)| {
                let at = tiles[i / s];
                for (x, pixel) in out.chunks_exact_mut(2).enumerate() {
                    pixel.copy_from_slice(&[self.rows[at.y + i % s], self.columns[at.x + x]]);
                }
            });
        })
    }
}

/// The first `height` x `width` pixels of the picture's mirror continuation; alpha is dropped.
pub fn pad_reflect(picture: &Picture, height: usize, width: usize) -> Picture {
    let mut rgb = Vec::with_capacity(height * width * 3);
    for y in 0..height {
        let row = &picture.rgb[reflect(y, picture.height) * picture.width * 3..][..picture.width * 3];
        for x in 0..width {
            rgb.extend_from_slice(&row[reflect(x, picture.width) * 3..][..3]);
        }
    }
    Picture::from_rgb(height, width, rgb)
}
