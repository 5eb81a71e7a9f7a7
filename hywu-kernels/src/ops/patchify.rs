//! Images to patch tokens and back.

use crate::{Error, Result, Tape, Tensor, Var};

/// Sizes of an image cut in patches of p x p pixels.
#[derive(Clone, Copy)]
pub(crate) struct Grid {
    pub batch: usize,
    pub rows: usize,
    pub columns: usize,
    pub p: usize,
    pub channels: usize,
}

impl Grid {
    /// Shape of the image.
    pub fn image(self) -> [usize; 4] {
        [self.batch, self.rows * self.p, self.columns * self.p, self.channels]
    }
    /// Shape of the patches.
    pub fn patches(self) -> [usize; 3] {
        [self.batch, self.rows * self.columns, self.p * self.p * self.channels]
    }
}

/// The patches of an image.
fn to_patches(image: &Tensor, grid: Grid) -> Result<Tensor> {
    Ok(on_device!(image, patchify::to_patches(image, grid)))
}

/// The image of patches.
fn to_image(patches: &Tensor, grid: Grid) -> Result<Tensor> {
    Ok(on_device!(patches, patchify::to_image(patches, grid)))
}

/// `image` [batch, height, width, channels] -> [batch, height/p * width/p, p * p * channels]; both sizes multiples of p.
/// A patch's elements are ordered (row, column, channel).
///
/// # Errors
/// Sizes that p does not divide.
pub fn patchify(tape: &Tape, image: &Var, p: usize) -> Result<Var> {
    let grid = match *image.shape() {
        [batch, h, w, channels] if p > 0 && h % p == 0 && w % p == 0 => {
            Grid { batch, rows: h / p, columns: w / p, p, channels }
        }
        ref other => {
            let expected = format!("[batch, height, width, channels] with sizes that {p} divides");
            return Err(Error::shape("patchify", "image", other, expected));
        }
    };
    let image_ = image.clone();
    Ok(tape.push(to_patches(image.value(), grid)?, &[image], move |grad, grads| {
        grads.accumulate(&image_, to_image(grad, grid)?)
    }))
}

/// The inverse of [`patchify`].
///
/// # Errors
/// Patches that are not those of a height x width picture.
pub fn unpatchify(tape: &Tape, patches: &Var, p: usize, height: usize, width: usize) -> Result<Var> {
    let grid = match *patches.shape() {
        [batch, n, c]
            if p > 0 && height.is_multiple_of(p) && width.is_multiple_of(p) && c.is_multiple_of(p * p) =>
        {
            let grid = Grid { batch, rows: height / p, columns: width / p, p, channels: c / (p * p) };
            (grid.rows * grid.columns == n).then_some(grid)
        }
        _ => None,
    };
    let Some(grid) = grid else {
        let expected = format!("[batch, {height}/{p} * {width}/{p}, {p} * {p} * channels]");
        return Err(Error::shape("unpatchify", "patches", patches.shape(), expected));
    };
    let patches_ = patches.clone();
    Ok(tape.push(to_image(patches.value(), grid)?, &[patches], move |grad, grads| {
        grads.accumulate(&patches_, to_patches(grad, grid)?)
    }))
}
