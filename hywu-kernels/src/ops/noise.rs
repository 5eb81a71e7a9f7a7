//! Standard normal noise that depends on (seed, position) alone.

use crate::Tensor;
use hywu_core::Philox;

/// Noise for a window of an unbounded picture: [height, width, channels], the pixel (y, x) of the picture always draws the same
/// numbers whatever the window. Stream = picture row, index = x * channels + c (see [`hywu_core::Philox`]).
pub fn noise_window(seed: u64, y0: usize, x0: usize, height: usize, width: usize, channels: usize) -> Tensor {
    let philox = Philox::new(seed);
    Tensor::build(&[height, width, channels], |out| {
        for (y, row) in out.chunks_mut((width * channels).max(1)).enumerate() {
            philox.fill_normal((y0 + y) as u64, (x0 * channels) as u64, row);
        }
    })
}
