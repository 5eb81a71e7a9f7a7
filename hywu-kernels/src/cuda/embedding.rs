//! Launchers of `kernels-cu/embedding`; see `cpu/embedding.rs` for what each computes.
