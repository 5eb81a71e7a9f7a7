//! softmax(Q K^T / sqrt(d)) V with online softmax, any length, strided operands.

mod extents;
mod ladder;
mod layout;
mod rotary;

pub use extents::{Causal, Ragged};
pub(crate) use extents::{Entry, Extents};
pub use ladder::{LADDER, ladder_step};
pub use layout::Layout;
pub use rotary::{Rotary, rotary_table};

use super::together;
use crate::{Error, Result, Tape, Tensor, Var};
use hywu_core::Dtype;

const OP: &str = "attention";

/// The shape of an attention call.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Sizes of the two batch axes.
    pub batch: [usize; 2],
    /// Query tokens of a batch entry; where entries are `ragged`, of all.
    pub queries: usize,
    /// Key and value tokens, likewise.
    pub keys: usize,
    /// Heads of queries and of the output.
    pub heads: usize,
    /// Heads of keys and values, which divide `heads`: query head h reads head h / (heads / kv_heads).
    pub kv_heads: usize,
    /// Channels of a head; even, 2..=256.
    pub head_dim: usize,
    /// Where queries are in their tensor.
    pub q: Layout,
    /// Where keys are.
    pub k: Layout,
    /// Where values are.
    pub v: Layout,
    /// Where the output goes.
    pub out: Layout,
    /// Shape of the output tensor; `out` covers it exactly.
    pub out_shape: Vec<usize>,
    /// Valid keys per (batch0, batch1) entry, row-major; the others are masked. A row with no key gives zeros.
    pub key_lengths: Option<Vec<usize>>,
    /// Entries of the first batch axis that differ in length, one behind the other; the stride of that axis is 0 then.
    pub ragged: Option<Ragged>,
    /// A mask; without it a query sees all keys of its entry.
    pub causal: Option<Causal>,
    /// Rotary tables of queries and of keys, by the token's number in its entry.
    pub rotary: Option<(Rotary, Rotary)>,
}

/// QK normalisation: RMSNorm (eps 1e-6) over each head's channels before the rotation, weights `[head_dim]`.
#[derive(Clone, Debug)]
pub struct QkNorm {
    /// Weight for queries.
    pub q: Var,
    /// Weight for keys.
    pub k: Var,
}

/// The weights of a [`QkNorm`] without a tape.
#[derive(Clone, Copy, Debug)]
pub struct NormWeights<'a> {
    /// Weight for queries, `[head_dim]`.
    pub q: &'a Tensor,
    /// Weight for keys, `[head_dim]`.
    pub k: &'a Tensor,
}

/// What [`forward`] leaves for [`backward`].
#[derive(Clone, Debug)]
pub struct Forward {
    /// The output, of shape `out_shape`.
    pub out: Tensor,
    /// Per row the base-2 logarithm of the sum over keys of 2^(score * log2(e)): [batch0, batch1, heads, queries], in f32; ragged
    /// entries are one behind the other in [batch1, heads, queries].
    pub lse: Tensor,
}

/// Which gradients [`backward`] computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// For q, k and v the gradient tensor each goes to, counted from 0 without gaps; operands that are read from one tensor share one.
    pub slots: [Option<usize>; 3],
    /// Those of the norm's weights.
    pub norm: bool,
}

/// What [`backward`] returns.
#[derive(Clone, Debug)]
pub struct Backward {
    /// The gradient tensors by slot, of the shape of their operand; elements that no layout reaches are zero.
    pub slots: Vec<Tensor>,
    /// Gradients of the norm's weights for queries and keys, when wanted.
    pub norm: Option<(Tensor, Tensor)>,
}

/// The gradient tensors that [`backward`] fills, as it has checked them.
pub(crate) struct Slots<'a> {
    pub wanted: Wanted,
    /// Is every element of every tensor reached at most once, by one row of one operand?
    pub once: bool,
    /// Per slot the tensor's shape, and whether all its elements are reached.
    pub tensors: Vec<(&'a [usize], bool)>,
}

