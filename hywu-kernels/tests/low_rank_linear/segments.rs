//! Ragged segments, weights for experts, parts of the columns with ranks of their own.

use hywu_kernels::{
    LoraVar, Result, Tape, Tensor, Var,
    ops::{
        loss::weighted_sum,
        low_rank_linear::{LowRankLinear, Segment, Segments, shrink},
    },
    reference::low_rank_linear::{Sizes, low_rank_linear as oracle},
    testing::{Place, check_gradients, check_output, for_each_place, places, random},
};
use proptest::prelude::*;

pub(super) const SCALE: f32 = 0.75;
/// Beside the edges of tiles, and longer than any.
pub(super) const RAGGED: [usize; 11] = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300];

#[derive(Clone)]
pub(super) struct Case {
    pub(super) segments: Vec<Segment>,
    pub(super) parts: usize,
    pub(super) x: Tensor,
    pub(super) w: Tensor,
    pub(super) bias: Tensor,
    pub(super) a: Tensor,
    pub(super) b: Tensor,
}

/// Segments of one weight, with adapters in descending order where `adapted`.
pub(super) fn one_weight(lengths: &[usize], adapted: impl Fn(usize) -> bool) -> Vec<Segment> {
    let mut left = (0..lengths.len()).filter(|&i| adapted(i)).count();
    let segment = |(i, &rows): (usize, &usize)| {
        let adapter = adapted(i).then(|| {
            left -= 1;
            left
        });
        Segment { rows, weight: 0, adapter }
    };
    lengths.iter().enumerate().map(segment).collect()
}

/// The layer of x, weight, bias and what else there is.
fn layer<'a>(v: &'a [Var], lora: Option<&'a LoraVar>, segments: Option<&'a Segments>) -> LowRankLinear<'a> {
    LowRankLinear { x: &v[0], weight: (&v[1]).into(), bias: Some(&v[2]), lora, segments, shrunk: None }
}

impl Case {
    /// One weight and one adapter more than the segments use.
    pub(super) fn new(segments: Vec<Segment>, [inner, outer, parts, rank]: [usize; 4]) -> Self {
        let used = |index: &dyn Fn(&Segment) -> Option<usize>| segments.iter().filter_map(index).max();
        let experts = used(&|s| Some(s.weight)).map_or(0, |i| i + 2);
        let adapters = used(&|s| s.adapter).map_or(0, |i| i + 1) + 1;
        let rows = segments.iter().map(|s| s.rows).sum();
        Self {
            x: random(1, &[rows, inner]),
            w: random(2, &[experts, outer, inner]),
            bias: random(3, &[experts, outer]),
            a: random(4, &[adapters, parts * rank, inner]),
            b: random(5, &[adapters, outer, rank]),
            segments,
            parts,
        }
    }
    fn inputs(&self) -> [Tensor; 5] {
        [&self.x, &self.w, &self.bias, &self.a, &self.b].map(Clone::clone)
    }
    fn op(&self) -> impl Fn(&Tape, &[Var]) -> Result<Var> + use<> {
        let segments = Segments::new(&self.segments).expect("good segments");
        move |tape, v| {
            let lora = LoraVar { a: v[3].clone(), b: v[4].clone(), scale: SCALE };
            let (lora, segments) = (Some(&lora), Some(&segments));
            layer(v, lora, segments).forward(tape)
        }
    }
    fn oracle(&self) -> impl Fn(&[Vec<f64>]) -> Vec<f64> + use<> {
        let [outer, inner] = [self.w.shape()[1], self.w.shape()[2]];
        let sizes = Sizes { inner, outer, parts: self.parts, rank: self.b.shape()[2] };
        let segments = self.segments.clone();
        move |v| oracle(sizes, &segments, std::array::from_fn(|i| &v[i][..]), SCALE.into())
    }
    fn check(&self, samples: usize) {
        check_gradients(&self.inputs(), self.op(), self.oracle(), samples, 1e-5);
    }
    /// The output at a place, on the host.
    fn run(&self, place: Place) -> Tensor {
        let y = self.op()(&Tape::inference(), &self.inputs().map(|t| place.constant(&t)));
        y.expect("good shapes").value().to_host().expect("the device works")
    }
    /// Output and all gradients at a place, on the host; the gradient of y is its rows' own.
    fn all(&self, place: Place) -> Vec<Tensor> {
        let op = self.op();
        self.all_of(place, |tape, leaves| op(tape, leaves))
    }
    fn all_of(&self, place: Place, op: impl Fn(&Tape, &[Var]) -> Result<Var>) -> Vec<Tensor> {
        let tape = Tape::new();
        let leaves = self.inputs().map(|t| tape.leaf(place.tensor(&t)));
        let y = op(&tape, &leaves).expect("good shapes");
        let weights = Tensor::build(y.shape(), |out| {
            let rows = out.chunks_mut(y.shape()[1]).zip(self.x.data().chunks(self.x.shape()[1]));
            for (row, x) in rows {
                row.iter_mut().enumerate().for_each(|(i, v)| *v = (x[0] * (i + 1) as f32).sin());
            }
        });
        let loss = weighted_sum(&tape, &y, &place.tensor(&weights)).expect("same shape");
        let mut grads = tape.backward(&loss).expect("a scalar");
        let grads = leaves.map(|leaf| grads.take(&leaf).expect("a gradient"));
        [y.value().clone()].into_iter().chain(grads).map(|t| t.to_host().expect("the device works")).collect()
    }
    /// The segments in another order, each with its rows and adapter.
    pub(super) fn permuted(&self, order: &[usize]) -> Self {
        let segments = order.iter().map(|&i| self.segments[i]).collect();
        let x = gather(&self.x, &self.segments, order);
        Self { segments, x, ..self.clone() }
    }
}

