use crate::output::say;
use anyhow::Result;
use clap::Args;
use hywu::model::{Memory, Model};
use hywu_diffusion::TextEncoder;
use hywu_kernels::{Device, Properties};

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
    let (devices, missing) = cuda_devices();
    let kernels = hywu_kernels::cuda_build();
    let backbone = model.backbone.params.numel();
    let generator = match &model.memory {
        Memory::Functional(generators) => generators.all().iter().map(|g| g.params.numel()).sum(),
        Memory::None | Memory::Static(_) => 0,
    };
    let text = TextEncoder::SOURCE;
    let names: Vec<String> =
        [Device::Cpu].iter().chain(devices.iter().map(|(d, _)| d)).map(Device::to_string).collect();
    if args.json {
        let whole = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"), "target": std::env::consts::ARCH, "simd": simd, "threads": threads,
            "devices": names,
            "cuda": {
                "kernels": kernels, "missing": missing,
                "devices": devices.iter().map(|(d, p)| serde_json::json!({
                    "device": d.to_string(), "name": p.name, "capability": [p.capability.0, p.capability.1],
                    "multiprocessors": p.multiprocessors, "memory": p.memory, "driver": [p.driver.0, p.driver.1],
                })).collect::<Vec<_>>(),
            },
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
    if let Some(kernels) = kernels {
        say(format_args!("cuda       kernels by {kernels}"))?;
    }
    for (device, p) in &devices {
        let gib = p.memory as f64 / f64::from(1 << 30);
        let (major, minor) = p.capability;
        let (name, processors, driver) = (&p.name, p.multiprocessors, p.driver);
        say(format_args!(
            "{device:<10} {name}, sm_{major}{minor}, {processors} multiprocessors, {gib:.0} GiB, driver for CUDA {}.{}",
            driver.0, driver.1
        ))?;
    }
    if let Some(missing) = missing {
        say(format_args!("cuda       {missing}"))?;
    }
    say(format_args!("model      {} {}", model.info.name, model.hash))?;
    say(format_args!("           backbone {backbone} parameters, generator {generator}"))?;
    say(format_args!("           licence {}", model.info.licence))?;
    for source in &model.info.data_sources {
        say(format_args!("           trained on {source}"))?;
    }
    say(format_args!("           text: {text}"))
}

/// The CUDA devices that can be used, or why there is none.
fn cuda_devices() -> (Vec<(Device, Properties)>, Option<String>) {
    let mut devices = Vec::new();
    loop {
        let device = Device::Cuda(devices.len());
        match device.properties() {
            Ok(Some(properties)) => devices.push((device, properties)),
            Err(e) if devices.is_empty() => return (devices, Some(e.to_string())),
            Ok(None) | Err(_) => return (devices, None),
        }
    }
}
