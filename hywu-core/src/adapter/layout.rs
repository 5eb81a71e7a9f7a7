//! Fused modules and their parts: one low-rank pair for several projections of the same input, or one for each.

use super::matrices::Pair;
use crate::{Error, Result};
use ndarray::{Array2, Axis, concatenate, s};
use std::ops::Range;

/// Where the rows of each part lie in a fused output of `out` rows: in groups, each holding `rows[i]` rows of every part i. One group
/// is [q | k | v]; a group a key/value head is [its q heads | k | v], over and over (FORMAT.md section 7).
fn ranges(rows: &[usize], out: usize) -> Result<Vec<Vec<Range<usize>>>> {
    let group: usize = rows.iter().sum();
    if rows.contains(&0) || !out.is_multiple_of(group) {
        let what = format!("{out} rows are no whole number of groups of {rows:?} rows");
        return Err(Error::Adapter(what));
    }
    let starts = rows.iter().scan(0, |at, n| {
        *at += n;
        Some(*at - n)
    });
    let part = |(start, &n): (usize, &usize)| {
        (0..out / group).map(move |g| g * group + start..g * group + start + n)
    };
    Ok(starts.zip(rows).map(|x| part(x).collect()).collect())
}

/// Equal parts of `out` rows where nothing else is said.
fn rows_of(rows: Option<&[usize]>, parts: usize, out: usize) -> Result<Vec<usize>> {
    match rows {
        Some(rows) => Ok(rows.to_vec()),
        None if out.is_multiple_of(parts) => Ok(vec![out / parts; parts]),
        None => Err(Error::Adapter(format!("{out} rows are not {parts} equal parts"))),
    }
}

/// The parts of a fused pair, all with its lora_a: their outputs are rows of its output.
pub(super) fn split(pair: &Pair, parts: usize, rows: Option<&[usize]>) -> Result<Vec<Pair>> {
    let rows = rows_of(rows, parts, pair.b.nrows())?;
    let part = |ranges: &Vec<Range<usize>>| -> Result<Pair> {
        let views: Vec<_> = ranges.iter().map(|r| pair.b.slice(s![r.clone(), ..])).collect();
        let b = concatenate(Axis(0), &views).map_err(|e| Error::Adapter(e.to_string()))?;
        Ok(Pair { a: pair.a.clone(), b })
    };
    ranges(&rows, pair.b.nrows())?.iter().map(part).collect()
}

/// Rows of each part of a fused output of `out` rows.
pub(super) fn heights(rows: Option<&[usize]>, parts: usize, out: usize) -> Result<Vec<usize>> {
    let places = ranges(&rows_of(rows, parts, out)?, out)?;
    Ok(places.iter().map(|place| place.iter().map(Range::len).sum()).collect())
}

/// One pair for all parts, of which at least one must be there; the others do nothing. Where those that are there have the same lora_a
/// to the bit, as [`split`] leaves them, it stays; otherwise as [`blocks`].
pub(super) fn join(parts: &[Option<&Pair>], rows: Option<&[usize]>) -> Result<Pair> {
    let parts = filled(parts, rows)?;
    let bits = |p: &Pair| p.a.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let mut there = parts.iter().filter(|p| p.rank() > 0);
    let first = there.next();
    let shared = first.filter(|f| there.all(|p| p.a.dim() == f.a.dim() && bits(p) == bits(f)));
    fuse(&parts, rows, shared)
}

/// Pairs of rank 0 for parts that are not there: as high as `rows` say beside the others, or as the others where all are equally high.
fn filled(parts: &[Option<&Pair>], rows: Option<&[usize]>) -> Result<Vec<Pair>> {
    let there: Vec<(usize, &Pair)> = (0..).zip(parts).filter_map(|(i, p)| Some((i, (*p)?))).collect();
    let Some((first, lead)) = there.first() else { return Err(Error::Adapter("no part is there".into())) };
    let equal = there.iter().all(|(_, p)| p.b.nrows() == lead.b.nrows());
    let empty = |i: usize| {
        let out = match rows.and_then(|rows| Some((*rows.get(i)?, *rows.get(*first)?))) {
            Some((own, leads)) => lead.b.nrows() / leads * own,
            None if equal => lead.b.nrows(),
            None => {
                let what = "a part is not there, and as the others differ in height its own is not known; give the rows of the parts";
                return Err(Error::Adapter(what.into()));
            }
        };
        Ok(Pair { a: Array2::zeros((0, lead.a.ncols())), b: Array2::zeros((out, 0)) })
    };
    (0..).zip(parts).map(|(i, part)| part.map_or_else(|| empty(i), |p| Ok(p.clone()))).collect()
}

