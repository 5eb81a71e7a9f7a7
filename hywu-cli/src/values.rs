//! Values on the command line: a bad one is wrong usage (exit code 2), told with what would be right.

use clap::builder::{RangedU64ValueParser, TypedValueParser};

/// Sampling steps.
pub fn steps() -> impl TypedValueParser<Value = usize> {
    RangedU64ValueParser::<usize>::new().range(1..=1000)
}

/// Side of a tile in pixels.
pub fn tile(text: &str) -> Result<usize, String> {
    let tile = text.parse().ok().filter(|n: &usize| (8..=512).contains(n) && n.is_multiple_of(8));
    tile.ok_or_else(|| "a tile's side is a multiple of 8 in 8..=512".into())
}

/// A number, not infinite.
pub fn finite(text: &str) -> Result<f32, String> {
    let number = text.parse().ok().filter(|f: &f32| f.is_finite());
    number.ok_or_else(|| "a finite number is expected".into())
}
