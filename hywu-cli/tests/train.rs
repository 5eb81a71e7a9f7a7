//! Training runs: the loss falls, a run that was killed goes on bit for bit, what is frozen stays.

use assert_cmd::Command;
use hywu::{
    model::{Memory, Model},
    train::{Kind, Progress, Run},
};
use hywu_diffusion::Backbone;
use hywu_kernels::{
    Device, Tensor,
    testing::{places, unguarded},
};
use predicates::str::contains;
use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Duration,
};

/// A small run; `start_from` is left out for a backbone.
fn config(dir: &Path, steps: u64, start_from: Option<&Path>) -> PathBuf {
    let from = start_from.map_or(String::new(), |p| format!("start_from = {p:?}\n"));
    let text = format!(
        r#"name = "tiny"
steps = {steps}
seed = 5
text_steps = 3
log_every = 1
checkpoint_every = 10
{from}
[data]
instances = 6
crops = 2
crop = 16
large_every = 7
skills = ["invert", "brighter", "sepia"]

[optimizer]
peak_lr = 1e-2
floor_lr = 1e-3
warmup = 3
weight_decay = 0.01
clip = 1.0
ema = 0.9

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
    );
    let file = dir.join(format!("config{steps}{}.toml", start_from.is_some()));
    fs::write(&file, text).expect("writable");
    file
}

fn photos() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/samples")
}

/// Runs on the CPU until `stop` steps are done.
fn train(kind: Kind, config: &Path, out: &Path, resume: bool, stop: u64) -> anyhow::Result<()> {
    train_on(Device::Cpu, kind, config, out, resume, stop)
}

fn train_on(
    device: Device,
    kind: Kind,
    config: &Path,
    out: &Path,
    resume: bool,
    stop: u64,
) -> anyhow::Result<()> {
    let mut run = Run::open(kind, config, &photos(), out, resume, device)?;
    run.train(&mut |Progress { step, .. }| {
        if step == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
}

/// The columns that depend on the run alone: step, loss, lr, gradient norm.
fn log(out: &Path) -> Vec<String> {
    let text = fs::read_to_string(out.join("log.csv")).expect("written");
    text.lines().map(|l| l.rsplit_once(',').expect("five columns").0.to_owned()).collect()
}

/// A finished tiny backbone run.
fn backbone(dir: &Path) -> PathBuf {
    let out = dir.join("start");
    train(Kind::Backbone, &config(dir, 30, None), &out, false, u64::MAX).expect("a run");
    out
}

#[test]
fn thirty_steps_lower_the_loss() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let out = backbone(dir.path());
    let losses: Vec<f64> = log(&out)
        .iter()
        .skip(1)
        .map(|l| l.split(',').nth(1).expect("loss").parse().expect("a number"))
        .collect();
    assert_eq!(losses.len(), 30);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert!(mean(&losses[22..]) < 0.8 * mean(&losses[..8]), "{losses:?}");
    assert!(fs::read_to_string(out.join("loss.svg")).expect("drawn").contains("<svg"));
    Model::load(out.join("model")).expect("a model folder");
}

/// The text tower stays as its own steps left it, over a stop too; the rest learns.
#[test]
fn a_frozen_text_tower_does_not_move() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let config = config(dir.path(), 8, None);
    let text = fs::read_to_string(&config).expect("written");
    fs::write(&config, text.replace("text_steps = 3", "text_steps = 3\nfreeze_text = true"))
        .expect("writable");
    let out = dir.path().join("run");
    let weights = || {
        let all = Model::load(out.join("model")).expect("a model folder").backbone.params;
        let part = |text: bool| -> Vec<Tensor> {
            let wanted = |name: &str| Backbone::in_text_tower(name) == text && !name.starts_with("condition");
            all.iter().filter(|(name, _)| wanted(name)).map(|(_, t)| t.clone()).collect()
        };
        [part(true), part(false)]
    };
    train(Kind::Backbone, &config, &out, false, 1).expect_err("interrupted");
    let [text, rest] = weights();
    train(Kind::Backbone, &config, &out, true, u64::MAX).expect("a run");
    let [same, moved] = weights();
    assert!(text.iter().zip(&same).all(|(a, b)| a.data() == b.data()) && !text.is_empty());
    assert!(rest.iter().zip(&moved).any(|(a, b)| a.data() != b.data()));
}

