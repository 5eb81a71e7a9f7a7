//! `hywu edit --cache`: what is kept, found again, damaged, thrown out, and used by several at once.

mod common;

use assert_cmd::Command;
use common::{Place, edit, hywu, origin, photo, pixels, quietly};
use hywu::{
    cache::{AdapterCache, CacheKey},
    model::Model,
    pipeline::{Editor, Origin},
};
use hywu_core::{Adapter, Lora};
use hywu_diffusion::load_picture;
use ndarray::ArrayD;
use predicates::{prelude::*, str::contains};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

#[test]
fn a_hit_is_a_fresh_edit_to_the_byte() {
    let place = Place::new();
    let saved = |mut command: Command, name: &str| {
        let origin = quietly(command.arg("--save-adapter").arg(place.at(name)));
        (origin, fs::read(place.at(name)).expect("written"))
    };
    let (fresh, adapter) = saved(place.edit(&place.input, "make it warmer", "a.png"), "a.safetensors");
    let (first, same) = saved(place.cached(&place.input, "make it warmer", "b.png"), "b.safetensors");
    let (second, again) = saved(place.cached(&place.input, "make it warmer", "c.png"), "c.safetensors");
    assert_eq!([fresh, first, second], ["generated", "generated", "cached"]);
    assert!(adapter == same && adapter == again);
    let picture = fs::read(place.at("a.png")).expect("written");
    assert!(["b.png", "c.png"].iter().all(|name| fs::read(place.at(name)).expect("written") == picture));
    // The key holds tokens, the adapter the words that were asked.
    let (third, other) = saved(place.cached(&place.input, "Make it  WARMER", "d.png"), "d.safetensors");
    assert_eq!((third.as_str(), place.entries().len()), ("cached", 1));
    assert_ne!(other, adapter);
    assert_eq!(pixels(&place.at("d.png")), pixels(&place.at("a.png")));
    let told = Adapter::load(place.at("d.safetensors")).expect("an adapter").metadata;
    assert_eq!(told["instruction"], "Make it  WARMER");
}

