//! Launchers of `kernels-cu/low_rank_linear/shrink.cuh`: S = scale X A^T in bf16, alone or beside what makes X.

use super::{OP, banded, int, rows::Rows};
use crate::{
    Error, Result, Tensor,
    cuda::{
        Call, blocks,
        call::{BLOCK, in_grid},
    },
    ops::low_rank_linear::{Segments, Shrink},
};
use hywu_core::Dtype;

/// From so many on, blocks of 32 rows are enough for every multiprocessor.
const ENOUGH_BLOCKS: usize = 128;

/// Rows and ranks of a block, and the end of its kernel's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    height: usize,
    ranks: usize,
    odd: bool,
}

impl Plan {
    /// For `rows` of X, `k` columns of it in a sum, `columns` of S. No bit of S depends on it.
    fn new(rows: usize, k: usize, columns: usize) -> Self {
        // Rows that are not whole packs.
        if !k.is_multiple_of(8) {
            return Self { height: 16, ranks: 16, odd: true };
        }
        let height = if rows.div_ceil(32) >= ENOUGH_BLOCKS { 32 } else { 16 };
        Self { height, ranks: if columns > 16 { 32 } else { 16 }, odd: false }
    }

    /// That of a kernel that computes X too: one block for all ranks of its rows. None where there is none for these.
    fn beside(k: usize, columns: usize) -> Option<Self> {
        let ranks = [16, 32, 64].into_iter().find(|&ranks| columns <= ranks)?;
        k.is_multiple_of(8).then_some(Self { height: 16, ranks, odd: false })
    }

    fn kernel(&self) -> String {
        match self.odd {
            true => "shrink_odd".to_owned(),
            false => format!("shrink_{}_{}", self.height, self.ranks),
        }
    }
}

/// S = scale X A^T, to be computed: the sum of every part of the columns of X and of A goes to columns of its own.
pub(super) struct Work<'a> {
    /// [adapters, ranks, parts * k].
    pub a: &'a Tensor,
    scale: f32,
    parts: usize,
    rows: Rows,
    /// Banded.
    pub s: Tensor,
}

impl<'a> Work<'a> {
    /// For so many rows of X, which will be where `like` is.
    ///
    /// # Errors
    /// Not enough memory; sizes beyond what a kernel takes.
    pub fn new(like: &Tensor, rows: usize, shrink: Shrink<'a>, parts: usize) -> Result<Self> {
        let Shrink { a, scale, segments } = shrink;
        let s = like.empty_like(&banded(segments, rows, a.shape()[0], parts * a.shape()[1]))?;
        Ok(Self { a, scale, parts, rows: Rows::adapters(like, segments, rows, a.shape()[0])?, s })
    }

    /// Columns of X in a sum.
    pub fn k(&self) -> usize {
        self.a.shape()[2] / self.parts
    }

    /// Ranks of a part.
    pub fn ranks(&self) -> usize {
        self.a.shape()[1]
    }

    /// Columns of S that the last part writes: the padding too.
    pub fn columns(&self) -> usize {
        self.s.shape()[1] - (self.parts - 1) * self.a.shape()[1]
    }

    /// Rows of S.
    pub fn lines(&self) -> usize {
        self.s.shape()[0]
    }

    /// `struct Sizes` of shrink.cuh.
    ///
    /// # Errors
    /// Sizes beyond 2^31.
    pub fn sizes(&self) -> Result<Vec<u8>> {
        let mut bytes = self.rows.bytes(self.s.shape()[1])?.to_vec();
        for size in [self.lines(), self.k(), self.a.shape()[1]] {
            bytes.extend(int(size)?.to_le_bytes());
        }
        bytes.extend(self.scale.to_le_bytes());
        Ok(bytes)
    }

    fn grid(&self, plan: Plan) -> Result<[u32; 3]> {
        let across = in_grid(OP, self.columns().div_ceil(plan.ranks), "blocks of ranks")?;
        Ok([blocks(self.lines(), plan.height)?, across, in_grid(OP, self.parts, "parts")?])
    }

    /// By a launch of its own.
    ///
    /// # Errors
    /// Those of the device.
    pub fn run(self, x: &Tensor) -> Result<Tensor> {
        let plan = Plan::new(x.numel() / x.dim_back(1), self.k(), self.columns());
        let call = Call::new(OP, &plan.kernel(), x)?.tensor(x)?.tensor(self.a)?.tensor(&self.s)?;
        call.bytes(&self.sizes()?).launch(self.grid(plan)?, BLOCK, 0)?;
        Ok(self.s)
    }
}

/// S for a [rows, in] in bf16 and a [adapters, ranks, in]; banded.
///
/// # Errors
/// Not enough memory; sizes beyond what a kernel takes.
pub(super) fn shrink(x: &Tensor, a: &Tensor, scale: f32, segments: Option<&Segments>) -> Result<Tensor> {
    let rows = x.numel() / x.dim_back(1);
    Work::new(x, rows, Shrink { a, scale, segments }, 1)?.run(x)
}

/// dS = scale dY B of every part, for b [adapters, out, rank]; banded.
///
/// # Errors
/// As [`shrink`].
pub(super) fn shrink_gradient(
    grad: &Tensor,
    b: &Tensor,
    scale: f32,
    parts: usize,
    segments: Option<&Segments>,
) -> Result<Tensor> {
    let &[adapters, outer, rank] = b.shape() else {
        return Err(Error::shape(OP, "lora_b", b.shape(), "[adapters, out, rank]"));
    };
    let rows = grad.numel() / outer;
    let turned = transposed(b, [adapters, outer, rank])?;
    Work::new(grad, rows, Shrink { a: &turned, scale, segments }, parts)?.run(grad)
}

