//! Trained low-rank pairs: `<module>.lora_A` [entries, rank, in] and `<module>.lora_B` [entries, out, rank]. One entry is a shared LoRA;
//! a bank has one for each skill.

use anyhow::{Context, Result, bail};
use hywu_core::Philox;
use hywu_diffusion::{EditBatch, MiniDownstream};
use hywu_kernels::{
    Bound, Downstream, LoraVar, LoraVars, ParamSet, Tape, Tensor, Var, ops::embedding::embedding,
};

/// The usual start: lora_a random with deviation in^-1/2, lora_b zero.
pub(super) fn fresh_loras(downstream: &MiniDownstream, entries: usize, seed: u64) -> ParamSet {
    let spec = downstream.adapter_spec();
    let mut params = ParamSet::new();
    for (i, name) in spec.module_names().enumerate() {
        let module = &spec.modules[i % spec.modules.len()];
        let mut a = Tensor::zeros(&[entries, spec.rank, module.in_dim]);
        Philox::new(seed).fill_normal(i as u64, 0, a.data_mut());
        let deviation = (module.in_dim as f32).powf(-0.5);
        a.data_mut().iter_mut().for_each(|v| *v *= deviation);
        params.insert(format!("{name}.lora_A"), a);
        params.insert(format!("{name}.lora_B"), Tensor::zeros(&[entries, module.out_dim, spec.rank]));
    }
    params
}

/// All entries, in order, as instances.
pub(super) fn shared(bound: &Bound, downstream: &MiniDownstream) -> Result<LoraVars> {
    pairs(bound, downstream, |var| Ok(var.clone()))
}

/// For each instance of the batch the entry of its skill; `skills` tells whose the entries are.
pub(super) fn chosen(
    tape: &Tape,
    bound: &Bound,
    downstream: &MiniDownstream,
    skills: &[usize],
    batch: &EditBatch,
) -> Result<LoraVars> {
    let entry = |skill: &usize| {
        let at = skills.iter().position(|s| s == skill);
        at.map(|at| at as u32).with_context(|| format!("the bank has no entry for skill {skill}"))
    };
    let entries: Vec<u32> = batch.skills.iter().map(entry).collect::<Result<_>>()?;
    pairs(bound, downstream, |var| {
        let &[n, rows, columns] = var.shape() else { bail!("an entry of a bank is a matrix") };
        let table = var.reshape(&[n, rows * columns])?;
        Ok(embedding(tape, &table, &entries, &[entries.len()])?.reshape(&[entries.len(), rows, columns])?)
    })
}

fn pairs(bound: &Bound, downstream: &MiniDownstream, take: impl Fn(&Var) -> Result<Var>) -> Result<LoraVars> {
    let spec = downstream.adapter_spec();
    let scale = spec.scale();
    let get = |name: &str, part: &str| take(bound.get(&format!("{name}.{part}"))?);
    let mut adapters = LoraVars::none();
    for name in spec.module_names() {
        let pair = LoraVar { a: get(&name, "lora_A")?, b: get(&name, "lora_B")?, scale };
        adapters.modules.insert(name, pair);
    }
    if adapters.modules.is_empty() {
        bail!("the backbone has no module that takes an adapter");
    }
    Ok(adapters)
}
