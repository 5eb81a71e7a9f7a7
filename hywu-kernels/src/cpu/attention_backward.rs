//! Gradients of attention on the CPU. A job is one (batch, key head): it computes the scores of the query heads again, tile by
//! tile, from the saved logarithms of the row sums, and adds up the gradients of its keys and values in the order of the query blocks.

use super::attention::{
    Group, Operand, Operands, Shared, Unit, align, inverse_rms, key_block, tile_row, transpose_panel,
    with_scratch,
};
#[cfg(target_arch = "x86_64")]
use super::attention_simd::{Avx2, Avx512};
use super::attention_simd::{Isa, Portable, Product, Simd, exp2};
use crate::{
    Tensor,
    ops::attention::{Attention, Backward, Forward, NormWeights, Slots},
};
use rayon::prelude::*;
use std::{f32::consts::LN_2, ops::Range};

/// Query rows of a tile: also the terms of a sum over queries, so it is larger than the forward's.
const QUERY_BLOCK: usize = 48;
/// Most keys of a tile; two tiles are alive at a time.
const KEY_BLOCK: usize = 128;

/// What the forward pass left, and the gradient of its output.
pub(super) struct Saved<'a> {
    /// The output.
    pub out: &'a [f32],
    /// Base-2 logarithms of the row sums.
    pub lse: &'a [f32],
    /// Gradient of the output.
    pub grad: &'a [f32],
}

/// Where gradients go. Pointers may be equal: then the layouts tell whose element is whose.
pub(super) struct Sinks {
    /// Tensors for q, k and v; null where the gradient is not wanted.
    pub qkv: [*mut f32; 3],
    /// Is every element written exactly once? Then jobs run in parallel and overwrite; otherwise they run one after the other and add.
    pub once: bool,
    /// Are the gradients of the norm's weights wanted?
    pub norm: bool,
}

/// The wanted gradients; see [`crate::ops::attention::backward`].
///
/// # Safety
/// `args` has been validated against all tensors.
pub(crate) unsafe fn backward(
    args: &Attention,
    qkv: [&Tensor; 3],
    norm: Option<NormWeights<'_>>,
    saved: &Forward,
    grad: &Tensor,
    slots: &Slots<'_>,
) -> Backward {
    // What the jobs overwrite completely needs no zeros.
    let tensor = |&(shape, whole): &(&[usize], bool)| match whole {
        true => Tensor::build(shape, |_| {}),
        false => Tensor::zeros(shape),
    };
    let mut tensors: Vec<Tensor> = slots.tensors.iter().map(tensor).collect();
    let pointers: Vec<*mut f32> = tensors.iter_mut().map(|t| t.data_mut().as_mut_ptr()).collect();
    let sinks = Sinks {
        qkv: slots.wanted.slots.map(|s| s.map_or(std::ptr::null_mut(), |s| pointers[s])),
        once: slots.once,
        norm: slots.wanted.norm,
    };
    let weights = norm.map(|n| [n.q.data(), n.k.data()]);
    let saved = Saved { out: saved.out.data(), lse: saved.lse.data(), grad: grad.data() };
    // SAFETY: the caller's; the gradient tensors have their operands' sizes and nobody else holds them; the processor has what it
    // detects.
    let [dq, dk] =
        unsafe { backward_on(Isa::detect(), args, qkv.map(Tensor::data), weights, &saved, &sinks) };
    let like = |w: &Tensor, d: &[f32]| Tensor::build(w.shape(), |out| out.copy_from_slice(d));
    let norm = norm.filter(|_| slots.wanted.norm).map(|n| (like(n.q, &dq), like(n.k, &dk)));
    Backward { slots: tensors, norm }
}

