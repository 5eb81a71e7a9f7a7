//! A canvas cut into overlapping tiles and blended from them (MultiDiffusion, arXiv 2302.08113). All in f32, and the same bits on every
//! device.

use super::together;
use crate::{Error, Result, Tensor};
use hywu_core::Dtype;

/// Position of a tile in the picture, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileAt {
    /// Top row.
    pub y: usize,
    /// Left column.
    pub x: usize,
}

/// The tiles of `size` x `size` pixels at `at`, cut from `field` [height, width, channels]: [n, size, size, channels].
///
/// # Errors
/// Another shape, empty tiles, a tile outside of the field; a field that is not f32.
pub fn gather_tiles(field: &Tensor, at: &[TileAt], size: usize) -> Result<Tensor> {
    const OP: &str = "gather_tiles";
    let [height, width, channels] = canvas(OP, "field", field)?;
    check_tiles(OP, at, size, height, width)?;
    let mut out = field.empty_like(&[at.len(), size, size, channels])?;
    if out.numel() > 0 {
        on_device!(field, tile_blend::gather_tiles(&mut out, field, at));
    }
    Ok(out)
}

/// Positions of the pixels of tiles, [n, size, size, 2]: the (y, x) of a pixel from `down` `[height]` and `across` `[width]`.
///
/// # Errors
/// Other shapes, empty tiles, a tile outside of the canvas; positions that are not f32.
pub fn tile_positions(down: &Tensor, across: &Tensor, at: &[TileAt], size: usize) -> Result<Tensor> {
    const OP: &str = "tile_positions";
    for (what, axis) in [("down", down), ("across", across)] {
        if axis.shape().len() != 1 {
            return Err(Error::shape(OP, what, axis.shape(), "one axis"));
        }
    }
    together(OP, &[down, across])?;
    check_f32(OP, down)?;
    check_tiles(OP, at, size, down.numel(), across.numel())?;
    let mut out = down.empty_like(&[at.len(), size, size, 2])?;
    if out.numel() > 0 {
        on_device!(down, tile_blend::tile_positions(&mut out, down, across, at));
    }
    Ok(out)
}

/// Weighted mean of overlapping tiles: `tiles` [n, size, size, channels] at `at`, each pixel weighted by a separable ramp that falls to
/// the tile's edges -> [height, width, channels]. Every pixel must be covered.
///
/// # Errors
/// Another shape, a tile outside of the canvas, a pixel that no tile covers; tiles that are not f32.
pub fn tile_blend(tiles: &Tensor, at: &[TileAt], height: usize, width: usize) -> Result<Tensor> {
    const OP: &str = "tile_blend";
    let (size, channels) = (tiles.dim_back(2), tiles.dim_back(1));
    if tiles.shape() != [at.len(), size, size, channels] || channels == 0 {
        let expected = format!("[{}, size, size, channels], none of them 0", at.len());
        return Err(Error::shape(OP, "tiles", tiles.shape(), expected));
    }
    check_f32(OP, tiles)?;
    check_tiles(OP, at, size, height, width)?;
    if let Some((y, x)) = uncovered(at, size, height, width) {
        return Err(Error::invalid(OP, format!("no tile covers the pixel ({y}, {x})")));
    }
    let mut out = tiles.empty_like(&[height, width, channels])?;
    if out.numel() > 0 {
        on_device!(tiles, tile_blend::tile_blend(&mut out, tiles, at));
    }
    Ok(out)
}

/// Adds `part` [rows, columns, channels], times `down[row] * across[column]`, to the part of `sum` [height, width, channels] that starts
/// at `corner`.
///
/// # Errors
/// A part that leaves `sum` or has other channels; other numbers of weights; tensors that are not f32.
pub fn add_tents(
    sum: &mut Tensor,
    part: &Tensor,
    corner: TileAt,
    down: &[f32],
    across: &[f32],
) -> Result<()> {
    const OP: &str = "add_tents";
    let ([height, width, channels], [rows, columns, others]) =
        (canvas(OP, "sum", sum)?, canvas(OP, "part", part)?);
    let inside = |start: usize, n: usize, all: usize| start.checked_add(n).is_some_and(|end| end <= all);
    if others != channels || !inside(corner.y, rows, height) || !inside(corner.x, columns, width) {
        let expected = format!("{channels} channels, and from {corner:?} on within {height} x {width}");
        return Err(Error::shape(OP, "part", part.shape(), expected));
    }
    for (what, weights, n) in [("down", down, rows), ("across", across, columns)] {
        if weights.len() != n {
            return Err(Error::shape(OP, what, &[weights.len()], format!("[{n}]")));
        }
    }
    together(OP, &[sum, part])?;
    if part.numel() > 0 {
        sum.make_unique()?;
        on_device!(part, tile_blend::add_tents(sum, part, corner, down, across));
    }
    Ok(())
}

/// The sizes of [height, width, channels] in f32.
fn canvas(op: &'static str, what: &'static str, tensor: &Tensor) -> Result<[usize; 3]> {
    match *tensor.shape() {
        [height, width, channels] => check_f32(op, tensor).map(|()| [height, width, channels]),
        ref other => Err(Error::shape(op, what, other, "[height, width, channels]")),
    }
}

fn check_f32(op: &'static str, tensor: &Tensor) -> Result<()> {
    match tensor.dtype() {
        Dtype::F32 => Ok(()),
        other => Err(Error::invalid(op, format!("works in f32, got {other:?}; see Tensor::cast"))),
    }
}

/// Is every tile within height x width?
fn check_tiles(op: &'static str, at: &[TileAt], size: usize, height: usize, width: usize) -> Result<()> {
    if size == 0 {
        return Err(Error::invalid(op, "tiles of 0 x 0 pixels"));
    }
    let leaves = |start: usize, n: usize| start.checked_add(size).is_none_or(|end| end > n);
    match at.iter().find(|t| leaves(t.y, height) || leaves(t.x, width)) {
        Some(t) => Err(Error::invalid(
            op,
            format!("the tile of {size} at {t:?} leaves the canvas of {height} x {width}"),
        )),
        None => Ok(()),
    }
}

/// A pixel that no tile covers. Between two rows where a tile starts or ends all rows are alike.
fn uncovered(at: &[TileAt], size: usize, height: usize, width: usize) -> Option<(usize, usize)> {
    let mut rows: Vec<usize> = at.iter().flat_map(|t| [t.y, t.y + size]).chain([0]).collect();
    rows.sort_unstable();
    rows.dedup();
    rows.into_iter().filter(|&y| y < height).find_map(|y| {
        let over = at.iter().filter(|t| t.y <= y && y < t.y + size);
        let mut starts: Vec<usize> = over.map(|t| t.x).collect();
        starts.sort_unstable();
        let reach =
            starts.into_iter().fold(0, |reach, x| if x <= reach { reach.max(x + size) } else { reach });
        (reach < width).then_some((y, reach))
    })
}
