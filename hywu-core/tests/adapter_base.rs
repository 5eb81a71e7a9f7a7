//! Where adapters meet a checkpoint: merged into it, or imported for it.

mod common;

use common::{adapter, folder, fused, lora};
use hywu_core::{
    Adapter, Dtype, TensorWriter,
    adapter::{
        Base, ExportOptions, Format, ImportOptions, Imported, MergeOptions, MergeReport, ModuleMap, Names,
        export, import, merge,
    },
};
use ndarray::{Array2, s};
use std::{fs, ops::ControlFlow, path::Path};

/// A safetensors file with tensors of any type.
fn raw(path: &Path, tensors: &[(&str, &str, &[usize], Vec<u8>)]) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        header.insert((*name).to_owned(), entry);
        data.extend_from_slice(bytes);
    }
    let header = serde_json::Value::from(header).to_string();
    let whole = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    fs::write(path, whole).expect("writable");
}

fn zeros(path: &Path, tensors: &[(&str, [usize; 2])]) {
    let mut writer = TensorWriter::new();
    for (name, shape) in tensors {
        writer.add(format!("{name}.weight"), shape, &vec![0.0; shape[0] * shape[1]], Dtype::F32);
    }
    writer.write(path).expect("writable");
}

fn merged(made: &Adapter, base: &Path, out: &Path, partial: bool) -> Result<MergeReport, String> {
    let names = fused();
    let options = MergeOptions { names: &names, instance: 0, partial };
    merge(made, base, out, &options, &mut |_, _| ControlFlow::Continue(())).map_err(|e| e.to_string())
}

#[test]
fn a_merge_covers_all_layers_and_experts_or_is_told_to_go_on() {
    let dir = folder();
    let (base, out) = (dir.path().join("base.safetensors"), dir.path().join("out"));
    let expert = |e: usize| (format!("l.0.experts.{e}.gate_and_up_proj"), [10, 4]);
    let experts: Vec<_> = (0..12).map(expert).collect();
    let mut tensors: Vec<(&str, [usize; 2])> = experts.iter().map(|(n, s)| (n.as_str(), *s)).collect();
    tensors.extend([("l.0.q", [5, 7]), ("l.1.q", [5, 7]), ("l.2.q", [5, 7]), ("embed", [9, 7])]);
    zeros(&base, &tensors);
    let q = |layer: usize| (format!("l.{layer}.q"), lora(&[1], [2, 7, 5], layer as u64));
    let mut made = adapter(1.0, []);
    made.modules.extend([q(0), q(2)]);
    // Layer 1 is left out; what the adapter has nothing of, experts and the embedding, is not for it.
    let e = merged(&made, &base, &out, false).expect_err("layer 1");
    assert!(e.contains("2 of 3 modules") && e.contains("missing modules: `l.1.q`"), "{e}");
    assert!(!e.contains("unused") && !e.contains("embed") && !e.contains("experts") && !out.exists(), "{e}");
    let report = merged(&made, &base, &out, true).expect("it was asked for");
    assert_eq!((report.merged, report.copied), (2, 14));
    assert_eq!((report.coverage.missing, report.coverage.unused), (vec!["l.1.q".to_owned()], Vec::new()));
    fs::remove_dir_all(&out).expect("written");
    // Both sides at once, ten names of each: one expert of twelve, and a layer too many.
    made.modules.extend([q(1), q(3)]);
    for w in ["w1", "w3"] {
        made.modules.insert(format!("l.0.experts.{w}"), lora(&[1, 1], [2, 4, 5], 9));
    }
    let e = merged(&made, &base, &out, false).expect_err("both");
    assert!(e.contains("`l.0.experts.8.gate_and_up_proj` and 1 more; unused entries: `l.3.q`"), "{e}");
    assert_eq!(merged(&made, &base, &out, true).expect("it was asked for").merged, 4);
    fs::remove_dir_all(&out).expect("written");
    // Whoever asks for a part wants some of it; and what meets must fit all the same.
    let other = adapter(1.0, [("x.q", lora(&[1], [2, 7, 5], 1))]);
    assert!(merged(&other, &base, &out, true).expect_err("nothing").contains("0 of 0 modules"));
    made.modules.insert("l.1.q".into(), lora(&[1], [2, 8, 5], 1));
    let e = merged(&made, &base, &out, true).expect_err("the shape");
    assert!(e.contains("`l.1.q` has shape [5, 7], the adapter's is [5, 8]") && !out.exists(), "{e}");
}

