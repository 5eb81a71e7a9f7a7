//! Skills added to a trained generator: from pairs of pictures, beside what it knows.

use assert_cmd::Command;
use hywu::{
    model::{Memory, Model, ModelInfo},
    pipeline::{EditOptions, Editor},
    train::{ExtensionConfig, Kind, Progress, Run, SaveAs, SkillConfig, TrainConfig},
};
use hywu_core::{Checkpoint, Dtype, TensorWriter};
use hywu_diffusion::{
    Picture, SampleOptions, condition_of, load_picture, save_picture, skills::filters::colours,
};
use hywu_kernels::{Device, Tensor};
use predicates::str::contains;
use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

fn samples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/samples")
}

fn config(steps: u64, skills: &str) -> String {
    format!(
        r#"name = "tiny"
steps = {steps}
seed = 5

[data]
instances = 6
crops = 2
crop = 16
skills = [{skills}]

[optimizer]
peak_lr = 1e-2
floor_lr = 1e-3
warmup = 3
clip = 1.0

[backbone]
width = 16
layers = 2
head_dim = 8
mlp_hidden = 32
text_layers = 1

[generator]
rank = 2
alpha = 2.0
token_dim = 16
dim_accumulation = 2
d_model = 16
head_dim = 8
blocks = 1
"#
    )
}

fn train(kind: Kind, config: TrainConfig, out: &Path, stop: u64, resume: bool) -> anyhow::Result<()> {
    let photos = (!config.data.skills.is_empty() || config.skill.is_empty()).then(samples);
    let mut run = Run::start(kind, config, photos.as_deref(), out, resume, Device::Cpu)?;
    run.train(&mut |Progress { step, .. }| match step == stop {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    })
}

/// The folder of a model whose generator has learnt to invert.
fn parent(dir: &Path) -> PathBuf {
    parent_of(dir, |config| config)
}

