//! Philox: the published known answers, and normals that are normal.

use hywu_core::Philox;

#[test]
fn known_answers() {
    // Random123's kat_vectors for philox4x32-10.
    let zero = Philox::new(0).block(0, 0);
    assert_eq!(zero, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    let ones = Philox::new(u64::MAX).block(u64::MAX, u64::MAX);
    assert_eq!(ones, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    let pi = Philox::new(0x299f_31d0_a409_3822).block(0x0370_7344_1319_8a2e, 0x85a3_08d3_243f_6a88);
    assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
}

#[test]
fn filling_equals_single_draws_from_any_start() {
    let philox = Philox::new(7);
    for start in [0, 1, 2, 3, 4, 1001] {
        let mut out = [0.0; 13];
        philox.fill_normal(5, start, &mut out);
        for (i, x) in out.iter().enumerate() {
            assert_eq!(x.to_bits(), philox.normal(5, start + i as u64).to_bits());
        }
    }
}

#[test]
fn normals_follow_box_muller_in_f64() {
    let philox = Philox::new(11);
    for block in 0..20_000 {
        let words = philox.block(3, block);
        let unit = |w: u32| (f64::from(w >> 9) + 0.5) / 8_388_608.0;
        let angle = |w: u32| f64::from(w >> 6) / f64::from(1 << 26) * std::f64::consts::TAU;
        for pair in 0..2 {
            let (r, a) = ((-2.0 * unit(words[2 * pair]).ln()).sqrt(), angle(words[2 * pair + 1]));
            for (i, expected) in [r * a.cos(), r * a.sin()].into_iter().enumerate() {
                let got = f64::from(philox.normal(3, 4 * block + (2 * pair + i) as u64));
                assert!((got - expected).abs() < 1e-5, "block {block}: {got} against {expected}");
            }
        }
    }
}

#[test]
fn moments_of_a_standard_normal() {
    let mut x = vec![0.0; 1 << 20];
    Philox::new(1).fill_normal(0, 0, &mut x);
    let moment = |k: i32| x.iter().map(|&v| f64::from(v).powi(k)).sum::<f64>() / x.len() as f64;
    assert!(moment(1).abs() < 0.005, "{}", moment(1));
    assert!((moment(2) - 1.0).abs() < 0.01, "{}", moment(2));
    assert!(moment(3).abs() < 0.02, "{}", moment(3));
    assert!((moment(4) - 3.0).abs() < 0.06, "{}", moment(4));
}

#[test]
fn integers_below_n_are_even() {
    let mut stream = Philox::new(2).stream(9);
    let mut counts = [0; 7];
    (0..70_000).for_each(|_| counts[stream.below(7)] += 1);
    assert!(counts.iter().all(|&c| (9_500..10_500).contains(&c)), "{counts:?}");
}
