use super::claims;
use crate::{interrupt, output::say, values};
use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use hywu::{
    eval::{EvalOptions, Sample, SkillReport, evaluate},
    model::Model,
    pipeline::{EditOptions, Editor},
};
use hywu_core::Dtype;
use hywu_diffusion::{Picture, SampleOptions, check_output, load_picture, save_picture, skills::Skill};
use hywu_kernels::Device;
use std::path::PathBuf;

/// Measure a model on photos and phrasings that it was not trained on
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct EvalArgs {
    #[command(subcommand)]
    command: Option<EvalCommand>,
    /// The model: `bundled`, or a model folder
    #[arg(long, default_value = "bundled", value_name = "bundled|DIR")]
    model: String,
    /// Folder of photos that were not trained on
    #[arg(long, default_value = "assets/samples", value_name = "DIR")]
    photos: PathBuf,
    /// Only these skills, by name
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    skills: Vec<String>,
    /// Side of the pictures in pixels
    #[arg(long, default_value_t = 256, value_name = "N")]
    side: usize,
    /// Seed of the examples and of the noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Sampling steps
    #[arg(long, default_value_t = SampleOptions::default().steps, value_name = "N", value_parser = values::steps)]
    steps: usize,
    /// Side of the square tiles in pixels, a multiple of 8
    #[arg(long, value_name = "N", default_value_t = SampleOptions::default().tile)]
    tile: usize,
    /// Factor on the adapter; 0 measures the backbone alone
    #[arg(long, default_value_t = 1.0, value_name = "F", allow_negative_numbers = true, value_parser = values::finite)]
    strength: f32,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: Device,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Write a contact sheet: source | edit | truth, one per skill in the table's order, four a row (.png, .jpg, .webp)
    #[arg(long, value_name = "FILE")]
    sheet: Option<PathBuf>,
}

#[derive(Subcommand, Debug)]
enum EvalCommand {
    Claims(claims::ClaimsArgs),
}

/// Source-edit-truth triples side by side in the contact sheet.
const COLUMNS: usize = 4;
/// Side of the pictures in it.
const THUMB: usize = 128;

/// Runs `hywu eval`.
pub fn run(args: &EvalArgs) -> Result<()> {
    if let Some(EvalCommand::Claims(args)) = &args.command {
        return claims::run(args);
    }
    args.device.check()?;
    interrupt::install()?;
    if let Some(file) = &args.sheet {
        check_output(file)?;
    }
    if !(64..=4096).contains(&args.side) {
        bail!("--side is {}, expected 64..=4096", args.side);
    }
    let mut options = EvalOptions { side: args.side, seed: args.seed, ..EvalOptions::default() };
    if !args.skills.is_empty() {
        options.skills.clear();
        for name in &args.skills {
            let Some(index) = Skill::find(name) else {
                bail!("no skill is called {name:?}; the table lists them")
            };
            options.skills.push(index);
        }
    }
    let sample =
        SampleOptions { seed: args.seed, steps: args.steps, ..SampleOptions::default() }.with_tile(args.tile);
    sample.validate()?;
    options.edit = EditOptions { strength: args.strength, sample, ..EditOptions::default() };
    let mut files: Vec<PathBuf> = std::fs::read_dir(&args.photos)
        .map_err(|e| hywu_core::Error::io(&args.photos, e))?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|p| check_output(p).is_ok())
        .collect();
    files.sort();
    if files.is_empty() {
        bail!("{}: no PNG, JPEG or WebP pictures in this folder", args.photos.display());
    }
    let photos = files.iter().map(load_picture).collect::<hywu_diffusion::Result<Vec<Picture>>>()?;
    let editor = Editor::new(Model::named(&args.model)?.to(args.device, Dtype::Bf16)?);
    let mut triples = Vec::new();
    if !args.json {
        say("| skill | PSNR | SSIM | no-op PSNR | gain | seam | right skill | others taken for |")?;
        say("|---|---|---|---|---|---|---|---|")?;
    }
    let mut finished = |report: &SkillReport, sample: Sample| {
        if args.sheet.is_some() {
            triples.push(sample.pictures);
        }
        if args.json { Ok(()) } else { say(row(report)) }
    };
    let reports = evaluate(&editor, &photos, &options, &interrupt::requested, &mut finished)?;
    let (right, asked) = reports.iter().fold((0, 0), |(r, a), s| (r + s.right, a + s.asked));
    if args.json {
        let whole = serde_json::json!({
            "model": editor.model().info.name, "hash": editor.model().hash, "photos": files.iter().map(|f| f.to_string_lossy()).collect::<Vec<_>>(), "side": args.side,
            "seed": args.seed, "steps": args.steps, "strength": args.strength, "right": right, "asked": asked,
            "skills": reports,
        });
        say(serde_json::to_string_pretty(&whole)?)?;
    } else {
        say(format_args!("\n{right} of {asked} held-out phrasings were taken for the right skill."))?;
    }
    if let Some(file) = &args.sheet {
        save_picture(file, &sheet(&triples), &[])?;
    }
    Ok(())
}

fn row(r: &SkillReport) -> String {
    let number = |v: Option<f64>, digits: usize| v.map_or("-".into(), |v| format!("{v:.digits$}"));
    let gain = r.psnr.zip(r.noop_psnr).map_or("-".into(), |(edit, noop)| format!("{:+.1}", edit - noop));
    let mut others: Vec<&str> = r.taken_for.clone();
    others.sort_unstable();
    others.dedup();
    format!(
        "| {} | {} | {:.3} | {} | {gain} | {} | {}/{} | {} |",
        r.skill,
        number(r.psnr, 1),
        r.ssim,
        number(r.noop_psnr, 1),
        number(r.seam, 2),
        r.right,
        r.asked,
        others.join(", ")
    )
}

/// All triples on a white sheet.
fn sheet(triples: &[[Picture; 3]]) -> Picture {
    let cells: Vec<Picture> = triples
        .iter()
        .map(|t| {
            let [a, b, c] = t.each_ref().map(|p| p.resize(THUMB, THUMB));
            Picture::side_by_side(&Picture::side_by_side(&a, &b), &c)
        })
        .collect();
    let (height, width) = (THUMB + 8, cells.iter().map(|c| c.width).max().unwrap_or(0) + 12);
    let rows = cells.len().div_ceil(COLUMNS);
    let mut rgb = vec![1.0; rows * height * COLUMNS * width * 3];
    for (i, cell) in cells.iter().enumerate() {
        for y in 0..cell.height {
            let at = ((i / COLUMNS * height + y) * COLUMNS * width + i % COLUMNS * width) * 3;
            let line = &cell.rgb[y * cell.width * 3..(y + 1) * cell.width * 3];
            rgb[at..at + line.len()].copy_from_slice(line);
        }
    }
    Picture::from_rgb(rows * height, COLUMNS * width, rgb)
}
