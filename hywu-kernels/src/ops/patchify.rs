//! Images to patch tokens and back.

use crate::{Result, Tape, Var};

/// `image` [batch, height, width, channels] -> [batch, height/p * width/p, p * p * channels]; both sizes multiples of p.
/// A patch's elements are ordered (row, column, channel).
pub fn patchify(tape: &Tape, image: &Var, p: usize) -> Result<Var> {
    let _ = (tape, image, p);
    todo!()
}

/// The inverse of [`patchify`].
pub fn unpatchify(tape: &Tape, patches: &Var, p: usize, height: usize, width: usize) -> Result<Var> {
    let _ = (tape, patches, p, height, width);
    todo!()
}
