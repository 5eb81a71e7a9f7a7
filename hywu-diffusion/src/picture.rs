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
    /// [1, height, width, 3].
    pub fn to_tensor(&self) -> Tensor {
        Tensor::build(&[1, self.height, self.width, 3], |out| out.copy_from_slice(&self.rgb))
    }
}
