//! What is timed is right: sampled rows of some heads against sums in f64 from the operands' values, by the rules of
//! [`hywu_kernels::testing`]. A naive implementation in bf16 rounds scores, weights and whatever else it stores.

use super::call::{Call, Gradients};
use crate::{
    Result,
    cases::samples::{Samples, dot, lines, rounded, sampled, wide},
    timing::Bench,
};
use hywu_core::Dtype;
use hywu_kernels::{
    Tensor,
    ops::attention::{Attention, Forward, Layout, Rotary},
};
use rayon::prelude::*;
use std::f64::consts::{LN_2, LOG2_E};

/// Entries and heads that are looked at, beside the first and the last of them.
const ENTRIES: usize = 1;
/// Tolerance in f32, as in the op's tests: of outputs, and of gradients.
const TOLERANCE: [f64; 2] = [1e-5, 1e-4];
/// A score's own rounding in f32 is a relative error of its weight: so much for every unit of the largest score.
const OF_SCORES: f64 = 4.0 * f32::EPSILON as f64;

/// Rows of one head, d channels each.
type Rows = Vec<f64>;

/// An entry: its two batch indices, its first token and how many it has, and how many keys may be seen.
#[derive(Clone, Copy)]
struct Entry {
    batch: [usize; 2],
    first: usize,
    tokens: usize,
    keys: usize,
}

fn entries(args: &Attention) -> Vec<Entry> {
    let [size0, size1] = args.batch;
    let entry = |i: usize| {
        let batch = [i / size1, i % size1];
        let (first, tokens) = match &args.ragged {
            Some(r) => (r.keys[batch[0]], r.keys[batch[0] + 1] - r.keys[batch[0]]),
            None => (0, args.keys),
        };
        let keys = args.key_lengths.as_ref().map_or(tokens, |lengths| lengths[i]);
        Entry { batch, first, tokens, keys }
    };
    (0..size0 * size1).map(entry).collect()
}

/// A few of `n`.
fn some(n: usize) -> Vec<usize> {
    let all = sampled(n, []);
    let inner = all[1..all.len().max(2) - 1].iter().take(ENTRIES).copied();
    let mut some: Vec<usize> = std::iter::once(0).chain(inner).chain([n - 1]).collect();
    some.dedup();
    some
}

/// All heads of an entry's tokens, from the device that has them.
struct Tokens {
    values: Vec<f32>,
    layout: Layout,
    row: usize,
    d: usize,
}

impl Tokens {
    fn read(x: &Tensor, layout: Layout, entry: Entry, d: usize) -> Result<Self> {
        let row = x.dim_back(1);
        let at = |token: usize| {
            let [b0, b1] = entry.batch;
            (b0 * layout.batch[0] + b1 * layout.batch[1] + (entry.first + token) * layout.token) / row
        };
        let values = if layout.token == row {
            lines(x, row, at(0), entry.tokens)?
        } else {
            let token = |token| lines(x, row, at(token), 1);
            (0..entry.tokens).map(token).collect::<Result<Vec<_>>>()?.concat()
        };
        Ok(Self { values, layout, row, d })
    }
    /// One channel row.
    fn row(&self, token: usize, head: usize) -> &[f32] {
        &self.values[token * self.row + self.layout.offset + head * self.layout.head..][..self.d]
    }
    fn head(&self, head: usize) -> Rows {
        let tokens = self.values.len() / self.row;
        (0..tokens).flat_map(|token| wide(self.row(token, head))).collect()
    }
}

/// Does nothing, or rounds to bf16.
type Round = fn(&[f64]) -> Rows;

fn exactly(values: &[f64]) -> Rows {
    values.to_vec()
}

