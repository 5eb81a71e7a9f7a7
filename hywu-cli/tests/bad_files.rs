//! Bad files from the outside: one line on standard error that says what is wrong, exit code 1, nothing written, no panic.

use assert_cmd::Command;
use hywu_core::{Checkpoint, Dtype, TensorWriter};
use predicates::{prelude::*, str::contains};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../hywu-generator/tests/golden/tiny-dense")
}

fn hywu() -> Command {
    Command::cargo_bin("hywu").expect("the binary is built by cargo")
}

/// It fails with one line of error that holds `messages`.
#[track_caller]
fn fails(mut command: Command, messages: &[&str]) {
    let mut assert = command.assert().code(1).stderr(contains("panicked").not());
    for message in messages {
        assert = assert.stderr(contains(*message));
    }
    let text = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
    assert!(text.starts_with("error: ") && text.lines().count() == 1 && text.len() < 5000, "{text}");
    assert!(!text.trim_end().contains(char::is_control), "{text:?}");
}

/// A folder with a copy of tiny-dense in two shards, `model`, and its condition.
struct Bad {
    dir: tempfile::TempDir,
}

const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
/// In the second shard.
const WEIGHT: &str = "model.blocks.0.self_attn_hw.W_k.weight";

impl Bad {
    fn new() -> Self {
        let this = Self { dir: tempfile::tempdir().expect("a temporary folder") };
        fs::create_dir(this.model()).expect("writable");
        fs::copy(golden().join("config.json"), this.model().join("config.json")).expect("a copy");
        fs::copy(golden().join("condition.safetensors"), this.condition()).expect("a copy");
        this.write(|_, _, _| {});
        this
    }
    fn model(&self) -> PathBuf {
        self.dir.path().join("model")
    }
    fn condition(&self) -> PathBuf {
        self.dir.path().join("condition.safetensors")
    }
    fn output(&self) -> PathBuf {
        self.dir.path().join("out.safetensors")
    }
    /// Writes the shards, after `change` of the shape, the values and the dtype of [`WEIGHT`].
    fn write(&self, change: impl Fn(&mut Vec<usize>, &mut Vec<f32>, &mut Dtype)) {
        let source = Checkpoint::open(golden()).expect("a good file");
        let (mut shards, mut map) = ([TensorWriter::new(), TensorWriter::new()], serde_json::Map::new());
        for name in source.names() {
            let x = source.read(name).expect("there");
            let (mut shape, mut data) = (x.shape().to_vec(), x.iter().copied().collect::<Vec<_>>());
            let mut dtype = Dtype::F32;
            if name == WEIGHT {
                change(&mut shape, &mut data, &mut dtype);
            }
            let second = usize::from(name.starts_with("model.blocks"));
            shards[second].add(name, &shape, &data, dtype);
            map.insert(name.into(), SHARDS[second].into());
        }
        for (shard, file) in shards.iter().zip(SHARDS) {
            shard.write(self.model().join(file)).expect("writable");
        }
        self.index(&json!({"weight_map": map}));
    }
    fn index(&self, index: &Value) {
        fs::write(self.model().join("model.safetensors.index.json"), index.to_string()).expect("writable");
    }
    fn generate(&self) -> Command {
        let mut command = hywu();
        command
            .arg("generate")
            .arg("--checkpoint")
            .arg(self.model())
            .arg("--condition")
            .arg(self.condition());
        command.arg("--output").arg(self.output()).args(["--device", "cpu"]);
        command
    }
    /// `hywu generate` fails so, and leaves the folder as it was.
    #[track_caller]
    fn refused(&self, messages: &[&str]) {
        let list = || fs::read_dir(self.dir.path()).expect("a folder").count();
        let before = list();
        fails(self.generate(), messages);
        assert_eq!(list(), before, "something was left");
        assert!(!self.output().exists());
    }
}

#[test]
fn a_good_folder_is_taken() {
    let good = Bad::new();
    good.generate().assert().success();
    let expected = Checkpoint::open(golden().join("expected.safetensors")).expect("a good file");
    assert_eq!(Checkpoint::open(good.output()).expect("written").names(), expected.names());
}

