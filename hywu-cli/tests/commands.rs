//! The commands from the outside: generate, inspect, completions.

use assert_cmd::Command;
use hywu_core::{Checkpoint, Dtype, TensorWriter};
use predicates::{prelude::*, str::contains};
use std::{
    fs,
    path::{Path, PathBuf},
};

fn hywu() -> Command {
    Command::cargo_bin("hywu").expect("the binary is built by cargo")
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../hywu-generator/tests/golden").join(name)
}

fn generate(checkpoint: &Path, condition: &Path, output: &Path) -> Command {
    let mut command = hywu();
    command.arg("generate").arg("--checkpoint").arg(checkpoint).arg("--condition").arg(condition);
    // In f32: on a device generators compute in bf16.
    command.arg("--output").arg(output).args(["--device", "cpu"]);
    command
}

#[test]
fn generate_writes_every_published_tensor() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for case in ["tiny-dense", "tiny-moe", "tiny-order"] {
        let (folder, output) = (golden(case), dir.path().join(format!("{case}.safetensors")));
        generate(&folder, &folder.join("condition.safetensors"), &output).assert().success();
        let ours = Checkpoint::open(&output).expect("a readable file");
        let expected = Checkpoint::open(folder.join("expected.safetensors")).expect("a readable file");
        assert_eq!(ours.names(), expected.names());
        for name in expected.names() {
            let (a, b) = (ours.read(name).expect("a tensor"), expected.read(name).expect("a tensor"));
            assert_eq!(a.shape(), b.shape(), "{name}");
            let worst = a.iter().zip(&b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
            assert!(worst <= 1e-4, "{case} {name}: {worst}");
        }
    }
}

#[test]
fn generate_refuses_bad_checkpoints() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (source, bad, output) =
        (golden("tiny-dense"), dir.path().join("bad"), dir.path().join("out.safetensors"));
    let condition = source.join("condition.safetensors");
    let refused = |message: &str| {
        let assert = generate(&bad, &condition, &output).assert().code(1).stderr(contains(message));
        assert.stderr(contains("panicked").not());
        assert!(!output.exists());
    };
    refused("bad");
    fs::create_dir(&bad).expect("writable");
    refused("config.json");
    let config = fs::read_to_string(source.join("config.json")).expect("readable");
    fs::write(bad.join("config.json"), &config).expect("writable");
    refused("model.safetensors");

    let weights = fs::read(source.join("model.safetensors")).expect("readable");
    fs::write(bad.join("model.safetensors"), &weights[..weights.len() / 2]).expect("writable");
    refused("model.safetensors");
    let mut spoiled = weights.clone();
    let len = spoiled.len();
    spoiled[len - 64..].fill(0xff);
    fs::write(bad.join("model.safetensors"), spoiled).expect("writable");
    refused("holds NaN");

    fs::remove_file(bad.join("model.safetensors")).expect("there");
    let index = r#"{"metadata": {}, "weight_map": {"hidden_in.weight": "../../model.safetensors"}}"#;
    fs::write(bad.join("model.safetensors.index.json"), index).expect("writable");
    refused("../../model.safetensors");
    fs::remove_file(bad.join("model.safetensors.index.json")).expect("there");

    fs::write(bad.join("model.safetensors"), &weights).expect("writable");
    let mut value: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    value["rank"] = 0.into();
    fs::write(bad.join("config.json"), value.to_string()).expect("writable");
    refused("rank");
    fs::write(bad.join("config.json"), "{").expect("writable");
    refused("config.json");

    // A condition of the wrong width.
    fs::write(bad.join("config.json"), config).expect("writable");
    let wrong = dir.path().join("wrong.safetensors");
    TensorWriter::new()
        .add("condition", &[1, 1, 2, 3], &[0.0; 6], Dtype::F32)
        .write(&wrong)
        .expect("writable");
    generate(&bad, &wrong, &output).assert().code(1).stderr(contains("condition"));
    let unnamed = dir.path().join("unnamed.safetensors");
    TensorWriter::new().add("x", &[1], &[0.0], Dtype::F32).write(&unnamed).expect("writable");
    generate(&bad, &unnamed, &output).assert().code(1).stderr(contains("condition"));
}