/// On a CUDA device every kind starts with the CPU's loss, and a run that was stopped goes on bit for bit.
#[test]
fn a_device_trains_as_the_cpu_does() {
    let Some(place) = places().into_iter().find(|p| p.device != Device::Cpu) else { return };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let start = backbone(dir.path()).join("model");
    for kind in [Kind::Backbone, Kind::Generator, Kind::Lora, Kind::Full] {
        let config = config(dir.path(), 8, (kind != Kind::Backbone).then_some(&start));
        let folder = |name: &str| dir.path().join(format!("{name}-{}", kind.name()));
        let (cpu, whole, stopped) = (folder("cpu"), folder("whole"), folder("stopped"));
        train(kind, &config, &cpu, false, u64::MAX).expect("a run");
        train_on(place.device, kind, &config, &whole, false, u64::MAX).expect("a run");
        let losses = |out: &Path| -> Vec<f64> {
            let loss = |l: &String| l.split(',').nth(1).expect("loss").parse().expect("a number");
            log(out).iter().skip(1).map(loss).collect()
        };
        // At this learning rate bf16's roundings grow from step to step; hywu-diffusion's tests follow a calmer curve.
        let (a, b) = (losses(&whole), losses(&cpu));
        assert!((a[0] - b[0]).abs() < b[0] / 128.0 && a.len() == b.len(), "{kind:?}: {a:?} {b:?}");
        train_on(place.device, kind, &config, &stopped, false, 3).expect_err("interrupted");
        train_on(place.device, kind, &config, &stopped, true, u64::MAX).expect("a run");
        assert_eq!(log(&whole), log(&stopped), "{kind:?}");
        let state = |out: &Path| fs::read(out.join("state.safetensors")).expect("written");
        assert!(state(&whole) == state(&stopped), "{kind:?}");
        Model::load(whole.join("model")).expect("a model folder");
        if kind == Kind::Full {
            // Nor does it show that steps are timed.
            let timed = folder("timed");
            let mut run = Run::open(kind, &config, &photos(), &timed, false, place.device).expect("a run");
            run.use_profile().expect("a device");
            run.train(&mut |_| ControlFlow::Continue(())).expect("it trains");
            assert!(log(&whole) == log(&timed) && state(&whole) == state(&timed));
            let table = run.profile().expect("asked for").to_string();
            assert!(table.starts_with("5 steps") && table.contains("adamw"), "{table}");
        }
        // Steps as graphs change nothing. With guarded allocations nothing is replayed, but the products are the same kernels'.
        let graphs = |name: &str| {
            let out = folder(name);
            let mut run = Run::open(kind, &config, &photos(), &out, false, place.device).expect("a run");
            run.use_graphs(true);
            run.train(&mut |_| ControlFlow::Continue(())).expect("it trains");
            (log(&out), state(&out), run.replayed())
        };
        let (eager, replayed) = (graphs("eager"), unguarded(|| graphs("replayed")));
        assert_eq!(eager.0, replayed.0, "{kind:?}");
        assert!(eager.1 == replayed.1, "{kind:?}");
        // Of eight steps one is large; the first two of the others warm up and record.
        assert_eq!((eager.2, replayed.2), (0, 5), "{kind:?}");
    }
}

#[test]
fn there_is_nothing_to_time_on_the_cpu() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let mut command = Command::cargo_bin("hywu").expect("built");
    command.args(["train", "backbone", "--device", "cpu", "--profile", "--config"]);
    command.arg(config(dir.path(), 3, None)).arg("--photos").arg(photos());
    let failed = command.arg("--out").arg(dir.path().join("out")).assert().failure();
    failed.stderr(contains("a profile is of a CUDA device; this run is on the CPU"));
}

/// Whoever waits for a batch may be the only thread that works.
#[test]
fn one_thread_feeds_a_device() {
    let Some(place) = places().into_iter().find(|p| p.device != Device::Cpu) else { return };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let mut command = Command::cargo_bin("hywu").expect("built");
    command
        .args(["train", "backbone", "--config"])
        .arg(config(dir.path(), 3, None))
        .arg("--photos")
        .arg(photos());
    command.arg("--out").arg(dir.path().join("out")).args(["--device", &place.device.to_string()]);
    command.env("RAYON_NUM_THREADS", "1").timeout(Duration::from_secs(300)).assert().success();
}

