//! Weights in eight bits, under adapters that are not.

use super::{
    EDGES,
    segments::{Case, RAGGED, SCALE, experts, gather, one_weight, without_adapters},
};
use hywu_core::Dtype;
use hywu_kernels::{
    Device, LoraVar, Result, Tape, Tensor, Var,
    ops::{
        loss::weighted_sum,
        low_rank_linear::{Format, LowRankLinear, QuantizedWeight, Segment, Segments, Weight},
    },
    reference::low_rank_linear::{Sizes, low_rank_linear as oracle},
    testing::{Place, check_gradients_at, check_output, for_each_place, places, random, widen},
};

const FORMATS: [Format; 2] = [Format::Int8, Format::Fp8];

/// Any codes, and scales that are powers of two: the elements are exact in bf16.
fn exact(format: Format, shape: &[usize]) -> QuantizedWeight {
    let values = random(7, shape);
    let codes = values.data().iter().map(|v| match format {
        Format::Int8 => (v * 40.0) as i8 as u8,
        // Of either sign, with exponents from the subnormal on.
        Format::Fp8 => ((v.abs() * 30.0) as u8).min(0x7e) | if *v < 0.0 { 0x80 } else { 0 },
    });
    let rows = shape[..shape.len() - 1].iter().product();
    let scales = (0..rows).map(|row: usize| 0.5f32.powi(5 - (row % 3) as i32)).collect();
    QuantizedWeight::from_parts(format, shape, codes.collect(), scales).expect("good codes")
}

/// The weight of a case in eight bits; the case's own is not used.
struct Quantized {
    case: Case,
    weight: QuantizedWeight,
}

impl Quantized {
    /// With a weight whose elements are exact in bf16.
    fn exact(format: Format, segments: Vec<Segment>, sizes: [usize; 4]) -> Self {
        let case = Case::new(segments, sizes);
        Self { weight: exact(format, case.w.shape()), case }
    }
    /// With one that was rounded.
    fn rounded(format: Format, segments: Vec<Segment>, sizes: [usize; 4]) -> Self {
        let case = Case::new(segments, sizes);
        Self { weight: QuantizedWeight::quantize(&case.w, format).expect("finite"), case }
    }
    fn inputs(&self) -> [Tensor; 4] {
        [&self.case.x, &self.case.bias, &self.case.a, &self.case.b].map(Clone::clone)
    }
    fn op(&self, place: Place) -> impl Fn(&Tape, &[Var]) -> Result<Var> + use<> {
        let weight = self.weight.to(place.device).expect("the device works");
        let segments = Segments::new(&self.case.segments).expect("good segments");
        move |tape, v| apply(tape, v, (&weight).into(), &segments)
    }
    /// With the weight in the dtype of the place.
    fn dense_op(&self, place: Place) -> impl Fn(&Tape, &[Var]) -> Result<Var> + use<> {
        let weight = place.constant(&self.weight.dequantize().expect("on the CPU"));
        let segments = Segments::new(&self.case.segments).expect("good segments");
        move |tape, v| apply(tape, v, (&weight).into(), &segments)
    }
    fn oracle(&self) -> impl Fn(&[Vec<f64>]) -> Vec<f64> + use<> {
        let [outer, inner] = [self.case.w.shape()[1], self.case.w.shape()[2]];
        let sizes = Sizes { inner, outer, parts: self.case.parts, rank: self.case.b.shape()[2] };
        let (segments, w) =
            (self.case.segments.clone(), widen(&self.weight.dequantize().expect("on the CPU")));
        move |v| oracle(sizes, &segments, [&v[0], &w, &v[1], &v[2], &v[3]], SCALE.into())
    }
    fn check_output(&self) {
        for_each_place(|place| check_output(place, &self.inputs(), self.op(place), self.oracle(), 1e-5));
    }
    fn check(&self, samples: usize) {
        for_each_place(|place| {
            check_gradients_at(place, &self.inputs(), self.op(place), self.oracle(), samples, 1e-5);
        });
    }
    /// Output and all gradients, on the host.
    fn all(&self, place: Place, op: impl Fn(&Tape, &[Var]) -> Result<Var>) -> Vec<Tensor> {
        let tape = Tape::new();
        let leaves = self.inputs().map(|t| tape.leaf(place.tensor(&t)));
        let y = op(&tape, &leaves).expect("good shapes");
        let loss = weighted_sum(&tape, &y, &place.tensor(&random(8, y.shape()))).expect("same shape");
        let mut grads = tape.backward(&loss).expect("a scalar");
        let grads = leaves.map(|leaf| grads.take(&leaf).expect("a gradient"));
        [y.value().clone()].into_iter().chain(grads).map(|t| t.to_host().expect("the device works")).collect()
    }
    /// The output at a place, on the host.
    fn run(&self, place: Place) -> Tensor {
        let y = self.op(place)(&Tape::inference(), &self.inputs().map(|t| place.constant(&t)));
        y.expect("good shapes").value().to_host().expect("the device works")
    }
    fn with(&self, case: Case) -> Self {
        Self { case, weight: self.weight.clone() }
    }
}

