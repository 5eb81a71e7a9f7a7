//! The published forward pass: recorded results of seven small checkpoints.

use hywu_core::{Checkpoint, Dtype, TensorWriter};
use hywu_generator::{Generator, GeneratorConfig};
use hywu_kernels::Tensor;
use std::path::{Path, PathBuf};

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case)
}

/// Relative Frobenius error <= 1e-5 and max |difference| <= 1e-4 over every tensor, names, order and shapes equal.
fn check(folder: &Path) {
    let case = folder.display();
    let generator = Generator::load(folder).expect("a good checkpoint");
    let read = |file: &str| Checkpoint::open(folder.join(file)).expect("a good file");
    let condition = read("condition.safetensors").read("condition").expect("there");
    let adapter = generator.generate(&Tensor::from_array(&condition)).expect("a good condition");
    let expected = read("expected.safetensors");
    assert_eq!(adapter.modules.len() * 2 + 1, expected.names().len(), "{case}");
    let names: Vec<_> = generator.spec().module_names().collect();
    assert_eq!(adapter.modules.keys().cloned().collect::<Vec<_>>(), names, "{case}");
    let (mut difference, mut norm, mut worst) = (0.0f64, 0.0f64, 0.0f64);
    for (name, lora) in &adapter.modules {
        for (kind, got) in [("lora_A", &lora.lora_a), ("lora_B", &lora.lora_b)] {
            let want = expected.read_shaped(&format!("{name}.{kind}"), got.shape()).expect("the same shape");
            for (a, b) in got.iter().zip(&want) {
                let delta = f64::from(a - b).abs();
                assert!(!delta.is_nan(), "{case} {name}");
                difference += delta * delta;
                norm += f64::from(*b).powi(2);
                worst = worst.max(delta);
            }
        }
    }
    let relative = (difference / norm).sqrt();
    println!("{case}: relative error {relative:.2e}, largest difference {worst:.2e}");
    assert!(relative <= 1e-5 && worst <= 1e-4, "{case}: {relative:e} {worst:e}");
    assert_eq!(expected.read("scale").expect("there").first(), Some(&adapter.scale), "{case}");
}

#[test]
fn six_small_cases() {
    for case in ["tiny-dense", "tiny-padded", "tiny-moe", "tiny-order", "tiny-wide", "tiny-moe-padded"] {
        check(&folder(case));
    }
}

/// The seventh (bf16, three shards) is too large to keep here; `HYWU_GOLDEN` names the folder that holds it.
#[test]
fn the_sharded_case() {
    match std::env::var_os("HYWU_GOLDEN") {
        Some(root) => check(&Path::new(&root).join("sharded")),
        None => println!("SKIPPED: HYWU_GOLDEN is not set"),
    }
}

#[test]
fn shards_in_bf16_equal_one_file_of_rounded_weights() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = Checkpoint::open(folder("tiny-dense")).expect("a good file");
    let config = std::fs::read(folder("tiny-dense").join("config.json")).expect("readable");
    std::fs::write(dir.path().join("config.json"), &config).expect("writable");
    let mut shards = [TensorWriter::new(), TensorWriter::new(), TensorWriter::new()];
    let mut whole = TensorWriter::new();
    let mut map = serde_json::Map::new();
    for (i, name) in source.names().into_iter().enumerate() {
        let x = source.read(name).expect("there");
        let data: Vec<f32> = x.iter().copied().collect();
        shards[i % 3].add(name, x.shape(), &data, Dtype::Bf16);
        let rounded: Vec<f32> = data.iter().map(|v| f32::from_bits(round(v.to_bits()))).collect();
        whole.add(name, x.shape(), &rounded, Dtype::F32);
        map.insert(name.into(), format!("model-{}.safetensors", i % 3).into());
    }
    for (i, shard) in shards.iter().enumerate() {
        shard.write(dir.path().join(format!("model-{i}.safetensors"))).expect("writable");
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map}).to_string();
    std::fs::write(dir.path().join("model.safetensors.index.json"), index).expect("writable");
    let one = dir.path().join("whole.safetensors");
    whole.write(&one).expect("writable");
    let condition =
        Checkpoint::open(folder("tiny-dense").join("condition.safetensors")).expect("a good file");
    let condition = Tensor::from_array(&condition.read("condition").expect("there"));
    let config = GeneratorConfig::from_json(&config).expect("a good config");
    let single =
        Generator::from_checkpoint(config, &Checkpoint::open(&one).expect("a good file")).expect("it fits");
    let sharded = Generator::load(dir.path()).expect("good shards");
    assert_eq!(sharded.generate(&condition).expect("good"), single.generate(&condition).expect("good"));
}

/// Round to nearest even in the upper 16 bits.
fn round(bits: u32) -> u32 {
    (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000
}
