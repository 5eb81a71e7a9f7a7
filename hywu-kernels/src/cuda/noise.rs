//! Launchers of `kernels-cu/noise`; see `cpu/noise.rs` for what each computes.
