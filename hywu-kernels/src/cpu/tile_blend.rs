//! CPU code of the op `tile_blend`.

use crate::{Tensor, ops::tile_blend::TileAt};
use rayon::prelude::*;

/// Fills `out` [n, size, size, channels] with tiles of `field` [height, width, channels].
pub fn gather_tiles(out: &mut Tensor, field: &Tensor, at: &[TileAt]) {
    let (size, channels, width) = (out.dim_back(2), out.dim_back(1), field.dim_back(2));
    let row = size * channels;
    out.data_mut().par_chunks_mut(row).enumerate().for_each(|(i, out)| {
        let at = at[i / size];
        let start = ((at.y + i % size) * width + at.x) * channels;
        out.copy_from_slice(&field.data()[start..start + row]);
    });
}

/// Fills `out` [n, size, size, 2] with the positions of the tiles' pixels.
pub fn tile_positions(out: &mut Tensor, down: &Tensor, across: &Tensor, at: &[TileAt]) {
    let size = out.dim_back(2);
    out.data_mut().par_chunks_mut(size * 2).enumerate().for_each(|(i, out)| {
        let at = at[i / size];
        for (x, pixel) in out.chunks_exact_mut(2).enumerate() {
            pixel.copy_from_slice(&[down.data()[at.y + i % size], across.data()[at.x + x]]);
        }
    });
}

/// Fills `picture` [height, width, channels] with the weighted mean of `tiles` [n, size, size, channels], which cover it.
pub fn tile_blend(picture: &mut Tensor, tiles: &Tensor, at: &[TileAt]) {
    let (size, channels, width) = (tiles.dim_back(2), tiles.dim_back(1), picture.dim_back(2));
    let each = size * size * channels;
    let ramp: Vec<f32> = (0..size).map(|i| (i + 1).min(size - i) as f32).collect();
    picture.data_mut().par_chunks_mut(width * channels).enumerate().for_each(|(y, row)| {
        row.fill(0.0);
        let mut weight = vec![0.0f32; width];
        // In the order of the tiles, so that the sums don't depend on the threads.
        for (i, t) in at.iter().enumerate().filter(|(_, t)| (t.y..t.y + size).contains(&y)) {
            let line = &tiles.data()[i * each + (y - t.y) * size * channels..][..size * channels];
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
    });
}

/// Adds `part` with its weights to `sum` from `corner` on.
pub fn add_tents(sum: &mut Tensor, part: &Tensor, corner: TileAt, down: &[f32], across: &[f32]) {
    let (width, channels) = (sum.dim_back(2), sum.dim_back(1));
    let rows = sum.data_mut().par_chunks_mut(width * channels).skip(corner.y);
    let parts = part.data().par_chunks(part.dim_back(2) * channels);
    rows.zip(parts).zip(down).for_each(|((sum, part), down)| {
        let pixels = sum[corner.x * channels..].chunks_exact_mut(channels).zip(part.chunks_exact(channels));
        for ((sum, pixel), across) in pixels.zip(across) {
            sum.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += down * across * value);
        }
    });
}