/// The rows of the segments `order`.
pub(super) fn gather(x: &Tensor, segments: &[Segment], order: &[usize]) -> Tensor {
    let width = x.shape()[1];
    let first = |i: usize| segments[..i].iter().map(|s| s.rows).sum::<usize>();
    let rows = |&i: &usize| &x.data()[first(i) * width..][..segments[i].rows * width];
    let data: Vec<f32> = order.iter().flat_map(rows).copied().collect();
    Tensor::new(&[data.len() / width, width], data).expect("whole rows")
}

#[test]
fn ragged_segments_match_the_oracle() {
    for (rank, inner, outer) in [(1, 33, 20), (4, 40, 72), (7, 64, 65), (16, 24, 130), (17, 31, 17)] {
        // The third has no adapter, nor have the last two.
        let case = Case::new(one_weight(&RAGGED, |i| i % 4 != 2 && i < 9), [inner, outer, 1, rank]);
        for_each_place(|place| check_output(place, &case.inputs(), case.op(), case.oracle(), 1e-5));
    }
    for rank in [64, 128] {
        let case = Case::new(one_weight(&[65, 3, 20, 129], |i| i != 1), [40, 72, 1, rank]);
        for_each_place(|place| check_output(place, &case.inputs(), case.op(), case.oracle(), 1e-5));
    }
}

#[test]
fn gradients_of_ragged_segments_match_finite_differences() {
    for (rank, inner, outer) in [(1, 19, 23), (4, 16, 24), (16, 24, 40), (17, 9, 11)] {
        Case::new(one_weight(&[1, 15, 17, 64, 9, 65], |i| i % 3 != 2), [inner, outer, 1, rank]).check(24);
    }
    for rank in [64, 128] {
        Case::new(one_weight(&[33, 5, 12], |i| i != 1), [16, 8, 1, rank]).check(16);
    }
    // Long enough for a device to cut the sums over rows into parts: one segment's, not the other's.
    Case::new(one_weight(&[1100, 40, 7], |i| i != 2), [8, 16, 1, 8]).check(12);
    // S over many columns of x, dS over many of y.
    Case::new(one_weight(&[3, 2, 4], |i| i != 1), [2100, 5, 1, 4]).check(8);
    Case::new(one_weight(&[3, 2, 4], |i| i != 1), [5, 2100, 2, 4]).check(8);
}

