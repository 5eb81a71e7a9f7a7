//! Provenance: what an adapter was generated from and by, in its metadata.

use crate::model::Model;
use hywu_core::Adapter;
use std::collections::BTreeMap;

/// The program with its version.
pub const PROGRAM: &str = concat!("hywu ", env!("CARGO_PKG_VERSION"));
/// Metadata key: name of the model.
pub const MODEL: &str = "model";
/// Metadata key: [`Model::hash`]; of an adapter that a generator alone wrote, that of its checkpoint ([`of_checkpoint`]).
///
/// [`of_checkpoint`]: crate::hash::of_checkpoint
pub const MODEL_HASH: &str = "model_hash";
/// Metadata key: which generator of a model that has several wrote it, from 1 on.
pub const GENERATOR: &str = "generator";
/// Metadata key: the instruction as it was given.
pub const INSTRUCTION: &str = "instruction";
/// Metadata key: [`hash::of_picture`](crate::hash::of_picture) of the source picture.
pub const SOURCE_HASH: &str = "source_hash";
/// Metadata key: seed of the noise of the edit that it was generated for. The adapter itself does not depend on it.
pub const SEED: &str = "seed";
/// Metadata key: what the scale of the generated adapter was multiplied by since.
pub const SCALED_BY: &str = "scaled_by";
/// Metadata key: hash of the condition that a generator was given instead of a picture ([`of_condition`]).
///
/// [`of_condition`]: crate::hash::of_condition
pub const CONDITION_HASH: &str = "condition_hash";
/// Metadata key: [`PROGRAM`].
pub const PROGRAM_KEY: &str = "program";

/// Writes into an adapter's metadata what it comes from.
pub fn stamp(adapter: &mut Adapter, model: &Model, instruction: &str, source_hash: &str, seed: u64) {
    adapter.metadata.extend(
        [
            (MODEL, model.info.name.as_str()),
            (MODEL_HASH, &model.hash),
            (INSTRUCTION, instruction),
            (SOURCE_HASH, source_hash),
            (SEED, &seed.to_string()),
            (PROGRAM_KEY, PROGRAM),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned())),
    );
}

/// The metadata of adapters that a generator alone writes, from a condition.
pub fn of_generator(checkpoint: String, condition: String) -> BTreeMap<String, String> {
    [(MODEL_HASH, checkpoint), (CONDITION_HASH, condition), (PROGRAM_KEY, PROGRAM.to_owned())]
        .map(|(key, value)| (key.to_owned(), value))
        .into()
}
