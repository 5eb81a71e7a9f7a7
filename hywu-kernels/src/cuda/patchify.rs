//! Launchers of `kernels-cu/patchify`; see `cpu/patchify.rs` for what each computes.