/// Experts 2, 0 and 3 have rows, 1 and 4 have none.
pub(super) fn experts(lengths: [usize; 5]) -> Vec<Segment> {
    let [a, b, c, d, e] = lengths;
    let segment = |rows, weight, adapter| Segment { rows, weight, adapter };
    vec![
        segment(a, 2, Some(1)),
        segment(b, 2, None),
        segment(0, 1, Some(1)),
        segment(c, 0, Some(3)),
        segment(d, 0, Some(0)),
        segment(e, 3, None),
    ]
}

#[test]
fn experts_and_parts_match() {
    for (inner, outer, parts, rank) in
        [(16, 24, 1, 4), (19, 22, 2, 1), (24, 48, 2, 16), (17, 34, 2, 7), (33, 130, 2, 8), (8, 12, 3, 5)]
    {
        Case::new(experts([5, 17, 64, 3, 30]), [inner, outer, parts, rank]).check(20);
    }
    for rank in [17, 64, 128] {
        Case::new(experts([5, 2, 9, 3, 4]), [8, 16, 2, rank]).check(12);
    }
    // Large enough for the large tiles of a device.
    let case = Case::new(experts([300, 129, 500, 1, 700]), [40, 1300, 2, 16]);
    for_each_place(|place| check_output(place, &case.inputs(), case.op(), case.oracle(), 1e-5));
}

#[test]
fn permuting_instances_permutes_the_rows_bit_for_bit() {
    for_each_place(|place| {
        for [inner, outer, parts, rank] in [[70, 66, 1, 8], [513, 40, 2, 7], [2100, 24, 1, 16]] {
            let case = Case::new(one_weight(&RAGGED, |i| i % 3 != 1), [inner, outer, parts, rank]);
            let order = [3, 10, 0, 7, 1, 9, 5, 2, 8, 4, 6];
            let (y, other) = (case.run(place), case.permuted(&order).run(place));
            assert_eq!(gather(&y, &case.segments, &order).data(), other.data(), "at {place:?}");
        }
    });
}

#[test]
fn an_instance_alone_is_as_in_the_batch_bit_for_bit() {
    for_each_place(|place| {
        for [inner, outer, parts, rank] in [[70, 66, 2, 8], [40, 1300, 1, 4], [24, 136, 1, 128]] {
            let mut lengths = RAGGED.to_vec();
            lengths.push(1300);
            let case = Case::new(one_weight(&lengths, |i| i != 4), [inner, outer, parts, rank]);
            let all = case.all(place);
            for i in [0, 3, 4, 9, 10, 11] {
                let alone = case.permuted(&[i]).all(place);
                for (what, n) in [("y", 0), ("dx", 1)] {
                    let mine = gather(&all[n], &case.segments, &[i]);
                    assert_eq!(mine.data(), alone[n].data(), "{what} of segment {i} at {place:?}");
                }
                let Some(adapter) = case.segments[i].adapter else { continue };
                for (what, n) in [("da", 4), ("db", 5)] {
                    let each = all[n].numel() / all[n].shape()[0];
                    let of = |t: &Tensor| t.data()[adapter * each..][..each].to_vec();
                    assert_eq!(of(&all[n]), of(&alone[n]), "{what} of segment {i} at {place:?}");
                }
            }
        }
    });
}

#[test]
fn two_runs_are_equal_and_what_nobody_uses_has_no_gradient() {
    for_each_place(|place| {
        let case = Case::new(experts([65, 20, 1100, 3, 130]), [40, 72, 2, 7]);
        let (one, two) = (case.all(place), case.all(place));
        for (one, two) in one.iter().zip(&two) {
            assert_eq!(one.data(), two.data(), "at {place:?}");
        }
        // dw, dbias of weights 1 and 4; da, db of adapters 2 and 4.
        for (n, unused) in [(2, [1, 4]), (3, [1, 4]), (4, [2, 4]), (5, [2, 4])] {
            let each = one[n].numel() / one[n].shape()[0];
            for (i, part) in one[n].data().chunks(each).enumerate() {
                let zero = part.iter().all(|v| *v == 0.0);
                assert_eq!(zero, unused.contains(&i), "gradient {n}, entry {i} at {place:?}");
            }
        }
    });
}

