//! Embedding of the timestep.

use hywu_kernels::ops::timestep::timestep_embedding;

#[test]
fn timestep_zero_is_cos_one_sin_zero() {
    let e = timestep_embedding(&[0.0, 0.5], 8);
    assert_eq!(e.shape(), [2, 8]);
    assert_eq!(e.data()[..8], [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
    assert!((f64::from(e.data()[12]) - 500f64.sin()).abs() < 1e-6);
}
