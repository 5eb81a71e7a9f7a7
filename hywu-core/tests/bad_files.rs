//! Files that are damaged, that lie, or that change while they are read: each is refused in one line that names the file and what is
//! wrong with it.

use hywu_core::{Adapter, Checkpoint, Dtype, Error, Header, Index, TensorWriter, parse_json, read_small};
use proptest::prelude::*;
use std::{
    fs,
    path::{Path, PathBuf},
};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// A safetensors file with this header before `data` bytes.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

#[track_caller]
fn one_line<T>(result: Result<T, Error>, messages: &[&str]) {
    let text = result.err().expect("refused").to_string();
    assert!(!text.contains(char::is_control) && text.len() < 5000, "{text}");
    for message in messages {
        assert!(text.contains(message), "`{message}` is not in: {text}");
    }
}

/// A checkpoint in memory is refused.
#[track_caller]
fn refused(header: &str, data: usize, message: &str) {
    let bytes = file(header, &vec![0; data]);
    one_line(
        Checkpoint::from_bytes("x.safetensors", bytes, Header::MAX_CHECKPOINT),
        &["x.safetensors", message],
    );
}

fn shard(path: &Path, name: &str) {
    TensorWriter::new().add(name, &[2, 3], &[1.0; 6], Dtype::F32).write(path).expect("writable");
}

/// A folder with an index that says where the tensors `a` and `b` are, and two shards that hold them.
fn sharded(b: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = folder();
    let model = dir.path().join("model");
    fs::create_dir(&model).expect("writable");
    shard(&model.join("one.safetensors"), "a");
    shard(&model.join("two.safetensors"), "b");
    let text = serde_json::json!({"weight_map": {"a": "one.safetensors", "b": b}}).to_string();
    fs::write(model.join("model.safetensors.index.json"), text).expect("writable");
    (dir, model)
}

#[test]
fn headers_that_are_too_long_are_not_read() {
    let dir = folder();
    let path = dir.path().join("x.safetensors");
    let lie = |length: u64| {
        fs::write(&path, length.to_le_bytes()).expect("writable");
        // Long enough for what it tells, without taking the room on the disk.
        let file = fs::OpenOptions::new().write(true).open(&path).expect("writable");
        file.set_len(1 << 30).expect("a sparse file");
    };
    lie(100_000_001);
    one_line(Checkpoint::open(&path), &["x.safetensors", "100000001 bytes", "100000000 allowed"]);
    lie(8_000_001);
    one_line(Adapter::load(&path), &["x.safetensors", "8000001 bytes", "8000000 allowed"]);
    for length in [u64::MAX, 1 << 63, 1 << 40] {
        lie(length);
        one_line(Checkpoint::open(&path), &[&length.to_string()]);
        one_line(Adapter::load(&path), &[&length.to_string()]);
    }
    let bytes = fs::read(&path).expect("readable")[..16].to_vec();
    one_line(Adapter::from_bytes("bytes", bytes), &["bytes", "8000000 allowed"]);
}

