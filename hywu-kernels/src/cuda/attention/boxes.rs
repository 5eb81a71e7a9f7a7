//! Rows of an operand as a tensor of five axes that Hopper's copy engine moves boxes of: `kernels-cu/attention/boxes.cuh`.

use super::{OP, Rows};
use crate::{
    Result, Tensor,
    cuda::{
        call::{Boxes, on_gpu},
        pack,
    },
    ops::attention::{Attention, Layout},
};
use hywu_core::Dtype;

/// Channels of a box's line, 128 bytes.
pub(super) const LINE_CHANNELS: usize = 64;

/// A tensor with its boxes, and which of its axes counts what.
#[derive(Debug)]
pub(super) struct Map {
    pub boxes: Boxes,
    /// Of batch0, batch1, token and head the axis, 1 to 4; 0: none.
    axes: [usize; 4],
}

/// The place of tokens in [`Map::axes`].
const TOKEN: usize = 2;

impl Map {
    /// Boxes of `tokens` rows; none where the engine can't be told of these rows: it wants multiples of 16 bytes, and no axis that folds
    /// back onto the one below it.
    ///
    /// # Errors
    /// A tensor on the host.
    pub fn new(args: &Attention, data: &Tensor, rows: &Rows, tokens: usize) -> Result<Option<Self>> {
        if !rows.aligned(pack(Dtype::Bf16)) {
            return Ok(None);
        }
        let Layout { offset, batch, token, head } = rows.layout;
        let [batch0, batch1, tokens_in_all, heads] = rows.sizes(args);
        let all = [(batch0, batch[0]), (batch1, batch[1]), (tokens_in_all, token), (heads, head)];
        // An axis of one element, or of the same one again and again, is none; but for tokens, of which a box has several.
        let mut order: Vec<usize> = (0..4).filter(|&i| all[i].0 > 1 && all[i].1 > 0).collect();
        order.sort_by_key(|&i| all[i].1);
        if !order.contains(&TOKEN) {
            if tokens_in_all > 1 {
                return Ok(None);
            }
            order.push(TOKEN);
        }
        let mut dims = vec![rows.channels as u64];
        let (mut pitches, mut size, mut axes) = (Vec::new(), vec![LINE_CHANNELS as u32], [0; 4]);
        // Of axes of one element: beyond all others.
        let mut beyond = 2 * rows.channels.next_multiple_of(8) as u64;
        for &i in &order {
            axes[i] = dims.len();
            let (count, stride) = (all[i].0 as u64, 2 * all[i].1 as u64);
            let pitch = if count > 1 { stride } else { beyond };
            pitches.push(pitch);
            dims.push(count);
            size.push(if i == TOKEN { tokens as u32 } else { 1 });
            beyond = beyond.max(pitch.saturating_mul(count));
        }
        while dims.len() < 5 {
            pitches.push(beyond);
            dims.push(1);
            size.push(1);
        }
        let nested = pitches.iter().zip(&dims).all(|(pitch, below)| pitch >= below && *pitch < 1 << 40);
        let address = on_gpu(OP, data)?.address() + 2 * offset as u64;
        Ok(nested.then_some(Self { boxes: Boxes { address, dims, pitches, size }, axes }))
    }
    /// The struct `Axes` of the kernels.
    pub fn bytes(&self) -> Vec<u8> {
        self.axes.iter().flat_map(|&a| (a as u32).to_le_bytes()).collect()
    }
}
