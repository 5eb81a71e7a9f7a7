//! Attention on the CPU: packing of the operands and the forward pass. A job is a run of blocks of query rows that read the keys
//! of one (batch, key head); rows are computed independently of each other, so neither the split into jobs nor the rest of the batch
//! shows in the result.

pub(crate) use super::attention_backward::backward;
#[cfg(target_arch = "x86_64")]
use super::attention_simd::{Avx2, Avx512};
use super::attention_simd::{Isa, Portable, Product, Simd, exp2};
use crate::{
    Tensor,
    ops::attention::{Attention, Entry, Extents, Forward, Layout, NormWeights, Rotary},
};
use rayon::prelude::*;
use std::{cell::RefCell, f32::consts::LOG2_E, ops::Range};

/// Added to the mean square of a normalised row.
pub(crate) const NORM_EPS: f32 = 1e-6;
/// Query rows that share a pass over the keys: a multiple of the product's tile height.
const QUERY_BLOCK: usize = 24;
/// Most keys of a score tile; fewer keys than this need no rescaling at all.
const KEY_BLOCK: usize = 256;
/// Rows of packed operands are this many floats apart, or a multiple: a cache line.
const ALIGN: usize = 16;

pub(super) fn align(n: usize) -> usize {
    n.next_multiple_of(ALIGN)
}

/// Size of the key blocks that cut `keys` evenly into blocks of at most `most`.
pub(super) fn key_block(keys: usize, most: usize) -> usize {
    align(keys.div_ceil(keys.div_ceil(most).max(1))).max(ALIGN)
}

/// From one row of a score tile to the next: a cache line more than a block, as at a power of two the rows would share
/// a few sets of the cache.
pub(super) fn tile_row(block: usize) -> usize {
    block + ALIGN
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; ALIGN]);

thread_local! {
    static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with this thread's working memory cut into parts of the given sizes (whole cache lines, unspecified contents).
pub(super) fn with_scratch<const N: usize>(sizes: [usize; N], f: impl FnOnce([*mut f32; N])) {
    SCRATCH.with_borrow_mut(|lines| {
        let total = sizes.iter().map(|&n| align(n) / ALIGN).sum();
        if lines.len() < total {
            lines.resize(total, Line([0.0; ALIGN]));
        }
        let mut next = lines.as_mut_ptr().cast::<f32>();
        f(sizes.map(|n| {
            let part = next;
            next = next.wrapping_add(align(n));
            part
        }));
    });
}

/// A pointer that jobs write through, each to elements of its own.
#[derive(Clone, Copy)]
pub(super) struct Shared(pub *mut f32);
// SAFETY: jobs write disjoint elements; see the callers.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub(super) fn at(self, i: usize) -> *mut f32 {
        self.0.wrapping_add(i)
    }
}

/// Queries, keys, values or the output, with what happens to a row on its way into the product.
pub(super) struct Operand<'a> {
    pub data: &'a [f32],
    pub layout: Layout,
    pub head_dim: usize,
    /// From one packed row to the next.
    pub width: usize,
    /// Weight of the RMSNorm, padded with zeros to `width`.
    pub norm: Option<Vec<f32>>,
    /// Per token `width` times cos, and `width` times sin with the sign of its term: y = x * cos + swapped(x) * sin.
    pub rotary: Option<(Vec<f32>, Vec<f32>)>,
    /// Multiplies the row.
    pub factor: f32,
}

/// The rows of an entry's head.
#[derive(Clone, Copy)]
pub(super) struct Unit {
    batch: [usize; 2],
    head: usize,
    /// The entry's first token among those of the tensor.
    token: usize,
}

impl Unit {
    /// Index of channel 0 of a token, which the entry counts.
    fn index(&self, l: &Layout, token: usize) -> usize {
        let [b0, b1] = self.batch;
        l.offset + b0 * l.batch[0] + b1 * l.batch[1] + (self.token + token) * l.token + self.head * l.head
    }
}

/// A batch entry and one of its heads of keys, with the query heads that read it.
pub(super) struct Group {
    pub entry: Entry,
    /// Number of the entry.
    pub index: usize,
    pub keys: Unit,
    pub heads: Range<usize>,
}

