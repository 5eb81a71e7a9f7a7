//! Cutting into tiles and blending them: the same bits at every place.

use hywu_core::Dtype;
use hywu_kernels::{
    Tensor,
    ops::{
        elementwise::{lerp, mean_of},
        tile_blend::{TileAt, add_tents, gather_tiles, tile_blend, tile_positions},
    },
    testing::{for_each_place, random},
};

/// Tiles of `size` that cover [h, w], every `step` pixels and at the ends.
fn cover(h: usize, w: usize, size: usize, step: usize) -> Vec<TileAt> {
    let starts = |n: usize| (0..n - size).step_by(step).chain([n - size]).collect::<Vec<_>>();
    starts(h).iter().flat_map(|&y| starts(w).into_iter().map(move |x| TileAt { y, x })).collect()
}

#[track_caller]
fn bits(x: &Tensor) -> Vec<u32> {
    x.to_host().expect("the device works").data().iter().map(|v| v.to_bits()).collect()
}

/// Runs the body at every device; these ops work in f32 alone.
fn for_each_device(mut body: impl FnMut(&dyn Fn(&Tensor) -> Tensor)) {
    for_each_place(|place| {
        if place.dtype == Dtype::F32 {
            body(&|x| place.tensor(x));
        }
    });
}

#[test]
fn blended_tiles_of_one_picture_are_that_picture() {
    // (height, width, size, step): within a cell of 64 pixels, over several, and a single tile.
    for [h, w, size, step] in
        [[20, 25, 8, 5], [129, 130, 33, 17], [64, 65, 64, 1], [17, 17, 17, 1], [5, 300, 1, 1]]
    {
        for channels in [1, 3, 4] {
            let picture = random(1, &[h, w, channels]);
            let at = cover(h, w, size, step);
            let on_cpu = gather_tiles(&picture, &at, size).expect("inside");
            for (t, tile) in at.iter().zip(on_cpu.data().chunks(size * size * channels)) {
                for (y, row) in tile.chunks(size * channels).enumerate() {
                    assert_eq!(row, &picture.data()[((t.y + y) * w + t.x) * channels..][..size * channels]);
                }
            }
            // Tiles that disagree, so that the weights matter.
            let other = random(2, on_cpu.shape());
            let other_on_cpu = tile_blend(&other, &at, h, w).expect("covered");
            for_each_device(|there| {
                let tiles = gather_tiles(&there(&picture), &at, size).expect("inside");
                assert_eq!((tiles.shape(), bits(&tiles)), (on_cpu.shape(), bits(&on_cpu)));
                let blended = tile_blend(&tiles, &at, h, w).expect("covered");
                assert_eq!(blended.shape(), picture.shape());
                let blended = blended.to_host().expect("the device works");
                let distance = blended.data().iter().zip(picture.data()).map(|(a, b)| (a - b).abs());
                let worst = distance.fold(0.0, |m, v| if v.is_nan() || v > m { v } else { m });
                assert!(worst < 1e-5, "{worst}");
                let other = tile_blend(&there(&other), &at, h, w).expect("covered");
                assert_eq!(bits(&other), bits(&other_on_cpu));
            });
        }
    }
}

