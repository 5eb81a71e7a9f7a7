//! Launchers of `kernels-cu/elementwise`; see `cpu/elementwise.rs` for what each computes.

use super::{Call, Words, blocks, call::BLOCK};
use crate::{Error, Result, Tensor};
use hywu_core::Dtype;

const OP: &str = "elementwise";
/// Most packs of 16 bytes that a kernel of rows counts, less a block.
const MOST_PACKS: usize = u32::MAX as usize - 256;
/// Rows that a thread of a sum over rows adds up before the rows are split.
const ROWS: usize = 8;
/// Most parts of a sum over rows.
const SPLITS: usize = 512;
/// Lanes that add up the parts of an element. So many or fewer parts are added up one after the other, which is the same order: that
/// of an entry with few parts must not show how many the longest of its batch has.
const LANES: usize = 16;

/// `rows` for a kernel that gives a thread to every pack of every row.
fn row_count(rows: usize, length: usize, pack: usize) -> Result<(usize, usize)> {
    let packs = rows.saturating_mul(length.div_ceil(pack));
    match packs <= MOST_PACKS {
        true => Ok((rows, packs)),
        false => {
            Err(Error::invalid(OP, format!("{rows} rows of {length} elements are more than a kernel counts")))
        }
    }
}

impl Call {
    /// Adds the number of rows and launches a thread for every pack of every row of `length`.
    pub(super) fn over_rows(self, rows: usize, length: usize, pack: usize) -> Result<()> {
        let (rows, packs) = row_count(rows, length, pack)?;
        self.long(rows).over(packs, 1)
    }
}

pub fn cast(x: &Tensor, dtype: Dtype) -> Result<Tensor> {
    let out = x.empty_as(x.shape(), dtype)?;
    let name = if dtype == Dtype::Bf16 { "cast_bf16" } else { "cast_f32" };
    let call = Call::named(OP, name, x)?.tensor(x)?.tensor_as(&out, dtype)?;
    call.long(x.numel()).over(x.numel(), 8)?;
    Ok(out)
}

pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let out = a.empty_like(a.shape())?;
    Call::new(OP, "add", a)?.tensor(a)?.tensor(b)?.tensor(&out)?.long(a.numel()).over(a.numel(), pack(a))?;
    Ok(out)
}

pub fn add_assign(sum: &mut Tensor, x: &Tensor) -> Result<()> {
    Call::new(OP, "add", x)?.tensor(sum)?.tensor(x)?.tensor(sum)?.long(x.numel()).over(x.numel(), pack(x))
}

pub fn scale(x: &Tensor, factor: f32) -> Result<Tensor> {
    let out = x.empty_like(x.shape())?;
    let call = Call::new(OP, "scale", x)?.tensor(x)?.tensor(&out)?.long(x.numel()).float(factor);
    call.over(x.numel(), pack(x))?;
    Ok(out)
}

pub fn lerp(a: &Tensor, b: &Tensor, rate: f32) -> Result<Tensor> {
    let out = a.empty_like(a.shape())?;
    let call = Call::new(OP, "lerp", a)?.tensor(a)?.tensor(b)?.tensor(&out)?.long(a.numel()).float(rate);
    call.over(a.numel(), pack(a))?;
    Ok(out)
}

pub fn gated(base: Option<&Tensor>, y: &Tensor, gate: &Tensor) -> Result<Tensor> {
    let (batch, channels) = (gate.shape()[0], gate.dim_back(1));
    let rows = y.numel() / channels;
    let out = y.empty_like(y.shape())?;
    let call = Call::new(OP, "gated", y)?.optional(base)?.tensor(y)?.tensor(gate)?.tensor(&out)?;
    call.size(channels)?.size(rows / batch)?.over_rows(rows, channels, pack(y))?;
    Ok(out)
}

pub fn gate_gradient(grad: &Tensor, y: &Tensor, gate: &Tensor) -> Result<Tensor> {
    sum_rows(grad, Some(y), gate.shape()[0], gate.shape(), 1.0)
}

pub fn add_row(x: &Tensor, row: &Tensor) -> Result<Tensor> {
    let n = row.numel();
    let out = x.empty_like(x.shape())?;
    let call = Call::new(OP, "add_row", x)?.tensor(x)?.tensor(row)?.tensor(&out)?;
    call.size(n)?.over_rows(x.numel() / n, n, pack(x))?;
    Ok(out)
}

pub fn standardise(x: &Tensor, mean: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let n = mean.numel();
    let out = x.empty_like(x.shape())?;
    let call = Call::new(OP, "standardise", x)?.tensor(x)?.tensor(mean)?.tensor(scale)?.tensor(&out)?;
    call.size(n)?.over_rows(x.numel() / n, n, pack(x))?;
    Ok(out)
}

pub fn column_sums(x: &Tensor, n: usize) -> Result<Tensor> {
    sum_rows(x, None, 1, &[n], 1.0)
}

/// Threads of a block of `pack_sums` (kernels-cu/common/reduce.cuh) that share a row of so many columns, a pack each.
pub(super) fn sum_lanes(columns: usize, dtype: Dtype) -> usize {
    columns.div_ceil(super::pack(dtype)).next_power_of_two().min(32)
}

/// The launch of a sum over the `rows` rows of each of `groups`; see `RowPart` in kernels-cu/common/reduce.cuh.
pub(super) struct RowParts {
    pub lanes: usize,
    pub splits: usize,
    pub grid: [u32; 3],
}

impl RowParts {
    pub fn new(rows: usize, columns: usize, groups: usize, dtype: Dtype) -> Result<Self> {
        let lanes = sum_lanes(columns, dtype);
        // Whatever the number of groups, as an entry's sum must not depend on the other entries of its batch.
        let splits = rows.div_ceil(ROWS * BLOCK as usize / lanes).clamp(1, SPLITS);
        let column_blocks = columns.div_ceil(lanes * super::pack(dtype));
        let grid = [blocks(groups.saturating_mul(column_blocks), 1)?, splits as u32, 1];
        Ok(Self { lanes, splits, grid })
    }
}

