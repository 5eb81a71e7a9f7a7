//! `hywu eval claims`: all of it, as small as it gets.

use assert_cmd::Command;
use hywu::{
    claims::{
        Watch, html,
        instance::hidden_amounts,
        measure,
        report::{AdapterLabel, Condition, Method, Report},
        settings::Settings,
        structure::structure,
    },
    model::Model,
    pipeline::Editor,
    train::{AdapterConfig, Kind, Task},
};
use hywu_core::{Philox, adapter::gram};
use hywu_diffusion::{
    BatchShape, EditData, PhotoSet, Picture, TextEncoder, load_picture,
    skills::{SKILLS, Skill},
};
use hywu_kernels::{Device, testing::for_each_place};
use predicates::{prelude::*, str::contains};
use std::{
    cell::Cell,
    fs,
    path::{Path, PathBuf},
};

const SETTINGS: &str = r#"
pairs = [["invert", "brighter"]]
seeds = [1, 2]
steps = 3
instances = 4
crops = 1
crop = 16
checkpoint_every = 2

[optimizer]
weight_decay = 0.01
clip = 1.0
ema = 0.5

[rates]
shared_lora = { peaks = [1e-3], steps = 2 }
wide_lora = { peaks = [1e-3], steps = 2 }
full = { peaks = [1e-3, 1e-6], steps = 2 }
bank = { peaks = [1e-3], steps = 2 }
hywu = { peaks = [1e-3, 1e30], steps = 1 }

[generator]
rank = 2
alpha = 2.0
token_dim = 16
dim_accumulation = 2
d_model = 48
head_dim = 8
blocks = 1

[measure]
side = 64
steps = 1
tile = 64
validation_batches = 1
conflict_batches = 1
adapters = 2
draws = 2
routed_photos = 1
resamples = 50
"#;

fn sample(name: &str) -> image::DynamicImage {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/samples").join(name);
    image::open(file).expect("the sample is a picture")
}

/// A folder of small photos.
fn photos(dir: &Path, name: &str, count: u32) -> PathBuf {
    let folder = dir.join(name);
    fs::create_dir_all(&folder).expect("writable");
    for i in 0..count {
        let whole = sample(if name == "test" { "chelsea.png" } else { "astronaut.png" });
        let cut = whole.crop_imm(40 * i, 30 * i, 96, 80).to_rgb8();
        cut.save(folder.join(format!("{i}.png"))).expect("writable");
    }
    folder
}

/// One measurement in `dir/out`, stopped when `stop` says so of the times that it was asked; what it told of.
fn run(dir: &Path, out: &str, stop: impl Fn(usize) -> bool) -> (anyhow::Result<Report>, Vec<String>) {
    run_of(SETTINGS, dir, out, stop)
}

/// The same with these settings.
fn run_of(
    settings: &str,
    dir: &Path,
    out: &str,
    stop: impl Fn(usize) -> bool,
) -> (anyhow::Result<Report>, Vec<String>) {
    let settings = Settings::parse(settings).expect("settings");
    let (asked, told) = (Cell::new(0), std::cell::RefCell::new(Vec::new()));
    let stop = || {
        asked.set(asked.get() + 1);
        stop(asked.get())
    };
    let tell = |what: &str, _: u64, _: u64| told.borrow_mut().push(what.to_owned());
    let watch = Watch { stop: &stop, tell: &tell };
    let (train, test) = (photos(dir, "train", 6), photos(dir, "test", 2));
    let report = measure(&settings, None, &train, &test, &dir.join(out), Device::Cpu, watch);
    (report, told.into_inner())
}

/// The report without what a clock or the system told.
fn timeless(mut report: Report) -> serde_json::Value {
    for cost in &mut report.cost {
        (cost.training_seconds, cost.adapter_ms, cost.edit_ms) = (0.0, 0.0, 0.0);
        (cost.training_mb, cost.edit_mb) = (None, None);
    }
    serde_json::to_value(report).expect("plain numbers")
}

