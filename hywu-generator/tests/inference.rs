//! Passes without gradients: neither the number of rows at a time, nor where the weights come from, nor what was kept from the pass
//! before shows in a bit.

use hywu_core::{Adapter, Checkpoint, Dtype};
use hywu_generator::{Error, Generator, GeneratorConfig, Inference, Limits, Progress};
use hywu_kernels::{
    Device, Tape, Tensor,
    testing::{for_each_place, random},
};
use std::{collections::BTreeMap, ops::ControlFlow, path::Path};

/// 3 layers of 262 positions: rows come in several lots.
const CONFIG: &str = r#"{"num_base_model_layers": 3, "rank": 4, "alpha": 6, "token_dim": 8, "output_dim": 8,
    "dim_accumulation": 2, "d_model": 32, "head_dim": 8, "num_pg_layers": 2, "input_dim": 12, "pg_mapping": {
    "qkv": {"lora_A_dim": 300, "lora_B_dim": 310},
    "experts": {"type": "grouped", "num_experts": 3, "sub_weights": {"w1": {"lora_A_dim": 70, "lora_B_dim": 75}}}}}"#;

/// Of which no number would have it otherwise.
const FEW_ROWS: Limits = Limits { memory: None, rows: Some(1) };

fn generator() -> Generator {
    let config = GeneratorConfig::from_json(CONFIG.as_bytes()).expect("a good config");
    Generator::random(config, 3, Device::Cpu, Dtype::F32).expect("small")
}

fn bits(adapter: &Adapter) -> Vec<(String, Vec<u32>)> {
    let values = |x: &ndarray::ArrayD<f32>| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let pair = |(name, lora): (&String, &hywu_core::Lora)| {
        (name.clone(), [values(&lora.lora_a), values(&lora.lora_b)].concat())
    };
    adapter.modules.iter().map(pair).collect()
}

/// The generator's folder, its weights in bf16.
fn saved(generator: &Generator) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    generator.save(folder.path(), Dtype::Bf16).expect("writable");
    folder
}

fn open(folder: &Path, device: Device, dtype: Dtype, limits: Limits) -> Result<Inference, Error> {
    Inference::open(folder, device, dtype, limits, (1, 6))
}

