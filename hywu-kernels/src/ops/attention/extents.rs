//! Which tokens a batch entry has, and which keys a query sees: always the first ones, up to a limit.

use super::{Attention, OP};
use crate::{Error, Result};
use std::ops::Range;

/// Entries of different lengths one behind the other: entry i of the first batch axis has the tokens `offsets[i]..offsets[i + 1]`. Both
/// lists start with 0 and end with the number of tokens in all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ragged {
    /// Offsets of queries.
    pub queries: Vec<usize>,
    /// Offsets of keys and values.
    pub keys: Vec<usize>,
}

/// A query sees the keys up to its own position, and where that is in a span, all keys of the span: text is causal, a picture in it is
/// not. The last query stands where the last key does.
///
/// What a query does not see has weight zero. It may still be multiplied: a value (or in the backward pass a query, a key or a gradient)
/// that is infinite or NaN also reaches rows that do not see it, where they share a tile with rows that do. Keys that no query of an
/// entry may see reach nothing, and scores of unseen keys neither.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Causal {
    /// Spans of key positions, ascending and apart: one list for all entries of the first batch axis, or one for each.
    pub spans: Vec<Vec<Range<usize>>>,
}

/// The tokens of a batch entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The first query among the tensor's tokens, and how many there are.
    pub query: usize,
    pub queries: usize,
    /// The first key, and how many may be seen at all.
    pub key: usize,
    pub keys: usize,
    /// Where the limits of its queries start in [`Extents::limits`].
    pub limits: usize,
}

/// The tokens of every entry, as all devices use them.
#[derive(Clone, Debug)]
pub(crate) struct Extents {
    /// By (batch0, batch1), row-major; empty where all entries are alike.
    pub entries: Vec<Entry>,
    /// What all of them are, where they are alike.
    pub alike: Entry,
    /// Keys that a query sees, never fewer than those of the one before it; empty: all keys of its entry.
    pub limits: Vec<usize>,
}

impl Extents {
    /// Entry number batch0 * size + batch1.
    pub fn entry(&self, i: usize) -> Entry {
        self.entries.get(i).copied().unwrap_or(self.alike)
    }
    /// Keys that a query of an entry sees.
    pub fn limit(&self, entry: &Entry, query: usize) -> usize {
        self.limits.get(entry.limits + query).copied().unwrap_or(entry.keys)
    }
    /// The first query of an entry that sees a key; as many as it has when none does.
    pub fn first_query(&self, entry: &Entry, key: usize) -> usize {
        if self.limits.is_empty() {
            return if key < entry.keys { 0 } else { entry.queries };
        }
        self.limits[entry.limits..][..entry.queries].partition_point(|&limit| limit <= key)
    }
    /// Most queries of an entry.
    pub fn most_queries(&self) -> usize {
        self.entries.iter().map(|e| e.queries).max().unwrap_or(self.alike.queries)
    }
    /// Most keys of an entry.
    pub fn most_keys(&self) -> usize {
        self.entries.iter().map(|e| e.keys).max().unwrap_or(self.alike.keys)
    }
}

/// Limits of `queries` queries that stand before `keys` keys, of which `valid` may be seen.
fn limits(
    spans: &[Range<usize>],
    queries: usize,
    keys: usize,
    valid: usize,
) -> impl Iterator<Item = usize> + '_ {
    (keys - queries..keys).map(move |at| {
        let span = spans.partition_point(|s| s.end <= at);
        let end = spans.get(span).filter(|s| s.start <= at).map_or(at + 1, |s| s.end);
        end.min(valid)
    })
}

impl Attention {
    /// The tokens of an entry of the first batch axis: queries and keys, those that are masked by their length too.
    pub(crate) fn tokens(&self, b0: usize) -> [Range<usize>; 2] {
        match &self.ragged {
            Some(r) => [r.queries[b0]..r.queries[b0 + 1], r.keys[b0]..r.keys[b0 + 1]],
            None => [0..self.queries, 0..self.keys],
        }
    }

    /// Where the rows of an entry's query head start in [`Forward::lse`](super::Forward::lse).
    pub(crate) fn first_row(&self, i: usize, head: usize) -> usize {
        let (b0, b1) = (i / self.batch[1], i % self.batch[1]);
        // Ragged entries share the axis of the tokens.
        let batch = if self.ragged.is_some() { b1 } else { i };
        (batch * self.heads + head) * self.queries + self.tokens(b0)[0].start
    }

