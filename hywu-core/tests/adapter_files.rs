//! Adapters described, combined and merged into checkpoints.

mod common;

use common::{adapter, folder, fused, lora, random};
use hywu_core::{
    Adapter, Checkpoint, Dtype, Lora, TensorWriter,
    adapter::{MergeOptions, Names, average, compare, inspect, merge},
};
use ndarray::{Array2, ArrayD, Axis, s};
use std::{fs, ops::ControlFlow, path::Path};

fn go_on(_: u64, _: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn at(instance: usize, names: &Names) -> MergeOptions<'_> {
    MergeOptions { names, instance, partial: false }
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
    let report = merge(&mlp, &base, &out, &at(0, &fused()), &mut go_on).expect("it fits");
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
    let mut tell = |done, all| {
        told.push((done, all));
        ControlFlow::Continue(())
    };
    let report = merge(&made, &base, &out, &at(0, &fused()), &mut tell).expect("it fits");
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
    merge(&nothing, &base, dir.path().join("same"), &at(0, &fused()), &mut go_on).expect("it fits");
    assert_eq!(originals(&dir.path().join("same")), before);

    // What can't be merged leaves nothing behind.
    let refused = |bad: &Adapter, to: &Path, message: &str| {
        let e = merge(bad, &base, to, &at(0, &fused()), &mut go_on).expect_err(message).to_string();
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
    let stopped = merge(&made, &base, &never, &at(0, &fused()), &mut |_, _| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(hywu_core::Error::Interrupted)));
    assert_eq!(names(dir.path()), ["base", "out", "same"]);
    let several = adapter(1.0, [("l.0.q", lora(&[2], [1, 7, 5], 1))]);
    assert!(merge(&several, &base, &never, &at(2, &fused()), &mut go_on).is_err());
    fs::remove_file(base.join("two.safetensors")).expect("there");
    refused(&made, &never, "two.safetensors");
}

#[test]
fn a_stack_comes_apart_again() {
    let made =
        |seed| adapter(0.5, [("q", lora(&[1], [3, 7, 5], seed)), ("k", lora(&[1], [3, 4, 5], seed + 1))]);
    let (x, y) = (made(1), made(5));
    let both = Adapter::stack(&[x.clone(), y.clone()]).expect("they fit");
    assert_eq!(both.batch(), x.batch() + y.batch());
    assert_eq!(both.entry(0).expect("there").modules, x.entry(0).expect("there").modules);
    assert_eq!(both.entry(x.batch()).expect("there").modules, y.entry(0).expect("there").modules);
    assert!(Adapter::stack(&[]).is_err());
    assert!(Adapter::stack(&[x.clone(), Adapter { scale: 2.0 * y.scale, ..y.clone() }]).is_err());
    let mut other = y;
    other.modules.pop();
    assert!(Adapter::stack(&[x, other]).is_err());
}
