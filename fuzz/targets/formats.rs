//! Any bytes as an adapter that another program wrote (`Parts`): the header and data of its safetensors file with lengths that agree,
//! PEFT's config if there is one, a module map if there is one. What is taken must be an adapter that this project's own files hold, must
//! be in a file that the `safetensors` crate takes too, and must still be the same operator after a way through diffusers' format.

#![no_main]

use hywu_core::{
    Adapter, Dtype,
    adapter::{ExportOptions, Format, ImportOptions, ModuleMap, Names, export, import, import_bytes},
};
use hywu_fuzz::{Parts, check_error, seeds};
use libfuzzer_sys::fuzz_target;
use safetensors::SafeTensors;
use std::{
    hash::{DefaultHasher, Hash, Hasher},
    path::Path,
    process::exit,
    sync::LazyLock,
};

/// The folder that seeds are written into, instead of a run.
const SEEDS: &str = "HYWU_FUZZ_SEEDS";
/// Adapters are written to the disk for one input of so many, which the input itself decides.
const WRITTEN: u64 = 256;

static FUSED: LazyLock<Names> =
    LazyLock::new(|| Names::fused(&ModuleMap::default()).expect("rules that work"));
static SPLIT: LazyLock<Names> =
    LazyLock::new(|| Names::split(&ModuleMap::default(), Some([2, 1, 1])).expect("rules that work"));
/// Modules that flattened names may stand for; two of them are the same flattened.
static KNOWN: LazyLock<Vec<String>> = LazyLock::new(|| {
    ["m.0.qkv_proj", "m.0_qkv.proj", "m.0.q_proj", "m.0.k_proj", "m.0.v_proj"].map(str::to_owned).to_vec()
});

fuzz_target!(
    init: {
        if let Some(folder) = std::env::var_os(SEEDS) {
            seeds::write(Path::new(&folder)).expect("seeds");
            exit(0);
        }
    },
    |input: &[u8]| {
        let parts = Parts::of(input);
        let file = hywu_fuzz::file(parts.header, parts.data);
        let config = (!parts.config.is_empty()).then_some(parts.config);
        if parts.map.is_empty() {
            for names in [&*FUSED, &*SPLIT] {
                try_names(input, &file, config, names);
            }
        } else if let Ok(map) = toml::from_slice::<ModuleMap>(parts.map) {
            match Names::split(&map, Some([2, 1, 1])) {
                Err(e) => check_error(e),
                Ok(names) => try_names(input, &file, config, &names),
            }
        }
    }
);

fn try_names(input: &[u8], file: &[u8], config: Option<&[u8]>, names: &Names) {
    let mut options = ImportOptions { names, component: None, known: &KNOWN, base: None, partial: false };
    let mut imported = import_bytes("file", file.to_vec(), config, &options);
    if imported.is_err() && config.is_none() {
        // It may have parts for several components.
        options.component = Some("transformer");
        check_error(imported.expect_err("it was one"));
        imported = import_bytes("file", file.to_vec(), config, &options);
    }
    let adapter = match imported {
        Err(e) => return check_error(e),
        Ok(imported) => imported.adapter,
    };
    let theirs = SafeTensors::deserialize(file).expect("a file that the library takes too");
    assert!(theirs.len() >= 2, "a pair");
    adapter.check_pairs().expect("checked");
    assert_eq!(adapter.batch(), 1);
    let mut hash = DefaultHasher::new();
    input.hash(&mut hash);
    if hash.finish().is_multiple_of(WRITTEN) {
        write(&adapter, names);
    }
}

/// Through the files that a program would write of it.
fn write(adapter: &Adapter, names: &Names) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let own = folder.path().join("own");
    adapter.save(&own).expect("writable");
    let read = Adapter::load(&own).expect("what was just written");
    assert_eq!((&read.metadata, read.scale.to_bits()), (&adapter.metadata, adapter.scale.to_bits()));
    assert_same(&read, adapter);
    let path = folder.path().join("theirs");
    let options = ExportOptions {
        format: Format::Diffusers,
        names,
        instance: 0,
        component: None,
        fold_scale: false,
        dtype: Dtype::F32,
    };
    // Its modules may have names or shapes that the rules can't tell.
    match export(adapter, &path, &options) {
        Err(e) => check_error(e),
        Ok(_) => {
            let options = ImportOptions { names, component: None, known: &[], base: None, partial: false };
            let back = import(&path, None, &options).expect("what was just written").adapter;
            assert_eq!(back.scale.to_bits(), adapter.scale.to_bits());
            assert_same(&back, adapter);
        }
    }
}

/// The same modules with the same products B A to the bit; a pair may have come back with other ranks that hold nothing.
fn assert_same(x: &Adapter, y: &Adapter) {
    assert_eq!(x.modules.len(), y.modules.len());
    for (name, lora) in &x.modules {
        let (x, y) = (lora.matrices(0), y.modules.get(name).expect("the same module").matrices(0));
        assert_eq!(x.len(), y.len());
        for (x, y) in x.iter().zip(&y) {
            let product =
                |m: &hywu_core::adapter::Matrices<'_>| m.b.mapv(f64::from).dot(&m.a.mapv(f64::from));
            // Zeros may differ in sign.
            assert_eq!(product(x), product(y), "{name}");
        }
    }
}
