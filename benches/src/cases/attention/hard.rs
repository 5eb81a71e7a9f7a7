//! Operands that are hard on a kernel: what a case computes from them is checked, not timed.

use super::{
    Start,
    call::Call,
    check,
    shapes::{Kind, Pass, Shape},
};
use crate::{Result, timing::Bench};
use hywu_kernels::Tensor;

/// What is hard about them.
#[derive(Clone, Copy, Debug)]
enum Hard {
    /// Scores of hundreds.
    Large,
    /// One key that all queries want.
    HotKey,
    /// All keys alike, and so all weights.
    Equal,
    /// Keys that are masked, all of them in one entry: scores of minus infinity.
    Masked,
}

/// Most entries; a kernel has no more to do with others.
const ENTRIES: usize = 64;

/// Checks a pass of a call with all of them.
pub fn check(bench: &Bench, pass: Pass, shape: Shape) -> Result<()> {
    let shape = match shape.kind {
        Kind::Ragged => shape,
        _ => Shape { b: shape.b.min(ENTRIES), ..shape },
    };
    for hard in [Hard::Large, Hard::HotKey, Hard::Equal, Hard::Masked] {
        let call = hard.call(bench, shape)?;
        let checked = if pass == Pass::Forward {
            check::output(bench, &call, &call.forward()?.out)
        } else {
            let saved = (pass == Pass::Backward).then(|| call.forward()).transpose()?;
            let start = Start { saved, grad: call.grad(bench, 0)?, call };
            check::gradients(bench, &start.call, &start.grad, &start.run()?)
        };
        checked.map_err(|e| format!("{hard:?}: {e}"))?;
    }
    Ok(())
}

/// The rows of some heads of every token changed; is the token the hot one of its entry?
fn changed(
    bench: &Bench,
    x: &Tensor,
    shape: Shape,
    heads: std::ops::Range<usize>,
    change: impl Fn(bool, &mut [f32]),
) -> hywu_kernels::Result<Tensor> {
    let mut x = x.to_host()?.clone();
    let width = x.dim_back(1);
    let hot: Vec<bool> = match shape.kind {
        Kind::Layers => (0..shape.s * shape.b).map(|i| i / shape.b == check::hot_key(shape.s)).collect(),
        _ => {
            let of_entry = |n| (0..n).map(move |token| token == check::hot_key(n));
            shape.lengths().into_iter().flat_map(of_entry).collect()
        }
    };
    for (token, is_hot) in x.data_mut().chunks_exact_mut(width).zip(hot) {
        for row in token[heads.start * shape.d..heads.end * shape.d].chunks_exact_mut(shape.d) {
            change(is_hot, row);
        }
    }
    x.to(bench.device, bench.dtype())
}

impl Hard {
    fn call(self, bench: &Bench, shape: Shape) -> hywu_kernels::Result<Call> {
        let mut call = Call::new(bench, 0, shape)?;
        // Alternating, so that no kernel is helped by equal channels.
        let direction = |c: usize| if c.is_multiple_of(3) { -2.0 } else { 2.0 };
        let of_query = |row: &mut [f32]| match self {
            Self::Large => row.iter_mut().for_each(|x| *x *= 8.0),
            Self::HotKey => row.iter_mut().enumerate().for_each(|(c, x)| *x = 0.1 * *x + direction(c)),
            Self::Equal | Self::Masked => {}
        };
        let of_key = |is_hot: bool, row: &mut [f32]| match self {
            Self::Large => row.iter_mut().for_each(|x| *x *= 8.0),
            Self::HotKey => {
                let sign = if is_hot { 1.0 } else { -1.0 };
                row.iter_mut().enumerate().for_each(|(c, x)| *x = 0.1 * *x + sign * direction(c));
            }
            Self::Equal => row.iter_mut().enumerate().for_each(|(c, x)| *x = 0.25 * direction(c)),
            Self::Masked => {}
        };
        let Shape { h, kv, kind, .. } = shape;
        if let (Self::Masked, true) = (self, kind != Kind::Ragged) {
            let lengths = [2 * shape.s / 3, 0, 1, shape.s].into_iter().cycle();
            call.args.key_lengths = Some(lengths.take(shape.b).collect());
        }
        let [q, k, v] = call.operands;
        call.operands = if kind == Kind::Projection {
            let x = changed(bench, &q, shape, 0..h, |_, row| of_query(row))?;
            let x = changed(bench, &x, shape, h..h + kv, of_key)?;
            [x.clone(), x.clone(), x]
        } else {
            [
                changed(bench, &q, shape, 0..h, |_, row| of_query(row))?,
                changed(bench, &k, shape, 0..kv, of_key)?,
                v,
            ]
        };
        Ok(call)
    }
}