/// One pair whose lora_a is that of all parts one below the other and whose lora_b has the parts' own in the rows and ranks of each and
/// zeros elsewhere: the rank is the sum of the ranks, and nothing is lost.
pub(super) fn blocks(parts: &[Pair], rows: Option<&[usize]>) -> Result<Pair> {
    fuse(parts, rows, None)
}

/// `shared`: a part whose lora_a all others have too, or are of rank 0.
fn fuse(parts: &[Pair], rows: Option<&[usize]>, shared: Option<&Pair>) -> Result<Pair> {
    let bad = |what: String| Err(Error::Adapter(what));
    let inner = parts[0].a.ncols();
    if let Some(other) = parts.iter().find(|p| p.a.ncols() != inner) {
        return bad(format!("parts of one fused module read {inner} and {} values", other.a.ncols()));
    }
    let own: Vec<usize> = parts.iter().map(|p| p.b.nrows()).collect();
    let out = own.iter().sum();
    let rows = rows.unwrap_or(&own);
    let places = ranges(rows, out)?;
    if let Some((n, place)) =
        own.iter().zip(&places).find(|(n, place)| place.iter().map(Range::len).sum::<usize>() != **n)
    {
        let wanted: usize = place.iter().map(Range::len).sum();
        return bad(format!(
            "parts of {own:?} rows don't fit groups of {rows:?}: {n} where {wanted} are expected"
        ));
    }
    let rank = shared.map_or_else(|| parts.iter().map(Pair::rank).sum(), Pair::rank);
    let mut b = Array2::zeros((out, rank));
    let mut column = 0;
    for (part, place) in parts.iter().zip(&places) {
        let mut row = 0;
        for range in place {
            let from = part.b.slice(s![row..row + range.len(), ..]);
            b.slice_mut(s![range.clone(), column..column + part.rank()]).assign(&from);
            row += range.len();
        }
        column += if shared.is_some() { 0 } else { part.rank() };
    }
    let a = match shared {
        Some(part) => part.a.clone(),
        None => {
            let views: Vec<_> = parts.iter().map(|p| p.a.view()).collect();
            concatenate(Axis(0), &views).map_err(|e| Error::Adapter(e.to_string()))?
        }
    };
    Ok(Pair { a, b })
}

/// Undoes [`blocks`]; a pair that is not made so is [`split`].
pub(super) fn unblock(pair: &Pair, parts: usize, rows: Option<&[usize]>) -> Result<Vec<Pair>> {
    let all = split(pair, parts, rows)?;
    let Some(own) = own_columns(&all, pair.rank()) else { return Ok(all) };
    let block = |(part, own): (&Pair, Range<usize>)| Pair {
        a: part.a.slice(s![own.clone(), ..]).to_owned(),
        b: part.b.slice(s![.., own]).to_owned(),
    };
    Ok(all.iter().zip(own).map(block).collect())
}

