//! The editing side of HY-WU: pictures, text, the mini backbone, flow matching and samplers.

mod backbone;
mod batch;
mod config;
mod data;
mod error;
mod flow;
mod instructions;
pub mod metrics;
mod mini;
mod own;
mod picture;
mod picture_io;
mod rehearsal;
mod router;
mod sampler;
pub mod skills;
mod text;
pub mod tiles;

pub use backbone::{Backbone, pixel_position};
pub use batch::{EditBatch, sizes_of_edits};
pub use config::BackboneConfig;
pub use data::{BatchShape, EditData, PhotoSet};
pub use error::{Error, Result};
pub use flow::{Noised, flow_loss, flow_loss_towards};
pub use instructions::learn_instructions;
pub use mini::MiniDownstream;
pub use own::{KnownSkill, OwnSkill};
pub use picture::Picture;
pub use picture_io::{check_output, load_picture, save_picture};
pub use rehearsal::Lesson;
pub use router::Router;
pub use sampler::{SampleOptions, Sampler, VIEW, condition_of, detail_of, edit_picture, thumbnail_of};
pub use text::TextEncoder;
