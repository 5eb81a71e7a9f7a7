//! The three attentions of a block: their rotary tables (FORMAT.md section 5), and what they have in common.

use crate::{GeneratorConfig, Result, config::Shape};
use hywu_kernels::{
    Device,
    ops::attention::{Attention, Layout, Rotary, rotary_table},
};

/// The rotary tables that don't depend on the condition.
pub(crate) struct Tables {
    /// Over layers.
    pub layer: Rotary,
    /// Inside a layer.
    pub token: Rotary,
    /// Queries of the attention to the condition.
    pub queries: Rotary,
}

impl Tables {
    pub fn new(config: &GeneratorConfig, shape: Shape, device: Device) -> Result<Self> {
        let (n, hd, Shape { t, w, s, .. }) = (config.num_base_model_layers, config.head_dim, shape);
        let pairs = |rows: usize, columns: usize| -> Vec<Vec<u32>> {
            (0..rows as u32).flat_map(|i| (0..columns as u32).map(move |j| vec![i, j])).collect()
        };
        let table = |positions: &[Vec<u32>], widths: &[usize]| -> Result<Rotary> {
            Ok(rotary_table(positions, widths)?.to(device)?)
        };
        Ok(Self {
            layer: table(&(0..n as u32).map(|i| vec![i]).collect::<Vec<_>>(), &[hd])?,
            token: table(&pairs(t, w), &[hd / 2; 2])?,
            queries: table(&pairs(n, s), &[hd / 2; 2])?,
        })
    }

    /// That of the keys of a condition of l tokens.
    pub fn keys(config: &GeneratorConfig, shape: Shape, l: usize, device: Device) -> Result<Rotary> {
        let offset = shape.t.max(shape.w) as u32;
        let positions: Vec<_> = (0..l as u32).map(|i| vec![i + offset; 2]).collect();
        Ok(rotary_table(&positions, &[config.head_dim / 2; 2])?.to(device)?)
    }
}

impl GeneratorConfig {
    /// Where the rows of d channels start, in all heads.
    pub(crate) fn rows(&self, offset: usize, batch: [usize; 2], token: usize) -> Layout {
        Layout { offset, batch, token, head: self.head_dim }
    }

    /// Attention without a mask, of queries and keys at these places; the output lies as the queries do, [rows, d].
    pub(crate) fn mixing(
        &self,
        batch: [usize; 2],
        [queries, keys]: [usize; 2],
        [q, k]: [Layout; 2],
        rotary: [&Rotary; 2],
    ) -> Attention {
        let (d, head) = (self.d_model, self.head_dim);
        Attention {
            batch,
            queries,
            keys,
            heads: d / head,
            kv_heads: d / head,
            head_dim: head,
            q,
            k,
            v: k,
            out: q,
            out_shape: vec![batch[0] * batch[1] * queries, d],
            key_lengths: None,
            ragged: None,
            causal: None,
            rotary: Some((rotary[0].clone(), rotary[1].clone())),
        }
    }
}
