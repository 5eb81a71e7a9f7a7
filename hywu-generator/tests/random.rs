//! Random weights: the same everywhere, and of sizes that a forward pass can work with; the ladder of sizes.

use hywu_core::Dtype;
use hywu_generator::{Generator, GeneratorConfig, Size};
use hywu_kernels::{
    Device,
    testing::{assert_same_bits, for_each_place, random},
};

const CONFIG: &str = r#"{"num_base_model_layers": 3, "rank": 4, "alpha": 4, "token_dim": 16, "output_dim": 16,
    "dim_accumulation": 2, "d_model": 64, "head_dim": 16, "num_pg_layers": 3, "input_dim": 24, "pg_mapping": {
    "proj": {"lora_A_dim": 40, "lora_B_dim": 60}}}"#;

fn config() -> GeneratorConfig {
    GeneratorConfig::from_json(CONFIG.as_bytes()).expect("a good config")
}

#[test]
fn every_device_draws_the_same_weights() {
    let host = Generator::random(config(), 5, Device::Cpu, Dtype::F32).expect("small");
    for_each_place(|place| {
        let there = Generator::random(config(), 5, place.device, place.dtype).expect("small");
        for ((name, a), (_, b)) in there.params.iter().zip(host.params.iter()) {
            assert_eq!(a.shape(), b.shape(), "{name}");
            assert_same_bits(&[a.to_host().expect("the device works")], &[b.clone()], name);
        }
    });
    let other = Generator::random(config(), 6, Device::Cpu, Dtype::F32).expect("small");
    let differ = other.params.iter().zip(host.params.iter()).all(|((_, a), (_, b))| a.data() != b.data());
    assert!(differ, "the seed has no say");
}

#[test]
fn adapters_have_a_sane_size() {
    let condition = random(1, &[1, 7, 24]);
    let generator = Generator::random(config(), 1, Device::Cpu, Dtype::F32).expect("small");
    let adapter = generator.generate(&condition).expect("a good condition");
    for (name, lora) in &adapter.modules {
        for x in [&lora.lora_a, &lora.lora_b] {
            let size = (x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32).sqrt();
            assert!((0.5..2.0).contains(&size), "{name}: {size}");
        }
    }
}

#[test]
fn rungs_of_the_ladder_are_those_fractions_of_the_published_flops() {
    let flops =
        |size: Size| GeneratorConfig::scaled(size).flops(1, size.condition_length()).expect("a good config");
    // FORMAT.md section 8, with 4000 tokens.
    let published = 36.0 * 4096f64.powi(2) * 24.0 * 176_512.0
        + 1.644e9 * 4000.0
        + 1.481e12
        + 2.221e12
        + 3.8285e14
        + 6.9407e10 * 4000.0;
    assert!((flops(Size::Published) / published - 1.0).abs() < 1e-4);
    for (size, fraction) in [(Size::Quarter, 4.0), (Size::Sixteenth, 16.0), (Size::SixtyFourth, 64.0)] {
        let ratio = flops(size) * fraction / published;
        assert!((ratio - 1.0).abs() < 0.04, "{size}: {ratio}");
        assert_eq!(size.to_string().parse::<Size>().expect("its name"), size);
    }
    let e = "1/3".parse::<Size>().expect_err("no size").to_string();
    assert!(e.contains("1/64, 1/16, 1/4, published"), "{e}");
}
