//! Samplers and tiles.

mod common;

use common::{adapters, backbone, fresh, ids, picture};
use hywu_diffusion::{
    Backbone, Error, Picture, SampleOptions, Sampler, edit_picture, pixel_position,
    tiles::{Tiling, pad_reflect, reflect, tile_starts},
};
use hywu_kernels::{
    Device, LoraVars, Tensor,
    ops::{low_rank_linear::Apply, noise::noise_window},
};
use proptest::prelude::*;
use std::ops::ControlFlow;

fn edit(backbone: &Backbone, picture: &Picture, adapters: &LoraVars, options: &SampleOptions) -> Picture {
    let ids = ids(backbone.config.text_len);
    edit_picture(backbone, picture, &ids, adapters, options, &mut |_, _| ControlFlow::Continue(())).unwrap()
}

fn steps(steps: usize) -> SampleOptions {
    SampleOptions { steps, ..SampleOptions::default() }
}

#[test]
fn pictures_of_any_size_keep_size_and_alpha() {
    let backbone = backbone();
    for (h, w) in [(1, 1), (3, 200), (64, 64), (70, 130)] {
        let mut source = picture(h, w);
        source.alpha = Some((0..h * w).map(|i| (i % 7) as f32 / 7.0).collect());
        let out = edit(&backbone, &source, &LoraVars::none(), &steps(1));
        assert_eq!((out.height, out.width, out.rgb.len()), (h, w, h * w * 3));
        assert!(out.rgb.iter().all(|v| (-1.0..=1.0).contains(v)));
        assert_eq!(out.alpha, source.alpha);
    }
}

#[test]
fn tiles_leave_no_seam() {
    // A backbone that inverts every pixel: any misplaced, mirrored or badly weighted pixel would show.
    let mut inverter = fresh();
    let pixels = inverter.config.patch * inverter.config.patch;
    for (name, tensor) in inverter.params.iter_mut() {
        if name == "head.bias" {
            (0..3).for_each(|c| tensor.data_mut()[3 * pixels + c * 31 + 1 + c] = -2.0);
        }
    }
    let source = picture(100, 150);
    for sampler in [Sampler::Euler, Sampler::Heun] {
        for tile in [16, 64, 128] {
            let options = SampleOptions { sampler, ..steps(3) }.with_tile(tile);
            let out = edit(&inverter, &source, &LoraVars::none(), &options);
            let worst = out.rgb.iter().zip(&source.rgb).map(|(o, s)| (o + s).abs()).fold(0.0, f32::max);
            assert!(worst <= 1e-5, "tile {tile}: {worst}");
        }
    }
}

#[test]
fn a_merged_adapter_gives_the_same_picture() {
    let backbone = backbone();
    let before: Vec<Tensor> = backbone.params.iter().map(|(_, t)| t.clone()).collect();
    let source = picture(70, 100);
    let adapters = adapters(&backbone, 1, 0.2);
    let with = |apply, adapters: &LoraVars| {
        edit(&backbone, &source, adapters, &SampleOptions { apply, ..steps(2) }.with_tile(64))
    };
    let (fused, merged, auto) =
        (with(Apply::Fused, &adapters), with(Apply::Merged, &adapters), with(Apply::Auto, &adapters));
    let none = with(Apply::Fused, &LoraVars::none());
    let largest = |a: &Picture, b: &Picture| {
        let differences = a.rgb.iter().zip(&b.rgb).map(|(a, b)| (a - b).abs());
        differences.fold(0.0, |m, d| if d > m || d.is_nan() { d } else { m })
    };
    assert!(largest(&fused, &none) > 0.01, "the adapter does something");
    // A step of 8 bits is 2 / 255 here.
    for other in [&merged, &auto] {
        assert!(largest(&fused, other) < 1.0 / 255.0, "{}", largest(&fused, other));
    }
    assert!(auto.rgb == fused.rgb || auto.rgb == merged.rgb);
    // Without an adapter there is nothing to merge, and the backbone is what it was.
    assert_eq!(with(Apply::Merged, &LoraVars::none()).rgb, none.rgb);
    assert_eq!(with(Apply::Auto, &LoraVars::none()).rgb, none.rgb);
    for ((name, now), before) in backbone.params.iter().zip(&before) {
        assert_eq!(now.data(), before.data(), "{name}");
    }
}

