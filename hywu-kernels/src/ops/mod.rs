//! One module per op. Each has plain `forward` and `backward` functions over [`Tensor`](crate::Tensor)s and a function
//! of the op's own name that records it on a [`Tape`](crate::Tape).

pub mod attention;
pub mod elementwise;
pub mod embedding;
pub mod local_filter;
pub mod loss;
pub mod low_rank_linear;
pub mod noise;
pub mod parameter_tokens;
pub mod patchify;
pub mod rms_norm;
pub mod swiglu;
pub mod tile_blend;
pub mod timestep;
