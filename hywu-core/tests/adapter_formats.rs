//! Adapters in the files of other programs.

mod common;

use common::{adapter, folder, fused, lora};
use hywu_core::{
    Adapter, Checkpoint, Dtype, TensorWriter,
    adapter::{ExportOptions, Format, ImportOptions, MapEntry, ModuleMap, Names, OneOrMore, export, import},
};
use ndarray::s;
use proptest::prelude::*;
use std::{fs, path::Path};

fn to(format: Format, names: &Names) -> ExportOptions<'_> {
    ExportOptions { format, names, instance: 0, component: None, fold_scale: false, dtype: Dtype::F32 }
}

fn from(names: &Names) -> ImportOptions<'_> {
    ImportOptions { names, component: None, known: &[], base: None, partial: false }
}

/// Every format, every layout: back to the bit.
fn round_trip(made: &Adapter, names: &Names, known: &[String]) {
    let dir = folder();
    for format in [Format::Peft, Format::Kohya, Format::Diffusers] {
        let path = dir.path().join(format!("{format:?}"));
        export(made, &path, &to(format, names)).expect("it can be told");
        let back = import(&path, None, &ImportOptions { known, ..from(names) }).expect("it comes back");
        assert!(back.absent.is_empty(), "{format:?}: {:?}", back.absent);
        let back = back.adapter;
        assert_eq!(back.modules, made.modules, "{format:?}");
        assert_eq!(back.metadata, made.metadata, "{format:?}");
        let unit = if format == Format::Kohya { f32::EPSILON * made.scale } else { 0.0 };
        assert!((back.scale - made.scale).abs() <= unit, "{format:?}: {} and {}", back.scale, made.scale);
    }
}

/// The modules of a layer of the published backbone, in small.
fn published(ranks: [usize; 4], experts: usize, scale: f32, seed: u64) -> Adapter {
    let mut made = adapter(scale, []);
    for layer in 0..2 {
        for (i, (path, lead, [inner, outer])) in [
            ("self_attn.qkv_proj", vec![1], [6, 16]),
            ("self_attn.o_proj", vec![1], [8, 6]),
            ("mlp.shared_mlp.gate_and_up_proj", vec![1], [6, 10]),
            ("mlp.experts.w1", vec![1, experts], [6, 5]),
            ("mlp.experts.w2", vec![1, experts], [5, 6]),
            ("mlp.experts.w3", vec![1, experts], [6, 5]),
        ]
        .into_iter()
        .enumerate()
        {
            let rank = ranks[i % ranks.len()];
            let name = format!("model.layers.{layer}.{path}");
            made.modules.insert(name, lora(&lead, [rank, inner, outer], seed ^ (layer * 8 + i) as u64));
        }
    }
    made
}