/// Rows after norm and rotation, each of which `round` follows.
fn prepared(x: &[f64], d: usize, norm: Option<&[f64]>, rotary: Option<&Rotary>, round: Round) -> Rows {
    let mut x = x.to_vec();
    if let Some(norm) = norm {
        for row in x.chunks_exact_mut(d) {
            let size = (dot(row, row) / d as f64 + 1e-6).sqrt();
            row.iter_mut().zip(norm).for_each(|(x, w)| *x *= w / size);
        }
        x = round(&x);
    }
    if let Some(Rotary { cos, sin }) = rotary {
        for (i, pair) in x.chunks_exact_mut(2).enumerate() {
            let (cos, sin) = (f64::from(cos.data()[i]), f64::from(sin.data()[i]));
            let [a, b] = [pair[0], pair[1]];
            pair.copy_from_slice(&[cos * a - sin * b, sin * a + cos * b]);
        }
        x = round(&x);
    }
    x
}

/// Queries, keys and values of a head.
struct Head {
    d: usize,
    q: Rows,
    k: Rows,
    v: Rows,
    round: Round,
}

impl Head {
    fn scale(&self) -> f64 {
        (self.d as f64).powf(-0.5)
    }
    fn query(&self, i: usize) -> &[f64] {
        row(&self.q, i, self.d)
    }
    /// Scores of a query's first keys.
    fn scores(&self, query: usize, keys: usize) -> Rows {
        let score = |k: &[f64]| self.scale() * dot(self.query(query), k);
        (self.round)(&self.k.chunks_exact(self.d).take(keys).map(score).collect::<Rows>())
    }
    /// Their weights.
    fn weights(&self, scores: &[f64]) -> Rows {
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Rows = scores.iter().map(|s| (s - most).exp()).collect();
        let sum: f64 = weights.iter().sum();
        (self.round)(&weights.iter().map(|w| w / sum).collect::<Rows>())
    }
    /// The output of a query.
    fn output(&self, scores: &[f64]) -> Rows {
        mixed(&self.weights(scores), &self.v, self.d)
    }
    /// The gradient of a query, whose output's gradient is `grad`.
    fn query_gradient(&self, scores: &[f64], grad: &[f64]) -> Rows {
        let weights = self.weights(scores);
        let of_weights = (self.round)(&self.v.chunks_exact(self.d).map(|v| dot(grad, v)).collect::<Rows>());
        let mean = dot(grad, &(self.round)(&mixed(&weights, &self.v, self.d)));
        let of_scores = weights.iter().zip(&of_weights).map(|(w, g)| self.scale() * w * (g - mean));
        mixed(&(self.round)(&of_scores.collect::<Rows>()), &self.k, self.d)
    }
}

fn row(rows: &[f64], i: usize, d: usize) -> &[f64] {
    &rows[i * d..][..d]
}

/// The sum of rows by weight.
fn mixed(weights: &[f64], rows: &[f64], d: usize) -> Rows {
    let mut sum = vec![0.0; d];
    for (weight, row) in weights.iter().zip(rows.chunks_exact(d)) {
        sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += weight * x);
    }
    sum
}

/// Operands of an entry on the host.
struct Operands {
    tokens: [Tokens; 3],
    norm: Option<[Rows; 2]>,
    rotary: Option<(Rotary, Rotary)>,
}

