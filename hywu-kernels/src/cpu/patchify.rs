//! Images to patch tokens and back.

use crate::{Tensor, ops::patchify::Grid};

/// Calls f(start in the image, start in the patches, length) for every run of pixels that stays together.
fn runs(grid: Grid, mut f: impl FnMut(usize, usize, usize)) {
    let Grid { batch, rows, columns, p, channels } = grid;
    let run = p * channels;
    for row in 0..batch * rows {
        for column in 0..columns {
            for y in 0..p {
                f(((row * p + y) * columns + column) * run, ((row * columns + column) * p + y) * run, run);
            }
        }
    }
}

/// The patches of an image.
pub fn to_patches(image: &Tensor, grid: Grid) -> Tensor {
    let x = image.data();
    Tensor::build(&grid.patches(), |out| {
        runs(grid, |i, o, n| out[o..o + n].copy_from_slice(&x[i..i + n]));
    })
}

/// The image of patches.
pub fn to_image(patches: &Tensor, grid: Grid) -> Tensor {
    let x = patches.data();
    Tensor::build(&grid.image(), |out| {
        runs(grid, |o, i, n| out[o..o + n].copy_from_slice(&x[i..i + n]));
    })
}
