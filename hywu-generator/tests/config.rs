//! Configs that lie: numbers too large to work with, alone, together, and beside the weights of another model.

use hywu_core::Checkpoint;
use hywu_generator::{Generator, GeneratorConfig};
use hywu_kernels::ParamSet;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::Path;

const KEYS: [&str; 9] = [
    "num_base_model_layers",
    "rank",
    "token_dim",
    "output_dim",
    "dim_accumulation",
    "d_model",
    "head_dim",
    "num_pg_layers",
    "input_dim",
];

fn tiny() -> (Value, Checkpoint) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-dense");
    let config = std::fs::read(folder.join("config.json")).expect("readable");
    (serde_json::from_slice(&config).expect("JSON"), Checkpoint::open(&folder).expect("a good file"))
}

fn parse(config: &Value) -> hywu_core::Result<GeneratorConfig> {
    GeneratorConfig::from_json(config.to_string().as_bytes())
}

#[track_caller]
fn refused(changes: &[(&str, Value)]) -> String {
    let (mut config, _) = tiny();
    changes.iter().for_each(|(key, value)| config[*key] = value.clone());
    parse(&config).expect_err("refused").to_string()
}

#[test]
fn the_published_size_fits() {
    let weights = GeneratorConfig::default().weights().expect("a good config");
    assert_eq!(weights.len(), 11 + 24 * 32);
    assert_eq!(
        weights.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum::<usize>(),
        8_096_647_168
    );
}

#[test]
fn a_number_out_of_range_is_named_with_its_range() {
    for key in KEYS {
        for value in [0, (1 << 16) + 4, 1 << 20, 1 << 32, 1 << 63, u64::MAX] {
            let e = refused(&[(key, value.into())]);
            assert!(e.contains(&format!("{key} {value} must be from 1 to ")), "{e}");
        }
    }
    for (value, shown) in [(json!(-1), "-1"), (json!(1e6), "1000000"), (json!(65536.5), "65536.5")] {
        let e = refused(&[("alpha", value)]);
        assert!(e.contains(&format!("alpha {shown} must be from 0 to ")), "{e}");
    }
    assert!(refused(&[("alpha", json!(1e300))]).contains("`alpha`: number out of range"));
    assert!(refused(&[("prefix", "x".repeat(1000).into())]).contains("prefix 1000 must be from"));
    let wide = json!({"q": {"lora_A_dim": 1u64 << 32, "lora_B_dim": 4}});
    assert!(refused(&[("pg_mapping", wide)]).contains("`q`: lora_A_dim 4294967296 must be from 1 to "));
}

#[test]
fn numbers_that_are_only_too_large_together_are_named() {
    let dims = json!({"w": {"lora_A_dim": 65536, "lora_B_dim": 65536}});
    let experts = json!({"e": {"type": "grouped", "num_experts": 4096, "sub_weights": dims}});
    let e = refused(&[("pg_mapping", experts)]);
    assert!(e.contains("positions (num_base_model_layers 3 x 67108864 tokens"), "{e}");
    assert!(e.contains(&format!(" {} must be from 1 to ", 3u64 * 67_108_864 * 2)), "{e}");

    let e = refused(&[
        ("num_base_model_layers", json!(1024)),
        ("rank", json!(1024)),
        ("dim_accumulation", json!(32)),
        ("token_dim", json!(65536)),
        ("output_dim", json!(65536)),
    ]);
    assert!(e.contains("token_dim 65536) 274877906944 must be from 1 to "), "{e}");

    let e = refused(&[("d_model", json!(65536)), ("num_pg_layers", json!(256))]);
    assert!(e.contains("d_model 65536, num_pg_layers 256) ") && e.contains("must be from 1 to "), "{e}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// No panic, no abort, and no weights for a checkpoint of another size.
    #[test]
    fn any_numbers_beside_a_small_file_are_refused(
        picks in prop::collection::vec((0usize..KEYS.len(), 0usize..14), 1..6),
        width in 1u64..1 << 21,
        experts in prop::option::of(1u64..5000),
    ) {
        let (mut config, checkpoint) = tiny();
        for (key, value) in picks {
            let values = [0, 1, 2, 3, 4, 32, 64, 256, 1024, 4096, 1 << 16, 1 << 20, 1 << 32, u64::MAX];
            config[KEYS[key]] = values[value].into();
            if KEYS[key] == "token_dim" {
                config["output_dim"] = values[value].into();
            }
        }
        let dims = json!({"lora_A_dim": width, "lora_B_dim": 7});
        config["pg_mapping"] = match experts {
            None => json!({"q": dims}),
            Some(n) => json!({"e": {"type": "grouped", "num_experts": n, "sub_weights": {"w": dims}}}),
        };
        if let Ok(config) = parse(&config) {
            // The tiny map's 14 tokens can come about by chance, and then everything may fit.
            let weights = config.weights().expect("checked");
            let same = weights.len() == checkpoint.names().len()
                && weights.iter().all(|(name, shape)| checkpoint.check_shape(name, shape).is_ok());
            prop_assert_eq!(Generator::from_checkpoint(config, &checkpoint).is_ok(), same);
        }
    }
}

/// The most memory that this process has held so far, in bytes.
#[cfg(target_os = "linux")]
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("readable");
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).expect("there");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") * 1024
}

#[test]
fn a_big_config_beside_a_small_file_takes_no_memory() {
    let (config, checkpoint) = tiny();
    // 2.7 and 5.4 GB of weights; the second under names that the file lacks.
    for (blocks, message) in [
        (2, "tensor `hidden_in.weight` has shape [32, 24], expected [4096, 24]"),
        (4, "\"model.blocks.2.self_attn_n.W_q.bias\""),
    ] {
        let mut config = config.clone();
        (config["d_model"], config["num_pg_layers"]) = (4096.into(), blocks.into());
        let config = parse(&config).expect("every number is in its range");
        let e = Generator::from_checkpoint(config, &checkpoint).err().expect("refused").to_string();
        assert!(e.contains(message) && e.len() < 2000, "{e}");
    }
    #[cfg(target_os = "linux")]
    assert!(peak() < 1 << 30, "{}", peak());
}

#[test]
fn more_weights_than_memory_are_an_error() {
    for shape in [vec![1 << 40, 1 << 20], vec![usize::MAX, usize::MAX]] {
        let e = ParamSet::zeros(&[("x".into(), shape)]).err().expect("refused").to_string();
        assert!(e.contains("GiB"), "{e}");
    }
}
