//! The mini backbone: what it computes, what holds bit for bit, and what it refuses.

mod common;

use common::{Inputs, VOCABULARY, adapters, backbone, fresh, ids, inputs, picture, predict, scaled};
use hywu_core::{Checkpoint, Dtype, TensorWriter};
use hywu_diffusion::{Backbone, BackboneConfig, condition_of, detail_of, thumbnail_of};
use hywu_kernels::{LoraVars, Tape, Tensor, Var, testing::random};

#[test]
fn the_default_has_four_million_weights_and_four_targets_a_layer() {
    let backbone = Backbone::new(BackboneConfig::default(), random(1, &[9, 64]), 0).unwrap();
    assert!((4_000_000..4_200_000).contains(&backbone.params.numel()), "{}", backbone.params.numel());
    let spec = backbone.adapter_spec(8, 16.0);
    spec.validate().unwrap();
    assert_eq!((spec.layers, spec.scale()), (6, 2.0));
    let names: Vec<String> = spec.module_names().take(5).collect();
    let expected = [
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_and_up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.qkv_proj",
    ];
    assert_eq!(names, expected);
    for (i, name) in spec.module_names().enumerate() {
        let m = &spec.modules[i % 4];
        let weight = backbone.params.get(&format!("{name}.weight")).unwrap();
        assert_eq!(weight.shape(), [m.out_dim, m.in_dim], "{name}");
    }
}

#[test]
fn a_fresh_backbone_is_the_identity() {
    let x = inputs(2, 16, 24);
    assert_eq!(predict(&fresh(), &x, 1, &LoraVars::none()).data(), x.source.data());
}

#[test]
fn the_head_adds_a_local_filter_and_a_residual() {
    let mut backbone = fresh();
    let pixels = backbone.config.patch * backbone.config.patch;
    for (name, tensor) in backbone.params.iter_mut() {
        if name == "head.bias" {
            let bias = tensor.data_mut();
            // The residual of a patch's first pixel, then green' = green - 2 * green + 0.25 * blue^2.
            bias[0] = 0.5;
            bias[3 * pixels + 31 + 2] = -2.0;
            bias[3 * pixels + 31 + 6] = 0.25;
        }
    }
    let x = inputs(1, 16, 16);
    let got = predict(&backbone, &x, 1, &LoraVars::none());
    for (i, (got, rgb)) in got.data().chunks(3).zip(x.source.data().chunks(3)).enumerate() {
        let corner = i % 8 == 0 && (i / 16) % 8 == 0;
        let expected = [rgb[0] + if corner { 0.5 } else { 0.0 }, -rgb[1] + 0.25 * rgb[2] * rgb[2], rgb[2]];
        for (g, e) in got.iter().zip(expected) {
            assert!((g - e).abs() <= 1e-6, "pixel {i}: {got:?}, expected {expected:?}");
        }
    }
}

#[test]
fn every_input_matters() {
    let backbone = backbone();
    let x = inputs(1, 16, 24);
    let base = predict(&backbone, &x, 1, &LoraVars::none());
    assert_eq!(base.shape(), [1, 16, 24, 3]);
    assert!(base.data().iter().all(|v| v.is_finite()));
    let other = |change: fn(&mut Inputs)| {
        let mut x = inputs(1, 16, 24);
        change(&mut x);
        predict(&backbone, &x, 1, &LoraVars::none())
    };
    assert_ne!(base.data(), other(|x| x.x_t.data_mut()[0] += 1.0).data());
    assert_ne!(base.data(), other(|x| x.source.data_mut()[0] += 1.0).data());
    assert_ne!(base.data(), other(|x| x.position.data_mut()[0] += 1.0).data());
    assert_ne!(base.data(), other(|x| x.t[0] += 0.1).data());
    let mut table = backbone.clone();
    table.text_table.data_mut()[0] += 1.0;
    assert_ne!(base.data(), predict(&table, &x, 1, &LoraVars::none()).data());
}