/// [adapters, n, rank] -> [adapters, rank, n].
fn transposed(b: &Tensor, [adapters, n, rank]: [usize; 3]) -> Result<Tensor> {
    let out = b.empty_like(&[adapters, rank, n])?;
    let across = in_grid(OP, rank.div_ceil(32), "blocks of ranks")?;
    let grid = [blocks(n, 64)?, across, in_grid(OP, adapters, "adapters")?];
    let call = Call::new(OP, "shrink_transpose", b)?.tensor(b)?.tensor(&out)?;
    call.size(n)?.size(rank)?.launch(grid, BLOCK, 0)?;
    Ok(out)
}

/// S to be computed by the kernel that makes the rows of X, of which it takes 16 in a block.
pub(in crate::cuda) struct Beside<'a> {
    work: Work<'a>,
    plan: Plan,
}

impl<'a> Beside<'a> {
    /// For so many rows of X. None where these are to be done one after the other: in f32, for ranks or columns that no kernel takes, or
    /// where rows have no adapter, so that nobody would make them.
    ///
    /// # Errors
    /// As [`shrink`].
    pub fn new(like: &Tensor, rows: usize, shrink: &Shrink<'a>) -> Result<Option<Self>> {
        let a = shrink.a;
        let segments = Segments::cover(shrink.segments, rows, a.shape()[0]);
        let all = segments.as_slice().iter().all(|s| s.adapter.is_some());
        let plan = Plan::beside(a.shape()[2], a.shape()[1].next_multiple_of(8));
        let Some(plan) = plan.filter(|_| all && like.dtype() == Dtype::Bf16) else { return Ok(None) };
        Ok(Some(Self { work: Work::new(like, rows, *shrink, 1)?, plan }))
    }

    /// The end of the kernel's name.
    pub fn ranks(&self) -> usize {
        self.plan.ranks
    }

    /// Adds A, S and the sizes to a call.
    ///
    /// # Errors
    /// As [`shrink`].
    pub fn arguments(&self, call: Call) -> Result<Call> {
        Ok(call.tensor(self.work.a)?.tensor(&self.work.s)?.bytes(&self.work.sizes()?))
    }

    /// S, computed by that call.
    ///
    /// # Errors
    /// Those of the device.
    pub fn launch(self, call: Call) -> Result<Tensor> {
        call.launch(self.work.grid(self.plan)?, BLOCK, 0)?;
        Ok(self.work.s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::low_rank_linear::Segment,
        testing::{places, random},
    };

    #[test]
    fn few_rows_get_low_blocks() {
        let plan = |rows, k, columns| Plan::new(rows, k, columns).kernel();
        assert_eq!(plan(4096, 4096, 16), "shrink_32_16");
        assert_eq!(plan(4064, 4096, 16), "shrink_16_16");
        assert_eq!(plan(1, 8, 24), "shrink_16_32");
        assert_eq!(plan(100_000, 4096, 128), "shrink_32_32");
        assert_eq!(plan(100_000, 4097, 128), "shrink_odd");
    }

    #[test]
    fn one_block_has_all_ranks_beside_x() {
        assert_eq!(Plan::beside(192, 8).map(|p| p.ranks), Some(16));
        assert_eq!(Plan::beside(192, 24).map(|p| p.ranks), Some(32));
        assert_eq!(Plan::beside(192, 64).map(|p| p.ranks), Some(64));
        assert_eq!(Plan::beside(192, 72), None);
        assert_eq!(Plan::beside(193, 16), None);
    }

    /// dS of a part is S of its columns and of B turned, in every bit.
    #[test]
    fn a_gradient_is_the_shrink_of_every_part() {
        let places = places();
        let Some(place) = places.iter().find(|place| place.dtype == Dtype::Bf16) else { return };
        for (outer, rank, parts) in [(48, 16, 1), (96, 7, 2), (130, 15, 2), (2 * 520, 40, 2), (51, 3, 3)] {
            let list = [(33, Some(1)), (5, None), (16, Some(0)), (40, Some(2))];
            let segment = |(rows, adapter)| Segment { rows, weight: 0, adapter };
            let segments = Segments::new(&list.map(segment)).expect("good segments");
            let (dy, b) = (random(1, &[94, outer]), random(2, &[3, outer, rank]));
            let ds = shrink_gradient(&place.tensor(&dy), &place.tensor(&b), 0.5, parts, Some(&segments));
            let ds = ds.and_then(|t| t.to_host()).expect("the device works");
            let pitch = (parts * rank).next_multiple_of(8);
            assert_eq!(ds.shape()[1], pitch);
            let k = outer / parts;
            for part in 0..parts {
                let columns = Tensor::build(&[94, k], |out| {
                    for (i, v) in out.iter_mut().enumerate() {
                        *v = dy.data()[i / k * outer + part * k + i % k];
                    }
                });
                let turned = Tensor::build(&[3, rank, k], |out| {
                    for (i, v) in out.iter_mut().enumerate() {
                        let (adapter, r, column) = (i / k / rank, i / k % rank, part * k + i % k);
                        *v = b.data()[(adapter * outer + column) * rank + r];
                    }
                });
                let s = shrink(&place.tensor(&columns), &place.tensor(&turned), 0.5, Some(&segments));
                let s = s.and_then(|t| t.to_host()).expect("the device works");
                for (row, (all, one)) in
                    ds.data().chunks(pitch).zip(s.data().chunks(s.shape()[1])).enumerate()
                {
                    assert_eq!(all[part * rank..][..rank], one[..rank], "part {part}, row {row}");
                    assert!(all[parts * rank..].iter().all(|v| *v == 0.0), "padding of row {row}");
                }
            }
        }
    }
}