/// x, bias, a and b with a weight.
fn apply(tape: &Tape, v: &[Var], weight: Weight<'_>, segments: &Segments) -> Result<Var> {
    let lora = LoraVar { a: v[2].clone(), b: v[3].clone(), scale: SCALE };
    let (bias, lora, segments) = (Some(&v[1]), Some(&lora), Some(segments));
    LowRankLinear { x: &v[0], weight, bias, lora, segments, shrunk: None }.forward(tape)
}

#[test]
fn tile_edges_match_the_oracle() {
    for format in FORMATS {
        for (i, n) in EDGES.into_iter().enumerate() {
            let rank = [1, 7, 16, 64][i % 4];
            let rows = |rows: &[usize]| one_weight(rows, |i| i != 1);
            Quantized::rounded(format, rows(&[n, 3]), [33, 20, 1, rank]).check_output();
            Quantized::rounded(format, rows(&[7, 2]), [n, 18, 1, rank]).check_output();
            Quantized::rounded(format, rows(&[5, 1]), [21, n, 1, rank]).check_output();
            Quantized::exact(format, rows(&[5, 1, n]), [n, n, 1, rank]).check_output();
        }
        // In steps of any depth, whole and not; aligned in one operand or the other.
        for (inner, outer) in [(64, 64), (96, 33), (136, 72), (257, 40), (520, 24)] {
            Quantized::rounded(format, one_weight(&[3, 70], |_| true), [inner, outer, 1, 8]).check_output();
        }
    }
}

#[test]
fn ragged_segments_experts_and_parts_match_the_oracle() {
    for format in FORMATS {
        for (rank, inner, outer) in [(1, 33, 20), (7, 64, 65), (16, 24, 130), (64, 31, 17)] {
            let segments = one_weight(&RAGGED, |i| i % 4 != 2 && i < 9);
            Quantized::rounded(format, segments, [inner, outer, 1, rank]).check_output();
        }
        for sizes in [[19, 22, 2, 1], [24, 48, 2, 16], [17, 34, 2, 7], [33, 130, 2, 64], [8, 12, 3, 5]] {
            Quantized::rounded(format, experts([5, 17, 64, 3, 30]), sizes).check_output();
        }
        // Large enough for the large tiles of a device.
        Quantized::rounded(format, experts([300, 129, 500, 1, 700]), [40, 1300, 2, 16]).check_output();
    }
}

#[test]
fn gradients_match_finite_differences() {
    for format in FORMATS {
        let ragged = || one_weight(&[1, 15, 17, 64, 9, 65], |i| i % 3 != 2);
        for sizes in [[19, 23, 1, 1], [16, 24, 1, 16], [9, 11, 1, 7]] {
            Quantized::exact(format, ragged(), sizes).check(16);
        }
        for sizes in [[24, 48, 2, 16], [17, 34, 2, 7], [8, 16, 2, 64]] {
            Quantized::exact(format, experts([5, 17, 9, 3, 30]), sizes).check(16);
        }
    }
}

/// On the CPU and in f32 all is as with the weight that the codes stand for, bit for bit; in bf16 gradients are: they know that
/// weight rounded to bf16.
#[test]
fn it_is_the_weight_that_the_codes_stand_for() {
    for format in FORMATS {
        for (segments, sizes) in [
            (one_weight(&RAGGED, |i| i % 3 != 1), [70, 66, 1, 8]),
            (one_weight(&[40, 3], |_| true), [1030, 37, 1, 5]),
            (experts([65, 20, 129, 3, 40]), [33, 72, 2, 7]),
        ] {
            let quantized = Quantized::rounded(format, segments, sizes);
            for_each_place(|place| {
                let all = quantized.all(place, quantized.op(place));
                let dense = quantized.all(place, quantized.dense_op(place));
                let first = usize::from(place.dtype == Dtype::Bf16);
                for (n, (one, two)) in all.iter().zip(&dense).enumerate().skip(first) {
                    assert_eq!(one.data(), two.data(), "result {n} of {sizes:?}, {format:?} at {place:?}");
                }
            });
        }
    }
}