#[test]
fn a_zero_lora_b_changes_no_bit_and_another_does() {
    let backbone = backbone();
    let x = inputs(4, 16, 24);
    let base = predict(&backbone, &x, 2, &LoraVars::none());
    assert_eq!(base.data(), predict(&backbone, &x, 2, &adapters(&backbone, 2, 0.0)).data());
    assert_ne!(base.data(), predict(&backbone, &x, 2, &adapters(&backbone, 2, 0.1)).data());
}

/// Entries `order` of the leading axis.
fn permuted(x: &Tensor, order: &[usize]) -> Tensor {
    let size = x.numel() / x.shape()[0];
    let data = order.iter().flat_map(|&i| x.data()[i * size..(i + 1) * size].iter().copied()).collect();
    let mut shape = x.shape().to_vec();
    shape[0] = order.len();
    Tensor::new(&shape, data).unwrap()
}

#[test]
fn a_permuted_or_smaller_batch_gives_the_same_rows() {
    let backbone = backbone();
    let run = |order: &[usize]| {
        let x = inputs(3, 24, 16);
        let tape = Tape::inference();
        let bound = backbone.params.bind(&tape, false).expect("on the CPU");
        let length = backbone.config.text_len;
        let all = ids(3 * length);
        let ids: Vec<u32> = order.iter().flat_map(|&i| all[i * length..(i + 1) * length].to_vec()).collect();
        let text = backbone.text_tokens(&tape, &bound, &ids, order.len()).unwrap();
        let mut lora = adapters(&backbone, 3, 0.1);
        for pair in lora.modules.values_mut() {
            pair.a = Var::constant(permuted(pair.a.value(), order));
            pair.b = Var::constant(permuted(pair.b.value(), order));
        }
        let [x_t, source, position] = [&x.x_t, &x.source, &x.position].map(|x| permuted(x, order));
        let t: Vec<f32> = order.iter().map(|&i| x.t[i]).collect();
        backbone.predict(&tape, &bound, &x_t, &source, &position, &t, &text, &lora).unwrap().value().clone()
    };
    let all = run(&[0, 1, 2]);
    for order in [&[2, 0, 1][..], &[1], &[2, 1]] {
        assert_eq!(run(order).data(), permuted(&all, order).data(), "{order:?}");
    }
}

#[test]
fn one_instance_serves_consecutive_crops() {
    let backbone = backbone();
    let x = inputs(4, 16, 16);
    let together = predict(&backbone, &x, 2, &adapters(&backbone, 2, 0.1));
    let twice = {
        let mut lora = adapters(&backbone, 2, 0.1);
        for pair in lora.modules.values_mut() {
            pair.a = Var::constant(permuted(pair.a.value(), &[0, 0, 1, 1]));
            pair.b = Var::constant(permuted(pair.b.value(), &[0, 0, 1, 1]));
        }
        predict(&backbone, &x, 2, &lora)
    };
    assert_eq!(together.data(), twice.data());
}

#[test]
fn the_thread_count_changes_no_bit() {
    let backbone = backbone();
    let x = inputs(3, 64, 64);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| predict(&backbone, &x, 3, &adapters(&backbone, 3, 0.1)))
    };
    let one = run(1);
    assert_eq!(one.data(), run(2).data());
    assert_eq!(one.data(), run(5).data());
}

#[test]
fn a_calibrated_condition_has_mean_0_and_deviation_1_in_every_channel() {
    let mut backbone = backbone();
    let views = [random(1, &[6, 64, 64, 3]), random(2, &[6, 64, 64, 3])];
    let (views, ids) = ([&views[0], &views[1]], ids(6 * backbone.config.text_len));
    let x = inputs(1, 16, 24);
    let before = predict(&backbone, &x, 1, &LoraVars::none());
    // Calibrating once more changes nothing: it measures the states, not the condition.
    backbone.calibrate(&views, &ids).unwrap();
    let once = backbone.condition(&views, &ids).unwrap();
    backbone.calibrate(&views, &ids).unwrap();
    let condition = backbone.condition(&views, &ids).unwrap();
    assert_eq!(once.data(), condition.data());
    let width = backbone.config.width;
    for channel in 0..width {
        let values = || condition.data().iter().skip(channel).step_by(width).map(|v| f64::from(*v));
        let count = (condition.numel() / width) as f64;
        let mean = values().sum::<f64>() / count;
        let deviation = (values().map(|v| (v - mean).powi(2)).sum::<f64>() / count).sqrt();
        assert!(mean.abs() < 1e-3 && (deviation - 1.0).abs() < 1e-3, "{channel}: {mean} {deviation}");
    }
    assert_eq!(before.data(), predict(&backbone, &x, 1, &LoraVars::none()).data());
}

