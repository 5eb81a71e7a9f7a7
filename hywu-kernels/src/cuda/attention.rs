//! Launchers of `kernels-cu/attention`; see `cpu/attention.rs` for what each computes.