#[test]
fn a_zero_lora_b_or_strength_changes_no_bit() {
    let backbone = backbone();
    let source = picture(70, 100);
    let base = edit(&backbone, &source, &LoraVars::none(), &steps(2));
    let zero = adapters(&backbone, 1, 0.0);
    let real = adapters(&backbone, 1, 0.1).to_adapter(1.0).expect("on the CPU");
    assert_eq!(base, edit(&backbone, &source, &zero, &steps(2)));
    assert_eq!(base, edit(&backbone, &source, &LoraVars::from_adapter(&real, 0.0), &steps(2)));
    assert_ne!(base, edit(&backbone, &source, &LoraVars::from_adapter(&real, 1.0), &steps(2)));
}

#[test]
fn tiles_at_once_and_threads_change_no_bit() {
    let backbone = backbone();
    let source = picture(100, 150);
    let run = |batch, threads| {
        let options = SampleOptions { sampler: Sampler::Heun, batch, ..steps(2) };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| edit(&backbone, &source, &LoraVars::none(), &options))
    };
    let first = run(16, 2);
    assert_eq!(first, run(1, 2));
    assert_eq!(first, run(5, 1));
    let other_seed = SampleOptions { sampler: Sampler::Heun, seed: 1, ..steps(2) };
    assert_ne!(first, edit(&backbone, &source, &LoraVars::none(), &other_seed));
}

