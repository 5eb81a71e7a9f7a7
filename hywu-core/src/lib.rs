//! Vocabulary of HY-WU: what the other crates talk about, and no arithmetic but what describes, combines and merges adapters as files.
//!
//! * [`Adapter`]: the low-rank weight update of one instance, as files and tools see it; [`adapter`]: what can be done with it.
//! * [`AdapterSpec`]: which modules of a backbone get a low-rank update (`pg_mapping`), in order.
//! * [`Checkpoint`]: memory-mapped safetensors files and shard folders.
//! * [`Philox`]: counter-based random numbers, equal on every device and thread count.

pub mod adapter;
mod atomic;
mod checkpoint;
mod error;
mod rng;
mod spec;

pub use adapter::{Adapter, Lora};
pub use atomic::{create_folder_atomic, write_atomic};
pub use checkpoint::{Checkpoint, Dtype, TensorWriter};
pub use error::{Error, Result, check_range};
pub use rng::{Philox, RandomStream};
pub use spec::{AdapterSpec, Module, Parameter, ParameterKind};
