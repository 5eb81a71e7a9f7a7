use crate::{
    interrupt,
    output::{complain, say, warn},
    values,
};
use anyhow::{Context, Result, bail};
use clap::{Args, CommandFactory, error::ErrorKind};
use hywu::{
    cache::AdapterCache,
    model::{Memory, Model},
    pipeline::{Edit, EditOptions, Editor, Recalled, fit},
    provenance,
};
use hywu_core::{Adapter, Dtype};
use hywu_diffusion::{Picture, SampleOptions, Sampler, check_output, load_picture, save_picture};
use hywu_kernels::{Device, ops::low_rank_linear::Apply};
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    collections::HashSet,
    ffi::OsString,
    io::IsTerminal,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

/// Edit pictures as an instruction says
#[derive(Args, Debug)]
pub struct EditArgs {
    /// One or more pictures (PNG, JPEG, WebP), then the instruction
    // One value is enough for clap, as options may stand between them.
    #[arg(required = true, num_args = 1.., value_names = ["INPUT", "INSTRUCTION"])]
    inputs_and_instruction: Vec<OsString>,
    /// Write the edited picture here (.png, .jpg, .webp)
    #[arg(
        short,
        long,
        value_name = "FILE",
        conflicts_with = "output_dir",
        required_unless_present = "output_dir"
    )]
    output: Option<PathBuf>,
    /// Write the edited pictures into this folder, under their own names
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Seed of the noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Sampling steps
    #[arg(long, default_value_t = SampleOptions::default().steps, value_name = "N", value_parser = values::steps)]
    steps: usize,
    /// Sampling method
    #[arg(long, value_enum, default_value = "euler")]
    sampler: SamplerArg,
    /// Factor on the adapter; 0 is the backbone's own output
    #[arg(long, default_value_t = 1.0, value_name = "F", allow_negative_numbers = true, value_parser = values::finite)]
    strength: f32,
    /// How the adapter is applied: in every call, merged into the weights, or whichever takes less time. The pictures differ by
    /// rounding alone, which on the CPU does not show
    #[arg(long, value_enum, default_value = "fused")]
    apply: ApplyArg,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: Device,
    /// The model: `bundled`, or a model folder
    #[arg(long, default_value = "bundled", value_name = "bundled|DIR")]
    model: String,
    /// Keep the generated adapter (safetensors)
    #[arg(long, value_name = "FILE")]
    save_adapter: Option<PathBuf>,
    /// Use this adapter instead of generating one
    #[arg(long, value_name = "FILE")]
    adapter: Option<PathBuf>,
    /// Apply what fits of that adapter, though it lacks modules of the model or has others
    #[arg(long, requires = "adapter")]
    allow_partial: bool,
    /// Use the adapter that this other picture gets with the instruction
    #[arg(long, value_name = "PICTURE", conflicts_with = "adapter")]
    adapter_from: Option<PathBuf>,
    /// Keep generated adapters in this folder, and look there before one is generated
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Most that the cache may take, such as 500MB or 2GiB [default: 1GB]; the least recently used adapters make room
    #[arg(long, value_name = "SIZE", requires = "cache", value_parser = values::bytes)]
    cache_size: Option<u64>,
    /// Also write before | after side by side
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// Side of the square tiles in pixels, a multiple of 8
    #[arg(long, value_name = "N", default_value_t = SampleOptions::default().tile, value_parser = values::tile)]
    tile: usize,
    /// No progress, no messages but errors
    #[arg(long)]
    quiet: bool,
    /// Print one JSON object per picture on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum SamplerArg {
    /// One evaluation a step
    Euler,
    /// Two evaluations a step, second order
    Heun,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum ApplyArg {
    /// Whichever takes less time
    Auto,
    /// In every call, beside the weights
    Fused,
    /// Merged into a copy of the weights
    Merged,
}

/// Ends the process with exit code 2 and clap's own wording.
fn usage(message: impl std::fmt::Display) -> ! {
    crate::Cli::command().error(ErrorKind::ArgumentConflict, message).exit()
}

impl EditArgs {
    /// Options that don't go together end the process.
    fn check_usage(&self, inputs: &[OsString]) {
        if self.save_adapter.is_some() && self.adapter.is_none() && self.strength == 0.0 {
            usage("--save-adapter: at --strength 0 no adapter is generated");
        }
        if inputs.len() > 1 {
            for (name, given) in [
                ("--output", self.output.is_some()),
                ("--compare", self.compare.is_some()),
                ("--save-adapter", self.save_adapter.is_some()),
            ] {
                if given {
                    usage(format!(
                        "{name} takes one picture; {} were given (use --output-dir)",
                        inputs.len()
                    ));
                }
            }
        }
    }

