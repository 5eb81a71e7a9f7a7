//! A call with its operands.

use super::shapes::{Kind, Shape};
use crate::timing::Bench;
use hywu_kernels::{
    Device, Error, Result, Tape, Tensor, Var,
    ops::attention::{
        Attention, Causal, Forward, Layout, NormWeights, QkNorm, Ragged, Rotary, Wanted, attention, backward,
        forward, rotary_table,
    },
    testing::random,
};

/// Arguments and operands of a call.
pub struct Call {
    pub shape: Shape,
    pub args: Attention,
    /// q, k and v; of a fused projection, three times the same.
    pub operands: [Tensor; 3],
    /// Weights of the norm of queries and of keys.
    pub norm: Option<[Tensor; 2]>,
}

/// Output and gradients of q, k and v, those of a fused projection in one tensor.
pub struct Gradients {
    /// None where there was only the backward pass.
    pub out: Option<Tensor>,
    pub slots: Vec<Tensor>,
}

impl Shape {
    /// The call's arguments, with tables on the device.
    pub fn arguments(self, device: Device) -> Result<Attention> {
        let Self { d, s, h, kv, b, kind } = self;
        let at = |row: usize, offset: usize| match kind {
            Kind::Ragged => Layout { offset, batch: [0, 0], token: row, head: d },
            Kind::Layers => Layout { offset, batch: [s * b * row, row], token: b * row, head: d },
            _ => Layout { offset, batch: [s * row, 0], token: row, head: d },
        };
        let projection = (h + 2 * kv) * d;
        let [q, k, v] = match kind {
            Kind::Projection => [0, h * d, (h + kv) * d].map(|offset| at(projection, offset)),
            _ => [h, kv, kv].map(|heads| at(heads * d, 0)),
        };
        let ends = |lengths: Vec<usize>| {
            let ends = lengths.into_iter().scan(0, |end, n| {
                *end += n;
                Some(*end)
            });
            std::iter::once(0).chain(ends).collect::<Vec<usize>>()
        };
        let offsets = (kind == Kind::Ragged).then(|| ends(self.lengths()));
        let spans = match kind {
            Kind::Causal => Some(vec![]),
            Kind::Spans => Some(vec![self.spans()]),
            _ => None,
        };
        let rotary = match kind {
            Kind::Rotated => Some(tables(s, d)?.to(device)?),
            _ => None,
        };
        Ok(Attention {
            batch: if kind == Kind::Layers { [1, b] } else { [b, 1] },
            queries: s,
            keys: s,
            heads: h,
            kv_heads: kv,
            head_dim: d,
            q,
            k,
            v,
            out: at(h * d, 0),
            out_shape: self.tensor(h * d),
            key_lengths: None,
            ragged: offsets.map(|offsets| Ragged { queries: offsets.clone(), keys: offsets }),
            causal: spans.map(|spans| Causal { spans }),
            rotary: rotary.map(|tables| (tables.clone(), tables)),
        })
    }

    /// Shape of a tensor with so many channels.
    fn tensor(self, channels: usize) -> Vec<usize> {
        match self.kind {
            Kind::Ragged => vec![1, self.s, channels],
            Kind::Layers => vec![1, self.s, self.b, channels],
            _ => vec![self.b, self.s, channels],
        }
    }
}

fn tables(tokens: usize, d: usize) -> Result<Rotary> {
    rotary_table(&(0..tokens).map(|t| vec![t as u32]).collect::<Vec<_>>(), &[d])
}

/// Weights around 1.
fn weights(seed: u64, d: usize) -> Tensor {
    let random = random(seed, &[d]);
    Tensor::build(&[d], |out| {
        out.iter_mut().zip(random.data()).for_each(|(o, x)| *o = 1.0 + 0.3 * x);
    })
}

impl Call {
    /// Random operands, another set for every `copy`.
    pub fn new(bench: &Bench, copy: u64, shape: Shape) -> Result<Self> {
        let args = shape.arguments(bench.device)?;
        let Shape { d, h, kv, kind, .. } = shape;
        let operand = |i: u64, heads: usize| bench.tensor(8 * copy + i, &shape.tensor(heads * d), 1.0);
        let operands = if kind == Kind::Projection {
            let all = operand(1, h + 2 * kv)?;
            [all.clone(), all.clone(), all]
        } else {
            [operand(1, h)?, operand(2, kv)?, operand(3, kv)?]
        };
        let weight = |seed| weights(seed, d).to(bench.device, bench.dtype());
        let norm = match kind {
            Kind::Rotated => Some([weight(1)?, weight(2)?]),
            _ => None,
        };
        Ok(Self { shape, args, operands, norm })
    }

    /// A random gradient of its output.
    pub fn grad(&self, bench: &Bench, copy: u64) -> Result<Tensor> {
        bench.tensor(8 * copy + 4, &self.args.out_shape, 1.0)
    }

    fn weights(&self) -> Option<NormWeights<'_>> {
        self.norm.as_ref().map(|[q, k]| NormWeights { q, k })
    }

    /// The output and what the backward pass wants of it.
    pub fn forward(&self) -> Result<Forward> {
        let [q, k, v] = &self.operands;
        forward(&self.args, q, k, v, self.weights())
    }

    /// Gradients of q, k and v.
    pub fn backward(&self, saved: &Forward, grad: &Tensor) -> Result<Gradients> {
        let slots = match self.shape.kind {
            Kind::Projection => [Some(0); 3],
            _ => [Some(0), Some(1), Some(2)],
        };
        let wanted = Wanted { slots, norm: false };
        let result = backward(&self.args, self.operands.each_ref(), self.weights(), saved, grad, wanted)?;
        Ok(Gradients { out: None, slots: result.slots })
    }

    /// Both on a tape, as a model has it.
    pub fn on_tape(&self, grad: &Tensor) -> Result<Gradients> {
        let tape = Tape::new();
        let leaf = |x: &Tensor| tape.leaf(x.clone());
        let leaves: Vec<Var> = match self.shape.kind {
            Kind::Projection => vec![leaf(&self.operands[0])],
            _ => self.operands.iter().map(leaf).collect(),
        };
        let [q, k, v] = [0, 1, 2].map(|i| &leaves[i.min(leaves.len() - 1)]);
        let norm = self.norm.as_ref().map(|n| n.each_ref().map(|w| Var::constant(w.clone())));
        let norm = norm.map(|[q, k]| QkNorm { q, k });
        let y = attention(&tape, &self.args, q, k, v, norm.as_ref())?;
        let out = Some(y.value().clone());
        let mut grads = crate::backward(tape, &y, grad)?;
        let missing = || Error::invalid("cases", "there is no gradient");
        let slots = leaves.iter().map(|leaf| grads.take(leaf).ok_or_else(missing));
        Ok(Gradients { out, slots: slots.collect::<Result<_>>()? })
    }
}
