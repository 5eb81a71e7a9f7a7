use hywu_kernels::Tensor;

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
    /// The picture in another size, antialiased (triangle filter); alpha is dropped. An empty size gives an empty picture.
    pub fn resize(&self, height: usize, width: usize) -> Self {
        let side = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        // The resizer clamps to [0, 1].
        let unit = self.rgb.iter().map(|v| (v + 1.0) * 0.5).collect();
        let buffer: Option<image::Rgb32FImage> =
            image::ImageBuffer::from_raw(side(self.width), side(self.height), unit);
        let (h, w) = (side(height), side(width));
        let resized =
            buffer.map(|b| image::imageops::resize(&b, w, h, image::imageops::FilterType::Triangle));
        let signed = |b: image::Rgb32FImage| b.into_raw().into_iter().map(|v| v * 2.0 - 1.0).collect();
        Self::from_rgb(height, width, resized.map_or_else(|| vec![0.0; height * width * 3], signed))
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
}
