//! Adapters to test with.

// Each test program uses some of it.
#![allow(dead_code)]

use hywu_core::{
    Adapter, Lora, Philox,
    adapter::{ModuleMap, Names},
};
use ndarray::ArrayD;

pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

pub fn random(shape: &[usize], seed: u64) -> ArrayD<f32> {
    let mut values = vec![0.0; shape.iter().product()];
    Philox::new(seed).fill_normal(0, 0, &mut values);
    ArrayD::from_shape_vec(shape, values).expect("as many")
}

/// `lead`: [batch] or [batch, experts].
pub fn lora(lead: &[usize], [rank, inner, outer]: [usize; 3], seed: u64) -> Lora {
    let shape = |matrix: [usize; 2]| lead.iter().copied().chain(matrix).collect::<Vec<_>>();
    Lora { lora_a: random(&shape([rank, inner]), seed), lora_b: random(&shape([outer, rank]), seed ^ 0xb) }
}

pub fn adapter<const N: usize>(scale: f32, modules: [(&str, Lora); N]) -> Adapter {
    let modules = modules.into_iter().map(|(name, lora)| (name.to_owned(), lora)).collect();
    Adapter { modules, scale, metadata: [("instruction".to_owned(), "make it \"warmer\"".to_owned())].into() }
}

pub fn fused() -> Names {
    Names::fused(&ModuleMap::default()).expect("the built-in rules work")
}
