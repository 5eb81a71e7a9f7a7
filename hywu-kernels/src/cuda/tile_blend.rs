//! Launchers of `kernels-cu/tile_blend`; see `cpu/tile_blend.rs` for what each computes.
