//! Embedding of the timestep.

use hywu_core::Dtype;
use hywu_kernels::{
    ops::timestep::timestep_embedding,
    testing::{for_each_place, rounded_to_bf16},
};

#[test]
fn timestep_zero_is_cos_one_sin_zero() {
    let e = timestep_embedding(&[0.0, 0.5], 8);
    assert_eq!(e.shape(), [2, 8]);
    assert_eq!(e.data()[..8], [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
    assert!((f64::from(e.data()[12]) - 500f64.sin()).abs() < 1e-6);
}

/// It is computed on the host, whatever the device that reads it.
#[test]
fn every_place_gets_the_same_values() {
    for_each_place(|place| {
        for width in [2, 16, 34, 192] {
            let host = timestep_embedding(&[0.0, 0.3, 1.0], width);
            let there = place.tensor(&host).to_host().expect("the device works");
            let held = if place.dtype == Dtype::Bf16 { rounded_to_bf16(&host) } else { host };
            assert_eq!(there.data(), held.data());
        }
    });
}
