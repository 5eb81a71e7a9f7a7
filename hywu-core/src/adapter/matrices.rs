//! An adapter's tensors as matrices.

use super::{Adapter, Lora};
use crate::{AdapterSpec, Error, Result};
use ndarray::{Array2, ArrayD, ArrayView2, Ix2, s};

/// lora_a [r, in] and lora_b [out, r] of one instance, and of one expert where a module has several.
#[derive(Clone, Copy, Debug)]
pub struct Matrices<'a> {
    /// [r, in].
    pub a: ArrayView2<'a, f32>,
    /// [out, r].
    pub b: ArrayView2<'a, f32>,
}

/// [`Matrices`] of their own.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Pair {
    pub(super) a: Array2<f32>,
    pub(super) b: Array2<f32>,
}

impl Pair {
    pub(super) fn rank(&self) -> usize {
        self.a.nrows()
    }
    /// The same update with zeros for further ranks; `rank` is not below its own.
    pub(super) fn with_rank(&self, rank: usize) -> Self {
        let (mut a, mut b) = (Array2::zeros((rank, self.a.ncols())), Array2::zeros((self.b.nrows(), rank)));
        a.slice_mut(s![..self.rank(), ..]).assign(&self.a);
        b.slice_mut(s![.., ..self.rank()]).assign(&self.b);
        Self { a, b }
    }
}

impl Matrices<'_> {
    pub(super) fn to_pair(self) -> Pair {
        Pair { a: self.a.to_owned(), b: self.b.to_owned() }
    }
}

impl Lora {
    /// Number of experts; none for a plain module.
    pub fn experts(&self) -> Option<usize> {
        (self.lora_a.ndim() == 4).then(|| self.lora_a.shape()[1])
    }

    /// The pairs of an instance: one, or one for each expert. Empty for an instance that is not there, and for tensors that
    /// [`Adapter::check_pairs`] refuses.
    pub fn matrices(&self, instance: usize) -> Vec<Matrices<'_>> {
        let (a, b) = (cut(&self.lora_a, instance), cut(&self.lora_b, instance));
        a.into_iter().zip(b).map(|(a, b)| Matrices { a, b }).collect()
    }
}

/// The matrices of an instance in [batch, ..] or [batch, experts, ..].
fn cut(array: &ArrayD<f32>, instance: usize) -> Vec<ArrayView2<'_, f32>> {
    let ndim = array.ndim();
    if !(3..=4).contains(&ndim) || instance >= array.shape()[0] {
        return Vec::new();
    }
    let one = array.index_axis(ndarray::Axis(0), instance);
    let experts = if ndim == 4 { one.shape()[0] } else { 1 };
    let matrix = |e: usize| {
        let view = if ndim == 4 { one.clone().index_axis_move(ndarray::Axis(0), e) } else { one.clone() };
        view.into_dimensionality::<Ix2>().ok()
    };
    (0..experts).filter_map(matrix).collect()
}

impl Adapter {
    /// Checks what needs no backbone: that the two tensors of every module belong together ([batch, r, in] and [batch, out, r], or
    /// both with experts behind the batch), that all modules have the same batch, and that every value is finite.
    ///
    /// # Errors
    /// [`Error::Adapter`] with the module and both shapes, or the value.
    pub fn check_pairs(&self) -> Result<()> {
        let batch = self.batch();
        for (name, lora) in &self.modules {
            let (a, b) = (lora.lora_a.shape(), lora.lora_b.shape());
            let n = a.len();
            let fits =
                (3..=4).contains(&n) && b.len() == n && a[..n - 2] == b[..n - 2] && a[n - 2] == b[n - 1];
            if !fits || a[0] != batch || a.iter().chain(b).any(|&x| x == 0) {
                let what = format!(
                    "`{name}` has lora_A {a:?} and lora_B {b:?}, expected [{batch}, r, in] and [{batch}, out, r]"
                );
                return Err(Error::Adapter(what));
            }
            if a[n - 2] > AdapterSpec::MAX_RANK {
                let what = format!("`{name}` has rank {}, at most {}", a[n - 2], AdapterSpec::MAX_RANK);
                return Err(Error::Adapter(what));
            }
            if let Some(bad) = lora.lora_a.iter().chain(&lora.lora_b).find(|x| !x.is_finite()) {
                return Err(Error::Adapter(format!("`{name}` holds {bad}")));
            }
        }
        if self.modules.is_empty() {
            return Err(Error::Adapter("there is no module in it".into()));
        }
        if !self.scale.is_finite() {
            return Err(Error::Adapter(format!("scale {} is not finite", self.scale)));
        }
        Ok(())
    }

    /// [`Adapter::check_pairs`], and that there is an instance of this number.
    pub(super) fn check_instance(&self, instance: usize) -> Result<()> {
        self.check_pairs()?;
        if instance >= self.batch() {
            let what = format!("there is no instance {instance}; it holds {}", self.batch());
            return Err(Error::Adapter(what));
        }
        Ok(())
    }

    /// The same update `factor` times as strong: the scale is multiplied, the tensors stay.
    ///
    /// # Errors
    /// [`Error::Adapter`] when the new scale is not finite.
    pub fn scaled(mut self, factor: f32) -> Result<Self> {
        let scale = self.scale * factor;
        if !scale.is_finite() {
            return Err(Error::Adapter(format!("scale {} times {factor} is not finite", self.scale)));
        }
        self.scale = scale;
        Ok(self)
    }
}
