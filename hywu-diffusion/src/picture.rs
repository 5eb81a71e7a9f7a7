use hywu_kernels::Tensor;
use rayon::prelude::*;

/// Channel values of a picture that are worth a task of their own: a training window is none, its batch has tasks enough.
pub(crate) const TASK: usize = 1 << 19;

/// An RGB picture in memory: row-major height x width x 3, values in [-1, 1] (sRGB-encoded, as in files).
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// height * width * 3 values.
    pub rgb: Vec<f32>,
    /// height * width values in [0, 1], when the file had an alpha channel.
    pub alpha: Option<Vec<f32>>,
}

impl Picture {
    /// An opaque picture from row-major RGB in [-1, 1].
    pub fn from_rgb(height: usize, width: usize, rgb: Vec<f32>) -> Self {
        debug_assert_eq!(rgb.len(), height * width * 3);
        Self { height, width, rgb, alpha: None }
    }
    /// The window of `h` x `w` pixels at (y, x), which must lie inside; alpha is dropped.
    pub fn crop(&self, y: usize, x: usize, h: usize, w: usize) -> Self {
        let mut rgb = Vec::with_capacity(h * w * 3);
        for row in y..y + h {
            let start = (row * self.width + x) * 3;
            rgb.extend_from_slice(&self.rgb[start..start + w * 3]);
        }
        Self::from_rgb(h, w, rgb)
    }
    /// The picture in another size, antialiased (triangle filter); alpha is dropped. An empty size gives an empty picture. The bits
    /// are the same on every CPU, which a resizer that chooses its instructions at run time doesn't promise.
    pub fn resize(&self, height: usize, width: usize) -> Self {
        let mut rgb = vec![0.0; height * width * 3];
        if self.rgb.is_empty() || rgb.is_empty() {
            return Self::from_rgb(height, width, rgb);
        }
        let (down, across) = (taps(self.height, height), taps(self.width, width));
        let row = self.width * 3;
        // A row of the result costs the reading of `span` rows.
        let span = down.iter().map(|t| t.weights.len()).max().unwrap_or(1);
        rgb.par_chunks_mut(width * 3).zip(&down).with_min_len(TASK.div_ceil(span * row)).for_each_init(
            || vec![0.0; row],
            |wide, (out, taps)| {
                wide.fill(0.0);
                for (k, source) in taps.weights.iter().zip(self.rgb.chunks_exact(row).skip(taps.start)) {
                    wide.iter_mut().zip(source).for_each(|(w, v)| *w += k * v);
                }
                for (out, taps) in out.chunks_exact_mut(3).zip(&across) {
                    for (k, c) in taps.weights.iter().zip(wide[taps.start * 3..].chunks_exact(3)) {
                        (0..3).for_each(|i| out[i] += k * c[i]);
                    }
                    // The weights add up to 1 but for rounding.
                    out.iter_mut().for_each(|v| *v = v.clamp(-1.0, 1.0));
                }
            },
        );
        Self::from_rgb(height, width, rgb)
    }
    /// Two pictures of the same height side by side with a white gap; both opaque, on white.
    pub fn side_by_side(left: &Self, right: &Self) -> Self {
        let height = left.height.max(right.height);
        let gap = (height / 64).max(2);
        let width = left.width + gap + right.width;
        let mut rgb = vec![1.0; height * width * 3];
        for (picture, x) in [(left, 0), (right, left.width + gap)] {
            for y in 0..picture.height {
                let row = &picture.rgb[y * picture.width * 3..(y + 1) * picture.width * 3];
                let out = (y * width + x) * 3;
                rgb[out..out + row.len()].copy_from_slice(row);
                let Some(alpha) = &picture.alpha else { continue };
                let out = rgb[out..out + row.len()].chunks_exact_mut(3);
                out.zip(&alpha[y * picture.width..])
                    .for_each(|(c, a)| c.iter_mut().for_each(|v| *v = *v * a + 1.0 - a));
            }
        }
        Self::from_rgb(height, width, rgb)
    }
    /// [1, height, width, 3].
    pub fn to_tensor(&self) -> Tensor {
        Tensor::build(&[1, self.height, self.width, 3], |out| out.copy_from_slice(&self.rgb))
    }
}

/// The values of an axis that make one value of the resized axis, from `start` on, and their weights.
struct Taps {
    start: usize,
    weights: Vec<f32>,
}

/// A triangle around the centre of each of `to` pixels, which reaches as far on both sides as one pixel of the coarser axis is wide;
/// what lies outside of the `from` >= 1 pixels is left out.
fn taps(from: usize, to: usize) -> Vec<Taps> {
    let ratio = from as f64 / to as f64;
    let reach = ratio.max(1.0);
    let around = |i: usize| {
        let centre = (i as f64 + 0.5) * ratio - 0.5;
        let start = (centre - reach).ceil().max(0.0) as usize;
        let end = ((centre + reach).floor() as usize).min(from - 1);
        let weights: Vec<f64> =
            (start..=end).map(|j| (1.0 - (j as f64 - centre).abs() / reach).max(0.0)).collect();
        let sum: f64 = weights.iter().sum();
        Taps { start, weights: weights.into_iter().map(|w| (w / sum) as f32).collect() }
    };
    (0..to).map(around).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resizing_keeps_black_and_white() {
        let rgb: Vec<f32> = (0..16 * 16).flat_map(|i| [if i % 16 < 8 { -1.0 } else { 1.0 }; 3]).collect();
        let small = Picture::from_rgb(16, 16, rgb).resize(4, 4);
        assert_eq!((small.rgb[0], small.rgb[9]), (-1.0, 1.0));
        let mean: f32 = small.rgb.iter().sum();
        assert!(mean.abs() < 1e-4, "{mean}");
    }

    #[test]
    fn resizing_agrees_with_the_triangle_filter_of_image() {
        let mut random = hywu_core::Philox::new(5).stream(0);
        let (h, w) = (37, 50);
        let rgb: Vec<f32> = (0..h * w * 3).map(|_| random.range(-1.0, 1.0)).collect();
        let unit = rgb.iter().map(|v| (v + 1.0) * 0.5).collect();
        let buffer = image::Rgb32FImage::from_raw(w as u32, h as u32, unit).expect("the size fits");
        let picture = Picture::from_rgb(h, w, rgb);
        for (height, width) in [(64, 64), (9, 13), (37, 50), (80, 7), (1, 1)] {
            let triangle = image::imageops::FilterType::Triangle;
            let wanted = image::imageops::resize(&buffer, width as u32, height as u32, triangle);
            let resized = picture.resize(height, width).rgb;
            assert_eq!(resized.len(), height * width * 3);
            for (a, b) in resized.iter().zip(wanted.as_raw()) {
                assert!((a - (b * 2.0 - 1.0)).abs() < 1e-4, "{height} x {width}: {a} {b}");
            }
        }
        assert!(picture.resize(0, 5).rgb.is_empty());
    }
}
