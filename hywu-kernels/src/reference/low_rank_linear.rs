//! Oracle of [`LowRankLinear`](crate::ops::low_rank_linear::LowRankLinear).

use crate::ops::low_rank_linear::Segment;

/// Sizes of an oracle call.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Columns of x.
    pub inner: usize,
    /// Columns of y.
    pub outer: usize,
    /// Equal parts of y's columns, each with ranks of its own.
    pub parts: usize,
    /// Ranks of a part.
    pub rank: usize,
}

/// y = x W^T + bias + scale (x A^T) B^T by nested loops, row after row of every segment: `w` [weights, outer, inner], `bias` [weights,
/// outer] (empty: none), `a` [adapters, parts * rank, inner], `b` [adapters, outer, rank].
pub fn low_rank_linear(
    s: Sizes,
    segments: &[Segment],
    [x, w, bias, a, b]: [&[f64]; 5],
    scale: f64,
) -> Vec<f64> {
    let mut y = Vec::new();
    let mut rows = x.chunks(s.inner);
    for segment in segments {
        for x in rows.by_ref().take(segment.rows) {
            let dot = |row: &[f64]| -> f64 { row.iter().zip(x).map(|(a, b)| a * b).sum() };
            let ranks = s.parts * s.rank;
            let shrunk: Vec<f64> = match segment.adapter {
                Some(i) => (0..ranks).map(|r| dot(&a[(i * ranks + r) * s.inner..][..s.inner])).collect(),
                None => Vec::new(),
            };
            for o in 0..s.outer {
                let column = segment.weight * s.outer + o;
                let mut sum = dot(&w[column * s.inner..][..s.inner]);
                if !bias.is_empty() {
                    sum += bias[column];
                }
                if let Some(i) = segment.adapter {
                    let part = o / (s.outer / s.parts);
                    for r in 0..s.rank {
                        sum += scale * b[(i * s.outer + o) * s.rank + r] * shrunk[part * s.rank + r];
                    }
                }
                y.push(sum);
            }
        }
    }
    y
}

/// W + scale * B A by nested loops: `w` [outer, inner], `a` [parts * rank, inner], `b` [outer, rank].
pub fn merge(s: Sizes, [w, a, b]: [&[f64]; 3], scale: f64) -> Vec<f64> {
    let mut merged = w.to_vec();
    for (o, row) in merged.chunks_mut(s.inner).enumerate() {
        let part = o / (s.outer / s.parts);
        for r in 0..s.rank {
            let a = &a[(part * s.rank + r) * s.inner..][..s.inner];
            row.iter_mut().zip(a).for_each(|(w, a)| *w += scale * b[o * s.rank + r] * a);
        }
    }
    merged
}
