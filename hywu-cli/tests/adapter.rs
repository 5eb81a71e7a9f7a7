//! `hywu adapter` from the outside.

use assert_cmd::Command;
use hywu_core::{Adapter, Checkpoint, Dtype, Lora, Philox, TensorWriter};
use ndarray::ArrayD;
use predicates::{prelude::*, str::contains};
use std::{
    fs,
    path::{Path, PathBuf},
};

const BASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/bundled/backbone.safetensors");

fn hywu<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> assert_cmd::assert::Assert {
    let mut command = Command::cargo_bin("hywu").expect("the binary is built by cargo");
    command.arg("adapter").args(args).assert()
}

/// For the bundled backbone, whose modules its own file tells.
fn adapter(path: &Path, seed: u64) -> Adapter {
    let base = Checkpoint::open(BASE).expect("readable");
    let targets = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_and_up_proj", "mlp.down_proj"];
    let mut adapter = Adapter {
        modules: Default::default(),
        scale: 2.0,
        metadata: [("instruction", "make it warmer"), ("seed", "7")]
            .map(|(k, v)| (k.into(), v.into()))
            .into(),
    };
    for name in base.names().iter().filter_map(|n| n.strip_suffix(".weight")) {
        if !name.starts_with("model.layers.") || !targets.iter().any(|t| name.ends_with(t)) {
            continue;
        }
        let (shape, _) = base.info(&format!("{name}.weight")).expect("it is there");
        let random = |shape: [usize; 3], stream: u64| {
            let mut values = vec![0.0; shape.iter().product()];
            Philox::new(seed).fill_normal(stream, 0, &mut values);
            ArrayD::from_shape_vec(shape.to_vec(), values).expect("as many").mapv(|x| x / 16.0)
        };
        let n = adapter.modules.len() as u64;
        let lora =
            Lora { lora_a: random([1, 4, shape[1]], 2 * n), lora_b: random([1, shape[0], 4], 2 * n + 1) };
        adapter.modules.insert(name.to_owned(), lora);
    }
    assert!(adapter.modules.len() >= 8);
    adapter.save(path).expect("writable");
    adapter
}

fn json(assert: &assert_cmd::assert::Assert) -> serde_json::Value {
    serde_json::from_slice(&assert.get_output().stdout).expect("JSON")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a temporary folder") }
    }
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

#[test]
fn inspect_tells_modules_layers_and_provenance() {
    let files = Files::new();
    let file = files.path("a.safetensors");
    let made = adapter(&file, 1);
    hywu(["inspect", text(&file)])
        .success()
        .stdout(contains("instruction: make it warmer").and(contains("model.layers.0.self_attn.qkv_proj")));
    let told = json(&hywu(["inspect", "--json", text(&file)]).success());
    assert_eq!((told["scale"].as_f64(), &told["metadata"]["seed"]), (Some(2.0), &"7".into()));
    let modules = told["instances"][0]["modules"].as_array().expect("a list");
    assert_eq!(modules.len(), made.modules.len());
    assert!(modules.iter().all(|m| m["rank"] == 4 && m["norm"].as_f64().is_some_and(|n| n > 0.0)));
    // What the system said, once.
    hywu(["inspect", "/no/such/file"])
        .code(1)
        .stderr("error: /no/such/file: No such file or directory (os error 2)\n");
    // What a file says does not reach the terminal as orders to it.
    let mut rude = made;
    rude.metadata.insert("k\u{1b}[2J".into(), "v\u{9b}31m\nforged: line".into());
    rude.save(&file).expect("writable");
    hywu(["inspect", text(&file)])
        .success()
        .stdout(contains('\u{1b}').or(contains('\u{9b}')).not())
        .stdout(contains(r"  k\u{1b}[2J: v\u{9b}31m\nforged: line"));
}

#[test]
fn scaling_is_told() {
    let files = Files::new();
    let (a, b) = (files.path("a"), files.path("b"));
    let made = adapter(&a, 1);
    let scaled = |from: &Path, by: &str| {
        hywu(["scale", text(from), "--by", by, "-o", text(&b)]).success();
        Adapter::load(&b).expect("written")
    };
    let once = scaled(&a, "-0.5");
    assert_eq!((once.scale, once.metadata["scaled_by"].as_str()), (-1.0, "-0.5"));
    assert_eq!(once.metadata["instruction"], made.metadata["instruction"]);
    assert_eq!(scaled(&b, "2").metadata["scaled_by"], "-0.5 * 2");
}

/// A file of diffusers with some tensors left out.
fn without(from: &Path, to: &Path, part: &str) {
    let file = Checkpoint::open(from).expect("readable");
    let mut writer = TensorWriter::new();
    for name in file.names().into_iter().filter(|name| !name.contains(part)) {
        let array = file.read(name).expect("it is there");
        writer.add(name, array.shape(), array.as_slice().expect("as it was read"), Dtype::F32);
    }
    for (key, value) in file.metadata() {
        writer.meta(key, value);
    }
    writer.write(to).expect("writable");
}