/// Writes the wanted gradients and returns those of the norm's weights for queries and keys (zeros when not wanted).
///
/// # Safety
/// `args` has been validated against the lengths of all slices and of the tensors behind the pointers of `sinks`; these are
/// initialised, and no other reference to them is alive; the processor has `isa`.
pub(super) unsafe fn backward_on(
    isa: Isa,
    args: &Attention,
    qkv: [&[f32]; 3],
    norm: Option<[&[f32]; 2]>,
    saved: &Saved<'_>,
    sinks: &Sinks,
) -> [Vec<f32>; 2] {
    let d = args.head_dim;
    let groups = Operands::groups(args);
    if groups == 0 {
        return [0, 1].map(|_| vec![0.0; d]);
    }
    let operands = Operands::new(args, qkv, norm);
    let out = Operand::plain(saved.out, args.out, d);
    let grad = Operand::plain(saved.grad, args.out, d);
    let weights = norm.is_some() && sinks.norm;
    // Per group, so that their sum has a fixed order.
    let mut parts = vec![0.0; if weights { groups * 2 * align(d) } else { 0 }];
    let shared = Shared(parts.as_mut_ptr());
    let job = Job {
        operands: &operands,
        out: &out,
        grad: &grad,
        lse: saved.lse,
        sinks: sinks.qkv.map(|p| (!p.is_null()).then_some(Shared(p))),
        add: !sinks.once,
        weights: weights.then_some(shared),
    };
    let run = |i| {
        // SAFETY: the caller's; jobs write disjoint elements, or run one after the other.
        with_scratch(job.scratch(i), |parts| unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => job.run_avx512(i, parts),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => job.run_avx2(i, parts),
                Isa::Portable => job.run::<Portable>(i, parts),
            }
        });
    };
    if sinks.once {
        (0..groups).into_par_iter().for_each(run);
    } else {
        (0..groups).for_each(run);
    }
    [0, 1].map(|which| {
        let sum = |c| {
            parts.chunks_exact(2 * align(d)).map(|part| f64::from(part[which * align(d) + c])).sum::<f64>()
        };
        (0..d).map(|c| sum(c) as f32).collect()
    })
}

struct Job<'a> {
    operands: &'a Operands<'a>,
    out: &'a Operand<'a>,
    grad: &'a Operand<'a>,
    lse: &'a [f32],
    sinks: [Option<Shared>; 3],
    /// Add to the gradients instead of overwriting them.
    add: bool,
    /// Per group the gradients of the norm's weights.
    weights: Option<Shared>,
}

/// A job's working memory.
#[derive(Clone, Copy)]
struct Parts {
    keys: *mut f32,
    key_panels: *mut f32,
    value_panels: *mut f32,
    d_keys: *mut f32,
    d_values: *mut f32,
    queries: *mut f32,
    grads: *mut f32,
    d_queries: *mut f32,
    weights: *mut f32,
    d_scores: *mut f32,
}