impl Operands {
    fn read(call: &Call, entry: Entry) -> Result<Self> {
        let Attention { q, k, v, head_dim, rotary, .. } = &call.args;
        let [of_q, of_k, of_v] = &call.operands;
        let host = |x: &Rotary| -> Result<Rotary> {
            Ok(Rotary { cos: x.cos.to_host()?.clone(), sin: x.sin.to_host()?.clone() })
        };
        let rotary = match rotary {
            Some((q, k)) => Some((host(q)?, host(k)?)),
            None => None,
        };
        let norm = match &call.norm {
            Some([q, k]) => Some([wide(q.to_host()?.data()), wide(k.to_host()?.data())]),
            None => None,
        };
        Ok(Self {
            tokens: [
                Tokens::read(of_q, *q, entry, *head_dim)?,
                Tokens::read(of_k, *k, entry, *head_dim)?,
                Tokens::read(of_v, *v, entry, *head_dim)?,
            ],
            norm,
            rotary,
        })
    }
    /// A query head with the keys and values that it reads.
    fn head(&self, args: &Attention, head: usize, round: Round) -> Head {
        let (d, kv) = (args.head_dim, head * args.kv_heads / args.heads);
        let [q, k, v] = &self.tokens;
        let norm = self.norm.as_ref().map(|[q, k]| (q.as_slice(), k.as_slice()));
        let rotary = self.rotary.as_ref();
        Head {
            d,
            q: prepared(&q.head(head), d, norm.map(|n| n.0), rotary.map(|r| &r.0), round),
            k: prepared(&k.head(kv), d, norm.map(|n| n.1), rotary.map(|r| &r.1), round),
            v: v.head(kv),
            round,
        }
    }
}

/// Keys that a query of an entry sees.
fn limit(call: &Call, entry: Entry, query: usize) -> usize {
    call.shape.limit(query, entry.tokens).min(entry.keys)
}

/// The key of an entry that all its queries want, where there is one.
pub fn hot_key(tokens: usize) -> usize {
    2 * tokens / 3
}

/// Tokens of an entry that are looked at: also the hot one, and those around a span.
fn sampled_tokens(call: &Call, entry: Entry) -> Vec<usize> {
    let span = call.args.causal.as_ref().and_then(|c| c.spans.first()?.get(1));
    let edges = span.into_iter().flat_map(|s| [s.start - 1, s.start, s.end - 1, s.end]);
    sampled(entry.tokens, edges.chain([hot_key(entry.tokens)]))
}

fn largest(scores: &[f64]) -> f64 {
    scores.iter().fold(0.0, |most, s| s.abs().max(most))
}

/// The output.
pub fn output(bench: &Bench, call: &Call, out: &Tensor) -> Result<()> {
    let (mut samples, mut most) = (Samples::default(), 0f64);
    let entries = entries(&call.args);
    for entry in some(entries.len()).into_iter().map(|i| entries[i]) {
        let operands = Operands::read(call, entry)?;
        let got = Tokens::read(out, call.args.out, entry, call.args.head_dim)?;
        for head in some(call.args.heads) {
            let [exact, naive] =
                [exactly, rounded].map(|round: Round| operands.head(&call.args, head, round));
            let tokens = sampled_tokens(call, entry);
            let row = |&i: &usize| {
                let scores = [&exact, &naive].map(|h| h.scores(i, limit(call, entry, i)));
                let [e, n] = &scores;
                (largest(e), exact.output(e), naive.output(n))
            };
            let rows: Vec<_> = tokens.par_iter().map(row).collect();
            for (i, (score, expected, naive)) in tokens.iter().zip(rows) {
                most = most.max(score);
                samples.add(got.row(*i, head), &expected, &naive);
            }
        }
    }
    samples.check(bench, "the output", TOLERANCE[0] + OF_SCORES * most)
}

