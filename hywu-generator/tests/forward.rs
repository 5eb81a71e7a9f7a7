//! The whole forward pass: its gradients, and that neither the batch nor the threads change a bit.

use hywu_core::{Adapter, Philox};
use hywu_generator::{Generator, GeneratorConfig};
use hywu_kernels::{
    ParamSet, Tape, Tensor, Var,
    ops::{elementwise::add, loss::weighted_sum},
    testing::random,
};

/// Plain and grouped modules, padding in both; large enough that a batch's products are shared among threads.
const CONFIG: &str = r#"{"num_base_model_layers": 3, "rank": 4, "alpha": 4, "token_dim": 8, "output_dim": 8,
    "dim_accumulation": 2, "d_model": 32, "head_dim": 8, "num_pg_layers": 2, "input_dim": 12, "pg_mapping": {
    "self_attn.qkv_proj": {"lora_A_dim": 30, "lora_B_dim": 44},
    "mlp.experts": {"type": "grouped", "num_experts": 3, "sub_weights": {
        "w1": {"lora_A_dim": 30, "lora_B_dim": 20}, "w2": {"lora_A_dim": 20, "lora_B_dim": 30}}}}}"#;

/// A generator whose every weight is away from zero, norms and lora_b's too.
fn generator() -> Generator {
    let config = GeneratorConfig::from_json(CONFIG.as_bytes()).expect("a good config");
    let mut generator = Generator::new(config, 1).expect("a good config");
    let philox = Philox::new(2);
    for (stream, (_, tensor)) in generator.params.iter_mut().enumerate() {
        let mut noise = vec![0.0; tensor.numel()];
        philox.fill_normal(stream as u64, 0, &mut noise);
        tensor.data_mut().iter_mut().zip(noise).for_each(|(v, n)| *v += 0.1 * n);
    }
    generator
}

/// sum(w * adapter) with random w, on a tape.
fn loss(generator: &Generator, condition: &Tensor) -> (f32, Vec<Tensor>) {
    let tape = Tape::new();
    let bound = generator.params.bind(&tape, true).expect("on the CPU");
    let lora = generator.forward(&tape, &bound, condition).expect("a good condition");
    let mut total = Var::constant(Tensor::scalar(0.0));
    for (seed, x) in lora.modules.values().flat_map(|pair| [&pair.a, &pair.b]).enumerate() {
        let part = weighted_sum(&tape, x, &random(100 + seed as u64, x.shape())).expect("the same shape");
        total = add(&tape, &total, &part).expect("two scalars");
    }
    let grads = bound.take_grads(&mut tape.backward(&total).expect("a scalar")).expect("on the CPU");
    (total.value().item().expect("a scalar"), grads)
}

/// The same sum in f64, from the adapter on the host.
fn value(generator: &Generator, params: ParamSet, condition: &Tensor) -> f64 {
    let mut moved = Generator::new(generator.config.clone(), 0).expect("a good config");
    moved.params = params;
    let adapter = moved.generate(condition).expect("a good condition");
    let arrays = adapter.modules.values().flat_map(|lora| [&lora.lora_a, &lora.lora_b]);
    let part = |(seed, x): (usize, &ndarray::ArrayD<f32>)| -> f64 {
        let weights = random(100 + seed as u64, x.shape());
        x.iter().zip(weights.data()).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum()
    };
    arrays.enumerate().map(part).sum()
}

