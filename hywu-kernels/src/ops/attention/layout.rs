//! Where the rows of the operands are in their tensors.

use super::{Attention, OP};
use crate::{Error, Result, Tensor};

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

/// Sizes and strides of a layout's axes.
type Axes = Vec<(usize, usize)>;

/// Does no index tuple meet another's element? Sufficient: sorted by stride, every stride exceeds all that the smaller ones reach.
fn injective(axes: &Axes) -> bool {
    if axes.iter().any(|a| a.0 == 0) {
        return true;
    }
    let mut axes: Axes = axes.iter().copied().filter(|a| a.0 > 1).collect();
    axes.sort_by_key(|a| a.1);
    let mut reach = 0;
    axes.iter().all(|&(size, stride)| {
        let apart = stride > reach;
        reach += (size - 1) * stride;
        apart
    })
}

/// The rows of an operand: one for each entry, token and head.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub layout: &'a Layout,
    pub tokens: usize,
    pub heads: usize,
}

impl Rows<'_> {
    /// From the first channel of a token to behind its last.
    fn part(&self, head_dim: usize) -> (usize, usize) {
        let l = self.layout;
        (l.offset, l.offset + self.heads.saturating_sub(1) * l.head + head_dim)
    }
}

impl Attention {
    /// Those of queries or of the output.
    pub(super) fn of_queries<'a>(&self, layout: &'a Layout) -> Rows<'a> {
        Rows { layout, tokens: self.queries, heads: self.heads }
    }
    /// Those of keys or values.
    pub(super) fn of_keys<'a>(&self, layout: &'a Layout) -> Rows<'a> {
        Rows { layout, tokens: self.keys, heads: self.kv_heads }
    }
    fn axes(&self, rows: Rows<'_>) -> Axes {
        let l = rows.layout;
        // Ragged entries lie along the axis of the tokens.
        let b0 = if self.ragged.is_some() { 1 } else { self.batch[0] };
        vec![
            (b0, l.batch[0]),
            (self.batch[1], l.batch[1]),
            (rows.tokens, l.token),
            (rows.heads, l.head),
            (self.head_dim, 1),
        ]
    }
    /// Elements that an operand has.
    pub(super) fn count(&self, rows: Rows<'_>) -> usize {
        self.axes(rows).iter().map(|a| a.0).product()
    }
    /// One past the last element of a layout; `None` when that overflows.
    pub(super) fn end(&self, rows: Rows<'_>) -> Option<usize> {
        let axes = self.axes(rows);
        // The product of the sizes is bounded too: jobs are counted by it.
        if axes.iter().try_fold(1usize, |n, a| n.checked_mul(a.0))? == 0 {
            return Some(0);
        }
        axes.iter().try_fold(rows.layout.offset.checked_add(1)?, |end, &(size, stride)| {
            end.checked_add((size - 1).checked_mul(stride)?)
        })
    }
    pub(super) fn in_bounds(&self, what: &'static str, rows: Rows<'_>, tensor: &Tensor) -> Result<()> {
        match self.end(rows) {
            Some(end) if end <= tensor.numel() => Ok(()),
            end => {
                let end = end.map_or("more than the address space".to_owned(), |n| n.to_string());
                let layout = rows.layout;
                Err(Error::shape(OP, what, tensor.shape(), format!("at least {end} elements for {layout:?}")))
            }
        }
    }
    /// Does an operand reach each of its elements once?
    pub(super) fn injective(&self, rows: Rows<'_>) -> bool {
        injective(&self.axes(rows))
    }
    /// Is every element of a tensor that these operands share met at most once? Sufficient.
    pub(super) fn disjoint(&self, operands: &[Rows<'_>]) -> bool {
        if !operands.iter().all(|&rows| self.injective(rows)) {
            return false;
        }
        let apart = |mut ranges: Vec<(usize, usize)>| {
            ranges.sort_unstable();
            ranges.windows(2).all(|w| w[0].1 <= w[1].0)
        };
        let whole = |&rows: &Rows<'_>| (rows.layout.offset, self.end(rows).unwrap_or(usize::MAX));
        if apart(operands.iter().map(whole).collect()) {
            return true;
        }
        // A fused projection [.., token, q | k | v]: the parts of a token are apart, and so are tokens.
        let d = self.head_dim;
        let first = operands[0];
        let strides = |rows: &Rows<'_>| (rows.layout.batch, rows.layout.token);
        let parts: Vec<_> = operands.iter().map(|rows| rows.part(d)).collect();
        let start = parts.iter().map(|p| p.0).min().unwrap_or(0);
        let end = parts.iter().map(|p| p.1).max().unwrap_or(0);
        let tokens = operands.iter().map(|rows| rows.tokens).max().unwrap_or(0);
        let mut axes = self.axes(Rows { tokens, heads: 1, ..first });
        axes.pop();
        axes.push((end - start, 1));
        if operands.iter().all(|rows| strides(rows) == strides(&first)) && apart(parts) && injective(&axes) {
            return true;
        }
        // The same axes at evenly spaced offsets are one layout with an axis more: [.., token, head, q | k | v].
        let mut offsets: Vec<_> = operands.iter().map(|rows| rows.layout.offset).collect();
        offsets.sort_unstable();
        let step = offsets.get(1).map_or(0, |o| o - offsets[0]);
        let mut axes = self.axes(first);
        let alike = operands.iter().all(|&rows| self.axes(rows) == axes);
        axes.push((offsets.len(), step));
        alike && offsets.windows(2).all(|w| w[1] - w[0] == step) && injective(&axes)
    }
}
