//! `hywu edit` from the outside: real pictures in, pictures out, and every kind of bad input.

mod common;

use assert_cmd::Command;
use common::{difference, edit, edit_as, hywu, photo, sample, without_hash};
use hywu::model::Model;
use hywu_core::{Adapter, Dtype};
use predicates::{prelude::*, str::contains};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// One line `error: ...`, exit code 1, nothing left in the folder beside what was there.
fn fails(mut command: Command, dir: &Path, message: &str) {
    let before = listing(dir);
    let assert = command.assert().code(1).stderr(contains(message)).stderr(contains("panicked").not());
    let stderr = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
    assert_eq!(stderr.trim_end().lines().count(), 1, "one line, got: {stderr}");
    assert!(stderr.starts_with("error: "), "{stderr}");
    assert_eq!(listing(dir), before, "files were left behind");
}

fn listing(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = fs::read_dir(dir).expect("a folder").map(|e| e.expect("an entry").path()).collect();
    all.sort();
    all
}

#[test]
fn edits_a_photo_as_told() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (input, output) = (photo(dir.path(), "in.png", 128, 96), dir.path().join("out.png"));
    edit_as(&input, "make it black and white", &output).assert().success();
    let grey = image::open(&output).expect("a picture").to_rgb8();
    assert_eq!(grey.dimensions(), (128, 96));
    // Black and white: the three channels of a pixel are (nearly) the same, and the picture is still there.
    let spread: f64 =
        grey.pixels().map(|p| f64::from(p.0.iter().max().unwrap() - p.0.iter().min().unwrap())).sum();
    assert!(spread / f64::from(128 * 96) < 12.0, "mean channel spread {}", spread / f64::from(128 * 96));
    let truth: f64 = (image::open(&input).expect("a picture").to_luma8().pixels().zip(grey.pixels()))
        .map(|(t, g)| (f64::from(t.0[0]) - f64::from(g.0[1])).abs())
        .sum();
    assert!(truth / f64::from(128 * 96) < 16.0, "mean error against luma {}", truth / f64::from(128 * 96));
}

#[test]
fn same_seed_same_bytes_and_the_text_chunk_tells_how() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let input = photo(dir.path(), "in.png", 80, 72);
    let (a, b) = (dir.path().join("a.png"), dir.path().join("b.png"));
    edit(&input, "make it warmer", &a).args(["--seed", "7"]).assert().success();
    edit(&input, "make it warmer", &b).args(["--seed", "7"]).env("RAYON_NUM_THREADS", "1").assert().success();
    let bytes = fs::read(&a).expect("written");
    assert_eq!(bytes, fs::read(&b).expect("written"));
    let text = String::from_utf8_lossy(&bytes);
    assert!(text.contains("make it warmer") && text.contains("hywu:seed"));
}

#[test]
fn an_adapter_can_be_saved_reapplied_and_inspected() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let input = photo(dir.path(), "in.png", 72, 64);
    let (a, b, adapter) =
        (dir.path().join("a.png"), dir.path().join("b.png"), dir.path().join("x.safetensors"));
    edit(&input, "invert the colours", &a).arg("--save-adapter").arg(&adapter).assert().success();
    edit(&input, "invert the colours", &b).arg("--adapter").arg(&adapter).assert().success();
    assert_eq!(difference(&a, &b), 0.0);
    let list = hywu().arg("inspect").arg(&adapter).assert().success();
    let list = String::from_utf8_lossy(&list.get_output().stdout).into_owned();
    assert!(
        list.contains("self_attn.qkv_proj.lora_A")
            && list.contains("scale")
            && list.contains("invert the colours")
    );
}

