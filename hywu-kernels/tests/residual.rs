//! The residual stream against the oracle: rows here and there, of every width.

use hywu_core::Dtype;
use hywu_kernels::{
    Tensor,
    ops::residual::{Runs, Stream},
    reference::elementary as oracle,
    testing::{Place, assert_close, assert_same_bits, for_each_place, random},
};

const EPS: f32 = 1e-6;

/// A stream with these rows.
fn stream(place: Place, x: &Tensor) -> Stream {
    let x = x.to(place.device, Dtype::F32).expect("the device works");
    Stream::repeated(&x, 1).expect("some rows")
}

/// Some rows of a matrix.
fn rows_of(x: &Tensor, runs: Runs) -> Tensor {
    let c = x.dim_back(1);
    let row = |i: usize| runs.first + i / runs.length * runs.pitch + i % runs.length;
    let data = (0..runs.rows()).flat_map(|i| x.data()[row(i) * c..][..c].iter().copied()).collect();
    Tensor::new(&[runs.rows(), c], data).expect("whole rows")
}

const ALL: [Runs; 6] = [
    Runs { first: 2, count: 57, length: 1, pitch: 1 },
    Runs { first: 0, count: 1, length: 60, pitch: 60 },
    Runs { first: 7, count: 1, length: 40, pitch: 90 },
    Runs { first: 1, count: 5, length: 3, pitch: 12 },
    Runs { first: 0, count: 20, length: 3, pitch: 3 },
    Runs { first: 59, count: 1, length: 1, pitch: 1 },
];

#[test]
fn rows_are_read_through_a_norm() {
    for c in [1, 3, 8, 17, 64, 132, 256, 513, 1032, 4096 + 8, 16384 + 20] {
        let (x, weight) = (random(1, &[60, c]), random(2, &[c]));
        for_each_place(|place| {
            let mut stream = stream(place, &x);
            let there = place.tensor(&weight);
            for runs in ALL {
                let got = stream.read(runs, &there, EPS).expect("rows of the stream");
                assert_eq!((got.shape(), got.dtype()), (&[runs.rows(), c][..], there.dtype()));
                let wide: Vec<f64> = rows_of(&x, runs).data().iter().map(|&v| v.into()).collect();
                let zeros = vec![0.0; c];
                let expected =
                    oracle::rms_norm(&wide, 1, &place.rounded(&weight), EPS.into(), &zeros, &zeros);
                // The input is not rounded, the result once.
                let tolerance = if place.dtype == Dtype::F32 { 1e-6 } else { 1.0 / 256.0 };
                assert_close(got.to_host().expect("the device works").data(), &expected, tolerance);
            }
        });
    }
}

#[test]
fn sums_are_exact_in_f32_and_reach_only_their_rows() {
    for c in [1, 5, 8, 130] {
        let x = random(3, &[60, c]);
        for_each_place(|place| {
            for runs in ALL {
                let mut stream = stream(place, &x);
                let y = place.tensor(&random(4, &[runs.rows(), c]));
                stream.add(runs, &y).expect("rows of the stream");
                let mut expected = x.clone();
                let y = y.to_host().expect("the device works");
                for (i, y) in y.data().chunks(c).enumerate() {
                    let row = runs.first + i / runs.length * runs.pitch + i % runs.length;
                    let place = expected.data_mut()[row * c..].iter_mut();
                    place.zip(y).for_each(|(x, y)| *x += y);
                }
                assert_same_bits(
                    &[stream.value().expect("it works").to_host().expect("it works")],
                    &[expected],
                    "stream",
                );
            }
        });
    }
}

#[test]
fn a_stream_may_start_as_copies() {
    let x = random(5, &[4, 9]);
    for_each_place(|place| {
        let there = x.to(place.device, Dtype::F32).expect("the device works");
        let twice = Stream::repeated(&there, 2)
            .expect("some rows")
            .into_value()
            .and_then(|x| x.to_host())
            .expect("it works");
        assert_eq!(twice.data(), [x.data(), x.data()].concat());
        assert_eq!(there.to_host().expect("the device works").data(), x.data());
    });
}

/// Whatever comes between a sum over all rows and the reading of it.
#[test]
fn sums_that_readers_make_change_no_bit() {
    for c in [5, 8, 16, 1032, 16384 + 16] {
        let (x, weight) = (random(6, &[60, c]), random(7, &[c]));
        for_each_place(|place| {
            let weight = place.tensor(&weight);
            let ys = [8, 9].map(|seed| place.tensor(&random(seed, &[60, c])));
            let some = place.tensor(&random(11, &[40, c]));
            let rows = |from, to| Runs::of(from..to);
            let columns = Runs { first: 1, count: 20, length: 2, pitch: 3 };
            let all = Runs { first: 0, count: 20, length: 3, pitch: 3 };
            // What is read after each of the sums over all rows.
            let lists: [&[Runs]; 7] = [
                &[rows(0, 60)],
                &[all],
                &[rows(0, 20), rows(20, 21), rows(21, 60)],
                &[rows(0, 20), rows(30, 60), rows(0, 30)],
                &[rows(5, 60), rows(0, 60)],
                &[columns, rows(0, 60)],
                &[],
            ];
            // The widest are slow on an emulated device.
            for list in if c > 10_000 { &lists[..1] } else { &lists[..] } {
                let mut stream = stream(place, &x);
                let mut sum = x.to(place.device, Dtype::F32).expect("it works");
                let same = |a: &Tensor, b: &Tensor| {
                    let host = |t: &Tensor| t.to_host().expect("it works");
                    assert_same_bits(&[host(a)], &[host(b)], "rows");
                };
                for y in &ys {
                    stream.add(rows(0, 60), y).expect("all rows");
                    sum.add_assign(&y.cast(Dtype::F32).expect("it works")).expect("alike");
                    for &runs in *list {
                        let got = stream.read(runs, &weight, EPS).expect("its rows");
                        let mut fresh = Stream::repeated(&sum, 1).expect("rows");
                        same(&got, &fresh.read(runs, &weight, EPS).expect("its rows"));
                    }
                    // A part is added to, whether all was read or not.
                    stream.add(columns, &some).expect("its rows");
                    let mut fresh = Stream::repeated(&sum, 1).expect("rows");
                    fresh.add(columns, &some).expect("its rows");
                    sum = fresh.into_value().expect("it works");
                }
                same(stream.value().expect("it works"), &sum);
            }
        });
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut stream = stream(Place::CPU, &random(1, &[10, 4]));
    let weight = Tensor::full(&[4], 1.0);
    for runs in [
        Runs::of(3..11),
        Runs::of(3..3),
        Runs { first: 0, count: 3, length: 4, pitch: 4 },
        Runs { first: 0, count: 2, length: 3, pitch: 2 },
        Runs { first: 2, count: usize::MAX, length: 1, pitch: 2 },
    ] {
        let e = stream.read(runs, &weight, EPS).expect_err("not its rows").to_string();
        assert!(e.contains("has not the rows"), "{e}");
        assert!(stream.add(runs, &weight).is_err());
    }
    let rows = Runs::of(0..2);
    assert!(stream.read(rows, &Tensor::full(&[5], 1.0), EPS).is_err());
    assert!(stream.read(rows, &weight, f32::NAN).is_err());
    assert!(stream.add(rows, &weight).expect_err("too few").to_string().contains("8 elements"));
    assert!(Stream::zeros(hywu_kernels::Device::Cpu, 0, 3).is_err());
}
