//! How the rows of a linear layer divide: whose weight and whose adapter each of them has.

use super::OP;
use crate::{Error, Result, cuda::low_rank_linear::Tables};
use std::{borrow::Cow, collections::HashSet, ops::Range, sync::Arc};

/// A run of contiguous rows with one weight, and with one adapter or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Length of the run.
    pub rows: usize,
    /// Index of the weight (expert) that its rows have.
    pub weight: usize,
    /// Index of the adapter that its rows have.
    pub adapter: Option<usize>,
}

/// All rows of a linear layer, in the order of the segments. Clones share what devices keep about it, so make one for a batch and use
/// it for all of its layers.
#[derive(Clone, Debug)]
pub struct Segments(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// None of them empty.
    segments: Vec<Segment>,
    rows: usize,
    /// Adapters that the rows divide over evenly, in order, with one weight for all.
    even: Option<usize>,
    tables: Tables,
}

impl PartialEq for Segments {
    fn eq(&self, other: &Self) -> bool {
        self.0.segments == other.0.segments
    }
}

impl Segments {
    /// Takes the segments in the order of their rows; those without rows are left out.
    ///
    /// # Errors
    /// No row at all; a weight whose rows lie apart; an adapter in more than one segment.
    pub fn new(segments: &[Segment]) -> Result<Self> {
        let (mut weights, mut adapters, mut end, mut last) = (HashSet::new(), HashSet::new(), 0usize, None);
        let segments: Vec<Segment> = segments.iter().copied().filter(|s| s.rows > 0).collect();
        for (i, s) in segments.iter().enumerate() {
            let refused = |what: String| Err(Error::invalid(OP, format!("segment {i} at row {end}: {what}")));
            if last != Some(s.weight) && !weights.insert(s.weight) {
                return refused(format!(
                    "weight {} has other rows before; they must be contiguous",
                    s.weight
                ));
            }
            if let Some(adapter) = s.adapter
                && !adapters.insert(adapter)
            {
                return refused(format!("adapter {adapter} has a segment already; it can have one"));
            }
            last = Some(s.weight);
            end = match end.checked_add(s.rows) {
                Some(end) => end,
                None => return refused(format!("{} rows more are too many", s.rows)),
            };
        }
        if segments.is_empty() {
            return Err(Error::invalid(OP, "the segments have no rows"));
        }
        Ok(Self::of(segments))
    }

    /// One weight, and `adapters` that divide the rows evenly, in order; none: rows without adapters.
    ///
    /// # Errors
    /// No rows, or a number that doesn't divide by the adapters.
    pub fn even(rows: usize, adapters: usize) -> Result<Self> {
        if rows == 0 || !rows.is_multiple_of(adapters.max(1)) {
            let what = format!("{rows} rows don't divide evenly over {adapters} adapters");
            return Err(Error::invalid(OP, what));
        }
        Ok(Self::divided(rows, adapters))
    }

    fn divided(rows: usize, adapters: usize) -> Self {
        let each = rows / adapters.max(1);
        let segment = |i| Segment { rows: each, weight: 0, adapter: (adapters > 0).then_some(i) };
        Self::of((0..adapters.max(1)).map(segment).collect())
    }

    fn of(segments: Vec<Segment>) -> Self {
        let rows = segments.iter().map(|s| s.rows).sum();
        let each = segments.first().map_or(0, |s| s.rows);
        let plain = segments.iter().all(|s| s.weight == 0 && s.adapter.is_none());
        let in_order = |(i, s): (usize, &Segment)| *s == Segment { rows: each, weight: 0, adapter: Some(i) };
        let even = match segments.iter().enumerate().all(in_order) {
            true => Some(segments.len()),
            false => plain.then_some(0),
        };
        Self(Arc::new(Inner { segments, rows, even, tables: Tables::default() }))
    }