#[test]
fn shards_that_are_missing_or_damaged() {
    let bad = Bad::new();
    let shard = bad.model().join(SHARDS[1]);
    let whole = fs::read(&shard).expect("readable");
    fs::write(&shard, &whole[..whole.len() - 1]).expect("writable");
    bad.refused(&[SHARDS[1], "truncated"]);
    fs::write(&shard, &whole[..100]).expect("writable");
    bad.refused(&[SHARDS[1], "truncated"]);
    fs::remove_file(&shard).expect("there");
    bad.refused(&["model.safetensors.index.json", &format!("`{}` can't be opened", SHARDS[1])]);
    // A header that is longer than any.
    fs::write(&shard, 100_000_001u64.to_le_bytes()).expect("writable");
    fs::OpenOptions::new().write(true).open(&shard).expect("there").set_len(1 << 30).expect("a sparse file");
    bad.refused(&[SHARDS[1], "100000001 bytes is longer than the 100000000 allowed"]);
}

#[test]
fn weights_of_another_kind() {
    let bad = Bad::new();
    bad.write(|shape, _, _| *shape = vec![16, 64]);
    bad.refused(&[SHARDS[1], &format!("tensor `{WEIGHT}` has shape [16, 64], expected [32, 32]")]);
    for (value, shown) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf")] {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            bad.write(|_, data, stored| {
                data[1000] = value;
                *stored = dtype;
            });
            bad.refused(&[SHARDS[1], &format!("tensor `{WEIGHT}` holds {shown} at element 1000")]);
        }
    }
    bad.write(|_, _, _| {});
    let shard = bad.model().join(SHARDS[1]);
    let bytes = fs::read(&shard).expect("readable");
    let at = bytes.windows(5).position(|w| w == b"\"F32\"").expect("a dtype");
    fs::write(&shard, [&bytes[..at], b"\"I32\"", &bytes[at + 5..]].concat()).expect("writable");
    bad.refused(&[SHARDS[1], "has dtype I32; F32, F16 and BF16 are supported"]);
}

