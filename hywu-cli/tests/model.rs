//! Model folders: what is written is read again, and what is damaged is refused with one line.

mod common;

use assert_cmd::Command;
use common::without_hash;
use hywu::model::{Memory, Model, ModelInfo};
use hywu_core::Dtype;
use hywu_diffusion::{Backbone, BackboneConfig, TextEncoder};
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
    // A file that was changed, or is another model's.
    spoil("backbone.safetensors", |b| {
        let last = b.len() - 4;
        b[last] ^= 1;
    });
    refused("its files are not those");
    write();
    without_hash(&model);
    // A generator for another backbone.
    let config = model.join("generator/config.json");
    let text = fs::read_to_string(&config).expect("written");
    fs::write(&config, text.replace("self_attn.o_proj", "self_attn.x_proj")).expect("writable");
    refused("x_proj");
    fs::write(&config, text.replace("\"rank\":8", "\"rank\":0").replace("\"rank\": 8", "\"rank\": 0"))
        .expect("writable");
    refused("rank 0 must be");
}

/// A small backbone as a model.
fn small(seed: u64) -> Model {
    let config = BackboneConfig {
        width: 16,
        layers: 1,
        head_dim: 8,
        mlp_hidden: 16,
        text_layers: 1,
        ..Default::default()
    };
    let backbone =
        Backbone::new(config, TextEncoder::table().expect("bundled"), seed).expect("sizes that work");
    let info = ModelInfo { name: format!("seed {seed}"), ..ModelInfo::default() };
    Model::assemble(backbone, Memory::None, info).expect("a model")
}

#[test]
fn a_model_replaces_another_and_nothing_else() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let folder = dir.path().join("model");
    Model::bundled().expect("in the binary").save(&folder, Dtype::F32).expect("writable");
    small(1).save(&folder, Dtype::Bf16).expect("writable");
    let read = Model::load(&folder).expect("a model");
    // The older one's generator is gone.
    assert!(matches!(read.memory, Memory::None) && read.info.name == "seed 1");
    fs::write(folder.join("notes.txt"), "mine").expect("writable");
    let refused = small(2).save(&folder, Dtype::F32).expect_err("notes would be lost").to_string();
    assert!(refused.contains("notes.txt"), "{refused}");
    assert_eq!(Model::load(&folder).expect("as it was").hash, read.hash);
    assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 1);
}

#[test]
fn a_mix_of_two_models_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let [one, two] = [1, 2].map(|seed| {
        let folder = dir.path().join(seed.to_string());
        small(seed).save(&folder, Dtype::F32).expect("writable");
        folder
    });
    fs::copy(one.join("backbone.safetensors"), two.join("backbone.safetensors")).expect("writable");
    let refused = Model::load(&two).err().expect("a mix").to_string();
    assert!(refused.contains("its files are not those") && !refused.contains('\n'), "{refused}");
    without_hash(&two);
    assert_eq!(Model::load(&two).expect("by hand").hash, Model::load(&one).expect("a model").hash);
}

#[test]
fn readers_of_a_model_that_is_being_replaced_get_one_or_an_error() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let folder = dir.path().join("model");
    let models = [small(1), small(2)];
    models[0].save(&folder, Dtype::F32).expect("writable");
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            for i in 1..40 {
                models[i % 2].save(&folder, Dtype::F32).expect("writable");
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        while !done.load(std::sync::atomic::Ordering::Relaxed) {
            if let Ok(read) = Model::load(&folder) {
                let model = models.iter().find(|m| m.hash == read.hash).expect("one of the two");
                assert_eq!(read.info, model.info);
            }
        }
    });
    assert_eq!(Model::load(&folder).expect("whole").hash, models[1].hash);
}