#[test]
fn bad_tiles_are_refused() {
    for_each_place(|place| {
        let device = place.device;
        let there = |shape: &[usize]| random(1, shape).to(device, Dtype::F32).expect("the device works");
        let (field, tile) = (there(&[20, 25, 3]), there(&[1, 8, 8, 3]));
        let corner = TileAt { y: 0, x: 0 };
        let e = tile_blend(&tile, &[corner], 20, 25).expect_err("mostly uncovered").to_string();
        assert!(e.contains("covers the pixel (0, 8)"), "{e}");
        let e = tile_blend(&tile, &[corner], 9, 8).expect_err("a row is uncovered").to_string();
        assert!(e.contains("covers the pixel (8, 0)"), "{e}");
        let e = tile_blend(&tile, &[TileAt { y: 1, x: 0 }], 9, 8).expect_err("uncovered").to_string();
        assert!(e.contains("covers the pixel (0, 0)"), "{e}");
        let four = there(&[4, 8, 8, 3]);
        let hole = [[0, 0], [0, 9], [8, 0], [8, 9]].map(|[y, x]| TileAt { y, x });
        let e = tile_blend(&four, &hole, 16, 17).expect_err("a column is uncovered").to_string();
        assert!(e.contains("covers the pixel (0, 8)"), "{e}");
        for wrong in [TileAt { y: 13, x: 0 }, TileAt { y: 0, x: 18 }, TileAt { y: usize::MAX, x: 0 }] {
            assert!(tile_blend(&tile, &[wrong], 20, 25).is_err());
            assert!(gather_tiles(&field, &[wrong], 8).is_err());
        }
        assert!(tile_blend(&tile, &[corner, corner], 8, 8).is_err());
        assert!(tile_blend(&there(&[1, 8, 7, 3]), &[corner], 8, 8).is_err());
        assert!(gather_tiles(&field, &[corner], 0).is_err() && gather_tiles(&tile, &[corner], 8).is_err());
        assert_eq!(gather_tiles(&field, &[], 8).expect("nothing").shape(), [0, 8, 8, 3]);
        let axis = there(&[20]);
        assert!(tile_positions(&axis, &axis, &[TileAt { y: 0, x: 13 }], 8).is_err());
        if place.dtype != Dtype::F32 {
            assert!(gather_tiles(&place.tensor(&random(1, &[20, 25, 3])), &[corner], 8).is_err());
            assert!(tile_blend(&place.tensor(&random(1, &[1, 8, 8, 3])), &[corner], 8, 8).is_err());
        }
    });
}

#[test]
fn positions_are_those_of_rows_and_columns() {
    let (down, across) = (random(1, &[70]), random(2, &[131]));
    let at = cover(70, 131, 17, 11);
    for_each_device(|there| {
        let got = tile_positions(&there(&down), &there(&across), &at, 17).expect("inside");
        assert_eq!(got.shape(), [at.len(), 17, 17, 2]);
        let got = got.to_host().expect("the device works");
        for (i, pixel) in got.data().chunks(2).enumerate() {
            let (t, y, x) = (at[i / 289], i / 17 % 17, i % 17);
            assert_eq!(pixel, [down.data()[t.y + y], across.data()[t.x + x]]);
        }
    });
}

#[test]
fn a_part_is_added_with_its_weights() {
    for ([h, w], [rows, columns]) in [([20, 33], [17, 31]), ([9, 129], [9, 129]), ([300, 5], [257, 1])] {
        for channels in [1, 3] {
            let (sum, part) = (random(1, &[h, w, channels]), random(2, &[rows, columns, channels]));
            let (down, across) = (random(3, &[rows]), random(4, &[columns]));
            let corner = TileAt { y: h - rows, x: (w - columns) / 2 };
            for_each_device(|there| {
                let mut got = there(&sum);
                let before = got.clone();
                add_tents(&mut got, &there(&part), corner, down.data(), across.data()).expect("inside");
                // A sum that is shared is copied first.
                assert_eq!(bits(&before), bits(&sum));
                let mut expected = sum.clone();
                for (i, v) in part.data().iter().enumerate() {
                    let (y, x, c) = (i / channels / columns, i / channels % columns, i % channels);
                    expected.data_mut()[((corner.y + y) * w + corner.x + x) * channels + c] +=
                        down.data()[y] * across.data()[x] * v;
                }
                assert_eq!(bits(&got), bits(&expected));
                let mut add = |corner, down: &[f32]| {
                    add_tents(&mut got, &there(&part), corner, down, across.data()).is_err()
                };
                assert!(add(TileAt { y: h, x: 0 }, down.data()) && add(corner, &down.data()[1..]));
            });
        }
    }
}

#[test]
fn steps_of_a_sampler() {
    for n in [1, 3, 4, 129, 40_000 + 257] {
        let (a, b) = (random(1, &[n]), random(2, &[n]));
        for_each_device(|there| {
            let pairs = || a.data().iter().zip(b.data());
            let step: Vec<u32> = pairs().map(|(a, b)| (a + 0.3 * (b - a)).to_bits()).collect();
            assert_eq!(bits(&lerp(&there(&a), &there(&b), 0.3).expect("one shape")), step);
            let mean: Vec<u32> = pairs().map(|(a, b)| (0.5 * (a + b)).to_bits()).collect();
            assert_eq!(bits(&mean_of(&there(&a), &there(&b)).expect("one shape")), mean);
            assert!(lerp(&there(&a), &there(&random(1, &[n + 1])), 0.3).is_err());
        });
    }
}
