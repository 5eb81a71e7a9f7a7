//! Images to patch tokens and back.

use crate::{Error, Result, Tape, Tensor, Var};

/// Sizes of an image cut in patches of p x p pixels.
#[derive(Clone, Copy)]
struct Grid {
    batch: usize,
    rows: usize,
    columns: usize,
    p: usize,
    channels: usize,
}

impl Grid {
    fn image(self) -> [usize; 4] {
        [self.batch, self.rows * self.p, self.columns * self.p, self.channels]
    }
    fn patches(self) -> [usize; 3] {
        [self.batch, self.rows * self.columns, self.p * self.p * self.channels]
    }
    /// Calls f(start in the image, start in the patches, length) for every run of pixels that stays together.
    fn runs(self, mut f: impl FnMut(usize, usize, usize)) {
        let Self { batch, rows, columns, p, channels } = self;
        let run = p * channels;
        for row in 0..batch * rows {
            for column in 0..columns {
                for y in 0..p {
                    f(
                        ((row * p + y) * columns + column) * run,
                        ((row * columns + column) * p + y) * run,
                        run,
                    );
                }
            }
        }
    }
    fn to_patches(self, image: &Tensor) -> Tensor {
        let x = image.data();
        Tensor::build(&self.patches(), |out| {
            self.runs(|i, o, n| out[o..o + n].copy_from_slice(&x[i..i + n]));
        })
    }
    fn to_image(self, patches: &Tensor) -> Tensor {
        let x = patches.data();
        Tensor::build(&self.image(), |out| {
            self.runs(|o, i, n| out[o..o + n].copy_from_slice(&x[i..i + n]));
        })
    }
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
    Ok(tape.push(grid.to_patches(image.value()), &[image], move |grad, grads| {
        grads.accumulate(&image_, grid.to_image(grad))
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
    Ok(tape.push(grid.to_image(patches.value()), &[patches], move |grad, grads| {
        grads.accumulate(&patches_, grid.to_patches(grad))
    }))
}
