//! Where merging takes less time than fusing: measured, beside what `Apply::Auto` decides.

use super::{Shape, shapes};
use crate::timing::Bench;
use hywu_kernels::ops::low_rank_linear::merging_pays;
use serde_json::{Value, json};
use std::collections::HashMap;

/// Calls that are looked at; a run is not longer.
const MOST_CALLS: usize = 1 << 20;

/// A row for every layer whose fused call, plain call and merge have been timed (`ms` by case). `calls` is from how many calls on merging
/// takes less time in all, `policy_calls` from how many on [`merging_pays`] says so; null: never.
pub fn merge_or_fuse(bench: &Bench, all: bool, ms: &HashMap<String, f64>) -> Vec<Value> {
    let row = |shape: &Shape| {
        let Shape { m, k, n, r, .. } = *shape;
        let fused = ms.get(&format!("low_rank_linear/{shape}"))?;
        let plain = ms.get(&format!("linear/m{m} k{k} n{n}"))?;
        let merge = ms.get(&format!("low_rank_linear/merge k{k} n{n} r{r}"))?;
        let saved = fused - plain;
        let calls = (saved > 0.0).then(|| (merge / saved).ceil()).filter(|calls| *calls <= MOST_CALLS as f64);
        let pays = |calls: usize| merging_pays([n, k], r, m, calls, bench.device);
        // It pays from some number of calls on.
        let (mut least, mut most) = (0, MOST_CALLS);
        while least < most {
            let middle = (least + most) / 2;
            (least, most) = if pays(middle) { (least, middle) } else { (middle + 1, most) };
        }
        Some(json!({
            "case": shape.to_string(), "rows": m, "rank": r, "merge_ms": merge, "fused_ms": fused, "plain_ms": plain,
            "calls": calls.map(|c| c as usize), "policy_calls": pays(least).then_some(least),
        }))
    };
    let one = |shape: &&Shape| shape.rows.instances() == 1;
    shapes::shapes(bench, all).iter().filter(one).filter_map(row).collect()
}
