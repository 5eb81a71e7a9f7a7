//! Tensors to pairs: one table of the names that programs give to the two sides.

use super::Theirs;
use crate::{
    Error, Result,
    adapter::matrices::{Pair, some_of},
    checkpoint::{all_finite, convert},
    raw::{RawFile, dtype_of},
};
use indexmap::IndexMap;
use ndarray::Array2;
use safetensors::tensor::{Dtype, TensorInfo};
use std::collections::HashMap;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    /// [r, in].
    A,
    /// [out, r].
    B,
    /// One value.
    Alpha,
}

/// What stands behind a module's name.
const SUFFIXES: [(&str, Side); 9] = [
    (".lora_A.weight", Side::A),
    (".lora_B.weight", Side::B),
    (".lora_A.default.weight", Side::A),
    (".lora_B.default.weight", Side::B),
    (".lora_down.weight", Side::A),
    (".lora_up.weight", Side::B),
    (".lora.down.weight", Side::A),
    (".lora.up.weight", Side::B),
    (".alpha", Side::Alpha),
];

/// What tells of an adapter that is more than a low-rank pair.
const OTHERS: [(&str, &str); 12] = [
    ("lora_magnitude_vector", "DoRA"),
    ("dora_scale", "DoRA"),
    ("lora_embedding_", "an adapter of an embedding"),
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("oft_", "OFT"),
    ("lora_mid", "a Tucker decomposition"),
    ("modules_to_save", "modules_to_save"),
    (".diff", "a full difference"),
    (".bias", "bias"),
    ("token_adapter", "trainable tokens"),
    ("norm.weight", "a trained norm"),
];

/// A pair as read, with its alpha tensor if there is one.
pub(super) struct Raw {
    pub(super) pair: Pair,
    pub(super) alpha: Option<f64>,
}

/// All pairs of a file. `module` turns what stands before the suffix into a module's name; none leaves the tensor out.
pub(super) fn read(
    file: &RawFile,
    mut module: impl FnMut(&str) -> Result<Option<String>>,
) -> Result<IndexMap<String, Raw>> {
    let bad = |what: String| Err(Error::checkpoint(file.path(), what));
    let mut sides = IndexMap::<String, (Option<Array2<f32>>, Option<Array2<f32>>, Option<f64>)>::new();
    let mut unknown = Vec::new();
    let mut tensors: Vec<(&str, &TensorInfo)> =
        file.tensors.iter().map(|(n, info)| (n.as_str(), info)).collect();
    tensors.sort_unstable_by_key(|(name, _)| *name);
    for (tensor, info) in tensors {
        if tensor.contains(char::is_control) {
            return bad(format!("the name of tensor `{tensor}` holds control characters"));
        }
        let known = SUFFIXES.iter().find_map(|(suffix, side)| Some((tensor.strip_suffix(suffix)?, *side)));
        let Some((before, side)) = known else {
            if module(tensor)?.is_some() {
                unknown.push(tensor);
            }
            continue;
        };
        let Some(name) = module(before)? else { continue };
        let entry = sides.entry(name).or_default();
        let taken = match side {
            Side::A => entry.0.replace(matrix(file, tensor, info)?).is_some(),
            Side::B => entry.1.replace(matrix(file, tensor, info)?).is_some(),
            Side::Alpha => entry.2.replace(single(file, tensor, info)?).is_some(),
        };
        if taken {
            return bad(format!("tensor `{tensor}`: this side of the module is there twice"));
        }
    }
    if let Some((tensor, (_, what))) =
        unknown.iter().find_map(|t| Some((t, OTHERS.iter().find(|(part, _)| t.contains(part))?)))
    {
        return bad(format!(
            "tensor `{tensor}`: {what} is not supported, only low-rank pairs of linear layers"
        ));
    }
    if !unknown.is_empty() {
        return bad(format!("not part of a low-rank adapter: {}", some_of(&unknown)));
    }
    let mut pairs = IndexMap::new();
    for (name, (a, b, alpha)) in sides {
        let (Some(a), Some(b)) = (a, b) else {
            return bad(format!("module `{name}` has not both a down and an up projection"));
        };
        if a.nrows() != b.ncols() || a.is_empty() || b.is_empty() {
            let (a, b) = (a.shape(), b.shape());
            return bad(format!(
                "module `{name}` has projections {a:?} and {b:?}, expected [r, in] and [out, r]"
            ));
        }
        pairs.insert(name, Raw { pair: Pair { a, b }, alpha });
    }
    Ok(pairs)
}

