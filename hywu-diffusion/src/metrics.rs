//! How close an edit is to the true one.

use crate::{Picture, skills::filters::luma};

/// Peak signal-to-noise ratio in dB over all channel values, white = 1: 10 log10(1 / mean square error); infinite for equal
/// pictures.
///
/// # Panics
/// When the sizes differ.
pub fn psnr(a: &Picture, b: &Picture) -> f64 {
    assert_eq!((a.height, a.width), (b.height, b.width), "pictures of one size");
    let square: f64 = a.rgb.iter().zip(&b.rgb).map(|(a, b)| (f64::from(a - b) * 0.5).powi(2)).sum();
    -10.0 * (square / a.rgb.len().max(1) as f64).log10()
}

/// Structural similarity of the luma (Wang et al., "Image quality assessment: from error visibility to structural similarity",
/// 2004): mean over 11 x 11 Gaussian windows (sigma 1.5) with K1 = 0.01, K2 = 0.03; 1 for equal pictures.
///
/// # Panics
/// When the sizes differ.
pub fn ssim(a: &Picture, b: &Picture) -> f64 {
    assert_eq!((a.height, a.width), (b.height, b.width), "pictures of one size");
    let (h, w) = (a.height, a.width);
    let gray = |p: &Picture| -> Vec<f64> {
        p.rgb.chunks_exact(3).map(|c| f64::from((luma([c[0], c[1], c[2]]) + 1.0) * 0.5)).collect()
    };
    let (a, b) = (gray(a), gray(b));
    let product = |x: &[f64], y: &[f64]| -> Vec<f64> { x.iter().zip(y).map(|(x, y)| x * y).collect() };
    let (ma, mb) = (window_mean(&a, h, w), window_mean(&b, h, w));
    let (aa, bb) = (window_mean(&product(&a, &a), h, w), window_mean(&product(&b, &b), h, w));
    let ab = window_mean(&product(&a, &b), h, w);
    let (c1, c2) = (0.01f64.powi(2), 0.03f64.powi(2));
    let similarity = |i: usize| {
        let (x, y) = (ma[i], mb[i]);
        let (vx, vy, cov) = (aa[i] - x * x, bb[i] - y * y, ab[i] - x * y);
        (2.0 * x * y + c1) * (2.0 * cov + c2) / ((x * x + y * y + c1) * (vx + vy + c2))
    };
    (0..a.len()).map(similarity).sum::<f64>() / a.len().max(1) as f64
}

/// Scales of [`gradient_distance`].
const SCALES: usize = 4;
/// Steps between neighbours below this much of white are invisible.
const LEAST_STEP: f64 = 0.004;

/// A perceptual distance without a trained network: how differently two pictures change from pixel to pixel, at several scales.
///
/// At full size, a half, a quarter and an eighth (2 x 2 means), over all steps g between horizontal and vertical neighbours of every
/// channel (white = 1), it is sum |g_a - g_b| / sum (|g_a| + |g_b| + 0.004), and the mean over the scales that have at least 8 pixels a side.
/// 0 for equal pictures, near 1 where one has structure that the other lacks. Unlike PSNR it does not see a shift of all values, and
/// blur, noise, blocks and halos count by the edges that they take or add, as in gradient magnitude similarity (Xue et al.,
/// arXiv 1308.3052).
///
/// # Panics
/// When the sizes differ.
pub fn gradient_distance(a: &Picture, b: &Picture) -> f64 {
    assert_eq!((a.height, a.width), (b.height, b.width), "pictures of one size");
    let (mut h, mut w) = (a.height, a.width);
    let unit = |p: &Picture| -> Vec<f64> { p.rgb.iter().map(|v| f64::from(v + 1.0) * 0.5).collect() };
    let (mut a, mut b) = (unit(a), unit(b));
    let (mut sum, mut scales) = (0.0, 0);
    while scales < SCALES && (scales == 0 || h.min(w) >= 8) {
        let (mut apart, mut all) = (0.0, 0.0);
        let mut step = |i: usize, j: usize| {
            let (x, y) = (a[j] - a[i], b[j] - b[i]);
            apart += (x - y).abs();
            all += x.abs() + y.abs() + LEAST_STEP;
        };
        for i in 0..a.len() {
            if i % (w * 3) + 3 < w * 3 {
                step(i, i + 3);
            }
            if i + w * 3 < a.len() {
                step(i, i + w * 3);
            }
        }
        sum += if all > 0.0 { apart / all } else { 0.0 };
        scales += 1;
        (a, b) = (half(&a, h, w), half(&b, h, w));
        (h, w) = (h / 2, w / 2);
    }
    sum / scales as f64
}

/// Means of 2 x 2 pixels of three channels.
fn half(x: &[f64], h: usize, w: usize) -> Vec<f64> {
    let at = |y: usize, column: usize, c: usize| x[(y * w + column) * 3 + c];
    let mut small = Vec::with_capacity((h / 2) * (w / 2) * 3);
    for (y, column) in (0..h / 2).flat_map(|y| (0..w / 2).map(move |column| (2 * y, 2 * column))) {
        small.extend((0..3).map(|c| {
            0.25 * (at(y, column, c) + at(y, column + 1, c) + at(y + 1, column, c) + at(y + 1, column + 1, c))
        }));
    }
    small
}

/// Gaussian mean over 11 x 11 pixels; at the borders over what there is of them.
fn window_mean(x: &[f64], h: usize, w: usize) -> Vec<f64> {
    let kernel: Vec<f64> = (-5i32..=5).map(|i| (-0.5 * (f64::from(i) / 1.5).powi(2)).exp()).collect();
    let along = |x: &[f64], n: usize, stride: usize, i: usize| {
        let place = i / stride % n;
        let (mut sum, mut weight) = (0.0, 0.0);
        for (k, offset) in kernel.iter().zip(-5isize..) {
            let Some(at) = place.checked_add_signed(offset).filter(|at| *at < n) else { continue };
            sum += k * x[i + at * stride - place * stride];
            weight += k;
        }
        sum / weight
    };
    let rows: Vec<f64> = (0..x.len()).map(|i| along(x, w, 1, i)).collect();
    (0..x.len()).map(|i| along(&rows, h, w, i)).collect()
}

