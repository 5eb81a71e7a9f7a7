//! Generator folders and conditions that can't be used: each is refused in one line that says what is wrong and what would be right.

use hywu_core::{Checkpoint, Dtype, TensorWriter};
use hywu_generator::{Generator, GeneratorConfig};
use hywu_kernels::Tensor;
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-dense")
}

fn config() -> Value {
    let text = fs::read(golden().join("config.json")).expect("readable");
    serde_json::from_slice(&text).expect("JSON")
}

#[track_caller]
fn one_line<T>(result: Result<T, impl std::fmt::Display>, messages: &[&str]) {
    let text = result.err().expect("refused").to_string();
    assert!(!text.contains(char::is_control) && text.len() < 5000, "{text}");
    for message in messages {
        assert!(text.contains(message), "`{message}` is not in: {text}");
    }
}

/// tiny-dense in two shards, after `change` of a tensor's name, shape and values.
fn sharded(mut change: impl FnMut(&mut String, &mut Vec<usize>, &mut Vec<f32>)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    fs::copy(golden().join("config.json"), dir.path().join("config.json")).expect("a copy");
    let source = Checkpoint::open(golden()).expect("a good file");
    let (mut shards, mut map) = ([TensorWriter::new(), TensorWriter::new()], serde_json::Map::new());
    let files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    for name in source.names() {
        let x = source.read(name).expect("there");
        let (mut name, mut shape) = (name.to_owned(), x.shape().to_vec());
        let mut data: Vec<f32> = x.iter().copied().collect();
        change(&mut name, &mut shape, &mut data);
        let second = usize::from(name.starts_with("model.blocks"));
        shards[second].add(&name, &shape, &data, Dtype::Bf16);
        map.insert(name, files[second].into());
    }
    for (shard, file) in shards.iter().zip(files) {
        shard.write(dir.path().join(file)).expect("writable");
    }
    let index = json!({"weight_map": map}).to_string();
    fs::write(dir.path().join("model.safetensors.index.json"), index).expect("writable");
    dir
}

#[test]
fn weights_that_do_not_fit_are_named_with_their_shard() {
    let name = "model.blocks.0.self_attn_hw.W_k.weight";
    let good = sharded(|_, _, _| {});
    Generator::load(good.path()).expect("a good folder");
    for (value, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let dir = sharded(|n, _, data| {
            if n == name {
                data[5] = value;
            }
        });
        let message = format!("tensor `{name}` holds {shown} at element 5");
        one_line(Generator::load(dir.path()), &["model-00002-of-00002.safetensors", &message]);
    }
    let dir = sharded(|n, shape, _| {
        if n == name {
            *shape = vec![16, 64];
        }
    });
    let message = format!("tensor `{name}` has shape [16, 64], expected [32, 32]");
    one_line(Generator::load(dir.path()), &["model-00002-of-00002.safetensors", &message]);
    let dir = sharded(|n, _, _| {
        if n == name {
            n.push('x');
        }
    });
    let message = format!("missing tensors: [\"{name}\"]; unused tensors: [\"{name}x\"]");
    one_line(Generator::load(dir.path()), &[&message]);
}

#[test]
fn shards_that_are_missing_or_truncated_are_named() {
    let dir = sharded(|_, _, _| {});
    let shard = dir.path().join("model-00002-of-00002.safetensors");
    let good = fs::read(&shard).expect("readable");
    fs::write(&shard, &good[..good.len() / 2]).expect("writable");
    one_line(Generator::load(dir.path()), &["model-00002-of-00002.safetensors", "truncated"]);
    fs::remove_file(&shard).expect("there");
    one_line(Generator::load(dir.path()), &["`model-00002-of-00002.safetensors` can't be opened"]);
}