#[test]
fn everything_is_measured_and_a_stopped_run_goes_on_to_the_same_numbers() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (whole, _) = run(dir.path(), "whole", |_| false);
    let whole = whole.expect("a measurement");
    let s = &whole.summary;
    let all = [
        s.hywu_vs_shared_lora_db,
        s.hywu_vs_full_db,
        s.hywu_win_rate,
        s.shuffled_loss_db,
        s.averaged_loss_db,
        s.conflict_cosine,
        s.phrasing_accuracy,
    ];
    for (i, interval) in all.iter().enumerate() {
        let interval = interval.unwrap_or_else(|| panic!("number {i} is missing"));
        assert!(interval.lo <= interval.mean && interval.mean <= interval.hi, "{i}: {interval:?}");
    }
    assert_eq!(whole.methods.len(), 7);
    let parameters = |method: Method| {
        whole.methods.iter().find(|m| m.method == method).map(|m| m.parameters).expect("there")
    };
    // A bank of two, and a shared LoRA as near to the generator as one rank more or less.
    assert_eq!(parameters(Method::Oracle), 2 * parameters(Method::SharedLora));
    let one = parameters(Method::SharedLora) / 2;
    assert!(parameters(Method::WideLora).abs_diff(parameters(Method::Hywu)) <= one / 2 + 1);
    // Four tries; one rate is far too high, the other is taken.
    let hywu: Vec<bool> = whole.sweep.iter().filter(|r| r.method == Method::Hywu).map(|r| r.chosen).collect();
    assert_eq!((whole.sweep.len(), hywu), (4, vec![true, false]));
    // Seven methods, each for all skills and for both; two seeds of five trained ones.
    assert_eq!((whole.quality.scores.len(), whole.curves.len()), (21, 10));
    let own = whole.condition.iter().find(|v| v.condition == Condition::Own).expect("the reference");
    assert_eq!((own.loss.mean, whole.condition.len(), whole.strength.len()), (0.0, 6, 5));
    assert_eq!((whole.adapters.len(), whole.pictures.len()), (4, 2));
    for row in &whole.pictures {
        for file in row.edits.values().chain([&row.source, &row.target]) {
            assert!(dir.path().join("whole").join(file).is_file(), "{file}");
        }
    }
    let kept = hywu_core::Adapter::load(dir.path().join("whole").join(&whole.setup.adapters));
    assert_eq!(kept.expect("an adapter file").batch(), 4);
    let page = fs::read_to_string(dir.path().join("whole").join(html::FILE)).expect("a page");
    assert!(page.contains("<section id=\"quality\">") && page.contains("data:image/jpeg"));
    // Four adapters are too few for a structure, two photos for a regression.
    assert!(
        whole.structure.is_none() && whole.hidden.is_empty() && !page.contains("<section id=\"structure\">")
    );

    // Stopped in the second step of the first training, then among the edits.
    let (stopped, told) = run(dir.path(), "parts", |asked| asked > 3);
    let error = stopped.map(|_| ()).expect_err("stopped");
    assert!(matches!(error.downcast_ref(), Some(hywu_diffusion::Error::Interrupted)), "{error:#}");
    assert_eq!(told.last().map(String::as_str), Some("training seed-1"));
    assert!(run(dir.path(), "parts", |asked| asked > 40).0.is_err());
    let (parts, told) = run(dir.path(), "parts", |_| false);
    assert!(!told.iter().any(|what| what.contains("sweep") || what == "training seed-1"), "{told:?}");
    assert_eq!(timeless(parts.expect("the rest")), timeless(whole));
    // All is there: nothing is done again.
    let (again, told) = run(dir.path(), "parts", |_| true);
    assert!(again.is_ok() && told.is_empty(), "{told:?}");
    // Not another measurement's.
    let settings = Settings::parse(&SETTINGS.replace("steps = 3", "steps = 4")).expect("settings");
    let watch = Watch { stop: &|| false, tell: &|_, _, _| {} };
    let train = dir.path().join("train");
    let refused = measure(&settings, None, &train, &train, &dir.path().join("parts"), Device::Cpu, watch);
    assert!(refused.map(|_| ()).expect_err("another").to_string().contains("another measurement"));
}

/// A backbone that knows nothing of the skills, in its first steps.
const BACKBONE: &str = r#"
[backbone]
name = "plain"
steps = 4
seed = 3

[backbone.data]
instances = 2
crops = 1
crop = 16
skills = ["keep", "darker"]

[backbone.optimizer]
peak_lr = 1e-3
floor_lr = 1e-4
warmup = 1
clip = 1.0

[backbone.backbone]
width = 64
layers = 1
head_dim = 32
mlp_hidden = 64
"#;