/// What a checkpoint of it is called, in both layouts.
fn modules_there() -> Vec<String> {
    let experts = |e: usize| {
        ["gate_and_up_proj", "up_proj", "gate_proj", "down_proj"].map(|p| format!("mlp.experts.{e}.{p}"))
    };
    let shared = ["gate_and_up_proj", "up_proj", "gate_proj"].map(|p| format!("mlp.shared_mlp.{p}"));
    let attention = ["qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj"].map(|p| format!("self_attn.{p}"));
    let layer: Vec<String> = attention.into_iter().chain(shared).chain((0..4).flat_map(experts)).collect();
    (0..2).flat_map(|n| layer.iter().map(move |path| format!("model.layers.{n}.{path}"))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn published_modules_come_back_from_every_format(
        ranks in [1_usize..5, 1_usize..5, 1_usize..5, 1_usize..5],
        experts in 1_usize..5,
        scale in 0.01_f32..20.0,
        seed in any::<u64>(),
    ) {
        let made = published(ranks, experts, scale, seed);
        let split = Names::split(&ModuleMap::default(), Some([4, 2, 2])).expect("rules that work");
        for names in [&fused(), &split] {
            round_trip(&made, names, &modules_there());
        }
    }
}

#[test]
fn fused_experts_are_up_and_gate() {
    let dir = folder();
    let made = published([2; 4], 3, 4.0, 7);
    let path = dir.path().join("there");
    assert_eq!(export(&made, &path, &to(Format::Peft, &fused())).expect("it can be told"), 2 * (3 + 3 * 2));
    let file = Checkpoint::open(path.join("adapter_model.safetensors")).expect("readable");
    let name = "base_model.model.model.layers.1.mlp.experts.2.gate_and_up_proj";
    let a = file.read(&format!("{name}.lora_A.weight")).expect("it is there");
    let b = file.read(&format!("{name}.lora_B.weight")).expect("it is there");
    assert_eq!((a.shape(), b.shape()), (&[4, 6][..], &[10, 4][..]));
    let (w3, w1) =
        (&made.modules["model.layers.1.mlp.experts.w3"], &made.modules["model.layers.1.mlp.experts.w1"]);
    assert_eq!(a.slice(s![..2, ..]), w3.lora_a.slice(s![0, 2, .., ..]));
    assert_eq!(b.slice(s![5.., 2..]), w1.lora_b.slice(s![0, 2, .., ..]));
    assert!(b.slice(s![..5, 2..]).iter().chain(b.slice(s![5.., ..2])).all(|&x| x == 0.0));
    // alpha of rank 2 and of rank 4, both 4 times that.
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(path.join("adapter_config.json")).expect("readable")).expect("JSON");
    assert_eq!((&config["r"], &config["lora_alpha"]), (&2.into(), &8.into()));
    assert_eq!(config["alpha_pattern"]["^model\\.layers\\.1\\.mlp\\.experts\\.2\\.gate_and_up_proj"], 16);
}

fn map(text: &str) -> ModuleMap {
    // Through JSON, which the crate has: the field names are the same in TOML.
    serde_json::from_str(text).expect("a map")
}

#[test]
fn a_module_map_renames_splits_and_fuses() {
    let made = adapter(
        2.0,
        [
            ("l.0.qkv", lora(&[1], [2, 6, 16], 1)),
            ("l.1.qkv", lora(&[1], [2, 6, 16], 2)),
            ("l.0.o", lora(&[1], [3, 8, 6], 3)),
            ("l.0.up", lora(&[1], [2, 6, 4], 4)),
            ("l.0.gate", lora(&[1], [2, 6, 4], 5)),
            ("l.0.moe.w", lora(&[1, 3], [2, 6, 4], 6)),
        ],
    );
    let names = Names::fused(&map(
        r#"{"module": [
            {"ours": "l.{layer}.qkv", "theirs": ["blocks.{layer}.to_q", "blocks.{layer}.to_k", "blocks.{layer}.to_v"], "rows": [4, 2, 2]},
            {"ours": "l.{layer}.o", "theirs": "blocks.{layer}.to_out.0"},
            {"ours": ["l.{layer}.gate", "l.{layer}.up"], "theirs": "blocks.{layer}.ff_in"},
            {"ours": "l.{layer}.moe.w", "theirs": "blocks.{layer}.moe.{expert}"}]}"#,
    ))
    .expect("rules that work");
    round_trip(&made, &names, &[]);
    let dir = folder();
    let path = dir.path().join("x.safetensors");
    export(&made, &path, &to(Format::Diffusers, &names)).expect("it can be told");
    let file = Checkpoint::open(&path).expect("readable");
    let q = file.read("transformer.blocks.1.to_q.lora_B.weight").expect("it is there");
    let fused = &made.modules["l.1.qkv"].lora_b;
    // Two groups of 4 rows of q, 2 of k, 2 of v.
    assert_eq!(q.slice(s![..4, ..]), fused.slice(s![0, ..4, ..]));
    assert_eq!(q.slice(s![4.., ..]), fused.slice(s![0, 8..12, ..]));
    assert_eq!(file.info("transformer.blocks.0.ff_in.lora_A.weight").expect("it is there").0, [4, 6]);
    assert!(file.contains("transformer.blocks.0.moe.2.lora_A.weight"));
}

