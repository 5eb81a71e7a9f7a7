//! Random weights: the same everywhere, and of sizes that a forward pass can work with; the ladder of sizes.

use hywu_core::{Checkpoint, Dtype};
use hywu_generator::{
    Error, Generator, GeneratorConfig, Progress, RandomCheckpoint, Size, write_random_checkpoint,
};
use hywu_kernels::{
    Device,
    testing::{assert_same_bits, for_each_place, random},
};
use std::ops::ControlFlow;

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
            assert_same_bits(&[a.to_host().expect("the device works")], std::slice::from_ref(b), name);
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

/// Every file of a folder, by name.
fn files(folder: &std::path::Path) -> std::collections::BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("readable"));
    let name = |path: std::path::PathBuf| path.file_name().expect("a name").to_string_lossy().into_owned();
    entries.map(|e| (name(e.path()), std::fs::read(e.path()).expect("readable"))).collect()
}

#[test]
fn checkpoints_hold_the_same_weights_in_shards() {
    let dir = tempfile::tempdir().expect("a folder");
    let write = |name: &str, shard| {
        let config = config();
        let what = RandomCheckpoint { config: &config, seed: 5, condition: 9, shard };
        let folder = dir.path().join(name);
        let mut last = 0.0;
        let mut watch = |at: Progress| {
            assert!(at.done > last && at.done <= at.total);
            last = at.done;
            ControlFlow::Continue(())
        };
        write_random_checkpoint(&what, &folder, &mut watch).expect("writable");
        folder
    };
    let host = Generator::random(config(), 5, Device::Cpu, Dtype::F32).expect("small");
    let (one, many) = (write("one", u64::MAX), write("many", 50_000));
    assert!(files(&many).keys().any(|n| n.starts_with("model-00003-of-000")), "{:?}", files(&many).keys());
    assert!(files(&write("again", 50_000)) == files(&many));
    for folder in [&one, &many] {
        let read = Generator::load(folder).expect("a good folder");
        assert_eq!(read.config, config());
        for ((name, a), (_, b)) in read.params.iter().zip(host.params.iter()) {
            assert_same_bits(std::slice::from_ref(a), std::slice::from_ref(b), name);
        }
        let condition = Checkpoint::open(folder.join("condition.safetensors")).expect("a good file");
        assert_eq!(condition.info("condition").expect("there"), (vec![1, 1, 9, 24], Dtype::F32));
        // No shard but of one tensor is larger, tensors of a block lie together.
        let sizes: Vec<_> =
            files(folder).iter().filter(|(n, _)| n.starts_with("model-")).map(|f| f.1.len()).collect();
        assert!(sizes.iter().all(|&size| size < 60_000), "{sizes:?}");
    }
    let index: serde_json::Value =
        serde_json::from_slice(&files(&many)["model.safetensors.index.json"]).expect("JSON");
    assert_eq!(index["metadata"]["total_parameters"], host.params.numel());
    assert_eq!(index["metadata"]["total_size"], 2 * host.params.numel());
    assert!(index["weight_map"].as_object().is_some_and(|map| map.len() == host.params.len()));
}

#[test]
fn a_checkpoint_that_is_stopped_leaves_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = config();
    let what = RandomCheckpoint { config: &config, seed: 5, condition: 9, shard: 50_000 };
    let stop = |at: Progress| match at.done > 0.5 * at.total {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    };
    let stopped = write_random_checkpoint(&what, dir.path().join("x"), &mut { stop });
    assert!(matches!(stopped, Err(Error::Interrupted)), "{stopped:?}");
    assert_eq!(std::fs::read_dir(dir.path()).expect("a folder").count(), 0);
}