#[test]
fn a_backbone_of_its_own_is_trained_first_and_once() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let settings = format!("{SETTINGS}{BACKBONE}")
        .replace("seeds = [1, 2]", "seeds = [1]")
        .replace("[1e-3, 1e30]", "[1e-3]");
    let (stopped, told) = run_of(&settings, dir.path(), "out", |asked| asked > 2);
    let error = stopped.map(|_| ()).expect_err("stopped");
    assert!(matches!(error.downcast_ref(), Some(hywu_diffusion::Error::Interrupted)), "{error:#}");
    assert!(told.iter().all(|what| what == "training the backbone"), "{told:?}");
    let model = dir.path().join("out/backbone/model");
    assert!(!model.exists() || Model::load(&model).is_ok());
    let report = run_of(&settings, dir.path(), "out", |_| false).0.expect("a measurement");
    let trained = Model::load(&model).expect("a model");
    assert_eq!((report.setup.hash.as_str(), report.setup.model.as_str()), (trained.hash.as_str(), "plain"));
    assert_eq!(trained.backbone.config.layers, 1);
    let page = fs::read_to_string(dir.path().join("out").join(html::FILE)).expect("a page");
    assert!(page.contains("trained for it, from nothing, for 4 steps on: keep, darker"));
    // Once: nothing is asked again, and it is the same as in one go.
    let (again, told) = run_of(&settings, dir.path(), "out", |_| true);
    assert!(again.is_ok() && told.is_empty(), "{told:?}");
    let whole = run_of(&settings, dir.path(), "whole", |_| false).0.expect("a measurement");
    assert_eq!(timeless(whole), timeless(report));
    // A model that is given is taken instead, and the report says nothing of another.
    let parsed = Settings::parse(&settings).expect("settings");
    let (train, watch) = (dir.path().join("train"), Watch { stop: &|| true, tell: &|_, _, _| {} });
    let out = dir.path().join("out");
    let other = measure(&parsed, Some(&trained), &train, &dir.path().join("test"), &out, Device::Cpu, watch);
    assert!(other.map(|_| ()).expect_err("no backbone to train").to_string().contains("another measurement"));
    let other = settings.replace("seed = 3", "seed = 4");
    let refused = run_of(&other, dir.path(), "out", |_| false).0.map(|_| ()).expect_err("another backbone");
    assert!(refused.to_string().contains("another config"), "{refused:#}");
    let bad = Settings::parse(&settings.replace("clip = 1.0\n\n[backbone.b", "clip = 0.0\n\n[backbone.b"));
    assert!(format!("{:#}", bad.expect_err("no clip")).contains("backbone: clip"));
}

#[test]
fn the_bundled_generators_adapters_cluster_by_skill_and_follow_the_damage() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let files = photos(dir.path(), "train", 3);
    let photos: Vec<Picture> =
        (0..3).map(|i| load_picture(files.join(format!("{i}.png"))).expect("written")).collect();
    let editor = Editor::new(Model::bundled().expect("in the binary"));
    let (mut adapters, mut labels) = (Vec::new(), Vec::new());
    for skill in ["blur", "fog", "invert"] {
        for (photo, picture) in photos.iter().enumerate() {
            let instruction = SKILLS[Skill::find(skill).expect("there")].train[0].to_owned();
            let recalled =
                editor.recall(picture, &instruction, 0).expect("a good picture").expect("a generator");
            adapters.push(recalled.adapter);
            labels.push(AdapterLabel { skill: skill.into(), photo, instruction, hidden: Vec::new() });
        }
    }
    let found = structure(&gram(&adapters).expect("alike"), &labels).expect("finite").expect("nine");
    assert_eq!((found.points.len(), found.skills.len()), (9, 3));
    assert!(found.nearest > found.chance && found.within > found.across, "{found:?}");

    let skills = ["denoise", "invert"].map(|name| Skill::find(name).expect("there"));
    let watch = Watch { stop: &|| false, tell: &|_, _, _| {} };
    let hidden = hidden_amounts(&editor, &photos, &skills, 3, watch).expect("a measurement");
    // Nothing is hidden in an inversion.
    assert_eq!(hidden.len(), 1);
    assert_eq!((hidden[0].skill.as_str(), hidden[0].amount.as_str()), ("denoise", "sigma"));
    assert_eq!(hidden[0].points.iter().map(|p| p.photo).collect::<Vec<_>>(), [0, 0, 0, 1, 1, 1, 2, 2, 2]);
    for p in &hidden[0].points {
        assert!((0.06..=0.3).contains(&p.truth) && p.told.is_finite(), "{p:?}");
    }
    assert!(hidden[0].r2.lo <= hidden[0].r2.mean && hidden[0].r2.mean <= hidden[0].r2.hi);
    assert!(hidden_amounts(&editor, &photos[..2], &skills, 3, watch).expect("nothing to do").is_empty());
    let stopped = hidden_amounts(&editor, &photos, &skills, 3, Watch { stop: &|| true, ..watch });
    let error = stopped.expect_err("stopped");
    assert!(matches!(error.downcast_ref(), Some(hywu_diffusion::Error::Interrupted)), "{error:#}");
}