/// The name that a rule gives may be another rule's to read.
#[test]
fn names_that_would_not_come_back_are_refused() {
    let dir = folder();
    let of_parts =
        r#"{"module": [{"ours": "m.qkv_proj", "theirs": ["m.q", "m.r"]}, {"ours": "m.x", "theirs": "m.q"}]}"#;
    let side_by_side = r#"{"module": [{"ours": "m.{x}.{y}", "theirs": "m.{x}{y}"}]}"#;
    for (ours, called, read, text) in [
        // A fused file of experts that was imported as a split one.
        ("m.experts.0.gate_and_up_proj", "m.experts.0.up_proj", "m.experts.w3", "{}"),
        ("m.x", "m.q", "m.qkv_proj", of_parts),
        ("m.1.23", "m.123", "m.12.3", side_by_side),
    ] {
        let names = Names::split(&map(text), Some([2, 1, 1])).expect("rules that work");
        let made = adapter(1.0, [(ours, lora(&[1], [2, 4, 4], 7))]);
        let path = dir.path().join("out");
        let error =
            export(&made, &path, &to(Format::Diffusers, &names)).expect_err("it would be another module");
        assert!(!path.exists());
        for part in [ours, called, read] {
            assert!(error.to_string().contains(part), "{part}: {error}");
        }
    }
}

#[test]
fn rules_that_can_not_work_are_refused() {
    let entry = |ours: OneOrMore, theirs: OneOrMore, rows: Option<Vec<usize>>| {
        Names::fused(&ModuleMap { modules: vec![MapEntry { ours, theirs, rows }] })
    };
    let one = |n: &str| OneOrMore::One(n.into());
    let more = |n: [&str; 2]| OneOrMore::More(n.map(str::to_owned).to_vec());
    for (ours, theirs, rows, message) in [
        (one("a.{n}"), one("b"), None, "both sides"),
        (one("a.{n}"), one("b.{m}"), None, "both sides"),
        (one("a.{expert}"), one("b.{expert}"), None, "no {expert}"),
        (one("a.{n"), one("b"), None, "not closed"),
        (one("a.{1}"), one("b.{1}"), None, "a word"),
        (one("a.{n}.{n}"), one("b.{n}"), None, "twice"),
        (more(["a", "b"]), more(["c", "d"]), None, "a single module"),
        (one("a"), OneOrMore::More(Vec::new()), None, "a single module"),
        (one("a"), more(["c", "d"]), Some(vec![1]), "rows [1]"),
        (one("a"), more(["c", "d"]), Some(vec![1, 0]), "rows [1, 0]"),
        (one("a"), more(["c", "d"]), Some(vec![1, usize::MAX]), "rows [1, "),
        (one("a"), one("c"), Some(vec![1]), "rows [1]"),
    ] {
        let e = entry(ours, theirs, rows).expect_err(message).to_string();
        assert!(e.contains(message), "{e}");
    }
    // Rules that work, for modules that they don't fit.
    let refused = |made: &Adapter, names: &Names, message: &str| {
        let dir = folder();
        let path = dir.path().join("x");
        let e = export(made, &path, &to(Format::Kohya, names)).expect_err(message).to_string();
        assert!(e.contains(message) && !path.exists(), "{e}");
    };
    let fused = fused();
    let split = Names::split(&ModuleMap::default(), None).expect("rules that work");
    refused(&published([1; 4], 2, 1.0, 1), &split, "512, 128, 128");
    refused(&adapter(1.0, [("x.moe", lora(&[1, 2], [1, 2, 3], 1))]), &fused, "module map");
    refused(&adapter(1.0, [("m.experts.w3", lora(&[1, 2], [1, 2, 3], 1))]), &fused, "no `m.experts.w1`");
    refused(&adapter(1.0, [("m.gate_and_up_proj", lora(&[1], [1, 2, 3], 1))]), &split, "2 equal parts");
    let twins = adapter(1.0, [("a.b_c", lora(&[1], [1, 2, 3], 1)), ("a_b.c", lora(&[1], [1, 2, 3], 2))]);
    refused(&twins, &fused, "`a.b_c` and `a_b.c`");
    assert!(
        export(&twins, folder().path().join("x"), &ExportOptions { instance: 1, ..to(Format::Peft, &fused) })
            .is_err()
    );
}

