//! What can be said of B A without forming it: B A = Qb (Rb Ra^T) Qa^T with A^T = Qa Ra and B = Qb Rb, so its norm and singular
//! values are those of the small matrix Rb Ra^T. All sums in f64.

use super::matrices::{Matrices, Pair};
use crate::{Error, Result};
use nalgebra::DMatrix;
use ndarray::Array2;

/// Far more sweeps than a matrix of at most a few thousand columns needs.
const SWEEPS: usize = 1_000_000;

/// A sum of pairs, each with a factor: [c1 B1, c2 B2, ..] [A1; A2; ..].
pub(super) struct Sum {
    /// [in, total rank].
    a: DMatrix<f64>,
    /// [out, total rank].
    b: DMatrix<f64>,
}

impl Sum {
    /// `terms`: one or more pairs of the same widths.
    pub(super) fn new(terms: &[(f64, Matrices<'_>)]) -> Self {
        let rank = terms.iter().map(|(_, m)| m.a.nrows()).sum();
        let (inner, outer) = terms.first().map_or((0, 0), |(_, m)| (m.a.ncols(), m.b.nrows()));
        // Rows of A are columns of A^T, and columns are what the library keeps in order.
        let a = terms.iter().flat_map(|(_, m)| m.a.iter()).map(|&x| f64::from(x));
        let b = terms
            .iter()
            .flat_map(|(c, m)| m.b.columns().into_iter().map(move |column| (c, column)))
            .flat_map(|(c, column)| column.iter().map(|&x| c * f64::from(x)).collect::<Vec<_>>());
        Self { a: DMatrix::from_iterator(inner, rank, a), b: DMatrix::from_iterator(outer, rank, b) }
    }

    /// Rb Ra^T.
    fn core(&self) -> DMatrix<f64> {
        self.b.clone().qr().r() * self.a.clone().qr().r().transpose()
    }

    /// Frobenius norm.
    pub(super) fn norm(&self) -> f64 {
        self.core().norm()
    }

    /// Singular values that can differ from zero, the largest first.
    pub(super) fn singular_values(&self) -> Result<Vec<f64>> {
        let svd = self.core().try_svd(false, false, f64::EPSILON, SWEEPS).ok_or_else(stuck)?;
        let mut values: Vec<f64> = svd.singular_values.iter().copied().collect();
        values.sort_by(|x, y| y.total_cmp(x));
        Ok(values)
    }

    /// The nearest pair of this rank in the Frobenius norm (Eckart and Young 1936), with sqrt(sigma) on both sides, and the norm of
    /// what is left out.
    pub(super) fn nearest(&self, rank: usize) -> Result<(Pair, f64)> {
        let (a, b) = (self.a.clone().qr(), self.b.clone().qr());
        let svd = (b.r() * a.r().transpose()).try_svd(true, true, f64::EPSILON, SWEEPS).ok_or_else(stuck)?;
        let (Some(u), Some(v_t)) = (svd.u, svd.v_t) else { return Err(stuck()) };
        let sigma = &svd.singular_values;
        let mut order: Vec<usize> = (0..sigma.len()).collect();
        order.sort_by(|&i, &j| sigma[j].total_cmp(&sigma[i]));
        let (kept, left) = order.split_at(rank.min(order.len()));
        let (outer, inner) = (b.q() * u, a.q() * v_t.transpose());
        let column = |m: &DMatrix<f64>, row: usize, k: usize| {
            kept.get(k).map_or(0.0, |&i| (m[(row, i)] * sigma[i].sqrt()) as f32)
        };
        let pair = Pair {
            a: Array2::from_shape_fn((rank, inner.nrows()), |(k, i)| column(&inner, i, k)),
            b: Array2::from_shape_fn((outer.nrows(), rank), |(o, k)| column(&outer, o, k)),
        };
        Ok((pair, left.iter().map(|&i| sigma[i] * sigma[i]).sum::<f64>().sqrt()))
    }
}

fn stuck() -> Error {
    Error::Adapter("the singular value decomposition does not converge".into())
}

/// <B1 A1, B2 A2> = tr((B1^T B2) (A2 A1^T)): two Gram products, r x r each.
pub(super) fn inner(x: &Matrices<'_>, y: &Matrices<'_>) -> f64 {
    let wide = |m: ndarray::ArrayView2<'_, f32>| m.mapv(f64::from);
    let b = wide(x.b).t().dot(&wide(y.b));
    let a = wide(x.a).dot(&wide(y.a).t());
    (&b * &a).sum()
}

/// Effective rank: exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007). From 1 for a single
/// direction to r for r equal ones; 0 for no update at all.
pub(super) fn effective_rank(singular_values: &[f64]) -> f64 {
    let sum: f64 = singular_values.iter().sum();
    if sum == 0.0 {
        return 0.0;
    }
    let entropy = |s: &f64| {
        let p = s / sum;
        if p > 0.0 { -p * p.ln() } else { 0.0 }
    };
    singular_values.iter().map(entropy).sum::<f64>().exp()
}