#[test]
fn an_entry_serves_what_it_was_generated_for_and_nothing_else() {
    let place = Place::new();
    let asked = |input: &Path, instruction: &str, with: &[&str]| {
        quietly(place.cached(input, instruction, "out.png").args(with))
    };
    assert_eq!(asked(&place.input, "make it warmer", &[]), "generated");
    // The adapter does not depend on how it is used.
    let used = ["--seed", "9", "--strength", "0.5", "--tile", "64", "--sampler", "heun", "--apply", "merged"];
    assert_eq!(asked(&place.input, "make it warmer", &used), "cached");
    assert_eq!(asked(&place.input, "make it warmer", &["--strength", "0"]), "none");
    assert_eq!(asked(&place.input, "make it colder", &[]), "generated");
    // One value of one pixel; the alpha channel, which no generator sees.
    let mut changed = image::open(&place.input).expect("a picture").to_rgba8();
    changed.get_pixel_mut(70, 1).0[3] = 9;
    changed.save(place.at("alpha.png")).expect("writable");
    changed.get_pixel_mut(70, 1).0[1] ^= 1;
    changed.save(place.at("other.png")).expect("writable");
    assert_eq!(asked(&place.at("alpha.png"), "make it warmer", &[]), "cached");
    assert_eq!(asked(&place.at("other.png"), "make it warmer", &[]), "generated");
    assert_eq!(place.entries().len(), 3);

    // The same model is the same from a folder; a change of weights or of a config is another model.
    let with =
        |model: &Path| asked(&place.input, "make it warmer", &["--model", model.to_str().expect("UTF-8")]);
    assert_eq!(with(&place.model(|_| ())), "cached");
    let spoil = |file: PathBuf| {
        let mut bytes = fs::read(&file).expect("written");
        *bytes.last_mut().expect("not empty") ^= 1;
        fs::write(file, bytes).expect("writable");
    };
    for file in ["backbone.safetensors", "generator/model.safetensors"] {
        assert_eq!(with(&place.model(|model| spoil(model.join(file)))), "generated", "{file}");
    }
    let alpha = place.model(|model| {
        let file = model.join("generator/config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&file).expect("written")).expect("JSON");
        config["alpha"] = (config["alpha"].as_f64().expect("a number") * 2.0).into();
        fs::write(file, config.to_string()).expect("writable");
    });
    assert_eq!(with(&alpha), "generated");
    assert_eq!(place.entries().len(), 6);
}

#[test]
fn several_pictures_share_a_cache() {
    let place = Place::new();
    let copy = place.at("copy.png");
    fs::copy(&place.input, &copy).expect("writable");
    let other = photo(place.dir.path(), "other.png", 64, 72);
    let mut command = hywu();
    command.arg("edit").args([&place.input, &other, &copy]).args([
        "make it warmer",
        "--steps",
        "1",
        "--json",
    ]);
    command.arg("--output-dir").arg(place.at("out")).arg("--cache").arg(place.at("cache"));
    let done = command.assert().success();
    let lines = String::from_utf8_lossy(&done.get_output().stdout).into_owned();
    let origins: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON")["adapter"].clone())
        .collect();
    assert_eq!(origins, ["generated", "generated", "cached"]);
    assert_eq!(pixels(&place.at("out/in.png")), pixels(&place.at("out/copy.png")));
    // The summary for people says it too.
    let mut command = edit(&place.input, "make it warmer", &place.at("a.png"));
    command.arg("--cache").arg(place.at("cache")).assert().success().stderr(contains("adapter cached in"));
}

/// About 4 KB, and different for every `value`.
fn small(value: f32) -> Adapter {
    let pair = Lora {
        lora_a: ArrayD::from_elem(vec![1, 2, 250], value),
        lora_b: ArrayD::from_elem(vec![1, 250, 2], -value),
    };
    Adapter {
        modules: [("a.q".to_owned(), pair)].into_iter().collect(),
        scale: 2.0,
        metadata: Default::default(),
    }
}

fn key(name: &str) -> CacheKey {
    CacheKey::of([name])
}

#[test]
fn the_least_recently_used_make_room() {
    let place = Place::new();
    let folder = place.at("cache");
    let whole = AdapterCache::new(&folder, u64::MAX);
    whole.put(&key("a"), &small(1.0)).expect("writable");
    let size = fs::metadata(&place.entries()[0]).expect("written").len();
    let cache = AdapterCache::new(&folder, 3 * size + size / 2);
    let there = |names: &str| -> String {
        names.chars().filter(|name| whole.get(&key(&name.to_string())).expect("whole").is_some()).collect()
    };
    for (name, value) in [("b", 2.0), ("c", 3.0)] {
        cache.put(&key(name), &small(value)).expect("writable");
    }
    // Used in the order b, c, a: the next one takes the place of b, the one after that that of c.
    assert_eq!(there("bca"), "bca");
    cache.put(&key("d"), &small(4.0)).expect("writable");
    assert_eq!(there("dbca"), "dca");
    // Used in the order d, c, a.
    assert_eq!(whole.get(&key("d")).expect("whole"), Some(small(4.0)));
    assert_eq!(whole.get(&key("c")).expect("whole"), Some(small(3.0)));
    assert_eq!(whole.get(&key("a")).expect("whole"), Some(small(1.0)));
    cache.put(&key("e"), &small(5.0)).expect("writable");
    cache.put(&key("f"), &small(6.0)).expect("writable");
    assert_eq!(there("abcdef"), "aef");

    // Files of others are left alone, but for temporary ones of processes that must be dead.
    let (old, new) = (folder.join(".hywu-old"), folder.join(".hywu-new"));
    for (file, age) in
        [(&folder.join("photo.png"), 9999), (&folder.join("x.safetensors"), 9999), (&old, 9999), (&new, 9)]
    {
        fs::write(file, vec![0; 9999]).expect("writable");
        let at = SystemTime::now() - Duration::from_secs(age);
        fs::File::options().write(true).open(file).expect("there").set_modified(at).expect("writable");
    }
    AdapterCache::new(&folder, size).put(&key("g"), &small(7.0)).expect("writable");
    assert_eq!(there("abcdefg"), "g");
    let names: Vec<_> = place
        .entries()
        .iter()
        .map(|p| p.file_name().expect("a name").to_string_lossy().into_owned())
        .collect();
    assert_eq!(names.len(), 4, "{names:?}");
    assert!(["photo.png", "x.safetensors", ".hywu-new"].iter().all(|name| names.iter().any(|n| n == name)));

    let e = AdapterCache::new(&folder, 1000).put(&key("h"), &small(8.0)).expect_err("too large").to_string();
    assert!(e.contains("larger than the limit"), "{e}");
    assert_eq!(there("gh"), "g");
    // Its values alone would have room, its file has not: nothing makes way for it.
    let e =
        AdapterCache::new(&folder, size - 1).put(&key("h"), &small(8.0)).expect_err("too large").to_string();
    assert!(e.contains("larger than the limit"), "{e}");
    assert_eq!(there("gh"), "g");
}

#[test]
fn processes_may_use_a_cache_at_once() {
    let place = Place::new();
    let words = ["make it warmer", "make it colder", "make it sepia", "invert the colours"];
    let fresh: Vec<_> = (words.iter().enumerate())
        .map(|(i, words)| {
            let name = format!("fresh-{i}.png");
            place.edit(&place.input, words, &name).assert().success();
            pixels(&place.at(&name))
        })
        .collect();
    place.cached(&place.input, words[0], "x.png").assert().success();
    // Room for two and a half, so that they keep making room for each other.
    let size = fs::metadata(&place.entries()[0]).expect("written").len() * 5 / 2;
    for round in 0..3 {
        let start = |i: usize| {
            std::process::Command::new(assert_cmd::cargo::cargo_bin("hywu"))
                .arg("edit")
                .arg(&place.input)
                .args([words[i % words.len()], "--steps", "2", "--quiet", "--device", "cpu", "--cache-size"])
                .arg(size.to_string())
                .arg("--cache")
                .arg(place.at("cache"))
                .arg("-o")
                .arg(place.at(&format!("at-once-{i}.png")))
                .stderr(std::process::Stdio::piped())
                .spawn()
                .expect("the binary starts")
        };
        let running: Vec<_> = (round..round + 6).map(|i| (i, start(i))).collect();
        for (i, child) in running {
            let done = child.wait_with_output().expect("it ends");
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            assert_eq!(pixels(&place.at(&format!("at-once-{i}.png"))), fresh[i % words.len()], "{i}");
        }
    }
    let left: u64 = place.entries().iter().map(|file| fs::metadata(file).expect("there").len()).sum();
    assert!(left <= size, "{left} bytes of {size}");
    assert!(place.entries().iter().all(|file| file.extension().is_some_and(|e| e == "safetensors")));
    // What is left is whole.
    let mut found = 0;
    for words in words {
        found += usize::from(quietly(&mut place.cached(&place.input, words, "x.png")) == "cached");
    }
    assert!((1..=2).contains(&found), "{found}");
}

#[test]
fn damaged_entries_are_told_and_generated_again() {
    let place = Place::new();
    assert_eq!(quietly(&mut place.cached(&place.input, "make it colder", "x.png")), "generated");
    let other = place.entries().remove(0);
    assert_eq!(quietly(&mut place.cached(&place.input, "make it warmer", "a.png")), "generated");
    let entry = place.entries().into_iter().find(|file| *file != other).expect("a second one");
    let whole = fs::read(&entry).expect("written");
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().expect("eight bytes")) as usize;
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        bytes
    };
    let replaced = |from: &str, to: &str| {
        let text = String::from_utf8_lossy(&whole[8..header]).replacen(from, to, 1);
        assert_ne!(text.as_bytes(), &whole[8..header], "{from}");
        [&whole[..8], text.as_bytes(), &whole[header..]].concat()
    };
    let damages = [
        ("empty", Vec::new()),
        ("cut", whole[..whole.len() - 4].to_vec()),
        ("cut header", whole[..header / 2].to_vec()),
        ("first value", flipped(header)),
        ("a value", flipped(header + 40_001)),
        ("last value", flipped(whole.len() - 1)),
        ("metadata", replaced("make it warmer", "make it colder")),
        ("a name", replaced("layers.0", "layers.9")),
        ("no checksum", replaced("cache_checksum", "cache_chokesum")),
        ("not a file of ours", b"I am not an adapter".to_vec()),
        ("another entry", fs::read(&other).expect("written")),
        ("not finite", [&whole[..header], &[0xff; 64], &whole[header + 64..]].concat()),
    ];
    let editor = Editor::new(Model::bundled().expect("in the binary"));
    let editor = editor.with_cache(AdapterCache::new(place.at("cache"), AdapterCache::LIMIT));
    let picture = load_picture(&place.input).expect("a picture");
    let recall = || editor.recall(&picture, "make it warmer", 0).expect("it goes on").expect("a generator");
    let before = recall();
    assert_eq!((before.origin, before.warnings.len()), (Origin::Cached, 0));
    for (what, bytes) in damages {
        fs::write(&entry, bytes).expect("writable");
        let again = recall();
        assert_eq!((again.origin, &again.adapter), (Origin::Generated, &before.adapter), "{what}");
        let [warning] = &again.warnings[..] else { panic!("{what}: {:?}", again.warnings) };
        assert!(warning.contains("generated again"), "{what}: {warning}");
        assert!(warning.contains(entry.to_str().expect("UTF-8")), "{what}: {warning}");
        assert_eq!(fs::read(&entry).expect("written"), whole, "{what}: it was not repaired");
    }
    fs::write(&entry, &whole[..whole.len() / 2]).expect("writable");
    let (how, stderr) = origin(&mut place.cached(&place.input, "make it warmer", "b.png"));
    assert!(stderr.starts_with("warning: ") && stderr.contains("generated again"), "{stderr}");
    assert_eq!((how.as_str(), stderr.lines().count()), ("generated", 1), "{stderr}");
    assert_eq!(fs::read(place.at("b.png")).expect("written"), fs::read(place.at("a.png")).expect("written"));
    assert_eq!(quietly(&mut place.cached(&place.input, "make it warmer", "c.png")), "cached");
    // A folder where the entry should be can't be replaced, which costs a second warning.
    fs::remove_file(&entry).expect("written");
    fs::create_dir(&entry).expect("writable");
    let (how, stderr) = origin(&mut place.cached(&place.input, "make it warmer", "d.png"));
    assert_eq!((how.as_str(), stderr.lines().count()), ("generated", 2), "{stderr}");
    // --quiet means quiet.
    let mut command = place.cached(&place.input, "make it warmer", "d.png");
    command.arg("--quiet").assert().success().stderr("");
}

