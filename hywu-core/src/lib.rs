//! Vocabulary of HY-WU: what the other crates talk about, and no arithmetic.
//!
//! * [`Adapter`]: the low-rank weight update of one instance, as files and tools see it.
//! * [`AdapterSpec`]: which modules of a backbone get a low-rank update (`pg_mapping`), in order.
//! * [`ApplyResult`]: which of an adapter's entries and a backbone's modules meet, and which don't.
//! * [`Checkpoint`]: memory-mapped safetensors files and shard folders.
//! * [`Philox`]: counter-based random numbers, equal on every device and thread count.

mod adapter;
mod atomic;
mod checkpoint;
mod coverage;
mod error;
mod rng;
mod spec;

pub use adapter::{Adapter, Lora};
pub use atomic::{TEMPORARY_PREFIX, write_atomic};
pub use checkpoint::{Checkpoint, Dtype, TensorWriter};
pub use coverage::ApplyResult;
pub use error::{Error, Result, check_range};
pub use rng::{Philox, RandomStream};
pub use spec::{AdapterSpec, Module, Parameter, ParameterKind};
