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

/// What [`gradients`] returns: for q, k and v in the shape of their operands, and for the norm's weights.
pub struct Gradients {
    /// The output of the rounded rows and weights.
    pub out: Vec<f64>,
    /// Of q, k and v; elements that no row reads are zero.
    pub operands: [Vec<f64>; 3],
    /// Of the norm's weights for queries and keys.
    pub norm: [Vec<f64>; 2],
}

/// The gradients of sum(`grad` * output), one weight at a time. `round` is applied where a kernel with operands of low precision rounds:
/// to queries (times log2(e) / sqrt(d)) and keys after norm and rotation, to weights, and to the gradients of scores; `out` is the
/// output that the kernel has saved.
pub fn gradients(
    args: &Attention,
    [q, k, v]: [&[f64]; 3],
    norm: Option<(&[f64], &[f64])>,
    (out, grad): (&[f64], &[f64]),
    round: impl Fn(f64) -> f64,
) -> Gradients {
    let d = args.head_dim;
    let scale = 1.0 / (d as f64).sqrt();
    let mut result = Gradients {
        out: vec![0.0; out.len()],
        operands: [q, k, v].map(|x| vec![0.0; x.len()]),
        norm: [vec![0.0; d], vec![0.0; d]],
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for unit in 0..args.batch[0] * args.batch[1] * args.heads {
        let (entry, head) = (unit / args.heads, unit % args.heads);
        let (b0, b1) = (entry / args.batch[1], entry % args.batch[1]);
        let valid = args.key_lengths.as_ref().map_or(args.keys, |n| n[entry]);
        let row = |l: &Layout, token: usize| {
            let at = l.offset + b0 * l.batch[0] + b1 * l.batch[1] + token * l.token + head * l.head;
            at..at + d
        };
        let packed = |x: &[f64], l: &Layout, weight, rotary: Option<&Rotary>, factor: f64, token| {
            let x = rotated(normed(x[row(l, token)].to_vec(), weight), rotary, token);
            x.iter().map(|x| round(x * factor)).collect::<Vec<f64>>()
        };
        let rotary = args.rotary.as_ref();
        let (weight_q, weight_k) = (norm.map(|n| n.0), norm.map(|n| n.1));
        let factor = scale * std::f64::consts::LOG2_E;
        let query = |i| packed(q, &args.q, weight_q, rotary.map(|r| &r.0), factor, i);
        let key = |j| packed(k, &args.k, weight_k, rotary.map(|r| &r.1), 1.0, j);
        let keys: Vec<_> = (0..valid).map(key).collect();
        let mut d_keys = vec![vec![0.0; d]; valid];
        for i in 0..args.queries {
            let (query, g, o) = (query(i), &grad[row(&args.out, i)], &out[row(&args.out, i)]);
            let scores: Vec<f64> = keys.iter().map(|key| dot(&query, key)).collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - most).exp2()).sum();
            let mut d_query = vec![0.0; d];
            for j in 0..valid {
                let weight = (scores[j] - most).exp2() / sum;
                let value = row(&args.v, j);
                let d_score = round(weight * (dot(g, &v[value.clone()]) - dot(g, o)));
                // The forward pass divides by the sum at the end.
                let before = round((scores[j] - most).exp2()) / sum;
                for c in 0..d {
                    result.out[row(&args.out, i).start + c] += before * v[value.start + c];
                    result.operands[2][value.start + c] += round(weight) * g[c];
                    d_query[c] += d_score * keys[j][c] * scale;
                    d_keys[j][c] += d_score * query[c] * std::f64::consts::LN_2;
                }
            }
            let at = row(&args.q, i);
            let (dx, dw) = unpacked(&q[at.clone()], d_query, weight_q, rotary.map(|r| &r.0), i);
            result.operands[0][at].iter_mut().zip(dx).for_each(|(sum, x)| *sum += x);
            result.norm[0].iter_mut().zip(dw).for_each(|(sum, x)| *sum += x);
        }
        for (j, d_key) in d_keys.into_iter().enumerate() {
            let at = row(&args.k, j);
            let (dx, dw) = unpacked(&k[at.clone()], d_key, weight_k, rotary.map(|r| &r.1), j);
            result.operands[1][at].iter_mut().zip(dx).for_each(|(sum, x)| *sum += x);
            result.norm[1].iter_mut().zip(dw).for_each(|(sum, x)| *sum += x);
        }
    }
    result
}

/// The gradients of a row and of its norm's weight from that of the normalised and rotated row.
fn unpacked(
    x: &[f64],
    mut g: Vec<f64>,
    weight: Option<&[f64]>,
    rotary: Option<&Rotary>,
    token: usize,
) -> (Vec<f64>, Vec<f64>) {
    let d = x.len();
    if let Some(rotary) = rotary {
        for i in 0..d / 2 {
            let at = token * (d / 2) + i;
            let (cos, sin) = (f64::from(rotary.cos.data()[at]), f64::from(rotary.sin.data()[at]));
            (g[2 * i], g[2 * i + 1]) =
                (cos * g[2 * i] + sin * g[2 * i + 1], cos * g[2 * i + 1] - sin * g[2 * i]);
        }
    }
    let Some(weight) = weight else { return (g, vec![0.0; d]) };
    let inverse = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / d as f64 + 1e-6).sqrt();
    let along = (0..d).map(|c| x[c] * weight[c] * g[c]).sum::<f64>() * inverse * inverse / d as f64;
    let dx = (0..d).map(|c| inverse * (weight[c] * g[c] - x[c] * along)).collect();
    (dx, (0..d).map(|c| x[c] * g[c] * inverse).collect())
}
