//! Y = X W^T + bias + scale (X A^T) B^T (LoRA, arXiv 2106.09685): rows in [`Segments`], each with a weight and an adapter or none.
//!
//! On a CUDA device a row's result depends on that row, its weight and its adapter alone, bit for bit: not on the rest of the batch, nor
//! on the number of its rows (adapters and weights of finite numbers, that is). Gradients of bf16 tensors that are a single product may
//! come from cuBLASLt where it is installed; `HYWU_CUDA_BLAS=0` does without it, so that they are the same bits on every machine of one
//! kind, `HYWU_CUDA_BLAS=1` uses it in forward passes without an adapter too, whose rows then may depend on their number.

mod ladder;
mod merge;
mod quantized;
mod segments;
mod shrunk;
mod weight;

pub use ladder::{LADDER, ladder_step};
pub use merge::{Apply, Load, Prepared, merge, mergeable, merging_gain, merging_pays};
pub use quantized::{Format, QuantizedWeight};
pub use segments::{Segment, Segments};
pub use shrunk::{Shrink, Shrunk, shrink};
pub use weight::Weight;

use super::together;
use crate::{Error, LoraVar, Result, Tape, Tensor, Var, ops::elementwise::column_sums};
use weight::Kept;

const OP: &str = "low_rank_linear";

/// The last two axes of a weight or an adapter.
pub(crate) fn matrix(shape: &[usize]) -> [usize; 2] {
    [shape[shape.len() - 2], shape[shape.len() - 1]]
}

/// A linear layer with low-rank updates.
#[derive(Clone, Copy)]
pub struct LowRankLinear<'a> {
    /// [batch, .., in]: all but the last axis are rows.
    pub x: &'a Var,
    /// [out, in], or [experts, out, in].
    pub weight: Weight<'a>,
    /// `[out]`, or [experts, out].
    pub bias: Option<&'a Var>,
    /// Adapters: A [adapters, P r, in], B [adapters, out, r]. Where P > 1 the columns of y are in P equal parts, of which part p has the
    /// ranks p r .. (p + 1) r of A: the fused up and gate of a SwiGLU, say, with A = [A_up; A_gate].
    pub lora: Option<&'a LoraVar>,
    /// Whose weight and adapter each row has. None: there is one weight, and the adapters, whose number divides the batch, serve as many
    /// entries each, in order.
    pub segments: Option<&'a Segments>,
    /// scale X A^T, where whoever made x has computed it, from the same x, A, scale and segments. Gradients are the same as without it.
    pub shrunk: Option<&'a Shrunk>,
}

