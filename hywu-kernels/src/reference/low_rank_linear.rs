//! Oracle of [`low_rank_linear`](crate::ops::low_rank_linear::low_rank_linear).

/// Sizes of an oracle call: `rows` of x, split evenly over `adapters`.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Rows of x.
    pub rows: usize,
    /// Columns of x.
    pub inner: usize,
    /// Columns of y.
    pub outer: usize,
    /// Number of adapters.
    pub adapters: usize,
    /// Rank of each.
    pub rank: usize,
}

/// y = x W^T + bias + scale (x A^T) B^T by three nested loops.
pub fn low_rank_linear(
    s: Sizes,
    x: &[f64],
    w: &[f64],
    bias: &[f64],
    a: &[f64],
    b: &[f64],
    scale: f64,
) -> Vec<f64> {
    let mut y = vec![0.0; s.rows * s.outer];
    for i in 0..s.rows {
        let x = &x[i * s.inner..(i + 1) * s.inner];
        let adapter = i / (s.rows / s.adapters);
        let dot = |row: &[f64]| -> f64 { row.iter().zip(x).map(|(a, b)| a * b).sum() };
        let shrunk: Vec<f64> =
            (0..s.rank).map(|r| dot(&a[(adapter * s.rank + r) * s.inner..][..s.inner])).collect();
        for o in 0..s.outer {
            let up = &b[(adapter * s.outer + o) * s.rank..][..s.rank];
            let low: f64 = up.iter().zip(&shrunk).map(|(a, b)| a * b).sum();
            y[i * s.outer + o] = dot(&w[o * s.inner..][..s.inner]) + bias[o] + scale * low;
        }
    }
    y
}

/// W + scale * B A by three nested loops: `w` [outer, inner], `a` [parts * rank, inner], `b` [outer, rank], where row o of w is of part
/// o / (outer / parts) and uses that part's ranks of a.
pub fn merge(
    [outer, inner, rank, parts]: [usize; 4],
    w: &[f64],
    a: &[f64],
    b: &[f64],
    scale: f64,
) -> Vec<f64> {
    let mut merged = w.to_vec();
    for o in 0..outer {
        let part = o / (outer / parts);
        for r in 0..rank {
            for i in 0..inner {
                merged[o * inner + i] += scale * b[o * rank + r] * a[(part * rank + r) * inner + i];
            }
        }
    }
    merged
}
