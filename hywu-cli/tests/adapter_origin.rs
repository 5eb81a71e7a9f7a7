//! Adapters of `hywu edit` that are not generated for the picture: borrowed, given, shared; what they must cover, and what they tell of
//! themselves.

mod common;

use assert_cmd::Command;
use common::{Place, hywu, origin, photo, pixels, quietly};
use hywu::{
    hash,
    model::{Memory, Model},
};
use hywu_core::{Adapter, Lora};
use hywu_diffusion::load_picture;
use ndarray::ArrayD;
use predicates::str::contains;
use std::{fs, path::Path};

#[test]
fn an_adapter_may_come_from_another_picture() {
    let place = Place::new();
    let other = photo(place.dir.path(), "other.png", 130, 100);
    let mut turned = image::open(&other).expect("a picture").to_rgb8();
    image::imageops::invert(&mut turned);
    turned.save(&other).expect("writable");
    const WORDS: &str = "fix the white balance";
    let strong = ["--strength", "8", "--tile", "64"];
    let saved = |mut command: Command, name: &str| {
        let origin = quietly(command.args(strong).arg("--save-adapter").arg(place.at(name)));
        (origin, Adapter::load(place.at(name)).expect("written"))
    };
    let (_, own) = saved(place.edit(&place.input, WORDS, "own.png"), "own.safetensors");
    let (_, others) = saved(place.edit(&other, WORDS, "others.png"), "others.safetensors");
    let mut borrowing = place.cached(&place.input, WORDS, "a.png");
    borrowing.arg("--adapter-from").arg(&other);
    let (origin, borrowed) = saved(borrowing, "a.safetensors");
    assert_eq!(origin, "generated");
    assert_eq!(borrowed, others);
    assert_ne!(borrowed.modules, own.modules);
    // As if it had been saved there and used here.
    let mut given = place.edit(&place.input, WORDS, "b.png");
    assert_eq!(quietly(given.args(strong).arg("--adapter").arg(place.at("others.safetensors"))), "given");
    assert_eq!(pixels(&place.at("a.png")), pixels(&place.at("b.png")));
    assert_ne!(pixels(&place.at("a.png")), pixels(&place.at("own.png")));
    assert_eq!(image::image_dimensions(place.at("a.png")).expect("written"), (72, 64));
    let source = hash::of_picture(&load_picture(&other).expect("a picture"));
    assert_eq!(borrowed.metadata["source_hash"], source);
    let bytes = fs::read(place.at("a.png")).expect("written");
    assert!(
        String::from_utf8_lossy(&bytes).contains(&source),
        "the picture does not tell where its adapter is from"
    );

    // The entry is that of the other picture, for several pictures too.
    assert_eq!(quietly(&mut place.cached(&other, WORDS, "c.png")), "cached");
    let mut several = hywu();
    several.arg("edit").args([&place.input, &other]).args([WORDS, "--steps", "2", "--json"]).args(strong);
    several.arg("--adapter-from").arg(&other).arg("--cache").arg(place.at("cache"));
    let done = several.arg("--output-dir").arg(place.at("out")).assert().success();
    let lines = String::from_utf8_lossy(&done.get_output().stdout).into_owned();
    assert_eq!(lines.matches(r#""adapter":"cached""#).count(), 2, "{lines}");
    assert_eq!(pixels(&place.at("out/in.png")), pixels(&place.at("a.png")));
    assert_eq!(pixels(&place.at("out/other.png")), pixels(&place.at("others.png")));
    assert_eq!(place.entries().len(), 1);
    // Options may stand between the picture and the instruction.
    let mut between = hywu();
    between.arg("edit").arg(&place.input).arg("--adapter-from").arg(&other).arg(WORDS);
    between
        .args(strong)
        .args(["--steps", "2", "--device", "cpu", "-o"])
        .arg(place.at("c.png"))
        .assert()
        .success();
    assert_eq!(pixels(&place.at("c.png")), pixels(&place.at("a.png")));
    // At strength 0 there is nothing to borrow.
    let mut nothing = place.edit(&place.input, WORDS, "d.png");
    nothing.args(["--strength", "0", "--adapter-from"]).arg(place.at("none.png"));
    assert_eq!(quietly(&mut nothing), "none");
}

#[test]
fn borrowing_in_vain_says_why() {
    let place = Place::new();
    let other = photo(place.dir.path(), "other.png", 64, 64);
    let from = |file: &Path, output: &str| {
        let mut command = place.edit(&place.input, "make it warmer", output);
        command.arg("--adapter-from").arg(file);
        command
    };
    from(&place.at("none.png"), "a.png").assert().code(1).stderr(contains("none.png"));
    fs::write(place.at("text.png"), "I am not a picture").expect("writable");
    from(&place.at("text.png"), "a.png").assert().code(1).stderr(contains("text.png"));
    from(&other, "other.png").assert().code(1).stderr(contains("same file"));
    let mut alone = hywu();
    alone.args(["edit", "make it warmer", "--output"]).arg(place.at("a.png"));
    alone.assert().code(2).stderr(contains("a picture and"));
    from(&other, "a.png").args(["--adapter", "x"]).assert().code(2).stderr(contains("--adapter-from"));
    let model = place.model(|model| fs::remove_dir_all(model.join("generator")).expect("written"));
    from(&other, "a.png").arg("--model").arg(&model).assert().code(1).stderr(contains("no generator"));
    assert!(!place.at("a.png").exists());
}

#[test]
fn a_saved_adapter_tells_where_it_is_from() {
    let place = Place::new();
    let file = place.at("x.safetensors");
    let mut command = place.edit(&place.input, "make it warmer", "out.png");
    command.args(["--seed", "7", "--save-adapter"]).arg(&file).assert().success();
    let told = Adapter::load(&file).expect("written").metadata;
    let model = Model::bundled().expect("in the binary");
    assert!(matches!(model.memory, Memory::Functional(_)));
    let expected = [
        ("instruction", "make it warmer".to_owned()),
        ("model", model.info.name),
        ("model_hash", model.hash),
        ("program", format!("hywu {}", env!("CARGO_PKG_VERSION"))),
        ("seed", "7".to_owned()),
        ("source_hash", hash::of_picture(&load_picture(&place.input).expect("a picture"))),
    ];
    assert_eq!(told.into_iter().collect::<Vec<_>>(), expected.map(|(key, value)| (key.to_owned(), value)));
}

#[test]
fn a_part_of_an_adapter_is_applied_only_where_it_is_asked_for() {
    let place = Place::new();
    let file = place.at("whole.safetensors");
    place
        .edit(&place.input, "make it warmer", "whole.png")
        .arg("--save-adapter")
        .arg(&file)
        .assert()
        .success();
    let whole = Adapter::load(&file).expect("written");
    let with = |change: &dyn Fn(&mut Adapter), args: &[&str]| {
        let mut adapter = whole.clone();
        change(&mut adapter);
        adapter.save(place.at("part.safetensors")).expect("writable");
        let mut command = place.edit(&place.input, "make it warmer", "part.png");
        command.args(args).arg("--adapter").arg(place.at("part.safetensors"));
        command
    };
    // Eleven modules and eleven entries too many: ten of each are told.
    let renamed = |adapter: &mut Adapter| {
        let rename = |(i, (name, pair)): (usize, (String, Lora))| {
            (if i < 11 { format!("x.{name}") } else { name }, pair)
        };
        adapter.modules = std::mem::take(&mut adapter.modules).into_iter().enumerate().map(rename).collect();
    };
    let refused = with(&renamed, &[]).assert().code(1).stdout("");
    let stderr = String::from_utf8_lossy(&refused.get_output().stderr).into_owned();
    let names: Vec<_> = whole.modules.keys().take(11).collect();
    assert!(stderr.contains("part.safetensors") && stderr.contains("missing modules"), "{stderr}");
    assert!(names[..10].iter().all(|name| stderr.contains(&format!("`x.{name}`"))), "{stderr}");
    assert_eq!((stderr.matches("and 1 more").count(), stderr.lines().count()), (2, 1), "{stderr}");
    assert!(!stderr.contains(&format!("x.{}", names[10])) && !place.at("part.png").exists(), "{stderr}");
    // Even where it would not be applied.
    with(&renamed, &["--strength", "0"]).assert().code(1);

    let (_, stderr) = origin(&mut with(&renamed, &["--allow-partial"]));
    assert!(stderr.starts_with("warning: ") && stderr.contains("missing modules"), "{stderr}");
    assert!(
        stderr.contains(&format!("{} of {} modules", whole.modules.len() - 11, whole.modules.len())),
        "{stderr}"
    );
    let part = pixels(&place.at("part.png"));
    // The modules without an entry work as with one that does nothing.
    let silent = |adapter: &mut Adapter| {
        adapter.modules.values_mut().take(11).for_each(|pair| pair.lora_b.fill(0.0));
    };
    quietly(&mut with(&silent, &[]));
    assert_eq!(pixels(&place.at("part.png")), part);
    // A whole adapter needs no leave, and says nothing with it.
    quietly(&mut with(&|_| (), &["--allow-partial"]));
    assert_eq!(pixels(&place.at("part.png")), pixels(&place.at("whole.png")));
    with(&renamed, &["--allow-partial", "--quiet"]).assert().success().stderr("");

    // An adapter of which nothing fits, or a pair of the wrong shape, is refused all the same.
    let foreign = |adapter: &mut Adapter| {
        let named = std::mem::take(&mut adapter.modules).into_iter().map(|(n, p)| (format!("x.{n}"), p));
        adapter.modules = named.collect();
    };
    with(&foreign, &["--allow-partial"]).assert().code(1).stderr(contains("0 of"));
    let narrow = |adapter: &mut Adapter| {
        let pair = &mut adapter.modules["model.layers.0.self_attn.o_proj"];
        pair.lora_a = ArrayD::zeros(vec![1, 8, 7]);
    };
    let refused = with(&narrow, &["--allow-partial"]).assert().code(1);
    refused.stderr(contains("[1, 8, 7]")).stderr(contains("expected [1, r, 192]"));
    let mut alone = place.edit(&place.input, "make it warmer", "part.png");
    alone.arg("--allow-partial").assert().code(2).stderr(contains("--adapter"));
}

#[test]
fn an_adapter_of_several_instances_is_refused_before_any_work() {
    let place = Place::new();
    let file = place.at("one.safetensors");
    place.edit(&place.input, "make it warmer", "a.png").arg("--save-adapter").arg(&file).assert().success();
    let mut two = Adapter::load(&file).expect("written");
    let twice = |array: &mut ArrayD<f32>| {
        *array = ndarray::concatenate(ndarray::Axis(0), &[array.view(), array.view()]).expect("of one shape");
    };
    for Lora { lora_a, lora_b } in two.modules.values_mut() {
        twice(lora_a);
        twice(lora_b);
    }
    two.save(&file).expect("writable");
    // Of two pictures neither is there, which is not what is told.
    let mut command = hywu();
    command.arg("edit").args([place.at("x.png"), place.at("y.png")]).arg("make it warmer");
    command.arg("--output-dir").arg(place.at("out")).arg("--adapter").arg(&file);
    let refused = command.assert().code(1).stderr(contains("one.safetensors: the adapter holds 2 instances"));
    assert_eq!(String::from_utf8_lossy(&refused.get_output().stderr).lines().count(), 1);
    assert!(!place.at("out").exists());
    let model = place.model(|model| {
        fs::remove_dir_all(model.join("generator")).expect("written");
        two.save(model.join("lora.safetensors")).expect("writable");
    });
    let mut shared = place.edit(&place.input, "make it warmer", "b.png");
    shared
        .arg("--model")
        .arg(&model)
        .assert()
        .code(1)
        .stderr(contains("the shared adapter holds 2 instances"));
}

#[test]
fn a_shared_adapter_must_cover_the_backbone_too() {
    let place = Place::new();
    let file = place.at("whole.safetensors");
    place.edit(&place.input, "make it warmer", "a.png").arg("--save-adapter").arg(&file).assert().success();
    let mut shared = Adapter::load(&file).expect("written");
    let model = place.model(|model| {
        fs::remove_dir_all(model.join("generator")).expect("written");
        shared.save(model.join("lora.safetensors")).expect("writable");
    });
    let with = |output: &str| {
        let mut command = place.cached(&place.input, "make it warmer", output);
        command.arg("--model").arg(&model);
        command
    };
    // It is the same for every picture, so there is nothing to keep.
    assert_eq!(quietly(&mut with("b.png")), "shared");
    assert_eq!(pixels(&place.at("a.png")), pixels(&place.at("b.png")));
    assert!(place.entries().is_empty());
    shared.modules.swap_remove("model.layers.2.mlp.down_proj").expect("a module");
    shared.save(model.join("lora.safetensors")).expect("writable");
    let refused = with("c.png").assert().code(1).stderr(contains("the shared adapter"));
    refused.stderr(contains("missing modules: `model.layers.2.mlp.down_proj`"));
}
