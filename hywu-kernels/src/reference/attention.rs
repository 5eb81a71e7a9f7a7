//! softmax(Q K^T / sqrt(d)) V, one score at a time.

use crate::ops::attention::{Attention, Layout, Rotary};
use std::ops::Range;

/// A query head of a batch entry. What its queries see is asked pair by pair, straight from the definitions.
struct Unit<'a> {
    args: &'a Attention,
    batch: [usize; 2],
    head: usize,
    /// The entry's tokens among those of the tensors.
    queries: Range<usize>,
    keys: Range<usize>,
}

impl<'a> Unit<'a> {
    fn all(args: &'a Attention) -> impl Iterator<Item = Self> {
        let entries = (0..args.batch[0]).flat_map(|b0| (0..args.batch[1]).map(move |b1| [b0, b1]));
        entries.flat_map(move |batch| {
            let of = |offsets: &Vec<usize>| offsets[batch[0]]..offsets[batch[0] + 1];
            let (queries, keys) = match &args.ragged {
                Some(ragged) => (of(&ragged.queries), of(&ragged.keys)),
                None => (0..args.queries, 0..args.keys),
            };
            let unit = move |head| Self { args, batch, head, queries: queries.clone(), keys: keys.clone() };
            (0..args.heads).map(unit)
        })
    }
    /// Does query i see key j?
    fn sees(&self, i: usize, j: usize) -> bool {
        let [b0, b1] = self.batch;
        let lengths = self.args.key_lengths.as_ref();
        if lengths.is_some_and(|n| j >= n[b0 * self.args.batch[1] + b1]) {
            return false;
        }
        let Some(causal) = &self.args.causal else { return true };
        let at = self.keys.len() - self.queries.len() + i;
        let spans = match &causal.spans[..] {
            [] => &[][..],
            [all] => all,
            each => &each[b0],
        };
        j <= at || spans.iter().any(|span| span.contains(&at) && span.contains(&j))
    }
    /// Keys that query i sees.
    fn seen(&self, i: usize) -> impl Iterator<Item = usize> + Clone {
        (0..self.keys.len()).filter(move |&j| self.sees(i, j))
    }
    fn row(&self, l: &Layout, token: usize, head: usize) -> Range<usize> {
        let [b0, b1] = self.batch;
        let at = l.offset + b0 * l.batch[0] + b1 * l.batch[1] + token * l.token + head * l.head;
        at..at + self.args.head_dim
    }
    /// The elements of a query or of its output.
    fn of_query(&self, l: &Layout, i: usize) -> Range<usize> {
        self.row(l, self.queries.start + i, self.head)
    }
    /// Those of a key or a value.
    fn of_key(&self, l: &Layout, j: usize) -> Range<usize> {
        self.row(l, self.keys.start + j, self.head / (self.args.heads / self.args.kv_heads))
    }
}

