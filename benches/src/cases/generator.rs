//! The parameter generator, from the condition to the adapter, over a ladder of sizes: the same in `peer/torch_generator_cases.py`.

use super::{Case, Floor};
use crate::{
    Result,
    timing::{Bench, Times},
};
use hywu_core::{Adapter, Dtype};
use hywu_generator::{Generator, GeneratorConfig, LayerTokens, Size};
use hywu_kernels::{
    Device, Tensor,
    testing::{naive_bf16, rounded_to_bf16},
};
use std::{cell::RefCell, ops::ControlFlow, rc::Rc};

/// Grouped and plain modules, padded tokens, heads that the CUDA kernels are made for.
const TINY: &str = r#"{"num_base_model_layers": 3, "rank": 8, "alpha": 16, "token_dim": 64, "output_dim": 64,
    "dim_accumulation": 4, "d_model": 128, "head_dim": 64, "num_pg_layers": 2, "input_dim": 96, "pg_mapping": {
    "attention": {"lora_A_dim": 256, "lora_B_dim": 200},
    "experts": {"type": "grouped", "num_experts": 5, "sub_weights": {
        "up": {"lora_A_dim": 256, "lora_B_dim": 100}, "down": {"lora_A_dim": 100, "lora_B_dim": 256}}}}}"#;
/// Root mean square of what a generator with random weights writes: its last layer keeps the size of a norm's output.
const SANE: std::ops::Range<f64> = 0.3..3.0;

/// A forward pass for one condition.
struct Pass {
    name: String,
    config: GeneratorConfig,
    /// Condition tokens.
    length: usize,
}

/// A rung of the ladder.
fn rung(size: Size) -> Pass {
    let length = size.condition_length();
    let name = match size {
        Size::Published => "full".into(),
        part => part.to_string().replace('/', "-"),
    };
    Pass { name: format!("generator/{name} L{length}"), config: GeneratorConfig::scaled(size), length }
}

/// The ladder on a device, from above, as bars depend on the published size; on the CPU its lowest rung.
pub fn cases(bench: &Bench) -> Vec<Case> {
    let passes = match (bench.quick, bench.device) {
        (true, _) => vec![tiny()],
        (false, Device::Cpu) => vec![rung(Size::SixtyFourth)],
        (false, _) => Size::ALL.into_iter().rev().map(rung).collect(),
    };
    let (cuda, bytes) = (bench.device != Device::Cpu, bench.dtype().size() as f64);
    passes.into_iter().map(|pass| Case { is_once: cuda, ..pass.case(bytes, bench.quick) }).collect()
}

fn tiny() -> Pass {
    let config = GeneratorConfig::from_json(TINY.as_bytes()).expect("it is part of this program");
    Pass { name: "generator/tiny L33".into(), config, length: 33 }
}

impl Pass {
    /// All weights and the condition are read, and the adapter is written.
    fn floor(&self, bytes: f64) -> hywu_core::Result<Floor> {
        let numel = |shape: &[usize]| shape.iter().product::<usize>();
        let weights: usize = self.config.weights()?.iter().map(|(_, shape)| numel(shape)).sum();
        let spec = self.config.spec()?;
        let written = spec.layers * spec.parameters().iter().map(|p| p.numel()).sum::<usize>();
        let moved = weights + self.length * self.config.input_dim + written;
        Ok(Floor { bytes: bytes * moved as f64, flops: self.config.flops(1, self.length)? })
    }

    /// With `is_small` its result is compared with the CPU's, which takes too long otherwise.
    fn case(self, bytes: f64, is_small: bool) -> Case {
        let floor = self.floor(bytes).unwrap_or_default();
        let name = self.name.clone();
        let pass = Rc::new(self);
        let checked = pass.clone();
        let case = Case::new(name, floor, move |bench, floor| pass.run(bench, floor));
        if !is_small {
            return case;
        }
        Case { check: Some(Box::new(move |bench| checked.check(bench))), ..case }
    }

    fn generator(&self, bench: &Bench) -> Result<Generator> {
        Ok(Generator::random(self.config.clone(), 1, bench.device, bench.dtype())?)
    }

    fn condition(&self, bench: &Bench) -> hywu_kernels::Result<Tensor> {
        bench.tensor(1, &[1, self.length, self.config.input_dim], 1.0)
    }

