//! Checkpoints, adapters and specs: round trips, and files that lie.

use hywu_core::{
    Adapter, AdapterSpec, Checkpoint, Dtype, Error, Lora, TensorWriter, create_folder_atomic, read_text,
    remove_leftovers, replace_folder_atomic, write_atomic,
};
use indexmap::IndexMap;
use ndarray::ArrayD;
use std::{fs, path::Path};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

#[track_caller]
fn refused(path: &Path, message: &str) {
    let e = Checkpoint::open(path).err().unwrap_or_else(|| panic!("{} was accepted", path.display()));
    let text = e.to_string();
    assert!(text.contains(message) && !text.contains('\n'), "{text}");
}

#[test]
fn every_dtype_comes_back() {
    let dir = folder();
    let file = dir.path().join("x.safetensors");
    // Exact in all three types.
    let data = [0.0, 1.0, -2.5, 0.15625, 96.0, -0.0];
    let mut writer = TensorWriter::new();
    for (name, dtype) in [("a", Dtype::F32), ("b", Dtype::F16), ("c", Dtype::Bf16)] {
        writer.add(name, &[2, 3], &data, dtype);
    }
    writer.meta("k", "v").write(&file).expect("writable");
    let read = Checkpoint::open(&file).expect("readable");
    assert_eq!(read.names(), ["a", "b", "c"]);
    assert_eq!(read.metadata()["k"], "v");
    for name in read.names() {
        let x = read.read_shaped(name, &[2, 3]).expect("a tensor");
        assert!(x.iter().zip(&data).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
    assert!(read.read_shaped("a", &[3, 2]).expect_err("wrong shape").to_string().contains("[2, 3]"));
    assert!(read.read("d").expect_err("missing").to_string().contains('d'));
}

#[test]
fn equal_contents_are_equal_bytes() {
    let dir = folder();
    let bytes = |i: usize| {
        let mut writer = TensorWriter::new();
        (0..20).for_each(|k| {
            writer.meta(format!("key {k}"), format!("\"{k}\" \n \u{e9}"));
        });
        let file = dir.path().join(format!("{i}.safetensors"));
        writer.add("a", &[1], &[1.0], Dtype::F32).write(&file).expect("writable");
        assert_eq!(Checkpoint::open(&file).expect("readable").metadata()["key 3"], "\"3\" \n \u{e9}");
        fs::read(file).expect("readable")
    };
    assert_eq!(bytes(0), bytes(1));
}

#[test]
fn damaged_files_are_refused() {
    let dir = folder();
    let file = dir.path().join("x.safetensors");
    refused(&file, "x.safetensors");
    refused(dir.path(), "model.safetensors");
    TensorWriter::new().add("a", &[4], &[1.0; 4], Dtype::F32).write(&file).expect("writable");
    let good = fs::read(&file).expect("readable");
    for cut in [0, 4, 8, 20, good.len() - 1] {
        fs::write(&file, &good[..cut]).expect("writable");
        refused(&file, "x.safetensors");
    }
    let mut spoiled = good.clone();
    spoiled[..8].fill(0xff);
    fs::write(&file, &spoiled).expect("writable");
    refused(&file, "x.safetensors");
    let mut nan = good;
    let n = nan.len();
    nan[n - 4..].fill(0xff);
    fs::write(&file, &nan).expect("writable");
    let e = Checkpoint::open(&file).expect("a good header").read("a").expect_err("NaN").to_string();
    assert!(e.contains('a') && e.contains("NaN"), "{e}");
}

#[test]
fn shards_stay_in_their_folder_and_agree_with_the_index() {
    let dir = folder();
    let inner = dir.path().join("model");
    fs::create_dir(&inner).expect("writable");
    let shard = |path: &Path, name: &str| {
        TensorWriter::new().add(name, &[1], &[1.0], Dtype::Bf16).write(path).expect("writable");
    };
    shard(&inner.join("one.safetensors"), "a");
    shard(&inner.join("two.safetensors"), "b");
    shard(&dir.path().join("outside.safetensors"), "b");
    let index = |b: &str| {
        let text = format!(r#"{{"metadata": {{}}, "weight_map": {{"a": "one.safetensors", "b": "{b}"}}}}"#);
        fs::write(inner.join("model.safetensors.index.json"), text).expect("writable");
    };
    index("two.safetensors");
    assert_eq!(Checkpoint::open(&inner).expect("readable").names(), ["a", "b"]);
    index("../outside.safetensors");
    refused(&inner, "../outside.safetensors");
    index("/etc/passwd");
    refused(&inner, "/etc/passwd");
    index("none.safetensors");
    refused(&inner, "none.safetensors");
    index("one.safetensors");
    refused(&inner, "`b`");
    index(r"..\\outside.safetensors");
    refused(&inner, "leaves the folder");
    fs::write(inner.join("model.safetensors.index.json"), "{").expect("writable");
    refused(&inner, "index");
}

/// As a Hugging Face cache has them: snapshots/<revision>/<file> -> ../../blobs/<hash>.
#[cfg(unix)]
#[test]
fn shards_may_be_links() {
    use std::os::unix::fs::symlink;
    let dir = folder();
    let (blobs, snapshot) = (dir.path().join("blobs"), dir.path().join("snapshots/main"));
    fs::create_dir(&blobs).expect("writable");
    fs::create_dir_all(&snapshot).expect("writable");
    for (name, hash, file) in [("a", "0a", "one.safetensors"), ("b", "0b", "two.safetensors")] {
        TensorWriter::new().add(name, &[1], &[1.0], Dtype::F32).write(blobs.join(hash)).expect("writable");
        symlink(format!("../../blobs/{hash}"), snapshot.join(file)).expect("a link");
    }
    let index = r#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
    fs::write(blobs.join("0c"), index).expect("writable");
    symlink("../../blobs/0c", snapshot.join("model.safetensors.index.json")).expect("a link");
    assert_eq!(Checkpoint::open(&snapshot).expect("readable").names(), ["a", "b"]);
    fs::remove_file(blobs.join("0b")).expect("writable");
    refused(&snapshot, "two.safetensors");
}

#[test]
fn a_failed_write_leaves_the_old_file() {
    let dir = folder();
    let file = dir.path().join("x");
    fs::write(&file, "old").expect("writable");
    let e = write_atomic(&file, |w| {
        w.write_all(b"half")?;
        Err(std::io::Error::other("disk full"))
    });
    assert!(e.expect_err("refused").to_string().contains("disk full"));
    assert_eq!(fs::read(&file).expect("readable"), b"old");
    assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 1);
    assert!(write_atomic(dir.path().join("none/x"), |_| Ok(())).is_err());
}

/// Fills a folder with two files of the same text.
fn pair(text: &str) -> impl FnOnce(&Path) -> hywu_core::Result<()> {
    move |folder| {
        ["a", "b"].iter().try_for_each(|n| write_atomic(folder.join(n), |w| w.write_all(text.as_bytes())))
    }
}

fn names(folder: &Path) -> Vec<String> {
    let name =
        |e: std::io::Result<fs::DirEntry>| e.expect("readable").file_name().into_string().expect("text");
    let mut names: Vec<_> = fs::read_dir(folder).expect("readable").map(name).collect();
    names.sort();
    names
}

#[test]
fn a_folder_is_replaced_whole_or_not_at_all() {
    let dir = folder();
    let place = dir.path().join("place");
    let replace = |text: &str| replace_folder_atomic(&place, &["a", "b", "c"], pair(text));
    let held = || ["a", "b"].map(|n| fs::read_to_string(place.join(n)).expect("written"));
    for text in ["one", "two"] {
        replace(text).expect("writable");
        assert_eq!(held(), [text, text]);
        // What the new one has not is gone.
        fs::write(place.join("c"), "old").expect("writable");
    }
    let e = replace_folder_atomic(&place, &["a", "b", "c"], |folder| {
        fs::write(folder.join("a"), "half").expect("writable");
        Err::<(), _>(hywu_core::Error::Interrupted)
    });
    assert!(matches!(e, Err(hywu_core::Error::Interrupted)));
    assert_eq!(
        (held(), names(&place)),
        (["two"; 2].map(String::from), ["a", "b", "c"].map(String::from).into())
    );
    // What is not known is not removed, even if it comes late.
    let late = replace_folder_atomic(&place, &["a", "b", "c"], |_| {
        fs::write(place.join("notes"), "mine").expect("writable");
        hywu_core::Result::Ok(())
    });
    for refused in [late, replace("three")] {
        let e = refused.expect_err("notes").to_string();
        assert!(e.contains("notes") && e.contains("place"), "{e}");
    }
    assert_eq!(held(), ["two", "two"]);
    fs::remove_file(place.join("notes")).expect("writable");
    assert_eq!(names(dir.path()), ["place"]);
    assert!(replace_folder_atomic(place.join("a"), &[], pair("x")).is_err());
    assert!(replace_folder_atomic(dir.path().join("none/x"), &[], pair("x")).is_err());
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("place", dir.path().join("link")).expect("a link");
        replace_folder_atomic(dir.path().join("link"), &["a", "b", "c"], pair("three")).expect("writable");
        assert_eq!(held(), ["three", "three"]);
        assert!(dir.path().join("link").is_symlink());
    }
}

/// One who has the folder open sees the old one or the new one.
#[cfg(target_os = "linux")]
#[test]
fn there_is_a_folder_at_any_time() {
    let dir = folder();
    let place = dir.path().join("place");
    let replace =
        |i: usize| replace_folder_atomic(&place, &["a", "b"], pair(&i.to_string())).expect("writable");
    replace(0);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            (1..50).for_each(replace);
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        while !done.load(std::sync::atomic::Ordering::Relaxed) {
            assert!(place.is_dir());
        }
    });
}

