//! The ladder of sizes that costs are measured at, and what a forward pass costs.

use crate::{GeneratorConfig, config::Shape};
use hywu_core::{Error, Result};
use std::{fmt, str::FromStr};

/// A rung of the ladder: the published generator, or about that fraction of its FLOPs. It is known by the same name on the command
/// line and in benches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// `1/64`.
    SixtyFourth,
    /// `1/16`.
    Sixteenth,
    /// `1/4`.
    Quarter,
    /// `published`: 8.1 billion weights, 0.72 billion generated values.
    Published,
}

impl Size {
    /// The ladder, from below.
    pub const ALL: [Self; 4] = [Self::SixtyFourth, Self::Sixteenth, Self::Quarter, Self::Published];

    /// Condition tokens that go with the size.
    pub fn condition_length(self) -> usize {
        match self {
            Self::Published | Self::Quarter => 4000,
            Self::Sixteenth => 2000,
            Self::SixtyFourth => 1000,
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Published => "published",
            Self::Quarter => "1/4",
            Self::Sixteenth => "1/16",
            Self::SixtyFourth => "1/64",
        })
    }
}

impl FromStr for Size {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|size| size.to_string() == text).ok_or_else(|| {
            let names = Self::ALL.map(|size| size.to_string()).join(", ");
            Error::Config(format!("`{text}` is no size; there are {names}"))
        })
    }
}

impl GeneratorConfig {
    /// The configuration of a size.
    ///
    /// Nearly all FLOPs are 36 d^2 K N S in products and 4 K N S^2 d + 4 K N S L d in attention. A quarter of the blocks K is a quarter
    /// of all of them. Width d, positions S and condition L divided by 2 each are an eighth, with half the blocks a sixteenth; divided
    /// by 4 each they are a sixty-fourth, with all blocks: so the parts keep their shares. Positions follow from the number of experts:
    /// 31 and 15 instead of 64 come nearest to a half and a quarter.
    pub fn scaled(size: Size) -> Self {
        let published = Self::default();
        let (width, blocks, experts) = match size {
            Size::Published => return published,
            Size::Quarter => return Self { num_pg_layers: 6, ..published },
            Size::Sixteenth => (2048, 12, 31),
            Size::SixtyFourth => (1024, 24, 15),
        };
        let mut mapping = Self::default_mapping();
        mapping["mlp.experts"]["num_experts"] = experts.into();
        Self {
            d_model: width,
            input_dim: width,
            num_pg_layers: blocks,
            pg_mapping: Some(mapping),
            ..published
        }
    }

    /// FLOPs of a forward pass for a batch of conditions of so many tokens, by the formulas of FORMAT.md section 8: products and
    /// attention, a multiplication and an addition counted as two.
    ///
    /// # Errors
    /// A bad config.
    pub fn flops(&self, batch: usize, length: usize) -> Result<f64> {
        let cost = Cost::new(self, self.sizes()?.1, length);
        Ok(batch as f64 * cost.all())
    }
}

/// FLOPs of the parts of a forward pass for one condition.
#[derive(Clone, Copy)]
pub(crate) struct Cost {
    blocks: f64,
    /// Of hidden_in.
    pub condition: f64,
    /// Of the sub-layers of a block: attention over layers, inside a layer, to the condition, feed-forward.
    pub sublayers: [f64; 4],
    /// Of the output projections.
    pub output: f64,
}

impl Cost {
    pub fn new(config: &GeneratorConfig, shape: Shape, length: usize) -> Self {
        let [n, s, t, c, l] =
            [config.num_base_model_layers, shape.s, shape.t, shape.c, length].map(|x| x as f64);
        let [d, i, r, p] =
            [config.d_model, config.input_dim, config.rank, config.output_dim].map(|x| x as f64);
        let (places, square) = (n * s, 2.0 * d * d);
        let sublayers = [
            4.0 * square * places + 4.0 * s * n * n * d,
            4.0 * square * places + 4.0 * n * s * s * d,
            2.0 * square * (places + l) + 4.0 * places * l * d,
            8.0 * square * places,
        ];
        Self {
            blocks: config.num_pg_layers as f64,
            condition: 2.0 * i * d * l,
            sublayers,
            output: 2.0 * n * t * r * c * p,
        }
    }
    pub fn all(&self) -> f64 {
        self.condition + self.blocks * self.sublayers.iter().sum::<f64>() + self.output
    }
}
