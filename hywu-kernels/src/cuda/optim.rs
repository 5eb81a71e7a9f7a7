//! Launchers of `kernels-cu/optim`; see `cpu/optim.rs` for what each computes.