    /// These, or an even division where there are none.
    pub(crate) fn cover(segments: Option<&Self>, rows: usize, adapters: usize) -> Cow<'_, Self> {
        segments.map_or_else(|| Cow::Owned(Self::divided(rows, adapters)), Cow::Borrowed)
    }

    /// Rows in all.
    pub fn rows(&self) -> usize {
        self.0.rows
    }
    /// The segments that have rows.
    pub fn as_slice(&self) -> &[Segment] {
        &self.0.segments
    }
    /// Weights that there must be: one more than the highest index.
    pub fn weights(&self) -> usize {
        self.0.segments.iter().map(|s| s.weight + 1).max().unwrap_or(0)
    }
    /// Adapters that there must be: one more than the highest index.
    pub fn adapters(&self) -> usize {
        self.0.segments.iter().filter_map(|s| s.adapter).map(|i| i + 1).max().unwrap_or(0)
    }
    /// Each with the first of its rows.
    pub(crate) fn placed(&self) -> impl Iterator<Item = (usize, Segment)> {
        self.0.segments.iter().scan(0, |end, s| {
            let first = *end;
            *end += s.rows;
            Some((first, *s))
        })
    }
    /// The weights that have rows: index, rows, segments.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (usize, Range<usize>, &[Segment])> {
        self.0.segments.chunk_by(|a, b| a.weight == b.weight).scan(0, |end, run| {
            let first = *end;
            *end += run.iter().map(|s| s.rows).sum::<usize>();
            Some((run[0].weight, first..*end, run))
        })
    }
    /// The number of adapters, where they divide the rows of the only weight evenly and in order.
    pub(crate) fn is_even(&self) -> Option<usize> {
        self.0.even
    }
    /// What devices keep about it.
    pub(crate) fn tables(&self) -> &Tables {
        &self.0.tables
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(rows: usize, weight: usize, adapter: Option<usize>) -> Segment {
        Segment { rows, weight, adapter }
    }

    #[test]
    fn rows_are_counted_and_empty_segments_dropped() {
        let list =
            [segment(3, 2, Some(4)), segment(0, 9, Some(4)), segment(5, 2, None), segment(2, 0, Some(0))];
        let segments = Segments::new(&list).expect("good segments");
        assert_eq!((segments.rows(), segments.weights(), segments.adapters()), (10, 3, 5));
        let placed: Vec<_> = segments.placed().map(|(first, s)| (first, s.rows)).collect();
        assert_eq!(placed, [(0, 3), (3, 5), (8, 2)]);
        let runs: Vec<_> = segments.runs().map(|(w, rows, run)| (w, rows, run.len())).collect();
        assert_eq!(runs, [(2, 0..8, 2), (0, 8..10, 1)]);
        assert_eq!(segments.is_even(), None);
    }

    #[test]
    fn an_even_division_is_recognised() {
        let even = |list: &[Segment]| Segments::new(list).expect("good segments").is_even();
        assert_eq!(even(&[segment(4, 0, Some(0)), segment(4, 0, Some(1))]), Some(2));
        assert_eq!(even(&[segment(4, 0, None), segment(3, 0, None)]), Some(0));
        assert_eq!(even(&[segment(4, 0, Some(1)), segment(4, 0, Some(0))]), None);
        assert_eq!(even(&[segment(4, 0, Some(0)), segment(5, 0, Some(1))]), None);
        assert_eq!(even(&[segment(4, 0, Some(0)), segment(4, 0, None)]), None);
        assert_eq!(even(&[segment(4, 1, None)]), None);
        assert_eq!(Segments::even(12, 3).expect("divides").is_even(), Some(3));
        assert_eq!(Segments::even(12, 0).expect("divides").is_even(), Some(0));
    }

    #[test]
    fn what_can_not_be_is_refused() {
        let refused = |list: &[Segment], why: &str| {
            let text = Segments::new(list).expect_err("refused").to_string();
            assert!(text.contains(why), "{text}");
        };
        refused(&[], "no rows");
        refused(&[segment(0, 0, None)], "no rows");
        refused(&[segment(1, 0, None), segment(1, 1, None), segment(1, 0, None)], "weight 0");
        refused(&[segment(1, 0, Some(2)), segment(1, 1, Some(2))], "adapter 2");
        refused(&[segment(usize::MAX, 0, None), segment(1, 0, None)], "too many");
        assert!(Segments::even(7, 2).is_err() && Segments::even(0, 2).is_err());
    }
}