impl Attention {
    /// Checks everything that the kernels rely on.
    fn validate(&self, [q, k, v]: [&Tensor; 3], norm: Option<NormWeights<'_>>) -> Result<()> {
        together(OP, &[q, k, v])?;
        if let Some(norm) = norm {
            together(OP, &[q, norm.q, norm.k])?;
        }
        let d = self.head_dim;
        if !d.is_multiple_of(2) || !(2..=256).contains(&d) {
            return Err(Error::invalid(OP, format!("head_dim is {d}, expected an even number in 2..=256")));
        }
        let groups = self.heads.checked_rem(self.kv_heads);
        if groups != Some(0) && self.heads > 0 {
            let text = format!("{} heads are no multiple of {} key heads", self.heads, self.kv_heads);
            return Err(Error::invalid(OP, text));
        }
        self.validate_extents()?;
        self.in_bounds("q", self.of_queries(&self.q), q)?;
        self.in_bounds("k", self.of_keys(&self.k), k)?;
        self.in_bounds("v", self.of_keys(&self.v), v)?;
        let of_out = self.of_queries(&self.out);
        let size = self.out_shape.iter().try_fold(1usize, |n, &s| n.checked_mul(s));
        let covers = self.end(of_out).is_some_and(|e| Some(e) <= size) && self.injective(of_out);
        if !covers || size != Some(self.count(of_out)) {
            let [b0, b1] = self.batch;
            let sizes = format!(
                "{b0} * {b1} batch entries, {} queries, {} heads, {d} channels",
                self.queries, self.heads
            );
            return Err(Error::shape(
                OP,
                "output",
                &self.out_shape,
                format!("what {:?} covers once: {sizes}", self.out),
            ));
        }
        if let Some(norm) = norm {
            for (what, weight) in [("norm weight of q", norm.q), ("norm weight of k", norm.k)] {
                if weight.numel() != d {
                    return Err(Error::shape(OP, what, weight.shape(), format!("[{d}]")));
                }
            }
        }
        if let Some((of_q, of_k)) = &self.rotary {
            let longest = |offsets: &[usize]| offsets.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0);
            let [queries, keys] = match &self.ragged {
                Some(ragged) => [longest(&ragged.queries), longest(&ragged.keys)],
                None => [self.queries, self.keys],
            };
            let tables = [
                ("cos table of q", &of_q.cos, queries),
                ("sin table of q", &of_q.sin, queries),
                ("cos table of k", &of_k.cos, keys),
                ("sin table of k", &of_k.sin, keys),
            ];
            for (what, table, tokens) in tables {
                if table.shape().len() != 2 || table.shape()[0] < tokens || table.shape()[1] != d / 2 {
                    return Err(Error::shape(
                        OP,
                        what,
                        table.shape(),
                        format!("[{tokens} or more, {}]", d / 2),
                    ));
                }
                if table.device() != q.device() || table.dtype() != Dtype::F32 {
                    let (device, other, dtype) = (q.device(), table.device(), table.dtype());
                    let text = format!(
                        "the {what} is {dtype:?} on {other}, it must be F32 on {device}; see Rotary::to"
                    );
                    return Err(Error::invalid(OP, text));
                }
            }
        }
        Ok(())
    }
    /// Shape of [`Forward::lse`].
    pub(crate) fn lse_shape(&self) -> Vec<usize> {
        let batch = if self.ragged.is_some() { &self.batch[1..] } else { &self.batch[..] };
        [batch, &[self.heads, self.queries]].concat()
    }
}

/// Attention without a tape.
///
/// # Errors
/// [`Error::Shape`] when a layout leaves its tensor, `args.out` does not cover the output exactly once, or a norm weight, rotary table
/// or the lists of key lengths, offsets or spans have the wrong size; [`Error::Invalid`] for a bad head_dim, for heads that `kv_heads`
/// does not divide, for key lengths, offsets or spans that make no sense, and for operands or tables that are not together on one
/// device. Those of the device.
pub fn forward(
    args: &Attention,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    norm: Option<NormWeights<'_>>,
) -> Result<Forward> {
    args.validate([q, k, v], norm)?;
    // SAFETY: validated.
    Ok(unsafe { on_device!(q, attention::forward(args, [q, k, v], norm)) })
}