    /// Input -> output, every file to write checked before any work.
    fn plan(&self, inputs: &[OsString]) -> Result<Vec<(PathBuf, PathBuf)>> {
        let mut plan = Vec::new();
        for input in inputs {
            let input = PathBuf::from(input);
            let output = match (&self.output, &self.output_dir) {
                (Some(file), _) => file.clone(),
                (None, Some(dir)) => {
                    let name =
                        input.file_name().with_context(|| format!("{}: no file name", input.display()))?;
                    let name = Path::new(name);
                    let known = name.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
                    let keep = known.is_some_and(|e| ["png", "jpg", "jpeg", "webp"].contains(&e.as_str()));
                    dir.join(if keep { name.to_owned() } else { name.with_extension("png") })
                }
                (None, None) => usage("--output or --output-dir is needed"),
            };
            plan.push((input, output));
        }
        if let Some(dir) = &self.output_dir {
            std::fs::create_dir_all(dir)
                .with_context(|| format!("{}: can't make the folder", dir.display()))?;
        }
        for output in plan.iter().map(|(_, output)| output).chain(&self.compare) {
            check_output(output)?;
        }
        if let Some(file) = &self.save_adapter {
            let folder = file.parent().filter(|p| !p.as_os_str().is_empty());
            if file.is_dir() || folder.is_some_and(|f| !f.is_dir()) {
                bail!("{}: no file can be written here", file.display());
            }
        }
        // Nothing is written over what is read, nor twice.
        let mut taken: HashSet<PathBuf> = plan.iter().map(|(input, _)| same_file(input)).collect();
        taken.extend(self.adapter.iter().chain(&self.adapter_from).map(|file| same_file(file)));
        for file in plan.iter().map(|(_, output)| output).chain(&self.compare).chain(&self.save_adapter) {
            if !taken.insert(same_file(file)) {
                bail!("{}: this would be written over the same file of this call", file.display());
            }
        }
        Ok(plan)
    }

    fn options(&self) -> EditOptions {
        let sampler = match self.sampler {
            SamplerArg::Euler => Sampler::Euler,
            SamplerArg::Heun => Sampler::Heun,
        };
        let apply = match self.apply {
            ApplyArg::Auto => Apply::Auto,
            ApplyArg::Fused => Apply::Fused,
            ApplyArg::Merged => Apply::Merged,
        };
        let (seed, steps) = (self.seed, self.steps);
        let sample = SampleOptions { seed, steps, sampler, apply, ..SampleOptions::default() };
        let sample = sample.with_tile(self.tile);
        EditOptions { strength: self.strength, partial: self.allow_partial, sample }
    }

    /// The adapter of `--adapter`. One that does not fit is told before any work.
    fn given(&self, model: &Model) -> Result<Option<Recalled>> {
        let Some(file) = &self.adapter else { return Ok(None) };
        let adapter = Adapter::load(file)?;
        let (_, found) = fit(&adapter, model, &self.options()).with_context(|| file.display().to_string())?;
        if !found.is_complete() && !self.quiet {
            warn(format_args!("{}: {found}", file.display()));
        }
        Ok(Some(adapter.into()))
    }

    /// The adapter of `--adapter-from`.
    fn borrowed(&self, editor: &Editor, instruction: &str) -> Result<Option<Recalled>> {
        let Some(file) = self.adapter_from.as_ref().filter(|_| self.strength != 0.0) else { return Ok(None) };
        let other = load_picture(file)?;
        editor.recall(&other, instruction, self.seed).with_context(|| file.display().to_string())
    }
}

/// One name for a file, whether it is there already or not.
fn same_file(path: &Path) -> PathBuf {
    let beside = || {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Some(folder.canonicalize().ok()?.join(path.file_name()?))
    };
    path.canonicalize().ok().or_else(beside).unwrap_or_else(|| path.to_owned())
}

/// Runs `hywu edit`.
pub fn run(mut args: EditArgs) -> Result<()> {
    let Some(instruction) = args.inputs_and_instruction.pop() else { usage("an instruction is needed") };
    let Ok(instruction) = instruction.into_string() else { usage("the instruction is not UTF-8 text") };
    let inputs = std::mem::take(&mut args.inputs_and_instruction);
    if inputs.is_empty() {
        usage("a picture and, last, an instruction are needed");
    }
    args.check_usage(&inputs);
    if instruction.trim().is_empty() {
        bail!("the instruction is empty; say what to change, for example \"make it warmer\"");
    }
    args.device.check()?;
    interrupt::install()?;
    let options = args.options();
    options.sample.validate()?;
    let model = Model::named(&args.model)?;
    let given = args.given(&model)?;
    if args.save_adapter.is_some() && given.is_none() && matches!(model.memory, Memory::None) {
        bail!("--save-adapter: the model {} generates no adapters, it is a backbone only", args.model);
    }
    if args.adapter_from.is_some() && !matches!(model.memory, Memory::Functional(_)) {
        bail!("--adapter-from: the model {} generates no adapters, it has no generator", args.model);
    }
    let plan = args.plan(&inputs)?;
    let mut editor = Editor::new(model.to(args.device, Dtype::Bf16)?);
    if let Some(folder) = &args.cache {
        let limit = args.cache_size.unwrap_or(AdapterCache::LIMIT);
        editor = editor.with_cache(AdapterCache::new(folder, limit));
    }
    let mut warnings = Warnings { quiet: args.quiet, told: HashSet::new() };
    let adapter = given.or(args.borrowed(&editor, &instruction)?);
    warnings.tell(adapter.iter().flat_map(|recalled| &recalled.warnings));
    let job = Job {
        args: &args,
        editor: &editor,
        instruction: &instruction,
        adapter: adapter.as_ref(),
        options: &options,
    };
    let mut failed = 0;
    for (input, output) in &plan {
        match job.edit(input, output, &mut warnings) {
            Ok(()) => {}
            // With several pictures a bad one does not cost the others.
            Err(e) if plan.len() > 1 && !interrupt::requested() => {
                complain(&e);
                failed += 1;
            }
            Err(e) => return Err(e),
        }
    }
    if failed > 0 {
        bail!("{failed} of {} pictures failed", plan.len());
    }
    Ok(())
}