#[test]
fn the_condition_reads_thumbnail_detail_and_text() {
    let backbone = backbone();
    let source = picture(90, 200);
    let ids = ids(backbone.config.text_len);
    let condition = condition_of(&backbone, &source, &ids).unwrap();
    assert_eq!(condition.shape(), [1, 1, 2 * (64 + 20), 64]);
    let (thumbnail, detail) =
        (thumbnail_of(&source).unwrap().to_tensor(), detail_of(&source).unwrap().to_tensor());
    assert_eq!(detail.data(), source.crop(13, 68, 64, 64).rgb);
    assert_eq!(condition.data(), backbone.condition(&[&thumbnail, &detail], &ids).unwrap().data());
    let half = condition.numel() / 2;
    let swapped = backbone.condition(&[&detail, &thumbnail], &ids).unwrap();
    assert_eq!(condition.data()[..half], swapped.data()[half..]);
    assert_ne!(condition.data()[..half], condition.data()[half..]);
    let mut alone = backbone.clone();
    alone.config.detail_view = false;
    let one_view = condition_of(&alone, &source, &ids).unwrap();
    assert_eq!(one_view.data(), &condition.data()[..half]);
    assert!(backbone.condition(&[&thumbnail], &ids).unwrap_err().to_string().contains("2 views"));
}

#[test]
fn pooled_image_tokens_are_means_of_squares() {
    let mut backbone = backbone();
    let source = picture(90, 200);
    let ids = ids(backbone.config.text_len);
    let whole = condition_of(&backbone, &source, &ids).unwrap();
    backbone.config.condition_pool = 2;
    let pooled = condition_of(&backbone, &source, &ids).unwrap();
    let width = backbone.config.width;
    assert_eq!(pooled.shape(), [1, 1, 2 * (16 + 20), width]);
    for view in 0..2 {
        let whole = |token: usize, c: usize| whole.data()[(view * (64 + 20) + token) * width + c];
        let pooled = |token: usize, c: usize| pooled.data()[(view * (16 + 20) + token) * width + c];
        for c in 0..width {
            for (y, x) in (0..4).flat_map(|y| (0..4).map(move |x| (y, x))) {
                let square = [0, 1, 8, 9].map(|at| whole(16 * y + 2 * x + at, c));
                let mean = square.iter().sum::<f32>() / 4.0;
                assert!((pooled(4 * y + x, c) - mean).abs() < 1e-5, "{view} {y} {x} {c}");
            }
            (0..20).for_each(|i| assert_eq!(pooled(16 + i, c), whole(64 + i, c)));
        }
    }
    backbone.config.condition_pool = 3;
    assert!(condition_of(&backbone, &source, &ids).unwrap_err().to_string().contains("3 divides"));
}

