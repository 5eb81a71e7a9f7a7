//! The HY-WU edit pipeline: pictures and instructions to adapters to edited pictures, and the training runs behind it.

pub mod cache;
pub mod claims;
pub mod eval;
pub mod generators;
pub mod hash;
pub mod model;
pub mod pipeline;
pub mod provenance;
pub mod train;

/// The README's examples are tests.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