#[test]
fn configs_that_can_not_work_say_why() {
    let refused = |changes: &[(&str, Value)], message: &str| {
        let mut config = config();
        changes.iter().for_each(|(key, value)| config[*key] = value.clone());
        one_line(GeneratorConfig::from_json(config.to_string().as_bytes()), &["config: ", message]);
        // And with the file's name, from a folder.
        let dir = tempfile::tempdir().expect("a temporary folder");
        fs::write(dir.path().join("config.json"), config.to_string()).expect("writable");
        one_line(Generator::load(dir.path()), &["config.json: ", message]);
    };
    refused(&[("output_dim", json!(1))], "output_dim 1 must equal token_dim ");
    refused(&[("head_dim", json!(12))], "head_dim 12 must divide d_model 32");
    refused(&[("d_model", json!(36))], "must divide d_model 36");
    refused(
        &[("d_model", json!(36)), ("head_dim", json!(6))],
        "head_dim 6 must divide d_model 36 and be a multiple of 4",
    );
    refused(&[("rank", json!("4"))], "`rank`: invalid type: string \"4\", expected usize");
    refused(&[("rank", json!(-4))], "`rank`: invalid value: integer `-4`");
    refused(&[("rank", json!(1.5))], "`rank`: invalid type: floating point `1.5`");
    let dims = json!({"lora_A_dim": 4, "lora_B_dim": 4});
    for mapping in [
        json!({"type": "sparse", "lora_A_dim": 4, "lora_B_dim": 4}),
        json!({"type": "grouped", "num_experts": 2}),
        json!({"type": "grouped", "num_experts": 2, "lora_A_dim": 4, "lora_B_dim": 4}),
        json!({"sub_weights": {"w": dims}}),
        json!({"lora_A_dim": 4}),
        json!({}),
    ] {
        refused(&[("pg_mapping", json!({"q": mapping}))], "pg_mapping entry `q` is neither plain");
    }
    refused(&[("pg_mapping", json!({"q": [4, 4]}))], "pg_mapping entry `q`");
    refused(&[("pg_mapping", json!({"q": null}))], "pg_mapping entry `q`");
    refused(&[("pg_mapping", json!([]))], "`pg_mapping`");
    refused(&[("pg_mapping", json!({}))], "pg_mapping names no module");
    let without = json!({"type": "grouped", "sub_weights": {"w": dims}});
    refused(&[("pg_mapping", json!({"q": without}))], "`q` needs `num_experts`");
    let half = json!({"type": "grouped", "num_experts": 2, "sub_weights": {"w": {"lora_A_dim": 4}}});
    refused(&[("pg_mapping", json!({"q": half}))], "`q.w` needs `lora_A_dim` and `lora_B_dim`");
    let row = json!({"type": "grouped", "num_experts": 2, "sub_weights": {"w": [4, 4]}});
    refused(&[("pg_mapping", json!({"q": row}))], "pg_mapping entry `q`");
}

#[test]
fn config_text_that_is_not_a_config_is_refused() {
    for (text, message) in [
        ("", "config.json"),
        ("{", "config.json"),
        ("[]", "an object is expected"),
        ("[32, 16]", "an object is expected"),
        (r#"{"rank": 4, "rank": 8}"#, "`rank` stands there twice"),
        (r#"{"pg_mapping": {"q": {"lora_A_dim": 4, "lora_B_dim": 4}, "q": {}}}"#, "`q` stands there twice"),
        (r#"{"extra": {"x": 1, "x": 1}}"#, "`x` stands there twice"),
        (r#"{"rank": 4} {}"#, "trailing"),
        (r#"{"alpha": 1e999}"#, "out of range"),
    ] {
        one_line(GeneratorConfig::from_json(text.as_bytes()), &["config: ", message]);
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = dir.path().join("config.json");
    fs::write(&file, " ".repeat((1 << 20) + 1)).expect("writable");
    one_line(Generator::load(dir.path()), &["config.json: larger than the 1048576 bytes"]);
    fs::remove_file(&file).expect("there");
    fs::create_dir(&file).expect("writable");
    one_line(Generator::load(dir.path()), &["config.json: not a regular file"]);
}

#[test]
fn conditions_that_do_not_fit_are_refused() {
    let generator = Generator::load(golden()).expect("a good folder");
    let width = generator.config.input_dim;
    let expected = format!("expected [batch, 1, length, {width}] or [batch, length, {width}]");
    for shape in [
        vec![1, 1, 3, width + 1],
        vec![1, 3, width - 1],
        vec![1, 2, 3, width],
        vec![3, width],
        vec![width],
        vec![1, 0, width],
        vec![0, 3, width],
        vec![],
    ] {
        let message = format!("condition: shape {shape:?}, ");
        one_line(generator.generate(&Tensor::zeros(&shape)), &[&message, &expected]);
    }
    for (value, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let condition = Tensor::full(&[1, 2, width], value);
        one_line(generator.generate(&condition), &[&format!("condition: it holds {shown}")]);
    }
}