impl Job<'_> {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx2,fma")]
    unsafe fn run_avx512(&self, i: usize, parts: [*mut f32; 10]) {
        // SAFETY: the caller's.
        unsafe { self.run::<Avx512>(i, parts) }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn run_avx2(&self, i: usize, parts: [*mut f32; 10]) {
        // SAFETY: the caller's.
        unsafe { self.run::<Avx2>(i, parts) }
    }
    fn scratch(&self, i: usize) -> [usize; 10] {
        let keys = self.operands.group(i).entry.keys;
        let width = self.grad.width;
        let (rows, block) = (align(keys) * width, QUERY_BLOCK * width);
        let tile = QUERY_BLOCK * tile_row(key_block(keys, KEY_BLOCK));
        [rows, rows, rows, rows, rows, block, block, block, tile, tile]
    }
    /// # Safety
    /// The processor has the instructions, the operands were validated, the parts have the sizes of `scratch`.
    #[inline(always)]
    unsafe fn run<S: Simd>(&self, index: usize, parts: [*mut f32; 10]) {
        let Operands { args, extents, q, k, v } = self.operands;
        let [keys, key_panels, value_panels, d_keys, d_values, queries, grads, d_queries, weights, d_scores] =
            parts;
        let p = Parts {
            keys,
            key_panels,
            value_panels,
            d_keys,
            d_values,
            queries,
            grads,
            d_queries,
            weights,
            d_scores,
        };
        let group = self.operands.group(index);
        let entry = &group.entry;
        let (valid, width, d) = (entry.keys, q.width, args.head_dim);
        let block = key_block(valid, KEY_BLOCK);
        let [q_sink, k_sink, v_sink] = self.sinks;
        let (wants_q, wants_k) = (self.takes(q, q_sink), self.takes(k, k_sink));
        // SAFETY: every part holds what is put into it; operand rows are inside.
        unsafe {
            v.pack_panels::<S>(group.keys, valid, p.keys, p.value_panels);
            k.pack::<S>(group.keys, 0..valid, p.keys);
            p.keys.add(valid * width).write_bytes(0, (align(valid) - valid) * width);
            for row in (0..valid).step_by(S::LANES) {
                transpose_panel::<S>(p.keys.add(row * width), d, width, p.key_panels.add(row * width));
            }
            p.d_keys.write_bytes(0, valid * width);
            p.d_values.write_bytes(0, valid * width);
            for (head, first) in group
                .heads
                .clone()
                .flat_map(|head| (0..entry.queries).step_by(QUERY_BLOCK).map(move |first| (head, first)))
            {
                let (unit, rows) = (group.queries(head), first..(first + QUERY_BLOCK).min(entry.queries));
                let seen = extents.limit(entry, rows.end - 1);
                q.pack::<S>(unit, rows.clone(), p.queries);
                self.grad.pack::<S>(unit, rows.clone(), p.grads);
                for key in (0..seen).step_by(block) {
                    let keys = key..(key + block).min(seen);
                    self.tile::<S>(&p, &group, head, rows.clone(), keys, block, [wants_q, wants_k]);
                }
                for (i, token) in rows.enumerate() {
                    if wants_q && seen > 0 {
                        let grad = p.d_queries.add(i * width);
                        let to = q_sink.map(|s| s.at(q.index(unit, token)));
                        self.unpack::<S>(
                            q,
                            unit,
                            token,
                            grad,
                            1.0 / (d as f32).sqrt(),
                            to,
                            self.weights_at(index, 0),
                        );
                    } else if let Some(sink) = q_sink {
                        self.no_gradient(sink.at(q.index(unit, token)));
                    }
                }
            }
            let any = entry.queries * group.heads.len() > 0;
            for token in 0..args.tokens(group.index / args.batch[1])[1].len() {
                let some = token < valid && any;
                if wants_k && some {
                    // Queries carry log2(e): what is left of the scale is ln(2).
                    let to = k_sink.map(|s| s.at(k.index(group.keys, token)));
                    let grad = p.d_keys.add(token * width);
                    self.unpack::<S>(k, group.keys, token, grad, LN_2, to, self.weights_at(index, 1));
                } else if let Some(sink) = k_sink {
                    self.no_gradient(sink.at(k.index(group.keys, token)));
                }
                if let Some(sink) = v_sink {
                    let (to, grad) = (sink.at(v.index(group.keys, token)), p.d_values.add(token * width));
                    if some {
                        self.unpack::<S>(v, group.keys, token, grad, 1.0, Some(to), None);
                    } else {
                        self.no_gradient(to);
                    }
                }
            }
        }
    }
    /// Is the gradient of the packed operand needed, for itself or for its norm's weight?
    fn takes(&self, operand: &Operand<'_>, sink: Option<Shared>) -> bool {
        sink.is_some() || (operand.norm.is_some() && self.weights.is_some())
    }
    fn weights_at(&self, index: usize, which: usize) -> Option<*mut f32> {
        self.weights.map(|w| w.at((2 * index + which) * self.grad.width))
    }
    unsafe fn no_gradient(&self, to: *mut f32) {
        if !self.add {
            // SAFETY: the caller's row.
            unsafe { to.write_bytes(0, self.operands.args.head_dim) };
        }
    }
    /// One tile of queries by keys: probabilities, gradients of scores, and what they add to the three operands.
    ///
    /// # Safety
    /// As for `run`.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn tile<S: Simd>(
        &self,
        p: &Parts,
        group: &Group,
        head: usize,
        rows: Range<usize>,
        keys: Range<usize>,
        block: usize,
        [wants_q, wants_k]: [bool; 2],
    ) {
        let Operands { args, extents, .. } = self.operands;
        let (d, width, row) = (args.head_dim, self.grad.width, tile_row(block));
        let (d_vecs, key_vecs) = (d.div_ceil(S::LANES), keys.len().div_ceil(S::LANES));
        let at = keys.start * width;
        // Scores and their gradients: rows of queries times panels of keys.
        let scores = |a, panels: *mut f32, c| Product {
            rows: rows.len(),
            vecs: key_vecs,
            depth: d,
            a,
            a_row: width,
            a_step: 1,
            b: panels.wrapping_add(at),
            b_vec: S::LANES * width,
            b_step: S::LANES,
            c,
            c_row: row,
            add: false,
        };
        // Sums over queries: columns of a tile times rows of queries.
        let over_queries = |a, b, c: *mut f32| Product {
            rows: keys.len(),
            vecs: d_vecs,
            depth: rows.len(),
            a,
            a_row: 1,
            a_step: row,
            b,
            b_vec: S::LANES,
            b_step: width,
            c: c.wrapping_add(at),
            c_row: width,
            add: true,
        };
        let (unit, first_row) = (group.queries(head), args.first_row(group.index, head));
        // Of a row's keys here those that it sees, and what holds them all.
        let seen = |i| extents.limit(&group.entry, rows.start + i).saturating_sub(keys.start).min(keys.len());
        let all = key_vecs * S::LANES;
        // SAFETY: the caller's.
        unsafe {
            S::product(&scores(p.queries, p.key_panels, p.weights));
            for i in 0..rows.len() {
                let lse = S::splat(self.lse[first_row + rows.start + i]);
                let (row, seen) = (p.weights.add(i * row), seen(i));
                for score in (0..seen).step_by(S::LANES).map(|j| row.add(j)) {
                    S::store(score, exp2::<S>(S::sub(S::load(score), lse)));
                }
                row.add(seen).write_bytes(0, all - seen);
            }
            if self.sinks[2].is_some() {
                S::product(&over_queries(p.weights, p.grads, p.d_values));
            }
            if !wants_q && !wants_k {
                return;
            }
            S::product(&scores(p.grads, p.value_panels, p.d_scores));
            for (i, token) in rows.clone().enumerate() {
                let mean = S::splat(self.mean_gradient::<S>(unit, token));
                let (weights, d_scores, seen) = (p.weights.add(i * row), p.d_scores.add(i * row), seen(i));
                for j in (0..seen).step_by(S::LANES) {
                    let change = S::sub(S::load(d_scores.add(j)), mean);
                    S::store(d_scores.add(j), S::mul(S::load(weights.add(j)), change));
                }
                d_scores.add(seen).write_bytes(0, all - seen);
            }
            if wants_k {
                S::product(&over_queries(p.d_scores, p.queries, p.d_keys));
            }
            if wants_q {
                S::product(&Product {
                    rows: rows.len(),
                    vecs: d_vecs,
                    depth: keys.len(),
                    a: p.d_scores,
                    a_row: row,
                    a_step: 1,
                    b: p.keys.wrapping_add(at),
                    b_vec: S::LANES,
                    b_step: width,
                    c: p.d_queries,
                    c_row: width,
                    add: keys.start > 0,
                });
            }
        }
    }
    /// Sum over keys of weight * gradient of weight, which is the dot product of the output row and its gradient.
    #[inline(always)]
    unsafe fn mean_gradient<S: Simd>(&self, unit: Unit, token: usize) -> f32 {
        let d = self.out.head_dim;
        let at = self.out.index(unit, token);
        let (out, grad) = (self.out.data.as_ptr().wrapping_add(at), self.grad.data.as_ptr().wrapping_add(at));
        // SAFETY: a row of both.
        unsafe {
            let mut sum = S::splat(0.0);
            for c in (0..d).step_by(S::LANES) {
                let n = (d - c).min(S::LANES);
                sum = S::fma(S::load_first(out.add(c), n), S::load_first(grad.add(c), n), sum);
            }
            S::sum(sum)
        }
    }
    /// Takes the gradient of a packed row, times `factor`, back through rotation and norm: to the operand's own row, if `to` is
    /// given, and added to its norm's weight.
    ///
    /// # Safety
    /// `grad` is a padded row, `to` a row of the operand's shape, `weight` a padded row; the processor has the instructions.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn unpack<S: Simd>(
        &self,
        operand: &Operand<'_>,
        unit: Unit,
        token: usize,
        grad: *mut f32,
        factor: f32,
        to: Option<*mut f32>,
        weight: Option<*mut f32>,
    ) {
        let (d, width) = (operand.head_dim, operand.width);
        let x = operand.data.as_ptr().wrapping_add(operand.index(unit, token));
        // SAFETY: the caller's.
        unsafe {
            let inverse = if operand.norm.is_some() { inverse_rms::<S>(x, d) } else { 1.0 };
            // y = x * inverse * w: with g the gradient of y, dw = x g inverse and
            // dx = inverse (w g - x inverse² sum(x w g) / d).
            let mut dot = S::splat(0.0);
            for c in (0..d).step_by(S::LANES) {
                let mut g = S::mul(S::load(grad.add(c)), S::splat(factor));
                if let Some((cos, sin)) = &operand.rotary {
                    let at = token * width + c;
                    let turned = S::mul(S::swap_pairs(g), S::load(sin.as_ptr().add(at)));
                    g = S::sub(S::mul(g, S::load(cos.as_ptr().add(at))), turned);
                }
                if let Some(w) = &operand.norm {
                    let xg = S::mul(S::load_first(x.add(c), (d - c).min(S::LANES)), g);
                    let w = S::load(w.as_ptr().add(c));
                    dot = S::fma(xg, w, dot);
                    g = S::mul(g, w);
                    if let Some(weight) = weight {
                        let sum = S::fma(xg, S::splat(inverse), S::load(weight.add(c)));
                        S::store(weight.add(c), sum);
                    }
                }
                S::store(grad.add(c), g);
            }
            let Some(to) = to else { return };
            let along = S::splat(-inverse * inverse * S::sum(dot) / d as f32);
            for c in (0..d).step_by(S::LANES) {
                let n = (d - c).min(S::LANES);
                let mut g = S::load(grad.add(c));
                if operand.norm.is_some() {
                    g = S::mul(S::fma(S::load_first(x.add(c), n), along, g), S::splat(inverse));
                }
                if self.add {
                    g = S::add(g, S::load_first(to.add(c), n));
                }
                S::store_first(to.add(c), g, n);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::attention::forward_on;
    use super::*;
    use crate::{
        ops::attention::{Causal, Layout, Rotary},
        reference,
    };

    /// Numbers between -1.5 and 1.5 without a pattern that matters.
    fn numbers(seed: usize, n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729) % 10_007) as f32 / 3335.7 - 1.5).collect()
    }

    fn distance(a: &[f32], b: &[f64]) -> f64 {
        let square = |x: f64| x * x;
        let difference: f64 = a.iter().zip(b).map(|(&a, b)| square(f64::from(a) - b)).sum();
        (difference / b.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
    }

    /// Whatever the processor would choose, the narrower instruction sets are right as well.
    #[test]
    fn every_instruction_set() {
        // Ends of queries, keys and channels that fill no block, more than one block of each, and a mask within them.
        let (queries, keys, d) = (50, 261, 22);
        let layout = |tokens: usize, heads: usize| {
            let token = heads * d;
            Layout { offset: 0, batch: [tokens * token, 0], token, head: d }
        };
        let table = |n: usize| {
            let angles = numbers(1, n * d / 2);
            let table = |f: fn(f32) -> f32| {
                Tensor::build(&[n, d / 2], |t| {
                    t.copy_from_slice(&angles.iter().map(|&a| f(a)).collect::<Vec<_>>())
                })
            };
            Rotary { cos: table(f32::cos), sin: table(f32::sin) }
        };
        let args = Attention {
            batch: [2, 1],
            queries,
            keys,
            heads: 2,
            kv_heads: 1,
            head_dim: d,
            q: layout(queries, 2),
            k: layout(keys, 1),
            v: layout(keys, 1),
            out: layout(queries, 2),
            out_shape: vec![2, queries, 2 * d],
            key_lengths: Some(vec![keys, 150]),
            ragged: None,
            causal: Some(Causal { spans: vec![vec![215..231, 240..261]] }),
            rotary: Some((table(queries), table(keys))),
        };
        let [q, k, v] = [(2, 2 * queries), (3, keys), (4, keys)].map(|(seed, n)| numbers(seed, 2 * n * d));
        let norm = [numbers(5, d), numbers(6, d)];
        let grad = numbers(7, q.len());
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let weights = (wide(&norm[0]), wide(&norm[1]));
        let expected = reference::attention::attention(
            &args,
            &wide(&q),
            &wide(&k),
            &wide(&v),
            Some((&weights.0, &weights.1)),
        );
        let mut first: Option<Vec<Vec<f64>>> = None;
        for isa in Isa::available() {
            let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; 4 * queries]);
            let mut grads = [&q, &k, &v].map(|x| vec![f32::NAN; x.len()]);
            let norm = Some([norm[0].as_slice(), norm[1].as_slice()]);
            let qkv = [q.as_slice(), k.as_slice(), v.as_slice()];
            let sinks = Sinks { qkv: grads.each_mut().map(|g| g.as_mut_ptr()), once: true, norm: true };
            // SAFETY: the layouts cover all operands exactly once, and the processor has what is available.
            let weights = unsafe {
                forward_on(isa, &args, qkv, norm, &mut out, &mut lse);
                backward_on(isa, &args, qkv, norm, &Saved { out: &out, lse: &lse, grad: &grad }, &sinks)
            };
            assert!(distance(&out, &expected) < 1e-5, "{isa:?}");
            let all: Vec<Vec<f32>> = grads.into_iter().chain(weights).collect();
            let first = first.get_or_insert_with(|| all.iter().map(|x| wide(x)).collect());
            for (i, (a, b)) in all.iter().zip(first).enumerate() {
                let error = distance(a, b);
                assert!(error < 1e-5, "{isa:?}: gradient {i}, relative difference {error}");
            }
        }
    }
}
