//! Launchers of `kernels-cu/timestep`; see `cpu/timestep.rs` for what each computes.