impl Group {
    /// Rows of a query head.
    pub(super) fn queries(&self, head: usize) -> Unit {
        Unit { head, token: self.entry.query, ..self.keys }
    }
}

impl<'a> Operand<'a> {
    /// Rows that go in as they are.
    pub(super) fn plain(data: &'a [f32], layout: Layout, head_dim: usize) -> Self {
        Self { data, layout, head_dim, width: align(head_dim), norm: None, rotary: None, factor: 1.0 }
    }
    fn prepared(mut self, norm: Option<&[f32]>, rotary: Option<&Rotary>, tokens: usize) -> Self {
        let width = self.width;
        self.norm = norm.map(|w| {
            let mut padded = w.to_vec();
            padded.resize(width, 0.0);
            padded
        });
        self.rotary = rotary.map(|r| {
            let half = self.head_dim / 2;
            let mut cos = vec![0.0; tokens * width];
            let mut sin = vec![0.0; tokens * width];
            for t in 0..tokens {
                for i in 0..half {
                    let (c, s) = (r.cos.data()[t * half + i], r.sin.data()[t * half + i]);
                    let at = t * width + 2 * i;
                    cos[at..at + 2].copy_from_slice(&[c, c]);
                    sin[at..at + 2].copy_from_slice(&[-s, s]);
                }
            }
            (cos, sin)
        });
        self
    }
    /// Index of channel 0 of a token, which the entry counts.
    pub(super) fn index(&self, unit: Unit, token: usize) -> usize {
        unit.index(&self.layout, token)
    }
    /// Packs rows: normalised, rotated, multiplied by the factor, padded with zeros to whole vectors.
    ///
    /// # Safety
    /// The rows are inside `data`, `to` holds them all, the processor has the instructions.
    #[inline(always)]
    pub(super) unsafe fn pack<S: Simd>(&self, unit: Unit, rows: Range<usize>, to: *mut f32) {
        let d = self.head_dim;
        for (i, token) in rows.enumerate() {
            let from = self.data.as_ptr().wrapping_add(self.index(unit, token));
            // SAFETY: a row of `data`, a row of `to`, rows of the padded tables.
            unsafe {
                let mut factor = S::splat(self.factor);
                if self.norm.is_some() {
                    factor = S::mul(factor, S::splat(inverse_rms::<S>(from, d)));
                }
                for c in (0..d).step_by(S::LANES) {
                    let mut x = S::load_first(from.add(c), (d - c).min(S::LANES));
                    if let Some(w) = &self.norm {
                        x = S::mul(x, S::load(w.as_ptr().add(c)));
                    }
                    if let Some((cos, sin)) = &self.rotary {
                        let at = token * self.width + c;
                        let turned = S::mul(S::swap_pairs(x), S::load(sin.as_ptr().add(at)));
                        x = S::fma(x, S::load(cos.as_ptr().add(at)), turned);
                    }
                    S::store(to.add(i * self.width + c), S::mul(x, factor));
                }
            }
        }
    }
    /// Packs rows 0..n and transposes them into panels of LANES rows: element (row, channel) is at
    /// row / LANES * LANES * width + channel * LANES + row % LANES; rows n.. of the last panel are zeros.
    ///
    /// # Safety
    /// As for `pack`; `to` holds the rows up to the next multiple of 16, `spare` 16 rows.
    #[inline(always)]
    pub(super) unsafe fn pack_panels<S: Simd>(&self, unit: Unit, n: usize, spare: *mut f32, to: *mut f32) {
        for row in (0..n).step_by(S::LANES) {
            let rows = row..(row + S::LANES).min(n);
            let count = rows.len();
            // SAFETY: the caller's.
            unsafe {
                self.pack::<S>(unit, rows, spare);
                spare.add(count * self.width).write_bytes(0, (S::LANES - count) * self.width);
                transpose_panel::<S>(spare, self.head_dim, self.width, to.add(row * self.width));
            }
        }
    }
}

/// One panel from LANES packed rows.
///
/// # Safety
/// Both hold LANES rows; the processor has the instructions.
#[inline(always)]
pub(super) unsafe fn transpose_panel<S: Simd>(rows: *const f32, head_dim: usize, width: usize, to: *mut f32) {
    for c in (0..head_dim).step_by(S::LANES) {
        // SAFETY: the caller's.
        unsafe { S::transpose(rows.add(c), width, to.add(c * S::LANES), S::LANES) };
    }
}

