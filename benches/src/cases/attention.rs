//! Attention over a fused projection [b, t, 3 h d] -> [b, t, h d].

use super::{Case, Floor};
use crate::backward;
use hywu_kernels::{
    Tape, Var,
    ops::attention::{Attention, Layout, attention},
};

/// Batch, tokens, heads, channels of a head.
const SHAPES: [[usize; 4]; 3] = [[32, 84, 3, 64], [16, 276, 3, 64], [1, 1024, 4, 64]];
/// For a device.
const LARGE: [[usize; 4]; 2] = [[1, 4096, 16, 128], [4, 1024, 16, 64]];

pub fn cases(cuda: bool, quick: bool, bytes: f64) -> Vec<Case> {
    let shapes: Vec<[usize; 4]> = match (cuda, quick) {
        (true, true) => SHAPES[..1].to_vec(),
        (true, false) => [&SHAPES[..], &LARGE[..]].concat(),
        (false, _) => SHAPES.to_vec(),
    };
    shapes.into_iter().flat_map(|shape| [forward(shape, bytes), both(shape, bytes)]).collect()
}

/// The shape of the call.
pub fn arguments([b, t, h, d]: [usize; 4]) -> Attention {
    let at = |part: usize, parts: usize| Layout {
        offset: part * h * d,
        batch: [t * parts * h * d, 0],
        token: parts * h * d,
        head: d,
    };
    Attention {
        batch: [b, 1],
        queries: t,
        keys: t,
        heads: h,
        kv_heads: h,
        head_dim: d,
        q: at(0, 3),
        k: at(1, 3),
        v: at(2, 3),
        out: at(0, 1),
        out_shape: vec![b, t, h * d],
        key_lengths: None,
        ragged: None,
        causal: None,
        rotary: None,
    }
}

/// Elements of the output, and operations of the forward pass.
fn sizes([b, t, h, d]: [usize; 4]) -> (f64, f64) {
    let elements = (b * t * h * d) as f64;
    (elements, 4.0 * elements * t as f64)
}

fn forward(shape @ [b, t, h, d]: [usize; 4], bytes: f64) -> Case {
    let (elements, flops) = sizes(shape);
    let args = arguments(shape);
    Case::op(
        format!("attention/fwd b{b} t{t} h{h} d{d}"),
        Floor { bytes: 4.0 * bytes * elements, flops },
        move |bench, copy| bench.constant(copy, &[b, t, 3 * h * d], 1.0),
        move |x: &Var| attention(&Tape::inference(), &args, x, x, x, None),
    )
}

fn both(shape @ [b, t, h, d]: [usize; 4], bytes: f64) -> Case {
    let (elements, flops) = sizes(shape);
    let args = arguments(shape);
    Case::op(
        format!("attention/fwd+bwd b{b} t{t} h{h} d{d}"),
        // Backward: five products where forward has two; it reads q, k, v, the output and its gradient, and writes three.
        Floor { bytes: 12.0 * bytes * elements, flops: 3.5 * flops },
        move |bench, copy| {
            let qkv = bench.tensor(2 * copy, &[b, t, 3 * h * d], 1.0)?;
            Ok((qkv, bench.tensor(2 * copy + 1, &[b, t, h * d], 1.0)?))
        },
        move |(qkv, grad)| {
            let tape = Tape::new();
            let x = tape.leaf(qkv.clone());
            let y = attention(&tape, &args, &x, &x, &x, None)?;
            Ok(backward(tape, &y, grad)?.take(&x))
        },
    )
}