impl LowRankLinear<'_> {
    /// [batch, .., out]. Rows of a segment without adapter have that of the weight alone. Without `lora` all have, whatever the segments
    /// say of adapters.
    ///
    /// # Errors
    /// Shapes that don't agree with each other, with the segments or with what was computed ahead, an empty operand, a scale that is not
    /// finite.
    pub fn forward(&self, tape: &Tape) -> Result<Var> {
        let (shape, parts) = self.validate()?;
        let Self { x, weight, bias, lora, segments, shrunk } = *self;
        let inputs: Vec<&Var> = ([x].into_iter().chain(weight.var()).chain(bias))
            .chain(lora.iter().flat_map(|l| [&l.a, &l.b]))
            .collect();
        together(OP, &inputs.iter().map(|v| v.value()).collect::<Vec<_>>())?;
        if let Weight::Quantized(w) = weight
            && w.device() != x.value().device()
        {
            let what = format!(
                "{w:?} is not where x is, on {}; bring it there with QuantizedWeight::to",
                x.value().device()
            );
            return Err(Error::invalid(OP, what));
        }
        // scale X A^T, kept for the backward pass.
        let of_bias = bias.map(Var::value);
        let (s, out) = match (lora, shrunk) {
            (Some(l), None) => {
                let (by, term) = (Shrink::by(l, segments), (l.b.value(), parts));
                let both = on_device!(
                    x.value(),
                    low_rank_linear::shrink_expand(x.value(), weight, of_bias, by, term, &shape)
                );
                (Some(both.0), both.1)
            }
            _ => {
                let s = shrunk.map(|s| s.tensor().clone());
                let term = s.as_ref().zip(lora).map(|(s, l)| (s, l.b.value(), parts));
                let out = on_device!(
                    x.value(),
                    low_rank_linear::expand(x.value(), weight, of_bias, term, segments, &shape)
                );
                (s, out)
            }
        };
        let kept = Backward {
            x: x.clone(),
            weight: weight.kept(),
            bias: bias.cloned(),
            lora: s.zip(lora.cloned()),
            parts,
            segments: segments.cloned(),
        };
        Ok(tape.push(out, &inputs, move |grad, grads| kept.run(grad, grads)))
    }

    /// Checks the arguments; the shape of the output and the number of parts.
    fn validate(&self) -> Result<(Vec<usize>, usize)> {
        let Self { x, weight, bias, lora, segments, shrunk } = *self;
        let (experts, outer, inner) = match *weight.shape() {
            [outer, inner] => (1, outer, inner),
            [experts, outer, inner] => (experts, outer, inner),
            ref other => return Err(Error::shape(OP, "weight", other, "[out, in] or [experts, out, in]")),
        };
        if x.shape().len() < 2 || x.value().dim_back(1) != inner || x.value().numel() == 0 || outer == 0 {
            return Err(Error::shape(OP, "x", x.shape(), format!("[batch, .., {inner}], not empty")));
        }
        let rows = x.value().numel() / inner;
        let of_bias = &weight.shape()[..weight.shape().len() - 1];
        if let Some(b) = bias
            && b.shape() != of_bias
        {
            return Err(Error::shape(OP, "bias", b.shape(), format!("{of_bias:?}")));
        }
        match segments {
            None if experts != 1 => {
                return Err(Error::shape(
                    OP,
                    "weight",
                    weight.shape(),
                    "one weight, as there are no segments",
                ));
            }
            Some(s) if s.rows() != rows => {
                let what = format!("the segments have {} rows, x has {rows}", s.rows());
                return Err(Error::invalid(OP, what));
            }
            Some(s) if s.weights() > experts => {
                let what = format!("a segment has weight {}, there are {experts}", s.weights() - 1);
                return Err(Error::invalid(OP, what));
            }
            _ => {}
        }
        let mut parts = 1;
        if let Some(lora) = lora {
            parts = validate_lora(lora, [x.shape()[0], outer, inner], segments)?;
        }
        match (shrunk, lora) {
            (Some(_), None) => return Err(Error::invalid(OP, "X A^T was computed ahead for no adapters")),
            (Some(shrunk), Some(lora)) => shrunk.check(x.value(), lora, segments)?,
            (None, _) => {}
        }
        let mut shape = x.shape().to_vec();
        shape[x.shape().len() - 1] = outer;
        Ok((shape, parts))
    }
}

/// The number of parts.
fn validate_lora(
    lora: &LoraVar,
    [batch, outer, inner]: [usize; 3],
    segments: Option<&Segments>,
) -> Result<usize> {
    let divides = |n: usize| segments.is_some() || (n > 0 && batch.is_multiple_of(n));
    let (adapters, ranks) = match *lora.a.shape() {
        [n, r, i] if i == inner && n > 0 && r > 0 && divides(n) => (n, r),
        ref other => {
            let expected = match segments {
                None => format!("[a divisor of {batch}, rank >= 1, {inner}]"),
                Some(_) => format!("[adapters, rank >= 1, {inner}]"),
            };
            return Err(Error::shape(OP, "lora_a", other, expected));
        }
    };
    let parts = match *lora.b.shape() {
        [n, o, r] if n == adapters && o == outer && r > 0 && ranks.is_multiple_of(r) => ranks / r,
        ref other => {
            let expected = format!("[{adapters}, {outer}, {ranks}, or that by the number of parts]");
            return Err(Error::shape(OP, "lora_b", other, expected));
        }
    };
    if !outer.is_multiple_of(parts) {
        let what = format!(
            "lora_a has {parts} times the ranks of lora_b, but {outer} columns are not {parts} equal parts"
        );
        return Err(Error::invalid(OP, what));
    }
    if let Some(s) = segments
        && s.adapters() > adapters
    {
        let what = format!("a segment has adapter {}, there are {adapters}", s.adapters() - 1);
        return Err(Error::invalid(OP, what));
    }
    if !lora.scale.is_finite() {
        return Err(Error::invalid(OP, format!("scale {} is not finite", lora.scale)));
    }
    Ok(parts)
}