/// Warnings are told once: what fails for one picture may fail for all.
struct Warnings {
    quiet: bool,
    told: HashSet<String>,
}

impl Warnings {
    fn tell<'a>(&mut self, warnings: impl IntoIterator<Item = &'a String>) {
        for warning in warnings {
            if !self.quiet && self.told.insert(warning.clone()) {
                warn(warning);
            }
        }
    }
}

/// What the pictures of a call have in common.
struct Job<'a> {
    args: &'a EditArgs,
    editor: &'a Editor,
    instruction: &'a str,
    /// Instead of one of the picture's own.
    adapter: Option<&'a Recalled>,
    options: &'a EditOptions,
}

impl Job<'_> {
    fn edit(&self, input: &Path, output: &Path, warnings: &mut Warnings) -> Result<()> {
        let Self { args, editor, instruction, adapter, options } = *self;
        let picture = load_picture(input)?;
        let bar = progress_bar(args.quiet, &input.display().to_string());
        let given = adapter.map(|recalled| &recalled.adapter);
        let edit = editor.edit(&picture, instruction, given, options, &mut |step, steps| {
            bar.set_length(steps as u64);
            bar.set_position(step as u64);
            if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        bar.finish_and_clear();
        let edit = edit.with_context(|| input.display().to_string())?;
        warnings.tell(edit.adapter.iter().flat_map(|recalled| &recalled.warnings));
        let model = editor.model();
        let mut text = vec![
            ("Software".to_owned(), provenance::PROGRAM.to_owned()),
            ("hywu:instruction".to_owned(), instruction.to_owned()),
            ("hywu:seed".to_owned(), args.seed.to_string()),
            ("hywu:steps".to_owned(), args.steps.to_string()),
            ("hywu:strength".to_owned(), args.strength.to_string()),
            ("hywu:model".to_owned(), format!("{} {}", model.info.name, model.hash)),
        ];
        let borrowed = given.filter(|_| args.adapter_from.is_some());
        if let Some(source) = borrowed.and_then(|adapter| adapter.metadata.get(provenance::SOURCE_HASH)) {
            text.push(("hywu:adapter_from".to_owned(), source.clone()));
        }
        save_picture(output, &edit.picture, &text)?;
        if let Some(file) = &args.compare {
            save_picture(file, &Picture::side_by_side(&picture, &edit.picture), &text)?;
        }
        if let (Some(file), Some(recalled)) = (&args.save_adapter, &edit.adapter) {
            recalled.adapter.save(file)?;
        }
        self.report(input, output, &edit)
    }

    fn report(&self, input: &Path, output: &Path, edit: &Edit) -> Result<()> {
        let args = self.args;
        let (generating, sampling) = (edit.generating.as_secs_f64(), edit.sampling.as_secs_f64());
        // A borrowed adapter was recalled before this edit.
        let origin = self.adapter.or(edit.adapter.as_ref()).map(|recalled| recalled.origin);
        if args.json {
            let line = serde_json::json!({
                "input": input.to_string_lossy(), "output": output.to_string_lossy(), "instruction": self.instruction,
                "width": edit.picture.width, "height": edit.picture.height,
                "seed": args.seed, "steps": args.steps, "strength": args.strength,
                "adapter": origin.map(|origin| origin.to_string()),
                "adapter_from": args.adapter_from.as_ref().map(|file| file.to_string_lossy()),
                "generating_s": generating, "sampling_s": sampling, "mean_change": edit.change,
            });
            say(line)?;
        } else if !args.quiet {
            let adapter = match (origin, &args.adapter_from) {
                (None, _) => "no adapter".to_owned(),
                (Some(origin), Some(file)) => format!("adapter {origin} for {}", file.display()),
                (Some(origin), None) => format!("adapter {origin} in {generating:.2} s"),
            };
            eprintln!(
                "{}: {}x{}, mean change {:.1}/255, {adapter}, sampling {sampling:.2} s",
                output.display(),
                edit.picture.width,
                edit.picture.height,
                edit.change
            );
        }
        Ok(())
    }
}

fn progress_bar(quiet: bool, name: &str) -> ProgressBar {
    if quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} [{bar:30}] step {pos}/{len}, {eta} left")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(1).with_style(style).with_message(name.to_owned())
}