#[test]
fn zero_lora_b_is_the_base_bit_for_bit() {
    for_each_place(|place| {
        for (segments, parts) in
            [(one_weight(&RAGGED, |i| i % 2 == 0), 1), (experts([65, 20, 129, 3, 40]), 2)]
        {
            let mut case = Case::new(segments, [70, 72, parts, 7]);
            case.b.data_mut().fill(0.0);
            let base = Case { segments: without_adapters(&case.segments), ..case.clone() };
            assert_eq!(case.run(place).data(), base.run(place).data(), "at {place:?}");
        }
    });
}

pub(super) fn without_adapters(segments: &[Segment]) -> Vec<Segment> {
    segments.iter().map(|s| Segment { adapter: None, ..*s }).collect()
}

/// Where no row has an adapter, and where the layer has none, there is the base alone.
#[test]
fn without_adapters_it_is_the_base() {
    let case = Case::new(without_adapters(&experts([5, 2, 9, 3, 4])), [16, 24, 1, 4]);
    case.check(20);
    // Segments may speak of adapters that a layer has not.
    let segments = Segments::new(&experts([5, 2, 9, 3, 4])).expect("good segments");
    for_each_place(|place| {
        let [x, weight, bias, ..] = &case.inputs().map(|t| place.constant(&t));
        let (bias, segments) = (Some(bias), Some(&segments));
        let plain = LowRankLinear { x, weight: weight.into(), bias, lora: None, segments, shrunk: None };
        let y = plain.forward(&Tape::inference()).expect("good shapes").value().to_host();
        assert_eq!(y.expect("the device works").data(), case.run(place).data(), "at {place:?}");
    });
}

/// With S computed ahead the output and all gradients are the same bits.
#[test]
fn s_computed_ahead_is_s_computed_inside() {
    for_each_place(|place| {
        for (segments, parts) in
            [(one_weight(&[65, 3, 300, 17], |i| i != 1), 1), (experts([65, 20, 129, 3, 40]), 2)]
        {
            let case = Case::new(segments, [70, 72, parts, 5]);
            let segments = Segments::new(&case.segments).expect("good segments");
            let ahead = case.all_of(place, |tape, v| {
                let [x, w, bias, a, b] = v else { unreachable!("five inputs") };
                let shrunk = shrink(x.value(), a.value(), SCALE, Some(&segments))?;
                let lora = LoraVar { a: a.clone(), b: b.clone(), scale: SCALE };
                let (lora, bias, segments) = (Some(&lora), Some(bias), Some(&segments));
                LowRankLinear { x, weight: w.into(), bias, lora, segments, shrunk: Some(&shrunk) }
                    .forward(tape)
            });
            for (n, (one, two)) in ahead.iter().zip(case.all(place)).enumerate() {
                assert_eq!(one.data(), two.data(), "result {n} at {place:?}");
            }
        }
    });
}