/// Columns of the identity find every element, in tiles of every shape.
#[test]
fn every_code_arrives_in_its_place() {
    for format in FORMATS {
        for [rows, inner, outer] in [[256, 256, 40], [35, 35, 129], [1024, 32, 2048]] {
            let code = |i: usize| match ((i * 7 + i / inner) % 256) as u8 {
                code if format == Format::Fp8 && code & 0x7f == 0x7f => 0,
                code => code,
            };
            let codes = (0..outer * inner).map(code).collect();
            let weight = QuantizedWeight::from_parts(format, &[outer, inner], codes, vec![1.0; outer]);
            let weight = weight.expect("good codes");
            let x = Tensor::build(&[rows, inner], |x| {
                x.fill(0.0);
                x.chunks_mut(inner).enumerate().for_each(|(i, row)| row[i % inner] = 1.0);
            });
            let values = weight.dequantize().expect("on the CPU");
            let expected = Tensor::build(&[rows, outer], |y| {
                let element = |i: usize| values.data()[i % outer * inner + i / outer % inner];
                y.iter_mut().enumerate().for_each(|(i, y)| *y = element(i));
            });
            for_each_place(|place| {
                let (x, weight) = (place.constant(&x), weight.to(place.device).expect("the device works"));
                let weight = (&weight).into();
                let op =
                    LowRankLinear { x: &x, weight, bias: None, lora: None, segments: None, shrunk: None };
                let y = op.forward(&Tape::inference()).expect("good shapes").value().to_host();
                assert_eq!(y.expect("the device works").data(), expected.data(), "{format:?} at {place:?}");
            });
        }
    }
}

#[test]
fn zero_lora_b_is_the_base_bit_for_bit() {
    for_each_place(|place| {
        for format in FORMATS {
            for (segments, parts) in
                [(one_weight(&RAGGED, |i| i % 2 == 0), 1), (experts([65, 20, 129, 3, 40]), 2)]
            {
                let mut with = Quantized::rounded(format, segments, [70, 72, parts, 7]);
                with.case.b.data_mut().fill(0.0);
                let segments = without_adapters(&with.case.segments);
                let base = with.with(Case { segments, ..with.case.clone() });
                assert_eq!(with.run(place).data(), base.run(place).data(), "{format:?} at {place:?}");
            }
        }
    });
}

/// Nor does an instance's number of rows change a bit of it: alone it has tiles of another shape on a device.
#[test]
fn rows_do_not_depend_on_other_instances() {
    for_each_place(|place| {
        for format in FORMATS {
            let lengths: Vec<usize> = RAGGED.into_iter().chain([900]).collect();
            let segments = one_weight(&lengths, |i| i % 3 != 1);
            let all = Quantized::rounded(format, segments, [40, 1300, 1, 17]);
            let y = all.run(place);
            let order = [3, 10, 0, 7, 11, 1, 9, 5, 2, 8, 4, 6];
            for order in [&order[..], &[0], &[3], &[4], &[9]] {
                let other = all.with(all.case.permuted(order)).run(place);
                let expected = gather(&y, &all.case.segments, order);
                assert_eq!(expected.data(), other.data(), "{order:?} in {format:?} at {place:?}");
            }
        }
    });
}

#[test]
fn elements_are_off_by_no_more_than_half_a_code() {
    for format in FORMATS {
        let mut weight = random(1, &[3, 40, 70]);
        // A row of zeros, rows of sizes at both ends of f32.
        weight.data_mut()[70..140].fill(0.0);
        weight.data_mut()[140..210].iter_mut().for_each(|v| *v *= 1e37);
        weight.data_mut()[210..280].iter_mut().for_each(|v| *v *= 1e-40);
        let quantized = QuantizedWeight::quantize(&weight, format).expect("finite");
        assert_eq!((quantized.shape(), quantized.format()), (weight.shape(), format));
        assert_eq!(quantized.bytes(), weight.numel() + 4 * 120);
        let (values, scales) = (quantized.dequantize().expect("on the CPU"), quantized.scales().data());
        for (i, (&w, &q)) in weight.data().iter().zip(values.data()).enumerate() {
            let (size, scale) = (f64::from(w.abs()), f64::from(scales[i / 70]));
            let bound = match format {
                Format::Int8 => scale / 2.0,
                // Normal numbers, and the subnormal ones below scale / 64.
                Format::Fp8 => (size / 16.0).max(scale / 1024.0),
            };
            let error = (f64::from(w) - f64::from(q)).abs();
            assert!(error <= bound * (1.0 + 1e-6), "{format:?} {i}: {w} became {q}, {error:e} > {bound:e}");
        }
        assert!(values.data()[70..140].iter().all(|v| *v == 0.0));
    }
}

