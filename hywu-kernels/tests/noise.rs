//! Noise: the generator's own numbers, the same bits at every place.

use hywu_core::{Dtype, Philox};
use hywu_kernels::{
    Device, Tensor,
    ops::noise::{noise_window, noised},
    testing::{for_each_place, random},
};

/// The elements' bits.
#[track_caller]
fn bits(x: &Tensor) -> Vec<u32> {
    x.to_host().expect("the device works").data().iter().map(|v| v.to_bits()).collect()
}

#[test]
fn noise_does_not_depend_on_the_window() {
    for_each_place(|place| {
        let noise = |seed, y0, x0, h, w| noise_window(place.device, seed, y0, x0, h, w, 3).expect("it works");
        let (whole, part) = (bits(&noise(7, 0, 0, 40, 50)), bits(&noise(7, 11, 13, 20, 30)));
        for y in 0..20 {
            assert_eq!(part[y * 90..(y + 1) * 90], whole[((y + 11) * 50 + 13) * 3..][..90]);
        }
        assert_ne!(bits(&noise(8, 0, 0, 4, 4)), bits(&noise(7, 0, 0, 4, 4)));
        assert_eq!(noise(8, 3, 3, 0, 4).shape(), [0, 4, 3]);
    });
}

#[test]
fn every_device_draws_the_generators_bits() {
    // (y0, x0, height, width, channels)
    let mut windows =
        vec![[0, 0, 1, 1, 1], [5, 3, 7, 1, 3], [1, 1, 2, 4096 + 257, 3], [9, 2, 4096 + 257, 1, 2]];
    windows.extend([1, 15, 16, 17, 63, 64, 65, 127, 128, 129].map(|n| [n, n / 2, 3, n, 3]));
    // Beyond what 32 bits count.
    windows.push([5_000_000_000, 3_000_000_001, 3, 9, 3]);
    let seed = 0xfeed_5eed_1234_5678;
    for_each_place(|place| {
        for [y0, x0, h, w, c] in windows.clone() {
            let got = noise_window(place.device, seed, y0, x0, h, w, c).expect("it works");
            assert_eq!((got.shape(), got.dtype(), got.device()), (&[h, w, c][..], Dtype::F32, place.device));
            let mut row = vec![0.0; w * c];
            let mut expected = Vec::new();
            for y in y0..y0 + h {
                Philox::new(seed).fill_normal(y as u64, (x0 * c) as u64, &mut row);
                expected.extend(row.iter().map(|v| v.to_bits()));
            }
            assert_eq!(bits(&got), expected, "{:?} at {place:?}", [y0, x0, h, w, c]);
        }
        // Enough to meet every octant and both ends of the radius.
        let many = noise_window(place.device, 3, 0, 0, 64, 1024, 4).expect("it works");
        assert_eq!(bits(&many), bits(&noise_window(Device::Cpu, 3, 0, 0, 64, 1024, 4).expect("it works")));
    });
}

#[test]
fn noised_is_the_mean_of_target_and_noise() {
    let t = [0.0, 0.3, 1.0];
    let sizes = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 4096 + 257];
    for_each_place(|place| {
        for n in sizes {
            let target = place.tensor(&random(5, &[3, n]));
            let got = noised(&target, &t, 11).expect("it works");
            assert_eq!((got.shape(), got.dtype()), (&[3, n][..], place.dtype));
            let target = target.to_host().expect("the device works");
            let expected = noised(&target, &t, 11).expect("it works");
            // In bf16 the same value is rounded once.
            assert_eq!(bits(&got), bits(&place.tensor(&expected)), "{n} at {place:?}");
            let mut noise = vec![0.0; n];
            Philox::new(11).fill_normal(2, 0, &mut noise);
            for (i, noise) in noise.iter().enumerate() {
                let x = target.data()[n + i];
                assert_eq!(expected.data()[n + i].to_bits(), (t[1] * x + (1.0 - t[1]) * noise).to_bits());
            }
            // An entry's draw does not depend on how many follow.
            let first = place.tensor(&Tensor::new(&[1, n], target.data()[..n].to_vec()).expect("one entry"));
            assert_eq!(bits(&noised(&first, &t[..1], 11).expect("it works")), bits(&got)[..n]);
        }
        assert!(noised(&place.tensor(&random(5, &[3, 4])), &t[..2], 0).is_err());
        assert!(noised(&place.tensor(&random(5, &[0, 4])), &[], 0).is_ok());
    });
    assert!(noise_window(Device::Cuda(10_000), 0, 0, 0, 1, 1, 1).is_err());
}