#[test]
fn a_cache_that_can_not_be_written_costs_no_edit() {
    let place = Place::new();
    let other = photo(place.dir.path(), "other.png", 64, 72);
    let blocked = |cache: &Path, message: &str| {
        let mut command = hywu();
        command.arg("edit").args([&place.input, &other]).args(["make it warmer", "--steps", "1"]);
        command.arg("--output-dir").arg(place.at("out")).arg("--cache").arg(cache);
        let done = command.assert().success().stderr(contains(message)).stderr(contains("panicked").not());
        let stderr = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
        // Told once, though it is so for both pictures.
        assert_eq!(stderr.lines().filter(|line| line.starts_with("warning: ")).count(), 1, "{stderr}");
        assert!(place.at("out/in.png").is_file() && place.at("out/other.png").is_file());
        fs::remove_dir_all(place.at("out")).expect("written");
    };
    blocked(&place.input, "in.png: it can't be kept");
    blocked(&place.input.join("below"), "below: it can't be kept");
    #[cfg(target_os = "linux")]
    blocked(Path::new("/proc/hywu"), "/proc/hywu: it can't be kept");

    // A folder that became read-only still serves what it has.
    assert_eq!(quietly(&mut place.cached(&place.input, "make it warmer", "a.png")), "generated");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let cache = place.at("cache");
        let mode = |mode| fs::set_permissions(&cache, fs::Permissions::from_mode(mode)).expect("it is ours");
        mode(0o555);
        assert_eq!(quietly(&mut place.cached(&place.input, "make it warmer", "b.png")), "cached");
        // Root may write all the same.
        let writable = fs::write(cache.join("probe"), "").is_ok();
        let (how, stderr) = origin(&mut place.cached(&other, "make it warmer", "c.png"));
        assert_eq!(how, "generated");
        assert_eq!(stderr.contains("cache: it can't be kept"), !writable, "{stderr}");
        mode(0o755);
    }

    // Wrong usage, and a limit that nothing fits under.
    for (args, message) in [(["--cache-size", "lots"], "512MiB"), (["--cache-size", "1 cup"], "--cache-size")]
    {
        place
            .cached(&place.input, "make it warmer", "d.png")
            .args(args)
            .assert()
            .code(2)
            .stderr(contains(message));
    }
    let alone = ["--cache-size", "1MB"];
    place
        .edit(&place.input, "make it warmer", "d.png")
        .args(alone)
        .assert()
        .code(2)
        .stderr(contains("--cache"));
    let (_, stderr) = origin(place.cached(&other, "make it sepia", "d.png").args(["--cache-size", "1KB"]));
    assert!(stderr.contains("larger than the limit of 1.0 kB"), "{stderr}");
}
