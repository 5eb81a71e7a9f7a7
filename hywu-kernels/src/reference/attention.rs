//! softmax(Q K^T / sqrt(d)) V, one score at a time.

use crate::ops::attention::{Attention, Layout, Rotary};

/// The output of `args` in f64: `q`, `k`, `v` as in the op, `norm` the weights for queries and keys. Elements of the output tensor
/// that no row writes are zero.
pub fn attention(
    args: &Attention,
    q: &[f64],
    k: &[f64],
    v: &[f64],
    norm: Option<(&[f64], &[f64])>,
) -> Vec<f64> {
    let d = args.head_dim;
    let mut out = vec![0.0; args.out_shape.iter().product()];
    for b0 in 0..args.batch[0] {
        for b1 in 0..args.batch[1] {
            let valid = args.key_lengths.as_ref().map_or(args.keys, |n| n[b0 * args.batch[1] + b1]);
            for head in 0..args.heads {
                let at = |l: &Layout, token: usize| {
                    l.offset + b0 * l.batch[0] + b1 * l.batch[1] + token * l.token + head * l.head
                };
                let row = |x: &[f64], l: &Layout, token| x[at(l, token)..at(l, token) + d].to_vec();
                let rotary_q = args.rotary.as_ref().map(|r| &r.0);
                let rotary_k = args.rotary.as_ref().map(|r| &r.1);
                let keys: Vec<_> = (0..valid)
                    .map(|j| rotated(normed(row(k, &args.k, j), norm.map(|n| n.1)), rotary_k, j))
                    .collect();
                for i in 0..args.queries {
                    let query = rotated(normed(row(q, &args.q, i), norm.map(|n| n.0)), rotary_q, i);
                    let dot = |key: &Vec<f64>| {
                        query.iter().zip(key).map(|(a, b)| a * b).sum::<f64>() / (d as f64).sqrt()
                    };
                    let scores: Vec<f64> = keys.iter().map(dot).collect();
                    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
                    let sum: f64 = weights.iter().sum();
                    let to = at(&args.out, i);
                    for (j, weight) in weights.iter().enumerate() {
                        for (o, x) in out[to..to + d].iter_mut().zip(row(v, &args.v, j)) {
                            *o += weight / sum * x;
                        }
                    }
                }
            }
        }
    }
    out
}

/// RMSNorm of a row.
fn normed(mut x: Vec<f64>, weight: Option<&[f64]>) -> Vec<f64> {
    if let Some(weight) = weight {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        for (x, w) in x.iter_mut().zip(weight) {
            *x *= w / (mean + 1e-6).sqrt();
        }
    }
    x
}

/// Pairs (2i, 2i + 1) turned by the angle of (token, i).
fn rotated(mut x: Vec<f64>, rotary: Option<&Rotary>, token: usize) -> Vec<f64> {
    if let Some(rotary) = rotary {
        for i in 0..x.len() / 2 {
            let at = token * (x.len() / 2) + i;
            let (cos, sin) = (f64::from(rotary.cos.data()[at]), f64::from(rotary.sin.data()[at]));
            let (a, b) = (x[2 * i], x[2 * i + 1]);
            x[2 * i] = cos * a - sin * b;
            x[2 * i + 1] = sin * a + cos * b;
        }
    }
    x
}