/// A config of which the rows come in several lots.
const CONFIG: &str = r#"{"num_base_model_layers": 4, "rank": 4, "token_dim": 32, "output_dim": 32, "dim_accumulation": 2,
    "d_model": 64, "head_dim": 16, "num_pg_layers": 2, "input_dim": 20,
    "pg_mapping": {"proj": {"lora_A_dim": 600, "lora_B_dim": 700}}}"#;

fn random_checkpoint(what: impl AsRef<std::ffi::OsStr>, output: &Path, seed: &str) -> Command {
    let mut command = hywu();
    command.args(["generate", "--seed", seed, "--random-checkpoint"]).arg(what.as_ref());
    command.arg("--output").arg(output);
    command
}

#[test]
fn random_checkpoints_can_be_generated_with() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let config = dir.path().join("my.json");
    fs::write(&config, CONFIG).expect("writable");
    let folders = ["a", "b", "c"].map(|name| dir.path().join(name));
    for (folder, seed) in folders.iter().zip(["1", "1", "2"]) {
        random_checkpoint(&config, folder, seed).assert().success().stderr(contains("random weights"));
    }
    let weights = |folder: &PathBuf| fs::read(folder.join("model.safetensors")).expect("readable");
    assert!(weights(&folders[0]) == weights(&folders[1]) && weights(&folders[0]) != weights(&folders[2]));

    let output = dir.path().join("adapter.safetensors");
    let condition = folders[0].join("condition.safetensors");
    generate(&folders[0], &condition, &output).args(["--dtype", "bf16"]).assert().success();
    let file = Checkpoint::open(&output).expect("a readable file");
    assert_eq!(file.names().len(), 4 * 2 + 1);
    let (shape, dtype) = file.info("model.layers.3.proj.lora_B").expect("there");
    assert_eq!((shape, dtype), (vec![1, 700, 4], Dtype::Bf16));

    // It tells which weights and which condition it is from: the hash is of contents, wherever they are.
    let origin = |folder: &Path, condition: &Path| {
        generate(folder, condition, &output).assert().success();
        let told = Checkpoint::open(&output).expect("a readable file").metadata().clone();
        assert!(told["program"].starts_with("hywu "), "{told:?}");
        (told["model_hash"].clone(), told["condition_hash"].clone())
    };
    let first = origin(&folders[0], &condition);
    assert!(first.0.len() == 64 && first.1.len() == 64 && first.0 != first.1, "{first:?}");
    assert_eq!(origin(&folders[1], &folders[1].join("condition.safetensors")), first);
    let (model, other) = origin(&folders[2], &condition);
    assert!(model != first.0 && other == first.1);
    assert_ne!(origin(&folders[0], &folders[2].join("condition.safetensors")).1, first.1);

    // What stands there stays; names that mean nothing are told with those that do.
    let written = weights(&folders[0]);
    random_checkpoint(&config, &folders[0], "3").assert().code(1).stderr(contains("there already"));
    assert!(weights(&folders[0]) == written);
    random_checkpoint("1/3", &dir.path().join("d"), "0").assert().code(1).stderr(contains("1/64, 1/16, 1/4"));
    random_checkpoint("1/64", &dir.path().join("d"), "0").args(["--device", "cpu"]).assert().code(2);
    hywu().args(["generate", "--output", "x"]).assert().code(2).stderr(contains("--checkpoint"));
}