#[test]
fn a_device_holds_the_same_weight() {
    for_each_place(|place| {
        for format in FORMATS {
            for shape in [&[3, 1][..], &[5, 16], &[40, 129], &[3, 7, 33]] {
                let weight = QuantizedWeight::quantize(&random(1, shape), format).expect("finite");
                let there = weight.to(place.device).expect("the device works");
                assert_eq!((there.device(), there.shape()), (place.device, shape));
                let back = there.to(Device::Cpu).expect("the device works");
                let values = [&weight, &there, &back].map(|w| {
                    w.dequantize().and_then(|w| w.to_host()).expect("the device works").data().to_vec()
                });
                assert_eq!(values[0], values[1], "{format:?} {shape:?} at {place:?}");
                assert_eq!(values[0], values[2], "{format:?} {shape:?} at {place:?}");
                // From wherever the floats are.
                let again = QuantizedWeight::quantize(&there.dequantize().expect("there"), format);
                assert!(again.is_ok_and(|w| w.device() == Device::Cpu && w.bytes() == weight.bytes()));
            }
        }
    });
}

#[test]
fn what_can_not_be_a_weight_is_refused() {
    let refused = |result: Result<QuantizedWeight>, why: &str| {
        let text = result.expect_err("refused").to_string();
        assert!(text.contains(why), "{text}");
    };
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut weight = random(1, &[2, 3, 4]);
        weight.data_mut()[3 * 4 + 2 * 4 + 1] = bad;
        refused(QuantizedWeight::quantize(&weight, Format::Int8), "row 2 of expert 1");
        let flat = weight.reshape(&[6, 4]).expect("as many");
        refused(QuantizedWeight::quantize(&flat, Format::Fp8), "row 5");
    }
    for shape in [&[4][..], &[1, 1, 1, 4], &[0, 4], &[4, 0]] {
        refused(QuantizedWeight::quantize(&Tensor::zeros(shape), Format::Int8), "weight");
    }
    let parts = |format, codes: &[u8], scales: &[f32]| {
        QuantizedWeight::from_parts(format, &[2, 3], codes.to_vec(), scales.to_vec())
    };
    refused(parts(Format::Int8, &[1; 5], &[1.0; 2]), "codes");
    refused(parts(Format::Int8, &[1; 6], &[1.0; 3]), "scales");
    refused(parts(Format::Int8, &[1; 6], &[1.0, -0.5]), "scale 1");
    refused(parts(Format::Int8, &[1; 6], &[f32::NAN, 1.0]), "scale 0");
    refused(parts(Format::Fp8, &[1; 6], &[f32::INFINITY, 1.0]), "scale 0");
    for nan in [0x7f, 0xff] {
        refused(parts(Format::Fp8, &[1, 2, 3, 4, nan, 6], &[1.0; 2]), "code 4");
        assert!(parts(Format::Int8, &[1, 2, 3, 4, nan, 6], &[1.0, 0.0]).is_ok());
    }
}

#[test]
fn a_weight_elsewhere_or_of_another_size_is_refused() {
    let good = Quantized::rounded(Format::Int8, one_weight(&[4, 3], |_| true), [8, 6, 1, 2]);
    let other = QuantizedWeight::quantize(&random(1, &[2, 6, 9]), Format::Int8).expect("finite");
    let segments = Segments::new(&good.case.segments).expect("good segments");
    let text = |v: &[Var], weight: &QuantizedWeight| {
        apply(&Tape::inference(), v, weight.into(), &segments).expect_err("refused").to_string()
    };
    for place in places() {
        let v = good.inputs().map(|t| place.constant(&t));
        assert!(text(&v, &other.to(place.device).expect("the device works")).contains("x has shape"));
        if place != Place::CPU {
            assert!(text(&v, &good.weight).contains("bring it there"));
        }
    }
}
