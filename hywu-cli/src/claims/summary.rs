//! The numbers to quote.

use super::{
    quality::Comparison,
    report::{Condition, Conflict, Method, Metric, Summary, Variant},
    statistics::{Cells, interval, mean_cells},
};

/// From the report's parts; `accuracy` holds the share of right choices by seed and photo.
pub fn summary(
    comparison: &Comparison<'_>,
    conflict: &[Conflict],
    condition: &[Variant],
    accuracy: &Cells,
) -> Summary {
    let of = |cells: &Cells| Some(interval(cells, comparison.resamples));
    let lost = |which: Condition| condition.iter().find(|v| v.condition == which).map(|v| v.loss);
    let psnr = |method| interval(&comparison.cells(method, None, |s| s.psnr), 1).mean;
    let better = match psnr(Method::WideLora) > psnr(Method::SharedLora) {
        true => Method::WideLora,
        false => Method::SharedLora,
    };
    let shared = [Method::SharedLora, Method::WideLora, Method::Full];
    let [a, b, c] = shared.map(|method| comparison.shares(method, Metric::Psnr)[0].clone());
    let conflicting = |c: &&Conflict| c.method == Method::Full && c.trained;
    Summary {
        hywu_vs_shared_lora_db: of(&comparison.gain(better, None)),
        hywu_vs_full_db: of(&comparison.gain(Method::Full, None)),
        hywu_win_rate: of(&mean_cells(&[&a, &b, &c])),
        shuffled_loss_db: lost(Condition::OtherSkill),
        averaged_loss_db: lost(Condition::Mean),
        conflict_cosine: conflict.iter().find(conflicting).map(|c| c.conflicting),
        forgetting_db: None,
        phrasing_accuracy: of(accuracy),
    }
}
