//! Naive f64 oracles, one file per op: what the fast code is tested against.

pub mod attention;
pub mod elementary;
pub mod low_rank_linear;
