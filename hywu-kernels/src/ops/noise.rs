//! Standard normal noise that depends on (seed, position) alone.

use crate::Tensor;

/// Noise for a window of an unbounded picture: [height, width, channels], the pixel (y, x) of the picture always draws the same
/// numbers whatever the window. Stream = picture row, index = x * channels + c (see [`hywu_core::Philox`]).
pub fn noise_window(seed: u64, y0: usize, x0: usize, height: usize, width: usize, channels: usize) -> Tensor {
    let _ = (seed, y0, x0, height, width, channels);
    todo!()
}
