//! Merging one adapter into the weight, W' = W + scale * B A (LoRA, arXiv 2106.09685 section 4.1), and when that is worth it.
//!
//! A merged weight costs nothing per call, but it serves one adapter, has no gradients for it, and is rounded once more: in bf16 the
//! update is lost where it is below half a unit of the weight's last place (1/512 of the weight), and elsewhere rounded to that grid,
//! while a fused call keeps both apart and adds them up in f32. On the CPU, in f32, the two agree to rounding.

use super::{OP, low_rank_linear};
use crate::{Device, Error, LoraVar, Result, Tape, Tensor, Var, ops::together, testing::as_naive};

/// Checks the arguments; equal parts of the rows of the weight, each with ranks of its own.
fn validate(weight: &Tensor, a: &Tensor, b: &Tensor, scale: f32) -> Result<usize> {
    let [outer, inner] = *weight.shape() else {
        return Err(Error::shape(OP, "weight", weight.shape(), "[out, in]"));
    };
    if outer * inner == 0 {
        return Err(Error::shape(OP, "weight", weight.shape(), "[out, in], not empty"));
    }
    let rank = match *b.shape() {
        [1, o, r] | [o, r] if o == outer && r > 0 => r,
        ref other => {
            let expected = format!("[1, {outer}, rank >= 1]: one adapter");
            return Err(Error::shape(OP, "lora_b", other, expected));
        }
    };
    let parts = match *a.shape() {
        [1, n, i] | [n, i] if i == inner && n > 0 && n.is_multiple_of(rank) => n / rank,
        ref other => {
            let expected = format!("[1, parts * {rank}, {inner}]: one adapter");
            return Err(Error::shape(OP, "lora_a", other, expected));
        }
    };
    if !outer.is_multiple_of(parts) {
        let expected = format!("[1, {rank} * a divisor of {outer}, {inner}]");
        return Err(Error::shape(OP, "lora_a", a.shape(), expected));
    }
    if !scale.is_finite() {
        return Err(Error::invalid(OP, format!("scale {scale} is not finite")));
    }
    together(OP, &[weight, a, b])?;
    Ok(parts)
}

/// The weight with one adapter in it: W' = W + scale * B A, added up in f32 and rounded once to the weight's dtype. The weight itself is
/// not touched. Where B A or scale is zero, the bits are those of W.
///
/// `weight` [out, in], `lora_a` [1, parts * r, in], `lora_b` [1, out, r], the leading axes optional: rows of part p of the weight, which
/// are out / parts, use ranks p * r .. (p + 1) * r of A.
///
/// # Errors
/// Shapes that don't agree, more than one adapter, an empty operand, a scale that is not finite.
pub fn merge(weight: &Tensor, lora_a: &Tensor, lora_b: &Tensor, scale: f32) -> Result<Tensor> {
    let parts = validate(weight, lora_a, lora_b, scale)?;
    if scale == 0.0 {
        return Ok(weight.clone());
    }
    Ok(as_naive(on_device!(weight, low_rank_linear::merge(weight, lora_a, lora_b, scale, parts))))
}

/// How a linear layer applies its adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Apply {
    /// As further steps of the product, in every call: any number of adapters, with gradients.
    #[default]
    Fused,
    /// Merged into the weight beforehand: one adapter, without gradients.
    Merged,
    /// Merged where that can be done and takes less time, by [`merging_pays`].
    Auto,
}

/// What a layer with its adapter is going to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Calls before the adapter changes.
    pub calls: usize,
    /// Rows of x in each.
    pub rows: usize,
}

/// What work costs on a device.
struct Costs {
    /// Bytes of an element.
    element: f64,
    /// Bytes read and written in a second.
    bandwidth: f64,
    /// Operations in a second of the low-rank products, an addition and a multiplication each one.
    arithmetic: f64,
    /// Seconds that any product takes.
    launch: f64,
}

impl Costs {
    fn of(device: Device) -> Self {
        match device {
            // Measured on two cores with AVX2 (an EPYC virtual machine): within a third of the time of merging 4096 x 4096 and of the
            // fused calls of the bundled backbone. What stays in a cache is faster than this.
            Device::Cpu => Self { element: 4.0, bandwidth: 16e9, arithmetic: 100e9, launch: 10e-6 },
            // Predicted, for an H100 in bf16: 85 % of its memory's bandwidth, half of what its tensor cores do, the time between two
            // kernels.
            Device::Cuda(_) => Self { element: 2.0, bandwidth: 2.8e12, arithmetic: 4e14, launch: 3e-6 },
        }
    }
}

