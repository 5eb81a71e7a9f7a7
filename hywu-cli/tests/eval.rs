//! `hywu eval` and `hywu info` from the outside.

use assert_cmd::Command;
use predicates::{prelude::*, str::contains};
use serde_json::Value;
use std::path::{Path, PathBuf};

fn hywu() -> Command {
    Command::cargo_bin("hywu").expect("the binary is built by cargo")
}

fn samples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/samples")
}

fn eval() -> Command {
    let mut command = hywu();
    command.args(["eval", "--side", "64", "--photos"]).arg(samples());
    command
}

#[test]
fn every_asked_skill_has_its_numbers_and_its_pictures() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let sheet = dir.path().join("sheet.png");
    let done = eval().args(["--json", "--skills", "keep,invert", "--sheet"]).arg(&sheet).assert().success();
    let json: Value = serde_json::from_slice(&done.get_output().stdout).expect("JSON");
    let skills = json["skills"].as_array().expect("a list");
    assert_eq!(skills.len(), 2);
    assert_eq!(json["asked"], 16);
    let (keep, invert) = (&skills[0], &skills[1]);
    assert_eq!((&keep["skill"], &invert["skill"]), (&"keep".into(), &"invert".into()));
    // Doing nothing is the truth of "keep", so its PSNR has no number.
    assert!(keep["noop_psnr"].is_null());
    // The bundled model has learnt both.
    assert!(keep["psnr"].as_f64().expect("a number") > 30.0, "{keep}");
    let (psnr, noop) =
        (invert["psnr"].as_f64().expect("a number"), invert["noop_psnr"].as_f64().expect("a number"));
    assert!(psnr > noop + 10.0, "{invert}");
    assert!(invert["right"].as_u64().expect("a number") >= 7, "{invert}");
    let (width, height) = image::image_dimensions(&sheet).expect("a picture");
    assert!(width > 1500 && height > 100, "{width} x {height}");
}

#[test]
fn the_table_is_markdown() {
    let done = eval().args(["--skills", "brighter", "--steps", "1"]).assert().success();
    let text = String::from_utf8_lossy(&done.get_output().stdout).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("| skill | PSNR") && lines[2].starts_with("| brighter |"), "{text}");
    assert!(text.contains("of 8 held-out phrasings"));
}

#[test]
fn bad_calls_say_what_is_wrong() {
    let fails = |args: &[&str], message: &str| {
        eval().args(args).assert().code(1).stderr(contains(message)).stderr(contains("panicked").not());
    };
    fails(&["--skills", "levitate"], "levitate");
    eval().args(["--steps", "0"]).assert().code(2).stderr(contains("1..=1000"));
    fails(&["--model", "/no/such"], "/no/such");
    fails(&["--sheet", "/no/such/sheet.png"], "/no/such");
    hywu().args(["eval", "--side", "8"]).assert().code(1).stderr(contains("--side"));
    hywu().args(["eval", "--photos", "/no/such"]).assert().code(1).stderr(contains("/no/such"));
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_a_measurement_with_130() {
    use std::process::{Command as Process, Stdio};
    let mut child = Process::new(assert_cmd::cargo::cargo_bin("hywu"))
        .args(["eval", "--side", "512", "--steps", "100", "--photos"])
        .arg(samples())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary starts");
    std::thread::sleep(std::time::Duration::from_secs(1));
    Process::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill");
    let start = std::time::Instant::now();
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
    assert!(start.elapsed().as_secs() < 10, "it took {:?} to stop", start.elapsed());
}

#[test]
fn info_tells_version_devices_and_the_model() {
    let text = hywu().arg("info").assert().success();
    let text = String::from_utf8_lossy(&text.get_output().stdout).into_owned();
    for part in
        [env!("CARGO_PKG_VERSION"), "cpu", "cuda", "hywu-mini", "MIT OR Apache-2.0", "photographs", "MiniLM"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    let json = hywu().args(["info", "--json"]).assert().success();
    let json: Value = serde_json::from_slice(&json.get_output().stdout).expect("JSON");
    assert!(json["model"]["backbone_parameters"].as_u64().expect("a number") > 1_000_000);
    assert!(json["model"]["generator_parameters"].as_u64().expect("a number") > 100_000);
}
