//! Training through a frozen model of one's own.

use hywu_core::AdapterSpec;
use hywu_generator::{Generator, GeneratorConfig, train_step};
use hywu_kernels::{
    Downstream, LoraVars, Result, Tape, Tensor, Var,
    ops::{loss::weighted_mse, low_rank_linear::low_rank_linear},
    optim::{Optimizer, Schedule},
    testing::random,
};

const CONFIG: &str = r#"{"num_base_model_layers": 1, "rank": 2, "alpha": 2, "token_dim": 8, "output_dim": 8,
    "dim_accumulation": 2, "d_model": 16, "head_dim": 8, "num_pg_layers": 1, "input_dim": 5,
    "pg_mapping": {"proj": {"lora_A_dim": 6, "lora_B_dim": 4}}}"#;

/// A frozen linear layer; the wanted output is the layer's own plus the condition's mean in every channel.
struct Frozen {
    spec: AdapterSpec,
    weight: Tensor,
}

impl Downstream for Frozen {
    type Batch = u64;

    fn adapter_spec(&self) -> &AdapterSpec {
        &self.spec
    }
    fn condition(&self, seed: &u64) -> Result<Tensor> {
        Ok(random(*seed, &[3, 1, 4, 5]))
    }
    fn loss(&self, tape: &Tape, seed: &u64, adapters: &LoraVars) -> Result<Var> {
        let mut x = random(seed + 1, &[3, 7, 6]);
        x.data_mut().chunks_mut(6).for_each(|row| row[0] = 1.0);
        let (x, w) = (Var::constant(x), Var::constant(self.weight.clone()));
        let base = low_rank_linear(tape, &x, &w, None, None)?;
        let condition = self.condition(seed)?;
        let mut target = base.value().clone();
        for (rows, c) in target.data_mut().chunks_mut(28).zip(condition.data().chunks(20)) {
            rows.iter_mut().for_each(|v| *v += c.iter().sum::<f32>() / 4.0);
        }
        let y = low_rank_linear(tape, &x, &w, None, adapters.get("model.layers.0.proj"))?;
        weighted_mse(tape, &y, &target, &[1.0; 3])
    }
}

#[test]
fn the_loss_falls_and_the_frozen_model_stays() {
    let config = GeneratorConfig::from_json(CONFIG.as_bytes()).expect("a good config");
    let mut generator = Generator::new(config, 1).expect("a good config");
    let weight = random(9, &[4, 6]);
    let frozen = Frozen { spec: generator.spec().clone(), weight: weight.clone() };
    let schedule = Schedule { warmup: 10, total: 300, peak: 5e-3, floor: 5e-4 };
    let mut optimizer = Optimizer::new(&generator.params, schedule, 0.0, 1.0, None).expect("on the CPU");
    let losses: Vec<f32> = (0..300)
        .map(|step| {
            train_step(&mut generator, &frozen, &(step % 8 * 2), &mut optimizer).expect("a finite step").loss
        })
        .collect();
    let mean = |part: &[f32]| part.iter().sum::<f32>() / part.len() as f32;
    let (first, last) = (mean(&losses[..8]), mean(&losses[292..]));
    assert!(last < 0.3 * first, "{first} -> {last}");
    let bits = |t: &Tensor| t.data().iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&frozen.weight), bits(&weight));
}

#[test]
fn a_fresh_generator_changes_nothing_and_comes_back_from_disk() {
    let config = GeneratorConfig::from_json(CONFIG.as_bytes()).expect("a good config");
    let generator = Generator::new(config, 1).expect("a good config");
    let condition = random(3, &[2, 1, 9, 5]);
    let adapter = generator.generate(&condition).expect("good");
    adapter.check(generator.spec()).expect("it fits");
    assert!(
        adapter
            .modules
            .values()
            .all(|m| m.lora_b.iter().all(|&v| v == 0.0) && m.lora_a.iter().any(|&v| v != 0.0))
    );
    let dir = tempfile::tempdir().expect("a temporary folder");
    generator.save(dir.path(), hywu_core::Dtype::F32).expect("writable");
    assert_eq!(Generator::load(dir.path()).expect("good").generate(&condition).expect("good"), adapter);
}

#[test]
fn bad_configs_and_conditions_are_named() {
    let with = |key: &str, value: serde_json::Value| {
        let mut config: serde_json::Value = serde_json::from_str(CONFIG).expect("JSON");
        config[key] = value;
        GeneratorConfig::from_json(config.to_string().as_bytes()).expect_err("refused").to_string()
    };
    for (key, value) in
        [("rank", 0), ("output_dim", 9), ("dim_accumulation", 3), ("head_dim", 6), ("d_model", 0)]
    {
        let e = with(key, value.into());
        assert!(e.contains(key), "{key}: {e}");
    }
    let config = GeneratorConfig::from_json(CONFIG.as_bytes()).expect("a good config");
    let generator = Generator::new(config, 1).expect("a good config");
    for shape in [&[1, 2, 4, 5][..], &[1, 4, 6], &[4, 5], &[1, 1, 0, 5]] {
        let e = generator.generate(&Tensor::zeros(shape)).expect_err("refused").to_string();
        assert!(e.contains("expected"), "{e}");
    }
    assert!(
        generator.generate(&Tensor::full(&[1, 4, 5], f32::NAN)).expect_err("NaN").to_string().contains("NaN")
    );
}

#[test]
fn a_fresh_generator_tells_instances_apart() {
    let config = GeneratorConfig {
        num_base_model_layers: 4,
        rank: 8,
        alpha: 8.0,
        token_dim: 32,
        output_dim: 32,
        dim_accumulation: 4,
        d_model: 64,
        head_dim: 32,
        num_pg_layers: 2,
        input_dim: 48,
        ..GeneratorConfig::from_json(CONFIG.as_bytes()).expect("a good config")
    };
    let generator = Generator::new(config, 1).expect("a good config");
    // What an instance's tokens have in common is half as large as what is each token's own.
    let (instances, tokens, width) = (16, 160, 48);
    let (own, mut condition) = (random(1, &[instances, width]), random(2, &[instances, 1, tokens, width]));
    for (i, value) in condition.data_mut().iter_mut().enumerate() {
        *value += 0.5 * own.data()[i / (tokens * width) * width + i % width];
    }
    let adapter = generator.generate(&condition).expect("good");
    // Their lora_a is the first to show it. Of its mean square, the part that is not the same for all instances:
    let (mut square, mut alike) = (0.0, 0.0);
    for lora in adapter.modules.values() {
        let rows: Vec<f32> = lora.lora_a.iter().copied().collect();
        let size = rows.len() / instances;
        for i in 0..size {
            let values = rows.iter().skip(i).step_by(size);
            square += values.clone().map(|v| v * v).sum::<f32>() / instances as f32;
            alike += (values.sum::<f32>() / instances as f32).powi(2);
        }
    }
    let apart = 1.0 - alike / square;
    assert!(apart > 0.25, "{apart}");
}