#[test]
fn threads_do_not_change_a_bit() {
    let pools = [1, 2, 5].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("threads"));
    for segments in [one_weight(&RAGGED, |i| i % 3 != 1), experts([65, 20, 129, 3, 400])] {
        let case = Case::new(segments, [600, 90, 2, 7]);
        let alone = pools[0].install(|| case.all(Place::CPU));
        for pool in &pools[1..] {
            for (one, two) in pool.install(|| case.all(Place::CPU)).iter().zip(&alone) {
                assert_eq!(one.data(), two.data(), "{} threads", pool.current_num_threads());
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    for_each_place(|place| {
        let good = Case::new(experts([5, 2, 9, 3, 4]), [8, 12, 2, 2]);
        let refused = |case: &Case, segments: Option<&[Segment]>, why: &str| {
            let v = case.inputs().map(|t| place.constant(&t));
            let lora = LoraVar { a: v[3].clone(), b: v[4].clone(), scale: SCALE };
            let segments = segments.map(|s| Segments::new(s).expect("good segments"));
            let (lora, segments) = (Some(&lora), segments.as_ref());
            let op = layer(&v, lora, segments);
            let text = op.forward(&Tape::inference()).expect_err("refused").to_string();
            assert!(text.contains(why), "{text}");
        };
        let all = |weight, adapter| [Segment { rows: 23, weight, adapter }];
        refused(&good, None, "no segments");
        refused(&good, Some(&[Segment { rows: 22, weight: 0, adapter: None }]), "22 rows");
        refused(&good, Some(&all(5, None)), "weight 5");
        refused(&good, Some(&all(4, Some(5))), "adapter 5");
        let other =
            |a: [usize; 3], b: [usize; 3]| Case { a: random(4, &a), b: random(5, &b), ..good.clone() };
        refused(&other([5, 4, 8], [5, 12, 3]), Some(&all(0, None)), "lora_b");
        refused(&other([5, 10, 8], [5, 12, 2]), Some(&all(0, None)), "5 equal parts");
        refused(&Case { bias: random(3, &[12]), ..good.clone() }, Some(&all(0, None)), "bias");
        refused(&Case { w: random(3, &[2, 2, 12, 8]), ..good.clone() }, Some(&all(0, None)), "weight");
    });
}

#[test]
fn what_was_computed_ahead_for_something_else_is_refused() {
    for_each_place(|place| {
        let case = Case::new(one_weight(&[5, 20, 7], |i| i != 1), [8, 12, 1, 2]);
        let v = case.inputs().map(|t| place.constant(&t));
        let segments = Segments::new(&case.segments).expect("good segments");
        let refused = |x: &Tensor, a: &Tensor, scale: f32, adapters: bool, why: &str| {
            let segments_of_x = Segments::new(&[Segment { rows: x.shape()[0], weight: 0, adapter: Some(0) }]);
            let of_x = segments_of_x.expect("good segments");
            let of_x = if x.shape()[0] == 32 { &segments } else { &of_x };
            let shrunk = shrink(x, a, scale, Some(of_x)).expect("good shapes");
            let lora = LoraVar { a: v[3].clone(), b: v[4].clone(), scale: SCALE };
            let lora = adapters.then_some(&lora);
            let op = LowRankLinear {
                x: &v[0],
                weight: (&v[1]).into(),
                bias: None,
                lora,
                segments: Some(&segments),
                shrunk: Some(&shrunk),
            };
            let text = op.forward(&Tape::inference()).expect_err("refused").to_string();
            assert!(text.contains(why), "{text}");
        };
        let (x, a) = (v[0].value(), v[3].value());
        refused(x, a, 0.5, true, "scale 0.5");
        refused(x, a, SCALE, false, "no adapters");
        refused(x, &place.tensor(&random(1, &[3, 3, 8])), SCALE, true, "[32, 2]");
        refused(&place.tensor(&random(1, &[31, 8])), a, SCALE, true, "[32, 2]");
        // And shrink itself.
        let wrong = |x: &Tensor, a: &Tensor, segments: Option<&Segments>| {
            assert!(shrink(x, a, SCALE, segments).is_err());
        };
        wrong(x, &place.tensor(&random(1, &[3, 2, 9])), Some(&segments));
        wrong(x, &place.tensor(&random(1, &[1, 2, 8])), Some(&segments));
        wrong(x, a, None);
        wrong(&place.tensor(&random(1, &[31, 8])), a, Some(&segments));
    });
}

/// Segments of up to five weights, with an adapter each or none.
fn any_segments() -> impl Strategy<Value = Vec<Segment>> {
    let segment = (0usize..90, 0usize..3, any::<bool>());
    prop::collection::vec(segment, 1..8).prop_map(|mut list| {
        list[0].0 += 1;
        let (mut weight, count) = (0, list.len());
        let segments = list.into_iter().enumerate().map(|(i, (rows, skip, adapted))| {
            // Mostly the same weight as before.
            weight += usize::from(skip == 2) * (1 + i % 2);
            Segment { rows, weight, adapter: adapted.then_some(count - 1 - i) }
        });
        segments.collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if places().len() > 1 { 16 } else { 40 }))]

    #[test]
    fn any_segmentation(
        segments in any_segments(),
        // A gradient of one number may be a sum that cancels: its relative error would say nothing.
        (inner, outer) in (5usize..70, 5usize..40),
        (parts, rank) in (1usize..3, 1usize..20),
    ) {
        Case::new(segments, [inner, parts * outer, parts, rank]).check(6);
    }
}