/// The ranks that each part has to itself, if they have: as many for each if that is possible, otherwise from the first one that it
/// uses on.
fn own_columns(parts: &[Pair], rank: usize) -> Option<Vec<Range<usize>>> {
    let n = parts.len();
    let used = |part: usize, k: usize| parts[part].b.column(k).iter().any(|&x| x != 0.0);
    let fits = |own: &[Range<usize>]| {
        own.iter()
            .enumerate()
            .all(|(i, ks)| ks.clone().all(|k| (0..n).all(|part| part == i || !used(part, k))))
    };
    if rank.is_multiple_of(n) {
        let equal: Vec<_> = (0..n).map(|i| i * (rank / n)..(i + 1) * (rank / n)).collect();
        if fits(&equal) {
            return Some(equal);
        }
    }
    let mut own = Vec::new();
    let mut start = 0;
    for part in 1..=n {
        let end = if part == n { rank } else { (start + 1..rank).find(|&k| used(part, k))? };
        own.push(start..end);
        start = end;
    }
    fits(&own).then_some(own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pair(rank: usize, inner: usize, out: usize, seed: u64) -> Pair {
        let mut values = vec![0.0; rank * (inner + out)];
        crate::Philox::new(seed).fill_normal(0, 0, &mut values);
        let (a, b) = values.split_at(rank * inner);
        Pair {
            a: Array2::from_shape_vec((rank, inner), a.to_vec()).expect("as many"),
            b: Array2::from_shape_vec((out, rank), b.to_vec()).expect("as many"),
        }
    }

    #[test]
    fn grouped_heads_lie_one_behind_the_other() {
        // Two groups of 2 q rows, 1 k row and 1 v row.
        let fused = Pair { a: Array2::ones((1, 3)), b: Array2::from_shape_fn((8, 1), |(i, _)| i as f32) };
        let parts = split(&fused, 3, Some(&[2, 1, 1])).expect("they fit");
        let rows: Vec<Vec<f32>> = parts.iter().map(|p| p.b.iter().copied().collect()).collect();
        assert_eq!(rows, [vec![0.0, 1.0, 4.0, 5.0], vec![2.0, 6.0], vec![3.0, 7.0]]);
        assert!(split(&fused, 3, None).is_err() && split(&fused, 3, Some(&[2, 1, 2])).is_err());
        assert!(split(&fused, 2, Some(&[8, 0])).is_err());
    }

    proptest! {
        #[test]
        fn parts_and_whole_are_the_same_operator(
            (rank, inner, seed) in (1_usize..5, 1_usize..9, any::<u64>()),
            rows in prop::collection::vec(1_usize..4, 2..5),
            ranks in [1_usize..5, 1_usize..5, 1_usize..5, 1_usize..5, 1_usize..5],
            groups in 1_usize..4,
        ) {
            let out = groups * rows.iter().sum::<usize>();
            let fused = pair(rank, inner, out, seed);
            let parts = split(&fused, rows.len(), Some(&rows)).expect("they fit");
            let all: Vec<Option<&Pair>> = parts.iter().map(Some).collect();
            prop_assert_eq!(&join(&all, Some(&rows)).expect("they fit"), &fused);
            // Parts of their own: as blocks, whose product is that of each in its rows.
            let own: Vec<Pair> =
                rows.iter().zip(1..).map(|(n, i)| pair(ranks[i as usize], inner, n * groups, seed ^ i)).collect();
            let whole = blocks(&own, Some(&rows)).expect("they fit");
            let product = split(&Pair { a: Array2::eye(inner), b: whole.b.dot(&whole.a) }, rows.len(), Some(&rows));
            for (part, product) in own.iter().zip(product.expect("they fit")) {
                let difference = part.b.dot(&part.a) - product.b;
                prop_assert!(difference.iter().all(|x| x.abs() <= 1e-5));
            }
            prop_assert_eq!(&unblock(&whole, rows.len(), Some(&rows)).expect("they fit"), &own);
            // A part that is not there does nothing, and the others are what they were.
            let absent = seed as usize % own.len();
            let there: Vec<Option<&Pair>> =
                own.iter().enumerate().map(|(i, p)| (i != absent).then_some(p)).collect();
            let whole = join(&there, Some(&rows)).expect("they fit");
            prop_assert_eq!(whole.rank(), own.iter().map(Pair::rank).sum::<usize>() - own[absent].rank());
            let product = split(&Pair { a: Array2::eye(inner), b: whole.b.dot(&whole.a) }, rows.len(), Some(&rows));
            for ((i, part), product) in own.iter().enumerate().zip(product.expect("they fit")) {
                let expected = if i == absent { Array2::zeros(product.b.dim()) } else { part.b.dot(&part.a) };
                prop_assert!((expected - product.b).iter().all(|x| x.abs() <= 1e-5));
            }
            // What is no blocks keeps its rank in every part.
            prop_assert_eq!(unblock(&fused, rows.len(), Some(&rows)).expect("they fit"), parts);
        }
    }
}
