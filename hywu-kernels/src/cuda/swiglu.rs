//! Launchers of `kernels-cu/swiglu`; see `cpu/swiglu.rs` for what each computes.
