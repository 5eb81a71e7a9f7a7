//! The mean of adapters.

use super::{Adapter, Lora, low_rank::Sum, matrices::Pair};
use crate::{AdapterSpec, Error, Result};
use indexmap::IndexMap;
use ndarray::{ArrayD, Axis, concatenate};

/// The weighted mean of the updates scale B A themselves, not of the factors (whose mean is another operator): ranks are laid side by
/// side, [B1, B2, ..] [A1; A2; ..], which is exact. With `rank` every module is then cut to the nearest update of that rank
/// (Eckart and Young 1936).
///
/// Weights are divided by their sum. Where all weight_i scale_i are equal they become the scale and no tensor is touched; otherwise
/// they are multiplied into lora_b and the scale is 1. The metadata is what all have in common.
///
/// Returns the adapter and, with `rank`, what the cut left out: its norm over that of the whole.
///
/// # Errors
/// [`Error::Adapter`] for fewer than one adapter, modules or shapes that are not the same in all, as many weights as there are not
/// adapters, weights that are negative or not finite or all zero, ranks that add up to more than [`AdapterSpec::MAX_RANK`] without a
/// `rank`; those of [`Adapter::check_pairs`].
pub fn average(adapters: &[Adapter], weights: &[f32], rank: Option<usize>) -> Result<(Adapter, f64)> {
    let bad = |what: String| Err(Error::Adapter(what));
    let Some(first) = adapters.first() else { return bad("there is nothing to average".into()) };
    if weights.len() != adapters.len() {
        return bad(format!("{} weights for {} adapters", weights.len(), adapters.len()));
    }
    let sum: f64 = weights.iter().map(|&w| f64::from(w)).sum();
    if weights.iter().any(|w| !(w.is_finite() && *w >= 0.0)) || sum <= 0.0 {
        return bad(format!("weights {weights:?} must be finite, none below zero and not all of them zero"));
    }
    for adapter in adapters {
        adapter.check_pairs()?;
    }
    let factor = |(a, &w): (&Adapter, &f32)| f64::from(a.scale) * f64::from(w) / sum;
    let factors: Vec<f64> = adapters.iter().zip(weights).map(factor).collect();
    let equal = factors.iter().all(|c| *c == factors[0]);
    let scale = if equal { factors[0] as f32 } else { 1.0 };
    let mut average = Adapter { modules: IndexMap::new(), scale, metadata: first.metadata.clone() };
    average.metadata.retain(|key, value| adapters.iter().all(|a| a.metadata.get(key) == Some(value)));
    let (mut whole, mut lost) = (0.0, 0.0);
    for name in first.modules.keys() {
        let loras = same_module(adapters, name)?;
        let mut lora = side_by_side(&loras, &factors, equal)?;
        let total = lora.lora_a.shape()[lora.lora_a.ndim() - 2];
        match rank {
            Some(rank) if rank < total => {
                let (cut, left, norm) = nearest(&lora, rank)?;
                lora = cut;
                lost += left;
                whole += norm;
            }
            None if total > AdapterSpec::MAX_RANK => {
                return bad(format!(
                    "`{name}`: the ranks add up to {total}, at most {}; give a rank to cut them to",
                    AdapterSpec::MAX_RANK
                ));
            }
            _ => {}
        }
        average.modules.insert(name.clone(), lora);
    }
    if let Some((name, _)) =
        adapters.iter().flat_map(|a| &a.modules).find(|(n, _)| !first.modules.contains_key(*n))
    {
        return bad(format!("`{name}` is not in all of them"));
    }
    average.check_pairs()?;
    Ok((average, if whole > 0.0 { (lost / whole).sqrt() } else { 0.0 }))
}

/// A module in every adapter, of the same shape but for the rank.
fn same_module<'a>(adapters: &'a [Adapter], name: &str) -> Result<Vec<&'a Lora>> {
    let shape = |lora: &Lora| {
        let (a, b) = (lora.lora_a.shape(), lora.lora_b.shape());
        let n = a.len();
        (a[..n - 2].to_vec(), b[n - 2], a[n - 1])
    };
    let mut loras: Vec<&Lora> = Vec::new();
    for adapter in adapters {
        let Some(lora) = adapter.modules.get(name) else {
            return Err(Error::Adapter(format!("`{name}` is not in all of them")));
        };
        if let Some(first) = loras.first()
            && shape(first) != shape(lora)
        {
            let (x, y) = (shape(first), shape(lora));
            let what = format!("`{name}` differs: ([batch, experts], out, in) is {x:?} and {y:?}");
            return Err(Error::Adapter(what));
        }
        loras.push(lora);
    }
    Ok(loras)
}

/// [B1, B2, ..] [A1; A2; ..], with the factors in B unless they are the scale.
fn side_by_side(loras: &[&Lora], factors: &[f64], equal: bool) -> Result<Lora> {
    let n = loras[0].lora_a.ndim();
    let join = |axis: usize, parts: &[ArrayD<f32>]| {
        let views: Vec<_> = parts.iter().map(|p| p.view()).collect();
        concatenate(Axis(axis), &views).map_err(|e| Error::Adapter(e.to_string()))
    };
    let weighted = |(lora, &c): (&&Lora, &f64)| match equal {
        true => lora.lora_b.clone(),
        false => lora.lora_b.mapv(|x| (f64::from(x) * c) as f32),
    };
    let a: Vec<_> = loras.iter().map(|l| l.lora_a.clone()).collect();
    let b: Vec<_> = loras.iter().zip(factors).map(weighted).collect();
    Ok(Lora { lora_a: join(n - 2, &a)?, lora_b: join(n - 1, &b)? })
}

/// Every instance and expert cut to `rank`, with the squares of what that leaves out and of the whole.
fn nearest(lora: &Lora, rank: usize) -> Result<(Lora, f64, f64)> {
    let (mut lost, mut whole) = (0.0, 0.0);
    let mut pairs = Vec::new();
    for instance in 0..lora.lora_a.shape()[0] {
        for matrices in lora.matrices(instance) {
            let sum = Sum::new(&[(1.0, matrices)]);
            let (pair, left) = sum.nearest(rank)?;
            lost += left * left;
            whole += sum.norm().powi(2);
            pairs.push(pair);
        }
    }
    let n = lora.lora_a.ndim();
    let lead = &lora.lora_a.shape()[..n - 2];
    Ok((stack(lead, &pairs)?, lost, whole))
}

/// Pairs of one shape as the tensors of a module, `lead` = [batch] or [batch, experts] of them.
pub(super) fn stack(lead: &[usize], pairs: &[Pair]) -> Result<Lora> {
    let Some(first) = pairs.first() else { return Err(Error::Adapter("there is no pair to stack".into())) };
    let tensor = |matrix: &[usize], data: Vec<f32>| {
        let shape: Vec<usize> = lead.iter().chain(matrix).copied().collect();
        ArrayD::from_shape_vec(shape, data).map_err(|e| Error::Adapter(e.to_string()))
    };
    let lora_a = tensor(first.a.shape(), pairs.iter().flat_map(|p| p.a.iter().copied()).collect())?;
    let lora_b = tensor(first.b.shape(), pairs.iter().flat_map(|p| p.b.iter().copied()).collect())?;
    Ok(Lora { lora_a, lora_b })
}
