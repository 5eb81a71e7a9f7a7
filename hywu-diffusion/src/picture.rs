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
        let buffer: Option<image::Rgb32FImage> =
            image::ImageBuffer::from_raw(side(self.width), side(self.height), self.rgb.clone());
        let (h, w) = (side(height), side(width));
        let resized =
            buffer.map(|b| image::imageops::resize(&b, w, h, image::imageops::FilterType::Triangle));
        Self::from_rgb(height, width, resized.map_or_else(|| vec![0.0; height * width * 3], |b| b.into_raw()))
    }
    /// [1, height, width, 3].
    pub fn to_tensor(&self) -> Tensor {
        Tensor::build(&[1, self.height, self.width, 3], |out| out.copy_from_slice(&self.rgb))
    }
}
