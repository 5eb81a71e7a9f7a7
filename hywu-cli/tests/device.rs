//! What a user reads when a CUDA device can't be used. The failures are made by the emulated driver of `kernels-cu/emulator`; a build
//! without CUDA, or with a real device, has only some of them.

use assert_cmd::Command;
use hywu_kernels::{Device, Error};
use predicates::{prelude::PredicateBooleanExt, str::contains};
use std::path::Path;

fn edit(folder: &Path, device: &str) -> Command {
    let photo = folder.join("photo.png");
    image::RgbImage::from_fn(40, 32, |x, y| image::Rgb([x as u8 * 5, y as u8 * 7, 90]))
        .save(&photo)
        .expect("writable");
    let mut command = Command::cargo_bin("hywu").expect("built");
    command.arg("edit").arg(photo).arg("make it warmer").arg("-o").arg(folder.join("out.png"));
    command.args(["--steps", "1", "--device", device]);
    command
}

fn emulated() -> bool {
    let name = Device::Cuda(0).properties().ok().flatten().map(|p| p.name);
    let emulated = name.is_some_and(|name| name == "emulated device");
    if !emulated {
        println!("SKIPPED: no emulated device");
    }
    emulated
}

/// Exit code 1, these words, and no file.
fn fails(mut command: Command, folder: &Path, words: &[&str]) {
    let mut failed = command.assert().code(1);
    for word in words {
        failed = failed.stderr(contains(*word));
    }
    assert!(!folder.join("out.png").exists());
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let words: &[&str] = match Device::Cuda(7).check() {
        Ok(_) => return,
        Err(Error::NotBuiltWithCuda) => &["--features cuda"],
        Err(Error::NoCudaDriver) => &["libcuda.so.1"],
        Err(_) => &["no device cuda:7", "cuda:0"],
    };
    fails(edit(folder.path(), "cuda:7"), folder.path(), words);
}

#[test]
fn a_driver_that_will_not_do_is_named() {
    if !emulated() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let with = |name: &str, value: &str| {
        let mut command = edit(folder.path(), "cuda");
        command.env(format!("HYWU_EMULATOR_{name}"), value);
        command
    };
    fails(with("DRIVER", "12040"), folder.path(), &["too old", "12.4", "13.0", "update"]);
    fails(with("DEVICES", "0"), folder.path(), &["no device cuda:0", "use `cpu`"]);
    fails(with("NO_IMAGE", "1"), folder.path(), &["compute capability is 9.0", "HYWU_CUDA_ARCH=90"]);
    fails(with("MEMORY", "9000000"), folder.path(), &["out of memory", "smaller tiles"]);
    fails(with("FAIL_LAUNCH", "20"), folder.path(), &["kernel", "719", "HYWU_CUDA_SYNC=1"]);
}

/// Nobody who did not ask for a device fails for want of one, nor for one that has no kernels.
#[test]
fn auto_does_without_a_device() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    edit(folder.path(), "auto").env("HYWU_EMULATOR_NO_IMAGE", "1").assert().success();
    std::fs::remove_file(folder.path().join("out.png")).expect("written");
    edit(folder.path(), "auto")
        .env("HYWU_EMULATOR_DEVICES", "0")
        .env("LD_LIBRARY_PATH", "")
        .assert()
        .success();
    assert!(folder.path().join("out.png").exists());
}

/// A picture that does not fit costs only itself: the device is as good as before for the next.
#[test]
fn the_next_picture_finds_a_device_that_works() {
    if !emulated() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("out");
    let picture = |name: &str, side: u32| {
        let file = folder.path().join(name);
        image::RgbImage::from_fn(side, side, |x, y| image::Rgb([x as u8, y as u8, 90]))
            .save(&file)
            .expect("writable");
        file
    };
    let mut command = Command::cargo_bin("hywu").expect("built");
    command.arg("edit").args([picture("large.png", 2500), picture("small.png", 24)]).arg("make it warmer");
    command.arg("--output-dir").arg(&out).args(["--steps", "1", "--device", "cuda", "--tile", "64"]);
    command.env("HYWU_EMULATOR_MEMORY", "110000000");
    command.assert().code(1).stderr(contains("large.png").and(contains("out of memory")));
    assert!(!out.join("large.png").exists() && out.join("small.png").exists());
}
