//! The arithmetic of HY-WU: [`Tensor`]s on a [`Device`], one module per op under [`ops`] with forward and backward, a
//! small reverse-mode [`Tape`], and naive f64 oracles under [`mod@reference`].
//!
//! Every op has one name: `ops/<op>.rs` is its interface, `cpu/<op>.rs` its CPU code, `cuda/<op>.rs` its launcher,
//! `kernels-cu/<op>/<op>.cu` its CUDA code, `reference/<op>.rs` its oracle, `tests/<op>.rs` its tests. Results do not depend on the number of threads nor on the other members of a batch.

pub mod adapter;
mod cpu;
mod cuda;
mod device;
mod error;
mod load;
pub mod ops;
pub mod optim;
mod params;
mod profile;
pub mod reference;
mod tape;
mod tensor;
pub mod testing;

pub use adapter::{Downstream, LoraVar, LoraVars};
pub use cuda::{Event, Properties, Replay};
pub use device::Device;
pub use error::{Error, Result};
pub use load::{Upload, load_tensor};
pub use params::{Bound, ParamSet, check_header};
pub use profile::Profile;
pub use tape::{Gradients, Tape, Var};
pub use tensor::Tensor;

/// The compiler of the CUDA kernels in this build and what they were compiled for, e.g. "nvcc 13.0.88 for 80,90a"; none without them.
pub fn cuda_build() -> Option<String> {
    let release = option_env!("HYWU_NVCC_RELEASE").filter(|release| !release.is_empty())?;
    Some(format!("nvcc {release} for {}", option_env!("HYWU_CUDA_ARCHS").unwrap_or("nothing")))
}

/// The widest instruction set that the CPU kernels use on this machine: "AVX-512", "AVX2" or "portable".
pub fn simd_level() -> &'static str {
    cpu::gemm::simd_level()
}
