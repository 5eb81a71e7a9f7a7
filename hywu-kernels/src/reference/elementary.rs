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

/// Colour polynomials per patch; see [`crate::ops::local_colour`].
pub fn local_colour(coef: &[f64], source: &[f64], pixels: usize) -> Vec<f64> {
    let mut out = Vec::with_capacity(source.len());
    for (i, pixel) in source.chunks(3).enumerate() {
        let [r, g, b] = [pixel[0], pixel[1], pixel[2]];
        let features = [1.0, r, g, b, r * r, g * g, b * b];
        for row in coef[i / pixels * 21..][..21].chunks(7) {
            out.push(row.iter().zip(features).map(|(c, f)| c * f).sum());
        }
    }
    out
}
