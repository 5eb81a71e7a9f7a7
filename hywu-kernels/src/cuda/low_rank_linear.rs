//! Launchers of `kernels-cu/low_rank_linear`; see `cpu/low_rank_linear.rs` for what each computes.