/// What the gradients need.
struct Backward {
    x: Var,
    weight: Kept,
    bias: Option<Var>,
    /// scale X A^T and the adapters.
    lora: Option<(Tensor, LoraVar)>,
    parts: usize,
    segments: Option<Segments>,
}

impl Backward {
    fn run(&self, grad: &Tensor, grads: &mut crate::Gradients) -> Result<()> {
        let (x, weight, segments) = (self.x.value(), self.weight.get(), self.segments.as_ref());
        if let Some(b) = self.bias.as_ref().filter(|b| grads.wants(b)) {
            let db = match b.shape() {
                [outer] => column_sums(grad, *outer)?,
                shape => {
                    // The sums over each weight's rows are a product with a column of ones.
                    let outer = grad.dim_back(1);
                    let ones = grad.full_like(&[grad.numel() / outer, 1], 1.0)?;
                    let shape = [shape[0], 1, outer];
                    on_device!(grad, low_rank_linear::weight_gradient(&ones, grad, segments, &shape))
                }
            };
            grads.accumulate(b, db)?;
        }
        if let Some(w) = weight.var().filter(|w| grads.wants(w)) {
            let dw = on_device!(grad, low_rank_linear::weight_gradient(grad, x, segments, w.shape()));
            grads.accumulate(w, dw)?;
        }
        let mut term = None;
        if let Some((s, lora)) = &self.lora {
            let (a, b) = (lora.a.value(), lora.b.value());
            if grads.wants(&lora.b) {
                // dB = dY^T (scale S)
                let db =
                    on_device!(grad, low_rank_linear::b_gradient(grad, s, self.parts, segments, b.shape()));
                grads.accumulate(&lora.b, db)?;
            }
            if grads.wants(&self.x) || grads.wants(&lora.a) {
                // dS = scale dY B
                let ds = on_device!(
                    grad,
                    low_rank_linear::shrink_gradient(grad, b, lora.scale, self.parts, segments)
                );
                if grads.wants(&lora.a) {
                    // dA = dS^T X
                    let da = on_device!(grad, low_rank_linear::a_gradient(&ds, x, segments, a.shape()));
                    grads.accumulate(&lora.a, da)?;
                }
                term = Some((ds, a));
            }
        }
        if grads.wants(&self.x) {
            let term = term.as_ref().map(|(ds, a)| (ds, *a));
            let dx =
                on_device!(grad, low_rank_linear::expand_gradient(grad, weight, term, segments, x.shape()));
            grads.accumulate(&self.x, dx)?;
        }
        Ok(())
    }
}

/// [`LowRankLinear`] with adapters for consecutive entries of the batch: `x` [batch, .., in], `weight` [out, in], `bias` `[out]`,
/// `lora.a` [lora batch, r, in], `lora.b` [lora batch, out, r] -> [batch, .., out]. The lora batch divides the batch.
///
/// # Errors
/// As [`LowRankLinear::forward`].
pub fn low_rank_linear(
    tape: &Tape,
    x: &Var,
    weight: &Var,
    bias: Option<&Var>,
    lora: Option<&LoraVar>,
) -> Result<Var> {
    LowRankLinear { x, weight: weight.into(), bias, lora, segments: None, shrunk: None }.forward(tape)
}

/// [`low_rank_linear`] without an update.
///
/// # Errors
/// As [`low_rank_linear`].
pub fn linear(tape: &Tape, x: &Var, weight: &Var, bias: Option<&Var>) -> Result<Var> {
    low_rank_linear(tape, x, weight, bias, None)
}
