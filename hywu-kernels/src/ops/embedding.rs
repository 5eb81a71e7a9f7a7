//! Table lookup.

use crate::{Result, Tape, Var};

/// `table` [n, width], `ids` of shape `shape` -> [shape.., width]. The table may be trained.
///
/// # Errors
/// An id >= n.
pub fn embedding(tape: &Tape, table: &Var, ids: &[u32], shape: &[usize]) -> Result<Var> {
    let _ = (tape, table, ids, shape);
    todo!()
}
