//! What the fuzz targets share.

mod parts;
pub mod seeds;

pub use parts::{Parts, file};

use std::fmt::Display;

/// An error is one line that a terminal can show, and of bounded length, whatever text the input held.
pub fn check_error(error: impl Display) {
    let text = error.to_string();
    assert!(!text.is_empty() && text.len() < 20_000, "{} bytes of error", text.len());
    assert!(!text.contains(char::is_control), "control characters in: {text:?}");
}
