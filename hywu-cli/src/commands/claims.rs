use crate::{interrupt, output::say, progress::Parts};
use anyhow::Result;
use clap::Args;
use hywu::{
    claims::{
        Watch, html, measure,
        report::{Interval, Report},
        settings::Settings,
    },
    model::Model,
};
use hywu_kernels::Device;
use std::path::PathBuf;

/// Train HY-WU and what it is compared with from one frozen backbone, and measure what the paper claims
///
/// Everything that is finished stays in the folder; the same command goes on where it was stopped.
#[derive(Args, Debug)]
pub struct ClaimsArgs {
    /// The model whose backbone is frozen: `bundled`, or a model folder. Default: one that is trained for it first, as [backbone] of the
    /// settings says, and does not know the skills; where they say nothing, `bundled`
    #[arg(long, value_name = "bundled|DIR")]
    model: Option<String>,
    /// Settings (TOML; the default is assets/configs/claims.toml)
    #[arg(long, value_name = "FILE", conflicts_with = "quick")]
    config: Option<PathBuf>,
    /// The small settings of assets/configs/claims-quick.toml: about twelve minutes on two cores
    #[arg(long)]
    quick: bool,
    /// Folder of photos to train on (scripts/fetch_photos.sh makes one); the last four by name choose the learning rates
    #[arg(long, default_value = "photos/train", value_name = "DIR")]
    photos: PathBuf,
    /// Folder of photos that measure
    #[arg(long, default_value = "photos/heldout", value_name = "DIR")]
    heldout: PathBuf,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: Device,
    /// Folder of the measurement: report.html, report.json, pictures, adapters, and the parts that are finished
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Runs `hywu eval claims`.
pub fn run(args: &ClaimsArgs) -> Result<()> {
    let device = args.device.check()?;
    interrupt::install()?;
    let settings = match &args.config {
        Some(file) => Settings::read(file)?,
        None => Settings::parse(if args.quick { Settings::QUICK } else { Settings::FULL })?,
    };
    let parts = Parts::new();
    let tell = |what: &str, done: u64, total: u64| parts.at(what, "", done, total);
    let watch = Watch { stop: &interrupt::requested, tell: &tell };
    let model = args.model.as_ref().map(Model::named).transpose()?;
    let report = measure(&settings, model.as_ref(), &args.photos, &args.heldout, &args.out, device, watch);
    parts.finish();
    print(&report?)?;
    eprintln!("done: {}", args.out.join(html::FILE).display());
    Ok(())
}

/// The summary, and the methods side by side.
fn print(report: &Report) -> Result<()> {
    let digits = |i: &Interval, n: usize| format!("{:.n$} [{:.n$}, {:.n$}]", i.mean, i.lo, i.hi);
    let with = |i: &Interval| digits(i, 2);
    say("| method | parameters | PSNR, dB | SSIM | distance | HY-WU wins |")?;
    say("|---|--:|---|---|---|---|")?;
    for method in &report.methods {
        let all = |s: &&hywu::claims::report::ScoreRow| s.method == method.method && s.skill.is_none();
        let Some(score) = report.quality.scores.iter().find(all) else { continue };
        let wins = report.quality.wins.iter().find(|w| w.against == method.method);
        say(format_args!(
            "| {} | {} | {} | {} | {} | {} |",
            method.label,
            method.parameters,
            with(&score.psnr),
            digits(&score.ssim, 3),
            digits(&score.distance, 3),
            wins.map_or("-".into(), |w| with(&w.good))
        ))?;
    }
    let s = &report.summary;
    say("\n| summary | mean and 95 % interval |\n|---|---|")?;
    for (name, value) in [
        ("HY-WU over the better shared LoRA, dB", &s.hywu_vs_shared_lora_db),
        ("HY-WU over full fine-tuning, dB", &s.hywu_vs_full_db),
        ("pairs that HY-WU wins against these", &s.hywu_win_rate),
        ("lost with an adapter of another skill, dB", &s.shuffled_loss_db),
        ("lost with the mean adapter, dB", &s.averaged_loss_db),
        ("cosine of conflicting gradients", &s.conflict_cosine),
        ("forgotten, dB", &s.forgetting_db),
        ("held-out phrasings taken for the right skill", &s.phrasing_accuracy),
    ] {
        say(format_args!("| {name} | {} |", value.as_ref().map_or("not measured".into(), with)))?;
    }
    Ok(())
}
