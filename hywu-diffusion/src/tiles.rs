//! Pictures of any size as overlapping square tiles.

use crate::{Picture, Result, backbone::pixel_position};
use hywu_core::Dtype;
use hywu_kernels::{
    Device, Tensor,
    ops::tile_blend::{TileAt, add_tents, gather_tiles, tile_blend, tile_positions},
};
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

/// Side of the backbone's patches: tiles start on this grid.
const GRID: usize = 8;
/// Half a patch: what lies between the patches of two layouts.
const SHIFT: usize = GRID / 2;
/// Least side of a tile where `size` allows it: what is smaller was never trained on.
const LEAST: usize = 64;

/// One way to lay tiles over the canvas.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Whether its patches are half a patch away from those of the first layout, down and across.
    pub shifted: [bool; 2],
    /// Where the tiles are in the canvas.
    pub at: Vec<TileAt>,
}

impl Layout {
    /// First row (or column) of the canvas that it covers; as many are left out at the end.
    fn margin(shifted: bool) -> usize {
        if shifted { SHIFT } else { 0 }
    }

    /// Weight of row (or column) `i`: a tent over each patch. Those of the two grids add up to 1.
    fn tent(shifted: bool, i: usize) -> f32 {
        let i = i % GRID;
        let tent = (i.min(GRID - 1 - i) as f32 + 0.5) / SHIFT as f32;
        if shifted { 1.0 - tent } else { tent }
    }
}

/// A picture laid out as tiles on a canvas: the picture continued by reflection, [`Tiling::MARGIN`] pixels at the top and left,
/// and at least as many at the bottom and right. A tile knows where in the picture it is.
///
/// There are four layouts: the patches of each lie half a patch beside another's, so that every border of a patch is inside of
/// the patches of the others. A mean with weights that fall to a patch's borders ([`Tiling::add`]) shows none of them: cycle
/// spinning (Coifman and Donoho, "Translation-invariant de-noising", 1995).
#[derive(Clone, Debug)]
pub struct Tiling {
    /// Rows of the canvas.
    pub height: usize,
    /// Columns of the canvas.
    pub width: usize,
    /// Side of a tile in pixels.
    pub size: usize,
    /// The layouts. The first covers the whole canvas.
    pub layouts: [Layout; 4],
    /// Position channel of every row of the canvas: that of the picture's row that it shows.
    rows: Tensor,
    /// Position channel of every column.
    columns: Tensor,
}

impl Tiling {
    /// Where the picture starts in the canvas, in rows and in columns.
    pub const MARGIN: usize = SHIFT;

    /// Lays tiles over `height` x `width` pixels (each at least 1), as few and then as small as do, with sides of at most `size`
    /// (a multiple of 8) and at least `overlap` pixels in common.
    pub fn new(height: usize, width: usize, size: usize, overlap: usize) -> Self {
        let overlap = overlap.div_ceil(GRID);
        let fit = |n: usize| {
            let n = n.div_ceil(GRID) + 1;
            let tiles = tile_starts(n.max(size / GRID), size / GRID, overlap).len();
            (n + (tiles - 1) * overlap).div_ceil(tiles) * GRID
        };
        let size = fit(height).max(fit(width)).max(LEAST).min(size);
        let [canvas_height, canvas_width] =
            [height, width].map(|n| n.next_multiple_of(GRID).max(size) + GRID);
        let starts = |n: usize, shifted: bool| -> Vec<usize> {
            let margin = Layout::margin(shifted);
            let starts = tile_starts((n - 2 * margin) / GRID, size / GRID, overlap);
            starts.into_iter().map(|start| start * GRID + margin).collect()
        };
        let layouts = [[false, false], [false, true], [true, false], [true, true]].map(|shifted| {
            let (ys, xs) = (starts(canvas_height, shifted[0]), starts(canvas_width, shifted[1]));
            let at = ys.iter().flat_map(|&y| xs.iter().map(move |&x| TileAt { y, x })).collect();
            Layout { shifted, at }
        });
        let positions = |canvas: usize, n: usize| {
            let position = |i: usize| pixel_position(reflect(i.abs_diff(Self::MARGIN), n), n);
            Tensor::build(&[canvas], |out| {
                out.iter_mut().enumerate().for_each(|(i, out)| *out = position(i));
            })
        };
        Self {
            height: canvas_height,
            width: canvas_width,
            size,
            layouts,
            rows: positions(canvas_height, height),
            columns: positions(canvas_width, width),
        }
    }