/// factor * the sums over the rows of each of `groups` of x, or of x * y, into `shape` = groups x columns elements.
pub(super) fn sum_rows(
    x: &Tensor,
    y: Option<&Tensor>,
    groups: usize,
    shape: &[usize],
    factor: f32,
) -> Result<Tensor> {
    let columns = shape.iter().product::<usize>() / groups;
    let rows = x.numel() / (groups * columns);
    let RowParts { lanes, splits, grid } = RowParts::new(rows, columns, groups, x.dtype())?;
    let partial = x.empty_as(&[splits, groups, columns], Dtype::F32)?;
    let call = Call::new(OP, "column_parts", x)?.tensor(x)?.optional(y)?.tensor_as(&partial, Dtype::F32)?;
    call.size(rows)?.size(columns)?.size(lanes)?.launch(grid, BLOCK, 0)?;
    sum_parts(&partial, x, shape, factor)
}

/// factor * the sum over the first axis of `partial`, in an order that knows only its indices, into `shape`, as `like` in dtype.
pub fn sum_parts(partial: &Tensor, like: &Tensor, shape: &[usize], factor: f32) -> Result<Tensor> {
    let out = like.empty_like(shape)?;
    let call = Call::new(OP, "sum_parts", &out)?.tensor_as(partial, Dtype::F32)?.tensor(&out)?;
    let splits = partial.shape()[0];
    let lanes = if splits > LANES { LANES } else { 1 };
    let grid = blocks(out.numel(), BLOCK as usize / lanes)?;
    call.long(out.numel()).size(splits)?.size(lanes)?.float(factor).launch([grid, 1, 1], BLOCK, 0)?;
    Ok(out)
}

pub fn copy_blocks(
    out: &mut Tensor,
    (at, to): (usize, usize),
    x: &Tensor,
    (start, from): (usize, usize),
    length: usize,
) -> Result<()> {
    // As many blocks as both sides have.
    let rows = (out.numel() / to).min(x.numel() / from);
    let call =
        Call::new(OP, "copy_blocks", x)?.tensor(out)?.long(at).long(to).tensor(x)?.long(start).long(from);
    call.size(length)?.over_rows(rows, length, pack(x))
}

pub fn add_blocks(sum: &mut Tensor, (at, to): (usize, usize), x: &Tensor, length: usize) -> Result<()> {
    let call = Call::new(OP, "add_blocks", x)?.tensor(sum)?.long(at).long(to).tensor(x)?.size(length)?;
    call.over_rows(x.numel() / length, length, pack(x))
}

pub fn repeat_each(x: &Tensor, each: usize, k: usize, shape: &[usize]) -> Result<Tensor> {
    let out = x.empty_like(shape)?;
    let call = Call::new(OP, "repeat_each", x)?.tensor(x)?.tensor(&out)?.size(each)?.size(k)?;
    call.over_rows(out.numel() / each, each, pack(x))?;
    Ok(out)
}

pub fn sum_each(x: &Tensor, each: usize, k: usize, shape: &[usize]) -> Result<Tensor> {
    let out = x.empty_like(shape)?;
    let call = Call::new(OP, "sum_each", x)?.tensor(x)?.tensor(&out)?.size(each)?.size(k)?;
    call.over_rows(out.numel() / each, each, pack(x))?;
    Ok(out)
}

pub fn mask_tokens(x: &Tensor, lengths: &[usize]) -> Result<Tensor> {
    let (tokens, channels) = (x.shape()[1], x.shape()[2]);
    let out = x.empty_like(x.shape())?;
    let lengths = Words::sizes(x, lengths)?;
    let call = Call::new(OP, "mask_tokens", x)?.tensor(x)?.words(&lengths).tensor(&out)?;
    call.size(channels)?.size(tokens)?.over_rows(lengths.len() * tokens, channels, pack(x))?;
    Ok(out)
}

pub fn mean_tokens(x: &Tensor) -> Result<Tensor> {
    let (batch, tokens) = (x.shape()[0], x.shape()[1]);
    sum_rows(x, None, batch, &[batch, x.shape()[2]], 1.0 / tokens as f32)
}

pub fn mean_tokens_gradient(grad: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let (batch, tokens, channels) = (shape[0], shape[1], shape[2]);
    let out = grad.empty_like(shape)?;
    let call = Call::new(OP, "broadcast", grad)?.tensor(grad)?.tensor(&out)?.size(channels)?.size(tokens)?;
    let (rows, packs) = row_count(batch * tokens, channels, pack(grad))?;
    call.long(rows).float(1.0 / tokens as f32).over(packs, 1)?;
    Ok(out)
}

/// Elements that a thread of a vectorised kernel takes.
fn pack(x: &Tensor) -> usize {
    super::pack(x.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_over_rows_are_split() {
        let splits = |rows, columns| {
            let parts = RowParts::new(rows, columns, 3, Dtype::Bf16).expect("few");
            (parts.lanes, parts.splits, parts.grid[0])
        };
        assert_eq!(splits(1, 1), (1, 1, 3));
        assert_eq!(splits(300, 192), (32, 5, 3));
        assert_eq!(splits(40_000, 264), (32, 512, 6));
        assert_eq!(splits(40_000, 64), (8, 157, 3));
    }

    #[test]
    fn rows_that_no_kernel_can_count_are_refused() {
        assert_eq!(row_count(10, 9, 8).expect("few"), (10, 20));
        assert!(row_count(1 << 30, 64, 8).is_err());
    }
}