#[test]
fn too_little_memory_is_told_with_what_is_enough() {
    let (dir, folder) = (tempfile::tempdir().expect("a temporary folder"), golden("tiny-moe"));
    let (condition, output) = (folder.join("condition.safetensors"), dir.path().join("out.safetensors"));
    let with = |memory: &str| {
        let mut command = generate(&folder, &condition, &output);
        command.args(["--max-memory", memory]);
        command
    };
    let refused = with("512KiB").assert().code(1);
    let text = String::from_utf8_lossy(&refused.get_output().stderr).into_owned();
    assert!(text.contains("524288 bytes of memory are too little"), "{text}");
    let least = text.trim().rsplit(' ').next().expect("the least");
    assert!(!output.exists());
    with(least).assert().success();
    for bad in ["0", "many", "-1GB"] {
        generate(&folder, &condition, &output).arg(format!("--max-memory={bad}")).assert().code(2);
    }
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_no_random_checkpoint() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let config = dir.path().join("my.json");
    fs::write(&config, CONFIG).expect("writable");
    let program = assert_cmd::cargo::cargo_bin("hywu");
    let output = dir.path().join("big");
    let script = format!(
        "trap '' XFSZ; ulimit -f 100; exec {program:?} generate --random-checkpoint {config:?} --output {output:?}"
    );
    Command::new("sh").arg("-c").arg(script).assert().code(1).stderr(contains("big"));
    assert_eq!(fs::read_dir(dir.path()).expect("a folder").count(), 1);
}

#[cfg(unix)]
#[test]
fn ctrl_c_in_a_long_pass_ends_with_130_and_no_file() {
    use std::{process::Stdio, time::Duration};
    let dir = tempfile::tempdir().expect("a temporary folder");
    // Wide enough that no machine is done before it is stopped.
    let config = CONFIG.replace("\"num_pg_layers\": 2", "\"num_pg_layers\": 40").replace("64", "256");
    let (file, folder) = (dir.path().join("my.json"), dir.path().join("big"));
    fs::write(&file, config).expect("writable");
    random_checkpoint(&file, &folder, "0").assert().success();
    let condition = folder.join("condition.safetensors");
    let output = dir.path().join("out").join("adapter.safetensors");
    fs::create_dir(dir.path().join("out")).expect("writable");
    let begun = || fs::read_dir(dir.path().join("out")).expect("a folder").count() > 0;
    // The second one ends it where it stands.
    for signals in [1, 2] {
        let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("hywu"));
        command.args(["generate", "--device", "cpu", "--checkpoint"]).arg(&folder);
        command.arg("--condition").arg(&condition).arg("--output").arg(&output);
        let mut child = command.stderr(Stdio::null()).spawn().expect("it starts");
        // The file is begun when the pass starts.
        while !begun() && child.try_wait().expect("a child").is_none() {
            std::thread::sleep(Duration::from_millis(5));
        }
        for _ in 0..signals {
            let id = child.id().to_string();
            std::process::Command::new("kill").args(["-INT", &id]).status().expect("kill");
        }
        assert_eq!(child.wait().expect("it ends").code(), Some(130));
        assert!(!begun(), "{signals}");
    }
}

#[test]
fn inspect_lists_tensors_and_layers() {
    let file = golden("tiny-dense").join("model.safetensors");
    hywu()
        .arg("inspect")
        .arg(&file)
        .assert()
        .success()
        .stdout(contains("hidden_in.weight"))
        .stdout(contains("model.blocks.0"));
    let out = hywu().arg("inspect").arg("--json").arg(&file).assert().success();
    let json: serde_json::Value = serde_json::from_slice(&out.get_output().stdout).expect("JSON");
    assert!(json["tensors"].as_array().is_some_and(|t| t.len() > 40));
    hywu().args(["inspect", "/no/such/file"]).assert().code(1).stderr(contains("/no/such/file"));
}

#[test]
fn completions_name_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        hywu()
            .args(["completions", shell])
            .assert()
            .success()
            .stdout(contains("generate").and(contains("inspect")));
    }
}

