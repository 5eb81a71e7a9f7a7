//! The editing side of HY-WU: pictures, text, the mini backbone, flow matching and samplers.

mod backbone;
mod batch;
mod config;
mod error;
mod flow;
mod mini;
mod picture;
mod sampler;
pub mod tiles;

pub use backbone::{Backbone, pixel_position};
pub use batch::EditBatch;
pub use config::BackboneConfig;
pub use error::{Error, Result};
pub use flow::{Noised, flow_loss};
pub use mini::MiniDownstream;
pub use picture::Picture;
pub use sampler::{SampleOptions, Sampler, VIEW, condition_of, detail_of, edit_picture, thumbnail_of};