#[test]
fn an_index_that_leaves_its_folder() {
    let bad = Bad::new();
    let outside = bad.dir.path().join("outside.safetensors");
    fs::copy(bad.model().join(SHARDS[1]), &outside).expect("a copy");
    for name in ["../outside.safetensors", outside.to_str().expect("text"), r"..\outside.safetensors", ".."] {
        bad.index(&json!({"weight_map": {"x": name}}));
        bad.refused(&["model.safetensors.index.json", &format!("shard name `{name}` leaves the folder")]);
    }
    bad.write(|_, _, _| {});
    #[cfg(unix)]
    {
        fs::remove_file(bad.model().join(SHARDS[1])).expect("there");
        std::os::unix::fs::symlink("../outside.safetensors", bad.model().join(SHARDS[1])).expect("a link");
        bad.refused(&[&format!("`{}` is a link that leaves the folder", SHARDS[1])]);
    }
    let twice = format!(r#"{{"weight_map": {{"x": "{}", "x": "{}"}}}}"#, SHARDS[0], SHARDS[1]);
    fs::write(bad.model().join("model.safetensors.index.json"), twice).expect("writable");
    bad.refused(&["model.safetensors.index.json", "the key `x` stands there twice"]);
}

#[test]
fn configs_that_can_not_work() {
    let bad = Bad::new();
    let text = fs::read(bad.model().join("config.json")).expect("readable");
    let good: Value = serde_json::from_slice(&text).expect("JSON");
    for (key, value, message) in [
        ("output_dim", json!(1), "output_dim 1 must equal token_dim"),
        ("head_dim", json!(12), "head_dim 12 must divide d_model 32"),
        ("rank", json!("many"), "`rank`: invalid type: string \"many\""),
        ("pg_mapping", json!({"q": {"type": "sparse"}}), "pg_mapping entry `q` is neither plain"),
    ] {
        let mut config = good.clone();
        config[key] = value;
        fs::write(bad.model().join("config.json"), config.to_string()).expect("writable");
        bad.refused(&["config.json: ", message]);
    }
}

#[test]
fn conditions_that_do_not_fit() {
    let bad = Bad::new();
    let write = |shape: &[usize], value: f32| {
        let data = vec![value; shape.iter().product()];
        TensorWriter::new()
            .add("condition", shape, &data, Dtype::F32)
            .write(bad.condition())
            .expect("writable");
    };
    write(&[1, 1, 2, 23], 0.5);
    bad.refused(&["shape [1, 1, 2, 23], expected [batch, 1, length, 24] or [batch, length, 24]"]);
    write(&[1, 1, 2, 24], f32::NAN);
    bad.refused(&["condition.safetensors", "`condition` holds NaN at element 0"]);
    fs::write(bad.condition(), "no").expect("writable");
    bad.refused(&["condition.safetensors", "2 bytes are too few"]);
}

#[test]
fn files_that_inspect_and_edit_refuse() {
    let bad = Bad::new();
    let file = bad.dir.path().join("x.safetensors");
    let inspect = || {
        let mut command = hywu();
        command.arg("inspect").arg(&file);
        command
    };
    let header = |text: &str, data: usize| {
        let length = (text.len() as u64).to_le_bytes();
        fs::write(&file, [&length, text.as_bytes(), &vec![0; data]].concat()).expect("writable");
    };
    let name = r"\u001b[31mred\nline";
    header(&format!(r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#), 4);
    fails(inspect(), &["x.safetensors", "control characters"]);
    let a = r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    header(&format!("{{{a},{a}}}"), 4);
    fails(inspect(), &["x.safetensors", "the key `a` stands there twice"]);
    #[cfg(unix)]
    fails(
        {
            let mut command = hywu();
            command.args(["inspect", "/dev/zero"]);
            command
        },
        &["/dev/zero: not a regular file"],
    );

    let (photo, out) = (bad.dir.path().join("in.png"), bad.dir.path().join("out.png"));
    image::RgbImage::new(8, 8).save(&photo).expect("a picture");
    let edit = || {
        let mut command = hywu();
        command.arg("edit").arg(&photo).args(["brighter", "--steps", "1", "--adapter"]).arg(&file);
        command.arg("-o").arg(&out);
        command
    };
    fs::write(&file, 8_000_001u64.to_le_bytes()).expect("writable");
    fs::OpenOptions::new().write(true).open(&file).expect("there").set_len(1 << 30).expect("a sparse file");
    fails(edit(), &["x.safetensors", "8000001 bytes is longer than the 8000000 allowed"]);
    TensorWriter::new()
        .add("l.q.lora_A", &[1, 1, 2], &[1.0, f32::NAN], Dtype::F32)
        .add("l.q.lora_B", &[1, 1, 1], &[1.0], Dtype::F32)
        .add("scale", &[], &[1.0], Dtype::F32)
        .write(&file)
        .expect("writable");
    fails(edit(), &["x.safetensors", "tensor `l.q.lora_A` holds NaN at element 1"]);
    assert!(!out.exists());
}

/// A file system of 16 KiB, which the adapter doesn't fit on; where the system lets a user mount one. (Limits on the size of a file,
/// in other tests, work everywhere, but give another error than a full disk does.)
#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_fills_half_way_keeps_what_was_there() {
    let may = std::process::Command::new("unshare").args(["-rm", "true"]).output();
    if !may.is_ok_and(|out| out.status.success()) {
        println!("SKIPPED: a user may not mount a file system here");
        return;
    }
    let folder = golden().parent().expect("a folder").join("tiny-moe");
    let disk = tempfile::tempdir().expect("a temporary folder");
    // An earlier adapter stands there; what is left on the disk at the end is listed.
    let script = format!(
        "mount -t tmpfs -o size=16k none {disk:?} && cd {disk:?} && echo earlier > out.safetensors || exit 9
        {:?} generate --checkpoint {folder:?} --condition {:?} --output out.safetensors --device cpu
        code=$?; ls -A; cat out.safetensors; exit $code",
        assert_cmd::cargo::cargo_bin("hywu"),
        folder.join("condition.safetensors"),
        disk = disk.path(),
    );
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c"]).arg(script);
    let assert = command.assert().code(1).stdout("out.safetensors\nearlier\n");
    assert.stderr(contains("out.safetensors: No space left on device")).stderr(contains("panicked").not());
}
