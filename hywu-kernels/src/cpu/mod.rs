//! CPU code, one file per op.

/// sum += x.
pub(crate) fn add_assign(sum: &mut [f32], x: &[f32]) {
    for (s, &x) in sum.iter_mut().zip(x) {
        *s += x;
    }
}
