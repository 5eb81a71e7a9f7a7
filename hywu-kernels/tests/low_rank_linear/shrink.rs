//! scale X A^T by itself: every element, what lies between the rows, and what no bit may depend on.

use hywu_core::Dtype;
use hywu_kernels::{
    Tensor,
    ops::low_rank_linear::{Segment, Segments, Shrink},
    testing::{Place, for_each_place, random, shrunk_rows},
};

const SCALE: f32 = -0.375;
const ROWS: [usize; 7] = [1, 15, 16, 17, 31, 33, 129];

fn segments(list: &[(usize, Option<usize>)]) -> Segments {
    let segment = |&(rows, adapter)| Segment { rows, weight: 0, adapter };
    Segments::new(&list.iter().map(segment).collect::<Vec<_>>()).expect("good segments")
}

/// Lengths around those of a tile, adapters in another order than the rows, and rows without adapter among them.
fn ragged() -> Segments {
    let adapter = [Some(3), Some(0), None, Some(5), Some(1), Some(2), Some(4)];
    segments(&ROWS.into_iter().zip(adapter).collect::<Vec<_>>())
}

fn shrunk(place: Place, x: &Tensor, a: &Tensor, of: Option<&Segments>) -> Tensor {
    let (x, adapters, a) = (place.tensor(x), a.shape()[0], place.tensor(a));
    let s = Shrink { a: &a, scale: SCALE, segments: of }.of(&x).expect("good shapes");
    shrunk_rows(&s, of, adapters)
}

/// Every element is as near as its rounding and a sum in f32 allow.
fn check(place: Place, x: &Tensor, a: &Tensor, of: Option<&Segments>) {
    let (adapters, ranks, inner) = (a.shape()[0], a.shape()[1], a.shape()[2]);
    let rows = x.numel() / inner;
    let got = shrunk(place, x, a, of);
    let (x, a) = (place.rounded(x), place.rounded(a));
    let even = Segments::even(rows, adapters);
    let of = of.unwrap_or_else(|| even.as_ref().expect("divides"));
    let owners = of.as_slice().iter().flat_map(|s| std::iter::repeat_n(s.adapter, s.rows));
    let unit = if place.dtype == Dtype::Bf16 { 1.0 / 256.0 } else { 0.0 };
    for (row, adapter) in owners.enumerate() {
        for r in 0..ranks {
            let got = f64::from(got.data()[row * ranks + r]);
            let Some(adapter) = adapter else {
                assert_eq!(got, 0.0, "row {row} has no adapter");
                continue;
            };
            let a = &a[(adapter * ranks + r) * inner..][..inner];
            let terms = x[row * inner..][..inner].iter().zip(a).map(|(x, a)| x * a * f64::from(SCALE));
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
            let error = (got - sum).abs();
            assert!(
                error <= unit * sum.abs() + 1e-5 * size,
                "at {place:?}: row {row}, rank {r} of {ranks}, {inner} columns: {got}, expected {sum}"
            );
        }
    }
}

#[test]
fn ragged_segments_match_the_oracle() {
    let of = ragged();
    for_each_place(|place| {
        let check = |inner, ranks| {
            let (x, a) = (random(1, &[of.rows(), inner]), random(2, &[6, ranks, inner]));
            check(place, &x, &a, Some(&of));
        };
        [8, 24, 63, 64, 65, 192, 513, 2056].into_iter().for_each(|inner| check(inner, 7));
        for ranks in [1, 4, 16, 17, 64, 128] {
            check(72, ranks);
            check(65, ranks);
        }
    });
}

#[test]
fn an_even_division_matches_the_oracle() {
    for_each_place(|place| {
        for (batch, tokens, adapters, inner, ranks) in [
            (1, 1, 1, 8, 1),
            (4, 5, 2, 200, 16),
            (3, 40, 3, 33, 20),
            (3, 128, 3, 64, 32),
            (1, 4128, 1, 16, 17),
        ] {
            check(place, &random(1, &[batch, tokens, inner]), &random(2, &[adapters, ranks, inner]), None);
        }
    });
}

/// Rows `range` of x.
fn rows(x: &Tensor, range: std::ops::Range<usize>) -> Tensor {
    let width = x.dim_back(1);
    Tensor::new(&[range.len(), width], x.data()[range.start * width..range.end * width].to_vec())
        .expect("rows")
}

/// Whatever the height of the blocks for them all, and wherever in a block an instance starts: its bits are those that it has alone.
#[test]
fn an_instance_has_its_bits_whatever_the_others() {
    let list = [(33, Some(2)), (4100, Some(0)), (17, None), (129, Some(3)), (5, Some(1))];
    let (all, total) = (segments(&list), 4284);
    for_each_place(|place| {
        for (inner, ranks) in [(64, 4), (24, 17), (21, 3)] {
            let (x, a) = (random(1, &[total, inner]), random(2, &[4, ranks, inner]));
            let s = shrunk(place, &x, &a, Some(&all));
            let again = shrunk(place, &x, &a, Some(&all));
            assert_eq!(s.data(), again.data(), "two runs at {place:?}");
            let mut first = 0;
            for (count, adapter) in list {
                let range = first..first + count;
                first += count;
                let Some(adapter) = adapter else { continue };
                let alone = segments(&[(count, Some(adapter))]);
                let one = shrunk(place, &rows(&x, range.clone()), &a, Some(&alone));
                assert_eq!(rows(&s, range).data(), one.data(), "adapter {adapter} at {place:?}");
            }
        }
    });
}

/// A is read for its own rows alone: what it has of NaN or infinity reaches neither the others nor the zeros between.
#[test]
fn nan_stays_in_its_instance() {
    let of = segments(&[(20, Some(0)), (7, Some(1)), (20, Some(2)), (3, None)]);
    for_each_place(|place| {
        for inner in [40, 41] {
            let (x, mut a) = (random(1, &[50, inner]), random(2, &[3, 5, inner]));
            a.data_mut()[(5 + 2) * inner + 3] = f32::NAN;
            a.data_mut()[(5 + 3) * inner + 4] = f32::INFINITY;
            let s = shrunk(place, &x, &a, Some(&of));
            for (i, v) in s.data().iter().enumerate() {
                let hit = (20..27).contains(&(i / 5)) && [2, 3].contains(&(i % 5));
                assert_eq!(v.is_finite(), !hit, "at {place:?}: row {}, rank {}", i / 5, i % 5);
            }
        }
    });
}