#[test]
fn an_import_is_compared_with_its_checkpoint() {
    let files = Files::new();
    let path = |name: &str| files.path(&format!("{name}.safetensors"));
    let (file, there, part, back) = (path("a"), path("there"), path("part"), path("back"));
    let made = adapter(&file, 6);
    let split = ["--layout", "split", "--qkv-rows", "192,192,192"];
    let call = |first: &[&str], rest: &[&str]| hywu(first.iter().chain(&split).chain(rest));
    call(&["export", text(&file), "--format", "diffusers", "-o", text(&there)], &[]).success();
    let import = |from: &Path, more: &[&str]| call(&["import", text(from), "-o", text(&back)], more);
    import(&there, &["--base", BASE]).success().stderr(contains("zeros").not());
    assert_eq!(Adapter::load(&back).expect("written").modules, made.modules);
    // Trained on q and v alone: the same operator, and it is said.
    without(&there, &part, ".k_proj.");
    import(&part, &["--base", BASE])
        .success()
        .stderr(contains("zeros for parts that it does not adapt: `model.layers.0.self_attn.k_proj`"));
    let read = Adapter::load(&back).expect("written");
    let name = "model.layers.0.self_attn.qkv_proj";
    let update = |adapter: &Adapter| {
        let pair = adapter.modules[name].matrices(0)[0];
        pair.b.dot(&pair.a)
    };
    let (all, some) = (update(&made), update(&read));
    for (row, (x, y)) in all.rows().into_iter().zip(some.rows()).enumerate() {
        let k = (192..384).contains(&row);
        let same = x.iter().zip(&y).all(|(x, y)| (if k { 0.0 } else { *x } - y).abs() <= 1e-6);
        assert!(same, "row {row}");
    }
    // A layer less is another thing.
    without(&there, &part, "layers.1.");
    let refused = import(&part, &["--base", BASE]).code(1);
    refused.stderr(contains("missing modules: `model.layers.1.").and(contains("unused").not()));
    import(&part, &[]).success();
    let warned = import(&part, &["--base", BASE, "--allow-partial"]).success();
    warned.stderr(contains("warning: ").and(contains("missing modules")));
    import(&part, &["--allow-partial"]).code(2).stderr(contains("--base"));
    import(&there, &["--component", "tranformer"]).code(1).stderr(contains("only for `transformer`"));
}

#[test]
fn diff_scale_and_average_agree() {
    let files = Files::new();
    let (a, b, half, mean) = (files.path("a"), files.path("b"), files.path("half"), files.path("mean"));
    adapter(&a, 1);
    adapter(&b, 2);
    hywu(["scale", text(&a), "--by", "-0.5", "-o", text(&half)]).success();
    let told = json(&hywu(["diff", "--json", text(&a), text(&half)]).success());
    let number = |told: &serde_json::Value, key: &str| told[key].as_f64().expect("a number");
    assert!((number(&told, "cosine") + 1.0).abs() < 1e-9, "{told}");
    assert!((number(&told, "distance") / number(&told, "norm_a") - 1.5).abs() < 1e-9);
    hywu(["average", text(&a), text(&b), "-o", text(&mean)]).success();
    let (to_a, to_b) = (
        json(&hywu(["diff", "--json", text(&a), text(&mean)]).success()),
        json(&hywu(["diff", "--json", text(&b), text(&mean)]).success()),
    );
    assert!((number(&to_a, "distance") - number(&to_b, "distance")).abs() < 1e-6 * number(&to_a, "norm_a"));
    hywu(["average", text(&a), text(&b), "--rank", "4", "--weights", "1,3", "-o", text(&mean)])
        .success()
        .stderr(contains("left out"));
    assert!(Adapter::load(&mean).expect("readable").modules.values().all(|l| l.lora_a.shape()[1] == 4));
    hywu(["average", text(&a), text(&b), "--weights", "1", "-o", text(&mean)])
        .code(1)
        .stderr(contains("2 adapters"));
    hywu(["scale", text(&a), "--by", "inf", "-o", text(&half)]).code(2);
    hywu(["diff", text(&a), text(&a)]).success().stdout(contains("1.000000"));
}

