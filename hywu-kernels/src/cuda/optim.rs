//! Launchers of `kernels-cu/optim`; see `cpu/optim.rs` for what each computes.

use super::{Call, Words, call::on_gpu};
use crate::{Error, ParamSet, Result, Tensor, optim::Rates};
use hywu_core::Dtype;

const OP: &str = "optim";
/// Elements that a block takes.
const CHUNK: usize = 8192;

/// The kernels' list of chunks: address of the gradient, start in the flat tensors, length, whether it decays.
fn chunks(grads: &[Tensor], starts: &[usize], decays: impl Fn(usize) -> bool) -> Result<(Words, usize)> {
    let mut words = Vec::new();
    let mut count = 0;
    for (i, (grad, &start)) in grads.iter().zip(starts).enumerate() {
        let address = on_gpu(OP, grad)?.address();
        for at in (0..grad.numel()).step_by(CHUNK) {
            let length = CHUNK.min(grad.numel() - at);
            for long in [address + (at * grad.dtype().size()) as u64, (start + at) as u64] {
                words.extend([long as u32, (long >> 32) as u32]);
            }
            words.extend([length as u32, u32::from(decays(i))]);
            count += 1;
        }
    }
    let first = grads.first().ok_or_else(|| Error::invalid(OP, "there are no gradients"))?;
    crate::ops::together(OP, &grads.iter().collect::<Vec<_>>())?;
    Ok((Words::new(first, &words)?, count))
}

/// [norm, factor] on the device.
fn norm(first: &Tensor, (chunks, count): (&Words, usize), clip: f64) -> Result<Tensor> {
    let squares = first.empty_as(&[count], Dtype::F32)?;
    let call = Call::new(OP, "gradient_squares", first)?.words(chunks).tensor_as(&squares, Dtype::F32)?;
    call.launch([super::blocks(count, 1)?, 1, 1], 256, 0)?;
    let norm = first.empty_as(&[2], Dtype::F32)?;
    let call = Call::named(OP, "finish_norm", first)?.tensor_as(&squares, Dtype::F32)?;
    call.tensor_as(&norm, Dtype::F32)?.size(count)?.float(clip as f32).launch([1, 1, 1], 256, 0)?;
    Ok(norm)
}

pub fn grad_norm(grads: &[Tensor]) -> Result<f64> {
    let Some(first) = grads.first() else { return Ok(0.0) };
    let (chunks, count) = chunks(grads, &vec![0; grads.len()], |_| false)?;
    Ok(norm(first, (&chunks, count), f64::INFINITY)?.to_host()?.data()[0].into())
}

pub fn step(
    params: &mut ParamSet,
    grads: &[Tensor],
    m: &mut Tensor,
    v: &mut Tensor,
    average: Option<(&mut ParamSet, f32)>,
    rates: Rates,
    clip: f64,
) -> Result<f64> {
    let decaying = params.decaying();
    let Some(first) = grads.first() else { return Ok(0.0) };
    m.make_unique()?;
    v.make_unique()?;
    let (weights, starts) = params.flat_mut()?;
    let (chunks, count) = chunks(grads, &starts, |i| decaying[i])?;
    let norm = norm(first, (&chunks, count), clip)?;
    let (average, share) = match average {
        Some((average, share)) => (Some(average.flat_mut()?.0), share),
        None => (None, 0.0),
    };
    let mut call = Call::new(OP, "adamw", first)?.words(&chunks);
    for tensor in [&norm, weights, m, v] {
        call = call.tensor_as(tensor, Dtype::F32)?;
    }
    call = call.optional_as(average, Dtype::F32)?;
    let Rates { lr, beta1, beta2, correct1, correct2, eps, decay } = rates;
    let rates: Vec<u8> =
        [lr, beta1, beta2, correct1, correct2, eps, decay].iter().flat_map(|v| v.to_le_bytes()).collect();
    call.bytes(&rates).float(share).launch([super::blocks(count, 1)?, 1, 1], 256, 0)?;
    // The only wait of a step, after everything has been launched.
    Ok(norm.to_host()?.data()[0].into())
}
