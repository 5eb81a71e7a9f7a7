//! What the numbers say, in sentences that follow from them.

use crate::claims::report::{Condition, GainRow, Interval, Method, Metric, Report};
use maud::{Markup, html};

/// How a difference stands to zero, by its interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The whole interval is above.
    Better,
    /// Zero is inside.
    Open,
    /// The whole interval is below.
    Worse,
}

/// The verdict on a difference.
pub(super) fn verdict(difference: &Interval) -> Verdict {
    if difference.lo > 0.0 {
        Verdict::Better
    } else if difference.hi < 0.0 {
        Verdict::Worse
    } else {
        Verdict::Open
    }
}

/// Methods with one weight set for all instances.
pub(super) const SHARED: [Method; 3] = [Method::SharedLora, Method::WideLora, Method::Full];

/// "1.50 (1.20 to 1.80)".
pub(super) fn with_range(v: &Interval, digits: usize) -> String {
    format!("{:.digits$} ({:.digits$} to {:.digits$})", v.mean, v.lo, v.hi)
}

fn percent(v: &Interval) -> String {
    format!("{:.0} % ({:.0} to {:.0} %)", v.mean * 100.0, v.lo * 100.0, v.hi * 100.0)
}

/// With a capital letter in front.
fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}

/// "a, b and c".
pub(super) fn list(items: &[String]) -> String {
    match items {
        [] => "none".into(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// The name of a method for people.
pub(super) fn label(report: &Report, method: Method) -> &str {
    report.methods.iter().find(|m| m.method == method).map_or("?", |m| m.label.as_str())
}

/// HY-WU's gain over a method on all skills together, or on one.
pub(super) fn gain<'a>(report: &'a Report, against: Method, skill: Option<&str>) -> Option<&'a GainRow> {
    report.quality.gains.iter().find(|g| g.against == against && g.skill.as_deref() == skill)
}

/// The hidden amounts that adapters tell better than the mean does, or the others: "sigma of denoise (R² 0.91)".
fn hidden(report: &Report, told: bool) -> Vec<String> {
    let chosen = report.hidden.iter().filter(|h| (h.r2.lo > 0.0) == told);
    chosen.map(|h| format!("{} of {} (R² {:.2})", h.amount, h.skill, h.r2.mean)).collect()
}

/// One sentence: does HY-WU beat the shared weights?
pub(super) fn lead(report: &Report) -> String {
    let of = |wanted: Verdict| -> Vec<String> {
        let gains = SHARED.iter().filter_map(|&m| Some((m, gain(report, m, None)?)));
        gains.filter(|(_, g)| verdict(&g.gain) == wanted).map(|(m, _)| label(report, m).to_owned()).collect()
    };
    let (better, open, worse) = (of(Verdict::Better), of(Verdict::Open), of(Verdict::Worse));
    match (better.is_empty(), open.is_empty(), worse.is_empty()) {
        (true, true, true) => "HY-WU was not compared with shared weights.".into(),
        (false, true, true) => "On these skills HY-WU edits better than every shared set of weights.".into(),
        (true, true, false) => "On these skills HY-WU edits worse than every shared set of weights.".into(),
        (true, false, true) => {
            "On these skills no difference between HY-WU and shared weights can be told.".into()
        }
        _ => {
            let part =
                |names: &[String], how: &str| (!names.is_empty()).then(|| format!("{how} {}", list(names)));
            let parts = [
                part(&better, "better than"),
                part(&open, "not clearly different from"),
                part(&worse, "worse than"),
            ];
            format!(
                "On these skills HY-WU edits {}.",
                parts.into_iter().flatten().collect::<Vec<_>>().join("; ")
            )
        }
    }
}

/// The sentences below the first.
pub(super) fn findings(report: &Report) -> Vec<String> {
    let mut said = Vec::new();
    for row in report.quality.gains.iter().filter(|g| g.skill.is_none()) {
        let (name, size) = (label(report, row.against), row.gain.mean.abs());
        let range = format!("{:+.2} to {:+.2}", row.gain.lo, row.gain.hi);
        said.push(match verdict(&row.gain) {
            Verdict::Better => format!("HY-WU is {size:.2} dB above {name} ({range})."),
            Verdict::Worse => format!("HY-WU is {size:.2} dB below {name} ({range})."),
            Verdict::Open => format!("HY-WU and {name} are level: {:+.2} dB ({range}).", row.gain.mean),
        });
    }
    let s = &report.summary;
    if let Some(rate) = &s.hywu_win_rate {
        said.push(format!(
            "Its edit is better by more than 0.1 dB in {} of the pairs with shared weights.",
            percent(rate)
        ));
    }
    if let Some(cosine) = &s.conflict_cosine {
        let how = match verdict(cosine) {
            Verdict::Worse => "Contradicting skills pull shared weights in opposite directions",
            Verdict::Open => {
                "Contradicting skills neither clearly help nor hinder each other in shared weights"
            }
            Verdict::Better => "Contradicting skills pull shared weights in the same direction",
        };
        said.push(format!("{how}: the cosine of their gradients is {}.", with_range(cosine, 2)));
    }
    for (loss, whose) in [
        (&s.shuffled_loss_db, "the adapter of an instance of another skill"),
        (&s.averaged_loss_db, "the mean adapter"),
    ] {
        if let Some(loss) = loss {
            said.push(match verdict(loss) {
                Verdict::Better => format!("With {whose} it loses {} dB.", with_range(loss, 2)),
                Verdict::Open => {
                    format!("With {whose} it loses nothing that could be told: {} dB.", with_range(loss, 2))
                }
                Verdict::Worse => format!("With {whose} it gains {:.2} dB.", -loss.mean),
            });
        }
    }
    let of = |wanted| report.condition.iter().find(|v| v.condition == wanted);
    if let Some(other) = of(Condition::OtherPhoto) {
        said.push(match verdict(&other.loss) {
            Verdict::Better => format!(
                "The adapter is of the instance, not only of the task: that of another photo with the same skill costs {} dB.",
                with_range(&other.loss, 2)
            ),
            _ => format!(
                "The adapter of another photo with the same skill does as well ({} dB lost): here it knows the task, not the instance.",
                with_range(&other.loss, 2)
            ),
        });
    }
    if let Some(near) = &report.structure {
        said.push(format!(
            "The adapter nearest to an adapter is of the same skill in {:.0} % of all cases (by chance {:.0} %).",
            near.nearest * 100.0,
            near.chance * 100.0
        ));
    }
    let told = hidden(report, true);
    if !told.is_empty() {
        said.push(format!(
            "Asked in the same words, adapters tell what only the picture shows: {}.",
            list(&told)
        ));
    }
    if let Some(lost) = &s.forgetting_db {
        said.push(format!(
            "Where it grows by a generator for each group of new skills, it has lost {} dB on the earlier ones after all of them.",
            with_range(lost, 2)
        ));
    }
    if let Some(right) = &s.phrasing_accuracy {
        said.push(format!(
            "It takes {} of the instructions that it never read for the right skill.",
            percent(right)
        ));
    }
    said
}

/// Where HY-WU does not win: methods, skills and metrics that are level with it or ahead.
pub(super) fn limits(report: &Report) -> Vec<String> {
    let mut said = Vec::new();
    for against in
        report.methods.iter().map(|m| m.method).filter(|m| !matches!(m, Method::Hywu | Method::None))
    {
        let of = |wanted: Verdict| -> Vec<String> {
            let own =
                report.quality.gains.iter().filter(|g| g.against == against && verdict(&g.gain) == wanted);
            own.filter_map(|g| Some(format!("{} ({:+.1} dB)", g.skill.as_ref()?, g.gain.mean))).collect()
        };
        let (worse, open) = (of(Verdict::Worse), of(Verdict::Open));
        let name = label(report, against);
        if !worse.is_empty() {
            said.push(format!("{name} is ahead on {}.", list(&worse)));
        }
        if !open.is_empty() {
            said.push(format!("No difference from {name} can be told on {}.", list(&open)));
        }
    }
    let silent = hidden(report, false);
    if !silent.is_empty() {
        said.push(format!("Its adapters don't clearly tell {}.", list(&silent)));
    }
    let metrics = report.quality.wins.iter().filter(|w| w.metric != Metric::Psnr && w.bad.mean > w.good.mean);
    for row in metrics {
        let by = if row.metric == Metric::Ssim { "SSIM" } else { "perceptual distance" };
        said.push(format!(
            "By {by}, {} has the better edit more often: {:.0} % against {:.0} %.",
            label(report, row.against),
            row.bad.mean * 100.0,
            row.good.mean * 100.0
        ));
    }
    said
}

/// What the project set out to reach, and whether it did. An aim is met when the mean meets it; an interval that is not apart from zero
/// meets nothing.
pub(super) fn aims(report: &Report) -> Vec<(&'static str, String, bool)> {
    let s = &report.summary;
    let least =
        |v: Option<Interval>, least: f64| v.map(|v| (with_range(&v, 2), v.mean >= least && v.lo > 0.0));
    let share = |v: Option<Interval>, least: f64| v.map(|v| (percent(&v), v.mean >= least));
    let rows = [
        ("at least 1.5 dB above the better shared LoRA", least(s.hywu_vs_shared_lora_db, 1.5)),
        ("at least 1.5 dB above full fine-tuning", least(s.hywu_vs_full_db, 1.5)),
        ("at least 75 % of the pairs with shared weights won", share(s.hywu_win_rate, 0.75)),
        ("at least 3 dB lost with the adapter of another skill", least(s.shuffled_loss_db, 3.0)),
        ("at least 3 dB lost with the mean adapter", least(s.averaged_loss_db, 3.0)),
        (
            "at most 0.3 dB lost on earlier skills after all groups",
            s.forgetting_db.map(|v| (with_range(&v, 2), v.mean <= 0.3)),
        ),
        ("at least 95 % of new phrasings taken for the right skill", share(s.phrasing_accuracy, 0.95)),
    ];
    rows.into_iter().filter_map(|(aim, found)| found.map(|(text, met)| (aim, text, met))).collect()
}

/// The box on top of the page.
pub(super) fn answer(report: &Report) -> Markup {
    let limits = limits(report);
    html! {
        div.answer {
            p.lead { (lead(report)) }
            ul { @for found in findings(report) { li { (sentence(&found)) } } }
            h3 { "Where HY-WU does not win" }
            @if report.quality.gains.is_empty() {
                p { "That was not measured." }
            } @else if limits.is_empty() {
                p { "On every skill, against every trained method, the interval of its gain is above zero." }
            } @else {
                ul { @for limit in limits { li { (sentence(&limit)) } } }
            }
        }
    }
}
