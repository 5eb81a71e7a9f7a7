//! Vocabulary of HY-WU: what the other crates talk about, and no arithmetic but what describes, combines and merges adapters as files.
//!
//! * [`Adapter`]: the low-rank weight update of one instance, as files and tools see it; [`adapter`]: what can be done with it.
//! * [`AdapterSpec`]: which modules of a backbone get a low-rank update (`pg_mapping`), in order.
//! * [`ApplyResult`]: which of an adapter's entries and a backbone's modules meet, and which don't.
//! * [`Checkpoint`]: safetensors files and shard folders; [`Header`] and [`Index`]: what they say of themselves, checked first.
//! * [`Philox`]: counter-based random numbers, equal on every device and thread count.

pub mod adapter;
mod atomic;
mod checkpoint;
mod coverage;
mod dtype;
mod error;
mod files;
mod header;
mod index;
mod json;
mod raw;
mod rng;
mod source;
mod spec;
mod tensor_file;

pub use adapter::{Adapter, Lora};
pub use atomic::{
    AtomicFile, TEMPORARY_PREFIX, create_folder_atomic, remove_leftovers, remove_temporaries,
    replace_folder_atomic, write_atomic,
};
pub use checkpoint::{Checkpoint, TensorWriter};
pub use coverage::ApplyResult;
pub use dtype::Dtype;
pub use error::{Error, Plain, Result, check_range, some_of};
pub use header::{Entry, Header};
pub use index::Index;
pub use json::parse_json;
pub use rng::{Philox, RandomStream};
pub use source::{read_small, read_text};
pub use spec::{AdapterSpec, Module, Parameter, ParameterKind};
pub use tensor_file::TensorFile;
