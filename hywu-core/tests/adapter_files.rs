//! Adapters as files: described, combined, exchanged with other programs, merged into checkpoints.

use hywu_core::{
    Adapter, Checkpoint, Dtype, Lora, Philox, TensorWriter,
    adapter::{
        ExportOptions, Format, ImportOptions, MapEntry, ModuleMap, Names, OneOrMore, average, compare,
        export, import, inspect, merge,
    },
};
use ndarray::{Array2, ArrayD, Axis, s};
use proptest::prelude::*;
use std::{fs, path::Path};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn random(shape: &[usize], seed: u64) -> ArrayD<f32> {
    let mut values = vec![0.0; shape.iter().product()];
    Philox::new(seed).fill_normal(0, 0, &mut values);
    ArrayD::from_shape_vec(shape, values).expect("as many")
}

/// `lead`: [batch] or [batch, experts].
fn lora(lead: &[usize], [rank, inner, outer]: [usize; 3], seed: u64) -> Lora {
    let shape = |matrix: [usize; 2]| lead.iter().copied().chain(matrix).collect::<Vec<_>>();
    Lora { lora_a: random(&shape([rank, inner]), seed), lora_b: random(&shape([outer, rank]), seed ^ 0xb) }
}

fn adapter<const N: usize>(scale: f32, modules: [(&str, Lora); N]) -> Adapter {
    let modules = modules.into_iter().map(|(name, lora)| (name.to_owned(), lora)).collect();
    Adapter { modules, scale, metadata: [("instruction".to_owned(), "make it \"warmer\"".to_owned())].into() }
}

/// scale B A of a plain module of the first instance, formed.
fn product(adapter: &Adapter, module: &str) -> Array2<f64> {
    let pair = adapter.modules[module].matrices(0)[0];
    pair.b.mapv(f64::from).dot(&pair.a.mapv(f64::from)) * f64::from(adapter.scale)
}

fn norm(x: &Array2<f64>) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn close(a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-10 * b.abs().max(1.0), "{a} and {b}");
}

fn fused() -> Names {
    Names::fused(&ModuleMap::default()).expect("the built-in rules work")
}

fn to(format: Format, names: &Names) -> ExportOptions<'_> {
    ExportOptions { format, names, instance: 0, component: None, fold_scale: false, dtype: Dtype::F32 }
}

fn from(names: &Names) -> ImportOptions<'_> {
    ImportOptions { names, component: None, known: &[] }
}

#[test]
fn what_is_told_is_that_of_the_product() {
    // Inputs narrower than the rank too.
    let made = adapter(
        1.5,
        [
            ("l.10.q", lora(&[1], [3, 7, 5], 1)),
            ("l.2.q", lora(&[1], [4, 2, 9], 2)),
            ("head", lora(&[1], [1, 3, 2], 3)),
        ],
    );
    let report = &inspect(&made).expect("it is whole")[0];
    let names: Vec<&str> = report.modules.iter().map(|m| m.name.as_str()).collect();
    assert_eq!(names, ["head", "l.2.q", "l.10.q"]);
    for module in &report.modules {
        close(module.norm, norm(&product(&made, &module.name)));
        let most = module.rank.min(module.in_dim).min(module.out_dim) as f64;
        assert!((1.0 - 1e-9..=most + 1e-9).contains(&module.effective_rank), "{module:?}");
    }
    let layers: Vec<&str> = report.layers.iter().map(|l| l.layer.as_str()).collect();
    assert_eq!(layers, ["l.2", "l.10"]);
    close(report.layers[1].norm, norm(&product(&made, "l.10.q")));
    close(report.norm.powi(2), report.modules.iter().map(|m| m.norm.powi(2)).sum());

    // Effective rank: of k equal directions k, of one 1, of shares 3/4 and 1/4 exp(H) = 4 / 3^(3/4), of nothing 0.
    let diagonal = |values: [f32; 3]| {
        let mut lora_a = ArrayD::zeros(vec![1, 3, 6]);
        let mut lora_b = ArrayD::zeros(vec![1, 4, 3]);
        for (i, v) in values.into_iter().enumerate() {
            (lora_a[[0, i, i]], lora_b[[0, i, i]]) = (v, 1.0);
        }
        Lora { lora_a, lora_b }
    };
    for (values, rank) in [
        ([2.0, 2.0, 2.0], 3.0),
        ([0.0, 5.0, 0.0], 1.0),
        ([3.0, 0.0, 1.0], 4.0 / 3.0_f64.powf(0.75)),
        ([0.0; 3], 0.0),
    ] {
        let made = adapter(4.0, [("l.0.q", diagonal(values))]);
        close(inspect(&made).expect("it is whole")[0].modules[0].effective_rank, rank);
    }
}