#[cfg(unix)]
#[test]
fn a_closed_or_full_standard_output_is_no_panic() {
    let program = assert_cmd::cargo::cargo_bin("hywu");
    let shell = |script: String| Command::new("sh").arg("-c").arg(script).assert();
    let file = golden("tiny-dense").join("model.safetensors");
    for call in [format!("inspect {file:?}"), "info".into(), "completions bash".into()] {
        // `head` goes away after a line; the program's own exit code is what counts.
        let closed = format!("{{ {program:?} {call}; echo code $? >&2; }} | head -n 1");
        shell(closed).stderr(contains("code 0")).stderr(contains("panicked").not());
        if Path::new("/dev/full").exists() {
            let full = shell(format!("{program:?} {call} > /dev/full")).code(1);
            full.stderr(contains("error: standard output")).stderr(contains("panicked").not());
        }
    }
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_no_generated_adapter() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (folder, output) = (golden("tiny-dense"), dir.path().join("out.safetensors"));
    let condition = folder.join("condition.safetensors");
    let script = format!(
        "trap '' XFSZ; ulimit -f 1; exec {:?} generate --checkpoint {folder:?} --condition {condition:?} --output {output:?}",
        assert_cmd::cargo::cargo_bin("hywu")
    );
    Command::new("sh").arg("-c").arg(script).assert().code(1).stderr(contains("out.safetensors"));
    assert_eq!(fs::read_dir(dir.path()).expect("a folder").count(), 0);
}

#[test]
fn a_mistyped_output_folder_is_told_before_any_work() {
    let folder = golden("tiny-dense");
    generate(&folder, &folder.join("condition.safetensors"), Path::new("/no/such/x.safetensors"))
        .assert()
        .code(1)
        .stderr(contains("/no/such"));
}

/// A checkpoint of zeros that takes no room on the disk. Its stream has 128 MiB for every one of `dim`.
#[cfg(unix)]
fn sparse_checkpoint(folder: &Path, dim: usize) {
    let config = r#"{"num_base_model_layers": 1024, "rank": 4, "token_dim": 4, "output_dim": 4, "dim_accumulation": 1,
        "d_model": 16384, "head_dim": 128, "num_pg_layers": 1, "input_dim": 8,
        "pg_mapping": {"proj": {"lora_A_dim": DIM, "lora_B_dim": DIM}}}"#;
    let config = config.replace("DIM", &dim.to_string());
    fs::create_dir(folder).expect("writable");
    fs::write(folder.join("config.json"), &config).expect("writable");
    let config = hywu_generator::GeneratorConfig::from_json(config.as_bytes()).expect("a good config");
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in config.weights().expect("a good config") {
        let start = end;
        end += 2 * shape.iter().product::<usize>() as u64;
        let entry = serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]});
        header.insert(name, entry);
    }
    let header = serde_json::Value::from(header).to_string();
    let path = folder.join("model.safetensors");
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat())
        .expect("writable");
    let file = fs::OpenOptions::new().append(true).open(&path).expect("writable");
    file.set_len(8 + header.len() as u64 + end).expect("a sparse file");
    let mut condition = TensorWriter::new();
    condition.add("condition", &[1, 1, 3, 8], &[0.5; 24], Dtype::F32);
    condition.write(folder.join("condition.safetensors")).expect("writable");
}

#[cfg(unix)]
#[test]
fn more_memory_than_there_is_is_told_before_any_work() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (folder, output) = (dir.path().join("big"), dir.path().join("x.safetensors"));
    // A terabyte.
    sparse_checkpoint(&folder, 8000);
    let refused = generate(&folder, &folder.join("condition.safetensors"), &output).assert().code(1);
    let text = String::from_utf8_lossy(&refused.get_output().stderr).into_owned();
    assert!(text.contains("memory are too little") && text.contains("--max-memory"), "{text}");
    assert_eq!(fs::read_dir(dir.path()).expect("a folder").count(), 1);
}

/// Whoever says that there is more than the system gives.
#[cfg(unix)]
#[test]
fn memory_that_the_system_refuses_leaves_no_file() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (folder, output) = (dir.path().join("big"), dir.path().join("x.safetensors"));
    sparse_checkpoint(&folder, 8);
    let condition = folder.join("condition.safetensors");
    let script = format!(
        "ulimit -v 1000000; exec {:?} generate --device cpu --max-memory 1TB --checkpoint {folder:?} --condition {condition:?} \
         --output {output:?}",
        assert_cmd::cargo::cargo_bin("hywu")
    );
    Command::new("sh").arg("-c").arg(script).assert().code(1).stderr(contains("out of memory"));
    assert_eq!(fs::read_dir(dir.path()).expect("a folder").count(), 1);
}