#[test]
fn a_header_of_the_greatest_length_is_read() {
    let mut header = String::from(r#"{"scale":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#);
    header.extend(std::iter::repeat_n(' ', 8_000_000 - header.len()));
    // There is a scale, but no module: the header itself was taken.
    one_line(Adapter::from_bytes("x", file(&header, &[0; 4])), &["there is no adapter in it"]);
    header.push(' ');
    one_line(Adapter::from_bytes("x", file(&header, &[0; 4])), &["8000001 bytes"]);
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let dir = folder();
    let path = dir.path().join("x.safetensors");
    shard(&path, "a");
    let good = fs::read(&path).expect("readable");
    for cut in 0..good.len() {
        fs::write(&path, &good[..cut]).expect("writable");
        one_line(Checkpoint::open(&path), &["x.safetensors"]);
    }
    fs::write(&path, &good[..good.len() - 1]).expect("writable");
    one_line(Checkpoint::open(&path), &["truncated", "23 bytes of tensors where its header tells of 24"]);
    fs::write(&path, [&good[..], &[0]].concat()).expect("writable");
    one_line(Checkpoint::open(&path), &["25 bytes of tensors where its header tells of 24"]);
}

#[test]
fn headers_that_lie_are_refused() {
    let one = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    assert!(
        Checkpoint::from_bytes("x", file(&one("F32", "[2]", "[0,8]"), &[0; 8]), Header::MAX_CHECKPOINT)
            .is_ok()
    );
    refused(&one("I64", "[1]", "[0,8]"), 8, "tensor `a` has dtype I64; F32, F16 and BF16 are supported");
    refused(&one("F99", "[1]", "[0,8]"), 8, "tensor `a`");
    refused(&one("F32", "[3]", "[0,8]"), 8, "invalid shape");
    refused(&one("F32", "[2]", "[4,12]"), 12, "offset");
    refused(&one("F32", "[2]", "[8,0]"), 8, "offset");
    refused(&one("F32", "[-2]", "[0,8]"), 8, "tensor `a`");
    refused(&one("F32", "[4294967296, 4294967296]", "[0,0]"), 0, "overflow");
    refused(&one("F32", "[2]", "[0,18446744073709551615]"), 8, "invalid shape");
    refused(&one("F32", &format!("[{}1]", "1,".repeat(99)), "[0,4]"), 4, "100 axes");
    for text in
        ["", "{", "[]", "null", "\u{feff}{}", r#"{"a":1}"#, r#"{"a":{}}"#, r#"{"__metadata__":{"k":1}}"#]
    {
        refused(text, 0, "safetensors file");
    }
    let overlap = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
    refused(overlap, 12, "`b`");
    // Two tensors of one name: which of them is meant?
    let twice = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#;
    refused(twice, 16, "`a` stands there twice");
    refused(r#"{"__metadata__":{"k":"1","k":"2"}}"#, 0, "`k` stands there twice");
    // Names reach the terminal.
    refused(&one("F32", "[2]", "[0,8]").replace("\"a\"", r#""\u001b[2Ja""#), 8, r"\u{1b}[2Ja");
    refused(
        &one("I8", "[8]", "[0,8]").replace("\"a\"", &format!("\"{}\"", "n".repeat(1 << 20))),
        8,
        "nnn ...",
    );
}

#[test]
fn a_wrong_shape_is_told_with_the_expected_one() {
    let (_dir, model) = sharded("two.safetensors");
    let checkpoint = Checkpoint::open(model).expect("readable");
    let message = ["two.safetensors", "tensor `b` has shape [2, 3], expected [3, 2]"];
    one_line(checkpoint.check_shape("b", &[3, 2]), &message);
    one_line(checkpoint.read_shaped("b", &[3, 2]), &message);
    one_line(checkpoint.read("c"), &["no tensor named `c`"]);
}

#[test]
fn every_value_that_is_not_finite_is_found() {
    let dir = folder();
    let path = dir.path().join("x.safetensors");
    let size = 300_000;
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        for (value, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
            for place in [0, 1, 65_535, 65_536, 131_072, size - 1] {
                let mut data = vec![-60_000.0; size];
                data[place] = value;
                TensorWriter::new().add("a", &[size], &data, dtype).write(&path).expect("writable");
                let e = Checkpoint::open(&path).expect("a good header").read("a");
                one_line(e, &["x.safetensors", &format!("tensor `a` holds {shown} at element {place}")]);
            }
        }
    }
    // As are the numbers next to them.
    let data = [f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45];
    TensorWriter::new().add("a", &[4], &data, Dtype::F32).write(&path).expect("writable");
    let read = Checkpoint::open(&path).expect("readable").read("a").expect("finite");
    assert_eq!(read.as_slice(), Some(&data[..]));
}

#[test]
fn missing_and_damaged_shards_are_named() {
    let (_dir, model) = sharded("two.safetensors");
    let two = model.join("two.safetensors");
    let good = fs::read(&two).expect("readable");
    fs::write(&two, &good[..good.len() - 5]).expect("writable");
    one_line(Checkpoint::open(&model), &["two.safetensors", "truncated"]);
    fs::write(&two, "").expect("writable");
    one_line(Checkpoint::open(&model), &["two.safetensors", "0 bytes are too few"]);
    fs::remove_file(&two).expect("there");
    one_line(
        Checkpoint::open(&model),
        &["model.safetensors.index.json", "`two.safetensors` can't be opened"],
    );
    fs::create_dir(&two).expect("writable");
    one_line(Checkpoint::open(&model), &["two.safetensors", "not a regular file"]);
    fs::remove_dir(&two).expect("there");
    shard(&two, "a");
    one_line(Checkpoint::open(&model), &["two.safetensors", "tensor `a` is also in", "one.safetensors"]);
    TensorWriter::new()
        .add("b", &[1], &[1.0], Dtype::F32)
        .add("c", &[1], &[1.0], Dtype::F32)
        .write(&two)
        .expect("writable");
    one_line(Checkpoint::open(&model), &["two.safetensors", "tensor `c` is not in the index"]);
    shard(&two, "d");
    one_line(Checkpoint::open(&model), &["model.safetensors.index.json", "tensor `b` is not in its shard"]);
}

#[test]
fn an_index_names_plain_files_alone() {
    let outside = [
        "../two.safetensors",
        "/etc/passwd",
        "./two.safetensors",
        "two.safetensors/",
        r"..\two.safetensors",
        "..",
        ".",
        "",
        "sub/two.safetensors",
    ];
    for name in outside {
        let (_dir, model) = sharded(name);
        one_line(Checkpoint::open(&model), &[&format!("shard name `{name}` leaves the folder")]);
    }
    let (_dir, model) = sharded("two\n.safetensors");
    one_line(Checkpoint::open(&model), &["control characters"]);
    for (text, message) in [
        ("", "not a shard index"),
        ("[]", "not a shard index"),
        (r#"{"metadata": {}}"#, "weight_map"),
        (r#"{"weight_map": {}}"#, "names no tensor"),
        (r#"[{"a": "x"}]"#, "an object is expected"),
        (r#"{"weight_map": {"a": 1}}"#, "`weight_map.a`"),
        (r#"{"weight_map": {"a": "x", "a": "y"}}"#, "`a` stands there twice"),
        (r#"{"weight_map": {"a": "x"}, "weight_map": {"a": "y"}}"#, "`weight_map` stands there twice"),
        (r#"{"weight_map": {"a": "x"}} x"#, "not a shard index"),
    ] {
        one_line(Index::parse("i.json", text.as_bytes()), &["i.json", message]);
    }
}

#[cfg(unix)]
#[test]
fn a_shard_may_not_be_a_link_out_of_the_folder() {
    use std::os::unix::fs::symlink;
    let (dir, model) = sharded("three.safetensors");
    let (outside, three) = (dir.path().join("outside.safetensors"), model.join("three.safetensors"));
    shard(&outside, "b");
    symlink("../outside.safetensors", &three).expect("a link");
    one_line(Checkpoint::open(&model), &["`three.safetensors` is a link that leaves the folder"]);
    fs::remove_file(&three).expect("there");
    symlink("two.safetensors", &three).expect("a link");
    assert_eq!(Checkpoint::open(&model).expect("it stays inside").names(), ["a", "b"]);
    // The folder itself may be one.
    symlink("model", dir.path().join("link")).expect("a link");
    assert_eq!(Checkpoint::open(dir.path().join("link")).expect("readable").names(), ["a", "b"]);
    fs::remove_file(&three).expect("there");
    symlink("three.safetensors", &three).expect("a link");
    one_line(Checkpoint::open(&model), &["three.safetensors"]);
}

/// Devices and pipes have no end, or nobody at their other end.
#[cfg(unix)]
#[test]
fn only_regular_files_are_read() {
    let dir = folder();
    let socket = dir.path().join("socket.safetensors");
    let _bound = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
    for path in [&socket, Path::new("/dev/zero")] {
        one_line(Checkpoint::open(path), &["not a regular file"]);
        one_line(Adapter::load(path), &["not a regular file"]);
        one_line(read_small(path, 10), &["not a regular file"]);
    }
    one_line(read_small(dir.path(), 10), &["not a regular file"]);
    let file = dir.path().join("file");
    fs::write(&file, [7; 11]).expect("writable");
    assert_eq!(read_small(&file, 11).expect("readable"), [7; 11]);
    one_line(read_small(&file, 10), &["larger than the 10 bytes"]);
}

/// A mapped file would end the program here, by a signal.
#[test]
fn a_file_that_shrinks_while_it_is_open_is_an_error() {
    let dir = folder();
    let path = dir.path().join("x.safetensors");
    TensorWriter::new()
        .add("a", &[1000], &[1.0; 1000], Dtype::F32)
        .add("b", &[300_000], &[2.0; 300_000], Dtype::Bf16)
        .write(&path)
        .expect("writable");
    let checkpoint = Checkpoint::open(&path).expect("readable");
    let writer = fs::OpenOptions::new().write(true).open(&path).expect("writable");
    let whole = writer.metadata().expect("there").len();
    // Within `b`, on its second piece and at its start; then within `a`.
    for (length, good) in
        [(whole - 1, true), (whole - 100_000, true), (whole - 600_000, true), (300, false), (0, false)]
    {
        writer.set_len(length).expect("writable");
        one_line(checkpoint.read("b"), &["x.safetensors", "has shrunk since it was opened"]);
        assert_eq!(checkpoint.read("a").is_ok(), good, "{length}");
    }
    one_line(checkpoint.read("a"), &["x.safetensors", "has shrunk since it was opened"]);
}

#[test]
fn adapters_of_odd_parts_are_refused() {
    let write = |parts: &[(&str, &[usize])]| {
        let dir = folder();
        let path = dir.path().join("a.safetensors");
        let mut writer = TensorWriter::new();
        for (name, shape) in parts {
            writer.add(*name, shape, &vec![1.0; shape.iter().product()], Dtype::F32);
        }
        writer.write(&path).expect("writable");
        Adapter::load(path)
    };
    let (a, b): ((&str, &[usize]), (&str, &[usize])) = (("m.lora_A", &[1, 2, 3]), ("m.lora_B", &[1, 3, 2]));
    assert!(write(&[a, b, ("scale", &[])]).is_ok());
    one_line(write(&[a, b]), &["no tensor named `scale`"]);
    one_line(write(&[a, b, ("scale", &[1])]), &["`scale` has shape [1], expected []"]);
    one_line(write(&[a, ("scale", &[])]), &["no tensor named `m.lora_B`"]);
    one_line(write(&[b, ("scale", &[])]), &["`m` has a lora_B but no lora_A"]);
    one_line(write(&[a, b, ("scale", &[]), ("other", &[1])]), &["`other` is not part of an adapter"]);
    one_line(write(&[("m.lora_A", &[2, 3]), b, ("scale", &[])]), &["`m` has lora_A [2, 3]"]);
    one_line(write(&[("scale", &[])]), &["there is no adapter in it"]);
}

#[test]
fn a_key_twice_is_found_at_any_depth() {
    for text in
        [r#"{"a": 1, "a": 1}"#, r#"{"c": [{"b": {"a": null, "a": 2}}]}"#, r#"{"\u0061": true, "a": "x"}"#]
    {
        let e = parse_json::<serde_json::Value>(text.as_bytes()).expect_err("twice").to_string();
        assert!(e.contains("`a` stands there twice"), "{e}");
    }
    let text = r#"{"a": {"a": [1, -2, 1.5, {"a": {}}]}, "b": {"a": null}}"#;
    let value: serde_json::Value = parse_json(text.as_bytes()).expect("good");
    assert_eq!(value["a"]["a"][2], 1.5);
    let deep = "[".repeat(100_000);
    assert!(parse_json::<serde_json::Value>(deep.as_bytes()).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// No panic and no endless text, whatever bytes are spoiled.
    #[test]
    fn spoiled_bytes_are_an_error_or_other_numbers(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let header = r#"{"m.lora_A":{"dtype":"F32","shape":[1,1,2],"data_offsets":[0,8]},"m.lora_B":{"dtype":"BF16","shape":[1,2,1],"data_offsets":[8,12]},"scale":{"dtype":"F16","shape":[],"data_offsets":[12,14]}}"#;
        let mut bytes = file(header, &[0x3f; 14]);
        prop_assert!(Adapter::from_bytes("x", bytes.clone()).is_ok());
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        match Adapter::from_bytes("x", bytes) {
            Ok(adapter) => prop_assert!(adapter.modules.values().all(|m| m.lora_a.iter().chain(&m.lora_b).all(|x| x.is_finite()))),
            Err(e) => {
                let text = e.to_string();
                prop_assert!(!text.contains(char::is_control) && text.len() < 5000, "{}", text);
            }
        }
    }
}