#[test]
fn a_comparison_is_that_of_the_products() {
    let a = adapter(2.0, [("l.0.q", lora(&[1], [3, 7, 5], 1)), ("l.1.q", lora(&[1], [2, 7, 5], 2))]);
    let b = adapter(-0.5, [("l.0.q", lora(&[1], [4, 7, 5], 3)), ("l.2.q", lora(&[1], [2, 7, 5], 4))]);
    let c = compare(&a, &b, (0, 0)).expect("they can be compared");
    let (x, y) = (product(&a, "l.0.q"), product(&b, "l.0.q"));
    let module = &c.modules[0];
    close(module.norm_a, norm(&x));
    close(module.norm_b, norm(&y));
    close(module.distance, norm(&(&x - &y)));
    close(module.cosine.expect("neither is zero"), (&x * &y).sum() / (norm(&x) * norm(&y)));
    assert_eq!((c.only_a, c.only_b), (vec!["l.1.q".to_owned()], vec!["l.2.q".to_owned()]));
    close(c.norm_b.powi(2), norm(&y).powi(2) + norm(&product(&b, "l.2.q")).powi(2));
    let rest = norm(&product(&a, "l.1.q")).powi(2) + norm(&product(&b, "l.2.q")).powi(2);
    close(c.distance.powi(2), norm(&(&x - &y)).powi(2) + rest);
    // Itself, and twice itself the other way.
    let c = compare(&a, &a, (0, 0)).expect("they can be compared");
    assert!(c.distance <= 1e-12 * c.norm_a && (c.cosine.expect("not zero") - 1.0).abs() <= 1e-12, "{c:?}");
    let c = compare(&a, &a.clone().scaled(-2.0).expect("finite"), (0, 0)).expect("they can be compared");
    close(c.distance, 3.0 * c.norm_a);
    close(c.cosine.expect("not zero"), -1.0);
    let c = compare(&a, &a.clone().scaled(0.0).expect("finite"), (0, 0)).expect("they can be compared");
    assert_eq!((c.cosine, c.norm_b), (None, 0.0));

    let other = adapter(1.0, [("l.0.q", lora(&[1], [3, 6, 5], 1))]);
    let e = compare(&a, &other, (0, 0)).expect_err("other widths").to_string();
    assert!(e.contains("l.0.q") && e.contains("(1, 5, 6)"), "{e}");
    assert!(compare(&a, &b, (1, 0)).expect_err("one instance").to_string().contains("no instance 1"));
}

#[test]
fn averages_are_of_the_updates() {
    let (x, y) =
        (adapter(2.0, [("q", lora(&[1], [3, 7, 5], 1))]), adapter(2.0, [("q", lora(&[1], [2, 7, 5], 2))]));
    let z = adapter(0.25, [("q", lora(&[1], [1, 7, 5], 3))]);
    let (px, py, pz) = (product(&x, "q"), product(&y, "q"), product(&z, "q"));
    let (mean, lost) = average(&[x.clone(), y.clone()], &[1.0, 1.0], None).expect("they fit");
    assert_eq!((mean.scale, lost), (1.0, 0.0));
    // Equal weights touch no value.
    assert_eq!(mean.modules["q"].lora_a.slice(s![.., 3.., ..]), y.modules["q"].lora_a.slice(s![.., .., ..]));
    close(norm(&(product(&mean, "q") - (&px + &py) / 2.0)), 0.0);
    let all = [x.clone(), y.clone(), z.clone()];
    let (mean, _) = average(&all, &[1.0, 3.0, 4.0], None).expect("they fit");
    let expected = (&px + &py * 3.0 + &pz * 4.0) / 8.0;
    assert!(norm(&(product(&mean, "q") - &expected)) <= 1e-6 * norm(&expected));
    assert_eq!(mean.modules["q"].lora_a.shape(), [1, 6, 7]);
    assert_eq!(mean.metadata, x.metadata);

    // Cut: never nearer than what is left out by the singular values, and nearer than either of the two.
    let (cut, lost) = average(&all, &[1.0, 3.0, 4.0], Some(2)).expect("they fit");
    assert_eq!(cut.modules["q"].lora_b.shape(), [1, 5, 2]);
    let distance = norm(&(product(&cut, "q") - &expected)) / norm(&expected);
    assert!((distance - lost).abs() <= 1e-5 && lost > 0.01 && lost < 0.9, "{distance} {lost}");
    let (same, lost) = average(std::slice::from_ref(&x), &[7.0], Some(3)).expect("it fits");
    assert_eq!((same, lost), (x.clone(), 0.0));

    let other = adapter(1.0, [("k", lora(&[1], [3, 7, 5], 1))]);
    assert!(average(&[x.clone(), other], &[1.0; 2], None).expect_err("modules").to_string().contains("`q`"));
    let wide = adapter(1.0, [("q", lora(&[1], [3, 8, 5], 1))]);
    assert!(average(&[x.clone(), wide], &[1.0; 2], None).expect_err("shape").to_string().contains("`q`"));
    for weights in [&[0.0, 0.0][..], &[1.0, -1.0], &[f32::NAN, 1.0], &[1.0]] {
        assert!(average(&[x.clone(), y.clone()], weights, None).is_err(), "{weights:?}");
    }
    let large = adapter(1.0, [("q", lora(&[1], [600, 7, 5], 1))]);
    let e = average(&[large.clone(), large], &[1.0; 2], None).expect_err("rank 1200").to_string();
    assert!(e.contains("1200"), "{e}");
}