#[test]
fn strength_zero_is_the_backbone_alone() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let input = photo(dir.path(), "in.png", 72, 64);
    let (a, b, adapter) =
        (dir.path().join("a.png"), dir.path().join("b.png"), dir.path().join("x.safetensors"));
    let pixels = |p: &Path| image::open(p).expect("a picture").to_rgb8().into_raw();
    edit(&input, "fix the white balance", &a).arg("--save-adapter").arg(&adapter).assert().success();
    let full = pixels(&a);
    // A model folder without its generator is the backbone alone.
    let model = dir.path().join("model");
    Model::bundled().expect("in the binary").save(&model, Dtype::F32).expect("writable");
    without_hash(&model);
    fs::remove_dir_all(model.join("generator")).expect("written");
    edit(&input, "fix the white balance", &b).arg("--model").arg(&model).assert().success();
    let alone = pixels(&b);
    assert_ne!(full, alone);
    edit(&input, "fix the white balance", &a).args(["--strength", "0"]).assert().success();
    assert_eq!(pixels(&a), alone);
    edit(&input, "fix the white balance", &a)
        .args(["--strength", "0"])
        .arg("--adapter")
        .arg(&adapter)
        .assert()
        .success();
    assert_eq!(pixels(&a), alone);
    for apply in ["merged", "auto"] {
        let options = ["--strength", "0", "--apply", apply];
        edit(&input, "fix the white balance", &a).args(options).assert().success();
        assert_eq!(pixels(&a), alone, "{apply}");
    }
}

#[test]
fn a_merged_adapter_gives_the_same_picture() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let input = photo(dir.path(), "in.png", 72, 64);
    let (fused, merged) = (dir.path().join("fused.png"), dir.path().join("merged.png"));
    let pixels = |p: &Path| image::open(p).expect("a picture").to_rgb8().into_raw();
    edit(&input, "make it black and white", &fused).args(["--device", "cpu"]).assert().success();
    assert!(difference(&input, &fused) > 1.0, "the adapter does something");
    for apply in ["merged", "auto"] {
        let mut command = edit(&input, "make it black and white", &merged);
        command.args(["--apply", apply, "--device", "cpu"]).assert().success();
        let (a, b) = (pixels(&fused), pixels(&merged));
        assert!(a.iter().zip(&b).all(|(a, b)| a.abs_diff(*b) <= 1), "{apply}");
    }
}

#[test]
fn several_pictures_of_any_size_and_format() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let out = dir.path().join("out");
    let names = ["a.png", "b.jpg", "c.webp", "one.png", "flat.png"];
    let sizes = [(70, 130), (64, 64), (33, 90), (1, 1), (100, 3)];
    let mut command = hywu();
    command.arg("edit");
    for (name, (w, h)) in names.iter().zip(sizes) {
        command.arg(photo(dir.path(), name, w, h));
    }
    command.arg("make it brighter").arg("--output-dir").arg(&out).args(["--steps", "1", "--json"]);
    let done = command.assert().success();
    let lines = String::from_utf8_lossy(&done.get_output().stdout).into_owned();
    assert_eq!(lines.lines().count(), 5);
    for (line, (name, (w, h))) in lines.lines().zip(names.iter().zip(sizes)) {
        let json: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
        assert_eq!((json["width"].as_u64(), json["height"].as_u64()), (Some(w.into()), Some(h.into())));
        assert_eq!(image::image_dimensions(out.join(name)).expect("written"), (w, h));
    }
}

#[test]
fn alpha_is_kept_and_compare_is_twice_as_wide() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (input, output, both) =
        (dir.path().join("in.png"), dir.path().join("out.png"), dir.path().join("both.png"));
    let mut picture =
        image::open(sample("astronaut.png")).expect("a picture").crop_imm(100, 0, 64, 64).to_rgba8();
    picture.pixels_mut().enumerate().for_each(|(i, p)| p.0[3] = (i % 256) as u8);
    picture.save(&input).expect("a writable folder");
    edit(&input, "make it darker", &output).arg("--compare").arg(&both).assert().success();
    let alpha =
        |p: &Path| image::open(p).expect("a picture").to_rgba8().pixels().map(|p| p.0[3]).collect::<Vec<_>>();
    assert_eq!(alpha(&input), alpha(&output));
    assert_eq!(image::image_dimensions(&both).expect("written").1, 64);
    assert!(image::image_dimensions(&both).expect("written").0 >= 128);
}