/// How visible borders before these columns and rows are: the mean step of `result - truth` across them over the mean step
/// elsewhere. 1 when a border is like any other place; `None` without a border.
///
/// # Panics
/// When the sizes differ.
pub fn seam(result: &Picture, truth: &Picture, columns: &[usize], rows: &[usize]) -> Option<f64> {
    assert_eq!((result.height, result.width), (truth.height, truth.width), "pictures of one size");
    let error: Vec<f64> = result.rgb.iter().zip(&truth.rgb).map(|(a, b)| f64::from(a - b)).collect();
    let (mut at, mut elsewhere) = ((0.0, 0usize), (0.0, 0usize));
    let line = result.width * 3;
    // Every value against the one before it, once across and once down.
    for (borders, back, place) in [(columns, 3, 0), (rows, line, 1)] {
        for (i, value) in error.iter().enumerate() {
            let position = [i % line / 3, i / line][place];
            if position == 0 {
                continue;
            }
            let sum = if borders.contains(&position) { &mut at } else { &mut elsewhere };
            sum.0 += (value - error[i - back]).abs();
            sum.1 += 1;
        }
    }
    if at.1 == 0 || elsewhere.1 == 0 {
        return None;
    }
    let (at, elsewhere) = (at.0 / at.1 as f64, elsewhere.0 / elsewhere.1 as f64);
    Some(if at == elsewhere { 1.0 } else { at / elsewhere })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::skills::filters::{blur, colours};

    fn picture() -> Picture {
        let rgb = (0..40 * 50 * 3).map(|i| ((i * 7919) % 256) as f32 / 127.5 - 1.0).collect();
        blur(&Picture::from_rgb(40, 50, rgb), 1.0)
    }

    #[test]
    fn psnr_of_a_known_shift() {
        let a = Picture::from_rgb(2, 2, vec![0.0; 12]);
        // 0.2 of the range -1..1 is 0.1 of white: 20 dB.
        let b = Picture::from_rgb(2, 2, vec![0.2; 12]);
        assert!((psnr(&a, &b) - 20.0).abs() < 1e-5);
        assert_eq!(psnr(&a, &a), f64::INFINITY);
    }

    #[test]
    fn ssim_is_one_for_itself_and_falls_with_damage() {
        let a = picture();
        assert!((ssim(&a, &a) - 1.0).abs() < 1e-12);
        let (little, much) = (ssim(&a, &blur(&a, 0.7)), ssim(&a, &blur(&a, 3.0)));
        assert!(0.0 < much && much < little && little < 1.0, "{little} {much}");
        // Against a plain formula at one pixel far from the borders is the same as against constants: luminance term alone.
        let (x, y) = (Picture::from_rgb(12, 12, vec![0.0; 432]), Picture::from_rgb(12, 12, vec![0.2; 432]));
        let expected = (2.0 * 0.5 * 0.6 + 1e-4) / (0.25 + 0.36 + 1e-4);
        assert!((ssim(&x, &y) - expected).abs() < 1e-6);
    }

    #[test]
    fn gradients_tell_structure_from_light() {
        let a = picture();
        assert_eq!(gradient_distance(&a, &a), 0.0);
        let lighter = colours(&a, |c| c.map(|v| 0.9 * v + 0.05));
        let (light, soft) = (gradient_distance(&a, &lighter), gradient_distance(&a, &blur(&a, 2.0)));
        assert!(light < 0.1 && soft > 3.0 * light && soft < 1.0, "{light} {soft}");
        assert_eq!(soft, gradient_distance(&blur(&a, 2.0), &a));
        // One column of steps of 0.5 against none, by hand: 3 channels x 4 rows x |0.5| over that + 0.004 for each of the 72 steps.
        let step = Picture::from_rgb(4, 4, (0..48).map(|i| if i / 3 % 4 < 2 { 0.0 } else { 1.0 }).collect());
        let plain = Picture::from_rgb(4, 4, vec![0.0; 48]);
        let expected = 12.0 * 0.5 / (12.0 * 0.5 + 72.0 * 0.004);
        assert!((gradient_distance(&step, &plain) - expected).abs() < 1e-9);
    }

    #[test]
    fn a_step_at_a_border_is_seen() {
        let truth = picture();
        let noisy = colours(&truth, |c| c.map(|v| v + 0.05 * (v * 91.0).sin()));
        let ratio = seam(&noisy, &truth, &[16, 32], &[16]).expect("borders");
        assert!((ratio - 1.0).abs() < 0.25, "{ratio}");
        assert_eq!(seam(&noisy, &truth, &[], &[]), None);
        let mut stepped = noisy.clone();
        stepped.rgb.chunks_exact_mut(3).enumerate().for_each(|(i, c)| {
            if i % 50 >= 16 {
                c.iter_mut().for_each(|v| *v += 0.2);
            }
        });
        assert!(seam(&stepped, &truth, &[16], &[]) > Some(1.5));
        let turned = |p: &Picture| {
            let at = |i: usize| p.rgb[((i / 3 % p.height) * p.width + i / 3 / p.height) * 3 + i % 3];
            Picture::from_rgb(p.width, p.height, (0..p.rgb.len()).map(at).collect())
        };
        assert!(seam(&turned(&stepped), &turned(&truth), &[], &[16]) > Some(1.5));
    }
}