#[test]
fn broken_adapters_are_told() {
    let good = adapter(1.0, [("q", lora(&[1], [3, 7, 5], 1))]);
    let refused = |message: &str, change: &dyn Fn(&mut Adapter)| {
        let mut bad = good.clone();
        change(&mut bad);
        let e = bad.check_pairs().expect_err(message).to_string();
        assert!(e.contains(message), "{e}");
        assert!(inspect(&bad).is_err() && compare(&bad, &good, (0, 0)).is_err());
    };
    refused("[1, 5, 2]", &|a| a.modules["q"].lora_b = random(&[1, 5, 2], 1));
    refused("[2, 5, 3]", &|a| a.modules["q"].lora_b = random(&[2, 5, 3], 1));
    refused("[3, 7]", &|a| a.modules["q"].lora_a = random(&[3, 7], 1));
    refused("[1, 0, 7]", &|a| {
        a.modules["q"] = Lora { lora_a: random(&[1, 0, 7], 1), lora_b: random(&[1, 5, 0], 1) }
    });
    refused("NaN", &|a| a.modules["q"].lora_b[[0, 1, 1]] = f32::NAN);
    refused("scale", &|a| a.scale = f32::INFINITY);
    refused("no module", &|a| a.modules.clear());
    assert!(good.clone().scaled(f32::MAX).expect("finite").scaled(2.0).is_err());
}

/// Layer 1 of a small published backbone with an adapter of its generator: merged weights must give what the published program
/// computes with the adapter beside them.
#[test]
fn merged_experts_compute_what_the_published_program_does() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let adapter = Adapter::load(golden.join("moe-adapter.safetensors")).expect("readable");
    // The recorded layer has an attention too, which its base here has not.
    let mut mlp = adapter;
    mlp.modules.retain(|name, _| name.contains(".mlp."));
    let dir = folder();
    let out = dir.path().join("merged");
    let base = golden.join("moe-base.safetensors");
    let report = merge(&mlp, 0, &fused(), &base, &out, &mut |_, _| {}).expect("it fits");
    assert_eq!((report.merged, report.copied, report.files), (10, 0, 1));
    let weights = Checkpoint::open(out.join("moe-base.safetensors")).expect("readable");
    let matrix = |file: &Checkpoint, name: &str| {
        file.read(name).expect("it is there").into_dimensionality::<ndarray::Ix2>().expect("a matrix")
    };
    let expected = Checkpoint::open(golden.join("moe-expected.safetensors")).expect("readable");
    let (x, chosen, share) =
        (matrix(&expected, "x"), matrix(&expected, "expert"), matrix(&expected, "weight"));
    let mlp = |module: &str, x: &Array2<f32>| {
        let y = x.dot(&matrix(&weights, &format!("model.layers.1.mlp.{module}.gate_and_up_proj.weight")).t());
        let (up, gate) = y.view().split_at(Axis(1), y.ncols() / 2);
        let hidden = &up * &gate.mapv(|g| g / (1.0 + (-g).exp()));
        hidden.dot(&matrix(&weights, &format!("model.layers.1.mlp.{module}.down_proj.weight")).t())
    };
    let all: Vec<Array2<f32>> = (0..4).map(|e| mlp(&format!("experts.{e}"), &x)).collect();
    let experts = Array2::from_shape_fn(x.dim(), |(row, column)| {
        (0..chosen.ncols()).map(|k| share[[row, k]] * all[chosen[[row, k]] as usize][[row, column]]).sum()
    });
    let distance = |a: &Array2<f32>, b: &Array2<f32>| (a - b).iter().fold(0.0, |m: f32, x| m.max(x.abs()));
    assert!(distance(&experts, &matrix(&expected, "experts")) <= 1e-5);
    assert!(distance(&mlp("shared_mlp", &x), &matrix(&expected, "shared")) <= 1e-5);
    assert!(distance(&experts, &matrix(&expected, "experts_without")) > 0.1);
}