#[test]
fn a_stored_backbone_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("backbone.safetensors");
    let backbone = backbone();
    let mut writer = TensorWriter::new();
    backbone.store(&mut writer, Dtype::F32).unwrap();
    writer.write(&file).unwrap();
    let again = Backbone::load(&Checkpoint::open(&file).unwrap(), backbone.text_table.clone()).unwrap();
    assert_eq!(again.config, backbone.config);
    for ((n, a), (m, b)) in again.params.iter().zip(backbone.params.iter()) {
        assert_eq!((n, a.shape(), a.data()), (m, b.shape(), b.data()));
    }
    let wrong_table = Backbone::load(&Checkpoint::open(&file).unwrap(), random(1, &[9, 17]));
    assert!(wrong_table.err().unwrap().to_string().contains("[vocabulary, 16]"));

    let mut bare = TensorWriter::new();
    bare.add("x", &[1], &[0.0], Dtype::F32);
    bare.write(&file).unwrap();
    let error = Backbone::load(&Checkpoint::open(&file).unwrap(), backbone.text_table.clone()).err().unwrap();
    assert!(error.to_string().contains("not a backbone"), "{error}");
}

#[test]
fn bad_configs_are_refused_by_name() {
    let base = BackboneConfig::default();
    let cases = [
        ("patch", BackboneConfig { patch: 0, ..base.clone() }),
        ("width", BackboneConfig { width: 100, ..base.clone() }),
        ("width", BackboneConfig { width: usize::MAX, ..base.clone() }),
        ("layers", BackboneConfig { layers: 0, ..base.clone() }),
        ("head_dim", BackboneConfig { head_dim: 6, ..base.clone() }),
        ("head_dim", BackboneConfig { head_dim: 512, width: 512, ..base.clone() }),
        ("mlp_hidden", BackboneConfig { mlp_hidden: 0, ..base.clone() }),
        ("text_dim", BackboneConfig { text_dim: 0, ..base.clone() }),
        ("text_len", BackboneConfig { text_len: 0, ..base.clone() }),
        ("text_layers", BackboneConfig { text_layers: 1000, ..base.clone() }),
    ];
    for (field, config) in cases {
        let error = Backbone::new(config, random(1, &[9, 64]), 0).err().unwrap().to_string();
        assert!(error.contains(field), "{field}: {error}");
    }
    base.validate().unwrap();
    assert!(serde_json::from_str::<BackboneConfig>(r#"{"widht": 192}"#).is_err());
    let partial: BackboneConfig = serde_json::from_str(r#"{"layers": 8}"#).unwrap();
    assert_eq!(partial, BackboneConfig { layers: 8, ..base });
}

#[test]
fn adapters_must_cover_the_targets_and_nothing_else() {
    let backbone = backbone();
    let error = |change: &dyn Fn(&mut LoraVars)| {
        let mut lora = adapters(&backbone, 2, 0.1);
        change(&mut lora);
        let x = inputs(4, 16, 16);
        let tape = Tape::inference();
        let bound = backbone.params.bind(&tape, false).expect("on the CPU");
        let text = backbone.text_tokens(&tape, &bound, &ids(20), 1).unwrap();
        let result = backbone.predict(&tape, &bound, &x.x_t, &x.source, &x.position, &x.t, &text, &lora);
        result.err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert_eq!(error(&|_| ()), "");
    const O: &str = "model.layers.1.self_attn.o_proj";
    let renamed = error(&|l| {
        let pair = l.modules.shift_remove(O).unwrap();
        l.modules.insert("text.layers.0.self_attn.o_proj".into(), pair);
    });
    assert!(renamed.contains(O) && renamed.contains("text.layers.0.self_attn.o_proj"), "{renamed}");
    let shape = error(&|l| l.modules[O].a = Var::constant(random(1, &[2, 4, 65])));
    assert!(shape.contains(O) && shape.contains("[2, 4, 65]") && shape.contains("[2, r, 64]"), "{shape}");
    let ranks = error(&|l| l.modules[O].b = Var::constant(random(1, &[2, 64, 3])));
    assert!(ranks.contains("[2, 64, 3]"), "{ranks}");
    let scale = error(&|l| l.modules[O].scale = f32::NAN);
    assert!(scale.contains("NaN"), "{scale}");
    let three = error(&|l| *l = adapters(&backbone, 3, 0.1));
    assert!(three.contains("3 instances") && three.contains("batch of 4"), "{three}");
}

#[test]
fn a_part_of_an_adapter_works_where_it_is_asked_for() {
    let backbone = backbone();
    let spec = backbone.adapter_spec(4, 4.0);
    let whole = adapters(&backbone, 1, 0.1).to_adapter(1.0).unwrap();
    const O: &str = "model.layers.1.self_attn.o_proj";
    let mut part = whole.clone();
    let spare = part.modules.shift_remove(O).unwrap();
    part.modules.insert("elsewhere".into(), spare);
    for strength in [0.0, 1.0] {
        let e = LoraVars::fit(&part, &spec, strength, false).unwrap_err().to_string();
        assert!(
            e.contains(&format!("missing modules: `{O}`")) && e.contains("unused entries: `elsewhere`"),
            "{e}"
        );
    }

    let (lora, found) = LoraVars::fit(&part, &spec, 1.0, true).unwrap();
    assert_eq!(
        (found.applied.len(), found.missing, found.unused),
        (7, vec![O.into()], vec!["elsewhere".into()])
    );
    assert_eq!(lora.cover(spec.module_names()).skipped, [O]);
    // The module without a pair works as if its pair did nothing.
    let mut silent = whole.clone();
    silent.modules[O].lora_b.fill(0.0);
    let silent = LoraVars::from_adapter(&silent, 1.0);
    let x = inputs(2, 16, 24);
    let got = predict(&backbone, &x, 1, &lora);
    assert_eq!(got.data(), predict(&backbone, &x, 1, &silent).data());
    assert_ne!(got.data(), predict(&backbone, &x, 1, &LoraVars::from_adapter(&whole, 1.0)).data());
    assert_eq!(
        predict(&backbone.merged(&lora).unwrap(), &x, 1, &LoraVars::none()).data(),
        predict(&backbone.merged(&silent).unwrap(), &x, 1, &LoraVars::none()).data()
    );

    let (none, found) = LoraVars::fit(&whole, &spec, 0.0, false).unwrap();
    assert_eq!((none.modules.len(), found.applied.len(), found.skipped.len()), (0, 0, 8));
    part.modules.retain(|name, _| name == "elsewhere");
    assert!(LoraVars::fit(&part, &spec, 1.0, true).unwrap_err().to_string().contains("0 of 8"));
}

#[test]
fn inputs_that_do_not_fit_are_refused() {
    let backbone = backbone();
    let tape = Tape::inference();
    let bound = backbone.params.bind(&tape, false).expect("on the CPU");
    let length = backbone.config.text_len;
    let text = backbone.text_tokens(&tape, &bound, &ids(2 * length), 2).unwrap();
    let error = |change: fn(&mut Inputs)| {
        let mut x = inputs(2, 16, 16);
        change(&mut x);
        let Inputs { x_t, source, position, t } = &x;
        let result = backbone.predict(&tape, &bound, x_t, source, position, t, &text, &LoraVars::none());
        result.err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert_eq!(error(|_| ()), "");
    assert!(error(|x| *x = inputs(2, 16, 20)).contains("multiples of 8"));
    assert!(error(|x| *x = inputs(2, 8, 520)).contains("up to 512"));
    assert!(error(|x| *x = inputs(3, 16, 16)).contains("divisor of 3"));
    assert!(error(|x| x.x_t = random(1, &[2, 16, 24, 3])).contains("x_t"));
    assert!(error(|x| x.position = random(1, &[2, 16, 16, 3])).contains("position"));
    assert!(error(|x| x.t.push(0.0)).contains("timesteps"));
    let unknown = backbone.text_tokens(&tape, &bound, &vec![VOCABULARY as u32; length], 1);
    assert!(unknown.unwrap_err().to_string().contains(&VOCABULARY.to_string()));
    assert!(backbone.text_tokens(&tape, &bound, &ids(length - 1), 1).is_err());
    assert!(backbone.text_tokens(&tape, &bound, &[], 0).is_err());
    assert!(
        backbone
            .condition(&[&scaled(1, &[1, 64, 64, 3], 1.0), &scaled(1, &[2, 64, 64, 3], 1.0)], &ids(length))
            .is_err()
    );
}
