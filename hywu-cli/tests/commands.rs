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
