//! CPU code, one file per op.

pub(crate) mod attention;
pub(crate) mod attention_backward;
mod attention_simd;
pub(crate) mod gemm;
pub(crate) mod math;

/// sum += x.
pub(crate) fn add_assign(sum: &mut [f32], x: &[f32]) {
    for (s, &x) in sum.iter_mut().zip(x) {
        *s += x;
    }
}
