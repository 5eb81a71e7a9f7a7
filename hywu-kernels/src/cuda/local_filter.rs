//! Launchers of `kernels-cu/local_filter`; see `cpu/local_filter.rs` for what each computes.