/// Gradients: those of sampled queries from nothing but the operands; those of keys and values from the row sums and outputs of the
/// forward pass too, whose own rows are checked.
pub fn gradients(bench: &Bench, call: &Call, grad: &Tensor, got: &Gradients) -> Result<()> {
    let saved = call.forward()?;
    output(bench, call, got.out.as_ref().unwrap_or(&saved.out))?;
    let Attention { q, k, v, out, head_dim: d, heads, kv_heads, .. } = call.args;
    let slot = |i: usize| &got.slots[i.min(got.slots.len() - 1)];
    let [mut dqs, mut dks, mut dvs] = [(); 3].map(|()| Samples::default());
    let mut most = 0f64;
    let entries = entries(&call.args);
    for e in some(entries.len()) {
        let entry = entries[e];
        let operands = Operands::read(call, entry)?;
        let grad = Tokens::read(grad, out, entry, d)?;
        let outputs = Tokens::read(&saved.out, out, entry, d)?;
        let [dq, dk, dv] =
            [(0, q), (1, k), (2, v)].map(|(i, layout)| Tokens::read(slot(i), layout, entry, d));
        let (dq, dk, dv) = (dq?, dk?, dv?);
        let tokens = sampled_tokens(call, entry);
        let group = heads / kv_heads;
        for kv in some(kv_heads) {
            let mut sums = vec![[(); 4].map(|()| vec![0.0; d]); tokens.len()];
            for head in kv * group..(kv + 1) * group {
                let [exact, naive] =
                    [exactly, rounded].map(|round: Round| operands.head(&call.args, head, round));
                let row = |&i: &usize| {
                    let scores = [&exact, &naive].map(|h| h.scores(i, limit(call, entry, i)));
                    let g = wide(grad.row(i, head));
                    let [e, n] = &scores;
                    (largest(e), exact.query_gradient(e, &g), naive.query_gradient(n, &g))
                };
                let rows: Vec<_> = tokens.par_iter().map(row).collect();
                for (i, (score, expected, naive)) in tokens.iter().zip(rows) {
                    most = most.max(score);
                    dqs.add(dq.row(*i, head), &expected, &naive);
                }
                let given = Given {
                    grad: grad.head(head),
                    out: outputs.head(head),
                    sums: row_sums(call, &saved, e, head)?,
                };
                let of_keys: Vec<_> = tokens
                    .par_iter()
                    .map(|&j| {
                        let sees = |i| j < limit(call, entry, i);
                        let [(dk, dv), (naive_dk, naive_dv)] =
                            [&exact, &naive].map(|h| given.key_gradients(h, j, sees));
                        [dk, dv, naive_dk, naive_dv]
                    })
                    .collect();
                for (sum, more) in sums.iter_mut().zip(of_keys) {
                    for (sum, more) in sum.iter_mut().zip(more) {
                        sum.iter_mut().zip(more).for_each(|(s, m)| *s += m);
                    }
                }
            }
            for (j, [exact_k, exact_v, naive_k, naive_v]) in tokens.iter().zip(&sums) {
                dks.add(dk.row(*j, kv), exact_k, naive_k);
                dvs.add(dv.row(*j, kv), exact_v, naive_v);
            }
        }
    }
    let tolerance = TOLERANCE[1] + OF_SCORES * most;
    if bench.dtype() == Dtype::F32 {
        // Against what the whole gradient holds: where one key has all weight, that of a query is zero but for rounding.
        return dqs.and(dks).and(dvs).check(bench, "a gradient", tolerance);
    }
    dqs.check(bench, "the gradient of q", tolerance)?;
    dks.check(bench, "the gradient of k", tolerance)?;
    dvs.check(bench, "the gradient of v", tolerance)
}

/// [`Forward::lse`] of an entry's queries, as natural logarithms.
fn row_sums(call: &Call, saved: &Forward, e: usize, head: usize) -> Result<Rows> {
    let Attention { queries, heads, batch, .. } = call.args;
    let (line, first, count) = match &call.args.ragged {
        Some(r) => {
            let [b0, b1] = [e / batch[1], e % batch[1]];
            (b1 * heads + head, r.queries[b0], r.queries[b0 + 1] - r.queries[b0])
        }
        None => (e * heads + head, 0, queries),
    };
    let sums = lines(&saved.lse, queries, line, 1)?;
    Ok(wide(&sums[first..first + count]).iter().map(|s| s * LN_2).collect())
}

/// What the gradients of keys start from: the output and its gradient, and the sums of rows.
struct Given {
    grad: Rows,
    out: Rows,
    sums: Rows,
}