#[test]
fn bad_pictures_give_one_line() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let out = dir.path().join("out.png");
    fails(edit(&dir.path().join("none.png"), "brighter", &out), dir.path(), "none.png");
    fails(edit(dir.path(), "brighter", &out), dir.path(), "folder");

    let text = dir.path().join("text.png");
    fs::write(&text, "I am not a picture").expect("writable");
    fails(edit(&text, "brighter", &out), dir.path(), "text.png");

    for name in ["cut.png", "cut.jpg", "cut.webp"] {
        let cut = photo(dir.path(), name, 200, 150);
        let whole = fs::read(&cut).expect("written");
        for part in [3, 5] {
            fs::write(&cut, &whole[..whole.len() * part / 6]).expect("writable");
            fails(edit(&cut, "brighter", &out), dir.path(), name);
        }
    }
    #[cfg(unix)]
    fails(edit(Path::new("/dev/null"), "brighter", &out), dir.path(), "not a PNG");

    // A valid PNG signature and a header of 60,000 x 60,000 pixels.
    let huge = dir.path().join("huge.png");
    let mut header = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR".to_vec();
    header.extend(60_000u32.to_be_bytes());
    header.extend(60_000u32.to_be_bytes());
    header.extend([8, 2, 0, 0, 0]);
    let crc = crc32(&header[12..]);
    header.extend(crc.to_be_bytes());
    header.extend(b"\0\0\0\0IDAT\x35\xaf\x06\x1e\0\0\0\0IEND\xaeB`\x82");
    fs::write(&huge, header).expect("writable");
    fails(edit(&huge, "brighter", &out), dir.path(), "60000");
}

/// CRC-32 of PNG chunks, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, b| {
        (0..8).fold(crc ^ u32::from(*b), |c, _| if c & 1 == 1 { (c >> 1) ^ 0xedb8_8320 } else { c >> 1 })
    })
}

#[test]
fn bad_arguments_say_what_would_be_right() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (input, out) = (photo(dir.path(), "in.png", 64, 64), dir.path().join("out.png"));
    let with = |args: &[&str]| {
        let mut command = edit(&input, "brighter", &out);
        command.args(args);
        command
    };
    fails(edit(&input, "  ", &out), dir.path(), "instruction is empty");
    fails(edit(&input, "brighter", &dir.path().join("out.gif")), dir.path(), "png");
    fails(edit(&input, "brighter", &dir.path().join("none/out.png")), dir.path(), "none");
    fails(edit(&input, "brighter", &input), dir.path(), "same file");
    fails(with(&["--compare", input.to_str().expect("UTF-8")]), dir.path(), "same file");
    fails(with(&["--save-adapter", input.to_str().expect("UTF-8")]), dir.path(), "same file");
    fails(with(&["--compare", out.to_str().expect("UTF-8")]), dir.path(), "same file");
    fails(with(&["--save-adapter", "/no/such/folder/x.safetensors"]), dir.path(), "/no/such/folder");
    fails(with(&["--model", "/no/such/model"]), dir.path(), "/no/such/model");
    fails(with(&["--adapter", "/no/such/adapter"]), dir.path(), "/no/such/adapter");

    // Wrong usage: exit code 2.
    for (args, message) in [
        (["--device", "tpu"], "auto, cpu, cuda"),
        (["--strength", "nan"], "finite"),
        (["--tile", "13"], "multiple of 8"),
        (["--steps", "0"], "1..=1000"),
        (["--steps", "many"], "--steps"),
    ] {
        edit_as(&input, "brighter", &out).args(args).assert().code(2).stderr(contains(message));
    }
    with(&["--strength", "0", "--save-adapter", "x.safetensors"])
        .assert()
        .code(2)
        .stderr(contains("no adapter"));
    hywu().args(["edit", "only-one"]).assert().code(2);
    hywu().arg("edit").arg(&input).arg("brighter").assert().code(2).stderr(contains("--output"));
    hywu().arg("edit").arg(&input).arg(&input).args(["brighter", "-o"]).arg(&out).assert().code(2);
    hywu().args(["edit", "--no-such-flag"]).assert().code(2);
    hywu().assert().code(2);
}