/// The output of `args` in f64: `q`, `k`, `v` as in the op, `norm` the weights for queries and keys. Elements of the output tensor
/// that no row writes are zero.
pub fn attention(
    args: &Attention,
    q: &[f64],
    k: &[f64],
    v: &[f64],
    norm: Option<(&[f64], &[f64])>,
) -> Vec<f64> {
    let mut out = vec![0.0; args.out_shape.iter().product()];
    let rotary = args.rotary.as_ref();
    for unit in Unit::all(args) {
        let key = |j| {
            let x = k[unit.of_key(&args.k, j)].to_vec();
            rotated(normed(x, norm.map(|n| n.1)), rotary.map(|r| &r.1), j)
        };
        let keys: Vec<_> = (0..unit.keys.len()).map(key).collect();
        for i in 0..unit.queries.len() {
            let query = q[unit.of_query(&args.q, i)].to_vec();
            let query = rotated(normed(query, norm.map(|n| n.0)), rotary.map(|r| &r.0), i);
            let seen = unit.seen(i);
            let score = |j: usize| dot(&query, &keys[j]) / (args.head_dim as f64).sqrt();
            let scores: Vec<f64> = seen.clone().map(score).collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let out = &mut out[unit.of_query(&args.out, i)];
            for (j, weight) in seen.zip(&weights) {
                for (o, x) in out.iter_mut().zip(&v[unit.of_key(&args.v, j)]) {
                    *o += weight / sum * x;
                }
            }
        }
    }
    out
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
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
/// to queries and keys after norm and rotation, to weights, and to the gradients of scores; `out` is the output that the kernel has
/// saved, where it computes from that what a row's gradients have in common, and not from all weights of the row. `narrowed`: gradients of
/// scores are computed from the rounded weights too.
pub fn gradients(
    args: &Attention,
    [q, k, v]: [&[f64]; 3],
    norm: Option<(&[f64], &[f64])>,
    (out, grad): (Option<&[f64]>, &[f64]),
    narrowed: bool,
    round: impl Fn(f64) -> f64,
) -> Gradients {
    let d = args.head_dim;
    let scale = 1.0 / (d as f64).sqrt();
    let mut result = Gradients {
        out: vec![0.0; args.out_shape.iter().product()],
        operands: [q, k, v].map(|x| vec![0.0; x.len()]),
        norm: [vec![0.0; d], vec![0.0; d]],
    };
    let rotary = [args.rotary.as_ref().map(|r| &r.0), args.rotary.as_ref().map(|r| &r.1)];
    let weights = [norm.map(|n| n.0), norm.map(|n| n.1)];
    let packed = |x: &[f64], which: usize, token| -> Vec<f64> {
        rotated(normed(x.to_vec(), weights[which]), rotary[which], token).into_iter().map(&round).collect()
    };
    for unit in Unit::all(args) {
        let keys: Vec<_> = (0..unit.keys.len()).map(|j| packed(&k[unit.of_key(&args.k, j)], 1, j)).collect();
        let mut d_keys = vec![vec![0.0; d]; unit.keys.len()];
        for i in 0..unit.queries.len() {
            let row = unit.of_query(&args.out, i);
            let g = &grad[row.clone()];
            let query = packed(&q[unit.of_query(&args.q, i)], 0, i);
            let seen = unit.seen(i);
            let scores: Vec<f64> = seen.clone().map(|j| scale * dot(&query, &keys[j])).collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - most).exp()).sum();
            let of_weight = |j| dot(g, &v[unit.of_key(&args.v, j)]);
            let common = match out {
                Some(out) => dot(g, &out[row.clone()]),
                None => seen.clone().zip(&scores).map(|(j, s)| (s - most).exp() / sum * of_weight(j)).sum(),
            };
            let mut d_query = vec![0.0; d];
            for (j, score) in seen.zip(&scores) {
                let weight = (score - most).exp() / sum;
                let value = unit.of_key(&args.v, j);
                let kept = if narrowed { round(weight) } else { weight };
                let d_score = round(kept * (of_weight(j) - common));
                // The forward pass divides by the sum at the end.
                let before = round((score - most).exp()) / sum;
                for c in 0..d {
                    result.out[row.start + c] += before * v[value.start + c];
                    result.operands[2][value.start + c] += round(weight) * g[c];
                    d_query[c] += d_score * keys[j][c] * scale;
                    d_keys[j][c] += d_score * query[c] * scale;
                }
            }
            result.add(0, q, unit.of_query(&args.q, i), d_query, weights[0], (rotary[0], i));
        }
        for (j, d_key) in d_keys.into_iter().enumerate() {
            result.add(1, k, unit.of_key(&args.k, j), d_key, weights[1], (rotary[1], j));
        }
    }
    result
}

impl Gradients {
    /// Adds what the gradient of a normalised and rotated row is for its operand and for the norm's weight.
    fn add(
        &mut self,
        which: usize,
        x: &[f64],
        at: Range<usize>,
        grad: Vec<f64>,
        weight: Option<&[f64]>,
        (rotary, token): (Option<&Rotary>, usize),
    ) {
        let (dx, dw) = unpacked(&x[at.clone()], grad, weight, rotary, token);
        self.operands[which][at].iter_mut().zip(dx).for_each(|(sum, x)| *sum += x);
        self.norm[which].iter_mut().zip(dw).for_each(|(sum, x)| *sum += x);
    }
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
