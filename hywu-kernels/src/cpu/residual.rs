//! CPU code of the op `residual`: rows are read and added to in parallel.

use super::rms_norm::normalise;
use crate::{Tensor, ops::residual::Runs};
use rayon::prelude::*;

/// Rows of a parallel task.
const ROWS: usize = 16;

/// The norm of some rows, after `late` is added to them.
pub fn read(x: &mut Tensor, runs: Runs, late: Option<&Tensor>, w: &Tensor, eps: f32) -> Tensor {
    if let Some(y) = late {
        add(x, runs, y);
    }
    let (c, data) = (x.dim_back(1), x.data());
    Tensor::build(&[runs.rows(), c], |out| {
        out.par_chunks_mut(c).with_min_len(ROWS).enumerate().for_each(|(i, out)| {
            let row = runs.first + i / runs.length * runs.pitch + i % runs.length;
            normalise(&data[row * c..][..c], w.data(), eps, out);
        });
    })
}

/// x += y in some rows.
pub fn add(x: &mut Tensor, runs: Runs, y: &Tensor) {
    let c = x.dim_back(1);
    let (run, pitch) = (runs.length * c, runs.pitch * c);
    // The last run may end before the next would start.
    let places = x.data_mut()[runs.first * c..].chunks_mut(pitch).map(|rows| &mut rows[..run]);
    for (x, y) in places.take(runs.count).zip(y.data().chunks(run)) {
        let parts = x.par_chunks_mut(ROWS * c).zip(y.par_chunks(ROWS * c));
        parts.for_each(|(x, y)| super::add_assign(x, y));
    }
}
