use super::{instance, names::NameArgs, sign};
use crate::output::warn;
use anyhow::{Context, Result};
use clap::Args;
use hywu::model::Model;
use hywu_core::{
    Adapter, Dtype,
    adapter::{Base, ExportOptions, Format, ImportOptions, Imported, export as write, import as read},
    some_of,
};
use std::path::PathBuf;

/// Write an adapter in another program's format
#[derive(Args, Debug)]
pub struct ExportArgs {
    /// The adapter
    file: PathBuf,
    /// Whose format: a folder for PEFT, a file for the others
    #[arg(long, value_enum)]
    format: FormatArg,
    /// The folder or file to write
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
    #[command(flatten)]
    names: NameArgs,
    /// The part of a pipeline it is for, not for PEFT: transformer (diffusers) and unet (kohya) if not given
    #[arg(long, value_name = "NAME")]
    component: Option<String>,
    /// Multiply the scale into the tensors, for programs that don't look for it
    #[arg(long)]
    fold_scale: bool,
    /// Type of the values
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DtypeArg,
    /// Which instance, for a batch
    #[arg(long, value_name = "N")]
    instance: Option<usize>,
}

/// Read an adapter that PEFT, kohya or diffusers wrote
#[derive(Args, Debug)]
pub struct ImportArgs {
    /// A PEFT folder, or a safetensors file
    path: PathBuf,
    /// Whose format; told by the names in it if not given
    #[arg(long, value_enum)]
    format: Option<FormatArg>,
    /// The safetensors file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    names: NameArgs,
    /// The part of a pipeline to take, where there are several
    #[arg(long, value_name = "NAME")]
    component: Option<String>,
    /// The checkpoint that it is for, a file or a folder: the adapter must cover it, and kohya's flattened names are those of its
    /// modules. If not given, they are those of the bundled backbone or of the module map, and nothing is compared
    #[arg(long, value_name = "CHECKPOINT")]
    base: Option<PathBuf>,
    /// Take it though it has modules that the checkpoint lacks, or leaves out some of its layers or experts
    #[arg(long, requires = "base")]
    allow_partial: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum FormatArg {
    /// PEFT: adapter_config.json and adapter_model.safetensors
    Peft,
    /// kohya: lora_down, lora_up, alpha; flattened names
    Kohya,
    /// diffusers: one file, config in the metadata
    Diffusers,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum DtypeArg {
    /// Nothing is lost
    F32,
    /// Rounded
    F16,
    /// Rounded
    Bf16,
}

impl FormatArg {
    fn format(self) -> Format {
        match self {
            Self::Peft => Format::Peft,
            Self::Kohya => Format::Kohya,
            Self::Diffusers => Format::Diffusers,
        }
    }
}

/// Runs `hywu adapter export`.
pub fn export(args: &ExportArgs) -> Result<()> {
    let adapter = Adapter::load(&args.file)?;
    let names = args.names.names()?;
    let options = ExportOptions {
        format: args.format.format(),
        names: &names,
        instance: instance(&adapter, args.instance)?,
        component: args.component.as_deref(),
        fold_scale: args.fold_scale,
        dtype: match args.dtype {
            DtypeArg::F32 => Dtype::F32,
            DtypeArg::F16 => Dtype::F16,
            DtypeArg::Bf16 => Dtype::Bf16,
        },
    };
    let modules = write(&adapter, &args.output, &options).with_context(|| args.file.display().to_string())?;
    eprintln!("{}: {modules} modules", args.output.display());
    Ok(())
}

/// Runs `hywu adapter import`.
pub fn import(args: &ImportArgs) -> Result<()> {
    let names = args.names.names()?;
    let base = args.base.as_ref().map(Base::open).transpose()?;
    let mut known: Vec<String> = match &base {
        Some(base) => base.modules().map(str::to_owned).collect(),
        None => Model::bundled()?.backbone.adapter_spec(1, 1.0).module_names().collect(),
    };
    // A file may have a module for each part of what is fused in the backbone.
    known.extend(names.plain_targets(known.iter().map(String::as_str)));
    let options = ImportOptions {
        names: &names,
        component: args.component.as_deref(),
        known: &known,
        base: base.as_ref(),
        partial: args.allow_partial,
    };
    let Imported { mut adapter, coverage, absent } =
        read(&args.path, args.format.map(FormatArg::format), &options)?;
    if !adapter.metadata.contains_key("program") {
        sign(&mut adapter);
    }
    adapter.save(&args.output)?;
    if let Some(found) = coverage.filter(|found| !found.is_complete()) {
        warn(format_args!("{}: {found}", args.path.display()));
    }
    eprintln!("{}: {} modules, scale {}", args.output.display(), adapter.modules.len(), adapter.scale);
    if !absent.is_empty() {
        eprintln!("{}: zeros for parts that it does not adapt: {}", args.output.display(), some_of(&absent));
    }
    Ok(())
}
