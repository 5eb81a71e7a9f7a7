//! Launchers of `kernels-cu/embedding`; see `cpu/embedding.rs` for what each computes.

use super::{Call, Words, blocks, call::BLOCK, elementwise::sum_lanes, pack};
use crate::{Result, Tensor};

const OP: &str = "embedding";

pub fn lookup(table: &Tensor, ids: &[u32], shape: &[usize]) -> Result<Tensor> {
    let out = table.empty_like(shape)?;
    let (width, ids) = (table.dim_back(1), Words::new(table, ids)?);
    let call = Call::new(OP, "embedding", table)?.tensor(table)?.words(&ids).tensor(&out)?.size(width)?;
    call.over_rows(ids.len(), width, pack(table.dtype()))?;
    Ok(out)
}

pub fn gradient(grad: &Tensor, ids: &[u32], shape: &[usize]) -> Result<Tensor> {
    let sum = grad.zeros_like(shape)?;
    let (positions, distinct, starts) = groups(ids);
    let (width, lanes) = (shape[1], sum_lanes(shape[1], grad.dtype()));
    let grid = [blocks(distinct.len(), 1)?, blocks(width, lanes * pack(grad.dtype()))?, 1];
    let (distinct, starts) = (Words::new(grad, &distinct)?, Words::sizes(grad, &starts)?);
    let positions = Words::sizes(grad, &positions)?;
    let call = Call::new(OP, "embedding_gradient", grad)?.tensor(grad)?.words(&distinct).words(&starts);
    call.words(&positions).tensor(&sum)?.size(width)?.size(lanes)?.launch(grid, BLOCK, 0)?;
    Ok(sum)
}

/// The positions ordered by their id and then by themselves, the ids that there are, and where the positions of each start.
fn groups(ids: &[u32]) -> (Vec<usize>, Vec<u32>, Vec<usize>) {
    let mut positions: Vec<usize> = (0..ids.len()).collect();
    positions.sort_by_key(|&p| ids[p]);
    let (mut distinct, mut starts) = (Vec::new(), Vec::new());
    for (i, &p) in positions.iter().enumerate() {
        if distinct.last() != Some(&ids[p]) {
            distinct.push(ids[p]);
            starts.push(i);
        }
    }
    starts.push(ids.len());
    (positions, distinct, starts)
}

#[cfg(test)]
mod tests {
    #[test]
    fn positions_are_grouped_in_order() {
        assert_eq!(super::groups(&[3, 0, 3, 1]), (vec![1, 3, 0, 2], vec![0, 1, 3], vec![0, 1, 2, 4]));
        assert_eq!(super::groups(&[]), (vec![], vec![], vec![0]));
    }
}