impl Given {
    /// Gradients of key and value number `j`, from the queries that see it.
    fn key_gradients(&self, head: &Head, j: usize, sees: impl Fn(usize) -> bool) -> (Rows, Rows) {
        let d = head.d;
        let (key, value) = (row(&head.k, j, d), row(&head.v, j, d));
        let seen: Vec<usize> = (0..self.sums.len()).filter(|&i| sees(i)).collect();
        let of_seen = |f: &dyn Fn(usize) -> f64| (head.round)(&seen.iter().map(|&i| f(i)).collect::<Rows>());
        let scores = of_seen(&|i| head.scale() * dot(head.query(i), key));
        let weights = scores.iter().zip(&seen).map(|(s, &i)| ((s - self.sums[i]) * LOG2_E).exp2());
        let weights = (head.round)(&weights.collect::<Rows>());
        let of_weights = of_seen(&|i| dot(row(&self.grad, i, d), value));
        let mean = |i: usize| dot(row(&self.grad, i, d), row(&self.out, i, d));
        let of_scores = seen.iter().zip(weights.iter().zip(&of_weights));
        let of_scores: Rows = of_scores.map(|(&i, (w, g))| head.scale() * w * (g - mean(i))).collect();
        let of_scores = (head.round)(&of_scores);
        let (mut dk, mut dv) = (vec![0.0; d], vec![0.0; d]);
        for ((&i, s), w) in seen.iter().zip(&of_scores).zip(&weights) {
            dk.iter_mut().zip(head.query(i)).for_each(|(sum, q)| *sum += s * q);
            dv.iter_mut().zip(&self.grad[i * d..]).for_each(|(sum, g)| *sum += w * g);
        }
        (dk, dv)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::shapes::{Kind, Pass, timed},
        *,
    };
    use hywu_kernels::{Device, ops::attention::Causal};

    /// A check that nothing can fail would show nothing.
    #[test]
    fn what_is_wrong_is_found() {
        let bench = Bench::new(Device::Cpu, true);
        for (_, shape, _) in timed(&bench, false).into_iter().filter(|t| t.0 == Pass::Forward) {
            let call = Call::new(&bench, 0, shape).expect("it fits");
            let saved = call.forward().expect("it fits");
            output(&bench, &call, &saved.out).expect("right");
            for at in [0, saved.out.numel() - 1] {
                for wrong in [f32::NAN, 1.0] {
                    let mut out = saved.out.clone();
                    out.data_mut()[at] += wrong;
                    assert!(output(&bench, &call, &out).is_err(), "{shape}: {wrong} at {at}");
                }
            }
            let other = Call::new(&bench, 1, shape).expect("it fits");
            assert!(output(&bench, &other, &saved.out).is_err(), "{shape}: other operands");
            if shape.kind == Kind::Rotated {
                continue;
            }
            let grad = call.grad(&bench, 0).expect("it fits");
            let right = call.backward(&saved, &grad).expect("it fits");
            gradients(&bench, &call, &grad, &right).expect("right");
            for slot in 0..right.slots.len() {
                let mut slots = right.slots.clone();
                slots[slot].data_mut()[0] += 1.0;
                let wrong = Gradients { out: None, slots };
                assert!(gradients(&bench, &call, &grad, &wrong).is_err(), "{shape}: gradient {slot}");
            }
        }
    }

    /// Every query that sees one key too many or too few.
    #[test]
    fn a_wrong_mask_is_found() {
        let bench = Bench::new(Device::Cpu, true);
        for (_, shape, _) in timed(&bench, false).into_iter().filter(|t| t.1.kind == Kind::Causal) {
            let call = Call::new(&bench, 0, shape).expect("it fits");
            let mut wrong = Call::new(&bench, 0, shape).expect("it fits");
            let pairs = (0..shape.s / 2).map(|i| 2 * i..2 * i + 2).collect();
            wrong.args.causal = Some(Causal { spans: vec![pairs] });
            let out = wrong.forward().expect("it fits").out;
            assert!(output(&bench, &call, &out).is_err(), "{shape}");
        }
    }
}