#[test]
fn gradients_agree_with_differences() {
    let generator = generator();
    let condition = random(3, &[2, 1, 5, 12]);
    let (sum, grads) = loss(&generator, &condition);
    let expected = value(&generator, generator.params.clone(), &condition);
    assert!((f64::from(sum) - expected).abs() < 1e-3, "{sum} {expected}");
    let mut worst = (0.0, "");
    for ((name, tensor), grad) in generator.params.iter().zip(&grads) {
        // |g|^2 over a random half of the weight's elements, against the sum's own slope in that direction.
        let mask = random(77, tensor.shape());
        let direction: Vec<f32> =
            grad.data().iter().zip(mask.data()).map(|(&g, &m)| if m > 0.0 { g } else { 0.0 }).collect();
        let square: f64 = direction.iter().map(|&g| f64::from(g).powi(2)).sum();
        assert!(square > 0.0, "{name}: no gradient");
        // The adapter is f32: a step that moves the sum by about 0.01 stands clear of rounding, and one of length 0.1 is still short.
        let h = (0.01 / square).min(0.1 / square.sqrt());
        let at = |h: f64| {
            let data = tensor.data().iter().zip(&direction).map(|(v, d)| v + h as f32 * d).collect();
            let mut params = generator.params.clone();
            params.insert(name, Tensor::new(tensor.shape(), data).expect("the same shape"));
            value(&generator, params, &condition)
        };
        let slope = (at(h) - at(-h)) / (2.0 * h);
        let error = (slope / square - 1.0).abs();
        println!("{name}: |g| {:.3e}, error {error:.1e}", square.sqrt());
        assert!(error < 0.01, "{name}: slope {slope}, gradient says {square}");
        if error > worst.0 {
            worst = (error, name);
        }
    }
    println!("worst: {worst:?}");
}

fn bits(adapter: &Adapter) -> Vec<u32> {
    let pairs = adapter.modules.values();
    pairs.flat_map(|lora| lora.lora_a.iter().chain(&lora.lora_b)).map(|x| x.to_bits()).collect()
}

#[test]
fn a_permuted_batch_gives_the_same_bits() {
    let generator = generator();
    let condition = random(4, &[4, 1, 9, 12]);
    let member = |i: usize| &condition.data()[i * 108..(i + 1) * 108];
    let generate = |order: &[usize]| {
        let data: Vec<f32> = order.iter().flat_map(|&i| member(i)).copied().collect();
        let condition = Tensor::new(&[order.len(), 1, 9, 12], data).expect("its size");
        generator.generate(&condition).expect("a good condition")
    };
    let entry = |adapter: &Adapter, i: usize| bits(&adapter.entry(i).expect("there"));
    let whole = generate(&[0, 1, 2, 3]);
    assert_ne!(entry(&whole, 0), entry(&whole, 1));
    for order in [&[2, 0, 3, 1][..], &[1, 1, 3], &[3]] {
        let other = generate(order);
        for (place, &i) in order.iter().enumerate() {
            assert!(entry(&other, place) == entry(&whole, i), "member {i} at place {place} of {order:?}");
        }
    }
}

/// The number of threads is fixed when a program first computes, so this test runs itself as two programs more.
#[test]
fn one_thread_and_three_give_the_same_bits() {
    const OUT: &str = "HYWU_TEST_BITS";
    if let Some(file) = std::env::var_os(OUT) {
        let (generator, condition) = (generator(), random(5, &[3, 1, 40, 12]));
        let mut all = bits(&generator.generate(&condition).expect("a good condition"));
        let (_, grads) = loss(&generator, &condition);
        all.extend(grads.iter().flat_map(|g| g.data()).map(|x| x.to_bits()));
        let threads = std::fs::read_dir("/proc/self/task").map_or(0, |tasks| tasks.count());
        return std::fs::write(file, format!("{threads} {all:?}")).expect("writable");
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let run = |threads: &str| {
        let file = dir.path().join(threads);
        let out = std::process::Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "one_thread_and_three_give_the_same_bits"])
            .envs([("RAYON_NUM_THREADS", threads.as_ref()), (OUT, file.as_os_str())])
            .output()
            .expect("it runs");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
        let text = std::fs::read_to_string(file).expect("written");
        let (threads, bits) = text.split_once(' ').expect("both");
        (threads.parse::<usize>().expect("a number"), bits.to_owned())
    };
    let ((one, expected), (three, got)) = (run("1"), run("3"));
    if cfg!(target_os = "linux") {
        assert_eq!(three, one + 2, "threads");
    }
    assert!(expected == got, "other bits with three threads");
}