/// Every instance of a batch is given its own skill's entry, and teaches that one alone.
#[test]
fn a_bank_gives_every_instance_its_own_skill() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let backbone = Model::bundled().expect("in the binary").backbone;
    let sizes = AdapterConfig { rank: 2, alpha: 2.0, ..AdapterConfig::default() };
    let skills = EditData::skills(&["invert".into(), "sepia".into()]).expect("known");
    let photos = PhotoSet::open(photos(dir.path(), "train", 2)).expect("photos");
    let text = TextEncoder::bundled(backbone.config.text_len).expect("bundled");
    let data = EditData::new(photos, &[], text, 3).expect("skills").without_combinations();
    let shape = BatchShape { instances: 3, crops: 2, crop: 16 };
    let batch_of =
        |skills: &[usize]| data.clone().with_skills(skills.to_vec()).batch(0, shape).expect("a batch");
    let mut bank = Task::bank(backbone.clone(), &sizes, skills.clone(), 1).expect("sizes");
    // lora_b starts at zero: give each entry another, so that they differ.
    for (i, (_, tensor)) in bank.params_mut().iter_mut().enumerate() {
        Philox::new(9).fill_normal(i as u64, 0, tensor.data_mut());
        tensor.data_mut().iter_mut().for_each(|v| *v *= 0.05);
    }
    let sepia = batch_of(&skills[1..]);
    for_each_place(|place| {
        let bank = bank.to(place.device, place.dtype).expect("room");
        let batch = sepia.clone().to(place.device).expect("room");
        let (_, grads) = bank.gradients(&batch).expect("gradients");
        for ((name, tensor), grad) in bank.params().iter().zip(&grads) {
            let grad = grad.to_host().expect("the device works");
            let (other, own) = grad.data().split_at(tensor.numel() / 2);
            assert!(other.iter().all(|g| *g == 0.0), "{name} of the skill that is not in the batch");
            assert!(own.iter().any(|g| *g != 0.0), "{name}");
            assert_eq!(grad.numel(), tensor.numel());
        }
    });
    // The second entry as a shared LoRA does the same.
    let mut lora = Task::on(Kind::Lora, backbone, &sizes, 1).expect("sizes");
    let entries: Vec<Vec<f32>> =
        bank.params().iter().map(|(_, t)| t.data()[t.numel() / 2..].to_vec()).collect();
    for ((_, tensor), entry) in lora.params_mut().iter_mut().zip(&entries) {
        tensor.data_mut().copy_from_slice(entry);
    }
    let (loss, _) = bank.gradients(&sepia).expect("gradients");
    let (shared, _) = lora.gradients(&sepia).expect("gradients");
    let (loss, shared) = (loss.item().expect("a number"), shared.item().expect("a number"));
    assert!((loss - shared).abs() <= 1e-5 * shared, "{loss} {shared}");
    let adapters = bank.adapters(bank.params()).expect("on the host");
    assert_eq!(adapters.len(), 2);
    assert_eq!(adapters[1], lora.adapters(lora.params()).expect("on the host")[0]);
    let strange = batch_of(&EditData::skills(&["blur".into()]).expect("known"));
    assert!(bank.gradients(&strange).map(|_| ()).expect_err("no entry").to_string().contains("no entry"));
}

#[test]
fn bundled_settings_can_work_and_bad_ones_say_why() {
    let full = Settings::parse(Settings::FULL).expect("bundled");
    assert_eq!((full.skills().len(), full.seeds.len()), (10, 3));
    Settings::parse(Settings::QUICK).expect("bundled");
    let fails = |from: &str, to: &str, message: &str| {
        let error = Settings::parse(&SETTINGS.replace(from, to)).expect_err(to);
        assert!(format!("{error:#}").contains(message), "{error:#}");
    };
    fails(r#""brighter""#, r#""levitate""#, "levitate");
    fails(r#""brighter""#, r#""invert""#, "contradict itself");
    fails("seeds = [1, 2]", "seeds = []", "seeds");
    fails("crop = 16", "crop = 15", "multiple of 8");
    fails("peaks = [1e-3, 1e30]", "peaks = []", "peaks");
    fails("side = 64", "side = 8", "measure.side");
    fails("adapters = 2", "adapters = 0", "measure.adapters");
    fails("rank = 2", "ranks = 2", "ranks");
}

#[test]
fn bad_calls_say_what_is_wrong() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let call = |photos: &Path, heldout: &Path| {
        let mut command = Command::cargo_bin("hywu").expect("the binary is built by cargo");
        command.args(["eval", "claims", "--quick", "--device", "cpu", "--photos"]).arg(photos);
        command.arg("--heldout").arg(heldout).arg("--out").arg(dir.path().join("out"));
        command.assert().code(1).stderr(contains("panicked").not())
    };
    let (few, one, some) =
        (photos(dir.path(), "few", 4), photos(dir.path(), "one", 1), photos(dir.path(), "some", 5));
    call(&few, &some).stderr(contains("at least 5"));
    call(&some, &one).stderr(contains("at least 2"));
    call(&dir.path().join("absent"), &some).stderr(contains("absent"));
    let mut both = Command::cargo_bin("hywu").expect("the binary is built by cargo");
    both.args(["eval", "--json", "claims", "--out", "x"]).assert().code(2);
}