    /// For validated arguments.
    pub(crate) fn extents(&self) -> Extents {
        // Ragged entries, if there are any, are not alike.
        let [queries, keys] = if self.ragged.is_some() { [0; 2] } else { [self.queries, self.keys] };
        let alike = Entry { query: 0, queries, key: 0, keys, limits: 0 };
        let mut extents = Extents { entries: Vec::new(), alike, limits: Vec::new() };
        let [size0, size1] = self.batch;
        // One list for all entries that are alike otherwise.
        let shared = self.ragged.is_none() && self.key_lengths.is_none();
        if let (true, Some(Causal { spans })) = (shared && size0 > 0, &self.causal)
            && spans.len() <= 1
        {
            let spans = spans.first().map_or(&[][..], |s| s);
            extents.limits = limits(spans, self.queries, self.keys, self.keys).collect();
        } else if !shared || self.causal.is_some() {
            for b0 in 0..size0 {
                let [queries, keys] = self.tokens(b0);
                for b1 in 0..size1 {
                    let valid = self.key_lengths.as_ref().map_or(keys.len(), |n| n[b0 * size1 + b1]);
                    extents.entries.push(Entry {
                        query: queries.start,
                        queries: queries.len(),
                        key: keys.start,
                        keys: valid,
                        limits: extents.limits.len(),
                    });
                    if let Some(causal) = &self.causal {
                        let spans = causal.spans.get(b0).or(causal.spans.first()).map_or(&[][..], |s| s);
                        extents.limits.extend(limits(spans, queries.len(), keys.len(), valid));
                    }
                }
            }
        }
        extents
    }

