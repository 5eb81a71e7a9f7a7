//! Noise.

use hywu_kernels::ops::noise::noise_window;

#[test]
fn noise_does_not_depend_on_the_window() {
    let whole = noise_window(7, 0, 0, 40, 50, 3);
    let part = noise_window(7, 11, 13, 20, 30, 3);
    for y in 0..20 {
        assert_eq!(part.data()[y * 90..(y + 1) * 90], whole.data()[((y + 11) * 50 + 13) * 3..][..90]);
    }
    assert_ne!(noise_window(8, 0, 0, 4, 4, 3).data(), noise_window(7, 0, 0, 4, 4, 3).data());
}