/// A PEFT folder with this config and these tensors, [out, in] = [3, 2].
fn peft(dir: &Path, config: serde_json::Value, modules: &[(&str, usize)]) {
    fs::create_dir_all(dir).expect("writable");
    fs::write(dir.join("adapter_config.json"), config.to_string()).expect("writable");
    let mut writer = TensorWriter::new();
    for (name, rank) in modules {
        writer.add(
            format!("base_model.model.{name}.lora_A.weight"),
            &[*rank, 2],
            &vec![1.0; rank * 2],
            Dtype::F32,
        );
        writer.add(
            format!("base_model.model.{name}.lora_B.weight"),
            &[3, *rank],
            &vec![1.0; rank * 3],
            Dtype::F32,
        );
    }
    writer.write(dir.join("adapter_model.safetensors")).expect("writable");
}

#[test]
fn scales_of_a_peft_config() {
    let dir = folder();
    let folder = dir.path().join("there");
    let config = serde_json::json!({
        "peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none",
        "rank_pattern": {"q": 4, "^l\\.1\\.k": 1}, "alpha_pattern": {"l.1.q": 8, "(k|\\w+k)": 5},
    });
    peft(
        &folder,
        config,
        &[("l.0.q", 4), ("l.1.q", 4), ("l.0.k", 2), ("l.1.k", 1), ("l.0.v", 2), ("l.1.xq", 2), ("l.2.v", 2)],
    );
    let read = import(&folder, None, &from(&fused())).expect("readable").adapter;
    // Most frequent: 3 / 2, of v and of xq, which ends in q but not behind a dot.
    assert_eq!(read.scale, 1.5);
    for (name, scale) in
        [("l.0.q", 0.75), ("l.1.q", 2.0), ("l.0.k", 2.5), ("l.1.k", 5.0), ("l.0.v", 1.5), ("l.1.xq", 1.5)]
    {
        let b = read.modules[name].lora_b[[0, 0, 0]];
        assert!((f64::from(b) * 1.5 - scale).abs() < 1e-6, "{name}: {b}");
    }
    let rs = serde_json::json!({"peft_type": "LORA", "r": 4, "lora_alpha": 3, "use_rslora": true});
    let folder = dir.path().join("rs");
    peft(&folder, rs, &[("l.0.q", 4)]);
    assert_eq!(import(&folder, None, &from(&fused())).expect("readable").adapter.scale, 1.5);
    // A config that says another rank is not believed.
    peft(&folder, serde_json::json!({"r": 2, "lora_alpha": 3}), &[("l.0.q", 4)]);
    let e = import(&folder, None, &from(&fused())).expect_err("another rank").to_string();
    assert!(e.contains("has rank 4, the config says 2"), "{e}");
}

