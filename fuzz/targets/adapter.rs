//! Any bytes as an adapter's file: as they are, and as the header and data of a file whose lengths agree, which chance seldom finds.
//! The library whose format it is must take every file that we take, and find the same tensors in it.

#![no_main]

use hywu_core::{Adapter, AdapterSpec, Module};
use libfuzzer_sys::fuzz_target;
use safetensors::{Dtype, SafeTensors};

fuzz_target!(|input: &[u8]| {
    try_file(input.to_vec());
    let (header, data) = match input.iter().position(|&b| b == 0) {
        Some(end) => (&input[..end], &input[end + 1..]),
        None => (input, &[][..]),
    };
    try_file(hywu_fuzz::file(header, data));
});

fn try_file(file: Vec<u8>) {
    let adapter = match Adapter::from_bytes("adapter", file.clone()) {
        Err(e) => return hywu_fuzz::check_error(e),
        Ok(adapter) => adapter,
    };
    let theirs = SafeTensors::deserialize(&file).expect("a file that the library takes too");
    assert_eq!(theirs.len(), 2 * adapter.modules.len() + 1);
    for (name, lora) in &adapter.modules {
        for (kind, ours) in [("lora_A", &lora.lora_a), ("lora_B", &lora.lora_b)] {
            let tensor = theirs.tensor(&format!("{name}.{kind}")).expect("the same name");
            assert_eq!(tensor.shape(), ours.shape());
            assert!(ours.iter().all(|x| x.is_finite()));
            if tensor.dtype() == Dtype::F32 {
                let numbers =
                    tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                assert!(ours.iter().map(|x| x.to_bits()).eq(numbers.map(f32::to_bits)));
            }
        }
    }
    // What follows in a program: one of its instances, and whether it fits a model.
    if let Some(first) = adapter.entry(0) {
        assert_eq!(first.batch(), 1);
    }
    let module = Module { path: "q".into(), in_dim: 2, out_dim: 1, experts: None };
    let spec = AdapterSpec { prefix: "l.".into(), layers: 1, rank: 1, alpha: 1.0, modules: vec![module] };
    if let Err(e) = adapter.check(&spec) {
        hywu_fuzz::check_error(e);
    }
}
