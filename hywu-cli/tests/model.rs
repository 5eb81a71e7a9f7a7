//! Model folders: what is written is read again, and what is damaged is refused with one line.

use assert_cmd::Command;
use hywu::model::{Memory, Model};
use hywu_core::Dtype;
use predicates::{prelude::*, str::contains};
use std::{fs, path::Path};

#[test]
fn the_bundled_model_is_a_folder_like_any_other() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let bundled = Model::bundled().expect("in the binary");
    bundled.save(dir.path(), Dtype::F32).expect("writable");
    let read = Model::load(dir.path()).expect("a model");
    assert_eq!(read.hash, bundled.hash);
    assert_eq!(read.info, bundled.info);
    assert!(matches!(read.memory, Memory::Functional(_)));
}

#[test]
fn the_bundled_files_are_small() {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets");
    let files = [
        "bundled/backbone.safetensors",
        "bundled/generator/model.safetensors",
        "bundled/generator/config.json",
        "bundled/model.json",
        "text/table.safetensors",
        "text/vocab.txt",
    ];
    let size: u64 = files.iter().map(|f| fs::metadata(assets.join(f)).expect("bundled").len()).sum();
    assert!(size <= 16 << 20, "{size} bytes");
}

#[test]
fn damaged_folders_are_refused_by_name() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let model = dir.path().join("model");
    let photo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/samples/chelsea.png");
    let refused = |message: &str| {
        let mut command = Command::cargo_bin("hywu").expect("built");
        command.arg("edit").arg(&photo).args(["make it warmer", "--steps", "1", "--model"]).arg(&model);
        let out = dir.path().join("out.png");
        let assert = command.arg("-o").arg(&out).assert().code(1).stderr(contains(message));
        let assert = assert.stderr(contains("panicked").not());
        assert_eq!(String::from_utf8_lossy(&assert.get_output().stderr).trim_end().lines().count(), 1);
        assert!(!out.exists());
    };
    refused("no such model folder");
    fs::create_dir(&model).expect("writable");
    refused("model.json");
    let bundled = Model::bundled().expect("in the binary");
    let write = || bundled.save(&model, Dtype::F32).expect("writable");
    let spoil = |file: &str, change: fn(&mut Vec<u8>)| {
        write();
        let path = model.join(file);
        let mut bytes = fs::read(&path).expect("written");
        change(&mut bytes);
        fs::write(path, bytes).expect("writable");
    };
    spoil("model.json", |b| b.truncate(5));
    refused("model.json");
    for file in ["backbone.safetensors", "generator/model.safetensors"] {
        spoil(file, |b| b.truncate(b.len() - 1000));
        refused(file);
        // NaN in the last tensor.
        spoil(file, |b| {
            let at = b.len() - 64;
            b[at..].fill(0xff);
        });
        refused("holds NaN");
        write();
        fs::remove_file(model.join(file)).expect("written");
        refused(file.rsplit('/').next().expect("a name"));
    }
    spoil("backbone.safetensors", |b| {
        let (from, to) = (b"[576,192]", b"[192,576]");
        let at = b.windows(from.len()).position(|w| w == from).expect("a projection");
        b[at..at + to.len()].copy_from_slice(to);
    });
    refused("[192, 576]");
    write();
    fs::write(model.join("lora.safetensors"), "x").expect("writable");
    refused("one is expected");
    fs::remove_file(model.join("lora.safetensors")).expect("written");
    // A generator for another backbone.
    let config = model.join("generator/config.json");
    let text = fs::read_to_string(&config).expect("written");
    fs::write(&config, text.replace("self_attn.o_proj", "self_attn.x_proj")).expect("writable");
    refused("x_proj");
    fs::write(&config, text.replace("\"rank\":8", "\"rank\":0").replace("\"rank\": 8", "\"rank\": 0"))
        .expect("writable");
    refused("rank 0 must be");
}