    /// The same tiling for fields on `device`.
    ///
    /// # Errors
    /// A device that can't be used, or has not enough memory.
    pub fn on(self, device: Device) -> Result<Self> {
        let (rows, columns) = (self.rows.to(device, Dtype::F32)?, self.columns.to(device, Dtype::F32)?);
        Ok(Self { rows, columns, ..self })
    }

    /// Columns of the picture, `n` wide, before which a tile of any layout starts or ends.
    pub fn borders(&self, n: usize) -> Vec<usize> {
        let tiles = self.layouts.iter().flat_map(|l| &l.at);
        let ends = tiles.flat_map(|at| [at.x, at.x + self.size]);
        let mut borders: Vec<usize> =
            ends.filter_map(|x| x.checked_sub(Self::MARGIN)).filter(|x| (1..n).contains(x)).collect();
        borders.sort_unstable();
        borders.dedup();
        borders
    }

    /// Blends the tiles of a layout, [tiles, size, size, channels], to the part of the canvas that it covers and adds that to `sum`
    /// [height, width, channels], pixel by pixel with the layout's weight. Over all layouts the weights add up to 1 in the picture.
    ///
    /// # Errors
    /// Another number of tiles; those of the device.
    pub fn add(&self, layout: &Layout, tiles: &Tensor, sum: &mut Tensor) -> Result<()> {
        let blended = self.blend(layout, tiles)?;
        let [y, x] = layout.shifted.map(Layout::margin);
        let tents = |shifted: bool, start: usize, n: usize| -> Vec<f32> {
            (start..start + n).map(|i| Layout::tent(shifted, i)).collect()
        };
        let down = tents(layout.shifted[0], y, self.height - 2 * y);
        let across = tents(layout.shifted[1], x, self.width - 2 * x);
        Ok(add_tents(sum, &blended, TileAt { y, x }, &down, &across)?)
    }

    /// Blends the tiles of a layout, [tiles, size, size, channels], to the part of the canvas that it covers: the whole for the first.
    ///
    /// # Errors
    /// Another number of tiles; those of the device.
    pub fn blend(&self, layout: &Layout, tiles: &Tensor) -> Result<Tensor> {
        let [top, left] = layout.shifted.map(Layout::margin);
        let at: Vec<TileAt> = layout.at.iter().map(|t| TileAt { y: t.y - top, x: t.x - left }).collect();
        Ok(tile_blend(tiles, &at, self.height - 2 * top, self.width - 2 * left)?)
    }

    /// Tiles of a field on the canvas, [height, width, channels]: [tiles, size, size, channels].
    ///
    /// # Errors
    /// A field of another size; those of the device.
    pub fn gather(&self, field: &Tensor, tiles: &[TileAt]) -> Result<Tensor> {
        Ok(gather_tiles(field, tiles, self.size)?)
    }

    /// Position channels of tiles: [tiles, size, size, 2], (y, x) in the whole picture.
    ///
    /// # Errors
    /// Those of the device.
    pub fn positions(&self, tiles: &[TileAt]) -> Result<Tensor> {
        Ok(tile_positions(&self.rows, &self.columns, tiles, self.size)?)
    }
}

/// A canvas of `height` x `width` pixels around a picture that starts at row and column `margin`: all around it is continued by
/// reflection; alpha is dropped.
pub fn pad_reflect(picture: &Picture, margin: usize, height: usize, width: usize) -> Picture {
    let columns: Vec<usize> = (0..width).map(|x| reflect(x.abs_diff(margin), picture.width) * 3).collect();
    let mut rgb = vec![0.0; height * width * 3];
    rgb.par_chunks_mut((width * 3).max(1)).enumerate().for_each(|(y, out)| {
        let row = reflect(y.abs_diff(margin), picture.height) * picture.width * 3;
        for (out, x) in out.chunks_exact_mut(3).zip(&columns) {
            out.copy_from_slice(&picture.rgb[row + x..][..3]);
        }
    });
    Picture::from_rgb(height, width, rgb)
}
