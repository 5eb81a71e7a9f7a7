//! softmax(Q K^T / sqrt(d)) V with online softmax, any length, strided operands.

use super::together;
use crate::{Device, Error, Result, Tape, Tensor, Var};
use hywu_core::Dtype;

const OP: &str = "attention";

/// How the element (batch0, batch1, token, head, channel) is found in a tensor: offset + the dot product with these strides
/// (in elements); channels are contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Index of the first element.
    pub offset: usize,
    /// Strides of the two batch axes.
    pub batch: [usize; 2],
    /// Stride from one token to the next.
    pub token: usize,
    /// Stride from one head to the next.
    pub head: usize,
}

/// Rotary tables: interleaved pairs (2i, 2i+1) of each head are rotated by the angle of (token, i). They are f32, on the device of the
/// operands.
#[derive(Clone, Debug)]
pub struct Rotary {
    /// [tokens, head_dim / 2].
    pub cos: Tensor,
    /// [tokens, head_dim / 2].
    pub sin: Tensor,
}

impl Rotary {
    /// The same tables on a device, in f32 whatever the operands.
    ///
    /// # Errors
    /// A device that can't be used, or has not enough memory.
    pub fn to(&self, device: Device) -> Result<Self> {
        Ok(Self { cos: self.cos.to(device, Dtype::F32)?, sin: self.sin.to(device, Dtype::F32)? })
    }
}

/// The shape of an attention call.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Sizes of the two batch axes.
    pub batch: [usize; 2],
    /// Query tokens.
    pub queries: usize,
    /// Key and value tokens.
    pub keys: usize,
    /// Heads.
    pub heads: usize,
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
    /// Rotary tables of queries and of keys.
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
    /// Per row the base-2 logarithm of the sum over keys of 2^(score * log2(e)): [batch0, batch1, heads, queries], in f32.
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

/// Sizes and strides of a layout's axes.
type Axes = Vec<(usize, usize)>;

/// Does no index tuple meet another's element? Sufficient: sorted by stride, every stride exceeds all that the smaller ones reach.
fn injective(axes: &Axes) -> bool {
    if axes.iter().any(|a| a.0 == 0) {
        return true;
    }
    let mut axes: Axes = axes.iter().copied().filter(|a| a.0 > 1).collect();
    axes.sort_by_key(|a| a.1);
    let mut reach = 0;
    axes.iter().all(|&(size, stride)| {
        let apart = stride > reach;
        reach += (size - 1) * stride;
        apart
    })
}

