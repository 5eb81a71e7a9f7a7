use crate::output::say;
use anyhow::Result;
use clap::Args;
use hywu::model::{Memory, Model};
use hywu_diffusion::TextEncoder;
use hywu_kernels::Device;

/// Show the version, the devices and the bundled model
#[derive(Args, Debug)]
pub struct InfoArgs {
    /// Print JSON on standard output
    #[arg(long)]
    json: bool,
}

/// Runs `hywu info`.
pub fn run(args: &InfoArgs) -> Result<()> {
    let model = Model::bundled()?;
    let simd = hywu_kernels::simd_level();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let cuda = match Device::Cuda(0).check() {
        Ok(_) => "cuda:0".to_owned(),
        Err(e) => e.to_string(),
    };
    let backbone = model.backbone.params.numel();
    let generator = match &model.memory {
        Memory::Functional(generator) => generator.params.numel(),
        Memory::None | Memory::Static(_) => 0,
    };
    let text = TextEncoder::SOURCE;
    if args.json {
        let whole = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"), "target": std::env::consts::ARCH, "simd": simd, "threads": threads,
            "devices": ["cpu"], "cuda": cuda,
            "model": {
                "hash": model.hash, "backbone_parameters": backbone, "generator_parameters": generator,
                "info": model.info, "text": text,
            },
        });
        return say(serde_json::to_string_pretty(&whole)?);
    }
    say(format_args!("hywu {}", env!("CARGO_PKG_VERSION")))?;
    say(format_args!("build      {} {}", std::env::consts::ARCH, std::env::consts::OS))?;
    say(format_args!("devices    cpu ({threads} threads, {simd})"))?;
    say(format_args!("cuda       {cuda}"))?;
    say(format_args!("model      {} {}", model.info.name, model.hash))?;
    say(format_args!("           backbone {backbone} parameters, generator {generator}"))?;
    say(format_args!("           licence {}", model.info.licence))?;
    for source in &model.info.data_sources {
        say(format_args!("           trained on {source}"))?;
    }
    say(format_args!("           text: {text}"))
}