#[test]
fn leftovers_are_removed_and_nothing_else() {
    let dir = folder();
    for name in [".hywu-a", "x.hywu-b", "c"] {
        fs::create_dir(dir.path().join(name)).expect("writable");
        fs::write(dir.path().join(name).join("y"), "").expect("writable");
    }
    fs::write(dir.path().join(".hywu-d"), "").expect("writable");
    remove_leftovers(dir.path()).expect("writable");
    assert_eq!(names(dir.path()), ["c", "x.hywu-b"]);
}

#[test]
fn text_is_read_to_its_limit() {
    let dir = folder();
    let file = dir.path().join("x");
    fs::write(&file, "gr\u{fc}n").expect("writable");
    assert_eq!(read_text(&file, 5).expect("short enough"), "gr\u{fc}n");
    assert!(read_text(&file, 4).expect_err("too long").to_string().contains("larger than the 4 bytes"));
    fs::write(&file, [b'a', 0xff]).expect("writable");
    assert!(read_text(&file, 5).expect_err("no text").to_string().contains("not text"));
}

#[cfg(unix)]
#[test]
fn a_link_stays_and_its_target_is_written() {
    use std::os::unix::fs::symlink;
    let dir = folder();
    fs::create_dir(dir.path().join("real")).expect("writable");
    let target = dir.path().join("real/x");
    fs::write(&target, "old").expect("writable");
    symlink("real/x", dir.path().join("one")).expect("a link");
    symlink(dir.path().join("one"), dir.path().join("two")).expect("a link");
    // The first write finds the file, the second only links.
    for text in ["new", "newer"] {
        write_atomic(dir.path().join("two"), |w| w.write_all(text.as_bytes())).expect("writable");
        assert_eq!(fs::read_to_string(&target).expect("written"), text);
        assert!(dir.path().join("one").is_symlink() && dir.path().join("two").is_symlink());
        assert!(!target.is_symlink());
        fs::remove_file(&target).expect("writable");
    }
    symlink("circle", dir.path().join("circle")).expect("a link");
    assert!(write_atomic(dir.path().join("circle"), |_| Ok(())).is_err());
}

