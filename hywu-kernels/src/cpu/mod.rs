//! CPU code, one file per op.

pub(crate) mod attention;
mod attention_backward;
mod attention_simd;
pub(crate) mod elementwise;
pub(crate) mod embedding;
pub(crate) mod gemm;
pub(crate) mod local_filter;
pub(crate) mod loss;
pub(crate) mod low_rank_linear;
pub(crate) mod math;
pub(crate) mod noise;
pub(crate) mod optim;
pub(crate) mod parameter_tokens;
pub(crate) mod patchify;
pub(crate) mod residual;
pub(crate) mod rms_norm;
pub(crate) mod swiglu;
pub(crate) mod tile_blend;

/// sum += x.
pub(crate) fn add_assign(sum: &mut [f32], x: &[f32]) {
    for (s, &x) in sum.iter_mut().zip(x) {
        *s += x;
    }
}