fn no_watch(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The least memory of a pass over a condition of 6 tokens, as the refusal of less says.
fn least(folder: &Path, device: Device, dtype: Dtype) -> u64 {
    match open(folder, device, dtype, Limits { memory: Some(1), rows: None }).err() {
        Some(Error::Memory { least, budget: 1, batch: 1, length: 6, .. }) => least,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_tape_gives_the_same_on_the_cpu() {
    let generator = generator();
    let condition = random(4, &[2, 1, 6, 12]);
    let tape = Tape::inference();
    let bound = generator.params.bind(&tape, false).expect("on the CPU");
    let vars = generator.forward(&tape, &bound, &condition).expect("a good condition");
    let expected = vars.to_adapter(generator.spec().scale()).expect("on the CPU");
    let adapter = generator.generate(&condition).expect("a good condition");
    assert_eq!(adapter.modules.keys().collect::<Vec<_>>(), expected.modules.keys().collect::<Vec<_>>());
    assert_eq!(adapter.scale, 1.5);
    assert!(bits(&adapter) == bits(&expected));
}

#[test]
fn rows_at_a_time_and_streaming_change_no_bit() {
    let generator = generator();
    let folder = saved(&generator);
    for batch in [1, 2] {
        let condition = random(5, &[batch, 6, 12]);
        for_each_place(|place| {
            let there = generator.to(place.device, place.dtype).expect("the device works");
            let expected = bits(&there.generate(&condition).expect("a good condition"));
            let least = least(folder.path(), place.device, place.dtype);
            // Twice the least has room for a batch of two.
            let all = [
                FEW_ROWS,
                Limits { memory: Some(batch as u64 * least), rows: None },
                Limits::default(),
                Limits { memory: Some(2 * least), rows: Some(700) },
            ];
            for limits in &all[..4 / batch] {
                let inference = open(folder.path(), place.device, place.dtype, *limits).expect("good");
                let adapter = inference.generate(&condition).expect("a good condition");
                assert!(bits(&adapter) == expected, "{place:?} {limits:?}");
            }
        });
    }
}

#[test]
fn weights_that_do_not_fit_are_streamed() {
    let folder = saved(&generator());
    for_each_place(|place| {
        let least = least(folder.path(), place.device, place.dtype);
        let with = |memory| {
            let limits = Limits { memory: Some(memory), rows: None };
            open(folder.path(), place.device, place.dtype, limits).map(|i| i.is_streamed())
        };
        assert!(with(least).expect("enough"));
        assert_eq!(with(least + (1 << 30)).expect("enough"), place.device == Device::Cpu);
        let e = with(least - 1).expect_err("too little").to_string();
        assert!(e.contains(&least.to_string()) && e.contains("6 tokens"), "{e}");
    });
}

/// Where they stay is decided for the batch that is to come; a larger one is an error, not a device that is full half-way.
#[test]
fn the_batch_counts() {
    let folder = saved(&generator());
    for_each_place(|place| {
        let least = least(folder.path(), place.device, place.dtype);
        let limits = Limits { memory: Some(least), rows: None };
        let open = |batch| Inference::open(folder.path(), place.device, place.dtype, limits, (batch, 6));
        let e = open(9).err().expect("too little for nine").to_string();
        assert!(e.contains("9 conditions of 6 tokens"), "{e}");
        let one = open(1).expect("enough for one");
        let file = folder.path().join("adapter.safetensors");
        let nine = random(5, &[9, 6, 12]);
        let refused = one.generate_file(&nine, &file, Dtype::F32, &BTreeMap::new(), &mut no_watch);
        assert!(matches!(refused, Err(Error::Memory { batch: 9, .. })), "{refused:?}");
        // Nor is there room for what could be kept.
        assert!(matches!(one.keeping_start().generate(&random(5, &[1, 6, 12])), Err(Error::Memory { .. })));
    });
}

#[test]
fn what_no_condition_changes_is_computed_once() {
    let generator = generator();
    for_each_place(|place| {
        let there = generator.to(place.device, place.dtype).expect("the device works");
        let inference = there.inference().expect("the device works").keeping_start();
        let mut work = Vec::new();
        for (seed, batch) in [(6, 1), (7, 2), (8, 1)] {
            let condition = random(seed, &[batch, 6, 12]);
            let adapter = inference.generate(&condition).expect("a good condition");
            assert!(bits(&adapter) == bits(&there.generate(&condition).expect("good")), "{place:?} {seed}");
            let mut last = Progress { done: 0.0, total: 0.0 };
            let mut watch = |at: Progress| {
                assert!(at.done > last.done);
                last = at;
                ControlFlow::Continue(())
            };
            inference.each_layer(&condition, &mut watch, &mut |_| Ok(())).expect("a good condition");
            assert!((last.done / last.total - 1.0).abs() < 1e-9, "{last:?}");
            work.push(last.total / batch as f64);
        }
        let all = generator.config.flops(1, 6).expect("a good config");
        assert!(
            work[0] < 0.9 * all && work.iter().all(|w| (w / work[0] - 1.0).abs() < 1e-9),
            "{work:?} {all}"
        );
    });
}

#[test]
fn files_hold_what_is_generated() {
    let generator = generator();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("adapter.safetensors");
    let inference = generator.inference().expect("on the CPU");
    let condition = random(9, &[2, 6, 12]);
    let metadata: BTreeMap<_, _> = [("program".to_owned(), "a test".to_owned())].into();
    for dtype in [Dtype::F32, Dtype::Bf16] {
        inference.generate_file(&condition, &path, dtype, &metadata, &mut no_watch).expect("writable");
        let mut expected = generator.generate(&condition).expect("a good condition");
        if dtype == Dtype::Bf16 {
            let rounded = |x: &f32| half::bf16::from_f32(*x).to_f32();
            for lora in expected.modules.values_mut() {
                lora.lora_a.mapv_inplace(|x| rounded(&x));
                lora.lora_b.mapv_inplace(|x| rounded(&x));
            }
        }
        let read = Adapter::load(&path).expect("a good file");
        read.check(generator.spec()).expect("it fits");
        assert_eq!((read.scale, &read.metadata), (1.5, &metadata));
        for (name, lora) in &expected.modules {
            assert_eq!(&read.modules[name], lora, "{name} in {dtype:?}");
        }
        let file = Checkpoint::open(&path).expect("a good file");
        assert_eq!(file.info("model.layers.2.qkv.lora_A").expect("there"), (vec![2, 4, 300], dtype));
    }
}

#[test]
fn a_pass_that_ends_early_leaves_no_file() {
    let generator = generator();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("adapter.safetensors");
    let condition = random(9, &[1, 6, 12]);
    let inference = generator.inference().expect("on the CPU");
    let mut pieces = 0;
    let mut stop = |at: Progress| {
        pieces += 1;
        if at.done > 0.5 * at.total { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let stopped = inference.generate_file(&condition, &path, Dtype::F32, &BTreeMap::new(), &mut stop);
    assert!(matches!(stopped, Err(Error::Interrupted)), "{stopped:?}");
    assert!(pieces > 3);

    let mut broken = generator;
    broken.params.insert("model.blocks.1.norm4.weight", Tensor::full(&[32], f32::NAN));
    let checkpoint = saved(&broken);
    let inference =
        open(checkpoint.path(), Device::Cpu, Dtype::F32, Limits::default()).expect("nothing is read yet");
    let refused = inference.generate_file(&condition, &path, Dtype::F32, &BTreeMap::new(), &mut no_watch);
    let e = refused.expect_err("NaN").to_string();
    assert!(e.contains("model.blocks.1.norm4.weight") && e.contains("NaN"), "{e}");
    assert_eq!(std::fs::read_dir(folder.path()).expect("readable").count(), 0);
}