/// What can't be replaced is told before anything is written.
#[test]
fn a_folder_that_can_not_take_its_place_is_refused_before_it_is_filled() {
    let dir = folder();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("full/inside")).expect("writable");
    fs::write(at("file"), "old").expect("writable");
    let mut bad =
        vec![at("full"), at("file"), at("none/x"), at("full/.."), "".into(), ".".into(), "/".into()];
    #[cfg(unix)]
    {
        fs::create_dir(at("empty")).expect("writable");
        for (name, target) in [("link", "empty"), ("nowhere", "none")] {
            std::os::unix::fs::symlink(target, at(name)).expect("a link");
            bad.push(at(name));
        }
        // A file system of its own, where there is one that is empty.
        let mounted = fs::read_to_string("/proc/mounts").unwrap_or_default();
        let mut mounted = mounted.lines().filter_map(|line| line.split(' ').nth(1));
        bad.extend(mounted.find(|m| fs::read_dir(m).is_ok_and(|mut d| d.next().is_none())).map(Into::into));
    }
    for path in bad {
        let made = create_folder_atomic(&path, |_| -> Result<(), Error> { panic!("{path:?}: not reached") });
        let e = made.expect_err("refused").to_string();
        assert!(e.starts_with(path.to_str().expect("text")), "{e}");
    }
    // An empty one is replaced, whatever it is called.
    for (name, asked) in [("empty", "empty"), ("new", "new/."), ("newer", "newer/")] {
        let fill = |made: &std::path::Path| fs::write(made.join("x"), name).map_err(|e| Error::io(made, e));
        create_folder_atomic(at(asked), fill).expect("a good place");
        assert_eq!(fs::read_to_string(at(name).join("x")).expect("there"), name);
    }
    assert_eq!(fs::read_to_string(at("file")).expect("there"), "old");
}