fn matrix(file: &RawFile, tensor: &str, info: &TensorInfo) -> Result<Array2<f32>> {
    let bad = |what: String| Error::checkpoint(file.path(), format!("tensor `{tensor}` {what}"));
    let &[rows, columns] = info.shape.as_slice() else {
        let kind =
            if info.shape.len() == 4 { "convolutions are not supported" } else { "a matrix is expected" };
        return Err(bad(format!("has shape {:?}; {kind}", info.shape)));
    };
    let dtype = dtype_of(info.dtype)
        .ok_or_else(|| bad(format!("has dtype {:?}; F32, F16 and BF16 are supported", info.dtype)))?;
    let bytes = file.read(info)?;
    let mut data = vec![0.0; rows * columns];
    convert(&bytes, dtype, &mut data);
    if !all_finite(&data) {
        return Err(bad("holds a value that is not finite".into()));
    }
    Array2::from_shape_vec((rows, columns), data).map_err(|e| bad(e.to_string()))
}

/// Alpha: some programs write it as a whole number.
fn single(file: &RawFile, tensor: &str, info: &TensorInfo) -> Result<f64> {
    let one = info.shape.iter().product::<usize>() == 1;
    let bytes = if one { file.read(info)? } else { Vec::new() };
    let value = match (info.dtype, &bytes[..]) {
        (Dtype::F64, &[a, b, c, d, e, f, g, h]) => Some(f64::from_le_bytes([a, b, c, d, e, f, g, h])),
        (Dtype::I64, &[a, b, c, d, e, f, g, h]) => Some(i64::from_le_bytes([a, b, c, d, e, f, g, h]) as f64),
        (Dtype::I32, &[a, b, c, d]) => Some(f64::from(i32::from_le_bytes([a, b, c, d]))),
        _ => dtype_of(info.dtype).and_then(|dtype| {
            let mut value = [0.0];
            convert(&bytes, dtype, &mut value);
            (bytes.len() == dtype.size()).then_some(f64::from(value[0]))
        }),
    };
    value.filter(|x| x.is_finite()).ok_or_else(|| {
        let what = format!("tensor `{tensor}` has shape {:?}; one finite value is expected", info.shape);
        Error::checkpoint(file.path(), what)
    })
}

impl Theirs {
    /// Gives all modules one scale: the most frequent one that is not zero, the first of several. What others have more or less goes
    /// into lora_b.
    pub(super) fn with_scales(
        pairs: IndexMap<String, (Pair, f64)>,
        metadata: std::collections::BTreeMap<String, String>,
    ) -> Self {
        let mut counts = HashMap::<u32, usize>::new();
        for (_, scale) in pairs.values() {
            *counts.entry((*scale as f32).to_bits()).or_default() += 1;
        }
        let mut scale = 0.0;
        let mut most = 0;
        for (_, own) in pairs.values() {
            let (own, count) = (*own as f32, counts[&(*own as f32).to_bits()]);
            if own != 0.0 && count > most {
                (scale, most) = (own, count);
            }
        }
        let one = |(name, (mut pair, own)): (String, (Pair, f64))| {
            // An alpha that was rounded to f32 is the same scale to within one unit in the last place.
            if (own as f32 - scale).abs() > f32::EPSILON * scale.abs() {
                let factor = own / f64::from(scale);
                pair.b.mapv_inplace(|x| (f64::from(x) * factor) as f32);
            }
            (name, pair)
        };
        Self { pairs: pairs.into_iter().map(one).collect(), scale, metadata }
    }
}
