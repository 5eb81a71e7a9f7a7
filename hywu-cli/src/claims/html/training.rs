//! Sections on training: learning rates, curves, forgetting, cost.

use super::{cell, exact, figure, key, methods, plot, table, words};
use crate::claims::report::{Forgetting, Interval, Method, Report};
use maud::{Markup, html};

/// Size of a plot.
const WIDE: [f64; 2] = [520.0, 320.0];
/// Size of one of several side by side.
const SMALL: [f64; 2] = [345.0, 250.0];
/// Colours of learners, in order of appearance.
const LEARNERS: [&str; 6] = ["full", "shared-lora", "routed", "hywu", "oracle", "none"];

/// Learning rates and curves.
pub(super) fn training(report: &Report) -> Option<Markup> {
    if report.sweep.is_empty() && report.curves.is_empty() {
        return None;
    }
    let tried: Vec<Method> = report
        .methods
        .iter()
        .map(|m| m.method)
        .filter(|m| report.sweep.iter().any(|s| s.method == *m))
        .collect();
    let sweep: Vec<plot::Series> = tried
        .iter()
        .map(|&method| {
            let own: Vec<_> =
                report.sweep.iter().filter(|s| s.method == method && s.loss.is_some()).collect();
            plot::Series {
                label: words::label(report, method).into(),
                class: method.name().into(),
                points: own.iter().filter_map(|s| Some((f64::from(s.lr), exact(s.loss?)))).collect(),
                marked: own.iter().position(|s| s.chosen),
            }
        })
        .collect();
    let curves: Vec<plot::Series> = report
        .curves
        .iter()
        .map(|c| plot::Series {
            label: format!("{}, seed {}", words::label(report, c.method), c.seed),
            class: c.method.name().into(),
            points: c.points.iter().map(|(step, loss)| (*step as f64, exact(*loss))).collect(),
            marked: None,
        })
        .collect();
    let rates = plot::Axes { x: "peak learning rate", y: "validation loss", log_x: true, log_y: false };
    let steps = plot::Axes { x: "step", y: "training loss", log_x: false, log_y: true };
    Some(html! {
        (methods(report))
        div.beside {
            @if !sweep.is_empty() {
                (figure(plot::lines("learning rates", &rates, WIDE, &sweep),
                    "Every method's learning rate was chosen by the loss on validation photos after a shorter training with the first seed; the ring is the chosen one. A rate that broke off has no point."))
            }
            @if !curves.is_empty() {
                (figure(plot::lines("training losses", &steps, WIDE, &curves), "Training loss of every method and seed."))
            }
        }
        @if !report.sweep.is_empty() {
            details { summary { "Learning rates in numbers" }
                (table(&["method", "peak rate", "steps", "validation loss", "taken"], report.sweep.iter().map(|s| html! {
                    td { (words::label(report, s.method)) } td { (format!("{:.1e}", s.lr)) } td { (s.steps) }
                    td { @if let Some(loss) = s.loss { (format!("{loss:.5}")) } @else { "broke off" } }
                    td { @if s.chosen { "yes" } }
                })))
            }
        }
    })
}

/// Groups of skills, one after the other.
pub(super) fn forgetting(report: &Report) -> Option<Markup> {
    let f = report.forgetting.as_ref()?;
    let mut learners: Vec<&str> = Vec::new();
    for row in &f.rows {
        if !learners.contains(&row.learner.as_str()) {
            learners.push(&row.learner);
        }
    }
    let colour = |k: usize| LEARNERS[k % LEARNERS.len()];
    let axes = plot::Axes { x: "group learnt last", y: "PSNR in dB", log_x: false, log_y: false };
    Some(html! {
        p { "Groups of skills are learnt one after the other, each without the data of those before. A line that falls after its group was taught is forgetting." }
        @if !f.lost.is_empty() {
            (table(&["learner", "lost on earlier groups after the last, dB", "all groups after the last, dB"], f.lost.iter().map(|(learner, lost)| html! {
                td { (learner) } (cell(lost, 2, false)) @match f.end.get(learner) { Some(end) => (cell(end, 1, false)), None => td {} }
            })))
        }
        (key(learners.iter().enumerate().map(|(k, name)| (colour(k), *name))))
        div.beside {
            @for (group, skills) in f.groups.iter().enumerate() {
                @let series: Vec<plot::Series> = learners.iter().enumerate().map(|(k, l)| line_of(f, group, l, colour(k))).collect();
                (figure(plot::lines("PSNR of a group over the stages", &axes, SMALL, &series), &format!("Group {group}: {}.", words::list(skills))))
            }
        }
    })
}

/// A learner on a group, stage by stage.
fn line_of(f: &Forgetting, group: usize, learner: &str, colour: &str) -> plot::Series {
    let mut points: Vec<(f64, Interval)> = f
        .rows
        .iter()
        .filter(|r| r.group == group && r.learner == learner)
        .map(|r| (r.stage as f64, r.psnr))
        .collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    plot::Series { label: learner.into(), class: colour.into(), points, marked: None }
}

/// Parameters, seconds and memory.
pub(super) fn cost(report: &Report) -> Option<Markup> {
    if report.cost.is_empty() {
        return None;
    }
    let mb = |v: Option<f64>| v.map_or("-".to_owned(), |v| format!("{v:.0}"));
    let rank = |method: Method| {
        let found = report.methods.iter().find(|m| m.method == method);
        found.and_then(|m| m.rank).map_or("-".to_owned(), |r| r.to_string())
    };
    Some(html! {
        p { "Mean over seeds, on " (report.setup.device) "." }
        (table(
            &["method", "rank", "trained weights", "training, s", "adapter, ms an edit", "sampling, ms an edit", "memory in training, MB", "memory in an edit, MB"],
            report.cost.iter().map(|c| html! {
                td { (words::label(report, c.method)) } td { (rank(c.method)) } td { (thousands(c.parameters)) }
                td { (format!("{:.0}", c.training_seconds)) } td { (format!("{:.1}", c.adapter_ms)) } td { (format!("{:.0}", c.edit_ms)) }
                td { (mb(c.training_mb)) } td { (mb(c.edit_mb)) }
            }),
        ))
    })
}

/// "1,234,567".
fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::thousands;

    #[test]
    fn thousands_are_set_apart() {
        let shown = [7, 999, 1000, 1_234_567].map(thousands);
        assert_eq!(shown, ["7", "999", "1,000", "1,234,567"]);
    }
}