/// A sharded checkpoint of every type with things beside it.
fn sharded(dir: &Path) {
    let weight = |shape: &[usize], seed| random(shape, seed).iter().copied().collect::<Vec<f32>>();
    TensorWriter::new()
        .add("l.0.q.weight", &[5, 7], &weight(&[5, 7], 1), Dtype::Bf16)
        .add("l.0.q.bias", &[5], &weight(&[5], 2), Dtype::Bf16)
        .meta("format", "pt")
        .write(dir.join("one.safetensors"))
        .expect("writable");
    TensorWriter::new()
        .add("l.1.q.weight", &[5, 7], &weight(&[5, 7], 3), Dtype::F16)
        .add("l.2.q.weight", &[5, 7], &weight(&[5, 7], 4), Dtype::F32)
        .add("norm.weight", &[7], &weight(&[7], 5), Dtype::F32)
        .write(dir.join("two.safetensors"))
        .expect("writable");
    let index = r#"{"metadata": {}, "weight_map": {"l.0.q.weight": "one.safetensors", "l.0.q.bias": "one.safetensors",
        "l.1.q.weight": "two.safetensors", "l.2.q.weight": "two.safetensors", "norm.weight": "two.safetensors"}}"#;
    fs::write(dir.join("model.safetensors.index.json"), index).expect("writable");
    for name in
        ["config.json", "LICENSE", "pytorch_model.bin", "pytorch_model.bin.index.json", ".hidden.json"]
    {
        fs::write(dir.join(name), name).expect("writable");
    }
}

#[test]
fn a_merge_keeps_shards_types_and_what_is_beside() {
    let dir = folder();
    let (base, out) = (dir.path().join("base"), dir.path().join("out"));
    fs::create_dir(&base).expect("writable");
    sharded(&base);
    let originals = |folder: &Path| {
        ["one.safetensors", "two.safetensors"].map(|name| fs::read(folder.join(name)).expect("readable"))
    };
    let before = originals(&base);
    let made = adapter(
        0.5,
        [
            ("l.0.q", lora(&[1], [3, 7, 5], 1)),
            ("l.1.q", lora(&[1], [2, 7, 5], 2)),
            ("l.2.q", lora(&[1], [3, 7, 5], 3)),
        ],
    );
    let mut told = Vec::new();
    let report =
        merge(&made, 0, &fused(), &base, &out, &mut |done, all| told.push((done, all))).expect("it fits");
    assert_eq!((report.merged, report.copied, report.files), (3, 2, 2));
    assert!(told.is_sorted() && told.last().is_some_and(|(done, all)| done == all), "{told:?}");
    assert_eq!(originals(&base), before);
    let (old, new) = (Checkpoint::open(&base).expect("readable"), Checkpoint::open(&out).expect("readable"));
    assert_eq!(old.names(), new.names());
    let (shape, dtype) = new.info("l.1.q.weight").expect("it is there");
    assert_eq!((shape, dtype), (vec![5, 7], Dtype::F16));
    // Half a unit in the last place of each type, of values below 8; f32 sums round a few times.
    for (module, unit) in
        [("l.0.q", 2.0_f64.powi(-6)), ("l.1.q", 2.0_f64.powi(-9)), ("l.2.q", 2.0_f64.powi(-20))]
    {
        let read = |file: &Checkpoint| {
            let weight = file.read(&format!("{module}.weight")).expect("it is there");
            weight.mapv(f64::from).into_dimensionality::<ndarray::Ix2>().expect("a matrix")
        };
        let (expected, sum) = (read(&old) + product(&made, module), read(&new));
        let worst = (&sum - &expected).iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        assert!(worst <= unit * 1.001 && norm(&(&sum - &read(&old))) > 0.1, "{module}: {worst}");
    }
    let names = |folder: &Path| {
        let mut names: Vec<String> = (fs::read_dir(folder).expect("readable"))
            .map(|e| e.expect("readable").file_name().into_string().expect("text"))
            .collect();
        names.sort();
        names
    };
    let expected =
        ["LICENSE", "config.json", "model.safetensors.index.json", "one.safetensors", "two.safetensors"];
    assert_eq!(names(&out), expected);

    // Nothing to add: the same bytes.
    let nothing = made.clone().scaled(0.0).expect("finite");
    merge(&nothing, 0, &fused(), &base, dir.path().join("same"), &mut |_, _| {}).expect("it fits");
    assert_eq!(originals(&dir.path().join("same")), before);

    // What can't be merged leaves nothing behind.
    let refused = |bad: &Adapter, to: &Path, message: &str| {
        let e = merge(bad, 0, &fused(), &base, to, &mut |_, _| {}).expect_err(message).to_string();
        assert!(e.contains(message), "{e}");
        assert_eq!(names(dir.path()), ["base", "out", "same"]);
    };
    let never = dir.path().join("never");
    refused(&made, &out, "there already");
    let mut bad = made.clone();
    for i in 0..12 {
        bad.modules.insert(format!("l.{i}.k"), lora(&[1], [1, 7, 5], 1));
    }
    refused(&bad, &never, "and 2 more");
    refused(&adapter(1.0, [("l.0.q", lora(&[1], [1, 8, 5], 1))]), &never, "[5, 7]");
    refused(&made.clone().scaled(1e6).expect("finite"), &never, "`l.1.q.weight` would hold");
    let several = adapter(1.0, [("l.0.q", lora(&[2], [1, 7, 5], 1))]);
    assert!(merge(&several, 2, &fused(), &base, &never, &mut |_, _| {}).is_err());
    fs::remove_file(base.join("two.safetensors")).expect("there");
    refused(&made, &never, "two.safetensors");
}