#[test]
fn a_checkpoint_that_holds_nan_is_not_merged_into() {
    let dir = folder();
    let base = dir.path().join("base.safetensors");
    let made = adapter(1.0, [("q", lora(&[1], [1, 2, 2], 1))]);
    let bytes = |values: [f32; 4]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let with = |copied: (&str, Vec<u8>), weight: [f32; 4]| {
        let tensors: [(&str, &str, &[usize], Vec<u8>); 2] =
            [("mask", copied.0, &[4], copied.1), ("q.weight", "F32", &[2, 2], bytes(weight))];
        raw(&base, &tensors);
        let out = dir.path().join("out");
        let done = merged(&made, &base, &out, false).map(|report| (report.merged, report.copied));
        assert_eq!(out.exists(), done.is_ok());
        let _ = fs::remove_dir_all(&out);
        done
    };
    let good = [1.0; 4];
    // An infinity that is only copied may be meant, and whole numbers may be anything.
    assert_eq!(with(("F32", bytes([0.0, f32::NEG_INFINITY, 0.0, 0.0])), good), Ok((1, 1)));
    assert_eq!(with(("I64", vec![0xff; 32]), good), Ok((1, 1)));
    for (dtype, one) in
        [("F8_E4M3", vec![0x7f]), ("BF16", vec![0xc1, 0x7f]), ("F64", f64::NAN.to_le_bytes().to_vec())]
    {
        let copied = [vec![0; 2 * one.len()], one.clone(), vec![0; one.len()]].concat();
        let e = with((dtype, copied), good).expect_err(dtype);
        assert!(e.contains("base.safetensors: tensor `mask` holds NaN at element 2"), "{e}");
    }
    let mask = || ("I64", vec![0; 32]);
    let e = with(mask(), [1.0, f32::NAN, 1.0, 1.0]).expect_err("the weight");
    assert!(e.contains("tensor `q.weight` holds NaN at element 1"), "{e}");
    let e = with(mask(), [1.0, 1.0, f32::INFINITY, 1.0]).expect_err("the sum");
    assert!(e.contains("tensor `q.weight` would hold inf"), "{e}");
    let e = with(("I64", vec![0; 32]), good).and_then(|_| {
        raw(&base, &[("q.weight", "I8", &[2, 2], vec![0; 4])]);
        merged(&made, &base, &dir.path().join("out"), false).map(|_| (0, 0))
    });
    assert!(e.expect_err("a type").contains("has dtype I8; F32, F16 and BF16 can be merged into"));
}

#[test]
fn a_merge_believes_no_index_that_its_shards_belie() {
    let dir = folder();
    let base = dir.path().join("base");
    fs::create_dir(&base).expect("writable");
    zeros(&base.join("one.safetensors"), &[("l.0.q", [5, 7])]);
    zeros(&base.join("two.safetensors"), &[("l.1.q", [5, 7])]);
    let q = || lora(&[1], [2, 7, 5], 1);
    let made = adapter(1.0, [("l.0.q", q()), ("l.1.q", q())]);
    let with = |map: &[(&str, &str)]| {
        let map: serde_json::Map<String, serde_json::Value> =
            map.iter().map(|(t, f)| (format!("{t}.weight"), format!("{f}.safetensors").into())).collect();
        let index = serde_json::json!({ "weight_map": map }).to_string();
        fs::write(base.join("model.safetensors.index.json"), index).expect("writable");
        let out = dir.path().join("out");
        let done = merged(&made, &base, &out, false).map(|report| report.merged);
        assert_eq!(out.exists(), done.is_ok());
        done
    };
    let swapped = with(&[("l.0.q", "two"), ("l.1.q", "one")]).expect_err("the other one");
    assert!(swapped.contains("`l.1.q.weight` is not in its shard `one.safetensors`"), "{swapped}");
    let absent = with(&[("l.0.q", "one"), ("l.1.q", "two"), ("l.2.q", "two")]).expect_err("not there");
    assert!(absent.contains("`l.2.q.weight` is not in its shard"), "{absent}");
    zeros(&base.join("two.safetensors"), &[("l.1.q", [5, 7]), ("x", [1, 1])]);
    let extra = with(&[("l.0.q", "one"), ("l.1.q", "two")]).expect_err("one more");
    assert!(extra.contains("tensor `x.weight` is not in the index"), "{extra}");
    zeros(&base.join("two.safetensors"), &[("l.1.q", [5, 7]), ("l.0.q", [5, 7])]);
    let twice = with(&[("l.0.q", "one"), ("l.1.q", "two")]).expect_err("twice");
    assert!(twice.contains("`l.0.q.weight` is also in"), "{twice}");
    zeros(&base.join("two.safetensors"), &[("l.1.q", [5, 7])]);
    assert_eq!(with(&[("l.0.q", "one"), ("l.1.q", "two")]), Ok(2));
}