/// 1 / sqrt(mean of squares + eps) of a row.
///
/// # Safety
/// `row` holds `d` floats; the processor has the instructions.
#[inline(always)]
pub(super) unsafe fn inverse_rms<S: Simd>(row: *const f32, d: usize) -> f32 {
    // SAFETY: the caller's.
    unsafe {
        let mut sum = S::splat(0.0);
        for c in (0..d).step_by(S::LANES) {
            let x = S::load_first(row.add(c), (d - c).min(S::LANES));
            sum = S::fma(x, x, sum);
        }
        1.0 / (S::sum(sum) / d as f32 + NORM_EPS).sqrt()
    }
}

/// The operands of a call, ready for packing. Queries carry log2(e) / sqrt(head_dim), so scores are exponents of 2.
pub(super) struct Operands<'a> {
    pub args: &'a Attention,
    pub extents: Extents,
    pub q: Operand<'a>,
    pub k: Operand<'a>,
    pub v: Operand<'a>,
}

impl<'a> Operands<'a> {
    pub(super) fn new(args: &'a Attention, [q, k, v]: [&'a [f32]; 3], norm: Option<[&[f32]; 2]>) -> Self {
        let (d, extents) = (args.head_dim, args.extents());
        let [rotary_q, rotary_k] = args.rotary.as_ref().map_or([None; 2], |(q, k)| [Some(q), Some(k)]);
        let [queries, keys] = [extents.most_queries(), extents.most_keys()];
        let mut q = Operand::plain(q, args.q, d).prepared(norm.map(|n| n[0]), rotary_q, queries);
        q.factor = LOG2_E / (d as f32).sqrt();
        let k = Operand::plain(k, args.k, d).prepared(norm.map(|n| n[1]), rotary_k, keys);
        Self { args, extents, q, k, v: Operand::plain(v, args.v, d) }
    }
    /// Entries times heads of keys.
    pub(super) fn groups(args: &Attention) -> usize {
        args.batch[0] * args.batch[1] * args.kv_heads
    }
    pub(super) fn group(&self, i: usize) -> Group {
        let args = self.args;
        let (index, head) = (i / args.kv_heads, i % args.kv_heads);
        let (entry, heads) = (self.extents.entry(index), args.heads / args.kv_heads);
        let batch = [index / args.batch[1], index % args.batch[1]];
        let keys = Unit { batch, head, token: entry.key };
        Group { entry, index, keys, heads: head * heads..(head + 1) * heads }
    }
}

/// The output and the logarithms of the row sums; see [`crate::ops::attention::forward`].
///
/// # Safety
/// `args` has been validated against the operands and the weights.
pub(crate) unsafe fn forward(args: &Attention, qkv: [&Tensor; 3], norm: Option<NormWeights<'_>>) -> Forward {
    let mut lse = Tensor::zeros(&args.lse_shape());
    let out = Tensor::build(&args.out_shape, |out| {
        let norm = norm.map(|n| [n.q.data(), n.k.data()]);
        // SAFETY: the caller's; a validated output layout is injective; the processor has what it detects.
        unsafe { forward_on(Isa::detect(), args, qkv.map(Tensor::data), norm, out, lse.data_mut()) }
    });
    Forward { out, lse }
}

