//! Oracles of the small ops, row by row.

/// RMSNorm with weight, then y * (1 + scale) + shift; `x` [batch, rows, c], `scale` and `shift` [batch, c].
pub fn rms_norm(x: &[f64], batch: usize, w: &[f64], eps: f64, scale: &[f64], shift: &[f64]) -> Vec<f64> {
    let c = w.len();
    let each = x.len() / batch;
    let mut out = Vec::with_capacity(x.len());
    for (b, entry) in x.chunks(each).enumerate() {
        for row in entry.chunks(c) {
            let rms = (row.iter().map(|v| v * v).sum::<f64>() / c as f64 + eps).sqrt();
            out.extend((0..c).map(|i| row[i] / rms * w[i] * (1.0 + scale[b * c + i]) + shift[b * c + i]));
        }
    }
    out
}

/// x / (1 + e^-x).
pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// [up | gate] -> up * silu(gate), rows of `n` channels.
pub fn swiglu(x: &[f64], n: usize) -> Vec<f64> {
    x.chunks(n).flat_map(|r| (0..n / 2).map(|i| r[i] * silu(r[n / 2 + i]))).collect()
}

/// x + gate * y, `gate` [batch, c].
pub fn gated_residual(x: &[f64], y: &[f64], gate: &[f64], c: usize) -> Vec<f64> {
    let each = x.len() / (gate.len() / c);
    (0..x.len()).map(|i| x[i] + gate[i / each * c + i % c] * y[i]).collect()
}

/// mean over the batch of weight * mean of squares.
pub fn weighted_mse(pred: &[f64], target: &[f64], weight: &[f64]) -> f64 {
    let each = pred.len() / weight.len();
    (0..pred.len()).map(|i| weight[i / each] * (pred[i] - target[i]).powi(2)).sum::<f64>() / pred.len() as f64
}

/// One filter per patch of `pixels` pixels with `n` features and `m` hidden channels; see [`crate::ops::local_filter`].
pub fn local_filter(
    coef: &[f64],
    features: &[f64],
    hidden: &[f64],
    pixels: usize,
    n: usize,
    m: usize,
) -> Vec<f64> {
    let mut out = Vec::with_capacity(features.len() / n * 3);
    for (i, (f, h)) in features.chunks(n).zip(hidden.chunks(m)).enumerate() {
        let coef = &coef[i / pixels * (3 * n + 4 * m)..];
        for c in 0..3 {
            let linear: f64 = (0..n).map(|k| coef[c * n + k] * f[k]).sum();
            let active = |j: usize| (h[j] + coef[3 * n + 3 * m + j]).max(0.0);
            out.push(linear + (0..m).map(|j| coef[3 * n + c * m + j] * active(j)).sum::<f64>());
        }
    }
    out
}

/// The features of one picture of `h` x `w` pixels, each by its definition; see [`crate::ops::local_filter::pixel_features`].
pub fn pixel_features(rgb: &[f64], h: usize, w: usize, p: usize) -> Vec<f64> {
    let mirror = |i: isize, n: usize| -> usize {
        let last = n as isize - 1;
        let mut i = i;
        while last > 0 && !(0..=last).contains(&i) {
            i = if i < 0 { -i } else { 2 * last - i };
        }
        i.clamp(0, last) as usize
    };
    let spline = [1.0, 4.0, 6.0, 4.0, 1.0];
    let smooth = |x: &[f64], hole: isize| -> Vec<f64> {
        let value = |i: usize| {
            let (y, x_, c) = ((i / 3 / w) as isize, (i / 3 % w) as isize, i % 3);
            let mut sum = 0.0;
            for (dy, ky) in (-2..).zip(spline) {
                for (dx, kx) in (-2..).zip(spline) {
                    sum += ky * kx / 256.0
                        * x[(mirror(y + dy * hole, h) * w + mirror(x_ + dx * hole, w)) * 3 + c];
                }
            }
            sum
        };
        (0..x.len()).map(value).collect()
    };
    let fine = smooth(rgb, 1);
    let middle = smooth(&fine, 2);
    let coarse = smooth(&middle, 4);
    let luma = |y: isize, x: isize| {
        let i = (mirror(y, h) * w + mirror(x, w)) * 3;
        0.299 * fine[i] + 0.587 * fine[i + 1] + 0.114 * fine[i + 2]
    };
    let mut out = Vec::new();
    for (y, x) in (0..h).flat_map(|y| (0..w).map(move |x| (y, x))) {
        let at = |x: &[f64], y: usize, x_: usize| [0, 1, 2].map(|c| x[(y * w + x_) * 3 + c]);
        let c = at(rgb, y, x);
        out.push(1.0);
        out.extend(c);
        out.extend(c.map(|v| v * v));
        out.extend([c[0] * c[1], c[1] * c[2], c[2] * c[0]]);
        for level in [&fine, &middle, &coarse] {
            out.extend(at(level, y, x));
        }
        let (sy, sx) = (y as isize, x as isize);
        let row = |d: isize| luma(sy + d, sx - 1) + 2.0 * luma(sy + d, sx) + luma(sy + d, sx + 1);
        let column = |d: isize| luma(sy - 1, sx + d) + 2.0 * luma(sy, sx + d) + luma(sy + 1, sx + d);
        out.push((row(1) - row(-1)).hypot(column(1) - column(-1)) / 4.0);
        let patch = (0..p * p).map(|i| at(rgb, y / p * p + i / p, x / p * p + i % p));
        let mean = patch.fold([0.0; 3], |sum, c| [0, 1, 2].map(|k| sum[k] + c[k] / (p * p) as f64));
        out.extend(mean);
        for place in [x, y] {
            let place = ((place % p) as f64 + 0.5) * 2.0 / p as f64 - 1.0;
            out.extend([place, place * c[0], place * c[1], place * c[2]]);
        }
    }
    out
}