#[test]
fn a_bad_picture_does_not_cost_the_others() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (good, out) = (photo(dir.path(), "good.png", 64, 64), dir.path().join("out"));
    let mut command = hywu();
    command.arg("edit").arg(dir.path().join("none.png")).arg(&good).arg("warmer").args([
        "--steps",
        "1",
        "--output-dir",
    ]);
    command.arg(&out).assert().code(1).stderr(contains("none.png")).stderr(contains("1 of 2"));
    assert!(out.join("good.png").is_file());
}

#[test]
fn bad_adapters_are_refused_by_name() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (input, out) = (photo(dir.path(), "in.png", 64, 64), dir.path().join("out.png"));
    let adapter = dir.path().join("x.safetensors");
    edit(&input, "brighter", &out).args(["--save-adapter"]).arg(&adapter).assert().success();
    fs::remove_file(&out).expect("written");
    let with = |file: &Path| {
        let mut command = edit(&input, "brighter", &out);
        command.arg("--adapter").arg(file);
        command
    };
    let bytes = fs::read(&adapter).expect("written");
    let cut = dir.path().join("cut.safetensors");
    fs::write(&cut, &bytes[..bytes.len() - 100]).expect("writable");
    fails(with(&cut), dir.path(), "cut.safetensors");

    let nan = dir.path().join("nan.safetensors");
    let mut spoiled = bytes.clone();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    spoiled[header..header + 4000].fill(0xff);
    fs::write(&nan, spoiled).expect("writable");
    fails(with(&nan), dir.path(), "nan.safetensors");

    // The same adapter with one module renamed: both sets are told.
    let other = dir.path().join("other.safetensors");
    let mut renamed = bytes;
    let text = String::from_utf8_lossy(&renamed[8..header]).replace("0.mlp.down_proj", "0.mlp.town_proj");
    renamed[8..header].copy_from_slice(text.as_bytes());
    fs::write(&other, renamed).expect("writable");
    fails(with(&other), dir.path(), "town_proj");

    // And one of another shape.
    let wrong = dir.path().join("wrong.safetensors");
    let mut adapter = Adapter::load(&adapter).expect("written");
    let pair = adapter.modules.get_mut("model.layers.0.self_attn.o_proj").expect("a module");
    pair.lora_a = ndarray::Array3::zeros((1, 8, 7)).into_dyn();
    adapter.save(&wrong).expect("writable");
    fails(with(&wrong), dir.path(), "[1, 8, 7]");
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (input, out) = (photo(dir.path(), "in.png", 200, 200), dir.path().join("out.png"));
    // No file may grow beyond one block: writing fails as on a full disk.
    let script = format!(
        "trap '' XFSZ; ulimit -f 1; exec {:?} edit {input:?} brighter -o {out:?} --steps 1",
        assert_cmd::cargo::cargo_bin("hywu")
    );
    let mut command = Command::new("sh");
    command.arg("-c").arg(script);
    fails(command, dir.path(), "out.png");
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_with_130_and_no_file() {
    use std::process::{Command as Process, Stdio};
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (input, out) = (photo(dir.path(), "in.png", 360, 400), dir.path().join("out.png"));
    let mut child = Process::new(assert_cmd::cargo::cargo_bin("hywu"))
        .arg("edit")
        .arg(&input)
        .args(["brighter", "--steps", "1000", "-o"])
        .arg(&out)
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary starts");
    std::thread::sleep(std::time::Duration::from_secs(2));
    Process::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill");
    let start = std::time::Instant::now();
    let status = child.wait().expect("it ends");
    assert_eq!(status.code(), Some(130));
    assert!(start.elapsed().as_secs() < 10, "it took {:?} to stop", start.elapsed());
    assert_eq!(listing(dir.path()), [input]);
}