/// Computes the output (through `args.out`) and per row the base-2 logarithm of the sum of 2^score, as
/// `args.lse_shape()` says.
///
/// # Safety
/// `args` has been validated against the lengths of all slices; the output layout never meets an element twice; the processor has `isa`.
pub(super) unsafe fn forward_on(
    isa: Isa,
    args: &Attention,
    qkv: [&[f32]; 3],
    norm: Option<[&[f32]; 2]>,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let groups = Operands::groups(args);
    if groups == 0 {
        return;
    }
    let operands = Operands::new(args, qkv, norm);
    let (out, lse) = (Shared(out.as_mut_ptr()), Shared(lse.as_mut_ptr()));
    let groups: Vec<Group> = (0..groups).map(|i| operands.group(i)).collect();
    let blocks = |group: &Group| group.entry.queries.div_ceil(QUERY_BLOCK) * group.heads.len();
    let all: usize = groups.iter().map(|group| blocks(group) * group.entry.keys).sum();
    let mut jobs = Vec::with_capacity(groups.len());
    for group in &groups {
        // Each job packs its keys, so a group is only cut when it is much of the work for a thread.
        let blocks = blocks(group);
        let parts = (2 * rayon::current_num_threads() * blocks * group.entry.keys).div_ceil(all.max(1));
        let run = blocks.div_ceil(parts.max(1)).max(1);
        jobs.extend((0..blocks).step_by(run).map(|first| {
            let blocks = first..(first + run).min(blocks);
            Job { operands: &operands, group, blocks, out, lse }
        }));
    }
    jobs.into_par_iter().for_each(|job| {
        // SAFETY: the caller's; a job writes its own rows only.
        with_scratch(job.scratch(), |parts| unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => job.run_avx512(parts),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => job.run_avx2(parts),
                Isa::Portable => job.run::<Portable>(parts),
            }
        });
    });
}

/// A run of blocks of query rows of one group: the rows of a head, then those of the next.
struct Job<'a> {
    operands: &'a Operands<'a>,
    group: &'a Group,
    blocks: Range<usize>,
    out: Shared,
    lse: Shared,
}

impl Job<'_> {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx2,fma")]
    unsafe fn run_avx512(&self, parts: [*mut f32; 6]) {
        // SAFETY: the caller's.
        unsafe { self.run::<Avx512>(parts) }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn run_avx2(&self, parts: [*mut f32; 6]) {
        // SAFETY: the caller's.
        unsafe { self.run::<Avx2>(parts) }
    }
    /// Sizes of the working memory: spare rows, key panels, values, queries, their weighted sums of values, and a tile of scores.
    fn scratch(&self) -> [usize; 6] {
        let (keys, width) = (self.keys(), self.operands.q.width);
        let rows = [ALIGN, align(keys), keys, QUERY_BLOCK, QUERY_BLOCK].map(|rows| rows * width);
        let [spare, panels, values, queries, sums] = rows;
        [spare, panels, values, queries, sums, QUERY_BLOCK * tile_row(self.key_block())]
    }
    /// Keys of a score tile: the same for all jobs of an entry.
    fn key_block(&self) -> usize {
        key_block(self.group.entry.keys, KEY_BLOCK)
    }
    /// The head and the rows of a block.
    fn block(&self, block: usize) -> (usize, Range<usize>) {
        let queries = self.group.entry.queries;
        let per_head = queries.div_ceil(QUERY_BLOCK);
        let first = block % per_head * QUERY_BLOCK;
        (self.group.heads.start + block / per_head, first..(first + QUERY_BLOCK).min(queries))
    }
    /// Keys that a query sees.
    fn limit(&self, query: usize) -> usize {
        self.operands.extents.limit(&self.group.entry, query)
    }
    /// Keys that any of the rows sees.
    fn keys(&self) -> usize {
        self.blocks.clone().map(|block| self.limit(self.block(block).1.end - 1)).max().unwrap_or(0)
    }
    /// # Safety
    /// The processor has the instructions, the operands were validated, the parts have the sizes of `scratch`.
    #[inline(always)]
    unsafe fn run<S: Simd>(&self, [spare, panels, values, queries, sums, tile]: [*mut f32; 6]) {
        let Operands { args, q, k, v, .. } = self.operands;
        let (keys, width, block) = (self.keys(), q.width, self.key_block());
        let row = tile_row(block);
        // SAFETY: every part holds what is put into it; tile and operand rows are inside.
        unsafe {
            k.pack_panels::<S>(self.group.keys, keys, spare, panels);
            v.pack::<S>(self.group.keys, 0..keys, values);
            for (head, rows) in self.blocks.clone().map(|block| self.block(block)) {
                let (unit, count, seen) = (self.group.queries(head), rows.len(), self.limit(rows.end - 1));
                let mut state = [Online::EMPTY; QUERY_BLOCK];
                q.pack::<S>(unit, rows.clone(), queries);
                for key in (0..seen).step_by(block) {
                    let here = block.min(seen - key);
                    S::product(&Product {
                        rows: count,
                        vecs: here.div_ceil(S::LANES),
                        depth: args.head_dim,
                        a: queries,
                        a_row: width,
                        a_step: 1,
                        b: panels.add(key * width),
                        b_vec: S::LANES * width,
                        b_step: S::LANES,
                        c: tile,
                        c_row: row,
                        add: false,
                    });
                    for (i, state) in state[..count].iter_mut().enumerate() {
                        let own = self.limit(rows.start + i).saturating_sub(key).min(here);
                        let before = state.exponentials::<S>(tile.add(i * row), own, here);
                        if key > 0 && before != 1.0 {
                            multiply::<S>(sums.add(i * width), args.head_dim, before);
                        }
                    }
                    S::product(&Product {
                        rows: count,
                        vecs: args.head_dim.div_ceil(S::LANES),
                        depth: here,
                        a: tile,
                        a_row: row,
                        a_step: 1,
                        b: values.add(key * width),
                        b_vec: S::LANES,
                        b_step: width,
                        c: sums,
                        c_row: width,
                        add: key > 0,
                    });
                }
                let first = args.first_row(self.group.index, head);
                for (i, state) in state[..count].iter().enumerate() {
                    let token = rows.start + i;
                    *self.lse.at(first + token) = state.most + state.sum.log2();
                    self.finish::<S>(unit, token, state, sums.add(i * width));
                }
            }
        }
    }
    /// Divides a row by its sum and writes it; zeros when there was no key.
    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, unit: Unit, token: usize, state: &Online, sums: *const f32) {
        let args = self.operands.args;
        let (d, at, any) = (args.head_dim, unit.index(&args.out, token), self.limit(token) > 0);
        // SAFETY: a row of the output, a row of the sums.
        unsafe {
            let inverse = S::splat(1.0 / state.sum);
            for c in (0..d).step_by(S::LANES) {
                let y = if any { S::mul(S::load(sums.add(c)), inverse) } else { S::splat(0.0) };
                S::store_first(self.out.at(at + c), y, (d - c).min(S::LANES));
            }
        }
    }
}