    /// Checks lengths, offsets and spans.
    pub(super) fn validate_extents(&self) -> Result<()> {
        let invalid = |text: String| Err(Error::invalid(OP, text));
        let [size0, size1] = self.batch;
        if let Some(lengths) = &self.key_lengths {
            let entries = size0.saturating_mul(size1);
            if lengths.len() != entries {
                return Err(Error::shape(OP, "key_lengths", &[lengths.len()], format!("[{entries}]")));
            }
            if let Some(n) = lengths.iter().find(|&&n| n > self.keys) {
                return invalid(format!("a key length is {n}, but there are {} keys", self.keys));
            }
        }
        if let Some(ragged) = &self.ragged {
            if self.key_lengths.is_some() {
                return invalid("there are offsets of the entries' keys and lengths of them too".to_owned());
            }
            for (what, offsets, tokens) in
                [("queries", &ragged.queries, self.queries), ("keys", &ragged.keys, self.keys)]
            {
                if offsets.len() != size0 + 1 {
                    let text = format!("[{}]", size0 + 1);
                    return Err(Error::shape(OP, "offsets of entries", &[offsets.len()], text));
                }
                if offsets[0] != 0 || offsets[size0] != tokens || !offsets.is_sorted() {
                    return invalid(format!(
                        "offsets of {what} are {offsets:?}, expected 0 to {tokens} in ascending order"
                    ));
                }
            }
            if [&self.q, &self.k, &self.v, &self.out].iter().any(|l| l.batch[0] != 0) {
                let text = "entries one behind the other have no stride of the first batch axis, it is 0";
                return invalid(text.to_owned());
            }
        }
        if let Some(Causal { spans }) = &self.causal {
            if spans.len() > 1 && spans.len() != size0 {
                let expected = format!("[1] or [{size0}]");
                return Err(Error::shape(OP, "lists of spans", &[spans.len()], expected));
            }
            for b0 in 0..size0 {
                let [queries, keys] = self.tokens(b0).map(|t| t.len());
                if queries > keys {
                    return invalid(format!(
                        "there are {queries} queries and {keys} keys: a causal query stands at a key"
                    ));
                }
                let spans = spans.get(b0).or(spans.first()).map_or(&[][..], |s| s);
                let good = spans.iter().all(|s| s.start < s.end && s.end <= keys)
                    && spans.windows(2).all(|w| w[0].end <= w[1].start);
                if !good {
                    return invalid(format!(
                        "spans {spans:?} are not ascending, apart and within {keys} keys"
                    ));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "lists of spans")]
mod tests {
    use super::*;
    use crate::ops::attention::Layout;

    fn args(batch: [usize; 2], queries: usize, keys: usize) -> Attention {
        let layout = Layout { offset: 0, batch: [0, 0], token: 8, head: 8 };
        Attention {
            batch,
            queries,
            keys,
            heads: 1,
            kv_heads: 1,
            head_dim: 8,
            q: layout,
            k: layout,
            v: layout,
            out: layout,
            out_shape: vec![queries, 8],
            key_lengths: None,
            ragged: None,
            causal: None,
            rotary: None,
        }
    }

    fn seen(args: &Attention) -> Vec<Vec<usize>> {
        args.validate_extents().expect("good");
        let extents = args.extents();
        let entry = |i| {
            let e = extents.entry(i);
            (0..e.queries).map(|q| extents.limit(&e, q)).collect()
        };
        (0..args.batch[0] * args.batch[1]).map(entry).collect()
    }

    #[test]
    fn without_a_mask_there_are_no_tables() {
        let extents = args([2, 3], 4, 5).extents();
        assert!(extents.entries.is_empty() && extents.limits.is_empty());
        assert_eq!(seen(&args([2, 1], 2, 5)), [[5, 5], [5, 5]]);
    }

    #[test]
    fn the_last_query_stands_at_the_last_key() {
        let causal = Some(Causal::default());
        let a = Attention { causal, ..args([2, 1], 3, 5) };
        assert_eq!(seen(&a), [[3, 4, 5], [3, 4, 5]]);
        assert!(a.extents().entries.is_empty());
        let e = a.extents().entry(1);
        assert_eq!([0, 2, 3, 4, 5].map(|key| a.extents().first_query(&e, key)), [0, 0, 1, 2, 3]);
    }

    #[test]
    fn a_span_sees_itself_whole() {
        let spans = vec![vec![1..4, 4..6]];
        let a = Attention { causal: Some(Causal { spans }), ..args([1, 1], 7, 7) };
        assert_eq!(seen(&a), [[1, 4, 4, 4, 6, 6, 7]]);
        let lengths = Attention { key_lengths: Some(vec![5, 0]), batch: [1, 2], ..a };
        assert_eq!(seen(&lengths), [[1, 4, 4, 4, 5, 5, 5], [0; 7]]);
    }

    #[test]
    fn every_entry_may_have_spans_of_its_own() {
        let spans = vec![vec![0..2], vec![1..3]];
        let a = Attention { causal: Some(Causal { spans }), ..args([2, 1], 3, 3) };
        assert_eq!(seen(&a), [[2, 2, 3], [1, 3, 3]]);
    }

    #[test]
    fn ragged_entries_lie_one_behind_the_other() {
        let ragged = Ragged { queries: vec![0, 2, 2, 5], keys: vec![0, 3, 4, 8] };
        let a = Attention { ragged: Some(ragged), ..args([3, 1], 5, 8) };
        assert_eq!(seen(&a), [vec![3, 3], vec![], vec![4, 4, 4]]);
        let extents = a.extents();
        assert_eq!(extents.entry(2), Entry { query: 2, queries: 3, key: 4, keys: 4, limits: 0 });
        assert_eq!([extents.most_queries(), extents.most_keys()], [3, 4]);
        let causal = Attention { causal: Some(Causal::default()), ..a };
        assert_eq!(seen(&causal), [vec![2, 3], vec![], vec![2, 3, 4]]);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let refused = |a: Attention, why: &str| {
            let text = a.validate_extents().expect_err("refused").to_string();
            assert!(text.contains(why), "{text}");
        };
        let good = args([2, 1], 4, 4);
        let ragged = |queries: &[usize], keys: &[usize]| {
            Some(Ragged { queries: queries.to_vec(), keys: keys.to_vec() })
        };
        let spans = |spans: &[Range<usize>]| Some(Causal { spans: vec![spans.to_vec()] });
        refused(Attention { key_lengths: Some(vec![5, 1]), ..good.clone() }, "key length is 5");
        refused(Attention { key_lengths: Some(vec![5]), ..good.clone() }, "[2]");
        refused(Attention { ragged: ragged(&[0, 4], &[0, 2, 4]), ..good.clone() }, "[3]");
        refused(Attention { ragged: ragged(&[0, 2, 4], &[0, 5, 4]), ..good.clone() }, "offsets of keys");
        refused(Attention { ragged: ragged(&[0, 2, 3], &[0, 2, 4]), ..good.clone() }, "offsets of queries");
        let both = Attention { key_lengths: Some(vec![1, 1]), ..good.clone() };
        refused(Attention { ragged: ragged(&[0, 2, 4], &[0, 2, 4]), ..both }, "lengths of them too");
        let mut stride = Attention { ragged: ragged(&[0, 2, 4], &[0, 2, 4]), ..good.clone() };
        stride.k.batch[0] = 8;
        refused(stride, "stride of the first batch axis");
        refused(Attention { causal: spans(&[2..2]), ..good.clone() }, "spans");
        refused(Attention { causal: spans(&[2..5]), ..good.clone() }, "spans");
        refused(Attention { causal: spans(&[1..3, 2..4]), ..good.clone() }, "spans");
        refused(Attention { causal: Some(Causal { spans: vec![vec![]; 3] }), ..good.clone() }, "[1] or [2]");
        refused(Attention { causal: spans(&[]), queries: 5, ..good }, "5 queries and 4 keys");
    }
}
