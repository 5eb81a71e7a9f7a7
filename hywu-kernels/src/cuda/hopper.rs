//! Whether kernels for Hopper alone are there and to be used.

use super::Gpu;
use std::sync::OnceLock;

/// Has the device these kernels? They are machine code for 9.0 alone.
pub(super) fn there(gpu: &Gpu) -> bool {
    gpu.properties().capability == (9, 0)
}

/// Are they to be used? `HYWU_CUDA_HOPPER=0` turns them off.
pub(super) fn on() -> bool {
    static ON: OnceLock<bool> = OnceLock::new();
    *ON.get_or_init(|| std::env::var_os("HYWU_CUDA_HOPPER").is_none_or(|v| v != "0"))
}
