//! Adapters as this project itself writes them for other programs, to start `formats` with.

use crate::Parts;
use hywu_core::{
    Adapter, Dtype, Lora, Philox,
    adapter::{ExportOptions, Format, ModuleMap, Names, export},
};
use ndarray::ArrayD;
use std::{fs, io, path::Path};

/// A map with every kind of rule.
pub const MAP: &str = r#"[[module]]
ours = "l.{n}.qkv"
theirs = ["b.{n}.q", "b.{n}.k", "b.{n}.v"]
rows = [2, 1, 1]
[[module]]
ours = "l.{n}.o"
theirs = "b.{n}.out.0"
[[module]]
ours = ["l.{n}.gate", "l.{n}.up"]
theirs = "b.{n}.ff"
[[module]]
ours = "l.{n}.w"
theirs = "b.{n}.moe.{expert}"
"#;

/// Writes an input for each format, dtype and layout into `folder`.
///
/// # Errors
/// A folder that can't be written, or an adapter that can't be told.
pub fn write(folder: &Path) -> io::Result<()> {
    let fail = |e: hywu_core::Error| io::Error::other(e.to_string());
    let map = toml::from_str(MAP).map_err(io::Error::other)?;
    let (none, scratch) = (ModuleMap::default(), tempfile::tempdir()?);
    let published = [
        ("qkv_proj", 2, &[1][..], [3, 4]),
        ("experts.w3", 1, &[1, 2], [3, 2]),
        ("experts.w1", 2, &[1, 2], [3, 2]),
    ];
    let own = [
        ("qkv", 1, &[1][..], [2, 4]),
        ("o", 2, &[1], [4, 2]),
        ("gate", 1, &[1], [2, 3]),
        ("up", 1, &[1], [2, 3]),
        ("w", 1, &[1, 2], [2, 2]),
    ];
    for (layout, names, made, text) in [
        ("fused", Names::fused(&none), adapter("m.0.", &published), ""),
        ("split", Names::split(&none, Some([2, 1, 1])), adapter("m.0.", &published[..1]), ""),
        ("map", Names::fused(&map), adapter("l.0.", &own), MAP),
    ] {
        let names = names.map_err(fail)?;
        for format in [Format::Peft, Format::Kohya, Format::Diffusers] {
            for dtype in [Dtype::F32, Dtype::Bf16] {
                let name = format!("{format:?}-{layout}-{dtype:?}").to_lowercase();
                let path = scratch.path().join(&name);
                let options = ExportOptions {
                    format,
                    names: &names,
                    instance: 0,
                    component: None,
                    fold_scale: false,
                    dtype,
                };
                export(&made, &path, &options).map_err(fail)?;
                let (tensors, config) = match format {
                    Format::Peft => (
                        fs::read(path.join("adapter_model.safetensors"))?,
                        compact(&fs::read(path.join("adapter_config.json"))?)?,
                    ),
                    _ => (fs::read(path)?, Vec::new()),
                };
                let (length, rest) =
                    tensors.split_first_chunk().ok_or_else(|| io::Error::other("no header"))?;
                let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
                fs::write(
                    folder.join(name),
                    Parts { header, config: &config, map: text.as_bytes(), data }.join(),
                )?;
            }
        }
    }
    Ok(())
}

/// JSON without spaces.
fn compact(text: &[u8]) -> io::Result<Vec<u8>> {
    Ok(serde_json::to_vec(&serde_json::from_slice::<serde_json::Value>(text)?)?)
}

/// Modules: name, rank, [batch] or [batch, experts], [in, out].
fn adapter(prefix: &str, modules: &[(&str, usize, &[usize], [usize; 2])]) -> Adapter {
    let random = |lead: &[usize], matrix: [usize; 2], stream: usize| {
        let shape: Vec<usize> = lead.iter().copied().chain(matrix).collect();
        let mut values = vec![0.0; shape.iter().product()];
        Philox::new(1).fill_normal(stream as u64, 0, &mut values);
        ArrayD::from_shape_vec(shape, values).expect("as many")
    };
    let module = |(i, &(name, rank, lead, [inner, outer])): (usize, &(&str, usize, &[usize], [usize; 2]))| {
        let lora = Lora {
            lora_a: random(lead, [rank, inner], 2 * i),
            lora_b: random(lead, [outer, rank], 2 * i + 1),
        };
        (format!("{prefix}{name}"), lora)
    };
    Adapter {
        modules: modules.iter().enumerate().map(module).collect(),
        scale: 1.5,
        metadata: Default::default(),
    }
}