/// A socket stands for /dev/null here, which a failing test would replace.
#[cfg(unix)]
#[test]
fn only_regular_files_are_replaced() {
    use std::os::unix::fs::{FileTypeExt, symlink};
    let dir = folder();
    let (socket, link, inner) =
        (dir.path().join("socket"), dir.path().join("link"), dir.path().join("folder"));
    let _bound = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
    symlink("socket", &link).expect("a link");
    fs::create_dir(&inner).expect("writable");
    for path in [&socket, &link, &inner] {
        let e = write_atomic(path, |_| panic!("not reached")).expect_err("refused").to_string();
        assert!(e.contains(path.to_str().expect("text")) && e.contains("regular file"), "{e}");
    }
    assert!(fs::symlink_metadata(&socket).expect("there").file_type().is_socket());
    assert!(link.is_symlink());
    assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 3);
}

fn mapping(text: &str) -> Result<AdapterSpec, String> {
    let map = serde_json::from_str(text).expect("JSON");
    AdapterSpec::from_mapping("model.layers.", 2, 2, 4.0, &map).map_err(|e| e.to_string())
}

#[test]
fn mappings_keep_their_order() {
    let spec = mapping(
        r#"{"z": {"lora_A_dim": 4, "lora_B_dim": 6},
            "e": {"type": "grouped", "num_experts": 3, "sub_weights": {"w2": {"lora_A_dim": 2, "lora_B_dim": 4},
                                                                     "w1": {"lora_A_dim": 4, "lora_B_dim": 2}}}}"#,
    )
    .expect("a good map");
    let paths: Vec<_> = spec.modules.iter().map(|m| m.path.as_str()).collect();
    assert_eq!(paths, ["z", "e.w2", "e.w1"]);
    assert_eq!(spec.scale(), 2.0);
    let parameters = spec.parameters();
    assert_eq!(parameters.len(), 6);
    assert_eq!(parameters[0].shape, [2, 4]);
    assert_eq!(parameters[1].shape, [3, 2, 2]);
    assert_eq!(parameters[3].shape, [6, 2]);
    assert_eq!(spec.module_name(1, 2), "model.layers.1.e.w1");
}