#[test]
fn options_that_are_more_than_a_pair_are_named() {
    let dir = folder();
    let folder = dir.path().join("there");
    for (field, value) in [
        ("use_dora", true.into()),
        ("bias", "all".into()),
        ("bias", "lora_only".into()),
        ("lora_bias", true.into()),
        ("modules_to_save", serde_json::json!(["head"])),
        ("layer_replication", serde_json::json!([[0, 1]])),
        ("fan_in_fan_out", true.into()),
        ("target_parameters", serde_json::json!(["experts.w"])),
        ("init_lora_weights", "pissa_niter_4".into()),
        ("peft_type", "LOHA".into()),
        ("rank_pattern", serde_json::json!({"q": "four"})),
        ("alpha_pattern", serde_json::json!({"(?=q)": 4})),
        ("alpha_pattern", serde_json::json!({"(a{999}){99}": 4})),
        (
            "rank_pattern",
            (0..10_000).map(|i| (format!("l.{i}.q"), 4.into())).collect::<serde_json::Map<_, _>>().into(),
        ),
    ] {
        let mut config = serde_json::json!({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "modules_to_save": [], "use_dora": false});
        config[field] = value;
        peft(&folder, config, &[("l.0.q", 4)]);
        let e = import(&folder, None, &from(&fused())).expect_err(field).to_string();
        assert!(e.contains(field) && e.contains("adapter_config.json"), "{e}");
    }
    fs::write(folder.join("adapter_config.json"), "[]").expect("writable");
    assert!(import(&folder, None, &from(&fused())).is_err());
    fs::remove_file(folder.join("adapter_config.json")).expect("there");
    assert!(
        import(&folder, None, &from(&fused()))
            .expect_err("no config")
            .to_string()
            .contains("adapter_config.json")
    );
    let alone = folder.join("adapter_model.safetensors");
    assert!(
        import(&alone, None, &from(&fused())).expect_err("alone").to_string().contains("give its folder")
    );
}

fn tensors(path: &Path, all: &[(&str, &[usize])]) {
    let mut writer = TensorWriter::new();
    for (name, shape) in all {
        writer.add(*name, shape, &vec![1.5; shape.iter().product()], Dtype::F16);
    }
    writer.write(path).expect("writable");
}

#[test]
fn tensors_that_are_more_than_a_pair_are_named() {
    let dir = folder();
    let file = dir.path().join("x.safetensors");
    let (a, b) = (("q.lora_A.weight", &[2, 4][..]), ("q.lora_B.weight", &[3, 2][..]));
    for (more, message) in [
        (("q.lora_magnitude_vector.weight", &[3][..]), "DoRA"),
        (("q.dora_scale", &[3]), "DoRA"),
        (("k.hada_w1_a", &[3, 3]), "LoHa"),
        (("k.lokr_w1", &[3, 3]), "LoKr"),
        (("q.lora_B.bias", &[3]), "bias"),
        (("k.diff", &[3, 4]), "difference"),
        (("k.weight", &[3, 4]), "`k.weight`"),
        (("k.lora_A.weight", &[2, 4]), "`k` has not both"),
        (("q.lora.down.weight", &[2, 4]), "twice"),
        (("q.alpha", &[2]), "one finite value"),
    ] {
        tensors(&file, &[a, b, more]);
        let e = import(&file, None, &from(&fused())).expect_err(message).to_string();
        assert!(e.contains(message) && e.contains("x.safetensors"), "{e}");
    }
    tensors(&file, &[a, ("q.lora_B.weight", &[3, 4])]);
    assert!(
        import(&file, None, &from(&fused())).expect_err("ranks").to_string().contains("[2, 4] and [3, 4]")
    );
    tensors(&file, &[("q.lora_A.weight", &[2, 4, 1, 1]), b]);
    assert!(import(&file, None, &from(&fused())).expect_err("4-D").to_string().contains("convolutions"));
    fs::write(&file, b"PK\x03\x04 no safetensors").expect("writable");
    assert!(import(&file, None, &from(&fused())).is_err());
}