/// The same in other sizes.
fn parent_of(dir: &Path, sizes: impl Fn(String) -> String) -> PathBuf {
    let config = |steps: u64, skills: &str| sizes(config(steps, skills));
    let parse = |text: &str| TrainConfig::parse(text).expect("a good config");
    let (backbone, generator) = (dir.join("backbone"), dir.join("generator"));
    let plain = r#""brighter", "keep""#;
    train(Kind::Backbone, parse(&config(30, plain)), &backbone, u64::MAX, false).expect("a run");
    let from = TrainConfig { start_from: Some(backbone.join("model")), ..parse(&config(60, r#""invert""#)) };
    train(Kind::Generator, from, &generator, u64::MAX, false).expect("a run");
    generator.join("model")
}

/// Two pairs: red and blue change places.
fn pairs(dir: &Path) -> PathBuf {
    let folder = dir.join("swap");
    fs::create_dir(&folder).expect("writable");
    for name in ["astronaut", "coffee"] {
        let photo = load_picture(samples().join(format!("{name}.png"))).expect("a sample").resize(96, 96);
        let after = colours(&photo, |[r, g, b]| [b, g, r]);
        save_picture(folder.join(format!("{name}-before.png")), &photo, &[]).expect("writable");
        save_picture(folder.join(format!("{name}-after.png")), &after, &[]).expect("writable");
    }
    folder
}

/// Without growing.
fn extension(parent: &Path, pairs: &Path, steps: u64, share: f32) -> TrainConfig {
    let skill = SkillConfig {
        name: "swap".into(),
        pairs: pairs.into(),
        instructions: vec!["swap the channels".into(), "exchange red and blue".into()],
    };
    TrainConfig {
        start_from: Some(parent.into()),
        extension: Some(ExtensionConfig { grow: false, share, weight: 20.0 }),
        skill: vec![skill],
        ..TrainConfig::parse(&config(steps, "")).expect("a good config")
    }
}

fn edit(model: &Path, photo: &Picture, instruction: &str) -> Picture {
    let editor = Editor::new(Model::load(model).expect("a model folder"));
    let sample = SampleOptions { steps: 2, ..SampleOptions::default() };
    let options = EditOptions { sample, ..EditOptions::default() };
    let mut go = |_: usize, _: usize| ControlFlow::Continue(());
    editor.edit(photo, instruction, None, &options, &mut go).expect("an edit").picture
}

fn distance(a: &Picture, b: &Picture) -> f64 {
    let square: f64 = a.rgb.iter().zip(&b.rgb).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    (square / a.rgb.len() as f64).sqrt()
}

#[test]
fn rehearsal_keeps_old_edits_closer_than_plain_training() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (parent, pairs) = (parent(dir.path()), pairs(dir.path()));
    let [plain, rehearsed] = [0.0, 0.5].map(|share| {
        let out = dir.path().join(format!("share{share}"));
        train(Kind::Generator, extension(&parent, &pairs, 60, share), &out, u64::MAX, false).expect("a run");
        out.join("model")
    });
    let photo = load_picture(samples().join("chelsea.png")).expect("a sample").resize(64, 64);
    let [mut a, mut b] = [0.0; 2];
    for old in ["invert the colors", "make it brighter", "keep it the same"] {
        let before = edit(&parent, &photo, old);
        a += distance(&before, &edit(&plain, &photo, old));
        b += distance(&before, &edit(&rehearsed, &photo, old));
    }
    assert!(b < 0.9 * a, "moved by {b} with rehearsal, by {a} without");
    // What is new has been learnt: the edit has come nearer to the true one.
    let truth = colours(&photo, |[r, g, b]| [b, g, r]);
    let [before, after] =
        [&parent, &rehearsed].map(|m| distance(&truth, &edit(m, &photo, "swap the channels")));
    assert!(after < before, "{before} -> {after}");
    // The backbone is what it was, and the model tells what it knows.
    let bytes = |model: &Path| fs::read(model.join("backbone.safetensors")).expect("written");
    assert!(bytes(&parent) == bytes(&rehearsed));
    let names = |model: &Path| -> Vec<String> {
        ModelInfo::read(model).expect("written").skills.into_iter().map(|s| s.name).collect()
    };
    assert_eq!(names(&parent), ["brighter", "keep", "invert"]);
    assert_eq!(names(&rehearsed), ["brighter", "keep", "invert", "swap"]);
    // Extended once more, the own skill is rehearsed without its pairs.
    let again = TrainConfig {
        skill: Vec::new(),
        data: TrainConfig::parse(&config(2, r#""sepia""#)).expect("good").data,
        ..extension(&rehearsed, &pairs, 2, 0.5)
    };
    let out = dir.path().join("again");
    train(Kind::Generator, again, &out, u64::MAX, false).expect("a run");
    let info = ModelInfo::read(out.join("model")).expect("written");
    assert_eq!(info.skills.last().map(|s| s.name.as_str()), Some("sepia"));
    assert_eq!(info.skills[3].instructions, ["swap the channels", "exchange red and blue"]);
}

/// A grown model's training: it looks after what is there however small it stores the rest.
fn growing(parent: &Path, pairs: &Path, steps: u64, share: f32) -> TrainConfig {
    let extension_of = Some(ExtensionConfig { grow: true, share, weight: 1.0 });
    TrainConfig { extension: extension_of, save_as: SaveAs::F16, ..extension(parent, pairs, steps, share) }
}

/// As [`growing`], but sepia instead of the pairs.
fn growing_sepia(parent: &Path, pairs: &Path, share: f32) -> TrainConfig {
    let data = TrainConfig::parse(&config(20, r#""sepia""#)).expect("good").data;
    TrainConfig { skill: Vec::new(), data, ..growing(parent, pairs, 20, share) }
}

fn skills(model: &Path) -> Vec<(String, usize)> {
    let skills = ModelInfo::read(model).expect("written").skills;
    skills.into_iter().map(|s| (s.name, s.generator)).collect()
}

fn file(model: &Path, name: &str) -> Vec<u8> {
    fs::read(model.join(name)).expect("written")
}

#[test]
fn a_model_that_grows_loses_nothing() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (parent, pairs) = (parent(dir.path()), pairs(dir.path()));
    let grown = dir.path().join("grown");
    train(Kind::Generator, growing(&parent, &pairs, 60, 0.0), &grown, u64::MAX, false).expect("a run");
    let grown = grown.join("model");
    for kept in ["backbone.safetensors", "generator/model.safetensors", "generator/config.json"] {
        assert!(file(&parent, kept) == file(&grown, kept), "{kept}");
    }
    let photo = load_picture(samples().join("chelsea.png")).expect("a sample").resize(64, 64);
    let [new, old] = ["exchange red and blue", "invert the colors"];
    assert!(edit(&parent, &photo, old).rgb == edit(&grown, &photo, old).rgb);
    let truth = colours(&photo, |[r, g, b]| [b, g, r]);
    let [before, after] = [&parent, &grown].map(|model| distance(&truth, &edit(model, &photo, new)));
    assert!(after < before, "{before} -> {after}");
    // Once more, from the grown one and rehearsing it: each generator answers for its own.
    let twice = dir.path().join("twice");
    train(Kind::Generator, growing_sepia(&grown, &pairs, 0.5), &twice, u64::MAX, false).expect("a run");
    let twice = twice.join("model");
    for known in [old, new] {
        assert!(edit(&grown, &photo, known).rgb == edit(&twice, &photo, known).rgb, "{known}");
    }
    assert!(edit(&grown, &photo, "make it sepia").rgb != edit(&twice, &photo, "make it sepia").rgb);
    let known = [("brighter", 1), ("keep", 1), ("invert", 1), ("swap", 2), ("sepia", 3)];
    assert_eq!(skills(&twice), known.map(|(name, of)| (name.to_owned(), of)));
    // All of them taught to one again, in the place of the others.
    let one = dir.path().join("one");
    let taught = TrainConfig {
        extension: Some(ExtensionConfig { grow: false, share: 0.5, weight: 1.0 }),
        ..growing_sepia(&twice, &pairs, 0.5)
    };
    train(Kind::Generator, taught, &one, u64::MAX, false).expect("a run");
    let one = one.join("model");
    assert!(skills(&one).iter().all(|(_, of)| *of == 1));
    Model::load(&one).expect("a model").save(&twice, Dtype::F32).expect("writable");
    for gone in ["generator-2", "generator-3", "gate.safetensors"] {
        assert!(!one.join(gone).exists() && !twice.join(gone).exists(), "{gone}");
    }
}

#[test]
fn several_generators_answer_a_batch_in_its_order() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (parent, pairs) = (parent(dir.path()), pairs(dir.path()));
    let grown = dir.path().join("grown");
    train(Kind::Generator, growing(&parent, &pairs, 5, 0.0), &grown, u64::MAX, false).expect("a run");
    let editor = Editor::new(Model::load(grown.join("model")).expect("a model"));
    let model = editor.model();
    let Memory::Functional(generators) = &model.memory else { panic!("no generators") };
    let photo = load_picture(samples().join("chelsea.png")).expect("a sample").resize(64, 64);
    let asked = ["invert it", "swap the channels", "make it brighter", "exchange red and blue"];
    let ids: Vec<Vec<u32>> = asked.iter().map(|words| model.text.encode(words).expect("short")).collect();
    let condition = |ids: &Vec<u32>| condition_of(&model.backbone, &photo, ids).expect("a condition");
    let alone: Vec<Tensor> = ids.iter().map(condition).collect();
    let mut shape = alone[0].shape().to_vec();
    shape[0] = asked.len();
    let values = alone.iter().flat_map(|c| c.data().to_vec()).collect();
    let all = Tensor::new(&shape, values).expect("they fit");
    let batch = generators.generate(&model.backbone, &all, &ids.concat()).expect("adapters");
    assert_eq!(generators.choose(&model.backbone, &ids.concat()).expect("they fit"), [0, 1, 0, 1]);
    for (i, words) in asked.into_iter().enumerate() {
        let single = editor.recall(&photo, words, 0).expect("an adapter").expect("a generator").adapter;
        assert_eq!(single.metadata["generator"], ["1", "2"][i % 2]);
        let entry = batch.entry(i).expect("there");
        for (name, lora) in &single.modules {
            for (a, b) in
                [(&lora.lora_a, &entry.modules[name].lora_a), (&lora.lora_b, &entry.modules[name].lora_b)]
            {
                assert!(
                    a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 * (1.0 + b.abs())),
                    "{words}: {name}"
                );
            }
        }
    }
    let error = generators.generate(&model.backbone, &alone[0], &ids.concat()).expect_err("one of four");
    assert!(error.to_string().contains("for 4 instructions"), "{error:#}");
    assert!(generators.choose(&model.backbone, &ids[0][1..]).is_err());
}

#[test]
fn a_device_grows_a_model_too() {
    let Ok(device) = Device::Cuda(0).check() else { return println!("SKIPPED: no CUDA device") };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let sizes =
        |config: String| config.replace("head_dim = 8", "head_dim = 32").replace("width = 16", "width = 32");
    let (parent, pairs) =
        (parent_of(dir.path(), |c| sizes(c).replace("d_model = 16", "d_model = 32")), pairs(dir.path()));
    let out = dir.path().join("grown");
    let mut run = Run::start(Kind::Generator, growing(&parent, &pairs, 3, 0.5), None, &out, false, device)
        .expect("a run");
    run.train(&mut |_| ControlFlow::Continue(())).expect("three steps");
    let grown = out.join("model");
    for kept in ["backbone.safetensors", "generator/model.safetensors"] {
        assert!(file(&parent, kept) == file(&grown, kept), "{kept}");
    }
    let on_host = Model::load(&grown).expect("a model");
    let on_device = Model::load(&grown).expect("a model").to(device, Dtype::Bf16).expect("room");
    let asked = ["invert it", "can you swap the channels", "make it brighter", "exchange red and blue"];
    let ids: Vec<u32> = asked.iter().flat_map(|words| on_host.text.encode(words).expect("short")).collect();
    for model in [&on_host, &on_device] {
        let Memory::Functional(generators) = &model.memory else { panic!("no generators") };
        assert_eq!(generators.choose(&model.backbone, &ids).expect("they fit"), [0, 1, 0, 1]);
    }
    let photo = load_picture(samples().join("chelsea.png")).expect("a sample").resize(32, 32);
    let sample = SampleOptions { steps: 1, ..SampleOptions::default() };
    let options = EditOptions { sample, ..EditOptions::default() };
    let mut go = |_: usize, _: usize| ControlFlow::Continue(());
    let [a, b] = [on_host, on_device].map(|model| {
        Editor::new(model).edit(&photo, asked[1], None, &options, &mut go).expect("an edit").picture
    });
    assert!(distance(&a, &b) < 0.02, "{}", distance(&a, &b));
}

#[test]
fn parts_of_a_grown_model_that_do_not_fit_are_told() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (parent, pairs) = (parent(dir.path()), pairs(dir.path()));
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    train(Kind::Generator, growing(&parent, &pairs, 2, 0.0), &first, u64::MAX, false).expect("a run");
    train(Kind::Generator, growing_sepia(&first.join("model"), &pairs, 0.0), &second, u64::MAX, false)
        .expect("a run");
    let (once, model) = (first.join("model"), second.join("model"));
    let refused = |message: &str| {
        let error = Model::load(&model).err().expect("refused");
        assert!(format!("{error:#}").contains(message), "{error:#}");
    };
    let (gate, info) = (model.join("gate.safetensors"), model.join("model.json"));
    let (gate_was, info_was) = (file(&model, "gate.safetensors"), file(&model, "model.json"));
    fs::remove_file(&gate).expect("there");
    refused("gate.safetensors");
    fs::copy(once.join("gate.safetensors"), &gate).expect("writable");
    refused("gate.safetensors: the gate tells other skills apart than model.json lists");
    // Counts that don't add up, or overflow.
    let examples =
        Checkpoint::open(once.join("gate.safetensors")).expect("written").read("examples").expect("f16");
    for count in [1, usize::MAX] {
        let names = ["brighter", "keep", "invert", "swap", "sepia"].map(|name| (name, count));
        let mut writer = TensorWriter::new();
        writer.add("examples", examples.shape(), examples.as_slice().expect("whole"), Dtype::F16);
        writer.meta("skills", serde_json::to_string(&names).expect("plain"));
        writer.write(&gate).expect("writable");
        refused("gate.safetensors: router: examples");
    }
    fs::write(&gate, &gate_was).expect("writable");
    let text = String::from_utf8(info_was.clone()).expect("JSON");
    let with = |number: usize| text.replace("\"generator\": 3", &format!("\"generator\": {number}"));
    fs::write(&info, with(2)).expect("writable");
    refused("its files are not those");
    for number in [0, 4] {
        fs::write(&info, with(number)).expect("writable");
        refused(&format!("\"sepia\" is in generator {number}; there are 3"));
    }
    fs::write(&info, &info_was).expect("writable");
    let [away, third] = [dir.path().join("away"), model.join("generator-3")];
    fs::rename(&third, &away).expect("there");
    refused("\"sepia\" is in generator 3; there are 2");
    fs::rename(model.join("generator-2"), &third).expect("there");
    refused("there are 2 generators, but no generator-2/");
    fs::remove_dir_all(&third).expect("there");
    refused("a gate, and one generator alone");
    fs::remove_file(&gate).expect("there");
    refused("\"swap\" is in generator 2; there are 1");
}

#[test]
fn an_extension_that_was_stopped_goes_on_bit_for_bit() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (parent, pairs) = (parent(dir.path()), pairs(dir.path()));
    for share in [0.0, 0.5] {
        let growing = || growing(&parent, &pairs, 5, share);
        let [whole, cut] = ["whole", "cut"].map(|name| dir.path().join(format!("{name}-{share}")));
        train(Kind::Generator, growing(), &whole, u64::MAX, false).expect("a run");
        train(Kind::Generator, growing(), &cut, 2, false).expect_err("stopped");
        train(Kind::Generator, growing(), &cut, u64::MAX, true).expect("the rest");
        for part in ["state.safetensors", "model/gate.safetensors", "model/generator-2/model.safetensors"] {
            assert!(file(&whole, part) == file(&cut, part), "{part}, share {share}");
        }
    }
    let extension = || extension(&parent, &pairs, 9, 0.5);
    let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
    train(Kind::Generator, extension(), &whole, u64::MAX, false).expect("a run");
    train(Kind::Generator, extension(), &cut, 4, false).expect_err("stopped");
    train(Kind::Generator, extension(), &cut, u64::MAX, true).expect("the rest");
    let state = |out: &Path| fs::read(out.join("state.safetensors")).expect("written");
    assert!(state(&whole) == state(&cut));
    // Other pairs are another run.
    train(Kind::Generator, TrainConfig { steps: 9, ..extension() }, &cut, u64::MAX, true)
        .expect("nothing left");
    fs::rename(pairs.join("coffee-before.png"), pairs.join("tea-before.png")).expect("writable");
    fs::rename(pairs.join("coffee-after.png"), pairs.join("tea-after.png")).expect("writable");
    let refused = train(Kind::Generator, extension(), &cut, u64::MAX, true).expect_err("other pairs");
    assert!(refused.to_string().contains("other photos"), "{refused:#}");
}

#[test]
fn the_command_learns_from_pairs() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (parent, pairs) = (parent(dir.path()), pairs(dir.path()));
    let file = |name: &str, text: &str| {
        let file = dir.path().join(name);
        fs::write(&file, text).expect("writable");
        file
    };
    let skills = file(
        "new.toml",
        &format!(
            "[[skill]]\nname = \"mine\"\npairs = {pairs:?}\ninstructions = [\"my look\", \"as I like it\"]\n"
        ),
    );
    let settings = file("settings.toml", &config(2, ""));
    let hywu = |kind: &str, out: &str| {
        let mut command = Command::cargo_bin("hywu").expect("built");
        command.args(["train", kind, "--device", "cpu", "--out"]).arg(dir.path().join(out));
        command
    };
    let known = |out: &str| ModelInfo::read(dir.path().join(out).join("model")).expect("written").skills;
    // A generator of its own for one look, from pairs alone.
    let fresh = file("fresh.toml", &format!("start_from = {parent:?}\n{}", config(2, "")));
    let mut command = hywu("generator", "fresh");
    command.arg("--config").arg(fresh).arg("--pairs").arg(&pairs).args(["--instruction", "swap it"]);
    command.assert().success();
    assert_eq!(known("fresh").last().map(|s| s.instructions.clone()), Some(vec!["swap it".to_owned()]));
    let mut command = hywu("generator", "extended");
    command.arg("--extend").arg(&parent).arg("--config").arg(&settings).arg("--skills").arg(&skills);
    command.arg("--photos").arg(samples()).assert().success();
    assert_eq!(known("extended").last().map(|s| s.name.clone()), Some("mine".to_owned()));

    let refused = |kind: &str, args: &[&str], message: &str| {
        let mut command = hywu(kind, "refused");
        let assert = command.args(args).assert().code(1).stderr(contains(message));
        let stderr = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
        assert_eq!(stderr.trim_end().lines().count(), 1, "one line, got: {stderr}");
        assert!(!dir.path().join("refused").exists(), "{args:?}");
    };
    let path = |p: &Path| p.to_str().expect("a plain name").to_owned();
    let (parent, pairs, settings) = (path(&parent), path(&pairs), path(&settings));
    let backbone = path(&dir.path().join("backbone/model"));
    let extend = ["--extend", &parent, "--pairs", &pairs, "--instruction"];
    refused("generator", &[&extend[..], &["Invert it "]].concat(), "asks for \"invert\" already");
    refused("generator", &[&extend[..], &[""]].concat(), "empty");
    refused("lora", &[&extend[..], &["my look"]].concat(), "--extend is for `train generator`");
    refused("generator", &["--extend", &parent, "--photos", &path(&samples())], "nothing to learn");
    let none = ["--extend", &backbone, "--pairs", &pairs, "--instruction", "my look"];
    refused("generator", &none, "no generator that could be extended");
    let twice = file("twice.toml", &fs::read_to_string(&skills).expect("written").repeat(2));
    let with = |file: &Path, message: &str| {
        refused("generator", &["--extend", &parent, "--skills", &path(file)], message);
    };
    with(&twice, "one of this name");
    with(&file("none.toml", "skill = []"), "no [[skill]]");
    with(
        &file("table.toml", &fs::read_to_string(&skills).expect("written").replace("mine", "sepia")),
        "one of this name",
    );
    with(
        &file("typo.toml", &fs::read_to_string(&skills).expect("written").replace("pairs", "pears")),
        "pears",
    );
    with(
        &file("mute.toml", &format!("[[skill]]\nname = \"mute\"\npairs = {pairs:?}\ninstructions = []\n")),
        "mute",
    );
    let all =
        file("all.toml", &format!("{}[extension]\ngrow = true\nshare = 1.0\nweight = 1.0\n", config(2, "")));
    refused(
        "generator",
        &["--extend", &parent, "--config", &path(&all), "--skills", &path(&skills)],
        "share is 1",
    );
    fs::remove_file(Path::new(&pairs).join("coffee-after.png")).expect("there");
    refused(
        "generator",
        &["--config", &settings, "--pairs", &pairs, "--instruction", "my look"],
        "start_from",
    );
    refused("generator", &[&extend[..], &["my look"]].concat(), "coffee-before.png");
}