/// Seconds that merging saves over all calls; negative where fused calls take less. `shape` is that of the weight, [out, in].
///
/// Merging reads and writes W and takes 2 r in out operations, once. A fused call reads X once more for S = X A^T, and takes 2 rows r
/// (in + out) operations and a launch more than a plain call.
pub fn merging_gain([outer, inner]: [usize; 2], rank: usize, load: Load, device: Device) -> f64 {
    let costs = Costs::of(device);
    let [outer, inner, rank, rows] = [outer, inner, rank, load.rows].map(|n| n as f64);
    let seconds = |elements: f64, operations: f64| {
        costs.launch + elements * costs.element / costs.bandwidth + operations / costs.arithmetic
    };
    let merging = seconds(2.0 * outer * inner, 2.0 * rank * inner * outer);
    let fusing = seconds(rows * inner, 2.0 * rows * rank * (inner + outer));
    load.calls as f64 * fusing - merging
}

/// Does merging an adapter of this rank into a weight of this shape, [out, in], take less time than so many fused calls with so many rows
/// of x? A model of the time ([`merging_gain`]); `benches` measures where each wins.
pub fn merging_pays(shape: [usize; 2], rank: usize, rows: usize, calls: usize, device: Device) -> bool {
    merging_gain(shape, rank, Load { calls, rows }, device) > 0.0
}

/// Can a pair be merged: is it one adapter, and does no gradient flow to it or to the weight?
pub fn mergeable(weight: &Var, lora: &LoraVar) -> bool {
    let one = |v: &Var| v.shape().len() == 2 || v.shape().first() == Some(&1);
    one(&lora.a) && one(&lora.b) && ![weight, &lora.a, &lora.b].iter().any(|v| v.requires_grad())
}

/// A linear layer with an adapter, ready for many calls: the weight and the adapter, or the merged weight.
#[derive(Clone, Debug)]
pub struct Prepared {
    weight: Var,
    lora: Option<LoraVar>,
}

impl Prepared {
    /// `weight` [out, in]; `lora` as in [`low_rank_linear`].
    ///
    /// # Errors
    /// To merge more than one adapter, or one that gradients are wanted of; those of [`merge`].
    pub fn new(weight: &Var, lora: Option<&LoraVar>, apply: Apply, load: Load) -> Result<Self> {
        let fused = || Self { weight: weight.clone(), lora: lora.cloned() };
        let Some(pair) = lora else { return Ok(fused()) };
        let merges = match apply {
            Apply::Fused => false,
            Apply::Merged => true,
            Apply::Auto => match *weight.shape() {
                [outer, inner] if mergeable(weight, pair) => {
                    let rank = pair.b.value().dim_back(1);
                    merging_pays([outer, inner], rank, load.rows, load.calls, weight.value().device())
                }
                _ => false,
            },
        };
        if !merges {
            return Ok(fused());
        }
        if !mergeable(weight, pair) {
            let what =
                "only one adapter can be merged, and none whose gradients, or the weight's, are wanted";
            return Err(Error::invalid(OP, what));
        }
        let weight = merge(weight.value(), pair.a.value(), pair.b.value(), pair.scale)?;
        Ok(Self { weight: Var::constant(weight), lora: None })
    }

    /// Is the adapter in the weight (or is there none)?
    pub fn is_plain(&self) -> bool {
        self.lora.is_none()
    }

    /// The layer's output; see [`low_rank_linear`].
    ///
    /// # Errors
    /// As [`low_rank_linear`].
    pub fn forward(&self, tape: &Tape, x: &Var, bias: Option<&Var>) -> Result<Var> {
        low_rank_linear(tape, x, &self.weight, bias, self.lora.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICES: [Device; 2] = [Device::Cpu, Device::Cuda(0)];

    #[test]
    fn many_calls_or_rows_are_worth_a_merge() {
        for device in DEVICES {
            let pays = |rows, calls| merging_pays([4096, 4096], 16, rows, calls, device);
            assert!(!pays(4096, 0), "what is never called is not worth anything");
            assert!(!pays(16, 1), "a few rows, once");
            assert!(pays(4096, 50), "a long run");
            assert!(pays(1 << 20, 1), "far more rows than the weight has");
            // Once it pays, more calls or rows make it pay all the more.
            for rows in [1, 64, 1024, 4096, 16384] {
                let first = (0..100_000).find(|&calls| pays(rows, calls)).expect("many calls pay");
                assert!(pays(rows, 2 * first) && pays(2 * rows, first), "{rows} rows, {first} calls");
                assert!(first == 0 || !pays(rows, first - 1));
            }
        }
    }

    #[test]
    fn sizes_beyond_any_machine_do_not_overflow() {
        let most = usize::MAX;
        for device in DEVICES {
            assert!(merging_gain([most, most], most, Load { calls: most, rows: most }, device).is_finite());
        }
    }
}