#[test]
fn other_spellings_and_components() {
    let dir = folder();
    let file = dir.path().join("x.safetensors");
    // The old and ComfyUI's names; alpha 1.5 of rank 2.
    tensors(
        &file,
        &[("unet.q.lora.down.weight", &[2, 4]), ("unet.q.lora.up.weight", &[3, 2]), ("unet.q.alpha", &[])],
    );
    let read = import(&file, None, &from(&fused())).expect("readable").adapter;
    assert_eq!((read.scale, read.modules["q"].lora_b.shape()), (0.75, &[1, 3, 2][..]));
    tensors(
        &file,
        &[
            ("transformer.q.lora_A.default.weight", &[2, 4]),
            ("transformer.q.lora_B.default.weight", &[3, 2]),
            ("text_encoder.k.lora_A.weight", &[2, 4]),
            ("text_encoder.k.lora_B.weight", &[3, 2]),
        ],
    );
    let e = import(&file, None, &from(&fused())).expect_err("two components").to_string();
    assert!(e.contains("`text_encoder`, `transformer`"), "{e}");
    let names = fused();
    let one = ImportOptions { component: Some("text_encoder"), ..from(&names) };
    assert_eq!(
        import(&file, None, &one).expect("readable").adapter.modules.keys().collect::<Vec<_>>(),
        ["k"]
    );
    let none = ImportOptions { component: Some("tranformer"), ..from(&names) };
    let e = import(&file, None, &none).expect_err("not there").to_string();
    assert!(e.contains("no adapter for `tranformer`, only for `text_encoder`, `transformer`"), "{e}");
    // Names without a component beside others, and one that is in no list.
    tensors(
        &file,
        &[
            ("q.lora_A.weight", &[2, 4]),
            ("q.lora_B.weight", &[3, 2]),
            ("unet.k.lora_A.weight", &[2, 4]),
            ("unet.k.lora_B.weight", &[3, 2]),
            ("mine.v.lora_A.weight", &[2, 4]),
            ("mine.v.lora_B.weight", &[3, 2]),
        ],
    );
    for (component, names) in [("", &["mine.v", "q"][..]), ("unet", &["k"]), ("mine", &["v"])] {
        let one = ImportOptions { component: Some(component), known: &[], ..none.clone() };
        let read = import(&file, None, &one).expect(component).adapter;
        assert_eq!(read.modules.keys().collect::<Vec<_>>(), names, "{component}");
    }
    let e = import(&file, None, &from(&names)).expect_err("two components").to_string();
    assert!(e.contains("`no component`, `unet`"), "{e}");
}

#[test]
fn components_that_a_format_can_not_say_are_refused() {
    let dir = folder();
    let made = adapter(1.0, [("q", lora(&[1], [1, 2, 3], 1))]);
    let names = fused();
    let path = dir.path().join("x");
    for (format, component, message) in [
        (Format::Peft, "unet", "`unet`: a PEFT folder"),
        (Format::Kohya, "u net", "no component `u net`; known are unet, "),
        (Format::Kohya, "", "no component ``"),
        (Format::Diffusers, "tranformer", "known are transformer, "),
    ] {
        let options = ExportOptions { component: Some(component), ..to(format, &names) };
        let e = export(&made, &path, &options).expect_err(component).to_string();
        assert!(e.contains(message) && !path.exists(), "{e}");
    }
    export(&made, &path, &to(Format::Peft, &names)).expect("it can be told");
    let one = ImportOptions { component: Some("unet"), ..from(&names) };
    let e = import(&path, None, &one).expect_err("none").to_string();
    assert!(e.contains("`unet`: a PEFT folder"), "{e}");
    // Every component that can be written can be read.
    let file = dir.path().join("x.safetensors");
    for (format, components) in [
        (Format::Kohya, &["unet", "transformer", "te", "te1", "te2", "te3"][..]),
        (Format::Diffusers, &["transformer", "unet", "text_encoder_2", "prior", ""]),
    ] {
        for component in components {
            let options = ExportOptions { component: Some(component), ..to(format, &names) };
            export(&made, &file, &options).expect(component);
            let known = ["q".to_owned()];
            for wanted in [None, Some(*component)] {
                let one = ImportOptions { component: wanted, known: &known, ..from(&names) };
                assert_eq!(import(&file, None, &one).expect(component).adapter, made, "{component}");
            }
        }
    }
}

