//! The generator of HY-WU: a transformer over parameter tokens that reads a condition and writes an adapter.
//!
//! One implementation serves published checkpoints and small ones: [`Generator::load`] reads the published files,
//! [`Generator::new`] makes a fresh generator, whose adapters do nothing until it is trained. [`train_step`] trains it through
//! any frozen backbone that implements [`Downstream`](hywu_kernels::Downstream).

mod config;
mod error;
mod generator;
mod inference;
mod mixing;
mod random;
mod size;
mod train;

pub use config::GeneratorConfig;
pub use error::{Error, Result};
pub use generator::Generator;
pub use inference::{Inference, LayerTokens, Limits, Progress};
pub use random::{RandomCheckpoint, write_random_checkpoint};
pub use size::Size;
pub use train::{TrainStats, train_step};
