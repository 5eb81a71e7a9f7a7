//! Skills added to a trained generator: from pairs of pictures, beside what it knows.

use assert_cmd::Command;
use hywu::{
    model::{Model, ModelInfo},
    pipeline::{EditOptions, Editor},
    train::{ExtensionConfig, Kind, Progress, Run, SkillConfig, TrainConfig},
};
use hywu_diffusion::{Picture, SampleOptions, load_picture, save_picture, skills::filters::colours};
use hywu_kernels::Device;
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

#[test]
fn a_model_that_grows_loses_nothing() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (parent, pairs) = (parent(dir.path()), pairs(dir.path()));
    let grown = dir.path().join("grown");
    let grow = |share: f32| Some(ExtensionConfig { grow: true, share, weight: 1.0 });
    let swap = TrainConfig { extension: grow(0.0), ..extension(&parent, &pairs, 60, 0.0) };
    train(Kind::Generator, swap, &grown, u64::MAX, false).expect("a run");
    let grown = grown.join("model");
    let photo = load_picture(samples().join("chelsea.png")).expect("a sample").resize(64, 64);
    let [new, old] = ["exchange red and blue", "invert the colors"];
    assert!(edit(&parent, &photo, old).rgb == edit(&grown, &photo, old).rgb);
    let truth = colours(&photo, |[r, g, b]| [b, g, r]);
    let [before, after] = [&parent, &grown].map(|model| distance(&truth, &edit(model, &photo, new)));
    assert!(after < before, "{before} -> {after}");
    // Once more, from the grown one and rehearsing it: each generator answers for its own.
    let sepia = || TrainConfig {
        skill: Vec::new(),
        data: TrainConfig::parse(&config(20, r#""sepia""#)).expect("good").data,
        extension: grow(0.5),
        ..extension(&grown, &pairs, 20, 0.5)
    };
    let twice = dir.path().join("twice");
    train(Kind::Generator, sepia(), &twice, u64::MAX, false).expect("a run");
    let twice = twice.join("model");
    for known in [old, new] {
        assert!(edit(&grown, &photo, known).rgb == edit(&twice, &photo, known).rgb, "{known}");
    }
    assert!(edit(&grown, &photo, "make it sepia").rgb != edit(&twice, &photo, "make it sepia").rgb);
    let places = |model: &Path| -> Vec<(String, usize)> {
        let skills = ModelInfo::read(model).expect("written").skills;
        skills.into_iter().map(|s| (s.name, s.generator)).collect()
    };
    let known = [("brighter", 1), ("keep", 1), ("invert", 1), ("swap", 2), ("sepia", 3)];
    assert_eq!(places(&twice), known.map(|(name, of)| (name.to_owned(), of)));
    // All of them taught to one again: only rehearsal keeps them there.
    let one = dir.path().join("one");
    let extension = Some(ExtensionConfig { grow: false, share: 0.5, weight: 1.0 });
    let taught = TrainConfig { extension, start_from: Some(twice.clone()), ..sepia() };
    train(Kind::Generator, taught, &one, u64::MAX, false).expect("a run");
    assert!(places(&one.join("model")).iter().all(|(_, of)| *of == 1));
    assert!(!one.join("model/generator-2").exists() && !one.join("model/gate.safetensors").exists());

    let refused = |message: &str| {
        let error = Model::load(&twice).err().expect("refused");
        assert!(format!("{error:#}").contains(message), "{error:#}");
    };
    let gate = fs::read(twice.join("gate.safetensors")).expect("written");
    fs::remove_file(twice.join("gate.safetensors")).expect("there");
    refused("gate.safetensors");
    fs::copy(grown.join("gate.safetensors"), twice.join("gate.safetensors")).expect("writable");
    refused("gate.safetensors: 4 skills, model.json has 5");
    fs::write(twice.join("gate.safetensors"), &gate).expect("writable");
    let info = fs::read_to_string(twice.join("model.json")).expect("written");
    fs::write(twice.join("model.json"), info.replace("\"generator\": 3", "\"generator\": 2"))
        .expect("writable");
    refused("its files are not those");
    fs::write(twice.join("model.json"), info.replace("\"generator\": 3", "\"generator\": 4"))
        .expect("writable");
    refused("\"sepia\" is in generator 4; there are 3");
    fs::write(twice.join("model.json"), info).expect("writable");
    fs::rename(twice.join("generator-3"), dir.path().join("elsewhere")).expect("there");
    refused("\"sepia\" is in generator 3; there are 2");
}

#[test]
fn an_extension_that_was_stopped_goes_on_bit_for_bit() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (parent, pairs) = (parent(dir.path()), pairs(dir.path()));
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
