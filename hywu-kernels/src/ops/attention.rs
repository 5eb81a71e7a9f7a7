//! softmax(Q K^T / sqrt(d)) V with online softmax, any length, strided operands.

use crate::{Result, Tape, Tensor, Var};

/// How the element (batch0, batch1, token, head, channel) is found in a tensor: offset + the dot product with these strides
/// (in elements); channels are contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Index of the first element.
    pub offset: usize,
    /// Strides of the two batch axes.
    pub batch: [usize; 2],
    /// Stride from one token to the next.
    pub token: usize,
    /// Stride from one head to the next.
    pub head: usize,
}

/// Rotary tables: interleaved pairs (2i, 2i+1) of each head are rotated by the angle of (token, i).
#[derive(Clone, Debug)]
pub struct Rotary {
    /// [tokens, head_dim / 2].
    pub cos: Tensor,
    /// [tokens, head_dim / 2].
    pub sin: Tensor,
}

/// The shape of an attention call.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Sizes of the two batch axes.
    pub batch: [usize; 2],
    /// Query tokens.
    pub queries: usize,
    /// Key and value tokens.
    pub keys: usize,
    /// Heads.
    pub heads: usize,
    /// Channels of a head; even.
    pub head_dim: usize,
    /// Where queries are in their tensor.
    pub q: Layout,
    /// Where keys are.
    pub k: Layout,
    /// Where values are.
    pub v: Layout,
    /// Where the output goes.
    pub out: Layout,
    /// Shape of the output tensor; `out` covers it exactly.
    pub out_shape: Vec<usize>,
    /// Valid keys per (batch0, batch1) entry, row-major; the others are masked. A row with no key gives zeros.
    pub key_lengths: Option<Vec<usize>>,
    /// Rotary tables of queries and of keys.
    pub rotary: Option<(Rotary, Rotary)>,
}

/// QK normalisation: RMSNorm (eps 1e-6) over each head's channels before the rotation, weights [head_dim].
#[derive(Clone, Debug)]
pub struct QkNorm {
    /// Weight for queries.
    pub q: Var,
    /// Weight for keys.
    pub k: Var,
}

/// Attention on a tape. `q`, `k` and `v` may be one and the same variable (a fused projection) read at different offsets.
pub fn attention(tape: &Tape, args: &Attention, q: &Var, k: &Var, v: &Var, norm: Option<&QkNorm>) -> Result<Var> {
    let _ = (tape, args, q, k, v, norm);
    todo!()
}

/// Rotary tables for positions with several coordinates (FORMAT.md section 5): `positions[token]` holds one coordinate per axis,
/// `widths` the channels of each axis (even, sum = head_dim); theta = 10000; angles rounded to f32.
pub fn rotary_table(positions: &[Vec<u32>], widths: &[usize]) -> Result<Rotary> {
    let _ = (positions, widths);
    todo!()
}