#[test]
fn a_killed_run_goes_on_bit_for_bit() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let start = backbone(dir.path()).join("model");
    for kind in [Kind::Backbone, Kind::Generator, Kind::Lora, Kind::Full] {
        let config = config(dir.path(), 21, (kind != Kind::Backbone).then_some(&start));
        let (whole, cut) = (dir.path().join(kind.name()), dir.path().join(format!("{}-cut", kind.name())));
        train(kind, &config, &whole, false, u64::MAX).expect("a run");
        // "Killed" before the first checkpoint, stopped after 13 steps, "killed" after 17: the state is older than the log.
        train(kind, &config, &cut, false, 4).expect_err("stopped");
        fs::remove_file(cut.join("state.safetensors")).expect("a checkpoint");
        let stopped = train(kind, &config, &cut, true, 13).expect_err("stopped");
        assert!(matches!(stopped.downcast_ref(), Some(hywu_diffusion::Error::Interrupted)), "{stopped:#}");
        let old = fs::read(cut.join("state.safetensors")).expect("a checkpoint");
        train(kind, &config, &cut, true, 17).expect_err("stopped");
        fs::write(cut.join("state.safetensors"), old).expect("writable");
        train(kind, &config, &cut, true, u64::MAX).expect("the rest");
        for file in ["state.safetensors", "model/backbone.safetensors", "loss.svg"] {
            let same =
                fs::read(whole.join(file)).expect("written") == fs::read(cut.join(file)).expect("written");
            assert!(same, "{} {file}", kind.name());
        }
        assert_eq!(log(&whole), log(&cut), "{}", kind.name());
        // What a generator or an adapter is trained through stays as it was; full training changes it.
        let frozen = fs::read(start.join("backbone.safetensors")).expect("written")
            == fs::read(whole.join("model/backbone.safetensors")).expect("written");
        assert_eq!(frozen, matches!(kind, Kind::Generator | Kind::Lora), "{}", kind.name());
        let Model { memory, info, .. } = Model::load(whole.join("model")).expect("a model folder");
        // model.json tells all runs that made the weights.
        let last = format!("{}: step 21 of 21, seed 5", kind.name());
        let runs = if kind == Kind::Backbone {
            vec![last]
        } else {
            vec!["backbone: step 30 of 30, seed 5".into(), last]
        };
        assert_eq!(info.training, runs);
        match kind {
            Kind::Generator => assert!(matches!(memory, Memory::Functional(_))),
            Kind::Lora => assert!(matches!(memory, Memory::Static(_))),
            Kind::Backbone | Kind::Full => assert!(matches!(memory, Memory::None)),
        }
    }
}

/// A folder with one photo only.
fn other_photos(dir: &Path) -> PathBuf {
    let folder = dir.join("other");
    fs::create_dir(&folder).expect("writable");
    fs::copy(photos().join("coffee.png"), folder.join("coffee.png")).expect("writable");
    folder
}