#[test]
fn a_path_inside_another_moves_it_up() {
    let dims = r#"{"lora_A_dim": 1, "lora_B_dim": 1}"#;
    let spec =
        mapping(&format!(r#"{{"v_proj": {dims}, "x": {dims}, "qkv_proj": {dims}}}"#)).expect("a good map");
    let order: Vec<_> = spec.parameters()[..3].iter().map(|p| p.module).collect();
    assert_eq!(order, [0, 2, 1]);
}

#[test]
fn bad_mappings_name_the_entry() {
    for (text, message) in [
        (r#"{"q": {"lora_A_dim": 0, "lora_B_dim": 1}}"#, "`q`"),
        (r#"{"q": {"lora_A_dim": 1}}"#, "`q`"),
        (r#"{"q": {"type": "other", "lora_A_dim": 1, "lora_B_dim": 1}}"#, "`q`"),
        (r#"{"q": {"type": "grouped", "sub_weights": {}}}"#, "num_experts"),
        (r#"{"q.lora_A": {"lora_A_dim": 1, "lora_B_dim": 1}}"#, "lora_A"),
        (r#"{}"#, "no module"),
    ] {
        let e = mapping(text).expect_err("a bad map");
        assert!(e.contains(message), "{text}: {e}");
    }
    let map = serde_json::from_str(r#"{"q": {"lora_A_dim": 1, "lora_B_dim": 1}}"#).expect("JSON");
    let e = AdapterSpec::from_mapping("", 1, 0, 1.0, &map).expect_err("rank 0").to_string();
    assert!(e.contains("rank 0"), "{e}");
}

/// A config can come from anywhere: products of its numbers must not overflow.
#[test]
fn numbers_out_of_range_are_named() {
    let good = || mapping(r#"{"q": {"lora_A_dim": 4, "lora_B_dim": 6}}"#).expect("a good map");
    let refused = |message: &str, change: &dyn Fn(&mut AdapterSpec)| {
        let mut spec = good();
        change(&mut spec);
        let e = spec.validate().expect_err(message).to_string();
        assert!(e.contains(message) && e.contains("must be from"), "{e}");
    };
    for big in [0, 1 << 32, usize::MAX] {
        refused(&format!("rank {big}"), &|s| s.rank = big);
        refused(&format!("layers {big}"), &|s| s.layers = big);
        refused(&format!("`q`: lora_A_dim {big}"), &|s| s.modules[0].in_dim = big);
        refused(&format!("`q`: lora_B_dim {big}"), &|s| s.modules[0].out_dim = big);
        refused(&format!("`q`: num_experts {big}"), &|s| s.modules[0].experts = Some(big));
    }
    for alpha in [-1.0, 1e30, f32::INFINITY, f32::NAN] {
        refused(&format!("alpha {alpha}"), &|s| s.alpha = alpha);
    }
    refused("prefix 1000", &|s| s.prefix = "x".repeat(1000));
    refused("path 1000", &|s| s.modules[0].path = "x".repeat(1000));
    refused("modules in pg_mapping 2000", &|s| s.modules = vec![s.modules[0].clone(); 2000]);
    // Each in its range, but not all together: 2^12 * 2^10 * 2^20.
    refused("4398046511104", &|s| {
        s.rank = 1 << 10;
        (s.modules[0].experts, s.modules[0].out_dim) = (Some(1 << 12), 1 << 20);
    });
    let mut large = good();
    (large.rank, large.modules[0].experts, large.modules[0].in_dim) = (64, Some(256), 8192);
    large.validate().expect("a large model");
    assert_eq!(large.parameters()[0].numel(), 64 * 256 * 8192);
}

#[test]
fn adapters_come_back_and_are_checked() {
    let dir = folder();
    let spec = mapping(r#"{"q": {"lora_A_dim": 3, "lora_B_dim": 5}}"#).expect("a good map");
    let array = |shape: &[usize], x: f32| ArrayD::from_elem(shape, x);
    let lora = Lora { lora_a: array(&[2, 2, 3], 0.5), lora_b: array(&[2, 5, 2], -1.0) };
    let modules: IndexMap<_, _> = spec.module_names().map(|n| (n, lora.clone())).collect();
    let mut adapter =
        Adapter { modules, scale: spec.scale(), metadata: [("seed".into(), "7".into())].into() };
    adapter.check(&spec).expect("it fits");
    let file = dir.path().join("a.safetensors");
    adapter.save(&file).expect("writable");
    assert_eq!(Adapter::load(&file).expect("readable"), adapter);
    assert_eq!(adapter.entry(1).expect("two instances").batch(), 1);
    assert!(adapter.entry(2).is_none());

    let spare = adapter.modules.swap_remove("model.layers.1.q").expect("there");
    let e = adapter.check(&spec).expect_err("one is missing").to_string();
    assert!(e.contains("missing") && e.contains("model.layers.1.q"), "{e}");
    adapter.modules.insert("model.layers.1.k".into(), spare);
    let e = adapter.check(&spec).expect_err("one is unused").to_string();
    assert!(e.contains("model.layers.1.q") && e.contains("model.layers.1.k"), "{e}");
    let mut bad = adapter.modules.swap_remove("model.layers.1.k").expect("there");
    bad.lora_a[[0, 0, 0]] = f32::NAN;
    adapter.modules.insert("model.layers.1.q".into(), bad);
    assert!(adapter.check(&spec).expect_err("NaN").to_string().contains("NaN"));
}

/// 65504 is the largest number of f16. Infinity is what it says.
#[test]
fn a_number_that_would_become_infinite_is_not_written() {
    let dir = folder();
    let path = dir.path().join("x");
    let mut writer = TensorWriter::new();
    writer.add("fine", &[2], &[65504.0, f32::INFINITY], Dtype::F16).add("b", &[2], &[1.0, -7e4], Dtype::F16);
    let error = writer.write(&path).expect_err("beyond f16").to_string();
    assert!(error.contains("`b` holds -7e4 at element 1") && error.contains("F16"), "{error}");
    assert!(!path.exists());
}
