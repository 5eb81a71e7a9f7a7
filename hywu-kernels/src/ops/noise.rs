//! Standard normal noise that depends on (seed, position) alone: the same bits on every device.

use crate::{Device, Error, Result, Tensor};
use hywu_core::Dtype;

/// Noise for a window of an unbounded picture: [height, width, channels] in f32 on `device`; the pixel (y, x) of the picture always
/// draws the same numbers whatever the window. Stream = picture row, index = x * channels + c (see [`hywu_core::Philox`]).
///
/// # Errors
/// A device that can't be used, or has not enough memory.
pub fn noise_window(
    device: Device,
    seed: u64,
    y0: usize,
    x0: usize,
    height: usize,
    width: usize,
    channels: usize,
) -> Result<Tensor> {
    let mut out = Tensor::empty(device, &[height, width, channels], Dtype::F32)?;
    on_device!(out, noise::noise_window(&mut out, seed, y0, x0 * channels));
    Ok(out)
}

/// t * target + (1 - t) * noise for every batch entry of `target` [batch, ..], in its dtype; entry b draws numbers 0 .. of stream
/// b + 1, whatever the other entries.
///
/// # Errors
/// Another number of timesteps `t` than batch entries; not enough memory.
pub fn noised(target: &Tensor, t: &[f32], seed: u64) -> Result<Tensor> {
    let batch = target.shape().first().copied().unwrap_or(1);
    if t.len() != batch {
        let expected = format!("[{batch}], one per batch entry");
        return Err(Error::shape("noised", "timesteps", &[t.len()], expected));
    }
    if target.numel() == 0 {
        return Ok(target.clone());
    }
    Ok(on_device!(target, noise::noised(target, t, seed)))
}
