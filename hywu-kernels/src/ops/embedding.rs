//! Table lookup.

use crate::{Error, Result, Tape, Var};

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
    let out = on_device!(table.value(), embedding::lookup(table.value(), ids, &full));
    let (table_, ids) = (table.clone(), ids.to_vec());
    Ok(tape.push(out, &[table], move |grad, grads| {
        grads.accumulate(&table_, on_device!(grad, embedding::gradient(grad, &ids, table_.shape())))
    }))
}