#[test]
fn a_run_goes_on_only_from_the_model_that_it_started_from() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let start = backbone(dir.path()).join("model");
    let (config, out) = (config(dir.path(), 6, Some(&start)), dir.path().join("run"));
    train(Kind::Generator, &config, &out, false, 3).expect_err("stopped");
    let other = Model::load(&start).expect("a model");
    let mut changed = other.backbone.clone();
    changed.params.iter_mut().for_each(|(_, t)| t.data_mut()[0] += 0.5);
    let changed = Model::assemble(changed, Memory::None, other.info).expect("a model");
    changed.save(&start, hywu_core::Dtype::F32).expect("writable");
    let refused = train(Kind::Generator, &config, &out, true, u64::MAX).expect_err("another model");
    assert!(refused.to_string().contains("another model"), "{refused:#}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_training_with_130_and_a_checkpoint() {
    use std::process::{Command as Process, Stdio};
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (config, out) = (config(dir.path(), 1_000_000, None), dir.path().join("run"));
    let mut child = Process::new(assert_cmd::cargo::cargo_bin("hywu"))
        .args(["train", "backbone", "--config"])
        .arg(&config)
        .arg("--photos")
        .arg(photos())
        .arg("--out")
        .arg(&out)
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary starts");
    while !out.join("state.safetensors").exists() {
        assert!(child.try_wait().expect("a child").is_none(), "it ended by itself");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    Process::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill");
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
    hywu_core::Checkpoint::open(out.join("state.safetensors")).expect("whole");
}

/// Killed at any moment, the run's model is a whole one, and the run ends as if nothing had happened.
#[cfg(unix)]
#[test]
fn a_process_that_is_killed_leaves_a_whole_model() {
    use std::process::{Command as Process, Stdio};
    let dir = tempfile::tempdir().expect("a temporary folder");
    let config = config(dir.path(), 6, None);
    // Writing takes most of the time.
    let text = fs::read_to_string(&config)
        .expect("written")
        .replace("checkpoint_every = 10", "checkpoint_every = 1");
    fs::write(&config, text).expect("writable");
    let (whole, killed) = (dir.path().join("whole"), dir.path().join("killed"));
    train(Kind::Backbone, &config, &whole, false, u64::MAX).expect("a run");
    let mut kills = 0;
    // Ever later, so that a slow machine gets on, too.
    for wait in (0..).map(|i| Duration::from_millis(1 + 13 * i)) {
        let known = killed.join("config.toml").exists();
        let mut command = Process::new(assert_cmd::cargo::cargo_bin("hywu"));
        command.args(["train", "backbone", "--config"]).arg(&config).arg("--photos").arg(photos());
        command
            .arg("--out")
            .arg(&killed)
            .args(["--device", "cpu"])
            .args(known.then_some("--resume"))
            .stderr(Stdio::null());
        let changed = || fs::metadata(killed.join("state.safetensors")).and_then(|m| m.modified()).ok();
        let before = changed();
        let mut child = command.spawn().expect("the binary starts");
        // It is killed some time after a checkpoint began to be written.
        while changed() == before && child.try_wait().expect("a child").is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(wait);
        child.kill().expect("a child");
        if child.wait().expect("it ends").success() {
            break;
        }
        kills += 1;
        if killed.join("model").exists() {
            Model::load(killed.join("model")).expect("a whole model");
        }
    }
    assert!(kills >= 3, "{kills} times");
    for file in ["state.safetensors", "model/model.json", "model/backbone.safetensors"] {
        let same =
            fs::read(whole.join(file)).expect("written") == fs::read(killed.join(file)).expect("written");
        assert!(same, "{file}");
    }
    let mut left: Vec<_> =
        fs::read_dir(&killed).expect("readable").map(|e| e.expect("an entry").file_name()).collect();
    left.sort();
    assert_eq!(left, ["config.toml", "log.csv", "loss.svg", "model", "state.safetensors"]);
}

#[test]
fn bad_runs_are_refused_by_name() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let good = config(dir.path(), 2, None);
    let text = fs::read_to_string(&good).expect("written");
    let refused = |kind: &str, config: &Path, photos: &Path, out: &Path, extra: &[&str], message: &str| {
        let mut command = Command::cargo_bin("hywu").expect("built");
        command
            .args(["train", kind, "--config"])
            .arg(config)
            .arg("--photos")
            .arg(photos)
            .arg("--out")
            .arg(out);
        let assert = command.args(extra).assert().code(1).stderr(contains(message));
        let stderr = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
        assert_eq!(stderr.trim_end().lines().count(), 1, "one line, got: {stderr}");
    };
    let (out, photos) = (dir.path().join("out"), photos());
    let with = |from: &str, to: &str| {
        assert!(text.contains(from));
        let file = dir.path().join("bad.toml");
        fs::write(&file, text.replace(from, to)).expect("writable");
        file
    };
    refused("backbone", &dir.path().join("none.toml"), &photos, &out, &[], "none.toml");
    refused("backbone", &with("seed = 5", "speed = 5"), &photos, &out, &[], "speed");
    let long = with("seed = 5", &format!("seed = 5{}", " ".repeat(1 << 20)));
    refused("backbone", &long, &photos, &out, &[], "larger than the 1048576 bytes");
    refused("backbone", &with("steps = 2", "steps = 0"), &photos, &out, &[], "steps is 0");
    refused("backbone", &with("clip = 1.0", "clip = 0.0"), &photos, &out, &[], "clip is 0");
    refused("backbone", &with("\"invert\"", "\"levitate\""), &photos, &out, &[], "levitate");
    refused("backbone", &with("crop = 16", "crop = 17"), &photos, &out, &[], "multiple of 8");
    refused("backbone", &with("head_dim = 8\nmlp", "head_dim = 5\nmlp"), &photos, &out, &[], "head_dim");
    refused("backbone", &good, &dir.path().join("none"), &out, &[], "none");
    refused("backbone", &good, dir.path(), &out, &[], "no PNG, JPEG or WebP");
    refused("generator", &good, &photos, &out, &[], "start_from");
    refused("backbone", &good, &photos, &dir.path().join("new"), &["--resume"], "no run to resume");
    // A finished run is not overwritten, nor taken for another.
    let done = dir.path().join("done");
    train(Kind::Backbone, &good, &done, false, u64::MAX).expect("a run");
    refused("backbone", &good, &photos, &done, &[], "--resume");
    refused(
        "full",
        &with("seed = 5", &format!("seed = 5\nstart_from = {:?}", done.join("model"))),
        &photos,
        &done,
        &["--resume"],
        "backbone",
    );
    refused("backbone", &with("seed = 5", "seed = 6"), &photos, &done, &["--resume"], "another config");
    refused("backbone", &good, &other_photos(dir.path()), &done, &["--resume"], "other photos");
    let state = done.join("state.safetensors");
    let whole = fs::read(&state).expect("written");
    fs::write(&state, &whole[..whole.len() / 2]).expect("writable");
    refused("backbone", &good, &photos, &done, &["--resume"], "state.safetensors");
}
