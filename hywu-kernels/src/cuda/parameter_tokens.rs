//! Launchers of `kernels-cu/parameter_tokens`; see `cpu/parameter_tokens.rs` for what each computes.
