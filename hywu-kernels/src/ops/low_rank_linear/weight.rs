//! What the weight of a linear layer is.

use super::QuantizedWeight;
use crate::Var;

/// The weight of a [`LowRankLinear`](super::LowRankLinear): [out, in], or [experts, out, in].
#[derive(Clone, Copy, Debug)]
pub enum Weight<'a> {
    /// In the dtype of x; it may be trained.
    Dense(&'a Var),
    /// In eight bits. It is frozen: gradients go to everything else.
    Quantized(&'a QuantizedWeight),
}

impl<'a> From<&'a Var> for Weight<'a> {
    fn from(weight: &'a Var) -> Self {
        Self::Dense(weight)
    }
}

impl<'a> From<&'a QuantizedWeight> for Weight<'a> {
    fn from(weight: &'a QuantizedWeight) -> Self {
        Self::Quantized(weight)
    }
}

impl<'a> Weight<'a> {
    /// [out, in], or [experts, out, in].
    pub fn shape(self) -> &'a [usize] {
        match self {
            Self::Dense(weight) => weight.shape(),
            Self::Quantized(weight) => weight.shape(),
        }
    }
    /// The tape's part of it.
    pub(super) fn var(self) -> Option<&'a Var> {
        match self {
            Self::Dense(weight) => Some(weight),
            Self::Quantized(_) => None,
        }
    }
    pub(super) fn kept(self) -> Kept {
        match self {
            Self::Dense(weight) => Kept::Dense(weight.clone()),
            Self::Quantized(weight) => Kept::Quantized(weight.clone()),
        }
    }
}

/// A weight that is kept for the backward pass.
pub(super) enum Kept {
    Dense(Var),
    Quantized(QuantizedWeight),
}

impl Kept {
    pub fn get(&self) -> Weight<'_> {
        match self {
            Self::Dense(weight) => weight.into(),
            Self::Quantized(weight) => weight.into(),
        }
    }
}