/// The running softmax of a row: largest score so far and sum of 2^(score - largest).
#[derive(Clone, Copy)]
struct Online {
    most: f32,
    sum: f32,
}

impl Online {
    const EMPTY: Self = Self { most: f32::NEG_INFINITY, sum: 0.0 };

    /// Replaces the next `n` scores by 2^(score - largest), those from there to `all` by 0, and returns the factor for all that was
    /// summed before.
    ///
    /// # Safety
    /// `scores` holds n floats up to the next whole vector, and `all`; the processor has the instructions.
    #[inline(always)]
    unsafe fn exponentials<S: Simd>(&mut self, scores: *mut f32, n: usize, all: usize) -> f32 {
        // SAFETY: the caller's.
        unsafe {
            let end = n.next_multiple_of(S::LANES);
            for i in n..end {
                *scores.add(i) = f32::NEG_INFINITY;
            }
            for i in end..all {
                *scores.add(i) = 0.0;
            }
            let mut most = S::splat(self.most);
            for i in (0..end).step_by(S::LANES) {
                most = S::max(S::load(scores.add(i)), most);
            }
            let most = S::largest(most);
            // Scores of minus infinity only: any finite reference gives them weight 0.
            let reference = if most == f32::NEG_INFINITY { 0.0 } else { most };
            let shift = S::splat(reference);
            let mut sum = S::splat(0.0);
            for i in (0..end).step_by(S::LANES) {
                let p = exp2::<S>(S::sub(S::load(scores.add(i)), shift));
                S::store(scores.add(i), p);
                sum = S::add(sum, p);
            }
            let before =
                if self.most == most { 1.0 } else { S::largest(exp2::<S>(S::splat(self.most - reference))) };
            self.most = most;
            self.sum = self.sum * before + S::sum(sum);
            before
        }
    }
}

/// row *= factor.
#[inline(always)]
unsafe fn multiply<S: Simd>(row: *mut f32, d: usize, factor: f32) {
    for c in (0..d).step_by(S::LANES) {
        // SAFETY: the caller's; rows are padded to whole vectors.
        unsafe { S::store(row.add(c), S::mul(S::load(row.add(c)), S::splat(factor))) };
    }
}
