//! Table lookup.

use crate::{Error, Result, Tape, Tensor, Var};

/// `table` [n, width], `ids` of shape `shape` -> [shape.., width]. The table may be trained.
///
/// # Errors
/// An id >= n, or another number of ids than `shape` holds.
pub fn embedding(tape: &Tape, table: &Var, ids: &[u32], shape: &[usize]) -> Result<Var> {
    const OP: &str = "embedding";
    let [n, width] = *table.shape() else {
        return Err(Error::shape(OP, "table", table.shape(), "[entries, width]"));
    };
    if shape.iter().product::<usize>() != ids.len() {
        return Err(Error::shape(OP, "ids", &[ids.len()], format!("{shape:?}")));
    }
    if let Some(id) = ids.iter().find(|&&id| id as usize >= n) {
        return Err(Error::invalid(OP, format!("id {id} is not in the table of {n} entries")));
    }
    let full: Vec<usize> = shape.iter().copied().chain([width]).collect();
    let row = move |id: u32| id as usize * width..(id as usize + 1) * width;
    let data = table.value().data();
    let out = Tensor::build(&full, |out| {
        // max(1): a table of width 0 has nothing to copy.
        out.chunks_mut(width.max(1)).zip(ids).for_each(|(o, &id)| o.copy_from_slice(&data[row(id)]));
    });
    let (table_, ids) = (table.clone(), ids.to_vec());
    Ok(tape.push(out, &[table], move |grad, grads| {
        let mut sum = Tensor::zeros(table_.shape());
        let data = sum.data_mut();
        for (grad, &id) in grad.data().chunks(width.max(1)).zip(&ids) {
            crate::cpu::add_assign(&mut data[row(id)], grad);
        }
        grads.accumulate(&table_, sum)
    }))
}