impl Attention {
    fn axes(&self, l: &Layout, tokens: usize) -> Axes {
        let [b0, b1] = self.batch;
        vec![(b0, l.batch[0]), (b1, l.batch[1]), (tokens, l.token), (self.heads, l.head), (self.head_dim, 1)]
    }
    /// Elements that one operand has.
    fn count(&self, tokens: usize) -> usize {
        self.batch[0] * self.batch[1] * tokens * self.heads * self.head_dim
    }
    /// One past the last element of a layout; `None` when that overflows.
    fn end(&self, l: &Layout, tokens: usize) -> Option<usize> {
        let axes = self.axes(l, tokens);
        // The product of the sizes is bounded too: jobs are counted by it.
        if axes.iter().try_fold(1usize, |n, a| n.checked_mul(a.0))? == 0 {
            return Some(0);
        }
        axes.iter().try_fold(l.offset.checked_add(1)?, |end, &(size, stride)| {
            end.checked_add((size - 1).checked_mul(stride)?)
        })
    }
    fn in_bounds(&self, what: &'static str, l: &Layout, tokens: usize, tensor: &Tensor) -> Result<()> {
        match self.end(l, tokens) {
            Some(end) if end <= tensor.numel() => Ok(()),
            end => {
                let end = end.map_or("more than the address space".to_owned(), |n| n.to_string());
                Err(Error::shape(OP, what, tensor.shape(), format!("at least {end} elements for {l:?}")))
            }
        }
    }
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
        self.in_bounds("q", &self.q, self.queries, q)?;
        self.in_bounds("k", &self.k, self.keys, k)?;
        self.in_bounds("v", &self.v, self.keys, v)?;
        let size = self.out_shape.iter().try_fold(1usize, |n, &s| n.checked_mul(s));
        let end = self.end(&self.out, self.queries);
        let covers = end.is_some_and(|e| Some(e) <= size) && injective(&self.axes(&self.out, self.queries));
        if !covers || size != Some(self.count(self.queries)) {
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
            let tables = [
                ("cos table of q", &of_q.cos, self.queries),
                ("sin table of q", &of_q.sin, self.queries),
                ("cos table of k", &of_k.cos, self.keys),
                ("sin table of k", &of_k.sin, self.keys),
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
        if let Some(lengths) = &self.key_lengths {
            let entries = self.batch[0] * self.batch[1];
            if lengths.len() != entries {
                return Err(Error::shape(OP, "key_lengths", &[lengths.len()], format!("[{entries}]")));
            }
            if let Some(n) = lengths.iter().find(|&&n| n > self.keys) {
                return Err(Error::invalid(
                    OP,
                    format!("a key length is {n}, but there are {} keys", self.keys),
                ));
            }
        }
        Ok(())
    }
    /// Is every element of a tensor that these operands share met at most once?
    fn disjoint(&self, operands: &[(&Layout, usize)]) -> bool {
        if !operands.iter().all(|(l, tokens)| injective(&self.axes(l, *tokens))) {
            return false;
        }
        let mut ranges: Vec<_> = operands
            .iter()
            .map(|(l, tokens)| (l.offset, self.end(l, *tokens).unwrap_or(usize::MAX)))
            .collect();
        ranges.sort_unstable();
        if ranges.windows(2).all(|w| w[0].1 <= w[1].0) {
            return true;
        }
        // A fused projection: the same axes at evenly spaced offsets are one layout with an axis more.
        let (first, tokens) = operands[0];
        let step = ranges[1].0 - ranges[0].0;
        let mut axes = self.axes(first, tokens);
        let alike = operands.iter().all(|(l, tokens)| self.axes(l, *tokens) == axes);
        axes.push((ranges.len(), step));
        alike && ranges.windows(2).all(|w| w[1].0 - w[0].0 == step) && injective(&axes)
    }
}

/// Attention without a tape.
///
/// # Errors
/// [`Error::Shape`] when a layout leaves its tensor, `args.out` does not cover the output exactly once, or a norm weight, rotary table
/// or the list of key lengths has the wrong size; [`Error::Invalid`] for a bad head_dim or key length, and for operands or tables that
/// are not together on one device. Those of the device.
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
    let rows = args.batch[0] * args.batch[1] * args.heads * args.queries;
    let count = args.count(args.queries);
    for (what, tensor, expected) in
        [("gradient", grad, count), ("saved output", &saved.out, count), ("saved row sums", &saved.lse, rows)]
    {
        if tensor.numel() != expected {
            return Err(Error::shape(OP, what, tensor.shape(), format!("{expected} elements")));
        }
    }
    let operands = [(q, &args.q, args.queries), (k, &args.k, args.keys), (v, &args.v, args.keys)];
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
        let layouts: Vec<_> = members(slot).map(|(_, l, tokens)| (l, tokens)).collect();
        args.disjoint(&layouts)
    });
    let mut tensors = Vec::with_capacity(number);
    for slot in 0..number {
        let mut shapes = members(slot).map(|(t, _, _)| t);
        let Some(first) = shapes.next() else { continue };
        if let Some(other) = shapes.find(|t| t.numel() != first.numel()) {
            return Err(Error::shape(
                OP,
                "operand of a shared gradient",
                other.shape(),
                format!("{:?}", first.shape()),
            ));
        }
        let covered: usize = members(slot).map(|(_, _, tokens)| args.count(tokens)).sum();
        tensors.push((first.shape(), once && covered == first.numel()));
    }
    let slots = Slots { wanted, once, tensors };
    // SAFETY: validated.
    Ok(unsafe { on_device!(q, attention_backward::backward(args, [q, k, v], norm, saved, grad, &slots)) })
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

/// Rotary tables for positions with several coordinates: `positions[token]` holds one coordinate per axis, `widths` the channels of
/// each axis (even, sum = head_dim). Axis by axis, the angles of a coordinate u are u / theta^(2m / width) for m in 0..width / 2, with
/// theta = 10000. Frequency and angle are rounded to f32, cos and sin are those of that angle.
///
/// # Errors
/// [`Error::Invalid`] when a width is odd or a position has another number of coordinates than there are axes.
pub fn rotary_table(positions: &[Vec<u32>], widths: &[usize]) -> Result<Rotary> {
    const THETA: f64 = 10_000.0;
    if widths.iter().any(|w| !w.is_multiple_of(2)) {
        return Err(Error::invalid(
            "rotary table",
            format!("axis widths are {widths:?}, expected even numbers"),
        ));
    }
    if let Some(position) = positions.iter().find(|p| p.len() != widths.len()) {
        let what =
            format!("position {position:?} has {} coordinates, expected {}", position.len(), widths.len());
        return Err(Error::invalid("rotary table", what));
    }
    let axis = |&width: &usize| -> Vec<f32> {
        // A float32 power, as its correctly rounded value; then a float32 reciprocal.
        let power = |m| THETA.powf(f64::from((2 * m) as f32 / width as f32)) as f32;
        (0..width / 2).map(|m| 1.0 / power(m)).collect()
    };
    let frequencies: Vec<Vec<f32>> = widths.iter().map(axis).collect();
    let mut angles = Vec::with_capacity(positions.len() * widths.iter().sum::<usize>() / 2);
    for position in positions {
        for (&u, frequencies) in position.iter().zip(&frequencies) {
            angles.extend(frequencies.iter().map(|f| f64::from(u as f32 * f)));
        }
    }
    let shape = [positions.len(), widths.iter().sum::<usize>() / 2];
    let table = |f: fn(f64) -> f64| Tensor::new(&shape, angles.iter().map(|&a| f(a) as f32).collect());
    Ok(Rotary { cos: table(f64::cos)?, sin: table(f64::sin)? })
}