#[test]
fn names_that_no_adapter_may_have_are_refused_at_once() {
    let dir = folder();
    let file = dir.path().join("x.safetensors");
    let entry = |name: &str, from: usize| {
        format!(r#""l\u001b[2J.{name}":{{"dtype":"F32","shape":[1,1],"data_offsets":[{from},{}]}}"#, from + 4)
    };
    let header = format!("{{{},{}}}", entry("lora_A.weight", 0), entry("lora_B.weight", 4));
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 8]].concat();
    fs::write(&file, bytes).expect("writable");
    let e = import(&file, None, &from(&fused())).expect_err("an escape").to_string();
    assert!(e.contains(r"l\u{1b}[2J.lora_A.weight") && e.contains("control characters"), "{e}");
    // A module map can ask for such a name too.
    let made = adapter(1.0, [("q", lora(&[1], [1, 2, 3], 1))]);
    let names = Names::fused(&map(r#"{"module": [{"ours": "q", "theirs": "a\u0007b"}]}"#)).expect("a rule");
    for format in [Format::Peft, Format::Kohya, Format::Diffusers] {
        let path = dir.path().join("y");
        let e = export(&made, &path, &to(format, &names)).expect_err("a bell").to_string();
        assert!(e.contains("control characters") && !path.exists(), "{e}");
    }
    let bell = adapter(1.0, [("a\u{7}b", lora(&[1], [1, 2, 3], 1))]);
    assert!(bell.save(dir.path().join("z")).is_err() && !dir.path().join("z").exists());
}

#[test]
fn flattened_names_need_the_real_ones() {
    let dir = folder();
    let file = dir.path().join("x.safetensors");
    tensors(
        &file,
        &[("lora_unet_a_0_to_q.lora_down.weight", &[2, 4]), ("lora_unet_a_0_to_q.lora_up.weight", &[3, 2])],
    );
    let known = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
    let names = fused();
    let read = |known: &[String]| import(&file, None, &ImportOptions { known, ..from(&names) });
    let good = read(&known(&["a.0.to_q", "a.1.to_q"])).expect("it is told").adapter;
    // No alpha: it is the rank.
    assert_eq!((good.scale, good.modules.contains_key("a.0.to_q")), (1.0, true));
    let e = read(&known(&["a.0.to_q", "a.0.to.q"])).expect_err("ambiguous").to_string();
    assert!(e.contains("`a.0.to.q`, `a.0.to_q`"), "{e}");
    let e = read(&[]).expect_err("unknown").to_string();
    assert!(e.contains("`a_0_to_q`"), "{e}");
    // By the rules of a map, to our name.
    let names = Names::fused(&map(r#"{"module": [{"ours": "l.{n}.q", "theirs": "a.{n}.to_q"}]}"#))
        .expect("rules that work");
    let read = import(&file, None, &from(&names)).expect("it is told").adapter;
    assert!(read.modules.contains_key("l.0.q"), "{read:?}");
    // Text encoders are another component.
    tensors(
        &file,
        &[("lora_te_q.lora_down.weight", &[2, 4]), ("lora_te_q.lora_up.weight", &[3, 2]), ("x.alpha", &[])],
    );
    let read = import(&file, None, &ImportOptions { known: &known(&["q"]), ..from(&names) });
    assert!(read.expect_err("a stray tensor").to_string().contains("`x`"));
}

#[test]
fn alpha_may_be_a_whole_number() {
    let dir = folder();
    let file = dir.path().join("x.safetensors");
    for (dtype, alpha) in [
        ("I64", 3_i64.to_le_bytes().to_vec()),
        ("F64", 3_f64.to_le_bytes().to_vec()),
        ("I32", 3_i32.to_le_bytes().to_vec()),
    ] {
        let size = alpha.len();
        let header = format!(
            r#"{{"lora_te_q.alpha": {{"dtype": "{dtype}", "shape": [], "data_offsets": [0, {size}]}},
                "lora_te_q.lora_down.weight": {{"dtype": "F32", "shape": [2, 1], "data_offsets": [{size}, {}]}},
                "lora_te_q.lora_up.weight": {{"dtype": "F32", "shape": [1, 2], "data_offsets": [{}, {}]}}}}"#,
            size + 8,
            size + 8,
            size + 16
        );
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(alpha);
        bytes.extend([1.0_f32; 4].iter().flat_map(|x| x.to_le_bytes()));
        fs::write(&file, bytes).expect("writable");
        let names = fused();
        let read = import(&file, None, &ImportOptions { known: &["q".to_owned()], ..from(&names) });
        assert_eq!(read.expect("readable").adapter.scale, 1.5, "{dtype}");
    }
}

#[test]
fn a_folded_scale_is_in_the_values() {
    let dir = folder();
    let file = dir.path().join("x.safetensors");
    let made = adapter(1.7, [("q", lora(&[2], [3, 7, 5], 1))]);
    let names = fused();
    let options = ExportOptions {
        fold_scale: true,
        instance: 1,
        component: Some("unet"),
        ..to(Format::Diffusers, &names)
    };
    export(&made, &file, &options).expect("it can be told");
    let read = import(&file, None, &from(&names)).expect("readable").adapter;
    assert_eq!(read.scale, 1.0);
    let second = made.entry(1).expect("two instances");
    assert_eq!(read.modules["q"].lora_a, second.modules["q"].lora_a);
    assert_eq!(read.modules["q"].lora_b, second.modules["q"].lora_b.mapv(|x| x * 1.7));
}

/// 65504 is the largest number of f16; the scale may take any type beyond its range.
#[test]
fn values_beyond_the_stored_type_are_refused() {
    let dir = folder();
    let mut made = adapter(2.0, [("l.0.q", lora(&[1], [1, 3, 2], 1))]);
    made.modules[0].lora_b[[0, 0, 0]] = 7e4;
    let names = fused();
    let path = dir.path().join("x");
    for (format, dtype, fold_scale, good) in [
        (Format::Kohya, Dtype::F16, false, false),
        (Format::Peft, Dtype::F16, true, false),
        (Format::Diffusers, Dtype::Bf16, true, true),
    ] {
        let options = ExportOptions { dtype, fold_scale, ..to(format, &names) };
        match export(&made, &path, &options) {
            Err(e) => assert!(!good && e.to_string().contains("`l.0.q` holds"), "{e}"),
            Ok(_) => assert!(good, "{format:?}"),
        }
        assert_eq!(path.exists(), good);
    }
    made.modules[0].lora_b[[0, 0, 0]] = 3e38;
    let options = ExportOptions { fold_scale: true, ..to(Format::Peft, &names) };
    let e = export(&made, dir.path().join("y"), &options).expect_err("6e38").to_string();
    assert!(e.contains("holds inf"), "{e}");
}

/// Its lora_b is still zero, and so might be two blocks.
#[test]
fn an_expert_that_was_never_trained_comes_along() {
    let dir = folder();
    let file = dir.path().join("x.safetensors");
    let mut writer = TensorWriter::new();
    for expert in 0..3 {
        let name = format!("transformer.model.layers.0.mlp.experts.{expert}.gate_and_up_proj");
        let b = if expert == 1 { vec![0.0; 20] } else { vec![1.5; 20] };
        writer.add(format!("{name}.lora_A.weight"), &[2, 6], &[0.5; 12], Dtype::F32);
        writer.add(format!("{name}.lora_B.weight"), &[10, 2], &b, Dtype::F32);
    }
    writer.write(&file).expect("writable");
    let read = import(&file, None, &from(&fused())).expect("one rank for all");
    let up = &read.adapter.modules["model.layers.0.mlp.experts.w3"];
    assert_eq!((up.lora_a.shape(), up.lora_b.shape()), (&[1, 3, 2, 6][..], &[1, 3, 5, 2][..]));
    assert!(up.lora_b.slice(s![0, 1, .., ..]).iter().all(|&x| x == 0.0));
    assert!(up.lora_b.slice(s![0, 2, .., ..]).iter().all(|&x| x == 1.5));
}