    /// Times it, and looks at the last result. Tokens stay where they were computed: what an adapter is cut out of.
    fn run(&self, bench: &Bench, floor: Floor) -> Result<Times> {
        let inference = self.generator(bench)?.inference()?.keeping_start();
        let last = RefCell::new(Vec::new());
        let times = bench.of_long_calls().time(
            1.0,
            floor.bytes,
            |_| Ok(self.condition(bench)?),
            |condition| {
                let mut tokens = Vec::new();
                inference.each_layer(condition, &mut |_| ControlFlow::Continue(()), &mut |layer| {
                    tokens.push(layer);
                    Ok(())
                })?;
                last.replace(tokens);
                Ok(())
            },
        )?;
        self.check_size(&last.take())?;
        Ok(times)
    }

    /// What was generated for the first and the last layer is finite and has a sane size.
    fn check_size(&self, layers: &[LayerTokens]) -> Result<()> {
        let expected = self.config.num_base_model_layers;
        let [first, .., last] = layers else { return Err(format!("{} layers", layers.len()).into()) };
        if layers.len() != expected {
            return Err(format!("{} layers instead of {expected}", layers.len()).into());
        }
        for LayerTokens { layer, a, b, .. } in [first, last] {
            for (what, x) in [("lora_A", a), ("lora_B", b)] {
                let x = x.to_host()?;
                let sum: f64 = x.data().iter().map(|&v| f64::from(v).powi(2)).sum();
                let size = (sum / x.numel() as f64).sqrt();
                // NaN is in no range.
                if !SANE.contains(&size) {
                    return Err(format!("{what} of layer {layer} has the size {size}").into());
                }
            }
        }
        Ok(())
    }

    /// As near to the CPU's result in f32 as twice an implementation that rounds what every op gives to bf16.
    fn check(&self, bench: &Bench) -> Result<()> {
        let there = self.generator(bench)?;
        let condition = self.condition(bench)?.to_host()?;
        let got = there.generate(&condition)?;
        // Weights are of bf16 everywhere.
        let here = Generator::random(self.config.clone(), 1, Device::Cpu, Dtype::F32)?;
        let expected = here.generate(&condition)?;
        let naive = naive_bf16(|| here.generate(&rounded_to_bf16(&condition)))?;
        let (error, allowed) = (distance(&got, &expected), 2.0 * distance(&naive, &expected));
        // NaN is not small either.
        if error <= allowed { Ok(()) } else { Err(format!("relative error {error:e} > {allowed:e}").into()) }
    }
}

/// The relative Frobenius error over all modules; both adapters are of one generator.
fn distance(actual: &Adapter, expected: &Adapter) -> f64 {
    let (mut difference, mut norm) = (0.0, 0.0);
    for (got, want) in actual.modules.values().zip(expected.modules.values()) {
        for (got, want) in [(&got.lora_a, &want.lora_a), (&got.lora_b, &want.lora_b)] {
            for (a, b) in got.iter().zip(want) {
                difference += f64::from(a - b).powi(2);
                norm += f64::from(*b).powi(2);
            }
        }
    }
    (difference / norm).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FORMAT.md section 8.
    #[test]
    fn flops_are_those_of_the_format() {
        for (length, total) in
            [(2048, 3.09e15), (4096, 3.24e15), (7500, 3.48e15), (12500, 3.83e15), (20000, 4.37e15)]
        {
            let pass = Pass { length, ..rung(Size::Published) };
            let flops = pass.floor(2.0).expect("a good config").flops;
            assert!((flops / total - 1.0).abs() < 0.002, "{length}: {flops:e}");
        }
    }

    #[test]
    fn the_ladder_has_the_names_of_the_bars() {
        let names = |device| -> Vec<String> {
            cases(&Bench::new(device, false)).into_iter().map(|case| case.name).collect()
        };
        let ladder =
            ["full L4000", "1-4 L4000", "1-16 L2000", "1-64 L1000"].map(|n| format!("generator/{n}"));
        assert_eq!(names(Device::Cuda(0)), ladder);
        assert_eq!(names(Device::Cpu), ladder[3..]);
    }

    /// What is read and written at the published size: 8.1 G weights, 0.72 G results (FORMAT.md section 8).
    #[test]
    fn bytes_are_counted() {
        let bytes = rung(Size::Published).floor(2.0).expect("a good config").bytes;
        assert_eq!(bytes, 2.0 * (8_096_647_168f64 + 722_993_152.0 + 4000.0 * 4096.0));
    }

    #[test]
    fn the_small_generator_writes_sane_adapters() {
        let (pass, bench) = (tiny(), Bench::new(Device::Cpu, true).shorter());
        pass.run(&bench, Floor::default()).expect("finite and of a sane size");
        pass.check(&bench).expect("the CPU gives the same again");
    }
}
