//! What tests of `hywu edit` share.

#![allow(dead_code, reason = "every test file uses a part")]

use assert_cmd::Command;
use std::path::{Path, PathBuf};

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
