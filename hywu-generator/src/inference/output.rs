//! What becomes of the tokens: an adapter in memory, or a file that is larger.

use super::Inference;
use crate::{Error, Result};
use hywu_core::{Adapter, Dtype, Lora, ParameterKind, TensorFile};
use hywu_kernels::Tensor;
use ndarray::{ArrayD, IxDyn};
use std::{collections::BTreeMap, ops::ControlFlow, path::Path};

/// How far long work is, in what it takes: a pass FLOPs, a file bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// Done.
    pub done: f64,
    /// In all.
    pub total: f64,
}

/// The parameter tokens of one layer of one instance, where they were computed and in that dtype.
pub struct LayerTokens {
    /// Which instance of the batch.
    pub instance: usize,
    /// Which layer of the base model.
    pub layer: usize,
    /// Those of all lora_A, [A, rank, token_dim].
    pub a: Tensor,
    /// Those of all lora_B, [B, rank, token_dim].
    pub b: Tensor,
}

/// A generated parameter: where in its side's tokens it lies.
struct Piece {
    module: usize,
    kind: ParameterKind,
    /// Without the batch.
    shape: Vec<usize>,
    start: usize,
    len: usize,
}

impl Piece {
    fn suffix(&self) -> &'static str {
        match self.kind {
            ParameterKind::LoraA => "lora_A",
            ParameterKind::LoraB => "lora_B",
        }
    }
    /// Its values among those of a layer.
    fn of<'a>(&self, a: &'a Tensor, b: &'a Tensor) -> &'a [f32] {
        let side = match self.kind {
            ParameterKind::LoraA => a,
            ParameterKind::LoraB => b,
        };
        &side.data()[self.start..self.start + self.len]
    }
}

impl Inference {
    /// The parameters of a layer in token order (FORMAT.md section 3).
    fn pieces(&self) -> Vec<Piece> {
        let area = self.config.rank * self.config.token_dim;
        let (mut at, mut side) = (0, None);
        let piece = |p: hywu_core::Parameter| {
            // All lora_A come first, and each side has tokens of its own.
            if side.replace(p.kind) != Some(p.kind) {
                at = 0;
            }
            let start = at;
            at += p.tokens(area) * area;
            Piece { module: p.module, kind: p.kind, len: p.numel(), shape: p.shape, start }
        };
        self.spec.parameters().into_iter().map(piece).collect()
    }

    /// The adapter of a condition, [b, 1, L, input_dim] or [b, L, input_dim], on the host.
    ///
    /// # Errors
    /// As [`Inference::each_layer`].
    pub fn generate(&self, condition: &Tensor) -> Result<Adapter> {
        let (batch, _) = self.config.batch_and_length(condition.shape())?;
        let pieces = self.pieces();
        let empty = |shape: &[usize]| ArrayD::<f32>::zeros(IxDyn(&[&[batch], shape].concat()));
        let mut adapter =
            Adapter { modules: Default::default(), scale: self.spec.scale(), metadata: Default::default() };
        for name in self.spec.module_names() {
            adapter.modules.insert(name, Lora { lora_a: empty(&[]), lora_b: empty(&[]) });
        }
        let modules = self.spec.modules.len();
        self.each_layer(condition, &mut |_| ControlFlow::Continue(()), &mut |tokens| {
            let (a, b) = (tokens.a.to_host()?, tokens.b.to_host()?);
            for piece in &pieces {
                let Some((_, lora)) = adapter.modules.get_index_mut(tokens.layer * modules + piece.module)
                else {
                    continue;
                };
                let array = match piece.kind {
                    ParameterKind::LoraA => &mut lora.lora_a,
                    ParameterKind::LoraB => &mut lora.lora_b,
                };
                if tokens.instance == 0 {
                    *array = empty(&piece.shape);
                }
                let all = array.as_slice_mut().unwrap_or_default();
                all[tokens.instance * piece.len..][..piece.len].copy_from_slice(piece.of(&a, &b));
            }
            Ok(())
        })?;
        Ok(adapter)
    }

    /// The same straight into a safetensors file in `dtype`, a layer at a time: [`Adapter::load`] reads it. The file appears when all is
    /// written, or not at all.
    ///
    /// # Errors
    /// As [`Inference::each_layer`]; a file that can't be written, a disk without room for it; values beyond the range of `dtype`.
    pub fn generate_file(
        &self,
        condition: &Tensor,
        path: impl AsRef<Path>,
        dtype: Dtype,
        metadata: &BTreeMap<String, String>,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<()> {
        let (batch, length) = self.config.batch_and_length(condition.shape())?;
        // What does not fit is told before the file takes its room on the disk.
        self.rows(batch, length)?;
        let pieces = self.pieces();
        let name = |layer: usize, piece: &Piece| {
            format!("{}.{}", self.spec.module_name(layer, piece.module), piece.suffix())
        };
        let tensors = (0..self.spec.layers).flat_map(|layer| pieces.iter().map(move |piece| (layer, piece)));
        let tensors =
            tensors.map(|(layer, piece)| (name(layer, piece), dtype, [&[batch], &piece.shape[..]].concat()));
        let scale = ("scale".to_owned(), dtype, Vec::new());
        let mut file = TensorFile::create(path.as_ref(), tensors.chain([scale]), metadata)?;
        self.each_layer(condition, progress, &mut |tokens| {
            let (a, b) = (tokens.a.to_host()?, tokens.b.to_host()?);
            for piece in &pieces {
                let name = name(tokens.layer, piece);
                let values = piece.of(&a, &b);
                if let Some(bad) = values.iter().find(|x| !x.is_finite()) {
                    return Err(Error::Output(format!("`{name}` came out with {bad}")));
                }
                file.put(&name, tokens.instance * piece.len, values)?;
            }
            Ok(())
        })?;
        file.put("scale", 0, &[self.spec.scale()])?;
        Ok(file.finish()?)
    }
}