#[test]
fn every_format_comes_back() {
    let files = Files::new();
    let file = files.path("a.safetensors");
    let made = adapter(&file, 3);
    for format in ["peft", "kohya", "diffusers"] {
        for layout in [&["--layout", "fused"][..], &["--layout", "split", "--qkv-rows", "192,192,192"]] {
            let (there, back) =
                (files.path(&format!("{format}{}", layout.len())), files.path("back.safetensors"));
            let call = ["export", text(&file), "--format", format, "--output", text(&there)];
            hywu(call.iter().chain(layout)).success();
            // kohya's names are resolved against the bundled backbone.
            let call = ["import", text(&there), "--output", text(&back)];
            hywu(call.iter().chain(layout)).success();
            let mut read = Adapter::load(&back).expect("readable");
            assert!(read.metadata.remove("program").is_some_and(|p| p.starts_with("hywu ")));
            assert_eq!(read, made, "{format} {layout:?}");
        }
    }
    let there = files.path("there");
    hywu(["export", text(&file), "--format", "peft", "--layout", "split", "-o", text(&there)])
        .code(1)
        .stderr(contains("qkv").and(contains("panicked").not()));
    hywu(["export", text(&file), "--format", "peft", "--qkv-rows", "1,2", "-o", text(&there)]).code(2);
    assert!(!there.exists());
}

#[test]
fn a_module_map_is_toml() {
    let files = Files::new();
    let (file, map, there) =
        (files.path("a.safetensors"), files.path("map.toml"), files.path("there.safetensors"));
    let made = adapter(&file, 4);
    let rules = r#"
        [[module]]
        ours = "model.layers.{layer}.self_attn.qkv_proj"
        theirs = ["blocks.{layer}.to_q", "blocks.{layer}.to_k", "blocks.{layer}.to_v"]

        [[module]]
        ours = "model.layers.{layer}.mlp.down_proj"
        theirs = "blocks.{layer}.ff.2"
    "#;
    fs::write(&map, rules).expect("writable");
    let named = ["--module-map", text(&map)];
    let call = ["export", text(&file), "--format", "kohya", "--output", text(&there)];
    hywu(call.iter().chain(&named)).success();
    let names = Checkpoint::open(&there).expect("readable");
    assert!(names.contains("lora_unet_blocks_0_to_v.lora_up.weight"));
    let back = files.path("back.safetensors");
    let call = ["import", text(&there), "--output", text(&back)];
    hywu(call.iter().chain(&named)).success();
    assert_eq!(Adapter::load(&back).expect("readable").modules, made.modules);
    fs::write(&map, "[[module]]\nours = \"a.{layer}\"\ntheirs = \"b\"\n").expect("writable");
    hywu(call.iter().chain(&named)).code(1).stderr(contains("a.{layer}"));
    fs::write(&map, "[[modules]]\n").expect("writable");
    hywu(call.iter().chain(&named)).code(1).stderr(contains("map.toml"));
}

#[test]
fn merge_writes_a_new_folder_and_names_what_is_missing() {
    let files = Files::new();
    let (file, out) = (files.path("a.safetensors"), files.path("merged"));
    let mut made = adapter(&file, 5);
    let call = ["merge", text(&file), "--base", BASE, "--output", text(&out)];
    hywu(call).success().stderr(contains(format!("{} tensors merged", made.modules.len())));
    let (old, new) = (
        Checkpoint::open(BASE).expect("readable"),
        Checkpoint::open(out.join("backbone.safetensors")).expect("readable"),
    );
    assert_eq!((old.names(), old.metadata()), (new.names(), new.metadata()));
    let name = "model.layers.1.mlp.down_proj";
    let pair = made.modules[name].matrices(0)[0];
    let expected =
        old.read(&format!("{name}.weight")).expect("it is there") + (pair.b.dot(&pair.a) * 2.0).into_dyn();
    let merged = new.read(&format!("{name}.weight")).expect("it is there");
    // The bundled weights are bf16: half a unit of values below 4, and what sums in another order differ by.
    let worst = (&merged - &expected).iter().fold(0.0, |m: f32, x| m.max(x.abs()));
    assert!(worst <= 2.0_f32.powi(-7) + 1e-5, "{worst}");
    hywu(call).code(1).stderr(contains("there already"));
    let lora = made.modules[name].clone();
    made.modules.insert("model.layers.99.mlp.down_proj".into(), lora);
    made.save(&file).expect("writable");
    let other = files.path("other");
    hywu(["merge", text(&file), "--base", BASE, "--output", text(&other)])
        .code(1)
        .stderr(contains("unused entries: `model.layers.99.mlp.down_proj`"));
    made.modules.swap_remove(name);
    made.save(&file).expect("writable");
    let call = ["merge", text(&file), "--base", BASE, "--output", text(&other)];
    hywu(call).code(1).stderr(contains("missing modules: `model.layers.1.mlp.down_proj`"));
    assert!(!other.exists());
    let whole = made.modules.len() - 1;
    hywu(call.iter().chain(&["--allow-partial"]))
        .success()
        .stderr(contains("warning: ").and(contains(format!("{whole} tensors merged"))));
    fs::remove_dir_all(&other).expect("written");
    hywu(call.iter().chain(&["--allow-partial", "--quiet"])).success().stderr("");
}