#[test]
fn progress_counts_to_the_end_and_can_stop() {
    let (backbone, source) = (backbone(), picture(64, 130));
    let ids = ids(backbone.config.text_len);
    let options = SampleOptions { sampler: Sampler::Heun, batch: 2, ..steps(3) };
    let mut seen = Vec::new();
    let run = |seen: &mut Vec<(usize, usize)>, stop: usize| {
        edit_picture(&backbone, &source, &ids, &LoraVars::none(), &options, &mut |done, total| {
            seen.push((done, total));
            if done == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    };
    run(&mut seen, usize::MAX).unwrap();
    // 2 * 3 - 2 evaluations of the first layout, then four layouts; each has 1 x 2 or 2 x 2 tiles.
    let tiling = Tiling::new(64, 130, options.tile, options.overlap);
    let batches = tiling.layouts.each_ref().map(|l| l.at.len().div_ceil(2));
    let total = 4 * batches[0] + batches.iter().sum::<usize>();
    assert_eq!(seen, (0..=total).map(|done| (done, total)).collect::<Vec<_>>());
    seen.clear();
    assert!(matches!(run(&mut seen, 3), Err(Error::Interrupted)));
    assert_eq!(seen.len(), 4);
}

#[test]
fn bad_options_and_pictures_are_refused() {
    let good = SampleOptions::default();
    good.validate().unwrap();
    let cases = [
        ("steps", SampleOptions { steps: 0, ..good.clone() }),
        ("tile", SampleOptions { tile: 60, ..good.clone() }),
        ("tile", SampleOptions { tile: 0, ..good.clone() }),
        ("tile", SampleOptions { tile: 520, ..good.clone() }),
        ("overlap", SampleOptions { overlap: 65, ..good.clone() }),
        ("batch", SampleOptions { batch: 0, ..good.clone() }),
    ];
    for (field, options) in cases {
        assert!(options.validate().unwrap_err().to_string().contains(field), "{field}");
    }
    let backbone = backbone();
    let ids = ids(backbone.config.text_len);
    let mut go = |_, _| ControlFlow::Continue(());
    for bad in [
        Picture { height: 0, width: 5, rgb: vec![], alpha: None },
        Picture { height: 2, width: 2, rgb: vec![0.0; 11], alpha: None },
    ] {
        assert!(edit_picture(&backbone, &bad, &ids, &LoraVars::none(), &good, &mut go).is_err());
    }
    let two = adapters(&backbone, 2, 0.1);
    assert!(
        edit_picture(&backbone, &picture(8, 8), &ids, &two, &SampleOptions { batch: 1, ..good }, &mut go)
            .is_err()
    );
}

/// |x(1) - e^k| for dx/dt = k x from x(0) = 1, which is the flow whose x_hat is x + (1 - t) k x.
fn toy_error(sampler: Sampler, steps: usize) -> f64 {
    let k = 1.5f32;
    let start = Tensor::full(&[4], 1.0);
    let flow = |x: &Tensor, t: f32, _last: bool| {
        let mut x_hat = x.clone();
        x_hat.data_mut().iter_mut().for_each(|x| *x += (1.0 - t) * k * *x);
        Ok(x_hat)
    };
    let end = sampler.integrate(steps, start, flow).unwrap();
    (f64::from(end.data()[0]) - f64::from(k).exp()).abs()
}

#[test]
fn samplers_follow_a_linear_flow_to_their_order() {
    // Euler: first order. Heun: second.
    let euler = toy_error(Sampler::Euler, 20) / toy_error(Sampler::Euler, 40);
    assert!((1.7..2.3).contains(&euler), "{euler}");
    let heun = toy_error(Sampler::Heun, 20) / toy_error(Sampler::Heun, 40);
    assert!((3.0..5.0).contains(&heun), "{heun}");
    assert!(toy_error(Sampler::Heun, 40) < 0.1 * toy_error(Sampler::Euler, 40));
    assert!(toy_error(Sampler::Heun, 40) < 0.01);
    let nothing = Sampler::Euler.integrate(0, Tensor::zeros(&[1]), |x, _, _| Ok(x.clone()));
    assert!(nothing.is_err());
}

#[test]
fn mirror_padding_goes_back_and_forth() {
    let line: Vec<usize> = (0..8).map(|i| reflect(i, 3)).collect();
    assert_eq!(line, [0, 1, 2, 1, 0, 1, 2, 1]);
    assert_eq!((reflect(5, 1), reflect(3, 2)), (0, 1));
    let small = Picture::from_rgb(1, 2, vec![0.1, 0.2, 0.3, 0.4, 0.5, 0.6]);
    let padded = pad_reflect(&small, 0, 2, 3);
    assert_eq!(padded.rgb, [&small.rgb[..], &small.rgb[..3], &small.rgb[..], &small.rgb[..3]].concat());
    let around = pad_reflect(&small, 1, 1, 4);
    assert_eq!(around.rgb, [&small.rgb[3..], &small.rgb[..], &small.rgb[..3]].concat());
}

proptest! {
    #[test]
    fn tiles_cover_an_axis_evenly(n in 1usize..700, size in 1usize..130, share in 0.0f64..0.5) {
        let n = n.max(size);
        let overlap = (size as f64 * share) as usize;
        let starts = tile_starts(n, size, overlap);
        prop_assert_eq!(starts[0], 0);
        prop_assert_eq!(starts[starts.len() - 1] + size, n);
        let gaps: Vec<usize> = starts.windows(2).map(|w| w[1] - w[0]).collect();
        prop_assert!(gaps.iter().all(|&g| g > 0 && g + overlap <= size), "{:?}", starts);
        if let (Some(least), Some(most)) = (gaps.iter().min(), gaps.iter().max()) {
            prop_assert!(most - least <= 1);
            // One tile fewer would not reach.
            prop_assert!((starts.len() - 2) * (size - overlap) + size < n);
        }
    }

    #[test]
    fn a_tile_sees_its_own_place(h in 1usize..90, w in 1usize..90, seed in any::<u64>()) {
        let tiling = Tiling::new(h, w, 32, 8);
        let size = tiling.size;
        prop_assert!(size <= 32);
        let field = noise_window(Device::Cpu, seed, 0, 0, tiling.height, tiling.width, 3).unwrap();
        let place = |i: usize, n: usize| pixel_position(reflect(i.abs_diff(Tiling::MARGIN), n), n);
        for layout in &tiling.layouts {
            let tiles = tiling.gather(&field, &layout.at).unwrap();
            let positions = tiling.positions(&layout.at).unwrap();
            for (i, at) in layout.at.iter().enumerate() {
                let own = noise_window(Device::Cpu, seed, at.y, at.x, size, size, 3).unwrap();
                prop_assert_eq!(own.data(), &tiles.data()[i * own.numel()..][..own.numel()]);
                let first = &positions.data()[i * size * size * 2..][..2];
                prop_assert_eq!(first, &[place(at.y, h), place(at.x, w)][..]);
                let patch = layout.shifted.map(|shifted| if shifted { 4 } else { 0 });
                prop_assert_eq!([at.y % 8, at.x % 8], patch);
            }
        }
    }

    #[test]
    fn the_layouts_of_one_picture_add_up_to_it(h in 1usize..150, w in 1usize..150, tile in 1usize..12) {
        let tiling = Tiling::new(h, w, 8 * tile, 8);
        let field = noise_window(Device::Cpu, 1, 0, 0, tiling.height, tiling.width, 3).unwrap();
        let mut sum = Tensor::zeros(field.shape());
        for layout in &tiling.layouts {
            let tiles = tiling.gather(&field, &layout.at).unwrap();
            tiling.add(layout, &tiles, &mut sum).unwrap();
        }
        for y in Tiling::MARGIN..Tiling::MARGIN + h {
            let row = (y * tiling.width + Tiling::MARGIN) * 3..(y * tiling.width + Tiling::MARGIN + w) * 3;
            for (s, f) in sum.data()[row.clone()].iter().zip(&field.data()[row]) {
                prop_assert!((s - f).abs() < 1e-5);
            }
        }
    }
}

#[test]
fn a_step_at_every_border_of_patches_does_not_show() {
    // Layouts that are off by 1 and -1 on a chessboard of their own patches: at the borders the error jumps by 2.
    let tiling = Tiling::new(64, 64, 64, 16);
    let mut sum = Tensor::zeros(&[tiling.height, tiling.width, 3]);
    for layout in &tiling.layouts {
        let margin = layout.shifted.map(|shifted| if shifted { 4 } else { 0 });
        let mut tiles = Vec::new();
        for at in &layout.at {
            for i in 0..tiling.size * tiling.size {
                let y = (at.y + i / tiling.size - margin[0]) / 8;
                let x = (at.x + i % tiling.size - margin[1]) / 8;
                tiles.extend([if (y + x).is_multiple_of(2) { 1.0f32 } else { -1.0 }; 3]);
            }
        }
        let tiles = Tensor::new(&[layout.at.len(), tiling.size, tiling.size, 3], tiles).unwrap();
        tiling.add(layout, &tiles, &mut sum).unwrap();
    }
    let in_picture = Tiling::MARGIN..Tiling::MARGIN + 64;
    let at = |y: usize, x: usize| sum.data()[(y * tiling.width + x) * 3];
    let steps =
        in_picture.clone().flat_map(|y| in_picture.clone().skip(1).map(move |x| at(y, x) - at(y, x - 1)));
    let worst = steps.fold(0.0f32, |worst, step| worst.max(step.abs()));
    // A tent of height 1 rises by 1 / 4 a pixel.
    assert!(worst <= 2.0 / 4.0 + 1e-5, "{worst}");
}