/// The wanted gradients of sum(`grad` * output); `saved` is what [`forward`] returned for the same arguments.
///
/// # Errors
/// As [`forward`]; [`Error::Shape`] when `grad` or `saved` has the wrong size, or two operands of one slot have different sizes;
/// [`Error::Invalid`] when the slots are not counted from 0 without gaps.
pub fn backward(
    args: &Attention,
    [q, k, v]: [&Tensor; 3],
    norm: Option<NormWeights<'_>>,
    saved: &Forward,
    grad: &Tensor,
    wanted: Wanted,
) -> Result<Backward> {
    args.validate([q, k, v], norm)?;
    together(OP, &[q, &saved.out, grad])?;
    let rows = args.lse_shape().iter().product();
    let count = args.count(args.of_queries(&args.out));
    for (what, tensor, expected) in
        [("gradient", grad, count), ("saved output", &saved.out, count), ("saved row sums", &saved.lse, rows)]
    {
        if tensor.numel() != expected {
            return Err(Error::shape(OP, what, tensor.shape(), format!("{expected} elements")));
        }
    }
    let operands = [(q, args.of_queries(&args.q)), (k, args.of_keys(&args.k)), (v, args.of_keys(&args.v))];
    let last = wanted.slots.into_iter().flatten().max();
    let number = last.map_or(0, |m| m.saturating_add(1));
    if number > 3 || (0..number).any(|slot| !wanted.slots.contains(&Some(slot))) {
        return Err(Error::invalid(
            OP,
            format!("gradient slots are {:?}, expected 0.. without gaps", wanted.slots),
        ));
    }
    let members = |slot| {
        operands.into_iter().zip(wanted.slots).filter_map(move |(o, s)| (s == Some(slot)).then_some(o))
    };
    // Rows can be written in parallel when no gradient has an element that two of them reach.
    let once = (0..number).all(|slot| {
        let rows: Vec<_> = members(slot).map(|(_, rows)| rows).collect();
        args.disjoint(&rows)
    });
    let mut tensors = Vec::with_capacity(number);
    for slot in 0..number {
        let mut shapes = members(slot).map(|(t, _)| t);
        let Some(first) = shapes.next() else { continue };
        if let Some(other) = shapes.find(|t| t.numel() != first.numel()) {
            return Err(Error::shape(
                OP,
                "operand of a shared gradient",
                other.shape(),
                format!("{:?}", first.shape()),
            ));
        }
        let covered: usize = members(slot).map(|(_, rows)| args.count(rows)).sum();
        tensors.push((first.shape(), once && covered == first.numel()));
    }
    let slots = Slots { wanted, once, tensors };
    // SAFETY: validated.
    Ok(unsafe { on_device!(q, attention::backward(args, [q, k, v], norm, saved, grad, &slots)) })
}

/// Attention on a tape. `q`, `k` and `v` may be one and the same variable (a fused projection) read at different offsets.
///
/// # Errors
/// As [`forward`].
pub fn attention(
    tape: &Tape,
    args: &Attention,
    q: &Var,
    k: &Var,
    v: &Var,
    norm: Option<&QkNorm>,
) -> Result<Var> {
    let weights = norm.map(|n| NormWeights { q: n.q.value(), k: n.k.value() });
    let saved = forward(args, q.value(), k.value(), v.value(), weights)?;
    let mut inputs = vec![q, k, v];
    inputs.extend(norm.into_iter().flat_map(|n| [&n.q, &n.k]));
    let (args, vars, norm) = (args.clone(), [q, k, v].map(Var::clone), norm.cloned());
    let out = saved.out.clone();
    Ok(tape.push(out, &inputs, move |grad, grads| {
        let mut owners: Vec<&Var> = Vec::with_capacity(3);
        let slots = [0, 1, 2].map(|i| {
            let var = &vars[i];
            if !grads.wants(var) {
                return None;
            }
            let known = owners.iter().position(|o| o.same_node(var));
            Some(known.unwrap_or_else(|| {
                owners.push(var);
                owners.len() - 1
            }))
        });
        let wanted =
            Wanted { slots, norm: norm.as_ref().is_some_and(|n| grads.wants(&n.q) || grads.wants(&n.k)) };
        let weights = norm.as_ref().map(|n| NormWeights { q: n.q.value(), k: n.k.value() });
        let [q, k, v] = &vars;
        let result = backward(&args, [q.value(), k.value(), v.value()], weights, &saved, grad, wanted)?;
        for (owner, grad) in owners.into_iter().zip(result.slots) {
            grads.accumulate(owner, grad)?;
        }
        if let (Some(norm), Some((dq, dk))) = (&norm, result.norm) {
            grads.accumulate(&norm.q, dq)?;
            grads.accumulate(&norm.k, dk)?;
        }
        Ok(())
    }))
}
