//! Launchers of `kernels-cu/rms_norm`; see `cpu/rms_norm.rs` for what each computes.