/// Every format, every layout: back to the bit.
fn round_trip(made: &Adapter, names: &Names, known: &[String]) {
    let dir = folder();
    for format in [Format::Peft, Format::Kohya, Format::Diffusers] {
        let path = dir.path().join(format!("{format:?}"));
        export(made, &path, &to(format, names)).expect("it can be told");
        let back = import(&path, None, &ImportOptions { known, ..from(names) }).expect("it comes back");
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
        "rank_pattern": {"q": 4, "^l\\.1\\.k": 1}, "alpha_pattern": {"l.1.q": 8, "k": 5},
    });
    peft(
        &folder,
        config,
        &[("l.0.q", 4), ("l.1.q", 4), ("l.0.k", 2), ("l.1.k", 1), ("l.0.v", 2), ("l.1.xq", 2), ("l.2.v", 2)],
    );
    let read = import(&folder, None, &from(&fused())).expect("readable");
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
    assert_eq!(import(&folder, None, &from(&fused())).expect("readable").scale, 1.5);
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
    let (a, b): ((&str, &[usize]), (&str, &[usize])) =
        (("q.lora_A.weight", &[2, 4]), ("q.lora_B.weight", &[3, 2]));
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
    let read = import(&file, None, &from(&fused())).expect("readable");
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
    assert_eq!(import(&file, None, &one).expect("readable").modules.keys().collect::<Vec<_>>(), ["k"]);
    let none = ImportOptions { component: Some("prior"), ..from(&names) };
    assert!(import(&file, None, &none).expect_err("not there").to_string().contains("no adapter"));
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
    let good = read(&known(&["a.0.to_q", "a.1.to_q"])).expect("it is told");
    // No alpha: it is the rank.
    assert_eq!((good.scale, good.modules.contains_key("a.0.to_q")), (1.0, true));
    let e = read(&known(&["a.0.to_q", "a.0.to.q"])).expect_err("ambiguous").to_string();
    assert!(e.contains("`a.0.to.q`, `a.0.to_q`"), "{e}");
    let e = read(&[]).expect_err("unknown").to_string();
    assert!(e.contains("`a_0_to_q`"), "{e}");
    // By the rules of a map, to our name.
    let names = Names::fused(&map(r#"{"module": [{"ours": "l.{n}.q", "theirs": "a.{n}.to_q"}]}"#))
        .expect("rules that work");
    let read = import(&file, None, &from(&names)).expect("it is told");
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
        assert_eq!(read.expect("readable").scale, 1.5, "{dtype}");
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
    let read = import(&file, None, &from(&names)).expect("readable");
    assert_eq!(read.scale, 1.0);
    let second = made.entry(1).expect("two instances");
    assert_eq!(read.modules["q"].lora_a, second.modules["q"].lora_a);
    assert_eq!(read.modules["q"].lora_b, second.modules["q"].lora_b.mapv(|x| x * 1.7));
}
