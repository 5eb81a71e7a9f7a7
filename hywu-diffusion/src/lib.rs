//! The editing side of HY-WU: pictures, text, the mini backbone, flow matching and samplers.

mod error;
mod picture;

pub use error::{Error, Result};
pub use picture::Picture;
