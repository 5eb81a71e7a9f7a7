//! What tests of `hywu edit` share.

#![allow(dead_code, reason = "every test file uses a part")]

use assert_cmd::Command;
use hywu::model::Model;
use hywu_core::Dtype;
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};

pub fn hywu() -> Command {
    let mut command = Command::cargo_bin("hywu").expect("the binary is built by cargo");
    command.env_remove("RUST_BACKTRACE");
    command
}

pub fn sample(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/samples").join(name)
}

/// A small cut of a real photo, saved as PNG.
pub fn photo(dir: &Path, name: &str, width: u32, height: u32) -> PathBuf {
    let whole = image::open(sample("astronaut.png")).expect("the sample is a picture");
    let path = dir.join(name);
    whole.crop_imm(150, 20, width, height).to_rgb8().save(&path).expect("a writable folder");
    path
}

pub fn edit_as(input: &Path, instruction: &str, output: &Path) -> Command {
    let mut command = hywu();
    command.arg("edit").arg(input).arg(instruction).arg("-o").arg(output);
    command
}

/// In as few steps as do where the quality does not matter.
pub fn edit(input: &Path, instruction: &str, output: &Path) -> Command {
    let mut command = edit_as(input, instruction, output);
    command.args(["--steps", "2"]);
    command
}

/// Mean absolute difference of two pictures in 8-bit steps.
pub fn difference(a: &Path, b: &Path) -> f64 {
    let (a, b) = (image::open(a).expect("a picture").to_rgb8(), image::open(b).expect("a picture").to_rgb8());
    assert_eq!(a.dimensions(), b.dimensions());
    let sum: u64 = a.as_raw().iter().zip(b.as_raw()).map(|(x, y)| u64::from(x.abs_diff(*y))).sum();
    sum as f64 / a.as_raw().len() as f64
}

/// A temporary folder with what most tests need.
pub struct Place {
    pub dir: tempfile::TempDir,
    /// A small picture.
    pub input: PathBuf,
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let input = photo(dir.path(), "in.png", 72, 64);
        Self { dir, input }
    }
    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    /// An edit that tells in JSON how it went.
    pub fn edit(&self, input: &Path, instruction: &str, output: &str) -> Command {
        let mut command = edit(input, instruction, &self.at(output));
        command.args(["--json", "--device", "cpu"]);
        command
    }
    /// The same with the cache.
    pub fn cached(&self, input: &Path, instruction: &str, output: &str) -> Command {
        let mut command = self.edit(input, instruction, output);
        command.arg("--cache").arg(self.at("cache"));
        command
    }
    pub fn entries(&self) -> Vec<PathBuf> {
        let listed = fs::read_dir(self.at("cache")).map(|dir| dir.map(|e| e.expect("an entry").path()));
        let mut all: Vec<_> = listed.into_iter().flatten().collect();
        all.sort();
        all
    }
    /// A folder with the bundled model, changed.
    pub fn model(&self, change: impl FnOnce(&Path)) -> PathBuf {
        let folder = self.at("model");
        Model::bundled().expect("in the binary").save(&folder, Dtype::F32).expect("writable");
        without_hash(&folder);
        change(&folder);
        folder
    }
}

/// Lets a model folder be changed by hand.
pub fn without_hash(model: &Path) {
    let file = model.join("model.json");
    let mut info: Value = serde_json::from_slice(&fs::read(&file).expect("written")).expect("JSON");
    info.as_object_mut().expect("an object").remove("hash").expect("it is written");
    fs::write(file, info.to_string()).expect("writable");
}

/// How the adapter of a successful edit came about, and what was said beside.
pub fn origin(command: &mut Command) -> (String, String) {
    let done = command.assert().success();
    let output = done.get_output();
    let line: Value = serde_json::from_slice(&output.stdout).expect("a line of JSON");
    let origin = line["adapter"].as_str().unwrap_or("none").to_owned();
    (origin, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// As [`origin`], and nothing was said.
#[track_caller]
pub fn quietly(command: &mut Command) -> String {
    let (origin, stderr) = origin(command);
    assert_eq!(stderr, "");
    origin
}

pub fn pixels(file: &Path) -> Vec<u8> {
    image::open(file).expect("a picture").to_rgb8().into_raw()
}
