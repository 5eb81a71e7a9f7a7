//! Launchers of `kernels-cu/tile_blend`; see `cpu/tile_blend.rs` for what each computes.

use super::{Call, Words, pack};
use crate::{Result, Tensor, ops::tile_blend::TileAt};
use hywu_core::Dtype;

const OP: &str = "tile_blend";
/// Side of the cells of a canvas that each have a list of the tiles that meet them; the kernel's constant.
const CELL: usize = 64;

pub fn gather_tiles(out: &mut Tensor, field: &Tensor, at: &[TileAt]) -> Result<()> {
    let (size, channels) = (out.dim_back(2), out.dim_back(1));
    let at = corners(field, at)?;
    let call = Call::named(OP, "gather_tiles", field)?.tensor(field)?.words(&at).tensor(out)?;
    let call = call.size(size)?.size(channels)?.size(field.dim_back(2))?.size(size * channels)?;
    call.over_rows(out.shape()[0] * size, size * channels, pack(Dtype::F32))
}

pub fn tile_positions(out: &mut Tensor, down: &Tensor, across: &Tensor, at: &[TileAt]) -> Result<()> {
    let size = out.dim_back(2);
    let at = corners(down, at)?;
    let call = Call::named(OP, "tile_positions", down)?.tensor(down)?.tensor(across)?.words(&at);
    call.tensor(out)?.size(size)?.over_rows(out.shape()[0] * size, size, 1)
}

pub fn tile_blend(picture: &mut Tensor, tiles: &Tensor, at: &[TileAt]) -> Result<()> {
    let (size, channels, width) = (tiles.dim_back(2), tiles.dim_back(1), picture.dim_back(2));
    let height = picture.shape()[0];
    let (starts, entries) = cells(at, size, height, width);
    let (starts, entries) = (Words::sizes(tiles, &starts)?, Words::sizes(tiles, &entries)?);
    let call = Call::named(OP, "tile_blend", tiles)?.tensor(tiles)?.words(&starts).words(&entries);
    let call = call.tensor(picture)?.size(size)?.size(channels)?.size(width * channels)?;
    call.size(width.div_ceil(CELL))?.over_rows(height, width * channels, 1)
}

pub fn add_tents(
    sum: &mut Tensor,
    part: &Tensor,
    corner: TileAt,
    down: &[f32],
    across: &[f32],
) -> Result<()> {
    let (width, channels) = (sum.dim_back(2), sum.dim_back(1));
    let length = part.dim_back(2) * channels;
    let weights = |w: &[f32]| Tensor::new(&[w.len()], w.to_vec())?.to_like(part);
    let (down, across) = (weights(down)?, weights(across)?);
    let call = Call::named(OP, "add_tents", part)?.tensor(sum)?;
    let call = call.long((corner.y * width + corner.x) * channels).long(width * channels);
    let call = call.tensor(part)?.tensor(&down)?.tensor(&across)?.size(channels)?.size(length)?;
    call.over_rows(part.shape()[0], length, 1)
}

/// (y, x) of every tile.
fn corners(like: &Tensor, at: &[TileAt]) -> Result<Words> {
    Words::sizes(like, &at.iter().flat_map(|t| [t.y, t.x]).collect::<Vec<_>>())
}

/// For every cell of the canvas, row by row, the tiles that meet it: where each cell's entries start (and the last one's end), and the
/// entries (tile, y, x), in the order of the tiles.
fn cells(at: &[TileAt], size: usize, height: usize, width: usize) -> (Vec<usize>, Vec<usize>) {
    let across = width.div_ceil(CELL);
    let mut lists = vec![Vec::new(); height.div_ceil(CELL) * across];
    for (tile, t) in at.iter().enumerate() {
        for row in t.y / CELL..(t.y + size).div_ceil(CELL) {
            for column in t.x / CELL..(t.x + size).div_ceil(CELL) {
                lists[row * across + column].push([tile, t.y, t.x]);
            }
        }
    }
    let (mut starts, mut entries) = (vec![0], Vec::new());
    let mut count = 0;
    for list in lists {
        count += list.len();
        starts.push(count);
        entries.extend(list.into_iter().flatten());
    }
    (starts, entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_know_their_tiles_in_order() {
        let at = [TileAt { y: 0, x: 0 }, TileAt { y: 0, x: 60 }, TileAt { y: 64, x: 63 }];
        let (starts, entries) = cells(&at, 8, 100, 130);
        assert_eq!(starts, [0, 2, 3, 3, 4, 5, 5]);
        let flat: Vec<usize> = [[0, 0, 0], [1, 0, 60], [1, 0, 60], [2, 64, 63], [2, 64, 63]].concat();
        assert_eq!(entries, flat);
    }
}
