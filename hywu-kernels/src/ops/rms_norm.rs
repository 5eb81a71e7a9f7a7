//! RMSNorm over the last axis (arXiv 1910.07467), with an optional modulation per batch entry (adaLN, arXiv 2212.09748).

use crate::{Error, Result, Tape, Tensor, Var, cpu::math::dot};
use rayon::prelude::*;

/// Per-batch-entry modulation: y = norm * (1 + scale) + shift.
pub struct Modulation<'a> {
    /// [batch, channels].
    pub scale: &'a Var,
    /// [batch, channels].
    pub shift: &'a Var,
}

/// y = x / sqrt(mean(x^2) + eps) * weight, then the modulation. `x` [batch, .., channels], `weight` `[channels]`.
///
/// # Errors
/// Shapes that don't agree, no channels, eps that is not positive.
pub fn rms_norm(
    tape: &Tape,
    x: &Var,
    weight: Option<&Var>,
    eps: f32,
    modulation: Option<Modulation<'_>>,
) -> Result<Var> {
    const OP: &str = "rms_norm";
    let (batch, c) = (x.shape().first().copied().unwrap_or(1), x.value().dim_back(1));
    if c == 0 || batch == 0 {
        return Err(Error::shape(OP, "x", x.shape(), "at least one entry and one channel"));
    }
    if eps.is_nan() || eps <= 0.0 {
        return Err(Error::invalid(OP, format!("eps {eps} is not positive")));
    }
    if let Some(w) = weight
        && w.shape() != [c]
    {
        return Err(Error::shape(OP, "weight", w.shape(), format!("[{c}]")));
    }
    for m in modulation.iter().flat_map(|m| [m.scale, m.shift]) {
        if m.shape() != [batch, c] {
            return Err(Error::shape(OP, "modulation", m.shape(), format!("[{batch}, {c}]")));
        }
    }
    let each = x.value().numel() / batch;
    let op = Norm { batch, c, each, eps };
    let scale = modulation.as_ref().map(|m| m.scale.value());
    let shift = modulation.as_ref().map(|m| m.shift.value());
    let out = op.forward(x.value(), weight.map(Var::value), scale, shift);
    let (x_, w_) = (x.clone(), weight.cloned());
    let m_ = modulation.as_ref().map(|m| (m.scale.clone(), m.shift.clone()));
    let inputs: Vec<&Var> =
        [x].into_iter().chain(weight).chain(modulation.iter().flat_map(|m| [m.scale, m.shift])).collect();
    Ok(tape.push(out, &inputs, move |grad, grads| {
        let scale = m_.as_ref().map(|m| m.0.value());
        let [dx, dw, dscale, dshift] = op.backward(x_.value(), w_.as_ref().map(Var::value), scale, grad);
        grads.accumulate(&x_, dx)?;
        if let Some((scale, shift)) = &m_ {
            grads.accumulate(scale, dscale)?;
            grads.accumulate(shift, dshift)?;
        }
        match &w_ {
            Some(w) => grads.accumulate(w, crate::ops::elementwise::column_sums(&dw, c)?),
            None => Ok(()),
        }
    }))
}

#[derive(Clone, Copy)]
struct Norm {
    batch: usize,
    c: usize,
    each: usize,
    eps: f32,
}

impl Norm {
    /// 1 / sqrt(mean(x^2) + eps), summed in eight lanes so that it vectorises.
    fn inverse(self, x: &[f32]) -> f32 {
        1.0 / (dot(x, x) / self.c as f32 + self.eps).sqrt()
    }

    /// Row of a [batch, c] tensor, or `None` where there is no tensor.
    fn row(self, t: Option<&Tensor>, b: usize) -> Option<&[f32]> {
        t.map(|t| &t.data()[b * self.c..(b + 1) * self.c])
    }

    fn forward(
        self,
        x: &Tensor,
        w: Option<&Tensor>,
        scale: Option<&Tensor>,
        shift: Option<&Tensor>,
    ) -> Tensor {
        let ones = vec![1.0; self.c];
        let w = w.map_or(&ones[..], Tensor::data);
        Tensor::build(x.shape(), |out| {
            out.par_chunks_mut(self.each).zip(x.data().par_chunks(self.each)).enumerate().for_each(
                |(b, (out, x))| {
                    for (out, x) in out.chunks_mut(self.c).zip(x.chunks(self.c)) {
                        let r = self.inverse(x);
                        out.iter_mut().zip(x).zip(w).for_each(|((o, x), w)| *o = x * r * w);
                        if let (Some(scale), Some(shift)) = (self.row(scale, b), self.row(shift, b)) {
                            out.iter_mut()
                                .zip(scale)
                                .zip(shift)
                                .for_each(|((o, s), h)| *o = *o * (1.0 + s) + h);
                        }
                    }
                },
            );
        })
    }

    /// Gradients of x, of the weight per batch entry [batch, c], of scale and of shift.
    fn backward(self, x: &Tensor, w: Option<&Tensor>, scale: Option<&Tensor>, grad: &Tensor) -> [Tensor; 4] {
        let c = self.c;
        let ones = vec![1.0; c];
        let w = w.map_or(&ones[..], Tensor::data);
        let [mut dx, mut dw, mut dscale, mut dshift] =
            [x.shape(), &[self.batch, c], &[self.batch, c], &[self.batch, c]]
                .map(|s| Tensor::build(s, |out| out.fill(0.0)));
        let sums = (dw.data_mut().par_chunks_mut(c))
            .zip(dscale.data_mut().par_chunks_mut(c))
            .zip(dshift.data_mut().par_chunks_mut(c));
        let rows = dx
            .data_mut()
            .par_chunks_mut(self.each)
            .zip(x.data().par_chunks(self.each))
            .zip(grad.data().par_chunks(self.each));
        rows.zip(sums).enumerate().for_each(|(b, (((dx, x), grad), ((dw, dscale), dshift)))| {
            let gain: Vec<f32> = match self.row(scale, b) {
                Some(scale) => scale.iter().map(|s| 1.0 + s).collect(),
                None => ones.clone(),
            };
            for ((dx, x), grad) in dx.chunks_mut(c).zip(x.chunks(c)).zip(grad.chunks(c)) {
                let r = self.inverse(x);
                for i in 0..c {
                    let n = x[i] * r;
                    dshift[i] += grad[i];
                    dscale[i] += grad[i] * n * w[i];
                    dw[i] += grad[i] * n * gain[i];
                    dx[i] = grad[i] * gain[i] * w[i];
                }
                let mean = dot(dx, x) * r * r / c as f32;
                dx.iter_mut().zip(x).for_each(|(d, x)| *d = r * (*d - x * mean));
            }
        });
        [dx, dw, dscale, dshift]
    }
}