/// Two layers in the split layout, heads in two groups of 4 rows of q and 2 of k and of v.
fn split() -> Names {
    Names::split(&ModuleMap::default(), Some([4, 2, 2])).expect("rules that work")
}

/// An adapter with these modules as another program writes it.
fn written(path: &Path, format: Format, modules: &[(&str, [usize; 3])]) -> Adapter {
    let mut made = adapter(1.5, []);
    let pairs =
        modules.iter().zip(1..).map(|((name, sizes), seed)| ((*name).to_owned(), lora(&[1], *sizes, seed)));
    made.modules.extend(pairs);
    let names = fused();
    let options = ExportOptions {
        format,
        names: &names,
        instance: 0,
        component: None,
        fold_scale: false,
        dtype: Dtype::F32,
    };
    export(&made, path, &options).expect("it can be told");
    made
}

fn product(adapter: &Adapter, module: &str) -> Array2<f32> {
    let pair = adapter.modules[module].matrices(0)[0];
    pair.b.dot(&pair.a)
}

#[test]
fn parts_that_are_not_there_do_nothing() {
    let dir = folder();
    let path = dir.path().join("there");
    // The most common choice of modules: q and v; and one half of a fused pair.
    let made = written(
        &path,
        Format::Peft,
        &[("l.0.q_proj", [2, 6, 8]), ("l.0.v_proj", [3, 6, 4]), ("l.0.up_proj", [2, 6, 5])],
    );
    let names = split();
    let options = ImportOptions { names: &names, component: None, known: &[], base: None, partial: false };
    let Imported { adapter: read, absent, coverage } = import(&path, None, &options).expect("it is whole");
    assert_eq!(absent, ["l.0.k_proj", "l.0.gate_proj"]);
    assert!(coverage.is_none());
    assert_eq!(read.modules.keys().collect::<Vec<_>>(), ["l.0.qkv_proj", "l.0.gate_and_up_proj"]);
    let (q, v, whole) =
        (product(&made, "l.0.q_proj"), product(&made, "l.0.v_proj"), product(&read, "l.0.qkv_proj"));
    assert_eq!(read.modules["l.0.qkv_proj"].lora_a.shape(), [1, 5, 6]);
    let near = |a: ndarray::ArrayView2<'_, f32>, b: ndarray::ArrayView2<'_, f32>| {
        assert!((&a - &b).iter().all(|x| x.abs() <= 1e-5), "{a} {b}");
    };
    for group in 0..2 {
        let at = 8 * group;
        near(whole.slice(s![at..at + 4, ..]), q.slice(s![4 * group..4 * group + 4, ..]));
        assert!(whole.slice(s![at + 4..at + 6, ..]).iter().all(|&x| x == 0.0));
        near(whole.slice(s![at + 6..at + 8, ..]), v.slice(s![2 * group..2 * group + 2, ..]));
    }
    let halves = product(&read, "l.0.gate_and_up_proj");
    near(halves.slice(s![..5, ..]), product(&made, "l.0.up_proj").view());
    assert!(halves.slice(s![5.., ..]).iter().all(|&x| x == 0.0) && halves.nrows() == 10);

    // Where the height of what is not there can't be known it must be said.
    let entry = |rows: &str| {
        let text = format!(
            r#"{{"module": [{{"ours": "l.{{n}}.qkv", "theirs": ["l.{{n}}.q_proj", "l.{{n}}.k_proj", "l.{{n}}.v_proj"]{rows}}}]}}"#
        );
        Names::fused(&serde_json::from_str(&text).expect("a map")).expect("a rule that works")
    };
    let with = |names: &Names| import(&path, None, &ImportOptions { names, ..options.clone() });
    let e = with(&entry("")).expect_err("8 and 4 rows").to_string();
    assert!(e.contains("give the rows"), "{e}");
    assert_eq!(with(&entry(r#", "rows": [4, 2, 2]"#)).expect("it is said").absent, ["l.0.k_proj"]);
    let e = with(&Names::split(&ModuleMap::default(), None).expect("rules")).expect_err("heads").to_string();
    assert!(e.contains("512, 128, 128"), "{e}");
}

#[test]
fn an_import_for_a_checkpoint_covers_it() {
    let dir = folder();
    let (base, path) = (dir.path().join("base.safetensors"), dir.path().join("x.safetensors"));
    // Types that are not computed with don't matter: names and shapes are all that is looked at.
    raw(
        &base,
        &[
            ("position_ids", "I64", &[1], vec![0; 8]),
            ("l.0.to_q.weight", "F8_E4M3", &[3, 2], vec![0; 6]),
            ("l.1.to_q.weight", "F8_E4M3", &[3, 2], vec![0; 6]),
            ("norm.weight", "BF16", &[2], vec![0; 4]),
        ],
    );
    let base = Base::open(&base).expect("readable");
    let known: Vec<String> = base.modules().map(str::to_owned).collect();
    assert_eq!(known, ["l.0.to_q", "l.1.to_q", "norm"]);
    let names = fused();
    let with = |base: &Base, known: &[String], names: &Names, partial: bool| {
        let options = ImportOptions { names, component: None, known, base: Some(base), partial };
        import(&path, None, &options).map_err(|e| e.to_string())
    };
    let (one, two, more) = (("l.0.to_q", [2, 2, 3]), ("l.1.to_q", [2, 2, 3]), ("l.2.to_q", [2, 2, 3]));
    for format in [Format::Kohya, Format::Diffusers] {
        let made = written(&path, format, &[one, two]);
        let read = with(&base, &known, &names, false).expect("it covers it");
        assert_eq!(read.adapter.modules, made.modules);
        assert!(read.coverage.is_some_and(|c| c.is_complete() && c.applied == ["l.0.to_q", "l.1.to_q"]));
        written(&path, format, &[one]);
        let e = with(&base, &known, &names, false).expect_err("layer 1");
        assert!(e.contains("missing modules: `l.1.to_q`"), "{e}");
        written(&path, format, &[one, two, more]);
        let e = with(&base, &known, &names, false).expect_err("layer 2");
        assert!(
            e.contains(if format == Format::Kohya { "`l_2_to_q`" } else { "unused entries: `l.2.to_q`" }),
            "{e}"
        );
        let read = with(&base, &known, &names, true).expect("it was asked for");
        let unused = read.coverage.expect("a backbone was given").unused;
        assert_eq!(unused, [if format == Format::Kohya { "l_2_to_q" } else { "l.2.to_q" }]);
        written(&path, format, &[("l.0.to_q", [2, 2, 4]), two]);
        let e = with(&base, &known, &names, true).expect_err("the shape");
        assert!(e.contains("`l.0.to_q` has shape [3, 2], the adapter's is [4, 2]"), "{e}");
    }
    // A backbone with fused modules knows what their parts are called, and how high they are.
    let fused_base = dir.path().join("fused.safetensors");
    zeros(
        &fused_base,
        &[("l.0.qkv_proj", [16, 6]), ("l.1.qkv_proj", [16, 6]), ("l.0.experts.1.gate_and_up_proj", [8, 6])],
    );
    let base = Base::open(&fused_base).expect("readable");
    let (q0, v0, q1, v1) = (
        ("l.0.q_proj", [2, 6, 8]),
        ("l.0.v_proj", [2, 6, 4]),
        ("l.1.q_proj", [2, 6, 8]),
        ("l.1.v_proj", [2, 6, 4]),
    );
    written(&path, Format::Diffusers, &[q0, v0, q1, v1]);
    let read = with(&base, &[], &split(), false).expect("it covers it");
    assert_eq!(read.absent, ["l.0.k_proj", "l.1.k_proj"]);
    written(&path, Format::Diffusers, &[q0, v0, q1]);
    let e = with(&base, &[], &split(), false).expect_err("v of layer 1");
    assert!(e.contains("missing modules: `l.1.v_proj`"), "{e}");
    written(&path, Format::Diffusers, &[("l.0.q_proj", [2, 6, 16]), ("l.0.v_proj", [2, 6, 8])]);
    let e = with(&base, &[], &split(), true).expect_err("twice as many heads");
    assert!(e.contains("`l.0.q_proj` has shape [8, 6], the adapter's is [16, 6]"), "{e}");
}
